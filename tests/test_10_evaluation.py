import json
import math

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import ssd_object_detection as ssd


def detections_of(rows):
    """rows: (image_id, label, score, box) in the form that evaluate_voc takes."""
    columns = list(zip(*rows, strict=True)) or [[]] * 4
    return dict(zip(("image_ids", "labels", "scores", "boxes_px"), map(np.array, columns), strict=True))


def truth_of(rows):
    """rows: (image_id, label, box, difficult)."""
    columns = list(zip(*rows, strict=True)) or [[]] * 4
    return dict(zip(("image_ids", "labels", "boxes_px", "difficult"), map(np.array, columns), strict=True))


def score(detections, truth, num_classes=1, **settings):
    return ssd.evaluate_voc(detections_of(detections), truth_of(truth), num_classes, **settings)


A_BOX, B_BOX, C_BOX, FAR = [1, 1, 10, 10], [21, 21, 30, 30], [41, 41, 50, 50], [81, 81, 90, 90]


# -- Average precision of a curve


def test_average_precision_of_a_hand_computed_curve():
    # hit, miss, hit, miss, hit over 4 objects
    recall, precision = np.array([1, 1, 2, 2, 3]) / 4, np.array([1, 1 / 2, 2 / 3, 2 / 4, 3 / 5])
    area, eleven = ssd.average_precision(recall, precision)
    # The curve from the right: 1 up to .25, 2/3 up to .5, 3/5 up to .75, then 0.
    assert area == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    # Recall 0, .1, .2: 1; .3, .4, .5: 2/3; .6, .7: 3/5; .8, .9, 1: 0.
    assert eleven == pytest.approx((3 * 1 + 3 * 2 / 3 + 2 * 3 / 5) / 11)


def test_average_precision_raises_what_a_later_point_exceeds():
    # miss, hit, hit over 2 objects: precision 0, 1/2, 2/3, made monotone to 2/3 everywhere.
    area, eleven = ssd.average_precision(np.array([0, 0.5, 1]), np.array([0, 1 / 2, 2 / 3]))
    assert area == pytest.approx(2 / 3)
    assert eleven == pytest.approx(2 / 3)


def test_average_precision_of_nothing_is_zero():
    assert ssd.average_precision(np.zeros(0), np.zeros(0)) == (0, 0)


@pytest.mark.parametrize("hits", range(11))
def test_eleven_points_are_the_numbers_that_the_devkit_counts_with(hits):
    # `hits` of 10 objects found without a miss: precision 1 at the recalls 0, .1, ..., hits / 10. All of them count
    # but 3 / 10, because the fourth number of MATLAB's 0:0.1:1 is 3 * .1 = .30000000000000004.
    recall = np.arange(1, hits + 1) / 10
    _, eleven = ssd.average_precision(recall, np.ones(hits))
    assert eleven == pytest.approx((hits + 1 - (hits == 3) if hits else 0) / 11)


# -- Hits and misses


def test_all_objects_found_is_one_and_none_is_zero():
    truth = [("a", 1, A_BOX, False), ("b", 1, B_BOX, False)]
    (perfect,) = score([("a", 1, 0.9, A_BOX), ("b", 1, 0.8, B_BOX)], truth).values()
    assert (perfect["ap_area"], perfect["ap11"], perfect["num_gt"]) == (1, 1, 2)
    (nothing,) = score([], truth).values()
    assert (nothing["ap_area"], nothing["ap11"], nothing["num_gt"]) == (0, 0, 2)
    assert len(nothing["recall"]) == len(nothing["precision"]) == 0


def test_hand_case_with_duplicate_and_wrong_place():
    truth = [("a", 1, A_BOX, False), ("a", 1, B_BOX, False)]
    detections = [
        ("a", 1, 0.9, A_BOX),  # hit
        ("a", 1, 0.8, A_BOX),  # found before: false
        ("a", 1, 0.7, FAR),  # false
        ("a", 1, 0.6, B_BOX),  # hit
    ]
    (result,) = score(detections, truth).values()
    assert result["recall"].tolist() == [0.5, 0.5, 0.5, 1]
    assert result["precision"].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2])
    assert result["ap_area"] == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    assert result["ap11"] == pytest.approx((6 * 1 + 5 * 0.5) / 11)


def test_order_of_scores_decides_not_order_of_rows():
    truth = [("a", 1, A_BOX, False)]
    late_hit = score([("a", 1, 0.2, A_BOX), ("a", 1, 0.9, FAR)], truth)[1]
    assert late_hit["precision"].tolist() == pytest.approx([0, 0.5])
    assert late_hit["ap_area"] == pytest.approx(0.5)


