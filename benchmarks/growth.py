"""Shows how the cost of inference grows with the image: python -m benchmarks.growth --help

Square images of random pixels are segmented as a whole (no scenes), for all predictions of the mode. Seconds are
of one image, decoded already, in a process of its own, after a small one that warms up; "process" is the largest
resident size of that process, interpreter and libraries included. "Device" and "host" are the peak bytes of live
tensors on a fake accelerator (see fake_accelerator.py), image and label included. MB are 2^20 bytes.

The figures go to growth.json, growth.md and growth.png.
"""

import argparse
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import draw_growth
from benchmarks.memory import COUNTED_PRECISIONS, count_inference
from benchmarks.records import RESULTS, command_of, write_results
from benchmarks.speed import elapsed
from benchmarks.workload import MODES, N_CLASS, Inference, random_sample
from models.backbone import BACKBONES
from models.glnet import GLNet
from utils.errors import exit_code
from utils.memory import keep_freed_memory, peak_memory_mb
from utils.run_record import device_name, git_commit, now
from utils.settings import Settings
from utils.tiling import PatchGrid

COLUMNS = {
    "side": "side, pixels",
    "patches": "patches",
    "seconds": "seconds",
    "seconds_per_megapixel": "seconds a megapixel",
    "device_mb": "device, MB",
    "host_mb": "host, MB",
    "process_mb": "process, MB",
}


def time_image(side: int, mode: int, backbone: str, size: int, settings: Settings) -> tuple[float, float]:
    """Return the seconds of segmenting an image of side x side, and the peak resident MB of this process."""
    keep_freed_memory()
    torch.manual_seed(0)
    work = Inference(GLNet(N_CLASS, backbone).eval(), mode, settings)
    work(random_sample(size, size))
    sample = random_sample(side, size)
    return elapsed(partial(work, sample), settings.device), peak_memory_mb(torch.device("cpu"))


def measure(side: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of an image of side x side, by the names of `COLUMNS`."""
    settings = Settings(
        size_p=options.size,
        sub_batch_size=options.sub_batch_size,
        precision=options.precision,
        device=torch.device(options.device),
    )
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        found = process.submit(time_image, side, options.mode, options.backbone, options.size, settings).result()
    count = count_inference(
        options.sub_batch_size,
        options.precision,
        options.mode,
        side=side,
        size=options.size,
        backbone=options.backbone,
    )
    return {
        "side": side,
        "patches": len(PatchGrid.cover((side, side), options.size).boxes()),
        "seconds": found[0],
        "seconds_per_megapixel": found[0] / (side**2 / 1e6),
        "device_mb": count["device"],
        "host_mb": count["host"],
        "process_mb": found[1],
    }


def table_row(row: dict[str, float]) -> str:
    """Return figures as a row of a Markdown table."""
    return f"| {' | '.join(f'{row[name]:.4g}' if row[name] < 1000 else f'{row[name]:.0f}' for name in COLUMNS)} |"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sides",
        type=int,
        nargs="+",
        default=[1000, 2000, 4000, 8000],
        help="of images, in pixels (default: %(default)s)",
    )
    parser.add_argument("--mode", type=int, choices=MODES, default=3, help="default: %(default)s")
    parser.add_argument("--backbone", choices=tuple(BACKBONES), help="default: resnet50; with --quick resnet18")
    parser.add_argument("--size", type=int, default=508, help="size_g and size_p, pixels (default: %(default)s)")
    parser.add_argument("--sub_batch_size", type=int, default=6, help="patches at a time (default: %(default)s)")
    parser.add_argument("--precision", choices=COUNTED_PRECISIONS, help="default: fp32; with --quick bf16")
    parser.add_argument("--quick", action="store_true", help="a smaller network in bf16: about a third of the time")
    parser.add_argument("--device", default="cpu", help="that seconds are taken on (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="for the figures (default: benchmarks/results)",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Measure every side and write the figures."""
    options.backbone = options.backbone or ("resnet18" if options.quick else "resnet50")
    options.precision = options.precision or ("bf16" if options.quick else "fp32")
    options.sides = sorted(set(options.sides))
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    lines = [f"| {' | '.join(COLUMNS.values())} |", f"|{'---|' * len(COLUMNS)}"]
    print("\n".join(lines), flush=True)
    rows = []
    for side in options.sides:
        rows.append(measure(side, options))
        lines.append(table_row(rows[-1]))
        print(lines[-1], flush=True)
    about: dict[str, Any] = {
        "command": command_of("growth"),
        "date": now(),
        "commit": git_commit(),
        "device": device_name(torch.device(options.device)),
        **{name: getattr(options, name) for name in ("mode", "backbone", "size", "sub_batch_size", "precision")},
    }
    record = {**about, "rows": rows}
    head = [
        "# How the cost of inference grows with the image",
        "",
        f"Made by `{about['command']}` on {about['date']}, commit {about['commit']}, on {about['device']}: mode "
        f"{options.mode}, {options.backbone}, size_g and size_p {options.size}, sub-batch {options.sub_batch_size}, "
        f"{options.precision}.",
        " ".join(__doc__.split("\n\n")[1].split()),
        "",
    ]
    page = "\n".join([*head, *lines, "", "![Seconds and memory over the image's side](growth.png)", ""])
    write_results(options.output / "growth.json", record, page)
    draw_growth(options.output / "growth.png", record)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(build_parser().parse_args())))
