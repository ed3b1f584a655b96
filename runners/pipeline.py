"""All stages in one process group: initialise, pretrain, evaluate; stages already complete are skipped.

deepspeed runners/pipeline.py --config F --deepspeed_config F --run-dir D --set key=value … [--stages NAME …]
"""

from typing import TYPE_CHECKING

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if TYPE_CHECKING:
    from instance_ssl.run.stage import Stage

STAGES = [
    StageSpec("initialize_classifier"),
    StageSpec("pretrain"),
    StageSpec("evaluate_knn", needs_labels=True),
    StageSpec("evaluate_linear", needs_labels=True),
]

FURTHER = [
    StageSpec("evaluate_checkpoints", needs_labels=True),
    StageSpec("evaluate_retrieval", needs_labels=True),
    StageSpec("evaluate_similarity"),
]


def _summarise(stage: "Stage") -> None:
    from instance_ssl.evaluation import summary  # late, for it imports torch

    summary.show(stage)


if __name__ == "__main__":
    leave(run_stages(STAGES, after=_summarise, further=FURTHER))