def test_tied_scores_stay_in_the_given_order():
    truth = [("a", 1, A_BOX, False)]
    rows = [("a", 1, 0.5, FAR)] * 20 + [("a", 1, 0.5, A_BOX)] + [("a", 1, 0.5, FAR)] * 20
    assert score(rows, truth)[1]["ap_area"] == pytest.approx(1 / 21)
    assert score(rows[20:], truth)[1]["ap_area"] == 1


def test_difficult_objects_count_neither_way():
    truth = [("a", 1, A_BOX, True), ("a", 1, B_BOX, False)]
    detections = [("a", 1, 0.9, A_BOX), ("a", 1, 0.8, A_BOX), ("a", 1, 0.7, B_BOX)]
    result = score(detections, truth)[1]
    assert result["num_gt"] == 1
    assert result["ap_area"] == 1
    assert result["recall"].tolist() == [1]


def test_class_with_difficult_objects_only_has_no_value():
    result = score([("a", 1, 0.9, A_BOX)], [("a", 1, A_BOX, True)])[1]
    assert math.isnan(result["ap_area"])
    assert math.isnan(result["ap11"])
    assert result["num_gt"] == 0


def test_detection_takes_the_object_it_overlaps_most_even_if_that_is_found():
    # The second detection overlaps B by more than .5 too, but A more: as the devkit has it, it is false.
    truth = [("a", 1, [1, 1, 10, 10], False), ("a", 1, [1, 3, 10, 12], False)]
    detections = [("a", 1, 0.9, [1, 1, 10, 10]), ("a", 1, 0.8, [1, 1, 10, 11])]
    assert reference.iou(detections[1][3], truth[1][2], 1) > 0.5
    assert score(detections, truth)[1]["recall"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("difficult_first", [True, False])
def test_of_equal_overlaps_the_first_object_is_taken(difficult_first):
    # Two objects at equal distance above and below: which one is taken shows in whether it counts.
    truth = [("a", 1, [1, 1, 10, 10], difficult_first), ("a", 1, [1, 5, 10, 14], not difficult_first)]
    result = score([("a", 1, 0.9, [1, 3, 10, 12])], truth)[1]
    assert result["num_gt"] == 1
    assert result["ap_area"] == (0 if difficult_first else 1)
    assert len(result["recall"]) == (0 if difficult_first else 1)


def test_overlap_counts_corners_as_pixels():
    # 10x10 and 10x5 pixels: IoU is exactly 50 / 100. Without the corners' pixels it would be 36 / 81 < .5.
    truth = [("a", 1, [1, 1, 10, 10], False)]
    assert score([("a", 1, 0.9, [1, 1, 10, 5])], truth)[1]["ap_area"] == 1
    assert reference.iou([1, 1, 10, 5], [1, 1, 10, 10]) < 0.5
    # And 49.9 of 100 is not enough.
    assert score([("a", 1, 0.9, [1, 1, 10, 4.99])], truth)[1]["ap_area"] == 0


def test_threshold_of_overlap_is_used():
    truth, detections = [("a", 1, [1, 1, 10, 10], False)], [("a", 1, 0.9, [1, 1, 10, 7])]  # IoU .7
    assert score(detections, truth, iou_thresh=0.65)[1]["ap_area"] == 1
    assert score(detections, truth, iou_thresh=0.75)[1]["ap_area"] == 0


def test_images_and_classes_are_kept_apart():
    truth = [("a", 1, A_BOX, False), ("b", 2, B_BOX, False)]
    right_box_wrong_image = [("b", 1, 0.9, A_BOX), ("a", 2, 0.9, B_BOX)]
    right_box_wrong_class = [("a", 2, 0.9, A_BOX), ("b", 1, 0.9, B_BOX)]
    for detections in (right_box_wrong_image, right_box_wrong_class):
        result = score(detections, truth, num_classes=2)
        assert [result[k]["ap_area"] for k in (1, 2)] == [0, 0]
        assert [len(result[k]["recall"]) for k in (1, 2)] == [1, 1]


def test_class_without_ground_truth_is_nan_and_present():
    result = score([("a", 2, 0.9, FAR)], [("a", 1, A_BOX, False)], num_classes=3)
    assert list(result) == [1, 2, 3]
    assert result[1]["ap_area"] == 0
    assert all(math.isnan(result[k][name]) for k in (2, 3) for name in ("ap_area", "ap11"))


def test_detections_in_images_without_truth_are_false():
    result = score([("z", 1, 0.9, A_BOX), ("a", 1, 0.8, A_BOX)], [("a", 1, A_BOX, False)])[1]
    assert result["precision"].tolist() == [0, 0.5]


def test_no_truth_and_no_detections_is_nan():
    assert math.isnan(score([], [])[1]["ap_area"])
    assert math.isnan(score([("a", 1, 0.5, A_BOX)], [])[1]["ap_area"])


@pytest.mark.parametrize("evaluator", [ssd.evaluate_voc, ssd.evaluate_coco, ssd.confusion_matrix])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", 1, math.nan, A_BOX), "detections: 1 scores NaN, the first in row 1: nan"),
        (("a", 0, 0.5, A_BOX), r"detections: 1 labels outside 1\.\.2, the first in row 1: 0"),
        (("a", 3, 0.5, A_BOX), r"detections: 1 labels outside 1\.\.2, the first in row 1: 3"),
        (("a", 1, 0.5, [1, 2, math.inf, 4]), "detections: 1 boxes_px not finite"),
    ],
)
def test_what_cannot_be_scored_is_named(evaluator, row, message):
    truth = truth_of([("a", 1, A_BOX, False)])
    with pytest.raises(ValueError, match=message):
        evaluator(detections_of([("a", 1, 0.9, A_BOX), row]), truth, 2)


