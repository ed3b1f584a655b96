"""SIGKILL of anything at any moment, again and again, until the run is done (F3)."""

import random
from pathlib import Path

import pytest
from conftest import fresh_copy
from rig import checkpoints, digests, running

ROUNDS = 24


@pytest.mark.fault
def test_kills_at_random_moments_change_nothing(
    initialised: Path, clean: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs are begun anew until so many rounds were cut short; every run that completes ends like the clean one."""
    seed = random.randrange(2**31)
    with capsys.disabled():
        print(f"\nseed {seed}")
    dice = random.Random(seed)
    rounds = completed = number = 0
    while rounds < ROUNDS:
        place = tmp_path / str(number)
        place.mkdir()
        fresh_copy(initialised, place)
        done = False
        while not done and rounds < ROUNDS:
            settings = {"checkpoint.every_steps": dice.randint(1, 3), "data.num_workers": dice.choice([0, 1])}
            with running(place, fault="step:*:*:sleep=0.03", settings=settings) as run:
                victims = dice.choice([[0], [1], [0, 1]])
                run.processes[0].join(dice.uniform(0.2, 3.0))
                done = run.processes[0].exitcode == 0
                if not done:
                    rounds += 1
                    for victim in victims:
                        run.processes[victim].kill()
                codes = run.wait(30)
            assert set(codes) <= {0, 3, -9}, f"seed {seed}: {codes}\n{run.text()}"
        if done:
            completed += 1
            assert digests(place) == clean, f"seed {seed}, run {number}"
            assert checkpoints(place)[-1].name == "step_000000015"
        number += 1
    with capsys.disabled():
        print(f"{rounds} rounds, {completed} runs completed")
    assert completed >= 2
