"""Exact search for the K most similar other classes of every class (paper, "Smoothing Labels of Hardest Classes").

Query rows stay with their owner and class blocks travel: each rank in turn broadcasts its rows block by block, and the
next block is sent while this one is processed. N x N is never stored. A tile of queries x classes costs

1. one product of unit rows in low precision with a bounded error (`hard_class_screening`); a tile of local rows by
   local rows serves both its rows and its columns;
2. maxima over groups of scores, which show where a score reaches the bound of its query's K-th best;
3. for those few, the exact cosine, which alone decides: the float64 sum of the products of two float32 unit rows,
   rounded to float32. It depends neither on the shape of a block nor on the number of ranks.

A first pass over all local rows gives every query an initial bound: K groups of classes whose maxima reach a score hold
K classes that do. It costs one more product and saves the exact cosines of several hundred candidates a row. Tiles that
the bounds hardly separate (no bound yet, or most rows alike) are computed exactly as a whole: slower, same result.

Equal cosines (of duplicate images, for example) go to the lower id, whatever the block size or the number of ranks.
Classes whose rows are not finite are excluded: they are in nobody's table and have none.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from instance_ssl.classifier.hard_class_screening import (
    GROUP,
    Screen,
    group_maxima,
    kth_largest,
    passing_pairs,
    passing_pairs_transposed,
)
from instance_ssl.classifier.softmax import directions, finite_rows
from instance_ssl.classifier.tie_breaking import LOWEST_KEY, pack_pairs, pack_scores, unpack_scores
from instance_ssl.distributed.comm import Group, Transfer
from instance_ssl.distributed.partition import Partition, Parts

# Longer tiles leave the cache of a CPU core; on a GPU they make the host wait less often.
_MAX_EDGE = {"cpu": 2048, "cuda": 16384}

# Groups of the first pass for each of the K: with 2.5 or more, the bound is at least that of the 1.3 K-th best.
_GROUPS_PER_HARD_CLASS = 2.5

# Scratch memory on a CPU if the configuration leaves it open.
_DEFAULT_SEARCH_BYTES = 32 * 2**20
# On a GPU the host waits several times a tile, so tiles are larger than the blocks of the softmax.
_SEARCH_BLOCKS_ON_GPU = 8

# Rows whose keys are unpacked at once: 26 MB for K = 100.
ROWS_AT_ONCE = 8192


def find_hard_classes(
    weight_nD: Tensor,
    num_hard_classes: int,
    partition: Partition,
    group: Group,
    *,
    block_bytes: int,
    screen_dtype: torch.dtype | None = None,
    on_block: Callable[[int, int], None] | None = None,
    on_not_finite: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Top-K of cos(w_i, w_j), j ≠ i, for every own class i.

    Args:
        weight_nD: (n, D) own rows of W.
        num_hard_classes: K, 1 … N - 1.
        partition: how the N classes lie on the ranks.
        block_bytes: scratch memory, beside unit rows and table.
        screen_dtype: bfloat16 or float32, which changes the time and not the result; None chooses by the device.
        on_block: called with (class blocks done, class blocks in all).
        on_not_finite: called on all ranks with the number of classes excluded because their rows are not finite.

    Returns:
        (n, K) int32, hardest first; -1 where there are not so many classes.
    """
    not_finite = _not_finite_classes(weight_nD, partition, group)
    if len(not_finite) == 0:
        return _search(weight_nD, num_hard_classes, partition, group, block_bytes, screen_dtype, on_block)
    on_not_finite(len(not_finite))
    table_nK = torch.full((len(weight_nD), num_hard_classes), -1, dtype=torch.int32, device=weight_nD.device)
    bounds = torch.tensor([partition.bounds(rank) for rank in range(group.size)])
    taken = torch.searchsorted(not_finite, bounds[:, 1]) - torch.searchsorted(not_finite, bounds[:, 0])
    parts = Parts(tuple((bounds[:, 1] - bounds[:, 0] - taken).tolist()))
    if (num_found := min(num_hard_classes, parts.total - 1)) > 0:
        start, stop = partition.bounds(group.rank)
        own = torch.arange(start, stop)
        live = (own[~torch.isin(own, not_finite)] - start).to(weight_nD.device)
        found_mK = _search(weight_nD[live], num_found, parts, group, block_bytes, screen_dtype, on_block)
        # Class c of the finite ones is class c + k of all, where k are excluded before it.
        gaps = (not_finite - torch.arange(len(not_finite))).to(found_mK)
        table_nK[live, :num_found] = found_mK + torch.searchsorted(gaps, found_mK, right=True, out_int32=True)
    return table_nK


