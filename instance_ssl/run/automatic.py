"""Chooses what an experiment leaves to `auto`, from the images and the machine, with a reason for each choice.

The rules aim at a training of minutes on whatever there is, and at numbers that another machine can resume with: a run
records what was chosen and keeps it. Imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from instance_ssl.config.draft import Draft
from instance_ssl.config.evaluation import KnnConfig
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.config.optimization import OptimizationConfig

# Sides of images; all but none are multiples of a vision transformer's patch of 16.
_SIDES = (16, 32, 64, 96, 128, 160, 192, 224)
# Up to this side, CIFAR's conventions hold (`data/augmentations.py`, `models/backbones.py`).
_SMALL_SIDE = 64
# Global batches, most of which many numbers of ranks divide.
_BATCHES = (1, 2, 4, 6, 12, 24, 48, 96, 192, 384, 768)
_LEAST_STEPS = 4  # of an epoch
# 0.03 at 64 images beside the paper's 0.0075 did best in short trainings (runners/results/ablations_cpu_202611.md).
_RATE_FACTOR = 4
_MOST_WORKERS = 16


@dataclass(frozen=True)
class Device:
    """What a training of minutes may take on a kind of device.

    Attributes:
        name: with its article, for messages.
        tera_flops: forward and backward passes of a whole training. 10 are 3 to 7 minutes on two CPU cores; the GPU's
            are an estimate, for this has not been measured on one.
        stem_giga_flops: forward and backward pass of one view up to which images keep their resolution in the stem.
        side: largest image side in pixels.
        batch: largest global batch.
        backbone: network whose training takes minutes.
    """

    name: str
    tera_flops: float
    stem_giga_flops: float
    side: int
    batch: int
    backbone: str


CPU = Device("a CPU", 10, 4, 64, 96, "small_cnn")
GPU = Device("a GPU", 10_000, 100, 224, 768, "resnet18")


@dataclass(frozen=True)
class Facts:
    """What the choices depend on.

    Attributes:
        num_images: N.
        short_side: median of some images' short sides in pixels.
        class_size: images of a class, on average, that evaluations compare with; None: there are no labels.
        world_size: number of ranks.
        cores: of one rank.
        micro_batch_size: the JSON's; None: `auto`.
        view_flops: of forward and backward pass of a view, by experiment.
    """

    device: Device
    num_images: int
    short_side: int
    class_size: int | None
    world_size: int
    cores: int
    micro_batch_size: int | None
    view_flops: Callable[[ExperimentConfig], int]


@dataclass(frozen=True)
class Choice:
    """A key's value and why, in a few words."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = f"{self.value:g}" if isinstance(self.value, float) else self.value
        return f"auto: {self.key} = {value} ({self.reason})"


def choose(draft: Draft, facts: Facts) -> list[Choice]:
    """Chooses all that `draft` leaves to choose, but `data.kind`, which decides which images there are."""
    choices: list[Choice] = []
    for key, rule in _RULES.items():
        if key in draft.auto:
            config = draft.completed({choice.key: choice.value for choice in choices})
            if (chosen := rule(config, facts)) is not None:
                choices.append(Choice(key, *chosen))
    return choices


def complete(draft: Draft, facts: Facts, say: Callable[[str], None]) -> ExperimentConfig:
    """Returns the experiment with what `choose` chooses, each choice said with its reason."""
    choices = choose(draft, facts)
    for choice in choices:
        say(str(choice))
    return draft.completed({choice.key: choice.value for choice in choices})


def _image_size(_: ExperimentConfig, facts: Facts) -> tuple[int, str]:
    most = min(facts.short_side, facts.device.side)
    size = max((side for side in _SIDES if side <= most), default=_SIDES[0])
    return size, f"short sides are about {facts.short_side} px; {facts.device.name} gets up to {facts.device.side} px"


def _backbone(_: ExperimentConfig, facts: Facts) -> tuple[str, str]:
    return facts.device.backbone, f"{facts.device.name} trains it in minutes"


