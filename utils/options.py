"""Names, defaults and help of the command line; no classes."""

import argparse
from pathlib import Path

from utils.errors import InputError
from utils.loss import GAMMA, LOSSES
from utils.precision import PRECISIONS
from utils.regions import BOX_MARGIN, BOX_RECALL, MOST_MARGIN
from utils.stages import STAGES
from utils.tiling import MIN_OVERLAP
from utils.turns import TURNS

FROM_CHECKPOINT = {
    "n_class": 7,
    "size_g": 508,
    "size_p": 508,
    "backbone": "resnet50",
    "normalize": "none",
    "min_overlap": MIN_OVERLAP,
    "coarse_to_fine": False,
    "box_margin": BOX_MARGIN,
}
"""Options that a checkpoint records. Not given, they take its value; where there is none, the data set's, or these."""

POSITIVE = ("batch_size", "sub_batch_size", "num_epochs", "n_class", "size_g", "size_p", "max_pixels", "max_bad_steps")
NOT_NEGATIVE = ("lr", "gamma", "lamb_fmreg", "num_workers", "min_overlap", "seed", "save_every", "early_stopping")

MOST_CLASSES = 255
LONGEST_SIDE = 1 << 15
"""Pixels; what no `--size_g` or `--size_p` can sensibly be, lest a damaged checkpoint asks for terabytes."""


def build_parser(backbones: tuple[str, ...], normalizations: tuple[str, ...], data_sets: tuple[str, ...]):
    """The parser of `train_deep_globe.py`; what other floors name (backbones, ...) is passed in."""
    parser = argparse.ArgumentParser(
        prog="train_deep_globe.py",
        description="Train or evaluate GLNet.\nModes: 1 global, 2 global to local, 3 local to global.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    _add_run(parser)
    _add_data(parser, data_sets)
    _add_files(parser)
    _add_network(parser, backbones, normalizations)
    add_coarse_to_fine(parser).add_argument(
        "--box_recall",
        type=float,
        default=BOX_RECALL,
        help="in training, take the boxes from the label where the coarse ones hold a smaller part of its\n"
        "foreground; 0: never, 1: wherever they miss a pixel (default: %(default)s)",
    )
    _add_training(parser)
    _add_computing(parser)
    _add_safety(parser)
    _add_evaluation(parser)
    return parser


def _recorded(name: str, data_sets: str = "") -> str:
    """Where the default is from; `data_sets`: which of them have which one, where it is theirs to say."""
    theirs = f"the data set's: {data_sets}" if data_sets else ""
    return f"(default: the checkpoint's, else {theirs}{FROM_CHECKPOINT[name]})"


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
        "--check_data",
        action="store_true",
        help="instead of training, read every image and label once and tell all that is wrong",
    )
    group.add_argument(
        "--task_name", default="glnet", help="name of this run's checkpoints and logs (default: %(default)s)"
    )
    group.add_argument(
        "--device",
        default=None,
        help="cpu, cuda, cuda:1, ...; under torchrun cpu or cuda, of which each process\n"
        "takes its own (default: cuda where there is one, else cpu)",
    )
    group.add_argument("--seed", type=int, default=0, help="of initial weights, order and augmentation (default: 0)")
    group.add_argument(
        "--num_workers", type=int, default=2, help="processes that decode images; 0: none (default: %(default)s)"
    )
    group.add_argument(
        "--max_pixels",
        type=int,
        help="larger images are refused; 1000 million take 4 GB when decoded (default: 1000 million)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="only operations that repeat bit by bit, where torch has them; slower on GPUs",
    )


