"""The precision in which gradients travel, as DeepSpeed really does it; what `ds_config` refuses rests on this."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed.comm
import pytest
import torch
from ranks import run_ranks
from small_training import settings_from, train
from torch import Tensor

from instance_ssl.distributed.comm import Group

BFLOAT16 = {"enabled": True, "dtype": "bfloat16"}


@contextmanager
def watching_reductions() -> Iterator[dict[torch.dtype, int]]:
    """Elements that DeepSpeed's collectives have reduced, by dtype."""
    elements: dict[torch.dtype, int] = {}
    real = deepspeed.comm.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
        return real(tensor, *args, **kwargs)

    deepspeed.comm.all_reduce = all_reduce
    try:
        yield elements
    finally:
        deepspeed.comm.all_reduce = real


def reduced(group: Group, path: Path) -> dict[torch.dtype, int]:
    with watching_reductions() as elements:
        train(group, settings_from(path, group.size))
    return elements


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"zero_optimization": {"stage": 0}, "torch_autocast": BFLOAT16}, torch.float32),
        (
            {"zero_optimization": {"stage": 0}, "torch_autocast": BFLOAT16, "communication_data_type": "bf16"},
            torch.bfloat16,
        ),
        ({"zero_optimization": {"stage": 1}, "communication_data_type": "bf16"}, torch.bfloat16),
        ({"zero_optimization": {"stage": 1}, "torch_autocast": BFLOAT16}, torch.bfloat16),
        ({"zero_optimization": {"stage": 2}, "torch_autocast": BFLOAT16}, torch.bfloat16),
        (
            {"zero_optimization": {"stage": 2}, "torch_autocast": {**BFLOAT16, "lower_precision_safe_modules": []}},
            torch.float32,
        ),
    ],
)
def test_gradients_travel_in(keys: dict[str, Any], expected: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 8, **keys}))
    for elements in run_ranks(reduced, 2, path):
        assert max(elements, key=lambda dtype: elements[dtype]) == expected
