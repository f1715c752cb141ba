"""The command line of `train_deep_globe.py`: each option with its type, bounds, default and help."""

import argparse
from pathlib import Path
from typing import Any

from dataset.augmentation import DRAWN_TURNS, LARGEST_SCALE
from dataset.registry import NAMES
from models.backbone import BACKBONES, backbone_name
from models.fpn import MOST_WIDTH, NORMS
from training.recipe import RECIPES
from utils.arguments import (
    Parser,
    add_coarse_to_fine,
    add_context,
    add_geometry,
    add_normalize,
    add_precision,
    add_refine_share,
    add_smoothing,
    add_view,
    number,
    recorded_default,
    whole,
)
from utils.errors import InputError
from utils.loss import GAMMA, LOSSES
from utils.settings import MOST_CLASSES, SHARES, SMALLEST_SIDE, TRAINED_SHARES
from utils.stages import STAGES
from utils.turns import TURNS

RELEASED: dict[str, Any] = {
    "ema": 0.0,
    "loss_size": "quarter",
    "patches": 0,
    "sub_batches": "image",
    "turns": "all",
    "val_every": 1,
}
"""Options of training whose parser default is None, and their values where nothing else sets them, as released."""

LOGGED = {
    *("task_name", "device", "num_workers", "max_pixels", "deterministic", "checkpoint_activations"),
    *("data_path", "split_lists", "view_pixels", "model_path", "log_path", "path_g", "path_g2l", "path_l2g"),
    *("backbone_weights", "recipe", "init_from", "save_every", "val_every", "early_stopping"),
}
"""Options that a resumed run may have with other values, which are logged."""

SILENT = {
    *("evaluation", "check_data", "resume", "overwrite", "resume_anyway"),
    *("split", "refine_share", "blend", "upsample", "save_predictions", "report"),
}
"""Options that do not matter to a resumed run. A change of any that is in neither set makes another experiment."""


def released(name: str) -> str:
    """Return a help text that tells the default of one of `RELEASED`."""
    value = RELEASED[name]
    return f"(default: {value if isinstance(value, str) else f'{value:g}'}, as released)"


def task_name(text: str) -> str:
    """Parse `--task_name`: a name that files and folders can have."""
    if "/" in text or not text.strip("."):
        raise argparse.ArgumentTypeError(f"{text!r} must be usable as a file name")
    return text


