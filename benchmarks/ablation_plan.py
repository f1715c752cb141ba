"""What `benchmarks.ablation` trains: the recipe of each data set, the variants, and the runs that they consist of."""

from dataclasses import dataclass, replace

BUDGETS = {"small": 1.0, "medium": 4.0}
"""By which the numbers of epochs are multiplied."""

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Recipe:
    """The settings of all variants on one data set, chosen by stage 1 and U-Net alone.

    Attributes:
        epochs: of the three stages in the smallest budget.
        arguments: of training, beside those of `COMMON`.
        windows: further arguments of training on whole scenes.
        evaluation: arguments of the evaluation on whole scenes.
        parts: by how much more epochs parts of scenes are trained, so that as many patches are read; 0 for no parts.
        reasons: whether U-Net is also trained as stage 2 is, and stage 2 for longer, to tell networks from training.
        patch: side of a patch, in pixels.
        other_patch: the same in the variant with other patches.
    """

    epochs: tuple[int, int, int]
    arguments: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    parts: float = 0
    reasons: bool = False
    patch: int = 128
    other_patch: int = 64


COMMON = (
    "--backbone=resnet18",
    "--backbone_weights=none",
    "--normalize=imagenet",
    "--size_g=96",
    "--min_overlap=0",
    "--sub_batch_size=9",
    "--loss=ce",
    "--precision=bf16",
    "--augment",
)
"""Arguments of every training."""

RECIPES = {
    "dubai": Recipe(
        windows=("--window=384", "--windows=16"),
        # scenes of 490 to 640 pixels are shrunk as much as windows are: to a quarter
        evaluation=("--size_g=144",),
        arguments=("--class_weights", "3", "0.5", "2", "2.5", "0.7"),
        epochs=(16, 2, 3),
        parts=2.5,
        reasons=True,
    ),
    "synthetic": Recipe(epochs=(12, 2, 3)),
}
"""By `--data`."""

RATES = {0: 1e-3, 1: 5e-4, 2: 2e-4, 3: 5e-4}
"""Learning rate by mode; 0 is a network of `benchmarks.baselines`. The rates of the stages have the released ratio."""

BATCH = {0: 1, 1: 2, 2: 1, 3: 2}
"""Images in a step, by mode. The norm layers of modes 1 and 3 need more than one whole image."""


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        name: of its files, without the seed.
        mode: of GLNet; 0 is a network of `benchmarks.baselines`.
        epochs: how many.
        options: further arguments.
        starts: by option, the name of the run whose checkpoint it starts from.
        data: the folder of its images, below that of the experiment's data.
        rate: learning rate; that of the mode in `RATES` by default.
        extra: whether it is trained after all others, of all seeds.
    """

    name: str
    mode: int
    epochs: int
    options: tuple[str, ...] = ()
    starts: tuple[tuple[str, str], ...] = ()
    data: str = "scenes"
    rate: float | None = None
    extra: bool = False

    @property
    def learning_rate(self) -> float:
        """The rate that it is trained with."""
        return RATES[self.mode] if self.rate is None else self.rate


@dataclass(frozen=True)
class Variant:
    """A row of the table: one prediction of a run."""

    title: str
    run: str
    prediction: str


def variants(recipe: Recipe) -> list[Variant]:
    """Return the rows of the table."""
    parts = [Variant("both, parts as images", "l2g_parts", ENSEMBLE)] if recipe.parts else []
    reasons = [
        Variant("global to local, longer", "g2l_longer", ENSEMBLE),
        Variant("U-Net, steps and rate of stage 2", "unet_slow", "global"),
    ]
    return [
        Variant("global", "global", "global"),
        Variant("local", "alone", "local"),
        Variant("global to local", "g2l", ENSEMBLE),
        Variant("local to global", "l2g_alone", ENSEMBLE),
        Variant("both", "l2g", ENSEMBLE),
        Variant("both, no regulariser", "l2g_free", ENSEMBLE),
        Variant(f"both, patches of {recipe.other_patch}", "l2g_patches", ENSEMBLE),
        *parts,
        Variant("U-Net", "unet", "global"),
        Variant("DeepLabV3+", "deeplab", "global"),
        *(reasons if recipe.reasons else []),
    ]


def plan(recipe: Recipe, factor: float) -> list[Run]:
    """Return all runs of one seed, in an order in which each follows those that it starts from."""
    first, second, third = (max(1, round(factor * epochs)) for epochs in recipe.epochs)
    patches = (f"--size_p={recipe.other_patch}",)
    alone = ("--no-share_maps",)
    start = (("path_g", "global"),)

    def refined(name: str, local: str, options: tuple[str, ...] = ()) -> Run:
        return Run(name, 3, third, options, (*start, ("path_g2l", local)))

    runs = [
        Run("global", 1, first),
        Run("g2l", 2, second, (), start),
        Run("unet", 0, second + third, ("--model=unet",)),
        refined("l2g", "g2l"),
        Run("alone", 2, second, (*alone, "--lamb_fmreg=0"), start),
        refined("l2g_alone", "alone", alone),
        Run("g2l_free", 2, second, ("--lamb_fmreg=0",), start),
        refined("l2g_free", "g2l_free"),
    ]
    extra = [
        Run("deeplab", 0, second + third, ("--model=deeplab",)),
        Run("g2l_patches", 2, second, patches, start),
        refined("l2g_patches", "g2l_patches", patches),
    ]
    if recipe.parts:
        parts = (("path_g", "global_parts"),)
        extra += [
            Run("global_parts", 1, round(recipe.parts * first), data="parts"),
            Run("g2l_parts", 2, round(recipe.parts * second), starts=parts, data="parts"),
            Run("l2g_parts", 3, round(recipe.parts * third), starts=(*parts, ("path_g2l", "g2l_parts")), data="parts"),
        ]
    if recipe.reasons:
        extra += [
            Run("unet_slow", 0, second, ("--model=unet",), rate=RATES[2]),
            Run("g2l_longer", 2, second + third, (), start),
        ]
    return [*runs, *(replace(run, extra=True) for run in extra)]
