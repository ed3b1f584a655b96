"""The contrastive prior: row i is image i's embedding, whatever the number of ranks, in every mode."""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from instance_ssl.classifier.prior import Moving, initialize_from_features, initialize_gaussian
from instance_ssl.classifier.shard import ClassifierShard
from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import InitializationMode
from instance_ssl.distributed import comm
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition

N, D, BATCH = 53, 6, 12  # the last global batch has 5 images, fewer than some worlds have places


def make_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 9),
        nn.BatchNorm1d(9),
        nn.Linear(9, D),
    )


def make_images() -> Tensor:
    return torch.randn(N, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 3 + 1


def make_shard(group: Group, num_instances: int = N) -> ClassifierShard:
    options = SoftmaxOptions(temperature=0.15, form="mixture", block_bytes=1000, matmul_dtype=torch.float32)
    return ClassifierShard(num_instances, D, comm.split(group, group.size)[0], options)


def own_batches(group: Group) -> list[tuple[Tensor, Tensor]]:
    """This rank's images and ids of every global batch."""
    images, order = make_images(), torch.randperm(N, generator=torch.Generator().manual_seed(2))
    batches = []
    for ids in order.split(BATCH):
        start, stop = Partition(len(ids), group.size).bounds(group.rank)
        batches.append((images[ids[start:stop]], ids[start:stop]))
    return batches


def initialized(group: Group, mode: InitializationMode) -> tuple[Tensor, dict[str, Tensor], bool]:
    batches = own_batches(group)
    shard, encoder = make_shard(group), make_encoder()
    encoder.train()
    initialize_from_features(shard, encoder, batches, mode, group)
    return shard.weight, dict(encoder.named_buffers()), encoder.training


@torch.no_grad()
def by_hand(mode: InitializationMode) -> Tensor:
    """One process, one image list, the definition of each mode spelled out with functional batch norm."""
    encoder, images = make_encoder(), make_images()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    rows = torch.empty(N, D)
    running: dict[int, tuple[Tensor, Tensor]] = {}
    for update, ids in enumerate(order.split(BATCH), start=1):
        x = images[ids]
        for place, layer in enumerate(encoder):
            if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                x = layer(x)
                continue
            axes = [0, *range(2, x.dim())]
            mean, variance = x.mean(axes), x.var(axes, unbiased=False)
            if mode == "frozen":
                mean, variance = torch.zeros_like(mean), torch.ones_like(variance)
            elif mode == "running" and update > 1:
                weight = max(0.1, 1 / update)
                old_mean, old_variance = running[place]
                mean, variance = old_mean.lerp(mean, weight), old_variance.lerp(variance, weight)
            running[place] = mean, variance
            x = nn.functional.batch_norm(x, mean, variance, layer.weight, layer.bias, training=False, eps=layer.eps)
        rows[ids] = x
    return rows.detach()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["running", "batch", "frozen"])
def test_row_i_is_the_embedding_of_image_i(world_size: int, mode: InitializationMode) -> None:
    results = run_ranks(initialized, world_size, mode)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), by_hand(mode), rtol=1e-4, atol=1e-5)
    for _, buffers, training in results:
        assert training  # the pass leaves the encoder in the mode it found
        for name, value in results[0][1].items():
            assert torch.equal(buffers[name], value)


def test_more_ranks_than_images_in_the_last_batch() -> None:
    results = run_ranks(initialized, 4, "running")
    expected = by_hand("running")
    torch.testing.assert_close(torch.cat([r[0] for r in results]), expected, rtol=1e-4, atol=1e-5)


def gaussian(group: Group, num_instances: int) -> Tensor:
    shard = make_shard(group, num_instances)
    initialize_gaussian(shard, seed=7)
    return shard.weight


def test_gaussian_rows_do_not_depend_on_the_number_of_ranks() -> None:
    (whole,) = run_ranks(gaussian, 1, 9001)
    assert torch.equal(torch.cat(run_ranks(gaussian, 3, 9001)), whole)
    assert whole.std().item() == pytest.approx(0.01, rel=0.02)
    assert len(whole.unique(dim=0)) == 9001


def make_plain_encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, D)
    )


def centred(group: Group, mode: InitializationMode, stop_after: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows and state after a pass, stopped and resumed, whose batch norm keeps its statistics."""
    batches = own_batches(group)
    shard, encoder = make_shard(group), make_plain_encoder()
    for part, done in ((batches[:stop_after], 0), (batches[stop_after:], stop_after)):
        resumed = make_plain_encoder()
        resumed.load_state_dict(encoder.state_dict())
        encoder, moving = resumed, Moving(kept=resumed[1], centred=resumed[-1])
        initialize_from_features(shard, encoder, part, mode, group, batches_done=done, moving=moving)
    return shard.weight, encoder.state_dict()


@torch.no_grad()
def centred_by_hand(mode: InitializationMode) -> tuple[Tensor, Tensor]:
    """Embeddings less their running mean, and that mean at the end."""
    encoder, images = make_plain_encoder().eval(), make_images()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    rows, mean = torch.empty(N, D), torch.zeros(D)
    for update, ids in enumerate(order.split(BATCH), start=1):
        x = encoder(images[ids])
        weight = {"batch": 1.0, "frozen": 0.0, "running": max(0.1, 1 / update)}[mode]
        mean = mean.lerp(x.mean(dim=0), weight)
        rows[ids] = x - mean
    return rows, mean


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("mode", ["running", "batch", "frozen"])
def test_without_moving_batch_norms_the_last_bias_follows_the_mean(world_size: int, mode: InitializationMode) -> None:
    expected, mean = centred_by_hand(mode)
    before = make_plain_encoder().state_dict()
    for stop_after in (0, 2):
        results = run_ranks(centred, world_size, mode, stop_after)
        torch.testing.assert_close(torch.cat([weight for weight, _ in results]), expected)
        for _, state in results:
            torch.testing.assert_close(state.pop("5.bias"), before["5.bias"] - mean)
            assert all(torch.equal(value, before[name]) for name, value in state.items())
