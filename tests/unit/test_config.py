"""The experiment YAML: defaults, files that ship, --set, and one-line errors that name the key."""

import json
from pathlib import Path

import pytest

from instance_ssl.config import ExperimentConfig, flatten, load_config
from instance_ssl.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "runners/configs").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_papers_main_setting() -> None:
    config = ExperimentConfig()
    assert config.optimization.peak_learning_rate == pytest.approx(0.48)
    assert (config.classifier.temperature, config.classifier.smoothing_factor) == (0.15, 0.2)
    assert (config.classifier.num_hard_classes, config.model.embedding_dim) == (100, 128)
    assert (config.optimization.global_batch_size, config.optimization.warmup_epochs) == (4096, 10)
    assert config.classifier.initialization == "running"


def test_defaults_of_fine_tuning_are_the_papers_and_simclrs() -> None:
    few, transfer = ExperimentConfig().evaluation.semi_supervised, ExperimentConfig().evaluation.fine_tune
    assert (few.fractions, few.backbone_learning_rate, few.classifier_learning_rates) == ((0.01, 0.1), 0.001, (15, 10))
    assert (transfer.steps, transfer.global_batch_size, transfer.random_steps) == (20_000, 256, 40_000)
    expected = [1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1]
    assert transfer.learning_rates == pytest.approx(expected, rel=1e-3)
    assert transfer.weight_decays == pytest.approx([0, *(rate / 100 for rate in expected)], rel=1e-3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_files_load_and_open_with_their_purpose(path: Path) -> None:
    load_config(path)
    assert path.read_text().startswith("# Purpose: ")


def test_set_parses_yaml_values(tmp_path: Path) -> None:
    path = write(tmp_path, "optimization: {epochs: 30}")
    config = load_config(
        path,
        ["optimization.epochs=1000", "model.stem=small", "evaluation.knn.neighbours=[7, 9]", "augmentation.blur=yes"],
    )
    assert config.optimization.epochs == 1000
    assert config.model.stem == "small"
    assert config.evaluation.knn.neighbours == (7, 9)
    assert config.augmentation.blur is True
    assert load_config(path, ["optimization.weight_decay=1e-4"]).optimization.weight_decay == 1e-4


def test_set_reaches_sections_that_are_absent_by_default(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    config = load_config(path, ["evaluation.data.kind=tree", "evaluation.data.root=/images"])
    assert config.evaluation.data is not None
    assert config.evaluation.data.root == Path("/images")


def test_evaluation_data_lists_only_what_differs_from_data(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {kind: cifar10, root: /c, image_size: 32, num_workers: 3, limit_train: 9}")
    config = load_config(path, ["evaluation.data.limit_train=null", "evaluation.data.limit_test=7"])
    assert config.evaluation.data == config.data.model_copy(update={"limit_train": None, "limit_test": 7})
    assert load_config(path).evaluation.data is None
    # The config that a run records says it in full, and is read back as it was.
    recorded = write(tmp_path, json.dumps(config.model_dump(mode="json")))
    assert load_config(recorded) == config


def test_a_single_epoch_without_warm_up_is_allowed(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "optimization: {epochs: 1, warmup_epochs: 0}"))
    assert config.optimization.epochs == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimization.epoch=3", "did you mean 'epochs'"),
        ("optimisation.epochs=3", "did you mean 'optimization'"),
        ("seed.epochs=3", "unknown key 'seed.epochs'"),
        ("optimization.epochs", "expected key=value"),
        ("optimization.epochs=[", "not YAML"),
        ("optimization.epochs=many", "--set optimization.epochs=many: optimization.epochs: "),
        ("classifier.temperature=0.02", "classifier.temperature: must be at least 0.03"),
        ("classifier.temperature=.nan", "classifier.temperature"),
        ("classifier.num_hard_classes=0", "smoothing_factor"),
        ("classifier.loss_form=sum", "classifier.loss_form"),
        ("export.formats=[npy]", "'npy' is none of pth, safetensors, detectron2, onnx, parquet"),
        ("export.formats=[pth,npy]", "export.images"),
        ("export.formats=pth", "expected a list: [pth]"),
        ("export.formats=5", "export.formats"),
        ("optimization.epochs=10", "optimization.warmup_epochs 10 must be below optimization.epochs 10"),
        ("optimization.warmup_epochs=300", "optimization.warmup_epochs 300"),
        ("evaluation.semi_supervised.fractions=[0.1]", "classifier_learning_rates has 2 values, fractions 1"),
        ("evaluation.semi_supervised.list_files=[a.txt]", "list_files has 1 files, fractions 2"),
        ("evaluation.semi_supervised.fractions=[0.1, 2]", "evaluation.semi_supervised.fractions.1"),
    ],
)
def test_a_bad_override_is_one_line_that_names_it(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in error_of(write(tmp_path, ""), override)


def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, "classifier: {temperatur: 0.1}"))
    assert "classifier.temperatur" in message
    assert "did you mean 'temperature'" in message


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "just words"])
def test_a_malformed_file_is_one_line(tmp_path: Path, text: str) -> None:
    assert "experiment.yaml" in error_of(write(tmp_path, text))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert "nowhere.yaml" in error_of(tmp_path / "nowhere.yaml")


def test_flatten_gives_dotted_keys() -> None:
    assert flatten(ExperimentConfig())["evaluation.knn.neighbours"] == list(
        ExperimentConfig().evaluation.knn.neighbours
    )
