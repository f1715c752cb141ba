"""The network prepared for inference: computed once from the weights, nothing in it learns.

It gives what the plain form gives, up to rounding, for about a third of the work. What is exact and why:

*Norm layers* in evaluation are affine, so each folds into the convolution before it.

*A convolution of a concatenation* is the sum of convolutions of its parts, and a *1x1 convolution commutes* with
resizing and cropping. So the part of every local lateral that reads the global branch is computed once per image, on
the whole global map, and cropped.

*A 3x3 convolution of a resized map needs no resized map* (`add_resized_conv`). Each of its nine taps is a 1x1
convolution, done at the map's own size; what remains, bilinear resizing, shifting by the tap and padding with zeros,
is linear in rows and columns separately, so it is one matrix for rows and one for columns. Resizes in a row multiply
into one.

*The end of the pyramid folds.* From ps2 to the scores there is only: resize, concatenate, smooth (1024 -> 512), and a
3x3 convolution to n_class scores. That last one is its nine taps of ps3, each shifted and added (`add_taps`), and a tap
of ps3 is one channel of smooth followed by a 1x1 convolution: one 3x3 convolution from 1024 to 9 n_class channels. So
ps3 is never built. Shifting after the fold keeps the border exact: what a tap reads outside ps3 is 0, as the padding.
The head and the local half of the ensemble are folded alike; of the global half of the ensemble, taps of the global
ps3 are computed once per image and cropped.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models.fpn import FPN, PS2_CHANNELS, PS3_CHANNELS, interleaved
from models.glnet import GLNet, ensemble_global_half
from models.pyramid import Levels, OnMap, Pyramid
from models.resized import add_resized_conv, add_taps, conv, joint_conv, resize, taps_of
from models.sharing import crop_pyramid
from utils.stages import Stage
from utils.tiling import Patches


@dataclass(frozen=True)
class GlobalMaps:
    """What a global branch computes from a whole image; None where it was not requested.

    Attributes:
        logits: (1, n_class, size_g / 4, size_g / 4).
        context: the maps that fused pyramids read; `c` is projected to the local laterals already.
        taps: what `Ensemble.global_taps` gives, (1, 9 * n_class, size_g / 4, size_g / 4).
    """

    logits: Tensor | None
    context: Pyramid | None
    taps: Tensor | None


@dataclass(frozen=True)
class LocalMaps:
    """What the local branch computes from n patches; None where it was not requested.

    Attributes:
        logits: (n, n_class, h / 4, w / 4).
        half: the local half of the ensemble's logits, of the same shape.
    """

    logits: Tensor | None
    half: Tensor | None


@dataclass(frozen=True)
class Placement:
    """Device, precision and memory layout of the prepared network."""

    device: torch.device
    dtype: torch.dtype = torch.float32

    def put(self, x: Tensor) -> Tensor:
        """Return `x` on the device, in the precision and, if it has rows and columns, channels last."""
        x = x.detach().to(self.device, self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def fold_norms(module: nn.Module, placement: Placement) -> nn.Module:
    """A copy of a ResNet (or a part of one) in `placement`, every norm layer folded into the convolution before it."""
    folded = copy.copy(module)
    folded._modules, folded._parameters = {}, {}
    before = ""
    for name, child in module.named_children():  # in the order of registration: a norm layer follows its convolution
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            layer, statistics = getattr(module, before), (child.running_mean, child.running_var, child.eps)
            weights = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, child.weight, child.bias)
            weight, bias = (nn.Parameter(placement.put(x), requires_grad=False) for x in weights)
            folded._modules[before].weight, folded._modules[before].bias = weight, bias
            folded._modules[name] = nn.Identity()
        else:
            folded._modules[name] = fold_norms(child, placement)
        before = name
    return folded


class PreparedPyramid:
    """A pyramid from backbone maps to ps2; the fused form's convolutions are split into own and other branch's half."""

    def __init__(self, fpn: FPN, placement: Placement) -> None:
        self.fused = fpn.fused
        self.own: list[list[tuple[Tensor, Tensor]]] = []
        self.other: list[list[Tensor]] = []
        for convs in (fpn.lateral, fpn.smooth1, fpn.smooth2):
            halves = [layer.weight.chunk(2 if fpn.fused else 1, dim=1) for layer in convs]
            biases = [placement.put(layer.bias) for layer in convs]
            self.own.append([(placement.put(own), bias) for (own, *_), bias in zip(halves, biases, strict=True)])
            self.other.append([placement.put(other) for _, *others in halves for other in others])

    def project(self, level: int, c: Tensor) -> Tensor:
        """Return the other branch's half of a lateral, 256 channels, at the size of the other branch's map `c`."""
        return conv(c, self.other[0][level])

    def __call__(self, c: list[Tensor], other: Pyramid | None = None, on_map: OnMap | None = None) -> Levels:
        """Compute ps2.

        Args:
            c: backbone maps, coarsest first. The list is emptied on the way: no map is held longer than needed.
            other: the other branch's pyramid in the fused form; its `c` is projected already.
            on_map: gets every map as soon as it is computed, coarsest level first.
        """
        maps: list[Any] = c
        for depth, layers in enumerate(self.own):
            for level, layer in enumerate(layers):
                own, maps[level] = maps[level], None
                if on_map is not None:
                    on_map(depth, level, own)
                x = conv(own, *layer)
                del own
                if other is not None:
                    theirs, size = other.levels[depth][level], (x.shape[-2], x.shape[-1])
                    if depth:
                        x = add_resized_conv(x, theirs, self.other[depth][level], [size])
                    else:
                        x += resize(theirs, size)
                if depth == 0 and level > 0:
                    x += resize(maps[level - 1], x.shape[-2:])
                maps[level] = x
        for level, x in enumerate(maps if on_map is not None else ()):
            on_map(len(self.own), level, x)
        return tuple(maps)


class FoldedTail:
    """Everything from ps2 to what 3x3 convolutions read of ps3: the nine taps of each, and ps3 never built."""

    def __init__(self, fpn: FPN, kernels: list[Tensor], placement: Placement) -> None:
        """Fold `kernels`, weights (n_class, 512, 3, 3), each one output that `__call__` may choose."""
        # (9, outputs, n_class, 512): the places outermost, row by row
        taps = torch.stack([taps_of(kernel.double()).view(9, *kernel.shape[:2]) for kernel in kernels], 1)
        if fpn.fused:  # (9, outputs, n_class, 512) by (512, 1024, 3, 3)
            weight = torch.tensordot(taps, fpn.smooth.weight.double(), dims=1)
            self.bias = placement.put(torch.tensordot(taps, fpn.smooth.bias.double(), dims=1))
        else:  # ps3 is the concatenation itself
            weight = taps[..., None, None]
            self.bias = placement.put(taps.new_zeros(taps.shape[:-1]))
        # one group for each map that is read: of each level the own, then in the fused form the other branch's
        self.groups = [placement.put(group) for group in weight.split(PS2_CHANNELS, dim=3)]

    def __call__(self, outputs: list[int], own: Levels, other: Levels | None = None) -> Tensor:
        """Return (N, 9 * K, H, W): the taps of ps3 for the `outputs` chosen (K classes in all), at the size of p2."""
        size = (own[-1].shape[-2], own[-1].shape[-1])
        maps, chains = (list(own), [[size]] * len(own)) if other is None else interleaved(own, other)
        weights = [group[:, outputs].flatten(0, 2) for group in self.groups]
        return joint_conv(maps, chains, weights, self.bias[:, outputs].flatten())


class PreparedGLNet:
    """GLNet as one stage evaluates it, in four parts: global maps, local maps, refined maps, ensemble.

    Each part computes only what is requested. Only the branches that the stage uses are copied, to the placement's
    device. The plain network, whose `forward` is the reference, is not changed and not kept.
    """

    def __init__(self, model: GLNet, stage: Stage, placement: Placement) -> None:
        self.n_class = model.n_class
        self.placement = placement
        joint = [branch for branch in ("local", "refined") if branch in stage.uses]
        local_kernel, global_kernel = model.ensemble.weight.split(PS3_CHANNELS, dim=1)
        kernels = {"global_": global_kernel, "local": local_kernel, "refined": global_kernel}
        self.backbones: dict[str, nn.Module] = {}
        self.pyramids: dict[str, PreparedPyramid] = {}
        self.tails: dict[str, FoldedTail] = {}
        self.biases: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in ("global_", *joint):
                branch = getattr(model, name)
                self.backbones[name] = fold_norms(branch.backbone, placement)
                self.pyramids[name] = PreparedPyramid(branch.pyramid, placement)
                self.tails[name] = FoldedTail(branch.pyramid, [branch.head.weight, kernels[name]], placement)
                self.biases[name] = branch.head.bias.detach().float().to(placement.device)
            self.ensemble_bias = model.ensemble.bias.detach().float().to(placement.device)

    def global_maps(self, image: Tensor, *, logits: bool, context: bool, ensemble: bool) -> GlobalMaps:
        """Run the global branch.

        Args:
            image: the whole image shrunk, (1, 3, size_g, size_g), normalised.
            logits: whether the logits are requested.
            context: whether the maps that the local branch reads are.
            ensemble: whether the taps of ps3 that the ensemble reads are.
        """
        kept: list[list[Tensor]] = [[], [], [], []]

        def keep(depth: int, level: int, x: Tensor) -> None:
            kept[depth].append(x if depth else self.pyramids["local"].project(level, x))

        c = list(self.backbones["global_"](self.placement.put(image)))
        ps2 = self.pyramids["global_"](c, on_map=keep if context else None)
        found, taps = self._read_ps3("global_", ps2, None, logits, ensemble)
        return GlobalMaps(found, Pyramid(*map(tuple, kept)) if context else None, taps)

    def local_maps(
        self,
        x: Tensor,
        context: Pyramid,
        grid: Patches,
        patches: slice,
        *,
        logits: bool,
        ensemble: bool,
        on_map: OnMap | None = None,
    ) -> LocalMaps:
        """Run the local branch on some patches.

        Args:
            x: the patches, (n, 3, h, w), normalised.
            context: the global branch's maps of the whole image, as `global_maps` gives them.
            grid: the image's patch grid.
            patches: which patches of the grid `x` holds.
            logits: whether the logits are requested.
            ensemble: whether the local half of the ensemble is.
            on_map: gets the maps that are merged for the refined branch.
        """
        other = crop_pyramid(context, grid, patches)
        ps2 = self.pyramids["local"](list(self.backbones["local"](self.placement.put(x))), other, on_map)
        outputs = [k for k, requested in enumerate((logits, ensemble)) if requested]
        if not outputs:
            return LocalMaps(None, None)
        scores = list(add_taps(self.tails["local"](outputs, ps2, other.ps2)).split(self.n_class, dim=1))
        found = scores.pop(0) + self.biases["local"].view(-1, 1, 1) if logits else None
        half = scores.pop(0) + self.ensemble_bias.view(-1, 1, 1) if ensemble else None
        return LocalMaps(found, half)

    def refined_maps(self, image: Tensor, merged: Pyramid, *, logits: bool, ensemble: bool) -> GlobalMaps:
        """Run the refined branch.

        Args:
            image: the whole image shrunk, (1, 3, size_g, size_g), normalised.
            merged: the local maps merged into the global frame, (1, C, H, W) each.
            logits: whether the logits are requested.
            ensemble: whether the taps of ps3 that the ensemble reads are.
        """
        fused = self.pyramids["refined"]
        projected = tuple(fused.project(level, x) for level, x in enumerate(merged.c))
        other = Pyramid(projected, merged.ps0, merged.ps1, merged.ps2)
        ps2 = fused(list(self.backbones["refined"](self.placement.put(image))), other)
        found, taps = self._read_ps3("refined", ps2, other.ps2, logits, ensemble)
        return GlobalMaps(found, None, taps)

    def ensemble_logits(self, half: Tensor, taps: Tensor, grid: Patches, patches: slice) -> Tensor:
        """Return the ensemble's logits (n, n_class, h, w) of some patches, from its local `half` and global `taps`."""
        return half + ensemble_global_half(taps, grid, patches, (half.shape[-2], half.shape[-1]))

    def _read_ps3(
        self, name: str, own: Levels, other: Levels | None, logits: bool, ensemble: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return a global branch's logits, and the taps that the ensemble reads of its ps3, as far as requested."""
        outputs = [k for k, requested in enumerate((logits, ensemble)) if requested]
        if not outputs:
            return None, None
        every = self.tails[name](outputs, own, other).unflatten(1, (9, len(outputs), self.n_class))
        taps = [x.flatten(1, 2) for x in every.unbind(2)]
        found = add_taps(taps.pop(0)) + self.biases[name].view(-1, 1, 1) if logits else None
        return found, taps.pop() if ensemble else None
