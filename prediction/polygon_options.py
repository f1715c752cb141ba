"""What `--polygons` and its options mean, and what they need: packages, and images that lie somewhere."""

import re
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imaging.georeference import Georeference, GroundAreas, to_degrees, to_map
from prediction.packages import require_packages
from utils.errors import InputError
from utils.tiling import Size

KINDS = ("gpkg", "geojson")
"""The formats, which are the suffixes of their files."""

PACKAGES = ("pyogrio", "shapely")


@dataclass(frozen=True)
class Quantity:
    """An area with its unit, `px` or `m2`."""

    value: float
    unit: str

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"

    @classmethod
    def parse(cls, text: str) -> "Quantity":
        """Read `50px`, the value of an option. Raises ArgumentTypeError if it is not a number with its unit."""
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(px|m2)", text.strip())
        if not match:
            raise ArgumentTypeError(f"{text} must be a number with its unit, as in 50px or 50m2")
        return cls(float(match[1]), match[2])


@dataclass(frozen=True)
class PolygonOptions:
    """How regions become polygons. InputError is raised if options do not fit, or a package or driver is missing.

    Attributes:
        kind: one of `KINDS`; None for no polygons.
        min_area: smaller regions are left out.
    """

    kind: str | None = None
    min_area: Quantity | None = None

    def __post_init__(self) -> None:
        if self.kind is None:
            if self.min_area is not None:
                raise InputError(f"--min_area {self.min_area} needs --polygons {' or '.join(KINDS)}")
            return
        require_packages(f"--polygons {self.kind}", PACKAGES)
        import pyogrio

        if self.kind == "gpkg" and "GPKG" not in pyogrio.list_drivers(write=True):
            raise InputError("--polygons gpkg needs GDAL's driver GPKG, which this pyogrio lacks")

    def check(self, image: Path, reference: Georeference, size: Size) -> None:
        """Raise InputError if an image lacks the georeference that the options need."""
        crs = reference.keywords.get("crs")
        if self.kind == "geojson" and crs is not None:
            middle = to_map(reference, *(np.array([side / 2]) for side in size))
            if not np.isfinite(to_degrees(crs, *middle)).all():
                raise InputError(
                    f"{image} has a reference system without a place on the Earth, and GeoJSON is in WGS 84; give "
                    "--polygons gpkg",
                    "reference system",
                )
        if self.min_area is not None and self.min_area.unit != "px" and GroundAreas.of(reference, size) is None:
            raise InputError(
                f"{image} does not say where on the ground it lies, which --min_area {self.min_area} needs; give "
                "pixels, as in 50px",
                "no georeference",
            )


def lacks_place(reference: Georeference) -> str:
    """Return what the polygons of an image lack, after the words "the polygons"; "" if they lie on the ground."""
    if not reference.keywords.keys() & {"transform", "gcps"}:
        return "are in pixels: the image has no georeference that places them"
    return "" if reference.keywords.get("crs") is not None else "name no reference system, as the image names none"
