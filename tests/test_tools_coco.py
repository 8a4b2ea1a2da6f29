"""COCO's figures: by hand, against a plain use of pycocotools, and the command on a tiny trained model."""

import json
import math
import sys

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ssd_object_detection as ssd
from ssd_tools import coco, common

NAMES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)
BOX = [1, 1, 10, 10]


def detections_of(rows):
    """rows: (image, label, score, box), as `ssd.evaluate_voc` takes them."""
    images, labels, scores, boxes = list(zip(*rows, strict=True)) or [[]] * 4
    return {
        "image_ids": np.array(images, int),
        "labels": np.array(labels, int),
        "scores": np.array(scores, float),
        "boxes_voc": np.array(boxes, float).reshape(-1, 4),
    }


def truth_of(rows):
    """rows: (image, label, box, difficult)."""
    images, labels, boxes, difficult = list(zip(*rows, strict=True)) or [[]] * 4
    return {
        "image_ids": np.array(images, int),
        "labels": np.array(labels, int),
        "boxes_voc": np.array(boxes, float).reshape(-1, 4),
        "difficult": np.array(difficult, bool),
    }


def annotations(side):
    """Return COCO's annotations, box by box."""
    rows = []
    columns = (side["image_ids"].tolist(), side["labels"].tolist(), side["boxes_voc"].tolist())
    for image_id, label, (x1, y1, x2, y2) in zip(*columns, strict=True):
        width, height = x2 - x1 + 1, y2 - y1 + 1
        rows.append(
            {
                "image_id": image_id,
                "category_id": label,
                "bbox": [x1 - 1, y1 - 1, width, height],
                "area": width * height,
            }
        )
    return rows


def judged(detections, truth, num_classes):
    """Return pycocotools' COCOeval, summarized, by its usual way: loadRes and summarize."""
    objects = annotations(truth)
    for number, row in enumerate(objects, start=1):
        row |= {"id": number, "iscrowd": int(truth["difficult"][number - 1])}
    found = [
        {**row, "score": score}
        for row, score in zip(annotations(detections), detections["scores"].tolist(), strict=True)
    ]
    images = {*detections["image_ids"].tolist(), *truth["image_ids"].tolist()}
    data = pycocotools.coco.COCO()
    data.dataset = {
        "images": [{"id": image} for image in images],
        "annotations": objects,
        "categories": [{"id": label} for label in range(1, num_classes + 1)],
    }
    data.createIndex()
    judge = pycocotools.cocoeval.COCOeval(data, data.loadRes(found), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge


def figures_of(detections, truth, num_classes):
    """Return pycocotools' own summary as `coco_figures` has it."""
    if len(detections["labels"]) == 0:  # loadRes fails
        return None
    stats = judged(detections, truth, num_classes).stats
    return {name: math.nan if value == -1 else value for name, value in zip(NAMES, stats, strict=True)}


def assert_equals_pycocotools(detections, truth, num_classes):
    figures = coco.coco_figures(detections, truth, num_classes)
    expected = figures_of(detections, truth, num_classes)
    assert {name: figures[name] for name in NAMES} == pytest.approx(expected, abs=1e-9, nan_ok=True)
    for label in range(1, num_classes + 1):  # a class alone
        sides = [
            {name: column[side["labels"] == label] for name, column in side.items()}
            for side in (detections, truth)
        ]
        expected = figures_of(*sides, num_classes)
        if expected:
            assert figures["per_class"][label] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    return figures


def random_detections(rng, *, images, objects, found, num_classes, whole_pixels):
    """Objects of 8 to 180 pixels, some of them difficult, and detections around them, with tied scores."""
    low = rng.uniform(1, 200, (objects, 2))
    size = np.exp(rng.uniform(np.log(8), np.log(180), (objects, 2)))
    boxes = np.concatenate((low, low + size), axis=1)
    truth = {
        "image_ids": rng.integers(images, size=objects),
        "difficult": rng.random(objects) < 0.15,
        "labels": rng.integers(1, num_classes + 1, objects),
        "boxes_voc": boxes.round() if whole_pixels else boxes,
    }
    source = rng.integers(objects, size=found)
    noise = rng.normal(0, 1, (found, 4)) * rng.choice([0.02, 0.08, 0.3], (found, 1))
    moved = boxes[source] + noise * np.tile(size[source], 2)
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    labels, image_ids = truth["labels"][source], truth["image_ids"][source]
    labels = np.where(rng.random(found) < 0.8, labels, rng.integers(1, num_classes + 1, found))
    image_ids = np.where(rng.random(found) < 0.8, image_ids, rng.integers(images, size=found))
    detections = {
        "image_ids": image_ids,
        "labels": labels,
        "scores": rng.random(found).round(2),
        "boxes_voc": moved.round() if whole_pixels else moved,
    }
    return detections, truth


@pytest.mark.parametrize(
    ("images", "objects", "found", "num_classes", "whole_pixels"),
    [(12, 80, 600, 3, False), (12, 80, 1500, 2, True), (3, 12, 900, 1, False), (20, 60, 300, 20, True)],
)
def test_figures_equal_pycocotools(images, objects, found, num_classes, whole_pixels):
    rng = np.random.default_rng(found)
    detections, truth = random_detections(
        rng, images=images, objects=objects, found=found, num_classes=num_classes, whole_pixels=whole_pixels
    )
    figures = assert_equals_pycocotools(detections, truth, num_classes)
    assert 0.02 < figures["ap"] < 0.9
    assert len({figures[name] for name in NAMES}) > 8  # sizes and counts differ, so they are told apart


# Few places and few scores: equal overlaps, repeated boxes and tied scores are the rule.
edges = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda e: (e[0], e[0] + e[1]))
boxes = st.tuples(edges, edges).map(lambda b: [b[0][0], b[1][0], b[0][1], b[1][1]])
detection = st.tuples(st.integers(0, 1), st.integers(1, 2), st.sampled_from([0.1, 0.5, 0.5, 0.9]), boxes)
ground_truth = st.tuples(st.integers(0, 1), st.integers(1, 2), boxes, st.booleans())


