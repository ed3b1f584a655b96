"""The peers of the benchmark: each loss by hand, what moves and what does not, and that all of them learn."""

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from instance_ssl.errors import UserError
from instance_ssl.models.backbones import build_backbone
from peer_methods import PEERS, InstDisc, MoCo, Peer, PeerName, SimClr, build_peer

N, B, D, F, TAU, QUEUE = 24, 8, 16, 128, 0.2, 12


@pytest.fixture
def lightly() -> None:
    pytest.importorskip("lightly", reason="lightly is not installed (the benchmark extra)")


def make(name: PeerName) -> Peer:
    torch.manual_seed(0)
    shape = {"feature_dim": F, "embedding_dim": D, "temperature": TAU, "queue": QUEUE, "num_instances": N}
    return build_peer(name, build_backbone("small_cnn", "auto", 16), **shape)


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    """Views that have their image's own pattern under noise."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randperm(N, generator=generator)[:B]
    patterns = torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(99))[ids]
    return patterns[:, None] + 0.3 * torch.randn(B, 2, 3, 16, 16, generator=generator), ids


def embed(head: nn.Module, backbone: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return functional.normalize(head(backbone(images)), dim=1)


@pytest.mark.usefixtures("lightly")
def test_simclr_has_every_other_view_as_a_negative() -> None:
    peer = make("simclr")
    assert isinstance(peer, SimClr)
    views, ids = batch()
    unit = torch.cat([embed(peer.head, peer.backbone, views[:, view]) for view in (0, 1)])
    logits = (unit @ unit.T / TAU).fill_diagonal_(-torch.inf)
    expected = functional.cross_entropy(logits, torch.arange(2 * B).roll(B))
    torch.testing.assert_close(peer(views, ids).detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("lightly")
def test_moco_compares_with_keys_in_a_queue_and_its_key_encoder_only_follows() -> None:
    peer = make("moco_v2")
    assert isinstance(peer, MoCo)
    views, ids = batch()
    queue = peer.loss.memory_bank.bank.clone()
    weight, key_weight = peer.head.layers[0].weight, peer.key_head.layers[0].weight
    with torch.no_grad():
        weight += 1  # the key encoder comes one hundredth of the way after it
    before = key_weight.clone()
    queries = [embed(peer.head, peer.backbone, views[:, view]) for view in (0, 1)]
    loss = peer(views, ids)
    torch.testing.assert_close(key_weight, 0.99 * before + 0.01 * weight.detach())
    keys = [embed(peer.key_head, peer.key_backbone, views[:, view]) for view in (0, 1)]

    def info_nce(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
        logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ negatives.T], dim=1)
        return functional.cross_entropy(logits / TAU, torch.zeros(B, dtype=torch.int64))

    filled = torch.cat([keys[1], queue[B:]])  # the first loss has put its keys in
    expected = 0.5 * (info_nce(queries[0], keys[1], queue) + info_nce(queries[1], keys[0], filled))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in peer.key_backbone.parameters())
    assert all(parameter.grad is not None for parameter in peer.backbone.parameters())


@pytest.mark.usefixtures("lightly")
def test_instdisc_is_a_softmax_over_a_bank_whose_own_rows_move() -> None:
    peer = make("instdisc")
    assert isinstance(peer, InstDisc)
    views, ids = batch()
    bank = peer.memory.bank.clone()
    unit = embed(peer.head, peer.backbone, views.transpose(0, 1).flatten(0, 1))
    expected = functional.cross_entropy(unit @ bank.T / TAU, ids.repeat(2))
    torch.testing.assert_close(peer(views, ids).detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(peer.memory.bank, bank)
    peer.after_step()
    rows = functional.normalize(0.5 * bank[ids] + 0.5 * unit[:B], dim=1)
    rows = functional.normalize(0.5 * rows + 0.5 * unit[B:], dim=1)
    bank[ids] = rows
    torch.testing.assert_close(peer.memory.bank, bank, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("lightly")
@pytest.mark.parametrize("name", PEERS)
def test_they_learn(name: PeerName) -> None:
    peer = make(name)
    parameters = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    losses = []
    for step in range(40):
        loss = peer(*batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        peer.after_step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5]), losses


def test_without_lightly_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[benchmark\]'"):
        make("simclr")
