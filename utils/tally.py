"""What training and evaluation count."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from utils.canvas import Ids
from utils.metrics import ConfusionMatrix
from utils.stages import Stage


class Tally:
    """A confusion matrix for each prediction of a stage."""

    def __init__(self, stage: Stage, n_class: int) -> None:
        self.matrices = {name: ConfusionMatrix(n_class) for name in stage.predictions}
        self.headline = stage.predictions[-1]

    def count(self, label: Tensor, predictions: Mapping[str, Ids]) -> None:
        for name, prediction in predictions.items():
            self.matrices[name].update(label, prediction.ids)

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
