"""The plan of an ablation, its table, and how a batch of runs goes: on children that are made up."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Batch
from instance_ssl.errors import UserError
from picture import draw
from settings import Ablation, Row, Run, plan_runs, read_ablation
from table import Values, _find, differences, format_markdown, read_results, to_json

ROOT = Path(__file__).parents[3]
SETTINGS: dict[str, Any] = {
    "title": "Two",
    "config": str(ROOT / "runners/configs/pipeline_digits.yaml"),
    "deepspeed_config": str(ROOT / "ds_configs/cpu_float32.json"),
    "seeds": [0, 1],
    "reference": "usual",
    "variants": [{"name": "usual"}, {"name": "cold", "set": {"classifier.temperature": 0.1}}],
}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    return path


def finish(directory: Path, **figures: float) -> None:
    """Results as the stages would have left them."""
    records: dict[str, Any] = {
        "initialize_classifier": {},
        "pretrain": {"seconds": 10.0, "images_per_second": 100.0, "peak_gib": 1.0},
        "evaluate_knn": {"figures": {"trained": {"top1": figures["knn"]}}},
        "evaluate_linear": {"figures": {"trained": {"top1": figures["linear"]}}},
    }
    for stage, record in records.items():
        (directory / stage).mkdir(parents=True)
        (directory / stage / "result.json").write_text(json.dumps(record))


def test_a_run_that_several_rows_ask_for_is_one(tmp_path: Path) -> None:
    same = {"name": "same", "set": {"classifier.temperature": 0.15}, "stages": ["pretrain", "evaluate_similarity"]}
    path = write(tmp_path / "a.yaml", variants=[*SETTINGS["variants"], same])
    plan = plan_runs(read_ablation(path))
    assert len(plan.runs) == 4
    usual, other = plan.rows[Row("", "usual", None)], plan.rows[Row("", "same", None)]
    assert usual == other
    assert plan.runs[usual[0]].stages[-1] == "evaluate_similarity"
    assert plan.runs[usual[0]].stages.count("pretrain") == 1


def test_runs_go_seed_by_seed_and_lengths_are_runs_of_their_own(tmp_path: Path) -> None:
    plan = plan_runs(read_ablation(write(tmp_path / "a.yaml", epochs=[20, 40])), ["optimization.warmup_epochs=1"])
    assert [run.label for run in plan.runs.values()][:4] == [
        "usual, 20 epochs, seed 0", "usual, 40 epochs, seed 0", "cold, 20 epochs, seed 0", "cold, 40 epochs, seed 0"
    ]  # fmt: skip
    assert len(plan.runs) == 8
    run = plan.runs[plan.rows[Row("", "cold", 40)][1]]
    assert {"optimization.epochs=40", "seed=1", "classifier.temperature=0.1"} <= set(run.overrides)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "'a' is listed twice"),
        ({"variants": []}, "variants"),
        ({"figures": {"k-NN": "knn.top1"}, "drawn": []}, "stage:key.key"),
        ({"figures": {"k-NN": "knn:curve.seconds=soon.top1"}, "drawn": []}, "whole number"),
        ({"figures": {"k-NN": "knn:curve.seconds=60.5.top1"}, "drawn": []}, "whole number"),
        ({"reference": "other"}, "reference 'other'"),
        ({"drawn": ["speed"]}, "drawn 'speed'"),
        ({"runner": "nothing"}, "runner 'nothing'"),
        ({"seed": [1]}, "did you mean 'seeds'"),
        ({"config": "absent.yaml"}, "absent.yaml"),
        ({"deepspeed_config": "absent.json"}, "absent.json"),
        ({"set": {"classifier.temperatur": 1}}, "did you mean 'temperature'"),
        ({"reference": None, "variants": [{"name": "a", "group": "T", "set": {"seed": 1}, "epochs": [3]}]}, "'T / a'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        plan_runs(read_ablation(write(tmp_path / "a.yaml", **changes)))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_mean_spread_and_differences_by_seed() -> None:
    values, others = Values({0: 1.0, 1: 3.0}), Values({1: 2.0, 0: 1.0, 2: 9.0})
    assert (values.mean, values.std) == (2.0, pytest.approx(2**0.5))
    assert values.less(others) == Values({0: 0.0, 1: 1.0})
    assert Values({0: 1.0}).std is None
    assert Values({}).mean is None


def test_figures_are_found_by_their_keys() -> None:
    records = {
        "first": {"seconds": 1, "figures": {"trained": {"top1": 2.5}}},
        "second": {"curve": [{"a": 3, "b": 10, "c": "x"}, {"a": 4, "b": 20, "c": None}], "none": [1, 2]},
    }
    assert _find(records, "first:figures.*.top1") == 2.5
    assert _find(records, "*:curve.1.a") == 4
    assert _find(records, "*:seconds") == 1
    assert _find(records, "second:curve.b=15.a") == 3.5
    assert _find(records, "second:curve.b=20.a") == 4
    nowhere = (
        "third:seconds",
        "first:seconds.more",
        "*:curve.2.a",
        "first:figures",
        "*:curve.b=9.a",
        "*:curve.c=1.a",
        "*:none.b=1.a",
    )
    for absent in nowhere:
        assert _find(records, absent) is None


def test_the_table_has_what_is_done(tmp_path: Path) -> None:
    ablation = read_ablation(write(tmp_path / "a.yaml"))
    plan = plan_runs(ablation)
    usual, cold = plan.rows[Row("", "usual", None)], plan.rows[Row("", "cold", None)]
    finish(tmp_path / usual[0], knn=50.0, linear=60.0)
    finish(tmp_path / usual[1], knn=52.0, linear=61.0)
    finish(tmp_path / cold[1], knn=49.0, linear=63.0)
    results = read_results(ablation, plan, tmp_path)
    table = format_markdown(ablation, results).splitlines()
    assert table[2] == (
        "| variant | seeds | k-NN | linear | seconds | images/s | peak GiB | k-NN less usual | linear less usual |"
    )
    assert table[4].startswith("| usual | 2 | 51.00 ± 1.41 | 60.50 ± 0.71 | 10.00 ± 0.00 | 100 ± 0 | 1.00 ± 0.00 |")
    assert table[5].startswith("| cold | 1 | 49.00 | 63.00 |")
    assert table[5].endswith("| -3.00 | +2.00 |")
    record = to_json(ablation, plan, results)["rows"][1]
    assert record["figures"]["k-NN"] == {"mean": 49.0, "std": None, "n": 1, "by_seed": {1: 49.0}}
    assert record["runs"] == cold
    assert differences(ablation, results)[Row("", "cold", None)]["k-NN"].mean == -3.0
    draw(tmp_path / "table.png", ablation, results)
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def made_up_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scripts: dict[str, str], jobs: int = 1
) -> tuple[int, list[str]]:
    """A batch whose children are Python scripts, named like the runs; each runs in the run's directory."""
    said: list[str] = []
    ablation = read_ablation(write(tmp_path / "a.yaml"))
    runs = [Run(name, (), ("pretrain",), name) for name in scripts]

    def command(self: Batch, run: Run, directory: Path) -> list[str]:
        return [sys.executable, "-c", f"import os; os.chdir({str(directory)!r})\n{scripts[run.name]}"]

    monkeypatch.setattr(Batch, "_command", command)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        return Batch(ablation, tmp_path, jobs=jobs, say=said.append).run(runs), said
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


