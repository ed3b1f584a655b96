"""Folders of images as they lie on a disk: what is in them, in an order that no file system decides."""

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import UnidentifiedImageError

from instance_ssl.errors import UserError, escape, tried

# What lies in the root of a kind, by which a level too deep or too high is told.
_MARKERS = {"tree": "train", "sun397": "SUN397", "dtd": "dtd/dtd", "inaturalist2018": "train2018.json"}
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


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


def class_folders(root: Path, folder: str) -> list[str]:
    """Names of the class folders in `root`/`folder`, sorted; at least one.

    Raises:
        UserError: when there is none, or the folder cannot be listed.
    """
    path = root / folder
    if not path.is_dir():
        raise UserError(f"data.root {escape(str(root))}: there is no {folder} folder in it")
    names = sorted(
        entry.name for entry in _list_folder(path) if os.path.isdir(entry) and not entry.name.startswith(".")
    )
    if not names:
        raise UserError(f"data.root: {escape(str(path))} holds no class folder")
    return names


def scan_images(root: Path) -> Iterator[str]:
    """POSIX paths relative to `root` of all images below it, in plain string order, a folder at a time."""
    return _walk(root, "", set())


def _walk(root: Path, folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    # A folder is known by its device and inode: a link to a folder seen before, or to one's own parent, ends there.
    # Sorted, so that which of two paths to one folder wins does not depend on the file system.
    status = (root / folder).stat()
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for name, is_folder in _sorted_entries(root / folder):
        if is_folder:
            yield from _walk(root, folder + name, visited)
        else:
            yield folder + name


def _sorted_entries(path: Path) -> list[tuple[str, bool]]:
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
    return sorted(found)


def _list_folder(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"data.root: {escape(str(path))} cannot be listed: {reason(error)}") from error


def differs_here(path: Path, size: int) -> str | None:
    """What is wrong with a file that had so many bytes on rank 0; None when nothing is."""
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"{escape(str(path))}: {reason(error)}"
    return None if found == size else f"{escape(str(path))} has {found} bytes, not {size} as on rank 0"


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
