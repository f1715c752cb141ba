"""What a run leaves behind: the text log, TensorBoard's events, the evaluation's table and JSON, coloured pictures.

Events are read back with TensorBoard's own reader.
"""

import io
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image

import helper
import train_deep_globe
from dataset.deep_globe import DEEP_GLOBE
from evaluation.report import evaluation_record, evaluation_table
from evaluation.run import Evaluation
from training.log import LONGEST_PICTURE, RunLog
from utils import run_record
from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.files import write_json
from utils.metrics import Scores
from utils.stages import STAGES
from utils.visualize import NO_CLASS, colorize

CLASSES = Classes(("unknown", "urban", "bare land"), ((0, 0, 0), (0, 255, 255), (255, 255, 255)), (0,))


def matrix(*pairs: tuple[int, int]) -> Scores:
    """The scores of pixels given as (true id, predicted id)."""
    counted = Scores(CLASSES)
    truth, guess = torch.tensor(pairs).T
    counted.update(truth, guess)
    return counted


# IoU per class, and their mean without the first class
RIGHT = matrix((0, 0), (1, 1), (2, 2), (2, 2))  # 1, 1, 1: 1
HALF = matrix((0, 0), (1, 1), (2, 1), (2, 2))  # 1, 1/2, 1/2: 1/2
LAST_MISSING = matrix((0, 0), (1, 1), (1, 0), (0, 0))  # 2/3, 1/2, none: 1/4


def record_of(mode: int, classes: Classes, matrices: dict[str, Scores], peak: float = 321.0) -> dict:
    return evaluation_record(mode, classes, matrices, images=5, seconds_per_image=1.5, peak_memory_mb=peak)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar tag of a folder of events, with its (step, value) points."""
    found = runs.read_events(folder)
    return {tag: [(e.step, pytest.approx(e.value)) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def pictures(folder: Path) -> dict[str, tuple[int, np.ndarray]]:
    """Every picture's only step and pixels."""
    found = {}
    events = runs.read_events(folder)
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        found[tag] = event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    return found


def test_log_has_the_released_lines(tmp_path) -> None:
    matrices = {"global": HALF, "local": LAST_MISSING, "ensemble": RIGHT}
    with closing(RunLog(tmp_path, "task", CLASSES)) as log:
        shown = log.epoch(1, 120, train=matrices, val={"global": RIGHT, "local": RIGHT, "ensemble": HALF})
    expected = (
        "epoch [2/120] IoU: train = 1.0000, val = 0.5000\n"
        "epoch [2/120] Local  -- IoU: train = 0.2500, val = 1.0000\n"
        "epoch [2/120] Global -- IoU: train = 0.5000, val = 1.0000\n"
        "train: [1. 1. 1.]\n"
        "val:[1.  0.5 0.5]\n"
        "Local train:[0.66666667 0.5               nan]\n"
        "Local val:[1. 1. 1.]\n"
        "Global train:[1.  0.5 0.5]\n"
        "Global val:[1. 1. 1.]\n"
        "================================\n"
    )
    assert (tmp_path / "task.log").read_text() == shown == expected


def test_log_of_mode_1_shows_the_global_branch_first_and_an_empty_local_one(tmp_path) -> None:
    """A later run appends."""
    expected = (
        "epoch [1/1] IoU: train = 1.0000, val = 0.5000\n"
        "epoch [1/1] Local  -- IoU: train = 0.0000, val = 0.0000\n"
        "epoch [1/1] Global -- IoU: train = 1.0000, val = 0.5000\n"
        "train: [1. 1. 1.]\n"
        "val:[1.  0.5 0.5]\n"
        "Local train:[nan nan nan]\n"
        "Local val:[nan nan nan]\n"
        "Global train:[1. 1. 1.]\n"
        "Global val:[1.  0.5 0.5]\n"
        "================================\n"
    )
    for count in (1, 2):
        with closing(RunLog(tmp_path, "task", CLASSES)) as log:
            log.epoch(0, 1, train={"global": RIGHT}, val={"global": HALF})
            assert (tmp_path / "task.log").read_text() == count * expected
    many = Classes.generic(40)
    full = Scores(many)
    full.update(torch.arange(40), torch.arange(40))
    with closing(RunLog(tmp_path, "many", many)) as log:  # each line stays one
        assert len(log.epoch(0, 1, train={"global": full}, val={"global": full}).splitlines()) == 10


