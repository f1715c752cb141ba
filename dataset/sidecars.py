"""Files beside a picture that say where on the ground it lies, or which of its pixels have no data."""

from pathlib import Path

_GEOREFERENCE = (b"<GeoTransform", b"<SRS", b"<GCPList", b'<Metadata domain="RPC"')
_MASKED = (b"<NoDataValue",)


def sidecars(path: Path) -> tuple[str, bool]:
    """Return "beside" where a file beside `path` holds a georeference, else ""; and whether one marks missing data.

    World files (.tfw, .pgw, .wld, ...), GDAL's .aux.xml and .msk, and rational polynomials (_RPC.TXT, .RPB) count.
    """
    auxiliary = _content(path.with_name(f"{path.name}.aux.xml"))
    masked = any(sign in auxiliary for sign in _MASKED) or _exists(path.with_name(f"{path.name}.msk"))
    names = _world_files(path) + [f"{path.stem}{ending}" for ending in ("_RPC.TXT", "_rpc.txt", ".RPB", ".rpb")]
    beside = any(sign in auxiliary for sign in _GEOREFERENCE) or any(_exists(path.with_name(name)) for name in names)
    return "beside" if beside else "", masked


def _world_files(path: Path) -> list[str]:
    """Return the names that a world file of `path` may have: x.tfw, x.tifw or x.wld beside x.tif."""
    suffix = path.suffix[1:].lower()
    endings = ["wld", *([f"{suffix[0]}{suffix[-1]}w", f"{suffix}w"] if suffix else [])]
    return [f"{path.stem}.{ending}" for low in endings for ending in (low, low.upper())]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # there is none
        return b""


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # its name is too long for a file's
        return False
