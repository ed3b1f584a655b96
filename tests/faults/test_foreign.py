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
from ranks import run_ranks
from rig import checkpoints, digests, quick_first, run

from instance_ssl.checkpoint.state import ENCODER_FILES, checkpoint_at, newest_checkpoint
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError

ROWS = ["rows_000000000_000000033.pt", "rows_000000033_000000065.pt"]


def the_only_error(said: Any) -> str:
    """The one line that a refusal is, over all ranks."""
    lines = [line for line in said.text().splitlines() if line.startswith(("error: ", "Traceback", "rank "))]
    assert len(lines) == 1, said.text()
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.full
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


@pytest.mark.parametrize(
    ("name", "write"),
    quick_first(PICKLES, lambda case: case == PICKLES[0], lambda case: case[1] is not FORMS[len(case[0]) % 3]),
)
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


@pytest.mark.full
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


POSITIONS = ["{}", "[", '{"step": 1, "from_the_future": 1}', "null"]


@pytest.mark.parametrize("content", quick_first(POSITIONS, lambda content: content == "{}"))
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


@pytest.mark.parametrize("stage", ["pretrain", "evaluate_knn"])
def test_a_copy_under_another_step_is_damage(place: Path, stage: str) -> None:
    """`cp -r step_5 step_999`: neither evaluated as the finished run, nor trained from, nor kept in place of others."""
    assert run(place, fault="step:0:6:term").wait() == [75, 75]
    older, newest = checkpoints(place)
    copy = shutil.copytree(older, older.with_name("step_000000999"))
    if stage == "evaluate_knn":
        assert run_ranks(evaluated, 2, place) == [(newest.name, 1)] * 2
        return
    resumed = run(place, settings={"checkpoint.keep": 1})
    assert resumed.wait() == [0, 0], resumed.text()
    assert f"resuming from {newest}" in resumed.text()
    assert f"warning: damaged checkpoint {copy}: its name says step 999, training.json says 5" in resumed.text()
    assert [path.name for path in checkpoints(place)] == ["step_000000015", "step_000000999"]
    result = json.loads((place / "run/pretrain/result.json").read_text())
    assert result["newest_checkpoint"] == "step_000000015"
    again = run(place)
    assert again.wait() == [0, 0], again.text()
    assert "pretrain: already complete" in again.text()


def evaluated(group: Group, place: Path) -> tuple[str, int]:
    """The checkpoint that an evaluation takes, and how many it passes over; by its path, the copy is refused."""
    parent = place / "run/pretrain/checkpoints"
    found = newest_checkpoint(parent, group, ENCODER_FILES)
    assert found is not None
    with pytest.raises(UserError, match=r"its name says step 999, training\.json says 5"):
        checkpoint_at(parent / "step_000000999", group, ENCODER_FILES)
    return found.directory.name, len(found.passed_over)


@pytest.mark.full
def test_nothing_but_a_copy_under_another_step_is_refused(place: Path) -> None:
    assert run(place, fault="step:0:1:term").wait() == [75, 75]
    (only,) = checkpoints(place)
    only.rename(only.with_name("step_000000015"))
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert "its name says step 15, training.json says" in the_only_error(refused)


@pytest.mark.full
def test_files_that_are_nobody_s_of_ours_are_named_and_ignored(place: Path, clean: dict[str, str]) -> None:
    stopped = run(place, fault="step:0:6:term")
    assert stopped.wait() == [75, 75]
    for directory in checkpoints(place):
        for name in (".DS_Store", "._encoder.pt", "notes\x1b[31m.txt", "rows_000000000_000000033.pt.bak"):
            (directory / name).write_bytes(b"?")
        (directory / ".ipynb_checkpoints").mkdir()
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert "damaged" not in resumed.text()
    assert "written by something else: .DS_Store, ._encoder.pt, .ipynb_checkpoints and 2 more" in resumed.text()
    assert digests(place) == clean


RESULTS = ["{}", '{"stage": "pretrain"}', "the whole of it, by another step", "gone checkpoints"]


@pytest.mark.parametrize("result", quick_first(RESULTS, lambda result: result == "gone checkpoints"))
def test_a_result_that_the_checkpoints_do_not_bear_out_is_not_complete(
    place: Path, clean: dict[str, str], result: str
) -> None:
    if result.startswith("{"):
        assert run(place, fault="step:0:6:term").wait() == [75, 75]
        (place / "run/pretrain/result.json").write_text(result)
    else:
        assert run(place).wait() == [0, 0]
        shutil.rmtree(checkpoints(place)[-1])
    if result.startswith("gone"):
        shutil.rmtree(checkpoints(place)[-1])
        refused = run(place)
        assert refused.wait() == [2, 2], refused.text()
        assert "result.json says complete, but" in the_only_error(refused)
        return
    resumed = run(place)
    assert resumed.wait() == [0, 0], resumed.text()
    assert "already complete" not in resumed.text()
    assert "resuming from" in resumed.text()
    assert digests(place) == clean


def test_a_config_of_a_stage_that_is_broken_ends_all_ranks_alike(place: Path) -> None:
    """One rank reads it: the others must not be left to wait for it."""
    (place / "run/initialize_classifier/config.yaml").write_text("[" * 5000)
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert "initialize_classifier/config.yaml: not YAML" in the_only_error(refused)
    assert "this is the stage's own record" in the_only_error(refused)


RECORDS = ["{", "[]", '{"steps": {}}', '{"steps": [1, "2"]}', "[" * 5000]


@pytest.mark.parametrize("content", quick_first(RECORDS, lambda content: content == "{"))
def test_a_broken_record_of_left_out_steps_is_one_line(place: Path, content: str) -> None:
    (place / "run/pretrain").mkdir()
    (place / "run/pretrain/left_out_steps.json").write_text(content)
    refused = run(place)
    assert refused.wait() == [2, 2], refused.text()
    assert "left_out_steps.json is damaged" in the_only_error(refused)
