"""What is looked at before DeepSpeed's launcher starts anything, since it would start something wrong in silence.

A hostfile that does not exist makes it train on this machine alone. Over ssh it puts arguments, exported variables and
paths into a shell line on every node, unquoted: a value with a `;` in it would be run there. So both are checked here.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepspeed.launcher.runner import DLTS_HOSTFILE, parse_args

from instance_ssl.errors import UserError

_HOST_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=([1-9][0-9]*)")
# What no shell gives a meaning to.
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]*")
# Beginnings of the names that DeepSpeed exports to the nodes, besides what .deepspeed_env names.
_EXPORTED = ("MLFLOW", "MV2", "NCCL", "PYTHON", "UCX")
_ENVIRONMENT_FILE = ".deepspeed_env"


@dataclass(frozen=True)
class Launch:
    """A `deepspeed` command, taken apart.

    Attributes:
        command: as given.
        hostfile: what follows --hostfile, or None.
        uses_ssh: whether nodes are reached over ssh, were there several.
        script: the runner and its own arguments.
    """

    command: Sequence[str]
    hostfile: Path | None
    uses_ssh: bool
    script: Sequence[str]

    @property
    def run_directory(self) -> Path | None:
        """What follows --run-dir, or None."""
        for place, argument in enumerate(self.script):
            if argument == "--run-dir" and place + 1 < len(self.script):
                return Path(self.script[place + 1])
            if argument.startswith("--run-dir="):
                return Path(argument.partition("=")[2])
        return None


def take_apart(command: Sequence[str]) -> Launch:
    """Reads a command line that begins with `deepspeed`.

    Raises:
        UserError: when it does not.
    """
    if not command or Path(command[0]).name != "deepspeed":
        raise UserError("give the whole command that starts the run: supervise.py … deepspeed … runners/pretrain.py …")
    arguments = parse_args(list(command[1:]))  # a mistake in the launcher's own flags ends here, with its usage
    hostfile = Path(arguments.hostfile)
    is_default = arguments.hostfile == DLTS_HOSTFILE and not hostfile.exists()
    return Launch(
        command,
        hostfile=None if is_default else hostfile,
        uses_ssh=not arguments.no_ssh,
        script=[arguments.user_script, *arguments.user_args],
    )


def check_launch(launch: Launch, environment: Mapping[str, str]) -> None:
    """Refuses a launch that would not do what was asked.

    Raises:
        UserError: naming the hostfile's line, the argument or the variable.
    """
    if launch.hostfile is None:
        return
    hosts = read_hostfile(launch.hostfile)
    if len(hosts) < 2 or not launch.uses_ssh:
        return
    for argument in launch.script:
        _require_plain(argument, f"the argument {argument}")
    for path in (os.getcwd(), sys.executable):
        _require_plain(path, f"the path {path}")
    for name, value in environment.items():
        if name.startswith(_EXPORTED):
            _require_plain(value, f"the variable {name}={value}")
    for directory in (Path.cwd(), Path.home()):
        exports = directory / _ENVIRONMENT_FILE
        if exports.is_file():
            for number, line in enumerate(exports.read_text().splitlines(), start=1):
                if "=" not in line:
                    raise UserError(f"{exports}, line {number}: expected NAME=value")
                _require_plain(line, f"{exports}, line {number}: {line}")


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host.

    Raises:
        UserError: for a missing file or a line that is not `host slots=N`, naming the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"--hostfile {path}: {reason}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _HOST_LINE.fullmatch(text)
        if match is None:
            raise UserError(f"--hostfile {path}, line {number}: expected `host slots=N`, found {text!r}")
        host, slots = match.groups()
        if host in hosts:
            raise UserError(f"--hostfile {path}, line {number}: {host} is there already")
        hosts[host] = int(slots)
    if not hosts:
        raise UserError(f"--hostfile {path} names no host")
    return hosts


def _require_plain(text: str, what: str) -> None:
    if _PLAIN.fullmatch(text) is None:
        strange = next(character for character in text if _PLAIN.fullmatch(character) is None)
        raise UserError(
            f"{what} holds {strange!r}, which the nodes' shells would not take as it is, and DeepSpeed does not quote: "
            "put settings into the YAML file, and keep paths and variables plain"
        )
