"""ssd_tools/convert.py: COCO, YOLO and flat folders become VOC's layout, box for box; faults are named."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pycocotools.coco
import pytest
from PIL import Image

import ssd_object_detection as ssd
from ssd_tools import convert, shapes

ODD_STEMS = ("a b", "細胞 é", "x & <y>", "scan 1", " edge ", "v1.2")
ORIENTATION = 0x0112  # the EXIF tag


def run(*argv):
    """Return the exit code of a command line."""
    return convert.main([str(word) for word in argv])


def fails(capsys, *argv):
    """Return the one line on standard error of a command that ends with exit code 2."""
    capsys.readouterr()
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def content_of(folder):
    """Return {path: bytes} of all files below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def picture(path, size=(100, 80), **options):
    """Write a grey picture; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path, **options)
    return path


def write_coco(path, images, objects, names=("blob", "cell")):
    """Write a COCO JSON. images: {id: name}, of 100x80; objects: (image id, category id, bbox[, iscrowd])."""
    path.write_text(
        json.dumps(
            {
                "images": [
                    {"id": number, "file_name": name, "width": 100, "height": 80}
                    for number, name in images.items()
                ],
                "categories": [{"id": 10 * k, "name": name} for k, name in enumerate(names, start=1)],
                "annotations": [
                    {
                        "id": 500 + number,
                        "image_id": image,
                        "category_id": category,
                        "bbox": box,
                        "iscrowd": crowd[0] if crowd else 0,
                    }
                    for number, (image, category, box, *crowd) in enumerate(objects)
                ],
            }
        ),
        encoding="utf-8",
    )
    return path


def write_yolo(root, labels, text="train: images\nnames: [blob, cell]\n"):
    """Write a YOLO data set of pictures of 100x80. labels: {file name: lines, None: no file}."""
    for name, lines in labels.items():
        picture(root / "images" / name)
        if lines is not None:
            file = root / "labels" / Path(name).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(lines, encoding="utf-8")
    (root / "data.yaml").write_text(text, encoding="utf-8")
    return root / "data.yaml"


def write_pair(folder, stem, objects=(("cell", [11, 21, 40, 60]),)):
    """Write a picture of 100x80 and its VOC XML into one folder."""
    file = picture(folder / f"{stem}.png")
    shapes.write_annotation(folder / f"{stem}.xml", file.name, (80, 100, 3), list(objects))


def boxes_of(out, split="train"):
    """Return {image id: [[class, x1, y1, x2, y2], ...]} of a list as the module reads it."""
    annotations, _ = ssd.read_annotations(out, split)
    classes = sorted(ssd.count_classes(annotations))
    records, _ = ssd.make_records(out, split, annotations, classes)
    return {
        record.image_id: [
            [classes[k - 1], *np.round(box.astype(float), 3).tolist()]
            for k, box in zip(record.labels, record.boxes_px, strict=True)
        ]
        for record in records
    }


# ---- there and back ----


@pytest.fixture(scope="module")
def odd_voc(make_voc, tmp_path_factory):
    """A data set in VOC layout with fractions of pixels, crowds, pictures without objects and odd names."""
    root = make_voc(tmp_path_factory.mktemp("voc"), {"train": 6, "val": 2, "test": 2})
    rng = np.random.default_rng(0)
    for number, stem in enumerate(ODD_STEMS):
        for folder, ending in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
            (root / folder / f"train_{number}{ending}").rename(root / folder / f"{stem}{ending}")
    records = {}
    names = {"train": ODD_STEMS, "val": ("val_0", "val_1"), "test": ("test_0", "test_1")}
    for split, ids in names.items():
        records[split] = []
        for image_id in ids:
            path = root / "JPEGImages" / f"{image_id}.jpg"
            annotation = ssd.parse_annotation(root / "Annotations" / f"{image_id}.xml")
            low = rng.uniform(0, 100, (len(annotation.objects), 2))
            boxes = np.concatenate((low, low + rng.uniform(2, 150, low.shape)), axis=1).astype(np.float32)
            labels = np.array([1 + (one.name == "round") for one in annotation.objects], dtype=np.int64)
            size = annotation.width, annotation.height
            records[split].append(ssd.Record(image_id, str(path), *size, boxes, labels, labels == 2))
    return records


def assert_same_boxes(out, records, *, with_difficult):
    """Demand that the module reads the records in OUT, boxes to a tenth of a pixel; returns train's ids."""
    data = ssd.load_data(str(out))
    assert data.classes == ("angular", "round")
    assert data.lists == {"train": "train", "val": "val", "test": "test"}
    for split, expected in records.items():
        found = getattr(data, split)
        assert len(found) == len(expected)
        assert any(len(record.labels) == 0 for record in found) or split != "train"
        for ours, theirs in zip(found, expected, strict=True):
            assert Path(ours.image_path).name == f"{ours.image_id}.jpg"
            assert os.path.samefile(ours.image_path, theirs.image_path)
            assert ours.read().shape == (theirs.height, theirs.width, 3)
            assert ours.labels.tolist() == theirs.labels.tolist()
            np.testing.assert_allclose(ours.boxes_px, theirs.boxes_px, atol=0.1)
            if with_difficult:
                assert ours.difficult.tolist() == theirs.difficult.tolist()
    return [record.image_id for record in data.train]


