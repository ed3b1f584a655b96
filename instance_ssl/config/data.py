"""The experiment's section `data`: which images, and how unreadable ones are treated."""

from typing import Annotated, Literal

from pydantic import Field

from instance_ssl.config.types import AUTO, LocalPath, NonNegativeInt, PositiveInt, Section

DataKind = Literal[
    "digits",
    "cifar10",
    "cifar100",
    "tree",
    "class_folders",
    "sun397",
    "dtd",
    "inaturalist2018",
    "folder",
    "list",
    "tar",
]


class DataConfig(Section):
    """Which images. `tree` is ImageNet's layout (root/train/class, root/val/class); `folder` and `list` need no labels.

    Attributes:
        kind: how images and labels are stored (runners/README.md, "Your own images"); `auto`: `tree`, `class_folders`
            or `folder`, by what lies below `root`.
        root: directory of the images, or of the data set's own files.
        list_file: for `list`: one path a line, relative to `root`.
        shards: for `tar`: the training shards, as a glob or brace list relative to `root`; null: found by their names.
        shuffle_buffer: for `tar`: images shuffled at a time, after the order of the shards; 0: all at once. Reads stay
            local in the page cache: 65,536 full-size photographs are 7 GB, 16 of the paper's batches.
        on_broken: an image that cannot be read is an `error`, or training skips it (`skip`): another image of its batch
            replaces it, and its class stays until the images are updated.
        max_broken_share: share of all images that `skip` accepts; more end the run.
        allow_lost: whether a run resumes without images that are no longer in the list, and drops their classes.
        exif: whether images are turned `upright` as their EXIF orientation says, or used as `stored`.
        alpha: whether transparent images are composed on `white`, or lose their alpha and show hidden colours (`drop`).
        image_size: side of the encoder's input in pixels; `auto`: by the images, up to 64 on a CPU and 224 on a GPU.
        limit_train: training images to keep, evenly spaced over the sorted ones; null: all.
        limit_test: the same of the test images.
        num_workers: loader processes per rank, which change the speed only; `auto`: by the cores of a rank.
        augment_on: where jitter, grey, blur and normalisation are computed: in the loader processes, or on the device,
            which then receives 8-bit crops. The views are the same but for rounding.
    """

    kind: Annotated[DataKind, AUTO] = "tree"
    root: LocalPath | None = None
    list_file: LocalPath | None = None
    shards: str | None = None
    shuffle_buffer: NonNegativeInt = 65_536
    on_broken: Literal["error", "skip"] = "error"
    max_broken_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    allow_lost: bool = False
    exif: Literal["upright", "stored"] = "upright"
    alpha: Literal["white", "drop"] = "white"
    image_size: Annotated[PositiveInt, AUTO] = 224
    limit_train: PositiveInt | None = None
    limit_test: PositiveInt | None = None
    num_workers: Annotated[NonNegativeInt, AUTO] = 8
    augment_on: Literal["cpu", "device"] = "cpu"
