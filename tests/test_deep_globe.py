"""DeepGlobe is found in both of its layouts, and what is missing is told or refused."""

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from PIL import Image

from dataset.base import SegmentationDataset
from dataset.deep_globe import published_splits
from dataset.registry import describe
from utils.errors import InputError


def write_pair(folder: Path, id_: str, label_folder: Path | None = None) -> None:
    """A black image with a black label, beside it or in a folder of its own."""
    for path in (folder / f"{id_}_sat.jpg", (label_folder or folder) / f"{id_}_mask.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12)).save(path)


def opened(root: Path, split: str) -> SegmentationDataset:
    return describe("deep_globe", root).open(split, 8)


def test_the_distributed_layout_is_split_by_the_lists_and_tells_once_what_is_missing(tmp_path, caplog) -> None:
    lists = published_splits()
    assert Counter(lists.values()) == {"train": 454, "crossvali": 207, "test": 142}
    chosen = {split: [id_ for id_ in lists if lists[id_] == split][3:6] for split in ("train", "crossvali", "test")}
    for id_ in chain(*chosen.values(), ["123456789"]):
        write_pair(tmp_path / "land-train", id_)
    for split, ids in chosen.items():
        caplog.clear()
        assert [item.id for item in opened(tmp_path, split).items] == sorted(ids, key=int)
        (line,) = caplog.messages
        total = Counter(lists.values())[split]
        assert f"{total - 3} of the {total} images listed for {split} are not there, and 1 images" in line
    assert len(opened(tmp_path / "land-train", "test")) == 3


def test_the_prepared_layout_is_split_by_its_folders(tmp_path) -> None:
    for split, ids in {"train": ("1000", "20", "3"), "crossvali": ("4",), "test": ("5",)}.items():
        for id_ in ids:
            write_pair(tmp_path / split / "Sat", id_, tmp_path / split / "Label")
    assert [item.id for item in opened(tmp_path, "train").items] == ["3", "20", "1000"]
    assert [item.id for item in opened(tmp_path, "crossvali").items] == ["4"]
    assert opened(tmp_path, "test")[0].id == "5"


def test_the_unlabelled_split_is_read_only_when_asked_for_and_has_no_labels(tmp_path) -> None:
    write_pair(tmp_path / "train" / "Sat", "1", tmp_path / "train" / "Label")
    assert len(opened(tmp_path, "train")) == 1
    write_pair(tmp_path / "offical_crossvali" / "Sat", "2", tmp_path)
    assert opened(tmp_path, "offical_crossvali")[0].label is None


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_folder_of_neither_layout_is_refused_with_both_layouts(tmp_path, folder) -> None:
    with pytest.raises(InputError, match=r"(has no DeepGlobe images|is no folder).*train/Sat/ID_sat\.jpg.*distributed"):
        opened(tmp_path / folder, "train")


def test_empty_and_unknown_splits_missing_labels_and_two_files_of_one_id_are_refused(tmp_path) -> None:
    write_pair(tmp_path, "119")
    with pytest.raises(InputError, match=r"split crossvali is empty: no ID_sat\.jpg of it in .*deepglobe\.org"):
        opened(tmp_path, "crossvali")
    write_pair(tmp_path, "266")
    (tmp_path / "266_mask.png").unlink()
    with pytest.raises(InputError, match=r"1 of 2 images have no label: .*266_sat\.jpg; expected is ID_mask\.png in "):
        opened(tmp_path, "train")
    (tmp_path / "119_sat.png").write_bytes((tmp_path / "119_sat.jpg").read_bytes())
    with pytest.raises(InputError, match=r"119_sat.* are both 119's"):
        opened(tmp_path, "train")
    with pytest.raises(InputError, match="--split validation: DeepGlobe has train, crossvali"):
        opened(tmp_path, "validation")
