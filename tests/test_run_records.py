"""What whole runs leave for people to look at, read back with TensorBoard's own reader."""

import io
import json

import numpy as np
import pytest
import runs
import torch
from PIL import Image

import helper
import train_deep_globe
from dataset.deep_globe import DEEP_GLOBE
from evaluation.run import Evaluation
from utils import run_record
from utils.stages import STAGES

pytestmark = pytest.mark.slow

STEPS, EPOCHS = 6, 2
TERMS = {1: ("focal_global",), 2: ("focal_local", "focal_ensemble", "fmreg"), 3: ("focal_global", "focal_ensemble")}
"""Of the released loss, which people have plots of."""


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_events_hold_every_tag_with_its_steps(reference, mode) -> None:
    folder, stage = reference.folders.logs / runs.NAMES[mode], STAGES[mode]
    events = runs.read_events(folder)
    per_step = {f"loss/{term}" for term in (*TERMS[mode], "total")} | {"gradient_norm", "learning_rate"}
    per_epoch = {f"mIoU/{name}_{part}" for name in stage.predictions for part in ("train", "validation")}
    numbers = ("seconds", "images_per_second", "validation_seconds_per_image", "peak_memory_mb", "skipped_steps")
    per_epoch |= {f"epoch/{name}" for name in numbers}
    per_class = {tag for tag in events.Tags()["scalars"] if tag.startswith("IoU_per_class/")}
    assert set(events.Tags()["scalars"]) == per_step | per_epoch | per_class
    assert {f"IoU_per_class/{name}_validation" for name in DEEP_GLOBE.names[1:]} <= per_class
    for tag in per_step:
        assert [event.step for event in events.Scalars(tag)] == list(range(STEPS)), tag
    for tag in per_epoch:
        assert [event.step for event in events.Scalars(tag)] == list(range(EPOCHS)), tag
    for part in ("train", "validation"):
        assert len(runs.read_events(folder / "IoU" / f"{part} iou").Scalars("IoU")) == EPOCHS


@pytest.mark.parametrize("mode", [1, 3])
def test_pictures_are_the_released_ones_fixed_ones_and_the_legend(reference, mode) -> None:
    events = runs.read_events(reference.folders.logs / runs.NAMES[mode])
    kinds = {"image", "mask", "prediction_global"} | ({"prediction", "prediction_local"} if mode == 3 else set())
    images = len(list((reference.folders.data / "crossvali" / "Sat").iterdir()))
    fixed = {f"fixed_{k + 1}/{kind}" for k in range(min(2, images)) for kind in kinds}
    assert set(events.Tags()["images"]) == kinds | fixed | {"legend"}
    for tag in kinds | fixed:
        assert [event.step for event in events.Images(tag)] == list(range(EPOCHS)), tag
    masks = [event.encoded_image_string for event in events.Images("fixed_1/mask")]
    assert masks[0] == masks[1]
    colors = set(map(tuple, np.asarray(Image.open(io.BytesIO(masks[0]))).reshape(-1, 3).tolist()))
    assert colors <= set(DEEP_GLOBE.palette)


def test_run_json_and_its_text_tell_how_to_repeat_the_run(reference) -> None:
    folder = reference.folders.logs / "two"
    record = json.loads((folder / "run.json").read_text())
    assert record["options"]["mode"] == 2
    assert record["options"]["lr"] == STAGES[2].lr  # what follows from the mode is told too
    assert record["seed"] == record["options"]["seed"] == 0
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["device"].startswith("cpu")
    assert record["processes"] == 1
    assert record["images"] == {"train": 5, "crossvali": 2}
    assert record["git_commit"] == run_record.git_commit()
    events = runs.read_events(folder)
    (tag,) = events.Tags()["tensors"]
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    for told in ("| options batch_size | 2 |", "| seed | 0 |", "| versions torch |"):
        assert told in text


def test_every_epoch_is_a_line_of_json(reference) -> None:
    for mode, stage in STAGES.items():
        lines = reference.folders.epochs(runs.NAMES[mode])
        assert [line["epoch"] for line in lines] == [1, 2]
        assert sum(line["best"] for line in lines) >= 1
        for line in lines:
            assert set(line["train"]) == set(line["validation"]) == set(stage.predictions)
            assert len(line["validation"]["global"]["iou"]) == len(line["classes"]) == 7
            assert line["seconds"] > 0
            assert line["images_per_second"] == pytest.approx(5 / line["seconds"])
            assert line["peak_memory_mb"] > 0


def test_the_end_tells_the_best_epoch_and_where_everything_is(reference) -> None:
    folders = reference.folders
    told = reference.output[1][reference.output[1].index("Best validation mIoU") :]
    best = max(folders.epochs("one"), key=lambda line: line["validation"]["global"]["mIoU"])
    assert f"in epoch {best['epoch']}: {folders.models / 'one.best.pth'}" in told
    for path in (
        folders.models / "one.pth",
        folders.logs / "one.log",
        folders.logs / "one",
        folders.logs / "one.jsonl",
    ):
        assert str(path) in told
        assert path.exists()
    assert not (folders.models / "one.resume.pth").exists()


def test_early_stopping_ends_a_run_that_no_longer_improves(reference, tmp_path, monkeypatch, caplog) -> None:
    """Training and validation are stubs; of each epoch both scores are asked for, validation's first."""
    scores = iter([0.5, 0.5, 0.6, 0.6, 0.6, 0.6, 0.4, 0.4, 0.9, 0.9])
    empty = helper.StageMetrics(STAGES[1], 7)
    monkeypatch.setattr(helper.StageMetrics, "mean_iou", lambda self: next(scores))
    monkeypatch.setattr(helper, "train_one_epoch", lambda *others, **more: empty)
    monkeypatch.setattr("training.run.evaluate_images", lambda *others, **more: Evaluation(empty, 2, 0.0))
    caplog.set_level("INFO")
    folders = reference.folders.beside(tmp_path)
    assert train_deep_globe.main(folders.arguments(1, "--num_epochs=9", "--early_stopping=2")) == 0
    assert [line["epoch"] for line in folders.epochs("one")] == [1, 2, 3, 4]
    assert "Stopped after epoch 4: no better score since 2" in caplog.text
