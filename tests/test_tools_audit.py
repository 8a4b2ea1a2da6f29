"""ssd_tools/audit.py: every fault is named and counted, and the exit code says if a training can start."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from reference import read_record

import ssd_object_detection as ssd
from ssd_tools import audit

SIZE = (40, 30)  # width, height
CAT = ("cat", (1, 1, 20, 15))
DOG = ("dog", (11, 6, 40, 30))


def annotation(objects, size=SIZE):
    """objects: (name, (xmin, ymin, xmax, ymax))."""
    nodes = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox></object>"
        for name, box in objects
    )
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{nodes}</annotation>"


def write_voc(root, images, **lists):
    """Write images {id: objects}, each of another grey, and lists of ids (default: all in train)."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, (image_id, objects) in enumerate(images.items()):
        Image.new("L", SIZE, 10 * number).save(root / "JPEGImages" / f"{image_id}.jpg")
        (root / "Annotations" / f"{image_id}.xml").write_text(annotation(objects))
    for split, ids in (lists or {"train": images}).items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root


def flags_of(root, *more):
    """The flags that audit a folder with nothing held out."""
    return ["--data", str(root), "--output-dir", str(root / "out"), "--val-fraction", "0", *more]


def use_all(root, **options):
    """Do what a training does with the files of a folder."""
    records = ssd.load_data(str(root), val_fraction=0, **options).train
    samples = ssd.VocDataset(records, ssd.build_transform(train=True), ssd.make_anchors())
    assert all(torch.isfinite(samples[i]["gt_boxes"]).all() for i in range(len(samples)))


@pytest.fixture
def findings(monkeypatch):
    """A function that audits a folder: (exit code, {kind: places}) of audit.json; it draws no picture."""
    monkeypatch.setattr(audit, "plot_data", lambda *_: Figure())

    def run(root, *flags):
        code = audit.main(flags_of(root, *flags))
        content = json.loads((root / "audit.json").read_text())
        assert content["counts"] == {kind: len(places) for kind, places in content["findings"].items()}
        return code, content["findings"]

    return run


