"""Measures Figure 1(b): instance accuracy against semantic accuracy over the checkpoints of a run.

python runners/evaluate_checkpoints.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if __name__ == "__main__":
    leave(run_stages([StageSpec("evaluate_checkpoints", needs_labels=True)]))
