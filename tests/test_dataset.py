"""Images and labels are read right or refused by name; samples are drawn, turned and shrunk as they should be.

DeepGlobe is found in both of its layouts; scale and colours of `--augment` are true to the labels.
"""

import math
import multiprocessing
import re
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from files import read_label
from PIL import Image, ImageFile
from torch.utils.data._utils.pin_memory import pin_memory

from dataset import augmentation, base
from dataset.augmentation import LARGEST_SCALE, ColorChange, Draw
from dataset.base import Item, Sample, SegmentationDataset
from dataset.deep_globe import DEEP_GLOBE, published_splits
from dataset.loader import BatchPart, EpochSampler, SampleLoader
from dataset.registry import describe
from imaging.image_file import open_image
from imaging.planes import MAX_PIXELS
from utils.classes import IGNORED
from utils.errors import InputError
from utils.resize import shrink_label
from utils.settings import Settings
from utils.tiling import Box, PatchGrid
from utils.turns import TURNS, Turn

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
    """The same `ids`, with or without 255, in every way in which a file may hold them."""
    order = np.array([3, 6, 0, 5, 1, 4, 2])
    forms = {
        "grey ids": Image.fromarray(ids),
        "ids in three channels": Image.fromarray(np.repeat(ids[..., None], 3, axis=2)),
        "palette of other colours": with_palette(ids, RNG.integers(1, 200, (7 if ids.max() < 7 else 256, 3))),
    }
    if ids.max() == IGNORED:
        return {**forms, "palette of class colours": with_palette(ids, np.pad(PALETTE, ((0, 249), (0, 0))))}
    rgb = PALETTE[ids]
    return {
        **forms,
        "rgb": Image.fromarray(rgb),
        "black and white": Image.fromarray(PALETTE[ids % 2 * 6]),
        "rgba": Image.fromarray(rgb).convert("RGBA"),
        "grey ids of 16 bits": Image.fromarray(ids.astype(np.uint16)),
        "palette in the classes' order": with_palette(ids, PALETTE),
        "palette in another order": with_palette(np.argsort(order).astype(np.uint8)[ids], PALETTE[order]),
    }


@pytest.mark.parametrize("values", [range(7), (0, 1, 6, IGNORED)])
def test_every_form_of_a_label_gives_the_same_ids(tmp_path, values) -> None:
    ids = RNG.choice(np.array(values, np.uint8), (9, 13))
    ids[0, 0] = values[-1]
    for form, image in label_forms(ids).items():
        image.save(tmp_path / "7_mask.png")
        read = read_label(tmp_path / "7_mask.png", DEEP_GLOBE, (9, 13))
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, ids % 2 * 6 if form == "black and white" else ids, form)


def test_foreign_colours_indices_and_sizes_are_refused_with_place_and_count(tmp_path) -> None:
    path, pixels = tmp_path / "7_mask.png", PALETTE[RNG.integers(0, 7, (9, 13))]
    pixels[4, 5:8] = (9, 8, 7)
    Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match=r"7_mask\.png: colour \(9, 8, 7\) at row 4, column 5 .* \(3 such pixels\)"):
        read_label(path, DEEP_GLOBE, (9, 13))
    # Pillow fits the bits per pixel to the palette, so 255 is written as 15
    with_palette(RNG.choice(np.array([0, 1, 255], np.uint8), (9, 13)), PALETTE).save(path)
    with pytest.raises(InputError, match=r"7_mask\.png: index 15 is neither a class nor in the palette of 7 colours"):
        read_label(path, DEEP_GLOBE, (9, 13))
    with pytest.raises(InputError, match=r"7_mask\.png is 9 x 13 pixels, but its image is 20 x 24"):
        read_label(path, DEEP_GLOBE, (20, 24))


def test_truncated_missing_and_foreign_files_are_refused_by_name_whatever_pillow_is_set_to(
    tmp_path, monkeypatch
) -> None:
    """Truncated files of every format: tests/test_folder.py."""
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


