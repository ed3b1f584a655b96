"""Runs the variants of an ablation over seeds, each run in its own process, and writes table.md, table.json and a PNG.

python runners/ablation/ablate.py --config runners/configs/ablations/F.yaml --output D [--jobs 2] [--set key=value …]
The same command resumes; finished runs are not repeated. README.md in this folder has the YAML's format.
"""

import argparse
from pathlib import Path

from batch import Batch
from instance_ssl.errors import UserError
from instance_ssl.files.atomic import write_json, write_text
from instance_ssl.run.console import ArgumentParser, exit_code_of, tell
from picture import draw
from settings import Ablation, Plan, plan_runs, read_ablation
from table import format_markdown, read_results, to_json


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the ablation's YAML")
    parser.add_argument("--output", type=Path, required=True, help="directory of the table")
    parser.add_argument("--runs", type=Path, help="directory of the runs, shared or not (default: OUTPUT/runs)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=v", help="overrides of all runs")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: as the YAML says)")
    parser.add_argument("--table-only", action="store_true", help="run nothing, write the table of what is done")
    return parser.parse_args()


def _report(output: Path, runs: Path, ablation: Ablation, plan: Plan) -> None:
    results = read_results(ablation, plan, runs)
    table = format_markdown(ablation, results)
    write_text(output / "table.md", table)
    write_json(output / "table.json", to_json(ablation, plan, results))
    draw(output / "table.png", ablation, results)
    tell(f"\n{table}\n{output / 'table.md'}")


def _run(arguments: argparse.Namespace) -> int:
    ablation = read_ablation(arguments.config)
    plan = plan_runs(ablation, arguments.set)
    runs = arguments.runs or arguments.output / "runs"
    jobs = ablation.jobs if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: at least 1")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {arguments.output}: {error.strerror}") from None
    code = 0 if arguments.table_only else Batch(ablation, runs, jobs=jobs).run(plan.runs.values())
    _report(arguments.output, runs, ablation, plan)
    return code


if __name__ == "__main__":
    raise SystemExit(exit_code_of(lambda: _run(_arguments())))
