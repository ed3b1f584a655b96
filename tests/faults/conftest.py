"""Runs that all fault tests begin with, made once. tests/README.md has the index of faults."""

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
