"""Rows of W from the deterministic view or from a random one, which is none of the training's."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.checkpoint.state import load_rows, newest_checkpoint
from instance_ssl.config.deepspeed import load_ds_config
from instance_ssl.config.experiment import ExperimentConfig
from instance_ssl.data.augmentations import centre_view
from instance_ssl.data.views import ViewDataset
from instance_ssl.distributed.comm import Group
from instance_ssl.run.agreement import share_images
from instance_ssl.run.build import classifier_shard, seeded_encoder, training_view
from instance_ssl.run.images import open_images
from instance_ssl.run.log import RunLog
from instance_ssl.run.stage import Stage
from instance_ssl.run.watchdog import Guard
from instance_ssl.stages import initialize_classifier

View = Literal["evaluation", "training"]
DS = Path(__file__).parents[2] / "ds_configs/cpu_float32.json"
SEED, IMAGES = 5, 128


def initialise(group: Group, directory: Path, view: View) -> tuple[Tensor, Tensor, Tensor]:
    """All rows, the embeddings that they should be, and those of the first training views."""
    config = ExperimentConfig.model_validate(
        {
            "seed": SEED,
            "data": {"kind": "digits", "image_size": 16, "num_workers": 0, "limit_train": IMAGES},
            "augmentation": {"view": "digit"},
            "model": {"backbone": "small_cnn", "embedding_dim": 8},
            # Frozen batch norms: an image's embedding does not depend on the batch it is in.
            "classifier": {"num_hard_classes": 5, "initialization": "frozen", "initialization_view": view},
            "optimization": {"epochs": 1, "warmup_epochs": 0, "global_batch_size": IMAGES},
        }
    )
    ds = load_ds_config(DS, global_batch_size=IMAGES, max_grad_norm=0.0, world_size=group.size)
    opened = open_images(config.data, "train", group, RunLog(is_main=False))
    source = share_images(opened, None, group)
    log = RunLog(is_main=False)
    stage = Stage("initialize_classifier", directory, config, ds, group, log, Guard(group.rank), source)
    initialize_classifier.run(stage)
    checkpoint = newest_checkpoint(stage.checkpoints_of(stage.name), group)
    assert checkpoint is not None
    shard = classifier_shard(stage)
    load_rows(checkpoint, shard)

    random_view, encoder = training_view(config.augmentation, config.data), seeded_encoder(config).eval()

    def embed(dataset: ViewDataset) -> Tensor:
        with torch.no_grad():
            return encoder(torch.stack([dataset[0, index][0][0] for index in range(IMAGES)]))

    if view == "training":
        expected = embed(ViewDataset(source, random_view, 1, SEED + 2**31))
    else:
        expected = embed(ViewDataset(source, centre_view(16), 1, 0))
    return shard.weight, expected, embed(ViewDataset(source, random_view, 1, SEED))


@pytest.mark.parametrize(("view", "world_size"), [("evaluation", 1), ("training", 1), ("training", 2)])
def test_rows_are_embeddings_of_the_view_asked_for(tmp_path: Path, view: View, world_size: int) -> None:
    results = run_ranks(initialise, world_size, tmp_path, view)
    rows = torch.cat([own for own, _, _ in results])
    _, expected, first_training_views = results[0]
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
    assert (rows - first_training_views).abs().max(dim=1).values.min() > 1e-4