def test_columns_of_different_length_are_named():
    detections = detections_of([("a", 1, 0.9, A_BOX)])
    with pytest.raises(ValueError, match="truth: columns of different length"):
        ssd.evaluate_voc(detections, {**truth_of([("a", 1, A_BOX, False)]), "difficult": []}, 1)


def test_boxes_beyond_the_picture_and_boxes_without_area_are_scored_as_they_are():
    truth = [("a", 1, [1, 1, 10, 10], False)]
    # Ten pixels of the object and ten outside the picture: IoU .5, not cut at the border.
    assert score([("a", 1, 0.9, [-9, 1, 10, 10])], truth)[1]["ap_area"] == 1
    assert score([("a", 1, 0.9, [-10, 1, 10, 10])], truth)[1]["ap_area"] == 0
    for reversed_box in ([10, 10, 1, 1], [5, 10, 4, 1], [1, 10, 10, 1]):
        with np.errstate(all="raise"):
            assert score([("a", 1, 0.9, reversed_box)], truth)[1]["precision"].tolist() == [0]


def test_rows_of_one_image_id_are_one_image_in_whatever_order():
    truth = [("a", 1, A_BOX, False), ("b", 1, B_BOX, False), ("a", 1, B_BOX, False)]
    detections = [("a", 1, 0.9, B_BOX), ("b", 1, 0.8, B_BOX), ("a", 1, 0.7, A_BOX), ("a", 1, 0.6, B_BOX)]
    assert score(detections, truth)[1]["recall"].tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_scores_stand_beside_the_curve():
    truth = [("a", 1, A_BOX, False), ("a", 1, C_BOX, True)]
    detections = [("a", 1, 0.2, A_BOX), ("a", 1, 0.9, FAR), ("a", 1, 0.5, C_BOX)]
    result = score(detections, truth)[1]
    assert result["scores"].tolist() == [0.9, 0.2]  # what is found on a difficult object is left out
    assert result["precision"].tolist() == [0, 0.5]


def test_string_image_ids_work_like_numbers():
    truth = [(0, 1, A_BOX, False), (1, 2, B_BOX, False), (2, 1, C_BOX, True)]
    detections = [(0, 1, 0.9, A_BOX), (0, 2, 0.8, B_BOX), (1, 2, 0.7, B_BOX), (2, 1, 0.95, C_BOX), (0, 1, 0.5, FAR)]
    names = {0: "2008_000002", 1: "000009", 2: "img"}
    numbered = score(detections, truth, num_classes=2)
    named = score([(names[d[0]], *d[1:]) for d in detections], [(names[t[0]], *t[1:]) for t in truth], num_classes=2)
    for label in (1, 2):
        assert numbered[label]["ap_area"] == named[label]["ap_area"]
        assert numbered[label]["precision"].tolist() == named[label]["precision"].tolist()
    assert numbered[1]["ap_area"] == 1
    assert numbered[2]["ap_area"] == 0.5


# -- Against the loops


def assert_agrees(detections, truth, num_classes):
    result = score(detections, truth, num_classes)
    for label in range(1, num_classes + 1):
        outcomes, num_gt = reference.voc_class(detections, truth, label)
        area, eleven = reference.voc_ap(outcomes, num_gt)
        assert result[label]["num_gt"] == num_gt
        assert len(result[label]["recall"]) == len(outcomes)
        assert (np.diff(result[label]["recall"], prepend=0) > 0).tolist() == [o and num_gt > 0 for o in outcomes]
        assert result[label]["ap_area"] == pytest.approx(area, abs=1e-9, nan_ok=True)
        assert result[label]["ap11"] == pytest.approx(eleven, abs=1e-9, nan_ok=True)


