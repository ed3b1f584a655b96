"""Packs a data set into tar shards of resized JPEGs, which `data.kind: tar` reads with the same ids, names and labels.

python runners/pack_dataset.py --config F --output DIR [--split train|test] [--size 256] [--quality 90]
    [--shard-mib 256] [--workers W] [--set data.root=…]

The same command resumes a packing that was stopped. Use the result as data.kind=tar data.root=DIR.
"""

import argparse
import os
from pathlib import Path

from instance_ssl.config.draft import load_draft
from instance_ssl.errors import UserError
from instance_ssl.run.checks import check_folders
from instance_ssl.run.console import ArgumentParser, exit_code_of
from instance_ssl.run.log import RunLog


def _arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="experiment YAML, whose data section is packed")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=v", help="override config keys")
    parser.add_argument("--output", type=Path, required=True, help="the shards go to its train or val folder")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--size", type=int, default=256, help="short side; 0 copies the files as they are")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 95")
    parser.add_argument("--shard-mib", type=float, default=256.0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def _pack(arguments: argparse.Namespace, log: RunLog) -> None:
    for name, low, high in (("size", 0, 65_535), ("quality", 1, 95), ("shard_mib", 1e-3, 1e6), ("workers", 1, 1024)):
        if not low <= getattr(arguments, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected {low:g} to {high:g}")
    draft, split = load_draft(arguments.config, arguments.set), arguments.split
    check_folders(draft.completed({}), needs_labels=False)
    from instance_ssl.data.image_sources import EncodedImages  # late, for these import torch
    from instance_ssl.data.pack import Packing, pack_images
    from instance_ssl.run import choosing
    from instance_ssl.run.images import broken_policy, open_split

    data = choosing.with_kind(draft).completed({}).data
    source = open_split(data, split)
    for remark in source.remarks:
        log.say(remark)
    if not isinstance(source, EncodedImages):
        raise UserError(f"data.kind {data.kind} lies in memory: there is nothing to pack")
    packing = Packing(arguments.size, arguments.quality, arguments.shard_mib, arguments.workers)
    folder = arguments.output / {"train": "train", "test": "val"}[split]
    with log.progress("packing", len(source), "images") as progress:
        packed = pack_images(source, folder, packing, broken_policy(data), progress.set)
    left_out = len(source.left_out) + packed.left_out
    log.say(
        f"{folder}: {packed.num_images:,} images in {len(packed.shards)} shards, {left_out} left out, {packed.digest}"
    )


if __name__ == "__main__":
    raise SystemExit(exit_code_of(lambda: _pack(_arguments(), RunLog(is_main=True))))
