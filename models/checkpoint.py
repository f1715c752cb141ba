"""Checkpoint files: our format, and the released one in both directions.

    python -m models.checkpoint export FILE OUTPUT

writes one of our files as the released file of its stage, so that the released code can load it.

Our files hold the whole GLNet as it stands after their stage and a header that says what it is. Released files are
plain state dicts whose names say nothing of the stage, so the reader is told it. `resnet_global` and the classifier
of `fpn_global` mean the global branch in files of stages 1 and 2, and the refined branch in files of stage 3.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.glnet import GLNet
from models.header import Header
from utils.errors import InputError, exit_code
from utils.files import load_torch, replacing, save_torch
from utils.stages import STAGES

FORMAT, VERSION = "glnet", 1

PLAIN = [  # (ours, released) within one pyramid, in the released order
    ("lateral.0", "toplayer"),
    *((f"lateral.{k}", f"latlayer{k}") for k in (1, 2, 3)),
    *((f"smooth1.{k}", f"smooth{k + 1}_1") for k in range(4)),
    *((f"smooth2.{k}", f"smooth{k + 1}_2") for k in range(4)),
]
RELEASED_ROOTS = ("resnet_global", "resnet_local", "fpn_global", "fpn_local", "ensemble_conv")


@dataclass(frozen=True)
class Checkpoint:
    """A file that was read: `header` is None for a released file; `tensors` by the file's names, without `module.`."""

    path: Path
    header: Header | None
    tensors: dict[str, Tensor]

    def tensors_of(self, stage: int) -> dict[str, Tensor]:
        """The tensors by our names, the file being one of `stage`.

        Of a released file of stage 1 or 2 the refined branch's backbone and head are its global branch's, as they are
        when stage 3 starts; of stage 3 the global branch's backbone and head are not in the file and not in the result.
        Raises InputError when a file of ours is of another stage.
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
        names = released_modules(stage)
        for name, tensor in self.tensors.items():
            module = next((r for r in names.values() if name.startswith(r + ".")), None)
            if module is None:
                raise InputError(f"{self.path}: unexpected tensor {name}; a released GLNet file has no such name")
            ours[next(o for o, r in names.items() if r == module) + name[len(module) :]] = tensor
        if stage < 3:
            for part in ("backbone.", "head."):
                copies = {k: v for k, v in ours.items() if k.startswith("global_." + part)}
                ours.update({k.replace("global_", "refined", 1): v for k, v in copies.items()})
        return ours


def released_modules(stage: int) -> dict[str, str]:
    """Our module path -> the released one, in the released order, in a file of `stage`."""
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


def save(path: Path, model: GLNet, header: Header) -> None:
    """Write `model` as it stands after `header.stage`; beside and renamed."""
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    save_torch(path, {"format": FORMAT, "version": VERSION, "header": header.to_record(), "model": tensors})


def keep_previous(path: Path) -> None:
    """Keep what stands at `path`, if anything, as `.previous.pth` too, for a new run will replace it.

    It stays at `path` until then: at no time is there neither the old file nor a new one.
    """
    if path.exists():
        with replacing(path.with_suffix(".previous.pth")) as beside:
            try:
                os.link(path, beside)
            except OSError:  # not every file system has links
                shutil.copyfile(path, beside)


def read(path: str | Path) -> Checkpoint:
    """Read a file of ours or a released one. No code in the file is executed.

    Raises InputError when it is missing, damaged, or neither.
    """
    path = Path(path)
    content = load_torch(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if content.get("version") != VERSION:
            raise InputError(f"{path} has format version {content.get('version')}; this code reads {VERSION}")
        try:
            header, tensors = Header.from_record(content["header"]), dict(content["model"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged: its header or model is not as it was written ({error})") from error
        return Checkpoint(path, header, only_tensors(path, tensors))
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds a {type(content).__name__}, not a GLNet state dict")
    tensors = {str(name).removeprefix("module."): value for name, value in content.items()}
    if not any(name.split(".")[0] in RELEASED_ROOTS for name in tensors):
        raise InputError(f"{path} is no GLNet checkpoint: its first entry is {next(iter(tensors))}")
    return Checkpoint(path, None, only_tensors(path, tensors))


def read_context(file: Checkpoint, stage: int, path_g: Path | None) -> Checkpoint | None:
    """Stage 1's file `path_g`, where `stage` cannot be evaluated by `file` alone: a released one of stage 3.

    A file of ours holds its own context; for it, and in other stages, there is none to read. Raises InputError where
    `path_g` is needed and not given.
    """
    if stage < 3 or file.header is not None:
        return None
    if path_g is None:
        raise InputError(
            f"{file.path} is a released file, which lacks the frozen global branch: mode 3 needs --path_g, the file of "
            "mode 1, too"
        )
    return read(path_g)


def only_tensors(path: Path, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """`tensors`; InputError, naming `path`, where a name is none, or a value something else than dense numbers."""
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise InputError(f"{path}: {name!r} names no tensor")
        if not isinstance(value, Tensor):
            raise InputError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise InputError(f"{path}: {name} is no plain tensor ({value.dtype}, {value.layout})")
    return tensors


def load(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, parts: Iterable[str]) -> None:
    """Copy the tensors whose names start with one of `parts` (as `local.`) into `model`, strictly.

    Raises InputError that names a missing, unexpected or misshaped tensor. A missing `num_batches_tracked` (files
    of torch 0.4) is read as 0.
    """
    parts = tuple(parts)
    state = model.state_dict()
    expected = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    given = {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}
    unexpected = sorted(set(tensors) - set(state))
    missing = sorted(n for n in set(expected) - set(given) if not n.endswith("num_batches_tracked"))
    for kind, names in (("misses", missing), ("has the unexpected", unexpected)):
        if names:
            raise InputError(f"{path} {kind} {_count(names)}; was it made with another --backbone?")
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{path}: {name} is {tuple(tensor.shape)} where {tuple(expected[name].shape)} is expected; "
                "was it made with another --n_class or --backbone?"
            )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(given[name]) if name in given else tensor.zero_()


def _count(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"


def load_whole(model: GLNet, checkpoint: Checkpoint, stage: int) -> None:
    """Load everything that a file of `stage` holds: of a released stage-3 file that is not the context's backbone."""
    parts = ["global_.pyramid.", "local.", "refined.", "ensemble."]
    if checkpoint.header is not None or stage < 3:
        parts += ["global_.backbone.", "global_.head."]
    load(model, checkpoint.tensors_of(stage), checkpoint.path, parts)


