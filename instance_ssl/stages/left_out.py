"""Images that take no part any more, with their classes: those that cannot be read, if `data.on_broken` is `skip`.

D/left_out.txt is the record of them, one image a line, in the order in which they were found: id, steps of the training
that were done by then (0: found before it), why, and name, with tabs between. A run that goes on reads it. It goes on
to the bit: an image that is found after the checkpoint's step is left out at that same step again.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from instance_ssl.data.folders import escape
from instance_ssl.errors import UserError
from instance_ssl.stages.context import Stage

_NAMED = 10
_NAMED_AT_THE_END = 3


class TooManyBroken(UserError):
    """More images than `data.max_broken_share` could not be read."""


@dataclass(frozen=True)
class _Found:
    step: int
    why: str


class LeftOut:
    """The images that are left out; the same on all ranks. Every rank calls the same methods in the same order.

    Raises:
        UserError: when the record cannot be read.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._path = stage.run_directory / "left_out.txt"
        self._found: dict[int, _Found] = stage.on_rank_0(lambda: _read(self._path, len(stage.source)))
        self._at: dict[int, list[int]] = {}
        self._index(self._found)
        self._met: dict[int, str] = {}

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
        """Makes known to all what any has met, at step `step`: it is said, and recorded. Collective.

        Raises:
            UserError: when it cannot be recorded.
        """
        met = {index: why for part in self._stage.world.all_gather_objects(self._met) for index, why in part.items()}
        new = {index: _Found(step, why) for index, why in sorted(met.items()) if index not in self._found}
        self._met = {}
        before = len(self._found)
        self._found |= new
        self._index(new)
        self._stage.on_rank_0(lambda: self._append(new))
        for number, found in enumerate(new.values(), start=before + 1):
            if number <= _NAMED:
                self._stage.log.say(f"warning: {found.why}; its class is left out")
            elif number % _NAMED == 0:
                self._stage.log.say(f"warning: {number} images cannot be read by now, see {self._path}")

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
        """Ends a run of which too much is left out.

        Raises:
            TooManyBroken: naming files.
        """
        share, total = self._stage.config.data.max_broken_share, len(self._stage.source)
        if len(self._found) > share * total:
            last = "; ".join([found.why for found in self._found.values()][-_NAMED_AT_THE_END:])
            raise TooManyBroken(
                f"{len(self._found)} of {total} images cannot be read, more than data.max_broken_share {share} "
                f"({last}): repair them, or raise the share; {self._path} lists all"
            )

    def _index(self, found: Mapping[int, _Found]) -> None:
        for index, one in found.items():
            self._at.setdefault(one.step, []).append(index)

    def _append(self, new: Mapping[int, _Found]) -> None:
        lines = [
            f"{index}\t{found.step}\t{escape(found.why)}\t{escape(self._stage.source.names[index])}\n"
            for index, found in new.items()
        ]
        try:
            with self._path.open("ab") as file:
                file.write("".join(lines).encode("utf-8", "surrogateescape"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}") from None


def _read(path: Path, num_images: int) -> dict[int, _Found]:
    """What is recorded; a last line that was not written to its end is taken away."""
    if not path.exists():
        return {}
    found = {}
    try:
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(path, len(whole) + 1 if whole else 0)
        for line in whole.decode("utf-8", "surrogateescape").split("\n") if whole else []:
            index, step, why, _ = line.split("\t", 3)
            found[int(index)] = _Found(int(step), why)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: restore it") from None
    if any(not 0 <= index < num_images for index in found):
        raise UserError(f"{path} is not of these {num_images} images: restore it")
    return found
