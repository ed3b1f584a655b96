"""The section `optimization`: the encoder's optimizer, and the schedule of all learning rates."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from instance_ssl.config.choices import OptimizerName
from instance_ssl.config.types import AUTO, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Share

# Learning rate at the end of the warm-up, and the global batch, in images, that it is for; others in proportion.
_PEAK_RATES: dict[OptimizerName, tuple[float, int]] = {
    "sgd": (0.48, 4096),
    "adamw": (1.5e-4, 256),
    "lars": (0.3, 256),
    "muon": (1.5e-4, 256),
}
WEIGHT_DECAYS: dict[str, float] = {"sgd": 1e-4, "adamw": 0.1, "lars": 1e-6, "muon": 0.1}


class OptimizationConfig(Section):
    """The encoder's optimizer and the schedule of all learning rates: linear warm-up, then cosine.

    W has an SGD of its own whatever the optimizer (`classifier.learning_rate`). The rates and decays that apply where
    none is given are those of the paper for `sgd`, of SimCLR for `lars` (arXiv:2002.05709, "Default setting"), of MoCo
    v3 for `adamw` (arXiv:2104.02057, section 4.1 and its published commands), and for `muon` AdamW's, for which its
    steps are scaled (arXiv:2502.16982, section 2.2).

    Attributes:
        epochs: passes over the images; `auto`: up to 200, within a budget of views that the device computes in minutes.
        warmup_epochs: epochs of linear warm-up, included in `epochs`; `auto`: a twentieth of them, up to 10.
        global_batch_size: images (not views) per step, over all ranks and micro-batches; `auto`: at most a quarter of
            the images, a size with many divisors.
        optimizer: of the encoder: the paper's `sgd`, `adamw`, `lars` (as in SimCLR) or `muon` (hidden matrices; `adamw`
            for all other parameters). LARS and Muon need ZeRO stage 0.
        learning_rate: learning rate at the end of the warm-up; null: 0.48 · global_batch_size / 4096 for `sgd`, the
            paper's, 0.3 · global_batch_size / 256 for `lars`, 1.5e-4 · global_batch_size / 256 for `adamw` and `muon`;
            `auto`: four times the paper's for `sgd`, which short trainings did best with.
        backbone_learning_rate_multiplier: factor on the backbone's learning rate; the projection keeps the full one.
        layer_decay: factor on the learning rate from each block of the backbone to the one before it, as in BEiT; null:
            one rate for all.
        momentum: momentum of SGD, W's included, and of LARS; the first β of AdamW. Muon's own is its authors' 0.95.
        weight_decay: weight decay of the encoder and, with `sgd`, of W; if not given, 0.1 for `adamw` and `muon` and
            1e-6 for `lars`. `sgd` decays all parameters (PIC), the others neither norms nor biases.
        max_grad_norm: clips the encoder's gradient norm; 0: no clipping. W's gradient is never clipped.
    """

    epochs: Annotated[PositiveInt, AUTO] = 200
    warmup_epochs: Annotated[NonNegativeInt, AUTO] = 10
    global_batch_size: Annotated[PositiveInt, AUTO] = 4096
    optimizer: OptimizerName = "sgd"
    learning_rate: Annotated[PositiveFloat | None, AUTO] = None
    backbone_learning_rate_multiplier: PositiveFloat = 1.0
    layer_decay: Share | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = WEIGHT_DECAYS["sgd"]
    max_grad_norm: NonNegativeFloat = 0.0

    @model_validator(mode="before")
    @classmethod
    def _weight_decay_follows_the_optimizer(cls, values: Any) -> Any:
        name = values.get("optimizer") if isinstance(values, dict) else None
        decay = WEIGHT_DECAYS.get(name) if isinstance(name, str) else None
        return values if decay is None else {"weight_decay": decay, **values}

    @property
    def peak_learning_rate(self) -> float:
        """The encoder's learning rate at the end of the warm-up."""
        return self.default_rate(self.optimizer) if self.learning_rate is None else self.learning_rate

    def default_rate(self, optimizer: OptimizerName) -> float:
        """The peak learning rate of an optimizer at this global batch size, where none is given."""
        rate, batch_size = _PEAK_RATES[optimizer]
        return rate * self.global_batch_size / batch_size
