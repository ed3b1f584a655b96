"""Builds the objects that stages share from the configuration."""

from dataclasses import replace

import torch
from torch import Tensor

from instance_ssl.classifier.kernel_selection import choose_block_bytes, choose_kernels, find_obstacle
from instance_ssl.classifier.prior import Moving, moving_parts
from instance_ssl.classifier.sampling import ClassSampler
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import StemName
from instance_ssl.config.data import DataConfig
from instance_ssl.config.experiment import AugmentationConfig, ExperimentConfig
from instance_ssl.data.augmentations import Transform, digit_view, simclr_view
from instance_ssl.data.image_sources import ImageSource
from instance_ssl.data.sampler import LazyBatches, Shards
from instance_ssl.data.views import ViewDataset
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition
from instance_ssl.errors import UserError
from instance_ssl.models.backbones import choose_stem, is_library_network
from instance_ssl.models.encoder import Encoder, build_encoder
from instance_ssl.run.stage import Stage
from instance_ssl.training.memory_plan import EncoderCost, measure_encoder


def seeded_encoder(config: ExperimentConfig, *, recompute_stages: bool = False) -> Encoder:
    """Builds the randomly initialised encoder of the experiment's seed, equal on all ranks."""
    torch.manual_seed(config.seed)
    return build_encoder(
        backbone=config.model.backbone,
        backbone_options=config.model.backbone_options,
        stem=config.model.stem,
        image_size=config.data.image_size,
        projection=config.model.projection,
        projection_hidden_dim=config.model.projection_hidden_dim,
        embedding_dim=config.model.embedding_dim,
        recompute_stages=recompute_stages,
    )


def describe_encoder(config: ExperimentConfig) -> str:
    """Returns the log line that names the stem: the wrong one for the image size costs several points."""
    model, size = config.model, config.data.image_size
    stem = choose_stem(model.backbone, model.stem, size)
    how = "chosen by image size" if model.stem == "auto" else "as configured"
    if is_library_network(model.backbone):
        kind = {"small": "its first layer for small images", "imagenet": "its own first layer"}[stem]
    else:
        kind = {"small": "3x3 stem without max-pool", "imagenet": "ImageNet stem"}[stem]
    head = f"{model.projection} projection to {model.embedding_dim}"
    return f"encoder: {model.backbone}, {kind} ({how}, {size} px), {head}"


def moving_statistics(encoder: Encoder, config: ExperimentConfig) -> Moving:
    """What moves in the prior's pass: batch norms of random layers, or the last bias where there are none."""
    return moving_parts(encoder, None if config.model.initial_weights is None else encoder.backbone)


def describe_stem_cost(config: ExperimentConfig) -> str | None:
    """Returns what the 3x3 stem costs against the ImageNet stem; None unless `auto` chose it."""
    model, size = config.model, config.data.image_size
    is_resnet = model.backbone != "small_cnn" and not is_library_network(model.backbone)
    if not is_resnet or model.stem != "auto" or choose_stem(model.backbone, "auto", size) != "small":
        return None

    def cost(stem: StemName) -> EncoderCost:
        def build() -> Encoder:
            return seeded_encoder(config.model_copy(update={"model": model.model_copy(update={"stem": stem})}))

        return measure_encoder(build, image_size=size, num_views=2, autocast_dtype=None)

    small, imagenet = cost("small"), cost("imagenet")
    return (
        f"the 3x3 stem takes {small.flops / imagenet.flops:.1f} times the FLOPs and {small.kept / imagenet.kept:.1f} "
        f"times the activation memory of the ImageNet stem at {size} px, and sees small images better; "
        "model.stem=imagenet selects that one, model.stem=small confirms this one"
    )


