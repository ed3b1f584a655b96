"""Classes that take no part: those of images that cannot be read, or are there no more.

Their rows of W and the rows' momentum are 0. A row without direction has no gradient, so they stay 0 by themselves; its
cosines are 0, so it adds exp(0) = 1 to each Z and nothing to anything else. That 1 is taken off each Z again. No tensor
of the softmax changes its shape, and no pass over W costs more.
"""

import torch
from torch import Tensor

from instance_ssl.distributed.partition import Partition

_PAIRS_AT_ONCE = 2**26


class LeftOutClasses:
    """Which classes are left out, equal on all ranks, and which of them are this rank's.

    Args:
        partition: how the classes lie on the ranks.
        rank: this one's place in it.

    Attributes:
        ids: (k,) int64 on the CPU, ascending.
        num_own: how many of them are own ones.
    """

    def __init__(self, partition: Partition, rank: int) -> None:
        self.start, self.stop = partition.bounds(rank)
        self.ids = torch.empty(0, dtype=torch.int64)
        self.num_own = 0

    def add(self, ids: Tensor) -> None:
        """Leaves out more classes, int64 on the CPU in any order."""
        self.ids = torch.cat([self.ids, ids]).unique()
        self.num_own = len(self.own_places())

    def own_places(self) -> Tensor:
        """Own left-out rows, counted from the first own row, ascending."""
        return self.ids[(self.ids >= self.start) & (self.ids < self.stop)] - self.start

    def strike_out_(self, table_nK: Tensor) -> None:
        """Puts -1 in place of every left-out class of a table of hardest classes, and in their own rows."""
        ids = self.ids.to(table_nK)
        # On a GPU `isin` writes out all pairs of a few ids.
        for rows in table_nK.split(max(1, _PAIRS_AT_ONCE // max(1, table_nK.shape[1] * len(ids)))):
            rows[torch.isin(rows, ids)] = -1
        table_nK[self.own_places().to(table_nK.device)] = -1
