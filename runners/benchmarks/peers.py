"""Trains SimCLR, MoCo v2 or InstDisc (lightly's parts) as this project trains, and measures all alike on the way.

python runners/benchmarks/peers.py --stages simclr --config F --deepspeed_config F --run-dir D --set key=value …
Without --stages it trains this project. runners/ablation/ablate.py with configs/ablations/peers.yaml runs all of them.
"""

from functools import partial

import peer_stages
from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave
from instance_ssl.stages import initialize_classifier
from peer_methods import PEERS

OWN = [
    StageSpec("initialize_classifier", initialize_classifier.run),
    StageSpec("pretrain", peer_stages.run_training),
    StageSpec("own", peer_stages.run_own, needs_labels=True),
]
OTHERS = [StageSpec(name, partial(peer_stages.run_peer, name), needs_labels=True) for name in PEERS]

if __name__ == "__main__":
    leave(run_stages(OWN, further=OTHERS))
