"""A training that waits for its images says so, with what helps."""

import json
import subprocess
import sys
from pathlib import Path

from processes import ROOT, cpu_environment

SLOW_PIPELINE = """
import sys, time
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
    command = [sys.executable, "-c", SLOW_PIPELINE, "--run-dir", str(tmp_path), "--set", *sets]
    ended = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if "input-bound" in line]
    assert len(lines) == 1, ended.stdout  # of twelve intervals
    assert "rank 0" in lines[0]
    assert "waits for images" in lines[0]
    logged = [json.loads(line) for line in (tmp_path / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert all(figures["speed/data_wait_share"] > 0.3 for figures in logged[1:])