def test_every_scalar_tag_reads_back(tmp_path) -> None:
    matrices = {"global": RIGHT, "local": HALF, "ensemble": LAST_MISSING}
    with closing(RunLog(tmp_path, "task", CLASSES)) as log:
        log.scalars(7, {"loss/focal_local": 0.25, "learning_rate": 2e-5})
        for epoch in (0, 1):
            log.epoch(epoch, 2, train=matrices, val={**matrices, "ensemble": HALF})
    # as released, add_scalars puts each curve into a folder of its own, from which TensorBoard draws one chart
    assert scalars(tmp_path / "task" / "IoU" / "train iou") == {"IoU": [(0, 0.25), (1, 0.25)]}
    assert scalars(tmp_path / "task" / "IoU" / "validation iou") == {"IoU": [(0, 0.5), (1, 0.5)]}
    both = {  # in training and in validation
        "mIoU/global": (1.0, 1.0),
        "mIoU/local": (0.5, 0.5),
        "mIoU/ensemble": (0.25, 0.5),
        "IoU_per_class/unknown": (2 / 3, 1.0),
        "IoU_per_class/urban": (0.5, 0.5),
        "IoU_per_class/bare_land": (None, 0.5),  # in training this class has no union, so no point
    }
    expected = {"loss/focal_local": [(7, 0.25)], "learning_rate": [(7, 2e-5)]}
    for tag, values in both.items():
        for part, value in zip(("train", "validation"), values, strict=True):
            if value is not None:
                expected[f"{tag}_{part}"] = [(0, value), (1, value)]
    assert scalars(tmp_path / "task") == expected


def test_pictures_read_back_in_their_colors_and_shrink_without_mixing_those_of_classes(tmp_path) -> None:
    photo = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    colored = colorize(np.array([[0, 1, 2], [IGNORED, 2, 1]], dtype=np.uint8), CLASSES.palette)
    shown = {"image": photo, **dict.fromkeys(("mask", "prediction", "prediction_local", "prediction_global"), colored)}
    stripes = colorize(np.indices((4, 2 * LONGEST_PICTURE))[1].astype(np.uint8) % 3, CLASSES.palette)
    for name, step, images in (("task", 3, shown), ("large", 0, {"image": stripes, "mask": stripes})):
        with closing(RunLog(tmp_path, name, CLASSES)) as log:
            log.images(step, images)
    found = pictures(tmp_path / "task")
    assert found.keys() == shown.keys()
    for tag, (step, decoded) in found.items():
        assert step == 3
        np.testing.assert_array_equal(decoded, shown[tag])
    image, mask = (pictures(tmp_path / "large")[tag][1] for tag in ("image", "mask"))
    assert image.shape == mask.shape == (2, LONGEST_PICTURE, 3)
    assert set(map(tuple, mask.reshape(-1, 3))) == set(CLASSES.palette)
    averages = stripes.reshape(2, 2, LONGEST_PICTURE, 2, 3).mean((1, 3))
    np.testing.assert_allclose(image, averages, atol=1)


@pytest.mark.parametrize("in_the_way", ["runs", "runs/task", "runs/task.log", "runs/task/IoU"])
def test_log_and_json_that_cannot_be_written_name_the_path(tmp_path, in_the_way) -> None:
    """A file where a folder should be, or a folder where the text log should be."""
    obstacle = tmp_path / in_the_way
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    of_text = in_the_way.endswith(".log")
    obstacle.mkdir() if of_text else obstacle.touch()
    with pytest.raises(InputError) as refused, closing(RunLog(tmp_path / "runs", "task", CLASSES)) as log:
        log.epoch(0, 1, train={"global": RIGHT}, val={"global": HALF})
    named = tmp_path / ("runs/task.log" if of_text else "runs/task")
    assert str(refused.value).startswith(f"{named} cannot be written: ")
    if not of_text:
        with pytest.raises(InputError, match=r"eval\.json cannot be written"):
            write_json(obstacle / "eval.json", {})


