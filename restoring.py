"""A network as a checkpoint left it, ready to be evaluated in a mode."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataset.deep_globe import DEEP_GLOBE
from models import checkpoint
from models.checkpoint import Checkpoint, Header
from models.glnet import GLNet
from utils.classes import Classes
from utils.errors import InputError
from utils.options import FROM_CHECKPOINT
from utils.stages import STAGES


def restore(path: Path, mode: int | None, path_g: Path | None, given: Mapping[str, Any]) -> tuple[GLNet, Header]:
    """The network in the file `path`, and a header that says how to evaluate it; `given` replaces what is not None.

    `mode` is by default the file's stage; a file of a later stage serves mode 1 too, as it holds that branch unchanged.
    A released file records nothing: it needs `mode`, and in mode 3 `path_g`, stage 1's. Raises InputError for files
    that cannot be used or do not fit.
    """
    file = checkpoint.read(path)
    recorded = file.header or _released_header(file, mode)
    if given.get("backbone") not in (None, recorded.backbone) and file.header is not None:
        raise InputError(f"--backbone {given['backbone']}: {path} was made with {recorded.backbone}")
    header = replace(recorded, stage=_stage(file, recorded, mode))
    header = replace(header, **{name: value for name, value in given.items() if value is not None})
    context = checkpoint.read_context(file, header.stage, path_g)
    model = GLNet(len(header.classes), header.backbone)
    checkpoint.load_whole(model, file, recorded.stage)
    if context is not None:
        checkpoint.load_context(model, context)
    model.learn(())
    return model.eval(), header


def _stage(file: Checkpoint, recorded: Header, mode: int | None) -> int:
    if mode in (None, recorded.stage):
        return recorded.stage
    if mode == 1:
        return 1
    raise InputError(
        f"--mode {mode}: {file.path} was made by stage {recorded.stage} ({STAGES[recorded.stage].name}), which "
        f"serves mode {recorded.stage}, or 1"
    )


def _released_header(file: Checkpoint, mode: int | None) -> Header:
    """What a released file must be: it says no more than its number of classes."""
    if mode is None:
        raise InputError(f"{file.path} is a released file, which does not say its stage: give --mode 1, 2 or 3")
    name = "fpn_global.classify.weight"
    if name not in file.tensors:
        raise InputError(f"{file.path} misses tensor {name}")
    n_class = len(file.tensors[name])
    values = {name: FROM_CHECKPOINT[name] for name in ("backbone", "size_g", "size_p", "min_overlap", "normalize")}
    classes = DEEP_GLOBE if n_class == len(DEEP_GLOBE) else Classes.generic(n_class)
    return Header(stage=mode, classes=classes, **values)