# Few places and few scores: equal overlaps, repeated boxes and tied scores are the rule.
edges = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda e: (e[0], e[0] + e[1]))
boxes = st.tuples(edges, edges).map(lambda b: [b[0][0], b[1][0], b[0][1], b[1][1]])
detection = st.tuples(st.sampled_from("ab"), st.integers(1, 2), st.sampled_from([0.1, 0.5, 0.5, 0.9]), boxes)
ground_truth = st.tuples(st.sampled_from("ab"), st.integers(1, 2), boxes, st.booleans())


@settings(max_examples=300, deadline=None)
@given(st.lists(detection, max_size=25), st.lists(ground_truth, max_size=12))
def test_evaluation_agrees_with_the_loops(detections, truth):
    assert_agrees(detections, truth, num_classes=2)


@pytest.mark.parametrize("seed", range(3))
def test_evaluation_agrees_with_the_loops_on_many_boxes(seed):
    rng = np.random.default_rng(seed)
    truth, detections = [], []
    for _ in range(120):
        low = rng.uniform(1, 200, 2)
        box = [*low, *(low + rng.uniform(10, 80, 2))]
        truth.append((int(rng.integers(12)), int(rng.integers(1, 4)), box, bool(rng.random() < 0.2)))
    for _ in range(1500):  # copies of objects, moved a little, some under a wrong class
        image, label, box, _ = truth[rng.integers(len(truth))]
        moved = [v + d for v, d in zip(box, rng.normal(0, 8, 4), strict=True)]
        label = label if rng.random() < 0.8 else int(rng.integers(1, 4))
        detections.append((image, label, round(float(rng.random()), 2), moved))
    assert_agrees(detections, truth, num_classes=3)


def test_advice_is_the_threshold_of_the_best_f1_by_hand():
    truth = [("a", 1, A_BOX, False), ("a", 1, B_BOX, False), ("a", 2, C_BOX, False)]
    # F1 at .9: 2 * 1 * .5 / 1.5 = .667; at .8: .5; at .7: 2 * .667 * 1 / 1.667 = .8; at .6: 2 * .5 / 1.5.
    detections = [("a", 1, 0.9, A_BOX), ("a", 1, 0.8, FAR), ("a", 1, 0.7, B_BOX), ("a", 1, 0.6, FAR)]
    result = score(detections, truth, num_classes=3)
    assert ssd.advise_thresholds(result, ("cat", "dog", "owl")) == {"cat": 0.7}  # no detection, no object: no advice
    assert ssd.best_f1(result[1])["f1"] == pytest.approx(0.8)


# -- COCO


def pycocotools_of(detections, truth, num_classes):
    """Score by pycocotools; returns its COCOeval, summarized."""
    ids = sorted({*detections["image_ids"].tolist(), *truth["image_ids"].tolist()})

    def rows(side):
        for image_id, label, (x1, y1, x2, y2) in zip(
            side["image_ids"].tolist(), side["labels"].tolist(), side["boxes_px"].tolist(), strict=True
        ):
            bbox = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
            yield {"image_id": ids.index(image_id), "category_id": label, "bbox": bbox, "area": bbox[2] * bbox[3]}

    objects = [
        {**row, "id": i, "iscrowd": int(is_difficult)}
        for i, (row, is_difficult) in enumerate(zip(rows(truth), truth["difficult"], strict=True), start=1)
    ]
    found = [{**row, "score": s} for row, s in zip(rows(detections), detections["scores"].tolist(), strict=True)]
    coco = pycocotools.coco.COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(len(ids))],
        "annotations": objects,
        "categories": [{"id": k} for k in range(1, num_classes + 1)],
    }
    coco.createIndex()
    judge = pycocotools.cocoeval.COCOeval(coco, coco.loadRes(found), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge


COCO_NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)


def assert_equals_pycocotools(detections, truth, num_classes):
    judge = pycocotools_of(detections, truth, num_classes)
    mine = ssd.evaluate_coco(detections, truth, num_classes)
    theirs = {name: (math.nan if v == -1 else v) for name, v in zip(COCO_NAMES, judge.stats, strict=True)}
    assert {name: mine[name] for name in COCO_NAMES} == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    for label in range(1, num_classes + 1):
        precision = judge.eval["precision"][:, :, label - 1, 0, 2]
        expected = {"ap": precision, "ap50": precision[0], "ap75": precision[5]}
        expected = {name: math.nan if (p == -1).any() else p.mean() for name, p in expected.items()}
        assert mine["per_class"][label] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    return mine


