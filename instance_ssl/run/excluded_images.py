"""Images that take no part any more, with their classes: those that cannot be read, if `data.on_broken` is `skip`, and
those that the data set has lost, if `data.allow_lost` is set.

D/left_out.txt is the record of them (`left_out_record.py`). A run that goes on reads it, and goes on to the bit: an
image that is found after the checkpoint's step is left out at that same step again.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from instance_ssl.data.augmentations import Transform
from instance_ssl.data.loaders import image_loader
from instance_ssl.errors import UserError
from instance_ssl.run.exclusion_list import LOST, Found, append_left_out, read_left_out, record_path
from instance_ssl.run.stage import Stage

_NAMED = 10
_NAMED_AT_THE_END = 3


class TooManyBroken(UserError):
    """More images than `data.max_broken_share` could not be read."""


class LeftOut:
    """The images that are left out; the same on all ranks. Every rank calls the same methods in the same order.

    Raises:
        UserError: when the record cannot be read.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._found: dict[int, Found] = {}
        self._at: dict[int, list[int]] = {}
        self._met: dict[int, str] = {}
        self._know(stage.on_rank_0(lambda: read_left_out(stage.run_directory, len(stage.source))))

    def meet(self, unreadable: Mapping[int, str]) -> None:
        """Takes id → why of images that this rank found unreadable, for the next `share`."""
        self._met.update({index: why for index, why in unreadable.items() if index not in self._found})

    @property
    def has_news(self) -> bool:
        """Whether this rank has met any that the others do not know of."""
        return bool(self._met)

    def anyone_has_news(self) -> bool:
        """Whether any rank has. Collective."""
        world = self._stage.world
        return bool(world.all_reduce_max_(torch.tensor([int(self.has_news)], device=world.device)).item())

    def share(self, step: int) -> None:
        """Makes known to all what any has met, when `step` steps are done: it is said, and recorded. Collective.

        Raises:
            UserError: when it cannot be recorded.
        """
        met = {index: why for part in self._stage.world.all_gather_objects(self._met) for index, why in part.items()}
        self._met = {}
        self._add(met, step)

    def take_absent(self, step: int) -> None:
        """Leaves out what the data set has lost since the run began, `step` steps being done. Collective.

        Raises:
            UserError: when it cannot be recorded.
        """
        for index in self._stage.source.absent:
            known = self._found.get(index)
            if known is not None and known.step > step:  # it is gone, also for the steps that are done again
                self._at[known.step].remove(index)
                self._know({index: Found(step, known.why)})
        self._add(self._stage.source.absent, step)

    @property
    def ids(self) -> Tensor:
        """Ids, int64, of all that are known, whenever they were found."""
        return torch.tensor(list(self._found), dtype=torch.int64)

    def found_at(self, step: int) -> Tensor:
        """Ids, int64, of the images that are left out from the end of this step on, those of a run before this too."""
        return torch.tensor(self._at.get(step, []), dtype=torch.int64)

    def found_by(self, step: int) -> Tensor:
        """Ids, int64, of all that are left out once so many steps are done."""
        return torch.tensor([index for index, found in self._found.items() if found.step <= step], dtype=torch.int64)

    @property
    def steps(self) -> list[int]:
        """Those at which any was found."""
        return list(self._at)

    def check_share(self) -> None:
        """Ends a run in which too many images cannot be read.

        Raises:
            TooManyBroken: naming files.
        """
        share, total = self._stage.config.data.max_broken_share, len(self._stage.source)
        broken = [found.why for found in self._found.values() if found.why != LOST]
        if len(broken) > share * total:
            raise TooManyBroken(
                f"{len(broken)} of {total} images cannot be read, more than data.max_broken_share {share} "
                f"({'; '.join(broken[-_NAMED_AT_THE_END:])}): repair them, or raise the share; "
                f"{record_path(self._stage.run_directory)} lists all"
            )

    def _add(self, whys: Mapping[int, str], step: int) -> None:
        new = {index: Found(step, why) for index, why in sorted(whys.items()) if index not in self._found}
        if not new:
            return
        before = len(self._found)
        self._know(new)
        self._stage.on_rank_0(lambda: append_left_out(self._stage.run_directory, new, self._stage.source))
        for number, (index, found) in enumerate(new.items(), start=before + 1):
            if number <= _NAMED:
                what = f"{self._stage.source.names[index]} is {LOST}" if found.why == LOST else found.why
                self._stage.log.say(f"warning: {what}; its class is left out")
            elif number % _NAMED == 0:
                self._stage.log.say(
                    f"warning: {number} images are left out by now, see {record_path(self._stage.run_directory)}"
                )

    def _know(self, found: Mapping[int, Found]) -> None:
        self._found |= found
        for index, one in found.items():
            self._at.setdefault(one.step, []).append(index)


def readable_batches(
    stage: Stage, parts: Sequence[Sequence[int]], left_out: LeftOut, view: Transform, *, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (b, 3, S, S) of a view and their ids (b,), for each list of ids; b is 0 for an empty one.

    Without what cannot be read, where the policy is to skip it: `left_out` is told.

    Raises:
        RankError: at the first such image, where the policy is another.
    """
    data = stage.config.data
    on_unreadable = left_out.meet if data.on_broken == "skip" else None
    loader = image_loader(stage.source, view, parts, data.num_workers, seed=seed, on_unreadable=on_unreadable)
    loaded = iter(loader)
    nothing = torch.empty(0, 3, data.image_size, data.image_size), torch.empty(0, dtype=torch.int64)
    for part in parts:
        images, ids_b = next(loaded) if part else nothing
        yield (images, ids_b) if len(ids_b) else nothing
