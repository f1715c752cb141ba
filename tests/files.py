"""Random files of every kind that people have, with what is stored in them: for tests of reading."""

import struct
import warnings
import zlib
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.label_file import open_label
from imaging.planes import MAX_PIXELS
from utils.classes import Classes
from utils.tiling import Box

SIDES = (5, 60)
WHERE = {"crs": "EPSG:32633", "transform": (0.5, 0, 500000, 0, -0.5, 5000000)}


@dataclass
class Stored:
    """A file, and what it stores: `values` (C, H, W); a palette's colours (n, 3); where there are data (H, W)."""

    path: Path
    values: np.ndarray
    palette: np.ndarray | None = None
    valid: np.ndarray | None = None
    top: int = 255
    orientation: int = 1
    lossy: bool = False
    about: dict[str, object] = field(default_factory=dict)

    def shown(self, values: np.ndarray) -> np.ndarray:
        """`values` (..., H, W), turned as EXIF's standard defines."""
        steps = {"x": lambda a: a[..., ::-1], "y": lambda a: a[..., ::-1, :], "t": lambda a: a.swapaxes(-1, -2)}
        for step in {1: "", 2: "x", 3: "xy", 4: "y", 5: "t", 6: "tx", 7: "txy", 8: "ty"}[self.orientation]:
            values = steps[step](values)
        return values


def read_label(path: Path, classes: Classes, image: object = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a whole label as (H, W) uint8 ids; for the arguments see `open_label`."""
    with open_label(path, classes, image, max_pixels) as label:
        return label.read(Box(0, 0, *label.size)).numpy()


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(*SIDES)), int(rng.integers(*SIDES))


def draw_values(rng: np.random.Generator, dtype: str, bands: int, size: tuple[int, int]) -> np.ndarray:
    """Noise in a band of the type's range, so that percentiles differ from the range."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.normal(200, 90, (bands, *size)).astype(kind)
    low, high = (0, 256) if dtype == "uint8" else (-90, 100) if dtype == "int8" else (0, 3000)
    return rng.integers(low - (400 if dtype in ("int16", "int32", "int64") else 0), high, (bands, *size)).astype(kind)


def write_raster(path: Path, values: np.ndarray, left_out: bool = False, **profile: object) -> Path:
    """A file written by rasterio, without which the test is skipped; with `left_out`, the right half of its tiles."""
    rasterio = pytest.importorskip("rasterio")

    if profile.get("transform") is not None:
        profile["transform"] = rasterio.Affine(*profile["transform"][:6])
    shape = dict(zip(("count", "height", "width"), values.shape, strict=True))
    shape |= {"sparse_ok": True} if left_out else {}
    profile = {"driver": "GTiff", "dtype": values.dtype.name, **shape, **profile}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", **profile) as f:
            if left_out:
                f.write(values[..., :16], window=((0, values.shape[1]), (0, 16)))
            else:
                f.write(values)
    return path


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(values: np.ndarray, depth: int, orientation: int = 1) -> bytes:
    """A PNG of (C, H, W), C one to four, with `depth` bits a sample."""
    bands, height, width = values.shape
    head = struct.pack(">IIBBBBB", width, height, depth, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = values.transpose(1, 2, 0).reshape(height, -1)
    if depth < 8:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., -depth:].reshape(height, -1)
        packed = np.packbits(bits, axis=1)
    else:
        packed = rows.astype(">u2" if depth == 16 else np.uint8).view(np.uint8).reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in packed)
    exif = struct.pack("<2sHIHHHII", b"II", 42, 8, 1, 274, 3, 1, orientation) + bytes(4)
    more = png_chunk(b"eXIf", exif) if orientation > 1 else b""
    data = png_chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + more + data + png_chunk(b"IEND", b"")


def draw_png(rng: np.random.Generator, path: Path) -> Stored:
    depth, bands = [(1, 1), (2, 1), (4, 1), *product((8, 16), (1, 2, 3, 4))][rng.integers(11)]
    top, turn = (1 << depth) - 1, int(rng.integers(1, 9))
    values = rng.integers(0, min(top, 4000) + 1, (bands, *draw_size(rng)))
    path.write_bytes(png(values, depth, turn))
    return Stored(path, values.astype(np.uint16 if depth == 16 else np.uint8), None, None, top, turn)


