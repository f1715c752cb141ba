"""Restoring a network from a checkpoint, for evaluation in a mode."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models import checkpoint
from models.checkpoint import Checkpoint
from models.glnet import GLNet
from models.header import Header
from utils.classes import Classes
from utils.errors import InputError
from utils.settings import RECORDED
from utils.stages import STAGES
from utils.stretch import fit_bands, parse_bands, spell_bands


def header_for(file: Checkpoint, mode: int | None, given: Mapping[str, Any], released: Classes) -> Header:
    """Return the header by which `file` is evaluated in a mode; None is the file's own, if it records one.

    `given` values replace the recorded ones, by the names of `RECORDED`; None replaces nothing. `released` are the
    classes of a released file, if it has that many; else they are numbered. Raises InputError if the file needs a mode,
    cannot serve it, or was made with another backbone or number of bands.
    """
    recorded = file.header or _released_header(file, mode, released)
    if given.get("backbone") not in (None, recorded.backbone) and file.header is not None:
        raise InputError(f"--backbone {given['backbone']}: {file.path} was made with {recorded.backbone}")
    values = {name: value for name, value in given.items() if value is not None}
    if "bands" in values:
        values["bands"] = spell_bands(fit_bands(parse_bands(values["bands"]), file.n_bands, file.path))
    scale = recorded.scale_for(values.get("context", recorded.context), values.get("size_g"))
    return replace(recorded, **{**values, "stage": mode or recorded.stage, "scale": scale})


def build_network(header: Header) -> GLNet:
    """Return the network that `header` describes, with initial weights, on the CPU."""
    return GLNet(len(header.classes), header.backbone, header.n_bands, header.pyramid_width, header.pyramid_norm)


class _NoDraws(TorchFunctionMode):
    """Sets parameters to 0 where initial weights would be drawn, which takes longer than reading them from a file."""

    DRAWS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, Tensor.uniform_, Tensor.normal_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        drawn = [*args, *kwargs.values()][0] if func in self.DRAWS else None
        return drawn.detach().zero_() if isinstance(drawn, nn.Parameter) else func(*args, **kwargs)


def restore(file: Checkpoint, header: Header, context: Checkpoint | None = None) -> GLNet:
    """Build the network that `header` describes, in evaluation mode, on the CPU, and load what its mode needs.

    `context` is stage 1's file, which a released file of stage 3 needs; see `checkpoint.read_context`. Weights that
    neither file holds, which the mode does not use, are 0. Raises InputError if the file cannot serve the mode, or
    lacks tensors.
    """
    made_by = header.stage if file.header is None else file.header.stage
    check_serves(file, header.stage)
    with _NoDraws():
        model = build_network(header)
    checkpoint.load_whole(model, file, made_by)
    if context is not None:
        checkpoint.load_context(model, context)
    model.learn(())
    return model.eval()


def check_serves(file: Checkpoint, mode: int) -> None:
    """Raise InputError if `file` was made by another stage than `mode`.

    Every stage's file serves mode 1, because later stages leave the global branch unchanged.
    """
    if file.header is None or mode in (1, file.header.stage):
        return
    made = STAGES[file.header.stage]
    raise InputError(
        f"--mode {mode}: {file.path} was made by stage {made.number} ({made.name}), which serves mode {made.number} "
        f"(as --{made.reads}){', or 1' if made.number > 1 else ''}"
    )


def _released_header(file: Checkpoint, mode: int | None, released: Classes) -> Header:
    """Return the header of a released file; see `header_for`."""
    if mode is None:
        raise InputError(f"{file.path} is a released file, which does not say its stage: give --mode 1, 2 or 3")
    name = "fpn_global.classify.weight"
    if name not in file.tensors:
        raise InputError(f"{file.path} misses tensor {name}")
    n_class = len(file.tensors[name])
    classes = released if n_class == len(released) else Classes.generic(n_class)
    return Header(stage=mode, classes=classes, **RECORDED)
