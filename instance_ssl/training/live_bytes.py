"""Counts the bytes of live tensors, operation by operation."""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, counts storages that operations allocate and release, on real and on fake tensors.

    Memory that an operation allocates and releases inside itself is not seen.

    Args:
        known: tensors that existed before and do not count.
        skips: whether to skip an in-place or out= operation, given it and its arguments; its output stays as it is.

    Attributes:
        live: bytes now.
        peak: the most bytes since the start, or since `peak` was last assigned.
    """

    def __init__(self, known: list[Tensor], skips: Callable[[Any, Any], bool] = lambda func, args: False) -> None:
        super().__init__()
        self._skips = skips
        self.live = self.peak = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = kwargs.get("out", args[0]) if self._skips(func, args) else func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                for part in _dense_parts(value):
                    self._add(part.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._storages:
            return
        self._storages.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


def _dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.layout == torch.sparse_csr:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    else:
        yield tensor
