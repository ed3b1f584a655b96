"""The experiment's section `data`: which images, and what becomes of those that cannot be read."""

from typing import Annotated, Literal

from pydantic import Field

from instance_ssl.config.types import LocalPath, NonNegativeInt, PositiveInt, Section

DataKind = Literal["digits", "cifar10", "cifar100", "tree", "sun397", "dtd", "inaturalist2018", "folder", "list", "tar"]


class DataConfig(Section):
    """Which images. `tree` is ImageNet's layout (root/train/class, root/val/class); `folder` and `list` need no labels.

    Attributes:
        root: directory of the images (of the dataset's own files for CIFAR).
        list_file: for `list`: one path a line, relative to `root`.
        shards: for `tar`: the training shards, as a glob or brace list relative to `root`; None: by their place in it.
        shuffle_buffer: images of tar shards are shuffled by shard, and then so many in a row among one another, so that
            what is read stays near in the page cache: 65,536 full-size photographs are 7 GB, 16 of the paper's batches.
            0: all images at once, as for what lies in no shards.
        on_broken: an image that cannot be read is an `error`, or training skips it (`skip`): another image of the batch
            replaces it, and its class stays until the images are updated.
        max_broken_share: of all images, as many as `skip` accepts; more of them end the run.
        allow_lost: a run resumes without the images that are not in the list any more, and drops their classes.
        exif: images are turned `upright` as their EXIF orientation says, or taken as they are `stored`.
        alpha: transparent images are composed on `white`, or their alpha is dropped (`drop`), and hidden colours show.
        image_size: side in pixels of what the encoder sees.
        limit_train: keep this many images, evenly spaced over the sorted ones; None keeps all.
        num_workers: loader processes a rank; changes nothing but speed.
        augment_on: who changes the colours of the training views (jitter, grey, blur) and normalises them: the loader
            processes, or the device, which then gets crops of 8 bits. The same views but for rounding.
    """

    kind: DataKind = "tree"
    root: LocalPath | None = None
    list_file: LocalPath | None = None
    shards: str | None = None
    shuffle_buffer: NonNegativeInt = 65_536
    on_broken: Literal["error", "skip"] = "error"
    max_broken_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    allow_lost: bool = False
    exif: Literal["upright", "stored"] = "upright"
    alpha: Literal["white", "drop"] = "white"
    image_size: PositiveInt = 224
    limit_train: PositiveInt | None = None
    limit_test: PositiveInt | None = None
    num_workers: NonNegativeInt = 8
    augment_on: Literal["cpu", "device"] = "cpu"
