"""`InstanceClassifier` in loops of all kinds against the dense twin: loss, encoder and rows after several steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from instance_ssl import InstanceClassifier
from instance_ssl.classifier.reference import dense_hard_classes, dense_labels, dense_loss
from instance_ssl.distributed.comm import Group

N, D, K, TAU, ALPHA, STEPS = 53, 6, 5, 0.2, 0.2, 5
MOMENTUM, DECAY, RATE = 0.9, 1e-2, 0.3
# 13 rows of a step's first loss and 5 of its second, whatever the number of ranks; a rank may have none.
FIRST = {1: [13], 2: [4, 9], 3: [6, 0, 7]}
SECOND = {1: [5], 2: [3, 2], 3: [1, 3, 1]}


def new_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, D)).double()


def first_rows() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, D, generator=generator, dtype=torch.float64) * (
        0.2 + torch.rand(N, 1, generator=generator, dtype=torch.float64)
    )


def batch_of(step: int, part: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + part)
    rows = (FIRST, SECOND)[part][1][0]
    ids = torch.randint(N, (rows,), generator=generator)
    return torch.randn(rows, 8, generator=generator, dtype=torch.float64), ids


def own(batch: tuple[Tensor, Tensor], counts: list[int], rank: int) -> tuple[Tensor, Tensor]:
    return batch[0].split(counts)[rank], batch[1].split(counts)[rank]


def rate_of(step: int) -> float:
    return RATE / (1 + step)


@dataclass
class Wrapped:
    """An encoder in somebody's hands."""

    encoder: nn.Module
    optimizer: torch.optim.Optimizer
    reduction: str
    backward: Callable[[Tensor], object] = Tensor.backward
    without_sync: Callable[[], AbstractContextManager[object]] = nullcontext
    step: Callable[[], object] | None = None


def sgd(encoder: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.5)


def by_hand(group: Group, reduction: str) -> Wrapped:
    encoder = new_encoder()

    optimizer = sgd(encoder)

    def step() -> None:
        for parameter in encoder.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= group.size if reduction == "mean" else 1
        optimizer.step()

    return Wrapped(encoder, optimizer, reduction, step=step)


def with_ddp(group: Group) -> Wrapped:
    encoder = DistributedDataParallel(new_encoder())
    return Wrapped(encoder, sgd(encoder), "mean", without_sync=encoder.no_sync)


def with_fsdp2(group: Group) -> Wrapped:
    encoder = fully_shard(new_encoder(), mesh=dist.init_device_mesh("cpu", (group.size,)))
    return Wrapped(encoder, sgd(encoder), "mean")


def with_accelerate(group: Group) -> Wrapped:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == group.size
    bare = new_encoder()
    encoder, optimizer = accelerator.prepare(bare, sgd(bare))
    return Wrapped(encoder, optimizer, "mean", accelerator.backward, lambda: accelerator.no_sync(encoder))


def with_fabric(group: Group) -> Wrapped:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    environment = TorchElasticEnvironment()
    fabric = Fabric(accelerator="cpu", devices=group.size, strategy="ddp", plugins=environment)
    fabric.launch()
    assert fabric.world_size == group.size
    bare = new_encoder()
    encoder, optimizer = fabric.setup(bare, sgd(bare))
    return Wrapped(encoder, optimizer, "mean", fabric.backward, lambda: fabric.no_backward_sync(encoder, enabled=True))


