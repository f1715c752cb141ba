"""`Segmenter.segment_to`: any source in windows, any sink of rows, the result of `segment`; stopped, nothing whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import SIDE, build_header, build_model, build_predictor, build_settings, write_thin_checkpoint
from pictures import PixelPredictor, Whole, random_image
from torch import Tensor

from examples import segment_array
from imaging.sources import MemorySource
from predict import Box, Cancelled, Segmenter
from utils.classes import IGNORED
from utils.errors import InputError


class Striped(MemorySource):
    """An image with columns that have no data."""

    def valid(self, box: Box) -> Tensor:
        return (torch.arange(box.left, box.left + box.width) % 7 > 0).expand(box.height, -1)


def segmenter_of(mode: int, scene_size: int) -> Segmenter:
    predictor = build_predictor(build_model(), mode, build_settings())
    return Segmenter(predictor, build_header(mode), scene_size)


def pixel_segmenter(scene_size: int) -> Segmenter:
    return Segmenter(PixelPredictor(), build_header(1), scene_size)


@pytest.mark.parametrize("seed", range(12))
def test_rows_of_any_source_are_those_of_the_image_in_memory(seed) -> None:
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 400, 2).tolist())
    segmenter = pixel_segmenter(int(rng.integers(40, 300)))
    image, found = random_image(size, seed), Whole()
    segmenter.segment_to(Striped(image), found, probabilities=True)
    expected = segmenter.segment(image.permute(1, 2, 0).numpy())
    expected[:, ::7] = IGNORED
    assert np.array_equal(found.ids.numpy(), expected)
    assert torch.equal(found.probabilities.isnan().all(0), found.ids == IGNORED)


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_progress_rises_to_its_total_and_the_result_is_that_of_segment(mode) -> None:
    image, found, steps = random_image((90, 170)), Whole(), []
    segmenter = segmenter_of(mode, 100)
    segmenter.segment_to(MemorySource(image), found, on_progress=lambda done, total: steps.append((done, total)))
    assert np.array_equal(found.ids.numpy(), segmenter.segment(image.permute(1, 2, 0).numpy()))
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[0][1] > 0


@pytest.mark.parametrize("mode", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_cancelled_call_raises_and_sends_no_last_row(mode, after) -> None:
    found, calls = Whole(), iter(range(100))
    with pytest.raises(Cancelled):
        segmenter_of(mode, 100).segment_to(
            MemorySource(random_image((250, 90))), found, is_cancelled=lambda: next(calls) >= after
        )
    assert found.next < 250


def test_a_source_that_does_not_fit_is_refused_by_the_rule_that_it_breaks() -> None:
    image = random_image((30, 40))
    for source, message in (
        (MemorySource(image[:2]), "has 2 bands and the network reads 3"),
        (MemorySource(image[:, :0]), "is empty"),
        (MemorySource(image.float()), r"MemorySource.read must return a tensor \(3, 30, 40\) torch.uint8"),
    ):
        with pytest.raises(InputError, match=message):
            pixel_segmenter(100).segment_to(source, Whole())


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

    monkeypatch.setattr(Segmenter, "segment_to", stopped)
    with pytest.raises(Cancelled):
        segment_array.main(arguments)
    assert set(tmp_path.iterdir()) == before
    monkeypatch.setattr(Segmenter, "segment_to", whole)
    assert segment_array.main(arguments) == 0
    expected = Segmenter.from_checkpoint(tmp_path / "network.pth").segment(image)
    assert np.array_equal(segment_array.open_array(Path(arguments[2]), 2)[:], expected)
    np.save(tmp_path / "image.npy", image.astype(np.float32))
    arguments[1] = str(tmp_path / "image.npy")
    assert segment_array.main(arguments) == 2
    arguments[1] = str(tmp_path / f"none{suffix}")
    assert segment_array.main(arguments) == 2
