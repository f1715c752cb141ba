"""`--context scale`: every image is shrunk by one factor, keeps its aspect, and is segmented from one global view.

A network that was trained on windows reads whole images shrunk as far as its windows were.
"""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from builders import SIDE, Scores, build_header, build_model, build_settings, gradients, write_noise
from pictures import PixelPredictor, Whole, pixel_scores, random_image
from torch import Tensor, nn

import predict
import train_deep_globe
from benchmarks.__main__ import main as benchmark
from benchmarks.cuts import border_shares, common_part, cuts_of, scene_lines
from dataset.base import Sample, SegmentationDataset
from engine.predictor import Predictor
from imaging.pictures import shrink
from imaging.sources import CropSource, MemorySource
from models import checkpoint
from models.glnet import GLNet
from models.header import Header
from models.restore import header_for
from prediction.scenes import reduce_scores, scene_grid, segment_scenes
from prediction.segmenter import Segmenter
from training.setup import synchronize_norms
from utils.canvas import ArgmaxSink
from utils.classes import Classes
from utils.distributed import ALONE
from utils.errors import InputError
from utils.resize import shrink_label
from utils.selection import UncertainPatches
from utils.settings import LEAST_VIEW, MOST_SHRUNK, VIEW_PIXELS, ContextScale, ViewScale
from utils.stages import STAGES
from utils.tiling import Box, PatchGrid, Size
from utils.turns import TURNS

SCALE = ViewScale(SIDE, 2.0)
SIZES = [(150, 170), (130, 400), (300, 140)]
"""Of a page nearly square, a strip and a portrait."""


