"""Which class each label of a zone belongs to: SegmOnto's labels, or a small JSON file.

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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.layout import decode_text
from utils.classes import IGNORED
from utils.errors import InputError

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
        classes: their records as in the file of a data set; see `dataset.folder_file`.
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
