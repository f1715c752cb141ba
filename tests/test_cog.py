"""`predict.py --cog`: masks as cloud-optimised GeoTIFFs hold the same pixels, and overviews without new ids."""

import io
import multiprocessing
import os
import resource
import sys
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from builders import N_CLASS
from pictures import random_image, run, save, summary, write_checkpoint, write_raster
from PIL import Image

import predict
from imaging.georeference import Georeference
from imaging.raster_writer import CogWriter, RasterWriter
from prediction.outputs import OutputOptions
from utils.classes import IGNORED, Classes
from utils.errors import InputError

rasterio = pytest.importorskip("rasterio")

SIZE = (1100, 1300)
CRS = rasterio.CRS.from_epsg(32633)
TRANSFORM = rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5e6)


def blocks(seed: int = 0, count: int = 3) -> np.ndarray:
    """(H, W) uint8 ids in blocks of 5 pixels, and 255."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, count, (SIZE[0] // 5, SIZE[1] // 5)).astype(np.uint8)
    ids[:20, :30] = IGNORED
    return np.kron(ids, np.ones((5, 5), np.uint8))


def write(path: Path, planes: np.ndarray, reference: Georeference, rows: int = 300) -> Path:
    writer = CogWriter(path, planes.shape[1:], "uint8", len(planes), reference, IGNORED)
    for top in range(0, planes.shape[1], rows):
        writer.write(planes[:, top : top + rows])
    writer.close()
    return path


def check(path: Path) -> None:
    """The rules of rio-cogeo: layout, order of the parts of the file, tiles, overviews."""
    cogeo = pytest.importorskip("rio_cogeo.cogeo")
    valid, errors, warnings = cogeo.cog_validate(path, strict=True, quiet=True)
    assert (valid, errors, warnings) == (True, [], [])
    with rasterio.open(path) as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"


def test_overviews_hold_the_most_frequent_ids(tmp_path) -> None:
    ids = blocks()
    check(write(tmp_path / "a.tif", ids[None], Georeference({"crs": CRS, "transform": TRANSFORM})))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]
    with rasterio.open(tmp_path / "a.tif") as file:
        assert np.array_equal(file.read(1), ids)
        assert (file.crs, file.transform, file.nodata) == (CRS, TRANSFORM, IGNORED)
        assert file.overviews(1) == [2, 4]
    with rasterio.open(tmp_path / "a.tif", overview_level=0) as file:
        found = file.read(1)
    quarters = np.stack([ids[i::2, j::2] for i in (0, 1) for j in (0, 1)])
    counts = np.stack([(quarters == k).sum(0) for k in range(3)])
    clear = (quarters != IGNORED).all(0) & (counts.max(0) > 2)
    assert np.array_equal(found[clear], counts.argmax(0)[clear])
    assert set(np.unique(found)) == {0, 1, 2, IGNORED}


@pytest.mark.parametrize("kind", ["gcps", "rpcs"])
def test_other_georeferences_are_kept(tmp_path, kind) -> None:
    numbers = [1.0] + [0.0] * 19
    rpcs = rasterio.rpc.RPC(0, 1, 0, 1, numbers, numbers, 0, 1, 0, 1, numbers, numbers, 0, 1)
    points = [rasterio.control.GroundControlPoint(r, c, c, -r) for r in (0, 500) for c in (0, 700)]
    reference = Georeference({"rpcs": rpcs} if kind == "rpcs" else {"gcps": points, "crs": CRS})
    check(write(tmp_path / "a.tif", blocks()[None], reference))
    with rasterio.open(tmp_path / "a.tif") as file:
        if kind == "rpcs":
            assert file.rpcs is not None
        else:
            assert file.gcps[1] == CRS
            assert [(one.row, one.col, one.x, one.y) for one in file.gcps[0]] == [
                (one.row, one.col, one.x, one.y) for one in points
            ]


def test_overviews_of_colours_hold_no_others(tmp_path) -> None:
    palette = np.array(Classes.generic(4).palette, np.uint8)
    write(tmp_path / "a.tif", palette[blocks(count=4) % 4].transpose(2, 0, 1), Georeference())
    check(tmp_path / "a.tif")
    with rasterio.open(tmp_path / "a.tif", overview_level=1) as file:
        found = {tuple(color) for color in file.read().reshape(3, -1).T.tolist()}
    assert found == {tuple(color) for color in palette.tolist()}


def test_an_unfinished_file_leaves_nothing(tmp_path) -> None:
    writer = CogWriter(tmp_path / "a.tif", SIZE, "uint8", 1, Georeference())
    writer.write(blocks()[None, :300])
    writer.close()
    assert not list(tmp_path.iterdir())


def test_masks_of_rasters_and_pictures_have_the_same_pixels_and_colours(tmp_path) -> None:
    checkpoint = write_checkpoint(tmp_path / "one.pth", 1)
    (tmp_path / "images").mkdir()
    write_raster(tmp_path / "images" / "a.tif", random_image((40, 60)).numpy())
    save(tmp_path / "images" / "b.png", (40, 60))
    for name, options in {"plain": [], "cog": ["--cog"]}.items():
        assert run(checkpoint, tmp_path / "images", output=tmp_path / name, options=options) == 0
    assert {path.name for path in (tmp_path / "cog").iterdir()} == {"a_mask.tif", "b_mask.tif", "summary.json"}
    expected = {"a": rasterio.open(tmp_path / "plain" / "a_mask.tif").read(1)}
    expected["b"] = np.asarray(Image.open(tmp_path / "plain" / "b_mask.png"))
    for name, ids in expected.items():
        check(tmp_path / "cog" / f"{name}_mask.tif")
        with rasterio.open(tmp_path / "cog" / f"{name}_mask.tif") as file:
            assert np.array_equal(file.read(1), ids)
            assert [file.colormap(1)[k][:3] for k in range(N_CLASS)] == [*Classes.generic(N_CLASS).palette]


def test_rasterio_is_needed(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(InputError, match="--cog needs the package rasterio, which is not installed: pip install rast"):
        OutputOptions(tmp_path, cog=True)


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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    pytest.importorskip("pyogrio")
    folder = tmp_path_factory.mktemp("inputs")
    write_checkpoint(folder / "one.pth", 1)
    save(folder / "a.png", (300, 400))
    write_raster(folder / "a.tif", random_image((300, 400)).numpy())
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("load_once")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.3, 0.999])
def test_a_limit_on_file_sizes(inputs, tmp_path, kind, part) -> None:
    """A line names a result that cannot be written, and the folder has no file of the name; then it is made.

    In a process of its own, as a limit cannot be lifted. Python ignores the signal, as predict.py does.
    """
    (image, options, result), out = FORMATS[kind], tmp_path / "out"
    whole = inputs / f"whole {kind}" / result
    if not whole.exists():
        assert run(inputs / "one.pth", inputs / image, output=whole.parent, options=options) == 0
    if kind == "gpkg":
        part = min(part, 0.7)  # a layer may do without some of its pages
    limit = int(whole.stat().st_size * part) - 8
    command = ["--checkpoint", inputs / "one.pth", "--input", inputs / image, "--output", out, "--device", "cpu"]
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=_limited, args=(limit, [*map(str, command), *options], there))
    process.start()
    code, said = here.recv()
    process.join()
    assert code in (1, 2) and "Traceback" not in said, said
    (line,) = {line for line in said.splitlines() if "cannot be written" in line}
    assert any(str(out / name) in line for name in (result, "a_mask.png", "a_mask.tif")), line
    assert ".part" not in line
    assert not (out / result).exists()
    assert not (out / "summary.json").exists() or summary(out)["images"] == []
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
    with rasterio.open(one) as first, rasterio.open(other) as second:
        return np.array_equal(first.read(), second.read())


@pytest.mark.slow
def test_a_raster_whose_last_block_is_lost_is_no_result(tmp_path, monkeypatch) -> None:
    """GDAL's `close` may raise nothing: here what it wrote is cut off or overwritten before it is read back."""
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
