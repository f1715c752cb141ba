"""Export of a trained network for other runtimes: its parts as ONNX files, or as programs of `torch.export`.

    python -m prediction.export CHECKPOINT DIR

Each file is run after it is written, and compared with the network.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from models.backbone import side_multiple
from models.glnet import GLNet
from models.header import Header
from models.parts import MAPS, OTHER_MAPS, Part, named_maps, parts_of
from models.sharing import crop_global, crop_pyramid, merge_local_maps
from prediction.packages import require_packages
from prediction.segmenter import load_network
from utils.errors import InputError, RunError, exit_code, required
from utils.files import new_folder, write_json
from utils.settings import LEAST_SHRUNK, MOST_SHRUNK, STATISTICS
from utils.tiling import PatchGrid

OPSET = 18
"""The version of ONNX's operators in the files."""

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
"""What writing and running ONNX files needs."""

TOLERANCE = 1e-4
"""The largest difference between a file's outputs and the network's, as a part of the range of the output."""

SMALLEST_PROGRAM_SIDE = 33
"""The shortest side, in pixels, of images of a program: torch takes maps with a side of one cell for another case."""

ODD_SIZES = 75, 45
"""Sides of a shrunk image and of patches at which files are compared, too: no encoder's cells fit them."""


def export(checkpoint: Path, folder: Path, mode: int | None, path_g: Path | None, kind: str) -> None:
    """Write the parts of a network and `glnet.json`, which describes them, and print how far each file is off.

    `folder` appears when all files are written and compared; `kind` is `onnx` or `pt2`; see `load_network` for the
    others. Raises InputError if a file cannot be read or written, a package is missing, or the branches do not share
    maps, and RunError if a file does not compute what the network does.
    """
    if kind == "onnx":
        require_packages("--format onnx", PACKAGES)
    model, header = load_network(checkpoint, path_g, mode, {})
    if header.stage > 1 and header.share == "none":
        raise InputError(f"{checkpoint} was trained with --share none, which the parts cannot express; use --mode 1")
    if kind == "pt2" and min(header.size_g, header.size_p) < SMALLEST_PROGRAM_SIDE:
        raise InputError(f"--format pt2 needs sides of at least {SMALLEST_PROGRAM_SIDE} pixels; use --format onnx")
    parts = parts_of(model, header.stage)
    with torch.no_grad(), new_folder(folder) as beside:
        odd = replace(header, size_g=ODD_SIZES[0], size_p=ODD_SIZES[1], min_overlap=ODD_SIZES[1] // 4)
        expected = [expected_tensors(model, one) for one in (header, odd)]
        for part, program in zip(parts, trace(parts, header.n_bands), strict=True):
            path = beside / f"{part.name}.{kind}"
            write_onnx(program, part, path) if kind == "onnx" else torch.export.save(program, path)
            difference = max(compare(path, part, tensors[part.name]) for tensors in expected)
            print(f"{path.name}: differs from the network by at most {difference:.1e} of an output's range")
        write_json(beside / "glnet.json", describe(parts, header, kind))
    print(f"{folder}: mode {header.stage}, {len(parts)} parts")


def trace(parts: Iterable[Part], n_bands: int) -> list[ExportedProgram]:
    """Return the graph of each part for images of `n_bands` bands; number and sizes of images and maps stay open."""
    found = {"image": torch.zeros(2, n_bands, 72, 104)}  # sides differ, so that neither is taken for the other
    programs = []
    for part in parts:
        inputs = tuple(found[name] for name in part.inputs)
        shape = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
        programs.append(torch.export.export(part, inputs, dynamic_shapes=((shape,) * len(inputs),)))
        outputs = dict(zip(part.outputs, part(*inputs), strict=True))
        found |= outputs | {f"other_{name}": x for name, x in outputs.items()}
    return programs


def write_onnx(program: ExportedProgram, part: Part, path: Path) -> None:
    """Write a part as one ONNX file, with its tensors' names and without traces of the files that made it.

    Raises OSError if it cannot be written.
    """
    import onnx

    exported = torch.onnx.export(
        program, input_names=part.inputs, output_names=part.outputs, opset_version=OPSET, verbose=False
    )
    proto = required(exported, "ONNX program").model_proto
    for one in (proto.graph, *proto.graph.node):
        del one.metadata_props[:]
    del proto.graph.value_info[:]  # sizes within the graph, in terms of names that are replaced here
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, name in ((0, "batch"), (2, f"{value.name}_height"), (3, f"{value.name}_width")):
            value.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.save(proto, path)


def compare(path: Path, part: Part, tensors: dict[str, Tensor]) -> float:
    """Return how far the outputs of a part's file are off at most, as a part of the range of each.

    `tensors` are inputs and outputs as the network computes them. Raises RunError beyond `TOLERANCE`.
    """
    inputs = [tensors[name].contiguous() for name in part.inputs]
    worst = 0.0
    for name, found in zip(part.outputs, run_file(path, part, inputs), strict=True):
        expected = tensors[name]
        span = (expected.max() - expected.min()).clamp(min=torch.finfo().tiny)  # 0 of a map that is constant
        difference = ((found - expected).abs().max() / span).item()
        if not difference <= TOLERANCE:  # one that is not a number, too
            raise RunError(f"{path.name}: {name} differs from the network by {difference:.1e} of its range")
        worst = max(worst, difference)
    return worst


def run_file(path: Path, part: Part, inputs: list[Tensor]) -> Iterable[Tensor]:
    """Return the outputs of a part, computed from its file."""
    if path.suffix == ".pt2":
        outputs: Iterable[Tensor] = torch.export.load(path).module()(*inputs)
        return outputs
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {name: x.numpy() for name, x in zip(part.inputs, inputs, strict=True)}
    return map(torch.from_numpy, session.run(part.outputs, feed))


def expected_tensors(model: GLNet, header: Header) -> dict[str, dict[str, Tensor]]:
    """Compute the inputs and outputs of each part by the network itself, for a random picture of two patches.

    The stage of `header` is the mode. Returns (N, C, h, w) each, by part, then by name.
    """
    generator = torch.Generator().manual_seed(0)
    side, overlap = header.size_p, header.min_overlap
    grid = PatchGrid.cover((side, 2 * side - overlap), side, overlap)
    everything = slice(0, len(grid))
    image = torch.rand(1, header.n_bands, header.size_g, header.size_g, generator=generator)
    patches = torch.rand(len(grid), header.n_bands, side, side, generator=generator)

    logits, maps = model.global_(image)
    found = {"global": {"image": image, "logits": logits, "ps3": maps.ps3, **named_maps(MAPS, maps)}}
    if header.stage == 1:
        return found
    context = crop_pyramid(maps, grid, everything)
    logits, local = model.local(patches, context)
    half = model.ensemble.local_half(local.ps3)
    found["local"] = {"image": patches, **named_maps(OTHER_MAPS, context)}
    found["local"] |= {"logits": logits, "half": half, **named_maps(MAPS, local)}
    if header.stage == 3:
        merged = merge_local_maps(local, grid, frame=maps)
        logits, maps = model.refined(image, merged)
        found["refined"] = {"image": image, **named_maps(OTHER_MAPS, merged), "logits": logits, "ps3": maps.ps3}
    crop = crop_global(maps.ps3, grid, everything)
    found["ensemble"] = {"half": half, "ps3": crop, "logits": model.ensemble(local.ps3, crop)}
    return found


def describe(parts: Iterable[Part], header: Header, kind: str) -> dict[str, Any]:
    """Return the record that `glnet.json` holds."""
    statistics = header.normalization() or STATISTICS["none"]
    # a single value is that of all bands
    mean, std = (values * (header.n_bands // len(values)) for values in (statistics.mean, statistics.std))
    same = ("backbone", "size_g", "context", "scale", "size_p", "min_overlap", "bands", "stretch")
    return {
        "mode": header.stage,
        **{name: getattr(header, name) for name in same},
        "side_multiple": side_multiple(header.backbone),
        "largest_side": MOST_SHRUNK,
        "least_side": LEAST_SHRUNK,
        "mean": mean,
        "std": std,
        "coarse_to_fine": header.coarse_to_fine and header.stage > 1,
        "classes": header.classes.names,
        "palette": header.classes.palette,
        "opset": OPSET if kind == "onnx" else None,
        "maps": MAPS,
        "parts": {
            part.name: {"file": f"{part.name}.{kind}", "inputs": part.inputs, "outputs": part.outputs} for part in parts
        },
    }


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m prediction.export", description="Export a trained network for other runtimes."
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="trained network, of this project or released")
    add("folder", type=Path, help="new folder for the files of the network's parts and glnet.json")
    mode = "mode of prediction (default: the checkpoint's stage; a released file needs it)"
    add("--mode", type=int, choices=(1, 2, 3), help=mode)
    add("--path_g", type=Path, metavar="FILE", help="stage 1's file, which a released file of mode 3 needs beside it")
    kinds = ("onnx", "pt2")
    add("--format", choices=kinds, default="onnx", help="ONNX, or programs of torch.export (default: %(default)s)")
    given = parser.parse_args()
    try:
        return exit_code(lambda: export(given.checkpoint, given.folder, given.mode, given.path_g, given.format))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
