"""Pearson and Spearman by their definitions, ties included."""

import pytest
from scipy import stats

from instance_ssl.evaluation.accuracy_correlation import correlations


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1.0, 2.0, 4.0, 8.0, 16.0], [3.0, 1.0, 4.0, 1.0, 5.0]),
        ([0.1, 0.1, 0.5, 0.7], [30.0, 31.0, 31.0, 31.0]),
        ([1.0, 2.0], [5.0, 4.0]),
    ],
)
def test_as_scipy_has_them(x: list[float], y: list[float]) -> None:
    found = correlations(x, y)
    assert found["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_what_does_not_vary_has_none() -> None:
    assert correlations([1.0, 2.0, 3.0], [7.0, 7.0, 7.0]) == {"pearson": None, "spearman": None}


def test_one_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="correlation of 1"):
        correlations([1.0], [2.0])
