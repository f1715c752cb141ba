"""One image, cut into patches as the network reads them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from utils.canvas import ArgmaxSink, ScoreCanvas, Sink
from utils.regions import Coverage
from utils.resize import shrink_label
from utils.settings import Settings
from utils.sources import MemorySource, Source
from utils.tiling import Patches, PatchGrid, Size


class ImagePatches:
    """One image and the sub-batches of patches that the local branch reads of it.

    The image stays where it is; each sub-batch goes to the device by itself. Patches cover the image, until
    `select_patches` keeps some of them.
    """

    def __init__(
        self,
        image: Tensor | Source,
        label: Tensor | None,
        settings: Settings,
        on_patches: Callable[[int], None] | None = None,
    ) -> None:
        """Cut an image.

        Args:
            image: a source, or (3, H, W) uint8 RGB.
            label: (H, W) uint8 class ids, if there are any.
            settings: sizes, device, and which patches are computed.
            on_patches: gets the number of patches of each sub-batch after it is computed.
        """
        self.settings = settings
        self.on_patches = on_patches
        self.source = MemorySource(image) if isinstance(image, Tensor) else image
        self.label = None if label is None else settings.to_device(label)
        self.all = PatchGrid.cover(self.source.size, settings.size_p, settings.min_overlap)
        self.grid: Patches = self.all
        self.boxes = self.grid.boxes()

    @property
    def size(self) -> Size:
        return self.source.size

    def select_patches(self, logits: Tensor) -> bool:
        """Keep only patches with foreground, coarse to fine; without it all patches stay.

        Foreground is what the coarse `logits` (1, 2, h, w) of the image predict. If there is a label, and the patches
        selected by `logits` miss too much of its foreground, the label selects them.

        Returns:
            Whether any patch is left.
        """
        selection = self.settings.coarse_to_fine
        if selection is None:
            return True
        geometry = self.size, self.settings.size_p, self.settings.min_overlap
        grid = selection.grids(selection.predicted(logits), *geometry)
        if self.label is not None and not selection.covers(grid, self.label):
            grid = selection.grids(selection.labelled(self.label, (logits.shape[-2], logits.shape[-1])), *geometry)
        self.grid, self.boxes = grid, grid.boxes()
        return bool(self.boxes)

    def coverage(self) -> Coverage:
        """Return how much of the image these patches cover."""
        covered = sum(region.height * region.width for region in self.grid.regions)
        return Coverage(self.size[0] * self.size[1], covered, len(self.all), len(self.grid))

    def canvas(self, sink: Sink, means: bool = False) -> ScoreCanvas:
        """Return a canvas that adds up scores of these patches for `sink`; pixels without a patch are background."""
        selection = self.settings.coarse_to_fine
        return ScoreCanvas(self.grid, sink, means, None if selection is None else selection.outside)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the grid, each with its patches (n, 3, h, w) as the network reads them."""
        for patches in self.grid.sub_batches(self.settings.sub_batch_size):
            cut = torch.stack([self.source.read(box) for box in self.boxes[patches]])
            yield patches, self.settings.to_input(cut)
            if self.on_patches is not None:
                self.on_patches(len(cut))

    def targets(self, patches: slice, logits: Tensor) -> Tensor:
        """Return labels (n, h, w) of `patches` at the size of their `logits`: cropped first, then shrunk."""
        cut = torch.stack([box.of(self.label) for box in self.boxes[patches]])
        return shrink_label(cut, (logits.shape[-2], logits.shape[-1]))

    def ids(self) -> ArgmaxSink:
        """Return a sink for this image's class ids, on the device."""
        return ArgmaxSink(self.size, self.settings.device)
