"""Uncertain patches: all of them are plain GLNet, none the global prediction; the least certain come first."""

import math

import pytest
import torch
from builders import (
    MIN_OVERLAP,
    SIDE,
    Scores,
    build_predictor,
    build_sample,
    build_settings,
    segment_scores,
    shared_model,
)

from engine.patches import ImagePatches
from imaging.sources import MemorySource
from utils.selection import UncertainPatches
from utils.tiling import PatchGrid, PatchSubset
from utils.turns import TURNS

SIZES = [(100, 150), (64, 64), (300, 70)]


def grid_of(size: tuple[int, int]) -> PatchGrid:
    return PatchGrid.cover(size, SIDE, MIN_OVERLAP)


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("mode", [2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_all_patches_are_plain_glnet_bit_for_bit(mode, size, means) -> None:
    model, sample = shared_model(), build_sample(size)
    expected = segment_scores(model, mode, sample, build_settings(), means=means)
    found = segment_scores(model, mode, sample, build_settings(selection=UncertainPatches(1.0)), means=means)
    for name, scores in expected.items():
        assert torch.equal(found[name], scores), name


@pytest.mark.parametrize("mode", [2, 3])
def test_no_patch_is_the_global_branch_s_prediction(mode) -> None:
    model, sample = shared_model(), build_sample((100, 150))
    expected = segment_scores(model, 1, sample, build_settings())["global"]
    for scores in segment_scores(model, mode, sample, build_settings(selection=UncertainPatches(0.0))).values():
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [2, 3])
def test_pixels_without_a_patch_have_the_global_prediction_and_the_others_do_not(mode) -> None:
    model, sample = shared_model(), build_sample((300, 200))
    plain = segment_scores(model, 1, sample, build_settings())["global"]
    settings = build_settings(selection=UncertainPatches(0.4))
    patches = ImagePatches(MemorySource(sample.image), settings)
    logits = model.eval()(settings.to_input(sample.global_image[None]), mode=1).global_.detach()
    patches.select_patches(logits)
    covered = patches.grid.counts(0, 300) > 0
    assert 0.2 < covered.float().mean() < 0.8
    for means in (False, True):
        found = segment_scores(model, mode, sample, settings, means=means)
        for name in ("local", "ensemble"):
            torch.testing.assert_close(found[name][:, ~covered], plain[:, ~covered], rtol=1e-4, atol=1e-4)
            assert (found[name] - plain).abs().amax(0)[covered].gt(1e-2).float().mean() > 0.9


def test_the_least_certain_patches_are_selected() -> None:
    """The global prediction is sure but for one corner, and least sure in the middle of that."""
    size, grid = (300, 300), grid_of((300, 300))
    logits = torch.zeros(1, 3, 60, 60)
    logits[0, 1] = 9.0
    logits[0, 2, 30:, 30:] = torch.linspace(0, 8.9, 30)
    for share in (0.01, 0.1, 0.25, 0.5):
        found = UncertainPatches(share).patches(logits, size, SIDE, MIN_OVERLAP)
        assert len(found) == math.ceil(share * len(grid))
        margin = (logits[0].softmax(0).topk(2, dim=0).values * torch.tensor([1.0, -1.0]).view(2, 1, 1)).sum(0)
        means = [float(box.of(margin).mean()) for box in grid.feature_boxes((60, 60))]
        selected = {grid.boxes().index(box) for box in found.boxes()}
        assert max(means[k] for k in selected) <= min(means[k] for k in range(len(grid)) if k not in selected) + 1e-6


def test_a_subset_counts_what_it_covers() -> None:
    grid = grid_of((200, 170))
    subset = PatchSubset(grid, (0, 3, 4, len(grid) - 1))
    expected = torch.zeros(200, 170)
    for box in subset.boxes():
        box.of(expected).add_(1)
    assert torch.equal(torch.cat([subset.counts(top, 50) for top in range(0, 200, 50)]), expected)
    assert subset.covered_pixels() == int((expected > 0).sum())
    assert subset.feature_boxes((50, 40)) == [grid.feature_boxes((50, 40))[k] for k in subset.kept]
    everything = PatchSubset(grid, tuple(range(len(grid))))
    for size in ((50, 43), (7, 6)):
        assert torch.equal(everything.shrunk_counts(size), grid.shrunk_counts(size))
        assert (subset.shrunk_counts(size) > 0).all()


@pytest.mark.parametrize("turns", ["none", "flip"])
def test_coverage_says_what_was_not_computed(turns) -> None:
    sample, settings = build_sample((300, 200)), build_settings(selection=UncertainPatches(0.25))
    predictor = build_predictor(shared_model(), 2, settings, TURNS[turns])
    sinks = {"ensemble": Scores((300, 200))}
    found = predictor.segment(MemorySource(sample.image), sinks)
    patches = len(grid_of((300, 200)))
    assert found.patches == patches * len(TURNS[turns])
    assert found.computed == -(-patches // 4) * len(TURNS[turns])
    assert 0 < found.pixels_not_covered < 1
    assert sinks["ensemble"].whole().isfinite().all()
