"""Maps that branches exchange: cutting and merging are inverse; `--share` says whose maps the local branch reads."""

from functools import partial

import builders
import pytest
import torch
import torch.nn.functional as F
from builders import SIDE, build_model, build_sample, build_settings, gradients, segment_scores, shared_model
from runs import generate
from torch import Tensor, nn

from dataset.base import GREY
from dataset.registry import describe
from evaluation.run import evaluate_images
from models.pyramid import Pyramid
from models.sharing import Mosaic, crop_global, crop_pyramid
from utils.errors import InputError
from utils.metrics import StageMetrics
from utils.stages import STAGES
from utils.tiling import PatchGrid

EXACT = {  # geometries whose patches begin and end between cells on every level
    "one patch": ((96, 128), 160, 0),
    "side by side": ((128, 192), 64, 0),
    "overlapping": ((160, 224), 96, 32),
    "overlapping in one row": ((64, 160), 96, 32),
}
INEXACT = ((100, 230), 64, 16)
SIZE = (100, 150)


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


def test_sub_batches_and_the_memory_layout_do_not_change_what_is_merged() -> None:
    grid, frame = PatchGrid.cover(*INEXACT), random_pyramid(INEXACT[0])
    channels_last = frame.map(lambda x: x.contiguous(memory_format=torch.channels_last))
    merged = [maps(merge(grid, frame, sub_batch)) for sub_batch in (len(grid) - 1, 1, 3, 100)]
    for expected, *others, found in zip(*merged, maps(merge(grid, channels_last, 3)), strict=True):
        assert all(torch.equal(other, expected) for other in others)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_crop_is_what_its_box_covers() -> None:
    grid = PatchGrid.cover((160, 224), 96, min_overlap=32)
    x = random_pyramid((160, 224)).c[3]  # 40 x 56 cells, patches every 16
    expected = [x[0, :, 0:24, 32:56], x[0, :, 16:40, 0:24], x[0, :, 16:40, 16:40]]
    assert torch.equal(crop_global(x, grid, slice(2, 5)), torch.stack(expected))


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


@pytest.mark.parametrize("mode", [2, 3])
def test_without_sharing_local_scores_and_gradients_do_not_depend_on_the_global_branch(mode) -> None:
    def with_other_global_branch(scale: float) -> tuple[dict[str, Tensor], dict[bool, dict[str, Tensor]]]:
        """Scores without sharing, and gradients without and with it."""
        model, learned = build_model(), {}
        with torch.no_grad():
            for parameter in model.global_.parameters():
                parameter.mul_(scale)
        scores = segment_scores(model, mode, sample, build_settings(share_maps=False))
        model.learn(STAGES[mode].trains)
        for share_maps in (False, True):
            model.zero_grad()
            builders.take_step(model.train(), mode, [sample], share_maps=share_maps, lamb_fmreg=0.0)
            learned[share_maps] = gradients(model)
        return scores, learned

    sample = build_sample(SIZE)
    (expected, learned), (found, others) = map(with_other_global_branch, (1, -0.7))
    for name in ("local", "ensemble"):  # in mode 3 the ensemble reads the refined branch, which is the same
        assert torch.equal(found[name], expected[name]), name
    plain = segment_scores(shared_model(), mode, sample, build_settings())["local"]
    assert (plain - expected["local"]).abs().max() > 1e-2
    assert learned[False] and all(torch.equal(others[False][name], x) for name, x in learned[False].items())
    assert any(not torch.allclose(learned[True][name], x) for name, x in learned[False].items())


def test_training_and_inference_leave_out_the_same_maps() -> None:
    """The local scores are those of a network whose weights for the other branch's maps are 0."""
    sample, model = build_sample(SIZE), build_model()
    pyramid = model.local.pyramid
    with torch.no_grad():
        for convolution in (*pyramid.lateral, *pyramid.smooth1, *pyramid.smooth2):
            convolution.weight[:, convolution.in_channels // 2 :] = 0
        # the last convolution reads ps2 of both branches, level by level, own maps first
        assert isinstance(pyramid.smooth, nn.Conv2d)
        pyramid.smooth.weight.unflatten(1, (4, 2, 128))[:, :, 1] = 0
    found = segment_scores(shared_model(), 2, sample, build_settings(share_maps=False))["local"]
    torch.testing.assert_close(segment_scores(model, 2, sample, build_settings())["local"], found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [2, 3])
def test_another_context_changes_what_reads_local_maps_and_nothing_else(mode) -> None:
    """With its own shrunk image as context the scores are the same; with another one the global ones of mode 2 are."""
    sample, other = build_sample(SIZE), build_sample(SIZE, seed=1)
    own, same, changed = (
        segment_scores(shared_model(), mode, sample, build_settings(), shared=context)
        for context in (None, sample.global_image, other.global_image)
    )
    for name, values in own.items():
        torch.testing.assert_close(same[name], values, rtol=1e-4, atol=1e-4)
        if (mode, name) != (2, "global"):
            assert (changed[name] - values).abs().max() > 1e-2, name
    if mode == 2:
        torch.testing.assert_close(changed["global"], own["global"], rtol=1e-4, atol=1e-4)
        predictor, counts = builders.build_predictor(shared_model(), 2, build_settings()), []
        for context in (None, other.global_image):  # evaluation predicts with the context of its samples
            metrics = StageMetrics(STAGES[2], builders.build_header(2).classes)
            evaluate_images(predictor, [[sample._replace(shared=context)]], metrics)
            counts.append({name: matrix.counts for name, matrix in metrics.matrices.items()})
        assert torch.equal(counts[0]["global"], counts[1]["global"])
        assert not torch.equal(counts[0]["local"], counts[1]["local"])


def test_the_context_is_the_next_image_or_grey(tmp_path) -> None:
    data = describe("deep_globe", generate(tmp_path, images=7)).open("train", SIDE)
    own = [data[i] for i in range(len(data))]
    assert all(sample.shared is None for sample in own)
    data.share = "other"
    for i in range(len(own)):
        context = data[i].shared
        assert context is not None and torch.equal(context, own[(i + 1) % len(own)].global_image)
        assert torch.equal(data[i].global_image, own[i].global_image)
    data.share = "blank"
    assert torch.equal(data[0].shared, torch.full((3, SIDE, SIDE), GREY, dtype=torch.uint8))
    data.share, data._samples = "other", data._samples[:1]
    with pytest.raises(InputError, match="--share other needs a second image"):
        data[0]
