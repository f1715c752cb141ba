"""Boxes around what is found, and uncertain patches: what they cover, in which order, and what is left outside."""

import math

import numpy as np
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
from test_sharing import maps, merge, random_pyramid

from engine.patches import ImagePatches
from imaging.sources import MemorySource
from utils.classes import Classes
from utils.errors import InputError
from utils.selection import CoarseToFine, UncertainPatches
from utils.tiling import Box, PatchGrid, PatchSubset, RegionGrids
from utils.turns import TURNS

SIZE = (400, 800)  # of the image
CELLS = (100, 200)  # of the mask: 4 pixels each
PATCH, OVERLAP = 64, 16
FOCUS = CoarseToFine(foreground=1, margin=0.1)

BOXES = {  # rows and columns of cells; the boxes in pixels
    "nothing": ([], []),
    "in the middle": ([(slice(50, 75), slice(100, 150))], [(190, 380, 120, 240)]),
    "a cell in the middle": ([(slice(50, 51), slice(100, 101))], [(170, 370, 64, 64)]),
    "a cell in the first corner": ([(slice(0, 1), slice(0, 1))], [(0, 0, 64, 64)]),
    "a cell in the last corner": ([(slice(99, 100), slice(199, 200))], [(336, 736, 64, 64)]),
    "along an edge": ([(slice(0, 100), slice(190, 200))], [(0, 736, 400, 64)]),
    "everything": ([(slice(0, 100), slice(0, 200))], [(0, 0, 400, 800)]),
    "with its margin everything": ([(slice(5, 95), slice(10, 190))], [(0, 0, 400, 800)]),
    "far apart": (
        [(slice(0, 10), slice(0, 10)), (slice(90, 100), slice(180, 190))],
        [(0, 0, 64, 64), (336, 708, 64, 64)],
    ),
    "near each other": (
        [(slice(50, 54), slice(100, 104)), (slice(60, 64), slice(110, 114))],
        [(194, 394, 68, 68)],
    ),
    "joined by a third": (
        [(slice(40, 44), slice(20, 24)), (slice(40, 44), slice(44, 48)), (slice(40, 44), slice(32, 36))],
        [(136, 69, 64, 134)],
    ),
}


def mask_of(parts: list) -> torch.Tensor:
    mask = torch.zeros(CELLS, dtype=torch.bool)
    for part in parts:
        mask[part] = True
    return mask


@pytest.mark.parametrize("name", BOXES)
def test_boxes_are_around_objects_and_clamped_to_the_image(name) -> None:
    parts, boxes = BOXES[name]
    grids = FOCUS.grids(mask_of(parts), SIZE, PATCH, OVERLAP)
    assert grids.regions == boxes
    assert len(grids) == sum(len(PatchGrid.cover(box[2:], PATCH, OVERLAP)) for box in boxes)


