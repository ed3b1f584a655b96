"""Packs images into tar shards of resized JPEGs (kind `tar`), which open faster and are read in long pieces.

The k-th shard always holds the same images, so a packing that was stopped resumes without redoing finished shards.
"""

import hashlib
import io
import math
import multiprocessing
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from instance_ssl.data.image_sources import EncodedImages
from instance_ssl.data.tar_index import index_shard
from instance_ssl.data.unreadable_images import OnBroken
from instance_ssl.errors import UserError, escape, reason
from instance_ssl.files.atomic import whole_file, write_json, write_lines
from instance_ssl.files.disk_space import why_not_written
from instance_ssl.files.hashing import HashingFile
from instance_ssl.files.name_lists import list_line
from instance_ssl.files.structured import read_json

RECORD, BEGUN = "index.json", "packing.json"
_FORMAT = "instance_ssl packed images, version 1"


@dataclass(frozen=True)
class PackedSet:
    """The record of a packed set: what it holds, and how it was made.

    Attributes:
        shards: name → SHA-256 of each shard, in order.
        digest: SHA-256 of the shards' digests, in order.
        num_images: in all shards.
        class_names: of the labels; None without labels.
        source: digest of the images it was made from.
        size: short side in pixels; smaller images keep their size. 0: the files' own bytes.
        quality: of the JPEGs.
        left_out: how many images could not be read.
    """

    shards: dict[str, str]
    digest: str
    num_images: int
    class_names: list[str] | None
    source: str
    size: int
    quality: int
    left_out: int


def read_packed_set(folder: Path) -> PackedSet | None:
    """Reads the record of a folder; None: the folder is not a packed set.

    Raises:
        UserError: the packing is unfinished, or the record is damaged.
    """
    path = folder / RECORD
    shown = f"data.root: {escape(str(folder))}"
    try:
        content = read_json(path)
    except FileNotFoundError:
        if (folder / BEGUN).exists():
            raise UserError(f"{shown} is packed only in part: run runners/pack_dataset.py again, it resumes") from None
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: {RECORD} cannot be read ({reason(error)}): pack the images again") from error
    if content.pop("format", None) != _FORMAT:
        return None  # not written by this project
    try:
        return TypeAdapter(PackedSet).validate_python(content)
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{shown}: {RECORD} is damaged ({escape(wrong)}): pack the images again") from error


_SAMPLED = 32
_POLL_SECONDS = 0.2
_BLOCK = tarfile.BLOCKSIZE
_JPEG = b"\xff\xd8\xff"
_LONGEST_JPEG = 65_500  # libjpeg's bound, below the format's own 65,535


@dataclass(frozen=True)
class Packing:
    """How images are packed.

    Attributes:
        size: short side in pixels; smaller images keep their size. 0 copies the files as they are.
        quality: of the JPEGs, 1 … 95.
        shard_mib: approximate size of a shard.
        workers: number of processes.
    """

    size: int
    quality: int = 90
    shard_mib: float = 256.0
    workers: int = 1


