"""Rows of many images in files: parts in order, interruptions cut off, tables that say the same."""

from pathlib import Path

import numpy as np
import pytest
import torch

from instance_ssl.evaluation import feature_files
from instance_ssl.evaluation.feature_files import append_features, join_parts, keep_whole_rows, write_parquet

WIDTH = 5
ROWS = np.arange(11 * WIDTH, dtype=np.float32).reshape(11, WIDTH)


def write_parts(tmp_path: Path, *counts: int) -> list[Path]:
    paths, first = [], 0
    for number, count in enumerate(counts):
        paths.append(tmp_path / f"part_{number}")
        paths[-1].write_bytes(ROWS[first : first + count].tobytes())
        first += count
    return paths


@pytest.mark.parametrize("chunk_bytes", [1, 2**24])
def test_parts_of_any_size_are_joined_in_order(
    chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_files, "_CHUNK_BYTES", chunk_bytes)
    parts = write_parts(tmp_path, 4, 0, 6, 1)
    join_parts(parts, WIDTH, slice(0, 3), tmp_path / "a.npy")
    join_parts(parts, WIDTH, slice(3, 5), tmp_path / "b.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), ROWS[:, :3])
    assert np.array_equal(np.load(tmp_path / "b.npy"), ROWS[:, 3:])


def test_an_interrupted_part_goes_on_after_its_last_whole_row(tmp_path: Path) -> None:
    part = tmp_path / "part"
    assert keep_whole_rows(part, WIDTH) == 0
    part.write_bytes(ROWS[:7].tobytes()[:-3])
    assert keep_whole_rows(part, WIDTH) == 6
    images = torch.from_numpy(ROWS.copy())
    counts: list[int] = []
    batches = [(images[6:9], torch.arange(3)), (images[9:], torch.arange(2))]
    append_features(part, lambda rows: rows, batches, WIDTH, torch.device("cpu"), on_batch=counts.append)
    assert part.read_bytes() == ROWS.tobytes()
    assert counts == [3, 2]


def test_the_table_says_what_the_arrays_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(feature_files, "_CHUNK_BYTES", 64)  # three rows at a time
    arrays = {"features": tmp_path / "features.npy", "embeddings": tmp_path / "embeddings.npy"}
    np.save(arrays["features"], ROWS[:, :3])
    np.save(arrays["embeddings"], ROWS[:, 3:])
    names = [f"folder/{number}.png" for number in range(10)] + ["not \udcff UTF-8.png"]
    write_parquet(names, arrays, tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.column_names == ["name", "features", "embeddings"]
    assert table["name"].to_pylist() == [*names[:10], "not \\udcff UTF-8.png"]
    assert np.array_equal(np.array(table["features"].to_pylist(), dtype=np.float32), ROWS[:, :3])
    assert np.array_equal(np.array(table["embeddings"].to_pylist(), dtype=np.float32), ROWS[:, 3:])
