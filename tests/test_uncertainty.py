"""`--uncertainty`: entropy and disagreement are what plain predictions give, in any scenes, files and polygons."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import N_CLASS, Scores, build_model, build_predictor, build_settings
from pictures import Whole, random_image, run, save, write_checkpoint, write_raster
from PIL import Image

from engine.predictor import Predictor
from imaging.sources import MemorySource
from prediction.scenes import scene_grid, segment_scenes
from prediction.uncertainty import measure_uncertainty
from utils.classes import IGNORED
from utils.stages import STAGES
from utils.turns import TURNS

SIZE = (90, 150)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "three.pth", 3)


def expected(predictor: Predictor, image: torch.Tensor) -> np.ndarray:
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
    found, plain = Whole(), Whole()
    segment_scenes(predictor, MemorySource(image), found, uncertainty=True)
    segment_scenes(predictor, MemorySource(image), plain)
    assert (found.ids == plain.ids).float().mean() > 0.999  # ties only
    measures = found.uncertainty.numpy()
    reference = expected(predictor, image)
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
    image = random_image((90, 330))
    predictor = build_predictor(build_model(), mode, build_settings())
    found, alone, plain, grid = Whole(), Whole(), Whole(), scene_grid((90, 330), 128)
    segment_scenes(predictor, MemorySource(image), found, scene_size=128, uncertainty=True, probabilities=True)
    segment_scenes(predictor, MemorySource(image), plain, scene_size=128, probabilities=True)
    segment_scenes(predictor, MemorySource(grid.boxes()[0].of(image)), alone, scene_size=128, uncertainty=True)
    assert torch.equal(found.ids, plain.ids)
    assert torch.equal(found.probabilities, plain.probabilities)
    measures, first = found.uncertainty, alone.uncertainty
    assert measures.shape == (len(STAGES[mode].predictions[:2]), 90, 330)
    own = grid.columns.starts[1]
    assert own > 50
    assert (measures[..., :own] == first[..., :own]).float().mean() > 0.99


@pytest.mark.parametrize("options", [[], ["--cog"]])
def test_rasters_lie_where_the_image_lies_and_polygons_have_the_means(checkpoint, tmp_path, options) -> None:
    rasterio = pytest.importorskip("rasterio")
    pyogrio = pytest.importorskip("pyogrio")
    values = random_image(SIZE).numpy()
    values[:, :30, :40] = 0
    path, out = write_raster(tmp_path / "a.tif", values, nodata=0), tmp_path / "out"
    options = [*options, "--uncertainty", "--probabilities", "--polygons", "gpkg", "--scene_size", "100"]
    assert run(checkpoint, path, output=out, options=options) == 0
    with rasterio.open(path) as source, rasterio.open(out / "a_uncertainty.tif") as file:
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
        assert (file.dtypes, file.descriptions) == (("uint8",) * 2, ("entropy", "disagreement"))
        assert rasterio.enums.ColorInterp.alpha not in file.colorinterp
        assert ("--cog" in options) == (file.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG")
        measures = file.read()
    with rasterio.open(out / "a_mask.tif") as file:
        ids = file.read(1)
    assert not measures[:, ids == IGNORED].any()
    meta, _, _, columns = pyogrio.raw.read(out / "a.gpkg", read_geometry=False)
    fields = dict(zip(meta["fields"].tolist(), columns, strict=True))
    assert {"mean_probability", "mean_entropy", "mean_disagreement"} < set(fields)
    for band, name in enumerate(("entropy", "disagreement")):
        total = (fields[f"mean_{name}"] * fields["pixels"]).sum()
        assert total == pytest.approx(measures[band].sum() / 255)


def test_pictures_get_red_and_green_and_mode_1_says_what_it_lacks(checkpoint, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    save(tmp_path / "a.png")
    for mode in (3, 1):
        out = tmp_path / str(mode)
        assert run(checkpoint, tmp_path / "a.png", output=out, options=["--uncertainty", "--mode", mode]) == 0
        picture = np.asarray(Image.open(out / "a_uncertainty.png"))
        assert picture[..., 0].any()
        assert picture[..., 1].any() == (mode == 3)
        assert not picture[..., 2].any()
        assert ("mode 1 has no local prediction" in caplog.text) == (mode == 1)
    kept = (out / "a_uncertainty.png").stat().st_mtime_ns
    assert run(checkpoint, tmp_path / "a.png", output=out, options=["--uncertainty", "--mode", 1]) == 0
    assert (out / "a_uncertainty.png").stat().st_mtime_ns == kept
