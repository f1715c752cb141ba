"""Turns of images: inverse, consistent with boxes, and a group."""

import pytest
import torch
from pictures import random_image

from imaging.sources import MemorySource, TurnedSource
from utils.tiling import Box
from utils.turns import TURNS, Turn

SIZE = (13, 22)


@pytest.mark.parametrize("turn", TURNS["d4"])
def test_undo_is_the_inverse(turn):
    image = random_image(SIZE)
    assert torch.equal(turn.undo(turn.apply(image)), image)
    assert tuple(turn.apply(image).shape[-2:]) == turn.size(SIZE)


@pytest.mark.parametrize("turn", TURNS["d4"])
def test_a_window_of_a_turned_image_is_the_turned_window(turn):
    image = random_image(SIZE)
    source = TurnedSource(MemorySource(image), turn)
    box = Box(3, 5, 6, 4)
    assert torch.equal(source.read(box), box.of(turn.apply(image)))


def test_the_eight_turns_differ_and_turning_twice_is_one_of_them():
    image = random_image((5, 5))
    found = [turn.apply(image) for turn in TURNS["d4"]]
    for k, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[k + 1 :])
        for turn in TURNS["d4"]:
            assert any(torch.equal(turn.apply(one), other) for other in found)


def test_flip_mirrors_left_right():
    assert TURNS["flip"] == (Turn(), Turn(mirrored=True))
    image = random_image(SIZE)
    assert torch.equal(TURNS["flip"][1].apply(image), image.flip(-1))
