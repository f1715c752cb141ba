"""GeoTIFF and other rasters, read and written in windows through rasterio, which is an optional dependency."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.stretch import Stretch
from utils.classes import Color
from utils.errors import InputError
from utils.tiling import Box, Size

CACHE_MB = "96"
"""What GDAL may keep of decoded blocks; its own choice is a twentieth of the machine's memory."""

SAMPLE_SIDE = 1024
"""Percentiles are those of at most so many rows and columns, spread evenly."""

BLOCK = 256
"""Side in pixels of the tiles that are written; rows are collected until a row of tiles is full."""


def _rasterio(path: Path) -> ModuleType:
    os.environ.setdefault("GDAL_CACHEMAX", CACHE_MB)
    try:
        import rasterio
    except ImportError as error:
        raise InputError(
            f"{path} needs the package rasterio, which is not installed: pip install rasterio", "needs rasterio"
        ) from error
    return rasterio


@contextmanager
def _naming(path: Path, does: str) -> Iterator[None]:
    """Turn what rasterio raises into an InputError that names `path`."""
    from rasterio.errors import RasterioError

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Dataset has no geotransform")
            yield
    except (RasterioError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        if does == "written":
            raise InputError(f"{path} cannot be written: {reason}") from error
        raise InputError(f"{path} cannot be read: {reason}; copy it again from its source", "unreadable") from error


@dataclass(frozen=True)
class Georeference:
    """Where on the ground a raster lies; of rasterio's types, None where the file has none."""

    keywords: Mapping[str, Any] = field(default_factory=dict)
    """What rasterio takes to write it: `crs` with `transform` or `gcps`."""
    square_metres: float | None = None
    """Of a pixel, in a projected reference."""


class Raster:
    """A raster file as a source; a context that closes it.

    `bands`: which three, counted from 1, are red, green and blue; by default the first three, or the only one, whose
    colour table, if any, is applied. What is not 8-bit is stretched. Pixels without data are read as 0.
    Methods raise InputError, naming the file, where it cannot be read.
    """

    def __init__(self, path: Path, bands: tuple[int, ...] | None, stretch: Stretch) -> None:
        rasterio = _rasterio(path)
        self.path, self.stretch = path, stretch
        with _naming(path, "read"):
            self._file = rasterio.open(path)
        count = self._file.count
        self.bands = bands or ((1, 2, 3) if count > 2 else (1, 1, 1))
        if max(self.bands) > count:
            self.close()
            raise InputError(f"--bands {','.join(map(str, self.bands))}: {path} has {count}", "no such band")
        self._colors = None if bands else self._color_table()
        self._masked = any(rasterio.enums.MaskFlags.all_valid not in flags for flags in self._file.mask_flag_enums)
        self._limits = None if all(kind == "uint8" for kind in self._file.dtypes) else self._sample_limits()

    @staticmethod
    def can_open(path: Path) -> bool:
        """Whether rasterio is there and knows the file `path`."""
        try:
            Raster(path, None, Stretch()).close()
        except InputError:
            return False
        return True

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Raster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> Size:
        return self._file.height, self._file.width

    @property
    def nodata(self) -> bool:
        """Whether the file says of pixels that they have no data."""
        return self._masked

    def _color_table(self) -> np.ndarray | None:
        if self._file.count > 1:
            return None
        try:
            colors = self._file.colormap(1)
        except ValueError:  # it has none
            return None
        table = np.zeros((256, 3), np.uint8)
        for index, color in colors.items():
            table[index] = color[:3]
        return table

    def _sample_limits(self) -> list[tuple[float, float]]:
        shape = tuple(min(side, SAMPLE_SIDE) for side in self.size)
        with _naming(self.path, "read"):
            planes = self._file.read(self.bands, out_shape=(len(self.bands), *shape)) if self.stretch.per_cent else None
            valid = self._file.dataset_mask(out_shape=shape) > 0 if self._masked and self.stretch.per_cent else None
        return self.stretch.limits(np.empty((3, 0, 0)) if planes is None else planes, valid)

    def read(self, box: Box) -> Tensor:
        """(3, height, width) uint8 RGB of `box`."""
        window = (box.top, box.top + box.height), (box.left, box.left + box.width)
        with _naming(self.path, "read"):
            if len(set(self.bands)) == 1:
                planes = self._file.read(self.bands[:1], window=window)
            else:
                planes = self._file.read(self.bands, window=window)
        if self._limits is not None:
            planes = self.stretch.apply(planes, self._limits[: len(planes)])
        if self._colors is not None:
            planes = self._colors[planes[0]].transpose(2, 0, 1)
        if self._masked:
            planes = planes * self.valid(box)
        return torch.from_numpy(planes).expand(3, -1, -1)

    def valid(self, box: Box) -> np.ndarray:
        """(height, width) bool: where `box` has data in any band."""
        window = (box.top, box.top + box.height), (box.left, box.left + box.width)
        with _naming(self.path, "read"):
            return self._file.dataset_mask(window=window) > 0

    @property
    def georeference(self) -> Georeference:
        file = self._file
        points, points_crs = file.gcps
        if points:
            return Georeference({"gcps": points, "crs": points_crs})
        if file.crs is None and file.transform.is_identity:
            return Georeference()
        square_metres = None
        if file.crs is not None and file.crs.is_projected:
            square_metres = abs(file.transform.determinant) * file.crs.linear_units_factor[1] ** 2
        return Georeference({"crs": file.crs, "transform": file.transform}, square_metres)


class RasterWriter:
    """A GeoTIFF, tiled and compressed, written from top to bottom; to be closed.

    `count` bands of `dtype`: uint8, or float16, which readers see as float32.
    """

    def __init__(
        self, path: Path, size: Size, dtype: str, count: int, georeference: Georeference, nodata: float | None = None
    ) -> None:
        rasterio = _rasterio(path)
        # GDAL before 3.11 knows half floats as float32 of 16 bits only
        kind = {"dtype": "float32", "nbits": 16} if dtype == "float16" else {"dtype": dtype}
        self.path = path
        with _naming(path, "written"):
            self._file = rasterio.open(
                path,
                "w",
                driver="GTiff",
                height=size[0],
                width=size[1],
                count=count,
                nodata=nodata,
                tiled=True,
                blockxsize=BLOCK,
                blockysize=BLOCK,
                compress="deflate",
                bigtiff="if_safer",
                **kind,
                **georeference.keywords,
            )
        self._pending: list[np.ndarray] = []
        self._top = 0

    def colors(self, palette: Mapping[int, Color]) -> None:
        """Give the only band a colour table, so that viewers show colours while readers get ids."""
        self._file.write_colormap(1, palette)

    def describe(self, names: tuple[str, ...]) -> None:
        """Name the bands."""
        self._file.descriptions = names

    def write(self, rows: np.ndarray) -> None:
        """Add `rows` (count, n, W) below those that are written."""
        self._pending.append(rows)
        ready = sum(part.shape[1] for part in self._pending) // BLOCK * BLOCK
        if ready:
            self._flush(ready)

    def _flush(self, ready: int) -> None:
        rows = np.concatenate(self._pending, axis=1)
        self._pending = [rows[:, ready:].copy()]
        window = (self._top, self._top + ready), (0, rows.shape[2])
        with _naming(self.path, "written"):
            self._file.write(rows[:, :ready].astype(self._file.dtypes[0], copy=False), window=window)
        self._top += ready

    def close(self) -> None:
        """Write what is pending and finish the file."""
        if rest := sum(part.shape[1] for part in self._pending):
            self._flush(rest)
        with _naming(self.path, "written"):
            self._file.close()
