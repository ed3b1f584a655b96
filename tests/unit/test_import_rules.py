"""Who may import whom: every import of every file is checked; an exception is listed with its reason, or an error."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "instance_ssl"
RUNNERS = sorted((ROOT / "runners").rglob("*.py"))
FILES = sorted(PACKAGE.rglob("*.py")) + RUNNERS
# Modules beside the runners are imported by plain names, which pytest finds wherever it is.
PLAIN_NAMES = {path.stem for path in RUNNERS}

# Room → the rooms that it may import, besides itself.
LAYERS: dict[str, set[str]] = {"errors": set(), "files": {"errors"}, "config": {"errors", "files"}}
LAYERS["distributed"] = {"errors"}
LAYERS["models"] = {"errors"}
LAYERS["data"] = {"errors", "files"}
LAYERS["classifier"] = {"errors", "files", "distributed"}
LAYERS["checkpoint"] = {"errors", "files", "distributed", "models", "classifier"}
LAYERS["training"] = {"errors", "config", "distributed", "models", "data", "classifier", "checkpoint"}
LAYERS["run"] = LAYERS["training"] | {"files", "training"}
LAYERS["evaluation"] = LAYERS["run"] | {"run"}
LAYERS["report"] = LAYERS["evaluation"] | {"evaluation"}
LAYERS["stages"] = LAYERS["evaluation"] | {"evaluation"}
LAYERS["api"] = {"errors", "run"}

# What every room may take from the configuration: names and constants, no settings.
CHOICES = "instance_ssl.config.choices"

# Module of a library → the only files or folders that may import it.
RESERVED: dict[str, tuple[str, ...]] = {
    "deepspeed": ("instance_ssl/training/engine.py",),
    # The examples are loops of somebody else.
    "torch.distributed": ("instance_ssl/distributed/comm.py", "runners/examples/"),
    "tensorboard": ("instance_ssl/run/log.py",),
    "torch.utils.tensorboard": (),
    # Published weights hold a Namespace, which `weights.py` lets torch build.
    "argparse": ("instance_ssl/run/", "instance_ssl/checkpoint/weights.py", "runners/"),
}
# Who may read the environment: a process's own start and end, and what the launcher said.
READS_ENVIRONMENT = ("instance_ssl/run/", "instance_ssl/distributed/comm.py", "instance_ssl/distributed/launched.py")
READS_ENVIRONMENT += ("runners/supervise.py", "runners/examples/")
# What a process imports before it has checked its command line: nothing here may import these at its top.
HEAVY = ("torch", "torchvision", "deepspeed", "tensorboard", "matplotlib", "numpy")
LIGHT = ("instance_ssl/__init__.py", "instance_ssl/errors.py", "instance_ssl/files/", "instance_ssl/config/")


def imports_of(path: Path) -> set[str]:
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in names_in(node)}


def names_in(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    room = None if name.startswith("runners/") else room_of(path)
    for imported in imports_of(path):
        for module, allowed in RESERVED.items():
            if imported == module or imported.startswith(module + "."):
                assert name.startswith(allowed), f"{name} imports {imported}"
        first, *rest = imported.split(".")
        assert first != "runners", f"{name} imports a runner"
        assert room is None or first not in PLAIN_NAMES, f"{name} imports {first} from runners/"
        if first != "instance_ssl" or room is None or room == "__init__":
            continue
        allowed = LAYERS[room] | {room}
        fine = rest[0] in allowed or imported.startswith(CHOICES)
        assert fine, f"{name} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_these_files_read_the_environment(path: Path) -> None:
    reads = any(
        isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        for node in ast.walk(ast.parse(path.read_text()))
    )
    assert not reads or str(path.relative_to(ROOT)).startswith(READS_ENVIRONMENT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_ground_floor_imports_nothing_heavy(path: Path) -> None:
    """torch is imported by functions that need it there, and for types."""
    if str(path.relative_to(ROOT)).startswith(LIGHT):
        tops = {name.split(".")[0] for node in ast.parse(path.read_text()).body for name in names_in(node)}
        assert not tops & set(HEAVY)


def test_plain_names_are_unique_and_hide_no_module_of_python() -> None:
    names = [path.stem for path in RUNNERS]
    assert sorted(names) == sorted(set(names))
    assert not set(names) & sys.stdlib_module_names


@pytest.mark.parametrize("path", RUNNERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_runner_is_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 80 or "__main__" not in text


def test_no_message_sends_to_a_registry_for_this_project() -> None:
    """It is installed from its folder; whatever a registry may have under its name is somebody else's."""
    guilty = [str(path) for path in FILES if re.search(r"pip install [\"']?instance_ssl", path.read_text())]
    assert guilty == []
