"""The result of an evaluation as a record for JSON and as a table."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from utils.classes import Classes
from utils.metrics import Scores
from utils.selection import Coverage
from utils.stages import PREDICTIONS
from utils.tables import aligned


def _number(value: float) -> float | None:
    """Return `value`, or None for NaN, which JSON lacks."""
    return None if math.isnan(value) else float(value)


def scores(classes: Classes, matrices: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """Return `iou`, `mIoU`, `mIoU_all` and the measures of each prediction; see `evaluation_record`."""
    return {
        name: {
            "iou": [_number(value) for value in matrices[name].iou()],
            "mIoU": _number(matrices[name].mean_iou(classes.left_out)),
            "mIoU_all": _number(matrices[name].mean_iou(())),
            **{measure: _number(value) for measure, value in matrices[name].measures().items()},
        }
        for name in PREDICTIONS
        if name in matrices
    }


def evaluation_record(
    mode: int,
    classes: Classes,
    matrices: Mapping[str, Scores],
    *,
    images: int,
    seconds_per_image: float,
    peak_memory_mb: float,
    coverage: Coverage | None = None,
) -> dict[str, Any]:
    """Return the result of an evaluation as values that JSON can hold.

    For each prediction: `iou`, 0..1 per class, None for a class that is neither true nor predicted; `mIoU`, their mean
    without `classes.left_out`, where None counts 0; `mIoU_all`, the mean with every class; and the measures of
    `classes`. `share` is each class's part of the labelled pixels. With `coverage`, that of coarse to fine,
    `not_looked_at` is the share of pixels that no patch covered, and `not_computed` that of patches.
    """
    shares = {}
    if coverage is not None:
        shares = {"not_looked_at": coverage.pixels_not_covered, "not_computed": coverage.patches_not_computed}
    truth = next(iter(matrices.values())).counts.sum(1).tolist()
    return {
        "mode": mode,
        "classes": list(classes.names),
        "left_out": [classes.names[k] for k in classes.left_out],
        "measures": list(classes.measures),
        "share": [count / max(1, sum(truth)) for count in truth],
        "images": images,
        "seconds_per_image": seconds_per_image,
        "peak_memory_mb": peak_memory_mb,
        **shares,
        **scores(classes, matrices),
    }


def per_cent(value: float | None) -> str:
    """Return a share 0..1 in per cent, `-` for None."""
    return "-" if value is None else f"{100 * value:.2f}"


def evaluation_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table: name, share of the labelled pixels, and a cell for each prediction."""
    found = [record[name] for name in PREDICTIONS if name in record]
    yield ("class", "share", *(name for name in PREDICTIONS if name in record))
    for k, name in enumerate(record["classes"]):
        yield (name, per_cent(record["share"][k]), *(per_cent(scores["iou"][k]) for scores in found))
    left_out = ", ".join(record["left_out"])
    yield (f"mIoU (without {left_out})" if left_out else "mIoU", "", *(per_cent(s["mIoU"]) for s in found))
    if left_out:
        yield (f"mIoU with {left_out}", "", *(per_cent(s["mIoU_all"]) for s in found))
    for measure in record["measures"]:
        yield (measure.replace("_", " "), "", *(per_cent(s[measure]) for s in found))


def evaluation_table(record: Mapping[str, Any]) -> str:
    """Return the record of `evaluation_record` as lines of text with columns of fixed width, without a last newline."""
    lines, n = aligned(list(evaluation_rows(record))), len(record["classes"])
    rule = "-" * len(lines[0])
    head = (
        f"Mode {record['mode']}, {record['images']} images. Share of labelled pixels and IoU in per cent; "
        "-: neither labelled nor predicted, counts 0."
    )
    costs = [
        f"seconds per image  {record['seconds_per_image']:.3f}",
        f"peak memory        {record['peak_memory_mb']:.0f} MB",
    ]
    if "not_looked_at" in record:
        costs.append(f"not looked at      {per_cent(record['not_looked_at'])} % of pixels")
        costs.append(f"not computed       {per_cent(record['not_computed'])} % of patches")
    return "\n".join([head, lines[0], rule, *lines[1 : n + 1], rule, *lines[n + 1 :], rule, *costs])
