r"""Reads and writes lists of names, one a line.

A name may hold anything that a file name may. Backslashes are doubled. Characters that would end a line, be stripped,
start a comment or not show are escaped, for example as \n, \x20 or \u2028.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from instance_ssl.errors import escape, unescape
from instance_ssl.files.atomic import write_lines

# What a reader would strip or take for a comment. `escape` handles what ends a line or does not show.
_UNSAFE = re.compile(r"^[#\s]|\s\Z")


def list_line(name: str) -> str:
    """Returns the line for a name, without its line end; `unescape` reverses it."""
    return _UNSAFE.sub(lambda found: _as_escape(found.group()), escape(name))


def _as_escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def write_names(names: Iterable[str], path: Path) -> None:
    """Writes a list of names, whole or not at all, for `read_names` and `read_lines`."""
    write_lines(map(list_line, names), path)


def read_lines(path: Path) -> Iterator[str]:
    """Yields the names that `write_names` wrote."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            yield unescape(line.removesuffix("\n"))


def read_names(path: Path, is_known: Callable[[str], bool]) -> Iterator[tuple[int, str]]:
    """Yields the number, from 1, and the name of each line of a list that anyone may have written.

    The list is UTF-8 with or without a byte order mark, or UTF-16 with one. Lines end in LF or CR LF. Blank lines and
    comments, which start with #, are skipped. Lists made elsewhere have no escapes, and may have blanks around names.
    So a line with blanks at its ends or a backslash is read in the first way that gives a known name: with escapes
    resolved, first with the blanks and then without; then the same with backslashes kept.

    Args:
        is_known: whether something has this name. Called for ambiguous lines only.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a text, or a comment is a known name. The message starts with the line if known.
    """
    with path.open("rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("utf-16", "strict") if is_utf16 else ("utf-8", "surrogateescape")
    with path.open(encoding=encoding, errors=errors, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            line = line.removesuffix("\n").removesuffix("\r")
            if "\0" in line:
                raise ValueError(f"line {number} holds a zero byte: save the list as UTF-8")
            plain, text = line.strip(" \t\ufeff"), line.strip().strip("\ufeff").strip()
            if text.startswith("#"):
                if (name := next(filter(is_known, (line, text)), None)) is not None:
                    raise ValueError(
                        f"line {number} is a comment, as it begins with #, but there is a file {escape(name)}: write "
                        f"{list_line(name)}, or change the comment"
                    )
            elif text:
                parts = (line, plain, text)
                ways = dict.fromkeys((*map(unescape, parts), *parts))
                known = ways if len(ways) == 1 else filter(is_known, ways)
                yield number, next(iter(known), unescape(text))
