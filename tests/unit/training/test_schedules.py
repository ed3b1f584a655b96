"""The learning rate, and how views become rows."""

import pytest
import torch

from instance_ssl.data.views import ViewBatch
from instance_ssl.training.schedules import warmup_cosine
from instance_ssl.training.step import flatten_views


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    rates = [warmup_cosine(step, peak=0.48, warmup_steps=10, total_steps=100) for step in range(10)]
    assert rates == pytest.approx([0.048 * (step + 1) for step in range(10)])


def test_the_cosine_starts_at_the_peak_and_ends_at_zero() -> None:
    def rate(step: int) -> float:
        return warmup_cosine(step, peak=0.48, warmup_steps=10, total_steps=110)

    assert rate(10) == pytest.approx(0.48)
    assert rate(60) == pytest.approx(0.24)
    assert rate(110) == pytest.approx(0.0, abs=1e-12)
    assert rate(130) == rate(110)
    assert all(rate(step) > rate(step + 1) for step in range(10, 110))


def test_no_warm_up_is_all_cosine() -> None:
    assert warmup_cosine(0, peak=1.0, warmup_steps=0, total_steps=10) == 1.0


def test_every_view_keeps_its_image_s_id() -> None:
    ids = torch.tensor([5, 3])
    views = (ids[:, None] * 10 + torch.arange(3)).float()[:, :, None, None, None].expand(2, 3, 3, 4, 4)
    images, labels = flatten_views(ViewBatch(views, ids), torch.device("cpu"))
    assert images.shape == (6, 3, 4, 4)
    assert (images[:, 0, 0, 0] // 10).tolist() == labels.tolist()
