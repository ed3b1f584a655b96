"""Prints what a training would take on every rank: memory, traffic, FLOPs, the largest N. Allocates nothing.

python runners/plan.py --config F --deepspeed_config F --world-size T [--num-instances N] [--gpu-memory-gib G]
    [--set key=value …]
"""

from instance_ssl.stages.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