def random_detections(rng, *, images, objects, found, num_classes, whole_pixels=False):
    """Objects of 8 to 180 pixels, a seventh of them difficult, and detections scattered around them, tied scores."""
    low = rng.uniform(1, 200, (objects, 2))
    boxes = np.concatenate((low, low + np.exp(rng.uniform(np.log(8), np.log(180), (objects, 2)))), axis=1)
    truth = {"image_ids": rng.integers(images, size=objects), "labels": rng.integers(1, num_classes + 1, objects)}
    source = rng.integers(objects, size=found)
    sides = np.tile(boxes[source, 2:] - boxes[source, :2], 2)
    moved = boxes[source] + rng.normal(0, 1, (found, 4)) * sides * rng.choice([0.02, 0.08, 0.3], (found, 1))
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    labels = np.where(rng.random(found) < 0.8, truth["labels"][source], rng.integers(1, num_classes + 1, found))
    image_ids = np.where(rng.random(found) < 0.8, truth["image_ids"][source], rng.integers(images, size=found))
    if whole_pixels:
        boxes, moved = boxes.round(), moved.round()
    detections = {"image_ids": image_ids, "labels": labels, "scores": rng.random(found).round(2), "boxes_px": moved}
    return detections, {**truth, "boxes_px": boxes, "difficult": rng.random(objects) < 0.15}


@pytest.mark.parametrize(
    ("images", "objects", "found", "num_classes", "whole_pixels"),
    [(12, 80, 600, 3, False), (12, 80, 1500, 2, True), (3, 12, 900, 1, False), (20, 60, 300, 20, True)],
)
def test_coco_figures_equal_pycocotools(images, objects, found, num_classes, whole_pixels):
    rng = np.random.default_rng(found)
    detections, truth = random_detections(
        rng, images=images, objects=objects, found=found, num_classes=num_classes, whole_pixels=whole_pixels
    )
    result = assert_equals_pycocotools(detections, truth, num_classes)
    assert 0.02 < result["ap"] < 0.9
    assert len({result[name] for name in COCO_NAMES}) > 8  # sizes and counts differ, so they are really told apart


@settings(max_examples=60, deadline=None)
@given(st.lists(detection, min_size=1, max_size=25), st.lists(ground_truth, max_size=12))
def test_coco_figures_equal_pycocotools_on_ties_of_all_kinds(detections, truth):
    assert_equals_pycocotools(detections_of(detections), {**truth_of([]), **truth_of(truth)}, 2)


def test_coco_of_real_detections_equals_pycocotools(tiny_run, tiny_voc):
    model = ssd.load_detector(tiny_run.final, "cpu", "off").model
    data = ssd.load_data(str(tiny_voc), val_split="val", test_split="test")
    records = [*data.train, *data.val, *data.test]
    found = ssd.evaluate(model, loader_of(records), score_thresh=0.001)["detections"]
    assert len(found["labels"]) > 500
    assert_equals_pycocotools(found, ssd.truth_of(records), 2)


def test_coco_hand_case_of_one_object():
    # IoU 80 / 100 at the first, 100 / 100 at the second: a hit at .5 to .8 comes first, above that second.
    truth = truth_of([("a", 1, [1, 1, 10, 10], False)])
    detections = detections_of([("a", 1, 0.9, [1, 1, 10, 8]), ("a", 1, 0.8, [1, 1, 10, 10])])
    result = ssd.evaluate_coco(detections, truth, 2)
    assert result["ap"] == pytest.approx((7 * 1 + 3 * 0.5) / 10)  # .5, .55, ..., .8: seven of the ten
    assert (result["ap50"], result["ar1"], result["ar10"]) == pytest.approx((1, 0.7, 1))
    assert result["ap_small"] == result["ap"]
    assert math.isnan(result["ap_medium"])
    assert math.isnan(result["per_class"][2]["ap"])


def test_coco_without_detections_is_zero_and_without_truth_is_nan():
    nothing, truth = detections_of([]), truth_of([("a", 1, A_BOX, False)])
    assert ssd.evaluate_coco(nothing, truth, 1)["ap"] == ssd.evaluate_coco(nothing, truth, 1)["ar100"] == 0
    for empty in (truth_of([]), truth_of([("a", 1, A_BOX, True)])):
        result = ssd.evaluate_coco(detections_of([("a", 1, 0.9, A_BOX)]), empty, 1)
        assert all(math.isnan(result[name]) for name in COCO_NAMES)


# -- Confusion


