"""Coarse to fine: plain GLNet where the box is the whole image, background outside, training that never stumbles.

`--patches N`: each image gives a training step N of its patches, and all else is as with all patches.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import builders
import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from builders import SIDE, build_model, build_predictor, build_sample, build_settings, gradients
from PIL import Image
from test_command_line import describe_lesions, evaluation
from test_distributed import together
from torch import Tensor

import predict
import train_deep_globe
from dataset.base import Item, Sample, SegmentationDataset
from dataset.registry import describe
from engine.patches import ImagePatches, TrainingPatches
from evaluation.run import evaluate_images
from helper import TRAINING_STEPS, EpochState
from imaging.sources import MemorySource
from models import checkpoint
from models.glnet import GLNet
from utils.classes import IGNORED, Classes
from utils.distributed import ALONE, Ranks
from utils.metrics import StageMetrics
from utils.resize import shrink_label
from utils.selection import OUTSIDE, CoarseToFine
from utils.settings import Settings
from utils.stages import STAGES
from utils.tiling import Box, Patches, PatchGrid, PatchSubset
from utils.turns import TURNS

FOCUS = CoarseToFine(foreground=1)
PLAIN = build_settings()
COARSE_TO_FINE = build_settings(selection=FOCUS)


def build_binary(everywhere: float, learning: int = 0) -> GLNet:
    """A network of two classes whose global branch finds `everywhere` (large: foreground, negative: background)."""
    model = builders.learning_model(learning, 2) if learning else build_model(2)
    with torch.no_grad():
        model.global_.head.bias.data += torch.tensor([-everywhere, everywhere])
    return model


class Given(CoarseToFine):
    """The global branch is taken to find what is true of this mask, whatever it finds."""

    mask: Tensor

    def predicted(self, logits: Tensor) -> Tensor:
        return self.mask


def covered(size: tuple[int, int], boxes: Iterable[Box]) -> Tensor:
    """(H, W) bool."""
    mask = torch.zeros(size, dtype=torch.bool)
    for box in boxes:
        box.of(mask).fill_(True)
    return mask


def told(size: tuple[int, int], *boxes: Box) -> Settings:
    """Settings under which the objects of an image of `size` are found to be `boxes`, in pixels."""
    focus = Given(1, margin=0.0)
    object.__setattr__(focus, "mask", covered(size, boxes))
    return replace(PLAIN, selection=focus)


def labelled(size: tuple[int, int], *boxes: Box, seed: int = 0) -> Sample:
    """A random image whose label has foreground in `boxes`, and some pixels that are left out."""
    sample = build_sample(size, seed, str(seed))
    label = torch.where((sample.label == IGNORED) & ~covered(size, boxes), sample.label, covered(size, boxes).byte())
    return sample._replace(label=label, global_label=shrink_label(label, (SIDE // 4,) * 2))


def scores(model: GLNet, mode: int, sample: Sample, settings: Settings, means: bool = False) -> dict[str, Tensor]:
    return builders.segment_scores(model, mode, sample, settings, means=means)


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_a_box_that_is_the_whole_image_gives_plain_glnet_bit_by_bit_and_none_the_coarse_prediction(mode) -> None:
    everywhere, nowhere, sample = build_binary(100.0), build_binary(-100.0), build_sample((100, 150))
    for means in (False, True):
        expected = scores(everywhere, mode, sample, PLAIN, means)
        runs.assert_equal_weights(scores(everywhere, mode, sample, COARSE_TO_FINE, means), expected)
    coarse = scores(nowhere, 1, sample, PLAIN)["global"]
    for found in scores(nowhere, mode, sample, COARSE_TO_FINE).values():
        assert torch.equal(found, coarse)


@pytest.mark.parametrize("mode", [2, 3])
@pytest.mark.parametrize("size", [(300, 170), (50, 260)])
def test_outside_the_boxes_is_background(mode, size) -> None:
    sample = build_sample(size)
    boxes = [Box(0, 0, min(64, size[0]), 64), Box(0, size[1] - 64, min(64, size[0]), 64)]
    settings, inside = told(size, *boxes), covered(size, boxes)
    for means in (False, True):
        found = scores(builders.shared_model(2), mode, sample, settings, means)
        for name in ("local", "ensemble"):
            assert found[name][:, ~inside].unique(dim=1).tolist() == [[OUTSIDE], [0]]
            assert found[name][:, inside].unique(dim=1).shape[1] > 10
        assert found["global"].isfinite().all()


def test_inside_a_box_is_what_its_patches_give() -> None:
    size = (210, 330)
    boxes = [Box(10, 20, 64, 64), Box(30, 250, 64, 64), Box(140, 100, 64, 64)]
    model, sample = builders.shared_model(2), build_sample(size)
    found = scores(model, 2, sample, told(size, *boxes))
    with torch.inference_mode():
        for box in boxes:
            grid = PatchGrid.cover(size, SIDE, builders.MIN_OVERLAP, box)
            x = PLAIN.to_input(box.of(sample.image)[None])
            alone = model(PLAIN.to_input(sample.global_image[None]), x, grid, mode=2)
            for name, logits in (("local", alone.local), ("ensemble", alone.ensemble)):
                expected = F.interpolate(logits, size=(64, 64), mode="nearest")[0]
                torch.testing.assert_close(box.of(found[name]), expected, rtol=1e-4, atol=1e-4)


def test_coverage_is_counted_over_images_and_turns() -> None:
    size = (200, 200)
    settings = told(size, Box(0, 0, 64, 64), Box(150, 150, 20, 20))
    model, sample = builders.shared_model(2), build_sample(size)
    predictor = build_predictor(model, 2, settings)
    found = evaluate_images(predictor, [[sample, sample]], StageMetrics(STAGES[2], 2)).coverage
    grid = PatchGrid.cover(size, SIDE, builders.MIN_OVERLAP)
    assert found.pixels_not_covered == pytest.approx(1 - 2 * 64 * 64 / 40000)
    assert found.patches_not_computed == pytest.approx(1 - 2 / len(grid))
    sinks = {"ensemble": builders.Scores(size)}
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
    runs.assert_equal_weights(*seen)


MIXED = [
    labelled((300, 200), Box(250, 150, 20, 30), seed=0),
    labelled((40, 190), Box(5, 100, 10, 10), seed=1),  # lower than a patch
    labelled((30, 50), Box(3, 3, 4, 4), seed=2),  # smaller
    labelled((90, 100), seed=3),  # without foreground
    labelled((100, 130), Box(0, 0, 100, 130), seed=4),  # all foreground
]


@pytest.mark.parametrize("mode", [2, 3])
def test_images_of_any_size_and_content_train_in_one_batch(mode) -> None:
    """The coarse prediction finds nothing: the boxes come from the labels. One without foreground adds no term.

    In mode 3 with norm layers in evaluation: in training they see the batch as one.
    """
    model, metrics = build_binary(-100.0, mode), StageMetrics(STAGES[mode], 2)
    terms = TRAINING_STEPS[mode](model, MIXED, COARSE_TO_FINE, metrics)
    known = sum(int((sample.label != IGNORED).sum()) for sample in MIXED)
    assert all(math.isfinite(value) and value > 0 for value in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert [int(matrix.counts.sum()) for matrix in metrics.matrices.values()] == [known] * len(metrics.matrices)
    alone, both = (build_binary(-100.0, mode).eval() for _ in range(2))
    one = labelled((100, 150), Box(20, 30, 40, 40))
    expected, found = (
        TRAINING_STEPS[mode](model, batch, COARSE_TO_FINE, StageMetrics(STAGES[mode], 2))
        for model, batch in ((alone, [one]), (both, [one, MIXED[3]]))
    )
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
    seen = builders.train_epoch(model, mode, batches, optimizer, selection=FOCUS, epoch=progress, ranks=ranks)
    assert progress.skipped == 0
    assert progress.batches == len(batches)
    return {name: x for name, x in model.state_dict().items() if "tracked" not in name}, seen


ONE, NOTHING = labelled((64, 90), Box(20, 30, 20, 20)), labelled((90, 70), seed=1)


def test_a_batch_with_nothing_to_learn_from_changes_nothing() -> None:
    expected, _ = train([[ONE]], 2)
    found, seen = train([[NOTHING, NOTHING], [ONE], [NOTHING]], 2)
    runs.assert_equal_weights(found, expected)
    for name in ("loss/total", "gradient_norm"):
        assert [values[name] == 0 for values in seen] == [True, False, True]


def train_together(mode: int, ranks: Ranks) -> tuple[dict[str, Tensor], list[dict]]:
    batches = [[NOTHING, NOTHING], [ONE, NOTHING], [NOTHING]]
    return train([batch[ranks.rank :: ranks.world] for batch in batches], mode, ranks)


@pytest.mark.parametrize("mode", [2, 3])
def test_processes_with_nothing_to_learn_from_keep_step(mode, tmp_path) -> None:
    (state, seen), (other, told) = together(train_together, 2, tmp_path, mode)
    assert seen == told
    assert len(seen) == 3
    runs.assert_equal_weights(other, state)
    assert all(tensor.isfinite().all() for tensor in state.values())
    if mode == 2:
        torch.testing.assert_close(state, train_together(mode, ALONE)[0], rtol=1e-4, atol=1e-4)


FOUND = 0.01
"""The part of all cells that the global branch finds to be foreground."""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> runs.Folders:
    """A set of one's own, and random checkpoints whose global branch finds a few cells of its images."""
    folders = describe_lesions(tmp_path_factory.mktemp("coarse_to_fine"), "--val", "0.5")
    folders.models.mkdir()
    described = describe("folder", folders.data)
    model, data = build_model(2), described.open("val", SIDE)
    with torch.inference_mode():
        x = torch.stack([sample.global_image for sample in data]).float() / 255
        logits = model.global_(x)[0]
        model.global_.head.bias[0] += (logits[:, 1] - logits[:, 0]).flatten().quantile(1 - FOUND)
    for stage, name in runs.NAMES.items():
        header = builders.build_header(stage, classes=described.classes, coarse_to_fine=stage > 1, box_margin=0.25)
        checkpoint.save(folders.models / f"{name}.pth", model, header)
    return folders


