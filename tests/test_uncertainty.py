"""`--uncertainty` and `--stability`: the maps are what plain predictions, or masks made one by one, give."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import N_CLASS, SIDE, Scores, build_model, build_predictor, build_settings
from pictures import Whole, random_image, run, save, summary, write_checkpoint, write_raster
from PIL import Image

from engine.predictor import Predictor
from imaging.sources import MemorySource
from predict import Segmenter
from prediction.scenes import Rows, scene_grid, segment_scenes
from prediction.stability import StabilityMap, shifted_cuts
from prediction.uncertainty import measure_uncertainty
from utils.classes import IGNORED
from utils.stages import STAGES
from utils.tiling import Box
from utils.turns import TURNS

SIZE = (90, 150)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "three.pth", 3)


def segmented(predictor: Predictor, image: torch.Tensor, **more) -> Whole:
    found = Whole()
    segment_scenes(predictor, MemorySource(image), found, **more)
    return found


def measures_of(predictor: Predictor, image: torch.Tensor) -> np.ndarray:
    """(1 or 2, H, W) uint8 of the definitions, in float64, from the scores of all predictions at once."""
    sinks = {name: Scores(SIZE) for name in predictor.stage.predictions}
    predictor.segment(MemorySource(image), sinks, means=True)
    p = sinks[predictor.stage.headline].whole().double().softmax(0)
    shares = [-(p * p.log()).sum(0) / math.log(N_CLASS)]
    if "local" in sinks:
        shares.append((sinks["local"].whole().argmax(0) != sinks["global"].whole().argmax(0)).double())
    return (255 * torch.stack(shares)).round().numpy()


@pytest.mark.parametrize(("mode", "turns"), [(1, "none"), (2, "none"), (3, "none"), (2, "flip"), (3, "flip")])
def test_measures_are_those_of_the_definitions_and_the_mask_stays(mode, turns) -> None:
    image = random_image(SIZE)
    predictor = build_predictor(build_model(), mode, build_settings(), TURNS[turns])
    found = segmented(predictor, image, uncertainty=True)
    assert (found.ids == segmented(predictor, image).ids).float().mean() > 0.999  # ties only
    measures, reference = found.uncertainty.numpy(), measures_of(predictor, image)
    assert measures.shape == reference.shape == (1 if mode == 1 else 2, *SIZE)
    assert np.abs(measures[0] - reference[0]).max() <= 1
    assert 20 < measures[0].mean() < 250
    if mode > 1:
        assert (measures[1] != reference[1]).mean() < 1e-3  # ties only
        assert 0.05 < (measures[1] == 255).mean() < 0.95


def test_entropy_is_0_where_a_class_is_certain_and_255_where_all_are_alike() -> None:
    scores = torch.zeros(N_CLASS, 1, 2)
    scores[1, 0, 0] = 200
    assert measure_uncertainty(scores, torch.tensor([[0.5, 1.0]])).tolist() == [[[0, 255]], [[128, 255]]]


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_away_from_overlaps_measures_are_those_of_the_scene_alone_and_the_result_stays(mode) -> None:
    image, grid = random_image((90, 330)), scene_grid((90, 330), 128)
    predictor = build_predictor(build_model(), mode, build_settings())
    found = segmented(predictor, image, scene_size=128, uncertainty=True, probabilities=True)
    plain = segmented(predictor, image, scene_size=128, probabilities=True)
    alone = segmented(predictor, grid.boxes()[0].of(image), scene_size=128, uncertainty=True)
    # more outputs of one convolution may be rounded in another way
    assert (found.ids == plain.ids).float().mean() > 0.999
    torch.testing.assert_close(found.probabilities, plain.probabilities, atol=1e-3, rtol=0)
    assert found.uncertainty.shape == (len(STAGES[mode].predictions[:2]), 90, 330)
    own = grid.columns.starts[1]
    assert own > 50
    assert (found.uncertainty[..., :own] == alone.uncertainty[..., :own]).float().mean() > 0.99


@pytest.mark.parametrize("options", [[], ["--cog"]])
def test_rasters_lie_where_the_image_lies_and_polygons_have_the_means(checkpoint, tmp_path, options) -> None:
    rasterio = pytest.importorskip("rasterio")
    pyogrio = pytest.importorskip("pyogrio")
    values = random_image(SIZE).numpy().clip(1)
    values[:, :30, :40] = 0
    path, out = write_raster(tmp_path / "a.tif", values, nodata=0), tmp_path / "out"
    options = [*options, "--uncertainty", "--probabilities", "--polygons", "gpkg", "--scene_size", "100"]
    assert run(checkpoint, path, output=out, options=[*options, "--stability", 2]) == 0
    maps = {"uncertainty": ("entropy", "disagreement"), "stability": ("changes",)}
    for name, descriptions in maps.items():
        with rasterio.open(path) as source, rasterio.open(out / f"a_{name}.tif") as file:
            assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
            assert (set(file.dtypes), file.descriptions) == ({"uint8"}, descriptions)
            assert rasterio.enums.ColorInterp.alpha not in file.colorinterp
            assert ("--cog" in options) == (file.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG")
            maps[name] = file.read()
    with rasterio.open(out / "a_mask.tif") as file:
        ids = file.read(1)
    assert (ids[:30, :40] == IGNORED).all()
    for levels in maps.values():  # pixels without data are not compared
        assert not levels[:, ids == IGNORED].any() and levels.any()
    meta, _, _, columns = pyogrio.raw.read(out / "a.gpkg", read_geometry=False)
    fields = dict(zip(meta["fields"].tolist(), columns, strict=True))
    assert {"mean_probability", "mean_entropy", "mean_disagreement"} < set(fields)
    for band, name in enumerate(("entropy", "disagreement")):
        total = (fields[f"mean_{name}"] * fields["pixels"]).sum()
        assert total == pytest.approx(maps["uncertainty"][band].sum() / 255)


def test_pictures_get_red_and_green_and_mode_1_says_what_it_lacks(checkpoint, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    save(tmp_path / "a.png")
    for mode in (3, 1):
        out, options = tmp_path / str(mode), ["--uncertainty", "--mode", mode]
        assert run(checkpoint, tmp_path / "a.png", output=out, options=options) == 0
        picture = np.asarray(Image.open(out / "a_uncertainty.png"))
        assert picture.any((0, 1)).tolist() == [True, mode == 3, False]
        assert ("mode 1 has no local prediction" in caplog.text) == (mode == 1)
    kept = (out / "a_uncertainty.png").stat().st_mtime_ns
    assert run(checkpoint, tmp_path / "a.png", output=out, options=options) == 0
    assert (out / "a_uncertainty.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize("size", [(150, 170), (1, 1), (3, 900), (5000, 5000)])
@pytest.mark.parametrize("count", [1, 4, 99])
def test_cuts_lie_in_the_image_and_keep_three_quarters_of_its_sides(size, count) -> None:
    cuts = shifted_cuts(size, 508, count)
    assert len(cuts) == count
    for cut in cuts:
        assert Box(0, 0, *size).overlap(cut) == cut
        assert 4 * cut.height >= 3 * size[0] and 4 * cut.width >= 3 * size[1]
    assert size[0] < 5000 or len(set(cuts)) == count


def changes_of(segmenter: Segmenter, image: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The map, (H, W), and the share of changes."""
    ids = segmenter.segment(image)
    changes, cuts = np.zeros((2, *ids.shape))
    for box in shifted_cuts(ids.shape, SIDE, count):
        part = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        changes[part] += segmenter.segment(np.ascontiguousarray(image[part])) != ids[part]
        cuts[part] += 1
    return np.rint(255 * changes / np.maximum(1, cuts)), changes.sum() / cuts.sum()


@pytest.mark.parametrize("scene_size", [100, 5000])
def test_the_map_of_changes_is_that_of_masks_made_one_by_one(checkpoint, tmp_path, capsys, scene_size) -> None:
    image = np.asarray(save(tmp_path / "a.png", (150, 170)))
    out, options = tmp_path / "out", ["--stability", 3, "--scene_size", scene_size]
    assert run(checkpoint, tmp_path / "a.png", output=out, options=options) == 0
    levels, share = changes_of(Segmenter.from_checkpoint(checkpoint, device="cpu", scene_size=scene_size), image, 3)
    found = np.asarray(Image.open(out / "a_stability.png"))
    assert np.array_equal(found[..., 0], levels) and not found[..., 1:].any()
    assert summary(out)["total"]["changed"] == pytest.approx(share)
    assert f"{100 * share:.2f} per cent of their pixels changes in shifted cuts" in capsys.readouterr().out
    assert run(checkpoint, tmp_path / "a.png", output=out, options=options) == 0  # nothing is made, the share is kept
    assert summary(out)["total"]["changed"] == pytest.approx(share)
    assert {path.name for path in out.iterdir()} == {"a_mask.png", "a_stability.png", "summary.json"}


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