def random_mask(seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    mask = torch.zeros(31, 37, dtype=torch.bool)
    for _ in range(rng.integers(1, 6)):
        top, left = rng.integers(0, 31), rng.integers(0, 37)
        mask[top : top + rng.integers(1, 6), left : left + rng.integers(1, 6)] = True
    return mask


@pytest.mark.parametrize("size", [(300, 700), (1000, 90), (40, 50), (20, 2000), (1, 1)])
def test_boxes_hold_every_cell_do_not_overlap_and_take_no_more_patches_than_one(size) -> None:
    several = 0
    for seed in range(40):
        mask = random_mask(seed)
        grids = FOCUS.grids(mask, size, PATCH, OVERLAP)
        found = torch.zeros(size, dtype=torch.int64)
        for region in grids.regions:
            assert all(length >= min(PATCH, side) for length, side in zip(region[2:], size, strict=True))
            assert region.of(found).shape == region[2:]
            region.of(found).add_(1)
        assert found.max() == 1
        for i, j in mask.nonzero().tolist():
            (top, bottom), (left, right) = (
                (k * side // cells, -(-(k + 1) * side // cells))
                for k, side, cells in ((i, size[0], 31), (j, size[1], 37))
            )
            assert found[top:bottom, left:right].min() == 1
        rows, columns = found.nonzero().amin(0).tolist(), found.nonzero().amax(0).tolist()
        around = Box(*rows, columns[0] + 1 - rows[0], columns[1] + 1 - rows[1])
        assert len(grids) <= len(RegionGrids.cover(size, [around], PATCH, OVERLAP))
        several += len(grids.regions) > 1
    assert several == 0 if max(size) < 2 * PATCH else several > 5


def test_labels_are_asked_where_too_little_of_them_is_covered() -> None:
    label = torch.zeros(SIZE, dtype=torch.uint8)
    label[:64, :64] = 1
    label[300:310, 700:764] = 1
    label[200:] += label[200:] * 254  # ignored: counts nowhere
    label[100:110, 0:64] = 1
    grids = RegionGrids.cover(SIZE, [Box(0, 0, 64, 64)], PATCH, OVERLAP)
    share = 64 / 74
    assert CoarseToFine(1, recall=share - 1e-3).covers(grids, label)
    assert not CoarseToFine(1, recall=share + 1e-3).covers(grids, label)
    nothing = torch.zeros_like(label)
    assert CoarseToFine(1).covers(RegionGrids(SIZE, ()), nothing)
    assert not CoarseToFine(1).covers(RegionGrids(SIZE, ()), label)
    label = torch.zeros(333, 517, dtype=torch.uint8)
    assert not FOCUS.labelled(label, (16, 16)).any()
    label[200, 300] = 1  # a single pixel of a label is a cell
    mask = FOCUS.labelled(label, (16, 16))
    assert mask.nonzero().tolist() == [[9, 9]]
    assert FOCUS.grids(mask, (333, 517), PATCH, OVERLAP).regions[0].of(label).sum() == 1
    names, palette = ("skin", "lesion"), ((0, 0, 0), (255, 255, 255))
    assert CoarseToFine.of(Classes(names, palette, foreground=(0,))).background == 1
    for classes in (Classes.generic(2), Classes.generic(7), Classes(names, palette, foreground=(0, 1))):
        with pytest.raises(InputError, match=f"--coarse_to_fine .* {len(classes)} classes"):
            CoarseToFine.of(classes)


@pytest.mark.parametrize("size", [(100, 230), (64, 64), (30, 200), (2448, 2448)])
def test_one_region_that_is_the_image_gives_its_grid_bit_by_bit(size) -> None:
    patch = 508 if size[0] == 2448 else PATCH
    plain = PatchGrid.cover(size, patch, OVERLAP)
    grids = RegionGrids.cover(size, [Box(0, 0, *size)], patch, OVERLAP)
    assert (len(grids), grids.image, grids.patch) == (len(plain), plain.image, plain.patch)
    assert (grids.boxes(), grids.regions) == (plain.boxes(), [plain.region])
    for cells in [(127, 127), (16, 31), (3, 1)]:
        assert grids.feature_boxes(cells) == plain.feature_boxes(cells)
        assert torch.equal(grids.shrunk_counts(cells), plain.shrunk_counts(cells))
    assert torch.equal(grids.counts(0, size[0]), plain.counts(0, size[0]))


def test_patches_of_several_regions_come_from_top_to_bottom_with_the_cells_of_the_whole_image() -> None:
    regions = [Box(0, 600, 130, 64), Box(30, 10, 64, 200), Box(300, 100, 64, 64)]
    grids = RegionGrids.cover(SIZE, regions, PATCH, OVERLAP)
    boxes, covered = grids.boxes(), torch.zeros(SIZE)
    assert boxes == sorted(boxes)
    assert len(boxes) == len(grids) == 3 + 4 + 1
    for box in boxes:
        box.of(covered).add_(1)
    assert torch.equal(torch.cat([grids.counts(0, 100), grids.counts(100, 300)]), covered)
    for region in regions:
        assert region.of(covered).min() == 1
        region.of(covered).zero_()
    assert covered.max() == 0
    for box, cells in zip(boxes, grids.feature_boxes(CELLS), strict=True):
        assert tuple(cells) == tuple(round(pixels / 4) for pixels in box)


def test_merged_maps_are_the_whole_ones_inside_and_zero_outside() -> None:
    size = (256, 320)
    regions = [Box(32, 64, 160, 64), Box(192, 192, 64, 128)]  # begin and end between cells on every level
    frame = random_pyramid(size)
    merged = merge(RegionGrids.cover(size, regions, 96, 32), frame, 2)
    for found, whole in zip(maps(merged), maps(frame), strict=True):
        expected, scale = torch.zeros_like(whole), size[0] // whole.shape[-2]
        for region in regions:
            cells = Box(*(pixels // scale for pixels in region))
            cells.of(expected).copy_(cells.of(whole))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gap", [0, 1, 9, 40])
def test_regions_that_share_cells_do_not_add_up(gap) -> None:
    size = (203, 307)
    regions = [Box(5, 7, 70, 90), Box(70 + gap, 97 + gap, 64, 71)]
    ones = random_pyramid(size).map(torch.ones_like)
    for x in maps(merge(RegionGrids.cover(size, regions, PATCH, OVERLAP), ones, 3)):
        assert x.min() == 0 or x.shape[-1] < 16
        assert x.max() <= 2  # as where patches of one region share a cell
        assert (x == 1).sum() > 0


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
