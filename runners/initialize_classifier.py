"""Stage 1: initialises the classifier from the features of a random network.

python runners/initialize_classifier.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.run.shutdown import leave
from instance_ssl.run.stage import StageSpec, run_stages
from instance_ssl.stages import initialize_classifier

if __name__ == "__main__":
    leave(run_stages([StageSpec("initialize_classifier", initialize_classifier.run)]))