def test_prediction_follows_the_checkpoint_and_equals_evaluation(work, tmp_path, capsys) -> None:
    assert train_deep_globe.main(evaluation(work, f"--save_predictions={tmp_path / 'masks'}")) == 0
    table = capsys.readouterr().out
    record = json.loads((work.logs / "glnet.json").read_text())
    assert 0.1 < record["not_looked_at"] < 1
    assert 0 < record["not_computed"] < 1
    assert f"not looked at      {100 * record['not_looked_at']:.2f} % of pixels" in table
    names = [item.id for item in describe("folder", work.data).open("val", SIDE).items]
    images = [str(work.data.with_name(f"{name}.png")) for name in names]
    common = ["--checkpoint", str(work.models / "three.pth"), "--device=cpu", "--input", *images]
    assert predict.main(["--output", str(tmp_path / "predicted"), "--colors", *common]) == 0
    summary = json.loads((tmp_path / "predicted" / "summary.json").read_text())
    assert summary["coarse_to_fine"]
    assert summary["total"]["not_looked_at"] == pytest.approx(record["not_looked_at"])
    assert "per cent of their pixels not looked at" in capsys.readouterr().out
    for name in names:
        masks = [np.asarray(Image.open(tmp_path / kind / f"{name}_mask.png")) for kind in ("masks", "predicted")]
        assert np.array_equal(*masks)
    shares = [one["not_looked_at"] for one in summary["images"]]
    assert predict.main(["--output", str(tmp_path / "plain"), "--no-coarse_to_fine", *common]) == 0
    plain = json.loads((tmp_path / "plain" / "summary.json").read_text())
    assert (plain["coarse_to_fine"], plain["total"]["not_looked_at"]) == (False, None)
    wide = ["--box_margin=10", "--tta=flip", "--scene_size=64", "--probabilities"]
    assert predict.main(["--output", str(tmp_path / "wide"), *wide, *common]) == 0
    again = json.loads((tmp_path / "wide" / "summary.json").read_text())
    assert sum(one["not_looked_at"] for one in again["images"]) < sum(shares)
    with np.load(tmp_path / "wide" / f"{names[0]}_probabilities.npz") as file:
        assert np.isfinite(file["probabilities"]).all()


