"""The DeepSpeed JSON: who owns which key, what is derived, and our own section in it.

DeepSpeed ignores unknown top-level keys, silently overrides some known ones, clips gradients to norm 1 by default, and
averages gradients where this project sums them. So only a closed list of keys is accepted, and the keys that follow
from the experiment are injected here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from instance_ssl.config.batch_division import indivisible, no_share
from instance_ssl.config.choices import OptimizerName
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.config.messages import DEEPSPEED_KEYS, describe_validation_error, nearest
from instance_ssl.config.types import AUTO, NonNegativeInt, Section
from instance_ssl.errors import UserError, reason, tried
from instance_ssl.files.structured import MalformedError, read_json

if TYPE_CHECKING:
    import torch

_DERIVED = {
    "train_batch_size": "optimization.global_batch_size",
    "gradient_accumulation_steps": "global batch / (micro-batch x world size)",
    "gradient_clipping": "optimization.max_grad_norm",
    "gradient_allreduce_op": "the loss, whose encoder gradients are summed over ranks",
    "zero_allow_untested_optimizer": "optimization.optimizer",
}
_REFUSED = {
    "optimizer": "optimization.optimizer of the experiment sets it; DeepSpeed would ignore this key in silence",
    "scheduler": "the schedule is set by the experiment's optimization section",
    "bf16": "it breaks batch norm, whose buffers stay float32; use torch_autocast with dtype bfloat16",
    "fp16": "it breaks batch norm, whose buffers stay float32; use torch_autocast with dtype float16",
    "steps_per_print": "the progress bar is ours",
}
# What an optimizer needs that ZeRO's partitions do not have.
_WHOLE_TENSORS: dict[str, str] = {"lars": "the norm of each whole tensor", "muon": "whole matrices"}
# DeepSpeed's keys of this section configure its own checkpointing function for transformers. Nothing here calls it, so
# each of them would be ignored.
_REFUSED_ACTIVATION_CHECKPOINTING = {
    "partition_activations": "it divides activations over model-parallel ranks, and every rank has the whole encoder",
    "contiguous_memory_optimization": "it needs partition_activations",
    "number_checkpoints": "the checkpoints are the inputs of the backbone's stages",
    "cpu_checkpointing": "the peak is the inside of the first stage, when no other stage's input is left to move",
    "synchronize_checkpoint_boundary": "it times DeepSpeed's own checkpointing function, which is not used",
    "profile": "it times DeepSpeed's own checkpointing function, which is not used",
}

DtypeName = Literal["float32", "bfloat16", "float16"]
_Model = TypeVar("_Model", bound=BaseModel)


class ZeroSection(Section):
    """The keys of `zero_optimization` that ZeRO stages 0 to 2 read, with DeepSpeed's defaults.

    The rest of DeepSpeed's keys belong to stage 3, to offloading or to its own checkpoints, and nothing would read
    them. Checked here, because DeepSpeed's own model takes seconds to import.
    """

    stage: Literal[0, 1, 2] = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: NonNegativeInt = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: NonNegativeInt = 500_000_000
    overlap_comm: bool | None = None
    round_robin_gradients: bool = False
    ignore_unused_parameters: bool = True


class InstanceClassifierSection(Section):
    """Where and how the classifier is computed.

    Attributes:
        block_mib: workspace of one block of classes; `auto`: ten L2 caches of a core on a CPU, 256 MiB on a GPU.
        matmul_dtype: precision of the logits' matrix products; `auto`: bfloat16 under bfloat16 autocast, unless float32
            measures faster on this CPU. `float16` is not offered: exp(cos/τ) spans more than its range.
        row_dtype: precision of the rows of W; bfloat16 rows are rounded stochastically at each update.
        momentum_dtype: precision of their momentum.
        kernels: `triton` on GPUs, `torch` for the same passes in PyTorch; `auto`: `triton` where it works.
        group_size: consecutive ranks that share one copy of W, `world`: all; 1 is Table 1's replicated classifier. The
            rows' gradient is summed over the copies.
    """

    block_mib: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "auto"
    matmul_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    row_dtype: Literal["float32", "bfloat16"] = "float32"
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    kernels: Literal["auto", "torch", "triton"] = "auto"
    group_size: Literal["world"] | Annotated[int, Field(ge=1)] = "world"


@dataclass(frozen=True)
class DeepSpeedSettings:
    """A resolved DeepSpeed JSON.

    Attributes:
        engine: the configuration for `deepspeed.initialize`.
        classifier: our own section.
        micro_batch_size: images of one forward pass on one rank.
        accumulation_steps: micro-batches of one optimizer step on one rank.
        autocast: dtype of the encoder's forward pass; None is plain float32.
        recompute_stages: whether `activation_checkpointing` is given: activations inside the backbone's stages are
            recomputed in the backward pass.
        auto_matmul: what `matmul_dtype: auto` was resolved to on these ranks; None follows autocast.
    """

    engine: dict[str, Any]
    classifier: InstanceClassifierSection
    micro_batch_size: int
    accumulation_steps: int
    autocast: DtypeName | None
    recompute_stages: bool = False
    auto_matmul: DtypeName | None = None

    @property
    def autocast_dtype(self) -> "torch.dtype | None":
        """Precision of the encoder's forward pass; None is plain float32."""
        return None if self.autocast is None else _dtype(self.autocast)

    @property
    def matmul_dtype(self) -> "torch.dtype":
        """Precision of the classifier's matrix products."""
        if self.classifier.matmul_dtype != "auto":
            return _dtype(self.classifier.matmul_dtype)
        return _dtype(self.auto_matmul or ("bfloat16" if self.autocast == "bfloat16" else "float32"))

    @property
    def block_bytes(self) -> int | None:
        """Memory of one block of classes; None: chosen by device."""
        return None if self.classifier.block_mib == "auto" else int(self.classifier.block_mib * 2**20)

    @property
    def row_dtype(self) -> "torch.dtype":
        """Precision of the rows of W."""
        return _dtype(self.classifier.row_dtype)

    @property
    def momentum_dtype(self) -> "torch.dtype":
        """Precision of the rows' momentum."""
        return _dtype(self.classifier.momentum_dtype)

    def describe(self) -> str:
        """Returns all settings as JSON."""
        return json.dumps({**self.engine, "instance_classifier": self.classifier.model_dump()}, sort_keys=True)

    def group_size(self, world_size: int) -> int:
        """Returns the number of ranks that share one copy of W."""
        return world_size if self.classifier.group_size == "world" else self.classifier.group_size