class InFloat32(nn.Module):
    """DeepSpeed reduces no float64."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.float()

    def forward(self, x: Tensor) -> Tensor:
        embeddings: Tensor = self.encoder(x.float())
        return embeddings


def with_deepspeed(group: Group) -> Wrapped:
    import deepspeed

    encoder = InFloat32(new_encoder())
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    engine, *_ = deepspeed.initialize(model=encoder, optimizer=sgd(encoder), config=config)
    return Wrapped(engine, engine.optimizer, "mean", engine.backward, step=engine.step)


WRAPPERS: dict[str, Callable[[Group], Wrapped]] = {
    "mean by hand": lambda group: by_hand(group, "mean"),
    "sum by hand": lambda group: by_hand(group, "sum"),
    "ddp": with_ddp,
    "fsdp2": with_fsdp2,
    "accelerate": with_accelerate,
    "fabric": with_fabric,
    "deepspeed": with_deepspeed,
}


def new_classifier(reduction: str = "mean", **settings: Any) -> InstanceClassifier:
    settings = {"num_hard_classes": K, "smoothing_factor": ALPHA} | settings
    classifier = InstanceClassifier(
        N, D, temperature=TAU, momentum=MOMENTUM, weight_decay=DECAY, gradient_reduction=reduction,
        row_dtype=torch.float64, **settings,
    )  # fmt: skip
    state = classifier.state_dict()
    classifier.load_state_dict({**state, "weight": first_rows()})
    return classifier


def trained(group: Group, wrapper: str, way: str, settings: dict[str, Any]) -> tuple[list[float], Tensor, Tensor]:
    """Losses, encoder and rows after some steps, each of one loss or, in the ways to accumulate, of two."""
    wrapped = WRAPPERS[wrapper](group)
    classifier = new_classifier(wrapped.reduction, **settings)
    losses = []
    for step in range(STEPS):
        if step % 2 == 0:
            classifier.refresh_hard_classes()
        first, second = (own(batch_of(step, part), (FIRST, SECOND)[part][group.size], group.rank) for part in (0, 1))
        if way == "one loss":
            loss = classifier(wrapped.encoder(first[0]), first[1])
            wrapped.backward(loss)
        else:
            total, factor = (18, 1.0) if way == "parts of a mean" else (None, 0.5)
            with wrapped.without_sync():
                part = classifier(wrapped.encoder(first[0]), first[1], total_rows=total) * factor
                wrapped.backward(part)
            rest = classifier(wrapped.encoder(second[0]), second[1], total_rows=total) * factor
            wrapped.backward(rest)
            loss = part.detach() + rest
        losses.append(loss.item())
        (wrapped.step or wrapped.optimizer.step)()
        wrapped.optimizer.zero_grad()
        classifier.step(rate_of(step))
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in wrapped.encoder.parameters()]
    return losses, nn.utils.parameters_to_vector(parameters).detach(), classifier.state_dict()["weight"]


def densely_trained(way: str, form: str = "mixture", alpha: float = ALPHA) -> tuple[list[float], Tensor, Tensor]:
    """The dense twin: one process, all N x D parameters in torch.optim.SGD, autograd throughout."""
    encoder, weight_ND = new_encoder(), first_rows().requires_grad_()
    optimizer = sgd(encoder)
    rows_optimizer = torch.optim.SGD([weight_ND], lr=1.0, momentum=MOMENTUM, weight_decay=DECAY)
    losses, table = [], torch.empty(0)
    for step in range(STEPS):
        if step % 2 == 0:
            table = dense_hard_classes(weight_ND.detach(), K)

        def loss_of(batch: tuple[Tensor, Tensor], table: Tensor = table) -> Tensor:
            y_BN = dense_labels(batch[1], table[batch[1]], alpha, N)
            return dense_loss(encoder(batch[0]), weight_ND, y_BN, TAU, form)  # type: ignore[arg-type]

        first, second = batch_of(step, 0), batch_of(step, 1)
        loss = loss_of(first)
        if way == "parts of a mean":
            loss = loss_of((torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])))
        elif way == "mean of means":
            loss = (loss + loss_of(second)) / 2
        optimizer.zero_grad()
        rows_optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows_optimizer.param_groups[0]["lr"] = rate_of(step)
        rows_optimizer.step()
        losses.append(loss.item())
    return losses, nn.utils.parameters_to_vector(encoder.parameters()).detach(), weight_ND.detach()


def check(results: list[Any], wanted: tuple[list[float], Tensor, Tensor], error: float = 1e-9) -> None:
    losses, parameters, weight_ND = wanted
    near = {"rtol": error, "atol": error / 100, "check_dtype": False}
    assert (weight_ND - first_rows()).abs().max() > 0.1
    for rank_losses, rank_parameters, rank_weight_ND in results:
        assert rank_losses == pytest.approx(losses, rel=error)
        torch.testing.assert_close(rank_parameters, parameters, **near)
        torch.testing.assert_close(rank_weight_ND, weight_ND, **near)


CASES = [
    *(("ddp", size) for size in (1, 2, 3)),
    ("mean by hand", 1), ("mean by hand", 3), ("sum by hand", 3), ("fsdp2", 2), ("accelerate", 2), ("fabric", 2),
    ("deepspeed", 2),
]  # fmt: skip


def needs_package(wrapper: str) -> None:
    name = {"fabric": "lightning"}.get(wrapper, wrapper)
    if wrapper in ("fabric", "accelerate") and find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize(("wrapper", "world_size"), CASES)
def test_a_loop_trains_as_the_dense_twin(wrapper: str, world_size: int) -> None:
    needs_package(wrapper)
    error = 1e-3 if wrapper == "deepspeed" else 1e-9
    check(run_ranks(trained, world_size, wrapper, "one loss", {}), densely_trained("one loss"), error)


@pytest.mark.parametrize("way", ["parts of a mean", "mean of means"])
@pytest.mark.parametrize(
    ("wrapper", "world_size"),
    [
        ("mean by hand", 1),
        ("ddp", 2),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("sum by hand", 3), ("fabric", 2))),
    ],
)
def test_losses_before_a_step_accumulate(wrapper: str, world_size: int, way: str) -> None:
    needs_package(wrapper)
    check(run_ranks(trained, world_size, wrapper, way, {}), densely_trained(way))


@pytest.mark.parametrize("way", ["one loss", "mean of means"])
def test_the_usual_smoothed_cross_entropy_trains_as_the_dense_twin(way: str) -> None:
    results = run_ranks(trained, 2, "ddp", way, {"loss_form": "cross_entropy"})
    check(results, densely_trained(way, form="cross_entropy"))


def test_without_smoothing_no_table_is_needed() -> None:
    check(run_ranks(trained, 2, "ddp", "one loss", {"smoothing_factor": 0.0}), densely_trained("one loss", alpha=0.0))
