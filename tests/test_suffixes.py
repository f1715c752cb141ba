"""Files of a folder: those of every format that the docs list are taken, and the others are said."""

from pathlib import Path

import numpy as np
import pytest
from builders import describe_set
from PIL import Image

from dataset.registry import describe
from imaging.probe import IMAGE_SUFFIXES, RARE_SUFFIXES
from prediction.run import find_images


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_a_folder_to_segment_gives_all_image_formats_and_says_what_it_leaves_out(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    names = [f"a{suffix}" for suffix in (*IMAGE_SUFFIXES, *RARE_SUFFIXES)] + ["B.PPM"]
    touch(tmp_path / "in", *names)
    assert sorted(path.name for path in find_images([str(tmp_path / "in")])) == sorted(names)
    assert "left out" not in caplog.text
    touch(tmp_path / "in", "notes.txt", "a.xml", "b.xml", "README", ".hidden")
    assert len(find_images([str(tmp_path / "in")])) == len(names)
    assert caplog.text.count("left out") == 1
    assert "4 files are left out, whose suffixes are no image's (.txt, .xml, README); name a file" in caplog.text


@pytest.mark.parametrize("images", ["{id}.*", "{id}.ppm"])
def test_a_data_set_has_all_image_formats(tmp_path, images) -> None:
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    for name in ("a.ppm", "b.ppm", "a_label.png", "b_label.png"):
        picture.save(tmp_path / name)
    items = describe("folder", describe_set(tmp_path, images=images)).find("train")
    assert [item.image.name for item in items] == ["a.ppm", "b.ppm"]


def test_what_is_made_from_a_picture_is_no_second_one(tmp_path) -> None:
    touch(tmp_path, "a.tif", "a.vrt", "a.gif", "a_label.png")
    (item,) = describe("folder", describe_set(tmp_path, images="{id}.*")).find("train")
    assert item.image.name == "a.tif"
