"""The three stages of training: what each trains, at which rate and for how many epochs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training, which is also one mode of evaluation (paper, section 3.4).

    Attributes:
        number: 1, 2 or 3, the value of `--mode`.
        name: as in the scripts' names.
        trains: children of GLNet that learn.
        uses: children of GLNet that are computed, the learning ones included.
        lr: the released base learning rate.
        epochs: the released number of epochs.
        starts_from: options that name the checkpoints a training needs.
        reads: the option that names the checkpoint an evaluation reads, and that this stage writes.
        predictions: names of the stage's predictions, in the order of tables.
        headline: the prediction that the stage is judged by.
        supervised: the predictions in the loss.
        other_terms: names of the other terms of the loss.
    """

    number: int
    name: str
    trains: tuple[str, ...]
    uses: tuple[str, ...]
    lr: float
    epochs: int
    starts_from: tuple[str, ...] = ()
    reads: str
    predictions: tuple[str, ...]
    headline: str
    supervised: tuple[str, ...]
    other_terms: tuple[str, ...] = ()


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
