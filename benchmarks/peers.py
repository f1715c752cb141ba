"""Measures GLNet beside the networks that one would take instead.

One image of random pixels is segmented by each network in turn, in one process: GLNet in its three modes, all
predictions of the mode; U-Net, DeepLabV3+ and FPN of segmentation_models_pytorch, and DeepLabV3 of torchvision, on the
same patches, of which they see nothing else. All have the same encoder, with random weights, and channels last in
memory. In bf16 the weights of all networks are bfloat16.

GMAC are 1e9 multiply-adds of convolutions and matrix products for the image, counted on fake tensors. Seconds are the
smallest of several rounds, after an image of one patch that warms up. Memory is the peak of live tensors in MB of 2^20
bytes, weights included: counted on a fake accelerator (see memory.py), or with `--device cuda` what CUDA's
allocator reports.
"""

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import segmentation

from benchmarks.memory import COUNTED_PRECISIONS, MB, allocate, fake_accelerator
from benchmarks.speed import MODES, N_CLASS, Inference, add_sizes, elapsed, prepared, random_sample
from dataset.base import Sample
from experiments.baselines import PatchPredictor, build_network
from models.fpn import WIDTH
from models.glnet import GLNet
from utils.arguments import AddOption, whole
from utils.precision import PRECISIONS
from utils.settings import Settings

GLNET = {f"GLNet, mode {mode}": mode for mode in MODES}
TITLES = {"U-Net": "unet", "DeepLabV3+": "deeplab", "FPN": "fpn"}
DEEPLAB_V3 = "DeepLabV3"
PEERS = (*GLNET, *TITLES, DEEPLAB_V3)
"""All networks, in the order of the table."""

REFERENCE = "U-Net"
"""Whose seconds the others are divided by."""


class Cast(nn.Module):
    """A network in another type, with inputs and outputs in float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, n_class, H, W) float32 of `x` (N, 3, H, W)."""
        found = self.network(x.to(self.dtype))
        return (found["out"] if isinstance(found, dict) else found).float()  # torchvision's networks return a dict


def titles(networks: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return the titles of the rows: one for each network, of GLNet one for each width of its pyramids."""
    spelt = ["" if width == WIDTH else f", width {width}" for width in widths]
    return [name + width for name in networks for width in (spelt if name in GLNET else [""])]


def build(title: str, backbone: str, precision: str) -> nn.Module:
    """Return the network of a row in evaluation mode. Raises InputError if its package is missing."""
    name, _, width = title.partition(", width ")
    if name in GLNET:
        return GLNet(N_CLASS, backbone, pyramid_width=int(width or WIDTH)).eval()
    if name in TITLES:
        network = build_network(TITLES[name], backbone, N_CLASS)
    else:
        build_deeplab = getattr(segmentation, f"deeplabv3_{backbone}")  # of resnet50 and resnet101
        network = build_deeplab(weights=None, weights_backbone=None, num_classes=N_CLASS)
    return Cast(network, PRECISIONS[precision]).eval()


def prepare(title: str, network: nn.Module, settings: Settings) -> Inference:
    """Return what segments an image with the network of a row."""
    if isinstance(network, GLNet):
        return Inference(prepared(network, GLNET[title.partition(", width ")[0]], settings))
    return Inference(PatchPredictor(network, settings))


def count(name: str, options: argparse.Namespace, settings: Settings) -> tuple[float, float]:
    """Return the GMAC and the peak MB of segmenting an image, counted on fake tensors."""
    with torch.device("meta"):
        network = build(name, options.backbone, settings.precision)
    with fake_accelerator() as memory:
        with memory.placing("host"):
            allocate(network)
            sample = random_sample(options.side, options.size_p)
        if not isinstance(network, GLNet):  # GLNet is copied to the device when it is prepared
            memory.put_on_device([network])
        work = prepare(name, network, settings)
        del network
        with FlopCounterMode(display=False) as operations:
            work(sample)
        gc.collect()
        memory.restart()
        work(sample)  # apart, because the counter of operations keeps tensors alive
    return operations.get_total_flops() / 2e9, memory.megabytes()["device"]


def measure(name: str, options: argparse.Namespace, settings: Settings, sample: Sample) -> tuple[float, float]:
    """Return the seconds of one image, and the peak MB of CUDA's allocator, 0 on a CPU."""
    device = settings.device
    torch.manual_seed(0)
    network = build(name, options.backbone, settings.precision)
    if not isinstance(network, GLNet):
        network.to(device)
        network.to(memory_format=torch.channels_last)
    work = prepare(name, network, settings)
    del network
    work(sample if device.type == "cuda" else random_sample(options.size_p, options.size_p))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    taken = elapsed(lambda: work(sample), device)
    return taken, torch.cuda.max_memory_allocated(device) / MB if device.type == "cuda" else 0.0


COLUMNS = {
    "network": "network",
    "precision": "precision",
    "gmac": "GMAC",
    "seconds": "seconds",
    "ratio": f"of {REFERENCE}",
    "mb": "MB",
}


def add_options(add: AddOption) -> None:
    add("--networks", nargs="+", choices=PEERS, default=PEERS, metavar="NAME", help="(default: all)")
    add("--precisions", nargs="+", choices=COUNTED_PRECISIONS, default=COUNTED_PRECISIONS, help="(default: both)")
    add("--widths", type=whole(2), nargs="+", default=[WIDTH], metavar="N", help="of GLNet's pyramids (default: 256)")
    rounds = "in each of which every network runs once; 0: count only (default: %(default)s)"
    add("--rounds", type=whole(0), default=2, help=rounds)
    add_sizes(add)
    add("--sub_batch_size", type=whole(1), default=6, help="patches at a time (default: %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Count and measure every network, then yield a row for each network and precision.

    `seconds` is the smallest of the rounds, `ratio` that over the reference's in the same precision.
    """
    sizes = {"size_p": options.size_p, "sub_batch_size": options.sub_batch_size}
    keys = list(product(titles(options.networks, options.widths), options.precisions))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, precision in keys:
        gmac, megabyte = count(name, options, Settings(precision=precision, **sizes))
        found[name, precision] = {"network": name, "precision": precision, "gmac": gmac, "mb": megabyte}
    sample = random_sample(options.side, options.size_p)
    for turn, (name, precision) in product(range(options.rounds), keys):
        settings = Settings(precision=precision, device=options.device, **sizes)
        taken, megabyte = measure(name, options, settings, sample)
        row = found[name, precision]
        row["seconds"] = min(taken, row.get("seconds", taken))
        if megabyte:
            row["mb"] = max(row["mb"], megabyte) if turn else megabyte
        print(f"round {turn + 1}, {name}, {precision}: {taken:.2f} s", file=sys.stderr)
    for (_, precision), row in found.items():
        reference = found.get((REFERENCE, precision))
        if reference is not None and "seconds" in reference:
            row["ratio"] = row["seconds"] / reference["seconds"]
        yield row
