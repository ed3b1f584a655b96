"""Finds images in folders, in an order that does not depend on the file system."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from instance_ssl.errors import UserError, escape, reason, tried

# What the root of a kind contains: tells a root that is a level too deep or too high.
_MARKERS = {"tree": "train", "sun397": "SUN397", "dtd": "dtd/dtd", "inaturalist2018": "train2018.json"}
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# Names that say which part of a data set a folder holds, not which class.
_PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_LEAST_CLASSES = 2
_SHOWN_SUFFIXES = 8
_LONGEST_SUFFIX = 16
_MOST_SUFFIXES = 1000
_OTHER_SUFFIXES = ".…"
# Files that mark the directory of a run (of any version), of a stage, and of an ablation.
_RUN_MARKS = (
    ("instances.txt", "data.json"),
    ("ds_config.json", "config.yaml", "environment.json"),
    ("table.png", "table.json", "table.md"),
)


def required_root(root: Path | None, kind: str) -> Path:
    """The root of a kind that needs one; raises UserError where it is not set."""
    if root is None:
        raise UserError(f"data.root is not set; data.kind '{kind}' needs a folder")
    return root


def existing_root(root: Path | None, kind: str) -> Path:
    """The root, checked to be a folder with the layout of its kind.

    Raises:
        UserError: it is not set, does not exist, or is a level above or below the folder that is meant.
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
    """What a scan has skipped: files by extension in lower case, and folders of runs. Its size is bounded."""

    files: Counter[str] = field(default_factory=Counter)
    num_runs: int = 0
    first_run: str = ""

    def add_file(self, name: str) -> None:
        """Counts a file by its extension; extensions past the first thousand share one count."""
        suffix = os.path.splitext(name)[1].lower()
        self.files[suffix if suffix in self.files or len(self.files) < _MOST_SUFFIXES else _OTHER_SUFFIXES] += 1

    def remarks(self, root: Path) -> list[str]:
        """One line for files and one for runs, each only if there are any."""
        lines = []
        if count := self.files.total():
            common = self.files.most_common(_SHOWN_SUFFIXES)
            named = [(escape(suffix[:_LONGEST_SUFFIX]) or "without extension", number) for suffix, number in common]
            if rest := count - sum(number for _, number in common):
                named.append(("of other extensions", rest))
            kinds = ", ".join(f"{number:,} {name}" for name, number in named)
            files = "1 file that is" if count == 1 else f"{count:,} files that are"
            lines.append(f"ignored in {escape(str(root))}: {files} not JPEG, PNG or WebP by name: {kinds}")
        if self.num_runs:
            which = "a folder" if self.num_runs == 1 else f"{self.num_runs:,} folders"
            first = "" if self.num_runs == 1 else "first "
            lines.append(
                f"ignored in {escape(str(root))}: {which} of this project's runs ({first}{escape(self.first_run)})"
            )
        return lines


def class_folders(root: Path, folder: str) -> list[str]:
    """Sorted names of the class folders in `root`/`folder`, at least one, without hidden folders and those of runs.

    Raises:
        UserError: there is none, or the folder cannot be listed.
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
    """Yields the POSIX paths relative to `root` of all images below it, in plain string order.

    Folders of runs are skipped: their pictures do not belong to the data set. `ignored` counts what is skipped.
    """
    return _walk(root, "", set(), ignored)


def _walk(root: Path, folder: str, visited: set[tuple[int, int]], ignored: Ignored) -> Iterator[str]:
    # Device and inode identify a folder, so a link to its own parent ends there. Entries are sorted, so the file system
    # does not decide which of two paths to one folder wins.
    status = (root / folder).stat()
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for name, is_folder in _sorted_entries(root / folder, ignored):
        if not is_folder:
            yield folder + name
        elif _is_of_a_run(root / folder / name):
            ignored.num_runs += 1
            ignored.first_run = ignored.first_run or str(root / folder / name)
        else:
            yield from _walk(root, folder + name, visited, ignored)


def _sorted_entries(path: Path, ignored: Ignored) -> list[tuple[str, bool]]:
    """Images and folders in a folder. A folder's name ends in "/", so that they sort as the whole paths do."""
    found = []
    for entry in _list_folder(path):
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry):  # unlike entry.is_dir, False for a link to itself
            found.append((entry.name + "/", True))
        # A broken link counts as an image, which is refused by name later; a pipe or a socket does not.
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and (entry.is_symlink() or entry.is_file()):
            found.append((entry.name, False))
        else:
            ignored.add_file(entry.name)
    return sorted(found)


def _is_of_a_run(path: Path) -> bool:
    """Whether a folder is the directory of a run or a stage, which may lie in the root itself."""
    return any(all(os.path.exists(path / name) for name in marks) for marks in _RUN_MARKS)


def _list_folder(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"data.root: {escape(str(path))} cannot be listed: {reason(error)}") from error


def find_layout(root: Path) -> tuple[Literal["tree", "class_folders", "folder"], str]:
    """Finds out whether the folders below `root` are labels: the kind of data that they make, and why.

    `tree` needs the same class folders in root/train and in root/val or root/test. `class_folders` needs at least two
    folders with two images each, of which one can be held out, and no image beside them. Only the first images of a
    folder are looked for, whatever it holds.

    Raises:
        UserError: a folder cannot be listed.
    """
    entries = [(name.rstrip("/"), is_folder) for name, is_folder in _sorted_entries(root, Ignored())]
    folders = {name: root / name for name, is_folder in entries if is_folder and not _is_of_a_run(root / name)}
    held_out = next((name for name in ("val", "test") if name in folders), None)
    train = _folders_with_images(folders["train"]) if "train" in folders and held_out is not None else []
    if held_out is not None and len(train) >= _LEAST_CLASSES:
        if train == _folders_with_images(folders[held_out]):
            return "tree", f"train and {held_out} hold the same {len(train):,} class folders"
        return "folder", f"no labels: train and {held_out} hold different class folders"
    loose = [name for name, is_folder in entries if not is_folder]
    if loose:
        return "folder", f"no labels: {escape(loose[0])} lies in no class folder"
    counts = {name: len(list(islice(scan_images(path, Ignored()), 2))) for name, path in folders.items()}
    classes = [name for name, count in counts.items() if count and name not in _PARTS]
    if len(classes) < sum(map(bool, counts.values())) or not classes:
        return "folder", "no labels: there are no class folders"
    if len(classes) == 1:
        return "folder", f"no labels: all images lie in one folder, {escape(classes[0])}"
    if sum(counts[name] == 2 for name in classes) < _LEAST_CLASSES:
        return "folder", f"no labels: the {len(classes):,} folders hold an image each, which leaves none to hold out"
    return "class_folders", f"the images lie in {len(classes):,} class folders"


def _folders_with_images(path: Path) -> list[str]:
    """Sorted names of the folders in a folder that hold an image."""
    folders = [name.rstrip("/") for name, is_folder in _sorted_entries(path, Ignored()) if is_folder]
    return [name for name in folders if any(True for _ in scan_images(path / name, Ignored()))]


def missing_here(probes: Iterable[tuple[Path, int]]) -> str | None:
    """What is wrong with the first file that is absent here or differs in size from rank 0's; None: nothing."""
    for path, size in probes:
        try:
            found = path.stat().st_size
        except OSError as error:
            return f"{escape(str(path))}: {reason(error)}"
        if found != size:
            return f"{escape(str(path))} has {found} bytes, not {size} as on rank 0"
    return None
