"""The confusion matrix and the scores read from it."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from utils.canvas import ArgmaxSink
from utils.classes import Classes
from utils.stages import Stage

JACCARD_THRESHOLD = 0.65
"""An image with a lower index counts 0 in the ISIC challenge's thresholded Jaccard index."""


class ConfusionMatrix:
    """Counts of (true class, predicted class).

    `counts` are (n_class, n_class) int64, on the device of the last update; rows are the truth. Pixels whose true id is
    not in 0..n_class-1, such as 255, are left out.
    """

    def __init__(self, n_class: int) -> None:
        self.n_class = n_class
        self.counts = torch.zeros(n_class, n_class, dtype=torch.int64)

    def update(self, truth: Tensor, guess: Tensor) -> Tensor:
        """Count pixels: integer ids of any shape, and predicted ids, 0..n_class-1, of the same shape and device.

        Return the counts of this call alone, (n_class, n_class) int64.
        """
        self.counts = self.counts.to(truth.device)
        known = (truth >= 0) & (truth < self.n_class)
        # int16 holds n_class**2 up to 181 classes and halves the memory that int32 would move
        kind = torch.int16 if self.n_class <= 181 else torch.int64
        pairs = truth[known].to(kind) * self.n_class + guess[known].to(kind)
        counts = torch.bincount(pairs, minlength=self.n_class**2).view(self.n_class, self.n_class)
        self.counts += counts
        return counts

    def sums(self) -> list[Tensor]:
        """Return all counters. They add up over images and processes; a matrix is restored by copying into them."""
        return [self.counts]

    def iou(self) -> np.ndarray:
        """Return intersection over union, (n_class,) float64; NaN for a class that is neither true nor predicted."""
        counts = self.counts.cpu().numpy().astype(np.float64)
        hit = np.diag(counts)
        union = counts.sum(0) + counts.sum(1) - hit
        return np.divide(hit, union, out=np.full(self.n_class, np.nan), where=union > 0)

    def accuracy(self) -> np.ndarray:
        """Return the share of each true class that is predicted right, (n_class,) float64; 0 without any pixel."""
        counts = self.counts.cpu().numpy().astype(np.float64)
        total = counts.sum(1)
        return np.divide(np.diag(counts), total, out=np.zeros(self.n_class), where=total > 0)

    def mean_iou(self, left_out: tuple[int, ...] = (0,)) -> float:
        """Return the mean IoU over all classes but `left_out`, 0..1; a class without union counts 0, as released."""
        kept = [k for k in range(self.n_class) if k not in left_out]
        return float(np.nan_to_num(self.iou())[kept].mean())

    def overall_accuracy(self) -> float:
        """Return the share of the counted pixels that are predicted right, 0..1; NaN without any pixel."""
        counts = self.counts.cpu().numpy()
        return float(np.trace(counts) / counts.sum()) if counts.any() else float("nan")


class Scores(ConfusionMatrix):
    """A confusion matrix that also adds up the measures that are means over images.

    `jaccards` are (3,) float64: the sum over images of the foreground's Jaccard index, the same sum of its thresholded
    form, and the number of images.
    """

    def __init__(self, classes: Classes) -> None:
        super().__init__(len(classes))
        self.classes = classes
        self.jaccards = torch.zeros(3, dtype=torch.float64)
        self._foreground = torch.tensor([k in classes.foreground for k in range(len(classes))])

    def update(self, truth: Tensor, guess: Tensor) -> Tensor:
        """Count one whole image; see `ConfusionMatrix.update`."""
        counts = super().update(truth, guess)
        self._foreground = self._foreground.to(counts.device)
        jaccard = foreground_jaccard(counts, self._foreground)
        passed = torch.where(jaccard >= JACCARD_THRESHOLD, jaccard, 0)
        self.jaccards = self.jaccards.to(counts.device) + torch.stack([jaccard, passed, torch.ones_like(jaccard)])
        return counts

    def sums(self) -> list[Tensor]:
        return [self.counts, self.jaccards]

    def measures(self) -> dict[str, float]:
        """Return the value of each measure of the classes, 0..1; NaN if nothing was counted."""
        return {name: MEASURES[name](self) for name in self.classes.measures}

    def mean_jaccard(self, thresholded: bool = False) -> float:
        """Return the mean over images of the foreground's Jaccard index, 0..1; NaN without images.

        If `thresholded`, an image below `JACCARD_THRESHOLD` counts 0.
        """
        total, passed, images = self.jaccards.tolist()
        return (passed if thresholded else total) / images if images else float("nan")


def foreground_jaccard(counts: Tensor, foreground: Tensor) -> Tensor:
    """Return the Jaccard index, 0..1, of all foreground classes as one, a float64 scalar; 1 if there is none.

    `counts` is a confusion matrix, (n_class, n_class); `foreground` says which classes are foreground, (n_class,) bool.
    """
    rows, columns = foreground[:, None], foreground[None]
    # masks, not indices: the size of an indexed selection would have to be copied to the host
    hit = (counts * (rows & columns)).sum().double()
    union = (counts * (rows | columns)).sum()
    return torch.where(union > 0, hit / union.clamp(min=1), 1.0)


MEASURES: dict[str, Callable[[Scores], float]] = {
    "accuracy": Scores.overall_accuracy,
    "jaccard": Scores.mean_jaccard,
    "thresholded_jaccard": lambda scores: scores.mean_jaccard(thresholded=True),
}
"""The measures that can be reported beside IoU, by the names that `Classes.measures` and data set files use."""

PER_IMAGE_MEASURES = ("jaccard", "thresholded_jaccard")
"""The measures that need the classes' foreground."""


class StageMetrics:
    """The scores of every prediction of a stage, by name, and the prediction that the stage is judged by."""

    def __init__(self, stage: Stage, classes: Classes | int) -> None:
        """Start at zero; a number of classes stands for classes without names."""
        classes = Classes.generic(classes) if isinstance(classes, int) else classes
        self.matrices = {name: Scores(classes) for name in stage.predictions}
        self.headline = stage.headline

    def update(self, label: Tensor, predictions: Mapping[str, ArgmaxSink]) -> None:
        """Count one whole image, labelled (H, W) uint8; the predictions, by name, are on the same device."""
        for name, prediction in predictions.items():
            self.matrices[name].update(label, prediction.ids)

    def mean_iou(self) -> float:
        """Return the headline's mIoU, 0..1, without the classes that `left_out` names."""
        matrix = self.matrices[self.headline]
        return matrix.mean_iou(matrix.classes.left_out)

    def has_labels(self) -> bool:
        """Return whether any pixel with a class was counted."""
        return bool(self.matrices[self.headline].counts.any())

    def mean_iou_on_device(self) -> Tensor:
        """Return `mean_iou` as a float32 scalar on the counts' device, so that the host need not wait for it."""
        matrix = self.matrices[self.headline]
        counts = matrix.counts.float()
        hit = counts.diagonal()
        iou = hit / (counts.sum(0) + counts.sum(1) - hit).clamp(min=1)
        kept = [iou[k] for k in range(matrix.n_class) if k not in matrix.classes.left_out]
        return torch.stack(kept).mean() if kept else iou.new_tensor(math.nan)

    def sums(self) -> list[Tensor]:
        """Return all counters, matrix by matrix; see `ConfusionMatrix.sums`."""
        return [tensor for matrix in self.matrices.values() for tensor in matrix.sums()]