KEPT_STEMS = ["a b", "細胞 é", "x & <y>", "scan_1", "edge", "v1.2"]  # a list's line is stripped, and no flag


def test_coco_comes_back_box_for_box_list_by_list(odd_voc, tmp_path, capsys):
    source = Path(odd_voc["train"][0].image_path).parent
    for split, records in odd_voc.items():
        categories = [{"id": 7, "name": "round"}, {"id": 3, "name": "angular"}]
        content = {"images": [], "annotations": [], "categories": categories}
        for number, record in enumerate(records, start=100):
            size = {"width": record.width, "height": record.height}
            content["images"].append({"id": number, "file_name": Path(record.image_path).name, **size})
            for box, label in zip(record.boxes_px.astype(float).tolist(), record.labels, strict=True):
                x1, y1, x2, y2 = box
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": number,
                        "iscrowd": int(label == 2),
                        "category_id": 7 if label == 2 else 3,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                    }
                )
        path = tmp_path / f"instances_{split}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        assert pycocotools.coco.COCO(str(path)).getImgIds()
        capsys.readouterr()
        assert run("coco", path, source, tmp_path / "out") == 0
        out, err = capsys.readouterr()
        counts = [sum(int((record.labels == k).sum()) for record in records) for k in (1, 2)]
        empty = sum(len(record.labels) == 0 for record in records)
        assert out == (
            f"{split}: {len(records)} pictures ({empty} without objects), {sum(counts)} objects "
            f"({counts[1]} difficult or crowds): angular {counts[0]}, round {counts[1]}\n"
        )
        assert err == ""
    assert assert_same_boxes(tmp_path / "out", odd_voc, with_difficult=True) == KEPT_STEMS
    assert all(path.is_symlink() for path in (tmp_path / "out" / "JPEGImages").iterdir())