@settings(max_examples=30, deadline=None)
@given(st.lists(detection, min_size=1, max_size=25), st.lists(ground_truth, max_size=12))
def test_figures_equal_pycocotools_on_ties_of_all_kinds(detections, truth):
    assert_equals_pycocotools(detections_of(detections), truth_of(truth), 2)


def test_hand_case_of_one_object():
    # IoU 80 / 100 at the first, 100 / 100 at the second: a hit at .5 to .8 comes first, above that second.
    truth = truth_of([(0, 1, BOX, False)])
    figures = coco.coco_figures(detections_of([(0, 1, 0.9, [1, 1, 10, 8]), (0, 1, 0.8, BOX)]), truth, 2)
    assert figures["ap"] == pytest.approx((7 * 1 + 3 * 0.5) / 10)  # .5, .55, ..., .8: seven of the ten
    assert (figures["ap50"], figures["ar1"], figures["ar10"]) == pytest.approx((1, 0.7, 1))
    assert figures["ap_small"] == figures["ap"] == figures["per_class"][1]["ap"]
    assert math.isnan(figures["ap_medium"])
    assert math.isnan(figures["per_class"][2]["ap"])


@pytest.mark.parametrize(("side", "size"), [(32, "small"), (33, "medium"), (96, "medium"), (97, "large")])
def test_sizes_are_counted_in_pixels_with_both_corners(side, size):
    box = [1, 1, side, side]
    figures = coco.coco_figures(detections_of([(0, 1, 0.9, box)]), truth_of([(0, 1, box, False)]), 1)
    assert (figures[f"ap_{size}"], figures[f"ar_{size}"]) == pytest.approx((1, 1))
    if side not in (32, 96):  # these count as both
        assert sum(not math.isnan(figures[f"ap_{name}"]) for name in coco.SIZES) == 1


