"""Activation checkpointing keeps less and changes nothing: outputs, gradients and statistics are bit-equal."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from instance_ssl.config.choices import BackboneName
from instance_ssl.models import activation_checkpointing
from instance_ssl.models.encoder import Encoder, build_encoder

BACKBONES: list[tuple[BackboneName, int]] = [("resnet18", 32), ("resnet50", 32), ("resnet18", 65), ("small_cnn", 16)]
# A CPU without bfloat16 instructions takes fifty times as long as in float32.
AUTOCAST = [
    ("small_cnn", 16, True),
    pytest.param("resnet18", 8, True, marks=pytest.mark.full),
    pytest.param("resnet50", 8, True, marks=pytest.mark.full),
    pytest.param("resnet18", 65, True, marks=pytest.mark.full),
]
CASES = [*((*each, False) for each in BACKBONES if each[0] != "resnet50"), *AUTOCAST]
CASES.append(pytest.param("resnet50", 32, False, marks=pytest.mark.full))


def encoder_for(backbone: BackboneName, image_size: int, *, recompute: bool) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(
        backbone=backbone, stem="auto", image_size=image_size, projection="mlp", projection_hidden_dim=None,
        embedding_dim=8, recompute_stages=recompute,
    )  # fmt: skip


def batches(image_size: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, image_size, image_size, generator=generator) for _ in range(count)]


def forward_backward(encoder: Encoder, images: Tensor, autocast: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        x_bD = encoder(images)
    x_bD.square().mean().backward()  # outside autocast, as in the training loop
    return x_bD.detach()


def kept_bytes(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes of the tensors that autograd keeps between forward and backward pass; weights are there anyway."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
        assert output.requires_grad  # and with it lives the graph, and with that all storages, each counted once
    return sum(kept.values())


@pytest.mark.parametrize(("backbone", "image_size", "autocast"), CASES)
def test_recomputing_changes_nothing(backbone: BackboneName, image_size: int, autocast: bool) -> None:
    plain, recomputed = (encoder_for(backbone, image_size, recompute=recompute).train() for recompute in (False, True))
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    buffers = dict(recomputed.named_buffers())
    for images in batches(image_size):
        expected = forward_backward(plain, images, autocast)
        assert torch.equal(forward_backward(recomputed, images, autocast), expected)
    for (name, ours), theirs in zip(recomputed.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), (_, theirs) in zip(recomputed.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours is buffers[name]  # the copies are gone
        if name.endswith("num_batches_tracked"):
            assert ours == 2


@pytest.mark.parametrize(("backbone", "image_size", "share"), [("resnet50", 96, 0.3), ("small_cnn", 16, 0.45)])
def test_recomputing_keeps_a_fraction_of_the_activations(backbone: BackboneName, image_size: int, share: float) -> None:
    [images] = batches(image_size, 1)
    kept = []
    for recompute in (False, True):
        encoder = encoder_for(backbone, image_size, recompute=recompute).train()
        kept.append(kept_bytes(lambda encoder=encoder: encoder(images), list(encoder.parameters())))
    assert kept[1] < share * kept[0], kept


def test_nothing_is_checkpointed_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_checkpointing, "checkpoint", None)
    encoder = encoder_for("small_cnn", 16, recompute=True)
    [images] = batches(16, 1)
    with torch.inference_mode():
        assert encoder(images).shape == (4, 8)
    with pytest.raises(TypeError):
        encoder(images)
