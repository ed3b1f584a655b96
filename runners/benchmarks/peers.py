"""Trains SimCLR, MoCo v2 or InstDisc (lightly's parts) as this project trains, and measures all alike on the way.

python runners/benchmarks/peers.py --stages simclr --config F --deepspeed_config F --run-dir D --set key=value …
Without --stages it trains this project. runners/ablation/ablate.py with configs/ablations/peers.yaml runs all of them.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from instance_ssl.run.main import StageSpec, run_stages
from instance_ssl.run.shutdown import leave

if TYPE_CHECKING:
    from instance_ssl.run.stage import Stage


def _late(function: str) -> "Callable[[Stage], dict[str, Any]]":
    """A function of `peer_stages`, which imports torch: it is imported when a stage begins."""
    return lambda stage: getattr(import_module("peer_stages"), function)(stage)


OWN = [
    StageSpec("initialize_classifier"),
    StageSpec("pretrain", _late("run_training")),
    StageSpec("own", _late("run_own"), needs_labels=True),
]
OTHERS = [StageSpec(name, _late("run_peer"), needs_labels=True) for name in ("simclr", "moco_v2", "instdisc")]

if __name__ == "__main__":
    leave(run_stages(OWN, further=OTHERS))
