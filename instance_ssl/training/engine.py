"""The data-parallel half: a DeepSpeed engine around the encoder. The only file that imports deepspeed."""

import logging
from collections.abc import Callable, Iterator
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
from instance_ssl.training.optimizers import OptimizerOptions, build_optimizer, fresh_state

# By parameter, then by slot (torch's names: momentum_buffer, exp_avg, exp_avg_sq, step).
OptimizerState = dict[str, dict[str, Tensor]]


class Engine:
    """Encoder, optimizer and schedule inside DeepSpeed: forward, backward, step, and the full state at any ZeRO stage.

    Args:
        encoder: float32, equal on all ranks. Parameters that require no gradient are not trained, and have no state.
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
        options: OptimizerOptions,
        *,
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
        # Under ZeRO, DeepSpeed puts this rank's part of each group, flat, in place of the group's parameters.
        self._optimizer = build_optimizer(self.encoder, options)
        self._engine, *_ = deepspeed.initialize(model=self.encoder, optimizer=self._optimizer, config=settings.engine)
        comm.set_timeouts()  # of the groups that DeepSpeed has just made
        self._zero_stage = self._engine.zero_optimization_stage()
        self._make_state()

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings (b, D) of images (b, 3, S, S), with the graph that `backward` needs."""
        if self._micro_batches_seen == 0:
            for before, buffer in zip(self._buffers_before, self._buffers, strict=True):
                before.copy_(buffer)
        return self._engine(images)

    def backward(self, x_bD: Tensor, gradient_bD: Tensor) -> None:
        """Backpropagates ∂J/∂x of the local rows; the encoder's gradients are summed over micro-batches and ranks.

        A scalar stands in for the loss, and is not divided by the accumulation steps: J is already the mean over the
        whole optimizer step. DeepSpeed 0.19.8 also takes `x_bD.backward(gradient_bD)`, which gives the same bits under
        ZeRO 1 and 2 once multiplied by the accumulation steps, but refuses it without ZeRO, and so with float16.
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
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_scale"]
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

    def _make_state(self) -> None:
        """Makes the optimizer's state, which torch would make at the first step, so that it can be read and loaded."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                self._optimizer.state[parameter] = fresh_state(parameter, group["slots"])
        if self._zero_stage > 0:
            # DeepSpeed links parameters to their parts of it after the first group's step, too early for other groups.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def full_state(self) -> tuple[dict[str, Tensor], OptimizerState]:
        """Encoder state and the optimizer's by name, whole, on the CPU. Collective.

        Floating-point buffers are the ranks' mean. Saving does not change the training.
        """
        state = {name: value.detach().to("cpu", copy=True) for name, value in self.encoder.state_dict().items()}
        for name, buffer in self.encoder.named_buffers():
            if buffer.is_floating_point():
                mean = self.group.all_reduce_sum_(buffer.detach().clone()).div_(self.group.size)
                state[name] = mean.to("cpu", copy=True)
        optimizer: OptimizerState = {}
        for name, parameter, own in self._own_states():
            whole = own if self._zero_stage == 0 else {slot: _gathered(parameter, slot, own[slot]) for slot in own}
            optimizer[name] = {slot: value.to("cpu", copy=True) for slot, value in whole.items()}
        return state, optimizer

    @torch.no_grad()
    def load_optimizer(self, state: OptimizerState) -> None:
        """Sets the optimizer's state; parameters that have none in `state` begin afresh. Collective.

        Encoder weights are loaded before the engine is built.
        """
        for name, parameter, own in self._own_states():
            for slot, value in state.get(name, {}).items():
                if self._zero_stage == 0 or value.ndim == 0:
                    own[slot].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value.to(parameter), slot)

    def _own_states(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Tensor]]]:
        """Names of trained parameters, the parameters and their state here: under ZeRO, that of their group's part."""
        keys: dict[nn.Parameter, Tensor] = {}
        if self._zero_stage > 0:
            zero = self._engine.optimizer
            for parameters, partition in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                keys |= dict.fromkeys(parameters, partition)
        for name, parameter in self.encoder.named_parameters():
            if parameter.requires_grad:
                yield name, parameter, self._optimizer.state[keys.get(parameter, parameter)]


def _gathered(parameter: nn.Parameter, slot: str, own: Tensor) -> Tensor:
    """A slot of a parameter from the parts that ZeRO's ranks have; the count of steps is the same on all of them."""
    return own if own.ndim == 0 else safe_get_full_optimizer_state(parameter, slot).view_as(parameter)


def versions() -> dict[str, Any]:
    """Versions of torch and DeepSpeed, for results."""
    return {"torch": torch.__version__, "deepspeed": deepspeed.__version__}


def _quieten() -> None:
    deepspeed_logger.setLevel(logging.ERROR)
    # The shared-memory collectives would be compiled at the first start, half a minute and a C++ compiler, for
    # gradients of at most a hundred megabytes on one CPU machine. gloo carries them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
