"""Images and labels are read right or refused by name; samples are drawn, turned and shrunk as they should be."""

import multiprocessing
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from files import read_label
from PIL import Image, ImageFile
from torch.utils.data._utils.pin_memory import pin_memory

from dataset import base
from dataset.base import Item, Sample, SegmentationDataset
from dataset.deep_globe import DEEP_GLOBE
from dataset.loader import BatchPart, EpochSampler, SampleLoader
from imaging.image_file import open_image
from imaging.planes import MAX_PIXELS
from utils.errors import InputError
from utils.resize import shrink_label
from utils.settings import Settings
from utils.tiling import Box

PALETTE = np.array(DEEP_GLOBE.palette, np.uint8)
RNG = np.random.default_rng(0)


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """(3, H, W) uint8."""
    with open_image(path, max_pixels=max_pixels) as image:
        return image.read(Box(0, 0, *image.size))


def write_pair(folder: Path, id_: str, size: tuple[int, int] = (24, 24)) -> None:
    """A random label in class colours, and an image that looks the same (losslessly, though named .jpg)."""
    colors = Image.fromarray(PALETTE[np.random.default_rng(int(id_)).integers(0, 7, size)])
    colors.save(folder / f"{id_}_sat.jpg", "PNG")
    colors.save(folder / f"{id_}_mask.png")


def with_palette(ids: np.ndarray, colors: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids)
    image.putpalette(colors.astype(np.uint8).tobytes())
    assert image.mode == "P"
    return image


def label_forms(ids: np.ndarray) -> dict[str, Image.Image]:
    """The same `ids`, none 255, in every way in which a file may hold them."""
    order = np.array([3, 6, 0, 5, 1, 4, 2])
    rgb = PALETTE[ids]
    return {
        "rgb": Image.fromarray(rgb),
        "black and white": Image.fromarray(PALETTE[ids % 2 * 6]),
        "rgba": Image.fromarray(rgb).convert("RGBA"),
        "grey ids": Image.fromarray(ids),
        "grey ids of 16 bits": Image.fromarray(ids.astype(np.uint16)),
        "ids in three channels": Image.fromarray(np.repeat(ids[..., None], 3, axis=2)),
        "palette of other colours": with_palette(ids, RNG.integers(1, 200, (7, 3))),
        "palette in the classes' order": with_palette(ids, PALETTE),
        "palette in another order": with_palette(np.argsort(order).astype(np.uint8)[ids], PALETTE[order]),
    }


@pytest.mark.parametrize("form", label_forms(np.zeros((1, 1), np.uint8)))
def test_every_form_of_a_label_gives_the_same_ids(tmp_path, form) -> None:
    ids = RNG.integers(0, 7, (9, 13), np.uint8)
    path = tmp_path / "7_mask.png"
    label_forms(ids)[form].save(path)
    read = read_label(path, DEEP_GLOBE, (9, 13))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, ids % 2 * 6 if form == "black and white" else ids)


@pytest.mark.parametrize("form", ["grey", "three channels", "palette of other colours", "palette of class colours"])
def test_id_255_is_kept_in_every_form_of_ids(tmp_path, form) -> None:
    ids = RNG.choice(np.array([0, 1, 6, 255], np.uint8), (9, 13))
    image = {
        "grey": Image.fromarray(ids),
        "three channels": Image.fromarray(np.repeat(ids[..., None], 3, axis=2)),
        "palette of other colours": with_palette(ids, RNG.integers(1, 200, (256, 3))),
        "palette of class colours": with_palette(ids, np.pad(PALETTE, ((0, 249), (0, 0)))),
    }[form]
    image.save(tmp_path / "7_mask.png")
    np.testing.assert_array_equal(read_label(tmp_path / "7_mask.png", DEEP_GLOBE, (9, 13)), ids)


def test_foreign_colours_indices_and_sizes_are_refused_with_place_and_count(tmp_path) -> None:
    pixels = PALETTE[RNG.integers(0, 7, (9, 13))]
    pixels[4, 5:8] = (9, 8, 7)
    Image.fromarray(pixels).save(tmp_path / "7_mask.png")
    expected = r"7_mask\.png: colour \(9, 8, 7\) at row 4, column 5 .* \(3 such pixels\)"
    with pytest.raises(InputError, match=expected):
        read_label(tmp_path / "7_mask.png", DEEP_GLOBE, (9, 13))
    # Pillow fits the bits per pixel to the palette, so 255 is written as 15
    with_palette(RNG.choice(np.array([0, 1, 255], np.uint8), (9, 13)), PALETTE).save(tmp_path / "7_mask.png")
    with pytest.raises(InputError, match=r"7_mask\.png: index 15 is neither a class nor in the palette of 7 colours"):
        read_label(tmp_path / "7_mask.png", DEEP_GLOBE, (9, 13))
    with pytest.raises(InputError, match=r"7_mask\.png is 9 x 13 pixels, but its image is 20 x 24"):
        read_label(tmp_path / "7_mask.png", DEEP_GLOBE, (20, 24))


