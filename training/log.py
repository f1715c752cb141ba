"""The logs of a training run: the released text log, lines of JSON, and events for TensorBoard."""

import json
import math
import os
import re
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from utils.classes import Classes
from utils.files import write_json, writing
from utils.metrics import ConfusionMatrix, Scores
from utils.stages import PREDICTIONS, STAGES
from utils.tables import as_markdown
from utils.visualize import legend, shrink_for_display

LONGEST_PICTURE = 1024
"""The most pixels of a picture's longer side in TensorBoard, so that event files stay small."""

RULE = "=" * 32

Matrices = Mapping[str, Scores]
"""The scores of the mode's predictions, by name."""


def headline(matrices: Container[str]) -> str:
    """Return the prediction that a mode is judged by: the ensemble if there is one, else (mode 1) the global one."""
    return next(stage.headline for stage in reversed(STAGES.values()) if stage.headline in matrices)


def epoch_lines(epoch: int, num_epochs: int, train: Matrices, val: Matrices, classes: Classes) -> str:
    """Return the released log of one epoch, counted from 0 and printed from 1: nine lines and a rule.

    A prediction that the mode does not have gets the scores of an empty matrix: 0 on the whole, NaN per class. If `val`
    is empty, as without a validation, all its values are NaN.
    """
    nothing = ConfusionMatrix(len(classes))
    # the headline comes first, without a name
    shown = [("", headline(train), ""), ("Local ", "local", "Local  -- "), ("Global ", "global", "Global -- ")]
    means, arrays = [], []
    for prefix, name, dashed in shown:
        pair = train.get(name, nothing), val.get(name, nothing)
        mean_train, mean_val = (matrix.mean_iou(classes.left_out) for matrix in pair)
        mean_val = mean_val if val else math.nan
        means.append(f"epoch [{epoch + 1}/{num_epochs}] {dashed}IoU: train = {mean_train:.4f}, val = {mean_val:.4f}")
        # the released log has a space after the first colon only
        ious = [np.array2string(matrix.iou(), max_line_width=10**6) for matrix in pair]  # in one line each
        arrays += [f"{prefix}train:{'' if prefix else ' '}{ious[0]}", f"{prefix}val:{ious[1]}"]
    return "\n".join([*means, *arrays, RULE, ""])


def run_table(record: Mapping[str, Any]) -> str:
    """Return `record` as a Markdown table for TensorBoard; nested entries get a row each."""
    rows = []
    for name, value in record.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [(f"{name} {key}".strip(), str(entry)) for key, entry in inner]
    return as_markdown(["what", "value"], rows)


