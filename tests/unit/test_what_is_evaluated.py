"""An evaluation is done again exactly when what it was of has changed."""

from pathlib import Path

from instance_ssl.config import EvaluationConfig
from instance_ssl.stages.checks import what_is_evaluated


def test_own_checkpoints_count_by_the_newest_name(tmp_path: Path) -> None:
    assert what_is_evaluated(EvaluationConfig(), tmp_path) is None
    for step in ("step_000000001", "step_000000012"):
        (tmp_path / step).mkdir()
    assert what_is_evaluated(EvaluationConfig(), tmp_path) == "step_000000012"


def test_another_runs_training_that_goes_on_is_noticed(tmp_path: Path) -> None:
    evaluation = EvaluationConfig(checkpoint=tmp_path / "other")
    newest = tmp_path / "other/pretrain/checkpoints/step_000000001"
    newest.mkdir(parents=True)
    before = what_is_evaluated(evaluation, tmp_path / "own")
    assert before == str(newest)
    newest.with_name("step_000000002").mkdir()
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
