"""Faults on demand: orders that could never be carried out are refused, and every point finds what it wraps."""

import multiprocessing
import os
from pathlib import Path

import injection
import pytest


@pytest.mark.parametrize("order", ["stepp:0:1:kill", "step:0:1:kil", "loss:0:1:nan", "step:0:1:spike"])
def test_an_order_without_a_known_point_and_action_is_refused(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(injection.ORDER, order)
    with pytest.raises(ValueError, match=order):
        injection.install()


def test_without_an_order_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(injection.ORDER, raising=False)
    for point in injection.POINTS:
        monkeypatch.setitem(injection.POINTS, point, lambda: pytest.fail("installed"))
    injection.install()


def _install_all(record: Path) -> None:
    for point in injection.POINTS:
        os.environ.update(injection.environment(f"{point}:0:99:term", record))
        injection.install()


def test_every_point_finds_what_it_wraps(tmp_path: Path) -> None:
    """In a process of its own, which keeps the wraps."""
    child = multiprocessing.get_context("fork").Process(target=_install_all, args=(tmp_path / "record",))
    child.start()
    child.join(120)
    assert child.exitcode == 0
