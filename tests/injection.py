"""Faults on demand, done to the package from outside: `INSTANCE_SSL_FAULT=point:rank:step:action`.

`install` wraps the function that the point lies in or beside. Rank and step are numbers or `*`. Actions: `kill`
(SIGKILL), `freeze` (SIGSTOP), `term` (SIGTERM), `sleep=SECONDS`, `disk-full`; `nan` at `step`, `spike` at `loss`.

    start               as the process begins
    step                a micro-batch is on the device, the encoder has not seen it; `nan`: its pixels become NaN
    loss                after an optimizer step; `spike`: the loss that is reported is 10,000 times as large
    hard_classes        a block of the search for the hardest classes is done; the step is the epoch's first
    save.before         in the thread that writes a checkpoint, before this rank's first file
    save.mid            the first bytes of each of this rank's files are on the disk
    save.before_commit  all files are whole, the manifest is not begun; rank 0
    commit.mid          the directory is renamed, its parent not yet synced; rank 0
    initialize          a batch of the initialisation is done, and not counted yet; the step is the batches before it
    evaluate            a batch of features is done
    fine_tune           before a step of a labelled training

A fault that is carried out is written to the file `INSTANCE_SSL_FAULT_RECORD`, so that a test can tell that its point
was reached.
"""

import errno
import inspect
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ORDER, RECORD = "INSTANCE_SSL_FAULT", "INSTANCE_SSL_FAULT_RECORD"
_SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "term": signal.SIGTERM}
_WRITING = ".writing-step_"


def install() -> None:
    """Wraps what the ordered fault needs; call it in a rank's process before its work begins.

    Raises:
        ValueError: an order that names no point or action.
    """
    if (order := os.environ.get(ORDER)) is None:
        return
    point, _, _, action = order.split(":", 3)
    known = action in (*_SIGNALS, "disk-full", {"step": "nan", "loss": "spike"}.get(point)) or action[:6] == "sleep="
    if point not in POINTS or not known:
        raise ValueError(f"{ORDER}={order} names no point or action")
    POINTS[point]()


def environment(order: str | None, record: Path) -> dict[str, str]:
    """The variables that order a fault."""
    return {} if order is None else {ORDER: order, RECORD: str(record)}


def _reach(point: str, step: int = 0) -> str | None:
    """Carries out the fault if it is ordered for this point, rank and step; returns its action then, or else None."""
    ordered_point, at_rank, at_step, action = os.environ[ORDER].split(":", 3)
    rank = os.environ.get("RANK", "0")
    if ordered_point != point or at_rank not in ("*", rank) or at_step not in ("*", str(step)):
        return None
    Path(os.environ[RECORD]).write_text(f"{point}:{rank}:{step}:{action}\n")
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    elif action.startswith("sleep="):
        time.sleep(float(action.removeprefix("sleep=")))
    elif action == "disk-full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return action


