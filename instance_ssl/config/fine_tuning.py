"""The sections `evaluation.semi_supervised` and `evaluation.fine_tune`: protocols that train a whole network."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from instance_ssl.config.types import LocalPath, NonNegativeFloat, PositiveFloat, PositiveInt, Section, Share

Rates = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
Decays = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]


class SemiSupervisedConfig(Section):
    """Fine-tuning on a share of the training labels.

    The learning rates are the paper's ("Semi-supervised learning"); it gives no epochs, schedule, batch or weight
    decay, which are SwAV's (eval_semisup.py): 20 epochs, rates times 0.2 at 12 and 16, batch 256, none.

    Attributes:
        fractions: shares of the training images that keep their labels, equally many per class.
        list_files: file lists in SimCLR's format, one per fraction; null: drawn and written down.
        epochs: epochs of one training.
        global_batch_size: images per step.
        backbone_learning_rate: the backbone's learning rate.
        classifier_learning_rates: the linear layer's learning rate, one per fraction.
        milestones: shares of the epochs after which the rates are multiplied by `decay_factor`.
        decay_factor: factor of the learning rates at each milestone.
        weight_decay: weight decay of all parameters.
        random_learning_rate: learning rate of both parts for `random`, the baseline from scratch (torchvision's).
        random_epochs: epochs for `random`; null: `epochs`.
    """

    fractions: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.01, 0.1)
    list_files: tuple[LocalPath, ...] | None = None
    epochs: PositiveInt = 20
    global_batch_size: PositiveInt = 256
    backbone_learning_rate: PositiveFloat = 0.001
    classifier_learning_rates: Rates = (15.0, 10.0)
    milestones: tuple[Share, ...] = (0.6, 0.8)
    decay_factor: Share = 0.2
    weight_decay: NonNegativeFloat = 0.0
    random_learning_rate: PositiveFloat = 0.1
    random_epochs: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_of_each_for_each_fraction(self) -> "SemiSupervisedConfig":
        wanted = len(self.fractions)
        for key, what in (("classifier_learning_rates", "values"), ("list_files", "files")):
            given = getattr(self, key)
            if given is not None and len(given) != wanted:
                raise ValueError(f"{key} has {len(given)} {what}, fractions {wanted}: give one for each")
        return self


def _log_spaced(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(float(f"{first * (last / first) ** (place / (count - 1)):.4g}") for place in range(count))


# Compares three rates without decay, and trains the best again on all images.
_SMALL: dict[str, Any] = {
    "steps": 500,
    "random_steps": 1000,
    "global_batch_size": 64,
    "learning_rates": (1e-3, 1e-2, 1e-1),
    "random_learning_rates": (1e-2, 1e-1, 1.0),
    "weight_decays": (0.0,),
}


class FineTuneConfig(Section):
    """Fine-tuning on another data set by SimCLR's protocol (arXiv:2002.05709, B.8.1).

    Every learning rate with every weight decay is trained on a part of the training images and compared on the rest;
    the best is trained on all of them and tested. One pair alone is not compared. SimCLR names no schedule: a cosine.

    Attributes:
        preset: defaults of the other keys: SimCLR's grid (`paper`), or 4 trainings of 500 steps for a few thousand
            images or fewer (`small`, BiT's rule for small sets, arXiv:1912.11370).
        steps: steps of one training.
        random_steps: steps of one training of the `random` source.
        global_batch_size: images per step.
        learning_rates: learning rates of the grid.
        random_learning_rates: learning rates of the grid for the `random` source.
        weight_decays: weight decays of the grid, divided by the learning rate before use.
        held_out_fraction: share held out by class to choose the grid point, if the set has no validation part.
        metric: metric of the choice and headline; SimCLR's is the mean per class for Aircraft, Pets, Caltech-101 and
            Flowers, and top-1 elsewhere.
    """

    preset: Literal["paper", "small"] = "paper"
    steps: PositiveInt = 20_000
    random_steps: PositiveInt = 40_000
    global_batch_size: PositiveInt = 256
    learning_rates: Rates = _log_spaced(1e-4, 1e-1, 7)
    random_learning_rates: Rates = _log_spaced(1e-3, 1.0, 7)
    weight_decays: Decays = (0.0, *_log_spaced(1e-6, 1e-3, 7))
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    metric: Literal["top1", "mean_per_class"] = "top1"

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, values: Any) -> Any:
        return {**_SMALL, **values} if isinstance(values, dict) and values.get("preset") == "small" else values
