"""How a process ends: everything is finished and flushed, and no thread of C++ meets an interpreter torn down."""

import subprocess
import sys

ENDING = """
import atexit, sys, threading, time
import torch
from instance_ssl.run.shutdown import leave

def add_for_ever():
    rows = torch.zeros(1000)
    while True:
        rows + rows

def write_late():
    time.sleep(0.3)
    print("the writer is done")

atexit.register(lambda: print("exit handlers have run"))
for _ in range(3):
    threading.Thread(target=add_for_ever, daemon=True).start()
threading.Thread(target=write_late).start()
print("not flushed", end=" ")
time.sleep(0.1)
{end}
"""


def _end_with(statement: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ENDING.format(end=statement)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_threads_of_cpp_do_not_abort_the_end() -> None:
    finished = _end_with("leave(75)")
    assert finished.returncode == 75, finished.stderr
    assert finished.stdout == "not flushed the writer is done\nexit handlers have run\n"
    assert finished.stderr == ""