def draw_picture(rng: np.random.Generator, path: Path) -> Stored:
    """What Pillow writes: JPEG, BMP, WebP, palettes, TIFF with EXIF's turn."""
    kind = ["a.jpg", "a.bmp", "a.webp", "p.png", "p.bmp", "a.tif", "p.tif", "deep.tif"][rng.integers(8)]
    path = path.with_suffix("." + kind.split(".")[1])
    size, turn = draw_size(rng), int(rng.integers(1, 9))
    exif = Image.Exif()
    exif[0x0112] = turn
    if kind == "deep.tif":
        values = rng.integers(0, 3000, size).astype(np.uint16)
        Image.fromarray(values).save(path, tiffinfo={274: turn})
        return Stored(path, values[None], top=65535, orientation=turn)
    if kind[0] == "p":
        values, palette = rng.integers(0, 9, size).astype(np.uint8), rng.integers(0, 256, (9, 3)).astype(np.uint8)
        image = Image.fromarray(values)
        image.putpalette(palette.tobytes())
    else:
        values, palette = rng.integers(0, 256, (*size, 3)).astype(np.uint8), None
        image = Image.fromarray(values)
        values = values.transpose(2, 0, 1)
    options = {"exif": exif} if kind in ("a.webp", "a.jpg", "p.png") else {}
    if kind == "a.webp":
        options["lossless"] = True
    if path.suffix == ".tif":
        options = {"tiffinfo": {274: turn}, "compression": [None, "tiff_lzw", "tiff_deflate"][rng.integers(3)]}
    image.save(path, **options)
    values = values[None] if values.ndim == 2 else values
    return Stored(path, values, palette, None, 255, turn if options else 1, kind == "a.jpg")


def draw_anymap(rng: np.random.Generator, path: Path) -> Stored:
    top, bands = int(rng.choice([1, 15, 255, 1000, 4095, 65535])), int(rng.choice([1, 3]))
    values = rng.integers(0, top + 1, (bands, *draw_size(rng)))
    head = f"P{5 if bands == 1 else 6}\n# made by a test\n{values.shape[2]} {values.shape[1]}\n{top}\n".encode()
    path = path.with_suffix(".ppm")
    path.write_bytes(head + values.transpose(1, 2, 0).astype(">u2" if top > 255 else np.uint8).tobytes())
    return Stored(path, values.astype(np.uint16 if top > 255 else np.uint8), top=top)


TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")


def draw_raster(rng: np.random.Generator, path: Path) -> Stored:
    """What GDAL writes: any type and number of bands, compressed, tiled, with nodata, with tiles left out."""
    dtype, bands, size = str(rng.choice(TYPES)), int(rng.integers(1, 7)), draw_size(rng)
    values = draw_values(rng, dtype, bands, size)
    profile: dict[str, object] = {"interleave": str(rng.choice(["pixel", "band"]))}
    if compress := str(rng.choice(["", "deflate", "lzw", "packbits", "zstd", "lerc"])):
        profile["compress"] = compress
    # GDAL would take the last of two or four bytes for transparency
    profile["photometric"] = "rgb" if bands == 3 and rng.random() < 0.5 else "minisblack"
    if bands in (2, 4):
        profile["alpha"] = "no"
    left_out = size[1] > 16 and rng.random() < 0.3
    if left_out or rng.random() < 0.3:
        profile |= {"tiled": True, "blockxsize": 16, "blockysize": 16}
    if rng.random() < 0.4:
        profile |= WHERE
    nodata = None
    if rng.random() < 0.4:
        nodata = float(values[0, 0, 0])
        profile["nodata"] = nodata
        values[:, : size[0] // 2, : size[1] // 2] = nodata
    if dtype.startswith("float") and compress != "lerc" and rng.random() < 0.3:
        values[0, -1, -1], values[0, -1, -2:-1] = np.nan, np.inf
    write_raster(path.with_suffix(".tif"), values, left_out, **profile)
    if left_out:
        values[..., 16:] = 0 if nodata is None else nodata
    valid = None if nodata is None else (values != np.array(nodata, values.dtype)).any(0)
    top = int(np.iinfo(dtype).max) if dtype.startswith("uint") else 255
    return Stored(path.with_suffix(".tif"), values, None, valid, top, about=profile)


def draw_jp2(rng: np.random.Generator, path: Path) -> Stored:
    dtype, bands = str(rng.choice(["uint8", "uint16"])), int(rng.choice([1, 3]))
    values = draw_values(rng, dtype, bands, draw_size(rng))
    more = {"driver": "JP2OpenJPEG", "quality": "100", "reversible": "YES"} | (WHERE if rng.random() < 0.5 else {})
    write_raster(path.with_suffix(".jp2"), values, **more)
    return Stored(path.with_suffix(".jp2"), values, top=255 if dtype == "uint8" else 65535)


DRAWN = (draw_png, draw_picture, draw_anymap, draw_raster, draw_raster, draw_raster, draw_jp2)


def draw_file(rng: np.random.Generator, folder: Path, k: int) -> Stored:
    return DRAWN[rng.integers(len(DRAWN))](rng, folder / f"file{k}.png")
