"""Holds images out for evaluations, of a labelled set that has no test part of its own."""

import numpy as np

from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.list_changes import taken

_SHARE = 0.2
# As many as ImageNet's validation part has: every one is compared with all others.
_MOST_IMAGES = 50_000


def split_by_class(source: ImageSource, seed: int) -> tuple[ImageSource, ImageSource]:
    """The images of a labelled source of files in two parts, to compare with and to test on.

    Of every class a fifth is held out to test on, at least one image and never all; a class of one image has none. Of
    more than 250,000 images, the share is 50,000 images.
    """
    assert source.labels is not None
    labels_N = source.labels.numpy()
    order = np.random.RandomState(seed).permutation(len(labels_N))
    by_class = order[labels_N[order].argsort(kind="stable")]
    sizes_C = np.bincount(labels_N)
    places = np.arange(len(labels_N)) - np.repeat(sizes_C.cumsum() - sizes_C, sizes_C)  # of each image in its class
    share = min(_SHARE, _MOST_IMAGES / len(labels_N))
    quotas_C = np.where(sizes_C > 1, np.maximum(1, (share * sizes_C).astype(np.int64)), 0)
    is_held_out = np.zeros(len(labels_N), bool)
    is_held_out[by_class] = places < np.repeat(quotas_C, sizes_C)
    return taken(source, (~is_held_out).nonzero()[0]), taken(source, is_held_out.nonzero()[0])
