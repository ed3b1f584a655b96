"""Runs that are stopped often, in evaluations, or resumed under what may change (F12, F13, F15, F18, F20, F21, F37)."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import fresh_copy
from PIL import Image
from rig import EPOCHS, STEPS_PER_EPOCH, checkpoints, digests, quick_first, run, running, status, wait_for

import instance_ssl.training.step as pretraining
from instance_ssl.data.views import ViewBatch


@pytest.mark.full
def test_a_run_that_is_stopped_in_every_step_ends_like_an_undisturbed_one(place: Path, clean: dict[str, str]) -> None:
    """F12: nothing that one resumption loses shows only in the next."""
    for step in range(3, 8):
        stopped = run(place, fault=f"step:{step % 2}:{step}:term")
        assert stopped.wait() == [75, 75], stopped.text()
        assert checkpoints(place)[-1].name == f"step_{step + 1:09d}"
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


def write_down_ids() -> None:
    """Every micro-batch's instance ids go to $IDS."""
    original, path = pretraining.flatten_views, Path(os.environ["IDS"]) / os.environ["RANK"]

    def flatten_views(batch: ViewBatch, device: torch.device) -> Any:
        with path.open("a") as file:
            file.write(json.dumps(batch.ids.tolist()) + "\n")
        return original(batch, device)

    pretraining.flatten_views = flatten_views


def global_batches(folder: Path) -> list[list[int]]:
    """Ids of every global batch of twelve, sorted, from what each rank has seen."""
    by_rank = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.iterdir())]
    in_order = [index for parts in zip(*by_rank, strict=True) for part in parts for index in part]
    return [sorted(in_order[first : first + 12]) for first in range(0, len(in_order), 12)]


RANKS = [(2, 1), (2, 3), (1, 2), (4, 2)]


@pytest.mark.parametrize(("wrote", "reads"), quick_first(RANKS, lambda case: case == (2, 3), lambda case: case[0] != 2))
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(
    initialised: Path, tmp_path: Path, wrote: int, reads: int
) -> None:
    """F13: with three images a micro-batch or two, whatever divides."""
    fresh_copy(initialised, tmp_path)
    stopped = run(tmp_path, size=wrote, fault="step:0:6:term")
    assert set(stopped.wait()) == {75}, stopped.text()
    seen = []
    for name, size, micro_batch in (("as before", wrote, 3), ("otherwise", reads, 2)):
        place, ids = tmp_path / name, tmp_path / f"ids {name}"
        shutil.copytree(tmp_path / "run", place / "run")
        (place / "images").symlink_to(initialised / "images")
        ids.mkdir()
        goes_on = run(place, size=size, micro_batch=micro_batch, prepare=write_down_ids, environment={"IDS": str(ids)})
        assert set(goes_on.wait()) == {0}, goes_on.text()
        seen.append(global_batches(ids))
    assert seen[0] == seen[1]
    assert len(seen[0]) == EPOCHS * STEPS_PER_EPOCH - 7
    assert all(len(set(batch)) == 12 for batch in seen[0])


def test_keys_that_may_change_do_not_change_the_result(place: Path, clean: dict[str, str]) -> None:
    """F15: the images may lie elsewhere, too."""
    assert run(place, fault="step:0:6:term").wait() == [75, 75]
    shutil.copytree(place / "images", place / "moved")
    free = {"log.every_steps": 1, "checkpoint.keep": 5, "checkpoint.every_steps": 3, "data.num_workers": 1}
    free |= {"safety.hang_seconds": 50, "evaluation.batch_size": 7, "data.root": place / "moved"}
    resumed = run(place, settings=free)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


@pytest.mark.parametrize("change", quick_first(["removed", "renamed"], lambda change: change == "removed"))
def test_a_set_without_one_of_the_images_is_refused(initialised: Path, place: Path, change: str) -> None:
    """F15; test_growth.py has images that come."""
    (place / "images").unlink()
    images = Path(shutil.copytree(initialised / "images", place / "images"))
    if change == "renamed":
        (images / "007.png").rename(images / "999.png")
    else:
        (images / "007.png").unlink()
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert "the images have changed" in refused.text()


@pytest.mark.full
def test_ranks_that_do_not_talk_to_the_dead_one_leave_too(place: Path) -> None:
    """F20 among four."""
    killed = run(place, size=4, fault="step:2:6:kill")
    codes = killed.wait(30)
    assert codes.pop(2) == -9
    assert set(codes) == {3}, killed.text()
    assert "rank 2 on" in status(place)["reason"]


