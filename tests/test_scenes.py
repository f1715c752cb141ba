"""Large images as scenes: they cover, joining them loses nothing, the next is read ahead, rows go to any sink."""

import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import SIDE, build_header, build_model, build_predictor, build_settings, write_thin_checkpoint
from pictures import PixelPredictor, Whole, pixel_scores, random_image, run, write_checkpoint, write_raster
from torch import Tensor

from examples import segment_array
from imaging.sources import CropSource, MemorySource, load_in_memory
from predict import Box, Cancelled, Segmenter
from prediction import scenes
from prediction.read_ahead import read_ahead
from prediction.scenes import ramps, reduce_scores, scene_grid, segment_scenes
from utils.classes import IGNORED
from utils.distributed import Ranks
from utils.errors import InputError
from utils.turns import TURNS

SIZES = [(300, 500), (161, 160), (160, 1000), (1000, 33), (320, 321), (480, 777)]
BOXES = scene_grid((100, 330), 100).boxes()


def segmented(source, predictor=None, **more) -> Whole:
    """The rows of `segment_scenes`, by default of a predictor of pixels."""
    found = Whole()
    source = MemorySource(source) if isinstance(source, Tensor) else source
    segment_scenes(predictor or PixelPredictor(), source, found, **more)
    return found


@pytest.mark.parametrize("size", [*SIZES, (1, 5001), (32768, 30000)])
@pytest.mark.parametrize("scene_size", [160, 5000])
def test_scenes_cover_with_the_overlap_asked_for_and_no_pixel_is_in_three_along_an_axis(size, scene_size) -> None:
    grid = scene_grid(size, scene_size)
    assert (len(grid) == 1) == (max(size) <= scene_size)
    for axis in (grid.rows, grid.columns):
        assert axis.patch <= scene_size
        assert {*axis.counts().tolist()} <= {1, 2}
        steps = np.diff(axis.starts)
        assert (steps <= axis.patch - scene_size // 16).all()


@pytest.mark.parametrize("size", SIZES)
def test_weights_of_scenes_add_up_to_one_and_scores_of_pixels_survive_any_scenes(size) -> None:
    axis = scene_grid(size, 160).columns
    total = torch.zeros(axis.side)
    for start, weights in zip(axis.starts, ramps(axis), strict=True):
        total[start : start + axis.patch] += weights
        assert weights.diff().abs().max() <= 0.2  # they pass over gradually
    torch.testing.assert_close(total, torch.ones(axis.side))
    image = random_image(size)
    found, expected = (segmented(image, scene_size=side, probabilities=True) for side in (160, 5000))
    assert (found.ids != expected.ids).float().mean() < 1e-3  # ties only
    torch.testing.assert_close(found.probabilities, expected.probabilities, atol=2e-3, rtol=0)
    assert torch.equal(expected.ids, reduce_scores(pixel_scores(image), True).ids)


def test_away_from_seams_a_scene_of_its_own_gives_the_same() -> None:
    image = MemorySource(random_image((100, 330)))
    predictor = build_predictor(build_model(), 3, build_settings())
    grid = scene_grid((100, 330), 128)
    whole = segmented(image, predictor, scene_size=128)
    for index, box in enumerate(grid.boxes()):
        alone = segmented(CropSource(image, box), predictor, scene_size=128)
        first = 0 if index == 0 else 20
        last = box.width - (0 if index == len(grid) - 1 else 20)
        found = whole.ids[:, box.left + first : box.left + last]
        assert (found == alone.ids[:, first:last]).float().mean() > 0.9999


@pytest.mark.parametrize("turns", ["flip", "d4"])
@pytest.mark.parametrize("size", [(60, 90), (130, 100)])
def test_turning_the_image_turns_what_d4_or_flip_gives(turns, size) -> None:
    image = random_image(size)
    predictor = build_predictor(build_model(), 3, build_settings(), TURNS[turns])
    straight = segmented(image, predictor).ids
    for turn in TURNS[turns]:
        assert (segmented(turn.apply(image), predictor).ids == turn.apply(straight)).float().mean() > 0.999


def test_a_single_scene_of_several_processes_is_the_main_ones_and_its_error_is_that_of_all(monkeypatch) -> None:
    """The cuts of `--stability` may be single scenes where the whole image is several."""
    image, gathered, tops = MemorySource(random_image((60, 50))), [], []
    monkeypatch.setattr(Ranks, "gather", lambda self, value: gathered.append(value) or [value])
    for rank in (0, 1):
        segment_scenes(PixelPredictor(), image, lambda top, rows: tops.append(top), ranks=Ranks(rank, 2))
    assert len(tops) == len(set(tops)) > 0
    del gathered[:]

    def fail(top: int, rows: object) -> None:
        raise InputError("the disk is full")

    with pytest.raises(InputError, match="the disk is full"):
        segment_scenes(PixelPredictor(), image, fail, ranks=Ranks(0, 2))
    assert gathered == [("the disk is full", "")]


class WatchedSource(MemorySource):
    """A source in memory that counts what is read, and fails where it is told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__(random_image((100, 330)))
        object.__setattr__(self, "started", [threading.Event() for _ in BOXES])
        object.__setattr__(self, "fails_at", fails_at)

    def read(self, box):
        scene = BOXES.index(box)
        self.started[scene].set()
        if scene == self.fails_at:
            raise InputError(f"scene {scene} cannot be read", "unreadable")
        return super().read(box)


@pytest.fixture
def no_thread_is_left():
    yield
    assert not any("read_ahead" in thread.name for thread in threading.enumerate())


def test_the_next_scene_is_read_while_one_is_used_and_no_other(no_thread_is_left) -> None:
    source = WatchedSource()
    with closing(read_ahead(source, BOXES)) as ahead:
        for k, scene in enumerate(ahead):
            assert torch.equal(scene.image, BOXES[k].of(source.image))
            if k + 1 < len(BOXES):
                assert source.started[k + 1].wait(20)
            assert not any(later.is_set() for later in source.started[k + 2 :])


def test_results_are_those_without_reading_ahead_bit_for_bit(monkeypatch) -> None:
    image = random_image((250, 330))
    found = segmented(image, scene_size=100, probabilities=True)

    def read_in_turn(source, boxes):
        yield from (load_in_memory(CropSource(source, box)) for box in boxes)

    monkeypatch.setattr(scenes, "read_ahead", read_in_turn)
    expected = segmented(image, scene_size=100, probabilities=True)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.probabilities, expected.probabilities)


def test_a_scene_that_cannot_be_read_is_reported_in_its_turn_and_an_interrupt_ends_all(no_thread_is_left) -> None:
    class Interrupted(PixelPredictor):
        def segment(self, image, sinks, **more):
            raise KeyboardInterrupt

    source, used = WatchedSource(fails_at=2), []
    with closing(read_ahead(source, BOXES)) as ahead, pytest.raises(InputError, match="scene 2") as caught:
        used.extend(ahead)
    assert (len(used), caught.value.kind) == (2, "unreadable")
    with pytest.raises(InputError, match="scene 2") as caught:
        segmented(source, scene_size=100)
    assert caught.value.kind == "unreadable"
    with pytest.raises(KeyboardInterrupt):
        segmented(WatchedSource(), Interrupted(), scene_size=100)


def test_a_raster_cut_short_is_named_and_the_others_are_segmented(tmp_path, capsys, no_thread_is_left) -> None:
    pytest.importorskip("rasterio")
    checkpoint, images = write_checkpoint(tmp_path / "two.pth"), tmp_path / "images"
    images.mkdir()
    for name in ("a", "b"):
        tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "lzw"}
        write_raster(images / f"{name}.tif", random_image((200, 330)).numpy(), **tiles)
    broken = bytearray((images / "a.tif").read_bytes())
    middle = len(broken) * 2 // 3
    broken[middle : middle + 20000] = bytes(20000)
    (images / "a.tif").write_bytes(broken)
    assert run(checkpoint, images, output=tmp_path / "out", options=["--scene_size", "120", "--mode", "1"]) == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tif")) == ["b_mask.tif"]
    printed = capsys.readouterr()
    assert "a.tif cannot be read" in printed.out + printed.err


class Striped(MemorySource):
    """An image with columns that have no data."""

    def valid(self, box: Box) -> Tensor:
        return (torch.arange(box.left, box.left + box.width) % 7 > 0).expand(box.height, -1)


def segmenter_of(mode: int, scene_size: int = 100) -> Segmenter:
    """A segmenter of the shared network, or for mode 0 of pixels."""
    predictor = build_predictor(build_model(), mode, build_settings()) if mode else PixelPredictor()
    return Segmenter(predictor, build_header(max(1, mode)), scene_size)


@pytest.mark.parametrize("seed", range(12))
def test_rows_of_any_source_are_those_of_the_image_in_memory(seed) -> None:
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 400, 2).tolist())
    segmenter = segmenter_of(0, int(rng.integers(40, 300)))
    image, found = random_image(size, seed), Whole()
    segmenter.segment_to(Striped(image), found, probabilities=True)
    expected = segmenter.segment(image.permute(1, 2, 0).numpy())
    expected[:, ::7] = IGNORED
    assert np.array_equal(found.ids.numpy(), expected)
    assert torch.equal(found.probabilities.isnan().all(0), found.ids == IGNORED)


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_progress_rises_to_its_total_and_a_cancelled_call_raises_and_sends_no_last_row(mode) -> None:
    image, found, steps = random_image((90, 170)), Whole(), []
    segmenter = segmenter_of(mode)
    segmenter.segment_to(MemorySource(image), found, on_progress=lambda done, total: steps.append((done, total)))
    assert np.array_equal(found.ids.numpy(), segmenter.segment(image.permute(1, 2, 0).numpy()))
    assert steps == sorted(steps) and steps[-1][0] == steps[0][1] > 0
    tall = MemorySource(random_image((250, 90)))
    for after in (0, 1, 3):
        found, calls = Whole(), iter(range(100))
        with pytest.raises(Cancelled):
            segmenter.segment_to(tall, found, is_cancelled=lambda calls=calls, after=after: next(calls) >= after)
        assert found.next < 250


def test_a_source_that_does_not_fit_is_refused_by_the_rule_that_it_breaks() -> None:
    image = random_image((30, 40))
    for source, message in (
        (MemorySource(image[:2]), "has 2 bands and the network reads 3"),
        (MemorySource(image[:, :0]), "is empty"),
        (MemorySource(image.float()), r"MemorySource.read must return a tensor \(3, 30, 40\) torch.uint8"),
    ):
        with pytest.raises(InputError, match=message):
            segmenter_of(0).segment_to(source, Whole())


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_the_example_writes_a_whole_mask_or_none(tmp_path, monkeypatch, suffix) -> None:
    image = random_image((130, SIDE)).permute(1, 2, 0).numpy()
    if suffix == ".zarr":
        zarr = pytest.importorskip("zarr")
        zarr.create_array(tmp_path / "image.zarr", data=image, chunks=(50, 50, 3))
    else:
        np.save(tmp_path / "image.npy", image)
    write_thin_checkpoint(tmp_path / "network.pth", 2)
    arguments = [str(tmp_path / name) for name in ("network.pth", f"image{suffix}", f"mask{suffix}")]
    before = set(tmp_path.iterdir())
    whole = Segmenter.segment_to

    def stopped(self, source, sink, **more):
        calls = iter([False, True])
        whole(self, source, sink, is_cancelled=lambda: next(calls), **more)

    with monkeypatch.context() as patch, pytest.raises(Cancelled):
        patch.setattr(Segmenter, "segment_to", stopped)
        segment_array.main(arguments)
    assert set(tmp_path.iterdir()) == before
    assert segment_array.main(arguments) == 0
    expected = Segmenter.from_checkpoint(tmp_path / "network.pth").segment(image)
    assert np.array_equal(segment_array.open_array(Path(arguments[2]), 2)[:], expected)
    np.save(tmp_path / "float.npy", image.astype(np.float32))
    for wrong in ("float.npy", f"none{suffix}"):
        assert segment_array.main([arguments[0], str(tmp_path / wrong), arguments[2]]) == 2
