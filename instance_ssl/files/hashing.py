"""SHA-256 of a file while it is written."""

import hashlib
import threading
from typing import BinaryIO

_THREAD_BYTES = 2**20


class HashingFile:
    """The part of a binary file that `torch.save` and `tarfile` write to; it hashes the bytes that pass.

    Attributes:
        digest: of all bytes written.
        size: bytes written.
        error: the first write that failed. torch's own error about it names a line of its C++ code.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest, self.size = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Writes and hashes; large pieces are hashed by a thread in the meantime."""
        hashing = threading.Thread(target=self.digest.update, args=(data,))
        (hashing.start if len(data) >= _THREAD_BYTES else hashing.run)()
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        finally:
            if hashing.is_alive():
                hashing.join()
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Flushes the file."""
        self._file.flush()

    def tell(self) -> int:
        """Bytes written."""
        return self.size
