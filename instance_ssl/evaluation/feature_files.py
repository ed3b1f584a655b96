"""Writes features of many images to files, a batch at a time in memory; a stopped rank resumes.

Every rank appends the rows of its contiguous part of the images to a file of its own, plain float32; at the end one
rank joins the parts in order of rank, which is the order of the images.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from instance_ssl.evaluation.features import forward_frozen

_DTYPE = np.dtype("<f4")
_CHUNK_BYTES = 2**24


def keep_whole_rows(part: Path, width: int) -> int:
    """Counts the rows of `width` numbers in a part and cuts off one that an interruption left incomplete."""
    if not part.exists():
        return 0
    row = width * _DTYPE.itemsize
    with part.open("r+b") as file:
        rows = part.stat().st_size // row
        file.truncate(rows * row)
    return rows


def append_features(
    part: Path,
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    width: int,
    device: torch.device,
    *,
    on_batch: Callable[[int], None] = lambda count: None,
) -> None:
    """Appends the rows (width,) of each batch's images to `part`, batch by batch.

    Args:
        part: created where it is missing.
        model: images (b, 3, S, S) to rows (b, width).
        batches: (images, ids) whose rows `part` does not hold yet, in order.
        on_batch: called with the number of images of each batch written.
    """
    with part.open("ab") as file:
        for images, _ in batches:
            rows = forward_frozen(model, images, width, device).cpu().numpy()
            file.write(rows.astype(_DTYPE, copy=False).tobytes())
            file.flush()
            on_batch(len(rows))


def join_parts(parts: Sequence[Path], width: int, columns: slice, path: Path) -> None:
    """Concatenates some columns of all parts into a .npy file: (N, columns), float32."""
    rows = sum(part.stat().st_size for part in parts) // (width * _DTYPE.itemsize)
    shape = (rows, len(range(*columns.indices(width))))
    with path.open("wb") as file:
        header = {"descr": _DTYPE.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            step = max(1, _CHUNK_BYTES // (width * _DTYPE.itemsize)) * width
            with part.open("rb") as source:
                while len(values := np.frombuffer(source.read(step * _DTYPE.itemsize), _DTYPE)):
                    file.write(np.ascontiguousarray(values.reshape(-1, width)[:, columns]).tobytes())


def write_parquet(names: Sequence[str], arrays: Mapping[str, Path], path: Path) -> None:
    """Writes a row for each image: `name`, and for each column of `arrays` the row of that .npy file, float32.

    Bytes of a name that are not UTF-8 are escaped.
    """
    import pyarrow
    import pyarrow.parquet

    columns = {name: np.load(file, mmap_mode="r") for name, file in arrays.items()}
    types = [(name, pyarrow.list_(pyarrow.float32(), array.shape[1])) for name, array in columns.items()]
    step = max(1, _CHUNK_BYTES // sum(array.shape[1] * _DTYPE.itemsize for array in columns.values()))
    schema = pyarrow.schema([("name", pyarrow.string()), *types])
    with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for start in range(0, len(names), step):
            chunk = [name.encode("utf-8", "backslashreplace").decode() for name in names[start : start + step]]
            lists = [
                pyarrow.FixedSizeListArray.from_arrays(array[start : start + step].reshape(-1), array.shape[1])
                for array in columns.values()
            ]
            writer.write_table(pyarrow.Table.from_arrays([pyarrow.array(chunk), *lists], schema=schema))
