"""Measures Figure 4: intra- and inter-instance cosines of every initialisation of the classifier.

python runners/evaluate_similarity.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.leaving import leave
from instance_ssl.stages import evaluate_similarity
from instance_ssl.stages.context import StageSpec, run_stages

if __name__ == "__main__":
    leave(run_stages([StageSpec("evaluate_similarity", evaluate_similarity.run)]))
