"""The command line that all runners of stages share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from instance_ssl.run.console import ArgumentParser


def add_config_arguments(parser: ArgumentParser) -> None:
    """Adds the flags that define an experiment."""
    root = Path(__file__).resolve().parents[2]
    parser.add_argument(
        "--config",
        type=Path,
        default=root / "runners/configs/pipeline_digits.yaml",
        help="experiment YAML: everything that changes the mathematics",
    )
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        default=root / "ds_configs/cpu_float32.json",
        help="DeepSpeed JSON: engine, precision, memory",
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=v", help="override config keys")


def parse_arguments(stages: Sequence[str]) -> argparse.Namespace:
    """Parses the command line of a runner that offers these stages."""
    parser = ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--stages", nargs="+", choices=stages, metavar="NAME", help="run these instead, in order")
    parser.add_argument("--run-dir", type=Path, help="run directory (default: runs/<config name>)")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    return parser.parse_args()
