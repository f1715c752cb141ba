"""`predict.py --cog`: masks as cloud-optimised GeoTIFFs hold the same pixels, and overviews without new ids."""

import sys
from pathlib import Path

import numpy as np
import pytest
from builders import N_CLASS
from pictures import random_image, run, save, write_checkpoint, write_raster
from PIL import Image

from imaging.georeference import Georeference
from imaging.raster_writer import CogWriter
from prediction.outputs import OutputOptions
from utils.classes import IGNORED, Classes
from utils.errors import InputError

rasterio = pytest.importorskip("rasterio")
cogeo = pytest.importorskip("rio_cogeo.cogeo")

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
