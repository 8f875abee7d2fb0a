"""Open files for reading, and unpack those with the suffix of a compression."""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

BUFFER_BYTES = 2**20  # A long line is assembled from buffers; small ones fragment the heap.
# A block of at most 128 KiB takes at least 4 bytes, so the unpacked size of one read is bounded.
PACKED_BYTES = 2**14
COMPRESSIONS = (".gz", ".zst")


def suffix_of(name: str) -> tuple[str, str]:
    """Return the suffix of a file's kind and that of its compression, or ""; both in lower case."""
    path = Path(name.lower())
    packed = path.suffix if path.suffix in COMPRESSIONS else ""
    return (Path(path.stem) if packed else path).suffix, packed


@contextmanager
def opened(path: Path, seekable: bool) -> Iterator[io.BufferedReader[Any]]:
    """Open the unpacked content of a file; a temporary file has it if it was packed and must be seekable."""
    packed = suffix_of(path.name)[1]
    with io.BufferedReader(path.open("rb", buffering=0), BUFFER_BYTES) as file:
        if not packed:
            yield file
            return
        raw: Any = gzip.GzipFile(fileobj=file) if packed == ".gz" else _ZstandardReader(file)
        with io.BufferedReader(raw, BUFFER_BYTES) as content:
            if not seekable:
                yield content
                return
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(content, unpacked, 2**20)
                unpacked.seek(0)
                yield unpacked  # type: ignore[misc]


class _ZstandardReader(io.RawIOBase):
    """The content of one or more Zstandard frames.

    The library's own reader accepts a truncated file as complete: 2 % of the lines were lost without an error.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # for files of `zstd --long=31`
        self._frame: Any = None
        self._packed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes and return their number; 0 at the end.

        Raises:
            EOFError: the file ends within a frame.
        """
        while not self._content:
            self._packed = self._packed or self._file.read(PACKED_BYTES)
            if not self._packed:
                if self._frame:
                    raise EOFError("it ends within a Zstandard frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._content = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size
