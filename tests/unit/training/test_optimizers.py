"""The encoder's optimizers against their papers' formulas and torch's own; who gets which rate, decay and optimizer."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from instance_ssl.config.choices import OptimizerName
from instance_ssl.models.encoder import Encoder, build_encoder
from instance_ssl.training.backbone_layers import layer_numbers
from instance_ssl.training.optimizers import (
    Lars,
    OptimizerOptions,
    build_optimizer,
    fresh_state,
    learning_rate_scales,
    parameter_groups,
    state_size,
    state_slots,
)


class Blocks(nn.Module):
    """A backbone of three blocks behind a stem, with a norm at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 1, 6))
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(3)))
        self.norm = nn.LayerNorm(6)


def make_encoder() -> Encoder:
    torch.manual_seed(0)
    backbone: Any = Blocks()
    return Encoder(backbone, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))


def set_gradients(encoder: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    for parameter in encoder.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def take_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    optimizer.step()


def groups_by_name(encoder: nn.Module, options: OptimizerOptions) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    return {names[id(p)]: group for group in parameter_groups(encoder, options) for p in group["params"]}


def test_plain_sgd_is_one_group_in_the_encoders_order() -> None:
    encoder = make_encoder()
    (group,) = parameter_groups(encoder, OptimizerOptions())
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in encoder.parameters()]
    assert (group["lr_scale"], group["weight_decay"]) == (1.0, 1e-4)


@pytest.mark.parametrize("name", ["adamw", "lars", "muon"])
def test_norms_and_biases_have_no_weight_decay(name: OptimizerName) -> None:
    encoder = make_encoder()
    for parameter, group in groups_by_name(encoder, OptimizerOptions(name, weight_decay=0.3)).items():
        is_norm = ".norm." in parameter or (".blocks." in parameter and parameter.split(".")[-2] == "0")
        assert group["weight_decay"] == (0.0 if is_norm or parameter.endswith("bias") else 0.3), parameter


def test_lars_follows_the_formula_of_its_paper() -> None:
    """In float64, written as in You et al., algorithm 1, with SimCLR's exclusions."""
    encoder, momentum, decay = make_encoder().double(), 0.9, 0.1
    encoder.projection[2].weight.data.zero_()  # without a norm, λ is 1
    weights = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    velocities = {name: torch.zeros_like(value) for name, value in weights.items()}
    optimizer = build_optimizer(encoder, OptimizerOptions("lars", momentum, decay, backbone_multiplier=0.5))
    for step, rate in enumerate([0.3, 0.7, 0.2]):
        for name, gradient in set_gradients(encoder, step).items():
            weight, own_rate = weights[name], rate * (0.5 if name.startswith("backbone.") else 1.0)
            local = torch.ones((), dtype=torch.float64)
            if weight.ndim > 1:
                gradient = gradient + decay * weight
                if weight.norm() > 0:
                    local = 0.001 * weight.norm() / gradient.norm()
            velocities[name] = momentum * velocities[name] + own_rate * local * gradient
            weights[name] = weight - velocities[name]
        take_step(optimizer, rate)
    assert isinstance(optimizer, Lars)
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            optimizer.state[parameter]["momentum_buffer"], velocities[name], rtol=1e-6, atol=1e-9
        )


def test_muon_is_torchs_muon_of_hidden_matrices_and_adamw_of_the_rest() -> None:
    encoder = make_encoder()
    twin = copy.deepcopy(encoder)
    by_name = dict(twin.named_parameters())
    hidden = ["backbone.stem.weight", *(f"backbone.blocks.{i}.1.weight" for i in range(3)), "projection.0.weight"]
    decayed = [by_name.pop(name) for name in ("backbone.position", "projection.2.weight")]
    muon = torch.optim.Muon(
        [by_name.pop(name) for name in hidden], lr=1.0, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    rest = [{"params": decayed, "weight_decay": 0.1}, {"params": list(by_name.values()), "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.999))
    optimizer = build_optimizer(encoder, OptimizerOptions("muon", weight_decay=0.1))
    for step, rate in enumerate([1e-2, 2e-2, 3e-2]):
        set_gradients(encoder, step)
        set_gradients(twin, step)
        for each in (optimizer, muon, adamw):
            take_step(each, rate)
    for parameter, expected in zip(encoder.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
    slots = state_slots(encoder, "muon")
    assert [name for name in slots if slots[name] == ("momentum_buffer",)] == hidden
    kept = {id(p): optimizer.state[p] for p in encoder.parameters()}  # of both optimizers inside
    assert all(kept[id(p)].keys() == fresh_state(p, slots[name]).keys() for name, p in encoder.named_parameters())


def test_muon_takes_the_matrices_of_attention_but_no_embedding_or_convolution() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.patches = nn.Embedding(5, 8), nn.Conv2d(3, 8, 2)
            self.attention = nn.MultiheadAttention(8, 2)

    backbone: Any = Attending()
    slots = state_slots(Encoder(backbone, nn.Linear(8, 4)), "muon")
    hidden = [name for name in slots if slots[name] == ("momentum_buffer",)]
    assert hidden == ["backbone.attention.in_proj_weight", "backbone.attention.out_proj.weight"]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "muon"])
def test_the_first_step_from_a_fresh_state_is_the_one_without_state(name: OptimizerName) -> None:
    encoder = make_encoder()
    twin = copy.deepcopy(encoder)
    optimizer, other = (build_optimizer(each, OptimizerOptions(name)) for each in (encoder, twin))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = fresh_state(parameter, group["slots"])
    sizes = [value.numel() for state in optimizer.state.values() for slot, value in state.items() if slot != "step"]
    assert state_size(encoder, name) == sum(sizes)
    for each, own in ((encoder, optimizer), (twin, other)):
        set_gradients(each, 0)
        take_step(own, 0.1)
    assert optimizer.state.keys() == set(encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), twin.parameters(), strict=True))
    states = zip(encoder.parameters(), twin.parameters(), strict=True)
    for mine, theirs in ((optimizer.state[p], other.state[q]) for p, q in states):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[slot], theirs[slot]) for slot in mine)


