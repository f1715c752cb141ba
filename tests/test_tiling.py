"""Patches cover every pixel; boxes around what is found, and uncertain patches: what they cover, and in which order."""

import itertools
import math

import builders
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import SIDE, build_sample, build_settings, segment_scores, shared_model
from test_sharing import maps, merge, random_pyramid

from engine.patches import ImagePatches
from imaging.sources import MemorySource
from utils.classes import Classes
from utils.errors import InputError
from utils.selection import CoarseToFine, UncertainPatches
from utils.settings import TrainingSettings
from utils.tiling import Axis, Box, PatchGrid, PatchSubset, RegionGrids, axis_starts
from utils.turns import TURNS

PATCHES = [(1, 0), (33, 32), (64, 0), (64, 16), (100, 50), (252, 50), (508, 50), (509, 100)]  # and least overlap
SIDES = [*range(1, 400, 3), *range(400, 3000, 37), 2448, 5000, 10007]
GRIDS = [((2448, 2448), 508, 50), ((100, 230), 64, 16), ((300, 60), 64, 16), ((7, 5), 64, 16), ((1, 999), 100, 50)]
MAPS = [1, 2, 3, 4, 7, 16, 26, 31, 32, 63, 64, 127, 128]


def long_axes(patch: int, min_overlap: int) -> list[int]:
    """Sides longer than the patch that do not take thousands of patches."""
    return [side for side in SIDES if patch < side <= 40 * (patch - min_overlap)]


@pytest.mark.parametrize(("patch", "min_overlap"), PATCHES)
def test_as_few_patches_as_can_cover_every_pixel_with_the_minimum_overlap(patch, min_overlap) -> None:
    for side in long_axes(patch, min_overlap):
        starts = axis_starts(side, patch, min_overlap)
        assert (starts[0], starts[-1]) == (0, side - patch)
        steps = [after - before for before, after in itertools.pairwise(starts)]
        assert min(steps) > 0 and patch - max(steps) >= min_overlap, side
        fewer = len(starts) - 1  # would not do
        assert fewer * patch < side or fewer == 1 or patch - (side - patch) / (fewer - 1) < min_overlap, side