def build_parser() -> Parser:
    """Return the parser of `train_deep_globe.py`."""
    parser = Parser(
        prog="train_deep_globe.py",
        description="Train or evaluate GLNet.\nModes: 1 global, 2 global to local, 3 local to global.",
    )
    add = parser.group("run")
    add(
        "--mode",
        type=int,
        choices=(1, 2, 3),
        default=1,
        help="1: global branch alone; 2: global to local; 3: local to global (default: 1)",
    )
    add("--evaluation", action="store_true", help="evaluate instead of training")
    add(
        "--check_data",
        action="store_true",
        help="instead of training, read every image and label once and report all that is wrong",
    )
    add(
        "--task_name",
        type=task_name,
        default="glnet",
        help="name of this run's checkpoints and logs (default: %(default)s)",
    )
    add(
        "--device",
        help="cpu, cuda, cuda:1, ...; under torchrun cpu or cuda, of which each process\n"
        "takes its own (default: cuda where there is one, else cpu)",
    )
    add("--seed", type=whole(0), default=0, help="of initial weights, order and augmentation (default: 0)")
    add("--num_workers", type=whole(0), default=2, help="processes that decode images; 0: none (default: %(default)s)")
    add(
        "--max_pixels",
        type=whole(1),
        help="larger images are refused; 1000 million take 4 GB when decoded (default: 1000 million)",
    )
    add(
        "--deterministic",
        action="store_true",
        help="only operations that repeat bit by bit, where torch has them; slower on GPUs",
    )
    add_data(parser)
    add = parser.group("files")
    add("--model_path", type=Path, default=Path("saved_models"), help="folder of checkpoints (default: saved_models)")
    add("--log_path", type=Path, default=Path("runs"), help="folder of logs (default: runs)")
    starts = {1: "; training in mode 2 starts from it", 2: "; training in mode 3 starts from it", 3: ""}
    for stage in STAGES.values():
        add(
            f"--{stage.reads}",
            default="",
            metavar="FILE",
            help=f"checkpoint of mode {stage.number} ({stage.name}), a file inside --model_path{starts[stage.number]}",
        )
    add = parser.group("network and geometry")
    add(
        "--n_class",
        type=whole(1, MOST_CLASSES),
        help="number of classes (default: the checkpoint's, else the data set's: deep_globe 7)",
    )
    add_geometry(add, "inria 536, others ")
    add_context(add)
    add(
        "--backbone",
        type=backbone_name,
        metavar="NAME",
        help=f"{', '.join(BACKBONES)}, or timm/NAME, a network of the package timm\n{recorded_default('backbone')}",
    )
    add(
        "--backbone_weights",
        metavar="SOURCE",
        help="initial weights of the backbones of modes 1 and 2: imagenet (downloaded by torchvision or timm), none,\n"
        "or a file of theirs, .pth or .safetensors (default: the checkpoint's, else imagenet)",
    )
    add_normalize(add)
    add(
        "--pyramid_width",
        type=whole(2, MOST_WIDTH),
        metavar="N",
        help=f"channels of the pyramid's maps ps0 and ps1; ps2 has N / 2, ps3 2 N\n{recorded_default('pyramid_width')}",
    )
    add(
        "--pyramid_norm",
        choices=NORMS,
        help="norm layers behind the convolutions of the pyramid: none, as released, or batch normalisation\n"
        f"{recorded_default('pyramid_norm')}",
    )
    add(
        "--start",
        choices=("released", "previous"),
        default="released",
        help="how modes 2 and 3 start: at random, as released, or with the ensemble as the global head (mode 2) and\n"
        "the refined branch as the global branch (mode 3) (default: %(default)s)",
    )
    add(
        "--share",
        choices=SHARES,
        help="modes 2 and 3: the local branch reads the global maps of its own image, or none; in evaluation also\n"
        "those of another image, or of a grey one\n"
        f"{recorded_default('share')}",
    )
    add_coarse_to_fine(parser.group("coarse to fine"))
    add = parser.group("training")
    add(
        "--recipe",
        choices=tuple(RECIPES),
        default="released",
        help="values of options that are not given, see docs/training.md (default: %(default)s)",
    )
    epochs = ", ".join(f"{s.epochs} in mode {s.number}" for s in STAGES.values())
    rates = ", ".join(f"{s.lr:g} in mode {s.number}" for s in STAGES.values())
    add(
        "--init_from",
        type=Path,
        metavar="FILE",
        help="start mode 1 from this checkpoint, ours or released, of any classes: heads and ensemble are new, all\n"
        "else is kept",
    )
    add(
        "--batch_size",
        type=whole(1),
        help="images in a step, all processes together (default: dubai 2, inria 4, others 6)",
    )
    add("--num_epochs", type=whole(1), help=f"passes over the training images (default: {epochs})")
    add("--lr", type=number(0), help=f"base learning rate (default: {rates})")
    add(
        "--ema",
        type=number(0, 1),
        metavar="DECAY",
        help="average weights and norm statistics over the steps, with this decay, such as 0.999: TASK.best.pth and\n"
        f"TASK.ema.pth hold averages, TASK.pth the last weights; 0: off {released('ema')}",
    )
    add(
        "--loss",
        choices=LOSSES,
        default=LOSSES[0],
        help="focal, cross-entropy, Lovasz-softmax, or a sum (default: %(default)s, as released)",
    )
    add(
        "--gamma",
        type=number(0),
        default=GAMMA,
        help="exponent of the focal loss; 0 is cross-entropy (default: %(default)g)",
    )
    add(
        "--loss_size",
        choices=("quarter", "full"),
        help="quarter: labels are shrunk to the logits; full: logits are enlarged to the labels\n"
        f"{released('loss_size')}",
    )
    add(
        "--class_weights",
        type=float,
        nargs="+",
        metavar="W",
        help="one number for each class, by which its pixels count in the loss (default: all alike)",
    )
    add(
        "--lamb_fmreg",
        type=number(0),
        default=0.15,
        help="weight of the feature-map regulariser in mode 2, lambda in the paper (default: %(default)s)",
    )
    add = parser.group("what training varies")
    add(
        "--window",
        type=whole(SMALLEST_SIDE),
        metavar="SIZE",
        help="train on windows of SIZE x SIZE pixels of every longer image, each with its own shrunk image\n"
        "(default: whole images)",
    )
    add("--windows", type=whole(1), metavar="N", help="with --window: how many each epoch draws from each longer image")
    add(
        "--patches",
        type=whole(0),
        metavar="N",
        help="modes 2 and 3: train on N patches of each image, drawn anew in each epoch; in mode 3 the ensemble alone\n"
        f"does; 0: all {released('patches')}",
    )
    add(
        "--sub_batches",
        choices=("image", "step"),
        help="mode 2: patches that are computed together, and normalised together, are of one image, or of all images\n"
        f"of the step {released('sub_batches')}",
    )
    add(
        "--turns",
        choices=DRAWN_TURNS,
        help="how training images are turned: mirrored left-right and rotated by quarter turns, mirrored alone, or\n"
        f"none {released('turns')}",
    )
    add(
        "--augment",
        action="store_true",
        help=f"vary scale (1 / {LARGEST_SCALE:g} to {LARGEST_SCALE:g}), brightness, contrast, saturation and hue of "
        "training images, too",
    )
    add = parser.group("computing")
    add_precision(add)
    add(
        "--checkpoint_activations",
        action="store_true",
        help="in training, compute maps of encoders again in the backward pass: less memory, more time, the same\n"
        "result",
    )
    add = parser.group("long runs, several processes")
    add(
        "--resume",
        default="off",
        metavar="WHAT",
        help="auto: continue the unfinished run of this name, or start one; a file: continue from it;\n"
        "off: refuse to start over an unfinished run (default: off)",
    )
    add("--overwrite", action="store_true", help="start over, even if a run of this name is unfinished")
    add(
        "--resume_anyway",
        action="store_true",
        help="continue although options changed that make it another experiment",
    )
    add(
        "--save_every",
        type=number(0),
        default=30,
        metavar="MINUTES",
        help="how often the resume file is written inside an epoch; 0: never (default: 30)",
    )
    add(
        "--val_every",
        type=whole(1),
        metavar="EPOCHS",
        help=f"validate after every so many epochs and after the last {released('val_every')}",
    )
    add(
        "--early_stopping",
        type=whole(0),
        default=0,
        metavar="EPOCHS",
        help="stop when the validation score has not grown for so many epochs; 0: never (default: 0)",
    )
    add(
        "--sync_bn",
        action="store_true",
        help="several GPUs, modes 1 and 3: norm layers take their statistics over the whole batch, as one process does",
    )
    add = parser.group("evaluation")
    add("--split", help="what --evaluation reads (default: the data set's validation: crossvali, else val)")
    add(
        "--tta",
        choices=tuple(TURNS),
        default="none",
        help="average over the image and its mirror image (flip), or over all its eight turns (d4) (default: none)",
    )
    add_refine_share(add)
    add_smoothing(add)
    add(
        "--save_predictions",
        type=Path,
        metavar="DIR",
        help="write each prediction as ID_mask.png, classes in their colours",
    )
    add("--report", type=Path, metavar="DIR", help="write scores and pictures to DIR/report.html")
    return parser


