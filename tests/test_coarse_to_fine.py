"""Coarse to fine: plain GLNet where the box is the whole image, background outside, training that never stumbles."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from builders import (
    MIN_OVERLAP,
    SIDE,
    Scores,
    build_model,
    build_predictor,
    build_sample,
    build_settings,
    gradients,
    learning_model,
    segment_scores,
    shared_model,
    train_epoch,
)
from test_distributed import together
from torch import Tensor

from dataset.base import Sample
from engine.patches import ImagePatches, TrainingPatches
from evaluation.run import evaluate_images
from helper import TRAINING_STEPS, EpochState
from imaging.sources import MemorySource
from models.glnet import GLNet
from utils.classes import IGNORED
from utils.distributed import ALONE, Ranks
from utils.metrics import StageMetrics
from utils.resize import shrink_label
from utils.selection import OUTSIDE, CoarseToFine
from utils.settings import Settings
from utils.stages import STAGES
from utils.tiling import Box, PatchGrid
from utils.turns import TURNS

FOCUS = CoarseToFine(foreground=1)
PLAIN = build_settings()
COARSE_TO_FINE = build_settings(selection=FOCUS)


def build_binary(everywhere: float, learning: int = 0) -> GLNet:
    """A network of two classes whose global branch finds `everywhere` (large: foreground, negative: background)."""
    model = learning_model(learning, 2) if learning else build_model(2)
    with torch.no_grad():
        model.global_.head.bias.data += torch.tensor([-everywhere, everywhere])
    return model


class Given(CoarseToFine):
    """The global branch is taken to find what is true of this mask, whatever it finds."""

    mask: Tensor

    def predicted(self, logits: Tensor) -> Tensor:
        return self.mask


def told(size: tuple[int, int], *boxes: Box) -> Settings:
    """Settings under which the objects of an image of `size` are found to be `boxes`, in pixels."""
    focus, mask = Given(1, margin=0.0), torch.zeros(size, dtype=torch.bool)
    for box in boxes:
        box.of(mask).fill_(True)
    object.__setattr__(focus, "mask", mask)
    return replace(PLAIN, selection=focus)


def labelled(size: tuple[int, int], *boxes: Box, seed: int = 0) -> Sample:
    """A random image whose label has foreground in `boxes`, and some pixels that are left out."""
    sample = build_sample(size, seed, str(seed))
    label = torch.where(sample.label == IGNORED, sample.label, 0)
    for box in boxes:
        box.of(label).fill_(1)
    return sample._replace(label=label, global_label=shrink_label(label, (SIDE // 4,) * 2))


def scores(model: GLNet, mode: int, sample: Sample, settings: Settings, means: bool = False) -> dict[str, Tensor]:
    return segment_scores(model, mode, sample, settings, means=means)


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("mode", [1, 2, 3])
def test_a_box_that_is_the_whole_image_gives_plain_glnet_bit_by_bit(mode, means) -> None:
    model, sample = build_binary(100.0), build_sample((100, 150))
    expected = scores(model, mode, sample, PLAIN, means)
    found = scores(model, mode, sample, COARSE_TO_FINE, means)
    for name, plain in expected.items():
        assert torch.equal(found[name], plain), name


@pytest.mark.parametrize("mode", [2, 3])
def test_where_nothing_is_found_every_prediction_is_the_coarse_one(mode) -> None:
    model, sample = build_binary(-100.0), build_sample((100, 150))
    coarse = scores(model, 1, sample, PLAIN)["global"]
    for found in scores(model, mode, sample, COARSE_TO_FINE).values():
        assert torch.equal(found, coarse)


@pytest.mark.parametrize("mode", [2, 3])
@pytest.mark.parametrize("size", [(300, 170), (50, 260)])
def test_outside_the_boxes_is_background(mode, size) -> None:
    sample = build_sample(size)
    boxes = [Box(0, 0, min(64, size[0]), 64), Box(0, size[1] - 64, min(64, size[0]), 64)]
    settings = told(size, *boxes)
    for means in (False, True):
        found = scores(shared_model(2), mode, sample, settings, means)
        inside = torch.zeros(size, dtype=torch.bool)
        for box in boxes:
            box.of(inside).fill_(True)
        for name in ("local", "ensemble"):
            assert found[name][:, ~inside].unique(dim=1).tolist() == [[OUTSIDE], [0]]
            assert found[name][:, inside].unique(dim=1).shape[1] > 10
        assert found["global"].isfinite().all()


def test_inside_a_box_is_what_its_patches_give() -> None:
    size = (210, 330)
    boxes = [Box(10, 20, 64, 64), Box(30, 250, 64, 64), Box(140, 100, 64, 64)]
    model, sample = shared_model(2), build_sample(size)
    found = scores(model, 2, sample, told(size, *boxes))
    with torch.inference_mode():
        for box in boxes:
            grid = PatchGrid.cover(size, SIDE, MIN_OVERLAP, box)
            x = PLAIN.to_input(box.of(sample.image)[None])
            alone = model(PLAIN.to_input(sample.global_image[None]), x, grid, mode=2)
            for name, logits in (("local", alone.local), ("ensemble", alone.ensemble)):
                expected = F.interpolate(logits, size=(64, 64), mode="nearest")[0]
                torch.testing.assert_close(box.of(found[name]), expected, rtol=1e-4, atol=1e-4)


def test_coverage_is_counted_over_images_and_turns() -> None:
    size = (200, 200)
    settings = told(size, Box(0, 0, 64, 64), Box(150, 150, 20, 20))
    model, sample = shared_model(2), build_sample(size)
    predictor = build_predictor(model, 2, settings)
    found = evaluate_images(predictor, [[sample, sample]], StageMetrics(STAGES[2], 2)).coverage
    grid = PatchGrid.cover(size, SIDE, MIN_OVERLAP)
    assert found.pixels_not_covered == pytest.approx(1 - 2 * 64 * 64 / 40000)
    assert found.patches_not_computed == pytest.approx(1 - 2 / len(grid))
    sinks = {"ensemble": Scores(size)}
    turned = build_predictor(model, 2, settings, TURNS["flip"]).segment(MemorySource(sample.image), sinks)
    assert (turned.pixels, turned.computed) == (2 * 40000, 4)
    assert sinks["ensemble"].whole().isfinite().all()
    plain = evaluate_images(build_predictor(model, 2, PLAIN), [[sample]], StageMetrics(STAGES[2], 2)).coverage
    assert (plain.pixels_not_covered, plain.patches_not_computed) == (0, 0)


@pytest.mark.parametrize("mode", [2, 3])
def test_training_with_the_whole_image_as_box_is_plain_training_bit_by_bit(mode) -> None:
    batch = [labelled((100, 90), Box(10, 10, 60, 60)), labelled((64, 120), Box(0, 0, 5, 5), seed=1)]
    seen = []
    for settings in (PLAIN, COARSE_TO_FINE):
        model, metrics = build_binary(100.0, mode), StageMetrics(STAGES[mode], 2)
        terms = TRAINING_STEPS[mode](model, batch, settings, metrics)
        seen.append({**terms, **gradients(model), **dict(model.named_buffers()), **dict(enumerate(metrics.sums()))})
    assert seen[0].keys() == seen[1].keys()
    for name, tensor in seen[0].items():
        assert torch.equal(seen[1][name], tensor), name


def mixed_batch() -> list[Sample]:
    """An object in a corner; images lower and smaller than a patch; no foreground; all of it foreground."""
    return [
        labelled((300, 200), Box(250, 150, 20, 30), seed=0),
        labelled((40, 190), Box(5, 100, 10, 10), seed=1),
        labelled((30, 50), Box(3, 3, 4, 4), seed=2),
        labelled((90, 100), seed=3),
        labelled((100, 130), Box(0, 0, 100, 130), seed=4),
    ]


@pytest.mark.parametrize("mode", [2, 3])
def test_images_of_any_size_and_content_train_in_one_batch(mode) -> None:
    """The coarse prediction finds nothing: the boxes come from the labels."""
    model, batch, metrics = build_binary(-100.0, mode), mixed_batch(), StageMetrics(STAGES[mode], 2)
    terms = TRAINING_STEPS[mode](model, batch, COARSE_TO_FINE, metrics)
    known = sum(int((sample.label != IGNORED).sum()) for sample in batch)
    assert all(math.isfinite(value) and value > 0 for value in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert [int(matrix.counts.sum()) for matrix in metrics.matrices.values()] == [known] * len(metrics.matrices)


@pytest.mark.parametrize("mode", [2, 3])
def test_an_image_without_foreground_adds_no_term_of_patches(mode) -> None:
    """In mode 3 with norm layers in evaluation: in training they see the batch as one."""
    one, nothing = labelled((100, 150), Box(20, 30, 40, 40)), labelled((90, 100), seed=1)
    alone, both = (build_binary(-100.0, mode).eval() for _ in range(2))
    expected = TRAINING_STEPS[mode](alone, [one], COARSE_TO_FINE, StageMetrics(STAGES[mode], 2))
    found = TRAINING_STEPS[mode](both, [one, nothing], COARSE_TO_FINE, StageMetrics(STAGES[mode], 2))
    assert float(found["focal_ensemble"]) == pytest.approx(float(expected["focal_ensemble"]), rel=1e-4)
    torch.testing.assert_close(both.ensemble.weight.grad, alone.ensemble.weight.grad, rtol=1e-3, atol=1e-5)


def test_a_coarse_box_that_misses_too_much_of_the_label_is_replaced_by_the_label_s() -> None:
    size, there, elsewhere = (300, 64), Box(0, 0, 64, 64), Box(280, 0, 20, 40)
    logits = torch.zeros(1, 2, 16, 16)
    both = [Box(0, 0, 75, 64), Box(236, 0, 64, 64)]  # of the label, in 16 rows of 18.75 pixels
    for objects, regions in (((there,), [there]), ((there, elsewhere), both), ((), [there])):
        sample = labelled(size, *objects)
        image = TrainingPatches(sample, told(size, there))
        image.select_patches(logits)
        assert image.grid.regions == regions
    without_label = ImagePatches(MemorySource(sample.image), told(size, there))
    without_label.select_patches(logits)
    assert without_label.grid.regions == [there]


def train(batches: list[list[Sample]], mode: int, ranks: Ranks = ALONE) -> tuple[dict[str, Tensor], list[dict]]:
    """The network's state after a step for each batch, and what each step told; nothing is ever found."""
    model, progress = build_binary(-100.0, mode), EpochState(StageMetrics(STAGES[mode], 2))
    learned = [p for p in model.parameters() if p.requires_grad]
    # a large eps: else the step of a gradient near 0 is as large as any, whatever rounding makes of it
    optimizer = torch.optim.Adam(learned, lr=1e-3, weight_decay=0.1, eps=1e-3)
    seen = train_epoch(model, mode, batches, optimizer, selection=FOCUS, epoch=progress, ranks=ranks)
    assert progress.skipped == 0
    assert progress.batches == len(batches)
    return {name: x for name, x in model.state_dict().items() if "tracked" not in name}, seen


