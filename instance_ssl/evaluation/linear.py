"""Linear classifiers on a frozen encoder: logistic regression on cached features, and the papers' SGD protocol.

Both keep weights and bias as one replicated matrix (C, F + 1) and sum the loss and its gradient over the ranks, so that
all ranks take the same steps.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from instance_ssl.distributed.comm import Group
from instance_ssl.errors import UserError
from instance_ssl.evaluation.epoch_log import Batches, LabelledBatches, Progress, mean_loss, train_epochs
from instance_ssl.evaluation.features import evaluation_mode, extract_features

_BLOCK_ROWS = 65536


def places(scores_nC: Tensor, labels_n: Tensor) -> Tensor:
    """Counts the classes that rank above each row's own: int64 (n,), 0 for a correct row.

    Equal scores rank the lower class first; a NaN ranks last.
    """
    own_n1 = scores_nC.gather(1, labels_n[:, None])
    classes = torch.arange(scores_nC.shape[1], device=scores_nC.device)
    ahead_nC = ~(scores_nC <= own_n1) | ((scores_nC == own_n1) & (classes < labels_n[:, None]))
    return ahead_nC.sum(dim=1).masked_fill(own_n1[:, 0].isnan(), max(5, scores_nC.shape[1]))


def count_correct(scores_nC: Tensor, labels_n: Tensor) -> Tensor:
    """Counts the rows that are correct at top-1 and at top-5: int64 (2,).

    Equal scores rank the lower class first; NaN is never correct. Fewer than 5 classes are all in the top 5.
    """
    places_n = places(scores_nC, labels_n)
    return torch.stack([(places_n == 0).sum(), (places_n < 5).sum()])


def probe_cached_features(
    train_nF: Tensor,
    train_labels_n: Tensor,
    test_mF: Tensor,
    test_labels_m: Tensor,
    group: Group,
    *,
    num_classes: int,
    l2_penalties: Sequence[float],
    held_out_fraction: float = 0.1,
    seed: int,
    max_iterations: int = 200,
    on_evaluation: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Fits multinomial logistic regression on cached features, its penalty chosen on held-out training images.

    Minimises mean cross-entropy + penalty / 2 · ‖weights‖² (bias free) by full-batch L-BFGS in float64, from the
    strongest penalty to the weakest, each from the previous solution; the best penalty (the stronger of equals) is then
    fitted to all training images. Features are standardised over the whole training set, held-out part included. L-BFGS
    without augmentation is SimCLR's protocol for small sets (arXiv:2002.05709, B.8).

    Args:
        train_nF, train_labels_n: this rank's features, any number, and their classes 0 … num_classes - 1.
        test_mF, test_labels_m: the same of the test images.
        held_out_fraction: share of the training images that the penalty is chosen on, at least one image.
        seed: decides which images those are, whatever the number of ranks.
        max_iterations: L-BFGS iterations of each fit.
        on_evaluation: called on all ranks before each evaluation of the objective.

    Returns:
        "top1", "top5" and "held_out_top1" in per cent; "l2_penalty" chosen; "iterations" of the last fit;
        "max_iterations", "train_images", "test_images". The same on all ranks.

    Raises:
        UserError: when there are fewer than 2 training images; ValueError: when there are no test images.
    """
    counts = group.row_counts(train_nF.shape[0])
    held_out_n = _draw_held_out(counts, held_out_fraction, seed)[group.rank].to(train_nF.device)
    mean_F, std_F = _moments(train_nF, sum(counts), group)
    train = _Rows(train_nF, train_labels_n.long(), mean_F, std_F)
    test = _Rows(test_mF, test_labels_m.long(), mean_F, std_F)
    fitted, held_out = train.select(~held_out_n), train.select(held_out_n)
    theta = torch.zeros(num_classes, train_nF.shape[1] + 1, dtype=torch.float64, device=group.device)
    best_top1, best_penalty, best_theta = -1.0, max(l2_penalties), theta
    for penalty in sorted(l2_penalties, reverse=True):
        theta, _ = _fit(theta, fitted, penalty, group, max_iterations, on_evaluation)
        top1 = _accuracy(theta, held_out.blocks(), group)["top1"]
        if top1 > best_top1:
            best_top1, best_penalty, best_theta = top1, penalty, theta
    theta, iterations = _fit(best_theta, train, best_penalty, group, max_iterations, on_evaluation)
    return {
        **_accuracy(theta, test.blocks(), group),
        "l2_penalty": best_penalty,
        "held_out_top1": best_top1,
        "iterations": iterations,
        "max_iterations": max_iterations,
        "train_images": sum(counts),
    }


