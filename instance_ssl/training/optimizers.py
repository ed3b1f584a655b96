"""The encoder's optimizers: SGD, AdamW, LARS and Muon, and which parameter gets which learning rate and decay."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from instance_ssl.config.choices import OptimizerName
from instance_ssl.training.backbone_layers import layer_numbers

_TRUST_COEFFICIENT = 0.001  # of LARS, in SimCLR's published code
_MUON_MOMENTUM = 0.95  # Nesterov's, in its authors' code
_SECOND_BETA = 0.999  # of AdamW
_MOMENTUM, _MOMENTS = ("momentum_buffer",), ("exp_avg", "exp_avg_sq")
_BACKBONE = "backbone."


@dataclass(frozen=True)
class OptimizerOptions:
    """How the encoder is optimized.

    Attributes:
        name: sgd, adamw, lars or muon.
        momentum: μ of SGD and LARS, β1 of AdamW.
        weight_decay: of all parameters for SGD; the others exclude norms and biases, which have one dimension.
        backbone_multiplier: factor on the learning rate of the encoder's `backbone`.
        layer_decay: factor on the learning rate from each block of the backbone to the one before; None: 1.
    """

    name: OptimizerName = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    backbone_multiplier: float = 1.0
    layer_decay: float | None = None


def build_optimizer(encoder: nn.Module, options: OptimizerOptions) -> Optimizer:
    """The optimizer of the encoder's trainable parameters, in groups with these entries of ours:

    lr_scale    factor on the learning rate, which the caller sets before each step
    slots       tensors like the parameter that the optimizer keeps; AdamW's also count steps (`fresh_state`)
    """
    groups, betas = parameter_groups(encoder, options), (options.momentum, _SECOND_BETA)
    match options.name:
        case "sgd":
            return torch.optim.SGD(groups, lr=1.0, momentum=options.momentum, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=1.0, betas=betas, fused=True)
        case "lars":
            return Lars(groups, momentum=options.momentum)
        case "muon":
            return Muon(groups, betas=betas)


def parameter_groups(encoder: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    """The trainable parameters by learning rate, decay and what is kept for them; one group for plain SGD."""
    scales, slots = learning_rate_scales(encoder, options), state_slots(encoder, options.name)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            continue
        is_sgd = options.name == "sgd"
        decay = options.weight_decay if is_sgd or parameter.ndim > 1 else 0.0
        # ZeRO counts one number of steps a group, and a backbone that was frozen has taken fewer than the projection.
        part = None if is_sgd else name.startswith(_BACKBONE)
        settings = {"lr_scale": scales[name], "weight_decay": decay, "slots": slots[name]}
        groups.setdefault((part, *settings.values()), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


def learning_rate_scales(encoder: nn.Module, options: OptimizerOptions) -> dict[str, float]:
    """Parameter name → factor on the learning rate; 1 for all that is not in the encoder's `backbone`.

    With layer decay d, block i = 1 … L of the backbone has the factor d^(L + 1 - i), what comes before the blocks
    d^(L + 1), and what follows them 1: BEiT's (arXiv:2106.08254), the projection in the place of its head.
    """
    scales = {name: 1.0 for name, _ in encoder.named_parameters()}
    backbone = getattr(encoder, "backbone", None)
    if backbone is not None:
        layers, num_blocks = layer_numbers(backbone)
        decay = 1.0 if options.layer_decay is None else options.layer_decay
        for name, layer in layers.items():
            scales[_BACKBONE + name] = options.backbone_multiplier * decay ** (num_blocks + 1 - layer)
    return scales


def state_slots(encoder: nn.Module, name: OptimizerName) -> dict[str, tuple[str, ...]]:
    """Parameter name → names of the tensors of its shape that the optimizer keeps."""
    names = [parameter for parameter, _ in encoder.named_parameters()]
    if name == "muon":
        matrices = _hidden_matrices(encoder)
        return {parameter: _MOMENTUM if parameter in matrices else _MOMENTS for parameter in names}
    return dict.fromkeys(names, _MOMENTS if name == "adamw" else _MOMENTUM)


def state_size(encoder: nn.Module, name: OptimizerName) -> int:
    """How many numbers the optimizer keeps for all parameters, trainable or not."""
    slots = state_slots(encoder, name)
    return sum(len(slots[parameter]) * value.numel() for parameter, value in encoder.named_parameters())


def fresh_state(parameter: Tensor, slots: tuple[str, ...]) -> dict[str, Tensor]:
    """The state that an optimizer would make at its first step; existing from the start, it can be loaded into."""
    state = {slot: torch.zeros_like(parameter, requires_grad=False) for slot in slots}
    return state | ({"step": torch.zeros((), device=parameter.device)} if slots == _MOMENTS else {})


def _hidden_matrices(encoder: nn.Module) -> set[str]:
    """Names of the matrices of hidden layers: not the last one of the projection, nor embeddings and convolutions."""
    modules = list(encoder.named_modules())
    linear = [f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)]
    joint = [
        f"{name}.in_proj_weight"
        for name, module in modules
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    ]
    return {*linear[:-1], *joint}


class Lars(Optimizer):
    """LARS (You et al. 2017, arXiv:1708.03888, algorithm 1) as SimCLR uses it (`lars_optimizer.py` of its code):

        v ← μ v + η λ (g + β w)
        w ← w - v                  with λ = 0.001 ‖w‖ / ‖g + β w‖

    for each tensor. λ is 1 for norms and biases, which have one dimension, and where a norm is 0.
    """

    def __init__(self, params: list[dict[str, Any]], *, momentum: float) -> None:
        super().__init__(params, {"lr": 1.0, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= fresh_state(parameter, _MOMENTUM)
        direction, rate = gradient.add(parameter, alpha=group["weight_decay"]), group["lr"]
        if parameter.ndim > 1:
            weight_norm, direction_norm = parameter.norm(), direction.norm()
            trust = _TRUST_COEFFICIENT * weight_norm / direction_norm
            rate = rate * torch.where((weight_norm > 0) & (direction_norm > 0), trust, 1.0)
        parameter.sub_(state["momentum_buffer"].mul_(group["momentum"]).add_(direction.mul_(rate)))


class Muon(Optimizer):
    """Muon of hidden matrices and AdamW of all other parameters, as its authors advise, in one optimizer.

    torch's Muon, with steps of AdamW's size (0.2 · √max(rows, columns), arXiv:2502.16982), so that both share one rate
    and decay. The groups and the state are those of the two optimizers inside.

    Args:
        params: groups with `slots`, which tell hidden matrices from other parameters.
    """

    def __init__(self, params: list[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        matrices = [group for group in params if group["slots"] == _MOMENTUM]
        others = [group for group in params if group["slots"] != _MOMENTUM]
        self._parts: list[Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr=1.0, momentum=_MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=1.0, betas=betas, fused=True))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._parts:
            part.step()
        return loss
