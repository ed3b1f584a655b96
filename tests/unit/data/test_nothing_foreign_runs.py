"""No call in the project can be made to run what a file, an archive or a setting holds: this test reads every call."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "instance_ssl").rglob("*.py")) + sorted((ROOT / "runners").glob("*.py"))
# Calls by their last names, and why they are not made.
FORBIDDEN = {
    "yaml.load": "safe_load builds plain values only",
    "yaml.unsafe_load": "safe_load builds plain values only",
    "pickle.load": "a pickle runs what it likes",
    "pickle.loads": "a pickle runs what it likes",
    "tarfile.open": "members may lie outside, or be links or devices",
    "shutil.unpack_archive": "members may lie outside, or be links or devices",
    "os.system": "a shell",
    "os.popen": "a shell",
    "eval": "it runs text",
    "exec": "it runs text",
}


def calls_in(text: str) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield name, {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}


def complaints(text: str) -> list[str]:
    found = []
    for name, keywords in calls_in(text):
        if name in FORBIDDEN:
            found.append(f"{name}: {FORBIDDEN[name]}")
        if "shell" in keywords and ast.unparse(keywords["shell"]) != "False":
            found.append(f"{name}: a shell")
        if name == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True":
            found.append(f"{name}: without weights_only it is a pickle")
        if name.endswith((".extract", ".extractall")):
            found.append(f"{name}: members may lie outside, or be links or devices")
        if name.endswith("Image.open") and "formats" not in keywords:
            found.append(f"{name}: any of Pillow's decoders would do")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_runs_what_is_foreign(path: Path) -> None:
    assert complaints(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "yaml.load(file)",
        "subprocess.run(words, shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "Image.open(path)",
        "tar.extractall(folder)",
        "eval(text)",
    ],
)
def test_the_reader_itself_sees_them(text: str) -> None:
    assert complaints(text)
