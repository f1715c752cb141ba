"""A run of `predict.py`: which images it segments, where results go, how processes share the work."""

import glob
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from imaging.georeference import Georeference, read_georeference
from imaging.image_file import View, open_image
from imaging.probe import IMAGE_SUFFIXES, RARE_SUFFIXES, RASTERIO, FileInfo, probe, save_part
from imaging.sources import CropSource
from prediction.areas import Areas, summary_record, summary_table
from prediction.outputs import OutputOptions, Outputs, output_paths, output_settings
from prediction.polygon_options import lacks_place
from prediction.polygons import check_closed
from prediction.records import Record, Records, differences, plain
from prediction.scenes import patch_count, scene_grid, segment_scenes
from prediction.segmenter import Segmenter
from prediction.stability import shifted_cuts
from utils.distributed import ALONE, Ranks
from utils.errors import InputError, shortened
from utils.files import check_writable
from utils.tiling import Box


@dataclass(frozen=True)
class ImageTask:
    """One image and its results.

    Attributes:
        image, info, reference: the file, and what its header says.
        paths: of its results by kind; see `prediction.outputs.output_paths`.
        made_by: what the file of each kind depends on; see `Record`.
        kept: the records of those that an earlier run made.
    """

    image: Path
    info: FileInfo
    reference: Georeference
    paths: dict[str, Path]
    made_by: dict[str, dict[str, Any]]
    kept: dict[str, Record]

    @property
    def missing(self) -> dict[str, Path]:
        """The paths of results that are still to be made."""
        return {kind: path for kind, path in self.paths.items() if kind not in self.kept}

    def with_kept(self, areas: Areas) -> Areas:
        """Return `areas` with what the records of other results of an earlier run say."""
        for kind, name in (("polygons", "features"), ("stability", "changed")):
            if kind in self.kept:
                areas = replace(areas, **{name: getattr(self.kept[kind], name)})
        return areas


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Return the files that `inputs` name: files, folders, or patterns; each file once, in order.

    A folder names the images directly in it. Raises InputError for an input that names no file.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if len(os.fsencode(path.name)) > 255:  # bytes, on every file system that is in use
            raise InputError(f"--input {text}: the name is longer than a file's can be")
        if path.is_dir():
            files = _images_in(path)
        elif path.exists() or not any(sign in text for sign in "*?["):
            files = [path]
        else:
            files = sorted(p for p in map(Path, glob.glob(text, recursive=True)) if p.is_file())  # noqa: PTH207
        if not files or not files[0].exists():
            mend = ""
            if re.match(r"/vsi\w+/|[A-Za-z][\w+]+:", text):  # GDAL opens it, though it is no file
                mend = f"; only files are read: save it as one, where GDAL opens it: {save_part(text)}"
            raise InputError(f"--input {text}: there is no image{mend}")
        found.update(dict.fromkeys(files))
    return list(found)


def _images_in(folder: Path) -> list[Path]:
    """Return the files of a folder that have an image's suffix, in order; the main process logs which have none."""
    files = sorted(path for path in folder.iterdir() if not (path.is_dir() or path.name.startswith(".")))
    images = [path for path in files if path.suffix.lower() in (*IMAGE_SUFFIXES, *RARE_SUFFIXES)]
    others = sorted({path.suffix or path.name for path in files if path not in images})
    if others and os.environ.get("RANK", "0") == "0":
        logging.info(
            f"{folder}: {len(files) - len(images)} files are left out, whose suffixes are no image's "
            f"({shortened(others, 5)}); name a file to segment it all the same"
        )
    return images


def output_names(images: Sequence[Path]) -> list[str]:
    """Return the name of each image's results: its stem, with the extension if another image has the same stem.

    Raises InputError if two images of one name come from different folders.
    """
    stems = Counter(path.stem for path in images)
    names = [path.stem if stems[path.stem] == 1 else f"{path.stem}_{path.suffix[1:]}" for path in images]
    first: dict[str, Path] = {}
    for name, path in zip(names, images, strict=True):
        if (other := first.setdefault(name, path)) != path:
            raise InputError(f"{other} and {path} would give the same files; segment them into different folders")
    return names


def identity(image: Path) -> dict[str, Any]:
    """Return by what a file is known again: its path, its size in bytes and the time of its last change."""
    try:
        status = image.stat()
    except OSError:  # it is gone
        return {"image": None}
    return {"image": str(image.resolve()), "image_size": status.st_size, "image_time": status.st_mtime_ns}


