"""A run of `predict.py`: what it segments, where results go, how processes share the work."""

import glob
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.pictures import SUFFIXES, is_raster, open_source, read_source_size
from dataset.stretch import Stretch
from outputs import Outputs, output_paths
from segmenting import Method, segment_any
from utils.areas import AreaLog, Areas, summary_record, summary_table
from utils.classes import Classes
from utils.distributed import ALONE, Ranks
from utils.errors import InputError
from utils.files import check_writable
from utils.report import write_json
from utils.scenes import scene_grid
from utils.tiling import Size

WILDCARDS = "*?["


@dataclass(frozen=True)
class Choice:
    """How files are read, and what is wanted of each."""

    folder: Path
    overwrite: bool = False
    overlay: bool = False
    probabilities: bool = False
    colors: bool = False
    bands: tuple[int, ...] | None = None
    stretch: Stretch = field(default_factory=Stretch)


@dataclass(frozen=True)
class Task:
    """One image: what it gives, by kind (`outputs.output_paths`), and which of that is `missing`."""

    image: Path
    size: Size
    paths: dict[str, Path]
    missing: dict[str, Path]


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The files that `inputs`, names of files, of folders, or patterns, stand for; each once, in order.

    A folder stands for the images right in it. Raises InputError for what stands for nothing.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        elif path.exists() or not any(sign in text for sign in WILDCARDS):
            files = [path]
        else:
            files = sorted(p for p in map(Path, glob.glob(text, recursive=True)) if p.is_file())  # noqa: PTH207
        if not files or not files[0].exists():
            raise InputError(f"--input {text}: there is no image")
        found.update(dict.fromkeys(files))
    return list(found)


def output_names(images: Sequence[Path]) -> list[str]:
    """What the results of each image are called: its stem, with the extension where another has the same stem.

    Raises InputError where two images of one name come from different folders.
    """
    stems = Counter(path.stem for path in images)
    names = [path.stem if stems[path.stem] == 1 else f"{path.stem}_{path.suffix[1:]}" for path in images]
    first: dict[str, Path] = {}
    for name, path in zip(names, images, strict=True):
        if (other := first.setdefault(name, path)) != path:
            raise InputError(f"{other} and {path} would give the same files; segment them into different folders")
    return names


class Prediction:
    """A run of `method` on images. Its `failures` are the messages of images that could not be segmented."""

    def __init__(self, method: Method, classes: Classes, choice: Choice, ranks: Ranks = ALONE) -> None:
        self.method, self.classes, self.choice, self.ranks = method, classes, choice, ranks
        self.failures: list[str] = []
        self.done: list[Areas] = []

    def run(self, images: Sequence[Path], about: dict[str, Any]) -> None:
        """Segment `images`, write the summary with `about` at its top, and print its table.

        Large images are segmented by all processes together, the others by one each. What cannot be read is told and
        left out. Raises InputError where results cannot be written.
        """
        folder = self.choice.folder
        check_writable(folder)
        if any(image.parent.resolve() == folder.resolve() for image in images):
            raise InputError(f"--output {folder} holds images to segment; the next run would read results as images")
        log = AreaLog(folder, self.ranks.rank)
        tasks = self._plan(images)
        self.ranks.barrier()  # nothing is written before everyone knows what is there
        known = {image: areas for image, areas in log.known.items() if len(areas.pixels) == len(self.classes)}
        finished = [task for task in tasks if not task.missing and str(task.image) in known]
        self.done += [known[str(task.image)] for task in finished]
        self._segment_all([task for task in tasks if task not in finished], log)
        self._conclude(tasks, about, log)

    def _plan(self, images: Sequence[Path]) -> list[Task]:
        tasks = []
        for image, name in zip(images, output_names(images), strict=True):
            try:
                size, raster = read_source_size(image), is_raster(image)
            except InputError as error:
                self._fail(error, self.ranks.main)
                continue
            wanted = self.choice.overlay, self.choice.probabilities
            paths = output_paths(self.choice.folder, name, raster, *wanted)
            missing = {k: path for k, path in paths.items() if self.choice.overwrite or not path.exists()}
            tasks.append(Task(image, size, paths, missing))
        left = sum(not task.missing for task in tasks)
        if left and self.ranks.main:
            logging.info(f"{left} of {len(tasks)} images were segmented before; --overwrite makes them anew")
        return tasks

    def _fail(self, error: InputError, counts: bool = True) -> None:
        if counts:
            self.failures.append(str(error))
            tqdm.write(f"skipped: {error}")

    def _segment_all(self, tasks: list[Task], log: AreaLog) -> None:
        shared = [task for task in tasks if len(scene_grid(task.size, self.method.scene_size)) > 1]
        single = [task for task in tasks if task not in shared]
        own = single[self.ranks.rank :: self.ranks.world]
        bar = tqdm(total=len(shared) + len(own), desc="images", unit="image", disable=not self.ranks.main)
        with bar:
            for task, ranks in [*((task, self.ranks) for task in shared), *((task, ALONE) for task in own)]:
                try:
                    areas = self._segment(task, ranks)
                    if ranks.main:
                        log.add(areas)
                        self.done.append(areas)
                except InputError as error:
                    if not error.kind:  # what is wrong is no image: results cannot be written
                        raise
                    self._fail(error, ranks.main)
                bar.update()

    def _segment(self, task: Task, ranks: Ranks) -> Areas | None:
        """Segment one image; the main one of `ranks` writes."""
        parts = self.choice.folder / f".{task.paths['mask'].name}.scenes"
        patches = self.method.patches(task.size) if self.ranks.main else 0
        try:
            with (
                open_source(task.image, self.choice.bands, self.choice.stretch) as source,
                tqdm(total=patches, desc=task.image.name, unit="patch", leave=False, disable=patches == 0) as bar,
            ):
                if not ranks.main:
                    segment_any(self.method, source, lambda top, rows: None, False, None, ranks, parts)
                    return None
                with Outputs(source, task.missing, self.classes, self.choice.colors) as outputs:
                    probabilities = "probabilities" in task.missing
                    effort = segment_any(self.method, source, outputs.emit, probabilities, bar.update, ranks, parts)
                areas = outputs.areas(task.image, task.paths["mask"])
                return replace(areas, not_looked_at=effort.not_looked_at) if self.method.looks else areas
        finally:
            if ranks.main:
                shutil.rmtree(parts, ignore_errors=True)

    def _conclude(self, tasks: list[Task], about: dict[str, Any], log: AreaLog) -> None:
        """The summary of all processes; the main one writes it. All then know all failures."""
        done = {one.image: one for part in self.ranks.gather(self.done) for one in part}
        self.failures = [message for part in self.ranks.gather(self.failures) for message in part]
        if self.ranks.main:
            images = [done[str(task.image)] for task in tasks if str(task.image) in done]
            record = summary_record(images, self.classes, {**about, "failures": self.failures})
            write_json(self.choice.folder / "summary.json", record)
            if images:
                print(summary_table(record))
            for left in self.choice.folder.glob(".areas.*.jsonl"):
                left.unlink(missing_ok=True)
        self.ranks.barrier()
