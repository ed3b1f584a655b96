"""A look at what the encoder sees: some training images and their views, drawn into a file. Starts no process group."""

from pathlib import Path

import torch

from instance_ssl.config.draft import Draft
from instance_ssl.data.folders import escape
from instance_ssl.data.view_grid import view_grid
from instance_ssl.errors import UserError
from instance_ssl.run import choosing
from instance_ssl.run.build import training_views
from instance_ssl.run.console import tell
from instance_ssl.run.images import open_split
from instance_ssl.training.step import flatten_views


def draw_views(draft: Draft, *, num_images: int, epoch: int, output: Path) -> None:
    """Draws images, evenly spaced over all, beside their views of an epoch into a PNG.

    What `draft` leaves to `auto` is chosen and printed as a run on one rank of this machine would choose it.

    Raises:
        UserError: where there are not so many images, or the file cannot be written.
    """
    draft = choosing.with_kind(draft)
    source = open_split(draft.completed({}).data, "train")
    config = choosing.completed_here(draft, source)
    for remark in source.remarks:
        tell(remark)
    if not 1 <= num_images <= len(source):
        raise UserError(f"--images {num_images}: there are {len(source)}, take 1 to as many")
    ids = [number * len(source) // num_images for number in range(num_images)]
    dataset = training_views(config, source)
    batch = dataset.collate([dataset[epoch, index] for index in ids])
    finished, _ = flatten_views(batch, torch.device("cpu"))
    views = finished.unflatten(0, (-1, len(ids))).transpose(0, 1)
    captions = [f"{index}: {escape(source.names[index])}" for index in ids]
    picture = view_grid([source.load(index) for index in ids], views, captions)
    try:
        picture.save(output, format="PNG")
    except OSError as error:
        raise UserError(f"--out {output}: {error.strerror or error}") from None
    tell(f"{output}: {len(ids)} of {len(source):,} images, {views.shape[1]} views each, epoch {epoch}")
    tell("\n".join(captions))