def test_truncated_missing_and_foreign_files_are_refused_by_name_whatever_pillow_is_set_to(
    tmp_path, monkeypatch
) -> None:
    """Truncated files of every format: tests/test_broken_files.py."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for path in (tmp_path / "7_sat.jpg", tmp_path / "7_sat.png"):
        with pytest.raises(InputError, match=f"{path.name} cannot be read: No such file"):
            read_image(path)
        Image.fromarray(RNG.integers(0, 256, (80, 80, 3), np.uint8)).save(path)
        whole = path.read_bytes()
        for kept in (0, 0.3, 0.999):
            path.write_bytes(whole[: int(kept * len(whole))])
            with pytest.raises(InputError, match=f"{path.name} cannot be read: .*copy it again"):
                read_image(path)
        path.write_bytes(b"no image at all")
        with pytest.raises(InputError, match=f"{path.name} cannot be read: not an image"):
            read_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "the setting is put back"


def test_the_pixel_limit_is_ours_not_pillows(tmp_path, monkeypatch) -> None:
    write_pair(tmp_path, "119")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(tmp_path / "119_sat.jpg").shape == (3, 24, 24)
    with pytest.raises(InputError, match=r"119_sat\.jpg has 576 pixels, more than the 575 allowed"):
        read_image(tmp_path / "119_sat.jpg", max_pixels=575)


def painted(tmp_path: Path, size: tuple[int, int], augment: bool = True, seed: int = 0) -> SegmentationDataset:
    """A data set of one image that shows its label's colours."""
    write_pair(tmp_path, "119", size)
    item = Item("119", tmp_path / "119_sat.jpg", tmp_path / "119_mask.png")
    return SegmentationDataset([item], DEEP_GLOBE, 8, augment, seed)


def drawn(dataset: SegmentationDataset, epochs: int) -> list[bytes]:
    return [dataset[epoch, 0].image.numpy().tobytes() for epoch in range(epochs)]


def test_a_sample_holds_image_and_label_at_both_sizes_as_pillow_shrinks_them(tmp_path) -> None:
    dataset = painted(tmp_path, (30, 50), augment=False)
    sample = dataset[0]
    image, label = Image.open(tmp_path / "119_sat.jpg"), Image.fromarray(sample.label.numpy())
    assert sample.image.dtype == sample.label.dtype == torch.uint8
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0), np.asarray(image))
    np.testing.assert_array_equal(
        sample.global_image.permute(1, 2, 0), np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
    )
    np.testing.assert_array_equal(sample.global_label, np.asarray(label.resize((2, 2), Image.Resampling.NEAREST)))


def test_a_turned_sample_is_turned_whole_with_its_label_and_its_shrunk_image(tmp_path) -> None:
    dataset = painted(tmp_path, (30, 50))
    for epoch in range(20):
        sample = dataset[epoch, 0]
        pixels = sample.image.permute(1, 2, 0).numpy()
        assert sorted(sample.label.shape) == [30, 50]
        np.testing.assert_array_equal(pixels, PALETTE[sample.label.numpy()])
        shrunk = np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(sample.global_image.permute(1, 2, 0), shrunk)
        torch.testing.assert_close(sample.global_label, shrink_label(sample.label, (2, 2)))


def test_all_eight_turns_and_no_others_occur_as_often_as_they_should(tmp_path) -> None:
    dataset = painted(tmp_path, (6, 9))
    original = np.asarray(Image.open(tmp_path / "119_sat.jpg"))
    turns = {}
    for mirrored in (False, True):
        source = np.fliplr(original) if mirrored else original
        turns |= {np.rot90(source, k).transpose(2, 0, 1).tobytes(): (mirrored, k) for k in range(4)}
    counts = Counter(turns[image] for image in drawn(dataset, 600))
    assert len(counts) == 8
    for (_, quarters), count in counts.items():
        assert count == pytest.approx(600 / (4 if quarters == 0 else 12), rel=0.4)


def test_shrunk_images_are_kept_within_a_limit_and_stay_the_same(tmp_path, monkeypatch) -> None:
    dataset = small_set(tmp_path)
    dataset.augment, dataset.keep_shrunk = False, True
    monkeypatch.setattr("dataset.base.KEPT_SHRUNK_BYTES", 3 * 8 * 8 * 3)
    calls = []
    shrink = base.shrink
    monkeypatch.setattr("dataset.base.shrink", lambda *given: calls.append(given) or shrink(*given))
    first = [dataset[k] for k in range(4)]
    for sample in first[1:]:
        sample.global_image.share_memory_()
    again = [dataset[k] for k in range(4)]
    assert len(calls) == 5  # the fourth does not fit
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)
        assert not b.global_image.is_shared()  # a worker that sent it does not hold a file open for it


