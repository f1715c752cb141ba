"""Large images as scenes: the scenes cover, their weights add up to one, and joining them loses nothing."""

import pytest
import torch
from builders import build_model, build_predictor, build_settings
from pictures import PixelPredictor, Whole, pixel_scores, random_image

from imaging.sources import CropSource, MemorySource
from prediction.scenes import ramps, reduce_scores, scene_grid, segment_scenes
from utils.distributed import Ranks
from utils.errors import InputError
from utils.turns import TURNS

SIZES = [(300, 500), (161, 160), (160, 1000), (1000, 33), (320, 321), (480, 777)]


@pytest.mark.parametrize("size", [*SIZES, (1, 5001), (32768, 30000)])
@pytest.mark.parametrize("scene_size", [160, 5000])
def test_scenes_cover_with_the_overlap_asked_for_and_no_pixel_is_in_three_along_an_axis(size, scene_size):
    grid = scene_grid(size, scene_size)
    assert (len(grid) == 1) == (max(size) <= scene_size)
    for axis in (grid.rows, grid.columns):
        assert axis.patch <= scene_size
        counts = axis.counts()
        assert counts.min() >= 1
        assert counts.max() <= 2
        if len(axis.starts) > 1:
            assert all(
                b - a <= axis.patch - scene_size // 16 for a, b in zip(axis.starts[:-1], axis.starts[1:], strict=True)
            )


@pytest.mark.parametrize("size", SIZES)
def test_weights_of_scenes_add_up_to_one_and_pass_over_gradually(size):
    axis = scene_grid(size, 160).columns
    total = torch.zeros(axis.side)
    for start, weights in zip(axis.starts, ramps(axis), strict=True):
        total[start : start + axis.patch] += weights
        assert weights.diff().abs().max() <= 0.2
    torch.testing.assert_close(total, torch.ones(axis.side))


@pytest.mark.parametrize("size", SIZES)
def test_scores_of_pixels_survive_any_scenes(size):
    image = random_image(size)
    found, expected = Whole(), Whole()
    segment_scenes(PixelPredictor(), MemorySource(image), found, scene_size=160, probabilities=True)
    segment_scenes(PixelPredictor(), MemorySource(image), expected, scene_size=5000, probabilities=True)
    assert (found.ids != expected.ids).float().mean() < 1e-3  # ties only
    torch.testing.assert_close(found.probabilities, expected.probabilities, atol=2e-3, rtol=0)
    reduced = reduce_scores(pixel_scores(image), True)
    assert torch.equal(expected.ids, reduced.ids)


def test_away_from_seams_a_scene_of_its_own_gives_the_same():
    image = random_image((100, 330))
    predictor = build_predictor(build_model(), 3, build_settings())
    grid = scene_grid((100, 330), 128)
    whole = Whole()
    segment_scenes(predictor, MemorySource(image), whole, scene_size=128)
    for index, box in enumerate(grid.boxes()):
        alone = Whole()
        segment_scenes(predictor, CropSource(MemorySource(image), box), alone, scene_size=128)
        first = 0 if index == 0 else 20
        last = box.width - (0 if index == len(grid) - 1 else 20)
        found = whole.ids[:, box.left + first : box.left + last]
        assert (found == alone.ids[:, first:last]).float().mean() > 0.9999


@pytest.mark.parametrize("turns", ["flip", "d4"])
@pytest.mark.parametrize("size", [(60, 90), (130, 100)])
def test_turning_the_image_turns_what_d4_or_flip_gives(turns, size):
    image = random_image(size)
    predictor = build_predictor(build_model(), 3, build_settings(), TURNS[turns])

    def ids(picture):
        found = Whole()
        segment_scenes(predictor, MemorySource(picture), found)
        return found.ids

    straight = ids(image)
    for turn in TURNS[turns]:
        assert (ids(turn.apply(image)) == turn.apply(straight)).float().mean() > 0.999


def test_a_single_scene_of_several_processes_is_the_main_ones_and_its_error_is_that_of_all(monkeypatch) -> None:
    """The cuts of `--stability` may be single scenes where the whole image is several."""
    image, gathered, tops = MemorySource(random_image((60, 50))), [], []

    def gather(self: Ranks, value: object) -> list[object]:
        gathered.append(value)
        return [value]

    monkeypatch.setattr(Ranks, "gather", gather)
    for rank in (0, 1):
        segment_scenes(PixelPredictor(), image, lambda top, rows: tops.append(top), ranks=Ranks(rank, 2))
    assert len(tops) == len(set(tops)) > 0
    del gathered[:]

    def fail(top: int, rows: object) -> None:
        raise InputError("the disk is full")

    with pytest.raises(InputError, match="the disk is full"):
        segment_scenes(PixelPredictor(), image, fail, ranks=Ranks(0, 2))
    assert gathered == [("the disk is full", "")]
