import itertools
import json
import math
import os
import re
import shutil
import urllib.error
import zlib
from pathlib import Path

import albumentations as A
import cv2
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ssd_object_detection as ssd

SIZE = (40, 30)  # width, height


def annotation(objects, size=SIZE):
    """objects: (name, (xmin, ymin, xmax, ymax), difficult)."""
    nodes = "".join(
        f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox><xmin>{box[0]}</xmin>"
        f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, box, difficult in objects
    )
    return (f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
            f"{nodes}</annotation>")


def write_voc(root, images, suffix=".jpg", **lists):
    """Write a folder in VOC layout; images: {id: objects}, lists: ids of each split (default: train has all)."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, (image_id, objects) in enumerate(images.items()):
        pixels = np.full((SIZE[1], SIZE[0], 3), 10 * number % 256, np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{image_id}{suffix}")
        (root / "Annotations" / f"{image_id}.xml").write_text(annotation(objects))
    for split, ids in (lists or {"train": list(images)}).items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
    return root


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


CAT = ("cat", (1, 1, 20, 15), False)
DOG = ("dog", (11, 6, 40, 30), True)


# -- Reading VOC annotations


def test_coordinates_become_zero_based_edges(tmp_path):
    data = ssd.load_data(str(write_voc(tmp_path, {"a": [CAT, DOG]})), val_fraction=0)
    (record,) = data.train
    assert record.boxes_px.tolist() == [[0, 0, 20, 15], [10, 5, 40, 30]]
    assert record.boxes_px.dtype == np.float32
    np.testing.assert_allclose(record.boxes, [[0, 0, 0.5, 0.5], [0.25, 1 / 6, 1, 1]], atol=1e-6)
    assert (record.width, record.height, record.image_id) == (40, 30, "a")
    assert data.notes == []


def test_difficult_is_kept_as_a_mark(tmp_path):
    (record,) = ssd.load_data(str(write_voc(tmp_path, {"a": [CAT, DOG]})), val_fraction=0).train
    assert record.difficult.tolist() == [False, True]
    assert record.difficult.dtype == bool
    assert record.labels.tolist() == [1, 2]
    assert record.labels.dtype == np.int64


def test_parse_annotation_returns_what_is_written_and_skips_parts(tmp_path):
    path = tmp_path / "a.xml"
    # VOC marks the head of a person as a part of the object: its name and box are not the object's.
    path.write_text(
        "<annotation><size><width>40</width><height>30</height></size><object><part><name>head</name><bndbox>"
        "<xmin>5</xmin><ymin>5</ymin><xmax>6</xmax><ymax>6</ymax></bndbox></part><name>person</name>"
        "<bndbox><xmax>20.5</xmax><xmin>3</xmin><ymin>4</ymin><ymax>9</ymax></bndbox></object></annotation>"
    )
    assert ssd.parse_annotation(path) == (40, 30, [("person", [3, 4, 20.5, 9], False)])


@pytest.mark.parametrize("box", [(5, 5, 5, 20), (20, 5, 10, 20), (5, 9, 20, 8), (41, 5, 60, 20), (5, -20, 20, -3)])
def test_box_without_area_is_dropped_and_noted(tmp_path, box):
    root = write_voc(tmp_path, {"a": [("dog", box, False), CAT]})
    data = ssd.load_data(str(root), val_fraction=0)
    assert data.classes == ("cat", "dog")
    assert data.train[0].labels.tolist() == [1]
    assert data.train[0].boxes_px.tolist() == [[0, 0, 20, 15]]
    assert len(data.notes) == 1
    assert "dropped" in data.notes[0]
    assert "a.xml object 1 (dog)" in data.notes[0]


def test_box_beyond_the_picture_is_clipped_and_noted(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT, ("cat", (-9, 11, 60, 40), False)]})
    data = ssd.load_data(str(root), val_fraction=0)
    assert data.train[0].boxes_px.tolist() == [[0, 0, 20, 15], [0, 10, 40, 30]]
    assert len(data.notes) == 1
    assert "clipped" in data.notes[0]
    assert "a.xml object 2 (cat)" in data.notes[0]


def test_zero_based_annotation_is_clipped_without_a_note(tmp_path):
    data = ssd.load_data(str(write_voc(tmp_path, {"a": [("cat", (0, 0, 20, 15), False)]})), val_fraction=0)
    assert data.train[0].boxes_px.tolist() == [[0, 0, 20, 15]]
    assert data.notes == []


def test_notes_count_all_and_name_few(tmp_path):
    root = write_voc(tmp_path, {f"i{n}": [CAT, ("cat", (7, 7, 7, 7), False)] for n in range(5)})
    (note,) = ssd.load_data(str(root), val_fraction=0).notes
    assert note.split()[0] == "5"
    assert "dropped" in note
    assert "i0.xml" in note
    assert "i4.xml" not in note


@pytest.mark.parametrize(
    "text",
    [
        "<annotation><size>", "not xml at all", "",
        "<annotation></annotation>",  # no size
        "<annotation><size><width>40</width></size></annotation>",
        "<annotation><size><width>0</width><height>30</height></size></annotation>",
        "<annotation><size><width>wide</width><height>30</height></size></annotation>",
        "<annotation><size><width>nan</width><height>inf</height></size></annotation>",
        annotation([("cat", (1, 2, "x", 4), False)]), annotation([("cat", (1, 2, "nan", 4), False)]),
        annotation([("", (1, 2, 3, 4), False)]),
        annotation([]).replace("</annotation>", "<object><name>cat</name></object></annotation>"),
    ],
)
def test_malformed_annotation_is_an_input_error_that_names_the_file(tmp_path, text):
    root = write_voc(tmp_path, {"fine": [CAT], "broken": [CAT]})
    (root / "Annotations" / "broken.xml").write_text(text)
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data(str(root), val_fraction=0)
    assert "broken.xml" in one_line(error)


def test_missing_annotation_is_an_input_error_that_names_the_file(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    (root / "Annotations" / "b.xml").unlink()
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data(str(root))
    assert "b.xml" in one_line(error)


def test_missing_image_is_an_input_error_that_names_the_file(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT]})
    (root / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data(str(root))
    assert "b.jpg" in one_line(error)


def test_unknown_class_in_another_list_is_an_input_error_that_names_the_file(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [DOG]}, train=["a"], test=["b"])
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data(str(root), test_split="test", val_fraction=0)
    assert "b.xml" in one_line(error)
    assert "'dog'" in one_line(error)


def test_missing_list_is_an_input_error_that_names_those_there(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT]}, trainval=["a"])
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data(str(root), train_split="train")
    assert "train.txt" in one_line(error)
    assert "trainval" in one_line(error)


def test_empty_list_is_an_input_error_that_names_the_file(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT]}, train=[])
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data(str(root))
    assert "train.txt" in one_line(error)


def test_missing_folder_is_an_input_error_that_names_it(tmp_path):
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data(str(tmp_path / "nowhere"))
    assert "nowhere" in one_line(error)


def test_list_takes_the_first_word_of_each_line(tmp_path):
    # Per-class lists of VOC have a second column, 1 or -1.
    root = write_voc(tmp_path, {"a": [CAT], "b c": []}, train=["a  1", "", "b -1"])
    assert ssd.read_split(root, "train") == ["a", "b"]


def test_an_image_listed_twice_counts_once(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": []}, train=["a", "b", "a"])
    assert ssd.read_split(root, "train") == ["a", "b"]


@pytest.mark.parametrize("suffix", [".png", ".jpeg", ".PNG"])
def test_images_of_other_endings_are_found(tmp_path, suffix):
    root = write_voc(tmp_path, {"a": [CAT]}, suffix=suffix)
    data = ssd.load_data(str(root), val_fraction=0)
    assert data.train[0].image_path.endswith("a" + suffix)
    assert ssd.VocDataset(data.train, ssd.build_transform(train=False))[0]["image"].shape == (3, 300, 300)


def test_images_are_read_as_rgb(tmp_path):
    Image.new("RGB", (8, 6), (200, 100, 50)).save(tmp_path / "a.png")
    image = ssd.read_image(tmp_path / "a.png")
    assert image.shape == (6, 8, 3)
    assert image.dtype == np.uint8
    assert image[0, 0].tolist() == [200, 100, 50]


def test_grey_images_become_three_equal_channels(tmp_path):
    Image.new("L", (8, 6), 77).save(tmp_path / "a.png")
    assert ssd.read_image(tmp_path / "a.png")[2, 3].tolist() == [77, 77, 77]


# -- The audit


def bad_image(root, content):
    (root / "JPEGImages" / "b.jpg").write_bytes(content)


def jpeg():
    """The bytes of a picture with content, 400x300."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def black_png(width, height):
    """A black and white PNG without white: whole, and a few thousandths of its pixels long."""
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


