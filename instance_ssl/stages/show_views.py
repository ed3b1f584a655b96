"""A look at what the encoder sees: some training images and their views, drawn into a file. Starts no process group."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from instance_ssl.config.experiment import load_config
from instance_ssl.data.folders import escape
from instance_ssl.data.view_grid import view_grid
from instance_ssl.errors import UserError
from instance_ssl.run.arguments import add_config_arguments
from instance_ssl.run.build import training_views
from instance_ssl.run.console import ArgumentParser, exit_code_of, tell
from instance_ssl.run.images import open_split
from instance_ssl.training.step import flatten_views


def main(words: Sequence[str] | None = None) -> int:
    """Writes the picture and returns the process's exit code; `words` are the command line's, or None for its own."""
    return exit_code_of(lambda: _show(_parse_arguments(words)))


def _parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--images", type=int, default=8, metavar="B", help="images, evenly spaced over all")
    parser.add_argument("--epoch", type=int, default=0, help="the views of which epoch, counted from 0")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="PNG to write")
    return parser.parse_args(words)


def _show(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.set)
    source = open_split(config.data, "train")
    for remark in source.remarks:
        tell(remark)
    if not 1 <= arguments.images <= len(source):
        raise UserError(f"--images {arguments.images}: there are {len(source)}, take 1 to as many")
    if arguments.epoch < 0:
        raise UserError(f"--epoch {arguments.epoch}: epochs are counted from 0")
    ids = [number * len(source) // arguments.images for number in range(arguments.images)]
    dataset = training_views(config, source)
    batch = dataset.collate([dataset[arguments.epoch, index] for index in ids])
    finished, _ = flatten_views(batch, torch.device("cpu"))
    views = finished.unflatten(0, (-1, len(ids))).transpose(0, 1)
    captions = [f"{index}: {escape(source.names[index])}" for index in ids]
    picture = view_grid([source.load(index) for index in ids], views, captions)
    try:
        picture.save(arguments.out, format="PNG")
    except OSError as error:
        raise UserError(f"--out {arguments.out}: {error.strerror or error}") from None
    tell(f"{arguments.out}: {len(ids)} of {len(source):,} images, {views.shape[1]} views each, epoch {arguments.epoch}")
    tell("\n".join(captions))
