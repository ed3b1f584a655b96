"""All stages in one process group: initialise, pretrain, evaluate; stages already complete are skipped.

deepspeed runners/pipeline.py --config F --deepspeed_config F --run-dir D --set key=value … [--stages NAME …]
"""

from instance_ssl.evaluation import summary
from instance_ssl.run.shutdown import leave
from instance_ssl.run.stage import StageSpec, run_stages
from instance_ssl.stages import (
    evaluate_checkpoints,
    evaluate_knn,
    evaluate_linear,
    evaluate_retrieval,
    evaluate_similarity,
    initialize_classifier,
    pretrain,
)

STAGES = [
    StageSpec("initialize_classifier", initialize_classifier.run),
    StageSpec("pretrain", pretrain.run),
    StageSpec("evaluate_knn", evaluate_knn.run, needs_labels=True),
    StageSpec("evaluate_linear", evaluate_linear.run, needs_labels=True),
]

FURTHER = [
    StageSpec("evaluate_checkpoints", evaluate_checkpoints.run, needs_labels=True),
    StageSpec("evaluate_retrieval", evaluate_retrieval.run, needs_labels=True),
    StageSpec("evaluate_similarity", evaluate_similarity.run),
]

if __name__ == "__main__":
    leave(run_stages(STAGES, after=summary.show, further=FURTHER))
