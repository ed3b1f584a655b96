"""A training under a real launcher, for tests that harm the launcher or its ranks."""

import subprocess
from pathlib import Path

import psutil
from injection import environment as ordering
from processes import ROOT, cpu_environment
from rig import wait_for

from instance_ssl.run.watchdog import is_launcher


class Launched:
    """Two ranks in `place`, slowed down so that there is time to harm them.

    Attributes:
        runner: the command that was started.
        launch: the launcher right above the ranks; of `deepspeed` it is a child of the command.
        ranks: in order of their start.
        output: the file that all write to.
    """

    def __init__(self, place: Path, command: list[str]) -> None:
        self.output, self.record = place / "launched.txt", place / "fault.txt"
        environment = cpu_environment() | ordering("step:*:*:sleep=0.15", self.record)
        with self.output.open("w") as output:
            self.runner = subprocess.Popen(
                command, cwd=ROOT, env=environment, start_new_session=True, stdout=output, stderr=output
            )
        wait_for((place / "run/pretrain/metrics.jsonl").exists, 90)
        assert self.record.exists()
        tree = psutil.Process(self.runner.pid).children(recursive=True)
        self.all = [psutil.Process(self.runner.pid), *tree]
        self.ranks = [p for p in tree if not is_launcher(p) and is_launcher(psutil.Process(p.ppid()))]
        self.launch = psutil.Process(self.ranks[0].ppid())

    def leftovers(self) -> list[psutil.Process]:
        """The processes of this start that still run."""
        return [p for p in self.all if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def all_gone(self) -> bool:
        """Whether none of them does."""
        self.runner.poll()
        return not self.leftovers()

    def kill(self) -> None:
        """Ends what is left, whatever happened."""
        for process in self.leftovers():
            process.kill()
        self.runner.wait()