LAUGHS = ('<!DOCTYPE annotation [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>' + annotation([CAT])).replace(
    "cat", "&b;")
OUTSIDE = '<!DOCTYPE annotation SYSTEM "http://127.0.0.1:9/voc.dtd">' + annotation([CAT])
READS = ('<!DOCTYPE annotation [<!ENTITY a SYSTEM "file:///etc/hostname">]>' + annotation([CAT])).replace("cat", "&a;")
UNUSABLE = {
    "image missing": lambda root: (root / "JPEGImages" / "b.jpg").unlink(),
    "image unreadable": lambda root: bad_image(root, b"nothing"),
    "image unreadable, empty": lambda root: bad_image(root, b""),
    "image unreadable, truncated": lambda root: bad_image(root, jpeg()[:20_000]),
    "image unreadable, short of its last bytes": lambda root: bad_image(root, jpeg()[:-40]),
    "image unreadable, a decompression bomb": lambda root: bad_image(root, black_png(15_000, 10_000)),
    "image and annotation differ in size": lambda root: bad_image(root, jpeg()),
    "annotation missing": lambda root: (root / "Annotations" / "b.xml").unlink(),
    "annotation unreadable": lambda root: (root / "Annotations" / "b.xml").write_text("<annotation><size>"),
    "annotation unreadable, of an unknown encoding":
        lambda root: (root / "Annotations" / "b.xml").write_text('<?xml version="1.0" encoding="x-none"?><a/>'),
    "annotation unreadable, with entities": lambda root: (root / "Annotations" / "b.xml").write_text(LAUGHS),
    "annotation unreadable, with entities in UTF-16": lambda root: (root / "Annotations" / "b.xml").write_bytes(
        ('<?xml version="1.0" encoding="utf-16"?>' + LAUGHS).encode("utf-16")),
    "annotation unreadable, with a remote document type":
        lambda root: (root / "Annotations" / "b.xml").write_text(OUTSIDE),
    "annotation unreadable, with a file as entity": lambda root: (root / "Annotations" / "b.xml").write_text(READS),
    "image also in the test list": lambda root: (root / "JPEGImages" / "b.jpg").write_bytes(
        (root / "JPEGImages" / "d.jpg").read_bytes()),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_used_stops_or_is_left_out_and_said(tmp_path, capsys, case):
    images = {"a": [CAT], "b": [CAT], "c": [CAT], "d": [CAT]}
    root = write_voc(tmp_path, images, train=["a", "b", "c"], test=["d"])
    how = {"val_fraction": 0, "test_split": "test"}
    ssd.load_data(str(root), **how)
    UNUSABLE[case](root)
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data(str(root), **how)
    assert re.search(r"\bb\.(jpg|xml)", one_line(error))
    assert "--allow-bad-data" in one_line(error)
    kind = case.split(",")[0]
    assert re.search(rf"^ +1  {kind}: unusable .*\bb\.(jpg|xml)", capsys.readouterr().out, re.M)
    data = ssd.load_data(str(root), **how, allow_bad_data=True)
    assert [r.image_id for r in data.train] == ["a", "c"]
    assert [r.image_id for r in data.test] == ["d"]
    assert "leaves out 1 image(s)" in capsys.readouterr().out
    report = json.loads((root / "audit.json").read_text())
    assert report["counts"][kind] == 1
    assert "b." in report["findings"][kind][0]


def test_an_unknown_class_in_another_list_leaves_its_image_out(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [DOG], "c": [CAT]}, train=["a"], test=["b", "c"])
    data = ssd.load_data(str(root), test_split="test", val_fraction=0, allow_bad_data=True)
    assert [r.image_id for r in data.test] == ["c"]


