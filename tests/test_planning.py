"""Planning a run over files reads their headers once each, and a file's percentiles are computed once."""

import numpy as np
import pytest
from files import write_raster
from pictures import write_checkpoint
from PIL import Image

from imaging import image_file
from prediction import run as prediction_run
from prediction.outputs import OutputOptions
from prediction.run import PredictionRun
from prediction.segmenter import Segmenter


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Segmenter:
    path = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "two.pth")
    return Segmenter.from_checkpoint(path, device="cpu")


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[object]:
    calls: list[object] = []
    plain = getattr(owner, name)

    def counted(*arguments, **more):
        calls.append(arguments[0])
        return plain(*arguments, **more)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_planning_reads_each_header_once_and_no_pixels(segmenter, tmp_path, monkeypatch) -> None:
    images = [tmp_path / f"{k}.png" for k in range(300)]
    for path in images:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    probed = count_calls(monkeypatch, prediction_run, "probe")
    (tmp_path / "out").mkdir()
    tasks = PredictionRun(segmenter, OutputOptions(tmp_path / "out"))._plan(images, {})
    assert [task.image for task in tasks] == images
    assert probed == images


@pytest.mark.parametrize("size", [(90, 120), (90, 300)])
def test_percentiles_are_computed_once_for_a_file(segmenter, tmp_path, monkeypatch, size) -> None:
    """Also where it is segmented as several scenes, read in windows."""
    rng = np.random.default_rng(0)
    path = write_raster(tmp_path / "deep.tif", rng.integers(0, 2000, (3, *size)).astype(np.uint16))
    sampled = count_calls(monkeypatch, image_file.ImageFile, "_sample")
    (tmp_path / "out").mkdir()
    run = PredictionRun(Segmenter(segmenter.predictor, segmenter.header, 150), OutputOptions(tmp_path / "out"))
    run.run([path], {})
    assert not run.failures
    assert len(sampled) == 1
