"""`InstanceClassifier` on ranks: sampling, the prior over uneven loaders, states of other ranks, disagreement."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from instance_ssl import InstanceClassifier
from instance_ssl.classifier.reference import dense_labels, dense_loss
from instance_ssl.classifier.sampling import ClassSampler
from instance_ssl.config.choices import SamplingMode
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition

N, D, K, TAU, M, BATCH = 53, 6, 5, 0.2, 20, 14
MOMENTUM, DECAY, RATE = 0.9, 1e-2, 0.3
NEAR = {"rtol": 1e-10, "atol": 1e-13}


def new_classifier(**settings: Any) -> InstanceClassifier:
    settings = {"num_hard_classes": K, "temperature": TAU, "momentum": MOMENTUM, "weight_decay": DECAY} | settings
    classifier = InstanceClassifier(N, D, row_dtype=torch.float64, **settings)
    weight = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    classifier.load_state_dict({**classifier.state_dict(), "weight": weight})
    return classifier


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, D, generator=generator, dtype=torch.float64), torch.randperm(N, generator=generator)[
        :BATCH
    ]


def own_part(step: int, group: Group) -> tuple[Tensor, Tensor]:
    rows = slice(*Partition(BATCH, group.size).bounds(group.rank))
    x_BD, ids_B = batch_of(step)
    return x_BD[rows].requires_grad_(), ids_B[rows]


def train(classifier: InstanceClassifier, group: Group, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = classifier(*own_part(step, group))
        loss.backward()
        classifier.step(RATE)
        losses.append(loss.item())
    return losses


def train_sampled(group: Group, mode: SamplingMode) -> tuple[list[float], float, float, Tensor, Tensor]:
    """Four steps, the third of two losses whose classes are drawn together; losses of a batch without gradient, too."""
    classifier = new_classifier(sampling=mode, num_sampled_classes=M, smoothing_factor=0.0, seed=3)
    losses = train(classifier, group, range(2))
    with torch.no_grad():
        before = classifier(*own_part(9, group)).item()
    x_bD, ids_b = own_part(2, group)
    classifier.begin_step(ids_b)
    parts = [classifier(x_bD[rows], ids_b[rows], total_rows=BATCH) for rows in (slice(0, 2), slice(2, None))]
    torch.stack(parts).sum().backward()
    with torch.no_grad():
        between = classifier(*own_part(9, group)).item()
    classifier.step(RATE)
    losses += [sum(part.item() for part in parts), *train(classifier, group, range(3, 4))]
    assert x_bD.grad is not None
    return losses, before, between, x_bD.grad, classifier.state_dict()["weight"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["random", "recent"])
def test_sampled_classes_train_as_the_dense_twin(mode: SamplingMode, world_size: int) -> None:
    weight_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.SGD([weight_ND], lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    sampler, losses, gradients, over_all = ClassSampler(mode, N, M, seed=3), [], [], []
    for step in range(4):
        x_BD, ids_B = batch_of(step)
        x_BD.requires_grad_()
        drawn = sampler.draw(ids_B, step)
        y_Bm = dense_labels(torch.searchsorted(drawn, ids_B), None, 0.0, len(drawn))
        loss = dense_loss(x_BD, weight_ND[drawn], y_Bm, TAU, "mixture")
        if step == 2:
            x_9, ids_9 = batch_of(9)
            over_all.append(dense_loss(x_9, weight_ND, dense_labels(ids_9, None, 0.0, N), TAU, "mixture").item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        gradients.append(x_BD.grad)

    results = run_ranks(train_sampled, world_size, mode)

    assert gradients[2] is not None
    torch.testing.assert_close(torch.cat([result[3] for result in results]), gradients[2] * world_size, **NEAR)
    for rank_losses, before, between, _, rank_weight_ND in results:
        assert rank_losses == pytest.approx(losses, rel=1e-11)
        assert [before, between] == pytest.approx(over_all * 2, rel=1e-11)
        torch.testing.assert_close(rank_weight_ND, weight_ND.detach(), **NEAR)


def resumed(group: Group, mode: str, steps: range, state: dict[str, Tensor] | None, path: str | None) -> Any:
    settings = {} if mode == "full" else {"sampling": mode, "num_sampled_classes": M, "smoothing_factor": 0.0}
    classifier = new_classifier(**settings)
    if state is None:
        classifier.refresh_hard_classes()
    elif path is None:
        classifier.load_state_dict(state)
    else:
        classifier.load(path)
    losses = train(classifier, group, steps)
    if path is not None and state is None:
        classifier.save(path)
    return losses, classifier.state_dict()


@pytest.mark.parametrize(
    ("mode", "in_file"),
    [
        ("full", True),
        ("recent", False),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [("full", False), ("random", True), ("recent", True)]
        ),
    ],
)
def test_any_number_of_ranks_resumes_what_another_left(mode: str, in_file: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "classifier.safetensors") if in_file else None
    (losses, whole), *_ = run_ranks(resumed, 2, mode, range(4), None, None)
    (first, state), *_ = run_ranks(resumed, 3, mode, range(2), None, path)
    for size in (1, 2, 3):
        for rest, end in run_ranks(resumed, size, mode, range(2, 4), state, path):
            assert first + rest == pytest.approx(losses, rel=1e-11)
            assert end.keys() == whole.keys()
            for name, value in whole.items():
                torch.testing.assert_close(end[name], value, **NEAR)


def new_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, D))


# The ids of every rank's batches. The last rounds are those of one rank alone.
LOADERS: dict[int, list[list[range]]] = {
    1: [[range(20), range(20, 40), range(40, N)]],
    2: [[range(12), range(20, 40), range(40, N)], [range(12, 20)]],
    3: [[range(12)], [range(12, 15), range(20, 30), range(40, N)], [range(15, 20), range(30, 40)]],
}


def initialized(group: Group, wraps: bool) -> tuple[Tensor, dict[str, Tensor]]:
    images = torch.randn(N, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 3 + 1
    batches = [(images[list(ids)], torch.tensor(ids)) for ids in LOADERS[group.size][group.rank]]
    encoder, classifier = new_encoder(), new_classifier()
    classifier.initialize(DistributedDataParallel(encoder) if wraps else encoder, batches)
    return classifier.state_dict()["weight"], dict(encoder.named_buffers())


@pytest.mark.parametrize(("world_size", "wraps"), [(2, False), (3, False), (3, True)])
def test_the_prior_over_uneven_loaders_is_that_of_one_process(world_size: int, wraps: bool) -> None:
    ((weight_ND, buffers),) = run_ranks(initialized, 1, False)
    encoder = new_encoder().eval()
    encoder.load_state_dict({**encoder.state_dict(), **buffers})
    images = torch.randn(N, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 3 + 1
    # The last batch was normalised by the statistics that the encoder ends with.
    torch.testing.assert_close(weight_ND[40:], encoder(images[40:]).detach().double(), rtol=1e-5, atol=1e-5)
    for rank_weight_ND, rank_buffers in run_ranks(initialized, world_size, wraps):
        torch.testing.assert_close(rank_weight_ND, weight_ND, rtol=1e-5, atol=1e-5)
        for name, buffer in buffers.items():
            torch.testing.assert_close(rank_buffers[name], buffer)


def attempt(group: Group, mistake: Callable[[Group, InstanceClassifier], object]) -> tuple[str, bool]:
    """What a rank is told, and whether a right step afterwards does what it would have done."""
    classifier, twin = new_classifier(smoothing_factor=0.0), new_classifier(smoothing_factor=0.0)
    train(twin, group, range(1))
    try:
        mistake(group, classifier)
    except (ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    classifier.discard()
    classifier.load_state_dict({**classifier.state_dict(), "steps_taken": torch.tensor(0)})
    train(classifier, group, range(1))
    state, wanted = classifier.state_dict(), twin.state_dict()
    return said, all(torch.equal(state[name], value) for name, value in wanted.items())


def foreign_id_on_one(group: Group, classifier: InstanceClassifier) -> object:
    return classifier(torch.ones(2, D, dtype=torch.float64), torch.tensor([0, N if group.rank else 1]))


def two_rates(group: Group, classifier: InstanceClassifier) -> object:
    classifier(*own_part(0, group)).backward()
    return classifier.step(RATE + group.rank)


def two_factors(group: Group, classifier: InstanceClassifier) -> object:
    (classifier(*own_part(0, group)) / (1 + group.rank)).backward()
    return classifier.step(RATE)


def one_without_backward(group: Group, classifier: InstanceClassifier) -> object:
    loss = classifier(*own_part(0, group))
    if group.rank == 0:
        loss.backward()
    return classifier.step(RATE)


def two_calls(group: Group, classifier: InstanceClassifier) -> object:
    return classifier(*own_part(0, group)) if group.rank else classifier.refresh_hard_classes()


def no_rows_anywhere(group: Group, classifier: InstanceClassifier) -> object:
    return classifier(torch.ones(0, D, dtype=torch.float64), torch.ones(0, dtype=torch.int64))


def two_sizes(group: Group, classifier: InstanceClassifier) -> object:
    return InstanceClassifier(N + group.rank, D, num_hard_classes=K)


MISTAKES: list[tuple[Callable[[Group, InstanceClassifier], object], str, str]] = [
    (foreign_id_on_one, "RuntimeError: rank 1: ids lie in 0 … 52", "ValueError: ids lie in 0 … 52"),
    (two_rates, "step(): the ranks disagree about the learning rate: rank 0 0.3, rank 1 1.3", ""),
    (two_factors, "step(): the ranks disagree about the factor on the loss: rank 0 1, rank 1 0.5", ""),
    (one_without_backward, "RuntimeError: rank 1: step() without a gradient", "loss.backward() was not called"),
    (two_calls, "the ranks disagree: rank 0 refresh_hard_classes(), rank 1 a loss", ""),
    (no_rows_anywhere, "ValueError: no rank has any rows", ""),
    (two_sizes, "the ranks disagree about num_instances: rank 0 53, rank 1 54", ""),
]


@pytest.mark.parametrize(
    ("mistake", "on_rank_0", "on_rank_1"), MISTAKES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_mistake_of_one_rank_is_an_error_on_all(mistake: Any, on_rank_0: str, on_rank_1: str) -> None:
    (said_0, is_intact_0), (said_1, is_intact_1) = run_ranks(attempt, 2, mistake)
    assert on_rank_0 in said_0
    assert (on_rank_1 or on_rank_0) in said_1
    assert "\n" not in said_0 + said_1
    assert is_intact_0
    assert is_intact_1
