"""GLNet: three branches that share maps, and the ensemble of their last ones (paper, section 3)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.fpn import FPN, INITIAL_STD, PS3_CHANNELS, initial_conv
from models.pyramid import Pyramid, See
from models.regulariser import conv_and_distance
from models.resized import add_taps, resize, spread, taps_of
from models.sharing import crop_global, crop_pyramid
from utils.tiling import Patches


class Branch(nn.Module):
    """Backbone, pyramid and a 3x3 head that classifies ps3."""

    def __init__(self, backbone: str, n_class: int, fused: bool) -> None:
        super().__init__()
        self.backbone = Backbone(backbone)
        self.pyramid = FPN(self.backbone.channels, fused)
        self.head = initial_conv(PS3_CHANNELS, n_class, 3)

    def forward(self, image: Tensor, other: Pyramid | None = None) -> tuple[Tensor, Pyramid]:
        """Logits (N, n_class, h/4, w/4) and the pyramid of `image` (N, 3, h, w); `other` is for the fused form."""
        pyramid = self.pyramid(self.backbone(image), other)
        return self.head(pyramid.ps3), pyramid

    def context(self, image: Tensor) -> Pyramid:
        """The pyramid of `image` without ps3 and head: all that another branch's fused pyramid reads."""
        return self.pyramid(self.backbone(image), ps3=False)

    def logits(self, image: Tensor) -> Tensor:
        """The logits alone, in the plain form, without building ps3."""
        return self.read(self.context(image))

    def read(self, context: Pyramid) -> Tensor:
        """The logits that the plain form's `context` gives."""
        return self.pyramid.conv_ps3(context.ps2, self.head.weight, self.head.bias)


class Ensemble(nn.Conv2d):
    """3x3 convolution over (local ps3, global ps3), as the sum of its two halves; no concatenation is built."""

    def __init__(self, n_class: int) -> None:
        super().__init__(2 * PS3_CHANNELS, n_class, 3, padding=1)
        nn.init.normal_(self.weight, 0, INITIAL_STD)

    def local_half(self, ps3: Tensor) -> Tensor:
        """The local map's share of the logits, bias included: (N, 512, h, w) to (N, n_class, h, w)."""
        return F.conv2d(ps3, self.weight[:, :PS3_CHANNELS], self.bias, padding=1)

    def global_half(self, ps3: Tensor) -> Tensor:
        """The global map's share of the logits: (N, 512, h, w) to (N, n_class, h, w)."""
        return F.conv2d(ps3, self.weight[:, PS3_CHANNELS:], padding=1)

    def global_taps(self, ps3: Tensor) -> Tensor:
        """The taps that `global_half` adds up, (N, 9 * n_class, H, W), row by row of the kernel, for `spread_crop`."""
        return F.conv2d(ps3, taps_of(self.weight[:, PS3_CHANNELS:]))

    def forward(self, local: Tensor, crop: Tensor) -> Tensor:
        """Logits of patches from their ps3 and the crop of the global ps3, which is resized to it."""
        return self.local_half(local) + self.global_half(resize(crop, local.shape[-2:]))


def spread_crop(taps: Tensor, grid: Patches, patches: slice, half: Tensor) -> Tensor:
    """The global half of the ensemble for `patches` of `grid`, at the size of their local `half`.

    `taps` are those of the whole image: cropping and resizing them equals cropping and resizing ps3 first.
    """
    crop = crop_global(taps, grid, patches)
    return spread(list(crop.chunk(3, dim=1)), [tuple(crop.shape[-2:]), tuple(half.shape[-2:])])


@dataclass(frozen=True)
class WholeMaps:
    """What a global branch found in a whole image; None where it was not asked for.

    `logits` (1, n_class, h/4, w/4). `context`: the maps that fused pyramids read. `ensemble`: what
    `Ensemble.global_taps` gives.
    """

    logits: Tensor | None
    context: Pyramid | None
    ensemble: Tensor | None


@dataclass(frozen=True)
class PatchMaps:
    """What the local branch found in n patches; None where it was not asked for.

    `logits` (n, n_class, h/4, w/4), `half`: the local half of the ensemble, of the same size.
    """

    logits: Tensor | None
    half: Tensor | None


