"""The records that a training run keeps: the released text log, and events for TensorBoard."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from tensorboardX import SummaryWriter

from utils.classes import Classes
from utils.errors import InputError
from utils.metrics import ConfusionMatrix
from utils.report import PREDICTIONS
from utils.visualize import shrink_for_display

LONGEST_SIDE = 1024
"""Pixels that a picture's longer side has at most in TensorBoard, so that event files stay small."""

FLUSH_SECONDS = 30
"""How long an event may wait before it reaches the disk."""

RULE = "=" * 32

Matrices = Mapping[str, ConfusionMatrix]
"""Confusion matrices of "global", "local" and "ensemble", as far as the mode has them."""


def headline(matrices: Container[str]) -> str:
    """Which prediction a mode is judged by: the ensemble where there is one, else (mode 1) the global prediction."""
    return "ensemble" if "ensemble" in matrices else "global"


def _one_line(iou: np.ndarray) -> str:
    """`iou` as numpy prints it, without its line breaks."""
    return np.array2string(iou, max_line_width=10**6)


def epoch_lines(epoch: int, num_epochs: int, train: Matrices, val: Matrices, classes: Classes) -> str:
    """The released log of one epoch (0-based; printed from 1): nine lines and a rule, each with its newline.

    A prediction that the mode does not have is printed as an empty matrix scores: 0 on the whole, NaN per class.
    """
    nothing = ConfusionMatrix(len(classes))
    # the headline comes first, without a name
    shown = [("", headline(val), ""), ("Local ", "local", "Local  -- "), ("Global ", "global", "Global -- ")]
    means, arrays = [], []
    for prefix, name, dashed in shown:
        pair = train.get(name, nothing), val.get(name, nothing)
        mean_train, mean_val = (matrix.mean_iou(classes.left_out) for matrix in pair)
        means.append(f"epoch [{epoch + 1}/{num_epochs}] {dashed}IoU: train = {mean_train:.4f}, val = {mean_val:.4f}")
        # the released log has a space after the first colon only
        arrays.append(f"{prefix}train:{'' if prefix else ' '}{_one_line(pair[0].iou())}")
        arrays.append(f"{prefix}val:{_one_line(pair[1].iou())}")
    return "\n".join([*means, *arrays, RULE, ""])


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


class RunLog:
    """The text log `<log_path>/<task_name>.log` and TensorBoard's events in `<log_path>/<task_name>/`.

    Both go on where an earlier run of the same name stopped. Epochs and steps are 0-based, in TensorBoard as released.
    Every method raises InputError, naming the path, when something cannot be written.
    """

    def __init__(self, log_path: str | Path, task_name: str, classes: Classes) -> None:
        self.text = Path(log_path) / f"{task_name}.log"
        self.folder = Path(log_path) / task_name
        self._classes = classes
        # both are tried at once: not after the first epoch's hours
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _writing(self.text):
            self.text.open("a").close()
        with _writing(self.folder):
            self._events = SummaryWriter(str(self.folder), flush_secs=FLUSH_SECONDS)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Bring what is pending to the disk; the log takes nothing more."""
        with _writing(self.folder):
            self._events.close()

    def epoch(self, epoch: int, num_epochs: int, train: Matrices, val: Matrices) -> str:
        """Record the scores of an epoch; returns the lines that the text log got.

        TensorBoard gets `IoU` (the headline's mIoU; two runs, `IoU/train iou` and `IoU/validation iou`, as
        released), `mIoU/<prediction>_train` and `_validation`, and the headline's `IoU_per_class/<class>_train` and
        `_validation`, where a class without union has no point.
        """
        lines = epoch_lines(epoch, num_epochs, train, val, self._classes)
        with _writing(self.text), self.text.open("a", encoding="utf-8") as log:
            log.write(lines)
        with _writing(self.folder):
            chosen = headline(val)
            means = {"train iou": self._mean(train[chosen]), "validation iou": self._mean(val[chosen])}
            self._events.add_scalars("IoU", means, epoch)
            self._scores(epoch, "train", train)
            self._scores(epoch, "validation", val)
            self._events.flush()
        return lines

    def _mean(self, matrix: ConfusionMatrix) -> float:
        return matrix.mean_iou(self._classes.left_out)

    def _scores(self, epoch: int, part: str, matrices: Matrices) -> None:
        """One part's mean of every prediction, and the headline's classes."""
        for name in PREDICTIONS:
            if name in matrices:
                self._events.add_scalar(f"mIoU/{name}_{part}", self._mean(matrices[name]), epoch)
        for name, iou in zip(self._classes.names, matrices[headline(matrices)].iou(), strict=True):
            if not np.isnan(iou):
                self._events.add_scalar(f"IoU_per_class/{name}_{part}", iou, epoch)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers under their tags, such as `loss/focal_local` and `learning_rate`, at `step`.

        TensorBoard writes anything but letters, digits and `-_./` in a tag as `_`.
        """
        with _writing(self.folder):
            for tag, value in values.items():
                self._events.add_scalar(tag, value, step)

    def images(self, epoch: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Record (H, W, 3) uint8 RGB pictures: `image`, and `mask`, `prediction` and its kind in the classes' colours.

        They shrink to LONGEST_SIDE; all but `image` without mixing colours.
        """
        with _writing(self.folder):
            for tag, picture in pictures.items():
                small = shrink_for_display(picture, LONGEST_SIDE, smooth=tag == "image")
                self._events.add_image(tag, small, epoch, dataformats="HWC")
            self._events.flush()
