"""Disks that are full where a stage writes: said with both sizes, and status.json tells it all the same."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import run, running, status, wait_for


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, place: Path) -> Iterator[Path]:
    """A file system of the size that the test asks for, where its stage writes."""
    stage, size = request.param
    directory = place / "run" / stage
    if stage == "initialize_classifier":
        subprocess.run(["rm", "-r", str(directory)], check=True)
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("small_disk", [("initialize_classifier", "200k")], indirect=True)
def test_an_initialisation_without_room_is_refused_before_its_pass(place: Path, small_disk: Path) -> None:
    """It used to end in "enforce fail at inline_container.cc:672"."""
    refused = run(place, stage="initialize_classifier")
    assert refused.wait() == [2, 2], refused.text()
    assert f"no space left in {small_disk}" in refused.text()
    assert "MiB needed" in refused.text()
    assert "enforce" not in refused.text()
    assert "Traceback" not in refused.text()
    assert "batches done" not in refused.text()
    assert status(place, "initialize_classifier")["state"] == "failed"


@pytest.mark.parametrize("small_disk", [("initialize_classifier", "8m")], indirect=True)
def test_an_initialisation_whose_disk_fills_up_says_so(place: Path, small_disk: Path) -> None:
    with running(place, stage="initialize_classifier", fault="initialize:0:2:sleep=1.5") as full:
        wait_for(lambda: full.record is not None and full.record.exists())  # the pass is under way
        fill(small_disk / "filler")
        assert full.wait(30) == [2, 2], full.text()
    assert full.text().count("error: ") == 1
    assert f"no space left in {small_disk}" in full.text()
    assert "enforce" not in full.text()
    told = json.loads((small_disk / "status.json").read_text())
    assert told["state"] == "failed"
    assert "no space left" in told["reason"]


@pytest.mark.parametrize("small_disk", [("pretrain", "8m")], indirect=True)
def test_a_training_on_a_full_disk_leaves_its_reason(place: Path, small_disk: Path) -> None:
    settings = {"checkpoint.tolerated_failures": 0}
    with running(place, fault="step:0:3:sleep=1.5", settings=settings) as full:
        wait_for(lambda: (small_disk / "metrics.jsonl").exists())
        fill(small_disk / "filler")
        assert full.wait(30) == [2, 2], full.text()
    assert "no space left in " in full.text()
    assert " MiB needed, 0.0 MiB free" in full.text()
    assert status(place)["state"] == "failed"
    assert "no space left in " in status(place)["reason"]
