"""Precision, memory layout and a switch of CUDA."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The type that convolutions compute in, by `--precision`."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return a context that computes convolutions and matrix products in `precision`, as torch's autocast does.

    In fp32 the context changes nothing.
    """
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def not_finite(precision: str) -> str:
    """Return, for messages, what scores that are not finite numbers mean, and what helps."""
    if precision == "fp32":
        return "not finite: its weights are damaged, or its training diverged; take another checkpoint"
    return f"not finite in --precision {precision}: give --precision fp32{' or bf16' if precision == 'fp16' else ''}"


def gradient_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Return a scaler of losses that keeps float16 gradients from vanishing; it is disabled in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def lay_out(x: Tensor, precision: str) -> Tensor:
    """Return `x` (N, C, H, W) in the type and the memory layout for training in `precision`.

    Channels last is faster in bfloat16 and float16 (on a CPU 1.1 to 2 times). In float32 it changes which kernels run
    and so the order of sums, and small differences grow in a network with norm layers: the released layout stays.
    """
    return x if precision == "fp32" else x.to(PRECISIONS[precision], memory_format=torch.channels_last)


def disable_tf32() -> None:
    """Make CUDA compute float32 products exactly; by default cuDNN may round what it multiplies."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
