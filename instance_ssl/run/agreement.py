"""What one rank does for all or all do together, and the images that rank 0 has opened on all ranks."""

import fcntl
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.name_table import pack_names
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError, escape, reason
from instance_ssl.files.disk_space import find_no_space, why_not_written
from instance_ssl.run.limits import describe_shortage

_T = TypeVar("_T")

_SECONDS_BETWEEN_SIGNS = 30.0


def together(work: Callable[[], _T], world: Group) -> _T:
    """Does work that may fail on one rank alone (reading its own file, say). Collective.

    Raises:
        UserError: on all ranks, with the first rank's reason, if the work of any raises one.
    """
    result, problem = None, None
    try:
        result = work()
    except UserError as error:
        problem = describe_shortage(error) or str(error)
    for found in world.all_gather_objects(problem):
        if found is not None:
            raise UserError(found)
    return cast(_T, result)


def rank_0_alone(work: Callable[[], _T], world: Group) -> _T:
    """Does work on rank 0 and returns its (picklable) result, or raises its `UserError`, on all ranks. Collective."""
    return cast(_T, world.broadcast_object(together(lambda: work() if world.rank == 0 else None, world)))


def on_rank_0(work: Callable[[], _T], world: Group, on_wait: Callable[[float], None]) -> _T | None:
    """Does work on rank 0, however long it takes, and returns its result there and None elsewhere. Collective.

    Listing millions of files on a slow disk takes longer than a collective may, so rank 0 reports now and then that it
    is alive.

    Args:
        on_wait: called on every rank at each report, with the seconds so far.
    """
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        results = [pool.submit(work)] if world.rank == 0 else []
        while not world.broadcast_object(bool(wait(results, timeout=_SECONDS_BETWEEN_SIGNS).done)):
            on_wait(time.perf_counter() - started)
        return results[0].result() if results else None


def share_images(opened: ImageSource | None, run_directory: Path | None, world: Group) -> ImageSource:
    """Rank 0's images on all ranks. Collective.

    The columns become `.npy` files in `run_directory`/index that every rank maps; its loader processes inherit the map.
    The files are removed as soon as all ranks have mapped them: the disk keeps the content until the last process ends,
    however it ends, and a list of images that changes later cannot meet a stale copy.

    Args:
        opened: the images on rank 0; None elsewhere.
        run_directory: on a file system that all ranks see; None: each rank is sent a copy of the columns instead.

    Raises:
        UserError: on all ranks, where the files cannot be written, or a rank does not see them.
    """
    if run_directory is None:
        return cast(ImageSource, world.broadcast_object(opened))
    folder = run_directory / "index"
    with ExitStack() as held:
        files = rank_0_alone(lambda: _write_columns(opened, folder, held), world)
        source: ImageSource = world.broadcast_object(None if opened is None else opened.with_columns(pack_names(())))
        columns = together(
            lambda: {name: _map_column(folder / file, world.rank) for name, file in files.items()}, world
        )
    return source.with_columns(columns)


def _write_columns(source: ImageSource | None, folder: Path, held: ExitStack) -> dict[str, str]:
    """Writes the columns and returns the names of their files, which last as long as `held`.

    Other starts in the same run directory wait until then.
    """
    assert source is not None

    def remove_columns() -> None:
        for path in folder.glob("*.npy"):
            path.unlink(missing_ok=True)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context((folder / "lock").open("w"))
        fcntl.lockf(lock, fcntl.LOCK_EX)
        remove_columns()  # of a start that was killed
        held.callback(remove_columns)
        needed = sum(column.nbytes for column in source.columns.values())
        if problem := find_no_space(folder, needed):
            raise UserError(f"--run-dir {escape(str(folder.parent))}: {problem}, for the list of images")
        # A name never used before cannot be that of an old file on a node with a disk of its own.
        files = {name: f"{name}_{secrets.token_hex(8)}.npy" for name in source.columns}
        for name, file in files.items():
            np.save(folder / file, source.columns[name])
        return files
    except OSError as error:
        why = why_not_written(error, folder.parent, 0)
        raise UserError(f"--run-dir {escape(str(folder.parent))}: {why}") from error


def _map_column(path: Path, rank: int) -> np.ndarray:
    try:
        return np.asarray(np.load(path, mmap_mode="r"))  # np.memmap's own indexing is slow
    except (OSError, ValueError) as error:
        raise UserError(
            f"rank {rank} on {socket.gethostname()} cannot read {escape(str(path))}, which rank 0 has written "
            f"({reason(error)}): give a --run-dir on a file system that all nodes share"
        ) from error