DONE = "os.mkdir('pretrain'); open('pretrain/result.json', 'w').write('{}')"


def test_a_failed_run_is_said_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scripts = {"bad": "print('error: no such thing'); raise SystemExit(2)", "good": DONE}
    code, said = made_up_batch(monkeypatch, tmp_path, scripts)
    assert code == EXIT_FAILED
    assert "failed: bad (exit code 2): error: no such thing" in said
    assert any(line.startswith("done: good") for line in said)


def test_what_is_done_is_not_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert made_up_batch(monkeypatch, tmp_path, {"good": DONE})[0] == EXIT_DONE
    code, said = made_up_batch(monkeypatch, tmp_path, {"good": "raise SystemExit(1)"})
    assert code == EXIT_DONE
    assert said == ["1 runs, 1 of them done"]


def test_two_jobs_run_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each waits until the other is there."""
    wait = "import time\nopen('here', 'w')\nwhile not os.path.exists('../{}/here'): time.sleep(0.05)\n"
    scripts = {"a": wait.format("b") + DONE, "b": wait.format("a") + DONE}
    assert made_up_batch(monkeypatch, tmp_path, scripts, jobs=2)[0] == EXIT_DONE


def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    """The batch as a process: its child saves when it is told to, and the batch ends with 75."""
    child = "import signal, sys, time\nsignal.signal(15, lambda *_: (open('saved', 'w'), sys.exit(75)))\n"
    child += "open('began', 'w')\ntime.sleep(60)"
    script = f"""
import sys
from pathlib import Path
from batch import Batch
from settings import Run
Batch._command = lambda self, run, path: [sys.executable, "-c", f"import os; os.chdir({{str(path)!r}})\\n" + {child!r}]
runs = [Run(name, (), ("pretrain",), name) for name in ("first", "second")]
raise SystemExit(Batch(None, Path({str(tmp_path)!r}), jobs=1).run(runs))
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/runners/ablation"}
    batch = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while not (tmp_path / "first/began").exists() and time.monotonic() < end:
        time.sleep(0.05)
    batch.terminate()
    output, _ = batch.communicate(timeout=30)
    assert batch.returncode == EXIT_STOPPED
    assert (tmp_path / "first/saved").exists()
    assert not (tmp_path / "second").exists()
    assert "the same command resumes" in output


@pytest.mark.parametrize("path", sorted((ROOT / "runners/configs/ablations").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_ablations_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ablation: Ablation = read_ablation(path)
    assert plan_runs(ablation).rows
