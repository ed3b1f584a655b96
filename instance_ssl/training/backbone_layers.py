"""Which layer of its backbone a parameter belongs to, read off the structure of any backbone.

Layers are numbered as in BEiT (arXiv:2106.08254, `LayerDecayValueAssigner`): 0 is what comes before the blocks (stem,
patch and position embeddings), 1 … L are the blocks, and L + 1 is what follows them.
"""

from collections import defaultdict
from collections.abc import Sequence

from torch import nn


def layer_numbers(backbone: nn.Module) -> tuple[dict[str, int], int]:
    """Parameter name → its layer, 0 … L + 1, and the number of blocks L.

    The blocks are the children of the outermost `Sequential` or `ModuleList` that holds most of the parameters. Where
    several with children of one kind lie side by side, as a ResNet's layer1 … layer4, each is a block. A backbone
    without such lists has its children as blocks. Modules are taken in the order of their registration, which in
    torchvision and timm is that of the forward pass; norms belong to the block before them.
    """
    lists = _outermost_lists(backbone)
    around: Sequence[nn.Module] = lists or [_without_wrappers(backbone)]
    blocks = lists if len(lists) > 1 else _weighted(around[0])
    starts = {id(next(block.parameters())) for block in blocks}
    inside = {id(parameter) for module in around for parameter in module.parameters()}
    named = list(backbone.named_parameters())
    last = max((place for place, (_, parameter) in enumerate(named) if id(parameter) in inside), default=-1)
    layers, begun = {}, 0
    for place, (name, parameter) in enumerate(named):
        begun += id(parameter) in starts
        layers[name] = begun if place <= last else len(starts) + 1
    return layers, len(starts)


def _outermost_lists(backbone: nn.Module) -> list[nn.Module]:
    """The lists of blocks nearest to the root that hold most of the parameters; empty where there are none."""
    level, half = [backbone], _size(backbone) / 2
    while level:
        of_kind: dict[type[nn.Module], list[nn.Module]] = defaultdict(list)
        for module in level:
            if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(children := _weighted(module)) > 1:
                of_kind[type(children[0])].append(module)
        lists = max(of_kind.values(), key=lambda modules: sum(map(_size, modules)), default=[])
        if sum(map(_size, lists)) > half:
            return lists
        level = [child for module in level for child in module.children()]
    return []


def _without_wrappers(module: nn.Module) -> nn.Module:
    while len(children := _weighted(module)) == 1 and _weighted(children[0]):
        module = children[0]
    return module


def _weighted(module: nn.Module) -> list[nn.Module]:
    """Children with a parameter of two or more dimensions: not norms."""
    return [child for child in module.children() if any(parameter.ndim > 1 for parameter in child.parameters())]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
