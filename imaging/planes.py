"""The stored values of pictures and rasters, exactly as in the file, whichever library decodes them."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imaging import raster
from imaging.failures import damaged, reading, too_large, unsupported
from imaging.probe import PILLOW, RASTERIO, FileInfo, strict_pillow
from imaging.tiff import as_stored
from utils.errors import InputError
from utils.tiling import Box, Size
from utils.turns import Turn

MAX_PIXELS = 1_000_000_000
"""Larger pictures, which are decoded whole, are refused unless the caller says otherwise: as RGB they take 4 GB."""

TURNS = {
    1: Turn(),
    2: Turn(mirrored=True),
    3: Turn(quarters=2),
    4: Turn(mirrored=True, quarters=2),
    5: Turn(mirrored=True, quarters=1),
    6: Turn(quarters=3),
    7: Turn(mirrored=True, quarters=3),
    8: Turn(quarters=1),
}
"""How stored pixels are turned for display, by EXIF's orientation."""


@dataclass(frozen=True)
class HeldPlanes:
    """Values in memory, (C, H, W); `nodata`, or `masked` (C, H, W) bool, in all bands marks a pixel without data.

    `palette` is (n, 3) uint8 RGB by value where the only band holds indices.
    """

    values: np.ndarray
    palette: np.ndarray | None = None
    nodata: float | None = None
    masked: np.ndarray | None = None

    @property
    def size(self) -> Size:
        return self.values.shape[1], self.values.shape[2]

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def dtype(self) -> str:
        return self.values.dtype.name

    def read(self, box: Box, bands: tuple[int, ...]) -> np.ndarray:
        """Return (len(bands), height, width) of the bands `bands`, counted from 1, within `box`."""
        return self._cut(self.values, box, bands)

    def _cut(self, values: np.ndarray, box: Box, bands: tuple[int, ...]) -> np.ndarray:
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        if bands == tuple(range(1, self.count + 1)):
            return values[:, rows, columns]
        return values[[band - 1 for band in bands], rows, columns]

    def valid(self, box: Box, bands: tuple[int, ...]) -> np.ndarray | None:
        """Return (height, width) bool: where any of `bands` has data, as the file marks it; None where all have."""
        if self.masked is not None:
            return np.asarray(~self._cut(self.masked, box, bands).all(0))
        if self.nodata is None:
            return None
        values = self.read(box, bands)
        nodata = np.float32(self.nodata) if values.dtype == np.float32 else self.nodata
        return (~np.isnan(values) if np.isnan(nodata) else values != nodata).any(0)


class RasterPlanes:
    """The values of a raster file, turned and read in windows; to be closed. For its methods see `HeldPlanes`.

    Two threads may read at once; GDAL's files do not allow that, so they take turns. InputError, naming the file, is
    raised where it cannot be read.
    """

    def __init__(self, info: FileInfo, turn: Turn) -> None:
        self._info, self._turn, self._lock = info, turn, Lock()
        self._file = raster.open_file(info.path)
        with reading(info.path):
            from rasterio.enums import MaskFlags

            flags = self._file.mask_flag_enums
            self._masked = [MaskFlags.all_valid not in own for own in flags]
            self._alpha = [MaskFlags.alpha in own for own in flags]
            self._alpha_band = raster.alpha_band(self._file)
            self.palette = raster.color_table(self._file) if self._file.count == 1 else None
        self.dtype = self._file.dtypes[0]
        self.count: int = self._file.count
        self.size = turn.size((self._file.height, self._file.width))

    def close(self) -> None:
        self._file.close()

    def read(self, box: Box, bands: tuple[int, ...]) -> np.ndarray:
        with self._lock, reading(self._info.path):
            values = self._file.read(bands, window=self._window(box))
        return turned(self._info.top - values if self._info.inverted else values, self._turn)

    def valid(self, box: Box, bands: tuple[int, ...]) -> np.ndarray | None:
        # transparency that is chosen as a colour is data
        hiding = [b for b in bands if self._masked[b - 1] and not (self._alpha[b - 1] and self._alpha_band in bands)]
        if not hiding:
            return None
        with self._lock, reading(self._info.path):
            masks = self._file.read_masks(bands, window=self._window(box))
        return turned((masks > 0).any(0), self._turn)

    def _window(self, box: Box) -> tuple[tuple[int, int], tuple[int, int]]:
        box = self._turn.origin(box, (self._file.height, self._file.width))
        return (box.top, box.top + box.height), (box.left, box.left + box.width)


Planes = HeldPlanes | RasterPlanes
"""Bands of stored values: `count` of them, of `size` (height, width) and numpy type `dtype`."""


def turned(values: np.ndarray, turn: Turn) -> np.ndarray:
    """Return a view of `values` (..., H, W), turned."""
    return np.rot90(values[..., ::-1] if turn.mirrored else values, turn.quarters, (-2, -1))


