"""GeoTIFF and other rasters, read in windows through rasterio, which is an optional dependency."""

import logging
import os
import warnings
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np

from imaging.failures import reading
from utils.errors import InputError
from utils.tiling import Box, Size

CACHE_MB = "96"
"""What GDAL may keep of decoded blocks; its own choice is a twentieth of the machine's memory."""


def installed() -> bool:
    """Return whether rasterio can be imported."""
    try:
        import rasterio  # noqa: F401
    except ImportError:
        return False
    return True


def library(path: Path) -> ModuleType:
    """Return rasterio; InputError, saying that `path` needs it, where it is not installed."""
    os.environ.setdefault("GDAL_CACHEMAX", CACHE_MB)
    try:
        import rasterio
    except ImportError as error:
        raise InputError(
            f"{path} needs the package rasterio, which is not installed: pip install rasterio", "needs rasterio"
        ) from error
    # what GDAL complains of is raised as well
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    return rasterio


def open_file(path: Path) -> Any:
    """Open `path` as rasterio's dataset, a context manager; InputError, naming the file, where GDAL cannot."""
    rasterio = library(path)
    with reading(path):
        return rasterio.open(path)


def color_table(file: Any) -> np.ndarray | None:
    """Return (n, 3) uint8 RGB by index of the only band of an open dataset, None where it has no colour table."""
    try:
        colors = file.colormap(1)
    except ValueError:  # it has none
        return None
    table = np.zeros((max(colors, default=0) + 1, 3), np.uint8)
    for index, color in colors.items():
        table[index] = color[:3]
    return table


def alpha_band(file: Any) -> int | None:
    """Return the band of an open dataset that is transparency, counted from 1; None where it has none."""
    from rasterio.enums import ColorInterp

    kinds = file.colorinterp
    return kinds.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in kinds else None


def has_georeference(file: Any) -> bool:
    """Return whether an open dataset says in any way where on the ground it lies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(file.crs or file.gcps[0] or file.rpcs or not file.transform.is_identity)


class RasterPlanes:
    """The stored values of a raster file, in windows; see `imaging.planes.Planes`. To be closed.

    Two threads may read at once; GDAL's files do not allow that, so they take turns.

    `top`: the largest value of unsigned samples. `inverted`: 0 is white, and values are turned about.
    """

    def __init__(self, path: Path, top: int = 255, inverted: bool = False) -> None:
        self.path, self.top, self.inverted = path, top, inverted
        self._file = open_file(path)
        self._turn = Lock()
        with reading(path):
            from rasterio.enums import MaskFlags

            flags = self._file.mask_flag_enums
            self._masked = [MaskFlags.all_valid not in own for own in flags]
            self._alpha = [MaskFlags.alpha in own for own in flags]
            self._alpha_band = alpha_band(self._file)
            self.palette = color_table(self._file) if self._file.count == 1 else None
        self.dtype = self._file.dtypes[0]
        self.count: int = self._file.count

    def close(self) -> None:
        self._file.close()

    @property
    def size(self) -> Size:
        return self._file.height, self._file.width

    def read(self, box: Box, bands: tuple[int, ...]) -> np.ndarray:
        with self._turn, reading(self.path):
            planes = self._file.read(bands, window=_window(box))
        return self.top - planes if self.inverted else planes

    def valid(self, box: Box, bands: tuple[int, ...]) -> np.ndarray | None:
        # transparency that is chosen as a colour is data
        hiding = [b for b in bands if self._masked[b - 1] and not (self._alpha[b - 1] and self._alpha_band in bands)]
        if not hiding:
            return None
        with self._turn, reading(self.path):
            return (self._file.read_masks(bands, window=_window(box)) > 0).any(0)


def _window(box: Box) -> tuple[tuple[int, int], tuple[int, int]]:
    return (box.top, box.top + box.height), (box.left, box.left + box.width)
