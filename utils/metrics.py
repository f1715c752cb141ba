"""The confusion matrix and the scores read from it."""

import numpy as np
import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts of (true class, predicted class), kept on the device of the first update.

    Rows are the truth. Pixels whose true id is not in 0..n_class-1 (255, the ignored id) are left out.
    """

    def __init__(self, n_class: int) -> None:
        self.n_class = n_class
        self.counts = torch.zeros(n_class, n_class, dtype=torch.int64)

    def update(self, truth: Tensor, guess: Tensor) -> None:
        """Count `truth` and `guess`, integer ids of one shape (guess in 0..n_class-1), on one device."""
        self.counts = self.counts.to(truth.device)
        known = (truth >= 0) & (truth < self.n_class)
        # int16 holds n_class**2 up to 181 classes and halves the memory that int32 would move
        kind = torch.int16 if self.n_class <= 181 else torch.int64
        pairs = truth[known].to(kind) * self.n_class + guess[known].to(kind)
        self.counts += torch.bincount(pairs, minlength=self.n_class**2).view(self.n_class, self.n_class)

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
