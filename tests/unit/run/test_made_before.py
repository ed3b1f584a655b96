"""A stage that begins with a checkpoint is refused before anything is opened, where none is there and none is made."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.errors import UserError
from instance_ssl.run.checks import check_made_before, check_sources
from instance_ssl.run.precision import settle

FROZEN = ("evaluate_knn", "evaluate_linear", "evaluate_retrieval", "export")
PRIOR, TRAINING = "initialize_classifier", "pretrain"


def refusal(run: Path, *stages: str, **settings: Any) -> str | None:
    export = {"source": settings["sources"][-1]} if settings["sources"] != ["pixels"] else {}
    config = ExperimentConfig.model_validate({"evaluation": settings, "export": export})
    try:
        check_made_before(config, run, stages)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("stage", "source", "maker"),
    [
        (TRAINING, "trained", PRIOR),
        *(
            (stage, "trained", TRAINING)
            for stage in ("evaluate_knn", "evaluate_linear", "evaluate_retrieval", "export")
        ),
        *((stage, "random", PRIOR) for stage in ("evaluate_knn", "evaluate_linear", "evaluate_retrieval", "export")),
        *((f"evaluate_{name}", "trained", TRAINING) for name in ("fine_tune", "semi_supervised", "detection")),
        ("evaluate_checkpoints", "random", TRAINING),
    ],
)
def test_the_stage_to_run_first_is_named(tmp_path: Path, stage: str, source: str, maker: str) -> None:
    assert f"run runners/{maker}.py first" in str(refusal(tmp_path, stage, sources=[source]))
    assert refusal(tmp_path, maker, stage, sources=[source]) == refusal(tmp_path, maker, sources=[source])
    assert refusal(tmp_path, stage, maker, sources=[source]) is not None  # in that order
    (tmp_path / maker / "checkpoints/step_000000000").mkdir(parents=True)
    assert refusal(tmp_path, stage, sources=[source]) is None


def test_the_pipeline_begins_with_nothing(tmp_path: Path) -> None:
    stages = (PRIOR, TRAINING, "evaluate_knn", "evaluate_linear")
    assert refusal(tmp_path, *stages, sources=["pixels", "random", "trained"]) is None


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("evaluate_similarity", {"sources": ["trained"]}),
        ("evaluate_fine_tune", {"sources": ["random"]}),
        ("evaluate_knn", {"sources": ["pixels"]}),
        ("evaluate_knn", {"sources": ["trained"], "checkpoint": "/elsewhere"}),
        ("own", {"sources": ["trained"]}),  # of benchmarks/peers.py
    ],
)
def test_what_reads_no_checkpoint_of_this_run_is_let_through(
    tmp_path: Path, stage: str, settings: dict[str, Any]
) -> None:
    assert refusal(tmp_path, stage, **settings) is None


def test_a_checkpoint_that_is_none_is_refused_with_the_path_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, expected in (
        ("run", "run (tried {d}/run) does not exist"),
        (".", "is not a checkpoint: give"),
    ):
        config = ExperimentConfig.model_validate({"evaluation": {"checkpoint": given}})
        with pytest.raises(UserError) as caught:
            check_sources(config.evaluation)
        assert expected.format(d=tmp_path) in str(caught.value)
    (tmp_path / "pretrain/checkpoints/step_000000003").mkdir(parents=True)
    check_sources(config.evaluation)


@pytest.mark.parametrize(
    ("dtype", "device", "count"), [("float16", "cpu", 1), ("float16", "cuda", 0), (None, "cpu", 0)]
)
def test_float16_on_a_cpu_is_said(dtype: str | None, device: str, count: int) -> None:
    said: list[str] = []
    ds: Any = SimpleNamespace(
        autocast_dtype=None if dtype is None else getattr(torch, dtype), matmul_dtype=torch.float32
    )
    world: Any = SimpleNamespace(device=torch.device(device))
    log: Any = SimpleNamespace(say=said.append)
    settle(ds, world, log)
    assert len(said) == count
    assert all("cpu_float32.json" in line for line in said)
