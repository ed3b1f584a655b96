"""Refuses mistakes in what was asked for; imports no torch.

Each check raises a `UserError` of one line that names the key, the path or the stage at fault and what to do.
"""

from collections.abc import Sequence
from pathlib import Path

import psutil

from instance_ssl.checkpoint.committed import MANIFEST, committed_directories, newest_sound_directory
from instance_ssl.config.batch_division import micro_batch_advice
from instance_ssl.config.evaluation import EvaluationConfig
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.data.folders import existing_root
from instance_ssl.errors import UserError, tried
from instance_ssl.files.named_part import split_part
from instance_ssl.run.launch import given_hostfile
from instance_ssl.run.records import BOUND_STAGES
from instance_ssl.run.watchdog import launchers_of

# Stages that start from a checkpoint whatever `evaluation.sources` says.
_READERS = {
    "pretrain": ["initialize_classifier"],
    "update_images": ["initialize_classifier"],
    "evaluate_checkpoints": ["pretrain"],
}
# Stages that only read an encoder: neither the batch nor W has to fit the images or the ranks.
READING_STAGES = ("export", "evaluate_knn", "evaluate_linear", "evaluate_retrieval")
# Kinds of data whose images lie below `data.root`.
_IN_FOLDERS = ("tree", "class_folders", "sun397", "dtd", "inaturalist2018", "folder")


def check_hostfile() -> None:
    """Refuses a hostfile that is not there, with which DeepSpeed would train on this machine alone."""
    for launcher in launchers_of(psutil.Process()):
        hostfile = given_hostfile(launcher.cmdline())
        if hostfile is not None and not (Path(launcher.cwd()) / hostfile).is_file():
            raise UserError(
                f"--hostfile {hostfile} does not exist: DeepSpeed would train on this machine alone; give the right "
                "path, or omit the flag for one machine"
            )


def check_labels(config: ExperimentConfig) -> None:
    """Refuses to evaluate with images that have no labels."""
    kind = (config.evaluation.data or config.data).kind
    if kind in ("folder", "list"):
        raise UserError(
            f"data.kind {kind} has no labels to evaluate with: point evaluation.data at a labelled set (kind tree or "
            "class_folders), or skip the evaluations: runners/pipeline.py --stages initialize_classifier pretrain"
        )


def check_folders(config: ExperimentConfig, *, needs_labels: bool) -> None:
    """Refuses image folders that are not there. What is in them is looked at once the ranks have met."""
    sections = {"": config.data, "evaluation.data: ": config.evaluation.data if needs_labels else None}
    for prefix, data in sections.items():
        if data is not None and data.kind in _IN_FOLDERS:
            try:
                existing_root(data.root, data.kind)
            except UserError as mistake:
                raise UserError(f"{prefix}{mistake}") from None


def check_sources(evaluation: EvaluationConfig) -> None:
    """Refuses a file or checkpoint to evaluate that is not there."""
    if (problem := absent_source(evaluation)) is not None:
        raise UserError(problem)


def absent_source(evaluation: EvaluationConfig) -> str | None:
    """Returns which file or checkpoint to evaluate is not there; None where all are."""
    weights = None if evaluation.weights is None else split_part(evaluation.weights)[0]
    given = {"evaluation.weights": weights, "evaluation.checkpoint": evaluation.checkpoint}
    for key, path in given.items():
        if path is not None and not path.exists():
            return f"{key} {tried(path)} does not exist"
    other = evaluation.checkpoint
    if other and not ((other / MANIFEST).exists() or committed_directories(other / "pretrain/checkpoints")):
        return f"evaluation.checkpoint {tried(other)} is not a checkpoint: give a directory step_… or a run directory"
    return None


def check_initial_weights(config: ExperimentConfig, run_directory: Path, stages: Sequence[str]) -> None:
    """Refuses weights to start from that are not there, unless the run has started from them before."""
    weights, first = config.model.initial_weights, "initialize_classifier"
    if first not in stages or not isinstance(weights, Path) or (run_directory / first / "result.json").exists():
        return
    if not split_part(weights)[0].exists():
        raise UserError(f"model.initial_weights {tried(weights)} does not exist")


def check_made_before(config: ExperimentConfig, run_directory: Path, stages: Sequence[str]) -> None:
    """Refuses stages that start from a checkpoint that is not there and that no stage before them makes.

    A stage that has a result is let through: it may be complete.
    """
    for place, stage in enumerate(stages):
        for maker in _checkpoints_read(config, stage):
            made = run_directory / maker / "checkpoints", run_directory / stage / "checkpoints"
            done = (run_directory / stage / "result.json").exists() and stage not in BOUND_STAGES
            if not (done or maker in stages[:place] or any(committed_directories(each) for each in made)):
                raise UserError(absent_checkpoint(run_directory, maker))


