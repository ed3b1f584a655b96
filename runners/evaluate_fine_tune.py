"""Evaluates the encoder by fine-tuning it on a labelled data set.

python runners/evaluate_fine_tune.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if __name__ == "__main__":
    leave(run_stages([StageSpec("evaluate_fine_tune", needs_labels=True)]))
