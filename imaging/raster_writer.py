"""GeoTIFFs written row by row through rasterio, which is an optional dependency."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from imaging import raster
from imaging.failures import not_written, writing
from imaging.georeference import Georeference, same_place
from utils.classes import Color
from utils.tiling import Size

BLOCK = 256
"""Side in pixels of the tiles that are written; rows are collected until a row of tiles is full."""


class RasterWriter:
    """A GeoTIFF, tiled and compressed, written from top to bottom; to be closed.

    `count` bands of `dtype`: uint8, or float16, which readers see as float32. When it is closed, it is read back: GDAL
    raises nothing where what it holds in memory cannot be written any more.
    """

    def __init__(
        self, path: Path, size: Size, dtype: str, count: int, georeference: Georeference, nodata: float | None = None
    ) -> None:
        rasterio = raster.library(path)
        # GDAL before 3.11 knows half floats as float32 of 16 bits only
        kind = {"dtype": "float32", "nbits": 16} if dtype == "float16" else {"dtype": dtype}
        if count == 2:
            kind["alpha"] = "no"  # GDAL would take the second of two bands for transparency
        self.path, self._size, self._georeference = path, size, georeference
        self._written: dict[tuple[tuple[int, int], tuple[int, int]], int] = {}  # checksums by rows and columns
        with writing(path):
            keywords = {**georeference.keywords}
            rpcs = keywords.pop("rpcs", None)
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
                **keywords,
            )
            if rpcs is not None:
                self._file.rpcs = rpcs
        self._pending: list[np.ndarray] = []
        self._top = 0

    def colors(self, palette: Mapping[int, Color]) -> None:
        """Give the only band a colour table, so that viewers show colours while readers get ids."""
        with writing(self.path):
            self._file.write_colormap(1, palette)

    def describe(self, names: tuple[str, ...]) -> None:
        """Name the bands."""
        with writing(self.path):
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
        values = np.ascontiguousarray(rows[:, :ready], self._file.dtypes[0])
        with writing(self.path):
            self._file.write(values, window=window)
        self._written[window] = zlib.crc32(values.data)
        self._top += ready

    def close(self) -> None:
        """Write what is pending, finish the file, and read it back if all rows are there."""
        if rest := sum(part.shape[1] for part in self._pending):
            self._flush(rest)
        with writing(self.path):
            self._file.close()
        if self._top == self._size[0]:
            self._read_back(self.path)

    def _read_back(self, path: Path) -> None:
        """Raise InputError if `path` does not hold what was written, or lies elsewhere."""
        rasterio = raster.library(path)
        try:
            with rasterio.open(path) as file:
                wrong = any(zlib.crc32(file.read(window=at)) != found for at, found in self._written.items())
                place = same_place(self._georeference, file, self._size)
                levels = len(file.overviews(1))
            for level in range(levels):
                with rasterio.open(path, overview_level=level) as file:
                    for _, window in file.block_windows(1):
                        file.read(window=window)
        except rasterio.errors.RasterioError:
            wrong = True
        if wrong:
            raise not_written(path, "what was written cannot be read back")
        if not place:
            raise not_written(
                path,
                "its format, or the installation of PROJ (see PROJ_LIB, PROJ_DATA), does not keep the reference system "
                "of the image",
                "reference system",
            )


class CogWriter(RasterWriter):
    """A cloud-optimised GeoTIFF with overviews; to be closed.

    GDAL makes it of a complete file, so the rows are gathered in a plain GeoTIFF beside. An overview's pixel is the
    most frequent id of those that it stands for; of several bands, which are colours, one of the pixels; or what GDAL's
    `resampling` makes of them.
    """

    def __init__(
        self,
        path: Path,
        size: Size,
        dtype: str,
        count: int,
        georeference: Georeference,
        nodata: float | None = None,
        resampling: str = "",
    ) -> None:
        self._final = path
        self._resampling = resampling or ("mode" if count == 1 else "nearest")
        super().__init__(path.with_name(f"{path.name}.tif"), size, dtype, count, georeference, nodata)

    def close(self) -> None:
        """Finish the file, if all rows are there."""
        try:
            super().close()
            if self._top == self._size[0]:
                self._copy()
                self._read_back(self._final)
        finally:
            self.path.unlink(missing_ok=True)

    def _copy(self) -> None:
        import rasterio.shutil

        with writing(self._final):
            rasterio.shutil.copy(
                self.path,
                self._final,
                driver="COG",
                compress="deflate",
                bigtiff="if_safer",
                overview_resampling=self._resampling,
            )
