"""Activation checkpointing under the engine: ZeRO 0, 1 and 2, in float32 and bfloat16, two ranks, two micro-batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_training import STEPS, Trained, settings_from, train
from torch import Tensor, nn

from instance_ssl.distributed.comm import Group

AUTOCAST = {"enabled": True, "dtype": "bfloat16"}


def train_and_count(group: Group, path: Path) -> tuple[Trained, int]:
    """The run, and the bytes that its forward passes had autograd keep, weights left out: they are there anyway."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return train(group, settings_from(path, group.size)), kept


def train_both_ways(group: Group, files: tuple[Path, Path]) -> list[tuple[Trained, int]]:
    return [train_and_count(group, path) for path in files]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [0, pytest.param(1, marks=pytest.mark.full), 2])
def test_recomputed_steps_are_bit_equal(zero_stage: int, autocast: bool, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": zero_stage}}
    if autocast:
        keys["torch_autocast"] = AUTOCAST
    files = tmp_path / "plain.json", tmp_path / "recomputed.json"
    files[0].write_text(json.dumps(keys))
    files[1].write_text(json.dumps({**keys, "activation_checkpointing": {}}))
    for (plain, kept), (recomputed, kept_recomputed) in run_ranks(train_both_ways, 2, files):
        assert kept_recomputed < 0.3 * kept
        assert recomputed.losses == plain.losses
        torch.testing.assert_close(recomputed.state, plain.state, rtol=0, atol=0)
        torch.testing.assert_close(recomputed.momentum, plain.momentum, rtol=0, atol=0)
        assert torch.equal(recomputed.weight, plain.weight)
        seen = {int(value) for name, value in recomputed.state.items() if name.endswith("num_batches_tracked")}
        assert seen == {2 * STEPS}
