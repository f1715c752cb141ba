"""Convolutions that read ps3 for the last time, alone or with the feature-map regulariser (paper, section 3.3).

ps3 is the largest map of a training step. In the backward pass its gradient takes its place in memory, sample by
sample. Autograd raises an error if another function needs ps3 there.
"""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.resized import conv
from utils.tiling import map_size


def conv_and_distance(x: Tensor, weight: Tensor, bias: Tensor, crop: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve `x` (n, C, h, w), which the backward pass overwrites, and compute its distance to `crop` (n, C, h', w').

    The crop is a constant and resized to `x`, which is not kept. Return the convolution, (n, K, h, w), and the mean
    squared difference, a float32 scalar.
    """
    return _LastConv.apply(x, weight.to(x.dtype), bias.to(x.dtype), crop)


def last_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve a map `x` (n, C, h, w), overwritten in the backward pass, by `weight` (K, C, k, k): (n, K, h, w)."""
    return _LastConv.apply(x, weight.to(x.dtype), None, None)[0]


class _LastConv(torch.autograd.Function):
    """A convolution, and the distance to `crop`, which is 0 without one, with their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, crop: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, crop)
        pairs = () if crop is None else zip(x.split(1), crop.split(1), strict=True)
        parts = (_difference(sample, target).square_().sum() for sample, target in pairs)
        return conv(x, weight, bias), reduce(torch.add, parts, x.new_zeros((), dtype=torch.float32)) / x.numel()

    @staticmethod
    def backward(ctx: Any, of_conv: Tensor, of_distance: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, crop = ctx.saved_tensors
        x, padding = x.detach(), weight.shape[-1] // 2
        from_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        scale = -2 * of_distance / x.numel()
        crops = [None] * len(x) if crop is None else crop.split(1)
        for sample, gradient, target in zip(x.split(1), of_conv.split(1), crops, strict=True):
            from_conv, from_sample, _ = torch.ops.aten.convolution_backward(
                gradient,
                sample,
                weight,
                bias_sizes=None,
                stride=[1, 1],
                padding=[padding, padding],
                dilation=[1, 1],
                transposed=False,
                output_padding=[0, 0],
                groups=1,
                output_mask=[True, True, False],
            )
            from_weight += from_sample
            if target is not None:  # adding to float32 is much faster on a CPU than adding float32 to bfloat16
                from_conv = _difference(sample, target).mul_(scale).add_(from_conv)
            sample.copy_(from_conv)
        from_bias = of_conv.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return x, from_weight.to(weight.dtype), from_bias, None


def _difference(x: Tensor, crop: Tensor) -> Tensor:
    """Return `crop` (1, C, h', w') resized to `x` (1, C, h, w), minus `x`: a new float32 tensor."""
    target = crop.float().contiguous(memory_format=torch.channels_last)  # as `x`; a CPU resizes this much faster
    return F.interpolate(target, size=map_size(x), mode="bilinear").sub_(x)
