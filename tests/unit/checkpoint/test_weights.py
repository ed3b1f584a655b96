"""Backbone weights from files: what is accepted, what is left aside, and one line for what does not fit."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from instance_ssl.checkpoint.weights import backbone_network, load_state, read_weights
from instance_ssl.errors import UserError
from instance_ssl.models.backbones import build_backbone


def network() -> nn.Module:
    """resnet18 with the ImageNet stem and without a classifier, as an encoder has it."""
    return backbone_network(build_backbone("resnet18", "imagenet", 224))


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return torchvision.models.resnet18().state_dict()


def error_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def save(tmp_path: Path, content: Any, name: str = "weights.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder_q.", "backbone.", "module.backbone.network."])
def test_torchvisions_keys_are_found_below_what_wrappers_put_before_them(
    prefix: str, tmp_path: Path, torchvision_state: dict[str, Tensor]
) -> None:
    prefixed = {prefix + name: value for name, value in torchvision_state.items()}
    weights = read_weights(save(tmp_path, {"state_dict": prefixed, "epoch": 3, "arch": "resnet18"}))
    assert weights.ignored == ["fc.weight", "fc.bias"]
    module = network()
    load_state(module, weights.state, "x")
    for name, value in module.state_dict().items():
        assert torch.equal(value, torchvision_state[name]), name


def test_of_mocos_checkpoint_the_query_encoder_is_taken(tmp_path: Path, torchvision_state: dict[str, Tensor]) -> None:
    state = {f"module.encoder_q.{name}": value for name, value in torchvision_state.items()}
    state |= {f"module.encoder_k.{name}": value + 1 for name, value in torchvision_state.items()}
    weights = read_weights(save(tmp_path, {"state_dict": {**state, "module.queue": torch.zeros(3)}}))
    assert torch.equal(weights.state["conv1.weight"], torchvision_state["conv1.weight"])
    assert "module.queue" in weights.ignored
    load_state(network(), weights.state, "x")


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.fixture(scope="module")
def body(torchvision_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names, with values of a number each: which tensors are taken is all that matters."""
    names = [name for name in torchvision_state if not name.startswith("fc.")]
    return {name: torch.tensor([float(number)]) for number, name in enumerate(names)}


