"""The next scene is read while one is computed: same results, errors in their turn, no thread left."""

import threading
from contextlib import closing

import pytest
import torch
from pictures import PixelPredictor, Whole, random_image, run, write_checkpoint, write_raster

from imaging.sources import CropSource, MemorySource, load_in_memory
from prediction import scenes
from prediction.read_ahead import read_ahead
from utils.errors import InputError

BOXES = scenes.scene_grid((100, 330), 100).boxes()


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


def no_thread_is_left() -> bool:
    return not any("read_ahead" in thread.name for thread in threading.enumerate())


def test_the_next_scene_is_read_while_one_is_used_and_no_other():
    source = WatchedSource()
    with closing(read_ahead(source, BOXES)) as ahead:
        for k, scene in enumerate(ahead):
            assert torch.equal(scene.image, BOXES[k].of(source.image))
            if k + 1 < len(BOXES):
                assert source.started[k + 1].wait(20)
            assert not any(later.is_set() for later in source.started[k + 2 :])
    assert no_thread_is_left()


def test_results_are_those_without_it_bit_for_bit(monkeypatch):
    source, predictor = MemorySource(random_image((250, 330))), PixelPredictor()
    found, expected = Whole(), Whole()
    scenes.segment_scenes(predictor, source, found, scene_size=100, probabilities=True)

    def read_in_turn(source, boxes):
        yield from (load_in_memory(CropSource(source, box)) for box in boxes)

    monkeypatch.setattr(scenes, "read_ahead", read_in_turn)
    scenes.segment_scenes(predictor, source, expected, scene_size=100, probabilities=True)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.probabilities, expected.probabilities)


def test_a_scene_that_cannot_be_read_is_reported_in_its_turn():
    source, used = WatchedSource(fails_at=2), []
    with closing(read_ahead(source, BOXES)) as ahead, pytest.raises(InputError, match="scene 2") as caught:
        used.extend(ahead)
    assert len(used) == 2 and caught.value.kind == "unreadable"
    with pytest.raises(InputError, match="scene 2") as caught:
        scenes.segment_scenes(PixelPredictor(), source, Whole(), scene_size=100)
    assert caught.value.kind == "unreadable" and no_thread_is_left()


def test_an_interrupt_while_a_scene_is_computed_leaves_no_thread():
    class Interrupted(PixelPredictor):
        def segment(self, image, sinks, **more):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scenes.segment_scenes(Interrupted(), WatchedSource(), Whole(), scene_size=100)
    assert no_thread_is_left()


def test_a_raster_cut_short_is_named_and_the_others_are_segmented(tmp_path, capsys):
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
    assert no_thread_is_left()
