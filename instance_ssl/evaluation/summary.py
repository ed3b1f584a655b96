"""The table at the end of a pipeline, from its stages' results."""

import shlex
from pathlib import Path

from instance_ssl.errors import UserError, printable
from instance_ssl.evaluation.frozen_encoder import title_of
from instance_ssl.files.structured import MalformedError, read_json
from instance_ssl.run.stage import Stage


def show(stage: Stage) -> None:
    """Prints the table and writes it to summary.txt in the run directory."""
    for line in stage.on_rank_0(lambda: _write(stage)):
        stage.log.say(line)


def _write(stage: Stage) -> list[str]:
    try:
        lines = _lines(stage)
        (stage.run_directory / "summary.txt").write_text(printable("\n".join(lines), "\n") + "\n", encoding="utf-8")
    except (OSError, MalformedError, KeyError, TypeError) as error:
        raise UserError(
            f"{stage.run_directory}: no summary.txt: a result.json is damaged or the disk is full ({error}); "
            "remove the damaged one and run the same command again"
        ) from None
    return ["", *lines]


def _lines(stage: Stage) -> list[str]:
    run = stage.run_directory
    accuracy = read_json(run / "pretrain/result.json")["instance_accuracy"]
    measured = "not measured" if accuracy is None else f"{100 * accuracy:.1f} %"
    return [
        *(_accuracies(stage) if stage.evaluation_sources is not None else []),
        f"instance accuracy of the last epoch: {measured} of {len(stage.source):,} classes",
        f"run directory: {run}",
        *_next_commands(run),
    ]


def _accuracies(stage: Stage) -> list[str]:
    knn, linear = (
        read_json(stage.run_directory / name / "result.json") for name in ("evaluate_knn", "evaluate_linear")
    )
    lines = [f"{'':16}{'k-NN top-1':>12}{'linear top-1':>14}"]
    for source in stage.config.evaluation.sources:
        row = knn["figures"][source]["top1"], linear["figures"][source]["top1"]
        lines.append(f"{title_of(stage, source):16}{row[0]:>10.2f} %{row[1]:>12.2f} %")
    return [*lines, f"nearest neighbours: {stage.run_directory / knn['picture']}"]


def _next_commands(run: Path) -> list[str]:
    """What people do with a trained run, as commands to copy."""
    shown, config = shlex.quote(str(run)), shlex.quote(str(run / "pretrain/config.yaml"))
    export = f"python runners/export.py --config {config} --run-dir {shown}"
    return [
        f"the page of this run: python runners/report.py {shown}",
        f"the backbone as files: {export}",
        f"features and embeddings of a folder: {export} --set export.images=/path/to/images",
    ]