def test_a_box_that_stands_twice_counts_once_and_of_two_classes_twice(tmp_path):
    other = ("dog", *CAT[1:])
    data = ssd.load_data(str(write_voc(tmp_path, {"a": [CAT, other, CAT]})), val_fraction=0)
    assert data.train[0].labels.tolist() == [1, 2]
    (note,) = data.notes
    assert "twice" in note
    assert "a.xml object 3 (cat)" in note


def test_a_picture_that_is_also_held_out_leaves_the_training_list(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT], "c": [CAT]}, train=["a", "b"], val=["c"])
    shutil.copy(root / "JPEGImages" / "a.jpg", root / "JPEGImages" / "c.jpg")
    data = ssd.load_data(str(root), val_split="val")
    assert [[r.image_id for r in part] for part in (data.train, data.val)] == [["b"], ["c"]]
    assert "a.jpg has the pixels of " in data.notes[0]


def test_an_object_that_no_anchor_overlaps_by_half_is_kept_and_counted(tmp_path):
    data = ssd.load_data(str(write_voc(tmp_path, {"a": [CAT, ("dog", (1, 4, 40, 5), False)]})), val_fraction=0)
    assert data.train[0].labels.tolist() == [1, 2]
    assert "no anchor" in data.notes[0]
    assert "a.xml object 2 (dog)" in data.notes[0]


@given(hnp.arrays(np.float32, (5, 4), elements=st.floats(0, 1, width=32)))
def test_the_best_anchor_is_that_of_all_of_them(corners):
    low, high = np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:]) + 0.01
    boxes = torch.from_numpy(np.concatenate((low, high), axis=1))
    anchors = ssd.box_convert(ssd.make_anchors(), "cxcywh", "xyxy")
    best = torchvision.ops.box_iou(boxes, anchors).amax(dim=1)
    torch.testing.assert_close(ssd.best_anchor_iou(boxes), best, atol=1e-5, rtol=0)


@pytest.mark.parametrize("image_id", ["../secret", "/etc/passwd", "a/../../b", "..\\secret", "C:\\secret"])
def test_a_list_cannot_leave_the_data_folder(tmp_path, image_id):
    root = write_voc(tmp_path, {"a": [CAT]}, train=["a", image_id])
    with pytest.raises(ssd.InputError, match="leaves the data folder") as error:
        ssd.load_data(str(root))
    assert image_id in one_line(error)
    assert "train.txt" in one_line(error)


def test_the_file_name_in_an_annotation_is_never_followed(tmp_path):
    root = write_voc(tmp_path / "voc", {"a": [CAT], "b": [CAT]})
    path = root / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<size>", "<folder>..</folder><filename>../../x.jpg</filename><size>"))
    assert ssd.load_data(str(root), val_fraction=0).train[0].image_path == str(root / "JPEGImages" / "a.jpg")


