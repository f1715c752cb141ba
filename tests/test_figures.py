"""The figures of the experiments: what is drawn, what is left out, and what is refused."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.published import PUBLISHED
from experiments import figures
from experiments.figures import MARKS, drawing, label_points, read_curves
from utils.errors import InputError
from utils.stages import STAGES

CLASSES = ["land", "water"]
VARIANTS = {"global": (0.3, 0.4), "both": (0.5, None)}
"""The IoU of water in two runs."""


def ablation() -> dict[str, Any]:
    runs = [
        {"variant": name, "seed": seed, "mIoU": (0.6 + (iou or 0)) / 2, "iou": [0.6, iou]}
        for name, ious in VARIANTS.items()
        for seed, iou in enumerate(ious)
    ]
    rows = [{"variant": name, "mIoU": 0.5, "spread": 0.02, "peak_memory_mb": 900 + len(name)} for name in VARIANTS]
    return {"command": "made up", "classes": CLASSES, "rows": rows, "runs": runs}


def write_log(folder: Path, mode: int, scores: list[float | None], started: str = "now") -> Path:
    """Write the log of a run as training does: a line for each epoch, and the run's record in a folder beside."""
    log = folder / f"run{mode}.jsonl"
    log.with_suffix("").mkdir(parents=True, exist_ok=True)
    (log.with_suffix("") / "run.json").write_text(json.dumps({"options": {"mode": mode, "seed": 7}}))
    with log.open("a") as lines:
        for epoch, score in enumerate(scores, start=1):
            part = {name: {"mIoU": score, "iou": []} for name in STAGES[mode].predictions}
            lines.write(json.dumps({"started": started, "epoch": epoch, "train": part, "validation": part}) + "\n")
    return log


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """The panels of every figure that a test draws, by the figure's name."""
    pytest.importorskip("matplotlib")
    found = {}

    @contextmanager
    def recorded(path: Path, *others, **more) -> Iterator[list]:
        with drawing(path, *others, **more) as axes:
            yield axes
        found[path.stem] = axes

    monkeypatch.setattr(figures, "drawing", recorded)
    monkeypatch.setattr("experiments.figures.DPI", 30)  # saves time
    return found


def points(axes, **properties) -> list[tuple[float, float]]:
    """Return the points of a panel's lines that have these properties."""
    lines = [line for line in axes.lines if all(getattr(line, f"get_{k}")() == v for k, v in properties.items())]
    return [tuple(point) for line in lines for point in line.get_xydata().tolist()]


def draw(folder: Path, *more: str, **files: dict) -> None:
    """Write results and draw the figures of a folder."""
    for name, record in files.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    assert figures.main(["--results", str(folder), *more]) == 0


def test_missing_results_are_named_with_their_command_and_published_points_are_drawn(tmp_path, panels, capsys) -> None:
    draw(tmp_path)
    assert list(panels) == ["memory_accuracy"]
    text = capsys.readouterr().out
    for data in figures.DATA:
        assert f"ablation_{data}.json is missing: python -m experiments.ablation --data {data}" in text
        assert f"curves_{data}.json is missing: python -m experiments.figures --curves {data}" in text


def test_hollow_points_are_published_with_both_numbers_and_filled_ones_are_ours(tmp_path, panels) -> None:
    """Every result has its figure, also of other data sets; variants that are not to be drawn are left out."""
    some = ablation()
    some["rows"][1]["drawn"] = False
    output = tmp_path / "drawn"
    draw(tmp_path, "--output", str(output), ablation_dubai=ablation(), ablation_mine=some)
    expected = {"iou_per_class_dubai", "iou_per_class_mine", "memory_accuracy"}
    assert {path.stem for path in output.iterdir()} == set(panels) == expected
    published, *ours = panels["memory_accuracy"]
    known = [(one.memory_mb, one.score) for one in PUBLISHED["deep_globe"].results if one.memory_mb is not None]
    assert sorted(points(published, fillstyle="none")) == sorted(points(published)) == sorted(known)
    found = [points(axes, marker="o", fillstyle="full") for axes in ours]
    assert sorted(found) == [[(906, 50)], [(906, 50), (904, 50)]]
    assert len(points(panels["iou_per_class_mine"][0], marker="|")) == 1
    assert "gpustat" in published.get_xlabel()


def test_a_class_shows_every_fold_that_has_it_and_their_mean(tmp_path, panels) -> None:
    draw(tmp_path, ablation_dubai=ablation())
    shown = {axes.get_title(loc="left"): axes for axes in panels["iou_per_class_dubai"]}
    assert list(shown)[:3] == ["mIoU", *CLASSES]
    assert points(shown["water"], marker="o") == pytest.approx(np.array([(30, 0), (40, 0), (50, 1)]))
    assert points(shown["water"], marker="|") == pytest.approx(np.array([(35, 0), (50, 1)]))
    widths = [bar.get_width() for bar in shown["water"].patches]
    assert widths == pytest.approx([2 * np.std((30, 40), ddof=1), 0])