def train_linear_classifier(
    features: Callable[[Tensor], Tensor],
    data: LabelledBatches,
    group: Group,
    *,
    feature_dim: int,
    epochs: int = 100,
    learning_rate: float = 40.0,
    global_batch_size: int = 2048,
    seed: int = 0,
    state: dict[str, Any] | None = None,
    on_epoch: Callable[[Progress], None] = lambda done: None,
) -> dict[str, float]:
    """Trains a linear layer by SGD on features of augmented images, the encoder frozen in evaluation mode.

    Liu et al. give batch 2048, learning rate 40 and the cosine; 100 epochs, no weight decay, weights ~ N(0, 0.01²) and
    bias 0 are MoCo's (facebookresearch/moco, main_lincls.py).

    Args:
        features: images (b, …) to features (b, F), without gradients; F is `feature_dim`.
        learning_rate: of the first step; falls to 0 along a cosine, step by step.
        global_batch_size: only reported; the gradient is the mean over the images that a batch really has.
        seed: of the weights.
        state: of an earlier training's `Progress`, to resume from.
        on_epoch: called at the end of every epoch.

    Returns:
        "top1" and "top5" in per cent, "train_loss" (mean of the last epoch, nats), "epochs", "learning_rate",
        "global_batch_size", "test_images". The same on all ranks.

    Raises:
        DivergedError: when the loss is not finite.
        ValueError: when an epoch has no training images or there are no test images.
    """
    # Drawn on the CPU: the same on every rank and device.
    weights_CF = torch.empty(data.num_classes, feature_dim)
    weights_CF.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
    theta = torch.cat([weights_CF, torch.zeros(data.num_classes, 1)], dim=1).to(group.device)
    optimizer = torch.optim.SGD([theta], lr=learning_rate, momentum=0.9)
    steps_per_epoch = data.steps_per_epoch

    def train_epoch(epoch: int) -> float:
        epochs_done = (epoch + step / steps_per_epoch for step in range(steps_per_epoch))
        rates = [learning_rate * 0.5 * (1 + math.cos(math.pi * done / epochs)) for done in epochs_done]
        parts = _labelled_parts(data.train_parts(epoch), features, feature_dim, data.labels, group.device)
        return _train_epoch(optimizer, theta, rates, parts, group)

    with evaluation_mode(features):
        train_loss = train_epochs(
            train_epoch, epochs, optimizer, "theta", lambda: theta, theta.copy_, state=state, on_epoch=on_epoch
        )
        one_by_one = ([batch] for batch in data.test_batches())
        rows = _labelled_parts(one_by_one, features, feature_dim, data.test_labels, group.device)
        accuracy = _accuracy(theta, rows, group)
    settings = {"epochs": epochs, "learning_rate": learning_rate, "global_batch_size": global_batch_size}
    return {**accuracy, "train_loss": train_loss, **settings}


@dataclass(frozen=True)
class _Rows:
    """This rank's features and classes, standardised a block at a time to avoid a second copy."""

    features_nF: Tensor
    labels_n: Tensor
    mean_F: Tensor
    std_F: Tensor

    def select(self, mask_n: Tensor) -> "_Rows":
        return replace(self, features_nF=self.features_nF[mask_n], labels_n=self.labels_n[mask_n])

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Standardised features (b, F), float64, and classes (b,)."""
        for start in range(0, self.labels_n.shape[0], _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            yield (self.features_nF[rows].double() - self.mean_F) / self.std_F, self.labels_n[rows]


def _draw_held_out(counts: Sequence[int], fraction: float, seed: int) -> Sequence[Tensor]:
    """Draws the held-out images among all images, in order of rank: a mask for each rank."""
    total = sum(counts)
    if total < 2:
        raise UserError(f"linear probe: {total} training images, too few to hold some out; give at least 2")
    held_out = min(max(round(fraction * total), 1), total - 1)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    mask_N = torch.zeros(total, dtype=torch.bool)
    mask_N[order[:held_out]] = True
    return mask_N.split(list(counts))


def _moments(features_nF: Tensor, total: int, group: Group) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (F,), float64, over all ranks; a constant feature gets the deviation 1."""
    sums_F = features_nF.new_zeros(features_nF.shape[1], dtype=torch.float64)
    for block_bF in features_nF.split(_BLOCK_ROWS):
        sums_F += block_bF.double().sum(dim=0)
    mean_F = group.all_reduce_sum_(sums_F) / total
    squares_F = torch.zeros_like(mean_F)
    for block_bF in features_nF.split(_BLOCK_ROWS):
        squares_F += (block_bF.double() - mean_F).square().sum(dim=0)
    std_F = (group.all_reduce_sum_(squares_F) / total).sqrt()
    # The rounding of the mean gives a constant feature a deviation that is not quite 0.
    return mean_F, torch.where(std_F > 1e-6 * mean_F.abs(), std_F, 1.0)


