"""What one rank of the classifier holds, sends and computes, from the numbers that decide it; nothing is allocated.

The counts follow the tensors of `shard.py`, `torch_passes.py` and `hard_classes.py` through a step and an epoch's
search for the hardest classes, one term a tensor; `tests/distributed/test_classifier_memory.py` holds them to what the
allocator sees.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from instance_ssl.classifier.hard_classes import ROWS_AT_ONCE, fast_screen_dtype, search_bytes, tile_bytes, tile_edge
from instance_ssl.classifier.matmul_rates import onednn_multiplies_bfloat16
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.classifier.torch_passes import block_classes, sums_block_bytes, update_block_bytes
from instance_ssl.distributed.comm import ring_bytes
from instance_ssl.distributed.partition import Partition

_FLOAT, _INT, _ID = 4, 4, 8  # bytes of a float32, an int32, an int64


@dataclass(frozen=True)
class ClassifierSize:
    """The numbers that decide memory and traffic of `ClassifierShard`.

    Attributes:
        num_instances: N.
        embedding_dim: D.
        group_size: G, ranks that hold W once between them.
        num_replicas: copies of W in the world.
        rows_per_rank: b, views of one micro-batch on one rank.
        accumulation_steps: micro-batches of an optimizer step.
        num_hard_classes: K; 0 without smoothing.
        options: of the two passes; counted are those in PyTorch.
        row_dtype: of W.
        momentum_dtype: of its momentum.
        num_sampled_classes: M of Table 3; None: every step's softmax runs over all N.
        device: type of the device, which decides the tiles and the precision of the search for the hardest classes.
    """

    num_instances: int
    embedding_dim: int
    group_size: int
    num_replicas: int
    rows_per_rank: int
    accumulation_steps: int
    num_hard_classes: int
    options: SoftmaxOptions
    row_dtype: torch.dtype = torch.float32
    momentum_dtype: torch.dtype = torch.float32
    num_sampled_classes: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))

    @property
    def own_classes(self) -> int:
        """n of rank 0, which has the most."""
        return Partition(self.num_instances, self.group_size).count(0)

    @property
    def stepped_classes(self) -> int:
        """Own classes that a step's softmax runs over; of sampled ones their mean."""
        if self.num_sampled_classes is None:
            return self.own_classes
        return Partition(min(self.num_sampled_classes, self.num_instances), self.group_size).count(0)

    @property
    def gathered_rows(self) -> int:
        """B, rows of a micro-batch over the group."""
        return self.rows_per_rank * self.group_size

    @property
    def own_entries(self) -> int:
        """P, entries of y (Eq. 2) of a micro-batch in one shard; on the mean, for they follow the images drawn."""
        return math.ceil(self.gathered_rows * (1 + self.num_hard_classes) / self.group_size)

    @property
    def row_bytes(self) -> int:
        """Of one row of W and its momentum."""
        return self.embedding_dim * (self.row_dtype.itemsize + self.momentum_dtype.itemsize)


@dataclass(frozen=True)
class ClassifierMemory:
    """Bytes of one rank. What is resident is there all the time; of the others, one row at a time.

    Attributes:
        weight: own rows of W.
        momentum: their momentum.
        hard_classes: own rows of the table of hardest classes, int32.
        clock: how far each own row is, where classes are sampled.
        sums_block: block buffers of the first pass.
        update_block: block buffers of the second pass.
        first_pass: `forward` of the last micro-batch at its largest: block buffers, features, labels, numerators.
        pending: features and labels that wait for the update, while the encoder's backward pass runs.
        update: `step` at its largest: block buffers, features, labels.
        refresh: the search for the hardest classes at its largest, the table that it makes included.
    """

    weight: int
    momentum: int
    hard_classes: int
    clock: int
    sums_block: int
    update_block: int
    first_pass: int
    pending: int
    update: int
    refresh: int

    @property
    def resident(self) -> int:
        """What is there all the time."""
        return self.weight + self.momentum + self.hard_classes + self.clock

    @property
    def peak(self) -> int:
        """The classifier alone at its largest."""
        return self.resident + max(self.first_pass, self.pending, self.update, self.refresh)


