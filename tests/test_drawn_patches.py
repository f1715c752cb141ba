"""`--patches N`: each image gives a training step N of its patches, and all else is as with all patches."""

from dataclasses import dataclass

import builders
import pytest
import torch
from builders import MIN_OVERLAP, SIDE, build_sample, build_settings, gradients, learning_model, write_noise
from torch import Tensor

from dataset.base import Item, Sample, SegmentationDataset
from engine.patches import TrainingPatches
from utils.classes import IGNORED, Classes
from utils.metrics import StageMetrics
from utils.tiling import Patches, PatchGrid, PatchSubset

SAMPLE = build_sample((130, 150), seed=7, left_out=0.2)
"""3 x 3 patches of 64 x 64, which overlap."""


def take_step(mode: int, batch: list[Sample], **changes) -> tuple[dict[str, Tensor], dict[str, Tensor], StageMetrics]:
    """Terms, gradients and norm statistics, and the metric of one batch."""
    model = learning_model(mode)
    terms, metrics = builders.take_step(model, mode, batch, **changes)
    return terms, gradients(model) | {name: b for name, b in model.named_buffers() if "running" in name}, metrics


def assert_equal(found, expected) -> None:
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            assert torch.equal(one[name], tensor), name
    for one, other in zip(found[2].sums(), expected[2].sums(), strict=True):
        assert torch.equal(one, other)


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
    covered = torch.zeros_like(SAMPLE.label, dtype=torch.bool)
    for k in kept:
        PatchGrid.cover((130, 150), SIDE, MIN_OVERLAP).boxes()[k].of(covered).fill_(True)
    masked = SAMPLE._replace(label=SAMPLE.label.where(covered, torch.tensor(IGNORED, dtype=torch.uint8)))
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
    items = [write_noise(tmp_path, name, (100, 100)) for name in "ab"]

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
    found, expected = (
        fixed_statistics(batch, mix_images=mixed, patches=3, sub_batch_size=6) for mixed in (True, False)
    )
    for name, gradient in expected.items():
        assert (2 * found[name] - gradient).norm() <= 5e-3 * gradient.norm(), name


def fixed_statistics(batch: list[Sample], **changes) -> dict[str, Tensor]:
    """Gradients of a step of stage 2 whose norm layers keep their statistics."""
    model = learning_model(2)
    model.local.eval()
    builders.take_step(model, 2, batch, **changes)
    return gradients(model)


def test_sub_batches_of_a_step_are_normalised_together() -> None:
    batch = [build_sample((130, 150), seed=seed) for seed in range(2)]
    means = []
    for mixed in (True, False):
        _, state, _ = take_step(2, batch, mix_images=mixed, patches=2, sub_batch_size=4)
        means.append(state["local.backbone.bn1.running_mean"])
    one = take_step(2, batch[:1], mix_images=True, patches=2, sub_batch_size=4)
    assert not torch.equal(*means)
    assert_equal(one, take_step(2, batch[:1], patches=2, sub_batch_size=4))


def test_images_smaller_than_a_patch_have_sub_batches_of_their_own() -> None:
    batch = [build_sample((130, 150), seed=1), build_sample((62, 150), seed=2)]
    assert_equal(*(take_step(2, batch, mix_images=mixed, patches=2, sub_batch_size=4) for mixed in (True, False)))
