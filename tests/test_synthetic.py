"""The generated set is in DeepGlobe's layouts, the same for the same seed, and holds what the network must learn."""

from itertools import product
from pathlib import Path

import cv2
import numpy as np

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


def test_files_are_read_back_as_drawn_up_to_jpeg_and_the_same_seed_gives_the_same_bytes(tmp_path) -> None:
    for name, seed in (("a", "5"), ("b", "5"), ("c", "2")):
        generate(tmp_path / name, "--seed", seed, images=3)
    first, same, other = (contents(tmp_path / name) for name in "abc")
    assert first == same and first.keys() == other.keys()
    assert len(first) == 6 and all(first[name] != other[name] for name in first)
    sample = describe("deep_globe", tmp_path / "a").open("train", 8)[0]
    image, label = draw_scene(5, 0, 64)
    np.testing.assert_array_equal(sample.label, label)
    assert np.abs(sample.image.permute(1, 2, 0).numpy().astype(float) - image).mean() < 8


def test_any_two_images_show_all_classes_and_a_town_has_barren_grounds_mean_colour_but_not_its_texture() -> None:
    for size, seed in product((64, 200), range(4)):
        labels = [draw_scene(seed, index, size)[1] for index in range(2)]
        assert np.unique(labels).tolist() == list(range(7))
    image, label = draw_scene(0, 0, 512)
    town, ground = (image[label == k].astype(float) for k in (URBAN, BARREN))
    assert np.abs(town.mean(0) - ground.mean(0)).max() < 25
    assert town.std() > 1.5 * ground.std()


def test_some_rivers_and_roads_are_too_thin_for_a_shrunk_image_and_crops_swap_colours_with_rangeland() -> None:
    label = draw_scene(0, 1, 512)[1]
    for k in (URBAN, WATER):
        mask = (label == k).astype(np.uint8)
        thick = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((9, 9), np.uint8))
        assert (mask & ~thick).mean() > 0.005
    greener = []
    for index in range(12):  # seasons
        image, label = draw_scene(0, index, 256)
        kinds = [image[label == k] for k in (AGRICULTURE, RANGELAND)]
        if all(map(len, kinds)):
            green = [pixels[:, 1].mean() - pixels[:, 0].mean() for pixels in kinds]
            greener.append(green[0] > green[1])
    assert 0 < sum(greener) < len(greener)


def test_impossible_requests_end_with_one_line_and_a_folder_with_images_is_only_written_to_on_request(
    tmp_path, refused
) -> None:
    for options, message in (
        (["--images", "2"], "--images 2 does not fill every split; ask for at least 3"),
        (["--images", "1", "--prepared"], "ask for at least 2"),
        (["--images", "900"], "ids for train, of which 454 are published"),
        (["--size", "8"], "--size 8 leaves no room"),
        (["--seed", "-1"], "--seed -1 is negative"),
    ):
        assert message in refused(main, "--output", tmp_path, *options)
        assert not contents(tmp_path)
    generate(tmp_path, "--prepared", images=2)
    before, again = contents(tmp_path), ["--prepared", "--seed", "1"]
    told = refused(main, "--output", tmp_path, "--images", 2, "--size", 64, *again)
    assert "holds images already" in told and contents(tmp_path) == before
    assert generate(tmp_path, *again, "--overwrite", images=2) == 0
    assert contents(tmp_path) != before
