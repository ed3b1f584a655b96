"""Runs that all fault tests begin with, made once. What is done to runs here, they survive.

The faults are numbered F1 to F40:

    test_saves.py         F1-F6 killed, slow and failed saves; F17, F34, F35; F37 a directory in use; F40 leftovers
    test_rounds.py        F3 kills at random moments
    test_damage.py        F7-F9 damaged checkpoints, F32 malicious ones
    test_foreign.py       F10 names that are no checkpoint's, F32 in every file and form
    test_resume.py        F11-F15, F18, F39: going on, to the bit, or with other ranks and settings
    test_stops.py         the same for stops in every step, evaluations, four ranks, closed terminals
    test_fine_tuning_resume.py  F16, F18 in the trainings of evaluations
    test_launcher.py      F16 signals, F19 dead launchers
    test_ends.py          F20 dead, F21 hung, F22 slow ranks; F26 dead loaders; F27 ranks that disagree; F36 logs
    test_numbers.py       F23 numbers that are not finite, F24 spikes of the loss
    test_gradients.py     F23 in the encoder alone, F29 no hidden clipping
    test_images.py        F25 images that cannot be read, and end the run
    test_broken.py        F25 images that cannot be read, and are skipped
    test_growth.py        F15 images that come and go between two runs
    test_surroundings.py  F5 full disks, F36 consoles, F40 ports

Elsewhere: F28 in tests/unit/config/test_deepspeed.py, F30 in tests/unit/run/test_launch.py, F31 in tests/nodes.
Not here, as the project has no such thing: F10's LATEST pointer, F33 archives, F38 export.
"""

import shutil
from pathlib import Path

import pytest
from rig import digests, make_images, run


@pytest.fixture(scope="session")
def initialised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with images and a run whose classifier is initialised, by two ranks."""
    directory = tmp_path_factory.mktemp("faults")
    make_images(directory / "images")
    finished = run(directory, stage="initialize_classifier")
    assert finished.wait() == [0, 0], finished.text()
    return directory


@pytest.fixture(scope="session")
def clean(initialised: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two ranks end with that nothing happens to."""
    directory = tmp_path_factory.mktemp("clean")
    fresh_copy(initialised, directory)
    finished = run(directory)
    assert finished.wait() == [0, 0], finished.text()
    return digests(directory)


@pytest.fixture
def place(initialised: Path, tmp_path: Path) -> Path:
    """A copy of `initialised` to do harm to."""
    fresh_copy(initialised, tmp_path)
    return tmp_path


def fresh_copy(source: Path, directory: Path) -> None:
    shutil.copytree(source / "run", directory / "run")
    (directory / "images").symlink_to(source / "images")