def test_yolo_comes_back_box_for_box(odd_voc, tmp_path):
    for split, records in odd_voc.items():
        for record in records:
            path = Path(record.image_path)
            for kind in ("images", "labels"):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "images" / split)
            lines = []
            for (x1, y1, x2, y2), label in zip(record.boxes.astype(float), record.labels, strict=True):
                values = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
                if label == 2:  # as a polygon
                    values = x1, (y1 + y2) / 2, (x1 + x2) / 2, y1, x2, (y1 + y2) / 2, (x1 + x2) / 2, y2
                lines.append(" ".join([str(label - 1), *(f"{value:.6f}" for value in values)]))
            label_file = tmp_path / "labels" / split / f"{path.stem}.txt"
            if lines:  # a picture without objects has no file
                label_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\ntest: images/test\nnc: 2\nnames:\n  0: angular\n"
        "  1: round\n"
    )
    assert run("yolo", tmp_path / "data.yaml", tmp_path / "out") == 0
    expected = {}
    for split, records in odd_voc.items():
        folder = tmp_path / "images" / split
        moved = [dataclasses.replace(r, image_path=str(folder / Path(r.image_path).name)) for r in records]
        expected[split] = sorted(moved, key=lambda record: record.image_path)
    ids = assert_same_boxes(tmp_path / "out", expected, with_difficult=False)
    assert sorted(ids) == sorted(KEPT_STEMS)


@pytest.mark.parametrize("folders", [{"train": "train", "val": "valid", "test": "test"}, None])
def test_flat_folders_come_back_box_for_box(make_voc, tmp_path, folders, capsys):
    root = make_voc(tmp_path / "voc", {"train": 12, "val": 4, "test": 4})
    expected = {}
    for split in ("train", "val", "test"):
        for record in ssd.read_records(root, split, ("angular", "round"))[0]:
            expected[record.image_id] = record
            folder = tmp_path / "flat" / (folders[split] if folders else "")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(record.image_path, folder)
            shutil.copy(root / "Annotations" / f"{record.image_id}.xml", folder)
    before = content_of(tmp_path / "flat")
    flags = () if folders else ("--test-fraction", ".25", "--seed", "3")
    assert run("flat", tmp_path / "flat", tmp_path / "out", *flags) == 0
    assert content_of(tmp_path / "flat") == before
    data = ssd.load_data(str(tmp_path / "out"), val_fraction=0)
    out = capsys.readouterr().out
    lists = {"train": data.train, "val": data.val, "test": data.test}
    if folders:
        assert "drawn" not in out
        for split, records in lists.items():
            assert {record.image_id.split("_")[0] for record in records} == {split}
    else:
        assert "5 of its 20 pictures are drawn for the list test (--test-fraction 0.25 --seed 3)" in out
        assert [len(records) for records in lists.values()] == [15, 0, 5]
        assert run("flat", tmp_path / "flat", tmp_path / "again", *flags) == 0
        for split in ("train", "test"):
            assert ssd.read_split(tmp_path / "again", split) == ssd.read_split(tmp_path / "out", split)
    found = [record for records in lists.values() for record in records]
    assert {record.image_id for record in found} == expected.keys()
    for record in found:
        theirs = expected[record.image_id]
        assert record.labels.tolist() == theirs.labels.tolist()
        np.testing.assert_array_equal(record.boxes_px, theirs.boxes_px)


# ---- hand cases ----


def test_edges_of_a_coco_box_are_read_back_and_its_crowd_is_difficult(tmp_path):
    picture(tmp_path / "in" / "deep" / "a.png")
    path = write_coco(
        tmp_path / "odd.json",
        {1: "deep\\a.png"},
        [(1, 10, [0, 0, 100, 80]), (1, 20, [10.25, 20.5, 30.125, 1.5]), (1, 20, [90, 70, 30, 30], 1)],
    )
    assert run("coco", path, tmp_path / "in", tmp_path / "out", "--list", "train") == 0
    assert boxes_of(tmp_path / "out") == {
        "a": [["blob", 0, 0, 100, 80], ["cell", 10.25, 20.5, 40.375, 22], ["cell", 90, 70, 100, 80]]
    }
    text = (tmp_path / "out" / "Annotations" / "a.xml").read_text(encoding="utf-8")
    assert "<xmin>11.25</xmin><ymin>21.5</ymin><xmax>40.375</xmax><ymax>22</ymax>" in text
    (record,), _ = ssd.read_records(tmp_path / "out", "train", ("blob", "cell"))
    assert record.difficult.tolist() == [False, False, True]


