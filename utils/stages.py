"""The three stages of training: what each trains, at which rate and for how many epochs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training, which is also one mode of evaluation (paper, section 3.4)."""

    number: int  # the value of `--mode`
    name: str  # as in the scripts' names
    trains: tuple[str, ...]  # children of GLNet that learn
    uses: tuple[str, ...]  # children of GLNet that are computed, the learning ones included
    lr: float  # base learning rate, as released
    epochs: int  # as released
    starts_from: tuple[str, ...] = ()  # options that name the checkpoints a training needs
    reads: str  # the option that names the checkpoint an evaluation reads, and that this stage writes
    predictions: tuple[str, ...]  # in the order of tables
    headline: str  # the prediction that the stage is judged by
    supervised: tuple[str, ...]  # the predictions in the loss
    other_terms: tuple[str, ...] = ()  # of the loss


PREDICTIONS = ("global", "local", "ensemble")
"""The predictions, in the order of every table; mode 1 has the first only."""

STAGES = {
    1: Stage(
        number=1,
        name="global",
        trains=("global_",),
        uses=("global_",),
        lr=5e-5,
        epochs=120,
        reads="path_g",
        predictions=PREDICTIONS[:1],
        headline="global",
        supervised=("global",),
    ),
    2: Stage(
        number=2,
        name="global2local",
        trains=("local", "ensemble"),
        uses=("global_", "local", "ensemble"),
        lr=2e-5,
        epochs=50,
        starts_from=("path_g",),
        reads="path_g2l",
        predictions=PREDICTIONS,
        headline="ensemble",
        supervised=("local", "ensemble"),
        other_terms=("fmreg",),
    ),
    3: Stage(
        number=3,
        name="local2global",
        trains=("refined", "ensemble"),
        uses=("global_", "local", "refined", "ensemble"),
        lr=5e-5,
        epochs=120,
        starts_from=("path_g2l",),
        reads="path_l2g",
        predictions=PREDICTIONS,
        headline="ensemble",
        supervised=("global", "ensemble"),
    ),
}
