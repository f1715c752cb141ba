"""Scale and colours of `--augment`: drawn from seed, epoch and sample alone, and true to the labels."""

import math
from dataclasses import replace
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from PIL import Image

from dataset.augmentation import (
    LARGEST_CHANGE,
    LARGEST_HUE,
    LARGEST_SCALE,
    ColorChange,
    Draw,
    draw_turn,
    resize,
    turned,
)
from dataset.base import Item, SegmentationDataset
from utils.classes import Classes
from utils.tiling import PatchGrid
from utils.turns import TURNS, Turn

CLASSES = Classes.generic(5)


def write_item(root: Path, size: tuple[int, int], id_: str = "a") -> Item:
    """A random image; its label is the image's red, cut to five shades."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    return builders.write_item(root, id_, pixels, pixels[..., 0] // 52)


def test_without_it_turns_are_drawn_as_ever_and_nothing_else_changes(tmp_path) -> None:
    item = write_item(tmp_path, (20, 31))
    data = SegmentationDataset([item], CLASSES, 8, augment=True, seed=3)
    pixels = torch.from_numpy(np.asarray(Image.open(item.image)).transpose(2, 0, 1).copy())
    for epoch in range(20):
        # CRC-32 of the id: 0xe8b7be43
        turn = Turn(*draw_turn(np.random.default_rng([3, epoch, 0xE8B7BE43])))
        assert torch.equal(data[epoch, 0].image, turn.apply(pixels))


def test_turned_copies_equal_turned_views() -> None:
    for shape in ((5, 7), (3, 5, 7), (1, 4, 1)):
        pixels = torch.arange(math.prod(shape), dtype=torch.uint8).view(shape)
        for turn in TURNS["d4"]:
            found = turned(pixels, turn)
            assert torch.equal(found, turn.apply(pixels)) and found.is_contiguous()


def test_draws_stay_within_their_bounds_go_both_ways_and_leave_turns_and_positions() -> None:
    draws = [Draw.of([seed], jitter=True) for seed in range(300)]
    for seed, varied in enumerate(draws):
        plain = Draw.of([seed])
        assert (plain.turn, plain.position) == (varied.turn, varied.position)
        assert (plain.scale, plain.color) == (1.0, None)
    scales = np.array([draw.scale for draw in draws])
    assert 1 / LARGEST_SCALE <= scales.min() < 0.75 and 1.35 < scales.max() <= LARGEST_SCALE
    assert 0.4 < (scales < 1).mean() < 0.6
    bounds = np.array([LARGEST_CHANGE] * 3 + [LARGEST_HUE])
    shifts = np.array([draw.color for draw in draws]) - [1, 1, 1, 0]
    assert (abs(shifts) <= bounds).all()
    assert (shifts.min(0) < -0.8 * bounds).all() and (shifts.max(0) > 0.8 * bounds).all()


def test_a_sample_depends_on_seed_epoch_and_id_only(tmp_path) -> None:
    item = write_item(tmp_path, (20, 31))

    def samples(items: list[Item], seed: int, index: int) -> list[bytes]:
        data = SegmentationDataset(items, CLASSES, 8, augment=True, seed=seed, jitter=True)
        return [data[epoch, index].image.numpy().tobytes() for epoch in range(6)]

    other = item._replace(id="b")
    assert samples([item], 1, 0) == samples([other, item], 1, 1)
    assert not set(samples([item], 1, 0)) & set(samples([item], 2, 0))
    assert not set(samples([item], 1, 0)) & set(samples([other], 1, 0))


def test_colours_leave_labels_and_sizes_and_do_not_depend_on_strips_or_turns(monkeypatch) -> None:
    image, ids = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8), torch.randint(0, 5, (40, 30), dtype=torch.uint8)
    before, change, turn = image.clone(), ColorChange(1.2, 0.8, 1.1, 0.02), Turn(True, 1)
    changed, same = Draw(color=change).apply(image, ids, (40, 30))
    assert torch.equal(same, ids)
    assert (changed.shape, changed.dtype) == (image.shape, torch.uint8)
    assert not torch.equal(changed, image) and torch.equal(image, before)
    assert torch.equal(change.apply(turn.apply(image)), turn.apply(changed))
    monkeypatch.setattr("dataset.augmentation._STRIP_PIXELS", 100)
    assert torch.equal(change.apply(image), changed)


@pytest.mark.parametrize("grey", [0, 100, 255])
def test_grey_stays_grey(grey) -> None:
    image = torch.full((3, 5, 6), grey, dtype=torch.uint8)
    changed = ColorChange(1.1, 0.9, 1.25, 0.03).apply(image)
    assert (changed == changed[:1]).all()
    assert abs(int(changed[0, 0, 0]) - min(255, round(1.1 * grey))) <= 1  # a single shade has no contrast


def test_labels_follow_the_scale_with_nearest_and_no_new_id(tmp_path) -> None:
    ids = torch.zeros(20, 30, dtype=torch.uint8)
    ids[:, 15:] = 3
    image = ids.mul(80).expand(3, -1, -1).contiguous()
    for size in ((30, 45), (13, 20), (20, 30)):
        larger, labels = resize(image, ids, size)
        assert tuple(labels.shape) == tuple(larger.shape[1:]) == size
        assert set(labels.unique().tolist()) == {0, 3}
        middle = size[1] // 2
        assert (labels[:, : middle - 1] == 0).all() and (labels[:, middle + 1 :] == 3).all()
        assert (larger[:, :, : middle - 2] == 0).all() and (larger[:, :, middle + 3 :] == 240).all()


def test_every_scaled_size_can_be_cut_into_patches(tmp_path) -> None:
    item = write_item(tmp_path, (40, 67))
    data = SegmentationDataset([item], CLASSES, 8, augment=True, jitter=True)
    sizes = set()
    for epoch in range(30):
        sample = data[epoch, 0]
        size = tuple(sample.label.shape)
        assert tuple(sample.image.shape[1:]) == size
        assert sample.global_image.shape == (3, 8, 8) and sample.global_label.shape == (2, 2)
        assert 40 / LARGEST_SCALE - 1 <= min(size) <= 40 * LARGEST_SCALE + 1
        assert sum(box.height * box.width for box in PatchGrid.cover(size, 32, 8).boxes()) >= size[0] * size[1]
        sizes.add(tuple(sorted(size)))
    assert len(sizes) > 15


def test_turns_of_fewer_kinds_leave_all_else_as_drawn(tmp_path) -> None:
    """Not turned, or mirrored where all turns mirror; position, scale and colours are the same."""
    mirrored = []
    for seed in range(30):
        every, mirror, none = (Draw.of([seed, 0, 1], turns, jitter=True) for turns in ("all", "mirror", "none"))
        assert (mirror.turn, none.turn) == (Turn(every.turn.mirrored), Turn())
        assert mirror == replace(every, turn=mirror.turn) and none == replace(every, turn=Turn())
        mirrored.append(mirror.turn.mirrored)
    assert set(mirrored) == {False, True}
    data = SegmentationDataset([write_item(tmp_path, (20, 31))], CLASSES, 8, augment=True)
    data.turns = "mirror"
    assert {tuple(data[epoch, 0].label.shape) for epoch in range(20)} == {(20, 31)}
    assert len({data[epoch, 0].image.numpy().tobytes() for epoch in range(20)}) == 2
