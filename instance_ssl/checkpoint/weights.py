"""Reads a backbone's weights by its library's names from a file of any origin."""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from instance_ssl.checkpoint.directory import read_tensors
from instance_ssl.errors import UserError, escape, in_one_line, tried
from instance_ssl.files.named_part import split_part
from instance_ssl.models.backbones import Backbone, SmallCnn
from instance_ssl.models.library_networks import LibraryBackbone

_SHOWN = 3
_DEEPEST = 8
# Parts of names that wrappers put anywhere: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Names that a ResNet has, and a small_cnn; then the children of a ResNet that have tensors, for a Sequential of them.
_RESNET = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight")
_SMALL_CNN = ("blocks.0.weight", "blocks.1.running_mean", "blocks.4.weight", "blocks.8.weight")
_BACKBONE_PART = re.compile(r"(conv|bn|layer)[0-9]+")
_CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
# Of a word in a name, the word that the trained network has where this one is its moving average; "" is none.
_TRAINED = {
    "k": ("q",),
    "key": ("query",),
    "teacher": ("student", ""),
    "target": ("online", ""),
    "momentum": ("base", ""),
    "ema": ("", "model"),
}


class Weights(NamedTuple):
    """Tensors of a file by their names in the network, and what was ignored.

    Attributes:
        state: without heads and the prefix, on the CPU.
        ignored: names of the file's other tensors, such as fc.weight; without the prefix where they have it.
        sha256: of the file, in hexadecimal.
        prefix: what the names in the file begin with, "" or ending in a dot.
        aside: the modules of `ignored`: the shortest prefixes that distinguish them from the backbone.
    """

    state: dict[str, Tensor]
    ignored: list[str]
    sha256: str
    prefix: str = ""
    aside: tuple[str, ...] = ()


def read_weights(path: Path, backbone: Backbone | None = None) -> Weights:
    """Reads a backbone from a file of safetensors or of `torch.save`, by its content: named tensors, however nested.

    Nothing in the file is run. The backbone is found by its names below any prefix, or as a Sequential of a ResNet's
    children; heads and all else are ignored. Of a network and its moving average (encoder_q and encoder_k, student and
    teacher, model and model_ema), the network is taken; `file.pth#teacher` selects another one.

    Args:
        backbone: what the tensors are for; a library's network is found by its own names. None: a ResNet or small_cnn.

    Raises:
        UserError: the file is absent or damaged, or holds code, no or several backbones or numbers that are not finite.
    """
    path, choice = split_part(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"weights file {tried(path)}: {error.strerror}") from None
    # A safetensors file begins with its header's length in eight bytes and an object; a zip or a pickle does not.
    header_bytes = int.from_bytes(start[:8], "little")
    is_safetensors = start[8:] == b"{" and header_bytes < path.stat().st_size
    if is_safetensors or (path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80"))):
        content: dict[str, Any] = dict(_read_safetensors(path))
    else:
        # Of what others keep beside the tensors, the command line is the one class that is harmless and common.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = read_tensors(path, mapped=False)
    found = _tensors(content)
    bare = {".".join(part for part in name.split(".") if part not in _WRAPPERS): found[name] for name in found}
    found = bare if len(bare) == len(found) else found
    if not found:
        what = f"'{escape(str(next(iter(content))))}' is not a tensor" if content else "there are none"
        raise UserError(f"weights file {path}: expected tensors by torchvision's names, but {what}")
    own_names = list(backbone.network.state_dict()) if isinstance(backbone, LibraryBackbone) else None
    prefix, names = _choose(found, choice, path, own_names)
    state = {name: found[full] for name, full in names.items()}
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"weights file {path}: {escape(name)} is not finite; give an intact one")
    rest = set(names.values())
    others = [name for name in found if name not in rest]
    num_shared = {name: _common_prefix([name, prefix]).count(".") for name in others}
    aside = tuple(dict.fromkeys(".".join(name.split(".")[: num_shared[name] + 1]) for name in others))
    ignored = [name.removeprefix(prefix).removeprefix("state_dict.") for name in others]
    return Weights(state, ignored, sha256, prefix, aside)


def backbone_network(backbone: Backbone) -> nn.Module:
    """The module whose keys are its library's: torchvision's, timm's (a small_cnn's are its own)."""
    return backbone if isinstance(backbone, SmallCnn) else backbone.network


def load_state(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Fills `module` with exactly these tensors; counts of batches (`num_batches_tracked`) may be absent.

    Args:
        origin: what the tensors come from, for the error.

    Raises:
        UserError: naming keys that are missing, extra or of another shape.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(".num_batches_tracked")]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} is {_shape(state[name])} instead of {_shape(value)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing or extra or shapes:
        found = {"missing": missing, "extra": extra, "of another shape": shapes}
        told = "; ".join(f"{len(names)} {what} ({_first_of(names)})" for what, names in found.items() if names)
        raise UserError(
            f"{origin} does not fit this encoder: {told}; give weights of the same network, or set model.backbone, "
            "model.stem (or data.image_size, which chooses it) and the other keys of model to what they are of"
        )
    module.load_state_dict({**own, **state})


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f'{path} needs safetensors: pip install -e ".[export]"') from None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"weights file {path}: not a safetensors file: {in_one_line(error)}") from None


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """All tensors by their dotted names. A file can hold a dictionary twice, or within itself: each is entered once."""
    found: dict[str, Tensor] = {}
    entered: set[int] = set()

    def enter(values: Mapping[Any, Any], prefix: str, depth: int) -> None:
        entered.add(id(values))
        for key, value in values.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{key}"] = value
            elif isinstance(value, dict) and id(value) not in entered and depth < _DEEPEST:
                enter(value, f"{prefix}{key}.", depth + 1)

    enter(content, "", 1)
    return found