class _Events:
    """One event file of TensorBoard, written in the caller's thread.

    tensorboardX's SummaryWriter hands events to another thread, so that neither the length of the file nor a full disk
    would be known when a write returns.
    """

    def __init__(self, folder: Path, anew: bool) -> None:
        """Make the file in `folder`; `anew` makes TensorBoard hide the earlier events there."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self._flushed = time.monotonic()
        if anew:
            self._file.write_event(Event(session_log=SessionLog(status=SessionLog.START), step=0))

    def add(self, what: Summary, step: int) -> None:
        self._file.write_event(Event(summary=what, step=step, wall_time=time.time()))
        if time.monotonic() - self._flushed > 30:  # seconds
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


class RunLog:
    """The text log `<log_path>/<task_name>.log`, lines of JSON in `.jsonl`, events in the folder `<task_name>/`.

    The logs of a new run are appended to those of an earlier one of the name, but TensorBoard shows the later one only.
    In TensorBoard epochs and steps count from 0, as released. Every method raises InputError, naming the path, if a
    file cannot be written.
    """

    def __init__(
        self, log_path: str | Path, task_name: str, classes: Classes, sizes: Mapping[str, int] | None = None
    ) -> None:
        """Open the logs; those of a resumed run are cut to the `sizes()` that they had where it continues."""
        self.text = Path(log_path) / f"{task_name}.log"
        self.lines = Path(log_path) / f"{task_name}.jsonl"
        self.folder = Path(log_path) / task_name
        self._classes = classes
        self._anew = sizes is None
        if sizes is not None:
            self._rewind(sizes)
        # a folder that cannot be written to is reported now, not after the first epoch
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._events = _Events(self.folder, self._anew)
        for path in (self.text, self.lines):
            with writing(path):
                path.open("a").close()
        self._curves: dict[str, _Events] = {}

    def _files(self) -> list[Path]:
        return [p for p in (self.text, self.lines, *self.folder.rglob("events.out.tfevents.*")) if p.is_file()]

    def sizes(self) -> dict[str, int]:
        """Write all records to the disk, and return the length of each file in bytes, by its path below `log_path`."""
        with writing(self.folder):
            for events in (self._events, *self._curves.values()):
                events.flush()
        return {str(path.relative_to(self.text.parent)): path.stat().st_size for path in self._files()}

    def _rewind(self, sizes: Mapping[str, int]) -> None:
        """Cut the files to `sizes`, and remove files that are not in it."""
        for path in self._files():
            size = sizes.get(str(path.relative_to(self.text.parent)))
            with writing(path):
                if size is None:
                    path.unlink()
                elif size < path.stat().st_size:
                    os.truncate(path, size)

    def close(self) -> None:
        """Write all records to the disk and close the event files."""
        with writing(self.folder):
            for events in (self._events, *self._curves.values()):
                events.close()

    def start(self, record: Mapping[str, Any], description: str) -> None:
        """Record the run in `run.json`, and its `description`, Markdown, and the legend in TensorBoard."""
        write_json(self.folder / "run.json", record)
        with writing(self.folder):
            self._events.add(summary.text("run", description), 0)
            picture = legend(self._classes.names, self._classes.palette)
            self._events.add(summary.image("legend", picture, dataformats="HWC"), 0)
            self._events.flush()

    def line(self, record: Mapping[str, Any]) -> None:
        """Append `record` to the lines of JSON."""
        with writing(self.lines), self.lines.open("a", encoding="utf-8", errors="backslashreplace") as lines:
            lines.write(json.dumps(record, allow_nan=False) + "\n")

    def epoch(self, epoch: int, num_epochs: int, train: Matrices, val: Matrices) -> str:
        """Record the scores of an epoch, and return the lines of the text log; see `epoch_lines`.

        TensorBoard gets the headline's mIoU, `IoU`, as two runs, `IoU/train iou` and `IoU/validation iou`, as released;
        and what `_scores` records. An epoch without a validation has no validation's values there.
        """
        lines = epoch_lines(epoch, num_epochs, train, val, self._classes)
        with writing(self.text), self.text.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(lines)
        with writing(self.folder):
            chosen = headline(train)
            for part, scores in (("train", train), ("validation", val)):
                if not scores:
                    continue
                curve = f"{part} iou"
                if curve not in self._curves:  # a folder each, as SummaryWriter.add_scalars does
                    self._curves[curve] = _Events(self.folder / "IoU" / curve, self._anew)
                self._curves[curve].add(summary.scalar("IoU", self._mean(scores[chosen])), epoch)
                self._curves[curve].flush()
                self._scores(epoch, part, scores)
            self._events.flush()
        return lines

    def _mean(self, matrix: ConfusionMatrix) -> float:
        return matrix.mean_iou(self._classes.left_out)

    def _scores(self, epoch: int, part: str, matrices: Matrices) -> None:
        """Record means and measures of every prediction, and the headline's classes, of one `part` of the data.

        Tags are such as `mIoU/local_train`, `jaccard/ensemble_validation` and `IoU_per_class/water_train`.
        """
        for name in (name for name in PREDICTIONS if name in matrices):
            values = {"mIoU": self._mean(matrices[name]), **matrices[name].measures()}
            for measure, value in values.items():
                if not np.isnan(value):
                    self._events.add(summary.scalar(f"{measure}/{name}_{part}", value), epoch)
        for name, iou in zip(self._classes.names, matrices[headline(matrices)].iou(), strict=True):
            if not np.isnan(iou):
                tag = re.sub(r"[^-/\w.]", "_", f"IoU_per_class/{name}_{part}")  # as tensorboardX does, with a warning
                self._events.add(summary.scalar(tag, iou), epoch)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers at `step`, by tags such as `loss/focal_local`.

        TensorBoard replaces all characters of a tag but letters, digits and `-_./` by `_`.
        """
        with writing(self.folder):
            for tag, value in values.items():
                self._events.add(summary.scalar(tag, value), step)

    def images(self, epoch: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Record pictures, (H, W, 3) uint8 RGB by tag, shrunk to `LONGEST_PICTURE`.

        All but `image` are in the classes' colours, which are not mixed.
        """
        with writing(self.folder):
            for tag, picture in pictures.items():
                small = shrink_for_display(picture, LONGEST_PICTURE, smooth=tag == "image")
                self._events.add(summary.image(tag, small, dataformats="HWC"), epoch)
            self._events.flush()