def test_only_changed_files_are_read_again(tmp_path, monkeypatch):
    root = write_voc(tmp_path, {"a": [CAT], "b": [CAT], "c": [DOG]})
    first, read, whole = ssd.load_data(str(root), val_fraction=0), [], ssd.inspect
    monkeypatch.setattr(ssd, "inspect", lambda root, image_id: read.append(image_id) or whole(root, image_id))
    again = ssd.load_data(str(root), val_fraction=0)
    assert read == []
    for a, b in zip(first.train, again.train, strict=True):
        assert (a.image_id, a.width, a.height, a.digest) == (b.image_id, b.width, b.height, b.digest)
        assert np.array_equal(a.boxes_px, b.boxes_px)
        assert np.array_equal(a.labels, b.labels)
        assert np.array_equal(a.difficult, b.difficult)
    (root / "Annotations" / "b.xml").write_text(annotation([CAT, ("cat", (2, 2, 39, 29), False)]))
    os.utime(root / "JPEGImages" / "c.jpg", (1, 1))
    assert len(ssd.load_data(str(root), val_fraction=0).train[1].labels) == 2
    assert sorted(read) == ["b", "c"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 0, "files": {}}', '{"version": 1}'])
def test_a_broken_audit_file_is_made_anew(tmp_path, content):
    root = write_voc(tmp_path, {"a": [CAT]})
    (root / "audit.json").write_text(content)
    assert len(ssd.load_data(str(root), val_fraction=0).train) == 1
    assert list(json.loads((root / "audit.json").read_text())["files"]) == ["a"]
    assert not list(root.glob(".*"))


def test_an_audit_file_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, capsys):
    root = write_voc(tmp_path, {"a": [CAT]})

    def refuse(*args, **more):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert len(ssd.load_data(str(root), val_fraction=0).train) == 1
    assert "Read-only" in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_found_or_trained_through(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("voc")
    write_voc(root, {"a": [CAT], "b": [CAT, DOG]})
    (root / "JPEGImages" / "b.jpg").write_bytes(cv2.imencode(".jpg", np.full((30, 40, 3), 99, np.uint8))[1].tobytes())
    path = root / data.draw(st.sampled_from(["Annotations/b.xml", "JPEGImages/b.jpg"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))]))
    found = ssd.load_data(str(root), classes=("cat",), val_fraction=0, allow_bad_data=True)
    samples = ssd.VocDataset(found.train, ssd.build_transform(train=True))
    assert all(torch.isfinite(samples[i]["boxes"]).all() for i in range(len(samples)))
    report = json.loads((root / "audit.json").read_text())
    assert (len(found.train) == 2) == (not any(ssd.AUDIT_KINDS[kind] is None for kind in report["counts"]))


# -- Classes and splits


def test_classes_of_a_folder_are_those_of_its_training_list_in_order_of_the_alphabet(tmp_path):
    root = write_voc(tmp_path, {"a": [("zebra", (1, 1, 9, 9), False), CAT], "b": [DOG]})
    data = ssd.load_data(str(root), val_fraction=0)
    assert data.classes == ("cat", "dog", "zebra")
    assert [r.labels.tolist() for r in data.train] == [[3, 1], [2]]


def test_classes_given_set_the_labels_and_leave_others_out(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT, DOG], "b": [("zebra", (1, 1, 9, 9), False)]})
    data = ssd.load_data(str(root), classes=("zebra", "cat"), val_fraction=0)
    assert data.classes == ("zebra", "cat")
    assert [r.labels.tolist() for r in data.train] == [[2], [1]]
    assert len(data.notes) == 1
    assert "a.xml object 2 (dog)" in data.notes[0]


def test_class_given_that_the_training_list_lacks_is_an_input_error(tmp_path):
    root = write_voc(tmp_path, {"a": [CAT]})
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data(str(root), classes=("cat", "unicorn"))
    assert "unicorn" in one_line(error)


def test_voc2007_has_its_twenty_classes_whatever_the_list_holds(tmp_path):
    write_voc(tmp_path / "VOCdevkit" / "VOC2007", {"a": [CAT], "b": [DOG]})
    data = ssd.load_data("voc2007", data_root=str(tmp_path), val_fraction=0)
    assert data.classes == ssd.VOC_CLASSES
    assert [r.labels.tolist() for r in data.train] == [[8], [12]]


def test_images_without_objects_are_legal(tmp_path):
    root = write_voc(tmp_path, {"a": [], "b": [CAT]})
    data = ssd.load_data(str(root), val_fraction=0)
    empty = data.train[0]
    assert empty.boxes_px.shape == (0, 4)
    assert empty.boxes.shape == (0, 4)
    for train in (False, True):
        sample = ssd.VocDataset(data.train, ssd.build_transform(train=train))[0]
        assert sample["boxes"].shape == (0, 4)
        assert sample["labels"].shape == sample["difficult"].shape == (0,)


def test_training_list_without_any_object_is_an_input_error(tmp_path):
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data(str(write_voc(tmp_path, {"a": [], "b": []})))
    assert "object" in one_line(error)


def test_held_out_share_is_disjoint_and_covers_the_list_with_the_rest(tmp_path):
    root = write_voc(tmp_path, {f"i{n:02d}": [CAT] for n in range(20)})

    def ids(records):
        return [r.image_id for r in records]

    splits = {seed: ssd.load_data(str(root), val_fraction=0.25, seed=seed) for seed in (0, 1)}
    for data in splits.values():
        assert len(data.val) == 5
        assert sorted(ids(data.train) + ids(data.val)) == [f"i{n:02d}" for n in range(20)]
        assert data.test == []
    assert ids(ssd.load_data(str(root), val_fraction=0.25, seed=0).val) == ids(splits[0].val)
    assert ids(splits[0].val) != ids(splits[1].val)


