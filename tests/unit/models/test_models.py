"""Encoders: shapes, stems, heads, torchvision's keys."""

import pytest
import torch
import torchvision
from torch import nn

from instance_ssl.config.choices import BackboneName, ProjectionName, StemName
from instance_ssl.models.backbones import build_backbone, choose_stem
from instance_ssl.models.encoder import Encoder, build_encoder


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


@pytest.mark.parametrize("backbone", ["resnet18", pytest.param("resnet50", marks=pytest.mark.full), "small_cnn"])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_activation_has_its_channels_side_by_side(backbone: BackboneName, autocast: bool) -> None:
    encoder, laid_out = encoder_for(backbone, 32), []

    def look(module: nn.Module, _: object, output: torch.Tensor) -> None:
        laid_out.append(output.is_contiguous(memory_format=torch.channels_last))
        # On the way back, too: a gradient in the other layout would be rearranged at every layer.
        output.register_hook(
            lambda gradient: laid_out.append(gradient.is_contiguous(memory_format=torch.channels_last))
        )

    for module in encoder.backbone.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_hook(look)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        encoder(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(laid_out) >= 12
    assert all(laid_out)
    weights = [parameter for parameter in encoder.parameters() if parameter.ndim == 4]
    assert all(weight.is_contiguous() and weight.grad.is_contiguous() for weight in weights)


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


@pytest.mark.parametrize(("projection", "layers", "norms"), [("mlp", 2, 0), ("mlp_bn", 2, 2), ("linear", 1, 0)])
def test_the_head_is_the_one_named(projection: ProjectionName, layers: int, norms: int) -> None:
    head = encoder_for("small_cnn", 16, projection).projection
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == layers
    assert linear[-1].out_features == 24
    assert sum(isinstance(module, nn.BatchNorm1d) for module in head.modules()) == norms


def test_embeddings_are_float32_under_autocast() -> None:
    encoder = encoder_for("small_cnn", 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(torch.randn(2, 3, 16, 16)).dtype == torch.float32
        assert encoder.features(torch.randn(2, 3, 16, 16)).dtype == torch.float32
