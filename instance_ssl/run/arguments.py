"""The command line that all runners of stages share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from instance_ssl.config.draft import Draft
from instance_ssl.run.console import ArgumentParser

_ROOT = Path(__file__).resolve().parents[2]


def add_config_arguments(parser: ArgumentParser) -> None:
    """Adds the flags that define an experiment."""
    parser.add_argument(
        "--config",
        type=Path,
        default=_ROOT / "runners/configs/pipeline_digits.yaml",
        help="experiment YAML: everything that changes the mathematics",
    )
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="F",
        help="DeepSpeed JSON: engine, precision, memory (default: ds_configs/cpu_float32.json; where the experiment "
        "leaves its batch to `auto`, ds_configs/auto.json)",
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=v", help="override config keys")


def ds_path_of(arguments: argparse.Namespace, draft: Draft) -> Path:
    """The DeepSpeed JSON of the arguments of `add_config_arguments`."""
    path: Path | None = arguments.deepspeed_config
    name = "auto.json" if "optimization.global_batch_size" in draft.auto else "cpu_float32.json"
    return path or _ROOT / "ds_configs" / name


def parse_arguments(stages: Sequence[str]) -> argparse.Namespace:
    """Parses the command line of a runner that offers these stages."""
    parser = ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--stages", nargs="+", choices=stages, metavar="NAME", help="run these instead, in order")
    parser.add_argument("--run-dir", type=Path, help="run directory (default: runs/<config name>)")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    return parser.parse_args()
