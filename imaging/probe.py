"""What a picture or raster file is, from its header alone, and which library reads its pixels rightly.

What decides is the file's own bit depth, sample format and tags: libraries show 16-bit colours as 8 bits, signed bytes
as unsigned ones and left-out tiles as bytes of the file's start, and say nothing of it.
"""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from imaging import raster
from imaging.failures import damaged, reading, unsupported
from imaging.sources import MEMORY_PIXELS
from imaging.tiff import TiffTags, read_tags
from utils.errors import InputError
from utils.tiling import Size

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
"""Of most images, in lower case."""

RARE_SUFFIXES = (
    *(".jp2", ".j2k", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".img", ".vrt", ".nc", ".h5", ".hdf5", ".grb", ".grb2", ".grib", ".ntf"),
)
"""Of the others that `docs/formats.md` names."""

PILLOW, OPENCV, RASTERIO = "pillow", "opencv", "rasterio"
"""The decoders."""

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JP2_MAGIC = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PICTURE_MAGIC = (b"\x89PNG", b"\xff\xd8", b"BM", b"GIF8", b"RIFF")
_GEO_BOXES = (b"\xb1\x4b\xf8\xbd\x08\x3d\x4b\x43\xa5\xae\x8c\xd7\xd5\xa6\xce\x03", b"gml.data")
"""Of JPEG 2000: GeoJP2's UUID, and the label of GML."""

_JP2_HEAD = 1 << 20
"""In how many bytes from its start a JPEG 2000 must have its image header."""

_PICTURE_HEAD = 4096
"""Bytes that the headers of PNG and of portable any-maps are read from."""

_MARKED_BESIDE = "pixels without data, marked beside it"

_COMPRESSIONS = (1, 5, 7, 8, 32773, 32946)
"""None, LZW, JPEG, deflate, PackBits: what Pillow, OpenCV and GDAL have all been built with."""

_PILLOW_COMPRESSIONS = (*_COMPRESSIONS, 2, 3, 4, 6, 34925, 50000, 50001)
"""Those of faxes, LZMA, Zstandard and WebP, too, as far as Pillow has been built with them."""