def test_a_yolo_line_is_a_box_a_polygon_or_key_points(tmp_path):
    lines = "0 .5 .5 .2 .5\n\n1.0 .1 .2 .3 .1 .25 .6\n"
    path = write_yolo(tmp_path / "in", {"a.png": lines, "empty.png": "", "none.png": None})
    assert run("yolo", path, tmp_path / "out") == 0
    assert boxes_of(tmp_path / "out") == {
        "a": [["blob", 40, 20, 60, 60], ["cell", 10, 8, 30, 48]],
        "empty": [],
        "none": [],
    }
    path = write_yolo(
        tmp_path / "pose", {"a.png": "0 .5 .5 .2 .5 .9 .9 2"}, "train: images\nnc: 1\nkpt_shape: [1, 3]\n"
    )
    assert run("yolo", path, tmp_path / "pose out") == 0
    assert boxes_of(tmp_path / "pose out") == {"a": [["class_0", 40, 20, 60, 60]]}


@pytest.mark.parametrize(
    ("text", "lists"),
    [
        ("train: ../train/images\nval: ../valid/images\ntest: ../test/images\n", {"train": 1, "val": 1}),
        ("path: /no/such/machine\ntrain: [train/images, valid/images]\n", {"train": 2}),
        ("path: train\ntrain: images\nval:\n", {"train": 1}),
        ("train: train/list.txt\n", {"train": 2}),
        ("train: .\n", {"train": 2}),
        ("train: [train/images, train]\n", {"train": 1}),
    ],
)
def test_paths_of_a_data_yaml(tmp_path, capsys, text, lists):
    for name in ("train", "valid"):
        picture(tmp_path / "in" / name / "images" / f"{name}.png")
        (tmp_path / "in" / name / "labels").mkdir()
        (tmp_path / "in" / name / "labels" / f"{name}.txt").write_text("0 .5 .5 .5 .5\n1 .5 .5 1 1\n")
    (tmp_path / "in" / "train" / "list.txt").write_text("./images/train.png\nvalid/images/valid.png\n")
    (tmp_path / "in" / "data.yaml").write_text(f"{text}names: [no, 12]\n")
    assert run("yolo", tmp_path / "in" / "data.yaml", tmp_path / "out") == 0
    for split, count in lists.items():
        found = boxes_of(tmp_path / "out", split)
        assert len(found) == count
        assert all(boxes == [["no", 25, 20, 75, 60], ["12", 0, 0, 100, 80]] for boxes in found.values())
    main = tmp_path / "out" / "ImageSets" / "Main"
    assert {path.stem for path in main.iterdir()} == lists.keys()
    err = capsys.readouterr().err
    assert err.count("\n") == ("test:" in text)
    assert ("test is left out: no file or folder" in err) == ("test:" in text)


def test_labels_lie_in_place_of_the_last_folder_images():
    found = convert.label_file(Path("/images/set/images/deep/a.b.jpg"))
    assert found == Path("/images/set/labels/deep/a.b.txt")
    assert convert.label_file(Path("/set/a.jpg")) == Path("/set/a.txt")


