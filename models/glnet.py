"""GLNet: three branches that share feature maps, and the ensemble of their last ones (paper, section 3, figure 2)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import build_backbone
from models.bands import set_bands
from models.fpn import FPN, INITIAL_STD, WIDTH, SameConv
from models.pyramid import FullPyramid, Pyramid, resize
from models.sharing import crop_global, crop_pyramid, merge_local_maps
from utils.errors import required
from utils.stretch import RGB
from utils.tiling import Patches, map_size


class Branch(nn.Module):
    """One branch of GLNet: backbone, feature pyramid and a 3x3 head that classifies ps3."""

    def __init__(
        self, backbone: str, n_class: int, fused: bool, n_bands: int = RGB, width: int = WIDTH, norm: str = "none"
    ) -> None:
        """Make the branch; `fused` if its pyramid reads another branch's, too. For `width` and `norm` see `FPN`."""
        super().__init__()
        self.backbone = build_backbone(backbone)
        set_bands(self.backbone, n_bands)
        self.pyramid = FPN(self.backbone.channels, fused, width, norm)
        self.head = SameConv(self.pyramid.ps3_channels, n_class, 3)

    def forward(self, image: Tensor, other: Pyramid | None = None) -> tuple[Tensor, FullPyramid]:
        """Compute logits (N, n_class, h / 4, w / 4) and pyramid of normalised images or patches (N, bands, h, w).

        `other` is the other branch's pyramid, for the fused form only.
        """
        pyramid = self.pyramid(self.backbone(image), other)
        return self.head(pyramid.ps3), pyramid


