"""Pretraining, embedding and export as functions: each starts a runner and waits for it.

A runner is a process of its own, so that a notebook keeps its memory, its signals and its process groups, and several
ranks are as easy as one. What the runner prints is printed here. Needs the project's checkout, whose runners it starts.
"""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instance_ssl.errors import EXIT_USER_ERROR, UserError
from instance_ssl.run.console import tell

if TYPE_CHECKING:
    import numpy as np

_ROOT = Path(__file__).resolve().parents[1]
_FOLDER = _ROOT / "runners/configs/pipeline_folder.yaml"
_AUTO_JSON = _ROOT / "ds_configs/auto.json"
_EXIT_STOPPED = 75
_LAST_LINES = 20


class RunError(RuntimeError):
    """A run ended before its end: it was stopped, or failed for another reason than a user's mistake.

    Attributes:
        exit_code: 75 for a stop, after which the same call resumes; runners/README.md lists the others.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def pretrain(
    data: str | Path,
    run_dir: str | Path,
    *,
    backbone: str | None = None,
    config: str | Path = _FOLDER,
    deepspeed_config: str | Path = _AUTO_JSON,
    ranks: int = 1,
    **settings: Any,
) -> Path:
    """Pretrains on a folder of images, and evaluates where it has labels; the same call resumes.

    Args:
        data: the folder, `data.root`.
        backbone: `model.backbone`; None: the config's.
        config: experiment YAML; by default everything that depends on images and machine is chosen for them.
        deepspeed_config: DeepSpeed JSON; by default float32 with the largest micro-batch that fits the memory.
        ranks: processes to start, one a GPU.
        settings: further keys of the configuration, by section, `optimization={"epochs": 10}`, or dotted in a dict:
            `**{"optimization.epochs": 10}`.

    Returns:
        The run directory.

    Raises:
        UserError: for a mistake in the arguments, the images or the settings.
        RunError: the run was stopped or failed.
    """
    run_dir = Path(run_dir)
    keys = {"data.root": str(Path(data).expanduser().resolve()), **dict(_dotted(settings))}
    if backbone is not None:
        keys["model.backbone"] = backbone
    flags = ["--config", str(config), "--deepspeed_config", str(deepspeed_config), "--run-dir", str(run_dir)]
    _run("pipeline", [*flags, "--set", *_overrides(keys)], ranks)
    return run_dir


def embed(run_dir: str | Path, images: str | Path, *, source: str = "trained") -> "tuple[np.ndarray, list[str]]":
    """Features (N, F), float32, of every image below a folder, by the run's backbone, and the images' names (N).

    They are kept in `run_dir/export/images`; the same call on the same images takes no second pass.

    Args:
        source: `export.source`: trained or random.

    Raises:
        UserError: the run has no encoder, or an image cannot be read.
        RunError: it was stopped or failed.
    """
    import numpy as np

    keys = {"export.images": str(Path(images).expanduser().resolve()), "export.formats": [], "export.source": source}
    _run("export", _flags_of(Path(run_dir), keys))
    folder = Path(run_dir) / "export/images"
    return np.load(folder / "features.npy"), (folder / "names.txt").read_text(encoding="utf-8").splitlines()


def export(
    run_dir: str | Path, formats: Sequence[str] = ("pth", "safetensors", "hub"), *, source: str = "trained"
) -> Path:
    """Writes the run's backbone for others and returns the directory of the files, which a model card describes.

    Args:
        formats: `export.formats`: pth, safetensors, hub (timm's local directory and the Hugging Face Hub's layout),
            detectron2, onnx.
        source: `export.source`: trained or random.

    Raises:
        UserError: the run has no encoder, or a format needs a package that is not installed.
        RunError: it was stopped or failed.
    """
    _run("export", _flags_of(Path(run_dir), {"export.formats": list(formats), "export.source": source}))
    return Path(run_dir) / "export"


def _flags_of(run_dir: Path, keys: Mapping[str, Any]) -> list[str]:
    """The flags of a stage that reads a run."""
    stages = ("pretrain", "initialize_classifier")
    config = next((path for stage in stages if (path := run_dir / stage / "config.yaml").exists()), None)
    if config is None:
        raise UserError(f"{run_dir} is not the directory of a run: it has no pretrain/config.yaml")
    return ["--config", str(config), "--run-dir", str(run_dir), "--set", *_overrides(keys)]


def _dotted(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _overrides(keys: Mapping[str, Any]) -> list[str]:
    """Keys and values as `--set` takes them: JSON is YAML."""
    return [f"{key}={json.dumps(str(value) if isinstance(value, Path) else value)}" for key, value in keys.items()]


def _run(runner: str, arguments: Sequence[str], ranks: int = 1) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(_ROOT / f"runners/{runner}.py"), *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as errors:
        code = _wait(command, errors)
        errors.seek(0)
        lines = [line.rstrip("\n") for line in errors if line.strip()]
    if code == 0:
        return
    mistakes = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    if mistakes and (code == EXIT_USER_ERROR or ranks > 1):
        raise UserError(mistakes[0])
    if code == _EXIT_STOPPED:
        raise RunError("stopped; the same call resumes", code)
    raise RunError("\n".join([f"runners/{runner}.py ended with exit code {code}", *lines[-_LAST_LINES:]]), code)


def _wait(command: Sequence[str], errors: Any) -> int:
    """Runs a command in a session of its own and prints what it prints; an interrupt lets it save and stop."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="backslashreplace", start_new_session=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            tell(line.rstrip("\n"))
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