def test_training_takes_and_records_the_options(work, tmp_path) -> None:
    folders = work.beside(tmp_path)
    given = ["--dataset=folder", "--num_epochs=1", "--coarse_to_fine", "--box_margin=0.5", "--task_name=two_more"]
    assert train_deep_globe.main(folders.arguments(2, *given)) == 0
    header = checkpoint.read(folders.models / "two_more.pth").header
    assert (header.stage, header.coarse_to_fine, header.box_margin) == (2, True, 0.5)


SAMPLE = build_sample((130, 150), seed=7, left_out=0.2)
"""3 x 3 patches of 64 x 64, which overlap."""


def take_step(mode: int, batch: list[Sample], **changes) -> tuple[dict[str, Tensor], dict[str, Tensor], StageMetrics]:
    """Terms, gradients and norm statistics, and the metric of one batch."""
    model = builders.learning_model(mode)
    terms, metrics = builders.take_step(model, mode, batch, **changes)
    return terms, gradients(model) | {name: b for name, b in model.named_buffers() if "running" in name}, metrics


def assert_equal(found, expected) -> None:
    parts = ([*step[:2], step[2].sums()] for step in (found, expected))
    torch.testing.assert_close(*parts, rtol=0, atol=0)


def drawn(sample: Sample, count: int) -> tuple[int, ...]:
    return TrainingPatches(sample, build_settings(patches=count)).draw()


