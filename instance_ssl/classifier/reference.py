"""The dense twin of `softmax` and `hard_classes`: slow and obvious, the truth that tests compare with."""

import torch
from torch import Tensor

from instance_ssl.config.choices import LossForm


def dense_labels(labels_B: Tensor, hard_BK: Tensor | None, smoothing_factor: float, num_instances: int) -> Tensor:
    """Eq. 2 as a dense (B, N) float64 tensor; -1 among the hardest classes stands for none."""
    y_BN = torch.zeros(labels_B.shape[0], num_instances, dtype=torch.float64)
    if hard_BK is None or smoothing_factor == 0:
        return y_BN.scatter_(1, labels_B[:, None], 1.0)
    for y_N, label, hard_K in zip(y_BN, labels_B.tolist(), hard_BK.tolist(), strict=True):
        there = [class_ for class_ in hard_K if class_ >= 0]
        y_N[there] = smoothing_factor / max(1, len(there))
        y_N[label] = 1 - smoothing_factor if there else 1.0
    return y_BN


def dense_loss(x_BD: Tensor, weight_ND: Tensor, y_BN: Tensor, temperature: float, form: LossForm) -> Tensor:
    """Eq. 3 (`mixture`; with one-hot y it is Eq. 1) or the usual smoothed cross entropy; differentiable."""
    unit_x_BD, unit_w_ND = _unit(x_BD), _unit(weight_ND)
    s_BN = unit_x_BD @ unit_w_ND.T / temperature
    log_z_B = torch.logsumexp(s_BN, dim=1)
    if form == "mixture":
        return (log_z_B - torch.logsumexp(s_BN + y_BN.to(s_BN.dtype).log(), dim=1)).mean()
    return (log_z_B - (y_BN.to(s_BN.dtype) * s_BN).sum(dim=1)).mean()


def dense_hard_classes(weight_ND: Tensor, num_hard_classes: int) -> Tensor:
    """(N, K) most similar other classes of every class, hardest first, ties by the lower id: sorts all N x N.

    Classes whose rows are not finite are excluded and have none; -1 fills rows with too few classes.
    """
    is_finite_N = weight_ND.isfinite().all(dim=1)
    unit_w_ND = _unit(weight_ND.where(is_finite_N[:, None], 1))
    cosine_NN = unit_w_ND @ unit_w_ND.T
    cosine_NN.fill_diagonal_(-torch.inf)
    cosine_NN[~is_finite_N] = -torch.inf
    cosine_NN[:, ~is_finite_N] = -torch.inf
    cosines_NN, ids_NN = torch.sort(cosine_NN, dim=1, descending=True, stable=True)
    return ids_NN.where(cosines_NN > -torch.inf, -1)[:, :num_hard_classes].int()


def _unit(rows_mD: Tensor) -> Tensor:
    """Rows of length 1; divided by their largest number first, so that no square overflows or underflows."""
    scaled_mD = rows_mD / rows_mD.detach().abs().amax(dim=1, keepdim=True)
    return scaled_mD / torch.linalg.vector_norm(scaled_mD, dim=1, keepdim=True)
