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
"""Below it an image counts as failed in the ISIC challenge's thresholded Jaccard."""


class ConfusionMatrix:
    """Counts of (true class, predicted class), kept on the device of the first update.

    Rows are the truth. Pixels whose true id is not in 0..n_class-1 (255, the ignored id) are left out.
    """

    def __init__(self, n_class: int) -> None:
        self.n_class = n_class
        self.counts = torch.zeros(n_class, n_class, dtype=torch.int64)

    def update(self, truth: Tensor, guess: Tensor) -> Tensor:
        """Count `truth` and `guess`, integer ids of one shape (guess in 0..n_class-1), on one device.

        Returns the counts of this call alone, (n_class, n_class) int64.
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
        """All that was counted: what adds up over images and processes, and what a saved matrix is copied into."""
        return [self.counts]

    def iou(self) -> np.ndarray:
        """(n_class,) float64 intersection over union; NaN for a class that is neither true nor predicted."""
        counts = self.counts.cpu().numpy().astype(np.float64)
        hit = np.diag(counts)
        union = counts.sum(0) + counts.sum(1) - hit
        return np.divide(hit, union, out=np.full(self.n_class, np.nan), where=union > 0)

    def accuracy(self) -> np.ndarray:
        """(n_class,) float64 share of each true class that is predicted right; 0 for a class that never occurs."""
        counts = self.counts.cpu().numpy().astype(np.float64)
        total = counts.sum(1)
        return np.divide(np.diag(counts), total, out=np.zeros(self.n_class), where=total > 0)

    def mean_iou(self, left_out: tuple[int, ...] = (0,)) -> float:
        """Mean IoU over all classes but `left_out`; a class without union counts 0, as in the released code."""
        kept = [k for k in range(self.n_class) if k not in left_out]
        return float(np.nan_to_num(self.iou())[kept].mean())

    def overall_accuracy(self) -> float:
        """Share of the counted pixels that are predicted right; NaN where none is counted."""
        counts = self.counts.cpu().numpy()
        return float(np.trace(counts) / counts.sum()) if counts.any() else float("nan")


class Scores(ConfusionMatrix):
    """A confusion matrix that also keeps what the measures of `classes` need of every single image.

    `jaccards` is (3,) float64: the sums over images of the Jaccard index of the foreground, and of its thresholded
    form, and the number of images. Like `counts` it is a plain sum: several processes add theirs.
    """

    def __init__(self, classes: Classes) -> None:
        super().__init__(len(classes))
        self.classes = classes
        self.jaccards = torch.zeros(3, dtype=torch.float64)
        self._foreground = torch.tensor([k in classes.foreground for k in range(len(classes))])

    def update(self, truth: Tensor, guess: Tensor) -> Tensor:
        """Count one whole image, as ConfusionMatrix does."""
        counts = super().update(truth, guess)
        self._foreground = self._foreground.to(counts.device)
        jaccard = foreground_jaccard(counts, self._foreground)
        passed = torch.where(jaccard >= JACCARD_THRESHOLD, jaccard, 0)
        self.jaccards = self.jaccards.to(counts.device) + torch.stack([jaccard, passed, torch.ones_like(jaccard)])
        return counts

    def sums(self) -> list[Tensor]:
        return [self.counts, self.jaccards]

    def measures(self) -> dict[str, float]:
        """The value, 0..1, of each of the classes' measures; NaN where nothing was counted."""
        return {name: MEASURES[name](self) for name in self.classes.measures}

    def mean_jaccard(self, thresholded: bool = False) -> float:
        """Mean over the images of the foreground's Jaccard index; NaN without images.

        `thresholded`: an image below 0.65 counts 0.
        """
        total, passed, images = self.jaccards.tolist()
        return (passed if thresholded else total) / images if images else float("nan")


def foreground_jaccard(counts: Tensor, foreground: Tensor) -> Tensor:
    """Jaccard index, a float64 scalar, of the foreground classes taken as one in the confusion matrix `counts`.

    `foreground` is (n_class,) bool, on the device of `counts`. Where there is no foreground and none is predicted,
    the index is 1: nothing was missed.
    """
    rows, columns = foreground[:, None], foreground[None]
    # masks, not indices: what they select need not be known on the host
    hit = (counts * (rows & columns)).sum().double()
    union = (counts * (rows | columns)).sum()
    return torch.where(union > 0, hit / union.clamp(min=1), 1.0)


MEASURES: dict[str, Callable[[Scores], float]] = {
    "accuracy": Scores.overall_accuracy,
    "jaccard": Scores.mean_jaccard,
    "thresholded_jaccard": lambda scores: scores.mean_jaccard(thresholded=True),
}
"""What may be reported beside IoU, by the names that `Classes.measures` and data set files use."""

PER_IMAGE_MEASURES = ("jaccard", "thresholded_jaccard")
"""Those that need the classes' foreground."""


class StageMetrics:
    """The scores of every prediction of a stage.

    Attributes:
        matrices: by prediction, its `Scores`.
        headline: the prediction that the stage is judged by.
    """

    def __init__(self, stage: Stage, classes: Classes | int) -> None:
        """Start at zero; a number of `classes` stands for that many numbered ones."""
        classes = Classes.generic(classes) if isinstance(classes, int) else classes
        self.matrices = {name: Scores(classes) for name in stage.predictions}
        self.headline = stage.headline

    def update(self, label: Tensor, predictions: Mapping[str, ArgmaxSink]) -> None:
        """Count one whole image: `label` (H, W) uint8 ids against each of `predictions`, on the same device."""
        for name, prediction in predictions.items():
            self.matrices[name].update(label, prediction.ids)

    def mean_iou(self) -> float:
        """Return the headline's mIoU, 0..1, without the classes that are left out."""
        matrix = self.matrices[self.headline]
        return matrix.mean_iou(matrix.classes.left_out)

    def mean_iou_on_device(self) -> Tensor:
        """Return what `mean_iou` does as a float32 scalar on the counts' device: the host does not wait for it."""
        matrix = self.matrices[self.headline]
        counts = matrix.counts.float()
        hit = counts.diagonal()
        iou = hit / (counts.sum(0) + counts.sum(1) - hit).clamp(min=1)
        kept = [iou[k] for k in range(matrix.n_class) if k not in matrix.classes.left_out]
        return torch.stack(kept).mean() if kept else iou.new_tensor(math.nan)

    def sums(self) -> list[Tensor]:
        """Return all that was counted, matrix by matrix."""
        return [tensor for matrix in self.matrices.values() for tensor in matrix.sums()]
