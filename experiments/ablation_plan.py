"""What `experiments.ablation` trains: the recipe, the budgets of each data set, the runs, and the rows of the table.

Everything that a trial may change stands here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

ENSEMBLE, LOCAL, GLOBAL = "ensemble", "local", "global"

COMMON = (
    "--backbone=timm/tf_efficientnet_lite0",
    "--normalize=half",
    "--min_overlap=0",
    "--sub_batch_size=16",
    "--loss=ce",
    "--loss_size=full",
    "--ema=0.98",
)
"""Arguments of every training, of GLNet and of the others: one encoder, optimizer, schedule, augmentation and loss."""

NETWORK = ("--pyramid_norm=batch", "--pyramid_width=64", "--start=previous")
"""Arguments of GLNet by the recipe; the released start and pyramid go without."""

REGULARISER, NO_REGULARISER = "--lamb_fmreg=0.01", "--lamb_fmreg=0"
"""Weights of the regulariser. With batch normalisation maps are of unit size, so that the released 0.15 outweighs all
other terms."""

RATES = {
    **dict.fromkeys(("global", "released_global"), 5e-4),
    **dict.fromkeys(("local", "g2l", "l2g", "unet", "deeplab", "released_g2l"), 1e-3),
}
"""Learning rate by family of runs, each found by the same number of trials."""


@dataclass(frozen=True)
class Recipe:
    """One data set: its folds, and how long everything is trained on it.

    Attributes:
        folds: how many; each has a seed of its own, its number.
        arguments: of training and, of other networks than GLNet, also of evaluation.
        epochs: of stage 1; of everything that is trained on patches; of stage 3.
        images: in a step, in the same order.
        patches: of each image in a step.
        ensemble_patches: the same of stage 3, whose ensemble alone reads them; None is `patches`.
        windows: further arguments of training.
        on_patches: the same of everything but stages 1 and 3.
        evaluation: further arguments of evaluation.
        patch: side of a patch, in pixels.
        sides: other sides of patches, for the gain of sharing over the side.
        context: the classes, by the beginning of their names, that only context tells.
        own_look: the classes that are told by their own look.
        grouped: whether an id is `GROUP_NUMBER`, as pages of a book are; else each image is a group of its own.
    """

    folds: int
    epochs: tuple[int, int, int]
    images: tuple[int, int, int]
    patches: int
    arguments: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    on_patches: tuple[str, ...] = ()
    ensemble_patches: int | None = None
    evaluation: tuple[str, ...] = ()
    patch: int = 128
    sides: tuple[int, ...] = ()
    context: tuple[str, ...] = ()
    own_look: tuple[str, ...] = ()
    grouped: bool = False

    def group(self, id_: str) -> str:
        """Return what an image belongs to: its book, or itself."""
        return id_.rpartition("_")[0] if self.grouped else id_


RECIPES = {
    "pages": Recipe(
        folds=4,
        epochs=(20, 36, 2),
        images=(8, 6, 2),
        patches=2,
        ensemble_patches=12,
        on_patches=("--sub_batches=step",),
        arguments=("--size_g=256", "--turns=none", "--class_weights", "0.7", "0.8", "3", "6", "5", "3"),
        sides=(64, 256, 512),
        context=("title", "margin", "head"),
        own_look=("ornament",),
        grouped=True,
    ),
    "dubai": Recipe(
        folds=3,
        epochs=(16, 10, 5),
        images=(2, 2, 2),
        patches=9,
        arguments=("--size_g=96", "--class_weights", "3", "0.5", "2", "2.5", "0.7"),
        windows=("--window=384", "--windows=16"),
        # scenes of 490 to 640 pixels are shrunk as much as windows are: to a quarter
        evaluation=("--size_g=144",),
    ),
    "synthetic": Recipe(
        folds=3,
        epochs=(24, 12, 6),
        images=(2, 2, 2),
        patches=9,
        arguments=("--size_g=96",),
        context=("agriculture", "rangeland"),
        own_look=("urban",),
    ),
}
"""By `--data`."""


@dataclass(frozen=True)
class Run:
    """One training and its evaluations.

    Attributes:
        name: of its files, without the fold.
        mode: of GLNet; 0 is a network of `experiments.baselines`.
        phase: index into `Recipe.epochs` and `Recipe.images`: 0 shrunk images, 1 patches, 2 stage 3.
        family: key of `RATES`.
        options: further arguments of training; of mode 0 also of evaluation.
        starts: by option, the name of the run whose checkpoint it reads.
        side: of its patches; 0 is `Recipe.patch`.
        evaluations: by name, further arguments.
        released: whether it goes without `NETWORK`.
        extra: whether it is trained after the others, of all folds.
    """

    name: str
    mode: int
    phase: int
    family: str
    options: tuple[str, ...] = ()
    starts: tuple[tuple[str, str], ...] = ()
    side: int = 0
    evaluations: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"own": ()})
    released: bool = False
    extra: bool = False


class Cost(NamedTuple):
    """How a run reads its images, in equal steps for every side of patches: `patches` of each of `images` in a step."""

    epochs: int
    images: int
    patches: int


def cost(recipe: Recipe, run: Run) -> Cost:
    """Return what a run reads. Patches of another side are as many fewer, or images, as each has more pixels."""
    epochs, images = recipe.epochs[run.phase], recipe.images[run.phase]
    own = recipe.ensemble_patches if run.phase == 2 and recipe.ensemble_patches else recipe.patches
    patches = own * (recipe.patch / (run.side or recipe.patch)) ** 2
    if patches < 1:  # fewer images a step, and fewer epochs, so that there are as many steps
        fewer = max(1, round(images * patches))
        return Cost(max(1, round(epochs * fewer / images)), fewer, 1)
    return Cost(epochs, images, round(patches))


@dataclass(frozen=True)
class Variant:
    """A row of the table: one prediction of one evaluation of a run.

    `key` names it in result files; figures of all variants show those that are `drawn`.
    """

    key: str
    title: str
    run: str
    prediction: str
    evaluation: str = "own"
    drawn: bool = True


def plan(recipe: Recipe) -> list[Run]:
    """Return all runs of one fold, in an order in which each follows those that it starts from."""
    start = (("path_g", "global"),)
    shared = {"own": (), "other": ("--share=other",), "blank": ("--share=blank",)}
    fused = {"fused": ("--late_fusion",)}  # the ensemble's place is taken; the other predictions are their own
    alone = ("--share=none", NO_REGULARISER)
    unet = ("--model=unet",)
    runs = [
        Run("global", 1, 0, "global"),
        Run("local", 2, 1, "local", alone, start, evaluations=fused),
        Run("g2l", 2, 1, "g2l", (REGULARISER,), start, evaluations=shared),
        Run("unet", 0, 1, "unet", unet),
        Run("deeplab", 0, 1, "deeplab", ("--model=deeplab",)),
        Run("unet_long", 0, 1, "unet", unet, side=2 * recipe.patch),
        Run("unet_scores", 0, 1, "unet", unet, (("scores_of", "global"),)),
        Run("l2g", 3, 2, "l2g", (), (*start, ("path_g2l", "g2l"))),
    ]
    extra = [
        Run("g2l_free", 2, 1, "g2l", (NO_REGULARISER,), start),
        Run("l2g_free", 3, 2, "l2g", (), (*start, ("path_g2l", "g2l_free"))),
        Run("released_global", 1, 0, "released_global", released=True),
        Run("released_g2l", 2, 1, "released_g2l", (), (("path_g", "released_global"),), released=True),
        *(
            Run(f"{name}_{side}", 2, 1, name, options, start, side)
            for side in recipe.sides
            for name, options in (("g2l", (REGULARISER,)), ("local", alone))
        ),
    ]
    return [*runs, *(replace(run, extra=True) for run in extra)]


def variants(recipe: Recipe) -> list[Variant]:
    """Return the rows of the table."""
    long = 2 * recipe.patch
    return [
        Variant("global", "global alone", "global", GLOBAL),
        Variant("local", "local alone", "local", LOCAL, "fused"),
        Variant("fused", "late fusion of both", "local", ENSEMBLE, "fused"),
        Variant("g2l", "global to local (stage 2)", "g2l", ENSEMBLE),
        Variant("g2l_local", "stage 2, its local branch", "g2l", LOCAL, drawn=False),
        Variant("g2l_other", "stage 2, another image's maps", "g2l", ENSEMBLE, "other"),
        Variant("g2l_blank", "stage 2, a blank image's maps", "g2l", ENSEMBLE, "blank", drawn=False),
        Variant("g2l_free", "stage 2, no regulariser", "g2l_free", ENSEMBLE),
        Variant("l2g", "both directions (stage 3)", "l2g", ENSEMBLE),
        Variant("l2g_free", "stage 3, no regulariser", "l2g_free", ENSEMBLE),
        Variant("unet", "U-Net", "unet", GLOBAL),
        Variant("deeplab", "DeepLabV3+", "deeplab", GLOBAL),
        Variant("unet_long", f"U-Net, patches of {long}", "unet_long", GLOBAL),
        Variant("unet_scores", "U-Net with scores of global alone", "unet_scores", GLOBAL),
        Variant("released_global", "global alone, released pyramid", "released_global", GLOBAL, drawn=False),
        Variant("released_g2l", "stage 2, released start and pyramid", "released_g2l", ENSEMBLE),
        *(
            Variant(f"{name}_{side}", f"{title}, patches of {side}", f"{name}_{side}", prediction, drawn=False)
            for side in recipe.sides
            for name, title, prediction in (("local", "local alone", LOCAL), ("g2l", "stage 2", ENSEMBLE))
        ),
    ]


OTHERS = "local fused global unet deeplab unet_long unet_scores g2l_other g2l_blank g2l_free released_g2l"
OF_STAGE_3 = "g2l local fused global unet deeplab l2g_free"
DIFFERENCES = tuple(
    (variant, other) for variant, others in (("g2l", OTHERS), ("l2g", OF_STAGE_3)) for other in others.split()
)
"""Keys of the variants whose scores are compared image by image: the first minus the second."""
