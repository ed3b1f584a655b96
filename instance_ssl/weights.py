"""A backbone's weights by torchvision's names, from a file that somebody else may have made."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from instance_ssl.checkpoint_files import read_tensors
from instance_ssl.errors import UserError, tried
from instance_ssl.models.backbones import ResNet, SmallCnn

# Wrappers' prefixes, stripped when every key has them: DistributedDataParallel, MoCo's query encoder, this project.
_PREFIXES = ("module.", "encoder_q.", "backbone.", "network.")
_SHOWN = 3


class Weights(NamedTuple):
    """Tensors of a file by their names in the network, and what was left aside.

    Attributes:
        state: without classifier and wrappers' prefixes, on the CPU.
        ignored: names in the file of what is no backbone's, such as fc.weight.
        sha256: of the file, in hexadecimal.
    """

    state: dict[str, Tensor]
    ignored: list[str]
    sha256: str


def read_weights(path: Path) -> Weights:
    """Reads a .safetensors file, or one of `torch.save`: named tensors, or a checkpoint with them at `state_dict`.

    Nothing in the file is run. The keys `fc.*` are left aside. `module.`, `backbone.` and `network.` before all keys
    are stripped; of MoCo's checkpoints, the query encoder (`module.encoder_q.`) is taken and the rest left aside.

    Raises:
        UserError: the file is absent, damaged, holds code or no named tensors, or a number in it is not finite.
    """
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"weights file {tried(path)}: {error.strerror}") from None
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_tensors(path, mapped=False)
    nested = content.get("state_dict")
    found = nested if isinstance(nested, dict) else content
    foreign = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if foreign or not found:
        what = f"'{foreign[0]}' is no tensor" if foreign else "there are none"
        raise UserError(f"weights file {path}: expected tensors by torchvision's names, but {what}")
    state, ignored = _without_classifier(*_without_prefixes({str(name): value for name, value in found.items()}))
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"weights file {path}: {name} is not finite; give an intact one")
    return Weights(state, ignored, sha256)


def backbone_network(backbone: ResNet | SmallCnn) -> nn.Module:
    """The module whose keys are torchvision's (a small_cnn's are its own)."""
    return backbone.network if isinstance(backbone, ResNet) else backbone


def load_state(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Fills `module` with exactly these tensors; counts of batches (`num_batches_tracked`) may be absent.

    Args:
        origin: what the tensors come from, for the error.

    Raises:
        UserError: one line: which keys are missing, which are there without a use, and which shapes differ.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(".num_batches_tracked")]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} is {_shape(state[name])} instead of {_shape(value)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    complaints = [
        _first_of("missing", missing),
        _first_of("extra", extra),
        _first_of("of another shape", shapes),
    ]
    if missing or extra or shapes:
        told = "; ".join(complaint for complaint in complaints if complaint)
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
        raise UserError(f"weights file {path}: not a safetensors file: {' '.join(str(error).split())}") from None


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The state without what all keys begin with, and the keys of all that is not MoCo's query encoder."""
    query = [name for name in state if name.startswith("module.encoder_q.")]
    ignored = [name for name in state if query and name not in query]
    state = {name: state[name] for name in query} if query else state
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
                stripped = True
    return state, ignored


def _without_classifier(state: dict[str, Tensor], ignored: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    classifier = [name for name in state if name.startswith("fc.")]
    return {name: value for name, value in state.items() if name not in classifier}, classifier + ignored


def _first_of(what: str, items: list[str]) -> str:
    """`3 missing (a, b, …)`; nothing for none."""
    if not items:
        return ""
    more = ", …" if len(items) > _SHOWN else ""
    return f"{len(items)} {what} ({', '.join(items[:_SHOWN])}{more})"


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a scalar"
