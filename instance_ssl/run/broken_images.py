"""Images that cannot be read, where `data.on_broken` is `skip`: counted, logged once and recorded in D/broken.txt.

Their classes stay. A training replaces them in its batches; a pass over all images skips them, and their rows get a
random direction. The next update of the images removes both (`stages/update_images.py`).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from instance_ssl.data.augmentations import Transform
from instance_ssl.data.list_changes import places_of
from instance_ssl.data.loaders import image_loader
from instance_ssl.errors import UserError
from instance_ssl.run.broken_record import Broken, append_broken, as_line, read_broken, record_path
from instance_ssl.run.stage import Stage

_NAMED = 10
_NAMED_AT_THE_END = 3


class TooManyBroken(UserError):
    """More images than `data.max_broken_share` cannot be read."""


class BrokenImages:
    """The images of a run that could not be read, the same on all ranks. Every rank calls the same methods in order."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._path = stage, record_path(stage.run_directory)
        self._met: dict[int, str] = {}
        self._known, self._num_removed = stage.on_rank_0(self._read)

    def meet(self, unreadable: Mapping[int, str]) -> None:
        """Collects id → why of images that this rank could not read, for the next `share`."""
        self._met.update({index: why for index, why in unreadable.items() if index not in self._known})

    @property
    def has_news(self) -> bool:
        """Whether this rank has met any that the others do not know."""
        return bool(self._met)

    def anyone_has_news(self) -> bool:
        """Whether any rank has. Collective."""
        world = self._stage.world
        return bool(world.all_reduce_max_(torch.tensor([int(self.has_news)], device=world.device)).item())

    def share(self) -> None:
        """Logs and records what any rank has met. Collective."""
        parts = self._stage.world.all_gather_objects(self._met)
        self._met = {}
        met = {index: why for part in parts for index, why in part.items() if index not in self._known}
        self._stage.on_rank_0(lambda: self._append(dict(sorted(met.items()))))
        for number, (index, why) in enumerate(sorted(met.items()), start=len(self._known) + 1):
            self._known[index] = why
            if number <= _NAMED:
                self._stage.log.say(f"warning: {why}; skipped from now on, its class stays")
            elif number % _NAMED == 0:
                self._stage.log.say(f"warning: {number} images cannot be read so far, see {self._path}")

    @property
    def ids(self) -> Tensor:
        """Ids, (k,) int64 on the CPU, ascending, of the images that have one."""
        return torch.tensor(sorted(self._known), dtype=torch.int64)

    def check_share(self) -> None:
        """Raises `TooManyBroken` where too many images cannot be read, those that an update has removed included."""
        share, total = self._stage.config.data.max_broken_share, len(self._stage.source) + self._num_removed
        count = len(self._known) + self._num_removed
        if count > share * total:
            named = "; ".join([*self._known.values()][-_NAMED_AT_THE_END:])
            raise TooManyBroken(
                f"{count} of {total} images cannot be read, more than data.max_broken_share {share} ({named}): repair "
                f"them, or raise the share; {self._path} lists all"
            )

    def _read(self) -> tuple[dict[int, str], int]:
        """Id → why of the recorded images, and how many more are in the list but have lost their id."""
        record, source = read_broken(self._stage.run_directory), self._stage.source
        if not record:
            return {}, 0
        places = places_of(list(record), source.names).tolist()
        known = {
            place: broken.why
            for place, broken in zip(places, record.values(), strict=True)
            if place >= 0 and broken.size == self._size(place)  # else it has been repaired
        }
        left_out = set(source.left_out)
        return known, sum(as_line(name, broken) in left_out for name, broken in record.items())

    def _append(self, met: Mapping[int, str]) -> None:
        source, directory = self._stage.source, self._stage.run_directory
        append_broken(directory, {source.names[index]: Broken(self._size(index), why) for index, why in met.items()})

    def _size(self, index: int) -> int:
        columns = self._stage.source.columns
        return int(columns["sizes"][index]) if "sizes" in columns else 0


def readable_batches(
    stage: Stage, parts: Sequence[Sequence[int]], broken: BrokenImages, view: Transform, *, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (b, 3, S, S) of a view and their ids (b,), for each list of ids; b is 0 for an empty one.

    Where `data.on_broken` is `skip`, a batch lacks the images that cannot be read, and `broken` meets them.

    Raises:
        RankError: at the first such image otherwise.
    """
    data = stage.config.data
    on_unreadable = broken.meet if data.on_broken == "skip" else None
    loader = image_loader(stage.source, view, parts, data.num_workers, seed=seed, on_unreadable=on_unreadable)
    loaded = iter(loader)
    nothing = torch.empty(0, 3, data.image_size, data.image_size), torch.empty(0, dtype=torch.int64)
    for part in parts:
        images, ids_b = next(loaded) if part else nothing
        yield (images, ids_b) if len(ids_b) else nothing