def test_confusion_of_a_hand_case():
    truth = [("a", 1, A_BOX, False), ("a", 2, B_BOX, False), ("a", 2, C_BOX, True), ("b", 1, A_BOX, False)]
    detections = [
        ("a", 1, 0.9, A_BOX),  # right
        ("a", 2, 0.8, A_BOX),  # a second one on it: false
        ("a", 1, 0.7, B_BOX),  # wrong class
        ("a", 1, 0.6, C_BOX),  # on a difficult object: nowhere
        ("a", 2, 0.5, FAR),  # false
        ("b", 1, 0.39, A_BOX),  # below the threshold: missed
    ]
    matrix = ssd.confusion_matrix(detections_of(detections), truth_of(truth), 2)
    assert matrix.tolist() == [[0, 0, 2], [1, 1, 0], [0, 1, 0]]


def test_confusion_prefers_the_right_class_to_the_larger_overlap():
    truth = [("a", 1, [1, 1, 10, 10], False), ("a", 2, [1, 2, 10, 11], False)]
    detections = [("a", 2, 0.9, [1, 1, 10, 10]), ("a", 1, 0.8, [1, 2, 10, 11])]
    assert ssd.confusion_matrix(detections_of(detections), truth_of(truth), 2).tolist() == [
        [0, 0, 0], [0, 1, 0], [0, 0, 1]
    ]


def test_confusion_of_nothing_is_zero():
    assert ssd.confusion_matrix(detections_of([]), truth_of([]), 2).tolist() == [[0] * 3] * 3


# -- The devkit's files


def test_devkit_files_come_back_as_they_were(records, tmp_path):
    rng = np.random.default_rng(1)
    detections, _ = random_detections(rng, images=5, objects=9, found=60, num_classes=2)
    order = np.lexsort((np.arange(60), detections["labels"]))  # a file a class
    detections = {name: column[order].astype(np.float32 if name == "scores" else column.dtype)
                  for name, column in detections.items()}
    ssd.write_devkit_files(tmp_path, "test", detections, records, ("cat", "dog"))
    image_id, *numbers = (tmp_path / "comp4_det_test_cat.txt").read_text().splitlines()[0].split()
    assert image_id == records[detections["image_ids"][0]].image_id
    assert [float(n) for n in numbers] == pytest.approx([detections["scores"][0], *detections["boxes_px"][0]])
    back = ssd.read_devkit_files(tmp_path, "test", records, ("cat", "dog"))
    for name in ("image_ids", "labels", "scores"):
        assert back[name].astype(np.float32).tolist() == detections[name].astype(np.float32).tolist()
    np.testing.assert_allclose(back["boxes_px"], detections["boxes_px"], rtol=1e-8)


def test_empty_devkit_files_are_no_detections(records, tmp_path):
    nothing = {"image_ids": np.zeros(0, int), "labels": np.zeros(0, int), "scores": np.zeros(0),
               "boxes_px": np.zeros((0, 4))}
    ssd.write_devkit_files(tmp_path, "val", nothing, records, ("cat",))
    assert (tmp_path / "comp4_det_val_cat.txt").read_text() == ""
    back = ssd.read_devkit_files(tmp_path, "val", records, ("cat",))
    assert {name: column.shape for name, column in back.items()} == {name: v.shape for name, v in nothing.items()}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 .9 1 1 10", "line 2: '0 .9 1 1 10': not 'image score xmin ymin xmax ymax'"),
        ("0 .9 1 1 10 nan", "line 2: .*not 'image score"),
        ("0 .9 one 1 10 10", "line 2: .*not 'image score"),
        ("", "line 2: '': not 'image score"),
        ("nowhere .9 1 1 10 10", "line 2: 'nowhere .9 1 1 10 10': list test has no such image"),
    ],
)
def test_bad_line_of_a_devkit_file_is_named(records, tmp_path, line, message):
    (tmp_path / "comp4_det_test_cat.txt").write_text(f"0 .9 1 1 10 10\n{line}\n0 .8 1 1 10 10\n")
    with pytest.raises(ssd.InputError, match=message):
        ssd.read_devkit_files(tmp_path, "test", records, ("cat",))


def test_missing_devkit_file_is_named(records, tmp_path):
    with pytest.raises(ssd.InputError, match=r"comp4_det_test_dog\.txt: no such file; each class needs one"):
        ssd.read_devkit_files(tmp_path, "test", records, ("dog",))


# -- Whole evaluation


