"""Checkpoint files: this project's format, and the released format in both directions.

    python -m models.checkpoint export FILE OUTPUT

writes a file of this project as the released file of its stage, so that the released code can load it.

A file of this project holds a header, and of GLNet what its stage uses; older ones hold all of it. A released file is a
plain state dict of all of GLNet that does not record its stage: functions that need the stage take it as an argument.
In released files of stages 1 and 2 `resnet_global` and the classifier of `fpn_global` are the global branch's, in files
of stage 3 the refined branch's.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.bands import fit_kernels
from models.fpn import WIDTH
from models.glnet import GLNet
from models.header import Header
from models.tensors import children_of, load, only_tensors, state_of
from models.timm_backbone import PREFIX
from utils.errors import InputError, exit_code
from utils.files import check_version, load_torch, replacing, save_torch, unreadable_record
from utils.stages import STAGES
from utils.stretch import RGB

FORMAT, VERSION = "glnet", 1
"""Recorded in every file of this project."""

PLAIN = [  # (ours, released) within one pyramid, in the released order
    ("lateral.0", "toplayer"),
    *((f"lateral.{k}", f"latlayer{k}") for k in (1, 2, 3)),
    *((f"smooth1.{k}", f"smooth{k + 1}_1") for k in range(4)),
    *((f"smooth2.{k}", f"smooth{k + 1}_2") for k in range(4)),
]
"""The layers of a pyramid, each with the name that it has in released files."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file in memory, tensors by their names without `module.`; a released file has no header."""

    path: Path
    header: Header | None
    tensors: dict[str, Tensor]

    @property
    def n_bands(self) -> int:
        """The number of bands that the network reads; released ones read RGB."""
        return RGB if self.header is None else self.header.n_bands

    def tensors_of(self, stage: int) -> dict[str, Tensor]:
        """Return the tensors by this project's names; a released file is taken to be of `stage`.

        In the result of a released file of stage 1 or 2 the refined branch's backbone and head are copies of the global
        branch's, as when stage 3 starts. A released file of stage 3 lacks the global branch's backbone and head, and so
        does the result. Raises InputError if a file of this project was made by another stage, or a released one holds
        unknown tensors.
        """
        if self.header is not None:
            if self.header.stage != stage:
                made, wanted = STAGES[self.header.stage], STAGES[stage]
                raise InputError(
                    f"{self.path} was made by stage {made.number} ({made.name}) and cannot serve as stage "
                    f"{wanted.number}'s ({wanted.name}): give it as --{made.reads}, or the file of stage {stage} here"
                )
            return self.tensors
        ours: dict[str, Tensor] = {}
        names = {released: own for own, released in released_modules(stage).items()}
        for name, tensor in self.tensors.items():
            module = next((released for released in names if name.startswith(released + ".")), None)
            if module is None:
                raise InputError(f"{self.path}: unexpected tensor {name}; a released GLNet file has no such name")
            ours[names[module] + name[len(module) :]] = tensor
        if stage < 3:
            for part in ("backbone.", "head."):
                copies = {k: v for k, v in ours.items() if k.startswith("global_." + part)}
                ours.update({k.replace("global_", "refined", 1): v for k, v in copies.items()})
        return ours


def released_modules(stage: int) -> dict[str, str]:
    """Return this project's module paths with the released ones of a file of `stage`, in the released order."""
    current = "refined" if stage == 3 else "global_"
    return {
        f"{current}.backbone": "resnet_global",
        "local.backbone": "resnet_local",
        **{f"global_.pyramid.{o}": f"fpn_global.{r}" for o, r in PLAIN},
        f"{current}.head": "fpn_global.classify",
        **{f"refined.pyramid.{o}": f"fpn_global.{r}_ext" for o, r in PLAIN},
        "refined.pyramid.smooth": "fpn_global.smooth",
        **{f"local.pyramid.{o}": f"fpn_local.{r}" for o, r in PLAIN},
        "local.pyramid.smooth": "fpn_local.smooth",
        "local.head": "fpn_local.classify",
        "ensemble": "ensemble_conv",
    }


def save(path: Path, model: GLNet, header: Header, children: Iterable[str] | None = None) -> None:
    """Write a checkpoint; an existing file is replaced only when the new one is complete.

    By default the `children` of the network that the stage uses are written. Raises InputError if the file cannot be
    written.
    """
    tensors = state_of(model, STAGES[header.stage].uses if children is None else children)
    save_torch(path, {"format": FORMAT, "version": VERSION, "header": header.to_record(), "model": tensors})


def keep_previous(path: Path) -> None:
    """Keep the file at `path`, if there is one, as `.previous.pth`, too, before a new run replaces it."""
    if path.exists():
        with replacing(path.with_suffix(".previous.pth")) as beside:
            try:
                os.link(path, beside)
            except OSError:  # not every file system has links
                shutil.copyfile(path, beside)


