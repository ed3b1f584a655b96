"""Trains SimCLR, MoCo v2 or InstDisc (lightly's parts) as this project trains, and measures all alike on the way.

python runners/benchmarks/peers.py --stages simclr --config F --deepspeed_config F --run-dir D --set key=value …
Without --stages it trains this project. runners/ablation/ablate.py with configs/ablations/peers.yaml runs all of them.
"""

from typing import TYPE_CHECKING, Any, cast

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if TYPE_CHECKING:
    from instance_ssl.run.stage import Stage
    from peer_methods import PeerName


def _train(stage: "Stage") -> dict[str, Any]:
    import peer_stages  # late, for it imports torch

    return peer_stages.run_training(stage)


def _own(stage: "Stage") -> dict[str, Any]:
    import peer_stages

    return peer_stages.run_own(stage)


def _peer(stage: "Stage") -> dict[str, Any]:
    import peer_stages

    return peer_stages.run_peer(cast("PeerName", stage.name), stage)


OWN = [StageSpec("initialize_classifier"), StageSpec("pretrain", _train), StageSpec("own", _own, needs_labels=True)]
OTHERS = [StageSpec(name, _peer, needs_labels=True) for name in ("simclr", "moco_v2", "instdisc")]

if __name__ == "__main__":
    leave(run_stages(OWN, further=OTHERS))
