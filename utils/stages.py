"""The three stages of training: what each trains, at which rate and how long."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage, which is also one mode of evaluation.

    `trains` and `uses` name children of GLNet; `starts_from` names the options that it needs to start, `reads`
    the one whose file it evaluates. `predictions` are what it predicts, the headline last; `supervised` those of them
    that the loss sees, and `other_terms` what else is in it.
    """

    number: int
    name: str
    trains: tuple[str, ...]
    uses: tuple[str, ...]
    lr: float
    epochs: int
    starts_from: tuple[str, ...]
    reads: str
    predictions: tuple[str, ...]
    supervised: tuple[str, ...]
    other_terms: tuple[str, ...] = ()


STAGES = {
    stage.number: stage
    for stage in (
        Stage(1, "global", ("global_",), ("global_",), 5e-5, 120, (), "path_g", ("global",), ("global",)),
        Stage(
            2,
            "global2local",
            ("local", "ensemble"),
            ("global_", "local", "ensemble"),
            2e-5,
            50,
            ("path_g",),
            "path_g2l",
            ("global", "local", "ensemble"),
            ("local", "ensemble"),
            ("fmreg",),
        ),
        Stage(
            3,
            "local2global",
            ("refined", "ensemble"),
            ("global_", "local", "refined", "ensemble"),
            5e-5,
            120,
            ("path_g2l",),
            "path_l2g",
            ("global", "local", "ensemble"),
            ("global", "ensemble"),
        ),
    )
}
