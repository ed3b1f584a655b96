"""Every shipped DeepSpeed JSON trains, and means the same experiment: only the rounding differs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_training import settings_from, train

from instance_ssl.distributed.comm import Group

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
# Batch norm sees a micro-batch of one rank, so the losses depend on its size: one size for all files, and one that has
# each step accumulate two micro-batches.
MICRO_BATCH_SIZE = 8

# A loss is a mean over rows whose rounding errors are independent: it may be off by one rounding of its own, half the
# dtype's epsilon. Measured: a ninth of that in bfloat16, a thirteenth in float16.
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.bfloat16, torch.float16)} | {None: 1e-5}


def losses_of(group: Group, files: list[Path]) -> list[tuple[list[float], torch.dtype | None]]:
    results = []
    for path in files:
        settings = settings_from(path, group.size)
        assert settings.accumulation_steps == 2
        results.append((train(group, settings).losses, settings.autocast_dtype))
    return results


def written(path: Path, **keys: Any) -> Path:
    path.write_text(json.dumps({**keys, "train_micro_batch_size_per_gpu": MICRO_BATCH_SIZE}))
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    [path] = [path for path in SHIPPED if path.name == "cpu_float32.json"]
    file = written(tmp_path_factory.mktemp("reference") / path.name, **json.loads(path.read_text()))
    by_rank = run_ranks(losses_of, 2, [file])
    return by_rank[0][0][0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_trains_like_float32(path: Path, expected: list[float], tmp_path: Path) -> None:
    keys = json.loads(path.read_text())
    # Without autocast as well: ZeRO, buckets and overlap are then held to float32's accuracy.
    without_autocast = {key: value for key, value in keys.items() if key != "torch_autocast"}
    files = [written(tmp_path / "float32.json", **without_autocast), written(tmp_path / "shipped.json", **keys)]
    for (full, full_dtype), (shipped, dtype) in run_ranks(losses_of, 2, files):
        assert full_dtype is None
        assert full == pytest.approx(expected, rel=ROUNDING[None])
        assert shipped == pytest.approx(expected, rel=ROUNDING[dtype])
        assert (shipped == full) == (dtype is None)  # autocast was really on
