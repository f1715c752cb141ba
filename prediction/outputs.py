"""The files that segmenting one image gives, written row by row."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image

from imaging.failures import writing
from imaging.georeference import Georeference, GroundAreas
from imaging.pictures import shrink
from imaging.raster_writer import CogWriter, RasterWriter
from imaging.sources import Source
from prediction.areas import Areas
from prediction.overlay import SampledIds, draw_overlay, overlay_size
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
from utils.visualize import NO_CLASS, as_rgb, colorize


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
    folder = options.folder
    paths = {"mask": folder / f"{name}_mask.{'tif' if raster or options.cog else 'png'}"}
    if options.overlay:
        paths["overlay"] = folder / f"{name}_overlay.png"
    if options.probabilities:
        paths["probabilities"] = folder / f"{name}_probabilities.{'tif' if raster else 'npz'}"
    if options.uncertainty:
        paths["uncertainty"] = paths["mask"].with_stem(f"{name}_uncertainty")
    if options.stability:
        paths["stability"] = paths["mask"].with_stem(f"{name}_stability")
    if options.polygons.kind:
        paths["polygons"] = folder / f"{name}.{options.polygons.kind}"
    return paths


def output_settings(options: OutputOptions, kind: str) -> dict[str, Any]:
    """Return the options on which results of one kind depend, in plain values."""
    if kind == "mask":
        return {"colors": options.colors, "cog": options.cog}
    if kind == "uncertainty":
        return {"cog": options.cog}
    if kind == "stability":
        return {"cog": options.cog, "stability": options.stability}
    if kind != "polygons":
        return {}
    least = options.polygons.min_area
    found = {"min_area": None if least is None else str(least), "probabilities": options.probabilities}
    return {**found, "uncertainty": True} if options.uncertainty else found  # records of before lack it


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
        self.counts = torch.zeros(256, dtype=torch.int64)
        self._sampled = SampledIds(source.size) if "overlay" in paths else None
        self._reference = reference or Georeference()
        self._ground = GroundAreas.of(self._reference, source.size)
        self._square_metres = np.zeros(256)
        self._writers: dict[str, RowWriter] = {}
        self._polygons: PolygonWriter | None = None
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
            for kind, open_writer in (
                ("mask", self._mask_writer),
                ("probabilities", self._probabilities_writer),
                ("uncertainty", lambda path: self._level_writer(path, self._measures)),
                ("stability", lambda path: self._level_writer(path, ("changes",))),
            ):
                if kind in self.paths:
                    with self._writing(kind):
                        self._writers[kind] = open_writer(self._parts[kind])
                    self._open.callback(self._close, kind, self._writers[kind])
            if self._changes is not None:
                stack.enter_context(self._changes)
            if "polygons" in self.paths:
                with self._writing("polygons"):
                    self._polygons = self._polygon_writer(self._parts["polygons"])
                self._open.callback(self._close, "polygons", self._polygons)
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
                self._write_levels("stability", levels)
            self._changed, self._changes = self._changes.share, None
        self._open.close()
        if self._sampled is not None:
            with self._writing("overlay"):
                self._draw_overlay(self._sampled, self._parts["overlay"])
            self._sampled = None
        for path in self.paths.values():
            check_closed(path)
        return self._parts

    def _close(self, kind: str, writer: RowWriter | PolygonWriter) -> None:
        with self._writing(kind):
            writer.close()

    def _writing(self, kind: str) -> AbstractContextManager[None]:
        """Return a context whose exceptions become an InputError that names the result of a kind."""
        return writing(self._parts[kind])

    def _mask_writer(self, path: Path) -> RowWriter:
        palette = [*self.classes.palette, *[NO_CLASS] * (256 - len(self.classes))]
        if path.suffix != ".tif":
            return PngWriter(path, self.source.size, None if self.options.colors else palette)
        kind = CogWriter if self.options.cog else RasterWriter
        writer = kind(
            path,
            self.source.size,
            "uint8",
            3 if self.options.colors else 1,
            self._reference,
            IGNORED if self.source.valid(Box(0, 0, 1, 1)) is not None and not self.options.colors else None,
        )
        if not self.options.colors:
            writer.colors(dict(enumerate(palette)))
        return writer

    def _probabilities_writer(self, path: Path) -> RowWriter:
        size, n_class = self.source.size, len(self.classes)
        if path.suffix != ".tif":
            return NpzWriter(path, "probabilities", size, n_class, "float16")
        writer = RasterWriter(path, size, "float16", n_class, self._reference, float("nan"))
        writer.describe(self.classes.names)
        return writer

    def _level_writer(self, path: Path, names: tuple[str, ...]) -> RowWriter:
        """Return the writer of bands of levels, 0..255, with these names; of a PNG, whose bands have none."""
        size, count = self.source.size, len(names)
        if path.suffix != ".tif":
            return PngWriter(path, size)
        if self.options.cog:
            writer: RasterWriter = CogWriter(path, size, "uint8", count, self._reference, resampling="average")
        else:
            writer = RasterWriter(path, size, "uint8", count, self._reference)
        writer.describe(names)
        return writer

    def _polygon_writer(self, path: Path) -> PolygonWriter:
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

    @property
    def needs_probabilities(self) -> bool:
        """Whether the rows that `emit` takes must hold probabilities."""
        return "probabilities" in self.paths or ("polygons" in self.paths and self.options.probabilities)

    def emit(self, top: int, rows: Rows) -> None:
        """Add rows from `top`; see `prediction.scenes.Emit`."""
        rows.leave_out(self.source.valid(Box(top, 0, *rows.ids.shape)))
        self.counts += torch.bincount(rows.ids.flatten(), minlength=256)
        metres = None if self._ground is None else self._ground.rows(top, len(rows.ids))
        if metres is not None:
            self._square_metres += np.bincount(rows.ids.numpy().ravel(), metres.ravel(), minlength=256)
        if self._sampled is not None:
            self._sampled(top, rows.ids)
        if self._changes is not None:
            self._changes.keep(rows)
        if "mask" in self._writers:
            ids = rows.ids.numpy()
            with self._writing("mask"):
                self._writers["mask"].write(
                    colorize(ids, self.classes.palette).transpose(2, 0, 1) if self.options.colors else ids[None]
                )
        if "probabilities" in self._writers:
            with self._writing("probabilities"):
                self._writers["probabilities"].write(required(rows.probabilities, "probabilities").numpy())
        if "uncertainty" in self._writers:
            self._write_levels("uncertainty", required(rows.uncertainty, "uncertainty").numpy())
        if self._polygons is not None:
            shares = None if rows.probabilities is None else rows.probabilities.numpy()
            measures = None if rows.uncertainty is None else rows.uncertainty.numpy()
            with self._writing("polygons"):
                self._polygons.write(rows.ids.numpy(), metres, shares, measures)

    def compare(self, cut: Box, top: int, rows: Rows) -> None:
        """Compare rows of the mask of a cut, from its row `top` on, with the mask."""
        required(self._changes, "stability").compare(cut, top, rows)

    def _write_levels(self, kind: str, levels: np.ndarray) -> None:
        """Write rows (1 or 2, n, W) uint8; of a PNG as red and green."""
        if self.paths[kind].suffix == ".png":
            levels = np.pad(levels, ((0, 3 - len(levels)), (0, 0), (0, 0)))
        with self._writing(kind):
            self._writers[kind].write(levels)

    def _draw_overlay(self, sampled: SampledIds, path: Path) -> None:
        image = as_rgb(shrink(self.source, overlay_size(self.source.size)))
        picture = draw_overlay(image, sampled.ids.numpy(), self.classes)
        Image.fromarray(np.ascontiguousarray(picture)).save(path, format="PNG")

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
            square_metres=None if self._ground is None else self._square_metres.sum() / self.counts.sum().item(),
            areas=None if self._ground is None else self._square_metres[:n_class].tolist(),
            features=None if self._polygons is None else self._polygons.features,
            changed=self._changed,
        )