def test_what_is_frozen_is_in_no_group() -> None:
    encoder = make_encoder()
    encoder.freeze_backbone()
    names = groups_by_name(encoder, OptimizerOptions("adamw", layer_decay=0.5)).keys()
    assert names == {"projection.0.weight", "projection.0.bias", "projection.2.weight", "projection.2.bias"}
    encoder.train()
    assert not any(module.training for module in encoder.backbone.modules())
    assert encoder.projection.training
    encoder.eval()
    assert not encoder.projection.training


def test_layer_decay_counts_back_from_the_projection() -> None:
    scales = learning_rate_scales(make_encoder(), OptimizerOptions(layer_decay=0.5, backbone_multiplier=0.1))
    expected = {
        "backbone.position": 0.1 / 16,
        "backbone.stem.weight": 0.1 / 16,
        "backbone.blocks.0.0.weight": 0.1 / 8,
        "backbone.blocks.1.1.bias": 0.1 / 4,
        "backbone.blocks.2.1.weight": 0.1 / 2,
        "backbone.norm.weight": 0.1,
        "projection.0.weight": 1.0,
    }
    assert {name: scales[name] for name in expected} == pytest.approx(expected)


def without_head(network: nn.Module, name: str) -> nn.Module:
    setattr(network, name, nn.Identity())
    return network


@pytest.mark.parametrize(
    ("name", "head", "blocks", "first", "last"),
    [
        ("resnet50", "fc", 4, "layer1.0.conv1.weight", "layer4.2.bn3.bias"),
        ("vit_b_16", "heads", 12, "encoder.layers.encoder_layer_0.ln_1.weight", None),
        ("mobilenet_v3_small", "classifier", 13, "features.0.0.weight", "features.12.1.bias"),
        ("swin_t", "head", 8, "features.0.0.weight", "features.7.1.mlp.3.bias"),
        ("vgg11_bn", "classifier", 8, "features.0.weight", "features.26.bias"),
        ("maxvit_t", "classifier", 4, "blocks.0.layers.0.layers.MBconv.proj.1.weight", None),
        ("shufflenet_v2_x0_5", "fc", 5, "conv1.0.weight", "conv5.1.bias"),
    ],
)  # fmt: skip
def test_blocks_are_found_in_torchvisions_networks(
    name: str, head: str, blocks: int, first: str, last: str | None
) -> None:
    with torch.device("meta"):
        network = without_head(getattr(torchvision.models, name)(), head)
    layers, found = layer_numbers(network)
    assert (found, layers[first], layers.get(str(last), blocks)) == (blocks, 1, blocks)
    assert list(layers) == [parameter for parameter, _ in network.named_parameters()]
    assert list(layers.values()) == sorted(layers.values())
    if name == "vit_b_16":
        before = {parameter for parameter, layer in layers.items() if layer == 0}
        assert before == {"class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding"}
        assert {parameter for parameter, layer in layers.items() if layer == 13} == {
            "encoder.ln.weight",
            "encoder.ln.bias",
        }


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "mixer_s32_224"])
def test_layer_decay_is_timms(name: str) -> None:
    """Of a network with a head, whose place the projection has. The last norm is timm's last block's; BEiT's head's."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        network, backbone = timm.create_model(name, num_classes=3), timm.create_model(name, num_classes=0)
    names = {id(parameter): parameter_name for parameter_name, parameter in network.named_parameters()}
    timms = {
        names[id(parameter)]: group["lr_scale"]
        for group in param_groups_layer_decay(network, layer_decay=0.75)
        for parameter in group["params"]
    }
    assert timms["head.weight"] == 1.0
    scales = learning_rate_scales(Encoder(backbone, nn.Linear(8, 4)), OptimizerOptions(layer_decay=0.75))
    for parameter, _ in backbone.named_parameters():
        is_last_norm = parameter.startswith(("norm.", "fc_norm."))
        assert scales[f"backbone.{parameter}"] == pytest.approx(1.0 if is_last_norm else timms[parameter]), parameter


@pytest.mark.parametrize(("backbone", "blocks"), [("resnet18", 4), ("small_cnn", 3)])
def test_our_own_backbones_have_blocks(backbone: str, blocks: int) -> None:
    settings: Any = {"backbone": backbone, "projection": "mlp"}
    encoder = build_encoder(**settings, stem="auto", image_size=32, projection_hidden_dim=None, embedding_dim=8)
    layers, found = layer_numbers(encoder.backbone)
    assert found == blocks
    assert max(layers.values()) == blocks  # a norm at the end belongs to the last block
