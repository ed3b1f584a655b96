"""The K most similar other classes of every class, exactly (paper, "Smoothing Labels of Hardest Classes").

Query rows stay with their owner, class blocks travel: each rank in turn broadcasts its rows block by block, and every
rank merges the block into the running top-K of its own rows. N x N is never stored.

Equal cosines (duplicate images, say) are settled by the lower id, whatever the block size or the number of ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from instance_ssl.classifier.cosine_softmax import normalise_rows
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.ordering import LOWEST_KEY, pack_scores, unpack_scores

# Memory for one block of keys where the configuration leaves it open.
DEFAULT_BLOCK_BYTES = 32 * 2**20


def find_hard_classes(
    weight_nD: Tensor,
    num_hard_classes: int,
    partition: Partition,
    group: Group,
    *,
    block_bytes: int,
    on_block: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Top-K of cos(w_i, w_j), j ≠ i, for every own class i.

    Args:
        weight_nD: (n, D) float32 own rows of W.
        num_hard_classes: K, 1 … N - 1.
        partition: how the N classes lie on the ranks.
        block_bytes: memory for one block of keys.
        on_block: called with (class blocks done, class blocks in all).

    Returns:
        (n, K) int32, hardest first.
    """
    start, stop = partition.bounds(group.rank)
    block_rows = tile_edge(block_bytes)
    unit_w_nD, _ = normalise_rows(weight_nD.float())
    best_nK = torch.full((stop - start, num_hard_classes), LOWEST_KEY, dtype=torch.int64, device=weight_nD.device)
    blocks = [
        (source, first, min(first + block_rows, partition.bounds(source)[1]))
        for source in range(group.size)
        for first in range(*partition.bounds(source), block_rows)
    ]
    for done, (source, first, last) in enumerate(blocks, start=1):
        block_mD = unit_w_nD.new_empty(last - first, unit_w_nD.shape[1])
        if source == group.rank:
            block_mD.copy_(unit_w_nD[first - start : last - start])
        group.broadcast_(block_mD, source)
        for query in range(0, stop - start, block_rows):
            rows = slice(query, min(query + block_rows, stop - start))
            # Float64 products rounded to float32 do not depend on the block's shape: equal rows have equal cosines.
            cosine_qm = (unit_w_nD[rows].double() @ block_mD.double().T).float()
            keys_qm = pack_scores(cosine_qm, first)
            _mask_self(keys_qm, start + query, first)
            merged = torch.cat([best_nK[rows], keys_qm], dim=1)
            best_nK[rows] = torch.topk(merged, num_hard_classes, dim=1).values
        if on_block is not None:
            on_block(done, len(blocks))
    return unpack_scores(best_nK)[1].int()


def tile_edge(block_bytes: int) -> int:
    """Queries, and keys, that are compared at once."""
    return max(1, min(4096, int((block_bytes / 8) ** 0.5)))


def _mask_self(keys_qm: Tensor, first_query: int, first_class: int) -> None:
    """A class is not its own neighbour."""
    both = range(max(first_query, first_class), min(first_query + keys_qm.shape[0], first_class + keys_qm.shape[1]))
    ids = torch.arange(both.start, max(both.start, both.stop), device=keys_qm.device)
    keys_qm[ids - first_query, ids - first_class] = LOWEST_KEY
