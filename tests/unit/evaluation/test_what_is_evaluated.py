"""An evaluation is done again exactly when what it was of has changed."""

import json
import shutil
from pathlib import Path

from instance_ssl.checkpoint.committed import MANIFEST, POSITION
from instance_ssl.checkpoint.directory import _manifest_text, write_file
from instance_ssl.config.evaluation import EvaluationConfig
from instance_ssl.run.checks import what_is_evaluated


def commit(directory: Path) -> None:
    """A directory as a save leaves it, with nothing but its position."""
    directory.mkdir(parents=True)
    record = write_file(directory / POSITION, json.dumps({"step": int(directory.name[5:])}))
    (directory / MANIFEST).write_text(_manifest_text({POSITION: record}))


def test_a_copy_under_a_later_name_and_a_broken_one_do_not_count(tmp_path: Path) -> None:
    """Else an evaluation would be of the copy for ever, however far the training went on."""
    commit(tmp_path / "step_000000003")
    shutil.copytree(tmp_path / "step_000000003", tmp_path / "step_000000999")
    (tmp_path / "step_000000500").mkdir()
    assert what_is_evaluated(EvaluationConfig(), tmp_path) == "step_000000003"


def test_own_checkpoints_count_by_the_newest_name(tmp_path: Path) -> None:
    assert what_is_evaluated(EvaluationConfig(), tmp_path) is None
    for step in ("step_000000001", "step_000000012"):
        commit(tmp_path / step)
    assert what_is_evaluated(EvaluationConfig(), tmp_path) == "step_000000012"


def test_another_runs_training_that_goes_on_is_noticed(tmp_path: Path) -> None:
    evaluation = EvaluationConfig(checkpoint=tmp_path / "other")
    newest = tmp_path / "other/pretrain/checkpoints/step_000000001"
    commit(newest)
    before = what_is_evaluated(evaluation, tmp_path / "own")
    assert before == str(newest)
    commit(newest.with_name("step_000000002"))
    assert what_is_evaluated(evaluation, tmp_path / "own") != before
    one = EvaluationConfig(checkpoint=newest)
    assert what_is_evaluated(one, tmp_path / "own") == str(newest)


def test_another_file_of_the_same_name_is_noticed(tmp_path: Path) -> None:
    evaluation = EvaluationConfig(weights=tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"1")
    before = what_is_evaluated(evaluation, tmp_path)
    assert what_is_evaluated(evaluation, tmp_path) == before
    (tmp_path / "w.pth").write_bytes(b"12")
    assert what_is_evaluated(evaluation, tmp_path) != before
    asked = EvaluationConfig(weights=tmp_path / "w.pth#teacher")
    assert what_is_evaluated(asked, tmp_path) not in (None, what_is_evaluated(evaluation, tmp_path))
