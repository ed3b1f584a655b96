"""The DeepSpeed JSON: what is passed on, derived, refused; every shipped file works."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from instance_ssl.config.choices import OptimizerName
from instance_ssl.config.deepspeed import DeepSpeedSettings, ZeroSection, load_ds_config, read_ds_file
from instance_ssl.errors import UserError

AUTOCAST = {"enabled": True, "dtype": "bfloat16"}
SHIPPED = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))


def load(path: Path, *, batch: int = 4096, world_size: int = 2, clip: float = 0.0) -> DeepSpeedSettings:
    return load_ds_config(path, global_batch_size=batch, max_grad_norm=clip, world_size=world_size)


def written(tmp_path: Path, **keys: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 64, **keys}))
    return path


def error_of(path: Path, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_load(path: Path) -> None:
    file = read_ds_file(path)
    settings = file.settings(global_batch_size=4096, max_grad_norm=0.0, world_size=2, micro_batch_size=64)
    assert settings.accumulation_steps == 32
    assert (file.micro_batch_size is None) == (path.name == "auto.json")
    assert ("bf16" in path.name) == (settings.autocast_dtype == torch.bfloat16)
    assert ("fp16" in path.name) == (settings.autocast_dtype == torch.float16)


def test_deepspeed_has_every_key_of_zero_that_is_accepted_and_these_defaults() -> None:
    theirs = DeepSpeedZeroConfig.model_fields
    for key, ours in ZeroSection.model_fields.items():
        assert theirs[key].default == ours.default, key


def test_what_trains_nothing_needs_no_batch_that_divides(tmp_path: Path) -> None:
    path = written(tmp_path, instance_classifier={"group_size": 4})
    settings = load_ds_config(path, global_batch_size=None, max_grad_norm=0.0, world_size=3)
    assert settings.accumulation_steps == 1


def test_the_derived_keys_are_injected(tmp_path: Path) -> None:
    settings = load(written(tmp_path, zero_optimization={"stage": 1}), clip=2.0)
    assert settings.engine["gradient_accumulation_steps"] == 32
    assert settings.engine["gradient_clipping"] == 2.0  # DeepSpeed clips at 1.0 when the key is absent
    assert settings.engine["gradient_allreduce_op"] == "sum"
    assert settings.engine["zero_allow_untested_optimizer"] is True
    assert "instance_classifier" not in settings.engine


def test_matmul_precision_follows_autocast_unless_set(tmp_path: Path) -> None:
    assert load(written(tmp_path, torch_autocast=AUTOCAST)).matmul_dtype == torch.bfloat16
    section = {"matmul_dtype": "float32", "block_mib": 8}
    settings = load(written(tmp_path, torch_autocast=AUTOCAST, instance_classifier=section))
    assert settings.matmul_dtype == torch.float32
    assert settings.block_bytes == 8 * 2**20


def test_the_classifier_s_memory_is_the_json_s(tmp_path: Path) -> None:
    default = load(written(tmp_path))
    assert default.block_bytes is None
    assert (default.row_dtype, default.momentum_dtype, default.group_size(8)) == (torch.float32, torch.float32, 8)
    section = {"row_dtype": "bfloat16", "momentum_dtype": "bfloat16", "group_size": 1, "kernels": "torch"}
    settings = load(written(tmp_path, instance_classifier=section))
    assert (settings.row_dtype, settings.momentum_dtype, settings.group_size(8)) == (torch.bfloat16, torch.bfloat16, 1)


def test_a_removed_key_is_accepted_with_its_default(tmp_path: Path) -> None:
    """`keep_mib: 0` stands in every older run directory's ds_config.json."""
    old = load(written(tmp_path, instance_classifier={"keep_mib": 0, "kernels": "torch"}))
    assert old == load(written(tmp_path, instance_classifier={"kernels": "torch"}))


def test_activation_checkpointing_is_on_when_its_section_is_there(tmp_path: Path) -> None:
    assert not load(written(tmp_path)).recompute_stages
    settings = load(written(tmp_path, activation_checkpointing={}))
    assert settings.recompute_stages
    assert settings.engine["activation_checkpointing"] == {}  # and ds_config.json of the run says so


