"""Work that one rank does for all, or that all do or fail together; and sharing rank 0's image index."""

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar, cast

import numpy as np
import torch

from instance_ssl.data.columns import Columns
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError, reason
from instance_ssl.run.limits import describe_shortage

_T = TypeVar("_T")

_CHUNK_BYTES = 64 << 20
_SECONDS_BETWEEN_SIGNS = 30.0


def together(work: Callable[[], _T], world: Group) -> _T:
    """Does work that may fail on one rank alone (reading its own file, say) and fails on all if it does. Collective.

    Raises:
        UserError: on all ranks, with the first rank's reason.
    """
    result, problem = None, None
    try:
        result = work()
    except UserError as error:
        problem = describe_shortage(error) or str(error)
    problem = next((text for text in world.all_gather_objects(problem) if text is not None), None)
    if problem is not None:
        raise UserError(problem)
    return cast(_T, result)


def rank_0_alone(work: Callable[[], _T], world: Group) -> _T:
    """Does work on rank 0 and returns its (picklable) result, or raises its failure, on all ranks. Collective.

    Raises:
        UserError: on all ranks.
    """
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
        result = pool.submit(work) if world.rank == 0 else None
        while True:
            if result is not None:
                wait([result], timeout=_SECONDS_BETWEEN_SIGNS)
            if world.broadcast_object(result is not None and result.done()):
                return None if result is None else result.result()
            on_wait(time.perf_counter() - started)


def share_images(opened: ImageSource | UserError | None, world: Group) -> ImageSource:
    """Rank 0's images on all ranks. The ranks of its machine map its file of columns; one of each other machine is sent
    the bytes, and maps a file with the other ranks there. Collective.

    Args:
        opened: on rank 0 the images, or why there are none; elsewhere None.

    Raises:
        UserError: on all ranks, rank 0's, or where a machine's temporary folder has no room.
    """
    if isinstance(opened, ImageSource):
        try:
            opened.columns.move_to_file()
        except OSError as error:
            opened = UserError(_no_room(error))
    opened = world.broadcast_object(opened)
    if isinstance(opened, UserError):
        raise opened
    assert opened is not None
    columns = opened.columns
    folder = os.stat(tempfile.gettempdir())
    machine = (socket.gethostname(), folder.st_dev, folder.st_ino)
    by_rank = world.all_gather_objects((columns.attach(), machine))
    problem = None
    if not all(attached for attached, _ in by_rank):
        first_of = {theirs: rank for rank, (there, theirs) in reversed(list(enumerate(by_rank))) if not there}
        problem = _send(columns, first_of.get(machine), world)
    problem = next((text for text in world.all_gather_objects(problem) if text is not None), None)
    if problem is not None:
        raise UserError(problem)
    return opened


def _send(columns: Columns, first: int | None, world: Group) -> str | None:
    """Sends rank 0's file to each rank that is the `first` of its machine to lack it; what went wrong here."""
    absent, problem = not columns.attach(), None
    received = _broadcast_chunks(columns, world)
    try:
        if absent and world.rank == first:
            columns.receive(received)
    except OSError as error:
        problem = _no_room(error)
    for _ in received:  # every rank takes part to the end
        pass
    places = world.all_gather_objects(columns.place)
    if absent and first is not None and not columns.attach(places[first]) and problem is None:
        problem = f"rank {world.rank} cannot open the table of images that rank {first} of its machine has"
    return problem


def _broadcast_chunks(columns: Columns, world: Group) -> Iterator[np.ndarray]:
    assert columns.place is not None
    own = columns.chunks(_CHUNK_BYTES) if world.rank == 0 else None
    for start in range(0, columns.place.size, _CHUNK_BYTES):
        size = min(_CHUNK_BYTES, columns.place.size - start)
        chunk = torch.empty(size, dtype=torch.uint8) if own is None else torch.from_numpy(next(own).copy())
        yield world.broadcast_(chunk.to(world.device), source=0).cpu().numpy()


def _no_room(error: OSError) -> str:
    return (
        f"the table of images does not fit into {tempfile.gettempdir()} on {socket.gethostname()} ({reason(error)}): "
        "make room, or set TMPDIR to a folder that has it"
    )
