"""How numbers are computed: precision, memory layout and the switches of libraries. The one place for such choices."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Convolutions and matrix products in `precision`, all else as torch's autocast decides; nothing for fp32."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def gradient_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales losses so that float16 gradients do not vanish; does nothing in any other precision."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def lay_out(x: Tensor, precision: str) -> Tensor:
    """`x` (N, C, H, W) in the layout that training in `precision` is to have.

    Channels last pays in bfloat16 and float16 (on a CPU 1.1 to 2 times). In float32 it changes which kernels run and so
    the order of sums, and small differences grow in a network with norm layers: there the released layout stays.
    """
    return x if precision == "fp32" else x.contiguous(memory_format=torch.channels_last)


def set_switches(tf32: bool, cudnn_benchmark: bool) -> None:
    """CUDA's faster but less exact float32 products, and cuDNN's search for the fastest convolution."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = cudnn_benchmark
