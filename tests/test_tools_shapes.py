"""ssd_tools/shapes.py: the drawn data set, the same every time and with boxes that bound what is visible."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import ssd_object_detection as ssd
from ssd_tools import shapes


def draw_few(patch, **splits):
    """Let a patch make the data set as small as `splits` say."""
    patch.setattr(shapes, "SPLITS", splits)
    patch.setattr(shapes, "STAMP", {**shapes.STAMP, "splits": splits})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A data set of 106 images."""
    with pytest.MonkeyPatch.context() as patch:
        draw_few(patch, train=100, val=3, test=3)
        return shapes.generate(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture
def few(monkeypatch):
    draw_few(monkeypatch, train=4, val=2, test=2)


def test_shapes_load_as_a_data_set_of_five_classes(drawn, capsys):
    data = ssd.load_data(str(drawn), val_split="val")
    assert data.name == "shapes"
    assert data.classes == shapes.CLASSES
    assert len(data.classes) == 5
    assert (len(data.train), len(data.val), len(data.test)) == (100, 3, 3)
    assert capsys.readouterr().err == ""  # no box is dropped
    for record in data.train:
        with Image.open(record.image_path) as image:
            assert image.size == (record.width, record.height)


def test_shapes_have_images_without_objects_and_objects_of_visible_size(drawn):
    records, _ = ssd.read_records(drawn, "train", shapes.CLASSES)
    counts = [len(r.labels) for r in records]
    assert min(counts) == 0
    assert max(counts) >= 5
    boxes_px = np.concatenate([r.boxes_px for r in records])
    sides = boxes_px[:, 2:] - boxes_px[:, :2]
    assert sides.max(axis=1).min() >= 12
    assert sides.max() > 150


def test_shapes_are_the_same_bytes_every_time(few, drawn, tmp_path):
    for name in ("one", "two"):
        shapes.generate(tmp_path / name)
    one, two = (sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in ("one", "two"))
    assert len(one) == 2 * 8 + 3 + 1
    for a, b in zip(one, two, strict=True):
        assert a.relative_to(tmp_path / "one") == b.relative_to(tmp_path / "two")
        assert a.read_bytes() == b.read_bytes()
    # An image does not depend on how many there are.
    for part in ("JPEGImages/train_0003.jpg", "Annotations/val_0001.xml"):
        assert (tmp_path / "one" / part).read_bytes() == (drawn / part).read_bytes()


def test_no_image_of_shapes_is_drawn_twice(drawn):
    images = [p.read_bytes() for p in sorted((drawn / "JPEGImages").iterdir())]
    assert len(images) == len(set(images)) == 106


def test_shapes_that_are_there_are_not_drawn_again(few, tmp_path, monkeypatch):
    shapes.generate(tmp_path / "shapes")
    monkeypatch.setattr(shapes, "draw_image", lambda rng: pytest.fail("drawn again"))
    assert shapes.generate(tmp_path / "shapes") == tmp_path / "shapes"


def test_shapes_of_another_version_are_replaced(few, tmp_path):
    root = shapes.generate(tmp_path / "shapes")
    stamp = root / "shapes.json"
    stamp.write_text(json.dumps({**shapes.STAMP, "version": -1}))
    (root / "JPEGImages" / "train_0000.jpg").write_bytes(b"old")
    shapes.generate(root)
    assert json.loads(stamp.read_text()) == shapes.STAMP
    assert len((root / "JPEGImages" / "train_0000.jpg").read_bytes()) > 1000
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]  # and nothing temporary stays


def test_a_folder_that_is_not_theirs_is_refused(few, tmp_path):
    root = tmp_path / "shapes"
    root.mkdir()
    (root / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not the shapes data set"):
        shapes.generate(root)
    assert (root / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]


def test_interrupted_drawing_leaves_nothing(few, tmp_path, monkeypatch):
    def interrupt(rng):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "draw_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shapes.generate(tmp_path / "shapes")
    assert list(tmp_path.iterdir()) == []


def test_boxes_bound_what_is_visible(monkeypatch):
    paint, masks = shapes._paint, []

    def recording(image, mask, rng):
        masks.append(mask > 127)
        paint(image, mask, rng)

    monkeypatch.setattr(shapes, "_paint", recording)
    checked = 0
    for number in range(40):
        masks.clear()
        image, objects = shapes.draw_image(np.random.default_rng(number))
        assert len(masks) == len(objects)
        owner = np.full(image.shape[:2], -1)
        for row, mask in enumerate(masks):
            owner[mask] = row
        for row, (name, box) in enumerate(objects):
            assert name in shapes.CLASSES
            ys, xs = np.nonzero(owner == row)
            assert box == [xs.min() + 1, ys.min() + 1, xs.max() + 1, ys.max() + 1]
            assert len(ys) >= 0.85 * masks[row].sum()
            checked += 1
    assert checked > 80


def test_an_annotation_written_is_read_back(tmp_path):
    objects = [("a <b> & c", [1, 2, 30, 20]), ("dog", [5, 6, 40, 30])]
    shapes.write_annotation(tmp_path / "a.xml", "a & b.jpg", (30, 40, 3), objects)
    expected = [ssd.VocObject(name, tuple(box), False) for name, box in objects]
    assert ssd.parse_annotation(tmp_path / "a.xml") == ssd.Annotation(40, 30, tuple(expected))


def test_the_command_line_draws_and_names_the_folder(few, tmp_path, monkeypatch, capsys):
    root = tmp_path / "new" / "shapes"
    monkeypatch.setattr(sys, "argv", ["shapes.py", str(root)])
    assert shapes.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(root)
    assert len(list((root / "JPEGImages").iterdir())) == 8


def test_the_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shapes.py", str(tmp_path)])
    assert shapes.main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {tmp_path}")
