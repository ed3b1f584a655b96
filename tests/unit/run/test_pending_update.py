"""An update of the images that is killed at any change to the disk leaves the old state or the new one."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from instance_ssl.run import pending_update

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "open")
FILES = ("instances.txt", "instance_sizes.npy", "data.json", "data_changes.jsonl")


def make_run(run: Path, *, has_training: bool) -> None:
    (run / "initialize_classifier/partial").mkdir(parents=True)
    for name in (*FILES[:3], "left_out.txt"):
        (run / name).write_text("old")
    if has_training:
        (run / "pretrain/checkpoints/step_000000012").mkdir(parents=True)
        for name in ("checkpoints/step_000000012/encoder.pt", "metrics.jsonl", "left_out_steps.json"):
            (run / "pretrain" / name).write_text("old")


def update(run: Path) -> None:
    folder = pending_update.begin(run)
    (folder / "checkpoints/step_000000010").mkdir(parents=True)
    for name in (*FILES, "instances_map_1.npy", "metrics.jsonl", "checkpoints/step_000000010/encoder.pt"):
        (folder / name).write_text("new")
    (run / "pretrain").mkdir(exist_ok=True)
    pending_update.commit(run)


def killed_at(change: int, run: Path) -> bool:
    """Whether the update, in a process of its own, came to so many changes of the run directory."""
    process = os.fork()
    if process == 0:
        left = change

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in CHANGES and str(arguments[0]).startswith(str(run)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        update(run)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def contents(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): path.read_text()
        for path in run.rglob("*")
        if path.is_file() and path.name != "lock" and not path.relative_to(run).parts[0].startswith(".")
    }


@pytest.mark.parametrize("has_training", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_kill_leaves_the_old_state_or_the_new_one(tmp_path: Path, has_training: bool) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for run in (old, new):
        make_run(run, has_training=has_training)
    update(new)
    assert contents(new)["data.json"] == contents(new)["pretrain/checkpoints/step_000000010/encoder.pt"] == "new"
    assert ("pretrain/checkpoints_before_update_1/step_000000012/encoder.pt" in contents(new)) == has_training
    assert not {"left_out.txt", "pretrain/left_out_steps.json"} & contents(new).keys()
    outcomes = []
    change = 0
    while True:
        change += 1
        run = tmp_path / str(change)
        make_run(run, has_training=has_training)
        if not killed_at(change, run):
            break
        pending_update.finish(run)
        found = contents(run)
        assert found in (contents(old), contents(new)), f"killed at change {change}"
        outcomes.append(found == contents(new))
        if not outcomes[-1]:
            update(run)  # what was left behind does not stand in its way
            assert contents(run) == contents(new)
    assert outcomes == sorted(outcomes)
    assert 10 < sum(outcomes) < len(outcomes) - 5
