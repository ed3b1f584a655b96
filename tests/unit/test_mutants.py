"""Every mutant of tests/mutants.yaml still changes one place of the code, and its tests are there."""

from collections.abc import Iterator

import pytest
from mutation import mutants
from processes import ROOT


def cases() -> Iterator[tuple[str, str, str, list[str]]]:
    yield from mutants()


@pytest.mark.parametrize(("file", "old", "new", "tests"), cases())
def test_a_mutant_has_one_place_and_tests(file: str, old: str, new: str, tests: list[str]) -> None:
    assert (ROOT / "instance_ssl" / file).read_text().count(old) == 1
    assert old != new
    paths = [word for word in tests if word.startswith("tests/")]
    assert paths
    assert all((ROOT / path.split("::")[0]).exists() for path in paths)
