"""Networks of torchvision, timm and the user's own code as backbones, without their classifiers."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torchvision
from torch import Tensor, nn

from instance_ssl.errors import UserError, escape, in_one_line, shorten
from instance_ssl.models.activation_checkpointing import recompute_blocks

_T = TypeVar("_T")
_PROBE_IMAGES = 2
# A convolution whose kernel is its stride, and at least this wide, cuts an image into a ViT's patches.
_LEAST_PATCH = 8
# A ViT for small images sees so many patches a side, as at 128 px with 16 px patches.
_PATCHES_A_SIDE = 8
# Arguments of networks that are made for one size of image.
_SIZES = {"img_size", "image_size", "input_size"}


class LibraryBackbone(nn.Module):
    """Images (b, 3, S, S) → features (b, F) by a network that someone else wrote; maps (b, F, h, w) are averaged.

    Args:
        built: the network, without a classifier, and how it was built.
        name: as in the configuration, for errors.
        image_size: S.
        recompute_stages: compute the activations inside the network's blocks again in the backward pass.

    Raises:
        UserError: the network cannot take such images, or returns something else.
    """

    def __init__(self, built: "Built", name: str, image_size: int, *, recompute_stages: bool = False) -> None:
        super().__init__()
        self.name = name
        self.network, self.arguments, self.has_halved_stride = built
        self.feature_dim = self._probe(image_size)
        if recompute_stages and recompute_blocks(self.network) == 0:
            raise UserError(
                f"activation_checkpointing: model.backbone {escape(name)} has no Sequential or ModuleList of blocks to "
                "recompute; remove the section from the DeepSpeed JSON"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Features (b, F) of images (b, 3, S, S)."""
        return self._pooled(self.network(images))

    def _probe(self, image_size: int) -> int:
        """F, found by running the network on blank images, which changes neither it nor the random numbers."""
        was_training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad():
                features = self(torch.zeros(_PROBE_IMAGES, 3, image_size, image_size))
        except UserError:
            raise
        except Exception as error:  # whatever a network of any origin raises
            raise UserError(
                f"model.backbone {escape(self.name)} cannot take images of 3 x {image_size} x {image_size} pixels "
                f"({in_one_line(error)}); set data.image_size or model.backbone_options to what it needs"
            ) from None
        finally:
            self.network.train(was_training)
        return features.shape[1]

    def _pooled(self, output: Any) -> Tensor:
        if isinstance(output, Tensor) and output.is_floating_point():
            if output.dim() == 4:
                output = output.mean(dim=(2, 3))
            if output.dim() == 2 and output.shape[1] > 0:
                return output
        shape = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"model.backbone {escape(self.name)} returns {escape(shape)}: a backbone returns features (b, F), or a map "
            "(b, F, h, w), which is averaged"
        )


class Built(NamedTuple):
    """A network without a classifier, the arguments of its constructor, and whether its first stride was halved."""

    network: nn.Module
    arguments: dict[str, Any]
    has_halved_stride: bool = False