def test_without_the_whole_image_the_rest_of_a_sample_is_the_same(tmp_path) -> None:
    dataset = small_set(tmp_path)
    whole = dataset[2, 3]
    dataset.whole = False
    assert dataset[2, 3].image is None
    assert_same(dataset[2, 3]._replace(image=whole.image), whole)
    bare = SegmentationDataset([dataset.items[0]._replace(label=None)], DEEP_GLOBE, 8, augment=True)[3, 0]
    assert bare.label is None and bare.global_label is None


@pytest.mark.parametrize(
    "source", [1, 2, 5, 7, 29, 31, 124, 127, 253, 500, 508, 512, 719, 1000, 1023, 2448, 2449, 5000]
)
def test_shrunk_labels_equal_pillows(source) -> None:
    line = np.arange(source)
    for target in (1, 2, 3, 8, 21, 31, 63, 126, 127, 128, 134, 250, 375, 508):
        for label in (line >> 8, line & 255):  # two bytes tell every index
            label = label.astype(np.uint8)[None]
            expected = np.asarray(Image.fromarray(label).resize((target, 1), Image.Resampling.NEAREST))
            np.testing.assert_array_equal(shrink_label(torch.from_numpy(label), (1, target)), expected)
            np.testing.assert_array_equal(shrink_label(torch.from_numpy(label.T), (target, 1)), expected.T)


def test_the_sampler_visits_every_index_once_in_an_order_of_seed_and_epoch() -> None:
    sampler = EpochSampler(50, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert {key[0] for key in keys} == {epoch}
        assert sorted(key[1] for key in keys) == list(range(50))
        orders.append(keys)
    assert orders[0] == orders[2]
    assert [key[1] for key in orders[0]] != [key[1] for key in orders[1]]
    assert list(EpochSampler(50, seed=4)) != orders[0]


def small_set(folder: Path) -> SegmentationDataset:
    for k in range(4):
        write_pair(folder, str(k), (20 + k, 30 - 2 * k))
    items = [Item(str(k), folder / f"{k}_sat.jpg", folder / f"{k}_mask.png") for k in range(4)]
    return SegmentationDataset(items, DEEP_GLOBE, 8, augment=True, seed=5)


def assert_same(a: Sample, b: Sample) -> None:
    assert a.id == b.id
    for x, y in zip(a[1:], b[1:], strict=True):
        torch.testing.assert_close(x, y)


def test_two_workers_load_what_one_process_loads_in_lists_of_any_sizes(tmp_path) -> None:
    dataset = small_set(tmp_path)
    sampler = EpochSampler(len(dataset), seed=5)
    sampler.set_epoch(7)
    batches = list(SampleLoader(dataset, batch_size=3, sampler=sampler, num_workers=2))
    assert [len(batch) for batch in batches] == [3, 1]
    for key, sample in zip(sampler, chain(*batches), strict=True):
        assert_same(sample, dataset[key])


def test_workers_of_a_persistent_loader_serve_every_epoch_until_it_is_closed(tmp_path) -> None:
    dataset = small_set(tmp_path)
    parts = BatchPart(EpochSampler(len(dataset), seed=5), batch_size=2)
    loader = SampleLoader(dataset, sampler=parts, num_workers=1, persistent=True)
    workers = set()
    for epoch, start in ((0, 0), (1, 1), (2, 0)):
        parts.set_epoch(epoch, start)
        expected = [[dataset[key] for key in keys] for keys in parts]
        batches = iter(loader)
        for samples in expected:
            for one, other in zip(next(batches), samples, strict=True):
                assert_same(one, other)
            if epoch == 0:
                break  # left in the middle
        batches.close()
        workers |= {process.pid for process in multiprocessing.active_children()}
    assert len(workers) == 1
    loader.close()
    assert not multiprocessing.active_children()


def test_samples_are_pinned_whole(tmp_path, monkeypatch) -> None:
    dataset = small_set(tmp_path)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *_: pinned.append(x) or x)
    sample = dataset[0]
    for one in (sample, sample._replace(label=None, global_label=None)):
        assert_same(pin_memory([one])[0], one)
    assert len(pinned) == 4 + 2
    assert SampleLoader(dataset, pin=True).pin_memory and not SampleLoader(dataset).pin_memory


def test_cuda_gets_pinned_memory_and_the_host_does_not_wait(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: bool(calls))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pin") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: calls.append((device, non_blocking)) or x)
    settings, x = Settings(device=torch.device("cuda")), torch.zeros(2)
    settings.to_device(settings.to_device(x))
    assert calls == ["pin", (settings.device, True), (settings.device, True)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_gives_one_clear_line_from_a_worker_too(tmp_path, workers) -> None:
    dataset = small_set(tmp_path)
    (tmp_path / "2_sat.jpg").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        list(SampleLoader(dataset, num_workers=workers))
    assert str(caught.value).startswith(str(tmp_path / "2_sat.jpg"))
    assert "\n" not in str(caught.value)
    assert caught.value.kind == "unreadable"
