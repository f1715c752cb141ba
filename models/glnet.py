"""GLNet: three branches that share maps, and the ensemble of their last ones (paper, section 3)."""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.fpn import FPN, INITIAL_STD, PS3_CHANNELS, initial_conv, resize
from models.pyramid import Pyramid


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

    def forward(self, local: Tensor, crop: Tensor) -> Tensor:
        """Logits of patches from their ps3 and the crop of the global ps3, which is resized to it."""
        return self.local_half(local) + self.global_half(resize(crop, local.shape[-2:]))


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
