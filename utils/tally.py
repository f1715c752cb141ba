"""What training and evaluation count."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from utils.canvas import Ids
from utils.classes import Classes
from utils.metrics import Scores
from utils.stages import Stage


class Tally:
    """The scores of each prediction of a stage; a number of `classes` stands for as many numbered ones."""

    def __init__(self, stage: Stage, classes: Classes | int) -> None:
        classes = Classes.generic(classes) if isinstance(classes, int) else classes
        self.matrices = {name: Scores(classes) for name in stage.predictions}
        self.headline = stage.predictions[-1]

    def count(self, label: Tensor, predictions: Mapping[str, Ids]) -> None:
        for name, prediction in predictions.items():
            self.matrices[name].update(label, prediction.ids)

    def mean_iou(self) -> float:
        """The headline's, without the classes that are left out."""
        matrix = self.matrices[self.headline]
        return matrix.mean_iou(matrix.classes.left_out)

    def sums(self) -> list[Tensor]:
        """All that was counted, matrix by matrix."""
        return [tensor for matrix in self.matrices.values() for tensor in matrix.sums()]


@dataclass
class Progress:
    """How far the training of an epoch is.

    `tally` is this process's part; everything else is the same in all processes.
    """

    tally: Tally
    batches: int = 0
    """Steps taken, skipped ones included."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    images: int = 0
    loss: float = 0.0
    """Mean over the steps that were not skipped."""
    seconds: float = 0.0
    """Spent on the steps, waiting for images included."""
    asked: bool = False
    """Whether a process asked for a pause at the last step."""