def test_val_fraction_zero_holds_nothing_out_and_a_small_one_at_least_one(tmp_path):
    root = write_voc(tmp_path, {f"i{n}": [CAT] for n in range(4)})
    assert ssd.load_data(str(root), val_fraction=0).val == []
    assert len(ssd.load_data(str(root), val_fraction=0.01).val) == 1


def test_nothing_left_to_train_on_is_an_input_error(tmp_path):
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data(str(write_voc(tmp_path, {"a": [CAT]})), val_fraction=0.5)
    assert "--val-fraction" in one_line(error)


def test_named_lists_are_used_as_they_are(tmp_path):
    images = {"a": [CAT], "b": [CAT], "c": [CAT], "d": [CAT]}
    root = write_voc(tmp_path, images, train=["a", "b"], val=["c"], test=["d"])
    data = ssd.load_data(str(root), val_split="val", test_split="test")
    assert [[r.image_id for r in part] for part in (data.train, data.val, data.test)] == [["a", "b"], ["c"], ["d"]]


def test_voc0712_trains_on_both_years_and_tests_on_2007(tmp_path):
    for year in (2007, 2012):
        root = tmp_path / "VOCdevkit" / f"VOC{year}"
        write_voc(root, {f"{year}a": [CAT], f"{year}b": [CAT]}, trainval=[f"{year}a"], test=[f"{year}b"])
    data = ssd.load_data("voc0712", data_root=str(tmp_path), train_split="trainval", test_split="test", val_fraction=0)
    assert [r.image_id for r in data.train] == ["2007a", "2012a"]
    assert [r.image_id for r in data.test] == ["2007b"]


def test_voc2007_that_cannot_be_fetched_is_an_input_error_that_says_what_to_do(tmp_path, monkeypatch):
    calls = []

    def refuse(*args, **kwargs):
        calls.append(kwargs)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", refuse)
    with pytest.raises(ssd.InputError) as error:
        ssd.load_data("voc2007", data_root=str(tmp_path))
    assert len(calls) == 1
    text = one_line(error)
    for word in ("--data ", "--data-root", "no route to host"):
        assert word in text


def test_voc2007_that_is_there_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "VOCDetection", lambda *a, **k: pytest.fail("fetched"))
    write_voc(tmp_path / "VOCdevkit" / "VOC2007", {"a": [CAT], "b": [DOG]})
    assert len(ssd.load_data("voc2007", data_root=str(tmp_path), val_fraction=0).train) == 2


# -- Samples and batches


@pytest.fixture
def records(tmp_path):
    # Every object is large and central, so that no augmentation can lose all of them too often.
    objects = [("cat", (5, 4, 30, 25), False), ("dog", (12, 10, 36, 28), True)]
    root = write_voc(tmp_path, {f"i{n}": objects[: n % 3] for n in range(6)}, suffix=".png")
    return ssd.load_data(str(root), val_fraction=0).train


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_sample_has_the_documented_form(records):
    sample = ssd.VocDataset(records, ssd.build_transform(train=True))[2, 0]
    assert sample["image"].shape == (3, 300, 300)
    assert sample["image"].dtype == torch.uint8
    assert (sample["boxes"].dtype, sample["labels"].dtype) == (torch.float32, torch.int64)
    assert sample["difficult"].dtype == torch.bool
    assert sample["index"] == 2


def test_plain_sample_is_the_resized_picture_with_its_boxes(records):
    sample = ssd.VocDataset(records, ssd.build_transform(train=False))[5]
    assert (sample["image"] == 50).all()
    torch.testing.assert_close(sample["boxes"], torch.from_numpy(records[5].boxes))
    assert sample["labels"].tolist() == [1, 2]
    assert sample["difficult"].tolist() == [False, True]


def test_sample_depends_on_seed_epoch_and_index_alone(records):
    transform = ssd.build_transform(train=True, noise=1.0)
    dataset = ssd.VocDataset(records, transform, seed=4)
    first = dataset[2, 3]
    for other in (0, 5, 1):  # what was asked for in between, and of global generators, must not matter
        dataset[other, 3]
    np.random.seed(1)
    torch.manual_seed(1)
    assert equal(dataset[2, 3], first)
    assert equal(ssd.VocDataset(records, ssd.build_transform(train=True, noise=1.0), seed=4)[2, 3], first)
    assert not torch.equal(dataset[2, 4]["image"], first["image"])
    assert not torch.equal(ssd.VocDataset(records, transform, seed=5)[2, 3]["image"], first["image"])
    # Images 2 and 5 differ by a constant only; so would their augmented versions if the index did not count.
    assert not torch.equal(dataset[5, 3]["boxes"], first["boxes"])


def test_an_index_alone_means_epoch_zero(records):
    dataset = ssd.VocDataset(records, ssd.build_transform(train=True))
    assert equal(dataset[2], dataset[2, 0])


