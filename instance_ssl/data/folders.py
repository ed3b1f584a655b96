"""Folders of images as they lie on a disk: what is in them, in an order that no file system decides."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from instance_ssl.errors import UserError, escape, reason, tried

# What lies in the root of a kind, by which a level too deep or too high is told.
_MARKERS = {"tree": "train", "sun397": "SUN397", "dtd": "dtd/dtd", "inaturalist2018": "train2018.json"}
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_NAMES = "JPEG, PNG or WebP"
_SHOWN_SUFFIXES = 8
_LONGEST_SUFFIX = 16
_MOST_SUFFIXES = 1000
_OTHER_SUFFIXES = ".…"
# Files that the directory of a run has, of every version, that of a stage, and that of an ablation.
_RUN_MARKS = (
    ("instances.txt", "data.json"),
    ("ds_config.json", "config.yaml", "environment.json"),
    ("table.png", "table.json", "table.md"),
)


def required_root(root: Path | None, kind: str) -> Path:
    """The root; refuses a kind without one.

    Raises:
        UserError: naming the key.
    """
    if root is None:
        raise UserError(f"data.root is not set; data.kind '{kind}' needs a folder")
    return root


def existing_root(root: Path | None, kind: str) -> Path:
    """The root, which is a folder, and holds what marks the layout of its kind.

    Raises:
        UserError: when it is not set or not there, or is a level above or below the one that is meant.
    """
    root = required_root(root, kind)
    shown = f"data.root {escape(tried(root))}"
    if os.path.isfile(root):
        keys = {".tar": " and its name as data.shards", ".txt": ", and data.kind=list with it as data.list_file"}
        raise UserError(f"{shown} is a file: give the folder that holds it{keys.get(root.suffix, '')}")
    if not os.path.isdir(root):  # unlike Path.is_dir, False rather than an exception where access is denied
        raise UserError(f"{shown} is not a folder that can be reached")
    marker = _MARKERS.get(kind)
    if marker is not None and (meant := _root_meant(root, marker)) is not None:
        what = marker if "." in marker else f"{marker} folder"
        raise UserError(f"{shown}: there is no {what} in it, but {escape(str(meant))} has one: give that folder")
    return root


def _root_meant(root: Path, marker: str) -> Path | None:
    """The folder one or two levels above the root, or one below, that holds the marker; None where the root does."""
    if os.path.exists(root / marker):
        return None
    below = sorted(entry.name for entry in _list_folder(root) if os.path.isdir(entry))
    candidates = [*root.absolute().parents[:2], *(root / name for name in below)]
    return next((folder for folder in candidates if os.path.exists(folder / marker)), None)


@dataclass
class Ignored:
    """What a scan has left alone: files by extension, folders of runs. Its size does not grow with the data set's.

    Attributes:
        files: how many of each extension, in lower case; "" for names without one.
        runs: folders of runs, how many, and the first of them.
    """

    files: Counter[str] = field(default_factory=Counter)
    num_runs: int = 0
    first_run: str = ""

    def add_file(self, name: str) -> None:
        """Counts a file by its extension; of names whose extensions are all different, most together."""
        suffix = os.path.splitext(name)[1].lower()
        self.files[suffix if suffix in self.files or len(self.files) < _MOST_SUFFIXES else _OTHER_SUFFIXES] += 1

    def add_run(self, path: Path) -> None:
        """Counts a folder of a run."""
        self.num_runs += 1
        self.first_run = self.first_run or str(path)

    def remarks(self, root: Path) -> list[str]:
        """What the user is told, a line for files and one for runs; none where there is nothing."""
        lines = []
        if self.files:
            count, kinds = self.files.total(), ", ".join(f"{number:,} {name}" for name, number in self._named())
            files = "1 file that is" if count == 1 else f"{count:,} files that are"
            lines.append(f"ignored in {escape(str(root))}: {files} not {_NAMES} by name: {kinds}")
        if self.num_runs:
            which = "a folder" if self.num_runs == 1 else f"{self.num_runs:,} folders"
            first = "" if self.num_runs == 1 else "first "
            lines.append(
                f"ignored in {escape(str(root))}: {which} of this project's runs ({first}{escape(self.first_run)})"
            )
        return lines

    def _named(self) -> list[tuple[str, int]]:
        common = self.files.most_common(_SHOWN_SUFFIXES)
        named = [(escape(suffix[:_LONGEST_SUFFIX]) or "without extension", number) for suffix, number in common]
        rest = self.files.total() - sum(number for _, number in common)
        return [*named, ("of other extensions", rest)] if rest else named


def class_folders(root: Path, folder: str) -> list[str]:
    """Names of the class folders in `root`/`folder`, sorted; at least one. Hidden ones and those of runs are none.

    Raises:
        UserError: when there is none, or the folder cannot be listed.
    """
    path = root / folder
    if not path.is_dir():
        raise UserError(f"data.root {escape(str(root))}: there is no {folder} folder in it")
    names = sorted(
        entry.name
        for entry in _list_folder(path)
        if os.path.isdir(entry) and not entry.name.startswith(".") and not _is_of_a_run(path / entry.name)
    )
    if not names:
        raise UserError(f"data.root: {escape(str(path))} holds no class folder")
    return names


def scan_images(root: Path, ignored: Ignored) -> Iterator[str]:
    """POSIX paths relative to `root` of all images below it, in plain string order, a folder at a time.

    Folders of runs are not entered: their pictures are no images of the data set. `ignored` is told what is left alone.
    """
    return _walk(root, "", set(), ignored)


def _walk(root: Path, folder: str, visited: set[tuple[int, int]], ignored: Ignored) -> Iterator[str]:
    # A folder is known by its device and inode: a link to a folder seen before, or to one's own parent, ends there.
    # Sorted, so that which of two paths to one folder wins does not depend on the file system.
    status = (root / folder).stat()
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for name, is_folder in _sorted_entries(root / folder, ignored):
        if not is_folder:
            yield folder + name
        elif _is_of_a_run(root / folder / name):
            ignored.add_run(root / folder / name)
        else:
            yield from _walk(root, folder + name, visited, ignored)


def _sorted_entries(path: Path, ignored: Ignored) -> list[tuple[str, bool]]:
    """Images and folders in a folder; a folder's name ends in "/", with which whole paths sort as these do."""
    found = []
    for entry in _list_folder(path):
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry):  # unlike entry.is_dir, False for a link to itself
            found.append((entry.name + "/", True))
        # A broken link counts as an image, to be refused by name later; a pipe or a socket does not.
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and (entry.is_symlink() or entry.is_file()):
            found.append((entry.name, False))
        else:
            ignored.add_file(entry.name)
    return sorted(found)


def _is_of_a_run(path: Path) -> bool:
    """Whether a folder is a run directory or that of a stage, which may lie in the root itself."""
    return any(all(os.path.exists(path / name) for name in marks) for marks in _RUN_MARKS)


def _list_folder(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"data.root: {escape(str(path))} cannot be listed: {reason(error)}") from error


def missing_here(probes: Iterable[tuple[Path, int]]) -> str | None:
    """The first file that is absent here or does not have the size in bytes that it has on rank 0; None: none."""
    for path, size in probes:
        try:
            found = path.stat().st_size
        except OSError as error:
            return f"{escape(str(path))}: {reason(error)}"
        if found != size:
            return f"{escape(str(path))} has {found} bytes, not {size} as on rank 0"
    return None
