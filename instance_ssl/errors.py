"""Errors meant for the user: one line that says what is wrong, where, and what to do."""

import re
from pathlib import Path

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake the user can mend, known to every rank alike; rank 0 prints it and all exit with code 2."""


class RankError(UserError):
    """A `UserError` met by one rank alone (a file that cannot be decoded, say): that rank prints it."""


class LoaderFault(Exception):
    """A fault of the program while an image was loaded, in one line that names the image; a note has the traceback."""


class AbsentPeersError(RankError):
    """The other ranks did not come: no mistake of this one's, and another start may find them."""


def tried(path: Path) -> str:
    """A path for a message: a relative one with the absolute path that was tried."""
    if path.is_absolute():
        return str(path)
    drive = "; a path with a drive letter is Windows'" if re.match(r"[A-Za-z]:", str(path)) else ""
    return f"{path} (tried {path.absolute()}{drive})"