def load_context(model: GLNet, checkpoint: Checkpoint) -> None:
    """Load the global branch, and nothing else, from a file of stage 1."""
    load(model, checkpoint.tensors_of(1), checkpoint.path, ["global_."])


def load_but_classes(model: GLNet, checkpoint: Checkpoint) -> None:
    """Load all that serves any classes, backbones and pyramids; heads and ensemble stay as they are.

    A released file, which does not say its stage, is read as one of stage 1 or 2: in that of stage 3 the global
    branch's backbone is then the refined branch's.
    """
    tensors = checkpoint.tensors_of(checkpoint.header.stage if checkpoint.header is not None else 1)
    parts = [f"{branch}.{part}." for branch in ("global_", "local", "refined") for part in ("backbone", "pyramid")]
    load(model, tensors, checkpoint.path, parts)


def check_context(model: GLNet, context: Checkpoint, start: Path) -> None:
    """Raise InputError where the global branch of `context`, stage 1's file, is not that in `model`, read of `start`.

    Stage 2 leaves that branch as it is: another one is of another training.
    """
    tensors = context.tensors_of(1)
    for name, tensor in model.global_.state_dict().items():
        if not torch.equal(tensor, tensors.get(f"global_.{name}", tensor)):
            raise InputError(
                f"--path_g {context.path} holds another global branch than {start}, which was trained on top of one: "
                "give the file of mode 1 that it started from, or leave --path_g out"
            )


def to_released(tensors: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
    """The tensors of one of our files under the released names, `module.` included, in the released order."""
    return {
        f"module.{released}{name[len(ours) :]}": tensor
        for ours, released in released_modules(stage).items()
        for name, tensor in tensors.items()
        if name.startswith(ours + ".")
    }


def export(source: Path, target: Path) -> str:
    """Write our file `source` as the released file of its stage to `target`; returns a line that says so."""
    checkpoint = read(source)
    if checkpoint.header is None:
        raise InputError(f"{source} is a released file already")
    stage = checkpoint.header.stage
    save_torch(target, to_released(checkpoint.tensors, stage))
    return f"{target}: the released file of mode {stage}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m models.checkpoint", description="Convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write one of our files as the released file of its stage")
    command.add_argument("file", type=Path, help="a checkpoint that train_deep_globe.py wrote")
    command.add_argument("output", type=Path, help="the released-format file to write")
    arguments = parser.parse_args()
    return exit_code(lambda: print(export(arguments.file, arguments.output)))


if __name__ == "__main__":
    sys.exit(main())
