"""The experiment YAML: defaults, files that ship, --set, and one-line errors that name the key."""

import json
from pathlib import Path

import pytest

from instance_ssl.config.draft import load_draft
from instance_ssl.config.experiment import ExperimentConfig, flatten, load_config
from instance_ssl.errors import UserError, tried

CONFIGS = sorted((Path(__file__).parents[3] / "runners/configs").glob("*.yaml"))


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


@pytest.mark.parametrize(
    ("optimizer", "rate", "decay", "rate_of_w"),
    [("sgd", 0.06, 1e-4, 0.06), ("adamw", 3e-4, 0.1, 0.06), ("lars", 0.6, 1e-6, 0.06), ("muon", 3e-4, 0.1, 0.06)],
)
def test_each_optimizer_has_its_papers_rate_and_w_the_papers_sgd(
    tmp_path: Path, optimizer: str, rate: float, decay: float, rate_of_w: float
) -> None:
    path = write(tmp_path, f"optimization: {{optimizer: {optimizer}, global_batch_size: 512}}")
    config = load_config(path)
    assert config.optimization.peak_learning_rate == pytest.approx(rate)
    assert config.optimization.weight_decay == decay
    assert (config.classifier_peak_learning_rate, config.classifier_weight_decay) == (pytest.approx(rate_of_w), 1e-4)
    given = load_config(path, ["optimization.weight_decay=0.03", "optimization.learning_rate=0.2"])
    assert given.optimization.weight_decay == 0.03
    assert given.optimization.peak_learning_rate == 0.2
    # One SGD in the paper: only its rate and decay are W's too.
    own = (0.2, 0.03) if optimizer == "sgd" else (pytest.approx(rate_of_w), 1e-4)
    assert (given.classifier_peak_learning_rate, given.classifier_weight_decay) == own
    for_w = load_config(path, ["classifier.learning_rate=0.7", "classifier.weight_decay=0"])
    assert (for_w.classifier_peak_learning_rate, for_w.classifier_weight_decay) == (0.7, 0)
    recorded = write(tmp_path, json.dumps(given.model_dump(mode="json")))
    assert load_config(recorded) == given


def test_defaults_of_fine_tuning_are_the_papers_and_simclrs() -> None:
    few, transfer = ExperimentConfig().evaluation.semi_supervised, ExperimentConfig().evaluation.fine_tune
    assert (few.fractions, few.backbone_learning_rate, few.classifier_learning_rates) == ((0.01, 0.1), 0.001, (15, 10))
    assert (transfer.steps, transfer.global_batch_size, transfer.random_steps) == (20_000, 256, 40_000)
    expected = [1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1]
    assert transfer.learning_rates == pytest.approx(expected, rel=1e-3)
    assert transfer.weight_decays == pytest.approx([0, *(rate / 100 for rate in expected)], rel=1e-3)