def _fit(
    start_theta: Tensor,
    rows: _Rows,
    penalty: float,
    group: Group,
    max_iterations: int,
    on_evaluation: Callable[[], None],
) -> tuple[Tensor, int]:
    """Returns the minimum found from `start_theta` and the number of iterations."""
    theta = start_theta.clone()
    total = sum(group.row_counts(rows.labels_n.shape[0]))
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=max_iterations, tolerance_grad=1e-6, history_size=10, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def evaluate() -> Tensor:
        on_evaluation()
        packed = theta.new_zeros(theta.numel() + 1)
        for rows_bF, labels_b in rows.blocks():
            packed += _loss_and_gradient(theta, rows_bF, labels_b)
        packed = group.all_reduce_sum_(packed) / total
        weights_CF = theta[:, :-1]
        theta.grad = packed[1:].view_as(theta)
        theta.grad[:, :-1] += penalty * weights_CF
        return packed[0] + penalty / 2 * weights_CF.square().sum()

    optimizer.step(evaluate)
    return theta, optimizer.state[theta]["n_iter"]


def _logits(theta: Tensor, rows_bF: Tensor) -> Tensor:
    return torch.addmm(theta[:, -1], rows_bF, theta[:, :-1].T)


def _loss_and_gradient(theta: Tensor, rows_bF: Tensor, labels_b: Tensor) -> Tensor:
    """Cross-entropy summed over the rows, and its gradient, in one vector for one all-reduce."""
    log_probabilities_bC = torch.log_softmax(_logits(theta, rows_bF), dim=1)
    targets_b1 = labels_b[:, None]
    loss = -log_probabilities_bC.gather(1, targets_b1).sum()
    errors_bC = log_probabilities_bC.exp().scatter_add_(1, targets_b1, -torch.ones_like(rows_bF[:, :1]))
    gradient = torch.cat([errors_bC.T @ rows_bF, errors_bC.sum(dim=0)[:, None]], dim=1)
    return torch.cat([loss[None], gradient.flatten()])


def _labelled_parts(
    parts: Iterable[Batches],
    features: Callable[[Tensor], Tensor],
    feature_dim: int,
    labels: Tensor,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (n, F) and classes (n,) of each part, concatenated over its batches."""
    labels = labels.long().to(device)
    for batches in parts:
        features_nF, ids_n = extract_features(features, batches, feature_dim, device)
        yield features_nF, labels[ids_n]


@torch.no_grad()
def _train_epoch(
    optimizer: torch.optim.SGD,
    theta: Tensor,
    rates: Sequence[float],
    parts: Iterator[tuple[Tensor, Tensor]],
    group: Group,
) -> float:
    """Steps once per rate along a global batch's mean gradient; returns the mean loss of the epoch's images."""
    totals = torch.zeros(2, dtype=torch.float64, device=theta.device)  # summed loss, number of images
    for rate, (rows_bF, labels_b) in zip(rates, parts, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        images = torch.full((1,), labels_b.shape[0], dtype=theta.dtype, device=theta.device)
        packed = group.all_reduce_sum_(torch.cat([images, _loss_and_gradient(theta, rows_bF, labels_b)]))
        theta.grad = (packed[2:] / packed[0].clamp_min(1)).view_as(theta)
        optimizer.step()
        totals += torch.stack([packed[1], packed[0]])
    return mean_loss(totals, "linear classifier", "lower its learning rate")


def _accuracy(theta: Tensor, rows: Iterable[tuple[Tensor, Tensor]], group: Group) -> dict[str, float]:
    """Accuracies in per cent over the (features, classes) of all ranks, any number on each."""
    counts = torch.zeros(3, dtype=torch.int64, device=theta.device)
    for rows_bF, labels_b in rows:
        counts[:2] += count_correct(_logits(theta, rows_bF), labels_b)
        counts[2] += labels_b.shape[0]
    top1, top5, images = group.all_reduce_sum_(counts).tolist()
    if images == 0:
        raise ValueError("no test images")
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "test_images": images}