def _not_finite_classes(weight_nD: Tensor, partition: Partition, group: Group) -> Tensor:
    """Classes (k,) whose rows are not finite, int64 on the CPU, ascending, the same on all ranks."""
    own = torch.nonzero(~finite_rows(weight_nD)).squeeze(1) + partition.bounds(group.rank)[0]
    return group.all_gather_rows(own, group.row_counts(len(own))).cpu()


def _search(
    weight_nD: Tensor,
    num_hard_classes: int,
    partition: Partition | Parts,
    group: Group,
    block_bytes: int,
    screen_dtype: torch.dtype | None,
    on_block: Callable[[int, int], None] | None,
) -> Tensor:
    search = _Search(weight_nD, num_hard_classes, partition, group, block_bytes, screen_dtype)
    search.look_first()
    for done, block in enumerate(search.class_blocks(), start=1):
        search.take(block)
        if on_block is not None:
            on_block(done, search.num_blocks)
    return search.table.ids()


def search_bytes(block_bytes: int | None, device: torch.device) -> int:
    """Scratch memory of the search, given the block budget of the softmax (None: chosen by the cache)."""
    if block_bytes is None:
        return _DEFAULT_SEARCH_BYTES
    return block_bytes if device.type == "cpu" else _SEARCH_BLOCKS_ON_GPU * block_bytes


def fast_screen_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are faster than float32's. An absent GPU is assumed to be Ampere or newer."""
    if device.type == "cuda":
        has_bfloat16 = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


@dataclass(frozen=True)
class _Block:
    """Consecutive rows of W.

    Attributes:
        first_id: class of the first row.
        unit_mD: (m, D) float32 unit rows.
        low_eD: (E, D) the same in the screening's precision, padded with zeros.
        own_index: index among this rank's blocks; None for another rank's.
    """

    first_id: int
    unit_mD: Tensor
    low_eD: Tensor
    own_index: int | None