class GLNet(nn.Module):
    """The global branch, the local branch fed by it, the refined global branch fed by both, and the ensemble.

    `global_` is trained in stage 1 and gives the context ever after; `local` in stage 2; `refined` in stage 3.
    No tensor is kept in a module between calls: what flows is in the functions of `helper`.
    """

    def __init__(self, n_class: int = 7, backbone: str = "resnet50") -> None:
        super().__init__()
        self.global_ = Branch(backbone, n_class, fused=False)
        self.local = Branch(backbone, n_class, fused=True)
        self.refined = Branch(backbone, n_class, fused=True)
        self.ensemble = Ensemble(n_class)
        self.n_class = n_class
        self.learning: tuple[str, ...] = ()
        self.learn(())

    def learn(self, names: Iterable[str]) -> None:
        """Let exactly the named children (`global_`, `local`, `refined`, `ensemble`) learn.

        All the rest gets no gradient, and its norm layers stay in evaluation whatever `train()` is called later.
        """
        self.learning = tuple(names)
        for name, child in self.named_children():
            child.requires_grad_(name in self.learning)
        self.train(self.training)

    def train(self, mode: bool = True) -> "GLNet":
        super().train(mode)
        for name, child in self.named_children():
            child.train(mode and name in self.learning)
        return self

    def start_refined(self) -> None:
        """Start stage 3: the refined branch's backbone and head as copies of the global branch's, norm buffers too."""
        self.refined.backbone.load_state_dict(self.global_.backbone.state_dict())
        self.refined.head.load_state_dict(self.global_.head.state_dict())

    # What two layers read of the same ps3 is one convolution: the widest map of all is passed, and in training its
    # gradient made, once.

    def read_local(self, ps3: Tensor, crop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the local ps3: its logits and half of the ensemble, (n, n_class, h, w) each, and its distance.

        The distance is that to `crop`, what its patches cover of the global ps3.
        """
        weight = torch.cat([self.local.head.weight, self.ensemble.weight[:, :PS3_CHANNELS]])
        bias = torch.cat([self.local.head.bias, self.ensemble.bias])
        scores, distance = conv_and_distance(ps3, weight, bias, crop)
        return *scores.chunk(2, dim=1), distance

    def read_refined(self, ps3: Tensor) -> tuple[Tensor, Tensor]:
        """The refined logits (N, n_class, h, w), and what `Ensemble.global_taps` gives, of the refined ps3."""
        kernels = self.refined.head.weight, self.ensemble.weight[:, PS3_CHANNELS:]
        mine, taps = F.conv2d(ps3, torch.cat([taps_of(kernel) for kernel in kernels])).chunk(2, dim=1)
        return add_taps(mine) + self.refined.head.bias.view(-1, 1, 1), taps

    # What inference calls, one method for each part of an image's way through the network. The prepared form in
    # models/inference.py has the same four; this plain one is its oracle.

    def read_whole(self, image: Tensor, logits: bool, context: bool, ensemble: bool) -> WholeMaps:
        """What the global branch finds in the shrunk `image` (1, 3, size_g, size_g), as far as it is asked for."""
        pyramid = self.global_.pyramid(self.global_.backbone(image), ps3=logits or ensemble)
        found = self.global_.head(pyramid.ps3) if logits else None
        taps = self.ensemble.global_taps(pyramid.ps3) if ensemble else None
        return WholeMaps(found, pyramid if context else None, taps)

    def read_patches(
        self,
        x: Tensor,
        whole: WholeMaps,
        grid: Patches,
        patches: slice,
        logits: bool,
        ensemble: bool,
        see: See | None = None,
    ) -> PatchMaps:
        """What the local branch finds in `x` (n, 3, h, w), the `patches` of `grid`, fed with `whole`'s context.

        `see` is shown the maps that are merged for the refined branch.
        """
        other = crop_pyramid(whole.context, grid, patches)
        pyramid = self.local.pyramid(self.local.backbone(x), other, ps3=logits or ensemble)
        if see is not None:
            pyramid.show(see)
        return PatchMaps(
            self.local.head(pyramid.ps3) if logits else None,
            self.ensemble.local_half(pyramid.ps3) if ensemble else None,
        )

    def refine(self, image: Tensor, merged: Pyramid, logits: bool, ensemble: bool) -> WholeMaps:
        """What the refined branch finds in the shrunk `image` and the `merged` local maps."""
        pyramid = self.refined.pyramid(self.refined.backbone(image), merged)
        found = self.refined.head(pyramid.ps3) if logits else None
        return WholeMaps(found, None, self.ensemble.global_taps(pyramid.ps3) if ensemble else None)

    def join(self, half: Tensor, whole: WholeMaps, grid: Patches, patches: slice) -> Tensor:
        """The ensemble's logits of `patches` from its local `half` and the `whole` image's taps."""
        return half + spread_crop(whole.ensemble, grid, patches, half)
