"""Draws the figures of experiments/results from the result files there: python -m experiments.figures --help

A figure whose result file is missing is left out, and the command that makes the file is printed. Where both are in one
figure, hollow marks are published numbers and filled ones were measured here.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.published import LATER, PUBLISHED
from utils.errors import InputError, exit_code, required
from utils.files import read_json, replacing, write_json
from utils.results import RESULTS, command_of
from utils.stages import PREDICTIONS, STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "errorbar.capsize": 3,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.title_fontsize": 12,
    "legend.handlelength": 3,
}
"""Settings of matplotlib for every figure."""

DPI = 200

GREY = "#666666"
"""Of references: lines that show no measurement."""

LABEL_SIZE = 10
"""Of texts beside points, in points."""

GAP = 1.5
"""Around such a text, in points."""

DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
PLACES = tuple((distance, *direction) for distance in (8, 20, 34, 50) for direction in DIRECTIONS)
"""Where a point's label may be, the best first: distance from the point in points, steps to the right and up."""

MARKS: tuple[dict[str, Any], ...] = (
    {"color": "#0072b2", "marker": "o", "linestyle": "-"},
    {"color": "#d55e00", "marker": "s", "linestyle": "--"},
    {"color": "#009e73", "marker": "^", "linestyle": "-."},
    {"color": "#000000", "marker": "D", "linestyle": ":"},
)
"""How curves are drawn: arguments of matplotlib's `plot`. Any two differ in all three; the colours are of Okabe and
Ito's palette, which people with any colour vision can tell apart."""


