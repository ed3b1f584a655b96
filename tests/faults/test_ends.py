"""Ranks that die, hang, lag or disagree (F20 to F22, F25 to F27, F36, F37)."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from rig import digests, metrics, quick_first, run, running, status, wait_for


def has_begun(place: Path) -> bool:
    return (place / "run/pretrain/metrics.jsonl").exists()


@pytest.mark.parametrize("victim", quick_first([0, 1], lambda victim: victim == 1))
def test_the_others_leave_when_a_rank_is_killed(place: Path, clean: dict[str, str], victim: int) -> None:
    with running(place, fault="step:*:*:sleep=0.1") as killed:
        wait_for(lambda: has_begun(place))
        killed.signal(victim, signal.SIGKILL)
        began = time.monotonic()
        codes = killed.wait(15)
        assert time.monotonic() - began < 15
    assert codes[victim] == -9
    assert codes[1 - victim] == 3, killed.text()
    assert "Traceback" not in killed.text()
    assert status(place)["state"] == "failed"
    assert f"rank {victim} on" in status(place)["reason"]
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


def test_a_hang_ends_with_stacks(place: Path, clean: dict[str, str]) -> None:
    hung = run(place, fault="step:1:6:sleep=1000", settings={"safety.hang_seconds": 5})
    assert hung.wait(30) == [4, 4], hung.text()
    assert "nothing has moved for" in status(place)["reason"]
    stacks = (place / "run/pretrain/stacks_rank_00001.txt").read_text()
    assert "injection.py" in stacks  # where it sleeps
    assert "train_step" in (place / "run/pretrain/stacks_rank_00000.txt").read_text()
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


@pytest.mark.full
def test_a_frozen_rank_does_not_hold_the_others(place: Path) -> None:
    with running(place, fault="step:1:6:freeze", settings={"safety.hang_seconds": 5}) as frozen:
        frozen.processes[0].join(30)
        assert frozen.reached_fault()
        assert frozen.processes[0].exitcode == 4, frozen.text()
        assert psutil.Process(frozen.processes[1].pid).status() == psutil.STATUS_STOPPED
        assert "nothing has moved for" in status(place)["reason"]
        time.sleep(5)  # so long that its guard, too, misses a beat
        frozen.signal(1, signal.SIGCONT)
        frozen.processes[1].join(30)
        assert frozen.processes[1].exitcode == 3, frozen.text()
    assert "nothing has moved for" in status(place)["reason"]  # what the woken rank finds is not why


@pytest.mark.full
def test_a_run_that_is_stopped_and_goes_on_ends_like_an_undisturbed_one(place: Path, clean: dict[str, str]) -> None:
    """Ctrl-Z, a freezer: for longer than a hang takes, and than collectives' own patience would be beyond that."""
    settings = {"safety.hang_seconds": 4}
    with running(place, fault="step:*:*:sleep=0.1", settings=settings) as stopped:
        wait_for(lambda: has_begun(place))
        for number, seconds in ((signal.SIGSTOP, 11), (signal.SIGCONT, 0)):
            for rank in (0, 1):
                stopped.signal(rank, number)
            time.sleep(seconds)
        assert stopped.wait() == [0, 0], stopped.text()
    assert digests(place) == clean


@pytest.mark.full
def test_a_straggler_is_named(place: Path, clean: dict[str, str]) -> None:
    slow = run(place, fault="step:1:*:sleep=0.3")
    assert slow.wait() == [0, 0], slow.text()
    assert "warning: rank 1 on" in slow.text()
    assert metrics(place)[-1]["speed/straggler_rank"] == 1
    assert digests(place) == clean


def test_a_killed_loader_process_is_said(place: Path, clean: dict[str, str]) -> None:
    settings = {"data.num_workers": 1}
    with running(place, fault="step:*:*:sleep=0.1", settings=settings) as starved:
        wait_for(lambda: has_begun(place))
        (loader,) = psutil.Process(starved.processes[1].pid).children()
        os.kill(loader.pid, signal.SIGKILL)
        assert starved.wait(20) == [3, 1], starved.text()
    assert "a loader process was killed" in starved.text()
    assert "Traceback" not in starved.text()
    resumed = run(place, settings=settings)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


DISAGREEMENTS = {
    "configuration": ["optimization.weight_decay=0.5"],
    "run directory": ["--run-dir", "elsewhere"],
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_ranks_that_were_started_differently_are_refused(place: Path, what: str) -> None:
    refused = run(place, by_rank={1: DISAGREEMENTS[what]})
    assert refused.wait() == [2, 2], refused.text()
    assert refused.text().count("error: ") == 1
    assert f"rank 1 has another {what}" in refused.text()
    assert not has_begun(place)


@pytest.mark.full
def test_logs_that_cannot_be_written_end_nothing(place: Path, clean: dict[str, str]) -> None:
    (place / "run/pretrain").mkdir()
    (place / "run/pretrain/metrics.jsonl").mkdir()
    finished = run(place)
    assert finished.wait() == [0, 0], finished.text()
    assert finished.text().count("metrics are not written") == 1
    assert digests(place) == clean
