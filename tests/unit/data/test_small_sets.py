"""A set too small for the settings: the settings that the message names pass, as they are written there."""

import json
import re
from pathlib import Path

import pytest

from instance_ssl.config.deepspeed import DeepSpeedSettings, load_ds_config
from instance_ssl.config.experiment import ExperimentConfig, load_config
from instance_ssl.errors import UserError
from instance_ssl.run.checks import check_size

ROOT = Path(__file__).parents[3]


def check(overrides: list[str], path: Path, num_images: int, ranks: int) -> tuple[ExperimentConfig, DeepSpeedSettings]:
    """What a run checks of sizes, in its order."""
    config = load_config(ROOT / "runners/configs/pipeline_digits.yaml", overrides)
    batch = config.optimization.global_batch_size
    ds = load_ds_config(path, global_batch_size=batch, max_grad_norm=0, world_size=ranks)
    check_size(config, num_images, ds.micro_batch_size, ranks, path)
    return config, ds


def follow(message: str, path: Path, directory: Path) -> tuple[list[str], Path]:
    """Does what the message says: appends to --set, and changes a copy of the JSON."""
    found = re.search(r"--set ((?:\S+=\S+ ?)+)", message)
    overrides = found[1].split() if found else []
    micro_batch = re.search(r'("train_micro_batch_size_per_gpu": \d+) in a copy of (\S+), given as', message)
    if micro_batch is None:
        return overrides, path
    assert Path(micro_batch[2]) == path
    copy = directory / f"{len(list(directory.iterdir()))}.json"
    copy.write_text(json.dumps({**json.loads(path.read_text()), **json.loads(f"{{{micro_batch[1]}}}")}))
    return overrides, copy


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("num_images", [2, 5, 20, 63, 65, 129, 1300])
@pytest.mark.parametrize("given", [[], ["optimization.global_batch_size={n}"], ["classifier.num_hard_classes=5000"]])
def test_one_message_a_file_leads_to_settings_that_pass(
    tmp_path: Path, num_images: int, ranks: int, given: list[str]
) -> None:
    overrides = [each.format(n=num_images) for each in given]
    path, messages = ROOT / "ds_configs/cpu_float32.json", []
    for _ in range(3):  # of the batch and the ranks, then of the images: never the same twice
        try:
            config, ds = check(overrides, path, num_images, ranks)
            break
        except UserError as error:
            messages.append(str(error))
            further, path = follow(messages[-1], path, tmp_path)
            overrides += further
    else:
        pytest.fail("\n".join(messages))
    batch = config.optimization.global_batch_size
    assert ranks <= batch <= num_images
    assert 1 <= config.classifier.num_hard_classes < num_images
    assert ds.micro_batch_size * ds.accumulation_steps * ranks == batch


def test_what_passes_is_left_as_it_is() -> None:
    path = ROOT / "ds_configs/cpu_float32.json"
    with pytest.raises(UserError) as caught:
        check(["classifier.num_hard_classes=200"], path, 200, 1)
    assert str(caught.value).endswith("this fits: --set classifier.num_hard_classes=20")
    with pytest.raises(UserError) as caught:
        check(["optimization.global_batch_size=4096"], path, 1000, 2)
    assert str(caught.value).endswith("this fits: --set optimization.global_batch_size=384")


@pytest.mark.parametrize(("num_images", "ranks"), [(1, 1), (1, 2)])
def test_fewer_images_than_ranks_or_two_is_said(num_images: int, ranks: int) -> None:
    with pytest.raises(UserError, match=f"{num_images} images cannot be divided over {ranks} ranks"):
        check([], ROOT / "ds_configs/cpu_float32.json", num_images, ranks)