def test_a_batch_with_nothing_to_learn_from_changes_nothing() -> None:
    one, nothing = labelled((64, 90), Box(20, 30, 20, 20)), labelled((90, 70), seed=1)
    expected, _ = train([[one]], 2)
    found, seen = train([[nothing, nothing], [one], [nothing]], 2)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert [values["loss/total"] == 0 for values in seen] == [True, False, True]
    assert [values["gradient_norm"] == 0 for values in seen] == [True, False, True]


def train_together(mode: int, ranks: Ranks) -> tuple[dict[str, Tensor], list[dict]]:
    one, nothing = labelled((64, 90), Box(20, 30, 20, 20)), labelled((90, 70), seed=1)
    batches = [[nothing, nothing], [one, nothing], [nothing]]
    return train([batch[ranks.rank :: ranks.world] for batch in batches], mode, ranks)


@pytest.mark.parametrize("mode", [2, 3])
def test_processes_with_nothing_to_learn_from_keep_step(mode, tmp_path) -> None:
    (state, seen), (other, told) = together(train_together, 2, tmp_path, mode)
    assert seen == told
    assert len(seen) == 3
    for name, tensor in state.items():
        assert torch.equal(other[name], tensor), name
        assert tensor.isfinite().all()
    if mode == 2:
        expected, _ = train_together(mode, ALONE)
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-4)
