"""`--report`: an evaluation as one HTML page that needs no network and no other file."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from evaluation.report import evaluation_rows, per_cent
from evaluation.report_images import RIGHT, WRONG, ReportImages
from utils.classes import Classes
from utils.files import replacing
from utils.stages import Stage
from utils.visualize import NO_CLASS

NAME = "report.html"
"""The page's name inside the folder that `--report` names."""

MOST_IN_MATRIX = 24
"""Rows of the confusion matrix; of more classes, the rarest share one row."""

MOST_LISTED = 5000
"""Images in the list of scores, so that the page stays light."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report shows.

    `record` is what `evaluation_record` returned, without labels only its entries of cost; `counts` the headline's
    confusion matrix, (n_class, n_class) pixels, rows are the truth, None without labels; `run` what was run, each value
    under its name; a nested table is folded away.
    """

    title: str
    data: str
    stage: Stage
    classes: Classes
    record: Mapping[str, Any]
    counts: np.ndarray | None
    images: ReportImages
    run: Mapping[str, Any]


def write_report(folder: Path, report: Report) -> Path:
    """Write the page into `folder`, beside and renamed; return its path.

    Raises InputError, naming the path, when it cannot be written.
    """
    path = folder / NAME
    with replacing(path) as part:
        part.write_text(report_page(report), encoding="utf-8", errors="backslashreplace")
    return path


def report_page(report: Report) -> str:
    """Return the text of the page; all that it shows is escaped."""
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "base64": lambda data: base64.b64encode(data).decode(),
        "per_cent": per_cent,
        "shown": _shown,
        "spaced": lambda name: name.replace("_", " "),
    }
    template = environment.from_string(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    best, worst = report.images.best_and_worst()
    key = [*zip(report.classes.names, report.classes.palette, strict=True)]
    tables: dict[str, Any] = {}
    if report.counts is not None:
        tables["titles"], *tables["rows"] = evaluation_rows(report.record)
        names, counts = joined_classes(report.classes.names, report.counts)
        tables["matrix"] = [*zip(names, counts.tolist(), strict=True)]
        key += [("errors: right", RIGHT), ("wrong", WRONG), ("not counted", NO_CLASS)]
    return template.render(
        vars(report), labelled=bool(tables), **tables, key=key, best=best, worst=worst, most_listed=MOST_LISTED
    )


def joined_classes(names: Sequence[str], counts: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return names and confusion matrix with the rarest classes joined if there are more than MOST_IN_MATRIX."""
    if len(names) <= MOST_IN_MATRIX:
        return list(names), counts
    common = np.sort(np.argsort(-counts.sum(1), kind="stable")[: MOST_IN_MATRIX - 1])
    place = np.full(len(names), MOST_IN_MATRIX - 1)
    place[common] = np.arange(len(common))
    joined = np.zeros((MOST_IN_MATRIX, MOST_IN_MATRIX), counts.dtype)
    np.add.at(joined, (place[:, None], place[None]), counts)
    return [*(names[k] for k in common), f"{len(names) - len(common)} others"], joined


def _shown(value: Any) -> str:
    """Return a value of a record as text."""
    if value is None:
        return "-"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