def jpeg(image=None):
    """The bytes of a JPEG file; without an image of noise, 400x300."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    return cv2.imencode(".jpg", noise if image is None else image)[1].tobytes()


# -- Images and annotations that cannot be used

USES_A = annotation([("&a;", CAT[1])])
READS = '<!DOCTYPE annotation [<!ENTITY a SYSTEM "file:///etc/hostname">]>' + USES_A
DAMAGES = {  # kind, how: the file and its content, None without it
    "image missing": ("b.jpg", None),
    "image unreadable": ("b.jpg", b"nothing"),
    "image unreadable, empty": ("b.jpg", b""),
    "image and annotation differ in size": ("b.jpg", jpeg()),
    "annotation missing": ("b.xml", None),
    "annotation unreadable": ("b.xml", b"<annotation><size>"),
    "annotation unreadable, a polygon": ("b.xml", annotation([CAT]).replace("bndbox", "polygon").encode()),
    "annotation unreadable, half a box": ("b.xml", annotation([CAT]).replace("xmin", "x").encode()),
    "annotation unreadable, unknown encoding": ("b.xml", b'<?xml version="1.0" encoding="x-none"?><a/>'),
    "annotation unreadable, a file as entity": ("b.xml", READS.encode()),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_stops_a_training_is_found_and_named(case, findings, tmp_path, capsys):
    root = write_voc(tmp_path, {name: [CAT] for name in "abcd"}, train="abc", test="d")
    assert findings(root) == (0, {})
    assert "a training can start" in capsys.readouterr().out
    kind = case.split(",")[0]
    name, content = DAMAGES[case]
    path = root / ("JPEGImages" if name.endswith("jpg") else "Annotations") / name
    path.write_bytes(content) if content is not None else path.unlink()
    code, found = findings(root)
    assert code == 1
    assert list(found) == [kind]
    (place,) = found[kind]
    assert str(path) in place
    out = capsys.readouterr().out
    assert re.search(rf"^ +1 {kind}: stops a training\n +{re.escape(place)}$", out, re.M)
    assert f"mend before a training: {kind}\n" in out
    with pytest.raises(ssd.InputError):  # it does stop one
        use_all(root)


def test_all_faults_are_named_together(findings, tmp_path, capsys):
    root = write_voc(tmp_path, {name: [CAT] for name in "abcdefgh"}, train="abcdefg", test="h")
    for name in "abcd":
        (root / "JPEGImages" / f"{name}.jpg").unlink()
    (root / "JPEGImages" / "e.jpg").write_bytes(b"nothing")
    (root / "Annotations" / "a.xml").write_text("no XML")
    (root / "Annotations" / "e.xml").unlink()
    code, found = findings(root)
    assert code == 1
    assert {kind: len(places) for kind, places in found.items()} == {
        "image missing": 4,
        "image unreadable": 1,
        "annotation missing": 1,
        "annotation unreadable": 1,
    }
    out = capsys.readouterr().out
    assert f"mend before a training: {', '.join(found)}\n" in out
    assert "c.jpg\n         ... and 1 more in audit.json\n" in out


@pytest.mark.parametrize(
    ("content", "is_complete"),
    [
        (jpeg(), True),
        (jpeg()[:20_000], False),
        (jpeg()[:-40], False),
        (jpeg() + b"\0", True),
        (cv2.imencode(".png", np.zeros((300, 400), np.uint8))[1].tobytes(), True),
    ],
)
def test_an_image_that_is_cut_off_is_unreadable(content, is_complete, findings, tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    (root / "JPEGImages" / "b.jpg").write_bytes(content)
    (root / "Annotations" / "b.xml").write_text(annotation([("cat", (101, 76, 300, 225))], (400, 300)))
    code, found = findings(root)
    assert (code, [*found]) == ((0, []) if is_complete else (1, ["image unreadable"]))
    if is_complete:
        use_all(root)


def save_turned(path, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (9, 99, orientation)).save(path, exif=exif)


@pytest.mark.parametrize(
    ("orientation", "stored", "annotated", "reading"),
    [
        (6, (30, 40), (40, 30), "annotated upright"),
        (8, (30, 40), (40, 30), "annotated upright"),
        (5, (40, 30), (40, 30), "annotated as stored"),
        (3, (40, 30), (40, 30), "both readings fit"),
        (2, (40, 30), (40, 30), "both readings fit"),
        (6, (40, 40), (40, 40), "both readings fit"),
        (6, (30, 40), (0, 0), "both readings fit"),
        (1, (40, 30), (40, 30), None),
        (0, (40, 30), (40, 30), None),
        (9, (40, 30), (40, 30), None),
    ],
)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_the_reading_of_a_turned_image_is_told(
    orientation, stored, annotated, reading, ending, findings, tmp_path
):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    (root / "JPEGImages" / "b.jpg").unlink()
    path = root / "JPEGImages" / f"b.{ending}"
    save_turned(path, orientation, stored)
    (root / "Annotations" / "b.xml").write_text(annotation([CAT], annotated))
    code, found = findings(root)
    found.pop("annotation without a size", None)
    assert (code, found) == (0, {f"image turned by EXIF, {reading}": [str(path)]} if reading else {})
    use_all(root)


def test_a_turned_image_that_fits_its_size_in_neither_reading_differs_in_size(findings, tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    save_turned(root / "JPEGImages" / "b.jpg", 6, (50, 60))
    ((kind, (place,)),) = findings(root)[1].items()
    assert kind == "image and annotation differ in size"
    assert "60x50" in place or "50x60" in place
    assert "40x30" in place


@pytest.mark.parametrize("ending", ["gif", "tif", "webp", "mpo"])
def test_an_image_of_several_frames_is_noted(ending, findings, tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    frames = [Image.new("RGB", SIZE, color) for color in ("red", "blue")]
    path = root / "JPEGImages" / ("b.jpg" if ending == "mpo" else f"b.{ending}")
    (root / "JPEGImages" / "b.jpg").unlink()
    frames[0].save(path, format={"mpo": "MPO"}.get(ending), save_all=True, append_images=frames[1:])
    found = {} if ending == "mpo" else {"image of several frames": [str(path)]}  # an MPO is a photo
    assert findings(root) == (0, found)
    assert ssd.open_image(path).getpixel((0, 0))[0] > 240  # the red one


@pytest.mark.parametrize("ending", ["gif", "tif"])
def test_an_image_cut_off_behind_its_first_frame_is_read_as_training_reads_it(ending, findings, tmp_path):
    root = write_voc(tmp_path, {"a": [CAT]})
    path = root / "JPEGImages" / f"a.{ending}"
    (root / "JPEGImages" / "a.jpg").unlink()
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (*SIZE[::-1], 3), np.uint8)) for _ in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    whole, kinds = path.read_bytes(), set()
    for length in range(200, len(whole), 211):
        path.write_bytes(whole[:length])
        code, found = findings(root)
        assert code == ("image unreadable" in found)
        kinds |= {*found}
    assert kinds == {"image unreadable", "image of several frames"}


def test_an_annotation_without_a_size_is_used_with_that_of_the_image(findings, tmp_path, capsys):
    root = write_voc(tmp_path, {"a": [CAT], "b": [("cat", (1, 1, 99, 15))]})
    path = root / "Annotations" / "b.xml"
    path.write_text(path.read_text().replace("<width>40", "<width>0"))
    code, found = findings(root)
    assert code == 0
    assert found == {
        "annotation without a size": [str(path)],
        "box beyond the image": [f"{path}: object 1 (cat) [1, 1, 99, 15]"],
    }
    assert "train       2 images        2 objects" in capsys.readouterr().out


def test_an_image_without_annotation_is_negative_if_asked(findings, tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    (root / "Annotations" / "b.xml").unlink()
    place = f"{root / 'Annotations' / 'b.xml'}: no such file (see --unlabelled)"
    assert findings(root) == (1, {"annotation missing": [place]})
    assert findings(root, "--unlabelled", "negative") == (0, {"image without annotation": [place]})


# -- Objects


def test_what_a_training_mends_is_noted_with_file_and_object(findings, tmp_path, capsys):
    other = ("dog", *CAT[1:])
    boxes = [
        CAT,
        other,
        CAT,
        ("cat", (20, 1, 20, 9)),
        ("cat", (9, 20, 5, 25)),
        ("cat", (60, 1, 70, 9)),
        ("dog", (30, 20, 45, 30)),
        ("dog", (0, 0, 40, 30)),
        ("dog", (1, 4, 40, 7)),
    ]  # the last: IoU .46
    boxes += [("cat", (1, 1, 20, 15 - n / 9)) for n in range(1, 41)]  # less than a tenth is left out
    boxes.append(("cat", (5, 9, 9, 5)))
    root = write_voc(tmp_path, {"a": boxes})
    code, found = findings(root, "--anchors", "paper")
    assert code == 0
    path = root / "Annotations" / "a.xml"
    assert found == {
        "same box and class twice": [f"{path}: object 3 (cat) [1, 1, 20, 15]"],
        "box without area": [f"{path}: object 4 (cat) [20, 1, 20, 9]"],
        "box outside the image": [f"{path}: object 6 (cat) [60, 1, 70, 9]"],
        "box reversed": [f"{path}: object 5 (cat) [9, 20, 5, 25]", f"{path}: object 50 (cat) [5, 9, 9, 5]"],
        "box beyond the image": [f"{path}: object 7 (dog) [30, 20, 45, 30]"],  # object 8 is 0-based
        "object that no anchor overlaps by half": [f"{path}: object 9 (dog) [1, 4, 40, 7]"],
    }
    captured = capsys.readouterr()
    assert re.search(r"^ +2 box reversed: left out; corners swapped, .*$", captured.out, re.M)
    assert "train       1 images       45 objects  (list train)" in captured.out
    assert "2 classes: cat, dog\n" in captured.out
    assert captured.err == ""


coordinate = st.integers(-3, 46) | st.floats(-1, 45)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.tuples(*[coordinate] * 4)), max_size=8))
def test_the_objects_that_are_kept_are_those_of_the_module(tmp_path_factory, objects):
    root = write_voc(tmp_path_factory.mktemp("voc"), {"a": objects + objects[:1]})
    path = root / "Annotations" / "a.xml"
    annotation_of_a = ssd.Annotation(*SIZE, ssd.parse_annotation(path).objects)
    record, dropped = read_record(root, "a", annotation_of_a, ("a", "b"))
    found = {kind: [] for kind in audit.KINDS}
    facts = json.loads(json.dumps(audit.inspect_files(root, "a")))
    assert audit.annotation_of(facts) == annotation_of_a
    kept = audit.check_objects(annotation_of_a, str(path), "ab", found)
    assert [(" ab".index(name), *box) for _, name, box in kept] == [
        (label, *box) for label, box in zip(record.labels, record.boxes, strict=True)
    ]
    kinds = ("box reversed", "box without area", "box outside the image")
    assert sorted(place for kind in kinds for place in found[kind]) == sorted(dropped)
    twice = found["same box and class twice"]
    assert len(kept) + len(dropped) + len(twice) == len(annotation_of_a.objects)


@pytest.mark.parametrize(
    ("objects", "kind", "cause"),
    [
        ([("cat", (0.1, 0.2, 0.5, 0.9)), ("cat", (0, 0, 0.5, 1))], "box under a pixel", "fractions"),
        ([("cat", (20, 15, 1, 1))] * 2, "box reversed", "swapped corners"),
        ([("cat", (20, 15, 9, 9)), ("cat", (10, 9, 9, 8)), CAT], "box reversed", "sizes or swapped corners?"),
    ],
)
def test_a_list_of_boxes_written_otherwise_stops_with_the_cause(objects, kind, cause, findings, tmp_path):
    root = write_voc(tmp_path, {"a": [CAT, DOG], "b": objects}, train="a", val="b")
    code, found = findings(root)
    assert code == 1
    assert len(found.pop(kind)) == 2
    (place,) = found.pop("boxes of a list written otherwise")
    assert "list val" in place
    assert cause in place
    found.pop("object that no anchor overlaps by half", None)  # of half a pixel
    assert found == {}
    with pytest.raises(ssd.InputError):
        ssd.load_data(str(root))


def test_class_names_that_differ_by_a_slip_are_noted_with_their_counts(findings, tmp_path, capsys):
    root = write_voc(tmp_path, {"a": [CAT, DOG], "b": [("Cat", CAT[1]), CAT, ("bird", CAT[1])]})
    code, found = findings(root)
    assert code == 0
    (place,) = found.pop("class names that differ by a slip")
    assert place == "Cat (1) and cat (2)"
    assert found == {}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("objects", [[], [("cat", (20, 1, 20, 9))]])
def test_a_training_list_without_an_object_is_told(objects, findings, tmp_path):
    root = write_voc(tmp_path, {"a": objects, "b": [CAT]}, train="a", test="b")
    code, found = findings(root)
    assert code == 1
    assert found["no object to train on"] == ["the training list"]


def test_a_rare_name_that_is_like_a_frequent_one_is_a_slip(findings, tmp_path):
    names = ("bowk", "bicyle", "car", "goat", "line 2")
    frequent = ("bowl", "bicycle", "cat", "boat", "line 1")
    boxes = [(1, 1, 20, 15 + n) for n in range(10)]
    objects = {name: [(name, box) for box in boxes] for name in frequent}
    rare = [(name, boxes[0]) for name in names] + [("goat", boxes[1])]
    code, found = findings(write_voc(tmp_path, objects | {"rare": rare}))
    assert code == 0
    slips = ["bicycle (10) and bicyle (1)", "bowk (1) and bowl (10)"]
    assert found["class names that differ by a slip"] == slips


def test_classes_given_leave_others_out(findings, tmp_path):
    root = write_voc(tmp_path, {"a": [CAT, DOG], "b": [("walrus", CAT[1]), CAT]}, train="a", test="b")
    code, found = findings(root, "--classes", "cat")
    assert code == 0
    assert [place.split("Annotations")[1][1:] for place in found["object of another class"]] == [
        "a.xml: object 2 (dog) [11, 6, 40, 30]",
        "b.xml: object 1 (walrus) [1, 1, 20, 15]",
    ]


def test_objects_too_small_to_be_seen_are_named(findings, tmp_path):
    root = write_voc(tmp_path, {"a": [CAT]})
    path = root / "Annotations" / "a.xml"
    Image.new("L", (400, 300)).save(root / "JPEGImages" / "a.jpg")
    path.write_text(annotation([("cat", (1, 1, 8, 7)), ("dog", (1, 1, 5, 9))], (400, 300)))
    assert findings(root)[1]["object under 8 pixels at 300x300"] == [f"{path}: object 1 (cat) [1, 1, 8, 7]"]


def test_anchors_are_those_of_a_training(findings, tmp_path, capsys):
    strips = [("dog", (x, y, x + 19, y + 1)) for x in (1, 21) for y in (2, 8, 14, 20, 26)]
    root = write_voc(tmp_path / "voc", {"a": strips})
    assert len(findings(root, "--anchors", "paper")[1]["object that no anchor overlaps by half"]) == 10
    capsys.readouterr()
    assert findings(root) == (0, {})
    assert "anchors  fitted" in capsys.readouterr().out


# -- Lists


def test_an_image_in_two_lists_stops_a_training(findings, tmp_path):
    root = write_voc(tmp_path, {name: [CAT] for name in "abc"}, train="ab", val="bc", test="c")
    code, found = findings(root, "--val-split", "val")
    assert code == 1
    assert found == {
        "image in two lists": [
            f"{root}/JPEGImages/b.jpg (train, val)",
            f"{root}/JPEGImages/c.jpg (val, test)",
        ]
    }
    with pytest.raises(ssd.InputError, match=r"b\.jpg"):
        ssd.load_data(str(root), val_split="val")


@pytest.mark.parametrize(
    ("objects", "lists", "code"),
    [
        ([CAT], {"train": "ab", "test": "c"}, 1),
        ([CAT], {"train": "abc"}, 0),
        ([], {"train": "ab", "test": "c"}, 0),
    ],
)
def test_the_same_pixels_in_two_lists_are_a_leak(objects, lists, code, findings, tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": objects, "c": objects}, **lists)
    shutil.copy(root / "JPEGImages" / "b.jpg", root / "JPEGImages" / "c.jpg")
    kind = "same pixels in two lists" if code else "same pixels twice"
    images = root / "JPEGImages"
    last = "train" if len(lists) == 1 else "test"
    assert findings(root) == (code, {kind: [f"{images}/c.jpg ({last}) has those of {images}/b.jpg (train)"]})


def test_voc_is_read_from_both_years_with_its_classes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit, "plot_data", lambda *_: Figure())
    devkit = tmp_path / "VOCdevkit"
    write_voc(devkit / "VOC2007", {"a": [CAT], "b": [CAT]}, trainval="a", test="b")
    shutil.copytree(devkit / "VOC2007", devkit / "VOC2012")
    (devkit / "VOC2012" / "Annotations" / "a.xml").write_text(annotation([("walrus", CAT[1])]))
    Image.new("L", SIZE, 200).save(devkit / "VOC2012" / "JPEGImages" / "a.jpg")
    flags = ["--data-root", str(tmp_path), "--output-dir", str(tmp_path), "--val-fraction", "0"]
    assert audit.main(["--data", "voc2007", *flags]) == 0
    assert re.search(r"^20 classes: aeroplane, .*, tvmonitor$", capsys.readouterr().out, re.M)
    assert audit.main(["--data", "voc0712", *flags]) == 0
    out = capsys.readouterr().out
    assert "train       2 images" in out
    assert "test        1 images" in out
    assert f"{devkit / 'VOC2012' / 'Annotations' / 'a.xml'}: object 1 (walrus)" in out


# -- Files


def test_only_changed_files_are_read_again(findings, tmp_path, monkeypatch):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT], "c": [DOG]})
    first = findings(root)
    read = []
    inspect = audit.inspect_files
    monkeypatch.setattr(audit, "inspect_files", lambda root, name: read.append(name) or inspect(root, name))
    assert findings(root) == first
    assert read == []
    (root / "Annotations" / "b.xml").write_text(annotation([CAT, CAT]))
    os.utime(root / "JPEGImages" / "c.jpg", (1, 1))
    assert list(findings(root)[1]) == ["same box and class twice"]
    assert sorted(read) == ["b", "c"]
    content = json.loads((root / "audit.json").read_text())
    (root / "audit.json").write_text(json.dumps(content | {"version": 1}))  # of another program
    assert list(findings(root)[1]) == ["same box and class twice"]
    assert sorted(read[2:]) == ["a", "b", "c"]
    moved = root.rename(tmp_path.with_name("moved"))  # whose files keep their time
    places = findings(moved)[1]["same box and class twice"]
    assert places == [f"{moved / 'Annotations' / 'b.xml'}: object 2 (cat) [1, 1, 20, 15]"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 0, "files": {"a": {}}}', '{"version": 2}'])
def test_a_broken_audit_file_is_made_anew(content, findings, tmp_path):
    root = write_voc(tmp_path, {"a": [CAT]})
    (root / "audit.json").write_text(content)
    assert findings(root) == (0, {})
    assert list(json.loads((root / "audit.json").read_text())["files"]) == ["a"]
    assert not list(root.glob(".*"))


def test_an_audit_file_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, capsys):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert audit.main(flags_of(root)) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"warning: {root / 'audit.json'} was not written: ")
    assert "a training can start" in captured.out


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_found_or_trained_through(tmp_path_factory, data):
    root = write_voc(tmp_path_factory.mktemp("voc"), {"a": [CAT], "b": [CAT, DOG]})
    (root / "JPEGImages" / "b.jpg").write_bytes(jpeg(np.full((30, 40, 3), 99, np.uint8)))
    path = root / data.draw(st.sampled_from(["Annotations/b.xml", "JPEGImages/b.jpg"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "plot_data", lambda *_: Figure())
        code = audit.main(flags_of(root, "--classes", "cat"))
    try:
        use_all(root, classes=("cat",))
    except ssd.InputError:
        assert code == 1
    else:
        assert code == 0


# -- The program


def test_the_plot_counts_the_objects_and_those_matched_by_an_anchor():
    # Squares of 30 and 60 pixels at a cell's centre fit anchors; a 2-pixel box and a 290 x 8 strip fit none.
    squares = [[150 - s / 2, 150 - s / 2, 150 + s / 2, 150 + s / 2] for s in (30, 60, 2)]
    boxes = np.float32([*squares, [5, 100, 295, 108]]) / 300
    objects = [audit.Object("", name, box, ["train"]) for name, box in zip("aaa$", boxes, strict=True)]
    figure = audit.plot_data(objects, ssd.best_anchor_iou(boxes), ("a", "$", "c$", "\u732b \u00f6"), 3)
    counts, sizes, shares = figure.axes
    assert [bar.get_width() for bar in counts.patches] == [3, 1, 0, 0]
    assert [bar.get_width() for bar in shares.patches] == pytest.approx([2 / 3, 0, 0, 0])
    assert "0.500" in shares.get_title()
    assert "4 objects in 3" in counts.get_title()
    assert sizes.collections[0].get_offsets().tolist() == pytest.approx(
        np.array([[30, 30], [60, 60], [2, 2], [290, 8]]), abs=1e-3
    )
    figure.canvas.draw()  # of a formula between two $ it would raise
    labels = [label.get_text() for label in counts.get_yticklabels()]
    assert labels == ["a", r"\$", r"c\$", r"\u732b" " \u00f6"]  # the font has no Chinese letters


def test_the_plot_of_many_classes_shows_the_rarest():
    names = [f"class {n:03d}" for n in range(100)]
    boxes = np.tile(np.float32([0, 0, 0.5, 0.5]), (1000, 1))
    objects = [audit.Object("", names[max(n % 100, n // 20)], box, ["train"]) for n, box in enumerate(boxes)]
    counts = Counter(one.name for one in objects)
    figure = audit.plot_data(objects, np.ones(1000), names, 3)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(shown) == 40
    assert max(counts[name] for name in shown) <= min(counts[name] for name in set(names) - set(shown))
    assert figure.get_figheight() < 12


def test_the_program_writes_audit_json_and_data_png_alone(make_voc, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = make_voc(tmp_path / "voc", {"train": 4, "val": 1})
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert audit.main(["--data", "voc", "--val-split", "val"]) == 0
    assert "4 images" in capsys.readouterr().out
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before.keys()
    assert written == {data / "audit.json", tmp_path / "plots" / "data.png"}
    assert Image.open(tmp_path / "plots" / "data.png").width == 1400
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    "flags",
    [["--data", "nowhere"], ["--train-split", "none"], ["--classes", "cat,walrus"], ["--val-split", "none"]],
)
def test_a_mistake_is_told_in_one_line(flags, tmp_path, capsys):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    assert audit.main(flags_of(root, *flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert flags[1].split(",")[-1] in error


def test_what_the_module_refuses_besides_is_told(tmp_path, capsys):
    root = write_voc(tmp_path, {"a": [CAT]})
    assert audit.main(flags_of(root, "--val-fraction", ".1")) == 2
    assert "no objects left to train on" in capsys.readouterr().err
    assert audit.main(flags_of(root)) == 0


def test_what_a_training_tells_besides_is_told(tmp_path, capsys):
    root = write_voc(tmp_path, {"a": [CAT], "b": []}, train="a", val="b")
    assert audit.main(flags_of(root)) == 0
    assert "warning: the validation images have no objects" in capsys.readouterr().err
    shutil.rmtree(root / "ImageSets")
    assert audit.main(flags_of(root)) == 0
    assert f"{root} has no lists: all its annotated images are trained on\n" in capsys.readouterr().out


def test_help_is_that_of_the_program(capsys):
    assert audit.main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == audit.__doc__.strip()


def test_a_test_list_without_the_classes_stops_a_training(tmp_path, capsys):
    root = write_voc(tmp_path, {"a": [CAT], "b": [("walrus", CAT[1])]}, train="a", test="b")
    assert audit.main(["--data", str(root), "--output-dir", str(tmp_path / "out")]) == 2
    assert "list test: nothing of cat" in capsys.readouterr().err
