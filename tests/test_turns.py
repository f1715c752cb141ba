"""Turns of images: inverse, consistent with boxes, a group; and scores averaged over them."""

import pytest
import torch
from builders import build_model, build_predictor, build_sample, build_settings
from pictures import random_image

from engine.predictor import Predictor
from evaluation.run import evaluate_images
from imaging.sources import MemorySource, TurnedSource
from models.prepared import GlobalMaps
from utils.canvas import ArgmaxSink
from utils.metrics import StageMetrics
from utils.stages import STAGES
from utils.tiling import Box
from utils.turns import TURNS, Turn

SIZE = (13, 22)


@pytest.mark.parametrize("turn", TURNS["d4"])
def test_undo_is_the_inverse_and_a_window_of_a_turned_image_the_turned_window(turn):
    image, box = random_image(SIZE), Box(3, 5, 6, 4)
    assert torch.equal(turn.undo(turn.apply(image)), image)
    assert tuple(turn.apply(image).shape[-2:]) == turn.size(SIZE)
    assert torch.equal(TurnedSource(MemorySource(image), turn).read(box), box.of(turn.apply(image)))


def test_the_eight_turns_differ_and_turning_twice_is_one_of_them():
    image = random_image((5, 5))
    found = [turn.apply(image) for turn in TURNS["d4"]]
    for k, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[k + 1 :])
        for turn in TURNS["d4"]:
            assert any(torch.equal(turn.apply(one), other) for other in found)
    assert TURNS["flip"] == (Turn(), Turn(mirrored=True))
    assert torch.equal(TURNS["flip"][1].apply(image), image.flip(-1))


class PointwiseNetwork:
    """Stage 1 of a network that knows each pixel alone, and so turns with the image."""

    def global_maps(self, image, *, logits, context, ensemble):
        cells = image[:, :, ::4, ::4] + image[:, :, 3::4, 3::4] + image[:, :, ::4, 3::4] + image[:, :, 3::4, ::4]
        return GlobalMaps(torch.cat([cells, 1.5 * cells - cells.mean()], dim=1), None, None)


@pytest.mark.parametrize("turns", ["flip", "d4"])
def test_a_network_that_turns_with_the_image_gives_the_same_with_and_without(turns):
    image = random_image((128, 128))
    found, expected = ArgmaxSink((128, 128)), ArgmaxSink((128, 128))
    for sink, chosen in ((found, turns), (expected, "none")):
        predictor = Predictor(PointwiseNetwork(), STAGES[1], build_settings(), 64, TURNS[chosen])
        predictor.segment(MemorySource(image), {"global": sink})
    assert (found.ids == expected.ids).float().mean() > 0.99  # shrinking rounds rows and columns in turn


@pytest.mark.parametrize("turns", ["flip", "d4"])
def test_evaluation_counts_what_averaging_predicts(turns):
    model, stage = build_model(), STAGES[2]
    sample = build_sample((70, 90))
    averaging, plain = (build_predictor(model, 2, build_settings(), TURNS[name]) for name in (turns, "none"))
    seen, straight = {}, {}
    for predictor, found in ((averaging, seen), (plain, straight)):
        metrics = StageMetrics(stage, model.n_class)
        evaluate_images(predictor, [[sample]], metrics, on_image=lambda s, ids, found=found: found.update(ids))
    sinks = {name: ArgmaxSink((70, 90)) for name in stage.predictions}
    averaging.segment(MemorySource(sample.image), sinks)
    for name, sink in sinks.items():
        assert (seen[name] == sink.ids).float().mean() > 0.999
        assert 0.1 < (seen[name] == straight[name]).float().mean() < 1


def test_without_turns_the_shrunk_image_at_hand_is_used():
    sample = build_sample((70, 90))
    predictor = build_predictor(build_model(), 1, build_settings())
    found = [ArgmaxSink((70, 90)) for _ in range(3)]
    other = sample.global_image.flip(-1)
    for sink, shrunk in zip(found, (None, sample.global_image, other), strict=True):
        predictor.segment(MemorySource(sample.image), {"global": sink}, global_image=shrunk)
    assert torch.equal(found[0].ids, found[1].ids)
    assert not torch.equal(found[0].ids, found[2].ids)
