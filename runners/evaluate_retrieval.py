"""Evaluates retrieval among the train images: same-class top-1 and recall@k of every source, and of the paper's prior.

python runners/evaluate_retrieval.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if __name__ == "__main__":
    leave(run_stages([StageSpec("evaluate_retrieval", needs_labels=True)]))
