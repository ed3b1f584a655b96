"""SIGKILL of anything at any moment, again and again, until the run is done (F3)."""

import random
import time
from pathlib import Path

import pytest
from conftest import fresh_copy
from rig import checkpoints, digests, running

ROUNDS, COMPLETED = 24, 2
PACE = "step:*:*:sleep=0.03"


@pytest.mark.fault
def test_kills_at_random_moments_change_nothing(
    initialised: Path, clean: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs are begun anew until so many rounds were cut short and two runs have completed, each like the clean one."""
    seed = random.randrange(2**31)
    with capsys.disabled():
        print(f"\nseed {seed}")
    dice = random.Random(seed)
    whole_seconds = undisturbed_seconds(initialised, tmp_path / "undisturbed")
    rounds = completed = number = 0
    while rounds < ROUNDS or completed < COMPLETED:
        place = tmp_path / str(number)
        place.mkdir()
        fresh_copy(initialised, place)
        done = False
        while not done:
            assert rounds < 10 * ROUNDS, f"seed {seed}: no run completes"
            settings = {"checkpoint.every_steps": dice.randint(1, 3), "data.num_workers": dice.choice([0, 1])}
            settings["safety.join_seconds"] = 15  # a rank killed before all have met is waited for so long
            with running(place, fault=PACE, settings=settings) as run:
                victims = dice.choice([[0], [1], [0, 1]])
                run.processes[0].join(dice.uniform(0.2, 1.2 * whole_seconds))
                done = run.processes[0].exitcode == 0
                if not done:
                    rounds += 1
                    for victim in victims:
                        run.processes[victim].kill()
                codes = run.wait(60, reaches_fault=False)
            assert set(codes) <= {0, 3, -9}, f"seed {seed}: {codes}\n{run.text()}"
        completed += 1
        assert digests(place) == clean, f"seed {seed}, run {number}"
        assert checkpoints(place)[-1].name == "step_000000015"
        number += 1
    with capsys.disabled():
        print(f"{rounds} rounds, {completed} runs completed")


def undisturbed_seconds(initialised: Path, place: Path) -> float:
    """How long a run takes here and now that nothing happens to."""
    place.mkdir()
    fresh_copy(initialised, place)
    began = time.monotonic()
    with running(place, fault=PACE) as run:
        assert run.wait(120) == [0, 0], run.text()
    return time.monotonic() - began


STARTS = 40


@pytest.mark.fault
def test_a_kill_at_any_moment_of_the_start_ends_all_in_time(
    initialised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank killed in the first seconds, of 2 or 4: the others end with a line each, no later than they may."""
    seed = random.randrange(2**31)
    dice, join_seconds = random.Random(seed), 5
    before = after = 0
    for number in range(STARTS):
        place = tmp_path / str(number)
        place.mkdir()
        fresh_copy(initialised, place)
        size = dice.choice([2, 2, 4])
        victim = dice.randrange(size)
        settings = {"safety.join_seconds": join_seconds}
        with running(place, size=size, fault="step:*:*:sleep=1", settings=settings) as run:
            time.sleep(dice.uniform(0.0, dice.choice([1.0, 6.0])))
            run.processes[victim].kill()
            codes = run.wait(join_seconds + 30, reaches_fault=False)
        assert codes.pop(victim) == -9, f"seed {seed}, start {number}: {codes}\n{run.text()}"
        assert set(codes) == {3}, f"seed {seed}, start {number}: {codes}\n{run.text()}"
        assert "Traceback" not in run.text(), run.text()
        waited = run.text().count("could not join")
        said = waited + run.text().count("; stopping too") + run.text().count("has died\n")
        assert said >= size - 1, f"seed {seed}, start {number}\n{run.text()}"
        before, after = before + (waited > 0), after + (waited == 0)
    with capsys.disabled():
        print(f"\nseed {seed}: {STARTS} starts, {before} killed before all had met, {after} after")
    assert before
    assert after
