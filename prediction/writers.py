"""Files of results, written from top to bottom as rows become final, so that no result is held as a whole."""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.lib import format as npy

from utils.classes import Color
from utils.tiling import Size


class RowWriter(Protocol):
    """Takes the rows of one result, in order; `close` finishes the file. Both raise OSError or InputError."""

    def write(self, rows: np.ndarray) -> None:
        """Add `rows` (channels, n, W) below those that are written."""
        ...

    def close(self) -> None: ...


class PngWriter:
    """A PNG of one 8-bit channel, whose values are indices of `palette` (256 colours), or of RGB without one."""

    def __init__(self, path: Path, size: Size, palette: list[Color] | None = None) -> None:
        height, width = size
        self._file = path.open("wb")
        self._file.write(b"\x89PNG\r\n\x1a\n")
        kind = 2 if palette is None else 3
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
        if palette is not None:
            self._chunk(b"PLTE", bytes(value for color in palette for value in color))
        self._packer = zlib.compressobj(6)

    def _chunk(self, name: bytes, content: bytes) -> None:
        self._file.write(struct.pack(">I", len(content)) + name + content)
        self._file.write(struct.pack(">I", zlib.crc32(name + content)))

    def write(self, rows: np.ndarray) -> None:
        channels, count, width = rows.shape
        lines = np.zeros((count, 1 + width * channels), np.uint8)  # the first byte: no filter
        lines[:, 1:] = rows.transpose(1, 2, 0).reshape(count, -1)
        if packed := self._packer.compress(lines.tobytes()):
            self._chunk(b"IDAT", packed)

    def close(self) -> None:
        try:
            self._chunk(b"IDAT", self._packer.flush())
            self._chunk(b"IEND", b"")
        finally:
            self._file.close()


class NpzWriter:
    """A compressed npz file with one array (H, W, channels) of the name `name`."""

    def __init__(self, path: Path, name: str, size: Size, channels: int, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        self._member = self._archive.open(f"{name}.npy", "w", force_zip64=True)
        description = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (*size, channels)}
        npy.write_array_header_1_0(self._member, description)

    def write(self, rows: np.ndarray) -> None:
        self._member.write(np.ascontiguousarray(rows.transpose(1, 2, 0), self._dtype).tobytes())

    def close(self) -> None:
        self._member.close()
        self._archive.close()
