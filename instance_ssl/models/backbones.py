"""Backbones: torchvision's ResNets with a stem that fits the image, and a small network.

A backbone maps images (b, 3, S, S) to features (b, F) and carries its width as `feature_dim`.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, get_args

import torch
import torchvision
from torch import Tensor, nn

from instance_ssl.config.choices import BackboneName, StemName
from instance_ssl.models.activation_checkpointing import run_stages
from instance_ssl.models.library_networks import LibraryBackbone, build_library_network

# Images up to this side keep their resolution: the ImageNet stem divides it by four before the first block and costs
# about 8 points of accuracy at 32 pixels (lightly-ai/lightly #1419).
SMALL_IMAGE_PIXELS = 64


class ResNet(nn.Module):
    """A torchvision ResNet without its classifier; the keys are torchvision's.

    Args:
        name: resnet18, resnet34, resnet50 or resnet101.
        small_stem: 3x3 convolution with stride 1 and no max-pool (SimCLR, appendix B.9) instead of ImageNet's stem.
        recompute_stages: compute the activations inside layer1 … layer4 again in the backward pass.
    """

    def __init__(self, name: str, *, small_stem: bool, recompute_stages: bool = False) -> None:
        super().__init__()
        self.recompute_stages = recompute_stages
        self.network = getattr(torchvision.models, name)(weights=None)
        self.feature_dim: int = self.network.fc.in_features
        self.network.fc = nn.Identity()
        if small_stem:
            self.network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(self.network.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.network.maxpool = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Features (b, F) of images (b, 3, S, S)."""
        network = self.network
        stem = network.maxpool(network.relu(network.bn1(network.conv1(channels_last(images)))))
        stages = (network.layer1, network.layer2, network.layer3, network.layer4)
        return network.avgpool(run_stages(stages, stem, recompute=self.recompute_stages)).flatten(1)


class SmallCnn(nn.Module):
    """Three convolution blocks with batch norm, for images of about 16 pixels; F = 4 times `width`.

    Args:
        recompute_stages: compute the activations inside a block again in the backward pass.
    """

    def __init__(self, width: int = 32, *, recompute_stages: bool = False) -> None:
        super().__init__()
        self.recompute_stages = recompute_stages
        self.feature_dim = 4 * width
        channels = [3, width, 2 * width, 4 * width]
        blocks: list[nn.Module] = []
        for before, after in pairwise(channels):
            blocks += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            blocks += [nn.MaxPool2d(2)] if after != channels[-1] else []
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        """Features (b, F) of images (b, 3, S, S)."""
        # A block is four of `blocks`, the last three: nested, they would have other keys in a checkpoint.
        stages = [self.blocks[first : first + 4] for first in range(0, len(self.blocks), 4)]
        return self.pool(run_stages(stages, channels_last(images), recompute=self.recompute_stages)).flatten(1)


Backbone = ResNet | SmallCnn | LibraryBackbone


def channels_last(images: Tensor) -> Tensor:
    """The same images (b, C, H, W) with a pixel's channels side by side in memory, as are all activations then.

    That is the layout of matrix units: convolutions are faster in it, on CPUs (1.05 to 1.65 times,
    runners/results/encoder_cpu_202611.md) as on GPUs. Weights keep theirs, which DeepSpeed's flat views need, and are
    rearranged at each use: that is little beside the images.
    """
    return images.contiguous(memory_format=torch.channels_last)


def choose_stem(name: str, stem: StemName, image_size: int) -> StemName:
    """The stem that `auto` stands for: `small` up to 64 pixels, `imagenet` above; a small_cnn has no choice."""
    if name == "small_cnn":
        return "small"
    if stem == "auto":
        return "small" if image_size <= SMALL_IMAGE_PIXELS else "imagenet"
    return stem


def is_library_network(name: str) -> bool:
    """Whether `model.backbone` names a network of torchvision, timm or the user, not one of this project's."""
    return name not in get_args(BackboneName)


def build_backbone(
    name: str,
    stem: StemName,
    image_size: int,
    *,
    options: Mapping[str, Any] | None = None,
    recompute_stages: bool = False,
) -> Backbone:
    """The named backbone, randomly initialised from torch's global generator.

    Args:
        name: a `BackboneName`, `torchvision/NAME`, `timm/NAME` or `package.module:function`.
        options: arguments of the constructor of a library's network.

    Raises:
        UserError: there is no such network, or it does not fit the images.
    """
    small_stem = choose_stem(name, stem, image_size) == "small"
    if is_library_network(name):
        built = build_library_network(name, options or {}, image_size, small_stem=small_stem)
        return LibraryBackbone(built, name, image_size, recompute_stages=recompute_stages)
    if name == "small_cnn":
        return SmallCnn(recompute_stages=recompute_stages)
    return ResNet(name, small_stem=small_stem, recompute_stages=recompute_stages)