def _stem(config: ExperimentConfig, facts: Facts) -> tuple[str, str] | None:
    model, size = config.model, config.data.image_size
    if not model.backbone.startswith("resnet"):
        return None  # it has one of its own
    if size > _SMALL_SIDE:
        return "imagenet", f"images above {_SMALL_SIDE} px"
    small = config.model_copy(update={"model": model.model_copy(update={"stem": "small"})})
    giga_flops, most = facts.view_flops(small) / 1e9, facts.device.stem_giga_flops
    cost = f"the 3x3 stem takes {giga_flops:.2g} GFLOP a view at {size} px; {facts.device.name} gets up to {most:g}"
    return ("small" if giga_flops <= most else "imagenet"), cost


def _crop_scale(config: ExperimentConfig, _: Facts) -> tuple[float, str]:
    is_small = config.data.image_size <= _SMALL_SIDE
    return (0.2, f"images up to {_SMALL_SIDE} px") if is_small else (0.08, f"images above {_SMALL_SIDE} px")


def _batch(_: ExperimentConfig, facts: Facts) -> tuple[int, str]:
    unit = facts.world_size * (facts.micro_batch_size or 1)
    most = min(facts.device.batch, facts.num_images // _LEAST_STEPS)
    size = max((batch for batch in _BATCHES if batch <= most and batch % unit == 0), default=0)
    size = size or max(unit, most // unit * unit)
    steps = facts.num_images // size
    return (
        size,
        f"{steps:,} steps an epoch of {facts.num_images:,} images; up to {facts.device.batch} on {facts.device.name}",
    )


def _learning_rate(config: ExperimentConfig, _: Facts) -> tuple[float, str] | None:
    if config.optimization.optimizer != "sgd":
        return None  # its own rule, which null stands for
    batch = config.optimization.global_batch_size
    rate = _RATE_FACTOR * OptimizationConfig(global_batch_size=batch).peak_learning_rate
    return rate, f"{_RATE_FACTOR} times the paper's for a batch of {batch}, for a short training"


def _epochs(config: ExperimentConfig, facts: Facts) -> tuple[int, str]:
    flops, most = facts.view_flops(config), OptimizationConfig().epochs
    views = int(facts.device.tera_flops * 1e12 / flops)
    epochs = min(most, max(1, views // (config.augmentation.num_views * facts.num_images)))
    return epochs, (
        f"up to {most} within {views:,} views of {flops / 1e9:.2g} GFLOP: {facts.device.name} gets "
        f"{facts.device.tera_flops:g} TFLOP, which is minutes"
    )


def _warmup_epochs(config: ExperimentConfig, _: Facts) -> tuple[int, str]:
    most = OptimizationConfig().warmup_epochs
    return min(most, config.optimization.epochs // 20), f"a twentieth of the epochs, up to {most}"


def _num_hard_classes(_: ExperimentConfig, facts: Facts) -> tuple[int, str]:
    return min(100, max(1, facts.num_images // 20)), "a twentieth of the images, 1 to 100"


def _num_workers(_: ExperimentConfig, facts: Facts) -> tuple[int, str]:
    cores = "1 core" if facts.cores == 1 else f"{facts.cores} cores"
    if facts.device is CPU:
        return min(_MOST_WORKERS, facts.cores // 2), f"half of a rank's {cores}; the training needs the others"
    return max(1, min(_MOST_WORKERS, facts.cores - 1)), f"a rank has {cores}"


def _neighbours(_: ExperimentConfig, facts: Facts) -> tuple[list[int], str] | None:
    if facts.class_size is None:
        return None  # there are no labels to vote with
    fitting = [k for k in (*KnnConfig().neighbours, 5) if k <= facts.class_size]
    return fitting or [1], f"a class has {facts.class_size:,} images to compare with, on average"


# By key, each after those that it depends on; None leaves the default.
_RULES: dict[str, Callable[[ExperimentConfig, Facts], tuple[Any, str] | None]] = {
    "data.image_size": _image_size,
    "model.backbone": _backbone,
    "model.stem": _stem,
    "augmentation.min_crop_scale": _crop_scale,
    "optimization.global_batch_size": _batch,
    "optimization.learning_rate": _learning_rate,
    "optimization.epochs": _epochs,
    "optimization.warmup_epochs": _warmup_epochs,
    "classifier.num_hard_classes": _num_hard_classes,
    "data.num_workers": _num_workers,
    "evaluation.knn.neighbours": _neighbours,
}
