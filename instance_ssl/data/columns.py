"""Arrays with an entry an image, held once a machine: all its processes map one file.

14.2 million names are a gigabyte. The process that opens a data set puts its arrays into an unnamed file below the
system's temporary folder (`TMPDIR`); whoever gets a pickled copy maps that file through /proc. It is gone with the last
process that uses it, however that one ends.
"""

import mmap
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np

_TOKEN_BYTES = 16
_ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """A file of arrays.

    Attributes:
        path: through which another process of this machine opens it.
        token: the file's first bytes, for on another machine the same path may lead elsewhere.
        size: in bytes.
        layout: dtype, shape and offset of each array.
    """

    path: str
    token: bytes
    size: int
    layout: dict[str, tuple[str, tuple[int, ...], int]]


class Columns:
    """Named arrays, in memory at first, in a file after `move_to_file`.

    Pickled, it takes the arrays along while they are in memory, and only the file's place afterwards; the copy maps the
    file when it is first used (or told to `attach`), read-only.

    Args:
        arrays: of any shapes, without objects in them.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays: dict[str, np.ndarray] = dict(arrays)
        self._place: Place | None = None
        self._file: IO[bytes] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._arrays and not self.attach():
            raise OSError(f"the table of images of another process is gone ({self._place})")
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in (self._arrays if self._place is None else self._place.layout)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays if self._place is None else self._place.layout)

    @property
    def place(self) -> Place | None:
        """Where other processes of this machine find the file; None while the arrays are in memory."""
        if self._place is None or self._file is None:
            return self._place
        return replace(self._place, path=f"/proc/{os.getpid()}/fd/{self._file.fileno()}")

    def move_to_file(self) -> None:
        """Puts the arrays into a file and maps it; the memory they took is free then.

        Raises:
            OSError: the temporary folder has no room, say.
        """
        token, layout, offset = secrets.token_bytes(_TOKEN_BYTES), {}, _ALIGNMENT
        for name, array in self._arrays.items():
            layout[name] = (array.dtype.str, array.shape, offset)
            offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the map lives as long as this does)
        file.write(token.ljust(_ALIGNMENT, b"\0"))
        for name, array in self._arrays.items():
            file.seek(layout[name][2])
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.truncate(offset)
        file.flush()
        self._place = Place("", token, offset, layout)
        self._map(file)

    def attach(self, place: Place | None = None) -> bool:
        """Maps the file, if it is not mapped yet; whether that is possible here.

        Args:
            place: of another copy of the same arrays; None is where this one was told to look.
        """
        self._place = place or self._place
        if self._file is not None or self._place is None:
            return True
        try:
            file = open(self._place.path, "rb")  # noqa: SIM115 (others open it through /proc)
            if file.read(_TOKEN_BYTES) != self._place.token:
                file.close()
                return False
            self._map(file)
        except (OSError, ValueError):
            return False
        return True

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """The file's bytes, `size` at a time, to be sent to another machine."""
        assert self._file is not None
        assert self._place is not None
        for offset in range(0, self._place.size, size):
            yield np.frombuffer(os.pread(self._file.fileno(), size, offset), np.uint8)

    def receive(self, chunks: Iterator[np.ndarray]) -> None:
        """Takes the bytes that `chunks` gave elsewhere into a file of this machine.

        Raises:
            OSError: it has no room for them.
        """
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the map lives as long as this does)
        for chunk in chunks:
            file.write(chunk.data)
        file.flush()
        self._map(file)

    def _map(self, file: IO[bytes]) -> None:
        assert self._place is not None
        content = mmap.mmap(file.fileno(), self._place.size, access=mmap.ACCESS_READ)
        self._file = file
        self._arrays = {
            name: np.frombuffer(content, dtype, count=int(np.prod(shape)), offset=offset).reshape(shape)
            for name, (dtype, shape, offset) in self._place.layout.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {"_arrays": self._arrays if self._place is None else {}, "_place": self.place, "_file": None}
