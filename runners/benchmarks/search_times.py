"""Times the hard-class search beside `faiss.IndexFlatIP` and `torch.mm` + `torch.topk`, in turns on equal threads."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from instance_ssl.classifier.hard_classes import find_hard_classes
from instance_ssl.classifier.softmax import normalise_rows
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError

# Two classes whose float64 cosines with a third differ by less are a tie for a float32 search of D ≤ 512.
TIE = 2.0**-20
_ROWS_AT_ONCE = 1024


def make_rows(num_classes: int, embedding_dim: int, num_clusters: int) -> Tensor:
    """Draws (N, D) float32 unit rows: normal, or around `num_clusters` normal centres with 0.7 of their spread."""
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(num_classes, embedding_dim, generator=generator)
    if num_clusters:
        centres = torch.randn(num_clusters, embedding_dim, generator=generator)
        rows_ND = centres[torch.randint(0, num_clusters, (num_classes,), generator=generator)] + 0.7 * rows_ND
    return normalise_rows(rows_ND)[0]


def compare(
    unit_ND: Tensor, num_hard_classes: int, group: Group, *, repeats: int, block_bytes: int, with_torch: bool
) -> list[dict[str, Any]]:
    """Times every implementation `repeats` times, in turns, on torch's number of threads; ours comes first.

    A row differs if its set of classes is not ours; it is wrong if no tie explains the difference.

    Args:
        unit_ND: (N, D) unit rows, float32.
        block_bytes: workspace of our search.

    Raises:
        UserError: faiss is not installed, or there are several ranks, on which it cannot search.
    """
    faiss = _import_faiss()
    if group.size > 1:
        raise UserError("faiss searches on one rank: run this benchmark without a launcher")
    faiss.omp_set_num_threads(torch.get_num_threads())
    partition = Partition(len(unit_ND), group.size)

    def ours(screen_dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: find_hard_classes(
            unit_ND, num_hard_classes, partition, group, block_bytes=block_bytes, screen_dtype=screen_dtype
        )

    searches = {
        "ours, bfloat16 screening": ours(torch.bfloat16),
        "ours, float32 screening": ours(torch.float32),
        "faiss IndexFlatIP": lambda: _without_self(_faiss_search(faiss, unit_ND, num_hard_classes + 1)),
    }
    if with_torch:
        searches["torch mm + topk"] = lambda: _without_self(_torch_search(unit_ND, num_hard_classes + 1))
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    tables: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, search in searches.items():
            started = time.perf_counter()
            tables[name] = search()
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(tables))
    return [
        {
            "search": name,
            "N": len(unit_ND),
            "K": num_hard_classes,
            "median_s": statistics.median(seconds[name]),
            "min_s": min(seconds[name]),
            "max_s": max(seconds[name]),
            "ratio_to_ours": statistics.median(seconds[name]) / statistics.median(seconds[first]),
            **_differences(unit_ND, tables[first], table),
        }
        for name, table in tables.items()
    ]


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("this benchmark compares with faiss, which is not installed: pip install faiss-cpu") from None
    return faiss


def _faiss_search(faiss: Any, unit_ND: Tensor, k: int) -> Tensor:
    index = faiss.IndexFlatIP(unit_ND.shape[1])
    index.add(unit_ND.numpy())
    return torch.from_numpy(index.search(unit_ND.numpy(), k)[1])


def _torch_search(unit_ND: Tensor, k: int) -> Tensor:
    return torch.cat([(rows @ unit_ND.T).topk(k, dim=1).indices for rows in unit_ND.split(_ROWS_AT_ONCE)])


def _without_self(ids_Nk: Tensor) -> Tensor:
    """Drops the row's own class, or the last one if a duplicate displaced it: (N, k) → (N, k - 1)."""
    is_self = ids_Nk == torch.arange(len(ids_Nk))[:, None]
    is_self[:, -1] |= ~is_self.any(dim=1)
    return ids_Nk[~is_self].view(len(ids_Nk), -1)


def _differences(unit_ND: Tensor, ours_NK: Tensor, theirs_NK: Tensor) -> dict[str, int]:
    """Counts rows whose sets differ, and rows whose sorted float64 cosines differ by more than a tie."""
    unequal = (ours_NK.long().sort(dim=1).values != theirs_NK.long().sort(dim=1).values).any(dim=1)
    rows = torch.nonzero(unequal).flatten()
    wrong = 0
    for some in rows.split(_ROWS_AT_ONCE):
        query = unit_ND[some, :, None].double()
        ours, theirs = (
            torch.bmm(unit_ND[table[some].long()].double(), query).squeeze(2).sort(dim=1).values
            for table in (ours_NK, theirs_NK)
        )
        wrong += int(((ours - theirs).abs() > TIE).any(dim=1).sum())
    return {"differing_rows": len(rows), "wrong_rows": wrong}
