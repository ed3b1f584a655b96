"""Resolves the precision of the classifier's products, and warns where bfloat16 is slower than float32."""

from dataclasses import replace

import torch

from instance_ssl.checkpoint.state import Checkpoint
from instance_ssl.classifier.matmul_rates import (
    agreed_rates,
    auto_matmul_dtype,
    quick_convolution_rate,
    quick_matmul_rate,
)
from instance_ssl.config.deepspeed import DeepSpeedSettings, DtypeName
from instance_ssl.distributed.comm import Group
from instance_ssl.run.log import RunLog

_INSTRUCTIONS = "bfloat16 is fast on CPUs with AMX or AVX512-BF16"


def settle(ds: DeepSpeedSettings, world: Group, log: RunLog) -> DeepSpeedSettings:
    """Resolves `matmul_dtype: auto`, the same on all ranks. Collective.

    A JSON that asks for bfloat16 keeps it, with a warning that gives both rates where it is slower. float16 on a CPU is
    warned about, too: a step of a ResNet-18 took 9.0 s against 0.9 s (2-core AMD EPYC, 2026-11). GPUs are not measured.
    """
    if world.device.type != "cpu":
        return ds
    if ds.autocast_dtype == torch.float16:
        log.say(
            "warning: torch_autocast.dtype float16 on a CPU: a CPU without float16 units takes up to ten times as long "
            "as in float32 and is less exact; give --deepspeed_config ds_configs/cpu_float32.json"
        )
    is_bfloat16 = ds.autocast_dtype == torch.bfloat16
    if is_bfloat16 and (rates := agreed_rates(quick_convolution_rate, world)).faster == torch.float32:
        log.say(
            f"warning: torch_autocast bfloat16 slows this CPU down: convolutions run at {rates}; {_INSTRUCTIONS}, "
            "remove torch_autocast elsewhere"
        )
    if ds.matmul_dtype != torch.bfloat16:
        return ds
    if ds.classifier.matmul_dtype == "auto":
        dtype, measured = auto_matmul_dtype(world)
        chosen: DtypeName = "bfloat16" if dtype == torch.bfloat16 else "float32"
        log.say(f"classifier: matmul_dtype auto takes {chosen}: products run at {measured}")
        return replace(ds, auto_matmul=chosen)
    if (rates := agreed_rates(quick_matmul_rate, world)).faster == torch.float32:
        log.say(
            f"warning: instance_classifier.matmul_dtype bfloat16 slows this CPU down: products run at {rates}; "
            f"{_INSTRUCTIONS}, use auto or float32 elsewhere"
        )
    return ds


def say_if_changed(start: Checkpoint, matmul_dtype: torch.dtype, log: RunLog) -> None:
    """Logs that a training resumes with products in another precision than its checkpoint was trained in."""
    before, now = start.position.matmul_dtype, describe(matmul_dtype)
    if before is not None and before != now:
        log.say(
            f"classifier: products are in {now} from here on and were in {before} before: the training resumes, but "
            "not bit for bit"
        )


def describe(dtype: torch.dtype) -> str:
    """Returns the dtype's name in the JSON."""
    return str(dtype).removeprefix("torch.")