@dataclass(frozen=True)
class DeepSpeedFile:
    """A checked DeepSpeed JSON, whose micro-batch and ranks may not be known yet.

    Attributes:
        values: of DeepSpeed's own keys.
        classifier: our own section.
        micro_batch_size: images of one forward pass on one rank; None: `auto`.
        zero_stage: 0, 1 or 2.
        autocast: dtype of the encoder's forward pass; None is plain float32.
    """

    path: Path
    values: dict[str, Any]
    classifier: InstanceClassifierSection
    micro_batch_size: int | None
    zero_stage: int
    autocast: DtypeName | None

    def describe(self) -> str:
        """Returns all values as JSON."""
        return json.dumps({**self.values, "instance_classifier": self.classifier.model_dump()}, sort_keys=True)

    def settings(
        self,
        *,
        global_batch_size: int | None,
        max_grad_norm: float,
        world_size: int,
        optimizer: OptimizerName = "sgd",
        micro_batch_size: int = 1,
    ) -> DeepSpeedSettings:
        """Divides a batch over ranks and completes what follows from it.

        Args:
            global_batch_size: images per step; None: nothing is trained, so neither a batch nor W is divided.
            optimizer: the encoder's.
            micro_batch_size: stands in for `auto`.

        Raises:
            UserError: the batch or the rows do not divide, or the optimizer cannot work on ZeRO's partitions.
        """
        path, is_auto = self.path, self.micro_batch_size is None
        micro_batch_size = self.micro_batch_size or micro_batch_size
        at_once, trains = micro_batch_size * world_size, global_batch_size is not None
        global_batch_size = at_once if global_batch_size is None else global_batch_size
        accumulation_steps, remainder = divmod(global_batch_size, at_once)
        if remainder or accumulation_steps == 0:
            if is_auto:
                raise UserError(no_share(global_batch_size, world_size))
            raise UserError(indivisible(global_batch_size, micro_batch_size, world_size, path))
        group_size = self.classifier.group_size
        if trains and group_size != "world" and world_size % group_size:
            raise UserError(
                f"{path}: instance_classifier.group_size {group_size} does not divide the {world_size} ranks"
            )
        engine = {
            "steps_per_print": 2**31,  # the progress bar is ours
            "timers": {"throughput": {"enabled": False}},  # which waits for the device twice a micro-batch
            **self.values,
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation_steps,
            "gradient_clipping": max_grad_norm,
            "gradient_allreduce_op": "sum",
        }
        if self.zero_stage > 0:
            if trains and optimizer in _WHOLE_TENSORS:
                raise UserError(
                    f"{path}: zero_optimization.stage {self.zero_stage} cuts the flattened weights into equal pieces, "
                    f"and optimization.optimizer {optimizer} needs {_WHOLE_TENSORS[optimizer]}: set the stage to 0, or "
                    "optimization.optimizer to sgd or adamw"
                )
            engine["zero_allow_untested_optimizer"] = True
        recompute_stages = "activation_checkpointing" in self.values
        return DeepSpeedSettings(
            engine, self.classifier, micro_batch_size, accumulation_steps, self.autocast, recompute_stages
        )


