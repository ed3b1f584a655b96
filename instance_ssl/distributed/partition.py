"""Which rank holds which rows: contiguous parts that may be uneven."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Partition:
    """`total` ≥ 0 rows in `size` ≥ 1 contiguous parts; the first `total % size` parts have one row more."""

    total: int
    size: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.total < 0:
            raise ValueError(f"cannot divide {self.total} rows into {self.size} parts")

    def bounds(self, rank: int) -> tuple[int, int]:
        """Returns the first row of part `rank` and the row after its last."""
        if not 0 <= rank < self.size:
            raise ValueError(f"part {rank} of {self.size} does not exist")
        quotient, remainder = divmod(self.total, self.size)
        start = rank * quotient + min(rank, remainder)
        return start, start + quotient + (rank < remainder)

    def count(self, rank: int) -> int:
        """Returns the number of rows of part `rank`."""
        start, stop = self.bounds(rank)
        return stop - start

    def counts(self) -> list[int]:
        """Returns the number of rows of every part, in order of rank."""
        return [self.count(rank) for rank in range(self.size)]


@dataclass(frozen=True)
class Parts:
    """Contiguous parts of any length, 0 included: a `Partition` without some of its rows."""

    lengths: tuple[int, ...]

    @property
    def total(self) -> int:
        """Number of rows of all parts."""
        return sum(self.lengths)

    def bounds(self, rank: int) -> tuple[int, int]:
        """Returns the first row of part `rank` and the row after its last."""
        start = sum(self.lengths[:rank])
        return start, start + self.lengths[rank]

    def counts(self) -> list[int]:
        """Returns the number of rows of every part, in order of rank."""
        return list(self.lengths)
