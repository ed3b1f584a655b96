"""Which image is which class, in a run directory: written when the run begins, checked whenever it is opened.

    instances.txt        the name of image i in line i
    instance_sizes.npy   (N,) int64, of the images' files in bytes, where they are files
    data.json            N, and the digest of names and sizes
    unreadable.txt       the images that had no id because they could not be read at the time, a line each
    data_changes.jsonl   a line for each update of the images

A training knows one fixed set of images, 0 … N - 1. It finds them by name, whatever the order of the list. When images
have come or gone, `update_images` rewrites the newest checkpoint and these files (`pending_update.py`). Functions raise
a `UserError` where a file is damaged or cannot be read or written.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from instance_ssl.checkpoint.committed import committed_directories
from instance_ssl.config.data import DataConfig
from instance_ssl.data.image_sources import ImageSource, read_instances, write_instances
from instance_ssl.data.list_changes import places_of, taken
from instance_ssl.data.name_table import NameTable, packed
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError, escape, reason
from instance_ssl.files.atomic import whole_file, write_json, write_lines
from instance_ssl.files.disk_space import why_not_written
from instance_ssl.files.name_lists import list_line
from instance_ssl.files.structured import MalformedError, read_json
from instance_ssl.run.agreement import rank_0_alone
from instance_ssl.run.broken_record import Broken, as_line, left_out_path, read_broken, read_left_out
from instance_ssl.run.records import sound_result

_NAMED = 3


def as_known(run_directory: Path, data: DataConfig, stages: Sequence[str]) -> Callable[[ImageSource], ImageSource]:
    """Returns a function that gives images their ids in a run. One process alone calls it.

    Images that the run knows come first, in the run's order; new ones follow in the order of the list. Where one of the
    `stages` updates the run, images that it is to drop are excluded.

    Raises:
        UserError: from that function, for images that have changed, are lost, or that no stage adds.
    """

    def arrange(source: ImageSource) -> ImageSource:
        before = _read(run_directory)
        if before is None:
            return source
        refusal = _why_not_updated(run_directory, stages)
        left_out = bool(read_left_out(run_directory)) and _has_classifier(run_directory)
        must_update = refusal is None and ("update_images" in stages or left_out)
        if before == _record_of(source) and (not must_update or "sizes" not in source.columns):
            return source
        known = _KnownImages(run_directory, before["num_instances"], source)
        known.refuse_changes(allow_lost=data.allow_lost, why_none_new=refusal)
        return known.arranged(drops_broken=must_update or (refusal is None and known.have_changed))

    return arrange


class _KnownImages:
    """Where the images of a run are in a list of today, and whether any `have_changed`: come or gone."""

    def __init__(self, run_directory: Path, count: int, source: ImageSource) -> None:
        self._run_directory, self._source = run_directory, source
        self._names, sizes_N = known_images(run_directory, count)
        if sizes_N is None or "sizes" not in source.columns:
            raise _changed(run_directory, f"{run_directory / 'data.json'} has another digest")
        listed_sizes = source.columns["sizes"]
        self._places_N = places_of(self._names, source.names)
        has_other_size_N = (self._places_N >= 0) & (listed_sizes[self._places_N] != sizes_N)
        self._is_there_N = (self._places_N >= 0) & ~has_other_size_N
        self._record = read_broken(run_directory)
        self._is_broken_N = np.zeros(count, bool)
        self._is_broken_N[[index for index in read_left_out(run_directory) if index < count]] = True
        self._is_broken_N[_recorded(self._record, self._names, sizes_N)] = True
        self._is_changed_N = has_other_size_N & ~self._is_broken_N
        self._broken_places = _recorded(self._record, source.names, listed_sizes)
        is_new = np.ones(len(source), bool)
        is_new[self._places_N[self._is_there_N]] = False
        is_new[self._broken_places] = False
        self._new = is_new.nonzero()[0]
        self.have_changed = bool(len(self._new)) or not self._is_there_N.all()

    def refuse_changes(self, *, allow_lost: bool, why_none_new: str | None) -> None:
        """Refuses files of another size that are not recorded as broken, and lost and new images unless allowed."""
        self._refuse(self._names, self._is_changed_N.nonzero()[0].tolist(), "another size")
        if not allow_lost:
            # Unreadable images are not lost. A name may hold ": " itself: each place that could end it is looked up.
            unreadable = {line[: end.start()] for line in self._source.left_out for end in re.finditer(": ", line)}
            gone = ((self._places_N < 0) & ~self._is_broken_N).nonzero()[0].tolist()
            lost = [index for index in gone if list_line(self._names[index]) not in unreadable]
            self._refuse(self._names, lost, "gone", cure=", or set data.allow_lost to drop their classes")
        if why_none_new is not None:
            self._refuse(self._source.names, self._new.tolist(), f"come, and {why_none_new}")

    def _refuse(self, names: Sequence[str], indices: list[int], what: str, cure: str = "") -> None:
        if indices:
            first = ", ".join(escape(names[index]) for index in indices[:_NAMED])
            more = f" and {len(indices) - _NAMED} more" if len(indices) > _NAMED else ""
            have = "has" if len(indices) == 1 else "have"
            raise _changed(self._run_directory, f"{first}{more} {have} {what}", cure)

    def arranged(self, *, drops_broken: bool) -> ImageSource:
        """The images of the run that are there, in its order, and then the new ones."""
        is_kept_N = self._is_there_N & ~self._is_broken_N if drops_broken else self._is_there_N
        order = np.concatenate([self._places_N[is_kept_N], self._new])
        source = taken(self._source, order)
        names = [self._source.names[int(place)] for place in np.setdiff1d(self._broken_places, order)]
        source.left_out = [*source.left_out, *(as_line(name, self._record[name]) for name in names)]
        return source


def _recorded(record: Mapping[str, Broken], names: Sequence[str], sizes: np.ndarray) -> np.ndarray:
    """The places, int64, of the recorded images among these, where they still have the recorded size."""
    if not record:
        return np.empty(0, np.int64)
    places = places_of(list(record), names)
    recorded_sizes = np.array([broken.size for broken in record.values()], np.int64)
    return places[(places >= 0) & (sizes[places] == recorded_sizes)]


def _why_not_updated(run_directory: Path, stages: Sequence[str]) -> str | None:
    """Why these stages do not take in new images; None where one of them does."""
    if not _has_classifier(run_directory):
        return None if "initialize_classifier" in stages else "the classifier is not initialised"
    if sound_result(run_directory / "pretrain") is not None:
        return "training is complete"
    if {"pretrain", "update_images"}.isdisjoint(stages):
        return "only runners/pretrain.py, runners/pipeline.py and runners/update_images.py add them to the run"
    return None


def _has_classifier(run_directory: Path) -> bool:
    return bool(committed_directories(run_directory / "initialize_classifier/checkpoints"))


def record(source: ImageSource, run_directory: Path, world: Group) -> None:
    """Writes the manifest of a run that has none, or has learned nothing yet by the one it has. Collective."""

    def write() -> None:
        try:
            before = _read(run_directory)
            if before is not None and (before == _record_of(source) or _has_classifier(run_directory)):
                return
            (run_directory / "data.json").unlink(missing_ok=True)
            left_out_path(run_directory).unlink(missing_ok=True)
            write_manifest(source, run_directory)
        except OSError as error:
            raise UserError(f"--run-dir {run_directory}: {why_not_written(error, run_directory, 0)}") from error

    rank_0_alone(write, world)


def write_manifest(source: ImageSource, folder: Path) -> None:
    """Writes which image is which class; data.json comes last, and without it the other files do not count."""
    folder.mkdir(parents=True, exist_ok=True)
    write_instances(source, folder / "instances.txt")
    if "sizes" in source.columns:
        write_array(source.columns["sizes"], folder / "instance_sizes.npy")
    if source.left_out:
        write_lines(source.left_out, folder / "unreadable.txt")
    write_json(folder / "data.json", _record_of(source))


def write_array(values: np.ndarray, path: Path) -> None:
    """Writes an .npy file through to the disk, whole or not at all."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)


