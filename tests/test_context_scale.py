"""A network that was trained on windows reads whole images shrunk as far as its windows were."""

import json
from pathlib import Path

import pytest
import runs
import torch
from builders import SIDE, build_header, build_model, build_sample, build_settings, describe_set, write_noise

import predict
import train_deep_globe
from dataset.base import SegmentationDataset
from engine.predictor import Predictor
from imaging.sources import MemorySource
from models import checkpoint
from models.restore import header_for
from utils.canvas import ArgmaxSink
from utils.classes import Classes
from utils.settings import MOST_SHRUNK, ContextScale
from utils.stages import STAGES
from utils.turns import TURNS

SCALE = ContextScale(64, 2.0)

SIDES = [
    ((128, 128), 64),  # not cut in training
    ((20, 128), 64),
    ((256, 256), 128),
    ((129, 129), 64),
    ((512, 128), 128),  # the mean of both factors is kept
    ((128, 512), 128),
    ((2, 500), 64),  # not below that of training
    ((99999, 99999), MOST_SHRUNK),
]
"""Sizes of images with the sides of their shrunk images."""


def test_the_example_of_exported_files_shrinks_alike() -> None:
    pytest.importorskip("onnxruntime")
    from examples.segment_onnx import shrunk_size
    from prediction.export import describe

    about = describe([], build_header(1, size_g=64, scale=2.0), "onnx")
    for image, side in SIDES:
        assert shrunk_size(about, image) == (side, side)
        assert shrunk_size({**about, "scale": None}, image) == (64, 64)


def test_the_side_of_the_shrunk_image_keeps_the_factor_and_is_what_the_encoder_takes() -> None:
    assert [SCALE.size(image) for image, _ in SIDES] == [(side, side) for _, side in SIDES]
    for multiple in (4, 224):
        scale = ContextScale(224, 3.0, multiple)
        sides = {scale.size((n, n + 50))[0] for n in range(100, 9000, 77)}
        assert len(sides) > 3
        assert all(side % multiple == 0 and 224 <= side <= MOST_SHRUNK for side in sides)
    file = checkpoint.Checkpoint(Path("a.pth"), build_header(1, size_g=64, scale=2.0), {})
    assert header_for(file, None, {}, Classes.generic(7)).context_scale() == SCALE
    assert header_for(file, None, {"size_g": 64}, Classes.generic(7)).context_scale() is None  # which is given
    assert build_header(1).context_scale() is None


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_a_predictor_shrinks_each_image_by_the_scale(mode) -> None:
    """As one whose size_g is that side does; turned, too."""
    model, settings, image = build_model(), build_settings(), MemorySource(build_sample((150, 170)).image)
    context = ContextScale(SIDE, 100 / SIDE)
    side = context.size(image.size)[0]
    assert side > SIDE
    for turns in (TURNS["none"], TURNS["flip"]):
        found = {}
        for name, more in (("scale", (SIDE, turns, context)), ("side", (side, turns))):
            predictor = Predictor.prepare(model, STAGES[mode], settings, *more)
            sink = ArgmaxSink(image.size, torch.device("cpu"))
            predictor.segment(image, {STAGES[mode].headline: sink})
            found[name] = sink.ids
        assert torch.equal(found["scale"], found["side"])


def test_samples_are_shrunk_by_the_scale_and_kept_within_the_bound(tmp_path, monkeypatch) -> None:
    sizes = [(100, 100), (256, 256), (400, 200)]
    items = [write_noise(tmp_path, str(k), size) for k, size in enumerate(sizes)]
    data = SegmentationDataset(items, Classes.generic(3), 64)
    data.context, data.keep_shrunk = SCALE, True
    monkeypatch.setattr("dataset.base.KEPT_SHRUNK_BYTES", 3 * (64**2 + 128**2))
    for _ in range(2):
        assert [data[k].global_image.shape[1:] for k in range(3)] == [*map(SCALE.size, sizes)]
    assert set(data._shrunk) == {0, 1}


@pytest.mark.slow
def test_the_scale_goes_from_training_to_validation_evaluation_and_prediction(tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    (tmp_path / "data").mkdir()
    for k, side in enumerate((80, 80, 200, 200)):
        write_noise(tmp_path / "data", str(k), (side, side))
    folders, seen = runs.Folders(tmp_path, describe_set(tmp_path / "data")), []
    plain = Predictor._segment_turned

    def noted(self: Predictor, image, global_image, *others):
        seen.append((image.size[0], global_image.shape[-1]))
        return plain(self, image, global_image, *others)

    monkeypatch.setattr(Predictor, "_segment_turned", noted)
    arguments = folders.arguments(1, "--dataset=folder", "--num_epochs=1", "--window=80", "--windows=1")
    expected = {(80, 64), (200, 160)}
    assert train_deep_globe.main(arguments) == 0
    assert set(seen) == expected
    assert checkpoint.read(folders.models / "one.pth").header.scale == 80 / 64
    assert "Validation: trained on windows that were shrunk 1.25 times" in caplog.text

    where = [f"--data_path={folders.data}", f"--model_path={folders.models}", f"--log_path={folders.logs}"]
    evaluation = ["--evaluation", "--dataset=folder", "--path_g=one.pth", "--num_workers=0", "--device=cpu", *where]
    images = ["--input", str(folders.data / "2.png")]
    prediction = ["--checkpoint", str(folders.models / "one.pth"), "--device=cpu", *images]
    for more, wanted in (([], expected), (["--size_g=64"], {(80, 64), (200, 64)})):
        seen.clear()
        assert train_deep_globe.main([*evaluation, *more]) == 0
        assert set(seen) == wanted
        seen.clear()
        assert predict.main([*prediction, *more, "--output", str(tmp_path / f"out{len(more)}")]) == 0
        assert set(seen) == wanted - {(80, 64)}
    assert json.loads((folders.logs / "glnet.json").read_text())["scale"] is None