def build_viewed(size: tuple[int, int], context: ViewScale = SCALE, seed: int = 0) -> Sample:
    """A random sample whose shrunk image and label keep the scale."""
    sample = builders.build_sample(size, seed)
    height, width = context.size(size)
    label = shrink_label(sample.label, (height // 4, width // 4))
    shrunk = shrink(MemorySource(sample.image), (height, width))
    return sample._replace(global_image=shrunk, global_label=label)


def write_set(root: Path, sizes: list[tuple[int, int]], validation: int) -> Path:
    """Write a folder of noise whose last images, so many, are those of the validation."""
    root.mkdir()
    for k, size in enumerate(sizes):
        write_noise(root, str(k), size)
    first = len(sizes) - validation
    for name, ids in (("train", range(first)), ("val", range(first, len(sizes)))):
        (root / f"{name}.txt").write_text("\n".join(map(str, ids)))
    return builders.describe_set(root, {"lists": {"train": "train.txt", "val": "val.txt"}})


@pytest.fixture(scope="module")
def predictors() -> dict[int, Predictor]:
    """One of each mode, which keeps the scale."""
    model, settings = build_model(), build_settings()
    return {mode: Predictor.prepare(model, STAGES[mode], settings, SIDE, context=SCALE) for mode in (1, 2, 3)}


@pytest.fixture
def views(monkeypatch) -> list[tuple[int, Size]]:
    """Filled with the height of each image that is segmented, and the size of its view."""
    seen, plain = [], Predictor._segment_turned

    def noted(self, image, global_image, *others):
        seen.append((image.size[0], tuple(global_image.shape[-2:])))
        return plain(self, image, global_image, *others)

    monkeypatch.setattr(Predictor, "_segment_turned", noted)
    return seen


@pytest.mark.parametrize(("factor", "multiple"), [(4.8, 4), (2.0, 32), (3.0, 224)])
def test_the_shrunk_image_keeps_factor_and_aspect_and_is_what_the_encoder_takes(factor, multiple) -> None:
    context = ViewScale(508, factor, multiple)
    for image in product((1, 100, 1000, 2448, 6000), repeat=2):
        for side, shrunk in zip(image, context.size(image), strict=True):
            assert shrunk % multiple == 0
            assert abs(shrunk - side / factor) <= multiple / 2 or (shrunk < 64 + multiple and side / factor < shrunk)


@pytest.mark.parametrize("most", [LEAST_VIEW, 10**5, VIEW_PIXELS])
@pytest.mark.parametrize("size", [(1000, 6000), (100_000, 700), (5450, 6184), (31623, 31623), (60, 9_999_999)])
@pytest.mark.parametrize("factor", [0.5, 4.82, 8.0])
def test_scenes_are_few_overlap_by_a_quarter_and_their_views_are_bounded(most, size, factor) -> None:
    context = ViewScale(508, factor, 4, most)
    grid = scene_grid(size, 5000, context)
    assert math.prod(context.size(grid.patch)) <= most
    assert (len(grid) == 1) == context.fits(size)
    for axis, longest in zip((grid.rows, grid.columns), context.scene(size), strict=True):
        assert axis.counts().min() >= 1
        assert axis.counts().max() <= 2
        assert axis.patch <= longest
        assert all(a + axis.patch - b >= longest // 4 for a, b in zip(axis.starts[:-1], axis.starts[1:], strict=True))
    if len(grid) > 1:  # no scene could be half as large
        assert 4 * math.prod(context.size(context.scene(size))) > 3 * most or min(size) < 64 * factor


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_an_image_that_is_read_in_windows_has_the_scores_of_the_whole(mode, size, predictors, monkeypatch) -> None:
    """Those of `GLNet.forward` on all patches and the whole image, shrunk."""
    monkeypatch.setattr("imaging.sources.fits_memory", lambda *found: False)
    sample, settings = build_viewed(size), build_settings()
    expected = builders.forward_scores(build_model(), mode, sample, settings)
    sinks = {name: Scores(size) for name in STAGES[mode].predictions}
    predictors[mode].segment(MemorySource(sample.image), sinks)
    for name, sink in sinks.items():
        torch.testing.assert_close(sink.whole(), expected[name], atol=1e-3, rtol=1e-3)
    found = Whole()
    segment_scenes(predictors[mode], MemorySource(sample.image), found, scene_size=100)  # which has no influence
    assert (found.ids == expected[STAGES[mode].headline].argmax(0)).float().mean() > 0.9999


def test_beyond_the_bound_scenes_have_views_of_their_own_that_are_blended(predictors, views) -> None:
    image = MemorySource(random_image((300, 440)))
    bounded = replace(predictors[3], context=replace(SCALE, most=16384))  # 128 x 128 of 152 x 220
    found = Whole()
    segment_scenes(bounded, image, found, probabilities=True)
    grid = scene_grid(image.size, 5000, bounded.context)
    assert len(grid.rows.starts) == len(grid.columns.starts) == 2
    assert len(views) == 4
    assert max(math.prod(view) for _, view in views) <= 16384
    alone = Whole()
    segment_scenes(bounded, CropSource(image, Box(0, 0, *grid.patch)), alone)
    height, width = grid.rows.starts[1], grid.columns.starts[1]
    assert (found.ids[:height, :width] == alone.ids[:height, :width]).float().mean() > 0.999
    pixels, blended = PixelPredictor(), Whole()
    object.__setattr__(pixels, "context", bounded.context)  # the same scenes; scores depend on each pixel alone
    segment_scenes(pixels, image, blended, probabilities=True)
    expected = reduce_scores(pixel_scores(image.image), True)
    torch.testing.assert_close(blended.probabilities, expected.probabilities, atol=2e-3, rtol=0)


def step_by_parts(mode: int, parts: list[list[Sample]], **more: Any) -> tuple[GLNet, dict[str, float]]:
    """A network with the gradients of parts of a batch, which weigh as their labels, and the sums of their terms."""
    weights = [sum(float((sample.global_label != 255).sum()) for sample in part) for part in parts]
    model, terms = builders.learning_model(mode), Counter()
    for part, weight in zip(parts, weights, strict=True):
        for name, value in builders.take_step(model, mode, part, share=weight / sum(weights), **more)[0].items():
            terms[name] += float(value)
    return model, terms


def step_at_once(mode: int, batch: list[Sample], **more: Any) -> tuple[GLNet, dict[str, float]]:
    """A network with the gradients of a batch, and what its step reports."""
    model = builders.learning_model(mode)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0)
    (values,) = builders.train_epoch(model, mode, [batch], optimizer, **more)
    return model, values


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_a_batch_of_mixed_sizes_has_the_gradients_of_its_images_one_by_one(mode) -> None:
    batch = [build_viewed(size, seed=k) for k, size in enumerate([(150, 170), (80, 200), (200, 80)])]
    (expected, terms), (found, values) = step_by_parts(mode, [[one] for one in batch]), step_at_once(mode, batch)
    assert {name: values[f"loss/{name}"] for name in terms} == pytest.approx(terms, rel=1e-5)
    runs.assert_equal_weights(gradients(found), gradients(expected))
    runs.assert_equal_weights(dict(found.named_buffers()), dict(expected.named_buffers()))  # norm statistics


def test_images_of_one_size_are_normalised_together_whatever_lies_between_them() -> None:
    first, other, second = (build_viewed(size, seed=k) for k, size in enumerate([(150, 170), (80, 200), (150, 170)]))
    (expected, _), (found, _) = step_by_parts(1, [[first, second], [other]]), step_at_once(1, [first, other, second])
    torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-5, atol=1e-7)
    more: dict[str, Any] = {"mix_images": True, "patches": 2, "sub_batch_size": 4}  # of images of all sizes
    (expected, _), (found, _) = step_by_parts(2, [[first, other]], **more), step_at_once(2, [first, other], **more)
    runs.assert_equal_weights(gradients(found), gradients(expected))


def test_samples_have_the_scale_their_labels_a_quarter_of_it_and_are_kept_in_bounds(tmp_path, monkeypatch) -> None:
    sizes = [(100, 100), (256, 140), (90, 400)]
    data = SegmentationDataset([write_noise(tmp_path, str(k), s) for k, s in enumerate(sizes)], Classes.generic(3), 64)
    data.context = SCALE
    for full, part in ((False, 4), (True, 1)):
        data.full_labels = full
        for k, size in enumerate(sizes):
            height, width = SCALE.size(size)
            assert data[k].global_image.shape[1:] == (height, width)
            assert data[k].global_label.shape == (height // part, width // part)
    data.share = "other"
    assert data[1].shared.shape[1:] == SCALE.size(sizes[2])
    data.context, data.keep_shrunk, data.share = WINDOW_SCALE, True, "own"
    monkeypatch.setattr("dataset.base.KEPT_SHRUNK_BYTES", 3 * sum(math.prod(WINDOW_SCALE.size(s)) for s in sizes[:2]))
    for _ in range(2):
        assert [data[k].global_image.shape[1:] for k in range(3)] == [*map(WINDOW_SCALE.size, sizes)]
    assert set(data._shrunk) == {0, 1}


@pytest.mark.parametrize("mode", [2, 3])
@pytest.mark.parametrize("more", ["other", "selected", "d4"])
def test_turns_selected_patches_and_other_maps_work_with_any_aspect(mode, more, predictors) -> None:
    image, settings = random_image((130, 260)), build_settings(selection=UncertainPatches(0.5))
    predictor = predictors[mode]
    if more == "selected":
        predictor = replace(predictor, settings=settings)
    if more == "d4":
        predictor = replace(predictor, turns=TURNS["d4"])
    shared = random_image((96, 64)) if more == "other" else None
    found = []
    for picture in (image, image.transpose(1, 2)):
        sinks = {name: Scores(tuple(picture.shape[1:])) for name in STAGES[mode].predictions}
        predictor.segment(MemorySource(picture), sinks, shared=shared)
        found.append(sinks[STAGES[mode].headline].whole())
    if more == "d4":  # turning the image turns the result
        torch.testing.assert_close(found[1], found[0].transpose(1, 2), atol=1e-3, rtol=1e-3)


class NearPixels(nn.Module):
    """A backbone whose cells read the pixels in them alone, and of these those of the finest maps."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps = (F.avg_pool2d(image, stride, ceil_mode=True) * 100 * (stride == 4) for stride in (32, 16, 8, 4))
        return tuple(F.pad(x, (0, 0, 0, 0, 0, c - 3)) for x, c in zip(maps, (512, 256, 128, 64), strict=True))


def test_cuts_of_one_scene_agree_in_their_common_part_where_squares_do_not() -> None:
    """They begin at whole cells, and what the network makes of pixels does not depend on far ones."""
    model = build_model()
    for name, x in model.named_parameters():
        if ".pyramid." in name and name.endswith("bias"):
            x.data.zero_()  # so that coarse maps are 0
    coarse = F.interpolate(random_image((32, 64))[None].float(), (512, 1024), mode="bicubic")[0]
    scene = MemorySource(coarse.clamp(0, 255).to(torch.uint8))
    cuts = [Box(128, 0, 192, 1024), Box(0, 192, 512, 512), Box(0, 320, 512, 256)]
    common = Box(176, 368, 96, 160)  # away from the borders, which zeros pad
    differences = {}
    for context in (None, SCALE):
        predictor = Predictor.prepare(model, STAGES[1], build_settings(), SIDE, context=context)
        predictor.network.backbones["global_"] = NearPixels()
        found = []
        for box in cuts:
            sink = Scores((box.height, box.width))
            predictor.segment(CropSource(scene, box), {"global": sink})
            found.append(common.within(box).of(sink.whole()))
        differences[context] = max(float((a - b).abs().mean()) for a, b in combinations(found, 2))
    assert differences[SCALE] < 0.05 * differences[None]


def test_the_recorded_factor_is_kept_or_follows_a_given_size_g_in_prediction_too(tmp_path) -> None:
    header = build_header(1, context="scale", scale=3.0)
    assert Header.from_record(header.to_record()) == header
    for context, size_g, scale in (
        ("scale", None, 3.0),
        ("scale", 2 * SIDE, 1.5),  # a view of twice the sides
        ("square", None, None),
        ("square", 2 * SIDE, None),
    ):
        assert header.scale_for(context, size_g) == scale
    windows = build_header(1, scale=3.0)
    assert windows.scale_for("scale", None) == windows.scale_for("square", None) == 3.0
    for changes in ({"scale": None}, {"context": "round"}):
        with pytest.raises(ValueError, match="context"):
            Header.from_record(replace(header, **changes).to_record())
    builders.write_thin_checkpoint(tmp_path / "one.pth", 1, context="scale", scale=2.0)
    builders.write_thin_checkpoint(tmp_path / "windows.pth", 1, scale=2.0)
    for name, given, expected in (
        ("one.pth", {}, SCALE),
        ("one.pth", {"size_g": 2 * SIDE, "view_pixels": 20000}, ViewScale(2 * SIDE, 1.0, 4, 20000)),
        ("one.pth", {"context": "square"}, None),
        ("windows.pth", {"context": "scale"}, SCALE),
    ):
        assert Segmenter.from_checkpoint(tmp_path / name, device="cpu", **given).predictor.context == expected


def test_options_that_do_not_fit_the_context_are_refused(tmp_path, refused) -> None:
    builders.write_thin_checkpoint(tmp_path / "square.pth", 1)
    builders.write_thin_checkpoint(tmp_path / "scale.pth", 1, context="scale", scale=2.0)
    (tmp_path / "images").mkdir()
    write_noise(tmp_path / "images", "a", (80, 150))

    def message(name: str, *more: str) -> str:
        where = ["--checkpoint", tmp_path / name, "--output", tmp_path / "out", "--input", tmp_path / "images/a.png"]
        return refused(predict.main, *where, "--device=cpu", *more)

    assert "train with --context scale" in message("square.pth", "--context=scale")
    assert "--view_pixels 20000 goes with --context scale" in message("square.pth", "--view_pixels=20000")
    assert "--scene_size 500 goes with --context square" in message("scale.pth", "--scene_size=500")
    assert "--view_pixels 9 must be at least" in message("scale.pth", "--view_pixels=9")
    with pytest.raises(InputError, match=r"--sync_bn .* --context scale"):
        synchronize_norms(builders.shared_model(), STAGES[1], ALONE, "scale")


def test_the_benchmark_of_cuts_compares_what_all_cuts_hold(tmp_path, monkeypatch) -> None:
    pytest.importorskip("rasterio")
    builders.write_thin_checkpoint(tmp_path / "one.pth", 1, scale=2.0)
    unet = nn.Conv2d(3, 7, 1)
    monkeypatch.setattr("benchmarks.cuts.build_network", lambda *_: unet)
    torch.save(unet.state_dict(), tmp_path / "unet.pth")
    boxes = cuts_of((5450, 6184), 6000)
    assert [box[2:] for box in boxes.values()] == [(1000, 6000), (3000, 3000), (4000, 1500)]
    assert common_part(boxes)[2:] == (1000, 1500)
    arguments = ["--checkpoint", str(tmp_path / "one.pth"), "--device=cpu", "--length=240", "--stability=2"]
    written = ["--unet", str(tmp_path / "unet.pth"), "--json", str(tmp_path / "cuts.json")]
    assert benchmark(["cuts", *arguments, *written]) == 0
    rows = json.loads((tmp_path / "cuts.json").read_text())["rows"]
    assert [row["network"] for row in rows] == ["GLNet, context square", "GLNet, context scale", "U-Net"]
    pairs = ("strip, square", "strip, portrait", "square, portrait")
    assert all(0 <= row["all"] <= min(row[pair] for pair in pairs) <= 100 for row in rows)
    assert all(0 <= row["changed"] <= 100 and "borders" not in row for row in rows)  # one scene has no borders
    assert rows[2]["all"] == 100 and rows[2]["changed"] == 0  # of a network that sees one pixel


def test_class_borders_are_counted_where_they_lie_on_borders_of_scenes() -> None:
    lines = scene_lines(PatchGrid.cover((60, 80), 50, 10))
    assert lines == ([10, 50], [30, 50])
    ids = np.zeros((60, 80), np.uint8)
    assert not border_shares(ids, lines).any()
    ids[:, 50:] = 1
    shares = border_shares(ids, lines, near=1)
    assert shares.shape == (79,)
    # the lines of columns are three pairs of pixels wide, and meet the one class border in three of 79 places each
    assert shares[0] == 1 and shares.sum() == 6 and shares[1] == 1 and shares[2] == 0


@pytest.mark.slow
def test_the_memory_of_a_view_is_counted(tmp_path) -> None:
    arguments = ["memory", "--view=128", "--precisions=bf16", "--device=cpu", "--json", str(tmp_path / "memory.json")]
    assert benchmark(arguments) == 0
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [row["work"] for row in rows] == ["inference_sub6 of 617 x 617", "inference_sub1 of 617 x 617"]
    assert rows[0]["device"] > rows[1]["device"] > 0


@pytest.mark.slow
def test_training_records_the_median_and_later_stages_evaluation_and_prediction_keep_it(tmp_path) -> None:
    sizes = [(96, 150), (130, 90), (200, 100), (96, 150), (70, 260), (128, 128), (150, 96), (140, 140)]
    folders = runs.Folders(tmp_path, write_set(tmp_path / "data", sizes, 2))
    scale = float(np.median([math.sqrt(h * w) / 64 for h, w in sizes[:6]]))
    more = ("--dataset=folder", "--num_epochs=1", "--batch_size=4")
    headers = []
    for mode in (1, 2, 3):
        first = ("--context=scale",) if mode == 1 else ()
        assert train_deep_globe.main(folders.arguments(mode, *more, *first)) == 0
        headers.append(checkpoint.read(folders.models / f"{runs.NAMES[mode]}.pth").header)
    assert [(header.context, header.scale) for header in headers] == 3 * [("scale", scale)]

    evaluation = folders.arguments(3, "--dataset=folder", "--evaluation", "--path_l2g=three.pth", "--task_name=e")
    assert train_deep_globe.main(evaluation) == 0
    found = json.loads((folders.logs / "e.json").read_text())
    assert (found["context"], found["scale"]) == ("scale", scale)
    out = tmp_path / "out"
    prediction = ["--checkpoint", folders.models / "three.pth", "--output", out, "--device=cpu", "--input"]
    assert predict.main([str(one) for one in (*prediction, folders.data / "6.png")]) == 0
    found = json.loads((out / "summary.json").read_text())
    assert (found["context"], found["view_pixels"]) == ("scale", VIEW_PIXELS)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [1, 3])
def test_a_run_on_mixed_sizes_that_is_stopped_ends_with_the_same_bits(mode, tmp_path) -> None:
    sizes = [(96, 150), (130, 90), (200, 100), (96, 150), (70, 260), (128, 128)]
    data = write_set(tmp_path / "data", sizes, 1)
    more = ("--dataset=folder", "--batch_size=3", runs.SAVE_OFTEN)
    whole = runs.Folders(tmp_path / "whole", data)
    for stage in range(1, mode + 1):
        assert runs.run(whole.arguments(stage, *more, "--context=scale"), tmp_path / f"run{stage}").code == 0
    stopped = runs.Folders(tmp_path / "stopped", data)
    if mode == 3:
        stopped = whole.beside(tmp_path / "stopped")
        (stopped.models / "three.pth").unlink()
    arguments = stopped.arguments(mode, *more, "--context=scale", "--resume=auto")
    runs.run(arguments, tmp_path / "killed", prepare=runs.die_while_saving, extra=("after renaming", 1))
    result = runs.run(arguments, tmp_path / "rest")
    assert result.code == 0, result.output
    assert "Going on" in result.output
    runs.assert_equal_weights(stopped.weights(mode), whole.weights(mode))


@pytest.mark.slow
def test_an_evaluation_beyond_the_bound_says_what_to_give(tmp_path, refused) -> None:
    folders = runs.Folders(tmp_path, write_set(tmp_path / "data", [(100, 100), (300, 500)], 1))
    folders.models.mkdir()
    builders.write_thin_checkpoint(folders.models / "one.pth", 1, 2, context="scale", scale=2.0)
    where = [f"--data_path={folders.data}", f"--model_path={folders.models}", f"--log_path={folders.logs}"]
    options = ["--dataset=folder", "--evaluation", "--path_g=one.pth", "--view_pixels=16384", "--device=cpu"]
    message = refused(train_deep_globe.main, *where, *options)
    assert "1.png is shrunk to 152 x 248 pixels, more than --view_pixels 16384; give --view_pixels 37696" in message


WINDOW_SCALE = ContextScale(64, 2.0)

SIDES = [
    ((128, 128), 64),  # not cut in training
    ((20, 128), 64),
    ((256, 256), 128),
    ((129, 129), 64),
    ((512, 128), 128),  # the mean of both factors is kept
    ((128, 512), 128),
    ((2, 500), 64),  # not below that of training
    ((99999, 99999), MOST_SHRUNK),
]
"""Sizes of images with the sides of their shrunk images."""


def test_the_side_of_the_shrunk_image_keeps_the_factor_and_is_what_the_encoder_takes_in_the_example_too() -> None:
    assert [WINDOW_SCALE.size(image) for image, _ in SIDES] == [(side, side) for _, side in SIDES]
    for multiple in (4, 224):
        scale = ContextScale(224, 3.0, multiple)
        sides = {scale.size((n, n + 50))[0] for n in range(100, 9000, 77)}
        assert len(sides) > 3
        assert all(side % multiple == 0 and 224 <= side <= MOST_SHRUNK for side in sides)
    file = checkpoint.Checkpoint(Path("a.pth"), build_header(1, size_g=64, scale=2.0), {})
    assert header_for(file, None, {}, Classes.generic(7)).context_scale() == WINDOW_SCALE
    assert header_for(file, None, {"size_g": 64}, Classes.generic(7)).context_scale() is None  # which is given
    assert build_header(1).context_scale() is None
    pytest.importorskip("onnxruntime")
    from examples.segment_onnx import shrunk_size
    from prediction.export import describe

    about = describe([], build_header(1, size_g=64, scale=2.0), "onnx")
    for image, side in SIDES:
        assert shrunk_size(about, image) == (side, side)
        assert shrunk_size({**about, "scale": None}, image) == (64, 64)


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_a_predictor_shrinks_each_image_by_the_scale(mode) -> None:
    """As one whose size_g is that side does; turned, too."""
    model, settings, image = build_model(), build_settings(), MemorySource(builders.build_sample((150, 170)).image)
    context = ContextScale(SIDE, 100 / SIDE)
    side = context.size(image.size)[0]
    assert side > SIDE
    for turns in (TURNS["none"], TURNS["flip"]):
        found = {}
        for name, more in (("scale", (SIDE, turns, context)), ("side", (side, turns))):
            predictor = Predictor.prepare(model, STAGES[mode], settings, *more)
            sink = ArgmaxSink(image.size, torch.device("cpu"))
            predictor.segment(image, {STAGES[mode].headline: sink})
            found[name] = sink.ids
        assert torch.equal(found["scale"], found["side"])


@pytest.mark.slow
def test_the_scale_goes_from_training_to_validation_evaluation_and_prediction(tmp_path, views, caplog) -> None:
    caplog.set_level("INFO")
    (tmp_path / "data").mkdir()
    for k, side in enumerate((80, 80, 200, 200)):
        write_noise(tmp_path / "data", str(k), (side, side))
    folders = runs.Folders(tmp_path, builders.describe_set(tmp_path / "data"))
    arguments = folders.arguments(1, "--dataset=folder", "--num_epochs=1", "--window=80", "--windows=1")
    expected = {(80, (64, 64)), (200, (160, 160))}
    assert train_deep_globe.main(arguments) == 0
    assert set(views) == expected
    assert checkpoint.read(folders.models / "one.pth").header.scale == 80 / 64
    assert "Validation: trained on windows that were shrunk 1.25 times" in caplog.text

    where = [f"--data_path={folders.data}", f"--model_path={folders.models}", f"--log_path={folders.logs}"]
    evaluation = ["--evaluation", "--dataset=folder", "--path_g=one.pth", "--num_workers=0", "--device=cpu", *where]
    images = ["--input", str(folders.data / "2.png")]
    prediction = ["--checkpoint", str(folders.models / "one.pth"), "--device=cpu", *images]
    for more, wanted in (([], expected), (["--size_g=64"], {(80, (64, 64)), (200, (64, 64))})):
        views.clear()
        assert train_deep_globe.main([*evaluation, *more]) == 0
        assert set(views) == wanted
        views.clear()
        assert predict.main([*prediction, *more, "--output", str(tmp_path / f"out{len(more)}")]) == 0
        assert set(views) == {view for view in wanted if view[0] == 200}
    assert json.loads((folders.logs / "glnet.json").read_text())["scale"] is None
