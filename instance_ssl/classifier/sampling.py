"""Sampled instance classification (Table 3): a step's softmax over some of the classes.

The classes of a step are the positives of its global batch plus negatives, M in all:

- `random`: drawn without replacement from all N at each step (the paper's "sampled instance classification"; as in
  PartialFC, but drawn over all shards at once, so that the same classes are drawn on any number of ranks);
- `recent`: the classes of the images seen last, as in PIC (Cao et al., NeurIPS 2020, "recent instances").

All other rows have a gradient of exactly zero, and SGD continues. A row w with momentum m and no gradient follows

    m ← μ m + λ w        w ← w - η m

a linear map of (w, m) that depends only on η, μ, λ. `RowClock` keeps the products of these 2 x 2 maps and applies all
that a row has missed at once, when the row is next read. A step thus reads and writes sampled rows only, and every row
is what dense SGD would have made of it (tested against torch.optim.SGD). PartialFC skips unsampled rows instead, which
makes their momentum and decay depend on how often they are drawn.
"""

import torch
from torch import Tensor

from instance_ssl.classifier.softmax import RowUpdate, round_stochastically_
from instance_ssl.config.choices import SamplingMode


class ClassSampler:
    """Chooses the classes of each step: the same on every rank, whatever their number.

    Args:
        num_instances: N.
        num_sampled_classes: M, including positives; if there are more positives than M, all are kept.
        seed: of the experiment.
    """

    def __init__(self, mode: SamplingMode, num_instances: int, num_sampled_classes: int, seed: int) -> None:
        self.mode = mode
        self.num_instances = num_instances
        self.num_sampled_classes = min(num_sampled_classes, num_instances)
        self.seed = seed
        # Newest first, unique; part of the training state.
        self.recent_classes = torch.empty(0, dtype=torch.int64)

    def draw(self, positives: Tensor, step: int) -> Tensor:
        """Classes of optimizer step `step`, ascending, (≤ M,) int64 on the CPU.

        Args:
            positives: instance ids of the whole global batch, int64 on the CPU.
        """
        positives = positives.unique()
        wanted = max(0, self.num_sampled_classes - len(positives))
        if self.mode == "recent":
            others = self.recent_classes[~torch.isin(self.recent_classes, positives)]
            self.recent_classes = torch.cat([positives, others])[: self.num_sampled_classes]
        else:
            others = self._random_classes(positives, min(wanted, self.num_instances - len(positives)), step)
        return torch.cat([positives, others[:wanted]]).sort().values

    def _random_classes(self, excluded: Tensor, wanted: int, step: int) -> Tensor:
        """At least `wanted` distinct classes in random order, none of them excluded; so many exist."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        if 2 * (wanted + len(excluded)) > self.num_instances:
            drawn = torch.randperm(self.num_instances, generator=generator)
            return drawn[~torch.isin(drawn, excluded)]
        others = torch.empty(0, dtype=torch.int64)
        while len(others) < wanted:  # at most half of all classes are taken: two or three rounds
            drawn = torch.cat([others, torch.randint(self.num_instances, (2 * wanted,), generator=generator)])
            others = _first_of_each(drawn[~torch.isin(drawn, excluded)])
        return others


def _first_of_each(values: Tensor) -> Tensor:
    """Unique values in order of first appearance: makes a sample without replacement of one with replacement."""
    unique, inverse = values.unique(return_inverse=True)
    places = torch.arange(len(values))
    first = torch.full_like(unique, len(values)).scatter_reduce_(0, inverse, places, "amin")
    return values[first.sort().values]


class RowClock:
    """Tracks the optimizer steps that each row has seen, and the maps that bring rows up to date.

    Args:
        weight_nD: (n, D) rows, updated in place.
        momentum_nD: (n, D) their momentum, updated in place.

    Attributes:
        seen_n: (n,) int64, index of the map that each row still needs.
        maps: (S + 1, 2, 2) float64; entry s takes (w, m) from before step s to now. The last one, the identity, belongs
            to rows that are up to date.
    """

    def __init__(self, weight_nD: Tensor, momentum_nD: Tensor) -> None:
        self._weight_nD, self._momentum_nD = weight_nD, momentum_nD
        self.seen_n = torch.zeros(weight_nD.shape[0], dtype=torch.int64, device=weight_nD.device)
        self.maps = torch.eye(2, dtype=torch.float64)[None]

    def settle(self, rows: Tensor | None, seed: int) -> None:
        """Brings rows up to date, as dense SGD with zero gradients would have.

        Args:
            rows: (r,) int64; None: all.
            seed: of the stochastic rounding of bfloat16 rows.
        """
        steps = self.maps.shape[0] - 1
        if steps == 0:
            return
        rows = torch.nonzero(self.seen_n < steps).squeeze(1) if rows is None else rows
        generator = torch.Generator(self._weight_nD.device).manual_seed(seed)
        for part in rows.split(65_536):  # bounds the workspace
            maps = self.maps.to(self._weight_nD.device)[self.seen_n[part]]
            a, b, c, d = maps.to(torch.promote_types(self._weight_nD.dtype, torch.float32)).flatten(1).T[:, :, None]
            weight, momentum = self._weight_nD[part], self._momentum_nD[part]
            settled = a * weight + b * momentum
            if weight.dtype == torch.bfloat16:
                round_stochastically_(settled, torch.empty_like(settled, dtype=torch.int32), generator)
            self._weight_nD[part] = settled.to(weight.dtype)
            self._momentum_nD[part] = (c * weight + d * momentum).to(momentum.dtype)
        self.seen_n[rows] = steps

    def settle_all(self, seed: int) -> None:
        """Brings all rows up to date and drops the maps."""
        self.settle(None, seed)
        self.seen_n.zero_()
        self.maps = self.maps[-1:]

    def advance(self, stepped: Tensor, update: RowUpdate) -> None:
        """Adds one optimizer step that the rows `stepped` (int64, up to date before it) have already taken."""
        eta, mu, decay = update.learning_rate, update.momentum, update.weight_decay
        step_map = torch.tensor([[1 - eta * decay, -eta * mu], [decay, mu]], dtype=torch.float64)
        self.maps = torch.cat([step_map @ self.maps, torch.eye(2, dtype=torch.float64)[None]])
        self.seen_n[stepped] = self.maps.shape[0] - 1
