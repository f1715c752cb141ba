"""Measures GLNet beside the networks that one would take instead: python -m benchmarks.peers --help

One image of random pixels is segmented by each network in turn, in one process: GLNet in its three modes, all
predictions of the mode; U-Net, DeepLabV3+ and FPN of segmentation_models_pytorch, and DeepLabV3 of torchvision, on the
same patches, of which they see nothing else. All have the same encoder, with random weights, and channels last in
memory. In bf16 the weights of all networks are bfloat16.

GMAC are 1e9 multiply-adds of convolutions and matrix products for the image, counted on fake tensors. Seconds are the
smallest of several rounds, after an image of one patch that warms up. Memory is the peak of live tensors in MB of 2^20
bytes, weights included: counted on a fake accelerator (see fake_accelerator.py), or with `--device cuda` what CUDA's
allocator reports.
"""

import argparse
import gc
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import PatchPredictor, build_network
from benchmarks.fake_accelerator import MB, allocate, fake_accelerator, host_tensors, megabytes, put_on_device
from benchmarks.memory import COUNTED_PRECISIONS
from benchmarks.records import RESULTS, command_of, write_results
from benchmarks.speed import elapsed
from benchmarks.workload import MODES, N_CLASS, Inference, random_sample
from dataset.base import Sample
from imaging.sources import MemorySource
from models.backbone import backbone_name
from models.fpn import WIDTH
from models.glnet import GLNet
from utils.arguments import Parser, whole
from utils.canvas import ArgmaxSink
from utils.errors import exit_code, required
from utils.memory import keep_freed_memory
from utils.precision import PRECISIONS
from utils.run_record import device_name, git_commit, now
from utils.settings import Settings
from utils.tiling import PatchGrid

GLNET = {f"GLNet, mode {mode}": mode for mode in MODES}
TITLES = {"U-Net": "unet", "DeepLabV3+": "deeplab", "FPN": "fpn"}
DEEPLAB_V3 = "DeepLabV3"
PEERS = (*GLNET, *TITLES, DEEPLAB_V3)
"""All networks, in the order of the table."""

REFERENCE = "U-Net"
"""Whose seconds the others are divided by."""

Work = Callable[[Sample], object]
"""Segments an image."""


class DeepLabV3(nn.Module):
    """The network of torchvision, with one output."""

    def __init__(self, backbone: str) -> None:
        """Build the network. `backbone` is resnet50 or resnet101."""
        from torchvision.models import segmentation

        super().__init__()
        build = getattr(segmentation, f"deeplabv3_{backbone}")
        self.network = build(weights=None, weights_backbone=None, num_classes=N_CLASS)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, n_class, H, W) of `x` (N, 3, H, W)."""
        return self.network(x)["out"]


class Cast(nn.Module):
    """A network in another type, with inputs and outputs in float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, n_class, H, W) float32 of `x` (N, 3, H, W)."""
        return self.network(x.to(self.dtype)).float()


def titles(networks: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return the titles of the rows: one for each network, of GLNet one for each width of its pyramids."""
    spelt = ["" if width == WIDTH else f", width {width}" for width in widths]
    return [name + width for name in networks for width in (spelt if name in GLNET else [""])]


def build(title: str, backbone: str, precision: str) -> nn.Module:
    """Return the network of a row in evaluation mode. Raises InputError if its package is missing."""
    name, _, width = title.partition(", width ")
    if name in GLNET:
        return GLNet(N_CLASS, backbone, pyramid_width=int(width or WIDTH)).eval()
    network = build_network(TITLES[name], backbone, N_CLASS) if name in TITLES else DeepLabV3(backbone)
    return Cast(network, PRECISIONS[precision]).eval()


def prepare(title: str, network: nn.Module, settings: Settings) -> Work:
    """Return what segments an image with the network of a row."""
    if isinstance(network, GLNet):
        return Inference(network, GLNET[title.partition(", width ")[0]], settings)
    predictor = PatchPredictor(network, settings)

    def segment(sample: Sample) -> ArgmaxSink:
        source = MemorySource(required(sample.image, "image"))
        sink = ArgmaxSink(source.size, settings.device)
        predictor.segment(source, {"global": sink})
        return sink

    return segment


def count(name: str, options: argparse.Namespace, precision: str) -> tuple[float, float]:
    """Return the GMAC and the peak MB of segmenting an image, counted on fake tensors."""
    with torch.device("meta"):
        network = build(name, options.backbone, precision)
    settings = Settings(size_p=options.size, sub_batch_size=options.sub_batch_size, precision=precision)
    with fake_accelerator() as memory:
        with host_tensors(memory):
            allocate(network)
            sample = random_sample(options.side, options.size)
        if not isinstance(network, GLNet):  # GLNet is copied to the device when it is prepared
            put_on_device(memory, [network])
        work = prepare(name, network, settings)
        del network
        with FlopCounterMode(display=False) as operations:
            work(sample)
        gc.collect()
        memory.peak = dict(memory.live)
        work(sample)  # apart, because the counter of operations keeps tensors alive
    return operations.get_total_flops() / 2e9, megabytes(memory)["device"]


