"""Named recipes: values of many options at once, each of which may still be given by itself."""

import argparse
from typing import Any

from models.fpn import INITIAL_STD, SameConv
from models.glnet import GLNet
from training.optimizer import poly
from utils.arguments import Parser
from utils.settings import OF_WEIGHTS
from utils.stages import Stage

RECIPES: dict[str, dict[str, Any]] = {
    "released": {},
    "modern": {
        "pyramid_norm": "batch",
        "pyramid_width": 64,
        "start": "previous",
        "loss": "ce",
        "loss_size": "full",
        "lr": {1: 5e-4, 2: 1e-3, 3: 1e-3},
        "sub_batches": "step",
        "lamb_fmreg": 0.01,
        "ema": 0.98,
    },
}
"""By `--recipe`, the values of options; a dictionary gives one for each mode. Found by trials (docs/experiments.md)."""

LEAST_REACH = 3.0
"""Below so many standard deviations of its initial weights a pyramid hardly learns (docs/experiments.md)."""

RELEASED_STEPS = 76
"""Steps of an epoch as released: of 454 images of DeepGlobe, 6 in a step."""


def parse(parser: Parser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line; options that it does not give take the values of its recipe. Raises InputError."""
    options = parser.parse_args(arguments)
    if options.evaluation:
        return options
    for name, value in RECIPES[options.recipe].items():
        if options.mode == 1 or name not in OF_WEIGHTS:  # later modes take the network from the file of mode 1
            parser.set_defaults(**{name: value[options.mode] if isinstance(value, dict) else value})
    return parser.parse_args(arguments)


def reach(lr: float, steps: int) -> float:
    """Return how far a run can move a weight: the sum of its learning rates, as each of Adam's steps is at most one."""
    return lr * sum(poly(t, steps) for t in range(steps))


def reach_line(lr: float, model: GLNet, stage: Stage, steps: int) -> tuple[str, bool]:
    """Describe how far a run of so many steps can move a weight, beside the released run; say whether it warns."""
    children = (getattr(model, name) for name in stage.trains)
    deviations = sorted(m.initial_std for child in children for m in child.modules() if isinstance(m, SameConv))
    deviation = deviations[len(deviations) // 2]
    own = reach(lr, steps)
    released = reach(stage.lr, stage.epochs * RELEASED_STEPS) / INITIAL_STD
    line = (
        f"Reach: {steps} steps can move a weight by {own:.3g}, {own / deviation:.1f} standard deviations of the "
        f"pyramid's initial weights; the released run of mode {stage.number}: {released:.1f}"
    )
    warns = own / deviation < LEAST_REACH
    advice = f". Below {LEAST_REACH:g} a pyramid hardly learns: train longer, or raise --lr {lr:g}"
    return line + advice if warns else line, warns
