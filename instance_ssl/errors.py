"""Errors meant for the user: one line that says what is wrong, where, and what to do; and names that may be printed."""

import re
from pathlib import Path

EXIT_USER_ERROR = 2

# What moves a terminal's cursor or changes its state (C0, C1), ends a line, hides or turns text round (zero-width
# characters, marks of direction, tags), and half characters, which stand for bytes of a name that are no text.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_ESCAPED = re.compile(r"\\(?:\\|n|r|t|x[0-9a-f]{2}|u[0-9a-f]{4}|U000[0-9a-f]{5}|U0010[0-9a-f]{4})")


class UserError(Exception):
    """A mistake the user can mend, known to every rank alike; rank 0 prints it and all exit with code 2."""


class RankError(UserError):
    """A `UserError` met by one rank alone (a file that cannot be decoded, say): that rank prints it."""


class LoaderFault(Exception):
    """A fault of the program while an image was loaded, in one line that names the image; a note has the traceback."""


class AbsentPeersError(RankError):
    """The other ranks did not come: no mistake of this one's, and another start may find them."""


def escape(name: str) -> str:
    r"""A name from outside (of a file, a class, a key) in one line that may be printed; `unescape` takes it back.

    Backslashes are doubled; newlines become \n, other characters that would not show as they are \x1b or \u202e.
    """
    return printable(name.replace("\\", "\\\\"))


def unescape(line: str) -> str:
    """The name that `escape` was given."""
    return _ESCAPED.sub(lambda found: found.group().encode().decode("unicode_escape"), line)


def printable(text: str, kept: str = "") -> str:
    """The text with what would not show as it is as escapes, but for the characters of `kept`. Backslashes stay."""
    return _UNPRINTABLE.sub(lambda found: found.group() if found.group() in kept else _as_escape(found.group()), text)


def _as_escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def reason(error: BaseException) -> str:
    """What an error says, in one line; of one of the file system, without the file's name."""
    return error.strerror if isinstance(error, OSError) and error.strerror else in_one_line(error)


def shorten(text: str) -> str:
    """The text, cut where it is too long for a message."""
    return text if len(text) <= 80 else text[:77] + "..."


def in_one_line(error: BaseException) -> str:
    """The whole text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def tried(path: Path) -> str:
    """A path for a message: a relative one with the absolute path that was tried."""
    if path.is_absolute():
        return str(path)
    drive = "; a path with a drive letter is Windows'" if re.match(r"[A-Za-z]:", str(path)) else ""
    return f"{path} (tried {path.absolute()}{drive})"
