"""Checks the checkpoint that a stage starts from, and logs damaged newer ones and foreign files."""

from instance_ssl.checkpoint.identity import keys_digest, require_same_run
from instance_ssl.checkpoint.state import Checkpoint
from instance_ssl.config.experiment import flatten
from instance_ssl.errors import escape
from instance_ssl.run.stage import Stage

_NAMED = 3


def run_digests(stage: Stage) -> dict[str, str]:
    """The digests that bind a checkpoint to this run."""
    return {"configuration": keys_digest(flatten(stage.config)), "images": stage.source.digest}


def accept(checkpoint: Checkpoint, stage: Stage) -> None:
    """Logs the oddities of a checkpoint to start from, and refuses one of another run."""
    log_oddities(checkpoint, stage)
    require_same_run(checkpoint, run_digests(stage))


def log_oddities(checkpoint: Checkpoint, stage: Stage) -> None:
    """Logs which newer checkpoints are damaged, and which foreign files in this one are ignored."""
    for problem in checkpoint.passed_over:
        stage.log.say(f"warning: damaged checkpoint {problem}; going back to {checkpoint.directory.name}")
    if checkpoint.foreign:
        names = ", ".join(escape(name) for name in checkpoint.foreign[:_NAMED])
        more = f" and {len(checkpoint.foreign) - _NAMED} more" if len(checkpoint.foreign) > _NAMED else ""
        stage.log.say(f"ignored in {checkpoint.directory}, written by something else: {names}{more}")
