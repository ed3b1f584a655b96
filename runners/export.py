"""Writes an encoder as files for others, and features of any folder of images.

python runners/export.py --config F --deepspeed_config F --run-dir D --set export.images=FOLDER …
"""

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if __name__ == "__main__":
    leave(run_stages([StageSpec("export")]))
