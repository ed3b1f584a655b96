"""Rank 0's images reach all ranks, with one table of names a machine."""

import errno
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from image_files import encoded
from ranks import run_ranks

from instance_ssl.config.data import DataConfig
from instance_ssl.data.columns import Columns, Place
from instance_ssl.data.image_sources import ArrayImages, ImageSource
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.run import agreement, checks, manifest
from instance_ssl.run.log import RunLog

NAMES = [f"images/{i}/ü\n\udcff.jpg" for i in range(5000)]


def share_over_two_machines(group: Group) -> list[Any]:
    """Rank 0 is on one machine, ranks 1 and 2 are on another: what each got, and then with a full disk there."""
    first = os.getpid() if group.rank == 0 else 0
    first = group.broadcast_object(first)
    there = group.rank > 0
    attach = Columns.attach

    def attach_here(self: Columns, place: Place | None = None) -> bool:
        wanted = place or self.place
        return not (there and wanted is not None and f"/proc/{first}/" in wanted.path) and attach(self, place)

    def full(self: Columns, chunks: Iterator[np.ndarray]) -> None:
        next(chunks)
        raise OSError(errno.ENOSPC, "No space left on device")

    Columns.attach = attach_here  # type: ignore[method-assign]
    socket.gethostname = lambda: "there" if there else "here"
    agreement._CHUNK_BYTES = 10_000
    answers: list[Any] = []
    images = agreement.share_images(_images() if group.rank == 0 else None, group)
    assert images.columns._file is not None
    answers += [
        images.names == NAMES,
        images.load(4999).getpixel((0, 0)),
        os.fstat(images.columns._file.fileno()).st_ino,
    ]
    Columns.receive = full  # type: ignore[method-assign]
    for opened in (_images(), UserError("no such folder")):
        try:
            agreement.share_images(opened if group.rank == 0 else None, group)
        except UserError as error:
            answers.append(str(error))
    return answers


def _images() -> ArrayImages:
    pixels = np.zeros((5000, 2, 2, 3), np.uint8)
    pixels[4999] = 7
    return ArrayImages(pixels, NAMES, None, None)


def test_each_machine_has_one_table_and_a_full_disk_ends_all_ranks() -> None:
    answers = run_ranks(share_over_two_machines, 3)
    assert [answer[:2] for answer in answers] == [[True, (7, 7, 7)]] * 3
    files = [answer[2] for answer in answers]
    assert files[1] == files[2] != files[0]
    for answer in answers:
        assert "on there (No space left on device)" in answer[3]
        assert "TMPDIR" in answer[3]
        assert answer[4:] == ["no such folder"]


def open_with_broken_files(group: Group, root: Path, run: Path) -> tuple[list[str], str]:
    data = DataConfig(kind="folder", root=root, on_broken="skip", max_broken_share=0.5)
    images = checks.open_images(data, "train", group, RunLog(is_main=False))
    manifest.record(images, run, group)
    try:
        checks.open_images(data.model_copy(update={"max_broken_share": 0.1}), "train", group, RunLog(is_main=False))
    except UserError as error:
        return list(images.names), str(error)
    return list(images.names), ""


def test_what_is_left_out_is_left_out_on_all_ranks_and_written_down(tmp_path: Path) -> None:
    for name, content in {f"{i}.jpg": encoded(i) for i in range(5)}.items():
        (tmp_path / name).write_bytes(b"" if name == "1.jpg" else content)
    answers = run_ranks(open_with_broken_files, 2, tmp_path, tmp_path / "run")
    assert answers[0] == answers[1]
    names, refusal = answers[0]
    assert names == ["0.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert "1 of 5 images" in refusal
    assert (tmp_path / "run/instances.txt").read_text().split() == names
    assert (tmp_path / "run/unreadable.txt").read_text() == "1.jpg: the file is empty\n"


def open_slowly(group: Group, root: Path) -> tuple[int, list[str]]:
    comm.set_timeouts(3)
    agreement._SECONDS_BETWEEN_SIGNS = 1.0
    said: list[str] = []
    log = RunLog(is_main=False)
    log.say = said.append  # type: ignore[method-assign]

    def arrange(images: ImageSource) -> ImageSource:
        time.sleep(6)
        return images

    data = DataConfig(kind="folder", root=root)
    return len(checks.open_images(data, "train", group, log, arrange)), said


def test_a_list_that_takes_longer_to_make_than_a_collective_may_reaches_all(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(encoded(0))
    for count, said in run_ranks(open_slowly, 2, tmp_path):
        assert count == 1
        assert len(said) >= 4
        assert re.fullmatch(r"train images: rank 0 is reading every file or shard, \d+ s so far", said[0])
