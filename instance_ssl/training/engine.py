"""The data-parallel half: a DeepSpeed engine around the encoder. The only file that imports deepspeed."""

import logging
from collections.abc import Callable
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from instance_ssl.config.deepspeed import DeepSpeedSettings
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group


class Engine:
    """Encoder, SGD and schedule inside DeepSpeed: forward, backward, step, and the full state whatever the ZeRO stage.

    Args:
        encoder: float32, equal on all ranks.
        schedule: step → learning rate.
        settings: the resolved DeepSpeed JSON.
        first_step: optimizer steps already taken, skipped ones included, for a resumed run.
    """

    def __init__(
        self,
        encoder: nn.Module,
        schedule: Callable[[int], float],
        settings: DeepSpeedSettings,
        group: Group,
        *,
        momentum: float,
        weight_decay: float,
        first_step: int = 0,
    ) -> None:
        _quieten()
        self.encoder = encoder.to(group.device)
        self.group = group
        self.steps_taken = first_step
        self._schedule = schedule
        self._accumulation_steps = settings.accumulation_steps
        self._micro_batches_seen = 0
        self._buffers = list(self.encoder.buffers())
        self._buffers_before = [buffer.clone() for buffer in self._buffers]
        optimizer = torch.optim.SGD(
            self.encoder.parameters(), lr=1.0, momentum=momentum, weight_decay=weight_decay, fused=True
        )
        self._engine, *_ = deepspeed.initialize(model=self.encoder, optimizer=optimizer, config=settings.engine)
        comm.set_timeouts()  # of the groups that DeepSpeed has just made
        self._zero_stage = self._engine.zero_optimization_stage()

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings (b, D) of images (b, 3, S, S), with the graph that `backward` needs."""
        if self._micro_batches_seen == 0:
            for before, buffer in zip(self._buffers_before, self._buffers, strict=True):
                before.copy_(buffer)
        return self._engine(images)

    def backward(self, x_bD: Tensor, gradient_bD: Tensor) -> None:
        """Backpropagates ∂J/∂x of the local rows; the encoder's gradients are summed over micro-batches and ranks.

        The scalar stands in for the loss because ZeRO hooks the backward pass of a scalar. It is not divided by the
        accumulation steps: J is already the mean over the whole optimizer step.
        """
        self._engine.backward((x_bD * gradient_bD).sum(), scale_wrt_gas=False)

    def end_micro_batch(self) -> bool:
        """Closes a micro-batch; at the last one of a step updates the encoder. True when it moved.

        False at the last one means that the gradients were not finite, or overflowed the float16 loss scale, on any
        rank: then nothing has moved. The schedule advances all the same, for steps count batches of data.
        """
        self._micro_batches_seen += 1
        if self._micro_batches_seen < self._accumulation_steps:
            self._engine.step()
            return False
        self._micro_batches_seen = 0
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.steps_taken += 1
        scaler = self._engine.torch_autocast_z0_gradscaler
        if self._zero_stage == 0 and scaler is None and not self._gradients_are_finite():
            self._drop_gradients()
            applied = False
        else:
            scale = None if scaler is None else scaler.get_scale()
            self._engine.step()
            # Without ZeRO, DeepSpeed calls a step applied that its gradient scaler has skipped; only the scale tells.
            applied = self._engine.was_step_applied() and (scaler is None or scaler.get_scale() >= scale)
        if not applied:
            self._restore_buffers()
        return applied

    def abandon_step(self, x_bD: Tensor) -> None:
        """In place of the last micro-batch's `backward` and `end_micro_batch`: the step's gradients are dropped.

        Weights and momentum stay as they are, and batch-norm statistics become what they were before the step. ZeRO
        keeps gradients in buffers of its own, and clears them when it meets one that is not finite: so it is given one.
        """
        self._micro_batches_seen = 0
        self.steps_taken += 1
        if self._zero_stage == 0:
            self._drop_gradients()
        else:
            self.backward(x_bD, torch.full_like(x_bD, torch.nan))
            self._engine.step()
        self._restore_buffers()

    def _gradients_are_finite(self) -> bool:
        """Whether the summed gradients, which are equal on all ranks, are: plain DeepSpeed would apply any."""
        gradients = [parameter.grad for parameter in self.encoder.parameters() if parameter.grad is not None]
        return bool(get_total_norm(gradients).isfinite())

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        for before, buffer in zip(self._buffers_before, self._buffers, strict=True):
            buffer.copy_(before)

    def _drop_gradients(self) -> None:
        self._engine.zero_grad()
        self._engine.micro_steps += 1  # what its own `step` would have counted

    @property
    def learning_rate(self) -> float:
        """The rate of the next step, which the classifier's shard follows."""
        return self._schedule(self.steps_taken)

    @property
    def loss_scale(self) -> dict[str, Any] | None:
        """State of float16's loss scale, which a resumed run needs; None where nothing is scaled."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        return None if scaler is None else scaler.state_dict()

    @loss_scale.setter
    def loss_scale(self, state: dict[str, Any] | None) -> None:
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None and state:
            scaler.load_state_dict(state)

    def own_buffers(self) -> dict[str, Tensor]:
        """This rank's buffers by name, on the CPU: batch-norm statistics are local in training."""
        return {name: buffer.detach().to("cpu", copy=True) for name, buffer in self.encoder.named_buffers()}

    @torch.no_grad()
    def full_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Encoder state and momentum by name, whole, on the CPU. Collective.

        Floating-point buffers are the ranks' mean. Saving does not change the training.
        """
        state = {name: value.detach().to("cpu", copy=True) for name, value in self.encoder.state_dict().items()}
        for name, buffer in self.encoder.named_buffers():
            if buffer.is_floating_point():
                mean = self.group.all_reduce_sum_(buffer.detach().clone()).div_(self.group.size)
                state[name] = mean.to("cpu", copy=True)
        momentum = {name: self._momentum_of(parameter) for name, parameter in self.encoder.named_parameters()}
        return state, {name: value.detach().to("cpu", copy=True) for name, value in momentum.items()}

    def _momentum_of(self, parameter: nn.Parameter) -> Tensor:
        value = None
        if self._zero_stage == 0:
            value = self._engine.optimizer.state.get(parameter, {}).get("momentum_buffer")
        elif self._engine.optimizer.optimizer.state:  # empty before the first step
            value = safe_get_full_optimizer_state(parameter, "momentum_buffer")
        return torch.zeros_like(parameter) if value is None else value.view_as(parameter)

    def load_momentum(self, momentum: dict[str, Tensor]) -> None:
        """Sets the momentum of every parameter; encoder weights are loaded before the engine is built. Collective."""
        if self._zero_stage > 0:  # ZeRO makes its links to the momentum after the first step
            zero = self._engine.optimizer
            for partition in zero.single_partition_of_fp32_groups:
                zero.optimizer.state[partition]["momentum_buffer"] = torch.zeros_like(partition)
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.encoder.named_parameters():
            value = momentum[name].to(parameter)
            if self._zero_stage == 0:
                self._engine.optimizer.state[parameter]["momentum_buffer"] = value.clone()
            else:
                safe_set_full_optimizer_state(parameter, value, "momentum_buffer")


def versions() -> dict[str, Any]:
    """Versions of torch and DeepSpeed, for results."""
    return {"torch": torch.__version__, "deepspeed": deepspeed.__version__}


def _quieten() -> None:
    deepspeed_logger.setLevel(logging.ERROR)
    # The shared-memory collectives would be compiled at the first start, half a minute and a C++ compiler, for
    # gradients of at most a hundred megabytes on one CPU machine. gloo carries them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
