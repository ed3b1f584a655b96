"""Evaluates the encoder by weighted k-nearest neighbours.

python runners/evaluate_knn.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if __name__ == "__main__":
    leave(run_stages([StageSpec("evaluate_knn", needs_labels=True)]))
