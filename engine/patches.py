"""The patches of one image, as the network's input, and the labels of the patches."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dataset.base import Sample
from imaging.sources import MemorySource, Source
from utils.canvas import ArgmaxSink, BoxScores, FiniteScores, ScoreCanvas, Sink, enlarge
from utils.classes import IGNORED
from utils.errors import required
from utils.resize import shrink_label
from utils.selection import Coverage
from utils.settings import Settings, TrainingSettings
from utils.tiling import Patches, PatchGrid, PatchSubset, Size, map_size

OnPatches = Callable[[int], object]
"""A callback with the number of patches of a sub-batch after it is computed."""


class ImagePatches:
    """The patches of one image, in sub-batches. The image stays in its source; each sub-batch is copied to the device.

    Attributes:
        all: the grid that covers the whole image.
        grid: the grid of the patches that are computed: `all`, until `select_patches` replaces it.
        boxes: of `grid`.
        shared: the shrunk image whose maps are shared in place of this image's own, as the network's input,
            (1, bands, size_g, size_g); None for its own.
        outside: the scores of pixels that no patch covers, after `select_patches` left some out.
    """

    def __init__(
        self, source: Source, settings: Settings, on_patches: OnPatches | None = None, check: FiniteScores | None = None
    ) -> None:
        """Cut an image; `on_patches` is called after each sub-batch, `check` gets all logits that become scores."""
        self.settings = settings
        self.on_patches, self.check = on_patches, check
        self.source = source
        self.all = PatchGrid.cover(source.size, settings.size_p, settings.min_overlap)
        self.grid: Patches = self.all
        self.boxes = self.grid.boxes()
        self.shared: Tensor | None = None
        self.outside: BoxScores | None = None

    @property
    def size(self) -> Size:
        """The image's (height, width), in pixels."""
        return self.source.size

    def select_patches(self, logits: Tensor, label: Tensor | None = None) -> bool:
        """Keep only the patches that the settings select by the global logits; return whether any is left.

        In training, the image's `label` (H, W) may replace the logits.
        """
        settings, selection = self.settings, self.settings.selection
        if selection is not None:
            self.grid = selection.patches(logits, self.size, settings.size_p, settings.min_overlap, label)
            self.boxes = self.grid.boxes()
            self.outside = selection.outside(logits, self.size, settings.upsample)
            if self.check is not None:
                self.check.add(logits)
        return bool(self.boxes)

    def coverage(self) -> Coverage:
        """Return the part of the image that these patches cover."""
        return Coverage(self.size[0] * self.size[1], self.grid.covered_pixels(), len(self.all), len(self.grid))

    def canvas(self, sink: Sink, means: bool = False) -> ScoreCanvas:
        """Return a canvas that adds up the scores of these patches, or with `means` takes their means over the patches.

        The selection gives the scores of other pixels.
        """
        blend, upsample = self.settings.blend, self.settings.upsample
        return ScoreCanvas(self.grid, sink, means, self.outside, blend=blend, upsample=upsample, check=self.check)

    def enlarge(self, logits: Tensor, sink: Sink) -> None:
        """Enlarge the logits of the whole image, (1, n_class, h, w), and send them to a sink."""
        if self.check is not None:
            self.check.add(logits)
        enlarge(logits, self.size, sink, upsample=self.settings.upsample)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the sub-batches of the settings' size; see `sub_batches`."""
        return self.sub_batches(self.settings.sub_batch_size)

    def sub_batches(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield `size` patches at a time: a slice of the grid, and the network's input, (n, bands, h, w)."""
        for patches in self.grid.sub_batches(size):
            cut = torch.stack([self.source.read(box) for box in self.boxes[patches]])
            yield patches, self.settings.to_input(cut)
            if self.on_patches is not None:
                self.on_patches(len(cut))

    def ids(self) -> ArgmaxSink:
        """Return a sink for the class ids of this image, on the device."""
        return ArgmaxSink(self.size, self.settings.device)


class TrainingPatches(ImagePatches):
    """The patches of a labelled image, whose label stays on the host, too.

    `drawn` says whether `keep` left out patches, so that the others stand for the image.
    """

    settings: TrainingSettings

    def __init__(self, sample: Sample, settings: TrainingSettings) -> None:
        """Cut the image of `sample`. Raises ValueError if the sample lacks the image or the label."""
        super().__init__(MemorySource(required(sample.image, "image")), settings)
        self._label = required(sample.label, "label")
        self._seed = sample.seed
        self.drawn = False

    def label(self) -> Tensor:
        """Return a copy of the label on the device, (H, W) uint8 class ids."""
        return self.settings.to_device(self._label)

    def select_patches(self, logits: Tensor, label: Tensor | None = None) -> bool:
        return super().select_patches(logits, None if self.settings.selection is None else self.label())

    def draw(self) -> tuple[int, ...]:
        """Draw the patches that the loss reads; return their indices in the grid, rising.

        They are as many as the settings say, by the sample's seed; all if the grid has no more, or the settings say 0.
        """
        everything, count = len(self.grid), self.settings.patches
        if not 0 < count < everything:
            return tuple(range(everything))
        return tuple(sorted(np.random.default_rng(self._seed).choice(everything, count, replace=False).tolist()))

    def keep(self, indices: tuple[int, ...]) -> None:
        """Leave out all patches of the grid but those at `indices`, by `draw`."""
        if len(indices) < len(self.grid):
            self.drawn = True
            self.grid = PatchSubset(self.grid, indices)
            self.boxes = self.grid.boxes()

    def labels_once(self) -> Tensor:
        """Return the labels of all patches, (n, height, width) uint8, on the device.

        A pixel of several patches is of the first one; in the others it is ignored.
        """
        labels = torch.stack([box.of(self._label) for box in self.boxes])
        for k, box in enumerate(self.boxes):
            for earlier in self.boxes[:k]:
                if shared := box.overlap(earlier):
                    shared.within(box).of(labels[k]).fill_(IGNORED)
        return self.settings.to_device(labels)

    def targets(self, patches: slice, logits: Tensor) -> Tensor:
        """Return the labels of n patches, (n, h, w) uint8 on the device: cropped first, then shrunk to `logits`.

        With `full_labels` in the settings they keep the patches' own size.
        """
        cut = self.settings.to_device(torch.stack([box.of(self._label) for box in self.boxes[patches]]))
        return cut if self.settings.full_labels else shrink_label(cut, map_size(logits))


def computed_together(batch: list[Sample], settings: TrainingSettings) -> list[list[Sample]]:
    """Return a batch in the groups whose patches share sub-batches: all images, or as released each by itself."""
    return [batch] if settings.mix_images else [[sample] for sample in batch]


def joint_sub_batches(images: Sequence[ImagePatches], size: int) -> Iterator[list[tuple[int, slice, Tensor]]]:
    """Yield sub-batches of about `size` patches, to which all images that have patches left contribute as many each.

    Each is a list of an image's index in `images`, a slice of its grid, and these patches as the network's input,
    (n, bands, h, w). Images whose patches are smaller, as the images are, have sub-batches of their own. Where there
    are more images than `size`, each contributes one patch.
    """
    sizes = [image.grid.patch for image in images]
    for patch in dict.fromkeys(sizes):
        group = [k for k, own in enumerate(sizes) if own == patch]
        each = max(1, size // len(group))
        left = [(k, images[k].sub_batches(each)) for k in group]
        # not itertools.zip_longest: it holds the first patches as long as it lives
        while parts := [(k, *part) for k, patches in left if (part := next(patches, None)) is not None]:
            yield parts
