"""Rank 0's images reach all ranks, with one table of names a machine."""

import errno
import fcntl
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import encoded
from ranks import run_ranks

from instance_ssl.config.data import DataConfig
from instance_ssl.data.image_sources import ArrayImages, ImageSource
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.run import agreement, manifest
from instance_ssl.run.images import open_images
from instance_ssl.run.log import RunLog

NAMES = [f"images/{i}/ü\n\udcff.jpg" for i in range(5000)]


def images() -> ArrayImages:
    pixels = np.zeros((5000, 2, 2, 3), np.uint8)
    pixels[4999] = 7
    return ArrayImages(pixels, NAMES, None, None)


def share(group: Group, run: Path, elsewhere: Path) -> list[Any]:
    """Shares with a run directory, without one, where the last rank sees another one, and on a full disk."""
    opened = images() if group.rank == 0 else None
    shared = agreement.share_images(opened, run, group)
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    inodes = sorted({row[4] for row in maps if len(row) == 6 and row[5].startswith(str(run))})
    answers: list[Any] = [inodes]
    for source in (shared, agreement.share_images(opened, None, group)):
        assert source.names == NAMES
        assert source.load(4999).getpixel((0, 0)) == (7, 7, 7)
        assert source.digest == images().digest
    with pytest.raises(ValueError, match="read-only"):
        shared.columns["pixels"][0] = 1
    for full in (False, True):
        if full:
            agreement.np.save = out_of_space  # type: ignore[attr-defined]
        try:
            agreement.share_images(opened, elsewhere if group.rank == 2 else run, group)
        except UserError as error:
            answers.append(str(error))
        group.barrier()
        # Nothing of it stays on the disk, whether all could map it or not, though the maps are good to the end.
        assert [path.name for path in (run / "index").iterdir()] == ["lock"]
        assert shared.names == NAMES
    return answers


def out_of_space(path: Path, column: np.ndarray) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_all_ranks_map_the_same_files_and_fail_together(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "index").mkdir(parents=True)
    (run / "index/labels.npy").write_bytes(b"of a start that was killed")
    answers = run_ranks(share, 3, run, tmp_path / "elsewhere")
    inodes, unseen, full = answers[0]
    assert len(inodes) == 3  # names, name_ends and pixels
    assert answers == [[inodes, unseen, full]] * 3
    assert "rank 2 on" in unseen
    assert f"cannot read {tmp_path}/elsewhere/index/names_" in unseen
    assert full.startswith(f"--run-dir {run}: no space left")


def share_alone(group: Group, run: Path) -> int:
    (run / "begun").touch()
    return len(agreement.share_images(images(), run, group))


def test_two_starts_of_a_run_do_not_touch_each_other_s_files(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    other = tmp_path / "index/names.npy"
    other.touch()
    with ThreadPoolExecutor() as pool, (tmp_path / "index/lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        second = pool.submit(run_ranks, share_alone, 1, tmp_path)
        while not (tmp_path / "begun").exists() and not second.done():
            time.sleep(0.05)
        time.sleep(0.5)
        assert other.exists()
        assert other.stat().st_size == 0
        fcntl.lockf(lock, fcntl.LOCK_UN)
        assert second.result() == [5000]
    assert not other.exists()


def open_with_broken_files(group: Group, root: Path, run: Path) -> tuple[list[str], str]:
    data = DataConfig(kind="folder", root=root, on_broken="skip", max_broken_share=0.5)
    images = agreement.share_images(open_images(data, "train", group, RunLog(is_main=False)), run, group)
    manifest.record(images, run, group)
    try:
        open_images(data.model_copy(update={"max_broken_share": 0.1}), "train", group, RunLog(is_main=False))
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
    return len(agreement.share_images(open_images(data, "train", group, log, arrange), None, group)), said


def test_a_list_that_takes_longer_to_make_than_a_collective_may_reaches_all(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(encoded(0))
    for count, said in run_ranks(open_slowly, 2, tmp_path):
        assert count == 1
        assert len(said) >= 4
        assert re.fullmatch(r"train images: rank 0 is reading every file or shard, \d+ s so far", said[0])
