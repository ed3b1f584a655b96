"""What an `InstanceClassifier` is made with."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from instance_ssl.classifier.kernel_selection import choose_block_bytes, choose_kernels, find_obstacle
from instance_ssl.classifier.sampling import ClassSampler
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import MIN_TEMPERATURE, LossForm, SamplingMode
from instance_ssl.distributed.comm import Group

GradientReduction = Literal["mean", "sum"]
_ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class ClassifierSettings:
    """The arguments of `InstanceClassifier`, which describes them; equal on all ranks, and stored with the rows."""

    num_instances: int
    embedding_dim: int
    temperature: float
    num_hard_classes: int
    smoothing_factor: float
    loss_form: LossForm
    momentum: float
    weight_decay: float
    sampling: Literal["full"] | SamplingMode
    num_sampled_classes: int
    seed: int

    @property
    def smooths(self) -> bool:
        """Whether labels are smoothed, for which the table of hard classes is needed."""
        return self.num_hard_classes > 0 and self.smoothing_factor > 0

    def check(self, gradient_reduction: str, row_dtype: torch.dtype) -> None:
        """Raises a `ValueError` where an argument is out of range."""
        n, k, sampling = self.num_instances, self.num_hard_classes, self.sampling
        wanted = (
            (n >= 2, f"num_instances is {n}: at least 2 are needed"),
            (self.embedding_dim >= 1, f"embedding_dim is {self.embedding_dim}: at least 1 is needed"),
            (
                MIN_TEMPERATURE <= self.temperature < math.inf,
                f"temperature is {self.temperature:g}: at least {MIN_TEMPERATURE} is needed, or float32 overflows",
            ),
            (0 <= self.smoothing_factor < 1, f"smoothing_factor is {self.smoothing_factor:g}: it lies in [0, 1)"),
            (k >= 0, f"num_hard_classes is {k}: at least 0 is needed"),
            (
                not self.smooths or k < n,
                f"num_hard_classes is {k}, of {n - 1} other classes: give fewer, or smoothing_factor=0",
            ),
            (
                self.loss_form in ("mixture", "cross_entropy"),
                f"loss_form is {self.loss_form!r}: mixture, cross_entropy",
            ),
            (0 <= self.momentum < 1, f"momentum is {self.momentum:g}: it lies in [0, 1)"),
            (0 <= self.weight_decay < math.inf, f"weight_decay is {self.weight_decay:g}: at least 0 is needed"),
            (sampling in ("full", "random", "recent"), f"sampling is {sampling!r}: full, random or recent"),
            (
                sampling == "full" or not self.smooths,
                f"sampling {sampling} cannot be combined with smoothing: give smoothing_factor=0",
            ),
            (self.num_sampled_classes >= 1, f"num_sampled_classes is {self.num_sampled_classes}: at least 1 is needed"),
            (
                gradient_reduction in ("mean", "sum"),
                f"gradient_reduction is {gradient_reduction!r}: mean (DDP, FSDP, DeepSpeed, Lightning) or sum",
            ),
            (row_dtype in _ROW_DTYPES, f"row_dtype is {row_dtype}: float32, bfloat16 or float64"),
        )
        for is_fine, problem in wanted:
            if not is_fine:
                raise ValueError(problem)


def build_shard(
    settings: ClassifierSettings, group: Group, row_dtype: torch.dtype, matmul_dtype: torch.dtype | None
) -> ClassifierShard:
    """This rank's shard, its rows 0. Collective on GPUs, none of which uses kernels that any of them gets wrong."""
    matmul_dtype = torch.promote_types(row_dtype, torch.float32) if matmul_dtype is None else matmul_dtype
    options = SoftmaxOptions(
        temperature=settings.temperature,
        form=settings.loss_form,
        matmul_dtype=matmul_dtype,
        block_bytes=choose_block_bytes(None, group.device),
        kernels=choose_kernels("auto", group.device, settings.embedding_dim, matmul_dtype),
    )
    if group.device.type == "cuda" and find_obstacle(settings.embedding_dim, options, row_dtype, row_dtype, group):
        options = replace(options, kernels="torch")
    sampler = None
    if settings.sampling != "full":
        sampler = ClassSampler(settings.sampling, settings.num_instances, settings.num_sampled_classes, settings.seed)
    return ClassifierShard(
        settings.num_instances,
        settings.embedding_dim,
        group,
        options,
        smoothing_factor=settings.smoothing_factor if settings.smooths else 0.0,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        row_dtype=row_dtype,
        momentum_dtype=row_dtype,
        sampler=sampler,
        seed=settings.seed,
    )
