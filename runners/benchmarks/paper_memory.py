"""Prints the paper's Table 1 and Figure 3 (memory) beside the planner's figures, and draws them.

python runners/benchmarks/paper_memory.py [--output D] [--world-size 64] [--config F --deepspeed_config F --set …]
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from instance_ssl.errors import UserError
from instance_ssl.run.console import ArgumentParser, exit_code_of, tell
from instance_ssl.run.plan_request import add_plan_arguments, read_plan_request
from paper_tables import PAPER_RANKS, TABLE_1, draw_figure_3, is_the_papers, table_1

if TYPE_CHECKING:
    from instance_ssl.run.planner import Training

_ROOT = Path(__file__).resolve().parents[2]
_WORLD_SIZES = tuple(2**exponent for exponent in range(11))


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_plan_arguments(parser, world_size=PAPER_RANKS)
    parser.set_defaults(
        config=_ROOT / "runners/configs/pipeline_imagenet_resnet50.yaml",
        deepspeed_config=_ROOT / "ds_configs/v100_fp16.json",
        num_instances=TABLE_1["ImageNet-1K"][0],
    )
    parser.add_argument("--output", type=Path, metavar="D", help="directory for figure3.png")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> None:
    ranks, gib = arguments.world_size, arguments.gpu_memory_gib
    request = read_plan_request(arguments)
    from instance_ssl.run.planner import Planner  # late, for these import torch
    from instance_ssl.stages.plan import show

    planner = Planner(request)
    training = planner.training(ranks)
    if not is_the_papers(training):
        tell("not the paper's setting (64 ranks, 4096 images in two views): do not compare with its figures")

    def training_at(world_size: int) -> "Training | None":
        try:
            return planner.training(world_size)
        except UserError:  # the batch, or the JSON's group size, cannot be divided over so many ranks
            return None

    show(table_1(training, gib))
    if arguments.output is not None:
        path = arguments.output / "figure3.png"
        draw_figure_3(path, training_at, ranks, _WORLD_SIZES, gib)
        tell(f"picture: {path}")


if __name__ == "__main__":
    raise SystemExit(exit_code_of(lambda: _run(_arguments())))
