"""`auto` in any file and after --set: taken out, chosen later, and refused where nothing could choose."""

from pathlib import Path

import pytest

from instance_ssl.config.draft import automatic_keys, load_draft
from instance_ssl.config.experiment import ExperimentConfig, flatten, load_config
from instance_ssl.errors import UserError

CONFIGS = sorted((Path(__file__).parents[3] / "runners/configs").glob("*.yaml"))


def written(directory: Path, text: str) -> Path:
    path = directory / "experiment.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("key", list(automatic_keys()))
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_file_takes_auto_for_every_key_that_may_have_it(path: Path, key: str) -> None:
    draft = load_draft(path, [f"{key}=auto"])
    assert key in draft.auto
    chosen = {key: value for key, value in flatten(load_draft(path).completed({})).items() if key in draft.auto}
    assert flatten(draft.completed(chosen)) == flatten(load_draft(path).completed({}))


def test_a_value_on_the_command_line_takes_the_place_of_auto(tmp_path: Path) -> None:
    path = written(tmp_path, "optimization: {epochs: auto, warmup_epochs: auto}")
    draft = load_draft(path, ["optimization.epochs=3"])
    assert draft.auto == ("optimization.warmup_epochs", "model.stem")
    config = draft.completed({"optimization.warmup_epochs": 1}).optimization
    assert (config.epochs, config.warmup_epochs) == (3, 1)


def test_without_auto_a_draft_is_the_experiment(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {stem: auto}")
    draft = load_draft(path)
    assert draft.auto == ()
    assert draft.completed({}) == load_config(path) == ExperimentConfig()


def test_choices_are_checked_like_values_that_were_written(tmp_path: Path) -> None:
    draft = load_draft(written(tmp_path, "optimization: {epochs: auto, warmup_epochs: 5}"))
    with pytest.raises(UserError, match=r"optimization\.warmup_epochs 5 must be below optimization\.epochs 2"):
        draft.completed({"optimization.epochs": 2})


def test_settled_choices_are_no_longer_open(tmp_path: Path) -> None:
    draft = load_draft(written(tmp_path, "data: {kind: auto, image_size: auto}"))
    settled = draft.settled({"data.kind": "tree"})
    assert settled.auto == ("data.image_size", "model.stem")
    assert settled.completed({}).data.kind == "tree"


def test_evaluations_on_the_same_folder_inherit_what_is_chosen(tmp_path: Path) -> None:
    draft = load_draft(written(tmp_path, "data: {image_size: auto}\nevaluation: {data: {root: /other}}"))
    assert draft.completed({"data.image_size": 96}).evaluation.data.image_size == 96  # type: ignore[union-attr]


def test_ranks_that_leave_other_keys_open_differ(tmp_path: Path) -> None:
    path = written(tmp_path, "optimization: {epochs: 100}")
    assert load_draft(path).describe() != load_draft(path, ["classifier.num_hard_classes=auto"]).describe()


@pytest.mark.parametrize("key", ["classifier.temperature", "seed", "data.limit_train", "evaluation.data.image_size"])
def test_other_keys_have_no_auto(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match="found 'auto'"):
        load_draft(written(tmp_path, ""), [f"{key}=auto"])
