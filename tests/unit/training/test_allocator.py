"""glibc keeps freed memory for the next step, within a bound; nothing happens elsewhere or against the user's wish."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from instance_ssl.training import allocator

ROOT = Path(__file__).parents[3]
# 96 MiB in six blocks, again and again, as a training step's activations; then four times as much, once.
PROGRAM = """
import os, resource, sys
from pathlib import Path
from instance_ssl.training import allocator
kept = sys.argv[1] == "keep" and allocator.keep_freed_memory(os.environ)
def resident():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1])
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step(blocks):
    held = [bytearray(2**24) for _ in range(blocks)]
step(6), step(6)
before = faults()
for _ in range(5):
    step(6)
repeated = faults() - before
step(48)
print(int(kept), repeated, resident())
"""


def figures(mode: str) -> tuple[int, int, int]:
    """Whether thresholds were raised, minor faults of five steps, and KiB resident after a large one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", PROGRAM, mode]
    kept, faults, resident = subprocess.check_output(command, env=environment, text=True, timeout=120).split()
    return int(kept), int(faults), int(resident)


needs_glibc = pytest.mark.skipif(allocator._mallopt() is None, reason="the C library is not glibc")


@needs_glibc
def test_a_step_finds_its_memory_again_and_a_large_one_gives_it_back() -> None:
    kept, faults, resident = figures("keep")
    _, faults_by_default, _ = figures("default")
    assert kept == 1
    assert faults < faults_by_default / 5
    assert resident < 400 * 2**10  # of 768 MiB that were used: the bound and the interpreter


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    called: list[int] = []

    def mallopt(option: int, _: int) -> int:
        called.append(option)
        return 1

    monkeypatch.setattr(allocator, "_mallopt", lambda: mallopt)
    assert allocator.keep_freed_memory({name: "glibc.malloc.trim_threshold=131072"}) is False
    assert called == []
    assert allocator.keep_freed_memory({"PATH": "/bin", "GLIBC_TUNABLES": "glibc.pthread.rseq=0"}) is True
    assert len(called) == 2


@pytest.mark.parametrize("found", [None, "", "musl 1.2.5", ValueError("unrecognized configuration name")])
def test_nothing_happens_under_another_c_library(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    def confstr(name: str) -> str | None:
        if isinstance(found, Exception):
            raise found
        return found

    def load(name: object) -> None:
        raise AssertionError("no library is to be loaded")

    monkeypatch.setattr(os, "confstr", confstr)
    monkeypatch.setattr(allocator.ctypes, "CDLL", load)
    assert allocator.keep_freed_memory({}) is False