@dataclass(frozen=True)
class Chosen:
    """A selection of patches by their numbers; other pixels are of class 0."""

    kept: tuple[int, ...]

    def patches(self, logits, size, patch, min_overlap, label=None) -> Patches:
        return PatchSubset(PatchGrid.cover(size, patch, min_overlap), self.kept)

    def outside(self, logits, size, upsample="nearest"):
        return lambda box: logits.new_zeros(logits.shape[1], 1, 1)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_stage_2_computes_what_it_would_of_these_patches_alone(count) -> None:
    """Bit by bit: gradients, norm statistics and the metric, which leaves out pixels without a patch."""
    kept = drawn(SAMPLE, count)
    assert len(set(kept)) == count
    boxes = PatchGrid.cover((130, 150), SIDE, builders.MIN_OVERLAP).boxes()
    inside = covered((130, 150), (boxes[k] for k in kept))
    masked = SAMPLE._replace(label=SAMPLE.label.where(inside, torch.tensor(IGNORED, dtype=torch.uint8)))
    expected = take_step(2, [masked], selection=Chosen(kept))
    found = take_step(2, [SAMPLE], patches=count)
    assert_equal(found, expected)
    assert int(found[2].matrices["local"].counts.sum()) == int((masked.label != IGNORED).sum())


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_as_many_as_there_are_or_none_given_are_all(mode) -> None:
    plain = take_step(mode, [SAMPLE])
    for count in (0, 9, 100):
        assert_equal(take_step(mode, [SAMPLE], patches=count), plain)


def test_stage_3_merges_all_patches_and_learns_from_these(monkeypatch) -> None:
    sample = SAMPLE._replace(label=SAMPLE.label.where(SAMPLE.label != IGNORED, torch.zeros_like(SAMPLE.label)))
    plain = take_step(3, [sample], sub_batch_size=4)
    terms, tensors, metrics = take_step(3, [sample], patches=6, sub_batch_size=4)
    kept = drawn(sample, 6)
    alone = []
    for k in kept:
        monkeypatch.setattr(TrainingPatches, "draw", lambda self, k=k: (k,))
        alone.append(take_step(3, [sample], sub_batch_size=4)[:2])
    # sub-batches of four and of two patches; a mean each
    weights = [1 / 4] * 4 + [1 / 2] * 2
    expected = sum(w * float(own["focal_ensemble"]) for w, (own, _) in zip(weights, alone, strict=True))
    assert float(terms["focal_ensemble"]) == pytest.approx(expected, rel=1e-5)
    gradient = sum(w * own["ensemble.weight"] for w, (_, own) in zip(weights, alone, strict=True))
    assert (tensors["ensemble.weight"] - gradient).norm() <= 1e-4 * gradient.norm()
    assert torch.equal(terms["focal_global"], plain[0]["focal_global"])
    assert torch.equal(metrics.matrices["local"].counts, plain[2].matrices["local"].counts)
    assert 0 < metrics.matrices["ensemble"].counts.sum() < plain[2].matrices["ensemble"].counts.sum()


def test_the_draw_follows_from_seed_epoch_and_id_alone(tmp_path) -> None:
    items = [builders.write_noise(tmp_path, name, (100, 100)) for name in "ab"]

    def seeds(items: list[Item], seed: int, index: int) -> list[int]:
        data = SegmentationDataset(items, Classes.generic(3), SIDE, seed=seed)
        return [data[epoch, index].seed for epoch in range(5)]

    assert seeds(items, 0, 1) == seeds(items[1:], 0, 0)
    every = [*seeds(items, 0, 0), *seeds(items, 0, 1), *seeds(items, 1, 0)]
    assert len(set(every)) == len(every)
    draws = [drawn(SAMPLE._replace(seed=seed), 3) for seed in range(200)]
    assert len(set(draws)) > 60  # of 84
    assert {k for one in draws for k in one} == set(range(9))


def test_sub_batches_of_a_step_compute_the_images_together() -> None:
    """Images of different sizes; with fixed statistics the gradients are the means of those of the images."""
    batch = [build_sample(size, seed=seed) for seed, size in enumerate([(130, 150), (90, 200)])]
    found = []
    for mixed in (True, False):
        model = builders.learning_model(2)
        model.local.eval()
        builders.take_step(model, 2, batch, mix_images=mixed, patches=3, sub_batch_size=6)
        found.append(gradients(model))
    for name, gradient in found[1].items():
        assert (2 * found[0][name] - gradient).norm() <= 5e-3 * gradient.norm(), name


def test_sub_batches_of_a_step_are_normalised_together_but_smaller_images_alone() -> None:
    batch = [build_sample((130, 150), seed=seed) for seed in range(2)]
    means = []
    for mixed in (True, False):
        _, state, _ = take_step(2, batch, mix_images=mixed, patches=2, sub_batch_size=4)
        means.append(state["local.backbone.bn1.running_mean"])
    one = take_step(2, batch[:1], mix_images=True, patches=2, sub_batch_size=4)
    assert not torch.equal(*means)
    assert_equal(one, take_step(2, batch[:1], patches=2, sub_batch_size=4))
    batch = [build_sample((130, 150), seed=1), build_sample((62, 150), seed=2)]
    assert_equal(*(take_step(2, batch, mix_images=mixed, patches=2, sub_batch_size=4) for mixed in (True, False)))
