"""A console that nobody reads any more neither ends a run nor keeps a hanging one alive."""

import os
import subprocess
import sys
from pathlib import Path

LINES = "from instance_ssl.run.log import RunLog; log = RunLog(is_main=True); log.say('a'); log.say('b')"
HANG = """
import sys, time
from pathlib import Path
from instance_ssl.run.watchdog import Guard
guard = Guard(0)
guard.start()
with guard.hangs_after(0.2, Path(sys.argv[1])):
    time.sleep(60)
"""


def test_a_run_goes_on_when_nobody_reads_its_lines() -> None:
    assert exit_code_unheard(LINES, "stdout") == 0


def test_a_hang_ends_when_nobody_reads_why(tmp_path: Path) -> None:
    assert exit_code_unheard(HANG, "stderr", str(tmp_path)) == 4
    assert "in <module>" in (tmp_path / "stacks_rank_00000.txt").read_text()


def test_a_hang_ends_when_the_console_is_full_and_stuck(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writing, True)
    program = "import instance_ssl.run.watchdog as g; g._SECONDS_FOR_WORDS = 1.0\n" + HANG
    finished = subprocess.run([sys.executable, "-c", program, str(tmp_path)], stderr=writing, timeout=30)
    os.close(reading)
    os.close(writing)
    assert finished.returncode == 4


def exit_code_unheard(program: str, stream: str, *arguments: str) -> int:
    """Of a Python program that writes to a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, timeout=30, **{stream: writing}).returncode
    finally:
        os.close(writing)
