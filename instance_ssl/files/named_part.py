"""Paths that name a part of a file: `file.pth#teacher`."""

from pathlib import Path


def split_part(path: Path) -> tuple[Path, str | None]:
    """Returns the file and the part that is asked for by `file#part`; None where no part is named.

    A file whose own name holds a # is found as it is.
    """
    file, mark, part = str(path).rpartition("#")
    return (Path(file), part.strip(".")) if mark and not path.exists() else (path, None)
