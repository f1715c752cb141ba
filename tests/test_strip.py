"""What is drawn and counted of both branches: the strip of an image, and errors where a prediction is unsure."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build_header, build_model, write_thin_checkpoint
from PIL import Image

from dataset import synthetic
from dataset.deep_globe import DEEP_GLOBE
from experiments import strip, unsure
from experiments.strip import GAP, IMAGE, draw_strip, most_different
from models import checkpoint
from prediction.segmenter import Segmenter
from utils.tiling import Box
from utils.visualize import colorize

pytestmark = pytest.mark.slow

WIDTH = 5 * 60 + 6 * GAP
"""Of a strip of five columns of 60 pixels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of stage 2, one of stage 1, one of other classes, and a data set."""
    root = tmp_path_factory.mktemp("strip")
    synthetic.generate(root / "data", 5, 96, seed=0, prepared=True)
    checkpoint.save(root / "two.pth", build_model(len(DEEP_GLOBE)), build_header(2, classes=DEEP_GLOBE))
    write_thin_checkpoint(root / "one.pth", 1, len(DEEP_GLOBE))
    write_thin_checkpoint(root / "other.pth", 2, 3)
    return root


def place(folder: Path, checkpoint: str = "two.pth") -> list[str]:
    return [f"--checkpoint={folder / checkpoint}", f"--data_path={folder / 'data'}", "--device=cpu"]


def draw(folder: Path, output: Path, *more: str) -> int:
    return strip.main([*place(folder), f"--output={output}", f"--width={WIDTH}", *more])


def cell(picture: np.ndarray, column: int, row: int) -> np.ndarray:
    """Return one picture of a strip of five columns of square pictures."""
    left, top = GAP + column * (60 + GAP), GAP + row * (60 + GAP)
    return picture[top : top + 60, left : left + 60]


def test_columns_are_image_label_and_all_predictions_and_the_second_row_enlarges_the_zoom(folder, tmp_path) -> None:
    assert draw(folder, tmp_path / "strip.png", "--zoom=10,20,30", "--generate", "4", "96") == 0
    picture = np.asarray(Image.open(tmp_path / "strip.png"))
    assert picture.shape[1] == WIDTH
    scene, label = synthetic.draw_scene(4, 0, 96)
    segmenter = Segmenter.from_checkpoint(folder / "two.pth", device="cpu")
    found = strip.predict(segmenter.predictor, torch.from_numpy(scene.transpose(2, 0, 1).copy()))
    assert list(found) == ["global", "local", "ensemble"]
    np.testing.assert_array_equal(found["ensemble"], segmenter.segment(scene))
    twice = scene[10:40, 20:50].repeat(2, 0).repeat(2, 1).astype(int)
    assert np.abs(cell(picture, 0, 1) - twice).mean() < 12
    for column, ids in enumerate((label, *found.values()), start=1):
        part = colorize(ids, DEEP_GLOBE.palette)[10:40, 20:50]
        np.testing.assert_array_equal(cell(picture, column, 1), part.repeat(2, 0).repeat(2, 1))


def test_an_image_of_a_data_set_is_chosen_by_its_id(folder, tmp_path, capsys) -> None:
    """A JPEG is written for its suffix; the zoom is printed."""
    ids = sorted(path.name.partition("_")[0] for path in (folder / "data" / "train" / "Sat").iterdir())
    for id_ in ids[:2]:
        assert draw(folder, tmp_path / f"{id_}.png", "--split=train", f"--image={id_}", "--zoom=0,0,96") == 0
        shown = cell(np.asarray(Image.open(tmp_path / f"{id_}.png")), 1, 1)
        label = Image.open(folder / "data" / "train" / "Label" / f"{id_}_mask.png").resize((60, 60), 0)
        np.testing.assert_array_equal(shown, np.asarray(label.convert("RGB")))
    assert draw(folder, tmp_path / "strip.jpg", "--generate", "1", "96") == 0
    assert Image.open(tmp_path / "strip.jpg").format == "JPEG"
    assert capsys.readouterr().out.rstrip().endswith(",24")


def test_the_zoom_is_where_two_maps_differ_most() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 23, 31), np.uint8)
    found = most_different(a, b, 6)
    counts = {(top, left): (a != b)[top : top + 6, left : left + 6].sum() for top in range(18) for left in range(26)}
    assert found[2:] == (6, 6)
    assert counts[found[:2]] == max(counts.values())
    assert found[:2] == min(place for place, count in counts.items() if count == max(counts.values()))
    assert most_different(a, a, 23) == Box(0, 0, 23, 23)


@pytest.mark.parametrize("size", [(40, 90), (90, 40)])
def test_pictures_of_any_shape_keep_their_proportions_and_class_colours_do_not_mix(size) -> None:
    picture = np.zeros((*size, 3), np.uint8)
    picture[::2] = 200
    height = round(120 * size[0] / size[1])
    for box in (Box(0, 0, 1, 1), Box(39, 39, 1, 1), Box(0, 0, 40, 40)):
        found = np.asarray(draw_strip({IMAGE: picture, "label": picture}, box, 2 * 120 + 3 * GAP))
        assert len(found) > height + 120 + 3 * GAP  # the titles
        values = np.unique(found[GAP : GAP + height, -120 - GAP : -GAP])
        assert {0, 200} <= set(values.tolist()) <= {0, 200, 255}  # 255 is of the frame


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output=strip.gif"], "--output strip.gif must end in one of .jpg"),
        (["--zoom=1,2"], "--zoom 1,2 must be TOP,LEFT,SIDE"),
        (["--zoom=-1,2,3"], "at least 0,0,1"),
        (["--generate", "0", "64", "--zoom=60,0,5"], "--zoom 60,0,5 is not inside the image of 64 x 64"),
        (["--generate", "0", "9"], "SIZE at least 64"),
        (["--image=none"], "--image none is not in the split"),
        (["--checkpoint", "one.pth"], "one.pth is of stage 1"),
        (["--checkpoint", "other.pth"], "other.pth was made with 3 classes, but DeepGlobe has 7"),
        (["--checkpoint", "other.pth", "--generate", "0", "64"], "but generated scenes have 7"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(folder, tmp_path, options, message, monkeypatch, refused) -> None:
    monkeypatch.chdir(folder)
    assert message in refused(strip.main, *place(folder), f"--output={tmp_path / 'strip.png'}", *options)
    assert not any(tmp_path.iterdir())


def test_errors_are_counted_where_the_branches_agree_and_where_they_do_not(folder, tmp_path) -> None:
    assert unsure.main([*place(folder), f"--output={tmp_path}"]) == 0
    rows = {row.pop("pixels"): row for row in json.loads((tmp_path / "unsure_deep_globe.json").read_text())["rows"]}
    options = unsure.build_parser().parse_args(place(folder))
    segmenter = strip.open_both_branches(options)
    data = strip.open_split(options, segmenter)
    agree, wrong = [], []
    for index in range(len(data)):
        image, label = data.read(index)
        found = strip.predict(segmenter.predictor, image)
        agree.append((found["global"] == found["local"]).ravel())
        wrong.append((found["ensemble"] != label.numpy()).ravel())
    alike, errors = np.concatenate(agree), np.concatenate(wrong)
    for name, chosen in {"all": alike | True, "global and local agree": alike, "they disagree": ~alike}.items():
        assert rows[name] == {"share": pytest.approx(chosen.mean()), "wrong": pytest.approx(errors[chosen].mean())}
    by_entropy = [row for name, row in rows.items() if name.startswith("entropy")]
    assert sum(row["share"] for row in by_entropy) == pytest.approx(1)
    known = [row["share"] * row["wrong"] for row in by_entropy if row["share"]]
    assert sum(known) == pytest.approx(errors.mean())


def test_a_checkpoint_of_stage_1_or_of_other_classes_is_not_compared(folder, tmp_path, refused) -> None:
    for name, message in (("one.pth", "one.pth is of stage 1"), ("other.pth", "made with 3 classes")):
        assert message in refused(unsure.main, *place(folder, name), f"--output={tmp_path}")
    assert not any(tmp_path.iterdir())
