"""Prints lines that are safe for a terminal, and survives a console that has gone: a pipe or an ssh connection."""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from instance_ssl import errors
from instance_ssl.distributed import launched
from instance_ssl.errors import EXIT_USER_ERROR, UserError


@contextmanager
def heard_or_not(stream: TextIO) -> Iterator[None]:
    """Wraps writing to a console, whose failure must not end a run.

    A pipe whose reader has gone is redirected to the null device, so that neither later lines nor the interpreter's
    flush at its end fail. A full disk may have room again later.
    """
    try:
        yield
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:
        pass


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others: one line, from rank 0, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raises the message as a `UserError`."""
        raise UserError(f"{message} (--help lists the flags)")

    def print_help(self, file: Any = None) -> None:
        """Prints the help on rank 0."""
        if launched.rank() == 0:
            super().print_help(file)


def printable(text: str, encoding: str | None) -> str:
    """Escapes what this encoding lacks and what would act on a terminal: names need not be text."""
    encoding = encoding or "utf-8"
    return errors.printable(text, kept="\n\t").encode(encoding, "backslashreplace").decode(encoding)


def one_line(text: str, encoding: str | None) -> str:
    """Like `printable`, and escapes newlines and tabs: a name must not start a line that looks like ours."""
    return printable(errors.printable(text), encoding)


def tell(text: str) -> None:
    """Prints lines on standard output."""
    _write(text, sys.stdout)


def complain(line: str) -> None:
    """Prints one line on standard error."""
    _write(errors.printable(line), sys.stderr)


def complain_last(line: str) -> None:
    """Prints why this process ends, on standard error, and hands the line to torchrun."""
    complain(line)
    tell_torchrun(line)


def tell_torchrun(line: str) -> None:
    """Hands torchrun the line with which this rank fails: it ends its own report, and so what a person reads, with it.

    The file has the form of `torch.distributed.elastic.multiprocessing.errors`, with the line for a traceback.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        line = errors.printable(line)
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))


def show_traceback(error: BaseException) -> None:
    """Prints an error with its traceback on standard error."""
    _write("".join(traceback.format_exception(error)), sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    with heard_or_not(stream):
        print(printable(text, stream.encoding), file=stream, flush=True)


def exit_code_of(tool: Callable[[], int | None]) -> int:
    """Returns a tool's exit code: what it returns (None is 0), or 2 after a `UserError`, which it prints."""
    try:
        return tool() or 0
    except UserError as mistake:
        complain_last(f"error: {mistake}")
        return EXIT_USER_ERROR
