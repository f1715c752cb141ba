"""The generated set is in DeepGlobe's layouts, the same for the same seed, and holds what the network must learn."""

from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset.registry import describe
from dataset.synthetic import AGRICULTURE, BARREN, RANGELAND, URBAN, WATER, draw_scene, main


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def generate(folder: Path, *options: str, images: int = 8, size: int = 64) -> int:
    return main(["--output", str(folder), "--images", str(images), "--size", str(size), *options])


def test_the_distributed_layout_fills_every_published_split_and_the_prepared_one_two(tmp_path) -> None:
    for images, counts in ((3, (1, 1, 1)), (8, (5, 2, 1)), (16, (10, 4, 2))):
        assert generate(tmp_path / f"{images}", images=images) == 0
        data = describe("deep_globe", tmp_path / f"{images}")
        assert tuple(len(data.find(split)) for split in ("train", "crossvali", "test")) == counts
    for images, counts in ((2, (1, 1)), (8, (6, 2)), (13, (10, 3))):
        folder = tmp_path / f"prepared{images}"
        assert generate(folder, "--prepared", images=images) == 0
        assert (folder / "train" / "Label").is_dir() and not list(folder.glob("*.*"))
        assert tuple(len(describe("deep_globe", folder).find(split)) for split in ("train", "crossvali")) == counts


def test_files_are_read_back_as_drawn_up_to_jpeg_and_leave_no_parts_behind(tmp_path) -> None:
    generate(tmp_path, "--seed", "5", images=3)
    sample = describe("deep_globe", tmp_path).open("train", 8)[0]
    image, label = draw_scene(5, 0, 64)
    np.testing.assert_array_equal(sample.label, label)
    assert np.abs(sample.image.permute(1, 2, 0).numpy().astype(float) - image).mean() < 8
    assert len(contents(tmp_path)) == 6


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        generate(tmp_path / name, "--seed", seed, images=3)
    first, same, other = (contents(tmp_path / name) for name in "abc")
    assert first == same
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_any_two_images_from_the_first_on_show_all_seven_classes() -> None:
    for size, seed in product((64, 200), range(4)):
        labels = [draw_scene(seed, index, size)[1] for index in range(2)]
        assert np.unique(labels).tolist() == list(range(7))


def test_some_rivers_and_roads_are_too_thin_for_a_shrunk_image() -> None:
    label = draw_scene(0, 1, 512)[1]
    for k in (URBAN, WATER):
        mask = (label == k).astype(np.uint8)
        thick = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((9, 9), np.uint8))
        assert (mask & ~thick).mean() > 0.005


def mean_colors(seed: int, index: int) -> np.ndarray:
    """(7, 3) mean RGB per class, NaN for a class that is not there."""
    image, label = draw_scene(seed, index, 256)
    return np.array([image[label == k].mean(0) if (label == k).any() else [np.nan] * 3 for k in range(7)])


def test_crops_and_rangeland_swap_colours_between_seasons() -> None:
    greener = []
    for index in range(12):
        colors = mean_colors(0, index)
        green = colors[:, 1] - colors[:, 0]
        greener.append(green[AGRICULTURE] > green[RANGELAND])
    assert 0 < sum(greener) < 12


def test_a_town_has_barren_grounds_mean_colour_but_not_its_texture() -> None:
    image, label = draw_scene(0, 0, 512)
    town, ground = (image[label == k].astype(float) for k in (URBAN, BARREN))
    assert np.abs(town.mean(0) - ground.mean(0)).max() < 25
    assert town.std() > 1.5 * ground.std()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "2"], "--images 2 does not fill every split; ask for at least 3"),
        (["--images", "1", "--prepared"], "ask for at least 2"),
        (["--images", "900"], "ids for train, of which 454 are published"),
        (["--size", "8"], "--size 8 leaves no room"),
        (["--seed", "-1"], "--seed -1 is negative"),
    ],
)
def test_impossible_requests_end_with_one_line_and_code_2(tmp_path, options, message, refused) -> None:
    assert message in refused(main, "--output", tmp_path, *options)
    assert not contents(tmp_path)


def test_a_folder_with_images_is_only_written_to_on_request(tmp_path, capsys) -> None:
    generate(tmp_path, "--prepared", images=2)
    before = contents(tmp_path)
    assert generate(tmp_path, "--prepared", "--seed", "1", images=2) == 2
    assert "holds images already" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert generate(tmp_path, "--prepared", "--seed", "1", "--overwrite", images=2) == 0
    assert contents(tmp_path) != before
