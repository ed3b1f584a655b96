"""Opens a run on all ranks: they meet, compare what they were asked, and open the images."""

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

from instance_ssl.config.draft import Draft
from instance_ssl.config.evaluation import EvaluationConfig
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError, shorten
from instance_ssl.run import agreement, checks, choosing, images, manifest, pending_update, precision, records
from instance_ssl.run.log import RunLog
from instance_ssl.run.process import Process
from instance_ssl.run.request import Request
from instance_ssl.run.stage import Stage
from instance_ssl.training import engine

# Outside a stage, opening millions of files reports progress only now and then.
_LEAST_HANG_SECONDS = 1800.0
_SHOWN_EXCLUDED = 10


def open_run(request: Request, process: Process, held: contextlib.ExitStack) -> Stage:
    """Joins the world, opens the images and chooses what is `auto`; refuses mistakes before a file is written.

    Args:
        held: ends with the work.

    Returns:
        What the stages share; `name` is still empty. It has no `evaluation_sources` where `request.finds_labels` and
        there are none.
    """
    run_directory, log, safety = request.run_directory, process.log, request.draft.completed({}).safety
    world = comm.initialize(safety.join_seconds)
    held.enter_context(process.guard.hangs_after(max(safety.hang_seconds, _LEAST_HANG_SECONDS)))
    process.meet(world)
    asked = {
        "configuration (--config, --set)": request.draft.describe(),
        "DeepSpeed configuration": request.ds.describe(),
        "run directory": str(run_directory),
        "version": _versions_in_use(),
    }
    _check_ranks_agree(asked, world)
    _check_sources(request.draft.completed({}).evaluation, world)
    agreement.rank_0_alone(lambda: pending_update.finish(run_directory), world)
    agreement.rank_0_alone(request.check_run_directory, world)
    draft = _with_kind(request, world, log)
    config = draft.completed({})
    arrange = manifest.as_known(run_directory, config.data, request.stages)
    opened = images.open_images(config.data, "train", world, log, arrange)
    has_labels = not request.finds_labels or config.data.kind != "folder"
    if not has_labels and request.only_evaluates:
        raise UserError(f"data.kind auto: no labels to evaluate with: {config.data.root} has no class folders")
    labelled = None
    if request.labelled_stages and has_labels:
        labelled = images.open_evaluation(config, opened, world, log)
    config, ds = choosing.choose(request, draft, opened, labelled, world, log)
    source = agreement.share_images(opened, run_directory, world)
    evaluation_sources = None
    if labelled is not None:
        is_shared = config.evaluation.data is None and not images.holds_out(config)
        shared = source if is_shared else agreement.share_images(labelled[0], run_directory, world)
        evaluation_sources = shared, agreement.share_images(labelled[1], run_directory, world)
    manifest.record(source, run_directory, world)
    _log_excluded((source, *(evaluation_sources or ())), log)
    batch = (
        f"global batch {config.optimization.global_batch_size} = {ds.micro_batch_size} images x "
        f"{ds.accumulation_steps} micro-batches x {world.size} ranks, {config.augmentation.num_views} views each; "
    )
    log.say(
        f"{len(source):,} images, {world.size} x {world.device.type}; {batch if request.trains else ''}"
        f"run in {run_directory}"
    )
    ds = precision.settle(ds, world, log)
    return Stage("", run_directory, config, ds, world, log, process.guard, source, evaluation_sources)


def _with_kind(request: Request, world: Group, log: RunLog) -> Draft:
    """The draft with the choices that the run has recorded, or else with the kind of data. Collective."""
    draft, run_directory = request.draft, request.run_directory
    known = agreement.rank_0_alone(lambda: records.recorded_choices(draft.auto, run_directory), world)
    if known:
        values = ", ".join(f"{key} = {value}" for key, value in known.items())
        log.say(f"auto: as {run_directory} was begun with: {values}")
    draft = draft.settled(known)
    if "data.kind" in draft.auto:
        kind = images.find_kind(draft.completed({}).data, world, log)
        log.say(str(kind))
        draft = draft.settled({kind.key: kind.value})
    return draft


def _check_ranks_agree(fields: dict[str, str], world: Group) -> None:
    """Refuses ranks whose `fields` differ, such as those of a node with an old copy of the project. Collective."""
    by_rank = world.all_gather_objects(fields)
    for rank, theirs in enumerate(by_rank):
        for name, value in theirs.items():
            if value != by_rank[0][name]:
                there, here = shorten(value), shorten(by_rank[0][name])
                raise UserError(
                    f"rank {rank} has another {name} than rank 0 ({there}, not {here}): start all "
                    "ranks from the same files with the same flags"
                )


def _check_sources(evaluation: EvaluationConfig, world: Group) -> None:
    """Refuses a file or checkpoint to evaluate that any rank lacks. Collective."""
    for rank, problem in enumerate(world.all_gather_objects(checks.absent_source(evaluation))):
        if problem is not None:
            raise UserError(problem + (f" where rank {rank} runs" if rank else ""))


def _log_excluded(sources: Iterable[ImageSource], log: RunLog) -> None:
    for source in sources:
        for line in source.left_out[:_SHOWN_EXCLUDED]:
            log.say(f"excluded, it cannot be read: {line}")
        if (more := len(source.left_out) - _SHOWN_EXCLUDED) > 0:
            log.say(f"excluded, they cannot be read: {more:,} more images")


def _versions_in_use() -> str:
    """Returns what must be alike on all nodes: the libraries, and this project's own code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    libraries = ", ".join(f"{name} {version}" for name, version in engine.versions().items())
    return f"{libraries}, instance_ssl {digest.hexdigest()[:12]}"
