"""The header of a checkpoint: the record of its network."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from models.backbone import NAME
from utils.classes import Classes
from utils.errors import InputError
from utils.metrics import MEASURES
from utils.selection import BOX_MARGIN, BOX_RECALL, MOST_MARGIN, CoarseToFine, PatchSelection, UncertainPatches
from utils.settings import LONGEST_SIDE, MOST_CLASSES, STATISTICS, Settings
from utils.stages import STAGES
from utils.stretch import Stretch, parse_bands


@dataclass(frozen=True)
class Header:
    """The record of a network that its evaluation needs. Entries with a default are missing in older files.

    Attributes:
        stage: that trained it last, 1, 2 or 3; or, in an evaluation, the mode.
        classes: of its predictions.
        backbone, size_g, size_p, min_overlap, normalize, coarse_to_fine, box_margin, bands, stretch: the options of
            these names; see `utils.settings.RECORDED`.
    """

    stage: int
    backbone: str
    classes: Classes
    size_g: int
    size_p: int
    min_overlap: int
    normalize: str
    coarse_to_fine: bool = False
    box_margin: float = BOX_MARGIN
    bands: str | None = None
    stretch: str = "2%,98%"

    def settings(self, *, box_recall: float = BOX_RECALL, refine_share: float = 1.0, **more: Any) -> Settings:
        """Return the settings of this network.

        Args:
            box_recall: see `CoarseToFine`; used in training only.
            refine_share: see `UncertainPatches`; not used in training.
            more: the settings that a file does not record.

        Raises:
            InputError: the network is coarse to fine, but its classes are not two, one of them foreground; or patches
                would be selected twice, or in mode 1, which has none.
        """
        selection: PatchSelection | None = None
        if self.coarse_to_fine:
            selection = CoarseToFine.of(self.classes, self.box_margin, box_recall)
        if refine_share < 1:
            if self.stage == 1 or selection is not None:
                reason = "mode 1 has no patches" if self.stage == 1 else "--coarse_to_fine selects patches already"
                raise InputError(f"--refine_share {refine_share:g} cannot be used: {reason}; leave it out")
            selection = UncertainPatches(refine_share)
        return Settings(
            size_p=self.size_p,
            min_overlap=self.min_overlap,
            normalize=self.normalize,
            selection=selection,
            **more,
        )

    def to_record(self) -> dict[str, Any]:
        """Return plain values, for a file."""
        return {**asdict(self), "classes": self.classes.to_record()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Header":
        """Return the header that `to_record` recorded. Raises ValueError or TypeError if no run can have written it."""
        header = cls(**{**record, "classes": Classes.from_record(record["classes"])})
        if header.stage not in STAGES or not NAME.fullmatch(header.backbone) or header.normalize not in STATISTICS:
            raise ValueError(f"stage {header.stage}, backbone {header.backbone}, normalize {header.normalize}")
        for name in ("size_g", "size_p", "min_overlap"):
            if not (isinstance(getattr(header, name), int) and 0 <= getattr(header, name) <= LONGEST_SIDE):
                raise ValueError(f"{name} {getattr(header, name)}")
        if not isinstance(header.coarse_to_fine, bool) or not 0 <= header.box_margin <= MOST_MARGIN:
            raise ValueError(f"coarse_to_fine {header.coarse_to_fine}, box_margin {header.box_margin}")
        if header.bands is not None:
            parse_bands(header.bands)
        Stretch.parse(header.stretch)
        _check_classes(header.classes)
        return header


def _check_classes(classes: Classes) -> None:
    """Raise ValueError for classes that no run can have written."""
    named = all(isinstance(name, str) for name in classes.names)
    if not (1 <= len(classes) <= MOST_CLASSES and len(classes.palette) == len(classes) and named):
        raise ValueError(f"{len(classes)} classes with {len(classes.palette)} colours")
    if not {*classes.left_out, *classes.foreground} <= {*range(len(classes))}:
        raise ValueError(f"left_out {classes.left_out} or foreground {classes.foreground} is no class")
    if len(classes.values) != len(classes) or not set(classes.measures) <= set(MEASURES):
        raise ValueError(f"{len(classes.values)} values, measures {classes.measures}")
