"""Patches cover every pixel, and their cells on a feature map are what the network can crop."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from utils.errors import InputError
from utils.tiling import Axis, PatchGrid, axis_starts

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
        assert min(steps) > 0, side
        assert patch - max(steps) >= min_overlap, side
        fewer = len(starts) - 1  # would not do
        assert fewer * patch < side or fewer == 1 or patch - (side - patch) / (fewer - 1) < min_overlap, side


@pytest.mark.parametrize(("size", "patch", "min_overlap"), GRIDS)
def test_boxes_of_a_grid_cover_the_image_row_by_row_and_stay_within_it(size, patch, min_overlap) -> None:
    grid = PatchGrid.cover(size, patch, min_overlap)
    boxes = grid.boxes()
    covered = torch.zeros(size, dtype=torch.int64)
    for box in boxes:
        assert box.of(covered).shape == grid.patch
        box.of(covered).add_(1)
    assert covered.min() >= 1
    assert len(boxes) == len(grid)
    assert boxes == sorted(boxes)
    assert torch.equal(covered, torch.outer(grid.rows.counts(), grid.columns.counts()).long())


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
            assert len(boxes) == len(grid)
            assert len({box[2:] for box in boxes}) == 1
            assert boxes[0].height >= 1
            assert boxes[0].width >= 1
            assert all(box.top >= 0 and box.top + box.height <= height for box in boxes), side
            assert all(box.left >= 0 and box.left + box.width <= width for box in boxes), side


def test_feature_boxes_lie_where_their_patches_do() -> None:
    # 160 pixels on 40 cells: patches of 96 at 0 and 64 are 24 cells at 0 and 16
    grid = PatchGrid.cover((160, 96), 96, min_overlap=32)
    assert grid.feature_boxes((40, 24)) == [(0, 0, 24, 24), (16, 0, 24, 24)]
    # 508 of 2448 pixels are 26.35 cells of 127; the last patch starts at 100.6
    first, *_, last = PatchGrid.cover((2448, 2448), 508).feature_boxes((127, 127))
    assert (first, last) == ((0, 0, 26, 26), (101, 101, 26, 26))


@pytest.mark.parametrize(("size", "patch", "min_overlap"), GRIDS)
def test_shrunk_counts_equal_the_count_of_every_pixel_resized(size, patch, min_overlap) -> None:
    grid = PatchGrid.cover(size, patch, min_overlap)
    counts = torch.zeros(1, 1, *size)
    for box in grid.boxes():
        box.of(counts).add_(1)
    for target in [(127, 127), (16, 32), (1, 5)]:
        expected = F.interpolate(counts, size=target, mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(grid.shrunk_counts(target), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5, 6, 100])
def test_sub_batches_are_all_patches_in_order_none_longer_than_asked(size) -> None:
    grid = PatchGrid.cover((100, 230), 64, min_overlap=16)
    slices = list(grid.sub_batches(size))
    assert [k for s in slices for k in range(s.start, s.stop)] == list(range(len(grid)))
    assert max(s.stop - s.start for s in slices) == min(size, len(grid))
