"""Names of millions of images: few bytes each, any bytes in them, and one copy a machine."""

import multiprocessing
import random
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

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


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    columns = pack_names(["a", "bc"])
    text, ends = columns["names"], columns["name_ends"]
    assert NameTable.checked(text, ends) == ["a", "bc"]
    for wrong in (ends[:-1], ends[1:], ends[:0], ends[[0, 2, 1, 2]], ends.astype(np.int32)):
        with pytest.raises(ValueError, match="not a table"):
            NameTable.checked(text, wrong)


def synthetic(count: int) -> dict[str, np.ndarray]:
    """Paths such as train/n01440764/n01440764_00000017.JPEG, 40 bytes each, made without Python strings."""
    text = np.frombuffer(b"train/n01440764/n01440764_00000000.JPEG!", np.uint8)
    names = np.tile(text, (count, 1))
    for digit in range(8):
        names[:, 33 - digit] = ord("0") + np.arange(count) // 10**digit % 10
    ends = np.arange(count + 1, dtype=np.int64) * len(text)
    return {"names": names.reshape(-1), "name_ends": ends, "sizes": np.arange(count)}


def write(columns: dict[str, np.ndarray], folder: Path) -> None:
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column)


def mapped(folder: Path) -> NameTable:
    return NameTable({path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in folder.glob("*.npy")})


def read_some(opened: NameTable | Path, answer: Connection) -> None:
    table = mapped(opened) if isinstance(opened, Path) else opened
    draw = random.Random(0)
    for _ in range(20_000):
        index = draw.randrange(len(table))
        assert table[index] == f"train/n01440764/n01440764_{index:08d}.JPEG!"
    # Pages of a file are the machine's; those of no file are the process's own, or still shared with its parent.
    rollup = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    answer.send(int(rollup["Anonymous"].split()[0]) * 1024)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_own_memory_of_a_process_does_not_grow_with_the_names(method: str, tmp_path: Path) -> None:
    """Of a loader process, which inherits the map of files that are removed by then, and of a rank that maps them."""
    own = []
    for count in (1_000_000, 10_000_000) if method == "fork" else (10_000, 1_000_000):
        write(synthetic(count), tmp_path)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) / count < 57
        opened: NameTable | Path = tmp_path
        if method == "fork":
            opened = mapped(tmp_path)
            for path in tmp_path.iterdir():
                path.unlink()
        context = multiprocessing.get_context(method)
        answer, there = context.Pipe(duplex=False)
        worker = context.Process(target=read_some, args=(opened, there))
        worker.start()
        there.close()
        own.append(answer.recv())
        worker.join()
        assert worker.exitcode == 0
    # 20,000 names are read all over the table: each copied page would be 4 KiB, 80 MB in all.
    assert own[1] - own[0] < 4 << 20