@pytest.mark.parametrize("keys", [{"torch_autocast": AUTOCAST}, {"zero_optimization": {"stage": 2}}])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_reductions_precision_can_be_set_where_it_counts(tmp_path: Path, keys: dict[str, Any], dtype: str) -> None:
    settings = load(written(tmp_path, communication_data_type=dtype, **keys))
    assert settings.engine["communication_data_type"] == dtype


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"train_batch_size": 4096}, "remove 'train_batch_size'"),
        ({"gradient_accumulation_steps": 2}, "remove 'gradient_accumulation_steps'"),
        ({"gradient_clipping": 1.0}, "optimization.max_grad_norm"),
        ({"gradient_allreduce_op": "mean"}, "remove 'gradient_allreduce_op'"),
        ({"zero_allow_untested_optimizer": True}, "remove 'zero_allow_untested_optimizer'"),
        ({"optimizer": {"type": "SGD"}}, "remove 'optimizer'"),
        ({"scheduler": {}}, "remove 'scheduler'"),
        ({"bf16": {"enabled": True}}, "torch_autocast"),
        ({"fp16": {"enabled": True}}, "torch_autocast"),
        ({"zero_optimisation": {"stage": 1}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 1, "overlap_com": True}}, "zero_optimization.overlap_com"),
        (
            {"zero_optimization": {"stage": 1, "stage3_max_live_parameters": 1}},
            "zero_optimization.stage3_max_live_para",
        ),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": True}, "zero_optimization"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"comms_logger": 3}, "unknown key 'comms_logger'"),
        ({"communication_data_type": "float7"}, "communication_data_type"),
        ({"torch_autocast": {"enabled": True, "dtype": "int8"}}, "torch_autocast.dtype"),
        ({"torch_autocast": {"enable": True}}, "did you mean 'enabled'"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}, "zero_optimization": {"stage": 1}}, "stage 0"),
        (
            {"torch_autocast": AUTOCAST, "zero_optimization": {"stage": 1}, "communication_data_type": "fp32"},
            "lower_precision_safe_modules",
        ),
        ({"communication_data_type": None}, "communication_data_type must be"),
        ({"activation_checkpointing": True}, "activation_checkpointing must be {}"),
        ({"activation_checkpointing": {"partition_activations": True}}, "every rank has the whole encoder"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "'activation_checkpointing.cpu_checkpointing'"),
        ({"activation_checkpointing": {"enabled": True}}, "the section takes no keys"),
        ({"instance_classifier": {"block_mb": 3}}, "instance_classifier.block_mb"),
        ({"instance_classifier": {"block_mib": 0}}, "instance_classifier.block_mib"),
        ({"instance_classifier": {"block_mib": "big"}}, "instance_classifier.block_mib"),
        ({"instance_classifier": {"row_dtype": "float16"}}, "instance_classifier.row_dtype"),
        ({"instance_classifier": {"momentum_dtype": "int8"}}, "instance_classifier.momentum_dtype"),
        ({"instance_classifier": {"kernels": "cuda"}}, "instance_classifier.kernels"),
        ({"instance_classifier": {"keep_mib": 8}}, "remove instance_classifier.keep_mib"),
        ({"instance_classifier": {"keep_mib": "8"}}, "remove instance_classifier.keep_mib"),
        ({"instance_classifier": {"group_size": 0}}, "instance_classifier.group_size"),
        ({"instance_classifier": {"group_size": 3}}, "does not divide the 2 ranks"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu"),
        ({"optimization": {"epochs": 3}}, "'optimization' is a key of the experiment"),
        ({"train_micro_batch_size_per_gpu": 48}, "optimization.global_batch_size 4096 is not a multiple"),
    ],
)
def test_a_bad_key_is_one_line_that_names_it(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    assert expected in error_of(written(tmp_path, **keys))


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(tmp_path: Path) -> None:
    assert "64 x 3 ranks" in error_of(written(tmp_path), world_size=3)
    assert "64 x 2 ranks" in error_of(written(tmp_path), batch=64)


@pytest.mark.parametrize(
    ("batch", "world_size", "micro_batch"), [(20, 1, 20), (20, 3, 6), (130, 1, 26), (96, 1, 48), (1, 2, 1), (63, 2, 31)]
)
def test_a_batch_that_does_not_divide_says_which_micro_batch_does(
    tmp_path: Path, batch: int, world_size: int, micro_batch: int
) -> None:
    message = error_of(written(tmp_path), batch=batch, world_size=world_size)
    assert f'"train_micro_batch_size_per_gpu": {micro_batch} in a copy of {tmp_path / "ds.json"}' in message
    changed = re.search(r"--set optimization.global_batch_size=(\d+)", message)
    path = written(tmp_path, train_micro_batch_size_per_gpu=micro_batch)
    settings = load(path, batch=batch if changed is None else int(changed[1]), world_size=world_size)
    assert settings.micro_batch_size == micro_batch
    nearest = re.search(r"the nearest is (\d+)", message)
    assert nearest is not None
    assert load(written(tmp_path), batch=int(nearest[1]), world_size=world_size).micro_batch_size == 64


def test_an_experiment_given_as_the_deepspeed_json_is_known_as_one() -> None:
    message = error_of(Path(__file__).parents[3] / "runners/configs/pipeline_digits.yaml")
    assert "pipeline_digits.yaml: this is YAML" in message
    assert "--config" in message


def test_a_malformed_or_missing_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"(tried {tmp_path}/gone.json)" in error_of(Path("gone.json"))
    path = tmp_path / "ds.json"
    assert "ds.json" in error_of(path)
    path.write_text("{")
    assert "not JSON" in error_of(path)
    path.write_text("[]")
    assert "expected an object" in error_of(path)


@pytest.mark.parametrize(("optimizer", "what"), [("lars", "the norm of each whole tensor"), ("muon", "whole matrices")])
@pytest.mark.parametrize("stage", [1, 2])
def test_an_optimizer_of_whole_tensors_is_refused_under_zero(
    tmp_path: Path, optimizer: OptimizerName, what: str, stage: int
) -> None:
    path = written(tmp_path, zero_optimization={"stage": stage})
    given: dict[str, Any] = {"max_grad_norm": 0.0, "world_size": 2, "optimizer": optimizer}
    with pytest.raises(UserError) as caught:
        load_ds_config(path, global_batch_size=4096, **given)
    assert f"optimization.optimizer {optimizer} needs {what}: set the stage to 0" in str(caught.value)
    assert "\n" not in str(caught.value)
    load_ds_config(path, global_batch_size=None, **given)  # an evaluation of the run trains nothing
    load_ds_config(written(tmp_path, zero_optimization={"stage": 0}), global_batch_size=4096, **given)
    load_ds_config(path, global_batch_size=4096, **{**given, "optimizer": "adamw"})


def test_an_automatic_micro_batch_is_filled_in_and_ranks_that_cannot_share_the_batch_are_refused(
    tmp_path: Path,
) -> None:
    file = read_ds_file(written(tmp_path, train_micro_batch_size_per_gpu="auto"))
    settings = file.settings(global_batch_size=96, max_grad_norm=0.0, world_size=3, micro_batch_size=16)
    assert (settings.micro_batch_size, settings.accumulation_steps) == (16, 2)
    assert settings.engine["train_micro_batch_size_per_gpu"] == 16
    with pytest.raises(UserError) as caught:
        file.settings(global_batch_size=96, max_grad_norm=0.0, world_size=5)
    assert str(caught.value) == (
        "optimization.global_batch_size 96 cannot be divided over 5 ranks: start 1 or 2 or 3 or 4 or 6 or 8"
    )
    with pytest.raises(UserError, match='a positive number of images a rank, or "auto"'):
        read_ds_file(written(tmp_path, train_micro_batch_size_per_gpu="automatic"))
