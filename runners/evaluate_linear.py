"""Evaluates the encoder by linear classification.

python runners/evaluate_linear.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if __name__ == "__main__":
    leave(run_stages([StageSpec("evaluate_linear", needs_labels=True)]))
