"""Windows of large images: where they lie, that runs repeat them, and that memory follows the window."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations

import numpy as np
import pytest
import runs
import torch
from builders import write_item
from files import WHERE
from test_dataset import assert_same

from dataset.augmentation import Windows
from dataset.base import Item, SegmentationDataset
from dataset.loader import BatchPart, EpochSampler, SampleLoader
from dataset.pairs import OpenFiles
from training import limits
from utils.classes import Classes
from utils.errors import InputError
from utils.settings import TrainingSettings
from utils.tiling import Box

CLASSES = Classes.generic(5)
SIZES = {"large": (90, 120), "flat": (30, 100), "small": (40, 20)}
WINDOWS = Windows(48, 3)


@pytest.fixture
def items(tmp_path) -> list[Item]:
    """Images whose red and green are row and column, and labels that are their sum, modulo five."""
    grids = {name: np.mgrid[:height, :width].astype(np.uint8) for name, (height, width) in SIZES.items()}
    return [write_item(tmp_path, name, np.stack([y, x, y * 0], 2), (y + x) % 5) for name, (y, x) in grids.items()]


def open_windows(items: list[Item], **more) -> SegmentationDataset:
    return SegmentationDataset(items, CLASSES, 8, **{"windows": WINDOWS, "augment": True, "seed": 7, **more})


def places(data: SegmentationDataset, epoch: int) -> list[tuple]:
    """Id, first row and column, and size of every sample."""
    found = []
    for k in range(len(data)):
        sample = data[epoch, k]
        found.append((sample.id, *sample.image[:2].flatten(1).amin(1).tolist(), *sorted(sample.image.shape[1:])))
    return found


def test_longer_images_are_cut_and_others_stay_whole(items) -> None:
    data = open_windows(items)
    assert len(data) == 3 + 3 + 1
    assert data.fingerprint().startswith("3 images, 6 windows, checksum ")
    assert open_windows(items, windows=None).fingerprint().startswith("3 images, checksum ")
    assert [data.id(k) for k in range(len(data))] == ["large"] * 3 + ["flat"] * 3 + ["small"]
    for _, top, left, *size in places(data, 0)[:3]:
        assert size == [48, 48]
        assert 0 <= top <= 90 - 48 and 0 <= left <= 120 - 48
    for _, top, left, *size in places(data, 0)[3:6]:
        assert (size, top) == ([30, 48], 0)
        assert 0 <= left <= 100 - 48
    assert places(data, 0)[6] == ("small", 0, 0, 20, 40)
    for sample in (data[epoch, k] for epoch in range(4) for k in range(len(data))):  # all of a sample is of its window
        assert torch.equal((sample.image[0] + sample.image[1]) % 5, sample.label)
        assert sample.global_image.shape == (3, 8, 8)
        mean = sample.image.float().mean((1, 2))
        assert (sample.global_image.float().mean((1, 2)) - mean).abs().max() < 1.5


def test_windows_depend_on_seed_epoch_id_and_number_only(items) -> None:
    data = open_windows(items)
    assert places(data, 4) == places(open_windows(items), 4)
    assert places(data, 4)[:3] == places(open_windows(items[::-1]), 4)[-3:]
    assert places(open_windows(items, windows=Windows(48, 5)), 4)[:3] == places(data, 4)[:3]
    renamed = open_windows([items[0]._replace(id="other")])
    others = (places(data, 5), places(open_windows(items, seed=8), 4), places(renamed, 4))
    drawn = [[place[1:] for place in found[:3]] for found in (places(data, 4), *others)]
    assert all(one != other for one, other in combinations(drawn, 2))
    assert all(len(set(found)) == 3 for found in drawn)


def test_every_place_occurs_with_the_borders_and_a_scaled_window_keeps_its_size() -> None:
    rng = np.random.default_rng(0)
    found = {Windows(3, 1).place((5, 4), tuple(rng.random(2)))[0] for _ in range(300)}
    assert found == {Box(top, left, 3, 3) for top in range(3) for left in range(2)}
    last = np.nextafter(1.0, 0.0)
    assert Windows(100, 1).place((100_000, 7), (last, last))[0] == Box(99_900, 0, 100, 7)
    for scale in (0.67, 0.9, 1.0, 1.1, 1.5):  # it reads more or less
        box, size = Windows(48, 1).place((200, 300), (0.3, 0.6), scale)
        assert size == (48, 48)
        assert box.height == box.width == round(48 / scale)
        box, size = Windows(48, 1).place((200, 30), (0.3, 0.6), scale)
        assert box.width == min(30, round(48 / scale))
        assert size[0] == 48 and abs(size[1] - min(48, 30 * scale)) <= 1


@pytest.mark.parametrize("more", [{}, {"jitter": True}, {"windows": None}, {"windows": None, "jitter": True}])
def test_no_sample_is_smaller_than_the_headers_say(items, more) -> None:
    data = open_windows(items, **more)
    for item in data.items:
        samples = [data[epoch, k] for epoch in range(25) for k in range(len(data)) if data.id(k) == item.id]
        least = min(data.smallest_sample(item)), max(data.smallest_sample(item))
        found = [sorted(sample.label.shape) for sample in samples]
        assert all(low <= side for one in found for low, side in zip(least, one, strict=True))
        assert min(one[0] for one in found) <= 1.1 * least[0]


def test_a_window_too_small_to_train_on_is_refused_before_the_first_step(items) -> None:
    settings = TrainingSettings(size_p=64, sub_batch_size=4, min_overlap=16)
    limits.check_images(open_windows(items[:1]), settings)
    with pytest.raises(InputError, match=r"large\.png is 32 x 32 pixels, and mode 2 would train on a single patch"):
        limits.check_images(open_windows(items[:1], windows=Windows(32, 1)), settings)


def test_files_stay_open_until_others_need_the_room() -> None:
    opened: list[str] = []
    names: list[str] = []  # of files that are open

    @contextmanager
    def start(name: str) -> Iterator[str]:
        names.append(name)
        opened.append(name)
        yield name
        names.remove(name)

    def use(files: OpenFiles, name: str, size: int) -> None:
        with files.use(name, lambda: start(name), lambda _: size) as file:
            assert file == name in names

    files = OpenFiles(10)
    for name in ("a", "b", "a", "c"):  # b is the one that was not used for longest
        use(files, name, 4)
    assert (names, files.held, len(opened)) == (["a", "c"], 8, 3)
    use(files, "huge", 11)
    assert names == ["a", "c"]
    assert pickle.loads(pickle.dumps(files)).held == 0
    names.clear()
    files = OpenFiles()  # without room
    for _ in range(2):
        use(files, "d", 1)
    assert (names, opened.count("d")) == ([], 2)


def test_samples_share_no_memory_with_open_files_and_one_that_cannot_be_opened_leaves_nothing(items) -> None:
    data = open_windows([items[2], items[0]], augment=False)
    data[0].image.zero_()
    data[0].label.zero_()
    assert data[0].image.any() and data[0].label.any()
    data.items[1].label.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InputError, match=r"large_label\.png"):
            data[1]


MEMORY = """
import resource, sys
from dataset.base import Item, SegmentationDataset
from dataset.augmentation import Windows
from pathlib import Path
from utils.classes import Classes
root, size = Path(sys.argv[1]), int(sys.argv[2])
def epoch(name):
    item = Item(name, root / f"{name}.tif", root / f"{name}_label.tif")
    data = SegmentationDataset([item], Classes.generic(5), 64, augment=True, windows=Windows(size, 40), jitter=True)
    for k in range(len(data)):
        data[k]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
