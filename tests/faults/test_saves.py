"""Harm while a checkpoint is written: old or new, never a mix, and never in silence (F1 to F6, F17, F34, F35, F40)."""

import shutil
import signal
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from rig import checkpoints, digests, quick_first, run, running, status, wait_for

from instance_ssl.checkpoint.state import newest_checkpoint
from instance_ssl.distributed.comm import Group

KILLS = {
    "rank 0 in the middle of its files": ("save.mid:0:10:kill", 5),
    "rank 1 in the middle of its files": ("save.mid:1:10:kill", 5),
    "before the commit": ("save.before_commit:0:10:kill", 5),
    "after the rename": ("commit.mid:0:10:kill", 10),
}


def newest_step(group: Group, place: Path) -> int:
    found = newest_checkpoint(place / "run/pretrain/checkpoints", group)
    assert found is not None
    return found.position.step


@pytest.mark.parametrize("moment", quick_first([*KILLS], lambda moment: "rank 0" in moment))
def test_a_kill_leaves_the_old_checkpoint_or_the_new(place: Path, clean: dict[str, str], moment: str) -> None:
    fault, expected = KILLS[moment]
    killed = run(place, fault=fault)
    codes = killed.wait()
    assert sorted(codes) == [-9, 3], killed.text()
    assert run_ranks(newest_step, 1, place) == [expected]
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert f"{expected} steps in all" in resumed.text()
    assert digests(place) == clean
    assert not list((place / "run/pretrain/checkpoints").glob(".*"))


@pytest.mark.full
def test_nothing_is_visible_before_the_slowest_rank_has_written(place: Path) -> None:
    folder = place / "run/pretrain/checkpoints"
    with running(place, fault="save.before:1:5:sleep=1.5") as saving:
        wait_for(lambda: (folder / ".writing-step_000000005/encoder.pt").exists())
        began = time.monotonic()
        while not (folder / "step_000000005").exists():
            assert saving.processes[0].is_alive()
            time.sleep(0.005)
        assert time.monotonic() - began > 1
        names = {path.name for path in (folder / "step_000000005").iterdir()}
        assert {"rank_00001.pt", "MANIFEST.json"} <= names
        assert saving.wait() == [0, 0]


@pytest.mark.full
def test_training_goes_on_while_a_slow_rank_writes(place: Path, clean: dict[str, str]) -> None:
    """Steps pass during the sleep; the next save waits for the one before, and the end is the same."""
    saving = run(place, fault="save.before:1:5:sleep=1.0", settings={"checkpoint.every_steps": 2})
    assert saving.wait() == [0, 0], saving.text()
    assert digests(place) == clean


DISKS = {
    "full for all ranks": {"fault": "save.before:*:10:disk-full"},
    "full for one rank": {"fault": "save.before:1:10:disk-full"},
    "full at the commit": {"fault": "save.before_commit:0:10:disk-full"},
}


@pytest.mark.parametrize("disk", quick_first([*DISKS], lambda disk: disk == "full for one rank"))
def test_a_full_disk_ends_the_run_with_one_line_and_the_old_checkpoint(
    place: Path, clean: dict[str, str], disk: str
) -> None:
    began = time.monotonic()
    ended = run(place, settings={"checkpoint.tolerated_failures": 0}, **DISKS[disk])
    assert ended.wait() == [2, 2], ended.text()
    assert time.monotonic() - began < 30
    assert ended.text().count("error: ") == 1
    assert "no space left in " in ended.text()
    assert "Traceback" not in ended.text()
    assert [path.name for path in checkpoints(place)] == ["step_000000005"]
    assert not list((place / "run/pretrain/checkpoints").glob(".*"))
    assert status(place)["state"] == "failed"
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


@pytest.mark.full
def test_a_failed_save_may_be_made_good_by_the_next(place: Path, clean: dict[str, str]) -> None:
    tolerant = run(place, fault="save.before:1:10:disk-full")
    assert tolerant.wait() == [0, 0], tolerant.text()
    assert "training continues and retries" in tolerant.text()
    assert digests(place) == clean


@pytest.mark.full
def test_a_write_that_the_system_cuts_short_is_no_checkpoint(place: Path) -> None:
    """One rank may write files of at most 3000 bytes, a real limit of the kernel: its rows are longer."""
    limited = run(place, file_limit={1: 3000}, settings={"checkpoint.tolerated_failures": 1})
    assert limited.wait() == [2, 2], limited.text()
    assert limited.text().count("training continues and retries") == 1
    assert "rank 1" in limited.text()
    assert checkpoints(place) == []


