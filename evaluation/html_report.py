"""`--report`: an evaluation as one HTML page that needs no network and no other file."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from evaluation.report import evaluation_rows, per_cent
from evaluation.report_images import RIGHT, WRONG, ReportImage, ReportImages
from utils.classes import Classes, Color
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
    """Return the text of the page."""
    labelled = report.counts is not None
    parts = [_summary(report)]
    if report.counts is not None:
        parts += [_class_table(report), _matrix(report, report.counts)]
    parts += [_images(report, labelled), _run(report)]
    template = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(f"Evaluation {report.title}"), body="\n".join(parts))


def _summary(report: Report) -> str:
    """Return the head of the page: what was evaluated, and its main numbers."""
    record, stage = report.record, report.stage
    tiles = []
    for name in stage.predictions if report.counts is not None else ():
        kind = "headline" if name == stage.headline else ""
        tiles.append((f"mIoU, {name}", f"{per_cent(record[name]['mIoU'])} %", kind))
        if name == stage.headline:
            measures = ((measure.replace("_", " "), record[name][measure]) for measure in record["measures"])
            tiles += [(f"{measure}, {name}", f"{per_cent(value)} %", "") for measure, value in measures]
    tiles += [
        ("images", f"{record['images']}", ""),
        ("seconds per image", f"{record['seconds_per_image']:.3f}", ""),
        ("peak memory", f"{record['peak_memory_mb']:.0f} MB", ""),
    ]
    if "not_looked_at" in record:
        tiles.append(("pixels not looked at", f"{per_cent(record['not_looked_at'])} %", ""))
        tiles.append(("patches not computed", f"{per_cent(record['not_computed'])} %", ""))
    items = "\n".join(f'<li class="{kind}">{escape(name)} <b>{escape(value)}</b></li>' for name, value, kind in tiles)
    missing = "" if report.counts is not None else "<p><b>The split has no labels, so there are no scores.</b></p>\n"
    return (
        f"<h1>Evaluation {escape(report.title)}</h1>\n"
        f"<p>GLNet in mode {stage.number} ({escape(stage.name)}) on {escape(report.data)}. "
        f"The main prediction is the {'global one' if stage.headline == 'global' else stage.headline}.</p>\n"
        f'{missing}<ul class="tiles">\n{items}\n</ul>'
    )


def _class_table(report: Report) -> str:
    """Return the table of IoU by class and prediction, with the means below."""
    classes, stage = report.classes, report.stage
    titles, *lines = evaluation_rows(report.record)
    rows = []
    for k, (name, *cells) in enumerate(lines):
        swatch = f"{_swatch(classes.palette[k])}<span>{escape(name)}</span>" if k < len(classes) else escape(name)
        rows.append(_row(swatch, cells, stage, "" if k < len(classes) else "mean"))
    head = "".join(f'<th scope="col">{name}</th>' for name in titles)
    return (
        "<h2>Classes</h2>\n"
        '<p class="soft">Share of the labelled pixels, and intersection over union (IoU), in per cent. '
        "A class that is neither labelled nor predicted (-) counts 0 in the mIoU.</p>\n"
        '<div class="scroll"><table class="scores">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody></table></div>"
    )


def _row(name: str, cells: Sequence[str], stage: Stage, kind: str = "") -> str:
    """Return a line of the table of classes; `name` is HTML."""
    main = 1 + stage.predictions.index(stage.headline)
    starts = ('<td class="headline">' if k == main else "<td>" for k in range(len(cells)))
    columns = "".join(f"{start}{cell}</td>" for start, cell in zip(starts, cells, strict=True))
    return f'<tr class="{kind}"><th scope="row"><span class="name">{name}</span></th>{columns}</tr>\n'


def _matrix(report: Report, counts: np.ndarray) -> str:
    """Return the confusion matrix of the headline, shaded by the share of the true class."""
    names, counts = joined_classes(report.classes.names, counts)
    totals = counts.sum(1)
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in names)
    rows = []
    for k, name in enumerate(names):
        cells = []
        for other in range(len(names)):
            share = counts[k, other] / totals[k] if totals[k] else 0.0
            color = "20, 80, 140" if other == k else "214, 96, 20"
            shade = f' style="background:rgba({color},{0.5 * share:.3f})"' if share else ""
            shown = f"{100 * share:.2f} %" if totals[k] else "-"
            cells.append(f"<td{shade}>{shown}<small>{int(counts[k, other]):,}</small></td>")
        row = f'<tr><th scope="row"><span>{escape(name)}</span></th>{"".join(cells)}'
        rows.append(f"{row}<td>{int(totals[k]):,}</td></tr>\n")
    return (
        "<h2>Confusion matrix</h2>\n"
        f'<p class="soft">Prediction {report.stage.headline}: rows are the true classes, columns the predicted ones. '
        "Per cent of the row, and pixels.</p>\n"
        '<div class="scroll"><table class="matrix">\n'
        f'<thead><tr><th scope="col"><span>true \\ predicted</span></th>{head}<th scope="col">pixels</th></tr>'
        "</thead>\n"
        f"<tbody>\n{''.join(rows)}</tbody></table></div>"
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


def _images(report: Report, labelled: bool) -> str:
    """Return the best and the worst images with their pictures, and the list of all scores."""
    images, total = report.images, len(report.images.ranking)
    best, worst = images.best_and_worst()
    order = (
        f"Ordered by each image's own mIoU in the prediction {report.stage.headline}: the mean over the classes that "
        "are labelled or predicted in it. It is no part of the mIoU above, which is of all pixels together."
    )
    parts = []
    if not labelled:
        parts.append(f"<h2>Images</h2>\n<p>The first {len(best)} of {total}, in the order of the split.</p>")
    elif worst:
        parts.append(f"<h2>The best {len(best)} of {total} images</h2>\n<p>{order}</p>")
    else:
        parts.append(f"<h2>Images, the best first</h2>\n<p>{order}</p>")
    parts.append(_legend(report.classes, labelled))
    parts += [_image(one, report.stage.headline) for one in best]
    if worst:
        parts.append(f"<h2>The worst {len(worst)} of {total} images</h2>\n<p>The worst first.</p>")
        parts += [_image(one, report.stage.headline) for one in worst]
    if labelled:
        parts.append(_ranking(images))
    return "\n".join(parts)


def _legend(classes: Classes, labelled: bool) -> str:
    entries = [*zip(classes.names, classes.palette, strict=True)]
    errors = [("errors: right", RIGHT), ("wrong", WRONG)]
    entries += [*errors, ("not counted", NO_CLASS)] if labelled else []
    items = "".join(f"<li>{_swatch(color)}{escape(name)}</li>" for name, color in entries)
    return (
        f'<ul class="key">{items}</ul>\n'
        '<p class="soft screen">Click a picture to enlarge it. There: wheel, + and - zoom, dragging moves, '
        "the arrow keys change the picture at the same place, Esc closes.</p>"
    )


def _image(image: ReportImage, headline: str) -> str:
    """Return one image: its id, score and size, and its pictures."""
    figures = []
    for kind, data in image.pictures.items():
        score = image.scores.get(kind)
        caption = kind if score is None else f"{kind}, {per_cent(score)} %"
        source = f"data:image/{'jpeg' if kind == 'image' else 'png'};base64,{base64.b64encode(data).decode()}"
        figures.append(
            f'<figure><button type="button" data-kind="{kind}"><img src="{source}" alt="{kind} of {escape(image.id)}">'
            f"</button><figcaption>{caption}</figcaption></figure>"
        )
    score, (height, width) = image.scores[headline], image.size
    shown = "" if score is None else f"{headline} {per_cent(score)} %; "
    return (
        f'<section class="image"><h3><b>{escape(image.id)}</b> {shown}{width} x {height} pixels</h3>\n'
        f'<div class="pictures">{"".join(figures)}</div></section>'
    )


def _ranking(images: ReportImages) -> str:
    """Return the folded list of all images and scores."""
    rows = "".join(
        f"<tr><td>{place}</td><th scope='row'>{escape(id_)}</th><td>{per_cent(score)}</td></tr>\n"
        for place, (score, _, id_) in enumerate(images.ranking[:MOST_LISTED], 1)
    )
    more = len(images.ranking) - MOST_LISTED
    rest = f"<p>And {more} more.</p>" if more > 0 else ""
    return (
        f"<details><summary>The score of every image</summary>\n"
        '<table class="list"><thead><tr><th scope="col">place</th><th scope="col">image</th>'
        f'<th scope="col">own mIoU, %</th></tr></thead><tbody>\n{rows}</tbody></table>{rest}</details>'
    )


def _run(report: Report) -> str:
    """Return the tables of what was run."""
    plain = {name: value for name, value in report.run.items() if not isinstance(value, Mapping)}
    parts = [f"<h2>What was run</h2>\n{_record_table(plain.items())}"]
    for name, value in report.run.items():
        if isinstance(value, Mapping):
            table = _record_table(value.items())
            parts.append(f"<details><summary>{escape(name.replace('_', ' '))}</summary>\n{table}</details>")
    return "\n".join(parts)


def _record_table(entries: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{escape(_text(value))}</td></tr>\n'
        for name, value in entries
    )
    return f'<table class="record"><tbody>\n{rows}</tbody></table>'


def _text(value: Any) -> str:
    """Return a value of a record as text."""
    if value is None:
        return "-"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _swatch(color: Color) -> str:
    return f'<span class="swatch" style="background:rgb{tuple(color)}"></span>'
