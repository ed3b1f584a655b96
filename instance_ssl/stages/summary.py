"""The table at the end of a pipeline, from the results its stages wrote."""

import json
from typing import Any

from instance_ssl.stages.context import Stage
from instance_ssl.stages.representation import TITLES


def show(stage: Stage) -> None:
    """Prints the table and writes it to summary.txt in the run directory."""
    if stage.world.rank != 0:
        return
    knn, linear, pretrain = (_result(stage, name) for name in ("evaluate_knn", "evaluate_linear", "pretrain"))
    lines = [f"{'':16}{'k-NN top-1':>12}{'linear top-1':>14}"]
    for source in stage.config.evaluation.sources:
        row = knn["figures"][source]["top1"], linear["figures"][source]["top1"]
        lines.append(f"{TITLES[source]:16}{row[0]:>10.2f} %{row[1]:>12.2f} %")
    accuracy = pretrain["instance_accuracy"]
    measured = "not measured" if accuracy is None else f"{100 * accuracy:.1f} %"
    lines += [
        f"instance accuracy of the last epoch: {measured} of {len(stage.source):,} classes",
        f"nearest neighbours: {stage.run_directory / knn['picture']}",
        f"the run lies in {stage.run_directory}",
    ]
    text = "\n".join(lines)
    (stage.run_directory / "summary.txt").write_text(text + "\n")
    for line in ("", *lines):
        stage.log.say(line)


def _result(stage: Stage, name: str) -> dict[str, Any]:
    return json.loads((stage.run_directory / name / "result.json").read_text())
