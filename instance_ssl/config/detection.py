"""The section `evaluation.detection`."""

from typing import Annotated

from pydantic import Field, model_validator

from instance_ssl.config.choices import VOC_CLASSES
from instance_ssl.config.types import LocalPath, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

_Share = Annotated[float, Field(ge=0, lt=1)]


class DetectionConfig(Section):
    """Detection on PASCAL VOC by MoCo's 24k recipe, whose values are the defaults; all layers are tuned.

    Attributes:
        root: the folder that holds VOC2007 and VOC2012.
        train: image lists to train on, as folder/list (root/VOC2007/ImageSets/Main/trainval.txt, for example).
        test: image lists to evaluate on.
        classes: in the order of their index.
        steps: iterations after which the learning rate falls to a tenth.
        batch_size: images per step, over all ranks.
        train_short_sides: one is drawn for each image, in pixels, unless the long side would exceed `max_long_side`.
        regions_per_image: number of regions that the box head learns from.
        test_proposals: number of regions that it classifies in a test image.
        statistics_iterations: batches over which batch norm's statistics are recomputed before the evaluation
            (detectron2's PRECISE_BN); 0 keeps the running ones.
        save_every: iterations between saves of the state that the same command resumes from.
    """

    root: LocalPath | None = None
    train: Annotated[tuple[str, ...], Field(min_length=1)] = ("VOC2007/trainval", "VOC2012/trainval")
    test: Annotated[tuple[str, ...], Field(min_length=1)] = ("VOC2007/test",)
    classes: Annotated[tuple[str, ...], Field(min_length=1)] = VOC_CLASSES
    iterations: PositiveInt = 24_000
    steps: tuple[PositiveInt, ...] = (18_000, 22_000)
    warmup_iterations: NonNegativeInt = 100
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 0.02
    momentum: _Share = 0.9
    weight_decay: NonNegativeFloat = 1e-4
    train_short_sides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = tuple(range(480, 801, 32))
    test_short_side: PositiveInt = 800
    max_long_side: PositiveInt = 1333
    regions_per_image: PositiveInt = 512
    test_proposals: PositiveInt = 1000
    statistics_iterations: NonNegativeInt = 200
    save_every: PositiveInt = 500

    @model_validator(mode="after")
    def _fits_together(self) -> "DetectionConfig":
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps {list(self.steps)} must rise")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes holds one twice")
        return self