def as_children(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of Sequential(*resnet.children()), as lightly saves a backbone."""
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return {f"{places[name.partition('.')[0]]}.{name.partition('.')[2]}": value for name, value in state.items()}


HEAD = {"0.weight": torch.zeros(4, 512), "layer1.weight": torch.zeros(2)}
LAYOUTS: dict[str, Any] = {
    "query encoder of one process": lambda b: {
        "state_dict": {**under("encoder_q.", b), **under("encoder_k.", moved(b)), "queue": torch.zeros(8)}
    },
    "base encoder": lambda b: {"state_dict": {**under("module.base_encoder.", b), **under("module.predictor.", HEAD)}},
    "its momentum encoder": lambda b: {**under("base_encoder.", b), **under("momentum_encoder.", moved(b))},
    "projector": lambda b: {"state_dict": {**under("backbone.", b), **under("projector.", HEAD)}, "epoch": 1},
    "momentum backbone": lambda b: {**under("backbone.", b), **under("momentum_backbone.", moved(b))},
    "head in the network": lambda b: {**under("module.", b), **under("module.projection_head.", HEAD)},
    "student": lambda b: {"student": under("module.backbone.", b), "teacher": under("backbone.", moved(b)), "epoch": 1},
    "online": lambda b: {**under("online_encoder.net.", b), **under("target_encoder.net.", moved(b))},
    "ema": lambda b: {"model": b, "model_ema": moved(b), "optimizer": {"state": {0: {"momentum": torch.zeros(3)}}}},
    "compiled": lambda b: {"model": under("_orig_mod.net.", b), "head": HEAD},
    "compiled inside": lambda b: {name.replace("layer1.", "layer1._orig_mod."): value for name, value in b.items()},
    "children": lambda b: {"state_dict": {**under("backbone.", as_children(b)), **under("projection_head.", HEAD)}},
    "children alone": as_children,
    "deep": lambda b: {"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", b)}}}},
    "twice": lambda b: {**under("encoder_q.0.", b), **under("backbone.", b), **under("encoder_k.0.", moved(b))},
    "a name that ends so": lambda b: {**under("backbone.", b), "old_backbone.conv1.weight": HEAD["0.weight"]},
}  # fmt: skip


def moved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trained_backbone_is_found_in_what_others_write(
    layout: str, tmp_path: Path, body: dict[str, Tensor]
) -> None:
    weights = read_weights(save(tmp_path, LAYOUTS[layout](body)))
    assert weights.state.keys() == body.keys()
    assert all(torch.equal(weights.state[name], value) for name, value in body.items())


def test_what_is_left_aside_is_named_by_whole_parts(tmp_path: Path, body: dict[str, Tensor]) -> None:
    content = {"student": {**under("module.backbone.", body), **under("module.head.", HEAD)}}
    content["teacher"] = {**under("backbone.", moved(body)), **under("head.", HEAD)}
    weights = read_weights(save(tmp_path, content))
    assert weights.prefix == "student.module.backbone."
    assert weights.aside == ("student.module.head", "teacher")
    asked = read_weights(Path(f"{save(tmp_path, content)}#teacher"))
    assert asked.prefix == "teacher.backbone."
    assert torch.equal(asked.state["conv1.weight"], body["conv1.weight"] + 1)
    assert "only: student.module.backbone, teacher.backbone" in error_of(read_weights, tmp_path / "weights.pth#ema")
    save(tmp_path, content, "with#mark.pth")
    assert read_weights(tmp_path / "with#mark.pth").prefix == "student.module.backbone."


@pytest.mark.parametrize("second", ["other.", "teacher2.", "averaged.", "backbone2."])
def test_several_backbones_are_refused_by_name(second: str, tmp_path: Path, body: dict[str, Tensor]) -> None:
    path = save(tmp_path, {**under("backbone.", body), **under(second, moved(body))})
    message = error_of(read_weights, path)
    assert f"several backbones: backbone, {second[:-1]}; choose one: {path}#backbone" in message
    assert read_weights(Path(f"{path}#{second[:-1]}")).prefix == second


def test_a_dictionary_within_itself_is_entered_once(tmp_path: Path, body: dict[str, Tensor]) -> None:
    content: dict[str, Any] = {"model": body}
    content["again"] = content
    content["model again"] = content["model"]
    assert read_weights(save(tmp_path, content)).prefix == "model."


def test_a_command_line_beside_the_weights_is_read(tmp_path: Path, body: dict[str, Tensor]) -> None:
    """As DINO's checkpoints have it."""
    assert read_weights(save(tmp_path, {"student": body, "args": argparse.Namespace(lr=1)})).prefix == "student."


def test_safetensors_and_torch_files_are_told_apart_by_their_content(tmp_path: Path, body: dict[str, Tensor]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(under("backbone.", body), tmp_path / "weights.pth")
    assert read_weights(tmp_path / "weights.pth").prefix == "backbone."
    assert read_weights(save(tmp_path, under("net.", body), "weights.safetensors")).prefix == "net."


def test_a_prefix_of_some_keys_only_is_left(tmp_path: Path, torchvision_state: dict[str, Tensor]) -> None:
    state = {("module." if name == "conv1.weight" else "") + name: value for name, value in torchvision_state.items()}
    message = error_of(load_state, network(), read_weights(save(tmp_path, state)).state, "evaluation.weights x.pth")
    assert "1 missing (conv1.weight)" in message
    assert "1 extra (module.conv1.weight)" in message


def test_files_of_old_versions_of_torch_are_read(tmp_path: Path, torchvision_state: dict[str, Tensor]) -> None:
    torch.save(torchvision_state, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    loaded = network()
    load_state(loaded, read_weights(tmp_path / "old.pth.tar").state, "x")
    assert torch.equal(loaded.state_dict()["conv1.weight"], torchvision_state["conv1.weight"])


def test_safetensors_are_read(tmp_path: Path, torchvision_state: dict[str, Tensor]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(torchvision_state, tmp_path / "weights.safetensors")
    weights = read_weights(tmp_path / "weights.safetensors")
    load_state(network(), weights.state, "x")
    (tmp_path / "weights.safetensors").write_bytes(b"no tensors")
    assert "not a safetensors file" in error_of(read_weights, tmp_path / "weights.safetensors")


def test_weights_without_counts_of_batches_fit(torchvision_state: dict[str, Tensor]) -> None:
    """torchvision's files of before 2018, and Caffe2's, do not have them."""
    state = {name: value for name, value in torchvision_state.items() if "fc." not in name and "num_b" not in name}
    loaded = network()
    load_state(loaded, state, "x")
    assert torch.equal(loaded.state_dict()["conv1.weight"], torchvision_state["conv1.weight"])


def test_another_network_is_one_line_that_says_what_differs(tmp_path: Path) -> None:
    state = torchvision.models.resnet50().state_dict()
    message = error_of(load_state, network(), read_weights(save(tmp_path, state)).state, "evaluation.weights x.pth")
    assert message.startswith("evaluation.weights x.pth does not fit this encoder: ")
    assert "extra (layer1.0.conv3.weight, layer1.0.bn3.weight, layer1.0.bn3.bias, …)" in message
    assert "layer1.0.conv1.weight is 64x64x1x1 instead of 64x64x3x3" in message


def test_another_stem_is_one_line(torchvision_state: dict[str, Tensor]) -> None:
    small = backbone_network(build_backbone("resnet18", "small", 32))
    state = {name: value for name, value in torchvision_state.items() if "fc." not in name}
    message = error_of(load_state, small, state, "evaluation.weights x.pth")
    assert "1 of another shape (conv1.weight is 64x3x7x7 instead of 64x3x3x3)" in message
    assert "model.stem" in message


class _Runs:
    """A pickle that makes a directory when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_weights_file_is_refused_and_does_not_run(
    tmp_path: Path, torchvision_state: dict[str, Tensor]
) -> None:
    path = save(tmp_path, {**torchvision_state, "extra": _Runs(tmp_path / "ran")})
    message = error_of(read_weights, path)
    assert "more than tensors" in message
    assert str(path) in message
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "there are none"),
        ({"epoch": 3}, "'epoch' is not a tensor"),
        ({"a": torch.tensor(float("nan"))}, "a is not"),
    ],
)
def test_what_holds_no_weights_is_refused(tmp_path: Path, content: Any, expected: str) -> None:
    assert expected in error_of(read_weights, save(tmp_path, content))


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.pth" in error_of(read_weights, tmp_path / "nowhere.pth")
