"""Draws images beside their random views as the training of this configuration sees them: its seeds, its bits.

python runners/show_views.py --config F --set key=value … --images 8 --epoch 0 --out views.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from instance_ssl.config.draft import load_draft
from instance_ssl.errors import UserError
from instance_ssl.run.arguments import add_config_arguments
from instance_ssl.run.checks import check_folders
from instance_ssl.run.console import ArgumentParser, exit_code_of


def main(words: Sequence[str] | None = None) -> int:
    """Writes the picture and returns the process's exit code; `words` are the command line's, or None for its own."""
    return exit_code_of(lambda: _show(_parse_arguments(words)))


def _parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--images", type=int, default=8, metavar="B", help="images, evenly spaced (default: 8)")
    parser.add_argument("--epoch", type=int, default=0, help="the views of which epoch, counted from 0 (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="PNG to write (default: views.png)")
    return parser.parse_args(words)


def _show(arguments: argparse.Namespace) -> None:
    draft = load_draft(arguments.config, arguments.set)
    if arguments.epoch < 0:
        raise UserError(f"--epoch {arguments.epoch}: epochs are counted from 0")
    if not arguments.out.absolute().parent.is_dir():
        raise UserError(f"--out {arguments.out}: {arguments.out.parent} is not a folder")
    check_folders(draft.completed({}), needs_labels=False)
    from instance_ssl.stages.show_views import draw_views  # late, for it imports torch

    draw_views(draft, num_images=arguments.images, epoch=arguments.epoch, output=arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
