"""Times the loaders on a folder of photographs, two views per image, beside torchvision's ImageFolder with PIL.

The same images are also packed into tar shards in a temporary folder and timed from there.

OMP_NUM_THREADS=1 python runners/benchmarks/data.py --images FOLDER --workers 2 --output DIR
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from instance_ssl.run.console import ArgumentParser, tell
from instance_ssl.run.main import run_measurement
from instance_ssl.run.shutdown import leave

if TYPE_CHECKING:
    from instance_ssl.distributed.comm import Group


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images, nested or not")
    parser.add_argument("--cifar10", type=Path, metavar="ROOT", help="instead: CIFAR-10's training images")
    parser.add_argument("--image-size", type=int, help="side of a view; 224, or 32 for CIFAR-10")
    parser.add_argument("--limit", type=int, help="number of images, evenly spaced (default: all)")
    parser.add_argument("--batch", type=int, default=32, metavar="B", help="images per batch")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--repeats", type=int, default=7, help="passes of each loader, in turns")
    parser.add_argument("--output", type=Path, help="directory for data.json and data.md")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    arguments = parser.parse_args()
    if (arguments.images is None) == (arguments.cifar10 is None):
        parser.error("give one of --images and --cifar10")
    return arguments


def _run(arguments: argparse.Namespace, world: "Group") -> None:
    from instance_ssl.data.datasets import open_source  # late, for it imports torch
    from instance_ssl.data.image_sources import EncodedImages
    from loader_rates import Settings, compare, compare_decoders, in_all_formats
    from measure import describe_machine, format_table, markdown_table

    kind, root = ("folder", arguments.images) if arguments.cifar10 is None else ("cifar10", arguments.cifar10)
    source = open_source(kind, "train", root=root, list_file=None, limit=arguments.limit)
    size = arguments.image_size or (224 if kind == "folder" else 32)
    settings = Settings(size, arguments.batch, arguments.workers, arguments.repeats)
    with in_all_formats(kind, source) as sources:
        rows = compare(sources, settings)
    title = f"{len(source)} images, two views of {size} px, {settings.workers} workers; {describe_machine(world)}"
    tables = [rows]
    if isinstance(source, EncodedImages):
        tables.append(compare_decoders(source, settings.repeats))
    tell("\n\n".join([title, *(format_table(table) for table in tables)]))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "data.json").write_text(json.dumps({"title": title, "tables": tables}, indent=1) + "\n")
        text = "\n\n".join([title, *(markdown_table(table) for table in tables)])
        (arguments.output / "data.md").write_text(text + "\n")


if __name__ == "__main__":
    leave(run_measurement(_arguments, _run))
