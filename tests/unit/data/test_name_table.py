"""Names of millions of images: few bytes each, any bytes in them, and one copy a machine."""

import multiprocessing
import os
import pickle
import random
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from instance_ssl.data.columns import Columns
from instance_ssl.data.name_table import NameTable, pack_names, packed

ODD_NAMES = ["a/ü.jpg", "new\nline.png", "\udcff\udc80.jpg", "", "日本/語.webp", "a" * 300]


def test_a_table_gives_the_names_that_went_in() -> None:
    table = packed(iter(ODD_NAMES))
    assert table == ODD_NAMES
    assert list(table) == ODD_NAMES
    assert [table[i] for i in range(-6, 6)] == ODD_NAMES * 2
    assert table[1:5:2] == ODD_NAMES[1:5:2]
    assert "new\nline.png" in table
    assert table != ODD_NAMES[:-1]
    assert table != [*ODD_NAMES[:-1], "b"]
    for index in (6, -7):
        with pytest.raises(IndexError):
            table[index]
    assert list(packed([])) == []


def test_iteration_crosses_the_chunks_it_reads() -> None:
    table = packed(str(i) for i in range(150_000))
    assert list(table) == [str(i) for i in range(150_000)]


def test_in_memory_a_table_pickles_with_its_names_and_in_a_file_without() -> None:
    columns = Columns({**pack_names(str(i) for i in range(10_000)), "sizes": np.arange(10_000), "none": np.zeros(0)})
    table = NameTable(columns)
    copy = pickle.loads(pickle.dumps(table))
    assert copy == table
    columns.move_to_file()
    sent = pickle.dumps(table)
    assert len(sent) < 1000
    copy = pickle.loads(sent)
    assert copy == table == [str(i) for i in range(10_000)]
    with pytest.raises(ValueError, match="read-only"):
        copy._columns["sizes"][0] = 1
    assert columns["none"].shape == (0,)
    assert "none" in copy._columns
    assert "other" not in copy._columns


def test_a_place_that_is_another_file_by_now_is_not_taken() -> None:
    columns, other = Columns(pack_names(["a"])), Columns(pack_names(["b"]))
    columns.move_to_file()
    copy = pickle.loads(pickle.dumps(columns))
    # The same path, as on another machine, or after the process has ended.
    other.move_to_file()
    assert columns._file is not None
    assert other._file is not None
    os.dup2(other._file.fileno(), columns._file.fileno())
    assert not copy.attach()
    with pytest.raises(OSError, match="gone"):
        copy["names"]


def synthetic(count: int) -> Columns:
    """Paths such as train/n01440764/n01440764_00000017.JPEG, 40 bytes each, made without Python strings."""
    text = np.frombuffer(b"train/n01440764/n01440764_00000000.JPEG!", np.uint8)
    names = np.tile(text, (count, 1))
    for digit in range(8):
        names[:, 33 - digit] = ord("0") + np.arange(count) // 10**digit % 10
    ends = np.arange(count + 1, dtype=np.int64) * len(text)
    return Columns({"names": names.reshape(-1), "name_ends": ends, "sizes": np.arange(count)})


def read_some(table: NameTable, answer: Connection) -> None:
    draw = random.Random(0)
    for _ in range(20_000):
        index = draw.randrange(len(table))
        assert table[index] == f"train/n01440764/n01440764_{index:08d}.JPEG!"
    # Pages of a file are the machine's; those of no file are the process's own, or still shared with its parent.
    rollup = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    answer.send(int(rollup["Anonymous"].split()[0]) * 1024)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_own_memory_of_a_worker_does_not_grow_with_the_names(method: str) -> None:
    own = []
    for count in (1_000_000, 10_000_000) if method == "fork" else (10_000, 1_000_000):
        columns = synthetic(count)
        in_memory = sum(columns[name].nbytes for name in ("names", "name_ends", "sizes"))
        assert in_memory / count < 100
        columns.move_to_file()
        assert columns.place is not None
        assert columns.place.size / count < 100
        context = multiprocessing.get_context(method)
        answer, there = context.Pipe(duplex=False)
        worker = context.Process(target=read_some, args=(NameTable(columns), there))
        worker.start()
        there.close()
        own.append(answer.recv())
        worker.join()
        assert worker.exitcode == 0
    # 20,000 names are read all over the table: each copied page would be 4 KiB, 80 MB in all.
    assert own[1] - own[0] < 4 << 20
