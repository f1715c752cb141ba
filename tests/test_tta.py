"""Averaging over turned images: in evaluation, and for networks that turning does not change."""

import pytest
import torch
from builders import build_model, build_sample, build_settings
from pictures import PixelMethod, Whole, random_image

import helper
from segmenting import segment_any, segment_averaged, segment_turned
from utils.canvas import Ids
from utils.sources import Held
from utils.stages import STAGES
from utils.turns import TURNS


class PointwiseNetwork:
    """Stage 1 of a network that knows each pixel alone, and so turns with the image."""

    def read_whole(self, image, logits, context, ensemble):
        from models.glnet import WholeMaps

        cells = image[:, :, ::4, ::4] + image[:, :, 3::4, 3::4] + image[:, :, ::4, 3::4] + image[:, :, 3::4, ::4]
        return WholeMaps(torch.cat([cells, 1.5 * cells - cells.mean()], dim=1), None, None)


@pytest.mark.parametrize("turns", ["flip", "d4"])
def test_a_network_that_turns_with_the_image_gives_the_same_with_and_without(turns):
    image = random_image((128, 128))
    arguments = PointwiseNetwork(), STAGES[1], Held(image), 64, build_settings()
    found, expected = Ids((128, 128)), Ids((128, 128))
    segment_turned(*arguments, {"global": found}, TURNS[turns])
    segment_turned(*arguments, {"global": expected})
    assert (found.ids == expected.ids).float().mean() > 0.99  # shrinking rounds rows and columns in turn


@pytest.mark.parametrize("turns", ["flip", "d4"])
def test_evaluation_counts_what_averaging_predicts(turns):
    model, stage, settings = build_model(), STAGES[2], build_settings()
    sample = build_sample((70, 90))
    seen = {}
    segment = segment_averaged(TURNS[turns])
    helper.evaluate(model, stage, [[sample]], settings, lambda s, found: seen.update(found), segment=segment)
    plain = {}
    helper.evaluate(model, stage, [[sample]], settings, lambda s, found: plain.update(found))
    sinks = {name: Ids((70, 90)) for name in stage.predictions}
    segment_turned(model, stage, Held(sample.image), 64, settings, sinks, TURNS[turns])
    for name, sink in sinks.items():
        assert (seen[name] == sink.ids).float().mean() > 0.999
        assert 0.1 < (seen[name] == plain[name]).float().mean() < 1


def test_without_turns_evaluation_is_the_plain_one():
    assert segment_averaged(TURNS["none"]) is helper.segment


def test_scores_of_pixels_are_the_same_in_scenes_of_any_size():
    image, results = random_image((90, 130)), []
    for scene_size in (64, 100, 5000):
        found = Whole()
        segment_any(PixelMethod(scene_size=scene_size), Held(image), found)
        results.append(found.ids)
    assert all((one == results[-1]).float().mean() > 0.999 for one in results)