def plan_notes(tasks: Sequence[ImageTask], view: View) -> list[str]:
    """Return a line for each thing that is done to images, or lost, beyond segmenting them."""
    lines = []
    if stretched := sum(task.info.needs_stretch for task in tasks):
        lines.append(f"{stretched} images of more than 8 bits are stretched: --stretch {view.stretch}")
    if turned := sum(task.info.orientation > 1 for task in tasks):
        lines.append(f"{turned} images are turned as they are displayed, and so are their masks")
    notes: dict[tuple[str, str], list[str]] = {}  # the names of images that each concerns
    for task in tasks:
        if task.reference.lost:
            notes.setdefault(("georeference", f"is not kept: {task.reference.lost}"), []).append(task.image.name)
        if "polygons" in task.paths and (lack := lacks_place(task.reference)):
            notes.setdefault(("polygons", lack), []).append(task.image.name)
    return lines + [f"the {what} of {shortened(names)} {lack}" for (what, lack), names in notes.items()]


class PredictionRun:
    """A run of `segmenter` on images; `failures` are the messages of images that could not be segmented."""

    def __init__(self, segmenter: Segmenter, results: OutputOptions, ranks: Ranks = ALONE) -> None:
        self.segmenter, self.results, self.ranks = segmenter, results, ranks
        self.records = Records(results.folder)
        self.failures: list[str] = []
        self.done: list[Areas] = []

    def run(self, images: Sequence[Path], about: dict[str, Any]) -> None:
        """Segment images, write the summary, and print its table.

        Large images are segmented by all processes together, the others by one process each. An image that cannot be
        read is reported and left out.

        Args:
            images: the files.
            about: entries at the top of the summary. All but `checkpoint` are what results depend on beside the image.

        Raises:
            InputError: results cannot be written, or the folder holds others under their names.
        """
        folder = self.results.folder
        check_writable(folder)
        if any(image.parent.resolve() == folder.resolve() for image in images):
            raise InputError(f"--output {folder} holds images to segment; the next run would read results as images")
        if not self.results.overwrite:
            self.records.check_summary()
        tasks = self._plan(images, {name: value for name, value in about.items() if name != "checkpoint"})
        self.ranks.barrier()  # nothing is written before everyone knows what exists
        for task in tasks:
            if not task.missing and (areas := task.kept["mask"].areas):
                self.done.append(task.with_kept(replace(areas, image=str(task.image))))
        self._segment_all([task for task in tasks if task.missing])
        self._conclude(tasks, about)

    def _plan(self, images: Sequence[Path], settings: Mapping[str, Any]) -> list[ImageTask]:
        """Return a task for each image whose header can be read; `settings` are those on which all results depend."""
        tasks = []
        others: dict[str, list[str]] = {}  # files that lie under the names of results, by what made them
        for image, name in zip(images, output_names(images), strict=True):
            with self._skipping(self.ranks):
                tasks.append(self._task(image, name, settings, others))
        if others:
            found = "; ".join(f"{shortened(names)} ({reason})" for reason, names in list(others.items())[:3])
            raise InputError(
                f"--output {self.results.folder} holds files that this run would not make: {found}; --overwrite makes "
                "them anew, or name another folder"
            )
        done = sum(not task.missing for task in tasks)
        if done and self.ranks.main:
            logging.info(f"{done} of {len(tasks)} images were segmented before; --overwrite makes them anew")
        if self.ranks.main:
            for line in plan_notes(tasks, self.segmenter.view):
                logging.info(line)
        return tasks

    def _task(self, image: Path, name: str, settings: Mapping[str, Any], others: dict[str, list[str]]) -> ImageTask:
        """Return the task of one image, whose results are called `name`; see `_plan` for `settings`.

        Names of files that this run would not make are added to `others`, by the reason. Raises InputError if the
        header cannot be read, or the image cannot give the results.
        """
        info = probe(image)
        self.segmenter.view.choose(info)
        reference = read_georeference(info)
        self.results.polygons.check(image, reference, info.size)
        longest = f".{name}_probabilities.{os.getpid()}.part.npz"
        if len(os.fsencode(longest)) > os.pathconf(self.results.folder, "PC_NAME_MAX"):
            raise InputError(
                f"the name {name} is too long for files of results in {self.results.folder}; rename the image",
                "file name",
            )
        raster = bool(reference.keywords) or info.decoders == (RASTERIO,)
        paths = output_paths(self.results, name, raster)
        source = {**identity(image), "georeference": reference.spell()}
        made_by = {kind: plain({**source, **settings, **output_settings(self.results, kind)}) for kind in paths}
        kept: dict[str, Record] = {}
        for kind, path in paths.items():
            if self.results.overwrite or not path.exists():
                check_closed(path)
                continue
            record = self.records.of(path)
            if record is None or (kind == "mask" and record.areas is None):
                others.setdefault("no record says what made it", []).append(path.name)
            elif reasons := differences(record.made_by, made_by[kind]):
                others.setdefault(", ".join(reasons), []).append(path.name)
            else:
                kept[kind] = record
        return ImageTask(image, info, reference, paths, made_by, kept)

    @contextmanager
    def _skipping(self, ranks: Ranks) -> Iterator[None]:
        """Leave out an image that an InputError blames; the main process of `ranks` reports it."""
        try:
            yield
        except InputError as error:
            if not error.kind:  # the fault is not the image's, such as results that cannot be written
                raise
            if ranks.main:
                self.failures.append(str(error))
                tqdm.write(f"skipped: {error}")

    def _segment_all(self, tasks: list[ImageTask]) -> None:
        shared: list[ImageTask] = []
        single: list[ImageTask] = []
        for task in tasks:
            scenes = scene_grid(task.info.size, self.segmenter.scene_size, self.segmenter.predictor.context)
            (shared if len(scenes) > 1 else single).append(task)
        own = single[self.ranks.rank :: self.ranks.world]
        shares = [*((task, self.ranks) for task in shared), *((task, ALONE) for task in own)]
        for task, ranks in tqdm(shares, desc="images", unit="image", disable=not self.ranks.main):
            with self._skipping(ranks):
                areas = self._segment(task, ranks)
                if areas is not None:
                    self.done.append(areas)

    def _segment(self, task: ImageTask, ranks: Ranks) -> Areas | None:
        """Segment one image; the main process of `ranks` writes the results and returns the areas."""
        predictor, scene_size = self.segmenter.predictor, self.segmenter.scene_size
        scenes = self.results.folder / f".{task.paths['mask'].name}.scenes"
        cuts: list[Box] = []
        if "stability" in task.missing:
            cuts = shifted_cuts(task.info.size, predictor.settings.size_p, self.results.stability)
        sizes = [task.info.size, *((cut.height, cut.width) for cut in cuts)]
        counts = [patch_count(predictor, size, scene_size) for size in sizes] if self.ranks.main else []
        patches = None if None in counts else sum(count or 0 for count in counts)
        try:
            with (
                ExitStack() as stack,
                tqdm(total=patches, desc=task.image.name, unit="patch", leave=False, disable=patches == 0) as bar,
            ):
                source = ranks.together(lambda: stack.enter_context(open_image(task.info, self.segmenter.view)))
                classes, mode = self.segmenter.classes, predictor.stage.number
                outputs = Outputs(source, task.missing, classes, self.results, task.reference, mode, cuts)
                # all know whether its files could be started
                ranks.together(lambda: stack.enter_context(outputs if ranks.main else nullcontext()))
                segment = partial(
                    segment_scenes,
                    predictor,
                    scene_size=scene_size,
                    on_patches=bar.update,
                    ranks=ranks,
                    folder=scenes,
                    name=task.image,
                )
                coverage = segment(
                    source,
                    outputs.emit,
                    probabilities=outputs.needs_probabilities,
                    uncertainty=self.results.uncertainty,
                )
                for cut in cuts:
                    segment(CropSource(source, cut), partial(outputs.compare, cut))
                if not ranks.main:
                    return None
                parts = outputs.finish()
                left = coverage.pixels_not_covered if predictor.selects_patches else None
                areas = replace(outputs.areas(task.image, task.paths["mask"]), not_looked_at=left)
                self._record(task, parts, areas)
            return task.with_kept(areas)
        finally:
            if ranks.main:
                shutil.rmtree(scenes, ignore_errors=True)

    def _record(self, task: ImageTask, parts: Mapping[str, Path], areas: Areas) -> None:
        """Record the complete files of an image, by kind, before they get their names.

        Raises InputError if the image was changed while it was segmented.
        """
        if plain({**task.made_by["mask"], **identity(task.image)}) != task.made_by["mask"]:
            raise InputError(f"{task.image} was changed while it was segmented; segment it again", "changed")
        more: dict[str, dict[str, Any]] = {
            "mask": {"areas": replace(areas, features=None, changed=None)},
            "polygons": {"features": areas.features},
            "stability": {"changed": areas.changed},
        }
        self.records.add(
            Record.of(part, task.paths[kind].name, task.made_by[kind], **more.get(kind, {}))
            for kind, part in parts.items()
        )

    def _conclude(self, tasks: list[ImageTask], about: dict[str, Any]) -> None:
        """Gather what all processes did; the main one writes the summary. All then know all failures."""
        done = {one.image: one for part in self.ranks.gather(self.done) for one in part}
        self.failures = [message for part in self.ranks.gather(self.failures) for message in part]
        if self.ranks.main:
            images = [done[str(task.image)] for task in tasks if str(task.image) in done]
            record = summary_record(images, self.segmenter.classes, {**about, "failures": self.failures})
            self.records.conclude(record)
            if images:
                print(summary_table(record))
        self.ranks.barrier()
