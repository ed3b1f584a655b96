"""Retrieval among labelled images, each a query against all others: same-class top-1, and recall@k.

The paper ("A Contrastive Prior") searches ImageNet's train set by features of a random network with running batch
norms: the nearest image has the query's class in 3 % of the cases, against 0.1 % by chance.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.evaluation.knn import ShardedBank, query_chunks


def retrieval_recall(
    features_nF: Tensor,
    labels_n: Tensor,
    group: Group,
    *,
    recall_at: Sequence[int],
    chunk_rows: int = 1024,
    on_chunk: Callable[[int], object] = lambda count: None,
) -> dict[str, float]:
    """Measures how often an image of the query's class is among its k nearest others, by cosine, exactly.

    Each query is excluded from its own ranking; equal cosines are ordered by image id. The only image of a class counts
    as a query that finds nothing.

    Args:
        features_nF, labels_n: this rank's features, any number, and their classes from 0.
        recall_at: the values of k.
        chunk_rows: queries searched at once.
        on_chunk: called on all ranks with the number of queries of each finished chunk, all ranks' in turn.

    Returns:
        "top1" (the nearest other image is of the query's class), "recall@k" for every k, and "chance_top1" (of an
        image drawn among the others), in per cent, and "queries". The same on all ranks.

    Raises:
        UserError: when a k is below 1 or above the number of other images.
    """
    bank = ShardedBank(features_nF, group)
    largest = max(recall_at)
    if min(recall_at) < 1 or largest >= bank.total:
        raise UserError(
            f"evaluation.retrieval.recall_at {list(recall_at)} of {bank.total} images: an image has only "
            f"{bank.total - 1} others"
        )
    counts = group.row_counts(features_nF.shape[0])
    first_id = sum(counts[: group.rank])
    labels_N = group.all_gather_rows(labels_n.long(), group.row_counts(labels_n.shape[0]))
    found_k = torch.zeros(largest, dtype=torch.int64, device=group.device)
    for owner, rows, chunk_qF in query_chunks(features_nF, counts, group, chunk_rows):
        ids_qk = bank.search(chunk_qF, largest + 1)[1]
        if owner == group.rank:
            own_q = torch.arange(rows.start, rows.stop, device=ids_qk.device) + first_id
            hits_qk = labels_N[_without(ids_qk, own_q)] == labels_N[own_q, None]
            found_k += (hits_qk.cumsum(dim=1) > 0).sum(dim=0)
        on_chunk(len(chunk_qF))
    per_cent = (100 * group.all_reduce_sum_(found_k).double() / bank.total).tolist()
    per_class = torch.bincount(labels_N).double()
    chance = 100 * ((per_class * (per_class - 1)).sum() / (bank.total * (bank.total - 1))).item()
    recalls = {f"recall@{k}": per_cent[k - 1] for k in recall_at}
    return {"top1": per_cent[0], **recalls, "chance_top1": chance, "queries": bank.total}


def _without(ids_qk: Tensor, own_q: Tensor) -> Tensor:
    """(q, k - 1): each ranking without the query itself, or without the last one where duplicates fill it."""
    is_own_qk = (ids_qk == own_q[:, None]).to(torch.int8)
    return ids_qk.gather(1, is_own_qk.argsort(dim=1, stable=True)[:, :-1])