class Ensemble(nn.Module):
    """3x3 convolution over the concatenation of local ps3 and global ps3 (paper, section 3.2).

    A convolution of a concatenation is the sum of two convolutions, so the halves can be computed apart.

    Attributes:
        weight: (n_class, 2 * C, 3, 3), C being the channels of ps3; the local half first.
        bias: (n_class,).
    """

    def __init__(self, n_class: int, channels: int) -> None:
        """Make the convolution for ps3 of `channels` channels."""
        super().__init__()
        initial = nn.Conv2d(2 * channels, n_class, 3)
        self.weight, self.bias = initial.weight, required(initial.bias, "bias")
        nn.init.normal_(self.weight, 0, INITIAL_STD)

    @property
    def local_weight(self) -> Tensor:
        """The half that reads the local ps3, (n_class, C, 3, 3)."""
        return self.weight[:, : self.weight.shape[1] // 2]

    @property
    def global_weight(self) -> Tensor:
        """The half that reads the global ps3, (n_class, C, 3, 3)."""
        return self.weight[:, self.weight.shape[1] // 2 :]

    def forward(self, local: Tensor, crop: Tensor) -> Tensor:
        """Return logits of patches, (n, n_class, h, w), from their own ps3 (n, C, h, w) and a crop of the global."""
        joined = torch.cat([local, resize(crop, map_size(local))], dim=1)  # (n, 2 * C, h, w)
        return F.conv2d(joined, self.weight, self.bias, padding=1)

    def local_half(self, ps3: Tensor) -> Tensor:
        """Return the local map's part of the logits, bias included: (n, C, h, w) to (n, n_class, h, w)."""
        return F.conv2d(ps3, self.local_weight, self.bias, padding=1)


@dataclass(frozen=True)
class Predictions:
    """Logits of one image; None for a prediction that the mode does not have."""

    global_: Tensor  # (1, n_class, size_g / 4, size_g / 4); of the refined branch in mode 3
    local: Tensor | None = None  # (n, n_class, h / 4, w / 4), of each patch
    ensemble: Tensor | None = None  # of the same shape


class GLNet(nn.Module):
    """The global branch, the local branch fed by it, the refined global branch fed by both, and the ensemble.

    Stage 1 trains `global_`, stage 2 `local` and `ensemble`, stage 3 `refined`, which starts as a copy of `global_`,
    and `ensemble`; `learning` names the children that learn. No tensor is kept in a module between calls.
    """

    def __init__(
        self,
        n_class: int = 7,
        backbone: str = "resnet50",
        n_bands: int = RGB,
        pyramid_width: int = WIDTH,
        pyramid_norm: str = "none",
    ) -> None:
        """Make a network with initial weights; nothing learns yet. For the last two see `FPN`."""
        super().__init__()
        self.global_ = Branch(backbone, n_class, False, n_bands, pyramid_width, pyramid_norm)
        self.local = Branch(backbone, n_class, True, n_bands, pyramid_width, pyramid_norm)
        self.refined = Branch(backbone, n_class, True, n_bands, pyramid_width, pyramid_norm)
        self.ensemble = Ensemble(n_class, self.global_.pyramid.ps3_channels)
        self.n_class = n_class
        self.n_bands = n_bands
        self.learning: tuple[str, ...] = ()
        self.learn(())

    def forward(
        self, image: Tensor, patches: Tensor | None = None, grid: Patches | None = None, mode: int = 3
    ) -> Predictions:
        """Segment one image as in the paper's figure 2: the plain reference of the faster forms.

        Args:
            image: the whole image shrunk, (1, bands, size_g, size_g), normalised.
            patches: all patches of the image at full resolution, (n, bands, h, w), normalised; not read in mode 1.
            grid: the grid of these patches; not read in mode 1.
            mode: 1 global, 2 global to local, 3 local to global.

        Returns:
            The logits of each prediction that the mode has.

        Raises:
            ValueError: modes 2 and 3 without patches or grid.
        """
        # the global branch reads the shrunk image
        logits_g, global_maps = self.global_(image)
        if mode == 1:
            return Predictions(logits_g)
        if patches is None or grid is None:
            raise ValueError(f"mode {mode} needs the patches and their grid")
        everything = slice(0, len(grid))
        # global to local: the local branch reads each patch, and the global maps cropped to it
        logits_l, local_maps = self.local(patches, crop_pyramid(global_maps, grid, everything))
        # local to global: the refined branch reads the shrunk image again, and the local maps merged into its frame
        if mode == 3:
            logits_g, global_maps = self.refined(image, merge_local_maps(local_maps, grid, frame=global_maps))
        # ensemble of the last local map and the last global map
        crop = crop_global(global_maps.ps3, grid, everything)
        return Predictions(logits_g, logits_l, self.ensemble(local_maps.ps3, crop))

    def learn(self, names: Iterable[str]) -> None:
        """Let exactly the named children (`global_`, `local`, `refined`, `ensemble`) learn.

        All others get no gradient, and their norm layers stay in evaluation mode whatever `train()` is called later.
        """
        self.learning = tuple(names)
        for name, child in self.named_children():
            child.requires_grad_(name in self.learning)
        self.train(self.training)

    def train(self, mode: bool = True) -> "GLNet":
        """Set training mode for the children that learn and evaluation mode for the others; return the network."""
        super().train(mode)
        for name, child in self.named_children():
            child.train(mode and name in self.learning)
        return self

    def start_refined(self) -> None:
        """Start stage 3: copy the global branch's backbone and head, norm buffers too, to the refined branch."""
        self.refined.backbone.load_state_dict(self.global_.backbone.state_dict())
        self.refined.head.load_state_dict(self.global_.head.state_dict())

    @torch.no_grad()
    def continue_global(self) -> None:
        """Start stage 2's ensemble as the global branch: its global half is the global head, its local half is 0.

        The head reads the crop of the global ps3 at the size of the patch, as the ensemble does.
        """
        self.ensemble.local_weight.zero_()
        self.ensemble.global_weight.copy_(self.global_.head.weight)
        self.ensemble.bias.copy_(self.global_.head.bias)

    @torch.no_grad()
    def continue_refined(self) -> None:
        """Start stage 3's refined branch as the global branch: after `start_refined`, the pyramid follows.

        The halves of its convolutions that read local maps are 0; the last convolution passes its own maps on. In
        evaluation mode the branch computes what the global one does, whatever local maps it gets. In training mode the
        last norm layer does so up to the differences between a batch's statistics and the recorded ones.
        """
        plain, fused = self.global_.pyramid, self.refined.pyramid
        for name in ("lateral", "smooth1", "smooth2"):
            for source, target in zip(getattr(plain, name), getattr(fused, name), strict=True):
                target.weight.zero_()
                target.weight[:, : source.in_channels].copy_(source.weight)
                target.bias.copy_(source.bias)
                if source.norm is not None:
                    target.norm.load_state_dict(source.norm.state_dict())
        smooth = required(fused.smooth, "the last convolution")
        smooth.weight.zero_()
        smooth.bias.zero_()
        # the inputs of the last convolution are, level by level, own maps and then the other branch's
        own = smooth.weight.unflatten(1, (4, 2, -1))[:, :, 0, :, 1, 1]  # (C, 4, C / 4)
        own.copy_(torch.eye(len(own)).view(own.shape))
        norms = [layer.norm for layer in plain.smooth2 if layer.norm is not None]
        if smooth.norm is not None:  # its input has the mean and the deviation that smooth2's norm layers gave it
            mean = torch.cat([required(norm.bias, "bias") for norm in norms])
            deviation = torch.cat([required(norm.weight, "weight") for norm in norms]).abs()
            variance = required(smooth.norm.running_var, "running variance")
            required(smooth.norm.running_mean, "running mean").copy_(mean)
            variance.copy_((deviation.square() - smooth.norm.eps).clamp(min=0))
            smooth.norm.weight.copy_((variance + smooth.norm.eps).sqrt())
            smooth.norm.bias.copy_(mean)
