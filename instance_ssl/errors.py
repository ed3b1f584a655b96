"""Errors for the user: one line that says what is wrong, where, what to do. Escapes names for printing."""

import re
from pathlib import Path

EXIT_USER_ERROR = 2

# Characters that move a terminal's cursor or change its state (C0, C1), end a line, hide or reverse text (zero-width
# characters, direction marks, tags), and surrogates, which stand for bytes of a name that are not text.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_ESCAPED = re.compile(r"\\(?:\\|n|r|t|x[0-9a-f]{2}|u[0-9a-f]{4}|U000[0-9a-f]{5}|U0010[0-9a-f]{4})")


class UserError(Exception):
    """A mistake that the user can fix and that every rank finds alike: rank 0 prints it and all exit with code 2."""


class RankError(UserError):
    """A `UserError` that one rank finds alone (an image that cannot be decoded, say): that rank prints it."""


class LoaderFault(Exception):
    """A bug met while loading an image: one line that names the image. The traceback is in a note."""


class AbsentPeersError(RankError):
    """The other ranks did not join. This rank is not at fault, and another start may succeed."""


def escape(name: str) -> str:
    r"""Returns an untrusted name (of a file, a class, a key) as one printable line; `unescape` reverses it.

    Doubles backslashes. Writes newlines as \n and other characters that would not show as \x1b or \u202e.
    """
    return printable(name.replace("\\", "\\\\"))


def unescape(line: str) -> str:
    """Returns the name that `escape` was given."""
    return _ESCAPED.sub(lambda found: found.group().encode().decode("unicode_escape"), line)


def printable(text: str, kept: str = "") -> str:
    """Escapes the characters that would not show, except those in `kept`. Backslashes stay single."""

    def shown(found: re.Match[str]) -> str:
        return found[0] if found[0] in kept else found[0].encode("unicode_escape").decode()

    return _UNPRINTABLE.sub(shown, text)


def reason(error: BaseException) -> str:
    """Returns an error's message in one line; for an `OSError`, without the file's name."""
    return error.strerror if isinstance(error, OSError) and error.strerror else in_one_line(error)


def shorten(text: str) -> str:
    """Truncates a text to 80 characters for a message."""
    return text if len(text) <= 80 else text[:77] + "..."


def in_one_line(error: BaseException) -> str:
    """Returns the whole text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def tried(path: Path) -> str:
    """Formats a path for a message; a relative one is followed by the absolute path that was tried."""
    if path.is_absolute():
        return str(path)
    drive = "; a drive letter is a Windows path" if re.match(r"[A-Za-z]:", str(path)) else ""
    return f"{path} (tried {path.absolute()}{drive})"
