"""Files of results, written from top to bottom as rows become final."""

import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from imaging.raster_writer import RasterWriter
from utils.classes import Color
from utils.tiling import Size


class PngWriter:
    """A PNG of class ids or of RGB colours, saved by `close` when all rows are there.

    Only images that are held in memory as a whole have PNGs as results, so the rows are collected.
    """

    def __init__(self, path: Path, size: Size, palette: list[Color] | None = None) -> None:
        """Start without rows; `palette` holds 256 colours of the ids, None for rows of RGB."""
        self._path, self._palette = path, palette
        self._picture = np.zeros((*size, 1 if palette else 3), np.uint8)
        self._top = 0

    def write(self, rows: np.ndarray) -> None:
        """Add the next n rows, (channels, n, W); channels that they lack are 0."""
        count = rows.shape[1]
        self._picture[self._top : self._top + count, :, : len(rows)] = rows.transpose(1, 2, 0)
        self._top += count

    def close(self) -> None:
        if self._top < len(self._picture):
            return
        picture = Image.fromarray(self._picture[..., 0] if self._palette else self._picture)
        if self._palette:
            picture.putpalette([value for color in self._palette for value in color])
        picture.save(self._path, format="PNG")


class NpzWriter:
    """A compressed npz file with one array (H, W, channels), which is never held as a whole."""

    def __init__(self, path: Path, name: str, size: Size, channels: int, dtype: str) -> None:
        """Open the file for an array `name` of (*size, channels)."""
        self._dtype = np.dtype(dtype)
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        self._member = self._archive.open(f"{name}.npy", "w", force_zip64=True)
        description = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (*size, channels)}
        npy.write_array_header_1_0(self._member, description)

    def write(self, rows: np.ndarray) -> None:
        """Add the next n rows, (channels, n, W)."""
        self._member.write(np.ascontiguousarray(rows.transpose(1, 2, 0), self._dtype).tobytes())

    def close(self) -> None:
        self._member.close()
        self._archive.close()


RowWriter = PngWriter | NpzWriter | RasterWriter
"""Writes the rows of one result, in order; its methods raise OSError or InputError if that fails."""
