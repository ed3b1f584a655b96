"""Features of a frozen encoder, each rank computing those of its local images."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def extract_features(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    feature_dim: int,
    device: torch.device,
    *,
    on_batch: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, Tensor]:
    """Computes the features of this rank's images, in the order of its batches.

    Args:
        model: images (b, …) to features (b, F); a module runs in evaluation mode, its own mode is restored after.
        batches: this rank's (images, ids (b,)), possibly none.
        feature_dim: F.
        device: of the model and the result.
        on_batch: called with the number of images of each finished batch.

    Returns:
        Features (n, F), float32, and image ids (n,), int64.

    Raises:
        ValueError: when the model's features are not (b, F).
    """
    features = [torch.empty(0, feature_dim, device=device)]
    ids = [torch.empty(0, dtype=torch.int64, device=device)]
    with evaluation_mode(model):
        for batch_images, batch_ids in batches:
            features.append(forward_frozen(model, batch_images, feature_dim, device))
            ids.append(batch_ids.to(device))
            on_batch(batch_images.shape[0])
    # Outside inference mode, so that callers get ordinary tensors that they may train on or write to.
    return torch.cat(features), torch.cat(ids)


@torch.inference_mode()
def forward_frozen(model: Callable[[Tensor], Tensor], images: Tensor, feature_dim: int, device: torch.device) -> Tensor:
    """Features (b, F), float32, of images (b, …), without gradients; without images the model is not called.

    Raises:
        ValueError: when the model's features are not (b, F).
    """
    if images.shape[0] == 0:
        return torch.empty(0, feature_dim, device=device)
    features = model(images.to(device, non_blocking=True))
    if features.shape != (images.shape[0], feature_dim):
        raise ValueError(f"features {tuple(features.shape)} instead of {(images.shape[0], feature_dim)}")
    return features.float()


@contextmanager
def evaluation_mode(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Puts a module in evaluation mode, then restores every submodule's flag; ignores other callables."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


def state_digest(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
