"""GeoTIFF and other rasters, read in windows through rasterio, which is an optional dependency."""

import logging
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from imaging.failures import reading
from utils.errors import InputError


def installed() -> bool:
    """Return whether rasterio can be imported."""
    try:
        import rasterio  # noqa: F401
    except ImportError:
        return False
    return True


def library(path: Path) -> ModuleType:
    """Return rasterio; InputError, saying that `path` needs it, where it is not installed."""
    os.environ.setdefault("GDAL_CACHEMAX", "96")  # MB of decoded blocks; else a twentieth of the machine's memory
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
