"""Reads every file of a data set once, so that all that is wrong is known before a long run meets it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from dataset.base import SegmentationDataset
from dataset.loader import ErrorsAsValues, prepare_worker, start_pass
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


class _Result(NamedTuple):
    """What reading one item gave: counts of its label's ids (256,), what was done to it, and what is wrong with it."""

    split: str
    counts: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def _check(split: str, data: SegmentationDataset, index: int) -> _Result:
    """Return the result of an item of a split."""
    item, reader = data.items[index], data.reader
    counts, problems = np.zeros(256, np.int64), {}

    def note(error: InputError) -> None:
        problems[str(error)] = Problem(split, error.kind or "no class", str(error))

    # the parts of a scene one by one, so that all that are wrong are named
    for pair in item.pairs():
        try:
            with reading(pair.image):
                _, ids = reader.read_files(pair)
            if ids is not None:
                counts += np.bincount(ids.flatten(), minlength=256)
        except InputError as error:
            note(error)
    try:
        reader.whole(item)
        notes = tuple(reader.notes(item))
    except InputError as error:
        note(error)
        notes = ()
    return _Result(split, counts if item.label is not None else None, notes, tuple(problems.values()))


def check(splits: Mapping[str, SegmentationDataset], num_workers: int) -> Report:
    """Read every image and label of `splits`, which have the same classes, once, by `num_workers` processes."""
    names = next(iter(splits.values())).classes.names if splits else ()
    report = Report(names, dict.fromkeys(splits, 0))
    if not splits:
        return report
    every: ConcatDataset[Any] = ConcatDataset(
        [ErrorsAsValues(partial(_check, split, data), len(data)) for split, data in splits.items()]
    )
    loader = DataLoader(every, batch_size=None, num_workers=num_workers, worker_init_fn=prepare_worker)
    bar = tqdm(start_pass(loader), total=len(every), desc="check", unit="image", dynamic_ncols=True)
    for split, counts, notes, problems in bar:
        report.images[split] += 1
        report.notes.update(notes)
        if counts is not None:
            report.counts += np.asarray(counts)
        report.problems += problems
    return report