def test_a_sample_holds_image_and_label_at_both_sizes_as_pillow_shrinks_them_whatever_its_turn(tmp_path) -> None:
    plain, turned = painted(tmp_path, (30, 50), augment=False), painted(tmp_path, (30, 50))
    np.testing.assert_array_equal(plain[0].image.permute(1, 2, 0), np.asarray(Image.open(tmp_path / "119_sat.jpg")))
    for sample in (plain[0], *(turned[epoch, 0] for epoch in range(20))):
        assert sample.image.dtype == sample.label.dtype == torch.uint8
        assert sorted(sample.label.shape) == [30, 50]
        pixels, ids = sample.image.permute(1, 2, 0).numpy(), sample.label.numpy()
        np.testing.assert_array_equal(pixels, PALETTE[ids])
        shrunk = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(sample.global_image.permute(1, 2, 0), np.asarray(shrunk))
        shrunk = Image.fromarray(ids).resize((2, 2), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(sample.global_label, np.asarray(shrunk))


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
    torch.testing.assert_close(a[1:], b[1:])


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
    dataset, pinned = small_set(tmp_path), []
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
    assert re.fullmatch(f"{tmp_path / '2_sat.jpg'} .*", str(caught.value))
    assert caught.value.kind == "unreadable"


def write_black_pair(folder: Path, id_: str, label_folder: Path | None = None) -> None:
    """A black image with a black label, beside it or in a folder of its own."""
    for path in (folder / f"{id_}_sat.jpg", (label_folder or folder) / f"{id_}_mask.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12)).save(path)


def open_deep_globe(root: Path, split: str) -> SegmentationDataset:
    return describe("deep_globe", root).open(split, 8)


def test_the_distributed_layout_is_split_by_the_lists_and_tells_once_what_is_missing(tmp_path, caplog) -> None:
    lists = published_splits()
    assert Counter(lists.values()) == {"train": 454, "crossvali": 207, "test": 142}
    chosen = {split: [id_ for id_ in lists if lists[id_] == split][3:6] for split in ("train", "crossvali", "test")}
    for id_ in chain(*chosen.values(), ["123456789"]):
        write_black_pair(tmp_path / "land-train", id_)
    for split, ids in chosen.items():
        caplog.clear()
        assert [item.id for item in open_deep_globe(tmp_path, split).items] == sorted(ids, key=int)
        (line,) = caplog.messages
        total = Counter(lists.values())[split]
        assert f"{total - 3} of the {total} images listed for {split} are not there, and 1 images" in line
    assert len(open_deep_globe(tmp_path / "land-train", "test")) == 3


def test_the_prepared_layout_is_split_by_its_folders_of_which_one_has_no_labels(tmp_path) -> None:
    for split, ids in {"train": ("1000", "20", "3"), "crossvali": ("4",), "test": ("5",)}.items():
        for id_ in ids:
            write_black_pair(tmp_path / split / "Sat", id_, tmp_path / split / "Label")
    assert [item.id for item in open_deep_globe(tmp_path, "train").items] == ["3", "20", "1000"]
    assert [item.id for item in open_deep_globe(tmp_path, "crossvali").items] == ["4"]
    assert open_deep_globe(tmp_path, "test")[0].id == "5"
    write_black_pair(tmp_path / "offical_crossvali" / "Sat", "2", tmp_path)
    assert open_deep_globe(tmp_path, "offical_crossvali")[0].label is None


def test_other_layouts_empty_and_unknown_splits_missing_labels_and_two_files_of_one_id_are_refused(tmp_path) -> None:
    def check(message: str, split: str = "train", root: Path = tmp_path) -> None:
        with pytest.raises(InputError, match=message):
            open_deep_globe(root, split)

    for folder in ("", "nowhere"):
        layouts = r"(has no DeepGlobe images|is no folder).*train/Sat/ID_sat\.jpg.*distributed"
        check(layouts, root=tmp_path / folder)
    write_black_pair(tmp_path, "119")
    check(r"split crossvali is empty: no ID_sat\.jpg of it in .*deepglobe\.org", "crossvali")
    write_black_pair(tmp_path, "266")
    (tmp_path / "266_mask.png").unlink()
    check(r"1 of 2 images have no label: .*266_sat\.jpg; expected is ID_mask\.png in ")
    (tmp_path / "119_sat.png").write_bytes((tmp_path / "119_sat.jpg").read_bytes())
    check(r"119_sat.* are both 119's")
    check("--split validation: DeepGlobe has train, crossvali", "validation")


def write_shades(root: Path, size: tuple[int, int], id_: str = "a") -> Item:
    """A random image; its label is the image's red, cut to five shades."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    return builders.write_item(root, id_, pixels, pixels[..., 0] // 52)


def test_all_eight_turns_and_no_others_occur_as_often_as_they_should_and_as_ever(tmp_path) -> None:
    data = painted(tmp_path, (6, 9), seed=3)
    original, turns = np.asarray(Image.open(tmp_path / "119_sat.jpg")), {}
    for mirrored in (False, True):
        source = np.fliplr(original) if mirrored else original
        turns |= {np.rot90(source, k).transpose(2, 0, 1).tobytes(): Turn(mirrored, k) for k in range(4)}
    assert len(turns) == 8
    drawn = [turns[data[epoch, 0].image.numpy().tobytes()] for epoch in range(600)]
    # CRC-32 of the id: 0x43b0d90f
    expected = [Turn(*augmentation.draw_turn(np.random.default_rng([3, k, 0x43B0D90F]))) for k in range(20)]
    assert drawn[:20] == expected
    for turn, count in Counter(drawn).items():
        assert count == pytest.approx(600 / (4 if turn.quarters == 0 else 12), rel=0.4)


def test_turned_copies_equal_turned_views() -> None:
    for shape in ((5, 7), (3, 5, 7), (1, 4, 1)):
        pixels = torch.arange(math.prod(shape), dtype=torch.uint8).view(shape)
        for turn in TURNS["d4"]:
            found = augmentation.turned(pixels, turn)
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
    bounds = np.array([augmentation.LARGEST_CHANGE] * 3 + [augmentation.LARGEST_HUE])
    shifts = np.array([draw.color for draw in draws]) - [1, 1, 1, 0]
    assert (abs(shifts) <= bounds).all()
    assert (shifts.min(0) < -0.8 * bounds).all() and (shifts.max(0) > 0.8 * bounds).all()


def test_a_sample_depends_on_seed_epoch_and_id_only(tmp_path) -> None:
    item = write_shades(tmp_path, (20, 31))

    def samples(items: list[Item], seed: int, index: int) -> list[bytes]:
        data = SegmentationDataset(items, DEEP_GLOBE, 8, augment=True, seed=seed, jitter=True)
        return [data[epoch, index].image.numpy().tobytes() for epoch in range(6)]

    other = item._replace(id="b")
    assert samples([item], 1, 0) == samples([other, item], 1, 1)
    assert not set(samples([item], 1, 0)) & set(samples([item], 2, 0))
    assert not set(samples([item], 1, 0)) & set(samples([other], 1, 0))


def test_colours_leave_labels_sizes_and_greys_and_do_not_depend_on_strips_or_turns(monkeypatch) -> None:
    image, ids = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8), torch.randint(0, 5, (40, 30), dtype=torch.uint8)
    before, change, turn = image.clone(), ColorChange(1.2, 0.8, 1.1, 0.02), Turn(True, 1)
    changed, same = Draw(color=change).apply(image, ids, (40, 30))
    assert torch.equal(same, ids)
    assert (changed.shape, changed.dtype) == (image.shape, torch.uint8)
    assert not torch.equal(changed, image) and torch.equal(image, before)
    assert torch.equal(change.apply(turn.apply(image)), turn.apply(changed))
    for grey in (0, 100, 255):
        found = ColorChange(1.1, 0.9, 1.25, 0.03).apply(torch.full((3, 5, 6), grey, dtype=torch.uint8))
        assert (found == found[:1]).all()
        assert abs(int(found[0, 0, 0]) - min(255, round(1.1 * grey))) <= 1  # a single shade has no contrast
    monkeypatch.setattr("dataset.augmentation._STRIP_PIXELS", 100)
    assert torch.equal(change.apply(image), changed)


def test_labels_follow_the_scale_with_nearest_and_no_new_id() -> None:
    ids = torch.zeros(20, 30, dtype=torch.uint8)
    ids[:, 15:] = 3
    image = ids.mul(80).expand(3, -1, -1).contiguous()
    for size in ((30, 45), (13, 20), (20, 30)):
        larger, labels = augmentation.resize(image, ids, size)
        assert tuple(labels.shape) == tuple(larger.shape[1:]) == size
        assert set(labels.unique().tolist()) == {0, 3}
        middle = size[1] // 2
        assert (labels[:, : middle - 1] == 0).all() and (labels[:, middle + 1 :] == 3).all()
        assert (larger[:, :, : middle - 2] == 0).all() and (larger[:, :, middle + 3 :] == 240).all()


def test_every_scaled_size_can_be_cut_into_patches(tmp_path) -> None:
    item = write_shades(tmp_path, (40, 67))
    data = SegmentationDataset([item], DEEP_GLOBE, 8, augment=True, jitter=True)
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
    data = SegmentationDataset([write_shades(tmp_path, (20, 31))], DEEP_GLOBE, 8, augment=True)
    data.turns = "mirror"
    assert {tuple(data[epoch, 0].label.shape) for epoch in range(20)} == {(20, 31)}
    assert len({data[epoch, 0].image.numpy().tobytes() for epoch in range(20)}) == 2
