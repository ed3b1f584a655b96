"""A backbone in the layout of timm's local directories and of the Hugging Face Hub.

`timm.create_model("local-dir:FOLDER", pretrained=True)` reads it, `huggingface-cli upload NAME FOLDER` publishes it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from instance_ssl.checkpoint.export import write_safetensors
from instance_ssl.files.atomic import write_json, write_text
from instance_ssl.models.backbones import Backbone, ResNet
from instance_ssl.models.library_networks import LibraryBackbone

HUB_FILES = ("config.json", "model.safetensors", "README.md")


class Preprocessing(NamedTuple):
    """How images become the network's input.

    Attributes:
        image_size: S, pixels.
        crop_share: side of the centre crop divided by the resized short side.
        mean, std: of the channels, of values in [0, 1].
    """

    image_size: int
    crop_share: float
    mean: Sequence[float]
    std: Sequence[float]


def timm_network(backbone: Backbone, name: str, *, small_stem: bool) -> tuple[str, dict[str, Any]] | None:
    """timm's name and arguments for a network that timm itself can build; None for another.

    Args:
        name: `model.backbone`.
        small_stem: whether a ResNet has the 3x3 stem, which timm's has not.
    """
    if isinstance(backbone, LibraryBackbone):
        library, _, network = name.partition("/")
        known = library == "timm" and not backbone.has_halved_stride
        return (network.partition(".")[0], backbone.arguments) if known else None
    return (name, {}) if isinstance(backbone, ResNet) and not small_stem else None


def write_hub(
    folder: Path,
    state: dict[str, Tensor],
    network: tuple[str, dict[str, Any]] | None,
    preprocessing: Preprocessing,
    described: dict[str, Any],
    load: dict[str, str],
) -> None:
    """Writes config.json, model.safetensors and README.md.

    Args:
        network: what `timm_network` returned.
        described: the model card's fields, `architecture` and `feature_dim` among them.
        load: Python that loads the network, by library, where timm cannot by itself.
    """
    folder.mkdir(exist_ok=True)
    size = preprocessing.image_size
    inputs = {
        "input_size": [3, size, size],
        "interpolation": "bicubic",
        "crop_pct": preprocessing.crop_share,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }
    config: dict[str, Any] = {"num_classes": 0, "num_features": described["feature_dim"]}
    if network is None:
        config |= {"architecture": described["architecture"], "load": load, **inputs}
    else:
        name, arguments = network
        config |= {"architecture": name, "model_args": arguments}
        config["pretrained_cfg"] = {**inputs, "num_classes": 0, "first_conv": "", "classifier": ""}
    write_safetensors(state, folder / "model.safetensors")
    write_json(folder / "config.json", config)
    write_text(folder / "README.md", _card(network is not None, described, load))


def _card(is_timm_s: bool, described: dict[str, Any], load: dict[str, str]) -> str:
    library = "library_name: timm\n" if is_timm_s else ""
    how = (
        "model = timm.create_model('hf-hub:OWNER/NAME', pretrained=True)  # or local-dir:FOLDER"
        if is_timm_s
        else "\n".join(load.values()).replace("backbone.pth", "model.safetensors")
    )
    rows = "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in described.items())
    return (
        f"---\n{library}tags:\n- image-feature-extraction\n- self-supervised\n---\n\n"
        f"# {described['architecture']}, pretrained without labels\n\n"
        "Trained with instance_ssl to tell every image apart from every other (Liu et al., Train a One-Million-Way "
        "Instance Classifier for Unsupervised Visual Representation Learning, AAAI 2021). It maps images to features; "
        f"it has no classifier.\n\n```python\n{how}\n```\n\n| | |\n| --- | --- |\n{rows}\n"
    )
