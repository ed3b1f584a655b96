"""`InstanceClassifier`: the sharded classifier as a differentiable loss, for training loops of other people.

    classifier = InstanceClassifier(len(dataset), embedding_dim=128)   # after init_process_group, if there is one
    classifier.initialize(encoder, loader)                             # the contrastive prior
    for epoch in range(epochs):
        classifier.refresh_hard_classes()
        for images, ids in loader:
            loss = classifier(encoder(images), ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            classifier.step(learning_rate)

Gradient contract. The loss is the mean over the rows of all ranks, the same number on each. The gradient that the
encoder's parameters have once the wrapper has reduced it over the ranks is exactly that of this mean:
`gradient_reduction` names what the wrapper does, and for `mean` the backward pass multiplies by the number of ranks.
The rows get the gradient of the scalar that `backward` was called on: a factor on the loss, 1 / accumulation steps say,
acts on encoder and rows alike. That of a `GradScaler`, which is taken back from the encoder, is given to `step`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from instance_ssl.classifier.call_checks import find_batch_problem, find_id_problem, find_step_problem
from instance_ssl.classifier.classifier_settings import ClassifierSettings, GradientReduction, build_shard
from instance_ssl.classifier.classifier_state import own_part, read_state, restore, whole_state, write_state
from instance_ssl.classifier.loader_pass import initialize_from_loader
from instance_ssl.classifier.matmul_rates import plain_arithmetic
from instance_ssl.classifier.prior import initialize_gaussian
from instance_ssl.classifier.shard import ShardOutput
from instance_ssl.classifier.softmax import DeferredRows
from instance_ssl.config.choices import LossForm, SamplingMode
from instance_ssl.distributed import comm
from instance_ssl.distributed.agreement import Agreement
from instance_ssl.errors import UserError

_OPERATIONS = (
    "a loss", "a loss without gradient", "begin_step()", "step()", "initialize()", "refresh_hard_classes()",
    "state_dict()", "load_state_dict()", "save()", "load()",
)  # fmt: skip


class InstanceClassifier:
    """One class for each of N images, sharded over the ranks: loss, gradient, and the rows' own SGD.

    Every method but `discard` is collective: all ranks call it, in the same order. It is not an `nn.Module`, and has no
    parameters: DDP and FSDP broadcast, average or shard again what they find in a module, and its rows differ on every
    rank. As an attribute of a module it is ignored by them, by `to()` and by `state_dict()`; save it by its own.

    Rows begin as gaussian noise. Calls run in float32, also under autocast.

    Args:
        num_instances: N, at least 2 and the number of ranks.
        embedding_dim: D.
        temperature: τ, at least 0.03.
        num_hard_classes: K < N, hardest classes that share the label's smoothing.
        smoothing_factor: α of Eq. 2; 0 is Eq. 1 and needs no `refresh_hard_classes`.
        loss_form: `mixture`, Eq. 3, or `cross_entropy`, the usual smoothed form.
        momentum: of the rows' SGD.
        weight_decay: of the rows' SGD.
        gradient_reduction: what happens to the encoder's gradients between the ranks: `mean` under DDP, FSDP,
            DeepSpeed, accelerate and Lightning; `sum` in a loop that adds them up. The same on one rank.
        sampling: classes of a step's softmax: all (`full`), or its positives and `random` others, or the most `recent`
            positives. Excludes smoothing.
        num_sampled_classes: M of a step, positives included.
        row_dtype: of rows and momentum: float32, bfloat16 with stochastic rounding, or float64.
        matmul_dtype: of the matrix products; None: float32, or float64 for float64 rows.
        seed: of the first rows, the sampling and the rounding.
        group: a `torch.distributed` process group; None: the default one, or this process alone where none is started.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the ranks were given different arguments, or were launched and have not met.
    """

    def __init__(
        self,
        num_instances: int,
        embedding_dim: int,
        *,
        temperature: float = 0.15,
        num_hard_classes: int = 100,
        smoothing_factor: float = 0.2,
        loss_form: LossForm = "mixture",
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        gradient_reduction: GradientReduction = "mean",
        sampling: Literal["full"] | SamplingMode = "full",
        num_sampled_classes: int = 65_536,
        row_dtype: torch.dtype = torch.float32,
        matmul_dtype: torch.dtype | None = None,
        seed: int = 0,
        group: Any = None,
    ) -> None:
        self.settings = ClassifierSettings(
            num_instances, embedding_dim, temperature, num_hard_classes, smoothing_factor, loss_form, momentum,
            weight_decay, sampling, num_sampled_classes, seed,
        )  # fmt: skip
        self.settings.check(gradient_reduction, row_dtype)
        self._group = comm.existing_group(group)
        self._is_alone = group is None and self._group.size == 1
        self._agreement = Agreement(self._group, _OPERATIONS)
        self._agreement.check_equal({**asdict(self.settings), "gradient_reduction": gradient_reduction})
        self._gradient_factor = self._group.size if gradient_reduction == "mean" else 1
        self._shard = build_shard(self.settings, self._group, row_dtype, matmul_dtype)
        initialize_gaussian(self._shard, seed)
        # Gives the loss a gradient where the embeddings have none, for rows alone are trained on a frozen encoder.
        self._anchor = torch.zeros((), device=self._group.device, requires_grad=True)
        self._forget_step()

    @property
    def device(self) -> torch.device:
        """Where embeddings are expected."""
        return self._group.device

    def __call__(self, embeddings: Tensor, ids: Tensor, *, total_rows: int | None = None) -> Tensor:
        """Returns the loss: the mean over these rows of all ranks, a scalar equal on all of them.

        Several losses before a `step` accumulate. Under `torch.no_grad()` it is the loss alone, over all N classes.

        Args:
            embeddings: (b, D), any float dtype, not normalised; b may differ between ranks and be 0.
            ids: (b,) int64 in 0 … N - 1, on any device; an id comes once for each view.
            total_rows: rows of the whole step, over all ranks and losses; each loss is then its part of their mean,
                so that uneven losses of a step add up. None: the rows of this loss.

        Raises:
            ValueError: what is given is malformed, on any rank.
            RuntimeError: it comes in the wrong order, or the ranks disagree.
        """
        trains = torch.is_grad_enabled()
        problem = self._find_order_problem() or find_batch_problem(embeddings, ids, self.settings, self.device)
        if problem is None and trains:
            problem = self._find_draw_problem(ids)
        counts = self._agreement.gather(
            "a loss" if trains else "a loss without gradient",
            problem,
            0 if problem else len(embeddings),
            steps_taken=self._shard.steps_taken,
            losses_since_the_last_step=self._num_losses,
            total_rows=total_rows or 0,
        )
        if (rows := sum(counts)) == 0:
            raise ValueError("no rank has any rows")
        if total_rows is not None and total_rows < rows:
            raise ValueError(f"total_rows is {total_rows}, and this loss alone has {rows}")
        x_bD, ids_b = embeddings.to(torch.promote_types(self._shard.weight.dtype, torch.float32)), ids.to(self.device)
        with plain_arithmetic(self.device):
            if not trains:
                return self._loss_over_all_classes(x_bD, ids_b, counts, total_rows or rows)
            if self._shard.sampler is not None and self._positives is None:
                self._draw(ids_b, counts)
            self._num_losses += 1
            loss: Tensor = _InstanceLoss.apply(x_bD, self._anchor, self, ids_b, counts, total_rows or rows)
            return loss

    def begin_step(self, ids: Tensor) -> None:
        """Draws the classes of a step. Needed only with sampling where a step has several losses.

        Args:
            ids: (r,) int64, this rank's ids of all losses of the step.
        """
        problem = find_id_problem(ids, len(ids), self.settings.num_instances)
        if problem is None and (self._num_losses or self._positives is not None):
            problem = RuntimeError("begin_step() comes once a step, before its first loss")
        counts = self._agreement.gather("begin_step()", problem, 0 if problem else len(ids))
        self._draw(ids.to(self.device), counts)

    @torch.no_grad()
    def step(self, learning_rate: float, *, loss_scale: float = 1.0) -> None:
        """One SGD step of the rows by the gradients of all losses since the last one.

        Args:
            learning_rate: of this step.
            loss_scale: what the losses were multiplied by for the sake of float16: `scaler.get_scale()`, read before
                `scaler.update()`. Where the scaler skips the optimizer's step, call `discard` in place of this.

        Raises:
            RuntimeError: `backward` was not called since the last step, a loss is not finite or was multiplied by a
                number that is not above 0, or the ranks disagree; nothing has changed.
        """
        received, losses, factors = self._received, [], []
        if received:
            numbers = torch.stack([torch.stack([loss, factor.to(loss)]) for _, loss, factor in received])
            losses, factors = numbers.T.tolist()
        self._agreement.check(
            "step()",
            find_step_problem(learning_rate, loss_scale, losses, factors, self._num_losses),
            learning_rate=learning_rate,
            loss_scale=loss_scale,
            losses_with_a_gradient=len(factors),
            factor_on_the_loss=sum(factors),
        )
        total_rows = received[0][0].total_rows
        for (rows, _, _), factor in zip(received, factors, strict=True):
            share = factor / loss_scale * (total_rows / rows.total_rows)
            self._shard.defer(replace(rows.scaled(share, self.settings.loss_form), total_rows=total_rows))
        with plain_arithmetic(self.device):
            self._shard.step(learning_rate)
        self._forget_step()

    def discard(self) -> None:
        """In place of `step`: forgets the gradients since the last step and changes no row. All ranks do it."""
        self._shard.discard()
        self._forget_step()

    def initialize(
        self,
        encoder: nn.Module,
        loader: Iterable[tuple[Tensor, Tensor]],
        *,
        mode: Literal["running", "batch", "frozen"] = "running",
        pretrained: nn.Module | None = None,
    ) -> None:
        """The contrastive prior: each row becomes the embedding of its image by the encoder as it is.

        Every batch norm first moves its running statistics by the batch (of all ranks), then normalises with them.
        Where none moves, the bias of the last layer follows the mean of the embeddings. Nothing else changes.

        Args:
            encoder: images → (b, D); wrapped or not, not compiled, on the classifier's device.
            loader: (images, ids) of this rank. All ranks together give every id once or more, of which the last counts;
                lengths may differ.
            mode: what batch norm does, see `prior.py`.
            pretrained: part of the encoder with given weights, whose batch norms keep their statistics.

        Raises:
            ValueError: a batch is malformed, an id never comes, or the encoder's output is not (b, D).
            RuntimeError: after a `step`.
        """
        late = RuntimeError("initialize() comes before the first step()") if self._shard.steps_taken else None
        self._agreement.check("initialize()", self._find_world_problem() or late)
        initialize_from_loader(self._shard, encoder, loader, mode, pretrained, self._agreement, "initialize()")
        self._shard.hard_classes = None

    def refresh_hard_classes(self) -> None:
        """Searches the K hardest classes of every class, exactly; once an epoch in the paper.

        Without smoothing there is nothing to search.
        """
        self._agreement.check("refresh_hard_classes()", self._find_world_problem())
        with plain_arithmetic(self.device):
            self._shard.refresh_hard_classes(self.settings.num_hard_classes)

    def state_dict(self) -> dict[str, Tensor]:
        """Rows, momentum, hard classes and position of all ranks, on the CPU of each; call it between steps.

        Not for rank 0 alone: every rank has to send its rows. Any number of ranks can load the result.
        """
        self._agreement.check("state_dict()")
        return whole_state(self._shard)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a `state_dict` of any number of ranks; a `ValueError` where it is that of another classifier."""
        self._restore("load_state_dict()", lambda: own_part(state, self._shard))

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the state as one safetensors file, whole or not at all; its metadata has the settings.

        Rank 0 writes. A `UserError` on it, and a `RuntimeError` on the others, where the file cannot be written.
        """
        state, problem = self.state_dict(), None
        if self._group.rank == 0:
            try:
                write_state(state, self.settings, Path(path))
            except (UserError, ImportError) as error:
                problem = error
        self._agreement.check("save()", problem)

    def load(self, path: str | PathLike[str]) -> None:
        """Restores what `save` wrote on any number of ranks; each reads its own rows.

        Raises:
            ValueError: the file cannot be read, or is that of a classifier with other `num_instances`,
                `embedding_dim`, `temperature` or `loss_form`.
        """
        self._restore("load()", lambda: read_state(Path(path), self.settings, self._shard))

    def _restore(self, operation: str, read: Callable[[], Mapping[str, Tensor]]) -> None:
        own: Mapping[str, Tensor] = {}
        problem = None
        try:
            own = read()
        except (ValueError, ImportError) as error:
            problem = error
        self._agreement.check(operation, problem)
        restore(own, self._shard, self.settings.num_hard_classes)
        self._forget_step()

    def _forget_step(self) -> None:
        """Begins a step: no classes drawn, no loss, no gradient."""
        self._positives: Tensor | None = None
        self._num_losses = 0
        # Of each loss that `backward` was called on: its rows, its value, and the factor on it.
        self._received: list[tuple[DeferredRows, Tensor, Tensor]] = []

    def _find_world_problem(self) -> Exception | None:
        if self._is_alone and comm.default_world_size() > 1:
            return RuntimeError(
                "a process group was started after this classifier was made, which is alone: make it after "
                "torch.distributed.init_process_group() (or what does it for you)"
            )
        return None

    def _find_order_problem(self) -> Exception | None:
        if self.settings.smooths and self._shard.hard_classes is None:
            return RuntimeError(
                f"smoothing_factor {self.settings.smoothing_factor:g} needs hard classes: call refresh_hard_classes() "
                "before the first loss and after initialize(), or give smoothing_factor=0"
            )
        return self._find_world_problem()

    def _find_draw_problem(self, ids: Tensor) -> Exception | None:
        if self._positives is None or bool(torch.isin(ids.cpu(), self._positives).all()):
            return None
        return RuntimeError(
            "an id is not among the classes drawn for this step: with sampling, call begin_step(ids) with the ids of "
            "all losses of a step before its first"
        )

    def _draw(self, ids_b: Tensor, counts: Sequence[int]) -> None:
        self._positives = self._group.all_gather_rows(ids_b, counts).cpu()
        self._shard.begin_step(self._positives)

    def _loss_over_all_classes(self, x_bD: Tensor, ids_b: Tensor, counts: Sequence[int], total_rows: int) -> Tensor:
        self._shard.settle()
        output, _ = self._shard.evaluate(x_bD, ids_b, total_rows=total_rows, row_counts=counts, all_classes=True)
        return output.loss

    def _evaluate(
        self, x_bD: Tensor, ids_b: Tensor, counts: Sequence[int], total_rows: int
    ) -> tuple[ShardOutput, DeferredRows, int]:
        return *self._shard.evaluate(x_bD, ids_b, total_rows=total_rows, row_counts=counts), self._shard.steps_taken

    def _receive(self, rows: DeferredRows, loss: Tensor, factor: Tensor, step: int) -> int:
        """Keeps a loss's rows for `step`, and returns the factor that the encoder's gradient gets."""
        if step != self._shard.steps_taken:
            raise RuntimeError("backward() of a loss from before the last step() or discard(): the rows have moved on")
        self._received.append((rows, loss, factor))
        return self._gradient_factor


class _InstanceLoss(torch.autograd.Function):
    """The loss of a micro-batch; its backward pass communicates nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x_bD: Tensor,
        anchor: Tensor,
        classifier: InstanceClassifier,
        ids_b: Tensor,
        counts: Sequence[int],
        total_rows: int,
    ) -> Tensor:
        output, ctx.rows, ctx.step = classifier._evaluate(x_bD, ids_b, counts, total_rows)
        ctx.classifier, ctx.loss, ctx.gradient_bD = classifier, output.loss, output.feature_gradient_bD
        return output.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        times = ctx.classifier._receive(ctx.rows, ctx.loss, factor.detach(), ctx.step)
        return ctx.gradient_bD * (factor * times), None, None, None, None, None