def test_the_preset_for_small_sets_fills_in_what_is_not_given(tmp_path: Path) -> None:
    path = write(tmp_path, "evaluation: {fine_tune: {preset: small, steps: 70}}")
    small = load_config(path, ["evaluation.fine_tune.weight_decays=[1e-4]"]).evaluation.fine_tune
    assert (small.steps, small.random_steps, small.global_batch_size) == (70, 1000, 64)
    assert (small.learning_rates, small.weight_decays) == ((1e-3, 1e-2, 1e-1), (1e-4,))
    recorded = write(tmp_path, json.dumps(load_config(path).model_dump(mode="json")))
    assert load_config(recorded).evaluation.fine_tune.steps == 70
    assert "found 'smal'; did you mean 'small'" in error_of(path, "evaluation.fine_tune.preset=smal")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_files_load_and_open_with_their_purpose(path: Path) -> None:
    load_draft(path)
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
        ("export.formats=[npy]", "'npy' is not one of pth, safetensors, hub, detectron2, onnx, parquet"),
        ("export.formats=[pth,npy]", "export.images"),
        ("export.formats=pth", "expected a list: [pth]"),
        ("export.formats=5", "export.formats"),
        ("optimization.epochs=10", "optimization.warmup_epochs 10 must be below optimization.epochs 10"),
        ("optimization.warmup_epochs=300", "optimization.warmup_epochs 300"),
        ("evaluation.semi_supervised.fractions=[0.1]", "classifier_learning_rates has 2 values, fractions 1"),
        ("evaluation.semi_supervised.list_files=[a.txt]", "list_files has 1 files, fractions 2"),
        ("evaluation.semi_supervised.fractions=[0.1, 2]", "evaluation.semi_supervised.fractions.1"),
        ("evaluation.sources=random,trained", "write 'evaluation.sources=[random,trained]'"),
        ("evaluation.sources=random", "write 'evaluation.sources=[random]'"),
        ("evaluation.knn.neighbours=5", "write 'evaluation.knn.neighbours=[5]'"),
        ("evaluation.sources=[random, traind]", "found 'traind'; did you mean 'trained'?"),
        ("evaluation.sources=[weights]", "with --set: evaluation: source 'weights' needs a file"),
        ("epochs=3", "unknown key 'epochs'; did you mean optimization.epochs or"),
        ("optimization.temperature=1", "did you mean classifier.temperature?"),
        ("train_micro_batch_size_per_gpu=8", "belongs in the DeepSpeed JSON, the file of --deepspeed_config"),
        ("optimization.epochs.max=8", "it is a value and has no keys"),
        ("optimization.epochs=0", "must be at least 1, not 0"),
        ("optimization.optimizer=adam", "did you mean 'adamw'?"),
        ("optimization.optimizer=[sgd]", "optimization.optimizer"),
        ("optimization.layer_decay=1.5", "must be at most 1, not 1.5"),
        ("optimization.layer_decay=0", "must be above 0, not 0"),
        ("optimization.backbone_learning_rate_multiplier=0", "must be above 0, not 0"),
        ("model.freeze_epochs=200", "model.freeze_epochs 200 must be below optimization.epochs 200"),
        ("classifier.smoothing_factor=1", "must be below 1, not 1"),
        ("optimization.epochs=30.5", "expected a whole number, found 30.5"),
        ("optimization.epochs=None", "expected a whole number, found 'None'"),
        ("optimization.learning_rate=None", "found 'None': write null for none"),
        ("optimization.learning_rate=0.5lr", "found '0.5lr': leave out the unit"),
        ("data.image_size=64 px", "found '64 px': leave out the unit"),
        ("optimization.momentum=90%", "found '90%': write 0.9 for 90%"),
        ("optimization.momentum=9.0.0%", "found '9.0.0%': leave out the unit"),
        ("evaluation.sources=null", "expected a list, found None"),
        ("optimization.learning_rate=1,5", "found '1,5': one number, with a decimal point"),
        ("model.backbone=ResNet18", "did you mean 'resnet18'?"),
        ("model=resnet18", "this is a section with keys of its own (backbone, backbone_options"),
        ("augmentation.blur=maybe", "expected true or false, found 'maybe'"),
        ("data.root=None", "write null for none"),
        ("data.root=''", "write null for none"),
        ("data.root=[a]", "expected a path, found ['a']"),
        ("optimization.epochs : 3", "expected key=value"),
    ],
)
def test_a_bad_override_is_one_line_that_names_it(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in error_of(write(tmp_path, ""), override)


def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, "classifier: {temperatur: 0.1}"))
    assert "classifier.temperatur" in message
    assert "did you mean 'temperature'" in message


def test_a_section_left_empty_says_what_belongs_into_it(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, "optimization:\nmodel: {backbone: small_cnn}"))
    assert "optimization: this is a section with keys of its own (epochs," in message
    assert "found nothing" in message


def test_a_deepspeed_json_given_as_the_experiment_is_known_as_one() -> None:
    message = error_of(Path(__file__).parents[3] / "ds_configs/cpu_bf16.json")
    assert "cpu_bf16.json: this is a DeepSpeed JSON" in message
    assert "--deepspeed_config" in message


def test_a_home_directory_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = ["data.root", "data.list_file", "evaluation.checkpoint", "evaluation.weights", "export.images"]
    keys += ["evaluation.detection.root", "evaluation.data.root"]
    config = load_config(
        write(tmp_path, ""), [*(f"{key}=~/x" for key in keys), "evaluation.semi_supervised.list_files=[~/x, ~/x]"]
    )
    recorded = flatten(config)
    assert {recorded[key] for key in keys} == {"/home/me/x"}
    assert recorded["evaluation.semi_supervised.list_files"] == ["/home/me/x"] * 2


def test_a_relative_path_is_told_with_the_one_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"--config mine.yaml (tried {tmp_path}/mine.yaml): No such file" in error_of(Path("mine.yaml"))
    assert tried(Path("/a/b")) == "/a/b"
    assert "drive letter" in tried(Path("C:\\images"))


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "just words"])
def test_a_malformed_file_is_one_line(tmp_path: Path, text: str) -> None:
    assert "experiment.yaml" in error_of(write(tmp_path, text))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert "nowhere.yaml" in error_of(tmp_path / "nowhere.yaml")


def test_flatten_gives_dotted_keys() -> None:
    assert flatten(ExperimentConfig())["evaluation.knn.neighbours"] == list(
        ExperimentConfig().evaluation.knn.neighbours
    )
