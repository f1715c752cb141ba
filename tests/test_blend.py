"""Blended patches and enlarged logits: equal to a dense reference, streamed or whole; refused where they do nothing."""

import functools
import json
import math
from itertools import product

import builders
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import MIN_OVERLAP, SIDE, Scores, build_header, build_sample, build_settings, segment_scores, shared_model
from pictures import SIZE, run, write_checkpoint
from PIL import Image
from torch import Tensor

from dataset.base import Sample
from engine.patches import ImagePatches
from imaging.sources import MemorySource
from models.glnet import Predictions
from training.options import build_parser
from training.setup import evaluation_settings, training_settings
from utils.canvas import UPSAMPLES, ArgmaxSink, ScoreCanvas, enlarge
from utils.errors import InputError
from utils.selection import UncertainPatches
from utils.tiling import BLENDS, Axis, Box, Patches, PatchGrid, PatchSubset, RegionGrids, Size, border_weights

CHOICES = list(product(BLENDS, UPSAMPLES))
SMOOTH = {"blend": "gaussian", "upsample": "bilinear"}
ARGUMENTS = [f"--{name}={value}" for name, value in SMOOTH.items()]


def whole_grid(size: Size) -> PatchGrid:
    return PatchGrid.cover(size, SIDE, MIN_OVERLAP)


GRIDS: dict[str, Patches] = {
    "odd sides": whole_grid((131, 177)),
    "one patch": whole_grid((SIDE, SIDE)),
    "smaller than a patch": whole_grid((37, 51)),
    "lower than a patch": whole_grid((41, 150)),
    "uncertain patches": PatchSubset(whole_grid((131, 177)), (0, 3, 4, 7)),
    "regions": RegionGrids.cover((210, 180), [Box(0, 0, 81, 77), Box(130, 90, 64, 90)], SIDE, MIN_OVERLAP),
}


def reference_window(size: Size, blend: str) -> np.ndarray:
    """(h, w) float64, from each pixel's distance to the nearest border along both sides."""
    distances = [np.minimum(np.arange(n) + 0.5, n - np.arange(n) - 0.5) / n for n in size]  # 0.5: the middle
    sides = {
        "none": [np.ones(n) for n in size],
        "linear": [2 * distance for distance in distances],
        "gaussian": [np.exp(-(((0.5 - distance) / 0.125) ** 2) / 2) for distance in distances],
    }
    return np.outer(*sides[blend])


def dense(grid: Patches, logits: Tensor, blend: str, upsample: str, *, means: bool, outside: Tensor | None) -> Tensor:
    """The scores (n_class, H, W) float64 by adding every patch to a whole image; `outside` where there is none."""
    window = torch.from_numpy(reference_window(grid.patch, blend))
    corners = None if upsample == "nearest" else False
    total, weights = torch.zeros(logits.shape[1], *grid.image).double(), torch.zeros(grid.image).double()
    for box, scores in zip(grid.boxes(), logits.double().split(1), strict=True):
        box.of(total).add_(F.interpolate(scores, size=grid.patch, mode=upsample, align_corners=corners)[0] * window)
        box.of(weights).add_(window)
    if means:
        total /= weights.where(weights > 0, 1.0)
    return total if outside is None else total.where(weights > 0, outside.double())


def streamed(grid: Patches, logits: Tensor, sub_batch: int, **more) -> Tensor:
    sink = Scores(grid.image)
    canvas = ScoreCanvas(grid, sink, **more)
    for patches in grid.sub_batches(sub_batch):
        canvas.add(logits[patches], patches)
    return sink.whole()


