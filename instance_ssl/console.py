"""Lines for whoever watches, who may have gone: an ssh connection or a pipe can end before the run does."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from instance_ssl.errors import EXIT_USER_ERROR, UserError


@contextmanager
def heard_or_not(stream: TextIO) -> Iterator[None]:
    """Around writing to a console: that it cannot be read is not what ends a run, or keeps one from ending.

    A pipe whose reader has gone leads nowhere from then on, so that neither later lines nor the interpreter's own flush
    at its end fail. A full disk may have room again.
    """
    try:
        yield
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:
        pass


def printable(line: str, encoding: str | None) -> str:
    """The line with what this encoding lacks as escapes: names of files need not be text."""
    encoding = encoding or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def complain(line: str) -> None:
    """One line on standard error."""
    with heard_or_not(sys.stderr):
        print(line, file=sys.stderr)


def exit_code_of(tool: Callable[[], int | None]) -> int:
    """What a command without a process group exits with: what it returns (None is 0), or 2 after a user's mistake."""
    try:
        return tool() or 0
    except UserError as mistake:
        complain(f"error: {mistake}")
        return EXIT_USER_ERROR
