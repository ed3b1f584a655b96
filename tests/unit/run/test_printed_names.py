"""Names from outside are printed as what they are, and never act on the terminal."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from instance_ssl.config.experiment import load_config
from instance_ssl.data.image_sources import read_instances
from instance_ssl.errors import UserError, escape, unescape
from instance_ssl.files.atomic import write_lines
from instance_ssl.report.command import main as report
from instance_ssl.run.console import ArgumentParser, complain, exit_code_of, show_traceback
from instance_ssl.run.log import RunLog

ROOT = Path(__file__).parents[3]
HOSTILE = {
    "colour": "\x1b[31mred",
    "title of the window": "\x1b]0;owned\x07",
    "C1": "\x9b2J",
    "carriage return": "good\rerror: bad",
    "newline": "a\nerror: no such thing",
    "backspace and delete": "ab\b\x7f",
    "turned round": "photo\u202egpj.exe",
    "isolate": "\u2066x\u2069",
    "not seen": "a\u200bb\ufeffc",
    "line separator": "a\u2028b\u2029c\x85d",
    "no text": "\udcff\udc80",
    "tag": "\U000e0041",
    "backslash": "a\\x1bb\\n",
}


def is_tame(text: str) -> bool:
    """Whether every character but the newline between lines is one that shows."""
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_name_is_escaped_into_one_line_and_back(name: str) -> None:
    assert escape(name).isprintable()
    assert unescape(escape(name)) == name


@pytest.mark.parametrize("name", ["photo 1.jpg", "b語.png", "Ünïcödé", "a　b", "🐈.png"])
def test_a_plain_name_stays(name: str) -> None:
    assert escape(name) == name


def test_lists_from_before_are_read_as_they_were_meant() -> None:
    """Only newlines, carriage returns and backslashes used to be written as escapes."""
    assert unescape("a\\\\x1b\\n\\r\x1b") == "a\\x1b\n\r\x1b"


def test_a_list_of_names_has_a_printable_line_for_each(tmp_path: Path) -> None:
    write_lines((escape(name) for name in HOSTILE.values()), tmp_path / "names.txt")
    assert list(read_instances(tmp_path / "names.txt")) == list(HOSTILE.values())
    lines = (tmp_path / "names.txt").read_text().split("\n")
    assert len(lines) == len(HOSTILE) + 1
    assert all(line.isprintable() for line in lines)


def say(name: str) -> None:
    RunLog(is_main=True).say(f"warning: {name}; its class is left out")


def refuse(name: str) -> None:
    def tool() -> None:
        raise UserError(f"{name} is not a folder")

    assert exit_code_of(tool) == 2


def end_with_a_traceback(name: str) -> None:
    try:
        raise RuntimeError(f"unexpected {name}")
    except RuntimeError as error:
        show_traceback(error)


def show_progress(name: str) -> None:
    log = RunLog(is_main=True)
    with log.progress(name, 2, "images") as progress:
        log.say(progress._line())


SAYINGS: list[Callable[[str], None]] = [say, complain, refuse, end_with_a_traceback, show_progress]


@pytest.mark.parametrize("saying", SAYINGS, ids=lambda saying: saying.__name__)
def test_no_printed_line_acts_on_the_terminal(saying: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    for name in HOSTILE.values():
        saying(name)
        output = "".join(capfd.readouterr())
        assert output
        assert is_tame(output), repr(output)
        if saying is not end_with_a_traceback:
            assert output.count("\n") == 1


def test_an_unknown_argument_is_shown_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: ArgumentParser().parse_args(["\x1b[31m--oops"]) and None) == 2
    assert is_tame(capfd.readouterr().err)


@pytest.mark.parametrize(
    "override", ["a\x1b[31m=1", "data.root\x9b=x", "data.kind=\u202eredlof", "\x1b[2J", 'data.kind="\\e[31m"']
)
def test_a_mistake_in_a_setting_is_shown_escaped(
    override: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("")
    assert exit_code_of(lambda: load_config(tmp_path / "c.yaml", [override]) and None) == 2
    assert is_tame(capfd.readouterr().err)


def test_a_report_of_a_run_with_a_hostile_name_shows_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run\x1b[31m\udcff"
    (run / "pretrain").mkdir(parents=True)
    (run / "pretrain/status.json").write_text('{"state": "failed", "reason": "\\u001b[31m\\u202e"}')
    assert report([str(run)]) == 0
    assert is_tame("".join(capfd.readouterr()))
    assert is_tame((run / "report.html").read_text().replace("\t", ""))


def test_nothing_is_printed_but_by_the_console_module() -> None:
    """Else this file proves little: `print`, the streams and argparse's own parser are used nowhere else."""
    found = []
    for path in [*(ROOT / "instance_ssl").rglob("*.py"), *(ROOT / "runners").glob("*.py")]:
        if path.name == "console.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                if call in (
                    "print",
                    "sys.stdout.write",
                    "sys.stderr.write",
                    "argparse.ArgumentParser",
                    "warnings.warn",
                ):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {call}")
    assert found == []