def palette_colors(palette: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return the colours (3, h, w) uint8 of indices (h, w) of a palette (n, 3); those beyond it are black."""
    table = np.zeros((max(len(palette), int(np.iinfo(indices.dtype).max) + 1), 3), np.uint8)
    table[: len(palette)] = palette
    return table[indices].transpose(2, 0, 1)


def to_tensor(values: np.ndarray) -> Tensor:
    """Return `values` as a tensor, copied where torch could not write to them, or where they are turned."""
    flags = values.flags
    usable = flags.c_contiguous and flags.writeable and min(values.strides, default=0) >= 0
    return torch.from_numpy(values if usable else values.copy())


@contextmanager
def open_planes(info: FileInfo, turn: Turn | None = None, max_pixels: int = MAX_PIXELS) -> Iterator[Planes]:
    """Open the values of a file, turned as it is displayed unless `turn` is given.

    Pictures are decoded whole, up to `max_pixels`; rasters are read in windows. Raises InputError if the file is
    damaged, too large, or needs rasterio, which is not installed.
    """
    turn = TURNS[info.orientation] if turn is None else turn
    if info.decoder != RASTERIO:
        yield _decode(info, turn, max_pixels)
        return
    planes = RasterPlanes(info, turn)
    try:
        _check(info, turn, planes)
        yield planes
    finally:
        planes.close()


def _decode(info: FileInfo, turn: Turn, max_pixels: int) -> HeldPlanes:
    """Decode a whole file by Pillow or OpenCV; see `open_planes`."""
    if info.pixels > max_pixels:
        raise too_large(info.path, info.pixels, max_pixels)
    try:
        with reading(info.path):
            values, palette = _by_pillow(info) if info.decoder == PILLOW else (_by_opencv(info), None)
    except InputError as error:
        if info.decoders[0] != RASTERIO:
            raise
        raise InputError(
            f"{error}, or, where it is intact, install the package rasterio: pip install rasterio", error.kind
        ) from error
    planes = HeldPlanes(turned(values, turn), palette, info.nodata)
    _check(info, turn, planes)
    return planes


def _check(info: FileInfo, turn: Turn, planes: Planes) -> None:
    """Raise InputError where a library decodes another thing than the header says: it is broken, or misunderstood."""
    said = info.bands, turn.size(info.stored), info.dtype, info.palette
    found = planes.count, planes.size, planes.dtype, planes.palette is not None
    if said != found:
        said_text, found_text = (
            f"{bands} bands of {size[0]} x {size[1]} {dtype}{' with a palette' * palette}"
            for bands, size, dtype, palette in (said, found)
        )
        raise unsupported(
            info.path,
            f"by its header it has {said_text}, but {info.decoder} decodes {found_text}",
            "copy it again from its source, or save it anew without extras",
        )


def _by_pillow(info: FileInfo) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the bands and the palette that Pillow decodes."""
    source = io.BytesIO(as_stored(info.path.read_bytes())) if _is_turned_tiff(info) else info.path
    with strict_pillow():
        with Image.open(source) as image:
            # compares checksums where the format has them (PNG), which decoding does not; spends the object
            image.verify()
        with Image.open(source) as image:
            image.load()
    values, palette = picture_values(image)
    if values.dtype != info.dtype:
        values = values.astype(info.dtype)
    if info.top < 255 and image.mode == "L":  # Pillow has spread the values over 8 bits
        values = ((values.astype(np.uint16) * info.top + 127) // 255).astype(np.uint8)
    return values, palette


def _is_turned_tiff(info: FileInfo) -> bool:
    """Return whether libraries might turn what they decode: of other formats, those used here turn none."""
    return info.format == "TIFF" and info.orientation > 1


def picture_values(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the bands (C, H, W) of a Pillow image, as RGB where Pillow alone knows them, and its palette (n, 3)."""
    palette = None
    if image.mode == "La":  # grey times its transparency
        image = image.convert("LA")
    if image.mode == "P":
        palette = np.reshape(image.getpalette("RGB") or [], (-1, 3)).astype(np.uint8)
    elif image.mode not in ("1", "L", "LA", "RGB", "RGBA", "RGBX") and not image.mode.startswith(("I", "F")):
        image = image.convert("RGB")
    values = _bands(image)
    return values.astype(np.uint8) if values.dtype == bool else values, palette


def _bands(image: Image.Image) -> np.ndarray:
    """Return (C, H, W) of an image."""
    if len(image.getbands()) == 1:
        return np.asarray(image)[None]
    values = np.empty((len(image.getbands()), image.height, image.width), np.uint8)
    step = 64  # numpy gets Pillow's pixels by way of copies: of strips they stay small, and in the processor's cache
    for top in range(0, image.height, step):
        rows = image.crop((0, top, image.width, min(top + step, image.height)))
        for k, band in enumerate(image.getbands()):
            # Pillow separates bands faster than numpy does, but of LA it cannot as it writes bytes
            own = rows.getchannel(k).tobytes() if image.mode == "LA" else rows.tobytes("raw", band)
            values[k, top : top + step] = np.frombuffer(own, np.uint8).reshape(-1, image.width)
    return values


def _by_opencv(info: FileInfo) -> np.ndarray:
    """Return the bands that OpenCV decodes, in the file's order."""
    if info.format == "PNG":
        with strict_pillow(), Image.open(info.path) as image:
            image.verify()
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        content = info.path.read_bytes()
        content = as_stored(content) if _is_turned_tiff(info) else content
        found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if found is None:
        raise damaged(info.path, "its pixels cannot be decoded")
    if found.ndim == 2:
        return found[None]
    # blue, green, red and, where there is transparency, alpha
    orders = {2: (0, 3), 3: (2, 1, 0), 4: (2, 1, 0, 3)}
    order = orders.get(info.bands, ()) if found.shape[2] > max(orders.get(info.bands, (99,))) else range(found.shape[2])
    return found.transpose(2, 0, 1)[list(order)]
