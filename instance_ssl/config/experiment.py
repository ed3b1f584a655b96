"""The experiment: everything that changes the mathematics. Defaults are the paper's main setting.

A YAML file lists only what differs. Where and how it is computed, and what memory it takes, is the DeepSpeed JSON's
(`config/deepspeed.py`).
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from instance_ssl.config.choices import (
    MIN_TEMPERATURE,
    BackboneName,
    InitializationMode,
    LossForm,
    ProjectionName,
    SamplingMode,
    StemName,
)
from instance_ssl.config.data import DataConfig
from instance_ssl.config.evaluation import EvaluationConfig, ExportConfig
from instance_ssl.config.messages import (
    DEEPSPEED_KEYS,
    describe_validation_error,
    fields_at,
    takes_any_key,
    unknown_key,
)
from instance_ssl.config.optimization import WEIGHT_DECAYS, OptimizationConfig
from instance_ssl.config.types import (
    AUTO,
    LocalPath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from instance_ssl.errors import UserError, reason, shorten, tried
from instance_ssl.files.structured import MalformedError, parse_yaml


class AugmentationConfig(Section):
    """Random views for training. The strength of jitter and blur follows the image size by default (SimCLR B.9).

    Attributes:
        view: SimCLR's augmentations, or `digit` for small handwriting.
        num_views: views per image and step.
        min_crop_scale: smallest area of a random crop, as a share of the image; `auto`: 0.2 up to 64 px, else 0.08.
        jitter_strength: strength of the colour jitter; null: 1, or 0.5 for images up to 64 px.
        blur: whether views are blurred; null: only images above 64 px.
    """

    view: Literal["simclr", "digit"] = "simclr"
    num_views: PositiveInt = 2
    min_crop_scale: Annotated[float, Field(gt=0, le=1), AUTO] = 0.08
    jitter_strength: Annotated[float, Field(ge=0, le=2.5)] | None = None
    blur: bool | None = None


class ModelConfig(Section):
    """The encoder: a backbone and a projection to the embedding.

    Attributes:
        backbone: a ResNet (`resnet18`, `resnet34`, `resnet50`, `resnet101`), three convolution blocks (`small_cnn`),
            `torchvision/NAME`, `timm/NAME` (`timm` extra), or `package.module:function`, which is called with
            `backbone_options` and returns a module of images (b, 3, S, S) to features (b, F) or maps (b, F, h, w);
            `auto`: `small_cnn` on a CPU, `resnet18` on a GPU.
        backbone_options: arguments of the constructor of a library's network or of the function.
        stem: first layers of a ResNet: ImageNet's 7x7, or 3x3 without max-pool (`small`); of a library's network: as it
            is, or for small images (half the stride in its first convolution; 8 x 8 patches for a ViT of timm); `auto`:
            `small` up to 64 px and, of a ResNet beside other keys that are `auto`, if the device can afford it.
        initial_weights: weights to start from instead of random ones: a file in any layout that `evaluation.weights`
            may have, a run directory, or `timm` or `torchvision` for the library's own, which are downloaded. Batch
            norms then keep the statistics of the weights in the prior's pass.
        projection: Linear-ReLU-Linear, the same with SimCLR's batch norms (`mlp_bn`), or one layer (Table 2).
        projection_hidden_dim: width of the hidden layer; null: the backbone's feature width.
        embedding_dim: D, width of an embedding and of a row of W.
        freeze_epochs: first epochs in which the backbone stays as it is, with batch norm in evaluation mode; the
            projection and W alone learn. The schedule goes on meanwhile.
    """

    backbone: Annotated[str, AUTO] = "resnet50"
    backbone_options: dict[str, Any] = Field(default_factory=dict)
    stem: StemName = "auto"
    initial_weights: Literal["timm", "torchvision"] | LocalPath | None = None
    projection: ProjectionName = "mlp"
    projection_hidden_dim: PositiveInt | None = None
    embedding_dim: PositiveInt = 128
    freeze_epochs: NonNegativeInt = 0

    @field_validator("backbone")
    @classmethod
    def _names_a_network(cls, value: str) -> str:
        own = get_args(BackboneName)
        if value not in own and not re.fullmatch(r"(torchvision|timm)/[\w.-]+|[^\W\d][\w.]*:[^\W\d]\w*", value):
            match = difflib.get_close_matches(value, own, n=1)
            near = f"; did you mean '{match[0]}'?" if match else ""
            raise ValueError(
                f"expected {', '.join(own)}, torchvision/NAME, timm/NAME or package.module:function, found "
                f"{value!r}{near}"
            )
        return value

    @model_validator(mode="after")
    def _options_have_a_constructor(self) -> "ModelConfig":
        if self.backbone_options and self.backbone in get_args(BackboneName):
            raise ValueError(
                f"model.backbone_options are for networks of torchvision, timm or your own, not for {self.backbone}: "
                f"remove them, or take torchvision/{self.backbone}"
            )
        if self.initial_weights == "timm" and not self.backbone.startswith("timm/"):
            raise ValueError("model.initial_weights timm needs model.backbone timm/NAME")
        if self.initial_weights == "torchvision" and (":" in self.backbone or self.backbone[:5] in ("timm/", "small")):
            raise ValueError("model.initial_weights torchvision needs a network of torchvision in model.backbone")
        return self


class ClassifierConfig(Section):
    """Eq. 1 to 3 and the prior. K = `num_hard_classes`, α = `smoothing_factor`, τ = `temperature`.

    Attributes:
        temperature: τ, which divides the cosines.
        smoothing_factor: α, the share of the label given to the hardest classes; 0 is Eq. 1.
        num_hard_classes: K, hardest classes per class; `auto`: a twentieth of the images, 1 to 100.
        loss_form: Eq. 3 with the sum inside the logarithm (`mixture`), or the usual label-smoothed cross entropy.
        initialization: batch norm during the prior's pass (Figure 4), or `gaussian` rows without a pass.
        initialization_batch_size: images over all ranks that give one set of batch-norm statistics in the prior's pass.
        initialization_view: view of each image in that pass: the deterministic `evaluation` view or a random
            `training` view. The paper does not say.
        weight_decay: weight decay of W; null: `optimization.weight_decay` with `sgd`, as in PIC, else the paper's 1e-4.
        learning_rate: W's learning rate at the end of the warm-up; null: the encoder's with `sgd`, else the paper's
            0.48 · global_batch_size / 4096. The schedule is the encoder's.
        learning_rate_multiplier: factor on W's learning rate; 1 in the paper, which has one SGD.
        sampling: classes in a step's softmax: all N (`full`), or Table 3's: the batch's positives and `random` others,
            or the most `recent` positives (PIC). Sampling excludes smoothing, as in Table 3.
        num_sampled_classes: sampled classes per step, positives included (2^10 to 2^16 in Table 3).
    """

    temperature: PositiveFloat = 0.15
    smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.2
    num_hard_classes: Annotated[NonNegativeInt, AUTO] = 100
    loss_form: LossForm = "mixture"
    initialization: InitializationMode = "running"
    initialization_batch_size: PositiveInt = 256
    initialization_view: Literal["evaluation", "training"] = "evaluation"
    weight_decay: NonNegativeFloat | None = None
    learning_rate: PositiveFloat | None = None
    learning_rate_multiplier: PositiveFloat = 1.0
    sampling: Literal["full"] | SamplingMode = "full"
    num_sampled_classes: PositiveInt = 65_536

    @field_validator("temperature")
    @classmethod
    def _float32_holds_the_softmax(cls, value: float) -> float:
        if value < MIN_TEMPERATURE:
            raise ValueError(
                f"must be at least {MIN_TEMPERATURE}: no maximum is subtracted before exp(cos/temperature), "
                "and float32 holds it only down to there"
            )
        return value


class LogConfig(Section):
    """How often metrics are logged.

    Attributes:
        every_steps: steps between two lines of metrics.jsonl.
    """

    every_steps: PositiveInt = 50


class CheckpointConfig(Section):
    """When checkpoints are written, besides the end of the training, of its frozen epochs, and every agreed stop.

    Attributes:
        every_epochs: epochs between checkpoints.
        every_steps: steps between additional checkpoints, for epochs of hours; null: none.
        keep: number of newest checkpoints to keep.
        keep_every_epochs: keeps every checkpoint at a multiple of this many epochs for good; null: none.
        tolerated_failures: saves in a row that may fail (a full disk, say) before the run stops.
    """

    every_epochs: PositiveInt = 1
    every_steps: PositiveInt | None = None
    keep: PositiveInt = 2
    keep_every_epochs: PositiveInt | None = None
    tolerated_failures: NonNegativeInt = 2


class SafetyConfig(Section):
    """What a run does when something goes wrong.

    Attributes:
        join_seconds: how long ranks wait for absent ranks at the start; more than nodes differ in booting.
        hang_seconds: a rank without progress for this long writes its stacks and exits; stopped time does not count.
        max_skipped_steps: steps in a row that may be skipped because a number in them is not finite.
        spike_nats: rise of the loss above its running mean that counts as a spike; null: none does.
        rollback: at a spike, returns to the newest checkpoint and skips that batch from then on.
    """

    join_seconds: PositiveFloat = 600.0
    hang_seconds: PositiveFloat = 1800.0
    max_skipped_steps: PositiveInt = 10
    spike_nats: PositiveFloat | None = 1.0
    rollback: bool = False


class ExperimentConfig(Section):
    """One experiment: all stages read the same file.

    Attributes:
        seed: seed of weights, order, views and samples.
    """

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: DataConfig = DataConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    model: ModelConfig = ModelConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    safety: SafetyConfig = SafetyConfig()

    @property
    def classifier_peak_learning_rate(self) -> float:
        """W's learning rate at the end of the warm-up, the multiplier aside."""
        optimization = self.optimization
        if self.classifier.learning_rate is not None:
            return self.classifier.learning_rate
        is_one_sgd = optimization.optimizer == "sgd"
        return optimization.peak_learning_rate if is_one_sgd else optimization.default_rate("sgd")

    @property
    def classifier_weight_decay(self) -> float:
        """W's weight decay."""
        if self.classifier.weight_decay is not None:
            return self.classifier.weight_decay
        return self.optimization.weight_decay if self.optimization.optimizer == "sgd" else WEIGHT_DECAYS["sgd"]

    @model_validator(mode="before")
    @classmethod
    def _evaluation_data_lists_what_differs(cls, values: Any) -> Any:
        data, evaluation = (values.get(key) if isinstance(values, dict) else None for key in ("data", "evaluation"))
        if not (isinstance(data, dict) and isinstance(evaluation, dict) and isinstance(evaluation.get("data"), dict)):
            return values
        return {**values, "evaluation": {**evaluation, "data": {**data, **evaluation["data"]}}}

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "ExperimentConfig":
        if self.data.augment_on == "device" and self.augmentation.view != "simclr":
            raise ValueError(
                f"data.augment_on device does not know augmentation.view {self.augmentation.view}: set it to cpu"
            )
        epochs, warmup_epochs = self.optimization.epochs, self.optimization.warmup_epochs
        freeze_epochs = self.model.freeze_epochs
        if warmup_epochs >= epochs:
            raise ValueError(
                f"optimization.warmup_epochs {warmup_epochs} must be below optimization.epochs {epochs}: the cosine "
                "would never begin; 0 disables the warm-up"
            )
        if freeze_epochs >= epochs:
            raise ValueError(
                f"model.freeze_epochs {freeze_epochs} must be below optimization.epochs {epochs}: the backbone would "
                "never be trained"
            )
        if self.classifier.smoothing_factor > 0 and self.classifier.num_hard_classes == 0:
            raise ValueError(
                "classifier.num_hard_classes is 0 but classifier.smoothing_factor is not: "
                "set smoothing_factor to 0 for Eq. 1, or give K"
            )
        if self.classifier.smoothing_factor > 0 and self.classifier.sampling != "full":
            raise ValueError(
                f"classifier.sampling {self.classifier.sampling} excludes hardest classes that smoothing needs: "
                "set classifier.smoothing_factor to 0, as Table 3 does"
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads a YAML file and applies `--set a.b=value` overrides, whose values are YAML too.

    Raises:
        UserError: the file is missing or malformed, a key or path is unknown, or a value is out of range, or `auto`
            (`draft.load_draft` reads such files).
    """
    return validated(read_values(path, overrides), path, overrides)


def read_values(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the values of a YAML file and of `overrides`, not validated; a `UserError` if they cannot be read."""
    values = read_yaml(path)
    foreign = [key for key in values if key in DEEPSPEED_KEYS]  # JSON is YAML too
    if foreign and not any(key in ExperimentConfig.model_fields for key in values):
        raise UserError(
            f"--config {path}: this is a DeepSpeed JSON ({foreign[0]}): give it as --deepspeed_config, and an "
            "experiment such as runners/configs/pipeline_digits.yaml as --config"
        )
    for override in overrides:
        _apply_override(values, override)
    return values


def validated(values: dict[str, Any], path: Path, overrides: Sequence[str]) -> ExperimentConfig:
    """Returns the experiment with these values; a `UserError` names the file or the override at fault."""
    try:
        return ExperimentConfig.model_validate(values)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        given = [f"--set {each}" for each in overrides if f"{key}.".startswith(each.partition("=")[0].strip() + ".")]
        where = given[-1] if given else f"{path} with --set" if overrides else str(path)
        raise UserError(f"{where}: {describe_validation_error(error, ExperimentConfig)}") from None


def flatten(config: BaseModel) -> dict[str, Any]:
    """Returns the dotted keys and JSON values of a config."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {
            k: v for name, item in value.items() for k, v in walk(f"{prefix}.{name}" if prefix else name, item).items()
        }

    return walk("", config.model_dump(mode="json"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the mapping in the file of `--config`; an empty file has no keys.

    Raises:
        UserError: it is missing, not YAML, or not a mapping.
    """
    try:
        values = parse_yaml(path.read_bytes())
    except (OSError, MalformedError) as error:
        raise UserError(f"--config {tried(path) if isinstance(error, OSError) else path}: {reason(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected keys and values, found a {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: expected key=value, e.g. --set optimization.epochs=1000")
    names = path.strip().split(".")
    for depth, name in enumerate(names):
        if takes_any_key(ExperimentConfig, names[:depth]):
            break
        if name not in fields_at(ExperimentConfig, names[:depth]):
            raise UserError(f"--set {path}: {unknown_key(names[: depth + 1], ExperimentConfig)}")
    try:
        value = parse_yaml(text)
    except MalformedError as error:
        raise UserError(f"--set {path}={shorten(text)}: the value is {error}") from None
    for name in names[:-1]:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[names[-1]] = value