def test_the_gain_of_sharing_is_drawn_over_the_side_of_patches(tmp_path, panels) -> None:
    def gain(*values: float) -> dict[str, dict]:
        names = ("mIoU", "context")
        return {name: {"value": v, "low": v - 0.01, "high": v + 0.02} for name, v in zip(names, values, strict=True)}

    classes = {"context": ["title", "margin"]}
    gains = [{"side": side, "gain": gain(0.1, 20 / side), "classes": classes} for side in (64, 128)]
    draw(tmp_path, ablation_mine={**ablation(), "gains": gains}, ablation_dubai={**ablation(), "gains": gains[:1]})
    (axes,) = panels["sharing_mine"]
    assert "sharing_dubai" not in panels  # of one side only
    assert points(axes, marker=MARKS[0]["marker"]) == [(64, 10), (128, 10)]
    assert points(axes, marker=MARKS[1]["marker"]) == [(64, 31.25), (128, 15.625)]
    assert axes.get_legend_handles_labels()[1] == ["mIoU", "context: title, margin"]


def test_curves_are_those_of_the_last_run_of_the_log(tmp_path) -> None:
    write_log(tmp_path, 2, [0.9, 0.9, 0.9], "before")
    found = read_curves(write_log(tmp_path, 2, [0.1, None], "later"))
    assert (found["stage"], found["seed"], found["epochs"]) == (2, 7, [1, 2])
    assert found["train"] == found["validation"] == {name: [0.1, None] for name in STAGES[2].predictions}


def test_learning_curves_are_drawn_again_without_the_logs(tmp_path, panels) -> None:
    logs = [write_log(tmp_path / "runs", mode, [0.1, 0.2 * mode]) for mode in STAGES]
    other = write_log(tmp_path / "other", 1, [0.3, 0.4, 0.5])
    draw(tmp_path, "--curves", "mine", *map(str, [*logs, other]))
    figure = tmp_path / "learning_curves_mine.png"
    first = figure.read_bytes()
    for log in (*logs, other):
        log.unlink()
    draw(tmp_path)
    assert figure.read_bytes() == first
    stages = panels["learning_curves_mine"]
    # the mean over the epochs that both runs of stage 1 have
    assert points(stages[0], marker="^") == pytest.approx(np.array([(1, 20), (2, 30)]))
    assert points(stages[2], marker="s") == pytest.approx(np.array([(1, 10), (2, 60)]))
    assert [len(axes.lines) for axes in stages] == [2, 4, 4]


def test_labels_cover_neither_points_nor_each_other(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    with pytest.raises(ZeroDivisionError), drawing(tmp_path / "fails.png", (1, 1), (3, 3)):
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    places = [(float(x), float(y), f"point {k}") for k, (x, y) in enumerate(rng.random((12, 2)))]
    with drawing(tmp_path / "plot.png", (1, 1), (6, 5)) as (axes,):
        axes.plot([x for x, _, _ in places], [y for _, y, _ in places], "o")
        label_points(axes, places)
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        centres = axes.transData.transform([place[:2] for place in places])
    assert len(boxes) == len(places)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert not any(box.contains(*centre) for box in boxes for centre in centres)


def test_without_matplotlib_one_line_says_so_and_nothing_is_written(tmp_path, monkeypatch, refused) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "matplotlib is missing: pip install matplotlib" in refused(figures.main, "--results", tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', "nothing"])
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, text, refused) -> None:
    (tmp_path / "ablation_dubai.json").write_text(text)
    assert "ablation_dubai.json" in refused(figures.main, "--results", tmp_path)


@pytest.mark.parametrize("spoil", ["record", "lines", "all"])
def test_a_file_that_is_no_training_log_is_refused_by_name(tmp_path, spoil) -> None:
    log = write_log(tmp_path, 1, [0.1])
    if spoil == "record":
        (tmp_path / "run1" / "run.json").unlink()
    else:
        log.write_text("" if spoil == "all" else '{"started": 1}\n')
    with pytest.raises(InputError, match=r"run\.json cannot be read" if spoil == "record" else r"run1\.jsonl is no"):
        read_curves(log)


def test_curves_without_a_log_are_refused(tmp_path, refused) -> None:
    assert "--curves mine names no log" in refused(figures.main, "--results", tmp_path, "--curves", "mine")
