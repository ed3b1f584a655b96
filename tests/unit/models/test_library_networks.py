"""Networks of torchvision, timm and one's own as backbones: features, stems for small images, recomputation, errors."""

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from instance_ssl.errors import UserError
from instance_ssl.models.backbones import build_backbone
from instance_ssl.models.library_networks import LibraryBackbone

# A small network of each family, and its width.
NETWORKS: list[tuple[str, dict[str, Any], int]] = [
    ("timm/vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}, 48),
    ("timm/convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 32),
    ("torchvision/mobilenet_v3_small", {}, 1024),
    ("timm/efficientnet_lite0", {}, 1280),
]
OWN = """
from torch import nn

def network(width=5):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())

def tokens():
    return nn.Sequential(nn.Flatten(2))

def pair():
    class Pair(nn.Module):
        def forward(self, images):
            return images, images
    return Pair()

def nothing():
    return None
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("own_networks", None)
    return "own_networks"


def built(name: str, options: dict[str, Any] | None = None, **changed: Any) -> LibraryBackbone:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"stem": "auto", "image_size": 32} | changed
    backbone = build_backbone(name, arguments.pop("stem"), arguments.pop("image_size"), options=options, **arguments)
    assert isinstance(backbone, LibraryBackbone)
    return backbone


@pytest.mark.parametrize(("name", "options", "width"), NETWORKS, ids=lambda value: str(value).partition("/")[2])
def test_a_library_s_network_gives_features(name: str, options: dict[str, Any], width: int) -> None:
    backbone = built(name, options)
    features = backbone(torch.randn(3, 3, 32, 32))
    assert features.shape == (3, backbone.feature_dim) == (3, width)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())  # no classifier is left behind


def test_the_search_for_the_width_changes_neither_the_network_nor_the_random_numbers() -> None:
    torch.manual_seed(0)
    plain = torchvision.models.mobilenet_v3_small(weights=None)
    after = torch.rand(1)
    backbone = built("torchvision/mobilenet_v3_small", stem="imagenet")
    assert torch.equal(torch.rand(1), after)
    assert backbone.network.training
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in backbone.network.state_dict().items())


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18"])
def test_the_small_stem_halves_the_first_stride_and_keeps_all_shapes(name: str) -> None:
    small, whole = (built(name, stem=stem).network for stem in ("small", "imagenet"))
    assert (small.conv1.stride, whole.conv1.stride) == ((1, 1), (2, 2))
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (small, whole)]
    assert shapes[0] == shapes[1]


def test_a_vit_gets_eight_patches_a_side_unless_its_patch_is_given() -> None:
    options = {"depth": 1, "embed_dim": 24, "num_heads": 3}

    def patch(**changed: Any) -> tuple[int, ...]:
        kernel: tuple[int, ...] = built("timm/vit_tiny_patch16_224", **changed).network.patch_embed.proj.kernel_size
        return kernel

    assert patch(options=options) == (4, 4)
    assert patch(options={**options, "patch_size": 8}) == (8, 8)
    assert patch(options={**options, "patch_size": 2}) == (2, 2)
    assert patch(options=options, stem="imagenet") == (16, 16)
    assert patch(options=options, image_size=96) == (16, 16)


def test_timm_s_features_are_timm_s_own() -> None:
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    backbone = built("timm/vit_tiny_patch16_224", options, stem="imagenet").eval()
    own = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **options).eval()
    own.load_state_dict(backbone.network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(own(images), backbone(images))


@pytest.mark.parametrize(("name", "options", "width"), NETWORKS[:3], ids=lambda value: str(value).partition("/")[2])
def test_recomputed_blocks_change_nothing(name: str, options: dict[str, Any], width: int) -> None:
    drop = {"drop_path_rate": 0.3} if "timm" in name else {}
    results = []
    for recompute in (False, True):
        backbone = built(name, {**options, **drop}, recompute_stages=recompute).train()
        torch.manual_seed(1)
        images = torch.randn(4, 3, 32, 32)
        features = backbone(images)
        features.square().sum().backward()
        results.append((features, *(p.grad for p in backbone.parameters()), *backbone.buffers()))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_recomputed_blocks_keep_less() -> None:
    def kept(*, recompute: bool) -> int:
        backbone = built(NETWORKS[0][0], NETWORKS[0][1], recompute_stages=recompute)
        weights = {parameter.data_ptr() for parameter in backbone.parameters()}
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = backbone(torch.randn(4, 3, 32, 32))
            assert features.requires_grad
        return sum(found.values())

    assert kept(recompute=True) < 0.3 * kept(recompute=False)


def test_an_own_function_gives_the_backbone_and_its_map_is_averaged(own_module: str) -> None:
    backbone = built(f"{own_module}:network", {"width": 7})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images), backbone.network(images).mean(dim=(2, 3)))
    assert backbone.feature_dim == 7
    assert isinstance(backbone.network, nn.Sequential)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("timm/vit_tiny_patch16_242", {}, "timm has no network vit_tiny_patch16_242; the nearest: vit_tiny_patch16_2"),
        ("torchvision/resnet19", {}, "torchvision has no network resnet19; the nearest: resnet1"),
        ("torchvision/squeezenet1_0", {}, "has no linear classifier to remove"),
        ("torchvision/inception_v3", {}, "cannot take images of 3 x 32 x 32 pixels"),
        ("torchvision/resnet18", {"widht": 3}, "cannot be built with model.backbone_options widht=3"),
        ("no_such_module:network", {}, "No module named 'no_such_module'"),
        ("own_networks:netwrok", {}, "has no function netwrok; the nearest: network"),
        ("own_networks:network", {"depth": 2}, "cannot be built with model.backbone_options depth=2"),
        ("own_networks:tokens", {}, "returns a tensor of shape (2, 3, 1024): a backbone returns features (b, F)"),
        ("own_networks:pair", {}, "returns tuple: a backbone returns features (b, F)"),
        ("own_networks:nothing", {}, "returns NoneType: it has to return a torch.nn.Module"),
    ],
)
def test_what_cannot_be_a_backbone_is_one_line(own_module: str, name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        built(name, options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_without_blocks_is_not_recomputed(own_module: str) -> None:
    Path("own_networks.py").write_text("from torch import nn\n\ndef network():\n    return nn.Conv2d(3, 4, 3)\n")
    with pytest.raises(UserError, match="has no Sequential or ModuleList of blocks"):
        built(f"{own_module}:network", recompute_stages=True)
