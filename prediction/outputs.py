"""The files that segmenting one image gives, written row by row."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from imaging.failures import writing
from imaging.georeference import Georeference, GroundAreas
from imaging.raster_writer import CogWriter, RasterWriter
from imaging.sources import Source
from prediction.areas import Areas
from prediction.overlay import OverlayWriter
from prediction.packages import require_packages
from prediction.polygon_options import PolygonOptions
from prediction.polygons import PolygonWriter, check_closed, layer_name
from prediction.scenes import Rows
from prediction.stability import StabilityMap
from prediction.uncertainty import bands_of_mode
from prediction.writers import NpzWriter, PngWriter, RowWriter
from utils.classes import IGNORED, Classes
from utils.errors import required
from utils.files import remove_leftovers, replacing
from utils.tiling import Box
from utils.visualize import NO_CLASS, colorize


@dataclass(frozen=True)
class OutputOptions:
    """Which results each image gives. InputError is raised if a package that they need is missing.

    Attributes:
        folder: of the results.
        overwrite: whether results that exist are made anew.
        overlay, probabilities, uncertainty: whether they are written beside the mask.
        colors: whether the mask is RGB instead of class ids.
        polygons: whether, and how, regions are written as polygons.
        cog: whether mask, uncertainty and stability are cloud-optimised GeoTIFFs.
        stability: in how many shifted cuts the image is segmented again; 0 for none.
    """

    folder: Path
    overwrite: bool = False
    overlay: bool = False
    probabilities: bool = False
    colors: bool = False
    polygons: PolygonOptions = field(default_factory=PolygonOptions)
    cog: bool = False
    uncertainty: bool = False
    stability: int = 0

    def __post_init__(self) -> None:
        if self.cog:
            require_packages("--cog", ("rasterio",))


def output_paths(options: OutputOptions, name: str, raster: bool) -> dict[str, Path]:
    """Return the paths of an image's results by kind: `mask`, `overlay`, `probabilities`, `uncertainty`, `stability`,
    `polygons`.

    `name` is the image's, without a suffix; `raster` says whether results are GeoTIFFs.
    """
    levels = "tif" if raster or options.cog else "png"
    ends = {
        "mask": f"_mask.{levels}",
        "overlay": options.overlay and "_overlay.png",
        "probabilities": options.probabilities and f"_probabilities.{'tif' if raster else 'npz'}",
        "uncertainty": options.uncertainty and f"_uncertainty.{levels}",
        "stability": options.stability and f"_stability.{levels}",
        "polygons": options.polygons.kind and f".{options.polygons.kind}",
    }
    return {kind: options.folder / f"{name}{end}" for kind, end in ends.items() if end}


def output_settings(options: OutputOptions, kind: str) -> dict[str, Any]:
    """Return the options on which results of one kind depend, in plain values."""
    least = options.polygons.min_area
    layer = {"min_area": None if least is None else str(least), "probabilities": options.probabilities}
    if options.uncertainty:
        layer["uncertainty"] = True  # records of before lack it
    settings: dict[str, dict[str, Any]] = {
        "mask": {"colors": options.colors, "cog": options.cog},
        "uncertainty": {"cog": options.cog},
        "stability": {"cog": options.cog, "stability": options.stability},
        "polygons": layer,
    }
    return settings.get(kind, {})


class Outputs:
    """A context that writes the results of one source; `emit` takes its rows.

    `paths` are those of `output_paths` that are wanted; they are renamed into place when the context ends well, and
    leave nothing when it does not. `reference` is the source's, for GeoTIFFs and polygons; `mode` decides which
    measures of uncertainty there are; `cuts` are segmented after the source, for `compare`. Where the source has no
    data, ids are 255, probabilities are not a number, and uncertainty and changes are 0.
    """

    def __init__(
        self,
        source: Source,
        paths: Mapping[str, Path],
        classes: Classes,
        options: OutputOptions,
        reference: Georeference | None = None,
        mode: int = 3,
        cuts: Sequence[Box] = (),
    ) -> None:
        self.source, self.paths, self.classes, self.options = source, paths, classes, options
        self._changes = StabilityMap(options.folder, source.size, cuts) if "stability" in paths else None
        self._changed: float | None = None
        self._measures = bands_of_mode(mode) if options.uncertainty else ()
        self.counts = np.zeros(256, np.int64)
        self._reference = reference or Georeference()
        self._ground = GroundAreas.of(self._reference, source.size)
        self._square_metres = np.zeros(256)
        self._writers: dict[str, Any] = {}  # what each takes differs; see `emit`
        self._parts: dict[str, Path] = {}
        self._open = ExitStack()  # closes all writers, whichever fails
        self._stack = ExitStack()

    def __enter__(self) -> "Outputs":
        with ExitStack() as stack:
            for kind, path in self.paths.items():
                remove_leftovers(path)
                stack.callback(remove_leftovers, path)  # of a library that failed
                self._parts[kind] = stack.enter_context(replacing(path))
            stack.enter_context(self._open)
            if self._changes is not None:
                stack.enter_context(self._changes)
            for kind, part in self._parts.items():
                with writing(part):
                    self._writers[kind] = self._writer(kind, part)
                self._open.callback(self._close, kind)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is None:
            with self._stack:
                self.finish()
            return None
        with suppress(Exception):  # the first error tells more
            self._open.close()
        return self._stack.__exit__(kind, error, trace)

    def finish(self) -> Mapping[str, Path]:
        """Finish all files when all rows are there; return them by kind. They get their names when the context ends."""
        if self._changes is not None:
            for levels in self._changes.levels():
                self._write("stability", levels)
            self._changed, self._changes = self._changes.share, None
        self._open.close()
        for path in self.paths.values():
            check_closed(path)
        return self._parts

    def _close(self, kind: str) -> None:
        with writing(self._parts[kind]):
            self._writers[kind].close()

    def _write(self, kind: str, *rows: np.ndarray | None) -> None:
        """Give rows to the writer of a kind, if there is one."""
        if kind in self._writers:
            with writing(self._parts[kind]):
                self._writers[kind].write(*rows)

    def _writer(self, kind: str, path: Path) -> RowWriter | OverlayWriter | PolygonWriter:
        """Open the file of one kind."""
        if kind == "overlay":
            return OverlayWriter(path, self.source, self.classes)
        if kind == "polygons":
            return PolygonWriter(
                path,
                self.source.size,
                self.classes,
                self.options.polygons,
                self._reference,
                self._ground,
                name=layer_name(self.paths["polygons"].stem),
                probabilities=self.options.probabilities,
                measures=self._measures,
            )
        size, n_class = self.source.size, len(self.classes)
        holds_ids = kind == "mask" and not self.options.colors
        palette = [*self.classes.palette, *[NO_CLASS] * (256 - n_class)]
        if path.suffix == ".png":
            return PngWriter(path, size, palette if holds_ids else None)
        if path.suffix == ".npz":
            return NpzWriter(path, "probabilities", size, n_class, "float16")
        if kind == "probabilities":
            writer = RasterWriter(path, size, "float16", n_class, self._reference, float("nan"))
            writer.describe(self.classes.names)
            return writer
        names = {"uncertainty": self._measures, "stability": ("changes",)}.get(kind, ())
        count = len(names) or (1 if holds_ids else 3)
        nodata = IGNORED if holds_ids and self.source.valid(Box(0, 0, 1, 1)) is not None else None
        if self.options.cog:
            resampling = "average" if names else ""
            writer = CogWriter(path, size, "uint8", count, self._reference, nodata, resampling)
        else:
            writer = RasterWriter(path, size, "uint8", count, self._reference, nodata)
        if holds_ids:
            writer.colors(dict(enumerate(palette)))
        elif names:
            writer.describe(names)
        return writer

    @property
    def needs_probabilities(self) -> bool:
        """Whether the rows that `emit` takes must hold probabilities."""
        return "probabilities" in self.paths or ("polygons" in self.paths and self.options.probabilities)

    def emit(self, top: int, rows: Rows) -> None:
        """Add rows from `top`; see `prediction.scenes.Emit`."""
        rows.leave_out(self.source.valid(Box(top, 0, *rows.ids.shape)))
        if self._changes is not None:
            self._changes.keep(rows)
        ids = rows.ids.numpy()
        shares, measures = (None if x is None else x.numpy() for x in (rows.probabilities, rows.uncertainty))
        self.counts += np.bincount(ids.ravel(), minlength=256)
        metres = None if self._ground is None else self._ground.rows(top, len(ids))
        if metres is not None:
            self._square_metres += np.bincount(ids.ravel(), metres.ravel(), minlength=256)
        colors = self.options.colors
        self._write("mask", colorize(ids, self.classes.palette).transpose(2, 0, 1) if colors else ids[None])
        self._write("overlay", ids)
        self._write("probabilities", shares)
        self._write("uncertainty", measures)
        self._write("polygons", ids, metres, shares, measures)

    def compare(self, cut: Box, top: int, rows: Rows) -> None:
        """Compare rows of the mask of a cut, from its row `top` on, with the mask."""
        required(self._changes, "stability").compare(cut, top, rows)

    def areas(self, image: Path, mask: Path) -> Areas:
        """What was counted."""
        n_class = len(self.classes)
        return Areas(
            image=str(image),
            mask=mask.name,
            height=self.source.size[0],
            width=self.source.size[1],
            pixels=self.counts[:n_class].tolist(),
            left_out=int(self.counts[n_class:].sum()),
            square_metres=None if self._ground is None else self._square_metres.sum() / self.counts.sum(),
            areas=None if self._ground is None else self._square_metres[:n_class].tolist(),
            features=self._writers["polygons"].features if "polygons" in self._writers else None,
            changed=self._changed,
        )