def _choose(
    found: dict[str, Tensor], choice: str | None, path: Path, own_names: list[str] | None
) -> tuple[str, dict[str, str]]:
    """The prefix of the backbone to take, and its names in the file by those in the network.

    Where there is none: all tensors but `fc`, so that `load_state` reports what is missing.

    Args:
        own_names: of the network, where it is a library's.
    """
    backbones = _backbones(found) if own_names is None else _places_of(own_names, found)
    chosen = {
        prefix: names
        for prefix, names in backbones.items()
        if choice is None or prefix.rstrip(".") == choice or (choice and f".{choice}." in f".{prefix}")
    }
    trained = {prefix: names for prefix, names in chosen.items() if not _is_average(prefix, chosen)}
    distinct: dict[str, dict[str, str]] = {}
    for prefix, names in trained.items():
        if not any(
            names.keys() == others.keys() and all(torch.equal(found[names[n]], found[others[n]]) for n in names)
            for others in distinct.values()
        ):
            distinct[prefix] = names
    if len(distinct) == 1:
        return next(iter(distinct.items()))
    shown = ", ".join(escape(prefix.rstrip(".")) or "(no prefix)" for prefix in backbones)
    if len(distinct) > 1:
        example = escape(next(prefix for prefix in distinct if prefix).rstrip("."))
        raise UserError(f"weights file {path} holds several backbones: {shown}; choose one: {path}#{example}")
    if choice is not None:
        raise UserError(f"weights file {path} holds no backbone under '{escape(choice)}', only: {shown or 'none'}")
    prefix = _common_prefix(found)
    names = {name.removeprefix(prefix): name for name in found}
    return prefix, {name: full for name, full in names.items() if not name.startswith("fc.")}


def _places_of(own_names: list[str], found: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Of every prefix below which the file has most of these names: name in the network → name in the file.

    Most, not all: `load_state` reports what is missing better than a search that found nothing.
    """
    own = set(own_names)
    counts: Counter[str] = Counter()
    for full in found:
        parts = full.split(".")
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in own:
                counts["".join(f"{part}." for part in parts[:depth])] += 1
    most = max(counts.values(), default=0)
    prefixes = [prefix for prefix, count in counts.items() if count == most > len(own_names) // 2]
    return {prefix: {name: prefix + name for name in own_names if prefix + name in found} for prefix in prefixes}


def _backbones(found: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Of every backbone in the file: its prefix → names in the network → names in the file."""
    backbones = {}
    for prefix in dict.fromkeys(prefix for name in found for prefix in _prefixes_before(name)):
        below = {name.removeprefix(prefix): name for name in found if name.startswith(prefix)}
        if all(name in below for name in _SMALL_CNN):
            backbones[prefix] = {name: full for name, full in below.items() if name.startswith("blocks.")}
        elif all(name in below for name in _RESNET):
            backbones[prefix] = {n: full for n, full in below.items() if _BACKBONE_PART.fullmatch(n.partition(".")[0])}
        elif children := _named_children(below):
            backbones[prefix] = children
    return backbones


def _prefixes_before(name: str) -> list[str]:
    """Where a backbone may begin that has a tensor of this name."""
    if numbered := re.fullmatch(r"((?:.*\.)?)[0-9]+\.0\.conv1\.weight", name, re.DOTALL):
        return [numbered[1]]
    return [name.removesuffix(end) for end in (_RESNET[2], _SMALL_CNN[0]) if f".{name}".endswith(f".{end}")]


def _named_children(below: Mapping[str, str]) -> dict[str, str] | None:
    """The names of `Sequential(*resnet.children())` as the ResNet's own; None where it is none."""
    places = sorted({int(name.partition(".")[0]) for name in below if re.match(r"[0-9]{1,4}\.", name)})
    if len(places) < len(_CHILDREN):
        return None
    renamed = dict(zip(map(str, places), _CHILDREN, strict=False))
    parts = ((name.partition("."), full) for name, full in below.items())
    named = {f"{renamed[place]}.{rest}": full for (place, _, rest), full in parts if place in renamed}
    return named if all(name in named for name in _RESNET) else None


def _is_average(prefix: str, prefixes: Iterable[str]) -> bool:
    """Whether a network is, by its name, the moving average of another one there."""
    there = [_parts(other) for other in prefixes]
    parts = _parts(prefix)
    for place, part in enumerate(parts):
        words = part.split("_")
        for index, word in enumerate(words):
            for trained in _TRAINED.get(word, ()):
                twin = "_".join(filter(None, [*words[:index], trained, *words[index + 1 :]]))
                if [*parts[:place], *filter(None, [twin]), *parts[place + 1 :]] in there:
                    return True
    return False


def _parts(prefix: str) -> list[str]:
    """The parts of a prefix, without DistributedDataParallel's, which one of two networks alone may have."""
    return [part for part in prefix.split(".") if part not in ("", "module")]


def _common_prefix(names: Iterable[str]) -> str:
    """What all names begin with, in whole parts."""
    places = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, places))


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a scalar"
