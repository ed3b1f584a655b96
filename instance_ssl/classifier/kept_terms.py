"""exp(s) of a step's first classes, kept from the first pass over the shard to the second."""

import torch
from torch import Tensor


class KeptTerms:
    """A budget's worth of the terms exp(s_ij), so that the second pass need not compute them again.

    A quarter of a step's arithmetic, for memory that grows with B n where all else does not: worth it where N is small
    (a JSON's `keep_mib`, none by default). The classes beyond the budget are computed twice as ever.

    Args:
        num_bytes: the budget.
        num_rows: B, rows of the whole optimizer step.
        num_classes: n, own classes.
        dtype: of the matrix products, in which the terms are factors.

    Attributes:
        shape: (B, n), what it was made for.
    """

    def __init__(
        self, num_bytes: int, num_rows: int, num_classes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = (num_rows, num_classes)
        self._num_kept = kept_classes(num_bytes, num_rows, num_classes, dtype)
        self._terms = torch.empty(self._num_kept * num_rows, dtype=dtype, device=device)
        self._inverse_norms = torch.empty(
            self._num_kept, 1, dtype=torch.promote_types(dtype, torch.float32), device=device
        )

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Where classes start … stop - 1 have their terms (B, m), and the 1/‖w‖ that these are with (m, 1).

        None where the budget does not reach.
        """
        num_rows, _ = self.shape
        if stop > self._num_kept:
            return None
        terms_Bm = self._terms[start * num_rows : stop * num_rows].view(num_rows, stop - start)
        return terms_Bm, self._inverse_norms[start:stop]


def kept_classes(num_bytes: int, num_rows: int, num_classes: int, dtype: torch.dtype) -> int:
    """Own classes whose terms fit into the budget."""
    return min(num_classes, num_bytes // (num_rows * dtype.itemsize))
