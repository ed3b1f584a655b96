"""One launched pipeline that many tests read: whoever changes a run changes a copy of it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import run_forked, run_launched

EPOCHS, TRAIN, TEST = 12, 201, 101  # of odd numbers of evaluated images two ranks have unequal parts
# Evaluated with few labels: with all 1437 a linear classifier on random features leaves next to nothing to learn.
FLAGS = ["--set", f"optimization.epochs={EPOCHS}", "optimization.warmup_epochs=2"]
FLAGS += ["checkpoint.every_epochs=1", "checkpoint.keep_every_epochs=4"]
FLAGS += [f"evaluation.data.limit_train={TRAIN}", f"evaluation.data.limit_test={TEST}", "evaluation.batch_size=64"]
FLAGS += ["evaluation.knn.neighbours=[10,20,100,200]"]
EVALUATED_EPOCHS = [4, 8, 11, 12]  # every fourth, and the newest two
FURTHER = ["--stages", "evaluate_retrieval", "evaluate_similarity", "evaluate_checkpoints"]


@dataclass(frozen=True)
class Pipeline:
    """A finished run of two ranks, and what the launcher printed."""

    run: Path
    output: str


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The demo's pipeline of 1437 digits under the deepspeed launcher, shortened. Read only."""
    run = tmp_path_factory.mktemp("pipeline") / "run"
    finished = run_launched("pipeline", 2, "--run-dir", str(run), *FLAGS)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return Pipeline(run, finished.stdout)


@pytest.fixture(scope="session")
def evaluated(pipeline: Pipeline) -> Path:
    """Its run directory, after two ranks have run the further evaluations there. Read only."""
    finished = run_forked("pipeline", 2, "--run-dir", str(pipeline.run), *FLAGS, *FURTHER)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return pipeline.run
