"""The memory, traffic and FLOPs of a training on a given number of ranks, from its configuration."""

from dataclasses import dataclass, replace

import torch

from instance_ssl.classifier.kernel_selection import choose_block_bytes
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import Layout
from instance_ssl.run.build import seeded_encoder
from instance_ssl.run.plan_request import PlanRequest
from instance_ssl.training.classifier_cost import ClassifierSize
from instance_ssl.training.memory_plan import EncoderCost, EngineSize, Plan, engine_size, measure_encoder, plan_layout

_GPU = torch.device("cuda")


@dataclass(frozen=True)
class Training:
    """A training on a given number of ranks, as far as its memory depends on it."""

    cost: EncoderCost
    engine: EngineSize
    classifier: ClassifierSize

    def plan(self, layout: Layout) -> Plan:
        """Plans one layout."""
        return plan_layout(layout, self.cost, self.engine, self.classifier)

    def peak_gib(self, layout: Layout, num_instances: int) -> float:
        """Peak memory of one rank in GiB, for another number of images."""
        size = replace(self.classifier, num_instances=num_instances)
        return replace(self, classifier=size).plan(layout).peak / 2**30

    def most_classes(self, layout: Layout, memory_gib: float) -> int:
        """Largest N that fits into this memory; 0 if not even one class a rank does."""
        low, high = 0, self.classifier.group_size
        while self.peak_gib(layout, high) <= memory_gib:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_gib(layout, middle) <= memory_gib else (low, middle)
        return low


class Planner:
    """Plans one configuration on any number of ranks; the encoder is measured once, on fake tensors.

    Args:
        device: of the ranks; the encoder's memory is taken to be the same on all kinds.
    """

    def __init__(self, request: PlanRequest, device: torch.device = _GPU) -> None:
        self._request, self._device = request, device
        config, ds = request.config, request.settings(request.world_size)
        # The micro-batch is the JSON's, whatever the number of ranks: one measurement serves all of them.
        self.cost = measure_encoder(
            lambda: seeded_encoder(config, recompute_stages=ds.recompute_stages),
            image_size=config.data.image_size,
            num_views=ds.micro_batch_size * config.augmentation.num_views,
            autocast_dtype=ds.autocast_dtype,
            optimizer=config.optimization.optimizer,
        )

    def training(self, world_size: int) -> Training:
        """Returns the training on this many ranks.

        Raises:
            UserError: the batch, or the JSON's group size, cannot be divided over them.
        """
        config, ds = self._request.config, self._request.settings(world_size)
        classifier, group_size = config.classifier, ds.group_size(world_size)
        block_bytes = choose_block_bytes(ds.block_bytes, self._device)
        size = ClassifierSize(
            num_instances=self._request.num_instances,
            embedding_dim=config.model.embedding_dim,
            group_size=group_size,
            num_replicas=world_size // group_size,
            rows_per_rank=ds.micro_batch_size * config.augmentation.num_views,
            accumulation_steps=ds.accumulation_steps,
            num_hard_classes=classifier.num_hard_classes if classifier.smoothing_factor > 0 else 0,
            options=SoftmaxOptions(classifier.temperature, classifier.loss_form, ds.matmul_dtype, block_bytes),
            row_dtype=ds.row_dtype,
            momentum_dtype=ds.momentum_dtype,
            num_sampled_classes=None if classifier.sampling == "full" else classifier.num_sampled_classes,
            device=self._device,
        )
        steps, dtype = ds.accumulation_steps, ds.autocast_dtype
        engine = engine_size(ds.engine, world_size=world_size, accumulation_steps=steps, autocast_dtype=dtype)
        return Training(self.cost, engine, size)