class Stub(nn.Module):
    """Answers each image, known by its constant colour, with given boxes on the first anchors."""

    def __init__(self, answers, num_classes):
        super().__init__()
        self.num_classes, self.answers, self.modes = num_classes, answers, []
        self.register_buffer("anchors", ssd.make_anchors())

    def forward(self, images):
        self.modes.append(self.training)
        cls_logits = torch.zeros(len(images), 9966, self.num_classes + 1)
        cls_logits[..., 0] = 20.0
        box_deltas = torch.zeros(len(images), 9966, 4)
        for row, image in enumerate(images):
            for place, (box, label) in enumerate(self.answers[int(image[0, 0, 0])]):
                cls_logits[row, place, label] = 25.0 - place
                box_deltas[row, place] = ssd.encode(torch.tensor(box), self.anchors[place])
        return cls_logits, box_deltas


@pytest.fixture
def records(tmp_path):
    """Five images of different sizes, the second without objects, each of the colour of its number."""
    rng, made = np.random.default_rng(2), []
    for number, count in enumerate((2, 0, 3, 1, 2)):
        width, height = 60 + 30 * number, 150 - 20 * number
        Image.new("RGB", (width, height), (number,) * 3).save(tmp_path / f"{number}.png")
        low = rng.uniform(0, 0.1, (count, 2)) + np.arange(count)[:, None] * 0.33  # apart from one another
        boxes = np.concatenate((low, low + rng.uniform(0.1, 0.22, (count, 2))), axis=1)
        boxes_px = (boxes * [width, height, width, height]).astype(np.float32)
        labels = rng.integers(1, 3, count)
        path = str(tmp_path / f"{number}.png")
        made.append(ssd.Record(str(number), path, width, height, boxes_px, labels, np.zeros(count, bool)))
    return made


def loader_of(records, batch_size=2):
    return ssd.make_loader(ssd.VocDataset(records, ssd.build_transform(train=False)), batch_size=batch_size)


def perfect_answers(records):
    return {n: list(zip(r.boxes.tolist(), r.labels.tolist(), strict=True)) for n, r in enumerate(records)}


def test_perfect_detections_have_map_one(records):
    model = Stub(perfect_answers(records), num_classes=2).train()
    result = ssd.evaluate(model, loader_of(records))
    assert result["map_area"] == pytest.approx(1)
    assert result["map11"] == pytest.approx(1)
    assert not any(model.modes)  # evaluation mode
    found = result["detections"]
    assert len(found["labels"]) == len(found["scores"]) == len(found["image_ids"]) == len(found["boxes_px"]) == 8
    # The pictures' own pixels, as VOC counts them: corners from 1, both included.
    first = found["boxes_px"][found["image_ids"] == 0]
    np.testing.assert_allclose(first, records[0].boxes_px + np.array([1, 1, 0, 0]), atol=0.01)


def test_batch_size_changes_nothing(records):
    model = Stub(perfect_answers(records), num_classes=2)
    results = [ssd.evaluate(model, loader_of(records, size)) for size in (1, 5)]
    for name in ("image_ids", "labels", "scores", "boxes_px"):
        np.testing.assert_allclose(results[0]["detections"][name], results[1]["detections"][name], atol=1e-4)


def test_detections_of_another_image_are_false(records):
    answers = perfect_answers(records)
    swapped = {**answers, 0: answers[2], 2: answers[0]}
    assert ssd.evaluate(Stub(swapped, num_classes=2), loader_of(records))["map_area"] < 0.9


def test_classes_without_ground_truth_are_left_out_of_the_mean(records):
    result = ssd.evaluate(Stub(perfect_answers(records), num_classes=5), loader_of(records))
    assert result["map_area"] == pytest.approx(1)
    assert list(result["classes"]) == [1, 2, 3, 4, 5]
    assert math.isnan(result["classes"][4]["ap_area"])


def test_no_detection_at_all_has_map_zero(records):
    result = ssd.evaluate(Stub({n: [] for n in range(5)}, num_classes=2), loader_of(records))
    assert result["map_area"] == result["map11"] == 0
    assert result["detections"]["boxes_px"].shape == (0, 4)


def test_no_ground_truth_at_all_has_no_map(records):
    answers = {1: [([0.1, 0.1, 0.4, 0.4], 1)], 0: []}
    empty = [records[1]]
    result = ssd.evaluate(Stub({**answers}, num_classes=2), loader_of(empty))
    assert math.isnan(result["map_area"])
    assert math.isnan(result["map11"])
    assert len(result["detections"]["labels"]) == 1


def test_settings_reach_detect(records):
    model = Stub(perfect_answers(records), num_classes=2)
    result = ssd.evaluate(model, loader_of(records), max_detections=1)
    assert np.bincount(result["detections"]["image_ids"], minlength=5).tolist() == [1, 0, 1, 1, 1]
    assert len(ssd.evaluate(model, loader_of(records), score_thresh=0.9999)["detections"]["scores"]) == 0


