"""SimCLR, MoCo v2 and InstDisc on the same backbone, built from lightly's parts.

Losses, heads, queue and momentum encoder are lightly's (`benchmark` extra; github.com/lightly-ai/lightly, 1.6). lightly
has no InstDisc: here it is lightly's memory bank with a row per image, moved half of the way to the new embedding, and
the non-parametric softmax over all rows (Wu et al. 2018, arXiv:1805.01978, Eq. 2; their NCE approximates it).
"""

import copy
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from instance_ssl.errors import UserError

PeerName = Literal["simclr", "moco_v2", "instdisc"]
PEERS: tuple[PeerName, ...] = get_args(PeerName)

_KEY_MOMENTUM = 0.99  # of MoCo's key encoder on CIFAR (MoCo's notebook, lightly's cifar10_benchmark)
_BANK_MOMENTUM = 0.5  # Wu et al., section 3.4


class Peer(nn.Module):
    """A method around a backbone; `forward(views (b, 2, 3, S, S), ids (b,))` returns the loss of a batch, a scalar.

    Every method uses both views as queries, so that all learn from equally many views per epoch.

    Attributes:
        backbone: images (b, 3, S, S) → features (b, F), the part that is evaluated.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def after_step(self) -> None:
        """Called after each optimizer step."""


class SimClr(Peer):
    """Chen et al. 2020 (arXiv:2002.05709): every other view of the batch is a negative."""

    def __init__(self, backbone: nn.Module, feature_dim: int, embedding_dim: int, temperature: float) -> None:
        loss, modules, _ = _lightly()
        super().__init__(backbone)
        self.head = modules.SimCLRProjectionHead(feature_dim, feature_dim, embedding_dim)
        self.loss = loss.NTXentLoss(temperature)

    def forward(self, views: Tensor, _: Tensor) -> Tensor:
        """NT-Xent of the two views."""
        first, second = (self.head(self.backbone(views[:, view])).float() for view in (0, 1))
        return self.loss(first, second)


class MoCo(Peer):
    """Chen et al. 2020 (arXiv:2003.04297), symmetric as in lightly's CIFAR-10 benchmark: a queue of keys as negatives.

    Args:
        queue: number of keys in the queue.
    """

    def __init__(
        self, backbone: nn.Module, feature_dim: int, embedding_dim: int, temperature: float, queue: int
    ) -> None:
        loss, modules, utils = _lightly()
        super().__init__(backbone)
        self.head = modules.MoCoProjectionHead(feature_dim, feature_dim, embedding_dim)
        self.key_backbone, self.key_head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        self._update: Callable[..., None] = utils.update_momentum
        for module in (self.key_backbone, self.key_head):
            utils.deactivate_requires_grad(module)
        self.loss = loss.NTXentLoss(temperature, memory_bank_size=(queue, embedding_dim))

    def forward(self, views: Tensor, _: Tensor) -> Tensor:
        """InfoNCE of each view against the other's key and the queue."""
        self._update(self.backbone, self.key_backbone, m=_KEY_MOMENTUM)
        self._update(self.head, self.key_head, m=_KEY_MOMENTUM)
        losses = []
        for query, key in ((0, 1), (1, 0)):
            with torch.no_grad():
                key_bD = self.key_head(self.key_backbone(views[:, key])).float()
            losses.append(self.loss(self.head(self.backbone(views[:, query])).float(), key_bD))
        return 0.5 * (losses[0] + losses[1])


class InstDisc(Peer):
    """Wu et al. 2018: a softmax over a bank with one row for every image, and a linear head.

    Args:
        num_instances: N.
    """

    def __init__(
        self, backbone: nn.Module, feature_dim: int, embedding_dim: int, temperature: float, num_instances: int
    ) -> None:
        _, modules, _ = _lightly()
        super().__init__(backbone)
        self.head = nn.Linear(feature_dim, embedding_dim)
        bank = modules.memory_bank.MemoryBankModule((num_instances, embedding_dim), feature_dim_first=False)
        self.memory = bank
        self._temperature = temperature
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, views: Tensor, ids: Tensor) -> Tensor:
        """Cross entropy of both views against all rows of the bank."""
        unit_2bD = functional.normalize(self.head(self.backbone(views.transpose(0, 1).flatten(0, 1))).float(), dim=1)
        _, bank_ND = self.memory(unit_2bD)  # a copy: `after_step` changes the rows
        self._seen = [(ids, part.detach()) for part in unit_2bD.chunk(2)]
        return functional.cross_entropy(unit_2bD @ bank_ND.T / self._temperature, ids.repeat(2))

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the batch's rows half of the way to each view in turn."""
        for ids, unit_bD in self._seen:
            moved = _BANK_MOMENTUM * self.memory.bank[ids] + (1 - _BANK_MOMENTUM) * unit_bD
            self.memory.bank[ids] = functional.normalize(moved, dim=1)
        self._seen = []


def build_peer(
    name: PeerName,
    backbone: nn.Module,
    *,
    feature_dim: int,
    embedding_dim: int,
    temperature: float,
    queue: int,
    num_instances: int,
) -> Peer:
    """Builds a method around this backbone; its other weights come from torch's global generator.

    Args:
        feature_dim: F, also the width of the heads' hidden layers.
        embedding_dim: D.
        temperature: τ.
        queue: keys in MoCo's queue.
        num_instances: N, rows of InstDisc's bank.

    Raises:
        UserError: lightly is not installed.
    """
    shape = backbone, feature_dim, embedding_dim, temperature
    if name == "simclr":
        return SimClr(*shape)
    if name == "moco_v2":
        return MoCo(*shape, queue)
    return InstDisc(*shape, num_instances)


def _lightly() -> tuple[Any, Any, Any]:
    """lightly's losses, modules and utilities."""
    try:
        from lightly import loss
        from lightly.models import modules, utils
    except ImportError as error:
        raise UserError(f"the peers need lightly ({error}): pip install -e '.[benchmark]'") from None
    return loss, modules, utils
