"""Which losses count as spikes, and when waiting for images is worth a word."""

import pytest

from instance_ssl.training.meters import InputWatch, LossLevel


def test_a_loss_far_above_the_mean_is_a_spike() -> None:
    level = LossLevel(1.0, None)
    assert not any(level.add(5.0 + 0.1 * (step % 3)) for step in range(20))
    assert level.add(6.3)
    assert not level.add(5.2)


def test_the_first_steps_are_none_however_they_climb() -> None:
    """Classes that are sampled by recency fill up, say: the loss rises by a nat in three steps."""
    level = LossLevel(1.0, None)
    assert not any(level.add(loss) for loss in (4.8, 4.8, 5.8, 5.9, 5.9, 5.9, 5.9, 5.8, 5.8, 5.8, 5.8, 5.8))
    assert level.level == pytest.approx(5.6, abs=0.1)


def test_the_eleventh_loss_is_the_first_that_can_be_a_spike() -> None:
    level = LossLevel(1.0, None)
    assert not any(level.add(loss) for loss in (*[5.0] * 9, 50.0))
    level = LossLevel(1.0, None)
    assert [level.add(loss) for loss in (*[5.0] * 10, 50.0)][-1]


def test_a_resumed_run_judges_from_its_first_step() -> None:
    assert LossLevel(1.0, 5.0).add(6.1)
    assert not LossLevel(None, 5.0).add(60.0)


def test_waiting_is_said_as_it_begins_and_ever_more_seldom() -> None:
    watch = InputWatch()
    assert not watch.should_warn(0.9)  # the loaders start
    said = [watch.should_warn(0.5) for _ in range(141)]
    assert [interval for interval, is_said in enumerate(said) if is_said] == [0, 20, 60, 140]
    watch = InputWatch()
    assert [watch.should_warn(share) for share in (0.05, 0.1, 0.1, 0.11, 0.05, 0.3)] == [
        *[False] * 3,
        True,
        *[False] * 2,
    ]