_BANDS = {"1": 1, "L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "RGBX": 4}
"""Of Pillow's modes as they are decoded; what is not here is converted to RGB."""

_DEEP_MODES = {"I;16": "uint16", "I;16L": "uint16", "I;16B": "uint16", "I": "int32", "F": "float32"}


@dataclass(frozen=True)
class FileInfo:
    """A picture or raster file.

    `stored` is (height, width) as in the file, `orientation` (EXIF's, 1..8) how it is turned for display. `dtype` is
    numpy's name of the samples, `top` the largest value that unsigned ones can have. `inverted`: 0 is white.
    `palette`: the only band holds indices. `alpha`: the last band is transparency. `nodata` is the value of pixels
    without data, where the header says so and other libraries than GDAL can obey it. `georeference` is where the file
    has one: "tags", "boxes", "beside" it, or "". `decoders` read it rightly, the best first; `why` says what needs
    rasterio, if that is all.
    """

    path: Path
    format: str
    stored: Size
    bands: int
    dtype: str
    decoders: tuple[str, ...]
    top: int = 255
    orientation: int = 1
    inverted: bool = False
    palette: bool = False
    alpha: bool = False
    nodata: float | None = None
    georeference: str = ""
    why: str = ""

    @property
    def size(self) -> Size:
        """(height, width) as displayed."""
        return (self.stored[1], self.stored[0]) if self.orientation > 4 else self.stored

    @property
    def pixels(self) -> int:
        return self.stored[0] * self.stored[1]

    @property
    def decoder(self) -> str:
        """The best decoder that is installed; InputError where that is none."""
        for decoder in self.decoders:
            if decoder != RASTERIO or raster.installed():
                return decoder
        raise InputError(
            f"{self.path} ({self.why}) needs the package rasterio, which is not installed: pip install rasterio",
            "needs rasterio",
        )

    @property
    def needs_stretch(self) -> bool:
        """Whether values become 0..255 by a stretch: those of colours and of 8 bits or fewer do not."""
        return self.dtype != "uint8" and not self.palette


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Let truncated files fail, whatever other code has set, and drop Pillow's limit of 0.18e9 pixels: ours holds."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def probe(path: str | Path) -> FileInfo:
    """Read the header of `path`; InputError, naming the file, where it is none or of a kind that nothing here reads."""
    path = Path(path)
    with reading(path), path.open("rb") as file:
        magic = file.read(12)
        file.seek(0)
        if magic[:4] in _TIFF_MAGIC:
            return _probe_tiff(path, read_tags(file))
        beside, needs_raster = sidecars(path)
        found = _probe_jp2(path, file) if magic.startswith(_JP2_MAGIC) else _probe_picture(path, file)
        if found is None:
            return _probe_raster(path)
        found = replace(found, georeference=found.georeference or beside)
        return replace(found, decoders=(RASTERIO,), why=_MARKED_BESIDE) if needs_raster else found


def _probe_tiff(path: Path, tags: TiffTags) -> FileInfo:
    if tags.kind == "complex":
        raise unsupported(path, "its samples are complex numbers", "save their magnitude as float32 instead")
    if tags.dtype == "mixed":
        raise unsupported(path, "its bands have samples of different types", "save all as one type, such as float32")
    if tags.pages:
        raise _several(path)
    if tags.end > path.stat().st_size:
        raise damaged(path, f"the file ends before byte {tags.end}, where its pixels do")
    beside, needs_raster = sidecars(path)
    nodata, why = None, _MARKED_BESIDE if needs_raster else ""
    if tags.nodata:
        try:
            nodata = float(tags.nodata)
        except ValueError:
            why = why or f"pixels without data, marked by {tags.nodata!r}"
    georeference = "tags" if tags.georeferenced else beside
    if tags.sparse:
        why = why or "tiles left out"
    if tags.masked or (tags.alpha and georeference):
        why = why or "a mask"
    own = "" if why else _own_decoder(tags)
    bands = tags.samples
    if not (own or why or raster.installed()) and (tags.photometric, bands, tags.dtype) == (2, 4, "uint8"):
        own, bands = PILLOW, 3  # the fourth is all that Pillow drops
    if not own:
        why = why or f"TIFF of {tags.samples} bands of {tags.dtype}, compression {tags.compression}"
    # other libraries show these as they are meant, GDAL as they are stored
    as_meant = own == PILLOW and (tags.photometric not in (1, 2, 3, 6) or (tags.bits or 8) < 8)
    large = tags.size[0] * tags.size[1] > MEMORY_PIXELS
    windows = not as_meant and (tags.georeferenced or large or tags.compression not in _COMPRESSIONS)
    decoders = (RASTERIO,) if not own else (RASTERIO, own) if windows else (own,)
    return FileInfo(
        path=path,
        format="TIFF",
        stored=tags.size,
        bands=3 if as_meant and tags.samples > 1 and tags.photometric > 3 else bands,
        dtype=tags.dtype,
        decoders=decoders,
        top=(1 << tags.bits) - 1 if tags.kind == "uint" and tags.bits else 255,
        orientation=tags.orientation if 1 <= tags.orientation <= 8 else 1,
        inverted=tags.inverted and own != PILLOW,
        palette=tags.palette,
        alpha=tags.alpha and bands == tags.samples,
        nodata=nodata,
        georeference=georeference,
        why=why,
    )


def _own_decoder(tags: TiffTags) -> str:
    """Return which of Pillow and OpenCV reads such a TIFF exactly, "" where neither is sure to."""
    if tags.kind == "uint" and (tags.bits or 99) <= 8:
        one = tags.samples == 1 and (tags.together or tags.compression != 1)
        colours = tags.photometric in (2, 6) and tags.samples == 3 + tags.alpha
        others = (tags.photometric, tags.samples, tags.alpha) in ((1, 2, True), (5, 4, False), (8, 3, False))
        many = tags.bits == 8 and (colours or (others and tags.together))
        return PILLOW if tags.compression in _PILLOW_COMPRESSIONS and (one or many) else ""
    if tags.compression not in _COMPRESSIONS or tags.palette or tags.inverted or not tags.together:
        return ""
    one = tags.samples == 1
    if one and tags.dtype in ("int16", "int32"):
        return PILLOW
    colours = tags.photometric == 2 and tags.samples in (3, 4)
    deep = tags.dtype in ("uint16", "float32") and tags.bits in (16, 32)
    return OPENCV if deep and (one or colours) else ""


def _probe_jp2(path: Path, file: BinaryIO) -> FileInfo | None:
    """Return what the image header of a JPEG 2000 says, None where it is not found near the file's start."""
    head = file.read(_JP2_HEAD)
    start = head.find(_JP2_MAGIC[1])
    if start < 0 or start + 40 > len(head):
        return None
    width, height, left, top = struct.unpack_from(">4I", head, start + 8)
    (count,) = struct.unpack_from(">H", head, start + 40)
    depths = {head[start + 42 + 3 * k] for k in range(count)}
    bits, signed = (max(depths) & 0x7F) + 1, bool(max(depths) & 0x80)
    found = FileInfo(
        path=path,
        format="JPEG2000",
        stored=(height - top, width - left),
        bands=count,
        dtype=f"{'int' if signed else 'uint'}{8 if bits <= 8 else 16 if bits <= 16 else 32}",
        decoders=(RASTERIO,),
        top=(1 << bits) - 1,
        georeference="boxes" if any(sign in head for sign in _GEO_BOXES) else "",
        why=f"JPEG 2000 of {count} bands of {bits} bits",
    )
    if depths == {7} and count in (1, 3):
        with suppress(Exception):  # it has no colour interpretation that Pillow knows
            file.seek(0)
            with strict_pillow(), Image.open(file) as image:
                palette = image.mode == "P"
                if (image.height, image.width) == found.stored:  # its two headers may differ
                    # Pillow takes some intact files for broken
                    return replace(found, decoders=(PILLOW,) if palette else (RASTERIO, PILLOW), palette=palette)
    return found


def _probe_picture(path: Path, file: BinaryIO) -> FileInfo | None:
    """Return what Pillow's header says, mended where Pillow shows less than the file holds; None if it knows none."""
    head = file.read(_PICTURE_HEAD)
    may_be_turned = not head.startswith(_PNG_MAGIC) or _png_may_be_turned(file)
    try:
        file.seek(0)
        with strict_pillow(), Image.open(file) as image:
            if isinstance(image, ImageFile.StubImageFile):  # Pillow knows the format (HDF5, GRIB) and cannot read it
                return None
            mode, format_, size = image.mode, image.format or "", (image.height, image.width)
            raw = " ".join(str(tile[3]) for tile in getattr(image, "tile", ()))
            orientation = read_orientation(image) if may_be_turned else 1
            # further frames of these are previews, maps of brightness or layers
            if format_ not in ("MPO", "PSD") and getattr(image, "is_animated", False):
                raise _several(path)
    except UnidentifiedImageError:
        # GDAL reads some of what Pillow does not know; of a broken picture it would make up the rest
        if head.startswith(_PICTURE_MAGIC) or not raster.installed():
            raise
        return None
    dtype, top, bands, decoder, why = _DEEP_MODES.get(mode, "uint8"), 255, _BANDS.get(mode, 3), PILLOW, ""
    if format_ == "PNG":
        depth, colour = head[24], head[25]
        top = (1 << depth) - 1 if colour in (0, 3) or depth == 16 else 255
        if depth == 16:
            dtype, bands, decoder = "uint16", {0: 1, 2: 3, 4: 2, 6: 4}[colour], OPENCV
    elif mode == "1":
        top = 1
    elif format_ == "PPM":  # Pillow scales values to 8 bits, or to 16
        bands, numbers = 3 if mode == "RGB" else 1, re.findall(rb"\d+", re.sub(rb"#[^\n]*", b"", head[2:]))
        if mode == "F":
            decoder = OPENCV
        elif (most := int(numbers[2])) > 255:
            dtype, top, decoder = "uint16", most, OPENCV
        else:
            dtype, top = "uint8", 255 if mode == "RGB" else most
    elif dtype != "uint8":
        bands, top = 1, np.iinfo(dtype).max if dtype != "float32" else 255
    elif "16" in raw and "BGR;16" not in raw:  # Pillow keeps the high bytes alone
        decoder, why = RASTERIO, f"{format_} of 16 bits"
    return FileInfo(
        path,
        format_,
        size,
        bands,
        dtype,
        (decoder,),
        int(top),
        orientation,
        palette=mode == "P",
        alpha=bands in (2, 4),
        why=why,
    )


def _png_may_be_turned(file: BinaryIO) -> bool:
    """Return whether a PNG has a chunk that can hold an orientation, from the heads of its chunks alone.

    To find one, Pillow decodes the pixels before it.
    """
    end = len(_PNG_MAGIC)
    while True:
        file.seek(end)
        head = file.read(11)  # length and kind of a chunk, and the first letters of a text's key
        if len(head) < 8:
            return False
        length, kind = struct.unpack(">I4s", head[:8])
        if kind == b"eXIf" or (kind in (b"tEXt", b"zTXt", b"iTXt") and head[8:] in (b"Raw", b"XML")):
            return True
        end += length + 12


def read_orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1..8; 1 where there is none that can be read: the rest of EXIF is not needed."""
    found = 1
    with suppress(Exception):
        found = int(image.getexif().get(0x0112, 1))
    return found if 1 <= found <= 8 else 1


def _probe_raster(path: Path) -> FileInfo:
    """Return what GDAL's driver says of a file that Pillow does not know."""
    try:
        file = raster.open_file(path)
    except InputError as error:
        if not raster.installed():
            raise
        raise damaged(path, "not an image, or of an unknown format") from error
    with file:
        types, parts = set(file.dtypes), file.subdatasets
        if not types:
            mend = f"save one of its parts as a file: {save_part(parts[0])}" if parts else "take another format"
            raise unsupported(path, f"as {file.driver} it has no bands of its own", mend)
        if file.driver in ("NITF", "PDF", "PDS4", "FITS") and len(parts) > 1:  # GDAL shows the first as if it were all
            raise _several(path)
        if any(kind.startswith("complex") for kind in types):
            raise unsupported(path, "its samples are complex numbers", "save their magnitude as float32 instead")
        if len(types) > 1:
            raise unsupported(path, f"its bands are of the types {', '.join(sorted(types))}", "save all as one type")
        dtype = types.pop()
        return FileInfo(
            path=path,
            format=file.driver,
            stored=(file.height, file.width),
            bands=file.count,
            dtype=dtype,
            decoders=(RASTERIO,),
            top=int(np.iinfo(dtype).max) if dtype.startswith("uint") else 255,
            palette=file.count == 1 and raster.color_table(file) is not None,
            alpha=raster.alpha_band(file) == file.count,
            georeference="tags" if raster.has_georeference(file) else "",
            why=file.driver,
        )


def save_part(name: str) -> str:
    """Return the command that saves what GDAL calls `name`, such as a part of a file, as a file."""
    return f"rio convert '{name}' part.tif"


def _several(path: Path) -> InputError:
    """Return the error for a file of several images, of which libraries show the first as if it were all."""
    return unsupported(
        path,
        "it holds several images (pages, frames)",
        "save the one that is meant, or all bands in one, as a file of its own",
    )


_GEOREFERENCE = (b"<GeoTransform", b"<SRS", b"<GCPList", b'<Metadata domain="RPC"')


def sidecars(path: Path) -> tuple[str, bool]:
    """Return "beside" where a file beside `path` holds a georeference, else ""; and whether one marks missing data.

    World files (.tfw, .pgw, .wld, ...), GDAL's .aux.xml and .msk, and rational polynomials (_RPC.TXT, .RPB) count.
    """
    auxiliary = b""
    with suppress(OSError):  # there is none
        auxiliary = path.with_name(f"{path.name}.aux.xml").read_bytes()
    masked = b"<NoDataValue" in auxiliary or _exists(path.with_name(f"{path.name}.msk"))
    suffix = path.suffix[1:].lower()
    world = ["wld", *([f"{suffix[0]}{suffix[-1]}w", f"{suffix}w"] if suffix else [])]  # x.tfw, x.tifw beside x.tif
    endings = [f".{ending}" for low in world for ending in (low, low.upper())]
    names = [f"{path.stem}{ending}" for ending in (*endings, "_RPC.TXT", "_rpc.txt", ".RPB", ".rpb")]
    beside = any(sign in auxiliary for sign in _GEOREFERENCE) or any(_exists(path.with_name(name)) for name in names)
    return "beside" if beside else "", masked


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # its name is too long for a file's
        return False