def test_worker_processes_change_nothing(records):
    batches = {}
    for workers in (0, 2):
        dataset = ssd.VocDataset(records, ssd.build_transform(train=True, noise=1.0), seed=1)
        sampler = ssd.EpochBatchSampler(len(dataset), 2, seed=1)
        loader = ssd.make_loader(dataset, workers=workers, sampler=sampler)
        batches[workers] = []
        for epoch in (0, 1):
            sampler.epoch = epoch
            batches[workers] += list(loader)
    assert len(batches[0]) == len(batches[2]) == 6
    assert all(equal(a, b) for a, b in zip(batches[0], batches[2], strict=True))

    by_index = [{i: im for b in batches[0][e : e + 3] for i, im in zip(b["indices"].tolist(), b["images"], strict=True)}
                for e in (0, 3)]
    assert all(not torch.equal(by_index[0][i], by_index[1][i]) for i in range(6))


class _Mark(A.ImageOnlyTransform):
    """Writes 255 into one pixel of the picture when its coin falls so."""

    def __init__(self, column, p=0.5):
        super().__init__(p=p)
        self.column = column

    def apply(self, img, **params):
        img = img.copy()
        img[0, self.column] = 255
        return img


@pytest.mark.filterwarnings("ignore:Got processor for bboxes:UserWarning")
def test_coins_of_two_transforms_are_independent(tmp_path):
    write_voc(tmp_path, {"a": []}, suffix=".png")
    record = ssd.Record("a", str(tmp_path / "JPEGImages" / "a.png"), *SIZE, np.zeros((0, 4), np.float32),
                        np.zeros(0, np.int64), np.zeros(0, bool))
    bbox_params = A.BboxParams(format="albumentations", label_fields=["rows"])
    dataset = ssd.VocDataset([record], A.Compose([_Mark(0), _Mark(1)], bbox_params=bbox_params))
    coins = np.array([(dataset[0, epoch]["image"][0, 0, :2] == 255).numpy() for epoch in range(600)])
    # Four outcomes, a quarter each; the standard deviation of a share is .018.
    for first in (False, True):
        for second in (False, True):
            assert abs((coins == (first, second)).all(axis=1).mean() - 0.25) < 0.08


def test_steps_of_the_training_pipeline_have_independent_coins(records):
    steps = ssd.build_transform(train=True)
    bbox_params = A.BboxParams(format="albumentations", label_fields=["rows"], filter_invalid_bboxes=True, clip=True)
    compose = A.Compose(steps.transforms, bbox_params=bbox_params, save_applied_params=True)
    applied = []

    def transform(**data):
        out = compose(**data)
        applied.append({name for name, _ in out["applied_transforms"]})
        return out

    transform.set_random_state = compose.set_random_state
    dataset = ssd.VocDataset(records, transform)
    for epoch in range(200):
        dataset[1, epoch]
    names = ("SSDZoomOut", "HorizontalFlip", "ColorJitter", "HueSaturationValue")  # each at probability .5
    coins = np.array([[name in a for name in names] for a in applied])
    assert (abs(coins.mean(axis=0) - 0.5) < 0.15).all()
    for i in range(4):
        for j in range(i):
            assert abs((coins[:, i] == coins[:, j]).mean() - 0.5) < 0.15


def test_collate_pads_with_label_zero():
    def sample(index, count):
        return {
            "image": torch.full((3, 2, 2), index, dtype=torch.uint8), "boxes": torch.rand(count, 4),
            "labels": torch.arange(1, count + 1), "difficult": torch.ones(count, dtype=torch.bool), "index": index,
        }

    samples = [sample(5, 1), sample(3, 3), sample(9, 0)]
    batch = ssd.collate(samples)
    assert batch["images"].shape == (3, 3, 2, 2)
    assert batch["images"][:, 0, 0, 0].tolist() == [5, 3, 9]
    assert batch["gt_boxes"].shape == (3, 3, 4)
    assert batch["gt_labels"].tolist() == [[1, 0, 0], [1, 2, 3], [0, 0, 0]]
    assert batch["gt_difficult"].tolist() == [[True, False, False], [True, True, True], [False, False, False]]
    assert batch["indices"].tolist() == [5, 3, 9]
    assert torch.equal(batch["gt_boxes"][0, 0], samples[0]["boxes"][0])
    assert torch.equal(batch["gt_boxes"][1], samples[1]["boxes"])
    assert not batch["gt_boxes"][0, 1:].any()


def test_batch_without_any_object_has_no_columns(records):
    dataset = ssd.VocDataset([records[0], records[3]], ssd.build_transform(train=True))
    batch = ssd.collate([dataset[0], dataset[1]])
    assert batch["gt_boxes"].shape == (2, 0, 4)
    assert batch["gt_labels"].shape == batch["gt_difficult"].shape == (2, 0)


def test_sampler_order_depends_on_seed_and_epoch_and_covers_all():
    sampler = ssd.EpochBatchSampler(12, 4, seed=7)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert [len(b) for b in first] == [4, 4, 4]
    assert sorted(i for b in first for i, _ in b) == list(range(12))
    assert {e for b in first for _, e in b} == {0}
    sampler.epoch = 1
    assert {e for b in sampler for _, e in b} == {1}
    assert [i for b in sampler for i, _ in b] != [i for b in first for i, _ in b]
    assert list(ssd.EpochBatchSampler(12, 4, seed=8)) != first