def test_weights_are_positive_symmetric_and_fall_from_the_middle_to_the_borders_to_hardly_anything() -> None:
    """The step of the score at a patch's border is the patch's share there: of two that overlap by 50 of 508 pixels."""
    for blend, length in product(BLENDS, (1, 2, 37, 508)):
        weights = border_weights(length, blend)
        torch.testing.assert_close(weights, torch.from_numpy(reference_window((length, 1), blend)[:, 0]).float())
        torch.testing.assert_close(weights, weights.flip(0))
        assert weights.min() > 0
        assert (weights[: length // 2].diff() >= 0).all()
    axis = Axis.cover(966, 508, 50)
    shares = {blend: float(border_weights(508, blend)[0] / axis.weights(blend)[458]) for blend in BLENDS}
    assert shares["none"] == 0.5 and shares["linear"] < 0.02 and shares["gaussian"] < 0.06


def seams(ids: Tensor, grid: PatchGrid) -> float:
    """The share of class borders in ids (H, W) that are patch borders, over the same share of all pairs of pixels."""
    borders, lines = [], []
    for labels, axis in ((ids, grid.rows), (ids.T, grid.columns)):
        starts, ends = torch.zeros(2, axis.side + 1, dtype=torch.bool)
        starts[list(axis.starts)] = ends[torch.tensor(axis.starts) + axis.patch] = True
        borders.append((labels[1:] != labels[:-1]).flatten())
        lines.append((starts | ends)[1:-1, None].expand(-1, labels.shape[1]).flatten())
    found, at = torch.cat(borders), torch.cat(lines)
    return float(at[found].float().mean() / at.float().mean())


def test_blending_removes_the_lattice_of_a_random_network() -> None:
    """In blocks every class border is one of cells, as is every patch border: the ratio is large without any seam."""
    halves = torch.zeros(100, 100, dtype=torch.uint8)
    halves[:, 40:] += 1
    halves[:, 50:] += 1
    assert seams(halves, PatchGrid.cover((100, 100), 60, 20)) == pytest.approx(0.5 / (2 / 99))  # borders at 40 and 60
    found, grid = builders.forward(shared_model(), 2, build_sample((101, 131)), build_settings())
    ratios = {}
    for blend, upsample in CHOICES:
        ids = ArgmaxSink(grid.image)
        ScoreCanvas(grid, ids, blend=blend, upsample=upsample).add(found.local, slice(0, len(grid)))
        ratios[blend, upsample] = seams(ids.ids, grid)
    for blend in ("linear", "gaussian"):
        assert ratios[blend, "nearest"] < 0.7 * ratios["none", "nearest"]
        assert ratios[blend, "bilinear"] < 1.4 < 2 < ratios["none", "bilinear"]


@pytest.mark.parametrize("name", GRIDS)
def test_a_canvas_equals_the_dense_reference_whatever_the_sub_batches(name) -> None:
    """Sums and means, the latter by any number of patches at a time bit by bit; other scores where no patch is."""
    grid = GRIDS[name]
    torch.manual_seed(0)
    logits, other = torch.randn(len(grid), 3, *(-(-side // 4) for side in grid.patch)), torch.randn(1, 3, 16, 16)
    for (blend, upsample), means in product(CHOICES, (False, True)):
        options = {"blend": blend, "upsample": upsample, "means": means}
        outside = UncertainPatches(0.5).outside(other, grid.image, upsample)
        corners = None if upsample == "nearest" else False
        elsewhere = F.interpolate(other, size=grid.image, mode=upsample, align_corners=corners)[0]
        found = streamed(grid, logits, 3, outside=outside, **options)
        torch.testing.assert_close(
            found.double(), dense(grid, logits, **options, outside=elsewhere), rtol=1e-4, atol=1e-5
        )
        if means:
            assert torch.equal(streamed(grid, logits, 1, outside=outside, **options), found)


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize(("cells", "size"), [((16, 16), (100, 131)), ((127, 127), (306, 2448)), ((31, 31), (1, 20))])
def test_enlarging_by_bands_equals_enlarging_the_whole(cells, size, upsample) -> None:
    logits = torch.randn(1, 2, *cells, generator=torch.Generator().manual_seed(0))
    corners = None if upsample == "nearest" else False
    expected = F.interpolate(logits, size=size, mode=upsample, align_corners=corners)[0]
    whole = Scores(size)
    enlarge(logits, size, whole, size[0], upsample)
    torch.testing.assert_close(whole.whole(), expected, rtol=1e-4, atol=1e-4)
    for band in (1, 7, 512):
        sink = Scores(size)
        enlarge(logits, size, sink, band, upsample)
        assert torch.equal(sink.whole(), whole.whole())


@functools.cache
def plain_network(mode: int) -> tuple[Sample, Predictions]:
    """An image of odd sides and the plain network's logits of it, in mode 2 or 3."""
    sample = build_sample((101, 131))
    return sample, builders.forward(shared_model(), mode, sample, build_settings())[0]


@pytest.mark.parametrize(("mode", "share"), [(1, 1.0), (2, 1.0), (2, 0.4), (3, 1.0)])
def test_predictions_are_the_dense_reference_of_the_plain_network(mode, share) -> None:
    """In mode 2 a patch has the same logits whichever others are computed; mode 1 gives torch's bilinear map."""
    sample, found = plain_network(max(mode, 2))
    settings = build_settings(selection=UncertainPatches(share), **SMOOTH)
    patches = ImagePatches(MemorySource(sample.image), settings)
    patches.select_patches(found.global_)
    kept = [patches.all.boxes().index(box) for box in patches.grid.boxes()]
    assert len(kept) == math.ceil(share * len(patches.all))
    outside = F.interpolate(found.global_, size=patches.size, mode="bilinear", align_corners=False)[0]
    for name, scores in segment_scores(shared_model(), mode, sample, settings, means=True).items():
        expected = outside
        if name != "global":
            logits = getattr(found, name)[kept]
            expected = dense(patches.grid, logits, **SMOOTH, means=True, outside=outside).float()
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)


def test_prediction_takes_and_records_the_options(tmp_path) -> None:
    weights, sample = write_checkpoint(tmp_path / "weights.pth"), build_sample(SIZE)
    Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    options = [*ARGUMENTS, "--probabilities"]
    assert run(weights, tmp_path / "a.png", output=tmp_path / "out", options=options) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: summary[name] for name in SMOOTH} == SMOOTH
    found = np.load(tmp_path / "out" / "a_probabilities.npz")["probabilities"]
    scores = segment_scores(shared_model(), 2, sample, build_settings(**SMOOTH), means=True)["ensemble"]
    np.testing.assert_allclose(found, scores.softmax(0).permute(1, 2, 0), atol=2e-3)


def test_evaluation_takes_the_options() -> None:
    options = build_parser().parse_args(["--evaluation", *ARGUMENTS])
    settings = evaluation_settings(options, build_header(2), torch.device("cpu"))
    assert {name: getattr(settings, name) for name in SMOOTH} == SMOOTH
    with pytest.raises(InputError, match="--blend linear cannot be used: mode 1 has no patches"):
        build_header(1).settings(blend="linear")
    default = training_settings(build_parser().parse_args([]), build_header(2), torch.device("cpu"))
    assert (default.blend, default.upsample) == ("none", "nearest")
