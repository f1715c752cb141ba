"""One image on the device, cut into patches as the network reads them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.canvas import Ids
from utils.resize import shrink_label
from utils.tiling import MIN_OVERLAP, PatchGrid, Size

STATISTICS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation by `--normalize`. The released code uses none."""


@dataclass(frozen=True)
class Settings:
    """How images are cut, scaled and weighed; sizes in pixels."""

    size_p: int = 508
    sub_batch_size: int = 6
    min_overlap: int = MIN_OVERLAP
    lamb_fmreg: float = 0.15
    normalize: str = "none"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def to_input(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 as the network reads it: float32 in [0, 1], normalised, on the device."""
        x = image.to(self.device).float().div_(255)
        if self.normalize == "none":
            return x
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in STATISTICS[self.normalize])
        return (x - mean) / std


class ImagePatches:
    """One image on the device, cut into sub-batches of patches. `image` (3, H, W) uint8, `label` (H, W) uint8."""

    def __init__(self, image: Tensor, label: Tensor | None, settings: Settings) -> None:
        self.settings = settings
        self.image = image.to(settings.device, non_blocking=True)
        self.label = None if label is None else label.to(settings.device, non_blocking=True)
        self.grid = PatchGrid.cover(tuple(image.shape[-2:]), settings.size_p, settings.min_overlap)
        self.boxes = self.grid.boxes()

    @property
    def size(self) -> Size:
        return self.grid.image

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the grid, each with its patches (n, 3, h, w) as the network reads them."""
        for patches in self.grid.sub_batches(self.settings.sub_batch_size):
            cut = torch.stack([box.of(self.image) for box in self.boxes[patches]])
            yield patches, self.settings.to_input(cut)

    def targets(self, patches: slice, logits: Tensor) -> Tensor:
        """Labels (n, h, w) of `patches` at the size of their `logits`: cropped first, then shrunk."""
        cut = torch.stack([box.of(self.label) for box in self.boxes[patches]])
        return shrink_label(cut, tuple(logits.shape[-2:]))

    def ids(self) -> Ids:
        """A sink for this image's class ids, on the device."""
        return Ids(self.size, self.settings.device)
