"""The same maths as `cosine_softmax` and `hard_classes`, dense, slow and obvious: the truth that tests compare with."""

import torch
from torch import Tensor

from instance_ssl.classifier.cosine_softmax import LossForm


def dense_labels(labels_B: Tensor, hard_BK: Tensor | None, smoothing_factor: float, num_instances: int) -> Tensor:
    """Eq. 2 as a dense (B, N) float64 tensor."""
    y_BN = torch.zeros(labels_B.shape[0], num_instances, dtype=torch.float64)
    if hard_BK is None or smoothing_factor == 0:
        return y_BN.scatter_(1, labels_B[:, None], 1.0)
    y_BN.scatter_(1, hard_BK.long(), smoothing_factor / hard_BK.shape[1])
    return y_BN.scatter_(1, labels_B[:, None], 1 - smoothing_factor)


def dense_loss(x_BD: Tensor, weight_ND: Tensor, y_BN: Tensor, temperature: float, form: LossForm) -> Tensor:
    """Eq. 3 (`mixture`; with one-hot y it is Eq. 1) or the usual smoothed cross entropy; differentiable."""
    unit_x_BD = x_BD / torch.linalg.vector_norm(x_BD, dim=1, keepdim=True)
    unit_w_ND = weight_ND / torch.linalg.vector_norm(weight_ND, dim=1, keepdim=True)
    s_BN = unit_x_BD @ unit_w_ND.T / temperature
    log_z_B = torch.logsumexp(s_BN, dim=1)
    if form == "mixture":
        return (log_z_B - torch.logsumexp(s_BN + y_BN.to(s_BN.dtype).log(), dim=1)).mean()
    return (log_z_B - (y_BN.to(s_BN.dtype) * s_BN).sum(dim=1)).mean()


def dense_hard_classes(weight_ND: Tensor, num_hard_classes: int) -> Tensor:
    """(N, K) most similar other classes of every class, hardest first, ties by the lower id: sorts all N x N."""
    unit_w_ND = weight_ND / torch.linalg.vector_norm(weight_ND, dim=1, keepdim=True)
    cosine_NN = unit_w_ND @ unit_w_ND.T
    cosine_NN.fill_diagonal_(-torch.inf)
    return torch.sort(cosine_NN, dim=1, descending=True, stable=True).indices[:, :num_hard_classes].int()
