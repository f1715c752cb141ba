"""Precision, memory layout and a switch of CUDA."""

import logging
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The type that convolutions compute in, by `--precision`."""

AUTO = "auto"
"""The value of `--precision` for bf16 where the device has instructions for it, else fp32."""

PRECISION_CHOICES = (*PRECISIONS, AUTO)
"""The values of `--precision`."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the key of `PRECISIONS` that one of `PRECISION_CHOICES` means on `device`.

    The first of several processes warns of bf16 on a CPU that only emulates it.
    """
    if precision == AUTO:
        return "bf16" if computes_bf16(device) else "fp32"
    emulated = precision == "bf16" and device.type == "cpu" and not computes_bf16(device)
    if emulated and os.environ.get("RANK", "0") == "0":
        logging.warning(
            "--precision bf16: this CPU has no bf16 instructions, and emulating them takes several times as long as "
            "fp32; give --precision auto"
        )
    return precision


def computes_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions for bf16; False where torch does not say."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # torch.ops.mkldnn._is_mkldnn_bf16_supported() also accepts AVX512 without bf16, where oneDNN emulates
    if hasattr(torch.cpu, "get_capabilities"):
        features = torch.cpu.get_capabilities()
        return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # bf16: of ARM
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()  # torch before 2.12


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return torch's autocast to `precision`, which in fp32 changes nothing."""
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
