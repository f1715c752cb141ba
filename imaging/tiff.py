"""What a TIFF's tags say of its pixels, read without decoding any."""

import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from utils.tiling import Size

_GEOREFERENCE = (33550, 33922, 34264, 34735, 50844)
"""Pixel scale, tie points, transformation, GeoKeyDirectory, rational polynomials."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES = 256, 257, 258, 259, 262, 274, 277
_PLANAR, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _GDAL_NODATA = 284, 338, 339, 42113
_PAGE_KIND, _OLD_PAGE_KIND, _PAGES_INSIDE = 254, 255, 330
_TILES, _STRIPS = (324, 325), (273, 279)
"""Tags; of tiles and strips those of their places and of their lengths."""

_MOST_PAGES = 64
"""How many further pages are looked at; overviews come as pages, too."""

_KINDS = {1: "uint", 2: "int", 3: "float", 4: "uint", 5: "complex", 6: "complex"}
"""By sample format; 4 is undefined data, which every reader takes for unsigned."""


class TiffTags:
    """The first page of a TIFF, and what the others are to it.

    `size` is as stored. `bits` and `kind` (uint, int, float, complex) are those of every sample, None where samples
    differ. `together`: whether samples of a pixel lie side by side. `alpha`: whether an extra sample is transparency.
    `sparse`: whether tiles or strips are left out. `masked`: whether a later page masks this one. `pages`: whether a
    later page is neither mask nor smaller copy of this one, but has pixels of its own. `end`: the file must be so many
    bytes long. `inverted`: whether 0 is white.
    """

    def __init__(self, page: ImageFileDirectory_v2, others: Sequence[ImageFileDirectory_v2]) -> None:
        offsets, lengths = _parts(page)
        nodata = _one(page, _GDAL_NODATA, "")
        self.size = _size(page)
        self.samples = int(_one(page, _SAMPLES, 1))
        self.bits = _common(page.get(_BITS, (1,)))
        self.kind = _KINDS.get(_common(page.get(_SAMPLE_FORMAT, (1,))) or 0)
        self.photometric = int(_one(page, _PHOTOMETRIC, 1))
        self.compression = int(_one(page, _COMPRESSION, 1))
        self.together = int(_one(page, _PLANAR, 1)) == 1
        self.orientation = int(_one(page, _ORIENTATION, 1))
        self.alpha = any(kind in (1, 2) for kind in page.get(_EXTRA_SAMPLES, ()))
        self.sparse = bool(len(lengths)) and bool((lengths == 0).any() or (offsets == 0).any())
        self.masked = any(_is_mask(other) for other in others)
        self.pages = any(not (_is_mask(other) or _is_copy(other, page)) for other in others)
        self.nodata = (nodata.decode("ascii", "replace") if isinstance(nodata, bytes) else str(nodata)).strip("\0 \n")
        self.georeferenced = any(tag in page for tag in _GEOREFERENCE)
        self.end = int((offsets + lengths).max()) if len(lengths) and len(lengths) == len(offsets) else 0
        self.palette = self.photometric == 3
        self.inverted = self.photometric == 0 and self.samples == 1

    @property
    def dtype(self) -> str:
        """The samples' type as numpy names it; fewer than 8 bits fill 8, others the next larger type."""
        if self.bits is None or self.kind is None:
            return "mixed"
        least = 8 if self.kind in ("uint", "int") else 16 if self.kind == "float" else 64
        width = next((width for width in (8, 16, 32, 64, 128) if width >= max(least, self.bits)), None)
        return "mixed" if width is None else f"{self.kind}{width}"


def read_tags(file: BinaryIO) -> TiffTags:
    """Read the tags of an open TIFF or BigTIFF; raises what Pillow's parser raises where they are broken."""
    head = file.read(8)
    if head[2:4] in (b"\x2b\x00", b"\x00\x2b"):
        head += file.read(8)
    page = ImageFileDirectory_v2(head)
    file.seek(page.next)
    page.load(file)
    return TiffTags(page, list(_other_pages(file, head, page)))


def as_stored(content: bytes) -> bytes:
    """Return a TIFF's bytes with its orientation set to 1, so that no library turns what it decodes.

    Some versions of Pillow and OpenCV turn some kinds of TIFF, some by half.
    """
    order = "<" if content[:2] == b"II" else ">"
    big = struct.unpack_from(f"{order}H", content, 2)[0] == 43
    (start,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", content, 8 if big else 4)
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", content, start)
    first, step = (start + 8, 20) if big else (start + 2, 12)
    changed = bytearray(content)
    for at in range(first, first + count * step, step):
        if struct.unpack_from(f"{order}H", content, at)[0] == _ORIENTATION:
            struct.pack_into(f"{order}H", changed, at + (12 if big else 8), 1)
    return bytes(changed)


def _one(page: ImageFileDirectory_v2, tag: int, default: Any = None) -> Any:
    """Return the first value of `tag`; ValueError where it is missing and has no default."""
    value = page.get(tag, default)
    value = value[0] if isinstance(value, tuple) and value else value
    if value is None:
        raise ValueError(f"TIFF tag {tag} is missing")
    return value


def _common(values: Any) -> int | None:
    """Return the value that all of `values` are, None where they differ."""
    values = values if isinstance(values, tuple) else (values,)
    return int(values[0]) if len(set(values)) == 1 else None


def _parts(page: ImageFileDirectory_v2) -> tuple[np.ndarray, np.ndarray]:
    """Return where the tiles or strips start in the file and how long they are, in bytes."""
    for offsets, lengths in (_TILES, _STRIPS):
        if offsets in page:
            first, length = (np.atleast_1d(np.asarray(page.get(tag, ()), np.int64)) for tag in (offsets, lengths))
            return first, length
    return np.empty(0, np.int64), np.empty(0, np.int64)


def _other_pages(file: BinaryIO, head: bytes, first: ImageFileDirectory_v2) -> Iterator[ImageFileDirectory_v2]:
    """Yield the tags of the other pages, and of those that the first one holds inside, as raw photographs do."""
    inside = np.atleast_1d(np.asarray(first.get(_PAGES_INSIDE, ()), np.int64)).tolist()
    following = first.next
    for _ in range(_MOST_PAGES):
        start = following or (inside.pop(0) if inside else 0)
        if not start:
            return
        page = ImageFileDirectory_v2(head)
        file.seek(start)
        page.load(file)
        yield page
        following = page.next if following else 0


def _is_mask(page: ImageFileDirectory_v2) -> bool:
    return bool(int(_one(page, _PAGE_KIND, 0)) & 4)


def _is_copy(page: ImageFileDirectory_v2, first: ImageFileDirectory_v2) -> bool:
    """Return whether a page is a smaller copy of the first: it says so, or has its shape up to rounding."""
    (height, width), (whole_height, whole_width) = _size(page), _size(first)
    if height > whole_height or width > whole_width:
        return False
    reduced = int(_one(page, _PAGE_KIND, 0)) & 1 or int(_one(page, _OLD_PAGE_KIND, 0)) == 2
    shape_differs = abs(height * whole_width - width * whole_height) > max(whole_height, whole_width)
    return bool(reduced) or (height < whole_height and not shape_differs)


def _size(page: ImageFileDirectory_v2) -> Size:
    return int(_one(page, _HEIGHT)), int(_one(page, _WIDTH))
