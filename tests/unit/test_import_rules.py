"""Who may import whom: the layers hold because this test reads every import."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "instance_ssl").rglob("*.py")) + sorted((ROOT / "runners").glob("*.py"))

# Folder → the parts of the package it may import (besides itself).
LAYERS = {
    "data": {"disk_space", "errors", "structured_files"},
    "models": {"errors"},
    "distributed": {"awake", "errors"},
    "classifier": {"distributed", "errors", "ordering"},
    "benchmarks": {"distributed", "data", "classifier", "checkpoint", "checkpoint_files", "errors"},
    "evaluation": {"distributed", "data", "models", "classifier", "errors", "ordering"},
    "ablation": {"config", "config_errors", "config_types", "console", "errors", "run_directory"},
    "report": {
        "checkpoint_files",
        "config",
        "console",
        "data",
        "disk_space",
        "errors",
        "evaluation",
        "images",
        "run_directory",
        "schedules",
        "structured_files",
    },
}
# Module → the only files that may import it.
RESERVED = {
    "deepspeed": {"instance_ssl/engine.py", "instance_ssl/launch_checks.py"},
    "torch.distributed": {"instance_ssl/distributed/comm.py"},
    "tensorboard": {"instance_ssl/run_log.py"},
    "torch.utils.tensorboard": set(),
    "argparse": {
        "instance_ssl/console.py",
        "instance_ssl/report/command.py",
        "instance_ssl/stages/arguments.py",
        "instance_ssl/stages/context.py",
        "instance_ssl/stages/plan.py",
        "instance_ssl/stages/show_views.py",
        "instance_ssl/weights.py",  # a command line's values may lie in a file of weights
        "runners/ablate.py",
        "runners/benchmark_checkpoint.py",
        "runners/benchmark_classifier.py",
        "runners/benchmark_data.py",
        "runners/benchmark_hard_classes.py",
        "runners/pack_dataset.py",
        "runners/supervise.py",
    },
}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    folder = path.parent.name if path.parent.name in LAYERS else None
    for imported in imports_of(path):
        for module, allowed in RESERVED.items():
            if imported == module or imported.startswith(module + "."):
                assert name in allowed, f"{name} imports {imported}"
        parts = imported.split(".")
        assert parts[0] != "runners", f"{name} imports a runner"
        if name.startswith("runners/") and parts[0] == "instance_ssl":
            continue
        if folder is not None and parts[0] == "instance_ssl":
            assert parts[1] in LAYERS[folder] | {folder}, f"{name} imports {imported}"
        if not name.startswith(("runners/", "instance_ssl/stages/")):
            assert not imported.startswith("instance_ssl.stages"), f"{name} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_these_files_read_the_environment(path: Path) -> None:
    reads = any(
        isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        for node in ast.walk(ast.parse(path.read_text()))
    )
    assert not reads or path.name in ("comm.py", "context.py", "faults.py", "supervise.py")


def test_no_message_sends_to_a_registry_for_this_project() -> None:
    """It is installed from its folder; whatever a registry may have under its name is somebody else's."""
    guilty = [str(path) for path in FILES if re.search(r"pip install [\"']?instance_ssl", path.read_text())]
    assert guilty == []
