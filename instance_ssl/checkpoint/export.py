"""A backbone as files that others read: its library's keys, detectron2's keys, ONNX."""

import copy
import importlib.util
import io
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from instance_ssl.checkpoint.weights import backbone_network
from instance_ssl.errors import UserError
from instance_ssl.files.atomic import saved_file
from instance_ssl.models.backbones import Backbone, ResNet
from instance_ssl.models.library_networks import LibraryBackbone, classifier_of

ONNX_OPSET = 18
_SMALL_STEM = "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False); model.maxpool = torch.nn.Identity(); "
_LOAD = "model.load_state_dict(torch.load('backbone.pth', weights_only=True))"
# What a format needs beside the project's own requirements.
_PACKAGES = {
    "safetensors": ("safetensors",),
    "hub": ("safetensors",),
    "onnx": ("onnx", "onnxscript"),
    "parquet": ("pyarrow",),
}


def require_packages(formats: Sequence[str]) -> None:
    """Refuses (`UserError`) formats whose packages are not installed, before anything is written."""
    for form in formats:
        for package in _PACKAGES.get(form, ()):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f'export.formats: {form} needs {package}: pip install -e ".[export]", or leave {form} out'
                )


def backbone_state(backbone: Backbone) -> dict[str, Tensor]:
    """The backbone's tensors by the keys of its library, on the CPU: it has no classifier.

    A ResNet's are torchvision's, which timm's resnets share. A small_cnn's are its own.
    """
    state = backbone_network(backbone).state_dict()
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def loading_code(backbone: Backbone, name: str, *, small_stem: bool) -> dict[str, str]:
    """Python that makes a network of images to features from backbone.pth, by library; none for a small_cnn.

    Args:
        name: `model.backbone`.
    """
    if isinstance(backbone, LibraryBackbone):
        return _library_code(backbone)
    return _resnet_code(name, small_stem=small_stem) if isinstance(backbone, ResNet) else {}


def _library_code(backbone: LibraryBackbone) -> dict[str, str]:
    library, _, name = backbone.name.partition("/")
    arguments = "".join(f", {key}={value!r}" for key, value in backbone.arguments.items())
    stem = next((module for module in backbone.network.modules() if isinstance(module, nn.Conv2d)), None)
    change = ""
    if backbone.has_halved_stride and stem is not None:
        change = f"next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d)).stride = {stem.stride}; "
    if ":" in backbone.name:
        module_name, _, function = backbone.name.partition(":")
        create, library = f"from {module_name} import {function}; model = {function}({arguments[2:]})", "python"
    elif library == "timm":
        create = f"model = timm.create_model('{name.partition('.')[0]}', num_classes=0{arguments})"
    else:
        with torch.device("meta"):
            whole = torchvision.models.get_model(name, weights=None, **backbone.arguments)
        create = f"model = torchvision.models.{name}({arguments[2:]}); model.set_submodule("
        create += f"'{classifier_of(whole, backbone.name)}', torch.nn.Identity())"
    return {library: f"{create}; {change}{_LOAD}"}


def _resnet_code(backbone: str, *, small_stem: bool) -> dict[str, str]:
    no_classifier = "model.fc = torch.nn.Identity(); "
    stem = _SMALL_STEM if small_stem else ""
    with_timm = f"model = timm.create_model('{backbone}', num_classes=0"
    return {
        "torchvision": f"model = torchvision.models.{backbone}(); {no_classifier}{stem}{_LOAD}",
        "timm": f"{with_timm}); {stem}{_LOAD}" if small_stem else f"{with_timm}, checkpoint_path='backbone.pth')",
    }


def write_pth(state: dict[str, Tensor], path: Path) -> None:
    """The state for `torch.load(path, weights_only=True)`."""
    buffer = io.BytesIO()  # torch.save itself reports a full disk in many ways
    torch.save(state, buffer)
    with saved_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """The state for `safetensors.torch.load_file`."""
    from safetensors.torch import save

    with saved_file(path) as temporary:
        temporary.write_bytes(save(state, metadata={"format": "pt"}))


def detectron2_name(name: str) -> str:
    """detectron2's key of a torchvision ResNet's, as MoCo's detection/convert-pretrain-to-detectron2.py has it.

    conv1 → stem.conv1, layer1.0.bn2 → res2.0.conv2.norm, layer1.0.downsample.1 → res2.0.shortcut.norm.
    """
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub("^layer([0-9])", lambda found: f"res{int(found[1]) + 1}", name)
    name = re.sub(r"\.bn([0-9])", r".conv\1.norm", name)
    return name.replace(".downsample.0", ".shortcut").replace(".downsample.1", ".shortcut.norm")


def write_detectron2(state: dict[str, Tensor], path: Path) -> None:
    """The state as NumPy arrays in detectron2's own file format, for MODEL.WEIGHTS.

    detectron2 reads a .pkl with `model` and `__author__` as one of its own (detectron2/checkpoint/
    detection_checkpoint.py) and finds the place of each key by its end. The network is RGB and has its strides in the
    3x3 convolutions: MoCo's configs (INPUT.FORMAT RGB, STRIDE_IN_1X1 False, its PIXEL_MEAN and PIXEL_STD) fit.
    NumPy 1.26 or newer reads it.
    """
    arrays = {detectron2_name(name): value.numpy() for name, value in state.items()}
    with saved_file(path) as temporary, temporary.open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "instance_ssl", "matching_heuristics": True}, file, protocol=4)


def write_onnx(backbone: Backbone, image_size: int, path: Path) -> None:
    """The features as an ONNX graph of opset 18: images (batch, 3, S, S), normalised → features (batch, F), float32.

    The batch is of any size; S is `image_size`. Batch norm is in evaluation mode.
    """
    network = copy.deepcopy(backbone).cpu().eval()
    # Two images: torch.export takes a batch of one for a constant.
    images = torch.zeros(2, 3, image_size, image_size)
    with saved_file(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        torch.onnx.export(
            network,
            (images,),
            temporary,
            input_names=["images"],
            output_names=["features"],
            opset_version=ONNX_OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            dynamo=True,
            verbose=False,
        )
