"""Encoders: shapes, stems, heads, torchvision's keys."""

from typing import Literal

import pytest
import torch
import torchvision
from torch import nn

from instance_ssl.models.backbones import BackboneName, StemName, build_backbone, choose_stem
from instance_ssl.models.encoder import Encoder, ProjectionName, build_encoder


def encoder_for(backbone: BackboneName, image_size: int, projection: ProjectionName = "mlp") -> Encoder:
    return build_encoder(
        backbone=backbone, stem="auto", image_size=image_size, projection=projection, projection_hidden_dim=None,
        embedding_dim=24,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "feature_dim"),
    [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048), ("resnet101", 2048), ("small_cnn", 128)],
)
def test_every_backbone_gives_features_and_embeddings(backbone: BackboneName, feature_dim: int) -> None:
    encoder = encoder_for(backbone, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    assert encoder.feature_dim == feature_dim
    assert encoder.features(images).shape == (2, feature_dim)
    assert encoder(images).shape == (2, 24)


@pytest.mark.parametrize(
    ("stem", "image_size", "expected"),
    [
        ("auto", 32, "small"),
        ("auto", 64, "small"),
        ("auto", 65, "imagenet"),
        ("imagenet", 32, "imagenet"),
        ("small", 224, "small"),
    ],
)
def test_the_stem_follows_the_image_size_unless_set(stem: StemName, image_size: int, expected: str) -> None:
    assert choose_stem("resnet18", stem, image_size) == expected
    network = build_backbone("resnet18", stem, image_size).network
    assert isinstance(network, nn.Module)
    assert network.conv1.kernel_size == ((7, 7) if expected == "imagenet" else (3, 3))
    assert isinstance(network.maxpool, nn.MaxPool2d) == (expected == "imagenet")


def test_backbone_weights_load_into_torchvision() -> None:
    theirs = torchvision.models.resnet18(weights=None)
    missing, unexpected = theirs.load_state_dict(
        build_backbone("resnet18", "imagenet", 224).network.state_dict(), strict=False
    )
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []


@pytest.mark.parametrize(("projection", "layers"), [("mlp", 2), ("linear", 1)])
def test_the_head_can_be_switched_off(projection: Literal["mlp", "linear"], layers: int) -> None:
    head = encoder_for("small_cnn", 16, projection).projection
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == layers
    assert linear[-1].out_features == 24
    assert not any(isinstance(module, nn.BatchNorm1d) for module in head.modules())


def test_embeddings_are_float32_under_autocast() -> None:
    encoder = encoder_for("small_cnn", 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(torch.randn(2, 3, 16, 16)).dtype == torch.float32
        assert encoder.features(torch.randn(2, 3, 16, 16)).dtype == torch.float32
