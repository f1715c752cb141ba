"""Names, defaults and help of the command line; no classes."""

import argparse
from pathlib import Path

from utils.errors import InputError
from utils.stages import STAGES
from utils.tiling import MIN_OVERLAP

FROM_CHECKPOINT = {
    "n_class": 7,
    "size_g": 508,
    "size_p": 508,
    "backbone": "resnet50",
    "normalize": "none",
    "min_overlap": MIN_OVERLAP,
}
"""Options that a checkpoint records. Not given, they take its value, and these where there is none."""


def build_parser(backbones: tuple[str, ...], normalizations: tuple[str, ...], splits: tuple[str, ...]):
    """The parser of `train_deep_globe.py`; what other floors name (backbones, ...) is passed in."""
    parser = argparse.ArgumentParser(
        prog="train_deep_globe.py",
        description="Train or evaluate GLNet on DeepGlobe.\nModes: 1 global, 2 global to local, 3 local to global.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    _add_run(parser)
    _add_files(parser)
    _add_network(parser, backbones, normalizations)
    _add_training(parser)
    _add_evaluation(parser, splits)
    return parser


def _recorded(name: str) -> str:
    return f"(default: the checkpoint's, else {FROM_CHECKPOINT[name]})"


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--mode",
        type=int,
        choices=(1, 2, 3),
        default=1,
        help="1: global branch alone; 2: global to local; 3: local to global (default: 1)",
    )
    group.add_argument("--evaluation", action="store_true", help="evaluate instead of training")
    group.add_argument(
        "--task_name", default="glnet", help="name of this run's checkpoints and logs (default: %(default)s)"
    )
    group.add_argument(
        "--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)"
    )
    group.add_argument("--seed", type=int, default=0, help="of initial weights, order and augmentation (default: 0)")
    group.add_argument(
        "--num_workers", type=int, default=2, help="processes that decode images; 0: none (default: %(default)s)"
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument(
        "--data_path", type=Path, default=Path("data"), help="DeepGlobe, in either layout (default: data)"
    )
    group.add_argument(
        "--model_path", type=Path, default=Path("saved_models"), help="folder of checkpoints (default: saved_models)"
    )
    group.add_argument("--log_path", type=Path, default=Path("runs"), help="folder of logs (default: runs)")
    for stage in STAGES.values():
        group.add_argument(
            f"--{stage.reads}",
            default="",
            metavar="FILE",
            help=f"checkpoint of mode {stage.number} ({stage.name}), a file inside --model_path"
            + ("; training in mode 2 starts from it" if stage.number == 1 else "")
            + ("; training in mode 3 starts from it" if stage.number == 2 else ""),
        )


def _add_network(parser: argparse.ArgumentParser, backbones: tuple[str, ...], normalizations: tuple[str, ...]) -> None:
    group = parser.add_argument_group("network and geometry")
    group.add_argument("--n_class", type=int, help=f"number of classes {_recorded('n_class')}")
    group.add_argument("--size_g", type=int, help=f"side of the shrunk image, in pixels {_recorded('size_g')}")
    group.add_argument("--size_p", type=int, help=f"side of a patch, in pixels {_recorded('size_p')}")
    group.add_argument(
        "--min_overlap",
        type=int,
        help=f"pixels that neighbouring patches share at least {_recorded('min_overlap')}",
    )
    group.add_argument("--sub_batch_size", type=int, default=6, help="patches at a time (default: %(default)s)")
    group.add_argument("--backbone", choices=backbones, help=f"{', '.join(backbones)} {_recorded('backbone')}")
    group.add_argument(
        "--backbone_weights",
        default="imagenet",
        metavar="SOURCE",
        help="what both backbones start from in mode 1: imagenet (downloaded by torchvision),\n"
        "none, or a torchvision weight file (default: %(default)s)",
    )
    group.add_argument(
        "--normalize",
        choices=normalizations,
        help=f"of pixel values after scaling to [0, 1]: none, 0.5/0.5, or ImageNet's\nmean and deviation "
        f"{_recorded('normalize')}",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    epochs = ", ".join(f"{s.epochs} in mode {s.number}" for s in STAGES.values())
    rates = ", ".join(f"{s.lr:g} in mode {s.number}" for s in STAGES.values())
    group.add_argument("--batch_size", type=int, default=6, help="images in a step (default: %(default)s)")
    group.add_argument("--num_epochs", type=int, help=f"(default: {epochs})")
    group.add_argument("--lr", type=float, help=f"base learning rate (default: {rates})")
    group.add_argument(
        "--lamb_fmreg",
        type=float,
        default=0.15,
        help="weight of the feature-map regulariser in mode 2, lambda in the paper (default: %(default)s)",
    )


def _add_evaluation(parser: argparse.ArgumentParser, splits: tuple[str, ...]) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--split", choices=splits, default="crossvali", help="what --evaluation reads (default: crossvali)"
    )
    group.add_argument(
        "--save_predictions",
        type=Path,
        metavar="DIR",
        help="write each prediction as ID_mask.png, classes in their colours",
    )


def check(options: argparse.Namespace) -> None:
    """Raise InputError for values and combinations that cannot work, before anything is read.

    Fills in what follows from the mode: epochs and learning rate.
    """
    stage = STAGES[options.mode]
    options.num_epochs = stage.epochs if options.num_epochs is None else options.num_epochs
    options.lr = stage.lr if options.lr is None else options.lr
    for name in ("batch_size", "sub_batch_size", "num_epochs", "n_class", "size_g", "size_p"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} is not positive")
    for name in ("lr", "lamb_fmreg", "num_workers", "min_overlap", "seed"):
        value = getattr(options, name)
        if value is not None and not value >= 0:
            raise InputError(f"--{name} {value} is negative")
    if "/" in options.task_name or not options.task_name.strip("."):
        raise InputError(f"--task_name {options.task_name!r} must be usable as a file name")
    needed = (stage.reads,) if options.evaluation else stage.starts_from
    for name in needed:
        if not getattr(options, name):
            does = "evaluation" if options.evaluation else "training"
            raise InputError(
                f"{does} in mode {stage.number} needs --{name} FILE, the checkpoint of "
                f"{'that mode' if options.evaluation else f'mode {stage.number - 1}'}, inside --model_path"
            )
    if options.save_predictions and not options.evaluation:
        raise InputError("--save_predictions goes with --evaluation")


def check_sizes(options: argparse.Namespace) -> None:
    """Raise InputError for sizes that do not fit together; after `FROM_CHECKPOINT` is filled in."""
    for name in ("size_g", "size_p"):
        value = getattr(options, name)
        if value % 4 or value < 32:
            near = max(32, value // 4 * 4)
            raise InputError(f"--{name} {value} must be at least 32 and divisible by 4; try {near} or {near + 4}")
    if options.min_overlap >= options.size_p:
        raise InputError(f"--min_overlap {options.min_overlap} must be smaller than --size_p {options.size_p}")