@pytest.mark.parametrize(("size", "patch", "min_overlap"), GRIDS)
def test_boxes_of_a_grid_cover_the_image_row_by_row_and_their_counts_shrink_as_those_of_pixels(
    size, patch, min_overlap
) -> None:
    grid, covered = PatchGrid.cover(size, patch, min_overlap), torch.zeros(size)
    boxes = grid.boxes()
    for box in boxes:
        assert box.of(covered).shape == grid.patch
        box.of(covered).add_(1)
    assert covered.min() >= 1
    assert len(boxes) == len(grid) and boxes == sorted(boxes)
    assert torch.equal(covered, torch.outer(grid.rows.counts(), grid.columns.counts()).float())
    for target in [(127, 127), (16, 32), (1, 5)]:
        expected = F.interpolate(covered[None, None], size=target, mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(grid.shrunk_counts(target), expected, rtol=1e-6, atol=1e-6)


def test_a_patch_not_larger_than_the_overlap_is_refused_on_longer_sides_only() -> None:
    """A side that is not longer than the patch gets one patch as long as the image."""
    for side, patch in ((1, 64), (63, 64), (64, 64), (30, 32), (50, 50), (1, 1)):
        axis = Axis.cover(side, patch, min_overlap=50)
        assert (axis.starts, axis.patch) == ((0,), side)
    for patch in (30, 50):
        with pytest.raises(InputError, match=f"size_p={patch} .*min_overlap=50"):
            axis_starts(patch + 1, patch, min_overlap=50)
    assert len(PatchGrid.cover((2448, 2448), 508)) == 36  # as published
    assert len(PatchGrid.cover((5000, 5000), 536)) == 121


@pytest.mark.parametrize(("patch", "min_overlap"), PATCHES)
def test_feature_boxes_are_never_empty_all_of_one_size_and_within_the_map(patch, min_overlap) -> None:
    for side in [*long_axes(patch, min_overlap)[::5], patch, max(1, patch // 2)]:
        grid = PatchGrid.cover((side, max(1, side // 3)), patch, min_overlap)
        for height, width in zip(MAPS, reversed(MAPS), strict=True):
            boxes = grid.feature_boxes((height, width))
            assert len(boxes) == len(grid) and len({box[2:] for box in boxes}) == 1
            assert boxes[0].height >= 1 and boxes[0].width >= 1
            assert all(box.top >= 0 and box.top + box.height <= height for box in boxes), side
            assert all(box.left >= 0 and box.left + box.width <= width for box in boxes), side


def test_feature_boxes_lie_where_their_patches_do() -> None:
    # 160 pixels on 40 cells: patches of 96 at 0 and 64 are 24 cells at 0 and 16
    grid = PatchGrid.cover((160, 96), 96, min_overlap=32)
    assert grid.feature_boxes((40, 24)) == [(0, 0, 24, 24), (16, 0, 24, 24)]
    # 508 of 2448 pixels are 26.35 cells of 127; the last patch starts at 100.6
    first, *_, last = PatchGrid.cover((2448, 2448), 508).feature_boxes((127, 127))
    assert (first, last) == ((0, 0, 26, 26), (101, 101, 26, 26))


def test_sub_batches_are_all_patches_in_order_none_longer_than_asked() -> None:
    grid = PatchGrid.cover((100, 230), 64, min_overlap=16)
    for size in (1, 2, 5, 6, 100):
        slices = list(grid.sub_batches(size))
        assert [k for s in slices for k in range(s.start, s.stop)] == list(range(len(grid)))
        assert max(s.stop - s.start for s in slices) == min(size, len(grid))


SIZE = (400, 800)  # of the image
CELLS = (100, 200)  # of the mask: 4 pixels each
PATCH, OVERLAP = 64, 16
FOCUS = CoarseToFine(foreground=1, margin=0.1)

BOXES = {  # first and last rows and columns of parts, in cells; the boxes in pixels
    "nothing": ([], []),
    "in the middle": ([(50, 75, 100, 150)], [(190, 380, 120, 240)]),
    "a cell in the middle": ([(50, 51, 100, 101)], [(170, 370, 64, 64)]),
    "a cell in the first corner": ([(0, 1, 0, 1)], [(0, 0, 64, 64)]),
    "a cell in the last corner": ([(99, 100, 199, 200)], [(336, 736, 64, 64)]),
    "along an edge": ([(0, 100, 190, 200)], [(0, 736, 400, 64)]),
    "everything": ([(0, 100, 0, 200)], [(0, 0, 400, 800)]),
    "with its margin everything": ([(5, 95, 10, 190)], [(0, 0, 400, 800)]),
    "far apart": ([(0, 10, 0, 10), (90, 100, 180, 190)], [(0, 0, 64, 64), (336, 708, 64, 64)]),
    "near each other": ([(50, 54, 100, 104), (60, 64, 110, 114)], [(194, 394, 68, 68)]),
    "joined by a third": ([(40, 44, 20, 24), (40, 44, 44, 48), (40, 44, 32, 36)], [(136, 69, 64, 134)]),
}


def test_boxes_are_around_objects_and_clamped_to_the_image() -> None:
    for name, (parts, boxes) in BOXES.items():
        mask = torch.zeros(CELLS, dtype=torch.bool)
        for top, bottom, left, right in parts:
            mask[top:bottom, left:right] = True
        grids = FOCUS.grids(mask, SIZE, PATCH, OVERLAP)
        assert grids.regions == boxes, name
        assert len(grids) == sum(len(PatchGrid.cover(box[2:], PATCH, OVERLAP)) for box in boxes), name


@pytest.mark.parametrize("size", [(300, 700), (1000, 90), (40, 50), (20, 2000), (1, 1)])
def test_boxes_hold_every_cell_do_not_overlap_and_take_no_more_patches_than_one(size) -> None:
    several = 0
    for seed in range(40):
        rng, mask = np.random.default_rng(seed), torch.zeros(31, 37, dtype=torch.bool)
        for _ in range(rng.integers(1, 6)):
            top, left = rng.integers(0, 31), rng.integers(0, 37)
            mask[top : top + rng.integers(1, 6), left : left + rng.integers(1, 6)] = True
        grids = FOCUS.grids(mask, size, PATCH, OVERLAP)
        found = torch.zeros(size, dtype=torch.int64)
        for region in grids.regions:
            assert all(length >= min(PATCH, side) for length, side in zip(region[2:], size, strict=True))
            assert region.of(found).shape == region[2:]
            region.of(found).add_(1)
        assert found.max() == 1
        for cell in mask.nonzero().tolist():
            axes = zip(cell, size, mask.shape, strict=True)
            rows, columns = (slice(k * side // cells, -(-(k + 1) * side // cells)) for k, side, cells in axes)
            assert found[rows, columns].min() == 1
        rows, columns = found.nonzero().amin(0).tolist(), found.nonzero().amax(0).tolist()
        around = Box(*rows, columns[0] + 1 - rows[0], columns[1] + 1 - rows[1])
        assert len(grids) <= len(RegionGrids.cover(size, [around], PATCH, OVERLAP))
        several += len(grids.regions) > 1
    assert several == 0 if max(size) < 2 * PATCH else several > 5


def test_labels_are_asked_where_too_little_of_them_is_covered() -> None:
    label = torch.zeros(SIZE, dtype=torch.uint8)
    label[:64, :64] = 1
    label[300:310, 700:764] = 1
    label[200:] *= 255  # ignored: counts nowhere
    label[100:110, 0:64] = 1
    grids = RegionGrids.cover(SIZE, [Box(0, 0, 64, 64)], PATCH, OVERLAP)
    share = 64 / 74
    assert CoarseToFine(1, recall=share - 1e-3).covers(grids, label)
    assert not CoarseToFine(1, recall=share + 1e-3).covers(grids, label)
    for asked, value in ((label, False), (torch.zeros_like(label), True)):
        assert CoarseToFine(1).covers(RegionGrids(SIZE, ()), asked) == value
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
    assert boxes == sorted(boxes) and len(boxes) == len(grids) == 3 + 4 + 1
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


def grid_of(size: tuple[int, int]) -> PatchGrid:
    return PatchGrid.cover(size, SIDE, builders.MIN_OVERLAP)


def selecting(share: float) -> TrainingSettings:
    return build_settings(selection=UncertainPatches(share))


@pytest.mark.parametrize("mode", [2, 3])
@pytest.mark.parametrize("size", [(100, 150), (64, 64), (300, 70)])
def test_all_patches_are_plain_glnet_bit_for_bit_and_no_patch_is_the_global_branch_s_prediction(mode, size) -> None:
    model, sample = shared_model(), build_sample(size)
    for means in (False, True):
        expected = segment_scores(model, mode, sample, build_settings(), means=means)
        found = segment_scores(model, mode, sample, selecting(1.0), means=means)
        for name, scores in expected.items():
            assert torch.equal(found[name], scores), name
    alone = segment_scores(model, 1, sample, build_settings())["global"]
    for scores in segment_scores(model, mode, sample, selecting(0.0)).values():
        torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [2, 3])
def test_pixels_without_a_patch_have_the_global_prediction_and_the_others_do_not(mode) -> None:
    model, sample = shared_model(), build_sample((300, 200))
    plain, settings = segment_scores(model, 1, sample, build_settings())["global"], selecting(0.4)
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
        found = UncertainPatches(share).patches(logits, size, SIDE, builders.MIN_OVERLAP)
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
    sample, sinks = build_sample((300, 200)), {"ensemble": builders.Scores((300, 200))}
    predictor = builders.build_predictor(shared_model(), 2, selecting(0.25), TURNS[turns])
    found = predictor.segment(MemorySource(sample.image), sinks)
    patches, times = len(grid_of((300, 200))), len(TURNS[turns])
    assert (found.patches, found.computed) == (patches * times, -(-patches // 4) * times)
    assert 0 < found.pixels_not_covered < 1
    assert sinks["ensemble"].whole().isfinite().all()
