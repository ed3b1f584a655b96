"""Principal components are those of a singular value decomposition, and a plane always has two coordinates."""

import pytest
import torch

from instance_ssl.evaluation.embedding_map import plane, principal_components


@pytest.mark.parametrize(("rows", "width"), [(40, 7), (6, 50)])
def test_components_are_those_of_the_svd(rows: int, width: int) -> None:
    features = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) + 0.3
    found = principal_components(features, 3)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    left, values, _ = torch.linalg.svd(unit - unit.mean(dim=0), full_matrices=False)
    expected = (left * values)[:, :3].float()
    torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-5, rtol=1e-4)
    assert bool((found.gather(0, found.abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_few_or_narrow_points_have_a_plane_too() -> None:
    points, method = plane(principal_components(torch.randn(5, 1), 50))
    assert points.shape == (5, 2)
    assert method == "PCA"


def test_groups_stay_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = 10 * torch.eye(8)[:2]
    features = centres[torch.arange(60) % 2] + torch.randn(60, 8, generator=generator)
    points, method = plane(principal_components(features, 5))
    assert method.startswith("t-SNE")
    first, second = points[::2], points[1::2]
    within = max(torch.cdist(group, group.mean(dim=0, keepdim=True)).mean() for group in (first, second))
    assert torch.linalg.vector_norm(first.mean(dim=0) - second.mean(dim=0)) > within