def _record_of(source: ImageSource) -> dict[str, Any]:
    return {"num_instances": len(source), "digest": source.digest}


def _read(run_directory: Path) -> dict[str, Any] | None:
    path = run_directory / "data.json"
    try:
        if not path.exists():
            return None
        record = read_json(path)
        count, digest = record.get("num_instances"), record.get("digest")
        if type(count) is not int or count < 1 or not isinstance(digest, str):
            raise MalformedError("it must hold num_instances and digest")
        return {"num_instances": count, "digest": digest}
    except (OSError, MalformedError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}): restore it or give another --run-dir") from None


def known_images(run_directory: Path, count: int) -> tuple[NameTable, np.ndarray | None]:
    """Names of the first `count` images of a run and their sizes in bytes, (count,) int64.

    The sizes are None where a run has none: its images are not files, or an early version began it.
    """
    path = run_directory / "instances.txt"
    try:
        names = packed(islice(read_instances(path), count))
    except UnicodeError:
        raise UserError(f"{path} is damaged: restore it or give another --run-dir") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(names) != count:
        raise UserError(f"{path} has {len(names)} names of {count}: restore it or give another --run-dir")
    path = run_directory / "instance_sizes.npy"
    if not path.exists():
        return names, None
    try:
        sizes = np.load(path, allow_pickle=False)
        if sizes.dtype != np.int64 or sizes.ndim != 1 or len(sizes) < count:
            raise ValueError
    except (OSError, ValueError, EOFError, AttributeError, TypeError, BadZipFile, MemoryError):
        raise UserError(f"{path} is damaged: restore it or give another --run-dir") from None
    return names, sizes[:count]


def _changed(run_directory: Path, what: str, cure: str = "") -> UserError:
    return UserError(
        f"the images have changed since {run_directory} was begun ({what}): restore them{cure}, or give another "
        "--run-dir"
    )