def load_ds_config(
    path: Path,
    *,
    global_batch_size: int | None,
    max_grad_norm: float,
    world_size: int,
    optimizer: OptimizerName = "sgd",
) -> DeepSpeedSettings:
    """Reads, checks and completes a DeepSpeed JSON whose micro-batch is a number: see `DeepSpeedFile.settings`.

    Args:
        optimizer: the encoder's.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, derived or refused, the batch does not divide, or
            the optimizer cannot work on ZeRO's partitions.
    """
    return read_ds_file(path).settings(
        global_batch_size=global_batch_size,
        max_grad_norm=max_grad_norm,
        world_size=world_size,
        optimizer=optimizer,
    )


def read_ds_file(path: Path) -> DeepSpeedFile:
    """Reads and checks a DeepSpeed JSON.

    Raises:
        UserError: it is missing or malformed, or a key is unknown, derived or refused.
    """
    values = _read_json(path)
    _check_keys(values, path)
    section = _without_keep_mib(values.pop("instance_classifier", {}), path)
    classifier = _validated(InstanceClassifierSection, section, "instance_classifier", path)
    if not isinstance(values.get("wall_clock_breakdown", False), bool):
        raise UserError(f"{path}: wall_clock_breakdown must be true or false")
    if values.get("communication_data_type", "fp32") not in ("fp32", "fp16", "bf16"):
        raise UserError(f"{path}: communication_data_type must be fp32, fp16 or bf16")
    given = values.get("train_micro_batch_size_per_gpu")
    if given != AUTO and (type(given) is not int or given < 1):
        raise UserError(f'{path}: train_micro_batch_size_per_gpu must be a positive number of images a rank, or "auto"')
    zero_stage = _zero_stage(values.get("zero_optimization", {}), path)
    autocast = _autocast(values, zero_stage, path)
    if "activation_checkpointing" in values:
        _check_activation_checkpointing(values["activation_checkpointing"], path)
    return DeepSpeedFile(path, values, classifier, None if given == AUTO else given, zero_stage, autocast)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, by_hand=True)
    except OSError as error:
        raise UserError(f"--deepspeed_config {tried(path)}: {reason(error)}") from None
    except MalformedError as error:
        if path.suffix in (".yaml", ".yml"):
            raise UserError(
                f"--deepspeed_config {path}: this is YAML, as experiments are: give it as --config, and a DeepSpeed "
                "JSON such as ds_configs/cpu_float32.json as --deepspeed_config"
            ) from None
        raise UserError(f"--deepspeed_config {path}: {reason(error)}") from None


