"""Checks that all ranks do the same thing, so that a mistake on one is an error on all and never a hang."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from instance_ssl.distributed.comm import Group

_MOST_FACTS = 4


@dataclass(frozen=True)
class Agreement:
    """Opens every collective operation of an object with one small all-gather of fixed size.

    Attributes:
        group: the ranks that hold the object.
        operations: names of all operations, as messages give them; the same on all ranks.
    """

    group: Group
    operations: Sequence[str]

    def check(self, operation: str, problem: Exception | None = None, **facts: float) -> None:
        """Raises on all ranks unless all begin the same operation, without a problem, with the same facts. Collective.

        Args:
            operation: which one this rank begins.
            problem: what is wrong on this rank; it raises it, and the others a `RuntimeError` that quotes it.
            facts: at most four finite numbers that must be equal on all ranks, by the names that a message gives them;
                an underscore stands for a space.
        """
        self.gather(operation, problem, 0, **facts)

    def gather(self, operation: str, problem: Exception | None, count: int, **facts: float) -> list[int]:
        """`check`, and returns every rank's `count`, which may differ, in order of rank."""
        padding = [0.0] * (_MOST_FACTS - len(facts))
        numbers = [float(problem is not None), self.operations.index(operation), count, *facts.values(), *padding]
        own = torch.tensor([numbers], dtype=torch.float64, device=self.group.device)
        problems, operations, counts, *columns = self.group.all_gather_rows(own).T.tolist()
        if any(problems):
            self._raise_first(problem)
        if len(set(operations)) > 1:
            raise RuntimeError(f"the ranks disagree: {self._by_rank([self.operations[int(i)] for i in operations])}")
        for name, values in zip(facts, columns, strict=False):
            if len(set(values)) > 1:
                said = self._by_rank([f"{value:.12g}" for value in values])
                raise RuntimeError(f"{operation}: the ranks disagree about the {name.replace('_', ' ')}: {said}")
        return [int(value) for value in counts]

    def check_equal(self, values: Mapping[str, object]) -> None:
        """Raises a `RuntimeError` on all ranks unless all have the same (picklable) values. Collective."""
        every = self.group.all_gather_objects(dict(values))
        for name in values:
            if any(theirs[name] != every[0][name] for theirs in every):
                said = self._by_rank([str(theirs[name]) for theirs in every])
                raise RuntimeError(f"the ranks disagree about {name}: {said}")

    def _raise_first(self, problem: Exception | None) -> NoReturn:
        texts = self.group.all_gather_objects(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        raise RuntimeError(f"rank {rank}: {text}")

    def _by_rank(self, values: Sequence[str]) -> str:
        return ", ".join(f"rank {rank} {value}" for rank, value in enumerate(values))
