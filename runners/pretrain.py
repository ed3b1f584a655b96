"""Stage 2: trains encoder and classifier; the same command again resumes.

python runners/pretrain.py --config F --deepspeed_config F --run-dir D --set key=value …
"""

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if __name__ == "__main__":
    leave(run_stages([StageSpec("pretrain")]))
