"""Evaluates the encoder by fine-tuning it on a small share of the labels.

python runners/evaluate_semi_supervised.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.run.shutdown import leave
from instance_ssl.run.stage import StageSpec, run_stages
from instance_ssl.stages import evaluate_semi_supervised

if __name__ == "__main__":
    leave(run_stages([StageSpec("evaluate_semi_supervised", evaluate_semi_supervised.run, needs_labels=True)]))