@pytest.mark.parametrize(("count", "batch_size", "lengths"), [(10, 4, [4, 4]), (3, 8, [3]), (4, 4, [4])])
def test_sampler_drops_the_last_smaller_batch_unless_it_is_the_only_one(count, batch_size, lengths):
    sampler = ssd.EpochBatchSampler(count, batch_size)
    assert [len(b) for b in sampler] == lengths
    assert len(sampler) == len(lengths)


def test_loader_for_evaluation_is_in_order_and_complete(records):
    loader = ssd.make_loader(ssd.VocDataset(records, ssd.build_transform(train=False)), batch_size=4)
    assert [b["indices"].tolist() for b in loader] == [[0, 1, 2, 3], [4, 5]]


# -- The generated data set


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    splits = {"train": 100, "val": 3, "test": 3}
    root = tmp_path_factory.mktemp("data") / "shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd, "SHAPES_SPLITS", splits)
        patch.setattr(ssd, "SHAPES_VERSION", {**ssd.SHAPES_VERSION, "splits": splits})
        ssd.generate_shapes(root)
        yield root


@pytest.fixture
def few_shapes(monkeypatch):
    splits = {"train": 4, "val": 2, "test": 2}
    monkeypatch.setattr(ssd, "SHAPES_SPLITS", splits)
    monkeypatch.setattr(ssd, "SHAPES_VERSION", {**ssd.SHAPES_VERSION, "splits": splits})


def test_shapes_load_as_a_data_set_of_at_least_five_classes(shapes):
    data = ssd.load_data("shapes", data_root=str(shapes.parent), val_split="val", test_split="test")
    assert data.name == "shapes"
    assert data.classes == tuple(sorted(ssd.SHAPES_CLASSES))
    assert len(data.classes) >= 5
    assert (len(data.train), len(data.val), len(data.test)) == (100, 3, 3)
    assert data.notes == []
    for record in data.train:
        with Image.open(record.image_path) as image:
            assert image.size == (record.width, record.height)


def test_shapes_have_images_without_objects_and_objects_of_visible_size(shapes):
    train = ssd.load_data("shapes", data_root=str(shapes.parent)).train
    counts = [len(r.labels) for r in train]
    assert min(counts) == 0
    assert max(counts) >= 5
    boxes = np.concatenate([r.boxes_px for r in train])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.max(axis=1).min() >= 12
    assert sides.max() > 150


def test_shapes_are_the_same_bytes_every_time(few_shapes, shapes, tmp_path):
    for name in ("one", "two"):
        ssd.generate_shapes(tmp_path / name)
    one, two = (sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("one", "two"))
    assert len(one) == 2 * 8 + 3 + 1
    for a, b in zip(one, two, strict=True):
        assert a.relative_to(tmp_path / "one") == b.relative_to(tmp_path / "two")
        assert a.read_bytes() == b.read_bytes()
    # An image does not depend on how many there are.
    for part in ("JPEGImages/train_0003.jpg", "Annotations/val_0001.xml"):
        assert (tmp_path / "one" / part).read_bytes() == (shapes / part).read_bytes()


def test_splits_of_shapes_share_no_image(shapes):
    pictures = [p.read_bytes() for p in sorted((shapes / "JPEGImages").iterdir())]
    assert len(pictures) == len(set(pictures)) == 106


def test_shapes_that_are_there_are_not_drawn_again(few_shapes, tmp_path, monkeypatch):
    ssd.generate_shapes(tmp_path / "shapes")
    monkeypatch.setattr(ssd, "draw_shapes_image", lambda rng: pytest.fail("drawn again"))
    ssd.generate_shapes(tmp_path / "shapes")


def test_shapes_of_another_version_are_replaced(few_shapes, tmp_path):
    root = tmp_path / "shapes"
    ssd.generate_shapes(root)
    stamp = root / "shapes.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "version": -1}))
    (root / "JPEGImages" / "train_0000.jpg").write_bytes(b"old")
    ssd.generate_shapes(root)
    assert json.loads(stamp.read_text()) == ssd.SHAPES_VERSION
    assert len((root / "JPEGImages" / "train_0000.jpg").read_bytes()) > 1000
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]  # and nothing temporary stays


def test_shapes_refuse_a_folder_that_is_not_theirs(few_shapes, tmp_path):
    root = tmp_path / "shapes"
    root.mkdir()
    (root / "thesis.txt").write_text("years of work")
    with pytest.raises(ssd.InputError) as error:
        ssd.generate_shapes(root)
    assert str(root) in one_line(error)
    assert (root / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]


