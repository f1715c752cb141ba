"""Sets of scanned pages: zones in ALTO and PAGE XML become known pixels, and what is wrong is refused by name."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.alto import draw_zone, main, split_books
from dataset.registry import describe
from dataset.zones import SEGMONTO, ZoneMapping
from utils.classes import IGNORED
from utils.errors import InputError

SIZE = 24, 16
"""(height, width) of the pages."""

Corners = Sequence[tuple[float, float]]
Zones = Sequence[tuple[str, Corners]]


def box(left: float, top: float, right: float, bottom: float) -> Corners:
    return (left, top), (right, top), (right, bottom), (left, bottom)


ZONES: Zones = (
    ("GraphicZone", box(3, 4, 6, 8)),  # before the zone below it
    ("MainZone#1", box(2, 3, 12, 20)),
    ("MarginTextZone:note#2", ((12, 5), (16, 5), (12, 9))),
    ("NumberingZone", box(13, 0, 15, 2)),
    ("StampZone", box(10, 18, 14, 22)),
)


def expected() -> np.ndarray:
    """The class ids of `ZONES`, by hand."""
    label = np.zeros(SIZE, np.uint8)
    label[3:20, 2:12] = 1
    for row, count in enumerate((3, 2, 1)):  # pixels whose centres are left of the slanting side
        label[5 + row, 12 : 12 + count] = 3
    label[0:2, 13:15] = 4
    label[4:8, 3:6] = 5
    label[18:22, 10:14] = IGNORED
    return label


def spell(corners: Corners, within: str) -> str:
    return " ".join(f"{x:g}{within}{y:g}" for x, y in corners)


def alto(zones=ZONES, version="4", picture="", size=SIZE, unit="pixel", boxes=False, comma=False, blocks="") -> str:
    """ALTO; with `boxes` zones of four corners have no polygon, and `blocks` is added as it is."""
    tags = "".join(f'<OtherTag ID="T{k}" LABEL="{label}"/>' for k, (label, _) in enumerate(zones))
    line = '<TextLine><Shape><Polygon POINTS="0 0 16 0 16 24"/></Shape></TextLine>'  # its polygon is no zone
    found = []
    for k, (_, corners) in enumerate(zones):
        (left, top), (right, bottom) = np.min(corners, axis=0), np.max(corners, axis=0)
        place = f'HPOS="{left:g}" VPOS="{top:g}" WIDTH="{right - left:g}" HEIGHT="{bottom - top:g}"'
        points = spell(corners, "," if comma else " ")
        shape = "" if boxes and len(corners) == 4 else f'<Shape><Polygon POINTS="{points}"/></Shape>'
        found.append(f'<TextBlock ID="z{k}" TAGREFS="T{k}" {place}>{shape}{line}</TextBlock>')
    page = "" if size is None else f'HEIGHT="{size[0]}" WIDTH="{size[1]}"'
    return (
        f'<?xml version="1.0"?><alto xmlns="http://www.loc.gov/standards/alto/ns-v{version}#"><Description>'
        f"<MeasurementUnit>{unit}</MeasurementUnit><sourceImageInformation><fileName>{picture}</fileName>"
        f"</sourceImageInformation></Description><Tags>{tags}</Tags><Layout><Page {page}><PrintSpace>"
        f"{''.join(found)}{blocks}</PrintSpace></Page></Layout></alto>"
    )


def page_xml(zones=ZONES, year="2019-07-15", picture="", typed="custom", points=True) -> str:
    """PAGE XML whose types stand in `custom` or `type`; without `points`, corners are elements as in 2010."""
    found = []
    for k, (label, corners) in enumerate(zones):
        custom = f"readingOrder {{index:{k};}} structure {{type:{label};}}"
        kind = f'custom="{custom}" type="paragraph"' if typed == "custom" else f'type="{label}"'
        elements = "".join(f'<Point x="{x:g}" y="{y:g}"/>' for x, y in corners)
        coords = f'<Coords points="{spell(corners, ",")}"/>' if points else f"<Coords>{elements}</Coords>"
        line = '<TextLine><Coords points="0,0 16,0 16,24"/></TextLine>'
        found.append(f'<TextRegion id="z{k}" {kind}>{coords}{line}</TextRegion>')
    return (
        f'<PcGts xmlns="http://schema.primaresearch.org/PAGE/gts/pagecontent/{year}"><Page imageFilename="{picture}" '
        f'imageHeight="{SIZE[0]}" imageWidth="{SIZE[1]}"><ReadingOrder><OrderedGroup><RegionRefIndexed/>'
        f"</OrderedGroup></ReadingOrder>{''.join(found)}</Page></PcGts>"
    )


def write_page(source: Path, name: str, xml: str, size: tuple[int, int] = SIZE, suffix: str = ".png") -> np.ndarray:
    """Write NAME.xml and its picture, in colours; returns the picture (H, W, 3)."""
    path = source / f"{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(xml)
    pixels = np.random.default_rng(len(name)).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(suffix))
    return pixels


def convert(source: Path, *options: str) -> Path:
    output = source.with_name(f"{source.name}_set{len(list(source.parent.iterdir()))}")
    assert main([str(source), "--output", str(output), "--quiet", *options]) == 0
    return output


def refused(capsys: pytest.CaptureFixture[str], source: Path, *options: str) -> str:
    """Run the command, which fails and leaves nothing behind; returns what it says."""
    output, before = source.with_name("refused"), set(source.parent.iterdir())
    assert main([str(source), "--output", str(output), "--quiet", *options]) == 2
    assert set(source.parent.iterdir()) == before
    return capsys.readouterr().err


def label_of(output: Path, id_: str) -> np.ndarray:
    return np.asarray(Image.open(output / "labels" / f"{id_}.tif"))


def test_a_pixel_belongs_to_a_polygon_if_its_centre_is_inside() -> None:
    label = np.zeros((4, 6), np.uint8)
    draw_zone(label, np.array([(0.5, -3), (9, 1.5), (0.5, 5.4)]), 7)
    rows, columns = np.mgrid[:4, :6] + 0.5
    above = (columns - 0.5) * 4.5 / 8.5 - 3
    below = 5.4 - (columns - 0.5) * 3.9 / 8.5
    inside = (rows > above) & (rows < below) & (columns >= 0.5)
    assert inside.any() and not inside.all()
    assert (label == 7 * inside).all()


def test_a_concave_polygon_leaves_its_notch_out_and_neighbours_share_no_pixel() -> None:
    label, left, right, outside = np.zeros((4, 9, 9), np.uint8)
    draw_zone(label, np.array([(0, 0), (6, 0), (6, 6), (4, 6), (4, 2), (2, 2), (2, 6), (0, 6)]), 1)
    assert (label[2:, 2:4] == 0).all() and label.sum() == 36 - 8
    draw_zone(left, np.array([(0, 0), (4.5, 0), (3.5, 9), (0, 9)]), 1)
    draw_zone(right, np.array([(4.5, 0), (9, 0), (9, 9), (3.5, 9)]), 1)
    assert (left + right == 1).all()
    for corners in (box(-9, -9, -2, -2), box(10, 0, 12, 4), box(0, 10, 6, 12)):
        draw_zone(outside, np.array(corners), 1)
    assert not outside.any()


@pytest.mark.parametrize(
    "xml",
    [
        alto(),
        alto(version="3", comma=True),
        alto(version="2", boxes=True),
        page_xml(),
        page_xml(year="2013-07-15", typed="type"),
        page_xml(year="2010-03-19", points=False),
    ],
    ids=["alto 4", "alto 3, commas", "alto 2, boxes", "page 2019", "page 2013, type", "page 2010, points as elements"],
)
def test_zones_of_every_version_and_spelling_give_the_pixels_drawn_by_hand(tmp_path, xml) -> None:
    pixels = write_page(tmp_path / "in", "book/f1", xml)
    output = convert(tmp_path / "in")
    assert (label_of(output, "book_f1") == expected()).all()
    assert (np.asarray(Image.open(output / "images" / "book_f1.tif")) == pixels).all()


def test_the_written_set_is_read_as_a_folder_set_with_the_ids_that_were_drawn(tmp_path) -> None:
    for name in "abcdef":
        write_page(tmp_path / "in", f"{name}/f1", alto())
    output = convert(tmp_path / "in", "--val", "b", "--test", "c/", "d")
    description = describe("folder", output)
    found = {split: [item.id for item in description.open(split, 8).items] for split in ("train", "val", "test")}
    assert found == {"train": ["a_f1", "e_f1", "f_f1"], "val": ["b_f1"], "test": ["c_f1", "d_f1"]}
    for sample in description.open("train", 8):
        assert sample.label is not None
        assert (sample.label.numpy() == expected()).all()
    assert description.classes.names == tuple(entry["name"] for entry in SEGMONTO["classes"])


def test_tall_pages_are_shrunk_by_area_and_their_zones_drawn_at_the_new_scale(tmp_path) -> None:
    pixels = write_page(tmp_path / "in", "f1", alto([("MainZone", box(2, 4, 9, 16))]))
    write_page(tmp_path / "in", "f2", alto(size=(8, 8), zones=[("MainZone", box(2, 4, 8, 8))]), (8, 8))
    output = convert(tmp_path / "in", "--height", "12")
    shrunk = np.asarray(Image.open(output / "images" / "f1.tif"))
    means = pixels.reshape(12, 2, 8, 2, 3).mean((1, 3))
    assert shrunk.shape == (12, 8, 3) and np.abs(shrunk - means).max() <= 0.5
    ids = np.zeros((12, 8))
    ids[2:8, 1:4] = 1  # columns 1 to 4.5: the centre of the last lies on the side, which belongs to what is right of it
    assert (label_of(output, "f1") == ids).all()
    assert label_of(output, "f2").shape == (8, 8)


def test_grey_pages_stay_grey_in_every_format(tmp_path) -> None:
    write_page(tmp_path / "in", "f1", alto())
    Image.new("L", SIZE[::-1], 90).save(tmp_path / "in" / "f1.png")
    for suffix in ("png", "jpg", "tif"):
        output = convert(tmp_path / "in", "--format", suffix)
        image = Image.open(output / "images" / f"f1.{suffix}")
        assert image.mode == "L" and (np.asarray(image) == 90).all()
        describe("folder", output).open("train", 8)[0]


def test_zones_in_other_units_are_scaled_to_the_picture_and_the_summary_says_so(tmp_path, capsys) -> None:
    doubled = [(label, [(2 * x, 2 * y) for x, y in corners]) for label, corners in ZONES]
    write_page(tmp_path / "in", "f1", alto(doubled, size=(2 * SIZE[0], 2 * SIZE[1]), unit="mm10"))
    write_page(tmp_path / "in", "f2", alto(size=None))
    output = convert(tmp_path / "in")
    assert (label_of(output, "f1") == expected()).all() and (label_of(output, "f2") == expected()).all()
    said = capsys.readouterr().out
    assert f"scaled to a picture of another size: 1: {tmp_path / 'in' / 'f1.xml'}" in said


def test_pictures_are_found_by_name_by_stem_and_above_a_folder_of_xml(tmp_path) -> None:
    source = tmp_path / "in"
    write_page(source, "a/scan7", alto(), suffix=".JPG")
    (source / "a" / "scan7.xml").rename(source / "a" / "other.xml")
    (source / "a" / "other.xml").write_text(alto(picture="C:\\scans\\scan7.JPG"))
    write_page(source, "b/f1", alto(picture="gone.tif"))
    write_page(source, "c/f1", page_xml(picture="f1.png"))
    (source / "c" / "page").mkdir()
    (source / "c" / "f1.xml").rename(source / "c" / "page" / "f1.xml")
    output = convert(source, "--val", "c", "--test")
    assert {path.stem for path in (output / "images").iterdir()} == {"a_other", "b_f1", "c_f1"}
    assert (output / "val.txt").read_text() == "c_f1\n" and not (output / "test.txt").exists()


def test_pages_without_zones_are_skipped_or_kept_and_named(tmp_path, capsys) -> None:
    source = tmp_path / "in"
    write_page(source, "f1", alto())
    # eScriptorium puts lines outside all zones into a block without a place
    write_page(source, "f2", alto([], blocks='<TextBlock ID="eSc_dummyblock_"/><ComposedBlock ID="group"/>'))
    (source / "METS.xml").write_text("<mets/>")
    assert {path.stem for path in (convert(source) / "images").iterdir()} == {"f1"}
    said = capsys.readouterr().out
    assert f"Pages without zones, skipped: 1: {source / 'f2.xml'}" in said
    assert "three corners, not drawn: 1" in said
    assert f"other kinds, passed over: 1: {source / 'METS.xml'}" in said
    assert not label_of(convert(source, "--empty", "keep"), "f2").any()


def test_labels_without_a_class_are_named_or_ignored(tmp_path, capsys) -> None:
    source = tmp_path / "in"
    zones = [("MainZone", box(0, 0, 8, 8)), ("Poem", box(0, 0, 4, 4)), ("Poem", box(8, 8, 9, 9))]
    write_page(source, "f1", alto([*zones, ("Song", box(9, 9, 12, 12))]))
    said = refused(capsys, source)
    assert f"label 'Poem' has no class (zones: 2, the first in {source / 'f1.xml'})" in said and "label 'Song'" in said
    label = label_of(convert(source, "--unknown", "ignore"), "f1")
    assert (label[:4, :4] == IGNORED).all() and label[5, 5] == 1 and label[8, 8] == IGNORED
    assert "labels without a class: Poem, Song" in capsys.readouterr().out


def test_a_mapping_file_gives_classes_and_their_order(tmp_path) -> None:
    zones = [("picture", box(0, 0, 4, 4)), ("paragraph", box(2, 2, 8, 8)), ("credit", box(9, 9, 12, 12))]
    write_page(tmp_path / "in", "f1", page_xml(zones, typed="type"))
    classes = [
        {"name": "none", "counts": False},
        {"name": "picture", "labels": ["Picture"], "color": [1, 2, 3]},
        {"name": "text", "labels": ["paragraph", "TextRegion"]},  # an element's name catches what has no other
    ]
    (tmp_path / "mapping.json").write_text(json.dumps({"classes": classes, "ignored": []}))
    output = convert(tmp_path / "in", "--mapping", str(tmp_path / "mapping.json"))
    label = label_of(output, "f1")
    assert (label[:2, :4] == 1).all() and (label[2:8, 2:8] == 2).all() and (label[9:12, 9:12] == 2).all()
    found = describe("folder", output).classes
    assert found.names == ("none", "picture", "text")
    assert (found.left_out, found.palette[1]) == ((0,), (1, 2, 3))


def test_spellings_of_a_label_are_one_class_but_a_subtype_that_the_mapping_names() -> None:
    for label in ("MainZone", "mainZone", "Main zone", "Main", "MainZone:column#3", "MainZone#1"):
        assert ZoneMapping.from_record(SEGMONTO).find([label, "TextBlock"]) == 1, label
    classes = [{"name": "outside"}, {"name": "a", "labels": ["X"]}, {"name": "b", "labels": ["X:note"]}]
    mapping = ZoneMapping.from_record({"classes": classes})
    assert [mapping.find([label]) for label in ("X:note#2", "X:other#2", "Y", "#1")] == [2, 1, None, None]


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ([], "list classes"),
        ({"classes": [], "ignore": []}, "'ignore'"),
        ({"classes": [{"name": "a"}, {"name": "b", "labels": "x"}]}, "classes[1].labels"),
        ({"classes": [{"name": "a"}, {"name": "b", "labels": ["x"]}], "ignored": ["X zone"]}, "'X zone'"),  # twice
        ({"classes": [{"name": "a"}]}, "2 to 250"),
        ({"classes": [{"name": "a", "value": 3}, {"name": "b"}]}, "classes[0]"),
    ],
)
def test_a_mapping_that_breaks_a_rule_is_refused_by_name(tmp_path, capsys, record, part) -> None:
    write_page(tmp_path / "in", "f1", alto())
    path = tmp_path / "mapping.json"
    path.write_text(json.dumps(record))
    said = refused(capsys, tmp_path / "in", "--mapping", str(path))
    assert str(path) in said and part in said


WRONG_BLOCK = '<TextBlock ID="q"><Shape><{}/></Shape></TextBlock>'
FAULTS = {
    "broken XML": ("<alto><Layout>", "cannot be read"),
    "an empty file": ("", "cannot be read"),
    "two pages": (alto().replace("</Layout>", "<Page/></Layout>"), "2 pages"),
    "another shape": (alto(size=(24, 20)), "20 x 24"),
    "no size": (alto(size=(0, 16)), "16"),
    "another unit without a size": (alto(size=None, unit="mm10"), "mm10"),
    "an odd number of coordinates": (alto(blocks=WRONG_BLOCK.format('Polygon POINTS="1 2 3"')), "q"),
    "a coordinate that is no number": (page_xml().replace("3,4", "3,x"), "TextRegion z0"),
    "a circle": (alto(blocks=WRONG_BLOCK.format('Circle RADIUS="3"')), "Circle"),
    "a box without a number": (alto(blocks='<TextBlock HPOS="a" VPOS="1" WIDTH="1" HEIGHT="1"/>'), "HPOS 'a'"),
    "a picture that is not there": (alto(picture="gone.jpg"), "gone.jpg"),
    "no picture": (alto(blocks="<!-- gone -->"), "it names no picture"),
}


@pytest.mark.parametrize(("xml", "part"), FAULTS.values(), ids=list(FAULTS))
def test_a_wrong_file_is_refused_by_name_and_nothing_is_written(tmp_path, capsys, xml, part) -> None:
    source = tmp_path / "in"
    write_page(source, "a/f1", alto())
    write_page(source, "a/f2", xml)
    if "gone" in xml:
        (source / "a" / "f2.png").unlink()
    said = refused(capsys, source)
    assert said.startswith(f"error: {source / 'a' / 'f2.xml'}") and said.count("\n") == 1
    assert part in said


def test_up_to_ten_wrong_files_and_all_damaged_pictures_are_named_at_once(tmp_path, capsys) -> None:
    for k in range(12):
        write_page(tmp_path / "a", f"f{k:02d}", "<alto>" if k else alto([("Poem", box(0, 0, 4, 4))]))
    said = refused(capsys, tmp_path / "a")
    assert "12 faults in 12 files" in said and "and 2 more" in said
    assert sum(f"f{k:02d}.xml" in said for k in range(12)) == 10
    for name in ("f1", "f2", "f3"):
        write_page(tmp_path / "b", name, alto())
    for path in (tmp_path / "b" / "f1.png", tmp_path / "b" / "f3.png"):
        path.write_bytes(path.read_bytes()[:-40])
    said = refused(capsys, tmp_path / "b")
    assert [f"f{k}.png" in said for k in (1, 2, 3)] == [True, False, True]


def test_two_files_of_one_page_and_a_folder_without_xml_are_refused(tmp_path, capsys) -> None:
    source = tmp_path / "in"
    write_page(source, "f1", alto())
    (source / "page").mkdir()
    (source / "page" / "f1.xml").write_text(page_xml(picture="f1.png"))
    assert "both describe page f1" in refused(capsys, source)
    assert (label_of(convert(source, "--files", "page/*.xml"), "f1") == expected()).all()
    (tmp_path / "empty").mkdir()
    assert "holds no file **/*.xml" in refused(capsys, tmp_path / "empty")
    assert "--files '/x/*.xml'" in refused(capsys, tmp_path / "empty", "--files", "/x/*.xml")
    assert "is not a folder" in refused(capsys, tmp_path / "nowhere")


def test_folders_and_not_pages_are_dealt_out_by_a_hash_of_the_seed_or_as_they_are_named() -> None:
    books = [f"book{k}" for k in range(10)]
    splits = split_books(books * 5, None, None, seed=0)
    assert [list(splits.values()).count(split) for split in ("train", "val", "test")] == [6, 2, 2]
    assert splits == split_books(reversed(books), None, None, seed=0)
    assert splits != split_books(books, None, None, seed=1)
    assert set(split_books(["only"], None, None, seed=0).values()) == {"train"}
    assert sorted(split_books(["a", "b"], None, None, seed=0).values()) == ["train", "val"]
    named = split_books(books, ["book3"], [], seed=0)
    assert {book for book, split in named.items() if split != "train"} == {"book3"}
    wrong = ((["book99"], [], "--val book99"), (["book1"], ["book1"], "book1 is named"), (books, [], "leave one"))
    for val, test, part in wrong:
        with pytest.raises(InputError, match=part):
            split_books(books, val, test, seed=0)
