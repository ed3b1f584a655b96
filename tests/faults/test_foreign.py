"""Checkpoints that somebody has put there: copies with names of their own, contents made to harm (F10, F32)."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import checkpoints, digests, quick_first, run

ROWS = ["rows_000000000_000000033.pt", "rows_000000033_000000065.pt"]


def the_only_error(said: Any) -> str:
    """The one line that a refusal is, over all ranks."""
    lines = [line for line in said.text().splitlines() if line.startswith(("error: ", "Traceback", "rank "))]
    assert len(lines) == 1, said.text()
    assert lines[0].startswith("error: ")
    return lines[0]


def test_names_that_are_no_checkpoint_s_do_no_harm(place: Path, clean: dict[str, str]) -> None:
    """F10: copies made by hand are whole, but neither the newest nor counted, nor removed."""
    stopped = run(place, fault="step:0:6:term")
    assert stopped.wait() == [75, 75]
    older, newest = checkpoints(place)
    folder = newest.parent
    for name in (f"{older.name}_copy", "step_best", "step_12"):
        shutil.copytree(older, folder / name)
    (folder / "step_999999999").write_text("a file")
    (folder / "step_..").mkdir()
    before = {path.name for path in folder.iterdir()} - {older.name, newest.name}
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert f"resuming from {newest}" in resumed.text()
    assert "damaged" not in resumed.text()
    assert before <= {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        if path.name in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert digests(place) == clean
    record = json.loads((place / "run/pretrain/result.json").read_text())
    assert record["newest_checkpoint"] == checkpoints(place)[-1].name


class Malice:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def as_torch_does(content: Any, path: Path) -> None:
    torch.save(content, path)


def as_old_torch_did(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_a_plain_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def make_the_manifest_fit(directory: Path) -> None:
    """As whoever can plant a file can do too."""
    names = sorted(path.name for path in directory.iterdir() if path.name != "MANIFEST.json")
    contents = {name: (directory / name).read_bytes() for name in names}
    files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
    checksum = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (directory / "MANIFEST.json").write_text(json.dumps({"files": files, "checksum": checksum}))


FORMS = [as_torch_does, as_old_torch_did, as_a_plain_pickle]
PICKLES = [(name, write) for name in ("encoder.pt", *ROWS, "rank_00000.pt", "rank_00001.pt") for write in FORMS]


@pytest.mark.parametrize(("name", "write"), quick_first(PICKLES, lambda case: case[1] is FORMS[len(case[0]) % 3]))
def test_no_form_of_pickle_in_no_file_is_run(place: Path, name: str, write: Callable[[Any, Path], None]) -> None:
    """F32: also in a file that one rank alone reads; all say the same one line and leave with exit code 2."""
    source, target = checkpoints(place, "initialize_classifier")[-1], place / "run/pretrain/checkpoints/step_000000000"
    shutil.copytree(source, target)
    mark = place / "mark"
    write({"state": Malice(mark), "buffers": {}}, target / name)
    make_the_manifest_fit(target)
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert name in the_only_error(refused)
    assert not mark.exists()


def test_what_sampled_classes_remember_is_not_run_either(place: Path) -> None:
    """F32: the file that only runs with sampled classes have."""
    settings = {"classifier.sampling": "recent", "classifier.num_sampled_classes": 40}
    settings |= {"classifier.smoothing_factor": 0, "classifier.num_hard_classes": 0}
    shutil.rmtree(place / "run")
    assert run(place, stage="initialize_classifier", settings=settings).wait() == [0, 0]
    (target,) = checkpoints(place, "initialize_classifier")
    assert (target / "sampling.pt").exists()
    as_torch_does({"recent_classes": Malice(place / "mark")}, target / "sampling.pt")
    make_the_manifest_fit(target)
    refused = run(place, settings=settings)
    assert refused.wait() == [2, 2], refused.text()
    assert "sampling.pt" in the_only_error(refused)
    assert not (place / "mark").exists()


@pytest.mark.parametrize("content", ["{}", "[", '{"step": 1, "from_the_future": 1}', "null"])
def test_a_position_that_is_none_is_damage(place: Path, content: str) -> None:
    """F32: training.json as another version of this project wrote it, with a manifest that fits."""
    stopped = run(place, fault="step:0:6:term")
    assert stopped.wait() == [75, 75]
    for directory in checkpoints(place):
        (directory / "training.json").write_text(content)
        make_the_manifest_fit(directory)
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert "training.json" in the_only_error(refused)