def test_flips_are_averaged_in_for_detections_but_not_for_losses(records, monkeypatch):
    seen = []

    def averaged(model, images, outputs, flips):
        if flips == "off":
            return outputs
        seen.append((len(images), flips))
        return outputs[0] * 0 - torch.tensor([0.0, 9, 9]), outputs[1]

    monkeypatch.setattr(ssd, "average_with_flips", averaged)
    model, loader = Stub(perfect_answers(records), num_classes=2), loader_of(records, batch_size=2)

    def criterion(outputs, batch):
        return {"loss": outputs[0].amax()}

    plain, both = (ssd.evaluate(model, loader, criterion=criterion, flip_average=f) for f in ("off", "both"))
    assert seen == [(2, "both"), (2, "both"), (1, "both")]
    assert both["loss"] == plain["loss"]
    assert len(plain["detections"]["labels"]) == 8
    assert len(both["detections"]["labels"]) == 0


def test_losses_are_means_over_the_images(records):
    model = Stub(perfect_answers(records), num_classes=2)

    def criterion(outputs, batch):
        mean = batch["images"][:, 0, 0, 0].float().mean()  # images are of the colours 0 to 4
        return {"loss": mean, "loss_cls": 2 * mean, "loss_box": 3 * mean}

    result = ssd.evaluate(model, loader_of(records, batch_size=2), criterion=criterion)
    assert [result[k] for k in ("loss", "loss_cls", "loss_box")] == pytest.approx([2, 4, 6])


def test_truth_and_pixels_follow_the_voc_convention(records):
    truth = ssd.truth_of(records)
    assert truth["image_ids"].tolist() == [0, 0, 2, 2, 2, 3, 4, 4]
    assert truth["labels"].tolist() == np.concatenate([r.labels for r in records]).tolist()
    np.testing.assert_allclose(truth["boxes_px"][5], records[3].boxes_px[0] + np.array([1, 1, 0, 0]))
    # Edges 0 to 10 are the ten pixels 1 to 10.
    assert ssd.to_voc_pixels([[0, 0, 10, 20]]).tolist() == [[1, 1, 10, 20]]
    assert ssd.to_voc_pixels(np.zeros((0, 4))).shape == (0, 4)


def test_table_names_every_class_and_the_mean(records):
    result = ssd.evaluate(Stub(perfect_answers(records), num_classes=3), loader_of(records))
    coco = ssd.evaluate_coco(result["detections"], ssd.truth_of(records), 3)
    lines = ssd.class_table(result, coco, ("cat", "dog", "unicorn")).splitlines()
    assert [line.split()[0] for line in lines] == ["class", "cat", "dog", "unicorn", "mean", "COCO", "COCO"]
    counts = np.bincount(np.concatenate([r.labels for r in records]), minlength=3)
    assert [int(line.split()[1]) for line in lines[1:3]] == counts[1:].tolist()
    assert lines[1].split()[2:] == ["1.000", "1.0000", "1.0000", "1.0000"]
    assert lines[3].split()[1:] == ["0", "no", "object", "to", "find"]
    assert lines[4].split()[1:] == ["1.0000", "1.0000", "1.0000"]
    assert lines[5].startswith("COCO AP: 50 1.0000, 75 1.0000, small 1.0000")
    assert lines[6].startswith(f"COCO AR: 1 {coco['ar1']:.4f}, 10 1.0000")
    assert lines[5].endswith("large -")


def test_summary_holds_every_number_by_name(records):
    result = ssd.evaluate(Stub(perfect_answers(records), num_classes=2), loader_of(records))
    truth = ssd.truth_of(records)
    coco, matrix = (f(result["detections"], truth, 2) for f in (ssd.evaluate_coco, ssd.confusion_matrix))
    numbers = json.loads(ssd.to_json(ssd.summarize(result, coco, matrix, ("cat", "dog"))))
    assert numbers["voc"]["map11"] == numbers["voc"]["map_area"] == pytest.approx(1)
    assert set(numbers["voc"]["per_class"]) == set(numbers["coco"]["per_class"]) == {"cat", "dog"}
    assert set(numbers["voc"]["per_class"]["dog"]) == {"ap11", "ap_area", "num_gt"}
    assert set(COCO_NAMES) < set(numbers["coco"])
    assert numbers["coco"]["ap_large"] is None
    assert numbers["confusion"]["classes"] == ["background", "cat", "dog"]
    assert np.array(numbers["confusion"]["matrix"]).sum() == numbers["num_detections"] == 8