def test_difficult_objects_are_crowds_and_count_neither_way():
    truth = truth_of([(0, 1, BOX, False), (0, 1, [21, 21, 60, 60], True)])
    # Both of the later two lie on the crowd, which takes any number: shared area over their own.
    rows = [(0, 1, 0.9, [21, 21, 30, 30]), (0, 1, 0.8, [31, 31, 40, 40]), (0, 1, 0.7, BOX)]
    detections = detections_of(rows)
    assert coco.coco_figures(detections, truth, 1)["ap"] == pytest.approx(1)
    truth["difficult"][:] = False
    assert coco.coco_figures(detections, truth, 1)["ap"] < 0.5


def test_without_detections_zero_and_without_truth_nan(capsys):
    nothing = coco.coco_figures(detections_of([]), truth_of([(0, 1, BOX, False)]), 1)
    assert nothing["ap"] == nothing["ar100"] == 0
    for empty in (truth_of([]), truth_of([(0, 1, BOX, True)])):
        figures = coco.coco_figures(detections_of([(0, 1, 0.9, BOX)]), empty, 1)
        assert all(math.isnan(figures[name]) for name in NAMES)
    figures = coco.coco_figures(detections_of([]), truth_of([]), 1)
    assert all(math.isnan(value) for value in figures["per_class"][1].values())
    assert capsys.readouterr().out == ""  # pycocotools prints its steps


def test_pycocotools_missing_is_one_line(monkeypatch, tiny_run, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    assert coco.main([str(tiny_run.final), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines() == [err.strip()]
    assert err.startswith(
        "error: measuring as COCO does needs the package pycocotools: pip install pycocotools"
    )
    assert out == ""  # said before the work
    assert not (tmp_path / "out").exists()


def test_table_has_a_row_for_each_class_and_all():
    figures = coco.coco_figures(detections_of([(0, 1, 0.9, BOX)]), truth_of([(0, 1, BOX, False)]), 2)
    _, headings, *rows = coco.table(coco.by_name(figures, ["cat", "unicorn"])).splitlines()
    assert headings.split() == "AP AP50 AP75 APS APM APL AR1 AR10 AR100 ARS ARM ARL".split()  # noqa: SIM905
    assert [row.split()[0] for row in rows] == ["cat", "unicorn", "all"]
    assert rows[0].split()[1:] == ["1.0000"] * 4 + ["-"] * 2 + ["1.0000"] * 4 + ["-"] * 2
    assert rows[1].split()[1:] == ["-"] * 12


def test_command_prints_and_writes_the_figures_of_real_detections(tiny_run, tmp_path, capsys):
    flags = ["--device", "cpu", "--amp", "off", "--workers", "0", "--score-thresh", ".001"]
    assert coco.main([str(tiny_run.final), *flags, "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "plots" / "evaluation"
    written = json.loads((folder / "coco.json").read_text())
    evaluation = ssd.evaluate_checkpoint(
        *common.load_evaluation(tiny_run.final, [*flags, "--output-dir", str(tmp_path / "b")])
    )
    detections = evaluation.result["detections"]
    assert len(detections["labels"]) > 100
    classes = evaluation.classes
    figures = assert_equals_pycocotools(detections, ssd.truth_of(evaluation.records), len(classes))
    for name in NAMES:
        assert written[name] == pytest.approx(None if math.isnan(figures[name]) else figures[name])
    assert set(written["per_class"]) == {"angular", "round"}
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for key in ("checkpoint", "data", "split", "num_images", "precision", "detection"):
        assert written[key] == evaluation[key]
    assert coco.table(coco.by_name(figures, classes)) in out
    assert out.endswith(f"{folder / 'coco.json'}\n")


def test_command_without_a_checkpoint_says_what_it_takes(tmp_path, capsys):
    with pytest.raises(SystemExit):
        coco.main(["--data", "shapes"])
    assert "required: CHECKPOINT" in capsys.readouterr().err
    assert coco.main([str(tmp_path / "none.pth")]) == 2
    assert "no such file" in capsys.readouterr().err
