"""What a process was asked to do: the command line and both files, read and checked before torch is imported."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from instance_ssl.config.deepspeed import DeepSpeedFile, read_ds_file
from instance_ssl.config.draft import Draft, load_draft
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.distributed import launched
from instance_ssl.run import checks, records
from instance_ssl.run.arguments import ds_path_of
from instance_ssl.run.directory import UPDATE


@dataclass(frozen=True)
class Request:
    """The stages to run, and with what.

    Attributes:
        stages: names, in order.
        draft: the experiment, with what is left to choose once the images are open.
        ds: the DeepSpeed JSON.
        run_directory: absolute; the user did not name it where `has_default_directory`.
        labelled_stages: those that read labelled images.
        trains: whether a stage needs the training's batch and W.
    """

    stages: tuple[str, ...]
    draft: Draft
    ds: DeepSpeedFile
    run_directory: Path
    has_default_directory: bool
    labelled_stages: tuple[str, ...]
    trains: bool

    @property
    def finds_labels(self) -> bool:
        """Whether the images, and not the experiment, decide if there are labels to evaluate with."""
        return "data.kind" in self.draft.auto and self.draft.completed({}).evaluation.data is None

    @property
    def only_evaluates(self) -> bool:
        """Whether every stage reads labelled images."""
        return self.labelled_stages == self.stages

    def check_run_directory(self) -> None:
        """Refuses a run directory that belongs to another experiment or lacks what the stages start from."""
        config = self.draft.completed(records.recorded_choices(self.draft.auto, self.run_directory))
        records.check_unchanged(config, self.run_directory)
        if self.has_default_directory and self.stages == ("export",):
            checks.check_run_to_export(config, self.run_directory)
        checks.check_initial_weights(config, self.run_directory, self.stages)
        checks.check_made_before(config, self.run_directory, self.stages)

    def check_division(self, config: ExperimentConfig, world_size: int) -> None:
        """Refuses a batch, if it is known, or rows that cannot be divided over the ranks."""
        batch_is_known = self.trains and "optimization.global_batch_size" not in self.draft.auto
        self.ds.settings(
            global_batch_size=config.optimization.global_batch_size if batch_is_known else None,
            max_grad_norm=config.optimization.max_grad_norm,
            world_size=world_size,
            optimizer=config.optimization.optimizer,
        )


def read_request(arguments: argparse.Namespace, stages: Sequence[str], labelled_stages: Sequence[str]) -> Request:
    """Reads the arguments of `parse_arguments` and refuses what can be refused before torch is imported.

    A single process checks paths here. Several ranks compare what they were asked and what they find once they have met
    (`opening.open_run`): one that was started differently must not be refused alone, in silence.

    Raises:
        UserError: for a mistake that every rank finds alike.
    """
    checks.check_hostfile()
    draft = load_draft(arguments.config, arguments.set)
    config = draft.completed({})
    request = Request(
        tuple(stages),
        draft,
        read_ds_file(ds_path_of(arguments, draft)),
        (arguments.run_dir or Path("runs") / arguments.config.stem).resolve(),
        has_default_directory=arguments.run_dir is None,
        labelled_stages=tuple(labelled_stages),
        trains=not set(stages) <= set(checks.READING_STAGES),
    )
    request.check_division(config, launched.world_size())
    if labelled_stages and not request.finds_labels:
        checks.check_labels(config)
    if launched.world_size() == 1:
        checks.check_sources(config.evaluation)
        if not (request.run_directory / UPDATE).exists():  # else the run directory is between two states
            request.check_run_directory()
        checks.check_folders(config, needs_labels=bool(labelled_stages))
    return request