@contextmanager
def drawing(path: Path, grid: tuple[int, int], panel: tuple[float, float], **more: Any) -> Iterator[list["Axes"]]:
    """Yield the panels of a figure, row by row; when they are drawn, the figure is written as a PNG.

    A panel is as wide and high as `panel` says, in inches; `more` are arguments of matplotlib's `subplots`.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"{path} is not drawn, as matplotlib is missing: pip install matplotlib") from error
    rows, columns = grid
    with rc_context(STYLE):
        figure = Figure((columns * panel[0], rows * panel[1]), dpi=DPI, layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False, **more).flat)
        with replacing(path) as part:
            figure.savefig(part, format="png")


def add_title(axes: "Axes", title: str) -> None:
    """Write the title of a panel above it, and under the title the legend of its curves."""
    axes.legend(title=title, alignment="left", loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def label_points(axes: "Axes", points: Sequence[tuple[float, float, str]]) -> None:
    """Write a text beside each point (x, y, text), where it covers no point and no other text if there is such a place.

    To be called last, as it needs the final limits of the axes.
    """
    from matplotlib.transforms import Bbox

    required(axes.get_figure(root=True), "figure").draw_without_rendering()
    inside, around = axes.get_window_extent(), 5 * DPI / 72
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox([(x - around, y - around), (x + around, y + around)]) for x, y in centres]
    for x, y, text in points:
        label = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=LABEL_SIZE, in_layout=False)
        for distance, across, up in (*PLACES, PLACES[0]):  # the first again, if none is free
            label.set(ha=("center", "left", "right")[across], va=("center", "bottom", "top")[up])
            label.set_position((across * distance, up * distance))
            box = label.get_window_extent().padded(GAP * DPI / 72)
            free = not any(box.overlaps(other) for other in taken)
            if free and all(inside.contains(*corner) for corner in box.corners()):
                break
        taken.append(box)
        if distance > PLACES[0][0]:
            line = {"arrowstyle": "-", "linewidth": 0.6, "color": GREY, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", (x, y), label.get_position(), textcoords="offset points", arrowprops=line)


def read_curves(log: Path) -> dict[str, Any]:
    """Return the curves of the last training run in the log `LOG_PATH/TASK_NAME.jsonl`, beside the folder `TASK_NAME`.

    Returns:
        `run` (its name), `stage`, `seed`, `epochs` (their numbers, from 1), and under `train` and `validation` the mIoU
        (0..1, None where no class counts, and without a validation) after each epoch, by prediction.

    Raises:
        InputError: the log or the record of its run is missing, or is something else.
    """
    try:
        options = json.loads((log.with_suffix("") / "run.json").read_text(encoding="utf-8"))["options"]
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line["started"] == lines[-1]["started"]]
        found = {
            "run": log.stem,
            "stage": options["mode"],
            "seed": options["seed"],
            "epochs": [line["epoch"] for line in lines],
        }
        for part in ("train", "validation"):
            epochs = [line[part] for line in lines]
            known = [scores for scores in epochs if scores]
            found[part] = {name: [scores[name]["mIoU"] if scores else None for scores in epochs] for name in known[0]}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{log} is no training's log: give LOG_PATH/TASK_NAME.jsonl, which train_deep_globe.py writes beside the "
            "folder TASK_NAME"
        ) from error
    return found


DATA = ("pages", "synthetic", "dubai")
"""The data sets that results are expected of; those of others are drawn where there are any."""

Record = Mapping[str, Any]
"""The content of a result file."""

OF_PREDICTION = dict(zip(PREDICTIONS, reversed(MARKS[:3]), strict=True))
"""The mark of each prediction, the same in all figures."""


def draw_memory_accuracy(path: Path, ours: Mapping[str, Record]) -> None:
    """Draw mIoU over memory: published points of DeepGlobe, and beside them a panel for each of our own data sets.

    `ours` are results of `experiments.ablation` by data set.
    """
    with drawing(path, (1, 1 + len(ours)), (5.6, 5.0)) as (published, *panels):
        _draw_published(published)
        for axes, (data, record) in zip(panels, ours.items(), strict=True):
            rows = [row for row in record["rows"] if row.get("drawn", True)]
            places = [(row["peak_memory_mb"], 100 * row["mIoU"], row["variant"]) for row in rows]
            spreads = [100 * (row["spread"] or 0) for row in rows]
            x, y, _ = zip(*places, strict=True)
            label = "mean over folds, ± 1 standard deviation"
            axes.errorbar(x, y, spreads, fmt="o", color=MARKS[0]["color"], label=label)
            axes.margins(0.2, 0.1)
            axes.set(xlabel="peak memory of the evaluation, MB of $2^{20}$ bytes", ylabel="mIoU, %")
            add_title(axes, f"Measured here: {data}")
            label_points(axes, places)


def _draw_published(axes: "Axes") -> None:
    """Draw the published points of DeepGlobe that have both numbers, hollow."""
    source = PUBLISHED["deep_globe"]
    known = [one for one in source.results if one.memory_mb is not None]
    kinds = (
        ("GLNet with three sizes of patches, by the paper", "*", [one for one in known if one.mode is not None]),
        ("others, by the paper", "o", [one for one in known if one.mode is None and one.source != LATER]),
        ("later systems, by their own papers", "s", [one for one in known if one.source == LATER]),
    )
    for label, marker, chosen in kinds:
        x, y = [one.memory_mb or 0 for one in chosen], [one.score for one in chosen]
        size = 13 if marker == "*" else 8
        axes.plot(x, y, marker, color="black", fillstyle="none", markersize=size, markeredgewidth=1.4, label=label)
    axes.set(xscale="log", xlim=(1250, 14000), ylim=(35, 83))
    axes.minorticks_off()
    ticks = (1500, 2000, 3000, 5000, 10000)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set(xlabel=f"memory, MB ({source.memory}; logarithmic)", ylabel=f"{source.measure}, %")
    add_title(axes, f"Published: {source.title}")
    # the other sizes of patches are within the mark of the first, which alone has a label
    label_points(axes, [(one.memory_mb or 0, one.score, one.name) for one in known if "patches" not in one.name])


def draw_iou_per_class(path: Path, record: Record) -> None:
    """Draw the IoU of each class, and the mIoU, by variant: every fold, the mean and the standard deviation.

    A fold whose images lack a class does not count for it. The record is a result of `experiments.ablation`.
    """
    variants = [row["variant"] for row in record["rows"] if row.get("drawn", True)]
    by_variant = {name: [run for run in record["runs"] if run["variant"] == name] for name in variants}
    titles = ["mIoU", *record["classes"]]
    columns = min(4, len(titles))
    rows = math.ceil(len(titles) / columns)
    with drawing(path, (rows, columns), (2.9, 0.9 + 0.32 * len(variants)), sharey=True) as panels:
        for k, (axes, title) in enumerate(zip(panels, titles, strict=False)):
            for place, runs in enumerate(by_variant.values()):
                scores = [run["iou"][k - 1] if k else run["mIoU"] for run in runs]
                found = [100 * score for score in scores if score is not None]
                if found:
                    spread = statistics.stdev(found) if len(found) > 1 else 0.0
                    mean = statistics.mean(found)
                    axes.barh(place, 2 * spread, left=mean - spread, height=0.3, color="#9ecae1")
                    axes.plot(mean, place, "|", color="black", markersize=13, markeredgewidth=2)
                    axes.plot(found, [place] * len(found), "o", color="black", fillstyle="none", markersize=5)
            axes.set_yticks(range(len(variants)), variants)
            axes.set(ylim=(len(variants) - 0.5, -0.5), title=title.replace("_", " "))
            axes.use_sticky_edges = False
            axes.margins(x=0.15)
            axes.locator_params(axis="x", nbins=4, min_n_ticks=3)
        for axes in panels[len(titles) :]:
            axes.set_axis_off()
        note = "IoU, %. Circles: folds; strokes: their means; bands: ± 1 standard deviation"
        required(panels[0].get_figure(root=True), "figure").supxlabel(note, fontsize=12)


def draw_sharing(path: Path, record: Record) -> None:
    """Draw the gain of sharing, stage 2 minus local alone, over the side of the patch, with its 95 % intervals.

    The record is a result of `experiments.ablation` with several sides.
    """
    gains = record["gains"]
    sides = [one["side"] for one in gains]
    with drawing(path, (1, 1), (5.6, 4.6)) as (axes,):
        axes.axhline(0, color=GREY, linewidth=1)
        for mark, name in zip(MARKS, gains[0]["gain"], strict=False):
            found = [one["gain"][name] for one in gains]
            values = [100 * one["value"] for one in found]
            ends = [
                [100 * abs(one["value"] - (one["value"] if one[end] is None else one[end])) for one in found]
                for end in ("low", "high")
            ]
            classes = gains[0]["classes"].get(name)
            label = name if classes is None else f"{name}: {', '.join(classes)}"
            axes.errorbar(sides, values, ends if any(map(any, ends)) else None, label=label, **mark)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.set(xlabel="side of the patch, pixels", ylabel="gain, points of IoU")
        add_title(axes, "Stage 2 minus local alone")


def draw_learning_curves(path: Path, record: Record) -> None:
    """Draw training and validation mIoU over the epochs of each stage: means over its runs, and their range.

    The record has the curves of several runs, as `--curves` copies them from training logs.
    """
    by_stage = {number: [run for run in record["runs"] if run["stage"] == number] for number in STAGES}
    by_stage = {number: runs for number, runs in by_stage.items() if runs}
    with drawing(path, (1, len(by_stage)), (4.0, 4.6), sharey=True) as panels:
        for axes, (number, runs) in zip(panels, by_stage.items(), strict=True):
            stage = STAGES[number]
            _draw_range(axes, runs, "train", stage.headline)
            for name in reversed(stage.predictions):
                _draw_range(axes, runs, "validation", name)
            axes.set_xlabel("epoch" if len(runs) == 1 else f"epoch (mean and range of {len(runs)} runs)")
            axes.locator_params(axis="x", integer=True)
            add_title(axes, f"Stage {number}: {stage.name.replace('2', ' to ')}")
        panels[0].set_ylabel("mIoU, %")


def _draw_range(axes: "Axes", runs: Sequence[Record], part: str, name: str) -> None:
    """Draw the mIoU of one prediction over the epochs that all runs have: the mean over the runs, and their range.

    `part` is `train`, which is drawn dotted and without marks, or `validation`.
    """
    # an epoch without a score was not validated
    found = [{k: x for k, x in zip(run["epochs"], run[part][name], strict=True) if x is not None} for run in runs]
    epochs = sorted(set.intersection(*(set(scores) for scores in found)))
    values = [[100 * scores[k] for scores in found] for k in epochs]
    mark = OF_PREDICTION[name]
    more: dict[str, Any] = {"marker": mark["marker"], "markevery": max(1, len(epochs) // 6)}
    more = {"linestyle": (0, (1, 1))} if part == "train" else more
    label = f"{name}, {'training' if part == 'train' else part}"
    axes.plot(epochs, [statistics.mean(column) for column in values], label=label, color=mark["color"], **more)
    if len(runs) > 1:
        low, high = ([pick(column) for column in values] for pick in (min, max))
        axes.fill_between(epochs, low, high, color=mark["color"], alpha=0.15, linewidth=0)


KINDS: dict[str, tuple[str, str, tuple[str, ...], Callable[[Path, Record], None]]] = {
    "ablation": (
        "iou_per_class",
        "ablation --data {} --data_path DIR",
        ("rows", "runs", "classes"),
        draw_iou_per_class,
    ),
    "curves": ("learning_curves", "figures --curves {} LOG_PATH/TASK_NAME.jsonl ...", ("runs",), draw_learning_curves),
}
"""The figures of which each data set has its own: by the name of the result file, that of the figure, the command that
makes the file, its needed entries, and what draws it."""


def run(options: argparse.Namespace) -> None:
    """Draw every figure whose results there are, and print its path.

    Raises InputError, naming the file, if one is no result file.
    """
    for name, *logs in options.curves:
        if not logs:
            raise InputError(f"--curves {name} names no log: add the files LOG_PATH/TASK_NAME.jsonl of its runs")
        curves = {"command": command_of("experiments.figures"), "runs": [read_curves(Path(log)) for log in logs]}
        write_json(options.results / f"curves_{name}.json", curves)  # from which the figure can be drawn again

    def draw(draw_figure: Callable[[Path, Any], None], name: str, content: Any) -> None:
        draw_figure(options.output / f"{name}.png", content)
        print(f"drawn: {options.output / name}.png")

    ablations = {}
    for kind, (figure, made_by, needed, draw_figure) in KINDS.items():
        there = sorted(path.stem.removeprefix(f"{kind}_") for path in options.results.glob(f"{kind}_*.json"))
        for data in dict.fromkeys((*DATA, *there)):
            path, command = options.results / f"{kind}_{data}.json", f"python -m experiments.{made_by.format(data)}"
            if not path.exists():
                print(f"skipped, as {path} is missing: {command}")
                continue
            record = read_json(path)
            if not isinstance(record, dict) or not all(record.get(name) for name in needed):
                raise InputError(f"{path} has no {', '.join(needed)}: make it anew by {command}")
            draw(draw_figure, f"{figure}_{data}", record)
            if kind == "ablation":
                ablations[data] = record
            if len(record.get("gains", ())) > 1:
                draw(draw_sharing, f"sharing_{data}", record)
    draw(draw_memory_accuracy, "memory_accuracy", ablations)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.figures", description=__doc__.splitlines()[0])
    add = parser.add_argument
    where = "of result files (default: experiments/results)"
    add("--results", type=Path, default=RESULTS, metavar="DIR", help=where)
    add("--output", type=Path, metavar="DIR", help="of figures (default: that of --results)")
    logs = "copy the learning curves of these training logs, LOG_PATH/TASK_NAME.jsonl, to curves_NAME.json first"
    add("--curves", nargs="+", action="append", default=[], metavar=("NAME", "FILE"), help=logs)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = build_parser().parse_args(arguments)
    options.output = options.output or options.results
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