class _Search:
    def __init__(
        self,
        weight_nD: Tensor,
        num_hard_classes: int,
        partition: Partition | Parts,
        group: Group,
        block_bytes: int,
        screen_dtype: torch.dtype | None,
    ) -> None:
        device, (num_rows, embedding_dim) = weight_nD.device, weight_nD.shape
        self.partition, self.group, self.block_bytes = partition, group, block_bytes
        self.start, _ = partition.bounds(group.rank)
        self.screen = Screen(screen_dtype or fast_screen_dtype(device))
        self.edge = tile_edge(block_bytes, embedding_dim, max(partition.counts()), device.type)
        self.unit_nD = directions(weight_nD)
        errors_n = self.screen.rounding_errors(self.unit_nD)
        largest = group.all_reduce_max_(errors_n.max() if num_rows else errors_n.new_zeros(()))
        self.margins_n = self.screen.margins(errors_n, largest, embedding_dim)
        self.table = HardTable(num_rows, num_hard_classes, partition.total, device)
        self.blocks = [
            self._block(unit_mD, self.start + index * self.edge, index)
            for index, unit_mD in enumerate(self.unit_nD.split(self.edge))
        ]
        self.num_blocks = sum(-(-count // self.edge) for count in partition.counts())
        self.scores_ee = torch.empty(self.edge, self.edge, dtype=self.screen.dtype, device=device)

    def look_first(self) -> None:
        """Gives every local row a bound that its K-th best reaches: that of its K-th best group of local classes."""
        num_groups = self.edge
        while num_groups % 2 == 0 and num_groups // 2 >= _GROUPS_PER_HARD_CLASS * self.table.k:
            num_groups //= 2
        if num_groups < self.table.k:
            return
        for query in self.blocks:
            best_qg = group_maxima(self._score(query, query), num_groups)
            for block in self.blocks:
                if block is not query:
                    torch.maximum(best_qg, group_maxima(self._score(query, block), num_groups), out=best_qg)
            own = self._own_rows(query)
            bits_q = kth_largest(best_qg, self.table.k)[: len(query.unit_mD)]
            self.table.bounds_n[own] = self.screen.exact_bounds(bits_q, self.margins_n[own])

    def class_blocks(self) -> Iterator[_Block]:
        """All ranks' blocks in order of rank; the next one is sent while one is processed."""
        plan = [
            (source, first, min(self.edge, self.partition.bounds(source)[1] - first))
            for source in range(self.group.size)
            for first in range(*self.partition.bounds(source), self.edge)
        ]
        following = self._send(*plan[0])
        for place, (source, first, _) in enumerate(plan):
            arriving = following
            if place + 1 < len(plan):
                following = self._send(*plan[place + 1])
            unit_mD = arriving.wait()
            own_index = (first - self.start) // self.edge
            yield self.blocks[own_index] if source == self.group.rank else self._block(unit_mD, first, None)

    def take(self, block: _Block) -> None:
        """Adds a class block's candidates for all local queries."""
        # Each pair of local blocks is scored once: the later block's turn serves both.
        queries = self.blocks if block.own_index is None else self.blocks[: block.own_index + 1]
        class_double_mD = block.unit_mD.double()
        for query in queries:
            query_double_qD = class_double_mD if query is block else query.unit_mD.double()
            bits_ee = self._score(query, block)
            pairs = passing_pairs(bits_ee, self._cutoffs(query))
            self._enter(query, block, query_double_qD, class_double_mD, pairs)
            if block.own_index is not None and query is not block:
                pairs = passing_pairs_transposed(bits_ee, self._cutoffs(block))
                self._enter(block, query, class_double_mD, query_double_qD, pairs)

    def _enter(
        self, query: _Block, block: _Block, query_qD: Tensor, class_mD: Tensor, pairs: tuple[Tensor, Tensor] | None
    ) -> None:
        """Adds the pairs that passed (None: all) with their exact cosines; rows are float64."""
        first_row = query.first_id - self.start
        if pairs is None:
            step = max(1, min(256, self.block_bytes // (64 * max(len(class_mD), self.table.k))))
            for first in range(0, len(query_qD), step):
                keys_qm = block_keys(query_qD[first : first + step], class_mD, query.first_id + first, block.first_id)
                self.table.add_block(slice(first_row + first, first_row + first + len(keys_qm)), keys_qm)
            return
        rows_P, columns_P = pairs
        is_other_P = (columns_P < len(class_mD)) & (query.first_id + rows_P != block.first_id + columns_P)
        rows_P, columns_P = rows_P[is_other_P], columns_P[is_other_P]
        if len(rows_P):
            keys_P = pair_keys(query_qD, class_mD, rows_P, columns_P, block.first_id)
            self.table.add_pairs(first_row, len(query_qD), rows_P, keys_P)

    def _score(self, query: _Block, block: _Block) -> Tensor:
        """(E, E) screened scores as integers; a class does not score with itself. Overwritten by the next call."""
        torch.mm(query.low_eD, block.low_eD.T, out=self.scores_ee)
        if query is block:
            self.scores_ee.fill_diagonal_(-torch.inf)
        return self.scores_ee.view(self.screen.bits_dtype)

    def _cutoffs(self, query: _Block) -> Tensor:
        own = self._own_rows(query)
        return self.screen.cutoff_bits(self.table.bounds_n[own], self.margins_n[own], self.edge)

    def _own_rows(self, block: _Block) -> slice:
        first_row = block.first_id - self.start
        return slice(first_row, first_row + len(block.unit_mD))

    def _block(self, unit_mD: Tensor, first_id: int, own_index: int | None) -> _Block:
        return _Block(first_id, unit_mD, self.screen.low_rows(unit_mD, self.edge), own_index)

    def _send(self, source: int, first: int, count: int) -> Transfer:
        rows = slice(first - self.start, first - self.start + count)
        own = source == self.group.rank
        unit_mD = self.unit_nD[rows] if own else self.unit_nD.new_empty(count, self.unit_nD.shape[1])
        return self.group.start_broadcast_(unit_mD, source)


def tile_edge(block_bytes: int, embedding_dim: int, longest_part: int, device_type: str) -> int:
    """E, a multiple of the groups' length: the largest tile whose scratch memory fits the budget."""
    edge = GROUP
    while tile_bytes(2 * edge, embedding_dim) <= block_bytes and edge < _MAX_EDGE[device_type]:
        edge *= 2
    return min(edge, -(-longest_part // GROUP) * GROUP)


def tile_bytes(edge: int, embedding_dim: int) -> int:
    """Scratch memory of a tile of E x E scores, of the pairs picked from it, and of a few class blocks."""
    return edge * (edge * 6 + embedding_dim * 26)


class HardTable:
    """Up to `capacity` candidates a row, in any order; a full row is cut back to its best K.

    Attributes:
        keys_nC: (n, C) packed exact cosines and ids; columns from `filled_n` on are empty.
        bounds_n: (n,) exact cosine that the K-th best is known to reach; -inf if none is known.
    """

    def __init__(self, num_rows: int, num_hard_classes: int, num_classes: int, device: torch.device) -> None:
        self.k = num_hard_classes
        self.capacity = min(2 * num_hard_classes, num_classes)
        self.keys_nC = torch.full((num_rows, self.capacity), LOWEST_KEY, dtype=torch.int64, device=device)
        self.filled_n = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.bounds_n = torch.full((num_rows,), -torch.inf, device=device)

    def add_pairs(self, first_row: int, num_rows: int, rows_P: Tensor, keys_P: Tensor) -> None:
        """Adds candidates of rows from `first_row` on; `rows_P` counts from there and ascends.

        Cutting a full row back raises its bound.
        """
        while True:
            counts = torch.bincount(rows_P, minlength=num_rows)
            firsts = counts.cumsum(0) - counts
            filled = self.filled_n[first_row : first_row + num_rows]
            places_P = (filled - firsts)[rows_P] + torch.arange(len(rows_P), device=rows_P.device)
            fits_P = places_P < self.capacity
            if bool(fits_P.all()):
                self.keys_nC[first_row + rows_P, places_P] = keys_P
                filled += counts
                return
            fit_rows_P, rest_P = rows_P[fits_P], ~fits_P
            self.keys_nC[first_row + fit_rows_P, places_P[fits_P]] = keys_P[fits_P]
            filled += torch.bincount(fit_rows_P, minlength=num_rows)
            self._cut_back(first_row + torch.unique_consecutive(rows_P[rest_P]))
            rows_P, keys_P = rows_P[rest_P], keys_P[rest_P]

    def add_block(self, rows: slice, keys_qm: Tensor) -> None:
        """Adds a dense block of keys: all candidates of a range of rows."""
        merged = torch.cat([self.keys_nC[rows], keys_qm], dim=1)
        self._keep(rows, torch.topk(merged, self.k, dim=1, sorted=False).values)

    def ids(self) -> Tensor:
        """(n, K) int32 ids, hardest first."""
        ids_nK = torch.empty(len(self.keys_nC), self.k, dtype=torch.int32, device=self.keys_nC.device)
        for first in range(0, len(ids_nK), ROWS_AT_ONCE):  # unpacked keys of all rows would exceed W
            best = torch.topk(self.keys_nC[first : first + ROWS_AT_ONCE], self.k, dim=1).values
            ids_nK[first : first + ROWS_AT_ONCE] = unpack_scores(best)[1]
        return ids_nK

    def _cut_back(self, rows: Tensor) -> None:
        self._keep(rows, torch.topk(self.keys_nC[rows], self.k, dim=1, sorted=False).values)

    def _keep(self, rows: Tensor | slice, best_qK: Tensor) -> None:
        self.keys_nC[rows, : self.k] = best_qK
        self.keys_nC[rows, self.k :] = LOWEST_KEY
        kth_q = best_qK.amin(dim=1)
        filled_q = (best_qK != LOWEST_KEY).sum(dim=1)
        self.filled_n[rows] = filled_q
        bounds_q = torch.where(filled_q == self.k, unpack_scores(kth_q)[0], -torch.inf)
        self.bounds_n[rows] = torch.maximum(self.bounds_n[rows], bounds_q)


def pair_keys(query_qD: Tensor, class_mD: Tensor, rows_P: Tensor, columns_P: Tensor, first_class: int) -> Tensor:
    """Keys (P,) of the exact cosines of some pairs of unit rows, given in float64; `rows_P` ascends.

    A product of two dense matrices taken only where a sparse one has entries: no row is copied.
    """
    counts = torch.bincount(rows_P, minlength=len(query_qD))
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values = torch.zeros(len(rows_P), dtype=torch.float64, device=rows_P.device)
    with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
        warnings.simplefilter("ignore", UserWarning)
        pattern = torch.sparse_csr_tensor(
            starts, columns_P, values, (len(query_qD), len(class_mD)), check_invariants=False
        )
    cosine_P = torch.sparse.sampled_addmm(pattern, query_qD, class_mD.T, beta=0.0).values().float()
    return pack_pairs(cosine_P, first_class + columns_P)


def block_keys(query_qD: Tensor, class_mD: Tensor, first_query: int, first_class: int) -> Tensor:
    """Keys (q, m) of the exact cosines of all pairs of unit rows, given in float64; own cosines order below all."""
    keys_qm = pack_scores((query_qD @ class_mD.T).float(), first_class)
    both = range(max(first_query, first_class), min(first_query + keys_qm.shape[0], first_class + keys_qm.shape[1]))
    ids = torch.arange(both.start, max(both.start, both.stop), device=keys_qm.device)
    keys_qm[ids - first_query, ids - first_class] = LOWEST_KEY
    return keys_qm