def absent_checkpoint(run_directory: Path, maker: str) -> str:
    """Returns the message that a run directory lacks a stage's checkpoint, and how to get one."""
    what = {"initialize_classifier": "initialised classifier", "pretrain": "trained encoder"}[maker]
    return (
        f"{run_directory} has no {what}: run runners/{maker}.py first with the same --config and --run-dir, or "
        "runners/pipeline.py for all stages, or give the right --run-dir"
    )


def _checkpoints_read(config: ExperimentConfig, stage: str) -> list[str]:
    """Returns whose checkpoints a stage starts from; stages that train whole networks create their random one."""
    if stage in _READERS:
        return _READERS[stage]
    sources = (config.export.source,) if stage == "export" else config.evaluation.sources
    of = {"trained": "pretrain"} if config.evaluation.checkpoint is None else {}
    if stage in ("evaluate_knn", "evaluate_linear", "evaluate_retrieval", "export"):
        of["random"] = "initialize_classifier"
    elif stage not in ("evaluate_fine_tune", "evaluate_semi_supervised", "evaluate_detection"):
        return []
    return [of[source] for source in sources if source in of]


def check_run_to_export(config: ExperimentConfig, run_directory: Path) -> None:
    """Refuses the default run directory where it has no encoder to export: --run-dir was forgotten."""
    for maker in _checkpoints_read(config, "export"):
        if not committed_directories(run_directory / maker / "checkpoints"):
            raise UserError(
                f"--run-dir is not given, and {run_directory}, its default for this --config, has no checkpoint of "
                f"{maker}: give the --run-dir of the training, or set evaluation.checkpoint, or "
                "export.source=weights with evaluation.weights"
            )


def what_is_evaluated(evaluation: EvaluationConfig, own_checkpoints: Path) -> str | None:
    """Identifies what is evaluated, so that an evaluation is repeated after more training or with another file."""
    newest = newest_sound_directory(own_checkpoints)
    names = [] if newest is None else [newest.name]
    if evaluation.checkpoint is not None:
        newest = newest_sound_directory(evaluation.checkpoint / "pretrain/checkpoints")
        names.append(str(newest or evaluation.checkpoint))
    if evaluation.weights is not None:
        status = split_part(evaluation.weights)[0].stat()
        names.append(f"{evaluation.weights} of {status.st_size} bytes and time {status.st_mtime_ns}")
    return ", ".join(names) or None


def check_size(config: ExperimentConfig, num_images: int, micro_batch_size: int, world_size: int, path: Path) -> None:
    """Refuses settings that need more images than there are, naming settings that fit.

    Args:
        path: of the DeepSpeed JSON, whose micro-batch may have to shrink too.
    """
    if num_images < max(2, world_size):
        raise UserError(
            f"{num_images} images cannot be divided over {world_size} ranks: each needs a class of its own, and a "
            "class another one; start fewer ranks or give more images"
        )
    hard, batch = config.classifier.num_hard_classes, config.optimization.global_batch_size
    wrong, overrides, micro_batch = [], [], micro_batch_size
    if batch > num_images:
        why = "a batch holds an image once at most"
        wrong.append(f"optimization.global_batch_size {batch} exceeds the {num_images} images: {why}")
        batch, micro_batch = _batch_that_fits(num_images, micro_batch_size, world_size)
        overrides.append(f"optimization.global_batch_size={batch}")
    if hard >= num_images:
        limit = f"the number of images {num_images}: a class has only {num_images - 1} others"
        wrong.append(f"classifier.num_hard_classes {hard} must be below {limit}")
        overrides.append(f"classifier.num_hard_classes={max(1, num_images // 10)}")
    if wrong:
        smaller = "" if micro_batch == micro_batch_size else f" and {micro_batch_advice(micro_batch, path)}"
        raise UserError(f"{'; '.join(wrong)}; this fits: --set {' '.join(overrides)}{smaller}")


def _batch_that_fits(num_images: int, micro_batch_size: int, world_size: int) -> tuple[int, int]:
    """Returns a global batch and a micro-batch for a small set: at least two steps an epoch, at most 512 images."""
    half = num_images // 2
    if micro_batch_size * world_size > half:
        micro_batch_size = 2 ** (max(1, half // world_size).bit_length() - 1)
    at_once = micro_batch_size * world_size
    return at_once * max(1, min(512, half) // at_once), micro_batch_size


def check_micro_batch(config: ExperimentConfig, micro_batch_size: int) -> None:
    """Refuses a micro-batch of one view, which has no variance for the head's batch norm."""
    if config.model.projection == "mlp_bn" and micro_batch_size * config.augmentation.num_views == 1:
        raise UserError("model.projection mlp_bn needs two views a micro-batch: raise train_micro_batch_size_per_gpu")
