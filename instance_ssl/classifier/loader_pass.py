"""The contrastive prior over a caller's own loader: uneven over the ranks, and checked."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from instance_ssl.classifier.call_checks import find_id_problem
from instance_ssl.classifier.prior import initialize_from_features, moving_parts
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.config.choices import InitializationMode
from instance_ssl.distributed.agreement import Agreement

Batch = tuple[Tensor, Tensor]


def initialize_from_loader(
    shard: ClassifierShard,
    encoder: nn.Module,
    loader: Iterable[Batch],
    mode: InitializationMode,
    pretrained: nn.Module | None,
    agreement: Agreement,
    operation: str,
) -> None:
    """w_i ← embedding of image i by `encoder`. Collective.

    Args:
        pretrained: part of the encoder whose batch norms keep their statistics; None: all move.
        loader: this rank's (images, ids); the numbers of batches and of images may differ between ranks.
        operation: its name in `agreement`.

    Raises:
        ValueError: a batch is malformed, the encoder's output is not (b, D), an id never comes, or the bias that has to
            move is divided over the ranks.
    """
    moving = moving_parts(encoder, pretrained)
    if moving.centred is not None and hasattr(moving.centred.bias, "placements"):  # a DTensor
        raise ValueError(
            "no batch norm of the encoder moves, so the bias of its last layer does, and fully_shard has divided it: "
            "call initialize() before fully_shard()"
        )
    rows = _CountedRows(shard)
    width = shard.weight.shape[1]

    def check(_: nn.Module, __: object, output: object) -> None:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] != width:
            raise ValueError(f"the encoder's output is {shape}, not (b, {width}): embedding_dim is {width}")

    hook = encoder.register_forward_hook(check)
    try:
        batches = _aligned(loader, shard.partition.total, agreement, operation)
        initialize_from_features(rows, encoder, batches, mode, shard.group, moving=moving)
    finally:
        hook.remove()
    rows.check()


class _CountedRows:
    """Hands rows to the shard, and remembers which classes had one."""

    def __init__(self, shard: ClassifierShard) -> None:
        self._shard = shard
        self._came_N = torch.zeros(shard.partition.total, dtype=torch.bool)

    def assign(self, x_BD: Tensor, instance_id_B: Tensor) -> None:
        """Keeps those of (B, D) that are this rank's."""
        self._shard.assign(x_BD, instance_id_B)
        self._came_N[instance_id_B.cpu()] = True

    def check(self) -> None:
        """Raises a `ValueError` where a class has had no row: it would keep a row of noise."""
        absent = torch.nonzero(~self._came_N).flatten()
        if len(absent):
            raise ValueError(
                f"the loader has no image for {len(absent)} of {len(self._came_N)} ids (the first is {absent[0]}): "
                "initialize() needs every image once, so no drop_last"
            )


def _aligned(loader: Iterable[Batch], num_instances: int, agreement: Agreement, operation: str) -> Iterator[Batch]:
    """The loader's batches, then empty ones while another rank still has some."""
    batches, empty = iter(loader), None
    while True:
        batch = next(batches, None)
        problem = _problem_of(batch, empty, num_instances)
        if not any(agreement.gather(operation, problem, int(batch is not None))):
            return
        if batch is not None:
            images, ids = batch
            yield images, ids
            empty = images[:0], ids[:0]
        elif empty is not None:
            yield empty


def _problem_of(batch: object, empty: Batch | None, num_instances: int) -> Exception | None:
    if batch is None:
        return ValueError("the loader has no batch") if empty is None else None
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        return ValueError(f"the loader gives (images, ids), two tensors a batch, not {type(batch).__name__}")
    return find_id_problem(batch[1], len(batch[0]), num_instances)
