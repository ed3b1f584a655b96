"""Applies each mutant of mutants.yaml to a copy of the tree and runs the tests that ought to fail: one that passes them
all has found a gap in the suite.

    python tests/mutation.py mutants.json          resumes: what was killed stays killed, survivors are tried again
    python tests/mutation.py mutants.json --table  prints the results as Markdown
"""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import context
from pathlib import Path
from typing import Any

import yaml

_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_SECONDS = 900
_OUTCOMES = {0: "survived", 1: "killed", None: "killed"}  # None: hung until it was stopped


def mutants() -> Iterator[tuple[str, str, str, list[str]]]:
    """File, old text, new text, and pytest's arguments, of each mutant of the table."""
    for group in yaml.safe_load((_ROOT / "tests/mutants.yaml").read_text()):
        for old, new in group["mutants"]:
            yield group["file"], old, new, group["tests"].split()


def run_tests(tree: Path, arguments: list[str]) -> tuple[int | None, str]:
    """pytest's exit code, None when it hung, and the first test that failed.

    Forks instead of starting Python anew, so that torch and DeepSpeed are imported once for all mutants.
    """
    log = tree / "pytest.log"
    if (child := os.fork()) == 0:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)
        import pytest

        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "", *arguments]))
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            failed = re.search(r"^(?:FAILED|ERROR) \S*?([^/\s]+)(?: - |$)", log.read_text(), re.MULTILINE)
            return os.waitstatus_to_exitcode(status), failed[1] if failed else ""
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, "hung"


def run(results_path: Path) -> None:
    """Tries all mutants that are not known to be killed, and writes the results after each."""
    results: dict[str, dict[str, Any]] = json.loads(results_path.read_text()) if results_path.exists() else {}
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        shutil.copytree(_ROOT, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
        passing: dict[str, bool] = {}
        for file, old, new, arguments in mutants():
            key = json.dumps([file, old, new])
            if results.get(key, {}).get("outcome") == "killed":
                continue
            source, tests = tree / "instance_ssl" / file, " ".join(arguments)
            before = source.read_text()
            if tests not in passing:
                passing[tests] = run_tests(tree, arguments)[0] == 0
            started = time.monotonic()
            if before.count(old) != 1:
                outcome, by = f"found {before.count(old)} times", ""
            elif not passing[tests]:
                outcome, by = "tests fail without it", ""
            else:
                source.write_text(before.replace(old, new))
                code, by = run_tests(tree, arguments)
                source.write_text(before)
                outcome = _OUTCOMES.get(code, f"pytest ended with {code}")
            results[key] = {"outcome": outcome, "by": by, "tests": tests, "seconds": round(time.monotonic() - started)}
            results_path.write_text(json.dumps(results, indent=1))
            print(outcome, by, key, flush=True)


def print_table(results_path: Path) -> None:
    """Every mutant of the table with its outcome, as Markdown."""
    results = json.loads(results_path.read_text())
    print("| file | instead of | it says | outcome | by |\n|---|---|---|---|---|")
    for file, old, new, _ in mutants():
        found = results.get(json.dumps([file, old, new]), {"outcome": "not run", "by": ""})
        cells = [f"`{' '.join(text.split()).replace('|', '¦')}`" if text else "nothing" for text in (old, new)]
        print(f"| {file} | {cells[0]} | {cells[1]} | {found['outcome']} | {found['by']} |")


if __name__ == "__main__":
    if "--table" in sys.argv:
        print_table(Path(sys.argv[1]))
        sys.exit()
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    sys.dont_write_bytecode = True
    # Ranks fork from the test process: nothing there has started a thread, and imports are what takes the time.
    context._concrete_contexts["forkserver"] = context.ForkContext()  # type: ignore[attr-defined]
    import deepspeed  # noqa: F401
    import torchvision  # noqa: F401

    run(Path(sys.argv[1]))
