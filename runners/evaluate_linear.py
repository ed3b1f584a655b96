"""Evaluates the encoder by linear classification.

python runners/evaluate_linear.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.run.shutdown import leave
from instance_ssl.run.stage import StageSpec, run_stages
from instance_ssl.stages import evaluate_linear

if __name__ == "__main__":
    leave(run_stages([StageSpec("evaluate_linear", evaluate_linear.run, needs_labels=True)]))
