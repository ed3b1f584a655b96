"""Checks the command that starts a run, before it starts.

With a hostfile that does not exist, DeepSpeed trains on this machine alone and says nothing. Over ssh it puts
arguments, exported variables and paths into a shell line on every node, unquoted: a value with a `;` would be executed.
Each mistake is a `UserError` that names the line, the argument or the variable.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from instance_ssl.errors import UserError

_HOST_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=([1-9][0-9]*)")
# Characters without a meaning to any shell.
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]")
# Prefixes of the variables that DeepSpeed exports to the nodes, besides those in .deepspeed_env.
_EXPORTED = ("MLFLOW", "MV2", "NCCL", "PYTHON", "UCX")
# The hostfile that `deepspeed` reads by default.
_DEFAULT_HOSTFILE = Path("/job/hostfile")


@dataclass(frozen=True)
class Launch:
    """A parsed command of `deepspeed` or `torchrun`.

    Attributes:
        passes_signals_on: whether the launcher itself signals the ranks of this machine.
        uses_ssh: whether other nodes, if any, are reached over ssh.
        script: the runner and its own arguments.
    """

    command: Sequence[str]
    hostfile: Path | None
    uses_ssh: bool
    passes_signals_on: bool
    script: Sequence[str]

    @property
    def run_directory(self) -> Path | None:
        """The value of --run-dir, or None."""
        for place, argument in enumerate(self.script):
            if argument == "--run-dir" and place + 1 < len(self.script):
                return Path(self.script[place + 1])
            if argument.startswith("--run-dir="):
                return Path(argument.partition("=")[2])
        return None


def take_apart(command: Sequence[str]) -> Launch:
    """Parses a command line, which must start with `deepspeed` or `torchrun` and name a runner."""
    name = Path(command[0]).name if command else ""
    if name not in ("deepspeed", "torchrun") and "torch.distributed.run" not in command[1:4]:
        raise UserError(
            "give the whole command that starts the run: supervise.py … deepspeed … runners/pretrain.py …, or torchrun"
        )
    place = next((place for place, word in enumerate(command) if word.endswith(".py")), None)
    if place is None:
        raise UserError(f"the command names no runner, a file that ends in .py: {' '.join(command)}")
    flags, script = command[1:place], command[place:]
    if name != "deepspeed":
        return Launch(command, hostfile=None, uses_ssh=False, passes_signals_on=True, script=script)
    hostfile = given_hostfile(flags) or (_DEFAULT_HOSTFILE if _DEFAULT_HOSTFILE.exists() else None)
    uses_ssh = "--no_ssh" not in flags
    return Launch(command, hostfile=hostfile, uses_ssh=uses_ssh, passes_signals_on=False, script=script)


def given_hostfile(flags: Sequence[str]) -> Path | None:
    """Returns the last hostfile among the launcher's flags, in any spelling that argparse accepts."""
    found = None
    for flag, following in zip(flags, (*flags[1:], ""), strict=False):
        name, equals, value = flag.partition("=")
        if len(name) >= len("--ho") and "--hostfile".startswith(name):
            found = Path(value if equals else following)
        elif flag.startswith("-H"):
            found = Path(flag[2:] or following)
    return found


def check_launch(launch: Launch, environment: Mapping[str, str]) -> None:
    """Refuses a launch that would not do what the user asked, given the launcher's environment."""
    if launch.hostfile is None or len(read_hostfile(launch.hostfile)) < 2 or not launch.uses_ssh:
        return
    for argument in launch.script:
        _require_plain(argument, f"the argument {argument}")
    for path in (os.getcwd(), sys.executable):
        _require_plain(path, f"the path {path}")
    for name, value in environment.items():
        if name.startswith(_EXPORTED):
            _require_plain(value, f"the variable {name}={value}")
    for directory in (Path.cwd(), Path.home()):
        exports = directory / ".deepspeed_env"
        if exports.is_file():
            for number, line in enumerate(_read_lines(exports, str(exports)), start=1):
                if "=" not in line:
                    raise UserError(f"{exports}, line {number}: expected NAME=value")
                _require_plain(line, f"{exports}, line {number}: {line}")


def read_hostfile(path: Path) -> dict[str, int]:
    """Reads the number of ranks of each host, from lines `host slots=N`."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(_read_lines(path, f"--hostfile {path}"), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if (match := _HOST_LINE.fullmatch(text)) is None:
            raise UserError(f"--hostfile {path}, line {number}: expected `host slots=N`, found {text!r}")
        host, slots = match.groups()
        if host in hosts:
            raise UserError(f"--hostfile {path}, line {number}: duplicate host {host}")
        if len(slots) > 6:
            raise UserError(f"--hostfile {path}, line {number}: {slots[:12]} slots are too many")
        hosts[host] = int(slots)
    if not hosts:
        raise UserError(f"--hostfile {path} names no host")
    return hosts


def _read_lines(path: Path, what: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what}: {error.strerror if isinstance(error, OSError) else 'not text'}") from None


def _require_plain(text: str, what: str) -> None:
    if strange := next((character for character in text if _PLAIN.fullmatch(character) is None), None):
        raise UserError(
            f"{what} holds {strange!r}, which the nodes' shells would interpret, and DeepSpeed does not quote: "
            "put settings into the YAML file, and keep paths and variables plain"
        )
