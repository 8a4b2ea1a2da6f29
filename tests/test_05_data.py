"""Data: annotations, lists, splits, samples, loaders."""

import hashlib
import http.server
import importlib.util
import itertools
import os
import shutil
import tarfile
import threading
import time

import albumentations as A
import numpy as np
import pytest
import torch
from folders import ids, load
from folders import refusal as input_error
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import read_record

import ssd_object_detection as ssd

SIZE = (40, 30)  # width, height
ANCHORS = ssd.make_anchors()
CAT = ("cat", (1, 1, 20, 15), False)
DOG = ("dog", (11, 6, 40, 30), True)


def annotation(objects, size=SIZE):
    """Return VOC XML; objects: (name, (xmin, ymin, xmax, ymax), difficult)."""
    nodes = "".join(
        f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox><xmin>{box[0]}</xmin>"
        f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, box, difficult in objects
    )
    return (
        f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        f"{nodes}</annotation>"
    )


def write_voc(root, images, suffix=".jpg", **lists):
    """Write a folder in VOC layout; images: {id: objects}, lists: ids of each split (none: train has all)."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, (image_id, objects) in enumerate(images.items()):
        pixels = np.full((SIZE[1], SIZE[0], 3), 10 * number % 256, np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{image_id}{suffix}")
        (root / "Annotations" / f"{image_id}.xml").write_text(annotation(objects))
    for split, listed in (lists or {"train": list(images)}).items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in listed))
    return root


# -- Annotations


def found(findings, kind):
    """Return the only finding of a kind."""
    (one,) = [finding for finding in findings if finding.kind == kind]
    assert "\n" not in one.text
    return one


def test_coordinates_become_zero_based_edges(tmp_path):
    data = load(write_voc(tmp_path, {"a": [CAT, DOG]}))
    (record,) = data.train
    assert record.boxes_px.tolist() == [[0, 0, 20, 15], [10, 5, 40, 30]]
    assert record.boxes_px.dtype == np.float32
    np.testing.assert_allclose(record.boxes, [[0, 0, 0.5, 0.5], [0.25, 1 / 6, 1, 1]], atol=1e-6)
    assert (record.width, record.height, record.image_id) == (40, 30, "a")
    assert (record.labels.tolist(), record.labels.dtype) == ([1, 2], np.int64)
    assert (record.difficult.tolist(), record.difficult.dtype) == ([False, True], bool)
    assert data.findings == ()


def test_parse_annotation_returns_what_is_written_and_skips_parts(tmp_path):
    path = tmp_path / "a.xml"
    # VOC marks the head of a person as a part of the object: its name and box are not the object's.
    path.write_text(
        "<annotation><size><width>40</width><height>30</height></size><object><part><name>head</name><bndbox>"
        "<xmin>5</xmin><ymin>5</ymin><xmax>6</xmax><ymax>6</ymax></bndbox></part><name>person</name>"
        "<bndbox><xmax>20.5</xmax><xmin>3</xmin><ymin>4</ymin><ymax>9</ymax></bndbox></object></annotation>"
    )
    person = ssd.VocObject("person", (3, 4, 20.5, 9), difficult=False)
    assert ssd.parse_annotation(path) == ssd.Annotation(40, 30, (person,))


def record_of(root, classes):
    annotations, _ = ssd.read_annotations(root, "train")
    return read_record(root, "a", annotations["a"], classes)


@pytest.mark.parametrize(
    "box", [(5, 5, 5, 20), (20, 5, 10, 20), (5, 9, 20, 8), (41, 5, 60, 20), (5, -20, 20, -3)]
)
def test_a_box_without_area_is_dropped(tmp_path, box):
    root = write_voc(tmp_path, {"a": [("dog", box, False), CAT]})
    record, dropped = record_of(root, ("cat", "dog"))
    assert record.labels.tolist() == [1]
    assert record.boxes_px.tolist() == [[0, 0, 20, 15]]
    assert [place.split(": ")[1] for place in dropped] == [
        "object 1 (dog) [" + ", ".join(map(str, box)) + "]"
    ]


@pytest.mark.parametrize(
    ("box", "edges"), [((-9, 11, 60, 40), [0, 10, 40, 30]), ((0, 0, 20, 15), [0, 0, 20, 15])]
)
def test_a_box_beyond_the_image_is_clipped(tmp_path, box, edges):
    record, dropped = record_of(write_voc(tmp_path, {"a": [("cat", box, False)]}), ("cat",))
    assert record.boxes_px.tolist() == [edges]
    assert dropped == []


def test_a_box_listed_twice_counts_once_and_of_two_classes_twice(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT, ("dog", *CAT[1:]), (*CAT[:2], True)]})
    record, dropped = record_of(root, ("cat", "dog"))
    assert record.labels.tolist() == [1, 2]
    assert record.difficult.tolist() == [False, False]  # the first one's
    assert dropped == []


@pytest.mark.parametrize(
    ("box", "box_px", "faults"),
    [
        ((1, 1, 20, 15), (0, 0, 20, 15), ()),
        ((1, 1, 40, 30), (0, 0, 40, 30), ()),
        ((0, 0, 40, 30), (0, 0, 40, 30), ()),  # written 0-based, beyond by one pixel
        ((-9, 11, 60, 40), (0, 10, 40, 30), ("box beyond the image",)),
        ((5, 5, 5.1, 20), (4, 4, 5.1, 20), ()),  # 1.1 pixels wide
        ((-30, 5, 0.5, 20), (0, 4, 0.5, 20), ("box beyond the image", "box under a pixel")),
        ((40.5, 5, 41, 20), (39.5, 4, 40, 20), ("box under a pixel",)),
        ((20, 5, 10, 20), None, ("box reversed",)),
        ((5, 9, 20, 8), None, ("box reversed",)),
        ((60, 9, 50, 8), None, ("box reversed",)),
        ((7, 7, 7, 7), None, ("box without area",)),  # one pixel of VOC
        ((5, 5, 5, 20), None, ("box without area",)),
        ((41, 5, 60, 20), None, ("box outside the image",)),
        ((5, -20, 20, -3), None, ("box outside the image",)),
        ((5, 5, float("nan"), 20), None, ("box not finite",)),
        ((5, 5, float("inf"), 20), None, ("box not finite",)),
    ],
)
def test_the_verdict_on_a_box(box, box_px, faults):
    verdict = ssd.judge_box(box, *SIZE)
    assert verdict.box_px == (box_px and pytest.approx(box_px))
    assert verdict.faults == faults


def test_a_box_whose_edges_coincide_in_float32_has_no_area():
    # What is inside the image is 2**-10 or 2**-30 wide, beside 40.
    assert ssd.judge_box((41 - 2**-10, 5, 42, 20), *SIZE).box_px == (40 - 2**-10, 4, 40, 20)
    assert ssd.judge_box((41 - 2**-30, 5, 42, 20), *SIZE) == (None, ("box without area",))


def test_an_image_without_a_size_has_no_box_inside():
    assert ssd.judge_box((1, 1, 20, 15), 0, 0) == (None, ("box outside the image",))


def in_record(box_voc, width, height):
    """Return the Record of an image with one object."""
    annotation = ssd.Annotation(width, height, (ssd.VocObject("cat", box_voc, difficult=False),))
    return read_record("nowhere", "a", annotation, ("cat",))


# Of any size, and near whole numbers, where edges of float32 coincide.
coordinate = st.floats(allow_nan=False, allow_infinity=False) | st.builds(
    lambda whole, part: whole + part, st.integers(-3, 70), st.floats(-1e-5, 1e-5)
)
corners = st.tuples(coordinate, coordinate, coordinate, coordinate)


@settings(max_examples=300, deadline=None)
@given(box=corners, width=st.integers(0, 10**40), height=st.integers(0, 10**40))
def test_any_finite_box_of_any_image_has_a_verdict(box, width, height):
    box_px, faults = ssd.judge_box(box, width, height)
    assert len(set(faults)) == len(faults)
    if box_px is None:
        assert len(faults) == 1
    else:
        assert set(faults) <= {"box beyond the image", "box under a pixel"}
        assert np.float32(box_px).tolist() == list(box_px)


@settings(max_examples=300, deadline=None)
@given(box=corners, width=st.integers(1, 64) | st.integers(1, 2**24), height=st.integers(1, 64))
def test_boxes_of_a_record_lie_in_the_image_and_have_an_area(box, width, height):
    record, dropped = in_record(box, width, height)
    assert len(record.labels) + len(dropped) == 1
    assert (record.boxes_px.dtype, record.boxes_px.shape) == (np.float32, (len(record.labels), 4))
    for x1, y1, x2, y2 in record.boxes.tolist():
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1


@settings(max_examples=150, deadline=None)
@given(box=corners, width=st.integers(1, 64), height=st.integers(1, 64), epoch=st.integers(0, 50))
def test_any_box_that_is_kept_comes_out_of_the_augmentation(box, width, height, epoch):
    record, _ = in_record(box, width, height)
    pixels = np.zeros((height, width, 3), np.uint8)
    for train in (True, False):
        transform = ssd.build_transform(train=train, zoom_out=0.8)
        sample = ssd.VocDataset([record], transform, ANCHORS, pixels=[pixels])[0, epoch]
        assert torch.isfinite(sample["gt_boxes"]).all()
        labels, box_targets = ssd.build_targets(torch.utils.data.default_collate([sample]), ANCHORS)
        assert torch.isfinite(box_targets[labels > 0]).all()


@settings(max_examples=150, deadline=None)
@given(box=corners, other=corners, width=st.integers(1, 64), height=st.integers(1, 64))
@example(box=(-5.0, 1.0, 1e-17, 10.0), other=(-5.0, 1.0, 2e-17, 10.0), width=10, height=10)  # rounds to 0
def test_any_box_that_is_kept_is_measured(box, other, width, height):
    objects = tuple(ssd.VocObject("cat", corner, difficult=False) for corner in (box, other))
    record, _ = read_record("nowhere", "a", ssd.Annotation(width, height, objects), ("cat",))
    count = len(record.labels)
    detections = {
        "image_ids": np.zeros(count, dtype=int),
        "labels": np.ones(count, dtype=int),
        "scores": np.linspace(0.9, 0.8, count),
        "boxes_voc": ssd.to_voc_pixels(record.boxes_px),
    }
    with np.errstate(all="raise"):
        result = ssd.score_detections(detections, [record], 1)
    if count:
        assert 0 <= result["map_area"] <= 1


def numbered(count):
    """Cats of which each lies a pixel lower than the one before."""
    return [("cat", (1, 1 + n, 20, 10 + n), False) for n in range(count)]


def test_a_few_dropped_boxes_of_a_list_are_one_warning_that_names_one(tmp_path):
    flat = ("cat", (7, 7, 7, 7), False)
    root = write_voc(tmp_path, {"i0": [*numbered(15), flat], "i1": [flat, *numbered(15)]})
    _, findings = ssd.read_records(root, "train", ("cat",))
    (finding,) = findings
    assert finding.is_warning
    assert "list train: 2 of 32 boxes have no area" in finding.text
    assert "i0.xml: object 16 (cat) [7, 7, 7, 7]" in finding.text
    assert [os.path.basename(place) for place in finding.places] == [
        "i0.xml: object 16 (cat) [7, 7, 7, 7]",
        "i1.xml: object 1 (cat) [7, 7, 7, 7]",
    ]


@pytest.mark.parametrize(
    ("objects", "cause"),
    [
        (
            [("cat", (20, 15, 1, 1), False)] * 3,
            "object 1 (cat) [20, 15, 1, 1]; fractions, sizes or swapped corners?",
        ),
        ([*numbered(8), ("cat", (20, 10, 15, 8), False), ("cat", (30, 20, 9, 9), False)], "sizes"),
        (
            [("cat", (0.1, 0.2, 0.5, 0.6), False), ("cat", (0.0, 0.0, 1, 1), False)],
            "no coordinate is above 1; fractions",
        ),
    ],
)
def test_boxes_that_are_written_otherwise_stop_with_the_likely_cause(tmp_path, objects, cause):
    message = input_error(load, write_voc(tmp_path, {"a": objects}))
    assert cause in message
    assert "xmin, ymin, xmax, ymax in pixels" in message


def test_an_encoding_of_several_bytes_and_a_namespace_are_read(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT]})
    text = annotation([("\u732b", *CAT[1:])]).replace("<annotation>", '<annotation xmlns="http://x.org/voc">')
    for encoding in ("gbk", "big5", "shift-jis", "gb2312", "utf-8", "iso-2022-jp"):
        declared = f'<?xml version="1.0" encoding="{encoding}"?>\n{text}'
        (root / "Annotations" / "a.xml").write_bytes(declared.encode(encoding, errors="xmlcharrefreplace"))
        assert load(root).classes == ("\u732b",)


@pytest.mark.parametrize(
    ("word", "expected"), [("1", True), ("True", True), ("yes", True), ("0", False), ("Unspecified", False)]
)
def test_difficult_is_a_number_or_a_word(tmp_path, word, expected):
    root = write_voc(tmp_path, {"a": [CAT]})
    path = root / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<difficult>0", f"<difficult>{word}"))
    assert load(root).train[0].difficult.tolist() == [expected]


@pytest.mark.parametrize(
    "size",
    [
        "",
        "<size><width>40</width></size>",
        "<size><width>0</width><height>30</height></size>",
        "<size><width>wide</width><height>inf</height></size>",
        "<size><width>1e300</width><height>30</height></size>",
        "<size><width>-40</width><height>30</height></size>",
    ],
)
def test_a_size_that_is_not_given_is_the_image_s_own(tmp_path, size):
    root = write_voc(tmp_path, {"a": [CAT]})
    path = root / "Annotations" / "a.xml"
    text = path.read_text()
    path.write_text(text[: text.index("<size>")] + size + text[text.index("</size>") + 7 :])
    (record,) = load(root).train
    assert (record.width, record.height) == SIZE
    assert record.boxes_px.tolist() == [[0, 0, 20, 15]]


def test_an_image_without_an_annotation_is_an_error_or_negative(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    (root / "Annotations" / "b.xml").unlink()
    message = input_error(load, root)
    assert "b.xml" in message
    assert "--unlabelled" in message
    record = load(root, unlabelled="negative").train[1]
    assert (record.image_id, record.width, record.height, len(record.labels)) == ("b", *SIZE, 0)


BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>20</xmax><ymax>15</ymax></bndbox>"
ONE = f"<object><name>cat</name>{BOX}</object>"
SIZED = "<size><width>40</width><height>30</height></size>"
READ = {
    "upper-case tags": (f"<annotation>{SIZED}{ONE}</annotation>".upper(), ["CAT"]),
    "a wrapper": (f"<annotation>{SIZED}<objects>{ONE}{ONE}</objects></annotation>", ["cat", "cat"]),
    "another root": (f"<doc>{SIZED}{ONE}</doc>", ["cat"]),
    "an annotation inside": (f"<annotations><annotation>{SIZED}{ONE}</annotation></annotations>", ["cat"]),
    "boxes of one name": (
        f"<annotation>{SIZED}<object><name>cat</name>{BOX * 3}</object></annotation>",
        ["cat"] * 3,
    ),
    "names and boxes": (
        f"<annotation>{SIZED}<object><name>a</name>{BOX}<name>b</name>{BOX}</object></annotation>",
        ["a", "b"],
    ),
    "a part": (
        f"<annotation>{SIZED}<object><name>a</name>{BOX}<part>{BOX}</part></object></annotation>",
        ["a"],
    ),
    "blank lines first": (f'\n\n<?xml version="1.0"?><annotation>{SIZED}{ONE}</annotation>', ["cat"]),
    "an encoding it has not": (
        f'<?xml version="1.0" encoding="utf-16"?><annotation>{SIZED}{ONE}</annotation>',
        ["cat"],
    ),
    "no object": (
        f"<annotation><filename>a.jpg</filename><source><annotation>x</annotation><image>flickr</image>"
        f"</source>{SIZED}<segmented>0</segmented><objects/><checked by='me'>yes</checked></annotation>",
        [],
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_an_annotation_written_otherwise_is_read(tmp_path, kind):
    text, names = READ[kind]
    (tmp_path / "a.xml").write_text(text)
    found = ssd.parse_annotation(tmp_path / "a.xml")
    assert [one.name for one in found.objects] == names
    assert {one.box_voc for one in found.objects} <= {(1, 2, 20, 15)}
    assert (found.width, found.height) == SIZE


def of_cat(inner):
    return f"<annotation><object><name>cat</name>{inner}</object></annotation>"


REFUSED = {
    "CVAT's root": (
        '<annotations><image name="a.jpg"><box label="cat" xtl="1"/></image></annotations>',
        "no VOC annotation (its root is <annotations>, with <box>)",
    ),
    "another root": (f"<doc>{SIZED}</doc>", "its root is <doc>, with <size>"),
    "two images": (
        f"<annotations><annotation>{SIZED}{ONE}</annotation><annotation>{SIZED}</annotation></annotations>",
        "it describes 2 images",
    ),
    "two files": (f"<data>{'<image>' + ONE + '</image>'}<image>x</image></data>", "it describes 2 images"),
    "a box": ("<annotation><box><xmin>1</xmin></box></annotation>", "<box>, <xmin> outside of any <object>"),
    "a polygon": ("<annotation><polygon><pt>1 2</pt></polygon></annotation>", "<polygon>, <pt> outside"),
    "an item": (f"<annotation><item><name>cat</name>{BOX}</item></annotation>", "<item>, <bndbox>"),
    "attributes": ('<annotation><cat x="3" y="4"/></annotation>', "<cat> outside"),
    "a box beside": (f"<annotation>{ONE}{BOX}</annotation>", "<bndbox> outside of any <object>"),
    "a rotated box": (of_cat("<robndbox/>"), "object 1 (cat) has no <bndbox>, but name, robndbox"),
    "a label": (ONE.replace("name>", "label>"), "object 1 has no <name>, but label, bndbox"),
    "two names": (of_cat(f"<name>dog</name>{BOX}"), "object 1 (cat) has the names cat, dog and 1 <bndbox>"),
    "eight corners": (
        of_cat(BOX.replace("</bndbox>", "") + BOX.replace("<bndbox>", "")),
        "object 1 (cat): its <bndbox> has more than four corners",
    ),
    "a size": (
        of_cat("<bndbox><x>1</x><y>2</y><w>3</w><h>4</h></bndbox>"),
        "object 1 (cat): its <bndbox> has x, y, w, h, not xmin, ymin, xmax, ymax",
    ),
    "corners as attributes": (of_cat('<bndbox xmin="1"/>'), "its <bndbox> has attribute xmin, not xmin"),
    "a comma": (of_cat(BOX.replace("20", "5,5")), 'object 1 (cat): xmax is "5,5", no number: write a point'),
    "a unit": (of_cat(BOX.replace("20", "5px")), 'xmax is "5px", no number'),
    "nothing": (of_cat(BOX.replace("20", "")), 'xmax is "", no number'),
    "an invisible name": (of_cat(BOX).replace("cat", "\u200b"), "object 1 has no <name>"),
    "a web page": ("<!DOCTYPE html><html><meta charset=utf-8></html>", "but a web page: download it again"),
    "a web page in XML": ("<html><body>404</body></html>", "its root is <html>, with <body>"),
    "JSON": ('{"shapes": []}', "but JSON"),
    "YOLO": ("0 .5 .5 .1 .1\n", "YOLO's numbers: see python -m ssd_tools.convert"),
    "an empty file": (" \n", "but an empty file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_annotation_that_is_not_understood_is_never_an_image_without_objects(tmp_path, kind):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    text, problem = REFUSED[kind]
    (root / "Annotations" / "b.xml").write_text(text)
    for unlabelled in ("error", "negative"):
        message = input_error(load, root, unlabelled=unlabelled)
        assert "b.xml: " in message
        assert problem in message


@pytest.mark.parametrize("tag", ["polygon", "robndbox"])
def test_a_shape_that_is_no_box_is_named(tmp_path, tag):
    root = write_voc(tmp_path, {"a": [CAT]})
    path = root / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("bndbox>", f"{tag}>"))
    assert f"but name, difficult, {tag}" in input_error(load, root)


def test_classes_that_are_not_listed_are_no_dropped_boxes(tmp_path):
    root = write_voc(tmp_path, {"a": [DOG, CAT, DOG]})
    (record,), findings = ssd.read_records(root, "train", ("cat",))
    assert record.labels.tolist() == [1]
    assert [finding.kind for finding in findings] == ["object of another class"]


ENTITY_CAT = annotation([("&a;", *CAT[1:])])
MALFORMED = {
    "cut": "<annotation><size>",
    "no XML": "not xml at all",
    "empty": "",
    "corner in words": annotation([("cat", (1, 2, "x", 4), False)]),
    "corner NaN": annotation([("cat", (1, 2, "nan", 4), False)]),
    "no name": annotation([("", (1, 2, 3, 4), False)]),
    "no box": annotation([]).replace("</annotation>", "<object><name>cat</name></object></annotation>"),
    "unknown encoding": '<?xml version="1.0" encoding="x-none"?><annotation/>',
    "a file as entity": '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/hostname">]>' + ENTITY_CAT,
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_annotation_is_an_input_error_that_names_the_file(tmp_path, case):
    root = write_voc(tmp_path, {"fine": [CAT], "broken": [CAT]})
    text = MALFORMED[case]
    (root / "Annotations" / "broken.xml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "broken.xml" in input_error(load, root)


@pytest.mark.parametrize("name", ["Annotations/b.xml", "JPEGImages/b.jpg"])
def test_a_missing_file_is_an_input_error_that_names_it(tmp_path, name):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    (root / name).unlink()
    assert str(root / name) in input_error(load, root)


def test_an_unknown_class_in_another_list_is_told_and_left_out(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [DOG, CAT]}, train=["a"], test=["b"])
    data = load(root)
    assert data.test[0].labels.tolist() == [1]
    (finding,) = data.findings
    assert finding.text.endswith("list test: objects of other classes are left out: dog")
    assert finding.places == ("dog",)
    assert not finding.is_warning


def test_the_file_name_in_an_annotation_is_never_followed(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT]})
    path = root / "Annotations" / "a.xml"
    elsewhere = "<folder>..</folder><filename>../x.jpg</filename><size>"
    path.write_text(path.read_text().replace("<size>", elsewhere))
    assert load(root).train[0].image_path == str(root / "JPEGImages" / "a.jpg")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_an_input_error_or_trained_through(tmp_path_factory, data):
    root = write_voc(tmp_path_factory.mktemp("voc"), {"a": [CAT], "b": [CAT, DOG]})
    path = root / data.draw(st.sampled_from(["Annotations/b.xml", "JPEGImages/b.jpg"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))]))
    message = None
    try:
        records = load(root, classes=("cat",)).train
        sample = ssd.VocDataset(records, ssd.build_transform(train=True), ANCHORS)[1]
    except ssd.InputError as error:
        message = str(error)
    if message is None:
        assert torch.isfinite(sample["gt_boxes"]).all()
    else:
        assert "b.xml" in message or "b.jpg" in message


# -- Lists


@pytest.mark.parametrize(
    "line",
    [
        "my cat",
        "  my cat  ",
        "my cat.jpg",
        "my cat.JPG",
        "sub/e\u0301",
        "sub\\\u00e9.jpg",
        "plain more",
        "plain.jpg plain.xml",
        "v1.2",
        "v1.2.jpg",
    ],
)
def test_a_line_of_a_list_names_an_image_in_any_of_the_usual_ways(tmp_path, line):
    root = write_voc(tmp_path, {"my cat": [], "plain": [], "v1.2": []}, train=[line, "", line])
    for folder, end in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
        (root / folder / "sub").mkdir()
        shutil.copy(
            root / folder / f"plain{end}", root / folder / "sub" / f"e\u0301{end}"
        )  # as macOS writes it
    (image_id,) = ssd.read_split(root, "train")
    stem = os.path.splitext(os.path.basename(ssd.find_file(root, "JPEGImages", image_id)))[0]
    assert stem[0] == line.strip().replace("sub", "").strip("/\\")[0].replace("\u00e9", "e")


def test_a_list_of_one_class_is_an_input_error(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]}, cat_train=["a  1", "b -1"])
    message = input_error(ssd.read_split, root, "cat_train")
    assert "cat_train.txt is a list of one class" in message
    assert "--classes" in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_lists_of_unicode_text_are_read(tmp_path, encoding):
    root = write_voc(tmp_path, {"a": [CAT], "\u732b": [CAT]})
    text = ("\ufeff" if encoding == "utf-16-le" else "") + "a\r\n\u732b\r\n"
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(text.encode(encoding))
    assert ids(load(root).train) == ["a", "\u732b"]


def test_a_list_of_another_encoding_is_an_input_error(tmp_path):
    root = write_voc(tmp_path, {"\u732b\u54aa": [CAT]})
    (root / "ImageSets" / "Main" / "train.txt").write_bytes("\u732b\u54aa\n".encode("gbk"))
    assert "not UTF-8 but gb18030 text" in input_error(load, root)


def test_the_folder_above_one_in_voc_layout_is_read_or_told(tmp_path):
    devkit = tmp_path / "VOCdevkit"
    write_voc(devkit / "VOC2007", {"a": [CAT]})
    (devkit / "README").touch()
    assert ids(load(devkit).train) == ["a"]
    write_voc(devkit / "VOC2012", {"b": [CAT]})
    assert f"try --data {devkit / 'VOC2007'}" in input_error(load, devkit)
    assert f"try --data {devkit / 'VOC2007'}" in input_error(load, tmp_path)


def test_a_folder_without_lists_is_trained_on_as_a_whole(tmp_path):
    root = write_voc(tmp_path, {"b": [CAT], "a": [DOG]})
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    for _ in range(2):
        data = load(root)
        assert ids(data.train) == ["a", "b"]
        assert "has no lists" in found(data.findings, "no lists").text
        shutil.rmtree(root / "ImageSets", ignore_errors=True)


def test_names_that_differ_by_a_slip_are_one_warning(tmp_path):
    names = ("Cat", "cat", "dogs", "dog", "car", "cart")
    data = load(write_voc(tmp_path, {"a": [(name, (1, 1, 9, 9), False) for name in names]}))
    (finding,) = data.findings
    assert finding.is_warning
    assert finding.places == ("Cat (1) and cat (1)", "dog (1) and dogs (1)")
    for words in (*finding.places, "--classes"):
        assert words in finding.text
    assert "car" not in finding.text


@pytest.mark.parametrize(
    ("name", "other", "count", "other_count", "expected"),
    [
        ("Cat", "cat", 5, 5, True),
        ("dogs", "dog", 5, 5, True),
        ("bicycle", "bicyle", 10, 1, True),  # a letter, and ten times rarer
        ("bicyle", "bicycle", 1, 10, True),
        ("bicycle", "bicyle", 9, 1, False),
        ("car", "cart", 10, 1, True),
        ("car", "bus", 10, 1, False),
        ("type 1", "type 2", 10, 1, False),
        ("cat", "\uff43\uff41\uff54", 5, 5, True),  # letters in full width
    ],
)
def test_names_are_similar_by_case_a_plural_or_a_letter_of_a_rare_one(
    name, other, count, other_count, expected
):
    assert ssd.are_similar_names(name, other, count, other_count) == expected


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("\ufeffcat", "cat"),
        ("c\u200ba\u00adt\u200d", "cat"),
        ("\u200ecat\u2060", "cat"),
        (" my\u00a0big \u200b cat\t", "my big cat"),
        ("ca\x7ft\x85", "cat"),
        (
            "\u06af\u0631\u0628\u0647\u200c\u0647\u0627",
            "\u06af\u0631\u0628\u0647\u200c\u0647\u0627",
        ),  # a joiner of Persian
        ("\u06af\u0631\u0628\u0647\u200c", "\u06af\u0631\u0628\u0647"),  # at the end it does nothing
        ("\u200b", ""),
        ("\u732b \u2460", "\u732b \u2460"),
    ],
)
def test_a_class_is_what_one_sees_of_its_name(written, name):
    assert ssd.clean_name(written) == name
    assert ssd.clean_name(name) == name


def test_one_class_written_in_several_ways_is_one_class(tmp_path):
    ways = ("caf\u00e9", "cafe\u0301", "\ufeffcaf\u00e9", "ca\u00adf\u00e9")
    root = write_voc(tmp_path, {"a": []})
    objects = [(name, (1 + n, 1, 9 + n, 9), False) for n, name in enumerate(ways)]
    (root / "Annotations" / "a.xml").write_text(annotation(objects), encoding="utf-8")
    for classes in (None, ["cafe\u0301\u200b", "caf\u00e9"]):
        data = load(root, classes=classes)
        assert data.classes == ("caf\u00e9",)
        assert data.train[0].labels.tolist() == [1, 1, 1, 1]
        assert data.findings == ()


def test_no_class_at_all_is_an_input_error(tmp_path):
    message = input_error(load, write_voc(tmp_path, {"a": [CAT]}), classes=())
    assert message == "--classes: the training list has cat, not none at all"


def test_a_missing_list_is_an_input_error_that_names_those_there(tmp_path):
    message = input_error(load, write_voc(tmp_path, {"a": [CAT]}, trainval=["a"]), train_split="train")
    assert "train.txt" in message
    assert "lists there: trainval" in message
    assert "VOC layout" in input_error(ssd.read_split, tmp_path / "Annotations", "train")


def test_an_empty_list_is_an_input_error_that_names_the_file(tmp_path):
    assert "train.txt" in input_error(load, write_voc(tmp_path, {"a": [CAT]}, train=[]))


@pytest.mark.parametrize(
    ("there", "asked", "chosen"),
    [
        (["train", "trainval", "test"], (None, None), ("train", "test")),
        (["trainval", "val"], (None, None), ("trainval", "")),
        (["train", "test"], ("mine", ""), ("mine", "")),
        (["other"], (None, "other"), ("train", "other")),
    ],
)
def test_lists_that_are_not_named_are_chosen_from_those_there(tmp_path, there, asked, chosen):
    write_voc(tmp_path, {"a": [CAT]}, **{name: ["a"] for name in there})
    _, lists = ssd.find_data(str(tmp_path), "nowhere", asked[0], None, asked[1])
    assert (lists["train"], lists["test"]) == chosen


@pytest.mark.parametrize(
    ("there", "asked", "chosen"),
    [
        (["train", "val"], (None, None, None), "val"),
        (["train", "val"], (None, "", None), ""),
        (["train", "val"], ("train", None, None), ""),
        (["train", "val"], (None, None, "val"), ""),
        (["trainval", "val"], (None, None, None), ""),
        (["train", "mine"], (None, "mine", None), "mine"),
    ],
)
def test_val_beside_train_validates_unless_a_flag_says_otherwise(tmp_path, there, asked, chosen):
    write_voc(tmp_path, {"a": [CAT]}, **{name: ["a"] for name in there})
    assert ssd.find_data(str(tmp_path), "nowhere", *asked)[1]["val"] == chosen


def test_find_data_returns_the_folder_and_its_lists(tmp_path):
    write_voc(tmp_path, {"a": [CAT]}, trainval=["a"], test=["a"])
    lists = {"train": "trainval", "val": "", "test": "test"}
    assert ssd.find_data(str(tmp_path), "nowhere", None, None, None) == ([tmp_path], lists)
    _, lists = ssd.find_data(str(tmp_path), "nowhere", "a", "b", "")
    assert lists == {"train": "a", "val": "b", "test": ""}


def test_find_data_names_the_lists_of_voc(tmp_path):
    devkit = tmp_path / "VOCdevkit"
    for year in (2007, 2012):
        write_voc(devkit / f"VOC{year}", {"a": [CAT]}, trainval=["a"], test=["a"])
    lists = {"train": "trainval", "val": "", "test": "test"}
    assert ssd.find_data("voc2007", tmp_path, None, None, None) == ([devkit / "VOC2007"], lists)
    roots, lists = ssd.find_data("voc0712", tmp_path, None, "mine", "")
    assert roots == [devkit / "VOC2007", devkit / "VOC2012"]
    assert lists == {"train": "trainval", "val": "mine", "test": ""}


def test_a_missing_folder_is_an_input_error_that_names_it(tmp_path):
    assert "nowhere" in input_error(load, tmp_path / "nowhere")


# -- Classes and splits


def test_classes_of_a_folder_are_those_of_its_training_list_in_alphabetical_order(tmp_path):
    root = write_voc(tmp_path / "My set!", {"a": [("zebra", (1, 1, 9, 9), False), CAT], "b": [DOG]})
    data = load(root)
    assert data.name == "my_set"
    assert data.classes == ("cat", "dog", "zebra")
    assert [r.labels.tolist() for r in data.train] == [[3, 1], [2]]


def test_classes_given_set_the_labels_and_leave_others_out(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT, DOG], "b": [("zebra", (1, 1, 9, 9), False)]})
    data = load(root, classes=("zebra", "cat"))
    assert data.classes == ("zebra", "cat")
    assert [r.labels.tolist() for r in data.train] == [[2], [1]]


def test_a_class_given_that_the_training_list_lacks_is_an_input_error(tmp_path):
    message = input_error(load, write_voc(tmp_path, {"a": [CAT]}), classes=("cat", "unicorn"))
    assert "the training list has cat, not unicorn" in message


def test_voc2007_has_its_twenty_classes_whatever_the_list_holds(tmp_path):
    write_voc(tmp_path / "VOCdevkit" / "VOC2007", {"a": [CAT], "b": [DOG]}, mine=["a", "b"])
    data = load("voc2007", data_root=str(tmp_path), train_split="mine", test_split="")
    assert (data.name, data.classes) == ("pascal_voc", ssd.VOC_CLASSES)
    assert [r.labels.tolist() for r in data.train] == [[8], [12]]


def test_images_without_objects_are_legal(tmp_path):
    data = load(write_voc(tmp_path, {"a": [], "b": [CAT]}))
    empty = data.train[0]
    assert empty.boxes_px.shape == empty.boxes.shape == (0, 4)
    assert empty.labels.shape == empty.difficult.shape == (0,)
    for train in (False, True):
        sample = ssd.VocDataset(data.train, ssd.build_transform(train=train), ANCHORS)[0]
        assert (sample["matched_gt"] == -1).all()
        assert not sample["gt_labels"].any()


def test_a_training_list_without_any_object_is_an_input_error(tmp_path):
    assert "no objects to train on" in input_error(load, write_voc(tmp_path, {"a": [], "b": []}))


def test_the_held_out_share_is_disjoint_and_covers_the_list_with_the_rest(tmp_path):
    root = write_voc(tmp_path, {f"i{n:02d}": [CAT] for n in range(20)})
    splits = {seed: load(root, val_fraction=0.25, seed=seed) for seed in (0, 1)}
    for data in splits.values():
        assert len(data.val) == 5
        assert sorted(ids(data.train) + ids(data.val)) == [f"i{n:02d}" for n in range(20)]
        assert data.test == []
    assert ids(load(root, val_fraction=0.25, seed=0).val) == ids(splits[0].val)
    assert ids(splits[0].val) != ids(splits[1].val)


def test_a_held_out_share_of_zero_is_nothing_and_a_small_one_at_least_one_image(tmp_path):
    root = write_voc(tmp_path, {i: [CAT] for i in "abcd"})
    assert ids(load(root, val_fraction=0).train) == list("abcd")
    data = load(root, val_fraction=0.01)
    assert (len(data.train), len(data.val)) == (3, 1)


def test_nothing_left_to_train_on_is_an_input_error(tmp_path):
    message = input_error(load, write_voc(tmp_path, {"a": [CAT]}), val_fraction=0.5)
    assert message == "list train has no objects left to train on; lower --val-fraction"


def test_nothing_to_validate_on_is_a_warning(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": []}, train=["a"], val=["b"])
    finding = found(load(root, val_split="val").findings, "no object to validate on")
    assert finding.is_warning
    assert "keeps the last weights" in finding.text


def test_named_lists_are_used_as_they_are(tmp_path):
    root = write_voc(tmp_path, {i: [CAT] for i in "abcd"}, train=["a", "b"], val=["c"], test=["d"])
    data = load(root, val_split="val", val_fraction=0.5)
    assert [ids(part) for part in (data.train, data.val, data.test)] == [["a", "b"], ["c"], ["d"]]
    assert data.lists == {"train": "train", "val": "val", "test": "test"}
    assert load(root, test_split="").test == []


@pytest.mark.parametrize(
    "lists",
    [
        {"train": "abc", "val": "c", "test": "d"},
        {"train": "ab", "val": "c", "test": "bd"},
        {"train": "a", "val": "cd", "test": "bd"},
    ],
)
def test_an_image_in_two_lists_is_an_input_error_that_names_it(tmp_path, lists):
    root = write_voc(tmp_path, {i: [CAT] for i in "abcd"}, **lists)
    message = input_error(load, root, val_split="val")
    (shared,) = [i for i in "abcd" if sum(i in members for members in lists.values()) == 2]
    assert f"{shared}.jpg is in two of the lists" in message


def test_copies_of_blank_frames_that_are_measured_on_leave_training(tmp_path):
    objects = {i: [CAT] if i in "ade" else [] for i in "abcdefg"}
    root = write_voc(tmp_path, objects, train=["a", "b", "c", "g"], val=["d", "e"], test=["f"])
    copies = {"b": "blank", "f": "blank", "c": "other", "g": "third", "a": "object", "d": "object"}
    shades = {"blank": 1, "other": 90, "third": 180, "object": 250}
    for name, kind in copies.items():
        Image.new("RGB", (40, 30), (shades[kind],) * 3).save(root / "JPEGImages" / f"{name}.jpg")
    data = load(root, val_split="val")
    assert ids(data.train) == ["a", "c", "g"]  # an image with objects stays, as the audit says of it
    assert [ids(data.val), ids(data.test)] == [["d", "e"], ["f"]]
    (finding,) = data.findings
    assert "left out: 1, e.g. " in finding.text
    assert finding.places == (str(root / "JPEGImages" / "b.jpg"),)
    data = load(root, val_split="val", test_split="")
    assert ids(data.train) == ["a", "b", "c", "g"]
    assert data.findings == ()


def test_voc0712_trains_on_both_years_and_tests_on_2007(tmp_path):
    for year in (2007, 2012):
        root = tmp_path / "VOCdevkit" / f"VOC{year}"
        write_voc(root, {f"{year}a": [CAT], f"{year}b": [CAT]}, trainval=[f"{year}a"], test=[f"{year}b"])
    data = load("voc0712", data_root=str(tmp_path))
    assert ids(data.train) == ["2007a", "2012a"]
    assert ids(data.test) == ["2007b"]


def test_data_functions_print_nothing_and_return_what_they_found(tmp_path, capsys):
    flat = ("cat", (7, 7, 7, 7), False)
    cats = [("Cats", CAT[1], False), *numbered(15)]
    objects = {"a": cats, "b": [flat, CAT, DOG], "c": [], "d": [], "e": []}
    root = write_voc(tmp_path, objects, train=["a", "b", "e"], val=["c"], test=["d"])
    for name in "cde":
        Image.new("RGB", SIZE).save(root / "JPEGImages" / f"{name}.jpg")
    findings = load(root, classes=("cat",)).findings
    assert [finding.kind for finding in findings] == [
        "class names that differ by a slip",
        "box without area",
        "object of another class",
        "no object to validate on",
        "same pixels twice",
    ]
    assert capsys.readouterr() == ("", "")
    ssd.print_findings(findings)
    out, err = capsys.readouterr()
    assert out.splitlines() == [finding.text for finding in findings if not finding.is_warning]
    warnings = [f"warning: {finding.text}" for finding in findings if finding.is_warning]
    assert err.splitlines() == warnings
    assert len(warnings) == 3


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("voc2007", True),
        ("voc0712", True),
        ("shapes", False),
        ("data/VOCdevkit/VOC2007", False),
        (ssd.VOC_CLASSES, True),
        (ssd.VOC_CLASSES[::-1], True),
        (ssd.VOC_CLASSES[:19], False),
        (("cat",), False),
    ],
)
def test_voc_is_known_by_its_name_or_its_classes(data, expected):
    assert ssd.is_voc(data) == expected


# -- Download


def voc_archive(path, year, images, **lists):
    """Write an archive as the VOC server has it; returns its MD5."""
    root = write_voc(path.parent / "made" / "VOCdevkit" / f"VOC{year}", images, **lists)
    with tarfile.open(path, "w") as archive:
        archive.add(root / "ImageSets", f"VOCdevkit/VOC{year}/ImageSets")  # first, so that an order shows
        for folder in ("JPEGImages", "Annotations"):
            archive.add(root / folder, f"VOCdevkit/VOC{year}/{folder}")
    shutil.rmtree(path.parent / "made")
    return hashlib.md5(path.read_bytes()).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` by the manner that the first part of the path names."""

    content, asked = b"", []

    def log_message(self, *what):
        pass

    def do_GET(self):
        manner = self.path.split("/")[1]
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.asked.append((manner, start))
        if manner == "forbidden":
            self.send_error(403)
            return
        content = b"<html>moved</html>" if manner == "html" else self.content
        if manner == "plain":  # a server that knows no ranges
            start = 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if manner == "silent":
            time.sleep(1.5)
            return
        self.wfile.write(content[start : start + 20_000] if manner == "cut" else content[start:])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A function that makes the module fetch from a server on loopback: serve(manner, ...) -> DIR."""
    data = tmp_path / "data"
    data.mkdir()
    md5 = voc_archive(tmp_path / "x.tar", 2007, {"a": [CAT], "b": [DOG]}, trainval=["a", "b"])
    monkeypatch.setattr(Server, "content", (tmp_path / "x.tar").read_bytes())
    monkeypatch.setattr(Server, "asked", [])
    monkeypatch.setattr(ssd, "VOC_ARCHIVES", {"2007": {"filename": "x.tar", "md5": md5}})
    monkeypatch.setattr(ssd, "DOWNLOAD_SECONDS", 0.5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()

        def serve(*manners):
            address = f"http://127.0.0.1:{running.server_port}"
            monkeypatch.setattr(
                ssd, "VOC_URLS", [f"{address}/{manner}/{{year}}/{{name}}" for manner in manners]
            )
            return data

        yield serve
        running.shutdown()


def load_voc(data):
    return load("voc2007", data_root=str(data), test_split="", classes=("cat", "dog"))


@pytest.mark.parametrize(
    "manners",
    [["good"], ["forbidden", "good"], ["html", "good"], ["silent", "good"], ["cut"], ["cut", "plain"]],
)
def test_an_archive_is_fetched_from_the_first_server_that_has_it(server, manners, tmp_path):
    if "cut" in manners:
        assert len(Server.content) < 40_000  # two rounds of 20,000 bytes
    data = server(*manners)
    assert ids(load_voc(data).train) == ["a", "b"]
    assert not list(data.glob("*.part"))
    if manners == ["cut"]:
        assert Server.asked == [("cut", 0), ("cut", 20_000)]  # it goes on where it was cut
    Server.asked.clear()
    load_voc(data)
    assert Server.asked == []


@pytest.mark.parametrize(
    ("manner", "problem"), [("forbidden", "403"), ("html", "MD5"), ("silent", "timed out")]
)
def test_an_archive_that_cannot_be_had_is_an_input_error_that_says_what_to_do(server, manner, problem):
    data = server(manner)
    message = input_error(load_voc, data)
    for word in (problem, f"/{manner}/2007/x.tar", str(data / "x.tar"), "--data-root"):
        assert word in message
    assert ids(load_voc(server("good")).train) == ["a", "b"]  # nothing stands in the way of a better server


def test_what_a_server_without_ranges_sends_is_not_added_to_what_is_there(server):
    data = server("html")  # of which nothing is left: it is whole, and another file
    (data / "x.tar.part").write_bytes(b"x" * 5000)
    message = input_error(load_voc, data)
    assert "another file" in message
    assert "cut off" not in message


def test_a_disk_without_room_is_an_input_error_before_the_download(server, monkeypatch):
    data = server("good")
    with monkeypatch.context() as patch:
        patch.setattr(ssd.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9, 9))
        assert "--data-root" in input_error(load_voc, data)
    assert ids(load_voc(data).train) == ["a", "b"]


def test_an_archive_that_is_there_is_used(server):
    data = server("forbidden")
    (data / "x.tar").write_bytes(Server.content)
    assert ids(load_voc(data).train) == ["a", "b"]
    assert Server.asked == []


def test_an_extraction_that_was_cut_is_done_again(server, monkeypatch):
    data = server("good")
    extract, calls = tarfile.TarFile.extract, itertools.count()

    def fill_the_disk(self, member, *args, **options):
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        return extract(self, member, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", fill_the_disk)
        message = input_error(load_voc, data)
        assert "No space left" in message
        assert "x.tar" in message
    assert ids(load_voc(data).train) == ["a", "b"]  # of the archive that is there
    assert len(Server.asked) == 1


def test_a_damaged_archive_is_an_input_error_that_names_it(server):
    data = server("forbidden")
    (data / "x.tar").write_bytes(Server.content[:3000])
    assert str(data / "x.tar") in input_error(load_voc, data)


def test_lists_that_voc_has_not_are_not_fetched(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(ssd, "download", lambda urls, path, md5: fetched.append(path.name))
    write_voc(tmp_path / "VOCdevkit" / "VOC2007", {"a": [CAT]}, trainval=["a"])
    cases = [
        (("trainval", "mine", "test"), "test"),
        (("", "", None), "test"),
        (("train", "", ""), "trainval"),
    ]
    for asked, kind in cases:
        assert "was not unpacked" in input_error(ssd.find_data, "voc2007", tmp_path, *asked)
        assert fetched == [f"VOC{kind}_06-Nov-2007.tar"]
        fetched.clear()


def test_nothing_is_fetched_into_a_folder_of_one_s_own_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(ssd, "download", lambda *what: pytest.fail("fetched"))
    root = write_voc(tmp_path / "VOCdevkit" / "VOC2007", {"a": [CAT], "b": [CAT]})
    shutil.rmtree(root / "ImageSets")
    assert ids(load(root).train) == ["a", "b"]
    assert "no image list" in input_error(load, root, test_split="test")


def test_a_folder_within_a_whole_one_is_not_looked_into(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT]})
    write_voc(tmp_path / "backup", {"b": [CAT]})
    assert ids(load(root).train) == ["a"]
    for name in ("JPEGImages", "Annotations", "ImageSets"):
        shutil.rmtree(root / name)
    assert ids(load(root).train) == ["b"]  # which is how VOCdevkit holds VOC2007


def test_shapes_are_drawn_by_the_script_beside_the_module(tmp_path, monkeypatch):
    monkeypatch.setattr(ssd, "__file__", str(tmp_path / "module.py"))
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)  # nothing is installed
        message = input_error(ssd.find_data, "shapes", tmp_path, None, None, None)
    assert f"needs the package ssd_tools, which draws the images, as {tmp_path / 'ssd_tools'}" in message
    (tmp_path / "ssd_tools").mkdir()
    script = "def generate(root):\n    root.mkdir()\n    return root\n"
    (tmp_path / "ssd_tools" / "shapes.py").write_text(script)
    roots, _ = ssd.find_data("shapes", tmp_path, None, None, None)
    assert roots == [tmp_path / "shapes"]
    assert roots[0].is_dir()


# -- Images


@pytest.mark.parametrize(
    "suffix", [".png", ".jpeg", ".PNG", ".Jpg", ".tif", ".TIFF", ".gif", ".bmp", ".webp", ".jfif"]
)
def test_images_of_other_endings_are_found(tmp_path, suffix):
    (record,) = load(write_voc(tmp_path, {"a": [CAT]}, suffix=suffix)).train
    assert record.image_path.endswith("a" + suffix)
    assert record.read().shape == (30, 40, 3)


def test_images_are_read_as_rgb(tmp_path):
    Image.new("RGB", (8, 6), (200, 100, 50)).save(tmp_path / "a.png")
    image = np.asarray(ssd.open_image(tmp_path / "a.png"))
    assert (image.shape, image.dtype) == ((6, 8, 3), np.uint8)
    assert image[0, 0].tolist() == [200, 100, 50]


def test_grey_images_become_three_equal_channels(tmp_path):
    Image.new("L", (8, 6), 77).save(tmp_path / "a.png")
    assert np.asarray(ssd.open_image(tmp_path / "a.png"))[2, 3].tolist() == [77, 77, 77]


def test_a_turned_image_is_read_as_its_annotation_means_it(tmp_path):
    exif = Image.Exif()
    for tag, size in ((6, (8, 6)), (3, (8, 6)), (6, (8, 8))):  # by 90 degrees, by 180, a square
        pixels = np.zeros((*size[::-1], 3), np.uint8)
        pixels[: size[1] // 2] = 200  # the upper half as stored
        exif[0x0112] = tag
        Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
        stored, upright = size, size[::-1] if tag == 6 else size
        assert ssd.open_image(tmp_path / "a.jpg").size == upright
        assert ssd.open_image(tmp_path / "a.jpg", upright).size == upright
        image = np.asarray(ssd.open_image(tmp_path / "a.jpg", stored))
        assert image.shape[1::-1] == stored
        is_as_stored = image[0].mean() > 150 and image[-1].mean() < 50
        assert is_as_stored == (stored != upright)  # where both readings fit, it is upright


def test_turned_images_whose_annotations_fit_both_readings_are_counted(tmp_path):
    root = write_voc(
        tmp_path, {"plain": [CAT], "half": [CAT], "none": [], "quarter": [CAT], "sizeless": [CAT]}
    )
    exif = Image.Exif()
    for name, tag, size in (
        ("half", 3, (40, 30)),
        ("none", 3, (40, 30)),
        ("quarter", 6, (30, 40)),
        ("sizeless", 6, (30, 40)),
    ):
        exif[0x0112] = tag
        Image.new("RGB", size).save(root / "JPEGImages" / f"{name}.jpg", exif=exif)
    path = root / "Annotations" / "sizeless.xml"
    path.write_text(path.read_text().replace("<width>40", "<width>0"))
    (finding,) = load(root).findings
    assert finding.kind == "image turned by EXIF, both readings fit"
    assert finding.text.startswith(f"{root}, list train: 2 rotated photos (e.g. {finding.places[0]}): ")
    assert [os.path.basename(place) for place in finding.places] == ["half.jpg", "sizeless.jpg"]
    assert load(write_voc(tmp_path / "other", {"plain": [CAT]})).findings == ()


@pytest.mark.parametrize(
    ("orientation", "size", "expected"),
    [
        (1, (8, 8), False),
        (2, (8, 6), True),  # mirrored or upside down: the sides stay
        (3, (8, 6), True),
        (4, (8, 6), True),
        (5, (8, 6), False),  # the sides are swapped
        (6, (8, 6), False),
        (8, (8, 6), False),
        (6, (8, 8), True),
        (6, (0, 0), True),  # no size in the annotation
        (7, (8, 0), True),
        (9, (8, 8), False),  # no orientation
    ],
)
def test_a_turn_is_ambiguous_where_the_size_fits_both_readings(orientation, size, expected):
    assert ssd.is_turn_ambiguous(orientation, *size) == expected


@pytest.mark.parametrize("content", [b"", b"nothing", "cut off"])
def test_an_unreadable_image_is_an_input_error_that_names_it(tmp_path, content):
    root = write_voc(tmp_path, {"a": [CAT]})
    path = root / "JPEGImages" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-40] if content == "cut off" else content)
    assert "a.jpg" in input_error(load(root).train[0].read)


def test_an_image_of_another_size_than_annotated_is_an_input_error_that_names_both(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT]})
    Image.new("RGB", (64, 48)).save(root / "JPEGImages" / "a.jpg")
    message = input_error(load(root).train[0].read)
    for words in ("a.jpg", "64x48", "40x30"):
        assert words in message


# -- Decoded images in memory


@pytest.fixture
def records(tmp_path):
    """Six images of none, one and two objects, all of them large and central."""
    objects = [("cat", (5, 4, 30, 25), False), ("dog", (12, 10, 36, 28), True)]
    return load(write_voc(tmp_path, {f"i{n}": objects[: n % 3] for n in range(6)}, suffix=".png")).train


def test_decoded_images_are_those_of_the_files(records, capsys):
    for record, image in zip(records, ssd.decode_all(records), strict=True):
        np.testing.assert_array_equal(image, record.read())
    assert capsys.readouterr().out == ""


def test_records_of_a_list_are_packed_as_a_split_holds_them(records):
    packed = ssd.pack_records([*records])
    assert packed == records
    for name in ("sizes", "counts", "ends", "boxes_px", "labels", "difficult"):
        assert getattr(packed, name).dtype == getattr(records, name).dtype
    assert len(ssd.pack_records([])) == 0
    assert ssd.pack_records(records) is records


def test_images_that_would_take_a_third_of_the_memory_are_not_decoded(records, monkeypatch, capsys):
    size = sum(r.width * r.height * 3 for r in records)
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 3 * size}
    monkeypatch.setattr(ssd.os, "sysconf", pages.get)
    assert len(ssd.decode_all(records)) == 6
    pages["SC_PHYS_PAGES"] -= 1
    assert ssd.decode_all(records) is None
    assert len(capsys.readouterr().out.splitlines()) == 1
    pages["SC_PHYS_PAGES"] = 6 * size
    assert len(ssd.decode_all(records)) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # as many processes each keep a copy
    assert ssd.decode_all(records) is None


def test_a_broken_image_ends_the_decoding_with_its_name(records):
    shutil.copy(__file__, records[3].image_path)
    assert "i3.png" in input_error(ssd.decode_all, records)


def test_samples_of_decoded_images_read_no_file_and_leave_them_as_they_are(records, monkeypatch):
    dataset = dataset_of(records, seed=3)
    expected = [dataset[i, 1] for i in range(6)]
    pixels = ssd.decode_all(records)
    copies = [image.copy() for image in pixels]
    monkeypatch.setattr(ssd, "open_small", lambda *key: pytest.fail("read again"))
    cached = dataset_of(records, seed=3, pixels=pixels)
    assert all(equal(cached[i, 1], expected[i]) for i in range(6))
    assert all((image == copy).all() for image, copy in zip(pixels, copies, strict=True))


# -- Samples


def dataset_of(records, train=True, **settings):
    transform = ssd.build_transform(train=train, **({"noise": 1.0} if train else {}))
    return ssd.VocDataset(records, transform, ANCHORS, **settings)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_a_sample_has_the_documented_form(records):
    sample = dataset_of(records)[2, 0]
    forms = {name: (tuple(v.shape), v.dtype) for name, v in sample.items() if name != "indices"}
    assert forms == {
        "images": ((3, 300, 300), torch.uint8),
        "matched_gt": ((9966,), torch.int16),
        "gt_boxes": ((2, 4), torch.float32),
        "gt_labels": ((2,), torch.int64),
    }
    assert sample["indices"] == 2


def test_a_plain_sample_is_the_resized_image_with_the_targets_of_its_boxes(records):
    sample = dataset_of(records, train=False)[5]
    assert (sample["images"] == 50).all()
    np.testing.assert_allclose(sample["gt_boxes"], records[5].boxes)
    assert sample["gt_labels"].tolist() == records[5].labels.tolist() == [1, 2]
    labels, box_targets = ssd.build_targets(torch.utils.data.default_collate([sample]), ANCHORS)
    positive = labels[0] > 0
    boxes = ssd.decode(box_targets[0, positive], ANCHORS[positive])
    expected = torch.from_numpy(records[5].boxes)[labels[0, positive] - 1]  # labels 1 and 2, in this order
    torch.testing.assert_close(boxes, expected, atol=1e-5, rtol=0)


def test_a_plain_image_has_its_own_boxes_and_labels(records):
    image, boxes, labels = dataset_of(records, train=False).augment(5)
    assert (image.shape, boxes.dtype, labels.dtype) == ((300, 300, 3), np.float32, np.int64)
    np.testing.assert_allclose(boxes, records[5].boxes)
    assert labels.tolist() == [1, 2]


def test_labels_stay_with_their_boxes_where_a_crop_loses_some(tmp_path):
    objects = [("cat", (2, 2, 12, 28), False), ("dog", (29, 2, 39, 28), False)]
    (record,) = load(write_voc(tmp_path, {"a": objects}, suffix=".png")).train
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[:, SIZE[0] // 2 :] = 255  # cats are black, dogs white
    off = dict.fromkeys(("zoom_out", "color", "shadow", "noise", "blur"), 0.0)
    transform = ssd.build_transform(train=True, **off)
    dataset = ssd.VocDataset([record], transform, ANCHORS, pixels=[pixels])
    kept = set()
    for epoch in range(40):
        image, boxes, labels = dataset.augment(0, epoch)
        kept.add(tuple(sorted(labels)))
        for (x1, y1, x2, y2), label in zip((boxes * 300).astype(int), labels, strict=True):
            assert image[(y1 + y2) // 2, (x1 + x2) // 2, 0] == (0 if label == 1 else 255)
    assert kept == {(1,), (2,), (1, 2)}


def test_a_sample_depends_on_seed_epoch_and_index_alone(records):
    dataset = dataset_of(records, seed=4)
    first = dataset[2, 3]
    for other in (0, 5, 1):  # what was asked for in between, and of global generators, must not matter
        dataset[other, 3]
    np.random.seed(1)
    torch.manual_seed(1)
    assert equal(dataset[2, 3], first)
    assert equal(dataset_of(records, seed=4)[2, 3], first)
    assert not torch.equal(dataset[2, 4]["images"], first["images"])
    assert not torch.equal(dataset_of(records, seed=5)[2, 3]["images"], first["images"])
    # Images 2 and 5 differ by a constant only; so would their augmented versions if the index did not count.
    assert not torch.equal(dataset[5, 3]["gt_boxes"][0], first["gt_boxes"][0])


def test_an_index_alone_means_epoch_zero(records):
    dataset = dataset_of(records)
    assert equal(dataset[2], dataset[2, 0])


class _Mark(A.ImageOnlyTransform):
    """Writes 255 into one pixel of the image when its coin falls so."""

    def __init__(self, column, p=0.5):
        super().__init__(p=p)
        self.column = column

    def apply(self, img, **params):
        img = img.copy()
        img[0, self.column] = 255
        return img


@pytest.mark.filterwarnings("ignore:Got processor for bboxes:UserWarning")
def test_coins_of_two_transforms_are_independent(records):
    bbox_params = A.BboxParams(format="albumentations", label_fields=["rows"])
    dataset = ssd.VocDataset(records, A.Compose([_Mark(0), _Mark(1)], bbox_params=bbox_params), ANCHORS)
    coins = np.array([dataset.augment(0, epoch)[0][0, :2, 0] == 255 for epoch in range(600)])
    # Four outcomes, a quarter each; the standard deviation of a share is .018.
    for first in (False, True):
        for second in (False, True):
            assert abs((coins == (first, second)).all(axis=1).mean() - 0.25) < 0.08


def test_steps_of_the_training_pipeline_have_independent_coins(records):
    bbox_params = A.BboxParams(format="albumentations", label_fields=["rows"])
    steps = ssd.build_transform(train=True).transforms
    compose = A.Compose(steps, bbox_params=bbox_params, save_applied_params=True)
    applied = []

    def transform(**data):
        out = compose(**data)
        applied.append({name for name, _ in out["applied_transforms"]})
        return out

    transform.set_random_state = compose.set_random_state
    dataset = ssd.VocDataset(records, transform, ANCHORS)
    for epoch in range(200):
        dataset.augment(1, epoch)
    names = ("SSDZoomOut", "HorizontalFlip", "ColorJitter", "HueSaturationValue")  # each at probability .5
    coins = np.array([[name in steps for name in names] for steps in applied])
    assert (abs(coins.mean(axis=0) - 0.5) < 0.15).all()
    for i in range(4):
        for j in range(i):
            assert abs((coins[:, i] == coins[:, j]).mean() - 0.5) < 0.15


# -- Batches


def test_the_order_depends_on_seed_and_epoch_and_covers_all():
    sampler = ssd.EpochBatchSampler(12, 4, seed=7)
    first = list(sampler)
    assert list(sampler) == first
    assert [len(batch) for batch in first] == [4, 4, 4]
    assert sorted(i for batch in first for i, _ in batch) == list(range(12))
    assert {epoch for batch in first for _, epoch in batch} == {0}
    second = list(ssd.EpochBatchSampler(12, 4, seed=7, epochs=[1]))
    assert {epoch for batch in second for _, epoch in batch} == {1}
    assert [i for batch in second for i, _ in batch] != [i for batch in first for i, _ in batch]
    both = ssd.EpochBatchSampler(12, 4, seed=7, epochs=range(2))
    assert list(both) == first + second
    assert both.steps_per_epoch == 3
    assert list(ssd.EpochBatchSampler(12, 4, seed=8)) != first


@pytest.mark.parametrize(("count", "batch_size", "lengths"), [(10, 4, [4, 4]), (3, 8, [3]), (4, 4, [4])])
def test_the_last_smaller_batch_is_dropped_unless_it_is_the_only_one(count, batch_size, lengths):
    sampler = ssd.EpochBatchSampler(count, batch_size)
    assert [len(batch) for batch in sampler] == lengths


def test_several_processes_share_the_batches_of_one():
    whole = list(ssd.EpochBatchSampler(14, 6, seed=2))
    parts = [list(ssd.EpochBatchSampler(14, 6, 2, rank=rank, world=3)) for rank in range(3)]
    assert [[len(batch) for batch in part] for part in parts] == [[2, 2]] * 3
    for number, batch in enumerate(whole):
        assert sorted(batch) == sorted(sample for part in parts for sample in part[number])


def test_a_batch_that_processes_cannot_share_is_an_input_error():
    assert "--batch-size" in input_error(ssd.EpochBatchSampler, 100, 8, world=3)
    assert "--batch-size 5 is not a multiple of 2" in input_error(ssd.EpochBatchSampler, 5, 8, world=2)


def test_a_batch_stacks_its_samples(records):
    dataset = dataset_of(records)
    (batch,) = ssd.make_loader(dataset, batch_size=6)
    forms = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    assert forms == {
        "images": ((6, 3, 300, 300), torch.uint8),
        "matched_gt": ((6, 9966), torch.int16),
        "gt_boxes": ((6, 2, 4), torch.float32),
        "gt_labels": ((6, 2), torch.int64),
        "indices": ((6,), torch.int64),
    }
    assert equal({name: value[4] for name, value in batch.items()}, dataset[4])


@pytest.mark.parametrize("in_memory", [False, True])
def test_loader_processes_change_nothing(records, in_memory):
    batches = {}
    for workers in (0, 2):
        dataset = dataset_of(records, seed=1, pixels=ssd.decode_all(records) if in_memory else None)
        sampler = ssd.EpochBatchSampler(len(dataset), 2, seed=1, epochs=range(2))
        batches[workers] = list(ssd.make_loader(dataset, workers=workers, batch_sampler=sampler))
    assert len(batches[0]) == 6
    assert all(equal(a, b) for a, b in zip(batches[0], batches[2], strict=True))
    first, second = (
        torch.cat([b["images"][b["indices"] == 2] for b in part]) for part in (batches[0][:3], batches[0][3:])
    )
    assert len(first) == len(second) == 1
    assert not torch.equal(first, second)  # an image of two epochs


def test_a_loader_draws_nothing_from_the_global_generator(records):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(ssd.make_loader(dataset_of(records, train=False), batch_size=4))
    assert torch.equal(torch.rand(1), expected)


def test_a_loader_for_evaluation_is_in_order_and_complete(records):
    loader = ssd.make_loader(dataset_of(records, train=False), batch_size=4)
    assert [batch["indices"].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5]]


def test_cores_are_shared_by_the_processes_of_the_machine(monkeypatch):
    alone = ssd.usable_cores()
    assert 1 <= alone <= os.cpu_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * alone))
    assert ssd.usable_cores() == 1


# -- Shared memory


@pytest.mark.parametrize(
    ("batches", "expected"),
    [(1000, (4, 4)), (40, (4, 3)), (18, (4, 1)), (12, (2, 1)), (7, (0, 1)), (0, (0, 1))],
)
@pytest.mark.parametrize("world", [1, 3])
def test_loader_processes_fit_into_shared_memory(monkeypatch, capsys, batches, expected, world):
    free = world * batches * 10_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))  # torchrun's processes share it
    monkeypatch.setattr(ssd.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    assert ssd.fit_shared_memory(4, 10_000_000) == expected
    line = capsys.readouterr().err
    assert (line == "") == (expected == (4, 4))
    if line:
        assert len(line.splitlines()) == 1
        for word in (f"{free / 2**20:.0f} MB", "--shm-size", "--ipc=host"):
            assert word in line


def test_what_does_not_fit_is_loaded_without_processes(records, monkeypatch, capsys):
    monkeypatch.setattr(ssd.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 0, 2**20))
    loader = ssd.make_loader(dataset_of(records, train=False), batch_size=4, workers=2)
    assert loader.num_workers == 0
    assert [len(batch["images"]) for batch in loader] == [4, 2]


class _Hanging(ssd.VocDataset):
    def __getitem__(self, key):
        time.sleep(30)


def test_a_loader_that_hangs_ends_with_advice(records, monkeypatch):
    monkeypatch.setattr(ssd, "LOADER_SECONDS", 1.0)
    loader = ssd.make_loader(_Hanging(records, ssd.build_transform(train=False), ANCHORS), workers=1)
    with pytest.raises(RuntimeError) as caught:
        next(iter(loader))
    assert "--ipc=host" in ssd.advise(caught.value)
