"""`--stability N`: the map and the share are those of masks of the cuts that are made one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import SIDE
from pictures import run, save, summary, write_checkpoint, write_raster
from PIL import Image

from predict import Segmenter
from prediction.scenes import Rows
from prediction.stability import StabilityMap, shifted_cuts
from utils.classes import IGNORED
from utils.tiling import Box

SIZE = (150, 170)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "three.pth", 3)


@pytest.mark.parametrize("size", [(150, 170), (1, 1), (3, 900), (5000, 5000)])
@pytest.mark.parametrize("count", [1, 4, 99])
def test_cuts_lie_in_the_image_and_keep_three_quarters_of_its_sides(size, count) -> None:
    cuts = shifted_cuts(size, 508, count)
    assert len(cuts) == count
    for cut in cuts:
        assert Box(0, 0, *size).overlap(cut) == cut
        assert 4 * cut.height >= 3 * size[0]
        assert 4 * cut.width >= 3 * size[1]
    if size[0] == size[1] == 5000:
        assert len(set(cuts)) == count


def expected(segmenter: Segmenter, image: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The map, (H, W), and the share of changes."""
    ids = segmenter.segment(image)
    changes, cuts = np.zeros((2, *ids.shape))
    for box in shifted_cuts(ids.shape, SIDE, count):
        part = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        changes[part] += segmenter.segment(np.ascontiguousarray(image[part])) != ids[part]
        cuts[part] += 1
    return np.rint(255 * changes / np.maximum(1, cuts)), changes.sum() / cuts.sum()


@pytest.mark.parametrize("scene_size", [100, 5000])
def test_the_map_is_that_of_masks_made_one_by_one(checkpoint, tmp_path, capsys, scene_size) -> None:
    image = np.asarray(save(tmp_path / "a.png", SIZE))
    out, options = tmp_path / "out", ["--stability", 3, "--scene_size", scene_size]
    assert run(checkpoint, tmp_path / "a.png", output=out, options=options) == 0
    levels, share = expected(Segmenter.from_checkpoint(checkpoint, device="cpu", scene_size=scene_size), image, 3)
    found = np.asarray(Image.open(out / "a_stability.png"))
    assert np.array_equal(found[..., 0], levels)
    assert not found[..., 1:].any()
    assert summary(out)["total"]["changed"] == pytest.approx(share)
    assert f"{100 * share:.2f} per cent of their pixels changes in shifted cuts" in capsys.readouterr().out
    assert run(checkpoint, tmp_path / "a.png", output=out, options=options) == 0  # nothing is made, the share is kept
    assert summary(out)["total"]["changed"] == pytest.approx(share)
    assert {path.name for path in out.iterdir()} == {"a_mask.png", "a_stability.png", "summary.json"}


def test_a_raster_gives_a_raster_and_pixels_without_data_are_not_compared(checkpoint, tmp_path) -> None:
    rasterio = pytest.importorskip("rasterio")
    values = np.random.default_rng(0).integers(1, 255, (3, *SIZE)).astype(np.uint8)
    values[:, :20, :30] = 0
    path, out = write_raster(tmp_path / "a.tif", values, nodata=0), tmp_path / "out"
    assert run(checkpoint, path, output=out, options=["--stability", 2, "--cog", "--scene_size", 100]) == 0
    with rasterio.open(path) as source, rasterio.open(out / "a_stability.tif") as file:
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
        assert file.descriptions == ("changes",)
        levels = file.read(1)
    assert not levels[:20, :30].any()
    assert levels.any()


def test_a_pixel_counts_the_cuts_that_hold_it(tmp_path) -> None:
    mask = torch.tensor([[0, 1], [IGNORED, 1]], dtype=torch.uint8)
    with StabilityMap(tmp_path, (2, 2), [Box(0, 0, 2, 2), Box(0, 1, 2, 1)]) as found:
        found.keep(Rows(mask))
        found.compare(found.cuts[0], 0, Rows(torch.zeros_like(mask)))
        found.compare(found.cuts[1], 1, Rows(mask[:1, :1]))
        (levels,) = found.levels()
    assert levels.tolist() == [[[0, 128], [0, 255]]]
    assert (found.changed, found.compared) == (3, 4)
    assert not list(tmp_path.iterdir())
