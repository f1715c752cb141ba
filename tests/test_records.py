"""What a run leaves behind: the text log, TensorBoard's events, the evaluation's table and JSON, coloured pictures."""

import io
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from evaluation.report import evaluation_record, evaluation_table
from training.log import LONGEST_PICTURE, RunLog
from utils.classes import IGNORED, Classes
from utils.errors import InputError
from utils.files import write_json
from utils.metrics import Scores
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


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar tag of a folder of events, with its (step, value) points."""
    found = runs.read_events(folder)
    return {tag: [(e.step, pytest.approx(e.value)) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_log_has_the_released_lines(tmp_path) -> None:
    with closing(RunLog(tmp_path, "task", CLASSES)) as log:
        shown = log.epoch(
            1,
            120,
            train={"global": HALF, "local": LAST_MISSING, "ensemble": RIGHT},
            val={"global": RIGHT, "local": RIGHT, "ensemble": HALF},
        )
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


def test_log_keeps_many_classes_on_one_line(tmp_path) -> None:
    many = Classes.generic(40)
    full = Scores(many)
    full.update(torch.arange(40), torch.arange(40))
    with closing(RunLog(tmp_path, "task", many)) as log:
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
    per_epoch = {
        "mIoU/global_train": 1.0,
        "mIoU/global_validation": 1.0,
        "mIoU/local_train": 0.5,
        "mIoU/local_validation": 0.5,
        "mIoU/ensemble_train": 0.25,
        "mIoU/ensemble_validation": 0.5,
        "IoU_per_class/unknown_train": 2 / 3,
        "IoU_per_class/unknown_validation": 1.0,
        "IoU_per_class/urban_train": 0.5,
        "IoU_per_class/urban_validation": 0.5,
        # in training this class has no union, so no point
        "IoU_per_class/bare_land_validation": 0.5,
    }
    assert scalars(tmp_path / "task") == {
        "loss/focal_local": [(7, 0.25)],
        "learning_rate": [(7, 2e-5)],
        **{tag: [(0, value), (1, value)] for tag, value in per_epoch.items()},
    }


def test_pictures_read_back_in_their_colors(tmp_path) -> None:
    ids = np.array([[0, 1, 2], [IGNORED, 2, 1]], dtype=np.uint8)
    photo = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    colored = colorize(ids, CLASSES.palette)
    kinds = ("mask", "prediction", "prediction_local", "prediction_global")
    with closing(RunLog(tmp_path, "task", CLASSES)) as log:
        log.images(3, {"image": photo, **dict.fromkeys(kinds, colored)})
    found = runs.read_events(tmp_path / "task")
    assert set(found.Tags()["images"]) == {"image", *kinds}
    for tag in found.Tags()["images"]:
        (event,) = found.Images(tag)
        decoded = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert event.step == 3
        np.testing.assert_array_equal(decoded, photo if tag == "image" else colored)


def test_large_pictures_shrink_and_class_colors_do_not_mix(tmp_path) -> None:
    stripes = colorize(np.indices((4, 2 * LONGEST_PICTURE))[1].astype(np.uint8) % 3, CLASSES.palette)
    with closing(RunLog(tmp_path, "task", CLASSES)) as log:
        log.images(0, {"image": stripes, "mask": stripes})
    found = runs.read_events(tmp_path / "task")
    decoded = {
        tag: np.asarray(Image.open(io.BytesIO(found.Images(tag)[0].encoded_image_string))) for tag in ("image", "mask")
    }
    assert decoded["image"].shape == decoded["mask"].shape == (2, LONGEST_PICTURE, 3)
    assert set(map(tuple, decoded["mask"].reshape(-1, 3))) == set(CLASSES.palette)
    averages = stripes.reshape(2, 2, LONGEST_PICTURE, 2, 3).mean((1, 3))
    np.testing.assert_allclose(decoded["image"], averages, atol=1)


@pytest.mark.parametrize("in_the_way", ["runs", "runs/task", "runs/task.log", "runs/task/IoU"])
def test_log_that_cannot_be_written_names_the_path(tmp_path, in_the_way) -> None:
    """A file where a folder should be, or a folder where the text log should be."""
    obstacle = tmp_path / in_the_way
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    if in_the_way.endswith(".log"):
        obstacle.mkdir()
    else:
        obstacle.touch()
    named = tmp_path / ("runs/task.log" if in_the_way.endswith(".log") else "runs/task")
    with pytest.raises(InputError) as refused, closing(RunLog(tmp_path / "runs", "task", CLASSES)) as log:
        log.epoch(0, 1, train={"global": RIGHT}, val={"global": HALF})
    assert str(refused.value).startswith(f"{named} cannot be written: ")


def test_colorize_gives_each_id_its_color_and_grey_to_the_rest() -> None:
    ids = np.array([[0, 1, 2], [3, 254, IGNORED]], dtype=np.uint8)
    picture = colorize(ids, CLASSES.palette)
    assert picture.shape == (2, 3, 3)
    assert picture.dtype == np.uint8
    assert [tuple(color) for color in picture[0]] == list(CLASSES.palette)
    assert {tuple(color) for color in picture[1]} == {NO_CLASS}
    assert NO_CLASS not in Classes.generic(255).palette


def test_record_gives_null_without_union_and_counts_it_as_0(tmp_path) -> None:
    path = tmp_path / "runs" / "eval.json"
    matrices = {"ensemble": HALF, "local": LAST_MISSING, "global": RIGHT}
    write_json(path, evaluation_record(3, CLASSES, matrices, images=5, seconds_per_image=1.5, peak_memory_mb=321.0))
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


def test_record_of_no_labelled_pixel_is_valid_json(tmp_path) -> None:
    record = evaluation_record(
        1, CLASSES, {"global": Scores(CLASSES)}, images=1, seconds_per_image=0.1, peak_memory_mb=1.0
    )
    write_json(tmp_path / "eval.json", record)
    assert not {"local", "ensemble"} & set(record)
    assert json.loads((tmp_path / "eval.json").read_text())["global"] == {"iou": [None] * 3, "mIoU": 0, "mIoU_all": 0}


def test_json_that_cannot_be_written_names_the_path(tmp_path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(InputError, match=r"eval\.json cannot be written"):
        write_json(tmp_path / "runs" / "eval.json", {})


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
    assert (
        evaluation_table(evaluation_record(2, CLASSES, matrices, images=5, seconds_per_image=1.5, peak_memory_mb=320.9))
        == expected
    )


def test_table_has_one_mean_when_no_class_is_left_out() -> None:
    classes = Classes(CLASSES.names, CLASSES.palette)
    lines = evaluation_table(
        evaluation_record(1, classes, {"global": HALF}, images=1, seconds_per_image=0.1, peak_memory_mb=1.0)
    ).splitlines()
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