def test_sizes_are_those_of_the_upright_picture_where_no_file_tells_them(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = write_yolo(tmp_path / "in", {"a.jpg": "0 .5 .5 .5 .5"})
    picture(tmp_path / "in" / "images" / "a.jpg", exif=exif)  # stored 100x80
    assert run("yolo", path, tmp_path / "out") == 0
    (record,), _ = ssd.read_records(tmp_path / "out", "train", ("blob",))
    assert record.read().shape == (100, 80, 3)
    assert record.boxes_px.tolist() == [[20, 25, 60, 75]]


def test_pictures_of_one_stem_are_named_apart(tmp_path):
    names = ("a/x.png", "b/x.png", "b/X.png", "b/x.jpg", "c/b_x.png")
    for name in names:
        picture(tmp_path / "in" / name)
    images = dict(enumerate(names))
    objects = [(number, 10, [number, 0, 50, 50]) for number in images]
    path = write_coco(tmp_path / "train.json", images, objects)
    assert run("coco", path, tmp_path / "in", tmp_path / "out") == 0
    found = boxes_of(tmp_path / "out")
    assert list(found) == ["x", "b_x", "in_b_X", *list(found)[3:]]
    assert len({name.casefold() for name in found}) == 5
    for number, (image_id, boxes) in enumerate(found.items()):
        assert boxes == [["blob", number, 0, number + 50, 50]]
        assert os.path.samefile(
            ssd.find_file(tmp_path / "out", "JPEGImages", image_id), tmp_path / "in" / names[number]
        )
    picture(tmp_path / "more" / "x.png")  # of a second list
    path = write_coco(tmp_path / "val.json", {1: "x.png"}, [(1, 20, [5, 5, 50, 50])])
    assert run("coco", path, tmp_path / "more", tmp_path / "out") == 0
    assert boxes_of(tmp_path / "out") == found
    assert boxes_of(tmp_path / "out", "val") == {"more_x": [["cell", 5, 5, 55, 55]]}


def test_where_links_are_impossible_pictures_are_copied(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no privilege")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    write_pair(tmp_path / "in", "a")
    before = content_of(tmp_path / "in")
    assert run("flat", tmp_path / "in", tmp_path / "out") == 0
    copy = tmp_path / "out" / "JPEGImages" / "a.png"
    assert copy.read_bytes() == (tmp_path / "in" / "a.png").read_bytes()
    assert not copy.is_symlink()
    assert content_of(tmp_path / "in") == before


# ---- faults ----


COCO_FAULTS = [
    ((99, 10, [1, 1, 9, 9]), "no image has the id 99"),
    ((1, 11, [1, 1, 9, 9]), "no category has the id 11"),
    ((1, 10, [5, 5, 0, 9]), "box reversed (xmin, ymin, xmax, ymax: 6, 6, 5, 14)"),
    ((1, 10, [5, 5, 9, -3]), "box reversed (xmin, ymin, xmax, ymax: 6, 6, 14, 2)"),
    (
        (1, 10, [5, 5, 1, 9]),
        "box without area (xmin, ymin, xmax, ymax: 6, 6, 6, 14)",
    ),  # which the module drops
    ((1, 10, [200, 5, 9, 9]), "box outside the image (xmin, ymin, xmax, ymax: 201, 6, 209, 14)"),
    ((1, 10, [5, 5, float("inf"), 9]), "box not finite (xmin, ymin, xmax, ymax: 6, 6, inf, 14)"),
    ((1, 10, [1, 1, 9]), "has no bbox of four numbers"),
    (([1], 10, [1, 1, 9, 9]), "no image has the id [1]"),
]


@pytest.mark.parametrize(("bad", "message"), COCO_FAULTS)
def test_few_faulty_annotations_are_left_out_and_named_many_are_refused(tmp_path, capsys, bad, message):
    picture(tmp_path / "in" / "a.png")
    good = [(1, 10, [i, i, 20, 20]) for i in range(18)]
    path = write_coco(tmp_path / "train.json", {1: "a.png"}, [*good, bad, bad])
    assert run("coco", path, tmp_path / "in", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert "18 objects" in out
    assert err.startswith(f"warning: faulty and left out (2): {path}: annotation 518")
    assert message in err
    assert err.endswith(", and 1 more\n")
    assert len(boxes_of(tmp_path / "out")["a"]) == 18
    path = write_coco(tmp_path / "val.json", {1: "a.png"}, [*good[1:], bad, bad])
    line = fails(capsys, "coco", path, tmp_path / "in", tmp_path / "other")
    assert f"2 of 19 objects are faulty: {path}: annotation 517" in line
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("2 .5 .5 .5 .5", "no class 2 among the 2 names"),
        ("0.5 .5 .5 .5 .5", "no class 0.5 among"),
        ("-1 .5 .5 .5 .5", "no class -1 among"),
        ("0 50 50 20 20", "has other numbers than fractions from 0 to 1"),
        ("0 .5 .5 -.5 .5", "has other numbers than fractions"),
        ("0 .5 nan .5 .5", "has other numbers than fractions"),
        ("0 .5 .5 0 .5", "box reversed"),
        ("0 .5 .5 .5", "is neither a box nor a polygon"),
        ("0 .5 .5", "is neither a box nor a polygon"),
        ("cell .5 .5 .5 .5", "is neither a box nor a polygon"),
        ("0 .5 .5 .5 .5 .9", "is neither a box nor a polygon"),
    ],
)
def test_a_faulty_line_of_labels_is_left_out_and_named(tmp_path, capsys, bad, message):
    path = write_yolo(tmp_path / "in", {"a.png": f"0 .5 .5 .5 .5\n{bad}\n"})
    assert run("yolo", path, tmp_path / "out") == 0
    err = capsys.readouterr().err
    label_file = tmp_path / "in" / "labels" / "a.txt"
    assert err.startswith(f"warning: faulty and left out (1): {label_file}: line 2 ({bad})")
    assert message in err
    assert boxes_of(tmp_path / "out") == {"a": [["blob", 25, 20, 75, 60]]}
    path = write_yolo(tmp_path / "in", {"a.png": f"0 .5 .5 .5 .5\n{bad}\n{bad}\n"})
    assert f"2 of 3 objects are faulty: {label_file}: line 2" in fails(capsys, "yolo", path, tmp_path / "b")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ("cat, dog", "names is text (cat, dog), not a list"),
        ("{0: {name: cat}}", "the name of class 0 is no text, but {'name': 'cat'}"),
        ("[[cat], [dog]]", "the name of class 0 is no text, but ['cat']"),
        ("[cat, '']", "class 1 has no name of a class: ''"),
        ("3", "names is text (3), not a list"),
        ("{cat: dog}", "not a data.yaml with train and names"),
    ],
)
def test_names_of_yolo_that_are_no_list_of_text_are_one_line(names, problem, tmp_path, capsys):
    write_yolo(tmp_path, {"a.jpg": "0 .5 .5 .2 .2"}, f"train: images\nnames: {names}\n")
    line = fails(capsys, "yolo", tmp_path / "data.yaml", tmp_path / "out")
    assert f"data.yaml: {problem}" in line
    assert not (tmp_path / "out").exists()


