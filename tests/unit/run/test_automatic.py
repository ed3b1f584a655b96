"""The rules of `auto`: valid for any number of images and ranks, and what people would choose for theirs."""

from itertools import product
from pathlib import Path

import pytest

from instance_ssl.config.deepspeed import read_ds_file
from instance_ssl.config.draft import load_draft
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.run.automatic import CPU, GPU, Device, Facts, choose
from instance_ssl.run.checks import check_size

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "runners/configs/pipeline_folder.yaml"
COUNTS = [2, 3, 4, 5, 7, 20, 63, 500, 3000, 50_000, 1_281_167]


def facts(num_images: int, device: Device = CPU, world_size: int = 1, **others: object) -> Facts:
    known = {
        "short_side": 300,
        "class_size": None,
        "cores": 2,
        "micro_batch_size": None,
        "view_flops": lambda _: 10**9 // 10,
    }
    return Facts(device, num_images, world_size=world_size, **{**known, **others})  # type: ignore[arg-type]


def chosen(overrides: list[str], known: Facts) -> ExperimentConfig:
    draft = load_draft(FOLDER, ["data.kind=folder", *overrides])
    return draft.completed({choice.key: choice.value for choice in choose(draft, known)})


@pytest.mark.parametrize("device", [CPU, GPU], ids=lambda device: device.name)
def test_any_number_of_images_and_ranks_gets_valid_settings(device: Device) -> None:
    ds = read_ds_file(ROOT / "ds_configs/auto.json")
    for num_images, world_size in product(COUNTS, [1, 2, 3, 4, 5, 7, 8, 12, 64]):
        if world_size > num_images:
            continue
        config = chosen([], facts(num_images, device, world_size))
        batch = config.optimization.global_batch_size
        check_size(config, num_images, 1, world_size, ds.path)
        ds.settings(global_batch_size=batch, max_grad_norm=0.0, world_size=world_size)
        assert batch <= max(device.batch, world_size), (num_images, world_size)
        assert num_images // batch >= 4 or batch in (1, world_size), (num_images, world_size)
        assert 1 <= config.classifier.num_hard_classes < num_images
        assert 0 <= config.optimization.warmup_epochs < config.optimization.epochs <= 200


@pytest.mark.parametrize(("num_images", "batch"), [(500, 96), (50_000, 96), (48, 12), (20, 4), (2, 1)])
def test_a_batch_chosen_on_one_rank_goes_with_many_others(num_images: int, batch: int) -> None:
    assert chosen([], facts(num_images)).optimization.global_batch_size == batch


def test_fewer_images_get_more_epochs_within_one_budget_of_views() -> None:
    def epochs(count: int, device: Device = CPU) -> int:
        return chosen([], facts(count, device)).optimization.epochs

    assert [epochs(count) for count in (2, 500, 5000, 50_000, 1_281_167)] == [200, 100, 10, 1, 1]
    assert epochs(50_000, GPU) == 200  # a thousand times the budget
    assert chosen(["augmentation.num_views=1"], facts(5000)).optimization.epochs == 20


def test_a_micro_batch_that_is_given_divides_the_batch() -> None:
    for num_images, micro, ranks in product([500, 5000], [1, 8, 10, 32, 64], [1, 2]):
        batch = chosen([], facts(num_images, world_size=ranks, micro_batch_size=micro)).optimization.global_batch_size
        assert batch % (micro * ranks) == 0


@pytest.mark.parametrize(
    ("side", "device", "expected"), [(8, CPU, 16), (32, CPU, 32), (375, CPU, 64), (100, GPU, 96), (375, GPU, 224)]
)
def test_views_are_no_larger_than_the_images_or_than_the_device_takes(side: int, device: Device, expected: int) -> None:
    assert chosen([], facts(500, device, short_side=side)).data.image_size == expected


@pytest.mark.parametrize(
    ("overrides", "device", "flops", "expected"),
    [
        ([], CPU, 10**8, "auto"),  # small_cnn has one of its own
        ([], GPU, 10**8, "small"),
        (["data.image_size=64"], GPU, 13 * 10**9, "small"),
        (["data.image_size=224"], GPU, 10**8, "imagenet"),
        (["model.backbone=resnet18", "data.image_size=32"], CPU, 3 * 10**9, "small"),
        (["model.backbone=resnet18", "data.image_size=64"], CPU, 13 * 10**9, "imagenet"),
        (["model.backbone=resnet18", "model.stem=small"], CPU, 13 * 10**9, "small"),
    ],
)
def test_the_stem_goes_by_size_and_cost(overrides: list[str], device: Device, flops: int, expected: str) -> None:
    side = 32 if not overrides else 300
    assert chosen(overrides, facts(500, device, short_side=side, view_flops=lambda _: flops)).model.stem == expected


def test_the_largest_k_is_that_of_a_class() -> None:
    for class_size, expected in ((1000, (200, 100, 20, 10, 5)), (25, (20, 10, 5)), (3, (1,))):
        assert chosen([], facts(500, class_size=class_size)).evaluation.knn.neighbours == expected


def test_a_choice_is_printed_with_its_reason() -> None:
    draft = load_draft(FOLDER, ["data.kind=folder"])
    lines = [str(choice) for choice in choose(draft, facts(500))]
    assert all(line.startswith("auto: ") and line.endswith(")") and "\n" not in line for line in lines)
    assert "auto: optimization.global_batch_size = 96 (5 steps an epoch of 500 images; up to 96 on a CPU)" in lines
    assert (
        "auto: optimization.learning_rate = 0.045 (4 times the paper's for a batch of 96, for a short training)"
        in lines
    )
