"""The exact keys of the best candidates of every own class, and how new candidates enter.

The exact cosine of two classes is the float64 sum of the products of their float32 unit rows, rounded to float32:
it depends neither on the shape of a block nor on the number of ranks.
"""

import warnings

import torch
from torch import Tensor

from instance_ssl.classifier.tie_breaking import LOWEST_KEY, pack_pairs, pack_scores, unpack_scores

# Rows whose keys are taken apart at once: 26 MB for K = 100.
ROWS_AT_ONCE = 8192


class HardTable:
    """At most `capacity` candidates a row in any order; a full row is cut back to its best K.

    Attributes:
        keys_nC: (n, C) packed exact cosines and ids; the places from `filled_n` on are empty.
        bounds_n: (n,) exact cosine that the K-th best reaches for certain; -inf when nothing is known.
    """

    def __init__(self, num_rows: int, num_hard_classes: int, num_classes: int, device: torch.device) -> None:
        self.k = num_hard_classes
        self.capacity = min(2 * num_hard_classes, num_classes)
        self.keys_nC = torch.full((num_rows, self.capacity), LOWEST_KEY, dtype=torch.int64, device=device)
        self.filled_n = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.bounds_n = torch.full((num_rows,), -torch.inf, device=device)

    def add_pairs(self, first_row: int, num_rows: int, rows_P: Tensor, keys_P: Tensor) -> None:
        """Enters candidates of the rows from `first_row` on; `rows_P` counts from there and ascends.

        Raises the bounds of rows that had to be cut back.
        """
        while True:
            counts = torch.bincount(rows_P, minlength=num_rows)
            firsts = counts.cumsum(0) - counts
            filled = self.filled_n[first_row : first_row + num_rows]
            places_P = (filled - firsts)[rows_P] + torch.arange(len(rows_P), device=rows_P.device)
            fits_P = places_P < self.capacity
            if bool(fits_P.all()):
                self.keys_nC[first_row + rows_P, places_P] = keys_P
                filled += counts
                return
            fit_rows_P, rest_P = rows_P[fits_P], ~fits_P
            self.keys_nC[first_row + fit_rows_P, places_P[fits_P]] = keys_P[fits_P]
            filled += torch.bincount(fit_rows_P, minlength=num_rows)
            self._cut_back(first_row + torch.unique_consecutive(rows_P[rest_P]))
            rows_P, keys_P = rows_P[rest_P], keys_P[rest_P]

    def add_block(self, rows: slice, keys_qm: Tensor) -> None:
        """Enters a dense block of keys: all candidates of a range of rows."""
        merged = torch.cat([self.keys_nC[rows], keys_qm], dim=1)
        self._keep(rows, torch.topk(merged, self.k, dim=1, sorted=False).values)

    def ids(self) -> Tensor:
        """(n, K) int32 ids, hardest first."""
        ids_nK = torch.empty(len(self.keys_nC), self.k, dtype=torch.int32, device=self.keys_nC.device)
        for first in range(0, len(ids_nK), ROWS_AT_ONCE):  # of all rows, the keys apart would be larger than W
            best = torch.topk(self.keys_nC[first : first + ROWS_AT_ONCE], self.k, dim=1).values
            ids_nK[first : first + ROWS_AT_ONCE] = unpack_scores(best)[1]
        return ids_nK

    def _cut_back(self, rows: Tensor) -> None:
        self._keep(rows, torch.topk(self.keys_nC[rows], self.k, dim=1, sorted=False).values)

    def _keep(self, rows: Tensor | slice, best_qK: Tensor) -> None:
        self.keys_nC[rows, : self.k] = best_qK
        self.keys_nC[rows, self.k :] = LOWEST_KEY
        kth_q = best_qK.amin(dim=1)
        filled_q = (best_qK != LOWEST_KEY).sum(dim=1)
        self.filled_n[rows] = filled_q
        bounds_q = torch.where(filled_q == self.k, unpack_scores(kth_q)[0], -torch.inf)
        self.bounds_n[rows] = torch.maximum(self.bounds_n[rows], bounds_q)


def pair_keys(query_qD: Tensor, class_mD: Tensor, rows_P: Tensor, columns_P: Tensor, first_class: int) -> Tensor:
    """Keys (P,) of the exact cosines of some pairs of unit rows, given in float64; `rows_P` ascends.

    A product of two dense matrices taken only where a sparse one has entries: no row is copied.
    """
    counts = torch.bincount(rows_P, minlength=len(query_qD))
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values = torch.zeros(len(rows_P), dtype=torch.float64, device=rows_P.device)
    with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
        warnings.simplefilter("ignore", UserWarning)
        pattern = torch.sparse_csr_tensor(
            starts, columns_P, values, (len(query_qD), len(class_mD)), check_invariants=False
        )
    cosine_P = torch.sparse.sampled_addmm(pattern, query_qD, class_mD.T, beta=0.0).values().float()
    return pack_pairs(cosine_P, first_class + columns_P)


def block_keys(query_qD: Tensor, class_mD: Tensor, first_query: int, first_class: int) -> Tensor:
    """Keys (q, m) of the exact cosines of all pairs of unit rows, given in float64; own cosines order below all."""
    keys_qm = pack_scores((query_qD @ class_mD.T).float(), first_class)
    both = range(max(first_query, first_class), min(first_query + keys_qm.shape[0], first_class + keys_qm.shape[1]))
    ids = torch.arange(both.start, max(both.start, both.stop), device=keys_qm.device)
    keys_qm[ids - first_query, ids - first_class] = LOWEST_KEY
    return keys_qm
