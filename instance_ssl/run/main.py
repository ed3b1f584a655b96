"""One process of a run: parse, check, open, run, end.

torch takes seconds to import, so nothing at the top of this module imports it: a mistake in the command line, the YAML,
the JSON or a path is reported at once.
"""

import contextlib
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from instance_ssl.run.arguments import parse_arguments
from instance_ssl.run.console import exit_code_of
from instance_ssl.run.limits import check_limits
from instance_ssl.run.place import take_place
from instance_ssl.run.process import Process, exit_code
from instance_ssl.run.request import read_request
from instance_ssl.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from instance_ssl.distributed.comm import Group
    from instance_ssl.run.stage import Stage


class StageSpec(NamedTuple):
    """A stage that a runner offers.

    Attributes:
        name: of its directory, and of its module in `instance_ssl.stages`.
        function: what it does; None: `run` of that module, imported once all checks have passed.
        needs_labels: whether it reads labelled images.
    """

    name: str
    function: "Callable[[Stage], dict[str, Any]] | None" = None
    needs_labels: bool = False

    def load(self) -> "Callable[[Stage], dict[str, Any]]":
        """Returns the stage's function."""
        return self.function or import_module(f"instance_ssl.stages.{self.name}").run


def run_stages(
    stages: Sequence[StageSpec], after: "Callable[[Stage], None] | None" = None, further: Sequence[StageSpec] = ()
) -> int:
    """Runs stages one after another in one process group and returns the process's exit code.

    Complete stages are skipped, and evaluations where `data.kind: auto` finds no labels. `after` follows the last
    stage. `--stages` names the ones to run instead, `further` ones included.
    """

    def work(process: Process) -> None:
        keep_freed_memory(os.environ)  # before anything forks loader processes, which inherit it
        process.guard.start()
        offered = {spec.name: spec for spec in (*stages, *further)}
        arguments = parse_arguments(list(offered))
        chosen = [offered[name] for name in arguments.stages] if arguments.stages else stages
        labelled = [spec.name for spec in chosen if spec.needs_labels]
        request = read_request(arguments, [spec.name for spec in chosen], labelled)
        from instance_ssl.run import opening, stage_work  # torch is imported here

        check_limits()  # again: torch's libraries take most of the address space that a limit leaves
        with contextlib.ExitStack() as held:
            context = opening.open_run(request, process, held)
            for spec in chosen:
                if spec.needs_labels and context.evaluation_sources is None:
                    process.log.say(f"{spec.name}: skipped, for the images have no labels to evaluate with")
                    continue
                stage_work.run_stage(replace(context, name=spec.name), spec.load(), process)
            if after is not None and not arguments.stages:
                after(context)
            context.world.barrier()

    return _run(work)


def run_measurement(parse: Callable[[], Namespace], measure: "Callable[[Namespace, Group], None]") -> int:
    """Runs a measurement, which needs a world but no run directory, and returns the process's exit code.

    Args:
        parse: parses the command line, before torch is imported.
        measure: is given the arguments and the world.
    """

    def work(process: Process) -> None:
        process.guard.watch()
        arguments = parse()
        from instance_ssl.distributed import comm

        world = comm.initialize()
        process.meet(world)
        measure(arguments, world)
        world.barrier()

    return _run(work)


def _run(work: Callable[[Process], None]) -> int:
    def checked() -> int:
        take_place(os.environ)
        check_limits()
        process = Process()
        return exit_code(lambda: work(process), process)

    return exit_code_of(checked)
