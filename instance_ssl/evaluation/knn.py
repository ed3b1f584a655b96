"""Weighted k-nearest-neighbour classification over a bank that is sharded over the ranks.

The vote is that of Wu et al. 2018 (arXiv:1805.01978, section 3.4): neighbour i of cosine similarity s_i votes for its
class with weight exp(s_i / T).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from instance_ssl.classifier.softmax import finite_rows, scaled_rows
from instance_ssl.classifier.tie_breaking import LOWEST_KEY, pack_scores, unpack_scores
from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.evaluation.linear import count_correct


class ShardedBank:
    """L2-normalised features of N images, a contiguous part on each rank, searched by all ranks together.

    Args:
        bank_nF: this rank's features, normalised here; rows of zeros stay zeros, rows that are not finite rank last.
        group: the ranks that hold the bank.
        block_rows: bank rows compared at once; besides the normalised copy of the local part, the memory is bounded by
            a few (queries, block_rows) and (block_rows, F) matrices.
    """

    def __init__(self, bank_nF: Tensor, group: Group, block_rows: int = 16384) -> None:
        counts = group.row_counts(bank_nF.shape[0])
        self.total = sum(counts)
        self._first_id = sum(counts[: group.rank])
        self._bank_nF = _normalise(bank_nF, block_rows)
        self._not_finite_n = ~finite_rows(self._bank_nF)
        self._bank_nF[self._not_finite_n] = 0
        self._group = group
        self._block_rows = block_rows

    def search(self, queries_qF: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Finds the k nearest bank images of each query; every rank calls this with the same queries.

        Equal similarities are ordered by image id, lowest first, so that the result does not depend on how the bank is
        divided.

        Args:
            queries_qF: the same on all ranks, of any length.
            k: 1 … N.

        Returns:
            Cosine similarities (q, k), float32, descending, and global image ids (q, k), int64.
        """
        queries = queries_qF.shape[0]
        own_qk = self._search_own(_normalise(queries_qF), k)
        every_Tqk = self._group.all_gather_rows(own_qk).view(self._group.size, queries, k)
        return unpack_scores(every_Tqk.transpose(0, 1).reshape(queries, -1).topk(k).values)

    def _search_own(self, queries_qF: Tensor, k: int) -> Tensor:
        """The packed k best of the local rows, (q, k), padded with the lowest key where there are fewer than k."""
        queries_qF = queries_qF.double()
        best_qk = torch.full((queries_qF.shape[0], k), LOWEST_KEY, dtype=torch.int64, device=queries_qF.device)
        for start in range(0, self._bank_nF.shape[0], self._block_rows):
            block_bF = self._bank_nF[start : start + self._block_rows]
            # Float64 products rounded to float32 do not depend on the block's shape: equal images have equal scores.
            scores_qb = (queries_qF @ block_bF.double().T).float()
            scores_qb.masked_fill_(self._not_finite_n[start : start + self._block_rows], -torch.inf)
            packed_qb = pack_scores(scores_qb, self._first_id + start)
            packed_qb = packed_qb.topk(min(k, packed_qb.shape[1])).values
            best_qk = torch.cat([best_qk, packed_qb], dim=1).topk(k).values
        return best_qk


def knn_accuracy(
    bank_nF: Tensor,
    bank_labels_n: Tensor,
    queries_mF: Tensor,
    query_labels_m: Tensor,
    group: Group,
    *,
    neighbours: Sequence[int],
    temperatures: Sequence[float],
    num_classes: int,
    chunk_rows: int = 1024,
    on_chunk: Callable[[int], object] = lambda count: None,
) -> dict[tuple[int, float], dict[str, float]]:
    """Measures the accuracy of the weighted vote for every (k, T), in one pass over the bank.

    Args:
        bank_nF, bank_labels_n: this rank's training features, any number, and their classes 0 … num_classes - 1.
        queries_mF, query_labels_m: the same of the test images.
        neighbours: the values of k.
        temperatures: the values of T, above 0.
        chunk_rows: queries searched at once.
        on_chunk: called on all ranks with the number of queries of each finished chunk, all ranks' in turn.

    Returns:
        {(k, T): {"top1": …, "top5": …}} in per cent, the same on all ranks. The lower class wins ties.

    Raises:
        UserError: when a k is below 1 or above the number of bank images.
        ValueError: when there are no queries.
    """
    bank = ShardedBank(bank_nF, group)
    for k in neighbours:
        if not 1 <= k <= bank.total:
            raise UserError(f"knn.neighbours: {k} of {bank.total} training images; choose from 1 to {bank.total}")
    query_counts = group.row_counts(queries_mF.shape[0])
    if sum(query_counts) == 0:
        raise ValueError("no query images")
    labels_N = group.all_gather_rows(bank_labels_n.long(), group.row_counts(bank_labels_n.shape[0]))
    settings = [(k, temperature) for k in neighbours for temperature in temperatures]
    correct = torch.zeros(len(settings), 2, dtype=torch.int64, device=group.device)
    for owner, rows, chunk_qF in query_chunks(queries_mF, query_counts, group, chunk_rows):
        scores_qk, ids_qk = bank.search(chunk_qF, max(neighbours))
        if owner == group.rank:
            for setting, (k, temperature) in enumerate(settings):
                votes_qC = _vote(scores_qk[:, :k], labels_N[ids_qk[:, :k]], temperature, num_classes)
                correct[setting] += count_correct(votes_qC, query_labels_m[rows])
        on_chunk(len(chunk_qF))
    per_cent = 100 * group.all_reduce_sum_(correct).double() / sum(query_counts)
    return {
        setting: {"top1": top1, "top5": top5} for setting, (top1, top5) in zip(settings, per_cent.tolist(), strict=True)
    }


def query_chunks(
    queries_mF: Tensor, counts: Sequence[int], group: Group, chunk_rows: int
) -> Iterator[tuple[int, slice, Tensor]]:
    """Broadcasts every rank's queries in turn: yields the owner, its rows, and the queries (q, F)."""
    for owner, count in enumerate(counts):
        for start in range(0, count, chunk_rows):
            rows = slice(start, min(start + chunk_rows, count))
            if owner == group.rank:
                chunk_qF = queries_mF[rows].contiguous()
            else:
                chunk_qF = queries_mF.new_empty(rows.stop - rows.start, queries_mF.shape[1])
            yield owner, rows, group.broadcast_(chunk_qF, owner)


def _vote(scores_qk: Tensor, labels_qk: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Votes (q, C), float32, relative to the nearest neighbour's, so that no temperature over- or underflows them."""
    scores_qk = scores_qk.double()
    weights_qk = torch.exp((scores_qk - scores_qk[:, :1]) / temperature)
    votes_qC = weights_qk.new_zeros(scores_qk.shape[0], num_classes).scatter_add_(1, labels_qk, weights_qk)
    # Summed in float64 and rounded: equal weights tie whatever the order of the additions.
    return votes_qC.float()


def _normalise(features_nF: Tensor, block_rows: int = 16384) -> Tensor:
    """Scales rows to length 1, float32, by blocks; rows of zeros stay zeros."""
    unit_nF = torch.empty(features_nF.shape, dtype=torch.float32, device=features_nF.device)
    for start in range(0, features_nF.shape[0], block_rows):
        block_bF = scaled_rows(features_nF[start : start + block_rows])
        norms_b = torch.linalg.vector_norm(block_bF, dim=1, keepdim=True, dtype=torch.float64)
        torch.div(block_bF, norms_b.clamp_min(1e-12).float(), out=unit_nF[start : start + block_rows])
    return unit_nF