def _check_keys(values: dict[str, Any], path: Path) -> None:
    for key in values:
        if key in _DERIVED:
            raise UserError(f"{path}: remove '{key}': it is derived from {_DERIVED[key]}")
        if key in _REFUSED:
            raise UserError(f"{path}: remove '{key}': {_REFUSED[key]}")
        if key in ExperimentConfig.model_fields:
            raise UserError(f"{path}: '{key}' is a key of the experiment: set it in the YAML of --config, or by --set")
        if key not in DEEPSPEED_KEYS:
            raise UserError(f"{path}: unknown key '{key}'{nearest(key, DEEPSPEED_KEYS)}")


def _validated(model: type[_Model], section: Any, name: str, path: Path) -> _Model:
    try:
        return model.model_validate(section)
    except ValidationError as error:
        raise UserError(f"{path}: {describe_validation_error(error, model, name)}") from None


def _without_keep_mib(section: Any, path: Path) -> Any:
    """The section without a `keep_mib` of 0, its default, which earlier versions wrote into every run directory."""
    if not isinstance(section, dict) or "keep_mib" not in section:
        return section
    if section["keep_mib"] != 0:
        raise UserError(
            f"{path}: remove instance_classifier.keep_mib: no terms of the softmax are kept between its two passes"
        )
    return {key: value for key, value in section.items() if key != "keep_mib"}


def _zero_stage(section: Any, path: Path) -> int:
    stage = section.get("stage", 0) if isinstance(section, dict) else None
    if stage not in (0, 1, 2) or isinstance(stage, bool):
        raise UserError(
            f"{path}: zero_optimization.stage must be 0, 1 or 2 (stage 3 cannot sum gradients, "
            "and an encoder of this size has nothing to gain from it)"
        )
    for key in section:
        if key.startswith("offload_"):
            raise UserError(
                f"{path}: remove 'zero_optimization.{key}': DeepSpeed offloads only its own optimizers, not torch's"
            )
    return _validated(ZeroSection, section, "zero_optimization", path).stage


def _autocast(values: dict[str, Any], zero_stage: int, path: Path) -> DtypeName | None:
    section = values.get("torch_autocast", {})
    known = ("enabled", "dtype", "lower_precision_safe_modules")
    if not isinstance(section, dict):
        raise UserError(f"{path}: torch_autocast must be an object with {', '.join(known)}")
    for key in section:
        if key not in known:
            raise UserError(f"{path}: unknown key 'torch_autocast.{key}'{nearest(key, known)}")
    if not section.get("enabled", False):
        return None
    dtype: DtypeName | None = next((name for name in ("bfloat16", "float16") if section.get("dtype") == name), None)
    if dtype is None:
        raise UserError(f"{path}: torch_autocast.dtype must be bfloat16 or float16")
    if zero_stage == 0:
        return dtype
    if dtype == "float16":
        raise UserError(
            f"{path}: torch_autocast.dtype float16 needs zero_optimization.stage 0: under ZeRO, DeepSpeed skips a step "
            "that overflows without lowering the loss scale, and so every later one"
        )
    if "communication_data_type" in values:
        raise UserError(
            f"{path}: remove 'communication_data_type': under ZeRO with torch_autocast, DeepSpeed ignores it and "
            "reduces gradients of convolutions and linear layers in torch_autocast.dtype, of other layers in float32; "
            "torch_autocast.lower_precision_safe_modules [] has all reduced in float32"
        )
    return dtype


def _check_activation_checkpointing(section: Any, path: Path) -> None:
    """Refuses keys in this section, whose presence alone switches recomputation on."""
    if not isinstance(section, dict):
        raise UserError(f"{path}: activation_checkpointing must be {{}}, which switches it on, or be omitted")
    for key in section:
        why = _REFUSED_ACTIVATION_CHECKPOINTING.get(key, "the section takes no keys; {} switches it on")
        raise UserError(f"{path}: remove 'activation_checkpointing.{key}': {why}")


def _dtype(name: DtypeName) -> "torch.dtype":
    """The dtype of this name. torch is imported only once one is needed, after the configuration has been checked."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