def test_names_of_categories_are_read_as_training_reads_them(tmp_path, capsys):
    picture(tmp_path / "in" / "a.jpg")
    objects = [(1, 10, [1, 1, 20, 20]), (1, 20, [30, 30, 20, 20])]
    write_coco(tmp_path / "a.json", {1: "a.jpg"}, objects, ("cafe\u0301", "\ufeffcaf\u00e9"))
    assert run("coco", tmp_path / "a.json", tmp_path / "in", tmp_path / "out") == 0
    assert ssd.load_data(str(tmp_path / "out"), train_split="a", val_fraction=0).classes == ("caf\u00e9",)
    write_coco(tmp_path / "b.json", {1: "a.jpg"}, objects, ({"en": "cat"}, "dog"))
    line = fails(capsys, "coco", tmp_path / "b.json", tmp_path / "in", tmp_path / "other")
    assert "b.json: the name of class 10 is no text" in line


def test_a_missing_picture_is_an_error(tmp_path, capsys):
    picture(tmp_path / "in" / "a.png")
    path = write_coco(tmp_path / "train.json", {1: "a.png", 2: "b.png", 3: "c.png"}, [(1, 10, [1, 1, 9, 9])])
    line = fails(capsys, "coco", path, tmp_path / "in", tmp_path / "out")
    assert f"no such picture: {tmp_path / 'in' / 'b.png'}, and 1 more" in line
    write_pair(tmp_path / "flat", "a")
    (tmp_path / "flat" / "a.png").unlink()
    assert f"no picture beside {tmp_path / 'flat' / 'a.xml'}" in fails(
        capsys, "flat", tmp_path / "flat", tmp_path / "out"
    )
    (tmp_path / "list.txt").write_text("in/none.png\n")
    (tmp_path / "data.yaml").write_text("train: list.txt\nnames: [a]\n")
    line = fails(capsys, "yolo", tmp_path / "data.yaml", tmp_path / "out")
    assert f"{tmp_path / 'data.yaml'}: train: no file or folder {tmp_path / 'in' / 'none.png'}" in line
    (tmp_path / "list.txt").write_bytes(b"in/caf\xe9.png\n")  # not UTF-8
    assert "train: no file or folder" in fails(capsys, "yolo", tmp_path / "data.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_without_an_xml_are_not_taken_for_empty_ones(tmp_path, capsys):
    for stem in ("a", "b"):
        write_pair(tmp_path / "in", stem)
    write_pair(tmp_path / "in", "no objects", [])
    picture(tmp_path / "in" / "unlabelled.png")
    assert run("flat", tmp_path / "in", tmp_path / "out", "--test-fraction", "0") == 0
    assert capsys.readouterr().err == (
        f"warning: left out, without an XML of its own beside it: {tmp_path / 'in' / 'unlabelled.png'}\n"
    )
    assert {name: len(boxes) for name, boxes in boxes_of(tmp_path / "out").items()} == {
        "a": 1,
        "b": 1,
        "no objects": 0,
    }
    assert [path.name for path in (tmp_path / "out" / "ImageSets" / "Main").iterdir()] == ["train.txt"]


def test_what_is_there_is_not_mixed_with(tmp_path, capsys, monkeypatch):
    write_pair(tmp_path / "in", "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    line = fails(capsys, "flat", tmp_path / "in", tmp_path / "full")
    assert f"{tmp_path / 'full'} is there and not of this program" in line
    assert content_of(tmp_path / "full") == {Path("notes.txt"): b"mine"}
    before = content_of(tmp_path / "in")
    for out in (tmp_path / "in", tmp_path / "in" / "voc", tmp_path / "in" / ".." / "in" / "deep" / "voc"):
        assert "is inside the source" in fails(capsys, "flat", tmp_path / "in", out)
    assert content_of(tmp_path / "in") == before
    write_pair(tmp_path / "split" / "train", "a")
    monkeypatch.chdir(tmp_path)
    assert "is inside the source split" in fails(capsys, "flat", "split", "split/voc")
    (tmp_path / "out").mkdir()  # an empty one is none
    assert run("flat", tmp_path / "in", tmp_path / "out") == 0
    before = content_of(tmp_path / "out")
    assert "has a list train already" in fails(capsys, "flat", tmp_path / "in", tmp_path / "out")
    path = write_coco(tmp_path / "val.json", {1: "a.png"}, [(1, 10, [1, 1, 9, 9])])
    line = fails(capsys, "coco", path, tmp_path / "in", tmp_path / "out")
    assert f"{tmp_path / 'in' / 'a.png'} is in the list train already" in line
    assert content_of(tmp_path / "out") == before


def test_an_interrupted_run_is_mended_by_the_same_command(tmp_path, monkeypatch):
    for stem in ("a", "b", "c"):
        write_pair(tmp_path / "in", stem)
    write_annotation, seen = convert.write_picture, []

    def interrupt(*args):
        seen.append(args)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return write_annotation(*args)

    monkeypatch.setattr(convert, "write_picture", interrupt)
    assert run("flat", tmp_path / "in", tmp_path / "out", "--test-fraction", "0") == 130
    assert list((tmp_path / "out" / "ImageSets" / "Main").iterdir()) == []
    before = content_of(tmp_path / "in")
    assert run("flat", tmp_path / "in", tmp_path / "out", "--test-fraction", "0") == 0
    assert list(boxes_of(tmp_path / "out")) == ["a", "b", "c"]
    assert content_of(tmp_path / "in") == before


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "twice.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png", "width": 1, "height": 1}] * 2,
                "annotations": [],
                "categories": [],
            }
        )
    )
    cats = '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]'
    (tmp_path / "cats.json").write_text(f'{{"images": [], "annotations": [], "categories": {cats}}}')
    (tmp_path / "null.json").write_text('{"images": [], "annotations": null, "categories": []}')
    for name, text in (
        ("bad", "names: ["),
        ("lacks", "names: [a]"),
        ("text", "train"),
        ("nothing", "train: images"),
        ("none", "train: images\nnames: [a]"),
        ("empty", "train: empty\nnames: [a]"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
    picture(tmp_path / "bare" / "images" / "a.png")
    (tmp_path / "bare" / "a.yaml").write_text("train: images\nnames: [a]\n")
    write_pair(tmp_path / "both", "a")
    write_pair(tmp_path / "both" / "valid", "b")
    write_yolo(tmp_path / "broken", {"a.png": "0 .5 .5 .5 .5"})
    (tmp_path / "broken" / "images" / "a.png").write_text("no image")
    picture(tmp_path / "a.pcx")
    write_coco(tmp_path / "ppm.json", {1: "a.pcx"}, [])
    write_coco(tmp_path / "name.json", {1: "a.pcx"}, [(1, 10, [1, 1, 9, 9])], ["a\1"])
    for argv, message in (
        (("coco", tmp_path / "none.json", tmp_path), "none.json"),
        (("coco", tmp_path / "bad.json", tmp_path), "bad.json: not a COCO JSON of instances (JSOND"),
        (("coco", tmp_path / "list.json", tmp_path), "list.json: not a COCO JSON of instances"),
        (("coco", tmp_path / "twice.json", tmp_path), "twice.json: two of its images have the same id"),
        (("coco", tmp_path / "cats.json", tmp_path), "two of its categories have the same id"),
        (("coco", tmp_path / "null.json", tmp_path), "null.json: not a COCO JSON of instances (Type"),
        (("coco", tmp_path / "ppm.json", tmp_path), ".heif, not "),
        (("coco", tmp_path / "ppm.json", tmp_path, "--list", "../a"), "--list: "),
        (("coco", tmp_path / "name.json", tmp_path), r"no name of a class: 'a\x01'"),
        (("yolo", tmp_path / "bad.yaml"), "bad.yaml: not a data.yaml with train and names (Pars"),
        (("yolo", tmp_path / "lacks.yaml"), "names (KeyError: 'train')"),
        (("yolo", tmp_path / "text.yaml"), "text.yaml: not a data.yaml"),
        (("yolo", tmp_path / "nothing.yaml"), "names (KeyError: 'nc')"),
        (("yolo", tmp_path / "none.yaml"), f"train: no file or folder {tmp_path / 'images'}"),
        (("yolo", tmp_path / "empty.yaml"), "train: 0 images with no label"),
        (("yolo", tmp_path / "bare" / "a.yaml"), f"no {tmp_path / 'bare' / 'labels' / 'a.txt'}"),
        (("yolo", tmp_path / "broken" / "data.yaml"), "a.png: not readable as an image"),
        (("flat", tmp_path / "none"), "none"),
        (("flat", tmp_path / "empty"), "empty: no picture"),
        (("flat", tmp_path / "both"), "both has pictures both in it and in val"),
    ):
        kind, source, *images = argv
        assert message in fails(capsys, kind, source, *images[:1], out, *images[1:])
    assert not out.exists()
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "pip install pyyaml" in fails(capsys, "yolo", tmp_path / "none.yaml", out)
