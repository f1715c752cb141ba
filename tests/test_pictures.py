"""Pictures of every kind as sources, and how sources shrink."""

import numpy as np
import pytest
import torch
from builders import image_tensor, shrink_image
from pictures import random_image
from PIL import Image

from imaging.image_file import View, open_image
from imaging.pictures import picture, shrink
from imaging.probe import probe
from imaging.sources import CropSource, MemorySource, load_in_memory
from utils.stretch import Stretch
from utils.tiling import Box

SIZE = (37, 53)


def pillow(size=SIZE, seed=0) -> Image.Image:
    return Image.fromarray(random_image(size, seed).permute(1, 2, 0).numpy())


def pixels(path, **arguments) -> torch.Tensor:
    with open_image(path, View(arguments.get("bands"), arguments.get("stretch") or Stretch())) as source:
        assert probe(path).size == source.size
        return source.read(Box(0, 0, *source.size))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".bmp", ".webp"])
def test_pictures_give_what_pillow_shows(tmp_path, mode, suffix):
    path = tmp_path / f"a{suffix}"
    image = pillow().convert(mode)
    try:
        image.save(path)
    except OSError:
        pytest.skip(f"{suffix} has no {mode}")
    assert torch.equal(pixels(path), image_tensor(Image.open(path).convert("RGB")))


def test_greys_of_16_bits_are_stretched(tmp_path):
    values = np.linspace(1000, 3000, 50 * 20).reshape(50, 20).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = pixels(tmp_path / "a.png", stretch=Stretch.parse("1000,3000"))
    assert found.shape == (3, 50, 20)
    assert (found[0, 0, 0], found[0, -1, -1]) == (0, 255)
    assert abs(float(found.float().mean()) - 127.5) < 0.5
    clipped = pixels(tmp_path / "a.png", stretch=Stretch.parse("10%,90%"))[0]
    assert (clipped == 0).float().mean() == pytest.approx(0.1, abs=0.01)
    assert (clipped == 255).float().mean() == pytest.approx(0.1, abs=0.01)


def test_constant_and_missing_values_survive_the_stretch():
    planes = np.array([[[5.0, 5.0, np.nan]]])
    assert Stretch().apply(planes, Stretch().limits(planes)).tolist() == [[[0, 0, 0]]]


SHAPES = [(64, 64), (100, 333), (333, 100), (1, 200), (200, 1), (64, 200), (40, 30)]


@pytest.mark.parametrize("size", SHAPES)
def test_a_source_shrinks_to_what_pillow_makes_of_the_image(size):
    image = pillow(size)
    assert torch.equal(shrink(MemorySource(image_tensor(image)), (64, 64)), image_tensor(shrink_image(image, 64)))


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_shrinking_band_by_band_differs_by_rounding_alone(monkeypatch, size, rows):
    monkeypatch.setattr("imaging.pictures._STRIP_PIXELS", rows * size[1])
    source = MemorySource(random_image(size))
    found, expected = shrink(source, (64, 48), most=1), shrink(source, (64, 48))
    assert (found.int() - expected.int()).abs().max() <= 1


def test_parts_and_held_images_read_the_same_pixels():
    image = random_image((40, 60))
    part = CropSource(MemorySource(image), Box(5, 7, 30, 20))
    expected = image[:, 5:35, 7:27]
    for source in (part, load_in_memory(part), load_in_memory(part, most=1)):
        assert source.size == (30, 20)
        assert torch.equal(source.read(Box(2, 3, 10, 11)), expected[:, 2:12, 3:14])
    assert isinstance(load_in_memory(part), MemorySource)
    assert load_in_memory(part, most=1) is part


def test_pictures_in_memory_keep_more_than_8_bits_apart():
    values = np.array([[0, 700, 1000]], np.uint16)
    source = picture(Image.fromarray(values), View(None, Stretch.parse("0,1000")))
    assert source.read(Box(0, 0, 1, 3))[0].tolist() == [[0, 178, 255]]
