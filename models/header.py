"""The header of a checkpoint: the record of its network."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from models.backbone import NAME, side_multiple
from models.fpn import MOST_WIDTH, NORMS
from utils.classes import Classes
from utils.errors import InputError
from utils.metrics import MEASURES
from utils.selection import MOST_MARGIN, CoarseToFine, UncertainPatches
from utils.settings import (
    CONTEXTS,
    DATA,
    LONGEST_SIDE,
    MOST_CLASSES,
    NORMALIZATIONS,
    RECORDED,
    STATISTICS,
    TRAINED_SHARES,
    VIEW_PIXELS,
    ContextScale,
    Recorded,
    Settings,
    Statistics,
    TrainingSettings,
    ViewScale,
)
from utils.stages import STAGES
from utils.stretch import RGB, Stretch, count_bands

HASH = 16
"""Hexadecimal digits of the hash of an image."""


@dataclass(frozen=True)
class TrainedOn:
    """The images that a network was trained on, and how they were chosen: by the options of the last stage."""

    dataset: str
    split_lists: str | None = None
    split_seed: int | None = None  # of files of earlier versions, which could split data sets by another seed
    hold_out: str | None = None
    images: str = ""  # the hashes of all stages' training images, sorted, of `HASH` digits each, joined

    def __str__(self) -> str:
        chosen = {name: value for name, value in self.choice.items() if value is not None}
        return ", ".join([self.dataset, *(f"{k} {v}" for k, v in chosen.items()), f"{len(self.hashes())} images"])

    @property
    def choice(self) -> dict[str, Any]:
        """The options that chose the split, by name."""
        return {"split_lists": self.split_lists, "split_seed": self.split_seed, "hold_out": self.hold_out}

    def hashes(self) -> set[str]:
        """Return the hash of each image."""
        return {self.images[i : i + HASH] for i in range(0, len(self.images), HASH)}

    def count(self, hashes: Iterable[str]) -> int:
        """Return how many of some images are among these."""
        known = self.hashes()
        return sum(one in known for one in hashes)

    @classmethod
    def from_record(cls, record: Any) -> "TrainedOn":
        """Return what `asdict` recorded. Raises ValueError or TypeError if no training can have written it."""
        found = cls(**record)
        texts = (found.dataset, found.images, found.split_lists or "", found.hold_out or "")
        if not all(isinstance(text, str) for text in texts) or not isinstance(found.split_seed, int | None):
            raise ValueError(f"trained_on {found.choice}")
        if len(found.images) % HASH or not re.fullmatch("[0-9a-f]*", found.images):
            raise ValueError("trained_on has no hashes")
        return found


@dataclass(frozen=True, kw_only=True)
class Header(Recorded):
    """The record of a network that its evaluation needs, its recorded options among it.

    `scale` is how many pixels of an image become one of its shrunk image: of training windows, with `--window`, or by
    `context`; None if images are shrunk to `size_g` x `size_g`.
    """

    stage: int  # that trained it last, 1, 2 or 3; or, in an evaluation, the mode
    classes: Classes
    backbone_weights: str = "imagenet"  # what the backbones start from; stage 2 starts `local` from it
    statistics: Statistics | None = None  # of the training images, with `--normalize data`
    trained_on: TrainedOn | None = None
    scale: float | None = None

    @property
    def n_bands(self) -> int:
        """The number of bands that the network reads."""
        return count_bands(self.bands)

    def context_scale(self, view_pixels: int | None = None) -> ContextScale | None:
        """Return how far images are shrunk, None if all are shrunk to `size_g` x `size_g`.

        `view_pixels` is the option of this name. Raises InputError if it does not fit `context`, or training recorded
        no factor, which `--context scale` needs.
        """
        if self.context == "square":
            if view_pixels is not None:
                raise InputError(f"--view_pixels {view_pixels} goes with --context scale; give both, or none")
            return None if self.scale is None else ContextScale(self.size_g, self.scale, side_multiple(self.backbone))
        if self.scale is None:
            raise InputError(
                "--context scale needs the factor by which images were shrunk in training, and the checkpoint records "
                "none; train with --context scale, or --window, or give --context square"
            )
        return ViewScale(
            self.size_g, self.scale, side_multiple(self.backbone), VIEW_PIXELS if view_pixels is None else view_pixels
        )

    def scale_for(self, context: str, size_g: int | None) -> float | None:
        """Return `scale` for another `context` or `size_g`, None if this one's stays.

        The view of `--context scale` grows with `size_g`. Squares have the side that is given, and else follow windows
        of training; where training had `--context scale`, they have the side `self.size_g`.
        """
        if context == "square":
            return self.scale if size_g is None and self.context == "square" else None
        if self.scale is None or size_g is None or size_g == self.size_g:
            return self.scale
        return self.scale * self.size_g / size_g

    def normalization(self) -> Statistics | None:
        """Return what pixel values are normalised by, None if they stay in [0, 1].

        Raises InputError if `normalize` does not fit the bands, or needs statistics that no training has recorded.
        """
        if self.normalize == DATA:
            if self.statistics is None:
                raise InputError(
                    f"--normalize {DATA} needs the statistics that stage 1 records when it is trained with --normalize "
                    f"{DATA}; give {', '.join(STATISTICS)}, or leave it out"
                )
            return self.statistics
        if self.normalize == "imagenet" and self.n_bands != RGB:
            raise InputError(
                f"--normalize imagenet has the values of {RGB} bands, but the network reads {self.n_bands}; give "
                f"{DATA}, half or none"
            )
        return None if self.normalize == "none" else STATISTICS[self.normalize]

    def settings(self, *, refine_share: float = 1.0, blend: str = "none", **more: Any) -> Settings:
        """Return the settings of inference with this network; `more` are those that a file does not record.

        Raises InputError, see `training_settings`; or if patches would be selected twice, by `refine_share` and coarse
        to fine, or selected or blended in mode 1, which has none.
        """
        if blend != "none" and self.stage == 1:
            raise InputError(f"--blend {blend} cannot be used: mode 1 has no patches; leave it out")
        recorded = self._recorded_settings()
        if refine_share < 1:
            if self.stage == 1 or recorded["selection"] is not None:
                reason = "mode 1 has no patches" if self.stage == 1 else "--coarse_to_fine selects patches already"
                raise InputError(f"--refine_share {refine_share:g} cannot be used: {reason}; leave it out")
            recorded["selection"] = UncertainPatches(refine_share)
        return Settings(**recorded, blend=blend, **more)

    def training_settings(self, **more: Any) -> TrainingSettings:
        """Return the settings of training this network; `more` are those that a file does not record.

        Raises InputError if the network is coarse to fine, but its classes are not two, one of them foreground, or
        `normalization` cannot be used.
        """
        return TrainingSettings(**self._recorded_settings(), **more)

    def _recorded_settings(self) -> dict[str, Any]:
        """Return the settings that follow from the header, by name."""
        return {
            "size_p": self.size_p,
            "min_overlap": self.min_overlap,
            "statistics": self.normalization(),
            "selection": CoarseToFine.of(self.classes, self.box_margin) if self.coarse_to_fine else None,
            "share_maps": self.share != "none",
        }

    def to_record(self) -> dict[str, Any]:
        """Return plain values, for a file."""
        return {**asdict(self), "classes": self.classes.to_record()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Header":
        """Return the header that `to_record` recorded. Raises ValueError or TypeError if no run can have written it."""
        values = {**record, "classes": Classes.from_record(record["classes"])}
        if "share_maps" in values:  # of older files
            values["share"] = {True: "own", False: "none"}.get(values.pop("share_maps"))
        if missing := {"stage", "size_g", "size_p", "min_overlap", "backbone", "normalize"} - values.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        header = cls(**values)
        for name, default in RECORDED.items():
            if default is not None and not isinstance(getattr(header, name), type(default)):
                raise ValueError(f"{name} {getattr(header, name)}")
        known_values = {"stage": STAGES, "normalize": NORMALIZATIONS, "share": TRAINED_SHARES, "pyramid_norm": NORMS}
        known_values["context"] = CONTEXTS
        for name, known in known_values.items():
            if getattr(header, name) not in known:
                raise ValueError(f"{name} {getattr(header, name)}")
        bounds: dict[str, tuple[float, float]] = dict.fromkeys(("size_g", "size_p", "min_overlap"), (0, LONGEST_SIDE))
        bounds |= {"box_margin": (0, MOST_MARGIN), "pyramid_width": (2, MOST_WIDTH)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(header, name) <= high:
                raise ValueError(f"{name} {getattr(header, name)}")
        if header.statistics is not None:
            header = replace(header, statistics=Statistics.from_record(header.statistics, header.n_bands))
        elif header.normalize == DATA:
            raise ValueError(f"normalize {DATA} without statistics")
        if header.trained_on is not None:
            header = replace(header, trained_on=TrainedOn.from_record(header.trained_on))
        if header.scale is not None and not 0 < header.scale <= LONGEST_SIDE:
            raise ValueError(f"scale {header.scale}")
        if header.scale is None and header.context == "scale":
            raise ValueError("context scale without a scale")
        if not NAME.fullmatch(header.backbone) or not isinstance(header.backbone_weights, str):
            raise ValueError(f"backbone {header.backbone}, backbone_weights {header.backbone_weights}")
        count_bands(header.bands)
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