def classifier_memory(size: ClassifierSize) -> ClassifierMemory:
    """Memory of rank 0's shard."""
    n, num_hard = size.own_classes, size.num_hard_classes
    step_rows = size.gathered_rows * size.accumulation_steps
    width = size.embedding_dim
    sums_block = sums_block_bytes(size.options, _block_length(size, size.gathered_rows), size.gathered_rows, width)
    dtypes = {"row_dtype": size.row_dtype, "momentum_dtype": size.momentum_dtype}
    update_block = update_block_bytes(size.options, _block_length(size, step_rows), step_rows, width, **dtypes)
    sampled = 0
    if size.num_sampled_classes is not None:  # ids, and copies of the rows and momentum that the step moves
        sampled = size.stepped_classes * (_ID + size.row_bytes)
    pending = _pending_bytes(size)
    return ClassifierMemory(
        weight=n * width * size.row_dtype.itemsize,
        momentum=n * width * size.momentum_dtype.itemsize,
        hard_classes=n * num_hard * _INT,
        clock=0 if size.num_sampled_classes is None else n * _ID,
        sums_block=sums_block,
        update_block=update_block,
        first_pass=sampled + (size.accumulation_steps - 1) * pending + _first_pass_bytes(size, sums_block),
        pending=sampled + size.accumulation_steps * pending,
        update=sampled + size.accumulation_steps * pending + _update_bytes(size, update_block),
        refresh=_refresh_bytes(size) if num_hard else 0,
    )


def _block_length(size: ClassifierSize, num_rows: int) -> int:
    return min(block_classes(size.options, num_rows, size.embedding_dim), size.stepped_classes)


def _pending_bytes(size: ClassifierSize) -> int:
    """`_PendingRows`: unit features, Z and Y, and the labels' two ids, value and exp(s)."""
    rows = size.gathered_rows * (size.embedding_dim + 2) * _FLOAT
    return rows + size.own_entries * (2 * _ID + 2 * _FLOAT)


def _entry_terms_bytes(size: ClassifierSize, num_rows: int, entries: int) -> int:
    """`label_terms._entry_terms`: rows of W of some entries, their products, and the ids of sparse matrices."""
    width, narrow = size.embedding_dim, size.row_dtype.itemsize
    at_once = min(entries, block_classes(size.options, num_rows, width))
    return at_once * (width * _FLOAT + max(width * narrow if narrow < _FLOAT else 0, 5 * (_ID + _FLOAT)))


def _first_pass_bytes(size: ClassifierSize, block: int) -> int:
    rows, entries, width = size.gathered_rows, size.own_entries, size.embedding_dim
    features = rows * width * _FLOAT
    own = size.rows_per_rank * (2 * width + 2) * _FLOAT  # x_bD and its unit rows
    gathered = own + features + rows * _ID
    # `own_labels`: ids, values and (B, K) table rows of all entries, masks, or own ones and their order sorted.
    all_entries = rows * (1 + size.num_hard_classes)
    labels = all_entries * (_ID + 2 * _FLOAT) + max(3 * all_entries, entries * (5 * _ID + 2 * _FLOAT))
    # `softmax_sums`: A, C, Z, Y; then the entries by row and their terms and product, and after them the blocks, with
    # a sum, the features scaled and a product in the products' precision.
    kept_labels = entries * (2 * _ID + _FLOAT)
    sums = kept_labels + 2 * features + 2 * rows * _FLOAT
    narrow = size.options.matmul_dtype.itemsize
    terms = entries * (3 * _ID + _FLOAT) + _entry_terms_bytes(size, rows, entries) + features
    widened = features if narrow < _FLOAT else 0  # the product, in the precision of the sum that it is added to
    workspace = features if _has_workspace(size) else 0
    passes = sums + max(terms, block + widened + workspace + rows * (2 * width * narrow + _FLOAT))
    # `unit_feature_gradient`: A, C and three more of their shape while they are put together.
    gradient = kept_labels + 5 * features
    return gathered + max(labels, passes, gradient)


