"""Figure 4's similarities: how much closer an instance's embeddings are to its own class than to others.

The paper plots "average intra- and inter-instance-class cosine similarities" of each initialisation and does not say
between what. Here a random view's embedding is compared with its own row of W and all others, as in the classifier's
first step, and with other views of the same image and of other images.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError


def instance_similarities(views_nVD: Tensor, weights_nD: Tensor, group: Group) -> dict[str, float]:
    """Mean cosines over all pairs, exactly: the mean over N² pairs follows from a few sums over N.

    Σ_{i≠j} x_i·y_j = (Σ x_i)·(Σ y_j) − Σ x_i·y_i for unit vectors, in float64. Vectors of zeros count as cosine 0.

    Args:
        views_nVD: embeddings of V ≥ 2 views of this rank's images, of which there may be none.
        weights_nD: their rows of W.

    Returns:
        "intra_class" cos(x_iv, w_i), "inter_class" cos(x_iv, w_j), "intra_view" cos(x_iu, x_iv), "inter_view"
        cos(x_iu, x_jv), for i ≠ j and u ≠ v (inter_view: any u, v), "class_gap" and "view_gap", intra less inter,
        all in [-2, 2], and "images". The same on all ranks.

    Raises:
        UserError: for fewer than two images over all ranks.
    """
    images, views = sum(group.row_counts(len(views_nVD))), views_nVD.shape[1]
    if images < 2:
        raise UserError(f"similarities need at least 2 images, not {images}")
    unit_nVD, unit_nD = _unit(views_nVD), _unit(weights_nD)
    sums_nD = unit_nVD.sum(dim=1)
    square_sums = torch.stack([sums_nD.square().sum(), unit_nVD.square().sum(), (sums_nD * unit_nD).sum()])
    packed = group.all_reduce_sum_(torch.cat([sums_nD.sum(dim=0), unit_nD.sum(dim=0), square_sums]))
    sum_x_D, sum_w_D, (image_squares, view_squares, own) = packed.split([unit_nD.shape[1], unit_nD.shape[1], 3])
    others = images * (images - 1)
    intra_class = own / (images * views)
    inter_class = (sum_x_D @ sum_w_D - own) / (views * others)
    intra_view = (image_squares - view_squares) / (images * views * (views - 1))
    inter_view = (sum_x_D @ sum_x_D - image_squares) / (views * views * others)
    return {
        "intra_class": intra_class.item(),
        "inter_class": inter_class.item(),
        "class_gap": (intra_class - inter_class).item(),
        "intra_view": intra_view.item(),
        "inter_view": inter_view.item(),
        "view_gap": (intra_view - inter_view).item(),
        "images": images,
    }


def draw_similarities(path: Path, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Writes Figure 4's bars as a PNG, by initialisation."""
    from matplotlib.figure import Figure  # half a second, and one rank of one stage draws

    picture = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, kind, title in zip(
        picture.subplots(1, 2, sharey=True), ("class", "view"), ("a view and rows of W", "two views"), strict=True
    ):
        for shift, key, label, colour in (
            (-0.2, f"intra_{kind}", "same instance", "#2a6f97"),
            (0.2, f"inter_{kind}", "other instances", "#e9a03b"),
        ):
            heights = [row[key] for row in figures.values()]
            bars = axes.bar([place + shift for place in range(len(figures))], heights, 0.38, label=label, color=colour)
            axes.bar_label(bars, fmt="%.3f", fontsize=7)
        axes.set_xticks(range(len(figures)), list(figures))
        axes.set_title(f"Mean cosine of {title}", fontsize=10)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = picture.axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    picture.savefig(path, dpi=120)


def _unit(vectors: Tensor) -> Tensor:
    """Length 1 along the last dimension, float64; zeros stay zeros."""
    norms = torch.linalg.vector_norm(vectors.double(), dim=-1, keepdim=True)
    return vectors.double() / norms.where(norms > 0, 1)