def test_interrupted_drawing_leaves_nothing(few_shapes, tmp_path, monkeypatch):
    def interrupt(rng):
        raise KeyboardInterrupt

    monkeypatch.setattr(ssd, "draw_shapes_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ssd.generate_shapes(tmp_path / "shapes")
    assert list(tmp_path.iterdir()) == []


def test_boxes_of_shapes_bound_what_is_visible(monkeypatch):
    paint, masks = ssd._paint, []

    def recording(image, mask, rng):
        masks.append(mask > 127)
        paint(image, mask, rng)

    monkeypatch.setattr(ssd, "_paint", recording)
    checked = 0
    for number in range(40):
        masks.clear()
        image, objects = ssd.draw_shapes_image(np.random.default_rng(number))
        assert len(masks) == len(objects)
        owner = np.full(image.shape[:2], -1)
        for row, mask in enumerate(masks):
            owner[mask] = row
        for row, (name, box) in enumerate(objects):
            assert name in ssd.SHAPES_CLASSES
            ys, xs = np.nonzero(owner == row)
            assert box == [xs.min() + 1, ys.min() + 1, xs.max() + 1, ys.max() + 1]
            assert len(ys) >= 0.85 * masks[row].sum()
            checked += 1
    assert checked > 80


def test_annotation_written_is_read_back(tmp_path):
    objects = [("a <b> & c", [1, 2, 30, 20]), ("dog", [5, 6, 40, 30])]
    ssd.write_annotation(tmp_path / "a.xml", "a & b.jpg", (30, 40, 3), objects)
    width, height, found = ssd.parse_annotation(tmp_path / "a.xml")
    assert (width, height) == (40, 30)
    assert found == [(name, box, False) for name, box in objects]


def test_exif_rotation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=exif)
    assert ssd.read_image(tmp_path / "a.jpg").shape == (6, 8, 3)
    assert cv2.imread(str(tmp_path / "a.jpg")).shape == (8, 6, 3)  # else the test tests nothing


# -- Decoded images kept


def test_cached_images_are_decoded_once_and_stay_as_they_are(records, monkeypatch):
    plain = ssd.VocDataset(records, ssd.build_transform(train=True), seed=3)
    expected = [plain[i, 1] for i in range(len(records))]
    cached = ssd.VocDataset(records, ssd.build_transform(train=True), seed=3, cache=ssd.ImageCache(records))
    for epoch in (0, 1):
        found = [cached[i, epoch] for i in range(len(records))]
        monkeypatch.setattr(ssd, "read_image", lambda path: pytest.fail("decoded again"))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["boxes"], other["boxes"])


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_loader_processes_fill_one_cache_together(records, kind, tmp_path, capsys):
    folder = tmp_path / "not yet" / "there"
    cache = ssd.open_cache(records, kind, folder)
    assert f"GiB of decoded images in {kind}" in capsys.readouterr().out
    dataset = ssd.VocDataset(records, ssd.build_transform(train=False), cache=cache)
    assert len(list(ssd.make_loader(dataset, batch_size=2, workers=2))) == math.ceil(len(records) / 2)
    assert cache.is_there.tolist() == [1] * len(records)  # this process decoded none of them
    for index, record in enumerate(records):
        np.testing.assert_array_equal(cache.read(index, record, load=None), ssd.read_image(record.image_path))
    assert list(folder.iterdir()) == []  # the file on disk has no name


def test_reading_from_the_cache_gives_copies(records):
    cache = ssd.ImageCache(records)
    for _ in range(2):
        image = cache.read(1, records[1], lambda: 7)
        assert (image == 7).all()
        image[:] = 0
    assert not cache.read(0, records[0], lambda: 0).any()


def test_cache_that_does_not_fit_falls_back_from_memory_to_disk_to_none(records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ssd, "free_memory", lambda: 10)
    assert ssd.open_cache(records, "ram", tmp_path) is not None
    captured = capsys.readouterr()
    assert "in ram" in captured.out
    assert "in disk" in captured.out
    assert len(captured.err.splitlines()) == 1
    monkeypatch.setattr(ssd.shutil, "disk_usage", lambda folder: ssd.shutil._ntuple_diskusage(10, 5, 5))
    assert ssd.open_cache(records, "ram", tmp_path) is None
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert ssd.open_cache(records, "off", tmp_path) is None
    assert capsys.readouterr().out == ""


def test_cache_counts_every_process_that_keeps_one(records, tmp_path, monkeypatch):
    size = ssd.ImageCache.size_of(records)
    assert size == sum(r.width * r.height * 3 + 1 for r in records)
    monkeypatch.setattr(ssd, "free_memory", lambda: 3 * size)
    monkeypatch.setattr(ssd.shutil, "disk_usage", lambda folder: ssd.shutil._ntuple_diskusage(10, 5, 5))
    assert ssd.open_cache(records, "ram", tmp_path, processes=2) is not None
    assert ssd.open_cache(records, "ram", tmp_path, processes=3) is None


# -- Several processes


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_the_batches_that_one_would_have(world):
    whole = list(ssd.EpochBatchSampler(20, 6, seed=7))
    shares = [list(ssd.EpochBatchSampler(20, 6, seed=7, rank=rank, world=world)) for rank in range(world)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert {len(part) for part in parts} == {6 // world}
        assert sorted(itertools.chain(*parts)) == sorted(batch)


def test_batch_that_processes_cannot_share_is_told():
    with pytest.raises(ssd.InputError, match="batch of 6 images cannot be shared by 4 processes"):
        ssd.EpochBatchSampler(20, 6, world=4)


def test_loader_of_a_share_has_its_images_only(records):
    dataset = ssd.VocDataset(records, ssd.build_transform(train=False))
    loader = ssd.make_loader(dataset, batch_size=2, share=range(1, 6, 2))
    assert [b["indices"].tolist() for b in loader] == [[1, 3], [5]]