def _update_bytes(size: ClassifierSize, block: int) -> int:
    rows = size.gathered_rows * size.accumulation_steps
    entries = size.own_entries * size.accumulation_steps
    narrow = size.options.matmul_dtype.itemsize
    # All micro-batches in one tensor each, and the features twice more in the precision of the products.
    features = rows * (size.embedding_dim * (_FLOAT + 2 * narrow) + 2 * _FLOAT)
    joined = entries * (2 * _ID + _FLOAT) if size.accumulation_steps > 1 else 0
    terms = entries * narrow  # of the entries, beside which first their rows are held, then the blocks
    workspace = rows * size.embedding_dim * _FLOAT if _has_workspace(size) else 0
    return features + joined + terms + max(_entry_terms_bytes(size, rows, entries), block + workspace)


def _has_workspace(size: ClassifierSize) -> bool:
    """Whether narrow products take a workspace: oneDNN's do; without it, a CPU multiplies in place."""
    narrow = size.options.matmul_dtype.itemsize < _FLOAT
    return narrow and (size.device.type != "cpu" or onednn_multiplies_bfloat16())


def _refresh_bytes(size: ClassifierSize) -> int:
    """`find_hard_classes`: unit rows in two precisions, places for 2K keys a class, a tile, and then the new table."""
    n, num_hard, width = size.own_classes, size.num_hard_classes, size.embedding_dim
    edge = tile_edge(search_bytes(size.options.block_bytes, size.device), width, n, size.device.type)
    padded = math.ceil(n / edge) * edge
    unit_rows = n * width * _FLOAT + padded * width * fast_screen_dtype(size.device).itemsize
    # Rounding error and margin, how many keys there are, and the bound that they give.
    keys = n * (min(2 * num_hard, size.num_instances) * _ID + 2 * _FLOAT + _ID + _FLOAT)
    scores = edge * edge * fast_screen_dtype(size.device).itemsize
    # Of the rows taken apart at once: their best keys, scores, the scores' bits, and ids that are made of masked keys.
    apart = min(n, ROWS_AT_ONCE) * num_hard * (3 * _ID + _FLOAT + _INT)
    return unit_rows + keys + max(tile_bytes(edge, width), scores + n * num_hard * _INT + apart)


def classifier_traffic(size: ClassifierSize) -> Counter[str]:
    """Bytes that one rank puts on the wire in one optimizer step, by collective, as `Group.sent_bytes` counts them."""
    sent: Counter[str] = Counter()
    group, replicas, width = size.group_size, size.num_replicas, size.embedding_dim
    rows, own_rows = size.gathered_rows, size.rows_per_rank
    for _ in range(size.accumulation_steps):
        sent["all_gather"] += ring_bytes("all_gather", own_rows * width * _FLOAT, group)
        sent["all_gather"] += ring_bytes("all_gather", own_rows * _ID, group)
        sent["all_reduce"] += ring_bytes("all_reduce", rows * size.num_hard_classes * _INT, group)
        sent["all_reduce"] += ring_bytes("all_reduce", 2 * rows * _FLOAT, group)
        sent["reduce_scatter"] += ring_bytes("reduce_scatter", own_rows * width * _FLOAT, group)
        sent["all_reduce"] += ring_bytes("all_reduce", 3 * _FLOAT, replicas)
    if replicas > 1:  # ∂W, block by block
        length = block_classes(size.options, rows * size.accumulation_steps, width)
        full, rest = divmod(size.stepped_classes, length)
        sent["all_reduce"] += full * ring_bytes("all_reduce", length * width * _FLOAT, replicas)
        sent["all_reduce"] += ring_bytes("all_reduce", rest * width * _FLOAT, replicas)
    return sent


def classifier_flops(size: ClassifierSize) -> int:
    """Of one rank in one optimizer step."""
    num_rows = size.gathered_rows * size.accumulation_steps
    return step_flops(num_rows, size.stepped_classes, size.embedding_dim)


def step_flops(num_rows: int, num_classes: int, embedding_dim: int) -> int:
    """8BND: logits and numerators, logits again and ∂W; 2 a row, class and dimension each."""
    return 8 * num_rows * num_classes * embedding_dim
