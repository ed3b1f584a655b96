"""The planner's arithmetic: layouts, limits and the encoder on fake tensors against a real one."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from instance_ssl.classifier.softmax import SoftmaxOptions
from instance_ssl.config.choices import LAYOUTS
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.models.encoder import build_encoder
from instance_ssl.run.build import describe_stem_cost
from instance_ssl.run.planner import Training
from instance_ssl.training import classifier_cost
from instance_ssl.training.classifier_cost import ClassifierSize, classifier_flops, classifier_memory
from instance_ssl.training.memory_plan import EncoderCost, EngineSize, encoder_memory, measure_encoder, plan_layout
from paper_tables import table_1

COST = EncoderCost(1_000_000, 1_000_000, 900_000, 1000, 3_000_000, 3_500_000, 4_000_000, 10**9)
ENGINE = EngineSize(8, 1, None, torch.float32, 0, 5_000_000, 1)
SIZE = ClassifierSize(1_000_000, 128, 8, 1, 64, 1, 100, SoftmaxOptions(0.15, "mixture", torch.float32, 2**20))
TRAINING = Training(COST, ENGINE, SIZE)


def small_encoder() -> nn.Module:
    return build_encoder(
        backbone="small_cnn",
        stem="auto",
        image_size=16,
        projection="mlp",
        projection_hidden_dim=None,
        embedding_dim=32,
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_encoder_is_measured_without_being_allocated(dtype: torch.dtype | None) -> None:
    cost = measure_encoder(small_encoder, image_size=16, num_views=6, autocast_dtype=dtype)
    encoder = small_encoder()
    assert cost.num_parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert cost.num_parameters - cost.num_low_precision == 2 * (32 + 64 + 128)  # of batch norm
    with FlopCounterMode(display=False) as flops:
        encoder(torch.rand(6, 3, 16, 16)).sum().backward()
    assert cost.flops == flops.get_total_flops()
    assert cost.kept < cost.backward_peak
    if dtype is not None:
        assert cost.kept < measure_encoder(small_encoder, image_size=16, num_views=6, autocast_dtype=None).kept


def test_the_optimizers_state_is_planned() -> None:
    sizes = {}
    for name in ("sgd", "lars", "adamw", "muon"):
        cost = measure_encoder(small_encoder, image_size=16, num_views=2, autocast_dtype=None, optimizer=name)
        for ranks, stage in ((1, 0), (4, 1)):
            size = replace(ENGINE, world_size=ranks, zero_stage=stage)
            sizes[name, stage] = encoder_memory(cost, size).optimizer / cost.num_parameters / 4
    assert (sizes["sgd", 0], sizes["lars", 0], sizes["adamw", 0]) == (1, 1, 2)
    hidden = 128 * 128 / cost.num_parameters  # the projection's first matrix, the only one that Muon takes here
    assert sizes["muon", 0] == pytest.approx(2 - hidden)
    # A quarter of it, and of a copy of the weights.
    assert sizes["sgd", 1] == pytest.approx(2 / 4, rel=1e-3)
    assert sizes["adamw", 1] == pytest.approx(3 / 4, rel=1e-3)


def test_activations_grow_with_the_views() -> None:
    few, many = (measure_encoder(small_encoder, image_size=16, num_views=v, autocast_dtype=None) for v in (8, 800))
    assert many.kept == pytest.approx(100 * few.kept, rel=0.02)


def test_recomputed_activations_are_not_counted() -> None:
    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = small_encoder()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.encoder, images, use_reentrant=False)

    plain, recomputing = (
        measure_encoder(build, image_size=16, num_views=64, autocast_dtype=None)
        for build in (small_encoder, Recomputing)
    )
    assert recomputing.kept < plain.kept / 5
    assert recomputing.flops > plain.flops


def test_sharding_divides_what_grows_with_the_classes() -> None:
    sharded, replicated = (TRAINING.plan(layout) for layout in ("sharded", "replicated"))
    for part in ("W", "momentum of W", "hard-class table"):
        assert replicated.resident[part] == 8 * sharded.resident[part]
    assert replicated.flops == sharded.flops
    assert replicated.sent["classifier"]["all_reduce"] > 20 * sharded.sent["classifier"].total()
    assert sharded.flops["classifier"] == classifier_flops(SIZE) == 8 * 512 * 125_000 * 128


def test_dense_layouts_hold_two_copies_of_the_logits() -> None:
    for layout, logits in (("sharded, dense", 2 * 4 * 512 * 125_000), ("replicated, dense", 2 * 4 * 64 * 1_000_000)):
        plan = plan_layout(layout, COST, ENGINE, SIZE)
        assert plan.phases["forward"]["logits"] == logits
        assert plan.resident["gradient of W"] == plan.resident["W"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_class_more_than_the_most_does_not_fit(layout: str) -> None:
    most = TRAINING.most_classes(layout, 1.0)
    assert TRAINING.peak_gib(layout, most) <= 1 < TRAINING.peak_gib(layout, most + 8)


def test_nothing_fits_beside_too_large_an_encoder() -> None:
    assert Training(replace(COST, kept=2**31), ENGINE, SIZE).most_classes("sharded", 1.0) == 0


def test_narrow_rows_halve_w() -> None:
    narrow = classifier_memory(replace(SIZE, row_dtype=torch.bfloat16, momentum_dtype=torch.bfloat16))
    assert 2 * narrow.weight == classifier_memory(SIZE).weight == narrow.weight + narrow.momentum


def test_a_workspace_is_counted_where_onednn_makes_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(SIZE.options, matmul_dtype=torch.bfloat16)
    size = replace(SIZE, options=options, device=torch.device("cpu"), num_hard_classes=0)
    plans = []
    for available in (True, False):
        monkeypatch.setattr(classifier_cost, "onednn_multiplies_bfloat16", lambda available=available: available)
        plans.append(classifier_memory(size))
    with_onednn, without = plans
    features = size.gathered_rows * size.embedding_dim * 4
    assert with_onednn.first_pass - without.first_pass == features
    assert with_onednn.update - without.update == features
    assert with_onednn.resident == without.resident


def test_table_1_has_the_papers_figures_beside_the_planners() -> None:
    rows = {row[0].strip(): row[1:] for row in table_1(TRAINING, 32)}
    assert rows["GiB a rank"] == list(LAYOUTS)
    assert rows["most classes in 32 GiB"][0] == f"{TRAINING.most_classes('sharded', 32) / 1e6:.1f} M"
    assert "21.51" in [cell for row in table_1(TRAINING, 32) for cell in row]


def test_the_stem_chosen_for_small_images_says_what_it_costs() -> None:
    def said(**settings: Any) -> str | None:
        values = {
            "model": {"backbone": "resnet18", **settings.pop("model", {})},
            "data": {"image_size": 64, **settings},
        }
        return describe_stem_cost(ExperimentConfig.model_validate(values))

    found = re.match(r"the 3x3 stem takes ([\d.]+) times the FLOPs and ([\d.]+) times the activation", str(said()))
    assert found is not None
    assert (float(found[1]), float(found[2])) == (pytest.approx(15.3, abs=0.5), pytest.approx(10.3, abs=1))
    assert "model.stem=imagenet" in str(said())
    assert said(image_size=65) is None
    assert said(model={"stem": "small"}) is None
    assert said(model={"backbone": "small_cnn"}) is None
