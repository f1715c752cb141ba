"""How much of each class is in segmented images: as records for JSON and as a table for people."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from utils.classes import Classes
from utils.tables import aligned


@dataclass(frozen=True)
class Areas:
    """What one image holds: `pixels` of each class, those `left_out` (without data), and its size in pixels.

    `square_metres` is the mean area of a pixel on the ground, and `areas` those of the classes, in square metres; None
    where the file does not say where on the ground it lies. `not_looked_at` is the part
    of the image, 0..1, that coarse to fine left out, None where all was looked at. `features` is the number of its
    polygons, None without a layer. `changed` is the part of the pixels, 0..1, whose class changes in shifted cuts, None
    without `--stability`.
    """

    image: str
    mask: str
    height: int
    width: int
    pixels: list[int]
    left_out: int
    square_metres: float | None
    not_looked_at: float | None = None
    areas: list[float] | None = None
    features: int | None = None
    changed: float | None = None

    def ground(self, k: int) -> float:
        """Return the square metres of class `k`; older records have the area of a pixel alone."""
        return self.areas[k] if self.areas is not None else self.pixels[k] * (self.square_metres or 0)


def summary_record(images: Sequence[Areas], classes: Classes, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The areas of `images`, one by one and in all, in types that JSON knows; `extra` comes first."""
    total = [sum(one.pixels[k] for one in images) for k in range(len(classes))]
    metres = None
    if images and all(one.square_metres is not None for one in images):
        metres = [sum(one.ground(k) for one in images) for k in range(len(classes))]
    features = [one.features for one in images if one.features is not None]
    return {
        **extra,
        "classes": list(classes.names),
        "total": {
            "pixels": total,
            "left_out": sum(one.left_out for one in images),
            "per_cent": [100 * pixels / max(1, sum(total)) for pixels in total],
            "square_metres": metres,
            "not_looked_at": _mean_share(images, [one.not_looked_at for one in images]),
            "features": sum(features) if features else None,
            "changed": _mean_share(images, [one.changed for one in images]),
        },
        "images": [asdict(one) for one in images],
    }


def _mean_share(images: Sequence[Areas], shares: Sequence[float | None]) -> float | None:
    """Return the mean over all pixels of shares of images; None if none is known. One that is not known is 0."""
    if all(share is None for share in shares):
        return None
    sizes = [one.height * one.width for one in images]
    return sum(size * (share or 0) for size, share in zip(sizes, shares, strict=True)) / sum(sizes)


def summary_table(record: Mapping[str, Any]) -> str:
    """The totals of `record`, made by `summary_record`, as lines of text; no newline at the end."""
    total, names = record["total"], record["classes"]
    metres = total["square_metres"]
    rows = [("class", "pixels", "per cent", "square metres")]
    for k, name in enumerate(names):
        ground = f"{metres[k]:.0f}" if metres else ""
        rows.append((name, str(total["pixels"][k]), f"{total['per_cent'][k]:.2f}", ground))
    if total["left_out"]:
        rows.append(("no data", str(total["left_out"]), "", ""))
    lines = aligned(rows if metres else [row[:-1] for row in rows])
    count = len(record["images"])
    title = f"{count} image{'' if count == 1 else 's'}"
    if total["features"] is not None:
        title += f", {total['features']} polygons"
    if total["not_looked_at"] is not None:
        title += f", {100 * total['not_looked_at']:.2f} per cent of their pixels not looked at in full resolution"
    if total["changed"] is not None:
        title += f", the class of {100 * total['changed']:.2f} per cent of their pixels changes in shifted cuts"
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])