def _add_data(parser: argparse.ArgumentParser, data_sets: tuple[str, ...]) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=data_sets,
        default="deep_globe",
        help="what lies at --data_path; folder: images of your own, as a JSON file says that\n"
        "`python -m dataset.describe` writes (default: %(default)s)",
    )
    group.add_argument(
        "--data_path",
        type=Path,
        default=Path("data"),
        help="the data set's folder; of folder the JSON file, or the folder that holds it (default: data)",
    )
    group.add_argument(
        "--split_lists",
        type=Path,
        metavar="DIR",
        help="inria, isic: take the splits from train.txt, val.txt and test.txt in DIR, an id a line",
    )
    group.add_argument("--split_seed", type=int, help="isic: seed of the split by hash (default: 0)")


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
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
    group.add_argument("--n_class", type=int, help=f"number of classes {_recorded('n_class', 'deep_globe ')}")
    group.add_argument("--size_g", type=int, help=f"side of the shrunk image, in pixels {_recorded('size_g')}")
    group.add_argument(
        "--size_p", type=int, help=f"side of a patch, in pixels {_recorded('size_p', 'inria 536, others ')}"
    )
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


def add_coarse_to_fine(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What training, evaluation and prediction share."""
    group = parser.add_argument_group("coarse to fine")
    group.add_argument(
        "--coarse_to_fine",
        action=argparse.BooleanOptionalAction,
        help="binary sets, modes 2 and 3: the local branch looks only into boxes around the foreground that\n"
        "the global branch found; outside is background (default: the checkpoint's, else off)",
    )
    group.add_argument(
        "--box_margin",
        type=float,
        metavar="PART",
        help=f"enlarge boxes by this part of their sides, in each direction {_recorded('box_margin')}",
    )
    return group


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    epochs = ", ".join(f"{s.epochs} in mode {s.number}" for s in STAGES.values())
    rates = ", ".join(f"{s.lr:g} in mode {s.number}" for s in STAGES.values())
    group.add_argument(
        "--init_from",
        type=Path,
        metavar="FILE",
        help="start mode 1 from this checkpoint, ours or released, which may have other classes: heads and\n"
        "ensemble are new, all else is kept, and --backbone_weights are not read",
    )
    group.add_argument(
        "--batch_size", type=int, help="images in a step, all processes together (default: inria: 4, else 6)"
    )
    group.add_argument("--num_epochs", type=int, help=f"(default: {epochs})")
    group.add_argument("--lr", type=float, help=f"base learning rate (default: {rates})")
    group.add_argument(
        "--loss",
        choices=LOSSES,
        default=LOSSES[0],
        help="focal, cross-entropy, Lovasz-softmax, or a sum (default: %(default)s, as released)",
    )
    group.add_argument(
        "--gamma", type=float, default=GAMMA, help="of the focal loss; 0 is cross-entropy (default: %(default)g)"
    )
    group.add_argument(
        "--class_weights",
        type=float,
        nargs="+",
        metavar="W",
        help="one number for each class, by which its pixels count in the loss (default: all alike)",
    )
    group.add_argument(
        "--lamb_fmreg",
        type=float,
        default=0.15,
        help="weight of the feature-map regulariser in mode 2, lambda in the paper (default: %(default)s)",
    )


def _add_safety(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("long runs, several processes")
    group.add_argument(
        "--resume",
        default="off",
        metavar="WHAT",
        help="auto: go on where an unfinished run of this name stopped, start where there is none;\n"
        "a file: go on from it; off: refuse to start over an unfinished run (default: off)",
    )
    group.add_argument("--overwrite", action="store_true", help="start over, whatever run of this name is unfinished")
    group.add_argument(
        "--resume_anyway", action="store_true", help="go on although options changed that make it another experiment"
    )
    group.add_argument(
        "--save_every",
        type=float,
        default=30,
        metavar="MINUTES",
        help="inside an epoch, save this often what --resume needs; 0: after epochs only (default: 30)",
    )
    group.add_argument(
        "--max_bad_steps",
        type=int,
        default=10,
        help="stop after so many steps in a row whose loss or gradient is not finite;\neach is skipped (default: 10)",
    )
    group.add_argument(
        "--early_stopping",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="stop when the validation score has not grown for so many epochs; 0: never (default: 0)",
    )
    group.add_argument(
        "--sync_bn",
        action="store_true",
        help="of several processes with GPUs, modes 1 and 3: norm layers take their statistics over the\n"
        "whole batch, as one process does. Without, each process normalises its part by itself, and\n"
        "gradients differ from one process's. Mode 2 normalises each sub-batch alone and needs it not",
    )


def _add_computing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="fp32",
        help="of convolutions and their maps; fp32 as released (default: %(default)s)",
    )
    group.add_argument("--tf32", action="store_true", help="CUDA: faster, less exact float32 products")
    group.add_argument("--cudnn_benchmark", action="store_true", help="CUDA: search for the fastest convolutions first")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--split", help="what --evaluation reads (default: the data set's validation: crossvali, else val)"
    )
    group.add_argument(
        "--tta",
        choices=tuple(TURNS),
        default="none",
        help="test-time augmentation: average over the image and its mirror image (flip), or over all\n"
        "eight turns of it (d4) (default: none)",
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
    for name in POSITIVE:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} is not positive")
    for name in NOT_NEGATIVE:
        value = getattr(options, name)
        if value is not None and not value >= 0:
            raise InputError(f"--{name} {value} is negative")
    check_margin(options.box_margin)
    if not 0 <= options.box_recall <= 1:
        raise InputError(f"--box_recall {options.box_recall} is a part of the foreground, from 0 to 1")
    if options.n_class is not None and options.n_class > MOST_CLASSES:
        raise InputError(f"--n_class {options.n_class} is more than the {MOST_CLASSES} that a byte holds beside 255")
    if "/" in options.task_name or not options.task_name.strip("."):
        raise InputError(f"--task_name {options.task_name!r} must be usable as a file name")
    if options.check_data:
        return
    needed = (stage.reads,) if options.evaluation else stage.starts_from
    for name in needed:
        if not getattr(options, name):
            does = "evaluation" if options.evaluation else "training"
            raise InputError(
                f"{does} in mode {stage.number} needs --{name} FILE, the checkpoint of "
                f"{'that mode' if options.evaluation else f'mode {stage.number - 1}'}, inside --model_path"
            )
    if options.tta != "none" and not options.evaluation:
        raise InputError(f"--tta {options.tta} goes with --evaluation")
    if options.init_from and (options.evaluation or stage.number > 1):
        other = "evaluation" if options.evaluation else f"mode {stage.number}"
        raise InputError(f"--init_from {options.init_from} starts training in mode 1 and does nothing in {other}")
    if options.save_predictions and not options.evaluation:
        raise InputError("--save_predictions goes with --evaluation")
    if options.resume != "off" and (options.evaluation or options.overwrite):
        other = "--evaluation" if options.evaluation else "--overwrite"
        raise InputError(f"--resume {options.resume} goes with training, and not with {other}: leave one of them out")


def check_margin(margin: float | None) -> None:
    """Raise InputError for what enlarges no box."""
    if margin is not None and not 0 <= margin <= MOST_MARGIN:
        raise InputError(f"--box_margin {margin} is a part of a box's side, from 0 to {MOST_MARGIN:g}")


def check_sizes(options: argparse.Namespace) -> None:
    """Raise InputError for sizes that do not fit together; after `FROM_CHECKPOINT` is filled in."""
    for name in ("size_g", "size_p"):
        value = getattr(options, name)
        if value % 4 or value < 32:
            near = max(32, value // 4 * 4)
            raise InputError(f"--{name} {value} must be at least 32 and divisible by 4; try {near} or {near + 4}")
        if value > LONGEST_SIDE:
            raise InputError(f"--{name} {value} is more than {LONGEST_SIDE} pixels")
    if options.min_overlap >= options.size_p:
        raise InputError(f"--min_overlap {options.min_overlap} must be smaller than --size_p {options.size_p}")