def test_colorize_gives_each_id_its_color_and_grey_to_the_rest() -> None:
    ids = np.array([[0, 1, 2], [3, 254, IGNORED]], dtype=np.uint8)
    picture = colorize(ids, CLASSES.palette)
    assert (picture.shape, picture.dtype) == ((2, 3, 3), np.uint8)
    assert [tuple(color) for color in picture[0]] == list(CLASSES.palette)
    assert {tuple(color) for color in picture[1]} == {NO_CLASS}
    assert NO_CLASS not in Classes.generic(255).palette


def test_record_gives_null_without_union_and_counts_it_as_0(tmp_path) -> None:
    path = tmp_path / "runs" / "eval.json"
    matrices = {"ensemble": HALF, "local": LAST_MISSING, "global": RIGHT}
    write_json(path, record_of(3, CLASSES, matrices))
    assert json.loads(path.read_text()) == {
        "mode": 3,
        "classes": ["unknown", "urban", "bare land"],
        "left_out": ["unknown"],
        "measures": [],
        "share": [0.25, 0.25, 0.5],
        "images": 5,
        "seconds_per_image": 1.5,
        "peak_memory_mb": 321.0,
        "global": {"iou": [1.0, 1.0, 1.0], "mIoU": 1.0, "mIoU_all": 1.0},
        "local": {"iou": [pytest.approx(2 / 3), 0.5, None], "mIoU": 0.25, "mIoU_all": pytest.approx((2 / 3 + 0.5) / 3)},
        "ensemble": {"iou": [1.0, 0.5, 0.5], "mIoU": 0.5, "mIoU_all": pytest.approx(2 / 3)},
    }
    record = record_of(1, CLASSES, {"global": Scores(CLASSES)})  # of no labelled pixel
    write_json(path, record)
    assert not {"local", "ensemble"} & set(record)
    assert json.loads(path.read_text())["global"] == {"iou": [None] * 3, "mIoU": 0, "mIoU_all": 0}


def test_table_shows_the_record_in_per_cent() -> None:
    matrices = {"global": HALF, "local": LAST_MISSING, "ensemble": HALF}
    expected = """\
Mode 2, 5 images. Share of labelled pixels and IoU in per cent; -: neither labelled nor predicted, counts 0.
class                   share  global  local  ensemble
------------------------------------------------------
unknown                 25.00  100.00  66.67    100.00
urban                   25.00   50.00  50.00     50.00
bare land               50.00   50.00      -     50.00
------------------------------------------------------
mIoU (without unknown)          50.00  25.00     50.00
mIoU with unknown               66.67  38.89     66.67
------------------------------------------------------
seconds per image  1.500
peak memory        321 MB"""
    assert evaluation_table(record_of(2, CLASSES, matrices, 320.9)) == expected
    plain = Classes(CLASSES.names, CLASSES.palette)  # one mean where no class is left out
    lines = evaluation_table(record_of(1, plain, {"global": HALF})).splitlines()
    assert [line.split() for line in lines if line.startswith("mIoU")] == [["mIoU", "66.67"]]


PEAK = """
import numpy, torch
from utils.memory import MB, peak_memory_mb
peak = lambda: peak_memory_mb(torch.device("cpu"))
before = peak()  # Linux lets a new process begin with its parent's peak
size = int(before) + 64
numpy.ones(size * MB, dtype=numpy.uint8)
grown = peak()
numpy.ones(32 * MB, dtype=numpy.uint8)
print(size, grown, peak())
"""