def add_data(parser: Parser) -> None:
    """Add the options that name a data set, its splits and how its files become pixels."""
    add = parser.group("data")
    add(
        "--dataset",
        choices=NAMES,
        default="deep_globe",
        help="what --data_path holds; folder: images of your own, described by a JSON file that\n"
        "`python -m dataset.describe` writes (default: %(default)s)",
    )
    add(
        "--data_path",
        type=Path,
        default=Path("data"),
        help="the data set's folder; of folder the JSON file, or the folder that holds it (default: data)",
    )
    add(
        "--split_lists",
        type=Path,
        metavar="DIR",
        help="inria, isic, dubai: take the splits from train.txt, val.txt and test.txt in DIR, an id a line",
    )
    add("--hold_out", metavar="ID", help="dubai: validate on this scene alone, such as tile3, and train on all others")
    add_view(add)


def check(options: argparse.Namespace) -> None:
    """Raise InputError for combinations of options that cannot work, before anything is read."""
    stage = STAGES[options.mode]
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
    of_evaluation = {"tta": "none", "blend": "none", "upsample": "nearest", "refine_share": 1.0}
    for name, default in {**of_evaluation, "save_predictions": None, "report": None}.items():
        if not options.evaluation and getattr(options, name) != default:
            raise InputError(f"--{name} {getattr(options, name)} goes with --evaluation")
    if options.share not in (None, *TRAINED_SHARES) and not options.evaluation:
        raise InputError(f"--share {options.share} goes with --evaluation; training has {' and '.join(TRAINED_SHARES)}")
    for name in ("window", "augment", "patches"):
        if options.evaluation and getattr(options, name):
            raise InputError(f"--{name} goes with training; --evaluation takes images whole, as they are")
    if (options.window is None) != (options.windows is None):
        raise InputError("--window SIZE and --windows N go together: give both, or none")
    if options.init_from and (options.evaluation or stage.number > 1):
        other = "evaluation" if options.evaluation else f"mode {stage.number}"
        raise InputError(f"--init_from {options.init_from} starts training in mode 1 and does nothing in {other}")
    if options.pyramid_width is not None and options.pyramid_width % 2:
        raise InputError(f"--pyramid_width {options.pyramid_width} must be even: ps2 has half as many channels")
    if options.resume != "off" and (options.evaluation or options.overwrite):
        other = "--evaluation" if options.evaluation else "--overwrite"
        raise InputError(f"--resume {options.resume} goes with training, and not with {other}: leave one of them out")
