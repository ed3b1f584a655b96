"""What an evaluation says of its length: the total first, the time once a minute of steps has been measured."""

import contextlib

import pytest

from instance_ssl.evaluation.workload import Workload, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_total_comes_first_and_the_time_left_once_after_a_minute() -> None:
    said: list[str] = []
    clock = Clock()
    workload = Workload(said.append, "grid", [1000, 1000], clock)
    assert said == ["grid: 2 trainings, 2,000 steps in all; an estimate of the time follows after a minute"]
    clock.now += 500  # reading images is no step
    for _ in range(200):
        workload.advance()
        clock.now += 1
    # The first step starts the clock; 60 more take 60 seconds, and 1,939 are left then.
    assert said[1:] == ["grid: about 32.3 minutes left, at 1 steps/s"]


def test_what_is_done_already_neither_counts_as_left_nor_as_speed() -> None:
    said: list[str] = []
    clock = Clock()
    workload = Workload(said.append, "grid", [1000, 1000, 1000], clock)
    with workload.training(1000):
        pass  # found done
    with contextlib.suppress(ValueError), workload.training(1000):
        workload.advance(400, done_before=True)
        workload.advance()
        raise ValueError("diverged")
    with workload.training(1000):
        for _ in range(121):
            clock.now += 0.5
            workload.advance()
    assert said[1:] == ["grid: about 7.3 minutes left, at 2 steps/s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "7 seconds"), (600, "10.0 minutes"), (7200, "2.0 hours"), (6.2 * 86400, "6.2 days"), (85, "85 seconds")],
)
def test_a_duration_has_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text