def pack_images(
    source: EncodedImages,
    folder: Path,
    packing: Packing,
    on_broken: OnBroken,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackedSet:
    """Packs a source into `folder`, or resumes. Opened as kind `tar`, the set has the same ids, names and labels.

    A shard gets its final name once it is whole, and the folder its record once all shards are.

    Args:
        on_broken: what to do about images that cannot be decoded; they get no id in the packed set.
        on_progress: called now and then with the number of images done and of all images.

    Raises:
        UserError: the folder cannot be written to or holds another packing, or `on_broken` refuses an image.
    """
    try:
        shards = _begin(source, folder, packing)
        left_out = _write_shards(source, folder, packing, on_broken, shards, on_progress)
        return _finish(source, folder, packing, list(shards), left_out)
    except OSError as error:
        raise UserError(
            f"--output {escape(str(folder))}: {why_not_written(error, folder, 0)}; the same command resumes"
        ) from error
    except BrokenProcessPool as error:
        raise UserError("a packing process was killed, perhaps for lack of memory; the same command resumes") from error


def _begin(source: EncodedImages, folder: Path, packing: Packing) -> dict[str, range]:
    """Records in the folder what is packed there, and returns the shards with the images of each."""
    odd = next((name for name in source.names if name.lower().endswith(".cls")), None)
    if odd is not None:
        raise UserError(f"{escape(odd)} is named like a class index of a tar: rename it")
    wanted = {"source": source.digest, "size": packing.size, "quality": packing.quality, "mib": packing.shard_mib}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / BEGUN
    if not path.exists():
        if any(folder.iterdir()):
            raise UserError(f"--output {escape(str(folder))} is not empty: give another folder")
        sampled = range(0, len(source), math.ceil(len(source) / _SAMPLED))
        contents = (content for index in sampled if (content := _try(source, index, packing)[0]))
        blocks = [1 - -len(content) // _BLOCK for content in contents]  # its header, and whole blocks of content
        mean = _BLOCK * sum(blocks) / len(blocks) if blocks else _BLOCK
        write_json(path, {**wanted, "images_per_shard": max(1, round(packing.shard_mib * 2**20 / mean))})
    try:
        begun = read_json(path)
        step = begun.pop("images_per_shard")
        if type(step) is not int or step < 1:
            raise ValueError("images_per_shard")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--output: {escape(str(path))} is damaged: give another folder") from error
    if begun != wanted:
        raise UserError(
            f"--output {escape(str(folder))} holds a packing of other images or with other --size, --quality, "
            "--shard-mib, data.exif or data.alpha: give another folder"
        )
    starts = range(0, len(source), step)
    width = max(6, len(str(len(starts))))
    return {
        f"shard-{place:0{width}d}.tar": range(start, min(start + step, len(source)))
        for place, start in enumerate(starts)
    }


def _write_shards(
    source: EncodedImages,
    folder: Path,
    packing: Packing,
    on_broken: OnBroken,
    shards: dict[str, range],
    on_progress: Callable[[int, int], None],
) -> list[tuple[str, str]]:
    """Writes the missing shards; returns name and reason of every image excluded from the set."""
    context = multiprocessing.get_context("fork")
    missing = {name: ids for name, ids in shards.items() if not _is_done(folder / name)}
    counter = context.Value("q", len(source) - sum(map(len, missing.values())))
    known = {"source": source, "packing": packing, "on_broken": on_broken, "counter": counter}
    with ProcessPoolExecutor(
        packing.workers, mp_context=context, initializer=_worker.update, initargs=(known,)
    ) as pool:
        pending: set[Future[None]] = {pool.submit(_write_shard, folder / name, ids) for name, ids in missing.items()}
        while pending:
            done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
            on_progress(counter.value, len(source))
            try:
                for task in done:
                    task.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    left_out = [tuple(row) for name in shards for row in read_json(_record_of(folder / name))["left_out"]]
    on_broken.judge(left_out, len(source))
    return left_out


_worker: dict[str, Any] = {}  # what a process packs, set as it starts


def _write_shard(path: Path, ids: range) -> None:
    """Writes a shard, whole or not at all, then its index, and its record last."""
    source, counter = _worker["source"], _worker["counter"]
    labels = source.labels
    left_out: list[tuple[str, str]] = []
    with whole_file(path) as temporary, temporary.open("wb") as file:
        hashing = HashingFile(file)
        with tarfile.TarFile(
            fileobj=cast(BinaryIO, hashing),
            mode="w",
            format=tarfile.GNU_FORMAT,
            encoding="utf-8",
            errors="surrogateescape",
        ) as tar:
            for index in ids:
                content, problem = _try(source, index, _worker["packing"])
                name = source.names[index]
                if content is None:
                    left_out.append((list_line(name), problem))
                    _worker["on_broken"].judge(left_out, len(source))
                else:
                    _add(tar, name, content)
                    if labels is not None:
                        _add(tar, _label_name(name), b"%d\n" % int(labels[index]))
                with counter.get_lock():
                    counter.value += 1
    index_shard(path, every_member=True)
    write_json(_record_of(path), {"sha256": hashing.digest.hexdigest(), "left_out": left_out, **_stamp(path)})


def _finish(
    source: EncodedImages, folder: Path, packing: Packing, shards: Sequence[str], left_out: Sequence[tuple[str, str]]
) -> PackedSet:
    digests = {name: str(read_json(_record_of(folder / name))["sha256"]) for name in shards}
    packed_set = PackedSet(
        shards=digests,
        digest=hashlib.sha256("".join(digests.values()).encode()).hexdigest(),
        num_images=len(source) - len(left_out),
        class_names=source.class_names,
        source=source.digest,
        size=packing.size,
        quality=packing.quality,
        left_out=len(left_out),
    )
    if left_out:
        write_lines((f"{name}: {why}" for name, why in left_out), folder / "left_out.txt")
    write_json(folder / RECORD, {"format": _FORMAT, **asdict(packed_set)})
    return packed_set


def _try(source: EncodedImages, index: int, packing: Packing) -> tuple[bytes | None, str]:
    """The packed file of an image, or None and the reason: whatever fails here is the image's fault.

    A copied file keeps its EXIF orientation, which readers follow; a re-encoded one is turned already and has none.
    """
    try:
        return _packed(source, index, packing), ""
    except Exception as error:  # encoders and decoders raise OSError, ValueError, MemoryError and more
        return None, reason(error)


def _packed(source: EncodedImages, index: int, packing: Packing) -> bytes:
    content = source.read(index)
    image = source.load(index)
    scale = packing.size / min(image.size)
    if packing.size == 0 or (scale >= 1 and content.startswith(_JPEG)):
        return content
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if max(image.size) > _LONGEST_JPEG:
        raise UserError(
            f"{image.width} x {image.height} pixels are too long for a JPEG ({_LONGEST_JPEG} at most): --size 0 copies "
            "files as they are"
        )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=packing.quality)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _label_name(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}.cls"


def _record_of(shard: Path) -> Path:
    return shard.with_name(shard.name + ".json")


def _stamp(shard: Path) -> dict[str, int]:
    status = shard.stat()
    return {"bytes": status.st_size, "time": status.st_mtime_ns}


def _is_done(shard: Path) -> bool:
    try:
        record = read_json(_record_of(shard))
        same = {name: record.get(name) for name in ("bytes", "time")} == _stamp(shard)
    except (OSError, ValueError):
        return False
    rows = record.get("left_out")
    are_pairs = isinstance(rows, list) and all(
        isinstance(row, list) and list(map(type, row)) == [str, str] for row in rows
    )
    return same and isinstance(record.get("sha256"), str) and are_pairs