first = epoch("small")
print(epoch("huge") - first)
"""


@pytest.mark.slow
def test_an_epoch_of_a_huge_raster_takes_the_memory_of_its_windows(tmp_path) -> None:
    """16 megapixels are 64 MB as pixels and ids."""
    rasterio = pytest.importorskip("rasterio")
    profile = {"driver": "GTiff", "dtype": "uint8", "tiled": True, "compress": "deflate", "crs": WHERE["crs"]}
    profile["transform"] = rasterio.Affine(*WHERE["transform"])
    for name, (height, width) in {"small": (1200, 1200), "huge": (4096, 3900)}.items():
        for ending, bands in (("", 3), ("_label", 1)):
            shape, path = {"count": bands, "height": height, "width": width}, tmp_path / f"{name}{ending}.tif"
            with rasterio.open(path, "w", **profile, **shape) as file:
                for top in range(0, height, 1024):
                    rows = np.full((bands, min(1024, height - top), width), top // 1024 % 5, np.uint8)
                    file.write(rows, window=((top, top + rows.shape[1]), (0, width)))
    assert float(runs.run_python(MEMORY, tmp_path, 256, GDAL_CACHEMAX="8")) < 40


@pytest.mark.slow
def test_two_processes_share_the_windows_of_one(items) -> None:
    """Each sample of an epoch, whatever its place, is the same and is taken once."""
    data = open_windows(items, jitter=True)
    alone = BatchPart(EpochSampler(len(data), 7), 4)
    parts = [BatchPart(EpochSampler(len(data), 7), 4, rank, 2) for rank in (0, 1)]
    for part in (alone, *parts):
        part.set_epoch(3)
    shared = [list(SampleLoader(data, sampler=part, num_workers=rank)) for rank, part in enumerate(parts)]
    for samples, *others in zip(SampleLoader(data, sampler=alone), *shared, strict=True):
        assert len(samples) == sum(map(len, others))
        for rank, part in enumerate(others):
            for sample, expected in zip(part, samples[rank::2], strict=True):
                assert_same(expected, sample)
