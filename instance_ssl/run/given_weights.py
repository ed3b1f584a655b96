"""Weights that a run is given: `model.initial_weights` to start from, `evaluation.weights` to evaluate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from instance_ssl.checkpoint.state import ENCODER_FILES, checkpoint_at, load_encoder
from instance_ssl.checkpoint.weights import backbone_network, load_state, read_weights
from instance_ssl.errors import UserError, escape
from instance_ssl.models.encoder import Encoder
from instance_ssl.models.library_networks import pretrained_state
from instance_ssl.run.build import seeded_encoder
from instance_ssl.run.stage import Stage

_NAMED = 5


class InitialEncoder(NamedTuple):
    """The encoder that a run starts from, and where its backbone's weights come from: None for random ones."""

    encoder: Encoder
    origin: dict[str, Any] | None


def initial_encoder(stage: Stage) -> InitialEncoder:
    """The experiment's random encoder, with `model.initial_weights` in its backbone, on its device. Collective.

    Raises:
        UserError: the weights are not there or do not fit.
    """
    encoder, source = seeded_encoder(stage.config), stage.config.model.initial_weights
    origin: dict[str, Any] | None = None
    if isinstance(source, Path):
        if stage.world.broadcast_object(source.is_dir()):
            origin = _load_run(stage, encoder, source)
        else:
            origin = load_file(stage, encoder, source, "model.initial_weights")
    elif source is not None:
        origin = _load_library(stage, encoder, source)
    return InitialEncoder(encoder.to(stage.world.device), origin)


def load_file(stage: Stage, encoder: Encoder, path: Path, key: str) -> dict[str, Any]:
    """Fills the backbone from a file, read by every rank; returns its name and hash. Collective.

    Args:
        key: the configuration's, for messages.

    Raises:
        UserError: the file is damaged, does not fit or is another one on another node.
    """
    weights = stage.together(lambda: read_weights(path, encoder.backbone))
    if len(set(stage.world.all_gather_objects(weights.sha256))) > 1:
        raise UserError(f"{key} {path} is not the same file on all nodes")
    stage.together(lambda: load_state(backbone_network(encoder.backbone), weights.state, f"{key} {path}"))
    prefix = f" ({escape(weights.prefix)}*)" if weights.prefix else ""
    stage.log.say(f"{_title(key)}: {path}{prefix}, sha256 {weights.sha256[:12]}{_ignored(weights.aside)}")
    return {"file": str(path), "sha256": weights.sha256, "prefix": weights.prefix}


def _load_run(stage: Stage, encoder: Encoder, path: Path) -> dict[str, Any]:
    """Fills the backbone from the newest checkpoint of another run, or from a checkpoint. Collective."""
    checkpoint = checkpoint_at(path, stage.world, ENCODER_FILES)

    def load() -> None:
        state = load_encoder(checkpoint)[0]
        part = "backbone."
        of_backbone = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        load_state(encoder.backbone, of_backbone, f"model.initial_weights {checkpoint.directory}")

    stage.together(load)
    position = checkpoint.position
    stage.log.say(f"initial weights: {checkpoint.directory}, {position.epoch} epochs; its projection is not used")
    return {"checkpoint": str(checkpoint.directory), "step": position.step, "epoch": position.epoch}


def _load_library(stage: Stage, encoder: Encoder, source: str) -> dict[str, Any]:
    """Fills the backbone with the library's own weights. Collective."""
    model, network = stage.config.model, backbone_network(encoder.backbone)

    def load() -> tuple[str, ...]:
        name = model.backbone.partition("/")[2] or model.backbone
        state = pretrained_state(source, name, model.backbone_options, stage.config.data.image_size, network)
        own, aside = _divided(state, network.state_dict())
        load_state(network, own, f"model.initial_weights {source}")
        return aside

    aside = stage.together(load)
    stage.log.say(f"initial weights: {source}'s of {model.backbone}{_ignored(aside)}")
    return {"library": source, "network": model.backbone}


def _divided(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The network's own tensors, and the names of the rest, which is the classifier."""
    return {name: value for name, value in state.items() if name in own}, tuple(n for n in state if n not in own)


def _title(key: str) -> str:
    return "initial weights" if key == "model.initial_weights" else "weights"


def _ignored(aside: tuple[str, ...]) -> str:
    more = f" and {len(aside) - _NAMED} more" if len(aside) > _NAMED else ""
    return f"; ignored: {escape(', '.join(aside[:_NAMED]))}{more}" if aside else ""
