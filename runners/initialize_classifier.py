"""Stage 1: initialises the classifier from the features of a random network.

python runners/initialize_classifier.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if __name__ == "__main__":
    leave(run_stages([StageSpec("initialize_classifier")]))
