"""The READMEs are true: every link leads somewhere, every function exists, every path is there."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from processes import run_bare

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("runs", "build") for part in path.relative_to(ROOT).parts)
)
FRONT_DOORS = [path for path in PAGES if path.name == "README.md"]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
FUNCTION = re.compile(r"^`([\w/]+\.py):([\w.]+)`$")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def defined_in(path: Path) -> set[str]:
    """Functions, classes and methods of a file, methods as Class.method."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()}
    for _, target in LINK.findall(text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        if path:
            assert (page.parent / path).exists(), f"{name_of(page)}: {target} does not exist"
        else:
            assert anchor in anchors, f"{name_of(page)}: no heading {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_function_that_is_linked_to_exists(page: Path) -> None:
    for text, target in LINK.findall(page.read_text()):
        if (match := FUNCTION.match(text)) is not None:
            file = (page.parent / target).resolve()
            assert name_of(file).endswith(match[1]), f"{name_of(page)}: {text} links to {target}"
            assert match[2] in defined_in(file), f"{name_of(page)}: {match[1]} has no {match[2]}"


# Files and folders that runs write; they are not part of the project.
WRITTEN_BY_RUNS = {
    "config.yaml", "ds_config.json", "environment.json", "status.json", "result.json", "training.json", "data.json",
    "tensorboard", "checkpoints", "trainings", "table.json", "table.md", "MANIFEST.json", "points.json",
    "left_out_steps.json", "model_card.json", "data.md", "train2018.json", "val2018.json",
}  # fmt: skip


@pytest.mark.parametrize("page", FRONT_DOORS, ids=name_of)
def test_every_path_that_is_named_exists(page: Path) -> None:
    """`code` that looks like a file or a folder of this project is the end of the path of one."""
    places = [f"/{name_of(path)}" for path in ROOT.rglob("*") if ".git" not in path.parts]
    for path in re.findall(r"`([\w/]+(?:\.(?:py|yaml|json|md)|/))`", page.read_text()):
        path = path.rstrip("/")
        written_by_runs = path.startswith("D/") or path.split("/")[-1] in WRITTEN_BY_RUNS
        assert written_by_runs or any(place.endswith(f"/{path}") for place in places), f"{name_of(page)}: {path}"


def runner_commands(page: Path) -> list[list[str]]:
    """The runners that a page's bash blocks start, each with its arguments; what a launcher is given is not in them.

    Examples take no arguments; `tests/runners/test_examples.py` runs them.
    """
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in re.split(r"\n|&&|;", block.replace("\\\n", " ")):
            words = [word for word in shlex.split(line, comments=True) if "…" not in word]
            starts = [place for place, word in enumerate(words) if re.match(r"runners/(?!examples/).*\.py$", word)]
            if starts and not any("$" in word for word in words):
                commands += [words[start:] for start in starts]
    return commands


COMMANDS = [(page, command) for page in FRONT_DOORS for command in runner_commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value[0] if isinstance(value, list) else None)
def test_every_command_is_one_that_its_runner_takes(page: Path, command: list[str]) -> None:
    """Its flags, and the configuration keys that it sets, by the runner's own parser."""
    finished = run_bare(str(ROOT / "tests/parse_only"), *command)
    assert finished.returncode == 0, f"{name_of(page)}: {shlex.join(command)}\n{finished.stderr}"


def test_the_front_door_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
