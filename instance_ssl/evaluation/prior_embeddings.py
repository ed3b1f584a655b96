"""The pass of the contrastive prior over any images: outputs of the random network, by mode."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from instance_ssl.classifier.prior import ALL_MOVES, Moving, OwnRows, initialize_from_features
from instance_ssl.config.choices import InitializationMode
from instance_ssl.data.augmentations import Transform
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.loaders import BatchLoader
from instance_ssl.data.sampler import BatchKeys, epoch_order
from instance_ssl.data.views import ViewBatch, ViewDataset
from instance_ssl.distributed.partition import Partition
from instance_ssl.evaluation.frozen_encoder import stoppable_progress
from instance_ssl.run.build import own_parts
from instance_ssl.run.stage import Stage


def prior_rows(
    stage: Stage,
    network: nn.Module,
    width: int,
    images: ImageSource,
    ids_N: Tensor,
    view: Transform,
    mode: InitializationMode,
    *,
    label: str,
    num_views: int = 1,
    batches_done: int = 0,
    moving: Moving = ALL_MOVES,
) -> Tensor:
    """Outputs (n, V, width), float32, of this rank's contiguous part of the chosen images. Collective.

    The batches are shuffled as in the initialisation, whatever the number of ranks.

    Args:
        network: images (b, 3, S, S) → (b, width); its batch-norm statistics end as the pass left them.
        ids_N: images of the source, ascending.
        view: drawn `num_views` times for each image.
        label: of the progress bar.
        batches_done, moving: see `initialize_from_features`.
    """
    start, stop = Partition(len(ids_N), stage.world.size).bounds(stage.world.rank)
    rows = OwnRows(start * num_views, stop * num_views, width, stage.world.device)
    batches = _own_batches(stage, images, ids_N, view, num_views)
    with stoppable_progress(stage, label, len(ids_N), "images") as advance, stage.autocast():
        initialize_from_features(
            rows, network, batches, mode, stage.world,
            batches_done=batches_done, moving=moving, on_batch=lambda count: advance(count // num_views),
        )  # fmt: skip
    return rows.rows_nD.view(stop - start, num_views, width)


def _own_batches(
    stage: Stage, images: ImageSource, ids_N: Tensor, view: Transform, num_views: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of every batch, views flattened: view v of the image at place p is row p · V + v."""
    order = ids_N[epoch_order(len(ids_N), stage.config.seed, epoch=0)]
    parts = own_parts(order, stage.config.classifier.initialization_batch_size, stage.world)
    dataset = ViewDataset(images, view, num_views, stage.config.seed)
    loaded = iter(BatchLoader(dataset, BatchKeys(parts), stage.config.data.num_workers, persistent=False))
    size = stage.config.data.image_size
    nothing = ViewBatch(torch.empty(0, num_views, 3, size, size), torch.empty(0, dtype=torch.int64))
    for part in parts:
        batch = next(loaded) if part else nothing
        places_b = torch.searchsorted(ids_N, batch.ids)
        yield batch.views.flatten(0, 1), (places_b[:, None] * num_views + torch.arange(num_views)).flatten()