def measure(name: str, options: argparse.Namespace, precision: str, sample: Sample) -> tuple[float, float]:
    """Return the seconds of one image, and the peak MB of CUDA's allocator, 0 on a CPU."""
    device = torch.device(options.device)
    settings = Settings(size_p=options.size, sub_batch_size=options.sub_batch_size, precision=precision, device=device)
    torch.manual_seed(0)
    network = build(name, options.backbone, precision)
    if not isinstance(network, GLNet):
        network.to(device)
        network.to(memory_format=torch.channels_last)
    work = prepare(name, network, settings)
    del network
    work(sample if device.type == "cuda" else random_sample(options.size, options.size))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    taken = elapsed(lambda: work(sample), device)
    return taken, torch.cuda.max_memory_allocated(device) / MB if device.type == "cuda" else 0.0


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Count and measure every network, printing each figure, and return the rows of the table."""
    networks = titles(options.networks, options.widths)
    rows: dict[str, dict[str, Any]] = {name: {"network": name} for name in networks}
    sample = random_sample(options.side, options.size)
    for precision in options.precisions:
        for name in networks:
            gmac, megabyte = count(name, options, precision)
            rows[name].update({"gmac": gmac, precision: {"mb": megabyte, "seconds": []}})
            print(f"{name}, {precision}: {gmac:.0f} GMAC, {megabyte:.0f} MB", flush=True)
    for turn in range(options.rounds):
        for precision in options.precisions:
            for name in networks:
                taken, megabyte = measure(name, options, precision, sample)
                found: dict[str, Any] = rows[name][precision]
                found["seconds"].append(taken)
                if megabyte:
                    found["mb"] = max(found["mb"] if turn else 0.0, megabyte)
                print(f"round {turn + 1}, {name}, {precision}: {taken:.2f} s", flush=True)
    return list(rows.values())


def as_markdown(rows: Sequence[dict[str, Any]], precisions: Sequence[str]) -> str:
    """Return the table: for each precision seconds and the part of U-Net's, if they were taken, and MB."""
    timed = bool(rows[0][precisions[0]]["seconds"])
    heads = ["network", "GMAC"]
    for precision in precisions:
        heads += [*([f"{precision}, s", f"of {REFERENCE}"] if timed else []), "MB" if timed else f"{precision}, MB"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    reference = next((row for row in rows if row["network"] == REFERENCE), None)
    for row in rows:
        cells = [row["network"], f"{row['gmac']:.0f}"]
        for precision in precisions:
            if timed:
                best = min(row[precision]["seconds"])
                part = "" if reference is None else f"{best / min(reference[precision]['seconds']):.2f}"
                cells += [f"{best:.2f}", part]
            cells.append(f"{row[precision]['mb']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def run(options: argparse.Namespace) -> None:
    """Compare the networks and write the results."""
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    keep_freed_memory()
    rows = compare(options)
    patches = len(PatchGrid.cover((options.side, options.side), options.size))
    device = device_name(torch.device(options.device))
    table = as_markdown(rows, options.precisions)
    head = (
        f"`{command_of('peers')}`, {now()}, commit {git_commit()}, {device}: "
        f"{options.side} x {options.side} pixels, {patches} patches of {options.size}, {options.backbone}."
    )
    record = {"command": command_of("peers"), "date": now(), "commit": git_commit(), "device": device, "rows": rows}
    write_results(options.output / f"{options.name}.json", record, f"{head}\n\n{table}")
    print(f"\n{table}")


def build_parser() -> Parser:
    """Return the command line."""
    parser = Parser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.group("options")
    add("--networks", nargs="+", choices=PEERS, default=PEERS, metavar="NAME", help="(default: all)")
    add("--precisions", nargs="+", choices=COUNTED_PRECISIONS, default=COUNTED_PRECISIONS, help="(default: both)")
    add("--widths", type=whole(2), nargs="+", default=[WIDTH], metavar="N", help="of GLNet's pyramids (default: 256)")
    rounds = "in each of which every network runs once; 0: count only (default: %(default)s)"
    add("--rounds", type=whole(0), default=2, help=rounds)
    add("--side", type=whole(64), default=2448, help="of the image, in pixels (default: %(default)s)")
    add("--size", type=whole(64), default=508, help="size_g and size_p, in pixels (default: %(default)s)")
    add("--sub_batch_size", type=whole(1), default=6, help="patches at a time (default: %(default)s)")
    add("--backbone", type=backbone_name, default="resnet50", help="as of train_deep_globe.py (default: %(default)s)")
    add("--name", default="peers", help="of the results' files (default: %(default)s)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help="that seconds are taken on (default: %(default)s)")
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="for the results (default: benchmarks/results)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
