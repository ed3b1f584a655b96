"""What a process was asked to do: the command line and both files, read and checked before torch is imported."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from instance_ssl.config.deepspeed import DeepSpeedSettings, load_ds_config
from instance_ssl.config.experiment import ExperimentConfig, load_config
from instance_ssl.distributed import launched
from instance_ssl.run import checks, records
from instance_ssl.run.directory import UPDATE


@dataclass(frozen=True)
class Request:
    """The stages to run, and with what.

    Attributes:
        stages: names, in order.
        ds_path: the DeepSpeed JSON, for messages.
        run_directory: absolute; the user did not name it where `has_default_directory`.
        needs_labels: whether a stage reads labelled images.
        trains: whether a stage needs the training's batch and W.
    """

    stages: tuple[str, ...]
    config: ExperimentConfig
    ds: DeepSpeedSettings
    ds_path: Path
    run_directory: Path
    has_default_directory: bool
    needs_labels: bool
    trains: bool

    def check_run_directory(self) -> None:
        """Refuses a run directory that belongs to another experiment or lacks what the stages start from."""
        records.check_unchanged(self.config, self.run_directory)
        if self.has_default_directory and self.stages == ("export",):
            checks.check_run_to_export(self.config, self.run_directory)
        checks.check_initial_weights(self.config, self.run_directory, self.stages)
        checks.check_made_before(self.config, self.run_directory, self.stages)


def read_request(arguments: argparse.Namespace, stages: Sequence[str], *, needs_labels: bool) -> Request:
    """Reads the arguments of `parse_arguments` and refuses what can be refused before torch is imported.

    A single process checks paths here. Several ranks compare what they were asked and what they find once they have met
    (`opening.open_run`): one that was started differently must not be refused alone, in silence.

    Raises:
        UserError: for a mistake that every rank finds alike.
    """
    checks.check_hostfile()
    config, trains = load_config(arguments.config, arguments.set), not set(stages) <= set(checks.READING_STAGES)
    ds = load_ds_config(
        arguments.deepspeed_config,
        global_batch_size=config.optimization.global_batch_size if trains else None,
        max_grad_norm=config.optimization.max_grad_norm,
        world_size=launched.world_size(),
        optimizer=config.optimization.optimizer,
    )
    if needs_labels:
        checks.check_labels(config)
    request = Request(
        tuple(stages),
        config,
        ds,
        arguments.deepspeed_config,
        (arguments.run_dir or Path("runs") / arguments.config.stem).resolve(),
        has_default_directory=arguments.run_dir is None,
        needs_labels=needs_labels,
        trains=trains,
    )
    if launched.world_size() == 1:
        checks.check_sources(config.evaluation)
        if not (request.run_directory / UPDATE).exists():  # else the run directory is between two states
            request.check_run_directory()
        checks.check_folders(config, needs_labels=needs_labels)
    return request
