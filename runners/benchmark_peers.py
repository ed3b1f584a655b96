"""Trains SimCLR, MoCo v2 or InstDisc (lightly's parts) as this project trains, and measures both alike on the way.

python runners/benchmark_peers.py --stages simclr --config F --deepspeed_config F --run-dir D --set key=value …
`--stages initialize_classifier pretrain own`, as without it, is this project. All with ablate.py: ablations/peers.yaml.
"""

from functools import partial

from instance_ssl.benchmarks.peers import PEERS
from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave
from instance_ssl.stages import benchmark_peers, initialize_classifier

OWN = [
    StageSpec("initialize_classifier", initialize_classifier.run),
    StageSpec("pretrain", benchmark_peers.run_training),
    StageSpec("own", benchmark_peers.run_own, needs_labels=True),
]
OTHERS = [StageSpec(name, partial(benchmark_peers.run_peer, name), needs_labels=True) for name in PEERS]

if __name__ == "__main__":
    leave(run_stages(OWN, further=OTHERS))
