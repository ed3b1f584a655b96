"""Opens the images that a section `data` of the configuration names."""

from typing import Literal

from instance_ssl.config.data import DataConfig
from instance_ssl.data.datasets import open_source
from instance_ssl.data.decode import Rendering
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.unreadable_images import OnBroken


def open_split(data: DataConfig, split: Literal["train", "test"]) -> ImageSource:
    """The training or the test images.

    Raises:
        UserError: one line that names the key and the path at fault.
    """
    return open_source(
        data.kind,
        split,
        root=data.root,
        list_file=data.list_file,
        limit=data.limit_train if split == "train" else data.limit_test,
        shards=data.shards,
        on_broken=broken_policy(data),
        rendering=rendering_of(data),
    )


def broken_policy(data: DataConfig) -> OnBroken:
    """What becomes of files that cannot be read."""
    return OnBroken(data.on_broken == "skip", data.max_broken_share)


def rendering_of(data: DataConfig) -> Rendering:
    """What becomes of orientation and transparency."""
    return Rendering(upright=data.exif == "upright", on_white=data.alpha == "white")
