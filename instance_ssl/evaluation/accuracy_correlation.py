"""Instance accuracy against semantic accuracy over checkpoints (Figure 1(b)): metrics, and a picture of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.distributed.comm import Group


@torch.inference_mode()
def instance_accuracy(
    embed: Callable[[Tensor], Tensor],
    shard: ClassifierShard,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: Group,
    *,
    embedding_dim: int,
    on_batch: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """Measures the share of images whose own class is the nearest of all N, the lower of equal ones. Collective.

    Args:
        embed: images (b, 3, S, S) → embeddings (b, D), frozen.
        shard: the classifier's rows.
        batches: this rank's (images, instance ids (b,)), as many on each rank, of any lengths; every image once over
            all ranks.
        on_batch: called with the number of images of each batch over all ranks.

    Returns:
        "instance_accuracy", a fraction, and "images".
    """
    correct = images = 0
    for batch_images, id_b in batches:
        counts = world.row_counts(len(id_b))
        if not any(counts):
            continue
        # The shard takes equally many rows from each rank; a padding row of zeros, with id -1, is never correct.
        x_bD = torch.zeros(max(counts), embedding_dim, device=world.device)
        padded_b = torch.full((max(counts),), -1, dtype=torch.int64, device=world.device)
        if len(id_b):
            x_bD[: len(id_b)] = embed(batch_images.to(world.device, non_blocking=True)).float()
            padded_b[: len(id_b)] = id_b.to(world.device)
        share, _ = shard.measure(x_bD, padded_b)
        correct += round(share * max(counts) * world.size)
        images += sum(counts)
        on_batch(sum(counts))
    return {"instance_accuracy": correct / images, "images": images}


def correlations(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    """Pearson's r and Spearman's ρ (ties share their mean rank); None where a side does not vary.

    Raises:
        ValueError: for fewer than two pairs, or sides of different lengths.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"correlation of {len(x)} and {len(y)} values")
    return {"pearson": _pearson(x, y), "spearman": _pearson(_ranks(x), _ranks(y))}


def draw_correlation(path: Path, points: Sequence[Mapping[str, float]], note: str) -> None:
    """Writes Figure 1(b) as a PNG: a point for each checkpoint, coloured by epoch."""
    from matplotlib.figure import Figure  # half a second, and one rank of one stage draws

    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    xs, ys, epochs = ([point[key] for point in points] for key in ("instance_accuracy", "knn_top1", "epoch"))
    drawn = axes.scatter(xs, ys, c=epochs, cmap="viridis", zorder=3)
    figure.colorbar(drawn, label="epoch")
    axes.set(xlabel="instance accuracy, %", ylabel="semantic accuracy (k-NN), %")
    axes.set_title(note, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    pairs = torch.tensor([x, y], dtype=torch.float64)
    pairs -= pairs.mean(dim=1, keepdim=True)
    norms = torch.linalg.vector_norm(pairs, dim=1)
    if bool((norms == 0).any()):
        return None
    return float((pairs[0] @ pairs[1]) / (norms[0] * norms[1]))


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 0; ties share their mean rank."""
    column = torch.tensor(values, dtype=torch.float64)
    below_n = (column[:, None] > column).sum(dim=1)
    equal_n = (column[:, None] == column).sum(dim=1)
    return (below_n + (equal_n - 1) / 2).tolist()
