"""Synchronised batch norm on any division of a batch is ordinary batch norm on the whole of it."""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from instance_ssl.distributed.batch_norm import SynchronisedBatchNorm2d, synchronise_batch_norm
from instance_ssl.distributed.comm import Group

COUNTS = {1: [5], 2: [4, 1], 3: [1, 2, 2]}


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.BatchNorm2d(4))


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 3 + torch.randn(5, 3, 7, 6, generator=generator), torch.randn(5, 4, 5, 4, generator=generator)


def _train(group: Group, momentum: float | None) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    network = _network()
    synchronise_batch_norm(network, group)
    for module in network.modules():
        if isinstance(module, SynchronisedBatchNorm2d):
            module.momentum = momentum
    counts = COUNTS[group.size]
    own = slice(sum(counts[: group.rank]), sum(counts[: group.rank + 1]))
    images, weights = _batch()
    for _ in range(3):
        output = network(images[own])
        (output * weights[own]).sum().backward()
    gradients = {n: group.all_reduce_sum_(p.grad.clone()) for n, p in network.named_parameters() if p.grad is not None}
    return output.detach(), gradients, {n: b.clone() for n, b in network.named_buffers()}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_it_is_ordinary_batch_norm_of_the_whole_batch(size: int, momentum: float | None) -> None:
    network = _network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    images, weights = _batch()
    for _ in range(3):
        expected = network(images)
        (expected * weights).sum().backward()
    results = run_ranks(_train, size, momentum)
    torch.testing.assert_close(torch.cat([output for output, _, _ in results]), expected.detach(), rtol=1e-4, atol=1e-5)
    for _, gradients, buffers in results:
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=2e-4, atol=2e-4)
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-5)


def _keys(group: Group) -> bool:
    network, plain = _network(), _network()
    synchronise_batch_norm(network, group)
    network.load_state_dict(plain.state_dict())
    images, _ = _batch()
    return torch.equal(network.eval()(images), plain.eval()(images)) and not any(
        type(module) is nn.BatchNorm2d for module in network.modules()
    )


def test_keys_and_evaluation_are_those_of_ordinary_batch_norm() -> None:
    assert run_ranks(_keys, 1) == [True]