def classifier_shard(stage: Stage) -> ClassifierShard:
    """Builds this rank's shard of W, not yet initialised, in groups of its own."""
    ds, device, seed, num_classes = stage.ds, stage.world.device, stage.config.seed, len(stage.source)
    classifier, optimization = stage.config.classifier, stage.config.optimization
    embedding_dim = stage.config.model.embedding_dim
    # The shard is given the encoder's rate in each step, and both follow one schedule.
    rate_ratio = stage.config.classifier_peak_learning_rate / optimization.peak_learning_rate
    group, replicas = comm.split(stage.world, ds.group_size(stage.world.size))
    options = SoftmaxOptions(
        temperature=classifier.temperature,
        form=classifier.loss_form,
        matmul_dtype=ds.matmul_dtype,
        block_bytes=choose_block_bytes(ds.block_bytes, device),
        kernels=choose_kernels(ds.classifier.kernels, device, embedding_dim, ds.matmul_dtype),
    )
    if device.type == "cuda":
        options = _with_tried_kernels(stage, options)
    sampler = None
    if classifier.sampling != "full":
        sampler = ClassSampler(classifier.sampling, num_classes, classifier.num_sampled_classes, seed)
    return ClassifierShard(
        num_classes,
        embedding_dim,
        group,
        options,
        replicas=replicas,
        smoothing_factor=classifier.smoothing_factor,
        momentum=optimization.momentum,
        weight_decay=stage.config.classifier_weight_decay,
        learning_rate_multiplier=classifier.learning_rate_multiplier * rate_ratio,
        row_dtype=ds.row_dtype,
        momentum_dtype=ds.momentum_dtype,
        sampler=sampler,
        seed=seed,
    )


def _with_tried_kernels(stage: Stage, options: SoftmaxOptions) -> SoftmaxOptions:
    """Selects the PyTorch passes unless the Triton kernels pass their self-test on every rank's GPU."""
    if (wanted := stage.ds.classifier.kernels) == "torch":
        return options
    dtypes = stage.ds.row_dtype, stage.ds.momentum_dtype
    found = find_obstacle(stage.config.model.embedding_dim, options, *dtypes, stage.world)
    if found is None:
        return options
    if wanted == "triton":
        raise UserError(f"instance_classifier.kernels: triton is not available ({found}): use auto or torch")
    stage.log.say(f"classifier: using PyTorch's operations, not the Triton kernels ({found})")
    return replace(options, kernels="torch")


def training_view(augmentation: AugmentationConfig, data: DataConfig) -> Transform:
    """Builds the random view of the configuration."""
    if augmentation.view == "digit":
        return digit_view(data.image_size)
    return simclr_view(
        data.image_size,
        min_crop_scale=augmentation.min_crop_scale,
        jitter_strength=augmentation.jitter_strength,
        blur=augmentation.blur,
    )


def training_views(config: ExperimentConfig, source: ImageSource) -> ViewDataset:
    """Builds the data set of training views; their colours are changed here or on the device."""
    return ViewDataset(
        source,
        training_view(config.augmentation, config.data),
        config.augmentation.num_views,
        config.seed,
        leave_colours=config.data.augment_on == "device",
    )


def training_shards(stage: Stage) -> Shards | None:
    """Returns how training images in shards are shuffled, and logs it; None shuffles all at once."""
    starts, buffer = stage.source.shard_starts, stage.config.data.shuffle_buffer
    if starts is None or buffer == 0:
        return None
    stage.log.say(
        f"images are shuffled by shard ({len(starts):,} of them) and within a buffer of {buffer:,}; "
        "data.shuffle_buffer=0 shuffles all at once"
    )
    return Shards(torch.from_numpy(starts), buffer)


def own_parts(order_N: Tensor, global_batch_size: int, world: Group) -> LazyBatches:
    """Returns this rank's part of every global batch of `order_N`.

    The global batches do not depend on the number of ranks. The last one may be short, and its parts empty.
    """

    def part(number: int) -> list[int]:
        batch = order_N[number * global_batch_size : (number + 1) * global_batch_size]
        return batch[slice(*Partition(len(batch), world.size).bounds(world.rank))].tolist()

    return LazyBatches(-(-len(order_N) // global_batch_size), part)
