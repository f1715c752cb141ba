"""The network as training computes it: what `FPN.forward`, heads and ensemble give, in less time and memory.

A convolution of a concatenation is the sum of two convolutions, of a resized map it needs no resized map
(`models/resized.py`), and convolutions in a row are one. All of it is exact up to rounding, and has gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.fpn import FPN, SameConv
from models.glnet import Branch, Ensemble, GLNet
from models.pyramid import FullPyramid, Levels, OnMap, Pyramid, fitted
from models.regulariser import conv_and_distance, last_conv
from models.resized import add_resized_conv, add_taps, conv, joint_conv, resize_and_add_taps, taps_of
from models.sharing import crop_global
from utils.errors import required
from utils.tiling import Patches, Size, map_size


def folded_kernel(layer: SameConv) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a layer, with those of a norm layer that is in evaluation mode folded in."""
    norm = layer.norm
    if norm is None or norm.training:
        return layer.weight, layer.bias
    factor = norm.weight * (required(norm.running_var, "running variance") + norm.eps).rsqrt()
    shift = layer.bias - required(norm.running_mean, "running mean")
    return layer.weight * factor.view(-1, 1, 1, 1), shift * factor + norm.bias


def trained_norm(layer: SameConv) -> nn.Module:
    """Return what follows the convolution by `folded_kernel`: the norm layer if it trains, else an identity."""
    return layer.norm if layer.norm is not None and layer.norm.training else nn.Identity()


def branch_maps(branch: Branch, image: Tensor, other: Pyramid | None = None) -> Pyramid:
    """Return a branch's pyramid without ps3: all that another branch's fused pyramid reads. See `Branch.forward`."""
    return shared_maps(branch.pyramid, branch.backbone(image), other)


def branch_pyramid(branch: Branch, image: Tensor, other: Pyramid | None = None) -> FullPyramid:
    """Return a branch's pyramid; see `Branch.forward`."""
    return full_pyramid(branch.pyramid, branch.backbone(image), other)


def branch_logits(branch: Branch, maps: Pyramid, other: Pyramid | None = None) -> Tensor:
    """Return the logits from what `branch_maps` returned of the same `other`; ps3 is not built."""
    read = None if other is None else other.ps2
    return conv_ps3(branch.pyramid, maps.ps2, branch.head.weight, branch.head.bias, read)


def full_pyramid(fpn: FPN, c: Levels, other: Pyramid | None = None) -> FullPyramid:
    """Compute the pyramid of backbone maps; see `FPN.forward`."""
    own = shared_maps(fpn, c, other)
    if fpn.smooth is None or other is None:
        size = map_size(own.ps2[-1])
        return FullPyramid(*own.levels, torch.cat([fitted(x, size) for x in own.ps2], dim=1))
    maps, chains = interleaved(own.ps2, other.ps2)
    weight, bias = folded_kernel(fpn.smooth)
    smoothed = joint_conv(maps, chains, weight.split(fpn.ps2_channels, dim=1), bias)
    return FullPyramid(*own.levels, trained_norm(fpn.smooth)(smoothed))


def shared_maps(fpn: FPN, c: Levels, other: Pyramid | None = None) -> Pyramid:
    """Compute the pyramid of backbone maps without ps3; see `FPN.forward`."""
    kept: list[list[Tensor]] = [[], [], [], []]
    SplitPyramid(fpn)(list(c), other, lambda depth, level, x: kept[depth].append(x))
    return Pyramid.of(kept)


class SplitPyramid:
    """A pyramid from backbone maps to ps2, the convolutions of its fused form split into two halves.

    Attributes:
        own: [depth][level]: weight and bias of the half that reads the own map.
        other: [depth][level]: weight of the half that reads the other branch's map; no levels in the plain form.
        norms: [depth][level]: `trained_norm`.
        projected: whether the other branch's c5..c2 come as `project` returns them.
    """

    def __init__(self, fpn: FPN, put: Callable[[Tensor], Tensor] = lambda x: x, projected: bool = False) -> None:
        """Split the convolutions; `put` returns each half as it is to be kept."""
        self.fused, self.projected = fpn.fused, projected
        self.own: list[list[tuple[Tensor, Tensor]]] = []
        self.other: list[list[Tensor]] = []
        self.norms: list[list[nn.Module]] = []
        for convs in (fpn.lateral, fpn.smooth1, fpn.smooth2):
            kernels = [folded_kernel(layer) for layer in convs]
            halves = [weight.chunk(2 if fpn.fused else 1, dim=1) for weight, _ in kernels]
            self.own.append([(put(own), put(bias)) for (own, *_), (_, bias) in zip(halves, kernels, strict=True)])
            self.other.append([put(other) for _, *others in halves for other in others])
            self.norms.append([trained_norm(layer) for layer in convs])

    def project(self, level: int, c: Tensor) -> Tensor:
        """Return the other branch's half of a lateral, (N, C', h, w), from the other branch's map `c` (N, C, h, w)."""
        return conv(c, self.other[0][level])

    def __call__(self, c: list[Tensor], other: Pyramid | None = None, on_map: OnMap | None = None) -> Levels:
        """Compute ps2 of backbone maps (N, C, h, w), coarsest first, each removed from the list when it was read.

        `other` is the other branch's pyramid in the fused form. `on_map` gets every map as soon as it is computed,
        coarsest level first.
        """
        maps: list[Any] = c
        for depth, layers in enumerate(self.own):
            for level, (weight, bias) in enumerate(layers):
                own, maps[level] = maps[level], None
                if on_map is not None:
                    on_map(depth, level, own)
                x = conv(own, weight, bias)
                del own
                if other is not None:
                    y, size = other.levels[depth][level], map_size(x)
                    if depth or not self.projected:
                        x = add_resized_conv(x, y, self.other[depth][level], [size])
                    else:
                        x += fitted(y, size)
                x = self.norms[depth][level](x)
                if depth == 0 and level > 0:
                    x += fitted(maps[level - 1], map_size(x))
                if depth == 0 and self.fused:
                    # convolutions of resized maps come with their channels last, so their partners should
                    x = x.contiguous(memory_format=torch.channels_last)
                maps[level] = x
        if on_map is not None:
            for level, x in enumerate(maps):
                on_map(len(self.own), level, x)
        return tuple(maps)


