"""A mistake or a cry for help is answered before torch, torchvision or deepspeed is imported, by every runner."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import ROOT, cpu_environment

HEAVY = ("torch", "torchvision", "deepspeed", "tensorboard", "matplotlib")
# Runs a runner as `python runners/x.py …` does, and says at its end which heavy libraries it has imported.
PROBE = """
import os, runpy, sys
leave = os._exit
def tell(code=0):
    heavy = [name for name in {heavy!r} if name in sys.modules]
    print("imported:", *heavy, file=sys.stderr, flush=True)
    leave(code)
os._exit = tell
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    tell(end.code or 0)
"""
STAGES = [
    "update_images", "initialize_classifier", "pretrain", "pipeline", "evaluate_knn", "evaluate_linear",
    "evaluate_semi_supervised",
    "evaluate_fine_tune", "evaluate_detection", "evaluate_retrieval", "evaluate_similarity", "evaluate_checkpoints",
    "export",
]  # fmt: skip
BENCHMARKS = [
    f"{path.parent.name}/{path.stem}"
    for folder in ("benchmarks", "ablation")
    for path in sorted((ROOT / "runners" / folder).glob("*.py"))
    if "__main__" in path.read_text()
]
NEEDED = {
    "plan": ["--world-size", "1"],
    "show_views": [],
    "pack_dataset": ["--output", "{d}/packed", "--config", "runners/configs/pipeline_digits.yaml"],
}
# Runner, arguments after those that it needs, what the line must say. {d} is a directory.
MISTAKES = [
    *((runner, ["--set", "classifier.temperatur=1"], "did you mean 'temperature'") for runner in (*STAGES, *NEEDED)),
    *((runner, ["--config", "{d}/absent.yaml"], "absent.yaml") for runner in ("pretrain", "plan", "show_views")),
    *((runner, ["--deepspeed_config", "{d}/bad.json"], "train_batch_size") for runner in ("pretrain", "plan")),
    *((runner, ["--bogus"], "--bogus") for runner in ("pretrain", "plan", "show_views", "pack_dataset")),
    ("report", ["run", "--bogus"], "--bogus"),
    ("pretrain", ["--deepspeed_config", "{d}/nested.json"], "did you mean 'overlap_comm'"),
    (
        "initialize_classifier",
        ["--set", "data.kind=folder", "data.root={d}/absent"],
        "data.root {d}/absent is not a folder",
    ),
    ("pretrain", [], "run runners/initialize_classifier.py first"),
    ("pretrain", ["--run-dir", "{d}/other"], "holds a run with data.kind = tree, not digits"),
    ("evaluate_knn", ["--set", "evaluation.checkpoint={d}/absent"], "evaluation.checkpoint {d}/absent"),
    ("export", ["--set", "export.source=weights", "evaluation.weights={d}/absent"], "evaluation.weights {d}/absent"),
    ("plan", ["--world-size", "0"], "--world-size 0"),
    ("show_views", ["--out", "{d}/absent/views.png"], "--out {d}/absent/views.png"),
    ("pack_dataset", ["--quality", "0"], "--quality 0"),
    ("report", ["{d}/absent"], "{d}/absent"),
    ("supervise", ["deepspeed", "--hostfile", "{d}/absent", "runners/pretrain.py"], "--hostfile {d}/absent"),
    ("supervise", ["python", "runners/pretrain.py"], "give the whole command"),
]


def probe(runner: str, arguments: list[str]) -> tuple[int, str, list[str], list[str]]:
    """Exit code, standard output, lines on standard error, and the heavy libraries that were imported."""
    script = str(ROOT / "runners" / f"{runner}.py")
    command = [sys.executable, "-c", PROBE.format(heavy=HEAVY), script, *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=120)
    *lines, last = ended.stderr.splitlines()
    assert last.startswith("imported:"), ended.stderr
    return ended.returncode, ended.stdout, lines, last.split()[1:]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("light")
    small = {"train_micro_batch_size_per_gpu": 8}
    (path / "bad.json").write_text(json.dumps({**small, "train_batch_size": 8}))
    (path / "nested.json").write_text(json.dumps({**small, "zero_optimization": {"stage": 1, "overlap_com": True}}))
    (path / "other/pretrain").mkdir(parents=True)
    (path / "other/pretrain/config.yaml").write_text("optimization: {epochs: 77}")
    return path


@pytest.mark.parametrize("runner", [*STAGES, *NEEDED, "report", "supervise", *BENCHMARKS])
def test_help_imports_nothing_heavy(runner: str) -> None:
    code, printed, lines, heavy = probe(runner, ["--help"])
    assert (code, lines, heavy) == (0, [], [])
    assert "usage:" in printed


def test_a_mistake_is_one_line_before_anything_heavy_is_imported(directory: Path) -> None:
    def find_fault(case: tuple[str, list[str], str]) -> str | None:
        runner, arguments, expected = case
        run_directory = [] if runner not in STAGES or "--run-dir" in arguments else ["--run-dir", "{d}/run"]
        words = [*NEEDED.get(runner, run_directory), *arguments]
        code, printed, lines, heavy = probe(runner, [word.format(d=directory) for word in words])
        fine = code == 2 and not printed and len(lines) == 1 and expected.format(d=directory) in lines[0] and not heavy
        return None if fine else f"{runner} {words}: {code}, {printed}, {lines}, {heavy}"

    with ThreadPoolExecutor(2) as pool:
        faults = [fault for fault in pool.map(find_fault, MISTAKES) if fault is not None]
    assert not faults, "\n".join(faults)
    assert not (directory / "run").exists()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("numpy", "pydantic", *HEAVY)
    code = f"import sys, instance_ssl; print([name for name in {heavy!r} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == "[]", ended.stderr