def _before(owner: Any, name: str, reach: Callable[..., object]) -> None:
    """`owner.name` calls `reach` with its own arguments first."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        reach(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def _before_callback(owner: Any, name: str, callback: str, reach: Callable[[dict[str, Any]], object]) -> None:
    """Before each call of `owner.name`'s argument `callback`, calls `reach` with all arguments by name."""
    original = getattr(owner, name)
    signature = inspect.signature(original)
    assert callback in signature.parameters, f"{name} has no {callback} any more"

    def wrapped(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        call_back = bound.arguments[callback]

        def reached(*values: Any) -> Any:
            reach(bound.arguments)
            return call_back(*values)

        bound.arguments[callback] = reached
        return original(*bound.args, **bound.kwargs)

    setattr(owner, name, wrapped)


def _at_start() -> None:
    _reach("start")


def _in_steps() -> None:
    import torch

    from instance_ssl.training.engine import Engine

    original = Engine.__call__

    def call(self: Engine, images: torch.Tensor) -> torch.Tensor:
        if _reach("step", self.steps_taken) == "nan":
            images = torch.full_like(images, torch.nan)
        return original(self, images)

    Engine.__call__ = call  # type: ignore[method-assign]


def _at_losses() -> None:
    from instance_ssl.training import step

    original = step.train_step

    def train_step(engine: Any, *arguments: Any, **options: Any) -> Any:
        number = engine.steps_taken
        report = original(engine, *arguments, **options)
        return replace(report, loss=report.loss * 1e4) if _reach("loss", number) == "spike" else report

    step.train_step = train_step


def _in_hard_classes() -> None:
    from instance_ssl.classifier.shard import ClassifierShard

    def reach(arguments: dict[str, Any]) -> None:
        _reach("hard_classes", arguments["self"].steps_taken)

    _before_callback(ClassifierShard, "refresh_hard_classes", "on_block", reach)


def _before_saves() -> None:
    from instance_ssl.checkpoint.directory import DirectoryWriter

    original = DirectoryWriter.start

    def start(self: Any, step: int, files: Any, find_problem: Callable[[], str | None] = lambda: None) -> None:
        def find() -> str | None:
            problem = find_problem()
            if problem is None:
                _reach("save.before", step)
            return problem

        original(self, step, files, find)

    DirectoryWriter.start = start  # type: ignore[method-assign]


def _in_saves() -> None:
    from instance_ssl.checkpoint import directory

    original = directory.HashingFile.__init__

    def __init__(self: Any, file: Any) -> None:
        path = Path(file.name)
        if path.parent.name.startswith(_WRITING) and path.name != directory.MANIFEST:
            file = _Begun(file, int(path.parent.name.removeprefix(_WRITING)))
        original(self, file)

    directory.HashingFile.__init__ = __init__  # type: ignore[method-assign]


class _Begun:
    """A file that reaches `save.mid` once its first bytes are on the disk."""

    def __init__(self, file: Any, step: int) -> None:
        self._file, self._step, self._reached = file, step, False

    def write(self, data: Any) -> int:
        count = self._file.write(data)
        if not self._reached:
            self._reached = True
            self._file.flush()
            _reach("save.mid", self._step)
        return count

    def flush(self) -> None:
        self._file.flush()


def _before_commits() -> None:
    from instance_ssl.checkpoint import directory

    def reach(path: Path, content: object) -> None:
        if path.name == directory.MANIFEST:
            _reach("save.before_commit", int(path.parent.name.removeprefix(_WRITING)))

    _before(directory, "write_file", reach)


def _in_commits() -> None:
    original = os.rename

    def rename(source: Any, target: Any, **options: Any) -> None:
        original(source, target, **options)
        name = Path(os.fsdecode(source)).name
        if name.startswith(_WRITING):
            _reach("commit.mid", int(name.removeprefix(_WRITING)))

    os.rename = rename


def _in_initialisations() -> None:
    from instance_ssl.stages import initialize_classifier

    done = 0

    def reach(arguments: dict[str, Any]) -> None:
        nonlocal done
        _reach("initialize", arguments["batches_done"] + done)
        done += 1

    _before_callback(initialize_classifier, "initialize_from_features", "on_batch", reach)


def _in_evaluations() -> None:
    from instance_ssl.evaluation import frozen_encoder
    from instance_ssl.stages import export

    for owner, name in ((frozen_encoder, "extract_features"), (export, "append_features")):
        _before_callback(owner, name, "on_batch", lambda _: _reach("evaluate"))


def _in_fine_tuning() -> None:
    from instance_ssl.data.loaders import PartLoader
    from instance_ssl.evaluation import labelled_training

    steps_per_epoch = 0

    def note(_backbone: Any, data: Any, *_: Any, **__: Any) -> None:
        nonlocal steps_per_epoch
        steps_per_epoch = data.steps_per_epoch

    _before(labelled_training, "fine_tune", note)
    original = PartLoader.epoch

    def epoch(self: PartLoader, epoch: int, parts: Any) -> Iterator[Any]:
        for step, part in enumerate(original(self, epoch, parts), start=epoch * steps_per_epoch):
            _reach("fine_tune", step)
            yield part

    PartLoader.epoch = epoch  # type: ignore[method-assign]


POINTS = {
    "start": _at_start,
    "step": _in_steps,
    "loss": _at_losses,
    "hard_classes": _in_hard_classes,
    "save.before": _before_saves,
    "save.mid": _in_saves,
    "save.before_commit": _before_commits,
    "commit.mid": _in_commits,
    "initialize": _in_initialisations,
    "evaluate": _in_evaluations,
    "fine_tune": _in_fine_tuning,
}
