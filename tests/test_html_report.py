"""The report of an evaluation: its numbers, its pictures, its size, and that a browser opens it without complaint."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from builders import build_sample
from PIL import Image

import train_deep_globe
from evaluation.html_report import MOST_IN_MATRIX, NAME, Report, joined_classes, write_report
from evaluation.report import evaluation_record, per_cent
from evaluation.report_images import LONGEST_SIDE, MOST_BYTES, RIGHT, SHOWN, WRONG, ReportImages, own_mean_iou
from utils.canvas import ArgmaxSink
from utils.classes import IGNORED, Classes
from utils.distributed import ALONE, Ranks
from utils.metrics import StageMetrics
from utils.stages import STAGES
from utils.tiling import Size
from utils.visualize import NO_CLASS

VOID = {"meta", "link", "img", "br", "input"}
LIMIT = 5_000_000
CLASSES = Classes.generic(5)
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """What an HTML page holds; its tags must close in order, and have each attribute once."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.links: list[str] = []
        self.pictures: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        assert len(values) == len(attributes), f"attribute twice in {tag}"
        self.links += [str(values[name]) for name in ("src", "href", "action", "data", "srcset") if name in values]
        if tag == "img" and values.get("src"):
            self.pictures[str(values["alt"])] = str(values["src"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and {"td", "th"} & {*self.open_tags}:
            self.rows[-1][-1] += ("|" if self.open_tags[-1] == "small" else "") + data

    def cells(self, first: str) -> list[list[str]]:
        return [row[1:] for row in self.rows if row and row[0] == first]


def decode(source: str) -> Image.Image:
    head, _, content = source.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image


def build_report(folder: Path, sizes: list[Size], classes: Classes = CLASSES, labelled: bool = True) -> Path:
    """Write the report of images of noise, predicted by noise; each has more errors than the one before."""
    stage, count = STAGES[3], len(sizes)
    metrics, images = StageMetrics(stage, classes), ReportImages(classes, "ensemble", labelled, count, ALONE)
    for k, size in enumerate(sizes):
        rng = np.random.default_rng(k)
        label, noise = torch.from_numpy(rng.integers(0, len(classes), (2, *size), np.uint8))
        ids = torch.where(torch.from_numpy(rng.random(size) < (k + 1) / count / 2), noise, label)
        label[:3], ids[:3] = IGNORED, 0
        sample = build_sample(size, k, f"image <{k}> & {'long' * 30}")._replace(label=label if labelled else None)
        sinks = {name: ArgmaxSink(size) for name in stage.predictions}
        for sink in sinks.values():
            sink.ids = ids
        if labelled:
            metrics.update(label, sinks)
        images.add(sample, dict.fromkeys(stage.predictions, ids))
    images.gather(ALONE)
    record = evaluation_record(3, classes, metrics.matrices, images=count, seconds_per_image=1.25, peak_memory_mb=100.0)
    counts = metrics.matrices["ensemble"].counts.numpy() if labelled else None
    run = {"checkpoint": "a&b.pth", "options": {"lr": 0.1, "nothing": None}}
    about = {"title": "a <name>", "data": "made-up", "stage": stage, "classes": classes, "run": run}
    return write_report(folder, Report(**about, record=record, counts=counts, images=images))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 23 images of noise, whose pictures no format shrinks."""
    sizes = [(700, 900), *[(660, 660)] * 2, *[(200, 200)] * 17, (50, 300), (2000, 90), (64, 64)]
    return build_report(tmp_path_factory.mktemp("noise"), sizes)


def evaluation(folders: runs.Folders, mode: int, *more: str) -> list[str]:
    reads = f"--{STAGES[mode].reads}={runs.NAMES[mode]}.pth"
    return [*folders.arguments(mode, "--evaluation", reads), "--task_name=eval", *more]


def test_the_numbers_are_those_of_the_json_and_the_pictures_show_errors(reference, tmp_path) -> None:
    folders = reference.folders.beside(tmp_path)
    for mode, stage in STAGES.items():
        arguments = evaluation(folders, mode, "--tta=flip", f"--report={tmp_path / 'report'}")
        assert train_deep_globe.main(arguments) == 0
        record = json.loads((folders.logs / "eval.json").read_text())
        used = {"checkpoint": f"{runs.NAMES[mode]}.pth", "tta": "flip", "precision": "fp32", "size_p": 64}
        assert used.items() <= record.items()
        page = Page(tmp_path / "report" / NAME)
        for k, name in enumerate(record["classes"]):
            expected = [record["share"][k], *(record[one]["iou"][k] for one in stage.predictions)]
            assert [per_cent(value) for value in expected] in page.cells(name)
        means = [per_cent(record[one]["mIoU"]) for one in stage.predictions]
        assert page.cells("mIoU (without unknown)") == [["", *means]]
        matrix = [row for name in record["classes"] for row in page.cells(name) if "|" in row[0]]
        counts = np.array([[int(cell.split("|")[1].replace(",", "")) for cell in row[:-1]] for row in matrix])
        np.testing.assert_allclose(counts.sum(1) / counts.sum(), record["share"])
        hit, union = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
        iou = [h / u if u else None for h, u in zip(hit, union, strict=True)]
        assert iou == pytest.approx(record[stage.headline]["iou"])
        ids = {path.name.removesuffix("_sat.jpg") for path in (folders.data / "crossvali" / "Sat").iterdir()}
        kinds = {"image", "label", "errors", *stage.predictions}
        assert set(page.pictures) == {f"{kind} of {id_}" for id_ in ids for kind in kinds}
        costs = f"{record['seconds_per_image']:.3f}", f"{record['peak_memory_mb']:.0f} MB"
        for told in (*costs, runs.NAMES[mode] + ".pth", "torchvision", "size_p 64", "crossvali"):
            assert told in page.text
        for id_ in ids:
            sources = (page.pictures[f"{kind} of {id_}"] for kind in ("errors", "label", stage.headline))
            errors, label, found = (np.asarray(decode(source).convert("RGB")) for source in sources)
            wrong = (label != found).any(2)
            assert (errors[wrong] == WRONG).all() and (errors[~wrong] == RIGHT).all()


def test_several_processes_write_the_report_of_one(reference, tmp_path) -> None:
    alone, together = (reference.folders.beside(tmp_path / name) for name in ("alone", "together"))
    for folders, world in ((alone, 1), (together, 2)):
        arguments = evaluation(folders, 1, f"--report={folders.root / 'report'}", "--device=cpu")
        results = runs.Run(arguments, folders.root / "out", world).start().wait()
        assert [result.code for result in results] == [0] * world, [result.output for result in results]
    pages = [Page(folders.root / "report" / NAME) for folders in (alone, together)]
    assert pages[0].pictures == pages[1].pictures and "mIoU" in pages[0].text
    assert not [path for path in (together.root / "report").iterdir() if path.name != NAME]


def test_the_best_and_the_worst_images_are_shown_by_their_own_scores_and_no_others_are_kept(noise) -> None:
    page = Page(noise)
    order = [int(number) for number in re.findall(r"image of image <(\d+)>", "\n".join(page.pictures))]
    assert order == [*range(SHOWN), *range(22, 22 - SHOWN, -1)]
    assert "The best 10 of 23 images" in page.text and "a <name>" in page.text
    (source,) = (source for name, source in page.pictures.items() if name.startswith("errors of image <22>"))
    errors = np.asarray(decode(source).convert("RGB"))
    assert (errors[:3] == NO_CLASS).all()  # pixels that do not count
    assert {*map(tuple, errors[3:].reshape(-1, 3).tolist())} == {RIGHT, WRONG}
    images = ReportImages(CLASSES, "global", True, 60, Ranks())  # of one of several processes
    for k in range(60):
        sample = build_sample((64, 64), k, str(k))
        images.add(sample, {"global": sample.label.clone().clamp(max=4)})
        assert len(images.kept) <= 2 * SHOWN and all(image.pictures for image in images.kept)
    assert len(images.ranking) == 60


def test_a_report_stays_below_its_bound_has_small_pictures_and_needs_no_other_file(noise) -> None:
    text, page = noise.read_text(encoding="utf-8"), Page(noise)
    assert noise.stat().st_size < LIMIT
    sizes = {name: decode(source).size for name, source in page.pictures.items()}
    assert all(max(size) <= LONGEST_SIDE for size in sizes.values())
    assert (300, 50) in sizes.values()  # smaller images are not enlarged
    total: Counter[str] = Counter()
    for name, source in page.pictures.items():
        id_ = name.partition(" of ")[2]
        assert sizes[name] == sizes[f"image of {id_}"]
        total[id_] += len(base64.b64decode(source.partition(",")[2]))
    assert max(total.values()) <= MOST_BYTES
    assert all(link.startswith("data:") for link in page.links)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|XMLHttpRequest|\bimport\b", text)


def test_a_split_without_labels_has_pictures_and_no_scores(tmp_path) -> None:
    page = Page(build_report(tmp_path, [(64, 80)] * 24, labelled=False))
    assert "The split has no labels, so there are no scores" in page.text
    assert "mIoU" not in page.text and "Confusion matrix" not in page.text
    assert len(page.pictures) == 2 * SHOWN * 4
    assert {name.partition(" of ")[0] for name in page.pictures} == {"image", "global", "local", "ensemble"}


def test_unlabelled_splits_are_reported_by_the_command(reference, tmp_path) -> None:
    folders = reference.folders.beside(tmp_path)
    folders.data = shutil.copytree(folders.data, tmp_path / "data")
    shutil.copytree(folders.data / "crossvali" / "Sat", folders.data / "offical_crossvali" / "Sat")
    more = ["--split=offical_crossvali", f"--report={tmp_path / 'report'}"]
    assert train_deep_globe.main(evaluation(folders, 1, *more)) == 0
    assert "has no labels" in Page(tmp_path / "report" / NAME).text
    assert not (folders.logs / "eval.json").exists()


@pytest.mark.parametrize("count", [1, 2, 60, 255])
def test_any_number_of_classes_with_long_names_is_shown(tmp_path, count) -> None:
    generic = Classes.generic(count)
    names = tuple(f"{'very' * 12} long <b>name</b> {k}" for k in range(count))
    path = build_report(tmp_path, [(70, 64)], Classes(names, generic.palette))
    assert path.stat().st_size < LIMIT
    page = Page(path)
    assert all(page.cells(name) for name in names)
    shown = [row for row in page.rows if len(row) > 1 and "|" in row[1]]
    assert len(shown) == min(count, MOST_IN_MATRIX)  # the others are joined, which keeps every pixel
    counts = np.random.default_rng(0).integers(0, 100, (40, 40))
    names, joined = joined_classes([str(k) for k in range(40)], counts)
    assert names[-1] == f"{41 - MOST_IN_MATRIX} others"
    assert joined.sum() == counts.sum()
    first, second = (int(name) for name in names[:2])
    assert joined[0, 1] == counts[first, second]


def test_an_image_s_own_score_is_of_the_classes_that_occur() -> None:
    for counts, left_out, expected in (
        ([[9, 0, 0], [0, 3, 1], [0, 0, 0]], (0,), (3 / 4 + 0) / 2),  # class 2 is predicted only
        ([[9, 0, 0], [0, 4, 0], [0, 0, 0]], (0,), 1.0),  # class 2 does not occur
        ([[9, 0, 0], [0, 0, 0], [0, 0, 0]], (0,), None),
        ([[3, 1, 0], [0, 0, 0], [0, 0, 0]], (), (3 / 4 + 0) / 2),
    ):
        assert own_mean_iou(np.array(counts), left_out) == (None if expected is None else pytest.approx(expected))


CLICK = """<script>
addEventListener("load", function () {
  document.querySelectorAll("figure button")[2].click();
  document.querySelector("[data-do=in]").click();
  console.assert(document.querySelector("dialog").open, "the picture did not open");
  document.querySelector("dialog").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  document.documentElement.dataset.shown = document.querySelector(".kinds [aria-pressed=true]").textContent;
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_opens_the_report_and_enlarges_a_picture_without_an_error(noise, tmp_path) -> None:
    page = tmp_path / "page.html"
    page.write_text(noise.read_text(encoding="utf-8").replace("</body>", CLICK), encoding="utf-8")
    quiet = "--disable-gpu --disable-quic --disable-sync --disable-background-networking --disable-component-update"
    flags = f"--headless --no-sandbox --no-first-run --disable-dev-shm-usage {quiet}".split()
    flags += ["--enable-logging=stderr", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([str(CHROMIUM), *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 'data-ready="yes"' in done.stdout and 'data-shown="local"' in done.stdout
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
