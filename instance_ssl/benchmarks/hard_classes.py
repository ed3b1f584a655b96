"""The hard-class search against `faiss.IndexFlatIP` and `torch.mm` + `torch.topk`, interleaved on equal threads."""

import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instance_ssl.classifier.cosine_softmax import normalise_rows
from instance_ssl.classifier.hard_classes import find_hard_classes
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError

# Two classes whose float64 cosines with a third differ by less are a tie for a float32 search of D ≤ 512.
TIE = 2.0**-20
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Timing:
    """One implementation at one size.

    Attributes:
        seconds: of every repeat, in order.
        different_rows: rows whose set of classes differs from ours.
        wrong_rows: of those, the rows that no tie explains.
    """

    name: str
    num_classes: int
    seconds: list[float]
    different_rows: int
    wrong_rows: int

    @property
    def median(self) -> float:
        """Median of the repeats, seconds."""
        return statistics.median(self.seconds)


def make_rows(num_classes: int, embedding_dim: int, num_clusters: int) -> Tensor:
    """(N, D) float32 unit rows: normal, or around `num_clusters` normal centres with 0.7 of their spread."""
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(num_classes, embedding_dim, generator=generator)
    if num_clusters:
        centres = torch.randn(num_clusters, embedding_dim, generator=generator)
        rows_ND = centres[torch.randint(0, num_clusters, (num_classes,), generator=generator)] + 0.7 * rows_ND
    return normalise_rows(rows_ND)[0]


def compare(
    unit_ND: Tensor, k: int, group: Group, *, repeats: int, threads: int, block_bytes: int, with_torch: bool
) -> list[Timing]:
    """Every implementation `repeats` times, in turns; ours comes first."""
    faiss = _import_faiss()
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    partition = Partition(len(unit_ND), group.size)

    def ours(screen_dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: find_hard_classes(
            unit_ND, k, partition, group, block_bytes=block_bytes, screen_dtype=screen_dtype
        )

    searches = {
        "ours, bfloat16 screening": ours(torch.bfloat16),
        "ours, float32 screening": ours(torch.float32),
        "faiss IndexFlatIP": lambda: _without_self(_faiss_search(faiss, unit_ND, k + 1)),
    }
    if with_torch:
        searches["torch mm + topk"] = lambda: _without_self(_torch_search(unit_ND, k + 1))
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    tables: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, search in searches.items():
            started = time.perf_counter()
            tables[name] = search()
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(tables.values()))
    return [
        Timing(name, len(unit_ND), seconds[name], *_differences(unit_ND, first, table))
        for name, table in tables.items()
    ]


def describe(timings: Sequence[Timing]) -> str:
    """A table: medians, spread, ratio to ours, rows that differ."""
    lines = [f"{'N':>8} {'search':28} {'median s':>9} {'min':>8} {'max':>8} {'ratio':>6} {'differ':>7} {'wrong':>6}"]
    for t in timings:
        ratio = t.median / timings[0].median
        lines.append(
            f"{t.num_classes:8} {t.name:28} {t.median:9.2f} {min(t.seconds):8.2f} {max(t.seconds):8.2f} {ratio:6.2f} "
            f"{t.different_rows:7} {t.wrong_rows:6}"
        )
    return "\n".join(lines)


def write_csv(path: Path, timings: Sequence[Timing]) -> None:
    """One line for every repeat."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["num_classes", "search", "repeat", "seconds", "different_rows", "wrong_rows"])
        for t in timings:
            for repeat, seconds in enumerate(t.seconds):
                writer.writerow([t.num_classes, t.name, repeat, f"{seconds:.4f}", t.different_rows, t.wrong_rows])


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("this benchmark compares with faiss: pip install faiss-cpu") from None
    return faiss


def _faiss_search(faiss: Any, unit_ND: Tensor, k: int) -> Tensor:
    index = faiss.IndexFlatIP(unit_ND.shape[1])
    index.add(unit_ND.numpy())
    return torch.from_numpy(index.search(unit_ND.numpy(), k)[1])


def _torch_search(unit_ND: Tensor, k: int) -> Tensor:
    return torch.cat([(rows @ unit_ND.T).topk(k, dim=1).indices for rows in unit_ND.split(_ROWS_AT_ONCE)])


def _without_self(ids_Nk: Tensor) -> Tensor:
    """(N, k - 1): the row's own class dropped, or the last where a duplicate pushed it out."""
    is_self = ids_Nk == torch.arange(len(ids_Nk))[:, None]
    is_self[:, -1] |= ~is_self.any(dim=1)
    return ids_Nk[~is_self].view(len(ids_Nk), -1)


def _differences(unit_ND: Tensor, ours_NK: Tensor, theirs_NK: Tensor) -> tuple[int, int]:
    """Rows whose sets differ; and those whose sorted float64 cosines differ by more than a tie, or beat ours."""
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
    return len(rows), wrong
