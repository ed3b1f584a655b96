"""A runner of the tests' own: a short training and the evaluations of `test_evaluations.py`, in one process group."""

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave
from instance_ssl.stages import (
    evaluate_checkpoints,
    evaluate_knn,
    evaluate_retrieval,
    evaluate_similarity,
    initialize_classifier,
    pretrain,
)

STAGES = [
    StageSpec("initialize_classifier", initialize_classifier.run),
    StageSpec("pretrain", pretrain.run),
    StageSpec("evaluate_knn", evaluate_knn.run, needs_labels=True),
    StageSpec("evaluate_retrieval", evaluate_retrieval.run, needs_labels=True),
    StageSpec("evaluate_similarity", evaluate_similarity.run),
    StageSpec("evaluate_checkpoints", evaluate_checkpoints.run, needs_labels=True),
]

if __name__ == "__main__":
    leave(run_stages(STAGES))
