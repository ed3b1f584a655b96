"""A training that waits for its images says so, with what helps."""

import json
from pathlib import Path

from processes import run_bare

SLOW_PIPELINE = """
import sys
import time
from instance_ssl.data.image_sources import ArrayImages
from instance_ssl.stages import initialize_classifier, pretrain
from instance_ssl.run.main import StageSpec, run_stages

load = ArrayImages.load

def slow_load(self, index):
    time.sleep(0.005)
    return load(self, index)

ArrayImages.load = slow_load
stages = {"initialize_classifier": initialize_classifier, "pretrain": pretrain}
sys.exit(run_stages([StageSpec(name, stage.run) for name, stage in stages.items()]))
"""


def test_a_slow_source_is_said(tmp_path: Path) -> None:
    sizes = ["data.limit_train=256", "optimization.global_batch_size=64", "optimization.epochs=3"]
    sets = [*sizes, "optimization.warmup_epochs=1", "log.every_steps=1", "data.num_workers=0"]
    (tmp_path / "slow_pipeline.py").write_text(SLOW_PIPELINE)
    ended = run_bare(str(tmp_path / "slow_pipeline"), "--run-dir", str(tmp_path), "--set", *sets)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if "input-bound" in line]
    assert len(lines) == 1, ended.stdout  # of twelve intervals
    assert "rank 0" in lines[0]
    assert "waits for images" in lines[0]
    logged = [json.loads(line) for line in (tmp_path / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert all(figures["speed/data_wait_share"] > 0.3 for figures in logged[1:])
