"""Small real runs that come to harm: every rank is a process of its own, forked from a server that has imported all.

A run of 65 images (odd on purpose; three epochs of five steps) takes about two seconds this way, where the
launcher takes eight; tests whose subject is the launcher use the launcher.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fork_server import context
from injection import environment as ordering
from injection import install
from PIL import Image

NUM_IMAGES, STEPS_PER_EPOCH, EPOCHS = 65, 5, 3
TOTAL_STEPS = STEPS_PER_EPOCH * EPOCHS
CONFIG: dict[str, Any] = {
    "data": {"kind": "folder", "image_size": 16, "num_workers": 0},
    "model": {"backbone": "small_cnn", "embedding_dim": 16},
    "classifier": {"num_hard_classes": 5, "initialization_batch_size": 16},
    "optimization": {"epochs": EPOCHS, "warmup_epochs": 1, "global_batch_size": 12, "learning_rate": 0.1},
    "log": {"every_steps": 2},
    "safety": {"hang_seconds": 60},
}


def make_images(folder: Path) -> None:
    """65 small PNGs, the same each time."""
    folder.mkdir()
    generator = np.random.RandomState(0)
    for number in range(NUM_IMAGES):
        pixels = generator.randint(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")


@dataclass
class Run:
    """Ranks at work on one stage.

    Attributes:
        directory: the run's.
        processes: by rank.
        outputs: where each rank's standard output and error go.
        record: what a fault that is carried out writes; None where none is ordered.
    """

    directory: Path
    processes: list[Any]
    outputs: list[Path]
    record: Path | None = None

    def wait(self, seconds: float = 60, *, reaches_fault: bool = True) -> list[int]:
        """Exit codes by rank; a rank that ends itself by a signal has minus its number.

        A fault that was ordered must have been carried out, unless the test says that it may not be reached.
        """
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
        assert not late, f"ranks {late} did not end in {seconds} s\n{self.text()}"
        assert not reaches_fault or self.reached_fault(), f"the fault was never reached\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def reached_fault(self) -> bool:
        """Whether the fault that was ordered has been carried out; True where none was."""
        return self.record is None or self.record.exists()

    def signal(self, rank: int, number: int) -> None:
        """Sends a signal to one rank."""
        os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        """Ends all ranks at once, as a power cut would."""
        for process in self.processes:
            process.kill()

    def text(self) -> str:
        """What all ranks have said."""
        return "\n".join(path.read_text() for path in self.outputs if path.exists())


def start(
    directory: Path,
    *,
    stage: str = "pretrain",
    size: int = 2,
    fault: str | None = None,
    settings: Mapping[str, Any] | None = None,
    zero_stage: int = 0,
    micro_batch: int = 3,
    by_rank: Mapping[int, Sequence[str]] | None = None,
    file_limit: Mapping[int, int] | None = None,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Run:
    """Starts a stage in `directory`/run, whose images lie in `directory`/images.

    Args:
        fault: an order for `injection`, which `Run.wait` wants carried out.
        settings: dotted keys over `CONFIG`.
        by_rank: further arguments of single ranks.
        file_limit: of single ranks, the most bytes that a file may hold.
        environment: of all ranks, over what a launcher would set.
        prepare: called in every rank before it begins; a function of a module, to change or watch the package.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = flags(directory, settings=settings, zero_stage=zero_stage, micro_batch=micro_batch)
    outputs = [directory / f"output_{time.monotonic_ns()}_{rank}.txt" for rank in range(size)]
    record = directory / f"fault_{time.monotonic_ns()}.txt"
    processes = []
    for rank in range(size):
        own_environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_SIZE": size}
        own_environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        own_environment |= ordering(fault, record) | dict(environment or {})
        own = [*arguments, *(by_rank or {}).get(rank, [])]
        target = (stage, own, {key: str(value) for key, value in own_environment.items()}, outputs[rank])
        process = context.Process(target=_one_rank, args=(*target, (file_limit or {}).get(rank), prepare))
        process.start()
        processes.append(process)
    return Run(directory / "run", processes, outputs, None if fault is None else record)


def flags(
    directory: Path, *, settings: Mapping[str, Any] | None = None, zero_stage: int = 0, micro_batch: int = 3
) -> list[str]:
    """A runner's command line for `directory`/run, whose two files are written."""
    (directory / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    ds = {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": {"stage": zero_stage}}
    (directory / "ds.json").write_text(json.dumps(ds))
    arguments = ["--config", str(directory / "config.yaml"), "--deepspeed_config", str(directory / "ds.json")]
    arguments += ["--run-dir", str(directory / "run"), "--set", f"data.root={directory / 'images'}"]
    return [*arguments, *(f"{key}={value}" for key, value in (settings or {}).items())]


def run(directory: Path, **options: Any) -> Run:
    """`start`, and wait until all ranks have ended; `exit_codes` of it are in `Run.wait()`."""
    started = start(directory, **options)
    started.wait()
    return started


def _one_rank(
    stage: str,
    arguments: list[str],
    environment: dict[str, str],
    output: Path,
    file_limit: int | None,
    prepare: Callable[[], None] | None,
) -> None:
    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    if file_limit is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a suite under nohup would pass on as ignored
    sys.argv = [f"runners/{stage}.py", *arguments]
    if prepare is not None:
        prepare()
    install()
    import importlib

    from instance_ssl.run.main import StageSpec, run_stages

    module = importlib.import_module(f"instance_ssl.stages.{stage}")
    code = 1
    try:
        code = run_stages([StageSpec(stage, module.run, needs_labels=stage.startswith("evaluate"))])
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def checkpoints(directory: Path, stage: str = "pretrain") -> list[Path]:
    """Committed checkpoints of a stage of `directory`/run, oldest first."""
    return sorted((directory / "run" / stage / "checkpoints").glob("step_*"))


def digests(directory: Path, stage: str = "pretrain") -> dict[str, str]:
    """SHA-256 of every file of the newest checkpoint but training.json, which holds times."""
    manifest = json.loads((checkpoints(directory, stage)[-1] / "MANIFEST.json").read_text())
    return {name: record["sha256"] for name, record in manifest["files"].items() if name != "training.json"}


def status(directory: Path, stage: str = "pretrain") -> dict[str, Any]:
    """status.json of a stage."""
    return json.loads((directory / "run" / stage / "status.json").read_text())


def metrics(directory: Path) -> list[dict[str, Any]]:
    """What the training has logged."""
    return [json.loads(line) for line in (directory / "run/pretrain/metrics.jsonl").read_text().splitlines()]


def quick_first(
    cases: Sequence[Any], is_quick: Callable[[Any], bool], is_long: Callable[[Any], bool] = lambda case: False
) -> list[Any]:
    """Parameters of a test: the quick ones as they are, the others marked `full` or, being long rounds, `fault`."""
    parameters = []
    for case in cases:
        marks = () if is_quick(case) else pytest.mark.fault if is_long(case) else pytest.mark.full
        parameters.append(pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks))
    return parameters


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Returns as soon as the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def running(directory: Path, **options: Any) -> Iterator[Run]:
    """`start`, with nothing left behind whatever happens."""
    started = start(directory, **options)
    try:
        yield started
    finally:
        started.kill()
