"""Maps that branches exchange: cutting and merging are inverse, and patches add up to the image's scores."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.pyramid import Pyramid
from models.sharing import Mosaic, crop_global, crop_pyramid
from utils.tiling import PatchGrid

EXACT = {  # geometries whose patches begin and end between cells on every level
    "one patch": ((96, 128), 160, 0),
    "side by side": ((128, 192), 64, 0),
    "overlapping": ((160, 224), 96, 32),
    "overlapping in one row": ((64, 160), 96, 32),
}
INEXACT = ((100, 230), 64, 16)


def random_pyramid(image: tuple[int, int], seed: int = 0) -> Pyramid:
    """Maps of 2 channels at 1/32, 1/16, 1/8, 1/4 of `image`, sides rounded up."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [tuple(-(-side // scale) for side in image) for scale in (32, 16, 8, 4)]
    return Pyramid(*(tuple(torch.randn(1, 2, *size, generator=generator) for size in sizes) for _ in range(4)))


def merge(grid: PatchGrid, frame: Pyramid, sub_batch: int, zoom: int = 1) -> Pyramid:
    """The mosaic of all crops of `frame`, each cell repeated `zoom` times per axis."""
    mosaic = Mosaic(1, frame)
    for patches in grid.sub_batches(sub_batch):
        crops = crop_pyramid(frame, grid, patches)
        enlarged = crops.map(lambda x: F.interpolate(x, scale_factor=zoom, mode="nearest"))
        enlarged.visit(partial(mosaic.add, 0, grid, patches))
    return mosaic.merged()


def maps(pyramid: Pyramid) -> list[Tensor]:
    return [x for level in pyramid.levels for x in level]


@pytest.mark.parametrize("zoom", [1, 2])
@pytest.mark.parametrize("geometry", EXACT)
def test_merging_what_was_cut_gives_the_map_back_where_counts_are_exact(geometry, zoom) -> None:
    size, patch, min_overlap = EXACT[geometry]
    grid, frame = PatchGrid.cover(size, patch, min_overlap), random_pyramid(size)
    for merged, whole in zip(maps(merge(grid, frame, 3, zoom)), maps(frame), strict=True):
        torch.testing.assert_close(merged, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sub_batch", [1, 3, 100])
def test_sub_batches_do_not_change_what_is_merged(sub_batch) -> None:
    grid, frame = PatchGrid.cover(*INEXACT), random_pyramid(INEXACT[0])
    for merged, expected in zip(
        maps(merge(grid, frame, sub_batch)), maps(merge(grid, frame, len(grid) - 1)), strict=True
    ):
        assert torch.equal(merged, expected)


def test_the_memory_layout_does_not_change_what_is_merged() -> None:
    grid, frame = PatchGrid.cover(*INEXACT), random_pyramid(INEXACT[0])
    channels_last = frame.map(lambda x: x.contiguous(memory_format=torch.channels_last))
    for found, expected in zip(maps(merge(grid, channels_last, 3)), maps(merge(grid, frame, 3)), strict=True):
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_crop_is_what_its_box_covers() -> None:
    grid = PatchGrid.cover((160, 224), 96, min_overlap=32)
    x = random_pyramid((160, 224)).c[3]  # 40 x 56 cells, patches every 16
    crops = crop_global(x, grid, slice(2, 5))
    expected = [x[0, :, 0:24, 32:56], x[0, :, 16:40, 0:24], x[0, :, 16:40, 16:40]]
    assert torch.equal(crops, torch.stack(expected))


def test_merged_ones_differ_from_one_as_in_the_released_counts() -> None:
    grid = PatchGrid.cover((2448, 2448), 508)
    ones = random_pyramid((508, 508)).map(torch.ones_like)
    mosaic = Mosaic(1, ones)
    for patches in grid.sub_batches(6):
        patch_ones = ones.map(lambda x, n=patches.stop - patches.start: x.expand(n, -1, -1, -1))
        patch_ones.visit(partial(mosaic.add, 0, grid, patches))
    c2 = mosaic.merged().c[3][0, 0]
    assert c2.shape == (127, 127)
    assert int((~torch.isclose(c2, torch.ones(()))).sum()) == 1000
    assert float(c2.min()) == pytest.approx(0.25)
