"""Zones of scanned pages: their outlines from ALTO (versions 1 to 4) or PAGE XML (2010 to 2019), and their classes.

eScriptorium, kraken and Transkribus write such files. Elements are known by their names without namespace: these are
the same in all versions. The classes of labels are SegmOnto's, or those of a small JSON file:

    {
      "classes": [
        {"name": "outside"},
        {"name": "text", "labels": ["paragraph", "heading"], "color": [70, 130, 180]},
        {"name": "picture", "labels": ["GraphicRegion", "ImageRegion"]}
      ],
      "ignored": ["stamp"]
    }

The first class is where no zone is. Zones are drawn in the order of their classes, so a later class lies over an
earlier one; ignored zones are drawn last.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from dataset.layout import decode_text
from imaging.failures import reading
from utils.classes import IGNORED
from utils.errors import InputError

_ALTO_BLOCKS = ("TextBlock", "Illustration", "GraphicalElement", "ComposedBlock")
_TYPE_IN_CUSTOM = re.compile(r"structure\s*\{[^}]*?\btype\s*:\s*([^;}]+)")


@dataclass(frozen=True)
class Zone:
    """A marked part of a page."""

    labels: tuple[str, ...]
    """What it is called, the most special first; the last is its element's name, such as `TextBlock`."""
    outline: np.ndarray
    """Corners of its polygon (n, 2) as x, y, in the file's unit; n is 3 or more."""


@dataclass(frozen=True)
class ZoneFile:
    """What a file says of its page.

    Attributes:
        picture: the name, or path, of the picture; "" where there is none.
        size: (height, width) of the page in the unit of the outlines; None where they are pixels of the picture.
        zones: in the file's order.
        placeless: how many zones have no place, or less than three corners. eScriptorium puts lines that lie in no zone
            into a zone without a place.
    """

    path: Path
    picture: str
    size: tuple[float, float] | None
    zones: tuple[Zone, ...]
    placeless: int


def read_zones(path: Path) -> ZoneFile | None:
    """Read a file; None for XML of another kind, such as METS.

    Raises InputError, naming the file, if it is no XML, has not exactly one page, or a number that is needed is none.
    """
    with reading(path):
        root = ElementTree.parse(path).getroot()
    read = {"alto": _read_alto, "PcGts": _read_page}.get(_name(root))
    if read is None:
        return None
    pages = root.findall(".//{*}Page")
    if len(pages) != 1:
        raise InputError(f"{path} holds {len(pages)} pages; save each page as a file of its own")
    try:
        picture, size, found = read(root, pages[0])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    zones = tuple(
        Zone(tuple(dict.fromkeys(filter(None, names))), outline)
        for names, outline in found
        if outline is not None and len(outline) > 2
    )
    return ZoneFile(path, picture.strip().replace("\\", "/"), size, zones, len(found) - len(zones))


_Page = tuple[str, tuple[float, float] | None, list[tuple[list[str], np.ndarray | None]]]
"""A page's picture and (height, width), and of each zone its names, the most special first, and its corners."""


def _read_alto(root: Element, page: Element) -> _Page:
    tags = {tag.get("ID", ""): tag.get("LABEL", "") for tag in root.findall(".//{*}Tags/*")}
    found = []
    for block in page.iter():
        if _name(block) not in _ALTO_BLOCKS:
            continue
        names = [tags.get(reference) or reference for reference in block.get("TAGREFS", "").split()]
        names += [block.get("TYPE", "")]
        if any(names) or _name(block) != "ComposedBlock":  # which only groups others
            found.append(([*names, _name(block)], _alto_outline(block)))
    unit = root.findtext(".//{*}MeasurementUnit", "").strip() or "pixel"
    size = _size(page, "HEIGHT", "WIDTH")
    if size is None and unit != "pixel":
        raise InputError(f"places are in {unit}, but Page has no WIDTH and HEIGHT; export it in pixels")
    return root.findtext(".//{*}fileName", ""), size, found


def _alto_outline(block: Element) -> np.ndarray | None:
    """Return the corners of a block's polygon, else of its box; None where it has neither."""
    shapes = block.findall("{*}Shape/*")
    if shapes:
        if _name(shapes[0]) != "Polygon":
            raise InputError(f"{_called(block)} is a {_name(shapes[0])}; only polygons and boxes can be read")
        return _corners(block, shapes[0].get("POINTS", ""))
    if not all(block.get(key) for key in ("HPOS", "VPOS", "WIDTH", "HEIGHT")):
        return None
    left, top, width, height = (_number(block, key) for key in ("HPOS", "VPOS", "WIDTH", "HEIGHT"))
    right, bottom = left + width, top + height
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _read_page(root: Element, page: Element) -> _Page:
    found = []
    for region in page.iter():
        if not _name(region).endswith("Region"):
            continue
        custom = _TYPE_IN_CUSTOM.search(region.get("custom", ""))
        names = [custom[1].strip() if custom else "", region.get("type", ""), _name(region)]
        outline = None
        if (coords := region.find("{*}Coords")) is not None:
            points = [f"{point.get('x', '')} {point.get('y', '')}" for point in coords]  # as in 2010
            outline = _corners(region, coords.get("points") or " ".join(points))
        found.append((names, outline))
    return page.get("imageFilename", ""), _size(page, "imageHeight", "imageWidth"), found


