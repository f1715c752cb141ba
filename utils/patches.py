"""One image, cut into patches as the network reads them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.canvas import Ids, ScoreCanvas, Sink
from utils.loss import Loss, build_loss
from utils.precision import lay_out
from utils.regions import CoarseToFine, Effort
from utils.resize import shrink_label
from utils.sources import Held, Source
from utils.tiling import MIN_OVERLAP, Patches, PatchGrid, Size

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
    loss: Loss = field(default_factory=build_loss)
    lamb_fmreg: float = 0.15
    normalize: str = "none"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    """Of float16 gradients."""
    share: float = 1.0
    """What the mean over a batch's pixels counts of this process's part of the batch; 1 where it has all of it."""
    coarse_to_fine: CoarseToFine | None = None
    """Where the local branch looks; everywhere where this is None."""

    def send(self, x: Tensor) -> Tensor:
        """`x` on the device; CUDA gets it from pinned memory, and so the host does not wait for the copy."""
        if self.device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)

    def to_input(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 as the network reads it: float32 in [0, 1], normalised, on the device."""
        x = lay_out(self.send(image).float().div_(255), self.precision)
        if self.normalize == "none":
            return x
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in STATISTICS[self.normalize])
        return (x - mean) / std


class ImagePatches:
    """One image, cut into sub-batches of patches: a source, or (3, H, W) uint8; `label` (H, W) uint8.

    The image stays where it is, and each sub-batch goes to the device by itself. `on_patches` is told how many patches
    are done.
    """

    def __init__(
        self,
        image: Tensor | Source,
        label: Tensor | None,
        settings: Settings,
        on_patches: Callable[[int], None] | None = None,
    ) -> None:
        self.settings = settings
        self.on_patches = on_patches
        self.source = Held(image) if isinstance(image, Tensor) else image
        self.label = None if label is None else settings.send(label)
        self.all = PatchGrid.cover(self.source.size, settings.size_p, settings.min_overlap)
        self.grid: Patches = self.all
        self.boxes = self.grid.boxes()

    @property
    def size(self) -> Size:
        return self.source.size

    @property
    def looks(self) -> bool:
        """Whether patches are cut where there is something to `look` at, and not everywhere."""
        return self.settings.coarse_to_fine is not None

    def look(self, logits: Tensor) -> None:
        """Keep only the patches where the coarse `logits` (1, 2, h, w) of the image say that there is something, which
        may be none. Where there is a label, and these patches miss too much of it, it is asked instead.
        """
        focus = self.settings.coarse_to_fine
        geometry = self.size, self.settings.size_p, self.settings.min_overlap
        grid = focus.grids(focus.found(logits), *geometry)
        if self.label is not None and not focus.covers(grid, self.label):
            grid = focus.grids(focus.labelled(self.label, tuple(logits.shape[-2:])), *geometry)
        self.grid, self.boxes = grid, grid.boxes()

    def effort(self) -> Effort:
        """How much of the image these patches are."""
        looked_at = sum(region.height * region.width for region in self.grid.regions)
        return Effort(self.size[0] * self.size[1], looked_at, len(self.all), len(self.grid))

    def canvas(self, sink: Sink, means: bool = False) -> ScoreCanvas:
        """Where scores of these patches are added up for `sink`; pixels that were not looked at are background."""
        return ScoreCanvas(self.grid, sink, means, self.settings.coarse_to_fine.outside if self.looks else None)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the grid, each with its patches (n, 3, h, w) as the network reads them."""
        for patches in self.grid.sub_batches(self.settings.sub_batch_size):
            cut = torch.stack([self.source.read(box) for box in self.boxes[patches]])
            yield patches, self.settings.to_input(cut)
            if self.on_patches is not None:
                self.on_patches(len(cut))

    def targets(self, patches: slice, logits: Tensor) -> Tensor:
        """Labels (n, h, w) of `patches` at the size of their `logits`: cropped first, then shrunk."""
        cut = torch.stack([box.of(self.label) for box in self.boxes[patches]])
        return shrink_label(cut, tuple(logits.shape[-2:]))

    def ids(self) -> Ids:
        """A sink for this image's class ids, on the device."""
        return Ids(self.size, self.settings.device)