@pytest.mark.full
def test_a_second_signal_during_the_save_changes_nothing(place: Path, clean: dict[str, str]) -> None:
    with running(place, fault="save.before:1:*:sleep=1.5", settings={"checkpoint.every_epochs": 9}) as saving:
        wait_for(lambda: (place / "run/pretrain/metrics.jsonl").exists())
        saving.signal(0, signal.SIGTERM)
        wait_for(lambda: list((place / "run/pretrain/checkpoints").glob(".writing-*")))
        saving.signal(0, signal.SIGTERM)
        saving.signal(1, signal.SIGINT)
        assert saving.wait() == [75, 75], saving.text()
    assert len(checkpoints(place)) == 1
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


@pytest.mark.full
def test_a_stop_while_files_are_written_waits_for_them(place: Path, clean: dict[str, str]) -> None:
    """The save of step 5 is under way when the stop at step 6 asks for one of its own."""
    with running(place, fault="save.before:1:5:sleep=1.5") as saving:
        wait_for(lambda: (place / "run/pretrain/checkpoints/.writing-step_000000005").exists())
        time.sleep(0.3)  # some steps, of 20 to 50 ms
        saving.signal(1, signal.SIGTERM)
        assert saving.wait() == [75, 75], saving.text()
    assert checkpoints(place)[0].name == "step_000000005"
    assert len(checkpoints(place)) == 2
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


@pytest.mark.full
def test_damaged_checkpoints_do_not_count_as_kept_ones(place: Path, clean: dict[str, str]) -> None:
    stopped = run(place, fault="step:0:11:term", settings={"checkpoint.keep": 4, "checkpoint.every_steps": 3})
    assert stopped.wait() == [75, 75]
    found = checkpoints(place)
    for broken in found[-2:]:
        with (broken / "encoder.pt").open("ab") as file:
            file.truncate(100)
    resumed = run(place, settings={"checkpoint.keep": 2})
    assert resumed.wait() == [0, 0], resumed.text()
    assert resumed.text().count("warning: damaged checkpoint") == 2
    # The broken one of step 10 was written anew, that of step 12 is left as evidence.
    assert [path.name[-2:] for path in checkpoints(place)] == ["10", "12", "15"]
    assert digests(place) == clean


def test_every_kth_epoch_stays(place: Path) -> None:
    finished = run(place, settings={"checkpoint.keep": 1, "checkpoint.keep_every_epochs": 2})
    assert finished.wait() == [0, 0], finished.text()
    assert [path.name for path in checkpoints(place)] == ["step_000000010", "step_000000015"]


@pytest.mark.full
def test_leftovers_do_no_harm(place: Path, clean: dict[str, str]) -> None:
    """What a crash leaves, an old lock file, and names that are no checkpoint; there is no LATEST that could lie."""
    stage = place / "run/pretrain"
    folder = stage / "checkpoints"
    (folder / ".writing-step_000000005").mkdir(parents=True)
    (folder / ".writing-step_000000005/rows_000000000_000000099.pt").write_bytes(b"half")
    (folder / ".removed-step_000000002").mkdir()
    (folder / "LATEST").write_text("../../../etc")
    (folder / "notes").mkdir()
    (stage / "lock").write_text("process 1 on elsewhere\n")
    finished = run(place)
    assert finished.wait() == [0, 0], finished.text()
    assert digests(place) == clean
    assert not list(folder.glob(".*"))


def test_a_run_directory_that_cannot_be_is_refused(place: Path) -> None:
    (place / "file").write_text("")
    refused = run(place, by_rank={rank: ["--run-dir", str(place / "file/run")] for rank in (0, 1)})
    assert refused.wait() == [2, 2], refused.text()
    assert "--run-dir" in refused.text()
    assert "Traceback" not in refused.text()


def test_too_little_disk_is_refused_before_the_first_step(place: Path) -> None:
    """The disk's free space is not in a test's hands; the number of checkpoints that must find room on it is."""
    free = shutil.disk_usage(place).free
    refused = run(place, settings={"checkpoint.keep": free // 1000})
    assert refused.wait() == [2, 2], refused.text()
    assert "make room, lower checkpoint.keep" in refused.text()
    assert not (place / "run/pretrain/metrics.jsonl").exists()


def test_a_directory_in_use_is_refused(place: Path) -> None:
    with running(place, fault="step:0:*:sleep=0.15") as first:
        wait_for(lambda: (place / "run/pretrain/metrics.jsonl").exists())
        second = run(place)
        assert second.wait() == [2, 2], second.text()
        assert "is in use by process" in second.text()
        assert first.wait() == [0, 0], first.text()