def _corners(element: Element, text: str) -> np.ndarray:
    """Return the points that `x y x y`, `x,y x,y` or `x,y,x,y` spell, (n, 2)."""
    try:
        numbers = np.array([float(part) for part in re.split(r"[\s,]+", text.strip()) if part])
    except ValueError:
        numbers = np.array([math.nan])
    if len(numbers) % 2 or not np.isfinite(numbers).all():
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise InputError(f"the points {shown!r} of {_called(element)} are not pairs of numbers; mend or export it anew")
    return numbers.reshape(-1, 2)


def _size(page: Element, height: str, width: str) -> tuple[float, float] | None:
    """Return (height, width) of a page, None where the file does not say."""
    if not (page.get(height) and page.get(width)):
        return None
    size = _number(page, height), _number(page, width)
    if min(size) <= 0:
        raise InputError(f"its page is {size[0]:g} x {size[1]:g}; export it anew with the picture's size")
    return size


def _number(element: Element, key: str) -> float:
    try:
        number = float(element.get(key, ""))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{key} {element.get(key)!r} of {_called(element)} is no number; mend or export it anew")
    return number


def _called(element: Element) -> str:
    return f"{_name(element)} {element.get('ID') or element.get('id') or ''}".strip()


def _name(element: Element) -> str:
    return element.tag.rpartition("}")[2]


SEGMONTO: Mapping[str, Any] = {
    "classes": [
        {"name": "outside", "color": [0, 0, 0]},
        {"name": "body", "labels": ["MainZone"], "color": [70, 130, 180]},
        {"name": "title page", "labels": ["TitlePageZone"], "color": [220, 50, 47]},
        {"name": "margin note", "labels": ["MarginTextZone"], "color": [38, 166, 91]},
        {
            "name": "head and foot lines",
            "labels": ["RunningTitleZone", "NumberingZone", "QuireMarksZone"],
            "color": [240, 180, 0],
        },
        {"name": "ornament", "labels": ["GraphicZone", "DropCapitalZone"], "color": [150, 80, 190]},
    ],
    "ignored": ["StampZone", "DamageZone", "MusicZone", "SealZone", "TableZone", "DigitizationArtefactZone"],
}
"""The zones of SegmOnto (https://segmonto.github.io) in six classes."""


@dataclass(frozen=True)
class ZoneMapping:
    """Classes of zones.

    Attributes:
        classes: their records as in the file of a data set; see `dataset.folder`.
        ids: the class id of each label, as `_key` spells it; 255 for what is ignored.
    """

    classes: tuple[Mapping[str, Any], ...]
    ids: Mapping[str, int]

    def find(self, labels: Sequence[str]) -> int | None:
        """Return the class id of a zone, 255 if it is ignored, None if no label is known; the first known one decides.

        Of a label with a subtype or a number, such as `MarginTextZone:note#2`, the whole is looked up first, then
        `MarginTextZone:note`, then `MarginTextZone`.
        """
        for label in labels:
            for spelling in (label, label.partition("#")[0], re.split("[#:]", label)[0]):
                if _key(spelling) in self.ids:
                    return self.ids[_key(spelling)]
        return None

    @classmethod
    def read(cls, path: Path) -> "ZoneMapping":
        """Read a file. Raises InputError, naming it and the entry, where it is no JSON or breaks a rule."""
        try:
            record = json.loads(decode_text(path.read_bytes()))
        except OSError as error:
            raise InputError(f"--mapping {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"--mapping {path} is not JSON: {error}; docs/data.md shows its form") from error
        try:
            return cls.from_record(record)
        except InputError as error:
            raise InputError(f"--mapping {path}: {error}") from error

    @classmethod
    def from_record(cls, record: Any) -> "ZoneMapping":
        """Return the mapping that the contents of a file give. Raises InputError, naming the entry, for broken rules.

        What else classes have, names and colours, is checked where the data set's file is made.
        """
        if not isinstance(record, Mapping) or not isinstance(record.get("classes"), list):
            raise InputError("it must be an object with the list classes, and may have the list ignored")
        unknown = [key for key in record if key not in ("classes", "ignored")]
        if unknown:
            raise InputError(f"the unknown entry {unknown[0]!r}; known are classes and ignored")
        classes, ids = [], dict[str, int]()
        for k, entry in enumerate(record["classes"]):
            if not isinstance(entry, Mapping) or "value" in entry:
                raise InputError(f"classes[{k}] must be an object with name and labels, without value")
            classes.append({key: value for key, value in entry.items() if key != "labels"})
            _add(ids, entry.get("labels", []), k, f"classes[{k}].labels")
        _add(ids, record.get("ignored", []), IGNORED, "ignored")
        return cls(tuple(classes), ids)


def _add(ids: dict[str, int], labels: Any, id_: int, where: str) -> None:
    """Add the labels of one class to `ids`; InputError where they are no labels, or have a class already."""
    if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise InputError(f"{where} must be a list of labels, such as ['MainZone']")
    for label in labels:
        if ids.setdefault(_key(label), id_) != id_:
            raise InputError(f"{where}: {label!r} has another class already; give each label one")


def _key(label: str) -> str:
    """Return a label as it is compared: `MainZone`, `main zone` and `Main` are the same."""
    plain = re.sub(r"[\s_-]+", "", label).casefold()
    return plain.removesuffix("zone") or plain
