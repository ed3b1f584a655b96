"""Chooses what a run leaves to `auto`: measures what the rules of `automatic.py` need, and plans the micro-batch."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil
import torch

from instance_ssl.config.deepspeed import DeepSpeedSettings
from instance_ssl.config.draft import Draft
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.distributed import launched
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import RankError
from instance_ssl.run import agreement, automatic, checks, images
from instance_ssl.run.automatic import CPU, GPU, Choice, Facts
from instance_ssl.run.build import seeded_encoder
from instance_ssl.run.console import tell
from instance_ssl.run.log import RunLog
from instance_ssl.run.plan_request import PlanRequest
from instance_ssl.run.planner import Planner
from instance_ssl.run.request import Request
from instance_ssl.training.memory_plan import measure_encoder

_SAMPLE = 64
# The CUDA context, libraries' workspaces and the allocator's losses are not planned.
_SHARE_OF_GPU = 0.8
_SHARE_OF_HOST = 0.5
# On a CPU, larger micro-batches are not faster; the shipped files have as many.
_MOST_ON_CPU = 64


def choose(
    request: Request,
    draft: Draft,
    source: ImageSource | None,
    labelled: tuple[ImageSource | None, ImageSource | None] | None,
    world: Group,
    log: RunLog,
) -> tuple[ExperimentConfig, DeepSpeedSettings]:
    """Completes the experiment and the JSON, the same on all ranks, and logs every choice with its reason. Collective.

    Args:
        draft: the request's, with the kind of data.
        source: the training images; None on all ranks but 0.
        labelled: the images of evaluations, if there are any; None on all ranks but 0.

    Raises:
        UserError: the settings do not fit the images or the ranks.
    """
    machines = world.all_gather_objects((launched.cores_of_rank(), _memory_for_training(world.device)))
    cores, memory_bytes = (min(each) for each in zip(*machines, strict=True))

    def on_rank_0() -> tuple[list[Choice], int]:
        assert source is not None
        facts = Facts(
            device=CPU if world.device.type == "cpu" else GPU,
            num_images=len(source),
            short_side=_short_side(source) if "data.image_size" in draft.auto else 0,
            class_size=_class_size(labelled),
            world_size=world.size,
            cores=cores,
            micro_batch_size=request.ds.micro_batch_size,
            view_flops=view_flops,
        )
        choices = automatic.choose(draft, facts)
        config = draft.completed({choice.key: choice.value for choice in choices})
        _check(request, config, source, labelled, world)
        plan = PlanRequest(config, request.ds, len(source), world.size)
        if request.ds.micro_batch_size is None and request.trains:
            micro_batch = choose_micro_batch(plan, world.device, memory_bytes)
            return [*choices, micro_batch], micro_batch.value
        return choices, 1

    choices, micro_batch_size = agreement.rank_0_alone(on_rank_0, world)
    for choice in choices:
        log.say(str(choice))
    config = draft.completed({choice.key: choice.value for choice in choices})
    optimization = config.optimization
    ds = request.ds.settings(
        global_batch_size=optimization.global_batch_size if request.trains else None,
        max_grad_norm=optimization.max_grad_norm,
        world_size=world.size,
        optimizer=optimization.optimizer,
        micro_batch_size=micro_batch_size,
    )
    if request.trains:
        checks.check_micro_batch(config, ds.micro_batch_size)
    return config, ds


def with_kind(draft: Draft) -> Draft:
    """Chooses and prints the kind of data, in a process that is not of a run."""
    if "data.kind" not in draft.auto:
        return draft
    kind = images.kind_below(draft.completed({}).data)
    tell(str(kind))
    return draft.settled({kind.key: kind.value})


def completed_here(draft: Draft, source: ImageSource) -> ExperimentConfig:
    """Chooses and prints what one rank of this machine would choose, in a process that is not of a run."""
    facts = Facts(
        device=GPU if torch.cuda.is_available() else CPU,
        num_images=len(source),
        short_side=_short_side(source) if "data.image_size" in draft.auto else 0,
        class_size=None,
        world_size=1,
        cores=launched.cores_of_rank(),
        micro_batch_size=None,
        view_flops=view_flops,
    )
    return automatic.complete(draft, facts, tell)


def _check(
    request: Request,
    config: ExperimentConfig,
    source: ImageSource,
    labelled: tuple[ImageSource | None, ImageSource | None] | None,
    world: Group,
) -> None:
    """Refuses settings that do not fit the images or the ranks."""
    ds = request.ds
    if request.trains:
        checks.check_size(config, len(source), ds.micro_batch_size or 1, world.size, ds.path)
        request.check_division(config, world.size)
    if labelled is not None and labelled[0] is not None:
        images.check_evaluation(config, len(labelled[0]))


def _short_side(source: ImageSource) -> int:
    """Median of the short sides, in pixels, of up to 64 images, evenly spaced over all.

    Raises:
        RankError: none of them can be read.
    """
    sides, fault = [], None
    for place in range(0, len(source), max(1, len(source) // _SAMPLE)):
        try:
            sides.append(min(source.load(place).size))
        except RankError as error:  # met again, and treated as `data.on_broken` says, where the image is used
            fault = error
    if not sides and fault is not None:
        raise fault
    return int(statistics.median(sides))


def _class_size(labelled: tuple[ImageSource | None, ImageSource | None] | None) -> int | None:
    """Images of a class, on average, that evaluations compare with; None where there are no labels."""
    images = None if labelled is None else labelled[0]
    return None if images is None or images.labels is None else len(images) // len(images.labels.unique())


def view_flops(config: ExperimentConfig) -> int:
    """FLOPs of the forward and backward pass of one view, 2 a multiply-add; counted without computing anything."""
    views = 2  # batch norm needs two
    size = config.data.image_size
    cost = measure_encoder(lambda: seeded_encoder(config), image_size=size, num_views=views, autocast_dtype=None)
    return cost.flops // views


def _memory_for_training(device: torch.device) -> int:
    """Bytes that a rank's training may take: most of what is free on a GPU; half of its share of the host's memory."""
    if device.type == "cpu":
        return int(_SHARE_OF_HOST * psutil.virtual_memory().available) // launched.local_size()
    return int(_SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0])


def choose_micro_batch(request: PlanRequest, device: torch.device, memory_bytes: int) -> Choice:
    """Chooses the largest micro-batch that divides a rank's part of the batch and whose plan fits into the memory.

    Where none does, it is 1: the plan may be wrong, and a run that fails says so.
    """
    part = request.config.optimization.global_batch_size // request.world_size
    bound = _MOST_ON_CPU if device.type == "cpu" else part
    sizes = [size for size in range(1, min(part, bound) + 1) if part % size == 0]

    def peak(size: int) -> int:
        planner = Planner(replace(request, micro_batch_size=size), device)
        return planner.training(request.world_size).plan("sharded").peak

    size, planned = largest_fitting(sizes, peak, memory_bytes)
    fits = "planned" if planned <= memory_bytes else "too much, but there is no smaller one: planned"
    limit = f"; up to {bound} on a CPU" if bound < part else ""
    reason = f"of {part} images a rank; {fits} {planned / 2**30:.2f} GiB of {memory_bytes / 2**30:.1f}{limit}"
    return Choice("train_micro_batch_size_per_gpu", size, reason)


def largest_fitting(sizes: Sequence[int], peak: Callable[[int], int], limit: int) -> tuple[int, int]:
    """Returns the last of ascending `sizes` whose peak is within the limit, or else the first, and its peak.

    `peak` grows with the size. The last size is tried first, for it fits in most cases.
    """
    low, high = 0, len(sizes)  # the size at `high` and those after it do not fit
    peaks = {sizes[-1]: peak(sizes[-1])}
    if peaks[sizes[-1]] <= limit:
        return sizes[-1], peaks[sizes[-1]]
    high -= 1
    while high - low > 1:
        middle = (low + high) // 2
        peaks[sizes[middle]] = peak(sizes[middle])
        low, high = (middle, high) if peaks[sizes[middle]] <= limit else (low, middle)
    return sizes[low], peaks.get(sizes[low]) or peak(sizes[low])
