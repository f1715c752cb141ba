"""Results that cannot be written whole: a line names each, no file has its name, and the next run makes it."""

import io
import json
import multiprocessing
import os
import resource
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from pictures import random_image, run, save, write_checkpoint, write_raster

import predict
from imaging.georeference import Georeference
from imaging.raster_writer import RasterWriter
from utils.errors import InputError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("load_once")]

FORMATS = {
    "png": ("a.png", [], "a_mask.png"),
    "rgb": ("a.png", ["--colors"], "a_mask.png"),
    "overlay": ("a.png", ["--overlay"], "a_overlay.png"),
    "npz": ("a.png", ["--probabilities"], "a_probabilities.npz"),
    "tif": ("a.tif", [], "a_mask.tif"),
    "cog": ("a.tif", ["--cog"], "a_mask.tif"),
    "shares": ("a.tif", ["--probabilities"], "a_probabilities.tif"),
    "gpkg": ("a.png", ["--polygons", "gpkg"], "a.gpkg"),
    "geojson": ("a.png", ["--polygons", "geojson"], "a.geojson"),
}
"""Of each: the image, the options, and the result."""

SIZE = (300, 400)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    pytest.importorskip("rasterio")
    pytest.importorskip("pyogrio")
    folder = tmp_path_factory.mktemp("inputs")
    write_checkpoint(folder / "one.pth", 1)
    save(folder / "a.png", SIZE)
    write_raster(folder / "a.tif", random_image(SIZE).numpy())
    return folder


def whole_result(inputs: Path, kind: str) -> Path:
    """Return the result of a kind, made without limits and once."""
    image, options, result = FORMATS[kind]
    path = inputs / f"whole {kind}" / result
    if not path.exists():
        assert run(inputs / "one.pth", inputs / image, output=path.parent, options=options) == 0
    return path


def check_refused(kind: str, out: Path, code: int, said: str) -> None:
    """A line names a result that cannot be written, and the folder has no file of the name; then it is made."""
    result = FORMATS[kind][2]
    assert code in (1, 2), said
    assert "Traceback" not in said
    (line,) = {line for line in said.splitlines() if "cannot be written" in line}
    assert any(str(out / name) in line for name in (result, "a_mask.png", "a_mask.tif")), line
    assert ".part" not in line
    assert not (out / result).exists()
    summary = out / "summary.json"
    assert not summary.exists() or json.loads(summary.read_text())["images"] == []


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.3, 0.999])
def test_a_limit_on_file_sizes(inputs, tmp_path, kind, part) -> None:
    """In a process of its own, as a limit cannot be lifted. Python ignores the signal, as predict.py does."""
    image, options, result = FORMATS[kind]
    if kind == "gpkg":
        part = min(part, 0.7)  # a layer may do without some of its pages
    whole = whole_result(inputs, kind)
    limit = int(whole.stat().st_size * part) - 8
    out = tmp_path / "out"
    command = ["--checkpoint", inputs / "one.pth", "--input", inputs / image, "--output", out, "--device", "cpu"]
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=_limited, args=(limit, [*map(str, command), *options], there))
    process.start()
    code, said = here.recv()
    process.join()
    check_refused(kind, out, code, said)
    assert run(inputs / "one.pth", inputs / image, output=out, options=options) == 0
    assert same_content(out / result, whole)


def _limited(limit: int, arguments: list[str], result: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = predict.main(arguments)
    result.send((code, said.getvalue()))


def same_content(one: Path, other: Path) -> bool:
    if one.suffix in (".png", ".geojson"):
        return one.read_bytes() == other.read_bytes()
    if one.suffix == ".npz":
        return np.array_equal(*(np.load(path)["probabilities"] for path in (one, other)))
    if one.suffix == ".gpkg":
        import pyogrio

        return len({pyogrio.read_info(path, force_feature_count=True)["features"] for path in (one, other)}) == 1
    import rasterio

    found = []
    for path in (one, other):
        with rasterio.open(path) as file:
            found.append(file.read())
    return np.array_equal(*found)


def test_a_raster_whose_last_block_is_lost_is_no_result(tmp_path, monkeypatch) -> None:
    """GDAL's `close` may raise nothing: here what it wrote is cut off or overwritten before it is read back."""
    rasterio = pytest.importorskip("rasterio")
    ids = np.random.default_rng(0).integers(0, 5, (1, 300, 300)).astype(np.uint8)
    for harm in ("cut", "zeros", "other"):
        path = tmp_path / f"{harm}.tif"
        writer = RasterWriter(path, ids.shape[1:], "uint8", 1, Georeference())
        writer.write(ids)
        plain = writer._read_back

        def harmed(path: Path, harm: str = harm, plain=plain) -> None:
            if harm == "other":
                with rasterio.open(path, "r+") as file:
                    file.write(np.zeros((1, 9, 9), np.uint8), window=((0, 9), (0, 9)))
            else:
                os.truncate(path, path.stat().st_size // 2)
                os.truncate(path, path.stat().st_size * (2 if harm == "zeros" else 1))
            plain(path)

        monkeypatch.setattr(writer, "_read_back", harmed)
        with pytest.raises(InputError, match="cannot be written: what was written cannot be read back") as caught:
            writer.close()
        assert caught.value.kind == "not written"
