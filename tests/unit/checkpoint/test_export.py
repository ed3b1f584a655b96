"""Exported backbones: torchvision, timm, detectron2's layout and ONNX give the features of the encoder itself."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from instance_ssl.checkpoint import export
from instance_ssl.checkpoint.hub_export import Preprocessing, timm_network, write_hub
from instance_ssl.checkpoint.weights import backbone_network, load_state, read_weights
from instance_ssl.config.choices import BackboneName, StemName
from instance_ssl.errors import UserError
from instance_ssl.files.atomic import saved_file
from instance_ssl.models.backbones import ResNet, build_backbone, channels_last

# In the layout that the encoder gives them: the same bits come from the same order of sums.
IMAGES = channels_last(torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


def used_backbone(name: BackboneName, stem: StemName) -> ResNet:
    """A random one whose batch norms have seen images, so that no two tensors are alike."""
    torch.manual_seed(2)
    backbone = build_backbone(name, stem, 64)
    assert isinstance(backbone, ResNet)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1)
                nn.init.uniform_(module.bias, -0.1, 0.1)
        backbone(IMAGES)
    return backbone.eval()


def features_of(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model.eval()(IMAGES)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.full)])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_cards_code_gives_the_same_features_to_the_bit(
    library: str, name: BackboneName, stem: StemName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"torch": torch, library: pytest.importorskip(library)}
    backbone = used_backbone(name, stem)
    export.write_pth(export.backbone_state(backbone), tmp_path / "backbone.pth")
    monkeypatch.chdir(tmp_path)
    exec(export.loading_code(backbone, name, small_stem=stem == "small")[library], known)  # the project's own text
    assert torch.equal(features_of(known["model"]), features_of(backbone))


def test_safetensors_load_into_timm_and_torchvision(tmp_path: Path) -> None:
    safetensors, timm = pytest.importorskip("safetensors.torch"), pytest.importorskip("timm")
    backbone = used_backbone("resnet50", "imagenet")
    path = tmp_path / "backbone.safetensors"
    export.write_safetensors(export.backbone_state(backbone), path)
    assert torch.equal(
        features_of(timm.create_model("resnet50", num_classes=0, checkpoint_path=str(path))), features_of(backbone)
    )
    model = torchvision.models.resnet50()
    told = model.load_state_dict(safetensors.load_file(path), strict=False)
    assert (told.missing_keys, told.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    model.fc = nn.Identity()
    assert torch.equal(features_of(model), features_of(backbone))


@pytest.mark.parametrize("library", ["torchvision", "timm", "own .pth", "own .safetensors"])
def test_the_way_back_is_bit_equal_too(library: str, tmp_path: Path) -> None:
    backbone, path = used_backbone("resnet18", "imagenet"), tmp_path / "weights.pth"
    state = export.backbone_state(backbone)
    if library == "own .safetensors":
        pytest.importorskip("safetensors")
        path = tmp_path / "weights.safetensors"
        export.write_safetensors(state, path)
    elif library == "own .pth":
        export.write_pth(state, path)
    else:
        model = (
            torchvision.models.resnet18()
            if library == "torchvision"
            else pytest.importorskip(library).create_model("resnet18")
        )
        model.load_state_dict(state, strict=False)
        torch.save(model.state_dict(), path)
    fresh = build_backbone("resnet18", "imagenet", 64)
    load_state(backbone_network(fresh), read_weights(path).state, "x")
    assert set(fresh.state_dict()) == set(backbone.state_dict())
    for name, value in backbone.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


class _OfNumpyAlone(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        assert module.split(".")[0] == "numpy", (module, name)
        return super().find_class(module, name)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_detectron2s_layout_holds_the_network(name: BackboneName, tmp_path: Path) -> None:
    """Its own network, written out here from its key names, has every key, and no other, and the same features."""
    backbone = used_backbone(name, "imagenet")
    export.write_detectron2(export.backbone_state(backbone), tmp_path / "detectron2.pkl")
    with (tmp_path / "detectron2.pkl").open("rb") as file:
        content = _OfNumpyAlone(file, encoding="latin1").load()  # the encoding that detectron2 gives
    assert content["matching_heuristics"] is True
    assert content["__author__"]
    left = {key: torch.from_numpy(value) for key, value in content["model"].items()}

    def conv(key: str, images: Tensor, stride: int) -> Tensor:
        weight = left.pop(f"{key}.weight")
        images = functional.conv2d(images, weight, stride=stride, padding=weight.shape[2] // 2)
        left.pop(f"{key}.norm.num_batches_tracked")
        scale, shift, mean, variance = (
            left.pop(f"{key}.norm.{part}") for part in ("weight", "bias", "running_mean", "running_var")
        )
        return functional.batch_norm(images, mean, variance, scale, shift)

    maps = functional.max_pool2d(conv("stem.conv1", IMAGES, 2).relu(), 3, stride=2, padding=1)
    strided = 2 if name == "resnet50" else 1  # the 3x3 convolution: STRIDE_IN_1X1 False
    for stage, count in enumerate(BLOCKS[name], start=2):
        for block in range(count):
            key, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            out = maps
            for number in range(1, strided + 2):
                out = conv(f"{key}.conv{number}", out.relu() if number > 1 else out, stride if number == strided else 1)
            shortcut = conv(f"{key}.shortcut", maps, stride) if f"{key}.shortcut.weight" in left else maps
            maps = (out + shortcut).relu()
    assert not left
    assert torch.equal(functional.adaptive_avg_pool2d(maps, 1).flatten(1), features_of(backbone))


def test_onnx_gives_the_features_at_any_batch_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    backbone, path = used_backbone("resnet18", "small"), tmp_path / "features.onnx"
    export.write_onnx(backbone, 64, path)
    onnx.checker.check_model(onnx.load(path))
    assert [(item.domain, item.version) for item in onnx.load(path).opset_import] == [("", export.ONNX_OPSET)]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        (features,) = session.run(["features"], {"images": IMAGES[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(features), features_of(backbone)[:count], rtol=1e-4, atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    export.require_packages(["pth", "detectron2"])
    with pytest.raises(UserError, match=r"onnx needs onnx: pip install -e \"\.\[export\]\""):
        export.require_packages(["pth", "onnx"])


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent/x\.pth could not be written: No such file"):
        export.write_pth({"a": torch.zeros(1)}, tmp_path / "absent/x.pth")

    def fill_the_disk(path: Path) -> None:
        with saved_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"half\.pth could not be written: no space left"):
        fill_the_disk(tmp_path / "half.pth")
    assert list(tmp_path.iterdir()) == []


LIBRARY_NETWORKS: list[tuple[str, dict[str, Any], StemName]] = [
    ("timm/vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}, "small"),
    ("timm/convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, "imagenet"),
    ("timm/convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, "small"),
    ("torchvision/mobilenet_v3_small", {}, "small"),
]
LIBRARY_CASES = [
    pytest.param(*case, marks=() if place == 0 else pytest.mark.full) for place, case in enumerate(LIBRARY_NETWORKS)
]


@pytest.mark.parametrize(("name", "options", "stem"), LIBRARY_CASES)
def test_a_library_s_network_is_loaded_as_its_files_say(
    name: str, options: dict[str, Any], stem: StemName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm, onnxruntime = pytest.importorskip("timm"), pytest.importorskip("onnxruntime")
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    backbone = build_backbone(name, stem, 32, options=options).eval()
    images = torch.randn(2, 3, 32, 32)
    state = export.backbone_state(backbone)
    export.write_pth(state, tmp_path / "backbone.pth")
    monkeypatch.chdir(tmp_path)
    load = export.loading_code(backbone, name, small_stem=stem == "small")
    known: dict[str, Any] = {"torch": torch, "torchvision": torchvision, "timm": timm}
    exec(load[name.partition("/")[0]], known)  # the project's own text
    with torch.inference_mode():
        expected = backbone(images)
        assert torch.equal(known["model"].eval()(images), expected)
    network = timm_network(backbone, name, small_stem=stem == "small")
    inputs = Preprocessing(32, 1.0, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    write_hub(tmp_path / "hub", state, network, inputs, {"architecture": name, "feature_dim": expected.shape[1]}, load)
    assert safetensors.load_file(tmp_path / "hub/model.safetensors").keys() == state.keys()
    assert (network is None) == (name != "timm/vit_tiny_patch16_224" and stem == "small")
    if network is not None:
        model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
        with torch.inference_mode():
            assert torch.equal(model(images), expected)
        assert tuple(timm.data.resolve_model_data_config(model)["input_size"]) == (3, 32, 32)
        assert model.pretrained_cfg["std"] == [0.2, 0.2, 0.2]
    export.write_onnx(backbone, 32, tmp_path / "features.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "features.onnx", providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"images": torch.cat([images, images]).numpy()})
    torch.testing.assert_close(torch.from_numpy(features[:2]), expected, rtol=1e-3, atol=1e-4)
