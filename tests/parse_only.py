"""Parses a command line as a runner does, checks its configuration keys, and exits before anything is run.

python tests/parse_only.py RUNNER arguments …
"""

import runpy
import sys
from argparse import Namespace
from pathlib import Path

from instance_ssl.config.draft import load_draft
from instance_ssl.run.console import ArgumentParser, exit_code_of


class Parsed(BaseException):
    """The command line is valid. A runner's own handlers of errors let it pass."""


def parse_and_stop(self: ArgumentParser, *arguments: object, **options: object) -> Namespace:
    parsed: Namespace = original(self, *arguments, **options)
    config = getattr(parsed, "config", None)
    if isinstance(config, Path) and config.exists() and hasattr(parsed, "deepspeed_config"):  # not of an ablation

        def check() -> None:
            load_draft(config, parsed.set)

        if exit_code_of(check):
            sys.exit(2)
    raise Parsed


original = ArgumentParser.parse_args
ArgumentParser.parse_args = parse_and_stop  # type: ignore[method-assign,assignment]
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except Parsed:
    sys.exit(0)
sys.exit(f"{sys.argv[0]} parses no command line")
