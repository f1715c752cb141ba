"""Reads every file of a data set once, so that all that is wrong is known before a long run meets it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from dataset.base import SegmentationDataset
from dataset.loader import read_each
from imaging.failures import reading
from utils.classes import IGNORED
from utils.errors import InputError


@dataclass(frozen=True)
class Problem:
    """One file, or pair of files, that cannot be used."""

    split: str
    kind: str
    message: str


@dataclass
class Report:
    """What a check found: `images` read in each split, `counts` of label ids (256,), `problems` in order."""

    names: tuple[str, ...]
    images: dict[str, int]
    counts: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    """What is done to images before they are used, and to how many."""

    def text(self, more: Sequence[Problem] = ()) -> str:
        """All problems, `more` first, then how many of each kind, then how frequent the classes are."""
        problems = [*more, *self.problems]
        lines = [f"{problem.split}: {problem.message}" for problem in problems]
        lines.append(f"Read: {', '.join(f'{count} of {split}' for split, count in self.images.items()) or 'nothing'}")
        kinds = Counter((problem.split, problem.kind or "other") for problem in problems)
        lines += [f"Wrong: {count} of {split}: {kind}" for (split, kind), count in sorted(kinds.items())]
        lines += [f"{note}: {count} images" for note, count in sorted(self.notes.items())]
        labelled = self.counts[: len(self.names)]
        total = max(1, int(labelled.sum()))
        width = max(map(len, self.names), default=0)
        lines += ["Class frequencies, in per cent of the labelled pixels:"] if labelled.any() else []
        for name, count in zip(self.names, labelled.tolist(), strict=True) if labelled.any() else ():
            lines.append(f"  {name:<{width}} {100 * count / total:6.2f}" + ("" if count else "  never occurs"))
        if self.counts[IGNORED]:
            lines.append(f"Left out: {100 * self.counts[IGNORED] / self.counts.sum():.2f} per cent of all pixels")
        return "\n".join(lines)


def _check(splits: Mapping[str, SegmentationDataset], key: tuple[str, int]) -> Report:
    """Return the report of one item, of a split and an index."""
    split, index = key
    item, reader = splits[split].items[index], splits[split].reader
    found = Report((), {split: 1})
    problems: dict[str, Problem] = {}

    def note(error: InputError) -> None:
        problems[str(error)] = Problem(split, error.kind or "no class", str(error))

    # the parts of a scene one by one, so that all that are wrong are named
    for pair in item.pairs():
        try:
            with reading(pair.image):
                _, ids = reader.read_files(pair)
            if ids is not None:
                found.counts += np.bincount(ids.flatten(), minlength=256)
        except InputError as error:
            note(error)
    try:
        reader.whole(item)
        found.notes.update(reader.notes(item))
    except InputError as error:
        note(error)
    found.problems += problems.values()
    return found


def check(splits: Mapping[str, SegmentationDataset], num_workers: int) -> Report:
    """Read every image and label of `splits`, which have the same classes, once, by `num_workers` processes."""
    names = next(iter(splits.values())).classes.names if splits else ()
    report = Report(names, dict.fromkeys(splits, 0))
    keys = [(split, index) for split, data in splits.items() for index in range(len(data))]
    for found in read_each(partial(_check, splits), keys, num_workers, "check", quiet=not keys):
        for split, count in found.images.items():
            report.images[split] += count
        report.notes.update(found.notes)
        report.counts += found.counts
        report.problems += found.problems
    return report
