"""A forked script cannot tell that it was forked, and what the server is to import exists."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from fork_server import PRELOADED
from processes import run_bare, run_forked, run_python

SCRIPT = """
import json, os, sys, threading
print(json.dumps({
    "name": __name__, "file": __file__, "argv": sys.argv, "cwd": os.getcwd(), "path": sys.path[0],
    "variable": os.environ.get("A_VARIABLE"), "terminal": sys.stdout.isatty(), "rank": os.environ.get("RANK"),
}))
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script")


def test_a_forked_script_sees_what_a_started_one_sees(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_VARIABLE", "set after the server has started")
    forked, started = (run(script, "--words", "a b", cwd=tmp_path) for run in (run_bare, run_python))
    assert (forked.returncode, forked.stderr) == (started.returncode, started.stderr) == (0, "")
    assert json.loads(forked.stdout) == json.loads(started.stdout)


def test_ranks_share_their_streams(script: str) -> None:
    finished = run_forked(script, 3)
    assert sorted(json.loads(line)["rank"] for line in finished.stdout.splitlines()) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("statement", "code", "said"),
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(75)", 75, ""),
        ("raise SystemExit('in words')", 1, "in words"),
        ("raise ValueError('unforeseen')", 1, "ValueError: unforeseen"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
    ],
)
def test_every_end_has_the_exit_code_of_a_real_process(
    script: str, tmp_path: Path, statement: str, code: int, said: str
) -> None:
    (tmp_path / "script.py").write_text(f"import atexit; atexit.register(print, 'at the end')\n{statement}")
    finished = run_bare(script)
    assert finished.returncode == code
    assert (finished.stderr.splitlines() or [""])[-1] == said
    assert finished.stdout == ("" if code == -9 else "at the end\n")


def test_what_is_to_be_preloaded_is_preloaded(script: str, tmp_path: Path) -> None:
    """The server passes over a module that it cannot import, and every process would import its part anew."""
    ours = [name for name in PRELOADED if name.startswith("instance_ssl")]
    assert ours
    assert all(importlib.util.find_spec(name) for name in ours)
    (tmp_path / "script.py").write_text("import sys; print(*sys.modules)")
    assert {"torch", "deepspeed", *ours} <= set(run_bare(script).stdout.split())


def test_ranks_and_runs_are_forked_from_the_same_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "faults")
    import ranks
    import rig

    assert ranks.context is rig.context
    assert rig.context.get_start_method() == sys.modules["fork_server"].context.get_start_method() == "forkserver"
