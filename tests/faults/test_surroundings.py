"""What the machine does to a run: disks that fill up, consoles that go, ports that are taken (F5, F17, F36, F40)."""

import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from rig import checkpoints, digests, metrics, quick_first, run, running, status, wait_for


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 8 MiB where the stage writes."""
    directory = place / "run/pretrain"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_disk_that_fills_up_costs_only_what_came_after(place: Path, clean: dict[str, str], small_disk: Path) -> None:
    """F5 on a real file system. One that is too full is refused at once; when there is room the run goes on."""
    settings = {"checkpoint.tolerated_failures": 0}
    with running(place, fault="step:0:6:sleep=1.5", settings=settings) as full:
        wait_for(lambda: checkpoints(place))
        with pytest.raises(OSError, match="No space"):
            fill(small_disk / "filler")
        assert full.wait(30) == [2, 2], full.text()
    assert full.text().count("error: ") == 1
    assert "older checkpoints are untouched" in full.text()  # TensorBoard's thread may complain in its own words
    assert [path.name for path in checkpoints(place)] == ["step_000000005"]
    assert not list(checkpoints(place)[0].parent.glob(".*"))
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - 2**18)
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert "make room" in refused.text()
    (small_disk / "filler").unlink()
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


@pytest.mark.full
def test_more_failed_saves_in_a_row_than_are_tolerated_end_the_run(place: Path) -> None:
    """F6: two are said and tried again, the third is one too many; no rank waits for a time-out."""
    failing = run(place, fault="save.mid:1:*:disk-full", settings={"checkpoint.tolerated_failures": 2})
    assert failing.wait(30) == [2, 2], failing.text()
    assert failing.text().count("training continues and retries") == 2
    assert failing.text().count("error: ") == 1
    assert checkpoints(place) == []


@pytest.mark.full
def test_a_configuration_that_cannot_be_written_again_is_still_the_old_one(place: Path, clean: dict[str, str]) -> None:
    """F5: half of one would be that of another experiment, and the run could never go on."""
    assert run(place, fault="step:0:6:term").wait() == [75, 75]
    refused = run(place, file_limit={0: 1000})
    assert refused.wait() == [2, 2], refused.text()
    assert "File too large" in refused.text()
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


@pytest.mark.full
def test_a_last_save_that_outlasts_the_grace_costs_only_itself(place: Path, clean: dict[str, str]) -> None:
    """F17: SIGKILL follows, as from a launcher or a scheduler that has lost its patience."""
    with running(place, fault="save.before:1:*:sleep=3", settings={"checkpoint.every_epochs": 9}) as saving:
        wait_for(lambda: (place / "run/pretrain/metrics.jsonl").exists())
        saving.signal(1, signal.SIGTERM)
        wait_for(lambda: list((place / "run/pretrain/checkpoints").glob(".writing-*/training.json")))
        saving.kill()
        assert saving.wait() == [-9, -9]
    assert checkpoints(place) == []
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


def print_to_a_full_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.full
def test_a_console_that_cannot_be_written_to_does_not_end_a_run(place: Path, clean: dict[str, str]) -> None:
    """F36: a log file on a full disk, or a pipe whose reader has gone."""
    finished = run(place, prepare=print_to_a_full_disk)
    finished.wait()
    assert "Traceback" not in finished.text()
    assert status(place)["state"] == "complete"
    assert digests(place) == clean


def test_a_line_of_metrics_that_was_cut_off_is_mended(place: Path) -> None:
    """F36, F40: as a kill or a full disk leaves it."""
    assert run(place, fault="step:0:6:term").wait() == [75, 75]
    path = place / "run/pretrain/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "tr')
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    steps = [line["step"] for line in metrics(place) if "train/loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == 15


def test_a_port_in_use_is_one_line(place: Path) -> None:
    """F40: two runs on one machine with the launcher's default port, say."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = run(place, size=1, micro_batch=3, environment={"WORLD_SIZE": "2", "MASTER_PORT": port})
        assert refused.wait() == [2], refused.text()
    (line,) = [line for line in refused.text().splitlines() if "rror" in line]
    assert (
        line == f"error: 127.0.0.1:{port}, where the ranks meet, is in use: give another --master_port or MASTER_PORT"
    )


def test_a_run_directory_that_may_not_be_made_is_one_line(place: Path) -> None:
    """F40: `/proc` is read-only even to root."""
    refused = run(place, by_rank={rank: ["--run-dir", "/proc/run"] for rank in (0, 1)})
    assert refused.wait() == [2, 2], refused.text()
    assert "/proc/run" in refused.text()
    assert refused.text().count("error: ") == 1
    assert "Traceback" not in refused.text()


SOON = {"safety.join_seconds": 3}


@pytest.mark.full
def test_a_port_of_another_program_holds_no_rank(place: Path) -> None:
    """F40 without a launcher, which would end all: rank 0 says it; the other talks to a program that never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = run(place, settings=SOON, environment={"MASTER_PORT": port})
        assert refused.wait(30) == [2, 3], refused.text()
    first, second = [line for line in refused.text().splitlines() if "rror" in line]
    assert "is in use" in first
    assert f"rank 1 of 2 could not join the others at 127.0.0.1:{port} within 3 s (safety.join_seconds)" in second
    assert "Traceback" not in refused.text()


@pytest.mark.parametrize("victim", quick_first([0, 1], lambda victim: victim == 1))
def test_a_rank_that_dies_before_all_have_met_does_not_hold_the_others(place: Path, victim: int) -> None:
    """F20 at the very start; test_rounds.py has every moment."""
    ended = run(place, fault=f"start:{victim}:*:kill", settings=SOON)
    codes = ended.wait(30)
    assert codes.pop(victim) == -9
    assert codes == [3], ended.text()
    assert ended.text().count("error: ") == 1
    assert "Traceback" not in ended.text()


def leave_few_files() -> None:
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))


def leave_little_memory() -> None:
    if os.environ["RANK"] == "1":
        limit = psutil.Process().memory_info().vms + 2**29
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.parametrize(("prepare", "flag"), [(leave_few_files, "ulimit -n"), (leave_little_memory, "ulimit -v")])
def test_a_rank_that_is_granted_too_little_says_so(place: Path, prepare: Callable[[], None], flag: str) -> None:
    """As in one node's limits.conf. The other rank waits for it, and says that it did not come."""
    refused = run(place, settings=SOON, prepare=prepare)
    assert refused.wait(30) == [3, 2], refused.text()
    absent, short = [line for line in refused.text().splitlines() if "error: " in line]
    assert "could not join" in absent
    assert flag in short
    assert "Traceback" not in refused.text()