def read(path: str | Path) -> Checkpoint:
    """Read a file of this project or a released one. No code in the file is executed.

    Raises InputError if the file is missing, damaged, or no such file.
    """
    path = Path(path)
    content = load_torch(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        check_version(path, content, VERSION)
        try:
            header, tensors = Header.from_record(content["header"]), dict(content["model"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise unreadable_record(path, error, f": its header or model is not as it was written ({error})") from error
        return Checkpoint(path, header, only_tensors(path, tensors))
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds a {type(content).__name__}, not a GLNet state dict")
    tensors = {str(name).removeprefix("module."): value for name, value in content.items()}
    roots = {"resnet_global", "resnet_local", "fpn_global", "fpn_local", "ensemble_conv"}
    if not roots & children_of(tensors):
        raise InputError(f"{path} is no GLNet checkpoint: its first entry is {next(iter(tensors))}")
    return Checkpoint(path, None, only_tensors(path, tensors))


def read_context(file: Checkpoint, stage: int, path_g: Path | None) -> Checkpoint | None:
    """Read stage 1's file if an evaluation needs it, beside a released file of stage 3; else return None.

    Raises InputError if `path_g` is needed and not given, or cannot be read.
    """
    if stage < 3 or file.header is not None:
        return None
    if path_g is None:
        raise InputError(
            f"{file.path} is a released file, which lacks the frozen global branch: mode 3 needs --path_g, the file of "
            "mode 1, too"
        )
    return read(path_g)


def load_whole(model: GLNet, checkpoint: Checkpoint, stage: int) -> None:
    """Load all tensors of a file of `stage`; what it lacks keeps its weights.

    A file of this project may lack children that the stage does not use, and a released file of stage 3 lacks the
    global branch's backbone and head. Raises InputError if the file lacks anything else or does not fit the network.
    """
    tensors = checkpoint.tensors_of(stage)
    if checkpoint.header is not None:
        parts = [f"{child}." for child in {*STAGES[stage].uses} | children_of(tensors)]
    else:
        parts = ["global_.pyramid.", "local.", "refined.", "ensemble."]
        parts += ["global_.backbone.", "global_.head."] if stage < 3 else []
    load(model, tensors, checkpoint.path, parts)


def load_context(model: GLNet, checkpoint: Checkpoint) -> None:
    """Load the global branch alone from a file of stage 1. Raises InputError if it does not fit."""
    load(model, checkpoint.tensors_of(1), checkpoint.path, ["global_."])


def load_but_classes(model: GLNet, checkpoint: Checkpoint) -> None:
    """Load backbones and pyramids, which fit any classes, of the branches that a file holds; all else stays.

    A released file is taken to be of stage 1 or 2. From one of stage 3 the global branch gets the refined branch's
    backbone. Kernels of three bands are widened to those of the network. Raises InputError if the file does not fit it.
    """
    tensors = checkpoint.tensors_of(checkpoint.header.stage if checkpoint.header is not None else 1)
    if checkpoint.n_bands not in (RGB, model.n_bands):
        raise InputError(
            f"{checkpoint.path} was made with {checkpoint.n_bands} bands, which cannot start a network of "
            f"{model.n_bands}: give as many --bands, or a file of {RGB}"
        )
    branches = {"global_"} | ({"local", "refined"} & children_of(tensors))
    for name in branches:
        tensors = fit_kernels(getattr(model, name).backbone, tensors, f"{name}.backbone.")
    parts = [f"{branch}.{part}." for branch in branches for part in ("backbone", "pyramid")]
    load(model, tensors, checkpoint.path, parts)


def check_context(model: GLNet, context: Checkpoint, start: Path) -> None:
    """Raise InputError unless stage 1's file holds the global branch that `model` has from stage 2's file `start`."""
    tensors = context.tensors_of(1)
    for name, tensor in model.global_.state_dict().items():
        if not torch.equal(tensor, tensors.get(f"global_.{name}", tensor)):
            raise InputError(
                f"--path_g {context.path} holds another global branch than {start}, which was trained on top of one: "
                "give the file of mode 1 that it started from, or leave --path_g out"
            )


def to_released(tensors: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
    """Return a file's tensors by the released names, with `module.`, in the released order, without unknown ones."""
    return {
        f"module.{released}{name[len(ours) :]}": tensor
        for ours, released in released_modules(stage).items()
        for name, tensor in tensors.items()
        if name.startswith(ours + ".")
    }


def export(source: Path, target: Path) -> str:
    """Write a file of this project as the released file of its stage; return a line that reports it.

    Released files hold all of GLNet. What the file lacks, because its stage does not use it, gets initial weights.
    Raises InputError if a file cannot be read or written, or `source` is no file of this project that the released code
    could have made.
    """
    file = read(source)
    header, tensors = file.header, file.tensors
    if header is None:
        raise InputError(f"{source} is a released file already")
    if file.n_bands != RGB:
        raise InputError(f"{source} was made with {file.n_bands} bands; released files are of {RGB}")
    if header.backbone.startswith(PREFIX):
        raise InputError(f"{source} was made with {header.backbone}; the released code has ResNets only")
    if (header.pyramid_width, header.pyramid_norm) != (WIDTH, "none"):
        raise InputError(
            f"{source} was made with --pyramid_width {header.pyramid_width} --pyramid_norm {header.pyramid_norm}; the "
            f"released code has {WIDTH} and none only"
        )
    if not children_of(tensors) >= {*STAGES[3].uses}:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            tensors = {**GLNet(len(header.classes), header.backbone).state_dict(), **tensors}
    save_torch(target, to_released(tensors, header.stage))
    return f"{target}: the released file of mode {header.stage}"


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m models.checkpoint", description="Convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a file of this project as the released file of its stage")
    command.add_argument("file", type=Path, help="a checkpoint that train_deep_globe.py wrote")
    command.add_argument("output", type=Path, help="the released-format file to write")
    arguments = parser.parse_args()
    return exit_code(lambda: print(export(arguments.file, arguments.output)))


if __name__ == "__main__":
    sys.exit(main())
