"""The encoder: backbone, whose features are what one keeps, and projection, which exists for training only."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from instance_ssl.config.choices import ProjectionName, StemName
from instance_ssl.models.backbones import Backbone, build_backbone


def _build_projection(name: ProjectionName, feature_dim: int, hidden_dim: int | None, embedding_dim: int) -> nn.Module:
    """The head that is trained with the backbone and then discarded.

    `mlp`: Linear-ReLU-Linear without batch norm (PIC, MoCo v2). `mlp_bn`: with batch norm behind either layer, which
    then needs no bias (SimCLR, in its published code). `linear`: one layer, Table 2's row without the head.

    Args:
        hidden_dim: width of the hidden layer; None is the feature width F.
    """
    if name == "linear":
        return nn.Linear(feature_dim, embedding_dim)
    width = feature_dim if hidden_dim is None else hidden_dim
    if name == "mlp_bn":
        hidden, out = nn.Linear(feature_dim, width, bias=False), nn.Linear(width, embedding_dim, bias=False)
        return nn.Sequential(hidden, nn.BatchNorm1d(width), nn.ReLU(inplace=True), out, nn.BatchNorm1d(embedding_dim))
    return nn.Sequential(nn.Linear(feature_dim, width), nn.ReLU(inplace=True), nn.Linear(width, embedding_dim))


class Encoder(nn.Module):
    """Images (b, 3, S, S) → features (b, F) → embeddings (b, D)."""

    def __init__(self, backbone: Backbone, projection: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, projection
        self._backbone_is_frozen = False

    @property
    def feature_dim(self) -> int:
        """F, the width of the backbone's output."""
        return self.backbone.feature_dim

    def freeze_backbone(self) -> None:
        """Has training leave the backbone as it is: without gradients, and with batch norm in evaluation mode."""
        self.backbone.requires_grad_(False)
        self._backbone_is_frozen = True

    def train(self, mode: bool = True) -> Self:
        """Sets training or evaluation mode, the latter always for a frozen backbone."""
        super().train(mode)
        if self._backbone_is_frozen:
            self.backbone.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Backbone output (b, F), float32 whatever autocast does inside."""
        return self.backbone(images).float()

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (b, D), float32: the classifier's cosines are not left to autocast."""
        return self.projection(self.backbone(images)).float()


def build_encoder(
    *,
    backbone: str,
    backbone_options: Mapping[str, Any] | None = None,
    stem: StemName,
    image_size: int,
    projection: ProjectionName,
    projection_hidden_dim: int | None,
    embedding_dim: int,
    recompute_stages: bool = False,
) -> Encoder:
    """A randomly initialised encoder; the caller seeds torch's global generator.

    Args:
        backbone, backbone_options, stem, image_size: as for `build_backbone`.
        recompute_stages: trade time for memory: activations inside the backbone's stages are not kept, but computed
            again in the backward pass.
    """
    network = build_backbone(backbone, stem, image_size, options=backbone_options, recompute_stages=recompute_stages)
    return Encoder(network, _build_projection(projection, network.feature_dim, projection_hidden_dim, embedding_dim))
