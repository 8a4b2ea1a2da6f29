"""The index of annotations: the same data with and without it, what makes it anew, records as arrays."""

import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import read_record
from test_05_data import CAT, DOG, SIZE, annotation, corners, input_error, write_voc

import ssd_object_detection as ssd

IMAGES = {
    "a": [CAT, DOG],
    "b": [],
    "c": [DOG, ("dog", (1, 1, 1, 9), False), DOG, ("caf\u00e9", (5, 5, 9, 9), True)],
    "d": [("cat", (-3, 2, 50, 20), False)],
    "my \u732b": [CAT],
    "f": [CAT, ("cat", (2, 2, 3, 3), False), ("cat", (2, 2, 9, 9), False), ("cat", (3, 2, 9, 9), False)],
    **{f"n{number}": [CAT] for number in range(12)},
}


@pytest.fixture(autouse=True)
def small_index(monkeypatch, tmp_path):
    """Keep an index of any list, in a folder of the test's own; returns the folder."""
    monkeypatch.setattr(ssd, "INDEX_LEAST", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ssd_object_detection"


@pytest.fixture
def settled(monkeypatch):
    """Trust new files at once: a test cannot make the time of a file's entry older."""
    monkeypatch.setattr(ssd, "UNSETTLED", -(10**12))


@pytest.fixture
def root(tmp_path):
    root = write_voc(tmp_path / "data", IMAGES, train=[*IMAGES][:14], test=[*IMAGES][14:])
    turned = Image.Exif()
    turned[0x0112] = 3
    path = root / "JPEGImages" / "a.jpg"
    Image.open(path).save(path, exif=turned)
    xml = root / "Annotations" / "d.xml"
    text = xml.read_text()
    xml.write_text(text[: text.index("<size>")] + text[text.index("</size>") + 7 :])
    return root


def content(data):
    """Return all that a DataSplits says, as plain values."""
    records = []
    for part in (data.train, data.val, data.test):
        for record in part:
            fields = {name: np.asarray(value).tolist() for name, value in vars(record).items()}
            records.append((fields, record.labels.dtype, record.boxes.tobytes()))
    digest = zlib.crc32(ssd.all_boxes(data.train).tobytes(), len(data.train))
    return data.classes, data.lists, data.findings, digest, records


def load(root, **flags):
    return content(ssd.load_data(str(root), val_fraction=0.3, **flags))


def parsed(monkeypatch):
    """Return a list that names the annotation files that are parsed from now on."""
    names = []
    parse = ssd.parse_annotation

    def listen(path):
        names.append(Path(path).stem)
        return parse(path)

    monkeypatch.setattr(ssd, "parse_annotation", listen)
    return names


def test_an_index_changes_nothing_but_what_is_parsed(root, small_index, settled, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ssd, "INDEX_LEAST", 1000)
        plain = load(root)
    assert not small_index.exists()
    assert {finding.kind for finding in plain[2]} == {
        "box without area",
        "image turned by EXIF, both readings fit",
    }
    assert load(root) == plain
    assert len(list(small_index.iterdir())) == 2  # of train and of test
    names = parsed(monkeypatch)
    assert load(root) == plain
    assert names == []


def test_boxes_are_those_of_records_made_one_by_one(root):
    annotations, _ = ssd.read_annotations(root, "train")
    for classes in (("cat", "dog", "caf\u00e9"), ("dog",)):
        records, _ = ssd.make_records(root, "train", annotations, classes)
        alone = [read_record(root, i, annotations[i], classes)[0] for i in annotations]
        assert records == alone
        assert records[2:5] == alone[2:5]
        assert records[-1].image_id == alone[-1].image_id
        assert ssd.all_boxes(records).tobytes() == ssd.all_boxes(alone).tobytes()


@settings(max_examples=200, deadline=None)
@given(boxes=st.lists(corners, max_size=6), sides=st.tuples(st.integers(1, 70), st.integers(1, 70)))
def test_any_boxes_are_kept_as_by_the_rule_for_one(boxes, sides):
    boxes = boxes + boxes[:2] + [tuple(float(round(min(max(x, 1), 60))) for x in box) for box in boxes]
    one = ssd.Annotation(*sides, tuple(ssd.VocObject("ab"[i % 2], box, False) for i, box in enumerate(boxes)))
    two = ssd.Annotation(*sides, tuple(reversed(one.objects)))
    columns = ssd.make_columns([(one, False), (two, False)])
    texts = ssd.Texts(["one", "two"])
    labels, edges, *_ = ssd._keep_columns("nowhere", ssd.Annotations(texts, texts, columns), ("a", "b"))
    start = 0
    for annotation_ in (one, two):
        record, _ = read_record("nowhere", "x", annotation_, ("a", "b"))
        rows = slice(start, start := start + len(annotation_.objects))
        kept = labels[rows] > 0
        assert labels[rows][kept].tolist() == record.labels.tolist()
        assert edges[rows][kept].tolist() == record.boxes_px.tolist()


def test_a_changed_annotation_is_noticed_and_no_other_is_parsed_again(root, settled, monkeypatch):
    load(root)
    path = root / "Annotations" / "n3.xml"
    stamp = path.stat()
    path.write_text(path.read_text().replace("<ymax>15<", "<ymax>16<"))  # of the same size
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # and time
    names = parsed(monkeypatch)
    changed = load(root)
    assert names == ["n3"]
    assert any(16.0 in box for fields, *_ in changed[4] for box in fields["boxes_px"])
    assert load(root) == changed
    assert names == ["n3"]


def test_files_that_come_and_go_are_noticed(root, settled):
    before = load(root)
    xml = root / "Annotations" / "n3.xml"
    xml.rename(root / "n3.xml")
    assert "n3.xml: no such annotation" in input_error(load, root)
    with_negative = load(root, unlabelled="negative")
    (root / "n3.xml").rename(xml)
    assert load(root) == before == load(root, unlabelled="negative")
    assert with_negative != before
    (root / "JPEGImages" / "n4.jpg").unlink()
    assert "n4.jpg: no such image" in input_error(load, root)
    shutil.copy(root / "JPEGImages" / "n5.jpg", root / "JPEGImages" / "n4.png")
    assert any(fields["image_path"].endswith("n4.png") for fields, *_ in load(root)[4])
    xml.write_text("<annotations><box/></annotations>")
    assert "n3.xml: no VOC annotation" in input_error(load, root)


def test_a_changed_list_and_a_new_image_of_a_folder_without_lists_are_noticed(root, settled, monkeypatch):
    load(root)
    listed = root / "ImageSets" / "Main" / "train.txt"
    listed.write_text("\n".join(reversed(listed.read_text().splitlines())))
    names = parsed(monkeypatch)
    ids = [fields["image_id"] for fields, *_ in load(root)[4]]
    assert ids.index("n7") < ids.index("my \u732b") or "n7" not in ids[:10]
    assert names == []  # the files are the same
    shutil.rmtree(root / "ImageSets")
    first = load(root)
    shutil.copy(root / "JPEGImages" / "a.jpg", root / "JPEGImages" / "z.jpg")
    (root / "Annotations" / "z.xml").write_text(annotation([CAT], SIZE))
    assert len(load(root)[4]) == len(first[4]) + 1


def test_what_has_just_changed_is_parsed_again(root, monkeypatch):
    first = load(root)
    names = parsed(monkeypatch)
    assert load(root) == first
    assert len(names) == len(IMAGES)


@pytest.mark.parametrize("damage", ["cut", "zeros", "flipped", "text", "pickle", "foreign", "other program"])
def test_an_index_that_is_damaged_or_foreign_is_made_anew(root, small_index, settled, monkeypatch, damage):
    first = load(root)
    for path in small_index.iterdir():
        good = path.read_bytes()
        with np.load(path) as arrays:
            content_of = dict(arrays)
        if damage == "cut":
            path.write_bytes(good[: len(good) // 2])
        elif damage == "zeros":
            path.write_bytes(bytes(len(good)))
        elif damage == "flipped":
            place = good.index(content_of["boxes_voc"].tobytes())
            path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
        elif damage == "text":
            path.write_text("not an index")
        elif damage == "pickle":
            path.write_bytes(pickle.dumps(Explosion()))
        elif damage == "foreign":
            np.savez(path.open("wb"), about=np.array([Explosion()], dtype=object))
        else:
            about = content_of["about"].tobytes().replace(b'"program": ', b'"program": 1')
            np.savez(path.open("wb"), **content_of | {"about": np.frombuffer(about, dtype=np.uint8)})
    names = parsed(monkeypatch)
    assert load(root) == first
    assert len(names) == len(IMAGES)
    assert load(root) == first
    assert len(names) == len(IMAGES)


class Explosion:
    """What must never be unpickled."""

    def __reduce__(self):
        return (os._exit, (7,))


def test_where_nothing_can_be_kept_all_is_parsed_each_time(root, settled, monkeypatch, tmp_path):
    first = load(root)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    names = parsed(monkeypatch)
    assert load(root) == first
    assert load(root) == first
    assert len(names) == 2 * len(IMAGES)
    assert (tmp_path / "file").read_text() == ""


def test_the_data_folder_is_not_written_to(root, settled):
    def listing():
        return sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))

    before = listing()
    load(root)
    load(root)
    assert listing() == before


def test_processes_find_and_parse_as_one_does_and_tell_the_same_error(root, monkeypatch):
    first = load(root)
    monkeypatch.setattr(ssd, "PARSE_CHUNK", 2)
    monkeypatch.setattr(ssd, "FIND_CHUNK", 2)
    monkeypatch.setattr(ssd, "usable_cores", lambda: 3)
    assert load(root) == first
    (root / "Annotations" / "n3.xml").write_text("<annotation><object/></annotation>")
    assert "n3.xml: object 1 has no <name>" in input_error(load, root)
    (root / "JPEGImages" / "n2.jpg").unlink()
    message = input_error(load, root)
    assert "n2" in message
    monkeypatch.setattr(ssd, "FIND_CHUNK", 500)
    assert input_error(load, root) == message


def test_records_are_few_bytes_an_image():
    count = 2000
    one = ssd.Annotation(640, 480, tuple(ssd.VocObject("cat", (1, 1, 9 + i, 9), False) for i in range(7)))
    columns = ssd.make_columns([(one, False)] * count)
    texts = ssd.Texts(f"train/{i:012d}" for i in range(count))
    records, _ = ssd.make_records("x", "train", ssd.Annotations(texts, texts, columns), ("cat",))
    arrays = [value for value in vars(records).values() if isinstance(value, np.ndarray)]
    arrays += [part for text in (records.image_ids, records.image_paths) for part in vars(text).values()]
    assert sum(array.nbytes for array in arrays) / count < 250
    assert records[1999].image_id == "train/000000001999"
