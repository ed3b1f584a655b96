"""Takes images that have come into a run, and drops those that are gone or cannot be read, between two trainings.

python runners/update_images.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if __name__ == "__main__":
    leave(run_stages([StageSpec("update_images")]))