def conv_ps3(fpn: FPN, ps2: Levels, weight: Tensor, bias: Tensor, other: Levels | None = None) -> Tensor:
    """Convolve ps3, which is not built, by `weight` (K, C, 3, 3) and `bias` (K,): (N, K, h / 4, w / 4).

    In the fused form, where ps3 is itself a convolution, the two kernels are multiplied first, as the prepared form
    does (`models/prepared.py`). The product and the sum over its taps are computed in float32 in any precision. A fused
    pyramid with norm layers must be in evaluation mode. `ps2` are (N, C / 4, h, w) each, coarsest first; `other` is the
    other branch's, for the fused form only.
    """
    if fpn.smooth is None or other is None:
        chains = [[map_size(ps2[-1])]] * len(ps2)
        return joint_conv(ps2, chains, weight.split(fpn.ps2_channels, dim=1), bias)
    with torch.autocast(weight.device.type, enabled=False):
        kernel, shift = folded_end(fpn, weight)
    maps, chains = interleaved(ps2, other)
    scores = add_taps(joint_conv(maps, chains, kernel.split(fpn.ps2_channels, dim=1), shift)) + bias.view(-1, 1, 1)
    return scores.to(ps2[-1].dtype)


def folded_end(fpn: FPN, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nine taps of a convolution of ps3 by `weight` (K, C, 3, 3) as one convolution of what ps3 reads.

    In the fused form that is ps2 of both branches, and kernel and bias are (9 * K, 2 * C, 3, 3) and (9 * K,); else it
    is ps2, and they are (9 * K, C, 1, 1) and zeros. The places of the taps are outermost, row by row.
    """
    taps = taps_of(weight).flatten(1)  # (9 * K, C)
    if fpn.smooth is None:
        return taps[..., None, None], taps.new_zeros(len(taps))
    smooth, bias = folded_kernel(fpn.smooth)
    return torch.tensordot(taps, smooth.to(taps.dtype), dims=1), taps @ bias.to(taps.dtype)


def interleaved(own: Levels, other: Levels) -> tuple[list[Tensor], list[list[Size]]]:
    """Return the maps that ps3 of a fused pyramid reads, in order, and the chain of sizes of each.

    `own` and `other` are both ps2, coarsest first. Each level of `other` is first resized to the own one's size; all
    chains end with p2's.
    """
    size = map_size(own[-1])
    maps = [x for level in zip(own, other, strict=True) for x in level]
    chains = [chain for x in own for chain in ([size], [map_size(x), size])]
    return maps, chains


def ensemble_taps(ensemble: Ensemble, ps3: Tensor) -> Tensor:
    """Return the nine taps of the global map's part of the ensemble, which `ensemble_global_half` crops and adds.

    (1, C, H, W) to (1, 9 * n_class, H, W), the places of the kernel outermost, row by row.
    """
    return F.conv2d(ps3, taps_of(ensemble.global_weight))


def ensemble_global_half(taps: Tensor, grid: Patches, patches: slice, size: Size) -> Tensor:
    """Compute the global map's part of the ensemble's logits for n patches, (n, n_class, h, w), (h, w) being `size`.

    `taps` are `ensemble_taps` of the whole image, (1, 9 * n_class, H, W). Cropping and resizing them equals cropping
    and resizing ps3 first.
    """
    crop = crop_global(taps, grid, patches)  # (n, 9 * n_class, h', w')
    return resize_and_add_taps(crop, [map_size(crop), size])


def read_local(model: GLNet, ps3: Tensor, crop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute all that training needs of the local ps3 (n, C, h, w), the largest map, in one pass.

    Head and ensemble both convolve ps3, which the backward pass overwrites. Their kernels are concatenated, so that ps3
    is read once and its gradient is made once. `crop` has the cells of the global ps3 that the patches cover, (n, C,
    h', w'). Return logits (n, n_class, h, w); the local half of the ensemble, of the same shape; the mean squared
    distance of `ps3` to `crop` resized to it, a scalar (the feature-map regulariser, paper, section 3.3).
    """
    weight = torch.cat([model.local.head.weight, model.ensemble.local_weight])
    bias = torch.cat([model.local.head.bias, model.ensemble.bias])
    scores, distance = conv_and_distance(ps3, weight, bias, crop)
    logits, half = scores.chunk(2, dim=1)
    return logits, half, distance


def read_refined(model: GLNet, ps3: Tensor) -> tuple[Tensor, Tensor]:
    """Compute all that training needs of the refined ps3 (N, C, h, w), which the backward pass overwrites, in one pass.

    Return logits (N, n_class, h, w), and the taps of `ensemble_taps`, (N, 9 * n_class, h, w).
    """
    kernels = model.refined.head.weight, model.ensemble.global_weight
    own, taps = last_conv(ps3, torch.cat([taps_of(kernel) for kernel in kernels])).chunk(2, dim=1)
    # a copy, so that the other half is freed
    return add_taps(own) + model.refined.head.bias.view(-1, 1, 1), taps.clone()
