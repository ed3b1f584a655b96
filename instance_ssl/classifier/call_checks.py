"""Mistakes in the calls of an `InstanceClassifier`, each in one line."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from instance_ssl.classifier.classifier_settings import ClassifierSettings


def find_batch_problem(
    embeddings: object, ids: object, settings: ClassifierSettings, device: torch.device
) -> Exception | None:
    """What is wrong with the embeddings (b, D) and ids (b,) of one rank; None: nothing."""
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        return ValueError(f"embeddings are a float tensor (b, {settings.embedding_dim}), not {_described(embeddings)}")
    if embeddings.dim() != 2 or embeddings.shape[1] != settings.embedding_dim:
        return ValueError(f"embeddings are (b, {settings.embedding_dim}), not {tuple(embeddings.shape)}")
    if embeddings.device != device:
        return ValueError(f"embeddings are on {embeddings.device}, and the classifier is on {device}")
    return find_id_problem(ids, len(embeddings), settings.num_instances)


def find_id_problem(ids: object, num_rows: int, num_instances: int) -> Exception | None:
    """What is wrong with the instance ids of `num_rows` rows; None: nothing."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        return ValueError(f"ids are an int64 tensor (b,), not {_described(ids)}")
    if ids.shape != (num_rows,):
        return ValueError(f"ids are ({num_rows},), one a row, not {tuple(ids.shape)}")
    lowest, highest = torch.stack(ids.aminmax()).tolist() if num_rows else (0, 0)
    if lowest < 0 or highest >= num_instances:
        wrong = lowest if lowest < 0 else highest
        return ValueError(f"ids lie in 0 … {num_instances - 1} (num_instances is {num_instances}): there is a {wrong}")
    return None


def find_step_problem(
    learning_rate: float, loss_scale: float, losses: Sequence[float], factors: Sequence[float], forwards: int
) -> Exception | None:
    """What keeps an SGD step from being taken; None: nothing.

    Args:
        losses: values of the losses that `backward` was called on since the last step.
        factors: what each was multiplied by, `loss_scale` included.
        forwards: losses that were computed since the last step.
    """
    if not (0 <= learning_rate < math.inf):
        return ValueError(f"the learning rate is {learning_rate:g}: a finite number of at least 0 is needed")
    if not (0 < loss_scale < math.inf):
        return ValueError(f"loss_scale is {loss_scale:g}: a finite number above 0 is needed")
    if not factors:
        missing = "loss.backward() was not called" if forwards else "there was no loss"
        return RuntimeError(f"step() without a gradient: {missing} since the last step")
    if not all(map(math.isfinite, [*losses, *factors])):
        return RuntimeError("the loss or its scale is not finite: call discard() in place of step()")
    if min(factors) <= 0:
        return RuntimeError(f"the loss was multiplied by {min(factors):g}: the rows take a factor above 0 only")
    return None


def _described(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
