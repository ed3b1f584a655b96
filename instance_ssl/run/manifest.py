"""Which image is which class, in a run directory: written at its beginning, kept to when the list of images changes.

    instances.txt        the name of image i in line i
    instance_sizes.npy   (N,) int64, of the images' files in bytes, where they are files
    data.json            N, and the digest of names and sizes
    unreadable.txt       the images that had no id because they could not be read at the time, a line each
    data_changes.jsonl   one line for each time that images have come

An image keeps its id for good, whatever the order of the list. New ones are put behind. One that is not in the list any
more keeps its row, which takes no part (`left_out.py`). So all that was ever written about the first n images stays
right, whatever comes behind them.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from instance_ssl.checkpoint.committed import committed_directories
from instance_ssl.config.data import DataConfig
from instance_ssl.data.folders import escape
from instance_ssl.data.image_sources import ImageSource, read_instances, write_instances
from instance_ssl.data.list_changes import places_of, rearranged
from instance_ssl.data.name_table import NameTable, packed
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError, reason
from instance_ssl.files.atomic import whole_file, write_json, write_lines
from instance_ssl.files.disk_space import why_not_written
from instance_ssl.files.name_lists import list_line
from instance_ssl.files.structured import MalformedError, read_json
from instance_ssl.run.agreement import rank_0_alone
from instance_ssl.run.exclusion_list import LOST, read_left_out
from instance_ssl.run.records import sound_result

_NAMED = 3


def as_known(run_directory: Path, data: DataConfig) -> Callable[[ImageSource], ImageSource]:
    """What gives images the ids by which a run knows them, as one process alone does it.

    It raises `UserError` for images that have changed, are lost though nobody allowed it, or come too late.
    """

    def arrange(source: ImageSource) -> ImageSource:
        before = _read(run_directory)
        if before is None or before == _record_of(source):
            return source
        sizes = _known_sizes(run_directory, before["num_instances"])
        if sizes is None or "sizes" not in source.columns or source.held_out is not None:
            raise _changed(run_directory, f"{run_directory / 'data.json'} has another digest")
        names = _known_names(run_directory, before["num_instances"])
        places = places_of(names, source.names)
        known = {index: found.why for index, found in read_left_out(run_directory, len(names)).items()}
        there = (places >= 0).nonzero()[0]
        others = there[source.columns["sizes"][places[there]] != sizes[there]].tolist()
        if changed := [index for index in others if index not in known]:
            raise _changed(run_directory, f"{_list(names, changed)} {_have(changed)} another size")
        absent = {index: known[index] for index in others}
        absent |= _why_gone(names, (places < 0).nonzero()[0].tolist(), known, source, run_directory, data)
        arranged = rearranged(source, names, sizes, places, absent)
        if len(arranged) > len(names) and (problem := _cannot_grow(run_directory)):
            come = range(len(names), len(arranged))
            raise _changed(run_directory, f"{_list(arranged.names, come)} {_have(come)} come, and {problem}")
        return arranged

    return arrange


def record(source: ImageSource, run_directory: Path, world: Group) -> None:
    """Writes down which image is which class. Collective.

    Raises:
        UserError: when that is impossible.
    """

    def write() -> None:
        try:
            _write(source, run_directory)
        except OSError as error:
            raise UserError(f"--run-dir {run_directory}: {why_not_written(error, run_directory, 0)}") from error

    rank_0_alone(write, world)


def _write(source: ImageSource, run_directory: Path) -> None:
    """data.json comes last: until it is there, what else was written says nothing new about the images it counts."""
    before, now = _read(run_directory), _record_of(source)
    if before == now:
        return
    run_directory.mkdir(parents=True, exist_ok=True)
    write_instances(source, run_directory / "instances.txt")
    if "sizes" in source.columns:
        with whole_file(run_directory / "instance_sizes.npy") as temporary, temporary.open("wb") as file:
            np.save(file, source.columns["sizes"])
    if source.left_out:
        write_lines(source.left_out, run_directory / "unreadable.txt")
    if before is not None:
        change = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "before": before, "now": now}
        with (run_directory / "data_changes.jsonl").open("a") as file:
            file.write(json.dumps(change) + "\n")
    write_json(run_directory / "data.json", now)


def _record_of(source: ImageSource) -> dict[str, Any]:
    return {"num_instances": len(source), "digest": source.digest}


def _read(run_directory: Path) -> dict[str, Any] | None:
    path = run_directory / "data.json"
    try:
        if not path.exists():
            return None
        record = read_json(path)
        num_instances, digest = record.get("num_instances"), record.get("digest")
        if type(num_instances) is not int or num_instances < 1 or not isinstance(digest, str):
            raise MalformedError("it must hold num_instances and digest")
        return {"num_instances": num_instances, "digest": digest}
    except (OSError, MalformedError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}): restore it or give another --run-dir") from None


def _known_names(run_directory: Path, count: int) -> NameTable:
    path = run_directory / "instances.txt"
    try:
        names = packed(islice(read_instances(path), count))
    except UnicodeError:
        raise UserError(f"{path} is damaged: restore it or give another --run-dir") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(names) != count:
        raise UserError(f"{path} has {len(names)} names of {count}: restore it or give another --run-dir")
    return names


def _known_sizes(run_directory: Path, count: int) -> np.ndarray | None:
    """None where a run has none: its images are no files, or it was begun before there was such a record."""
    path = run_directory / "instance_sizes.npy"
    if not path.exists():
        return None
    try:
        sizes = np.load(path, allow_pickle=False)
        if sizes.dtype != np.int64 or sizes.ndim != 1 or len(sizes) < count:
            raise ValueError
    except (OSError, ValueError, EOFError, AttributeError, TypeError, BadZipFile, MemoryError):
        raise UserError(f"{path} is damaged: restore it or give another --run-dir") from None
    return sizes[:count]


def _why_gone(
    names: NameTable,
    gone: list[int],
    known: dict[int, str],
    source: ImageSource,
    run_directory: Path,
    data: DataConfig,
) -> dict[int, str]:
    """Id → why of the images that are not in the list: left out already, broken, or lost where that is allowed."""
    whys, lost = {}, []
    # A name may hold ": " itself, so each place that could end it is looked up.
    left_out = {line[:end]: line for line in source.left_out for end in _ends(line)}
    for index in gone:
        broken = left_out.get(list_line(names[index]))
        if index not in known and broken is None:
            lost.append(index)
        whys[index] = known.get(index) or broken or LOST
    if lost and not data.allow_lost:
        what = f"{_list(names, lost)} {_have(lost)} gone"
        raise _changed(run_directory, what, ", or set data.allow_lost to leave them out")
    return whys


def _ends(line: str) -> list[int]:
    return [place for place in range(len(line)) if line.startswith(": ", place)]


def _cannot_grow(run_directory: Path) -> str | None:
    if sound_result(run_directory / "pretrain") is not None:
        return "training is complete"
    if not committed_directories(run_directory / "initialize_classifier/checkpoints"):
        return "there is no classifier yet that they could join"
    return None


def _changed(run_directory: Path, what: str, cure: str = "") -> UserError:
    return UserError(
        f"the images have changed since {run_directory} was begun ({what}): restore them{cure}, or give another "
        "--run-dir"
    )


def _list(names: NameTable | Any, indices: Any) -> str:
    first = ", ".join(escape(names[int(index)]) for index in list(indices)[:_NAMED])
    return first + (f" and {len(indices) - _NAMED} more" if len(indices) > _NAMED else "")


def _have(indices: Any) -> str:
    return "has" if len(indices) == 1 else "have"