@pytest.mark.slow
def test_peak_memory_without_an_accelerator_is_the_process_s() -> None:
    """The first array is larger than all that was resident, the second is not."""
    size, grown, last = map(float, runs.run_python(PEAK).split())
    assert size <= grown < size + 1024  # interpreter and libraries
    assert last == pytest.approx(grown, abs=32)


STEPS, EPOCHS = 6, 2
TERMS = {1: ("focal_global",), 2: ("focal_local", "focal_ensemble", "fmreg"), 3: ("focal_global", "focal_ensemble")}
"""Of the released loss, which people have plots of."""


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_events_hold_every_tag_with_its_steps_and_the_released_pictures_fixed_ones_and_the_legend(
    reference, mode
) -> None:
    folder, stage = reference.folders.logs / runs.NAMES[mode], STAGES[mode]
    events = runs.read_events(folder)
    per_step = {f"loss/{term}" for term in (*TERMS[mode], "total")} | {"gradient_norm", "learning_rate"}
    per_epoch = {f"mIoU/{name}_{part}" for name in stage.predictions for part in ("train", "validation")}
    numbers = ("seconds", "images_per_second", "validation_seconds_per_image", "peak_memory_mb", "skipped_steps")
    per_epoch |= {f"epoch/{name}" for name in numbers}
    per_class = {tag for tag in events.Tags()["scalars"] if tag.startswith("IoU_per_class/")}
    assert set(events.Tags()["scalars"]) == per_step | per_epoch | per_class
    assert {f"IoU_per_class/{name}_validation" for name in DEEP_GLOBE.names[1:]} <= per_class
    for part in ("train", "validation"):
        assert len(runs.read_events(folder / "IoU" / f"{part} iou").Scalars("IoU")) == EPOCHS
    kinds = {"image", "mask", "prediction_global"} | ({"prediction", "prediction_local"} if mode > 1 else set())
    images = len(list((reference.folders.data / "crossvali" / "Sat").iterdir()))
    fixed = {f"fixed_{k + 1}/{kind}" for k in range(min(2, images)) for kind in kinds}
    assert set(events.Tags()["images"]) == kinds | fixed | {"legend"}
    of_tags = (
        (events.Scalars, per_step, STEPS),
        (events.Scalars, per_epoch, EPOCHS),
        (events.Images, kinds | fixed, EPOCHS),
    )
    for of_tag, tags, count in of_tags:
        for tag in tags:
            assert [event.step for event in of_tag(tag)] == list(range(count)), tag
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
    assert (record["processes"], record["images"]) == (1, {"train": 5, "crossvali": 2})
    assert record["git_commit"] == run_record.git_commit()
    events = runs.read_events(folder)
    (tag,) = events.Tags()["tensors"]
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    for told in ("| options batch_size | 2 |", "| seed | 0 |", "| versions torch |"):
        assert told in text


def test_epochs_are_lines_of_json_and_the_end_tells_the_best_one_and_where_everything_is(reference) -> None:
    folders = reference.folders
    for mode, stage in STAGES.items():
        lines = folders.epochs(runs.NAMES[mode])
        assert [line["epoch"] for line in lines] == [1, 2]
        assert sum(line["best"] for line in lines) >= 1
        for line in lines:
            assert set(line["train"]) == set(line["validation"]) == set(stage.predictions)
            assert len(line["validation"]["global"]["iou"]) == len(line["classes"]) == 7
            assert line["seconds"] > 0 and line["peak_memory_mb"] > 0
            assert line["images_per_second"] == pytest.approx(5 / line["seconds"])
    told = reference.output[1][reference.output[1].index("Best validation mIoU") :]
    best = max(folders.epochs("one"), key=lambda line: line["validation"]["global"]["mIoU"])
    assert f"in epoch {best['epoch']}: {folders.models / 'one.best.pth'}" in told
    for path in (folders.models / "one.pth", *(folders.logs / name for name in ("one.log", "one", "one.jsonl"))):
        assert str(path) in told and path.exists()
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
