"""The network as training computes it: what `FPN.forward`, heads and ensemble give, in less time and memory.

A convolution of a concatenation is the sum of two convolutions, of a resized map it needs no resized map
(`models/resized.py`), and convolutions in a row are one. All of it is exact up to rounding, and has gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fpn import FPN, LevelConvs, SameConv
from models.glnet import Branch, Ensemble, GLNet
from models.pyramid import FullPyramid, Levels, Pyramid, fitted
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


def normalized(layer: SameConv, x: Tensor) -> Tensor:
    """Return the output `x` of the convolution by `folded_kernel`, normalised if a norm layer trains."""
    return layer.norm(x) if layer.norm is not None and layer.norm.training else x


def branch_maps(branch: Branch, image: Tensor, other: Pyramid | None = None) -> Pyramid:
    """Return a branch's pyramid without ps3: all that another branch's fused pyramid reads. See `Branch.forward`."""
    return shared_maps(branch.pyramid, branch.backbone(image), other)


def branch_pyramid(branch: Branch, image: Tensor, other: Pyramid | None = None) -> FullPyramid:
    """Return a branch's pyramid. See `Branch.forward`."""
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
    return FullPyramid(*own.levels, normalized(fpn.smooth, smoothed))


def shared_maps(fpn: FPN, c: Levels, other: Pyramid | None = None) -> Pyramid:
    """Compute the pyramid of backbone maps without ps3; see `FPN.forward`."""
    other_c, other_ps0, other_ps1 = (None, None, None) if other is None else (other.c, other.ps0, other.ps1)
    ps0: list[Tensor] = []
    for lateral in _convolve(fpn.lateral, c, other_c):
        total = lateral.add_(fitted(ps0[-1], map_size(lateral))) if ps0 else lateral
        # convolutions of resized maps come with their channels last, so their partners should
        ps0.append(total.contiguous(memory_format=torch.channels_last) if fpn.fused else total)
    ps1 = _convolve(fpn.smooth1, tuple(ps0), other_ps0)
    ps2 = _convolve(fpn.smooth2, ps1, other_ps1)
    return Pyramid(c, tuple(ps0), ps1, ps2)


def _convolve(layers: LevelConvs, own: Levels, other: Levels | None) -> Levels:
    """Convolve every level of `own`, concatenated with the same level of `other` if there is one."""
    outputs = []
    for level, (layer, x) in enumerate(zip(layers, own, strict=True)):
        weight, bias = folded_kernel(layer)
        if other is None:
            total = conv(x, weight, bias)
        else:
            read_own, read_other = weight.split(x.shape[1], dim=1)
            total = add_resized_conv(conv(x, read_own, bias), other[level], read_other, [map_size(x)])
        outputs.append(normalized(layer, total))
    return tuple(outputs)


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
    taps = taps_of(weight).flatten(1)  # (9 * K, C)
    with torch.autocast(weight.device.type, enabled=False):
        smooth, smooth_bias = folded_kernel(fpn.smooth)
        kernel = torch.tensordot(taps, smooth, dims=1)  # (9 * K, 2 * C, 3, 3)
        shift = taps @ smooth_bias
    maps, chains = interleaved(ps2, other)
    scores = add_taps(joint_conv(maps, chains, kernel.split(fpn.ps2_channels, dim=1), shift)) + bias.view(-1, 1, 1)
    return scores.to(ps2[-1].dtype)


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