def build_library_network(name: str, options: Mapping[str, Any], image_size: int, *, small_stem: bool) -> Built:
    """The network of `torchvision/NAME`, `timm/NAME` or `package.module:function`, randomly initialised.

    Args:
        options: arguments of its constructor.
        image_size: S, given to networks that are made for one size.
        small_stem: adapt a library's network to small images: a ViT of timm gets 8 x 8 patches in all, a network for
            any size half the stride in its first convolution, which changes neither names nor shapes of its weights.
            Others, and those with a `patch_size` in the options, stay as they are.

    Raises:
        UserError: there is no such network, or it refuses the options.
    """
    library, _, network_name = name.partition("/")
    if ":" in name:
        return _own_network(name, options)
    build = {"torchvision": _torchvision_network, "timm": _timm_network}[library]
    built = build(network_name, options, image_size)
    stem = next((module for module in built.network.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is None or not small_stem or "patch_size" in options:
        return built
    if stem.kernel_size == stem.stride and stem.stride[0] >= _LEAST_PATCH:
        if library == "timm":
            patch_size = max(1, image_size // _PATCHES_A_SIDE)
            return build(network_name, {**options, "patch_size": patch_size}, image_size)
    elif max(stem.stride) > 1 and not _SIZES & built.arguments.keys():
        stem.stride = tuple(max(1, stride // 2) for stride in stem.stride)
        return built._replace(has_halved_stride=True)
    return built


def pretrained_state(
    library: str, name: str, options: Mapping[str, Any], image_size: int, network: nn.Module
) -> dict[str, Tensor]:
    """The library's own weights of one of its networks, classifier included where it has them apart.

    They are downloaded at the first use. timm's come resampled to the network's image size and patches.

    Args:
        library: torchvision or timm.
        network: what they are for.

    Raises:
        UserError: there are none, or they are not here and there is no network.
    """
    if library == "torchvision":
        weights = torchvision.models.get_model_weights(name).DEFAULT
        place = f"{weights.url}, put into {torch.hub.get_dir()}/checkpoints"
        fetch: Callable[[], Mapping[str, Tensor]] = partial(weights.get_state_dict, progress=False, check_hash=True)
    else:
        import timm

        known = timm.get_pretrained_cfg(name, allow_unregistered=True)
        if known is None or not (known.hf_hub_id or known.url):
            tags = timm.list_pretrained(f"{name.partition('.')[0]}*")[:3]
            raise UserError(f"model.initial_weights timm: timm has no weights of {escape(name)}; it has {tags}")
        place = f"https://huggingface.co/{known.hf_hub_id}" if known.hf_hub_id else str(known.url)
        patch_size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        changed = {} if patch_size is None else {"patch_size": patch_size[0]}

        def fetch() -> Mapping[str, Tensor]:
            return _timm_network(name, {**changed, **options}, image_size, pretrained=True).network.state_dict()

    try:
        return dict(fetch())
    except Exception as error:  # of a network, a cache or a file
        why = in_one_line(error.__cause__ or error)
        raise UserError(
            f"model.initial_weights {library}: {escape(name)}'s cannot be loaded ({shorten(why)}); without a network, "
            f"give the file itself as model.initial_weights ({place})"
        ) from None


def _torchvision_network(name: str, options: Mapping[str, Any], image_size: int) -> Built:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(f"model.backbone: torchvision has no network {escape(name)}{_nearest(name, names)}")
    sizes = {"vit": "image_size", "maxvit": "input_size"}  # of the families that are made for one size of image
    given: dict[str, Any] = {}
    if (key := sizes.get(name.partition("_")[0])) is not None:
        given[key] = image_size if key == "image_size" else (image_size, image_size)
    if name in ("googlenet", "inception_v3"):
        given |= {"aux_logits": False, "init_weights": True}  # training returns no further logits
    given |= options
    network = _constructed(
        lambda: torchvision.models.get_model(name, weights=None, **given), f"torchvision/{name}", options
    )
    parent_path, _, last = classifier_of(network, f"torchvision/{name}").rpartition(".")
    parent = network.get_submodule(parent_path)
    setattr(parent, last, nn.Identity())
    if isinstance(parent, nn.Sequential):
        for place, module in enumerate(parent):
            if isinstance(module, nn.Dropout):
                parent[place] = nn.Identity()
    return Built(network, given)


def classifier_of(network: nn.Module, name: str) -> str:
    """The path of the classifier in a network of torchvision: its last linear layer."""
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"model.backbone {name} has no linear classifier to remove: take another network")
    return linear[-1]


def _timm_network(name: str, options: Mapping[str, Any], image_size: int, *, pretrained: bool = False) -> Built:
    try:
        import timm
    except ImportError:
        raise UserError(f'model.backbone timm/{escape(name)} needs timm: pip install -e ".[timm]"') from None
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = _nearest(architecture, timm.list_models())
        raise UserError(f"model.backbone: timm has no network {escape(name)}{near}")
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    create = partial(timm.create_model, name if pretrained else architecture, num_classes=0, pretrained=pretrained)
    sized = {"img_size": image_size} if known is not None and known.fixed_input_size else {}

    def build() -> Built:
        try:
            arguments = {**sized, **options}
            return Built(create(**arguments), arguments)
        except TypeError as error:
            if "img_size" not in str(error) or "img_size" in options or not sized:
                raise
        return Built(create(**options), dict(options))

    return build() if pretrained else _constructed(build, f"timm/{name}", options)


def _own_network(name: str, options: Mapping[str, Any]) -> Built:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a runner's own folder is there, the one it is started in is not
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # of the user's own code
        raise UserError(f"model.backbone {escape(name)}: {escape(module_name)}: {in_one_line(error)}") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        near = _nearest(attribute, [known for known in vars(module) if not known.startswith("_")])
        raise UserError(f"model.backbone {escape(name)}: {escape(module_name)} has no function {attribute}{near}")
    network = _constructed(lambda: function(**options), name, options)
    if not isinstance(network, nn.Module):
        raise UserError(
            f"model.backbone {escape(name)} returns {type(network).__name__}: it has to return a torch.nn.Module"
        )
    return Built(network, dict(options))


def _constructed(build: Callable[[], _T], name: str, options: Mapping[str, Any]) -> _T:
    try:
        return build()
    except Exception as error:  # whatever a constructor of any origin raises
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
        raise UserError(
            f"model.backbone {escape(name)} cannot be built with model.backbone_options {escape(given)}: "
            f"{in_one_line(error)}"
        ) from None


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; the nearest: {', '.join(near)}" if near else ""