def ignore_hangups() -> None:
    """As nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.full
def test_a_run_under_nohup_outlives_its_terminal(place: Path, clean: dict[str, str]) -> None:
    with running(place, fault="step:*:*:sleep=0.05", prepare=ignore_hangups) as goes_on:
        wait_for(lambda: checkpoints(place))
        for rank in (0, 1):
            goes_on.signal(rank, signal.SIGHUP)
        assert goes_on.wait() == [0, 0], goes_on.text()
    assert digests(place) == clean


@pytest.mark.fault
@pytest.mark.parametrize("action", ["sleep=1000", "freeze"])
def test_a_hang_in_the_search_for_hard_classes_ends_with_stacks(
    place: Path, clean: dict[str, str], action: str
) -> None:
    """F21 in the classifier's own group."""
    settings = {"safety.hang_seconds": 3}
    with running(place, fault=f"hard_classes:1:5:{action}", settings=settings) as hung:
        hung.processes[0].join(30)
        assert hung.reached_fault()
        assert hung.processes[0].exitcode == 4, hung.text()
    assert "hard_classes.py" in (place / "run/pretrain/stacks_rank_00000.txt").read_text()
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean


def labelled(place: Path) -> dict[str, Any]:
    """Settings of an evaluation on some of the images, with labels."""
    for split, numbers in (("train", range(21)), ("val", range(21, 32))):
        for number in numbers:
            folder = place / f"labelled/{split}/class_{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            with Image.open(place / f"images/{number:03d}.png") as image:
                image.save(folder / f"{number:03d}.png")
    return {
        "evaluation.data.kind": "tree",
        "evaluation.data.root": place / "labelled",
        "evaluation.sources": "[pixels,random]",
        "evaluation.batch_size": 2,
        "evaluation.knn.neighbours": "[3]",
    }


ENDS = [("evaluate:1:0:term", 75, "stopped"), ("evaluate:*:0:term", 75, "stopped"), ("evaluate:1:0:kill", -9, "failed")]


@pytest.mark.parametrize(
    ("fault", "code", "state"), quick_first(ENDS, lambda case: case is ENDS[0], lambda case: case is ENDS[1])
)
def test_an_evaluation_that_is_ended_is_done_again_with_the_same_figures(
    place: Path, fault: str, code: int, state: str
) -> None:
    """F18, F37: it claims nothing, says truly how it ended, and what it finds then is what it would have found."""
    settings = labelled(place)
    figures = []
    for order in (fault, None):
        if order is not None:
            ended = run(place, stage="evaluate_knn", fault=order, settings=settings)
            codes = ended.wait(30)
            assert codes[1] == code, ended.text()
            assert codes[0] == (75 if state == "stopped" else 3), ended.text()
            assert status(place, "evaluate_knn")["state"] == state
            assert not (place / "run/evaluate_knn/result.json").exists()
        finished = run(place, stage="evaluate_knn", settings=settings)
        assert finished.wait() == [0, 0], finished.text()
        figures.append(json.loads((place / "run/evaluate_knn/result.json").read_text())["figures"])
        shutil.rmtree(place / "run/evaluate_knn")
    assert figures[0] == figures[1]


# A closed terminal sends SIGHUP to all.
SIGNALS = [((0,), signal.SIGTERM), ((0, 1), signal.SIGINT), ((0, 1), signal.SIGHUP)]
SIGNALS += [((0,), signal.SIGINT), ((0, 1), signal.SIGTERM)]


@pytest.mark.parametrize(
    ("who", "number"), quick_first(SIGNALS, lambda case: case is SIGNALS[0], lambda case: case not in SIGNALS[:3])
)
def test_a_signal_to_ranks_with_loaders_stops_all_with_one_checkpoint(
    place: Path, clean: dict[str, str], who: tuple[int, ...], number: int
) -> None:
    """F16 without a launcher: exit code 75 from every rank, and the signal is named.

    What goes to all ranks goes to their loader processes as well, as from a terminal or a scheduler.
    """
    settings = {"data.num_workers": 2}
    with running(place, fault="step:*:*:sleep=0.3", settings=settings) as stopped:
        wait_for(lambda: checkpoints(place))
        ranks = [psutil.Process(stopped.processes[rank].pid) for rank in who]
        loaders = [loader for rank in ranks for loader in rank.children()]
        assert len(loaders) == 2 * len(who)
        for process in [*loaders, *ranks] if len(who) == 2 else ranks:
            process.send_signal(number)
        assert stopped.wait() == [75, 75], stopped.text()
        assert not any(loader.is_running() and loader.status() != psutil.STATUS_ZOMBIE for loader in loaders)
    assert status(place)["reason"] == signal.Signals(number).name
    assert len(checkpoints(place)) == 2
    resumed = run(place, settings=settings)
    assert resumed.wait() == [0, 0], resumed.text()
    assert digests(place) == clean
