"""The READMEs' tables of keys are those of the models."""

from pathlib import Path

import key_table
import pytest

TABLES = key_table.tables()


@pytest.mark.parametrize("path", TABLES, ids=lambda path: str(path.relative_to(key_table.ROOT)))
def test_the_table_of_keys_is_current(path: Path) -> None:
    page = path.read_text()
    assert page == key_table.replaced(page, TABLES[path]), "run: python tests/key_table.py"


@pytest.mark.parametrize("table", TABLES.values(), ids=["experiment", "instance_classifier"])
def test_every_key_has_a_meaning(table: str) -> None:
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 5
    assert [row[0] for row in rows if len(row[-1].strip("| ")) < 8] == []
