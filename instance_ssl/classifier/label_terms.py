"""Terms of the softmax for the entries of y, K + 1 a row of the batch, apart from the products over all classes.

They are exact whatever the precision of those products, and are computed for many blocks at once.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from instance_ssl.classifier.softmax import SmoothedLabels, SoftmaxOptions, SoftmaxSums, inverse_norms


@dataclass(frozen=True)
class _EntryTerms:
    """Some entries of y and their exact terms of the softmax.

    Attributes:
        rows: (p,) int64.
        values: (p,) y_ij.
        unit_pD: (p, D) ŵ_j.
        logits: (p,) s_ij.
        exp: (p,) exp(s_ij).
    """

    rows: Tensor
    values: Tensor
    unit_pD: Tensor
    logits: Tensor
    exp: Tensor

    def sums(self, values_p: Tensor, num_rows: int) -> Tensor:
        """Σ_j values_j ŵ_j over each row's entries, (B, D); entries ascend by row."""
        row_starts = torch.searchsorted(self.rows, torch.arange(num_rows + 1, device=self.rows.device))
        columns = torch.arange(len(values_p), device=values_p.device)
        return _sparse_matrix(row_starts, columns, values_p, num_rows, len(values_p)) @ self.unit_pD


def _entry_terms(
    labels: SmoothedLabels, weight_nD: Tensor, unit_x_BD: Tensor, options: SoftmaxOptions, at_once: int
) -> Iterator[_EntryTerms]:
    """Entries of y in the order of `labels`, `at_once` at a time."""
    split = zip(labels.rows.split(at_once), labels.classes.split(at_once), labels.values.split(at_once), strict=True)
    for rows_p, classes_p, values_p in split:
        unit_pD = weight_nD.index_select(0, classes_p).to(unit_x_BD.dtype)
        unit_pD.mul_(inverse_norms(unit_pD))
        # One entry a row of a sparse matrix, in the column of its row of the batch: that product alone is computed.
        row_starts = torch.arange(len(rows_p) + 1, device=rows_p.device)
        places = _sparse_matrix(row_starts, rows_p, values_p, len(rows_p), len(unit_x_BD))
        logit_p = torch.sparse.sampled_addmm(places, unit_pD, unit_x_BD.T, beta=0.0, alpha=1 / options.temperature)
        yield _EntryTerms(rows_p, values_p, unit_pD, logit_p.values(), logit_p.values().exp())


def entry_sums(
    labels: SmoothedLabels, weight_nD: Tensor, unit_x_BD: Tensor, options: SoftmaxOptions, at_once: int
) -> SoftmaxSums:
    """Sums over the entries of y alone.

    Z and Y, and A and C, share the very same terms, so that their errors cancel where a row knows its class.
    """
    num_rows, mixture = len(unit_x_BD), options.form == "mixture"
    shape, exp_P = unit_x_BD.shape, unit_x_BD.new_empty(len(labels.rows))
    z_B, y_B = unit_x_BD.new_zeros(2, num_rows)
    sums = SoftmaxSums(z_B, y_B, unit_x_BD.new_zeros(shape), unit_x_BD.new_zeros(shape), exp_P)
    order_P = _argsort(labels.rows)
    by_row = SmoothedLabels(labels.rows[order_P], labels.classes[order_P], labels.values[order_P])
    first = 0
    for part in _entry_terms(by_row, weight_nD, unit_x_BD, options, at_once):
        exp_P.index_copy_(0, order_P[first : first + len(part.exp)], part.exp)
        first += len(part.exp)
        weight_p = part.values * part.exp if mixture else part.values
        sums.z_B.index_add_(0, part.rows, part.exp)
        sums.y_B.index_add_(0, part.rows, weight_p if mixture else weight_p * part.logits)
        sums.dense_BD.add_(part.sums(part.exp, num_rows))
        sums.sparse_BD.add_(part.sums(weight_p, num_rows))
    return sums


def entry_exp(
    labels: SmoothedLabels, weight_nD: Tensor, unit_x_BD: Tensor, options: SoftmaxOptions, at_once: int
) -> Tensor:
    """exp(s_ij) of each entry of y, (P,): from the first pass if it kept them, otherwise computed."""
    if labels.exp is not None:
        return labels.exp
    return torch.cat([part.exp for part in _entry_terms(labels, weight_nD, unit_x_BD, options, at_once)])


def gradient_terms(z_B: Tensor, y_B: Tensor, labels: SmoothedLabels, options: SoftmaxOptions) -> Tensor:
    """Z_i (p_ij - q_ij) of each entry of y, in the order of `labels`.

    Put in the place of Z_i p_ij in a block, they make one product serve the dense and the sparse part.
    """
    exp_P = labels.exp
    assert exp_P is not None
    zq_P = labels.values * z_B[labels.rows]
    if options.form == "mixture":
        zq_P.mul_(exp_P).div_(y_B[labels.rows])
    return exp_P - zq_P


def _sparse_matrix(row_starts: Tensor, columns_p: Tensor, values_p: Tensor, rows: int, columns: int) -> Tensor:
    with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(row_starts, columns_p, values_p, (rows, columns), check_invariants=False)


def _argsort(keys_P: Tensor) -> Tensor:
    """Ascending order; on a CPU by NumPy, whose vectorised sort is four times as fast as torch's."""
    return torch.from_numpy(keys_P.numpy().argsort()) if keys_P.device.type == "cpu" else keys_P.argsort()
