"""A run directory of an earlier release resumes: tests/fixtures/run_2ecc540.tar.xz, stopped after step 8 of 15.

`rig.start` of that commit made it with two ranks, and `finished_rows.npy` holds the rows of W that the same commit
ended with. The bits of later steps depend on the processor, so they are compared within rounding.
"""

import tarfile
from pathlib import Path

import numpy as np
import torch
from rig import checkpoints, make_images, metrics, run

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_2ecc540.tar.xz"
# Keys that are newer than the run, as they were in effect when it was made.
AS_THEN = {"data.exif": "stored", "data.alpha": "drop"}


def restore(place: Path) -> None:
    make_images(place / "images")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(place, filter="data")


def rows_of(checkpoint: Path) -> np.ndarray:
    parts = [torch.load(path, weights_only=True)["weight"] for path in sorted(checkpoint.glob("rows_*.pt"))]
    return torch.cat(parts).numpy()


def test_an_old_run_resumes_and_ends_as_its_own_release_would_have_ended_it(tmp_path: Path) -> None:
    restore(tmp_path)
    stopped = rows_of(checkpoints(tmp_path)[-1])
    resumed = run(tmp_path, settings=AS_THEN)
    assert resumed.wait() == [0, 0], resumed.text()
    assert checkpoints(tmp_path)[-1].name == "step_000000015"
    steps = [line["step"] for line in metrics(tmp_path) if "loss" in line]
    assert steps == sorted(set(steps)), "steps were trained twice"
    expected = np.load(tmp_path / "finished_rows.npy")
    assert np.abs(stopped - expected).max() > 1e-2, "seven more steps move the rows far beyond the tolerance"
    np.testing.assert_allclose(rows_of(checkpoints(tmp_path)[-1]), expected, rtol=0, atol=1e-4)


def test_an_old_run_resumes_on_one_rank(tmp_path: Path) -> None:
    restore(tmp_path)
    resumed = run(tmp_path, size=1, micro_batch=6, settings=AS_THEN)
    assert resumed.wait() == [0], resumed.text()
    assert checkpoints(tmp_path)[-1].name == "step_000000015"


def test_what_is_newer_than_the_run_is_named(tmp_path: Path) -> None:
    restore(tmp_path)
    refused = run(tmp_path)
    assert refused.wait() == [2, 2], refused.text()
    assert "--set data.exif=stored data.alpha=drop" in refused.text()
