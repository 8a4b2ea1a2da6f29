"""The error analysis: every kind by hand, TIDE's sums as properties, and the command on a tiny trained model."""

import json
import math

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ssd_object_detection as ssd
from tools import analyze

A, B, C, FAR = [1, 1, 10, 10], [21, 21, 30, 30], [41, 41, 50, 50], [81, 81, 90, 90]
B_LOOSE = [21, 26, 30, 35]  # shares 50 of 150 pixels with B


def arrays(detections, truth):
    """detections: (image, label, score, box), truth: (image, label, box, difficult), as `evaluate_voc` takes them."""
    det, gt = list(zip(*detections, strict=True)) or [[]] * 4, list(zip(*truth, strict=True)) or [[]] * 4
    return (
        {"image_ids": np.array(det[0]), "labels": np.array(det[1], int), "scores": np.array(det[2], float),
         "boxes_px": np.array(det[3], float).reshape(-1, 4)},
        {"image_ids": np.array(gt[0]), "labels": np.array(gt[1], int), "difficult": np.array(gt[3], bool),
         "boxes_px": np.array(gt[2], float).reshape(-1, 4)},
    )


def kinds_of(detections, truth, num_classes=2):
    """The kind of each detection as given: a name of KINDS, "hit" or "ignored"."""
    errors = analyze.find_errors(*arrays(detections, truth), num_classes)
    names = [None] * len(detections)
    for place, row in enumerate(errors["order"].tolist()):
        kind = errors["kind"][place]
        names[row] = analyze.KINDS[kind] if kind >= 0 else "hit" if errors["is_hit"][place] else "ignored"
    return names


def gains_of(detections, truth, num_classes=2):
    errors = analyze.find_errors(*arrays(detections, truth), num_classes)
    names = [str(k) for k in range(1, num_classes + 1)]
    return analyze.analyze_errors(errors, names)


def assert_gains(tide, name="mean", **expected):
    """Demand the gains named, 0 for every other kind."""
    assert tide["gain"][name] == pytest.approx(dict.fromkeys(analyze.HEADINGS, 0.0) | expected)


# -- Each kind by hand


def test_localisation_error():
    truth, found = [("a", 1, A, False), ("b", 1, B, False)], [("a", 1, 0.9, A), ("b", 1, 0.8, B_LOOSE)]
    assert kinds_of(found, truth, 1) == ["hit", "localisation"]
    tide = gains_of(found, truth, 1)
    assert tide["ap"]["mean"] == pytest.approx(0.5)
    # Moved onto B it is the second hit. B is not missed: something found its place.
    assert_gains(tide, localisation=0.5, false_negatives=0.5)
    assert (tide["counts"]["localisation"], tide["counts"]["missed"]) == (1, 0)


def test_classification_error_costs_both_classes():
    truth = [("a", 1, A, False), ("b", 1, B, False), ("c", 2, C, False)]
    found = [("a", 1, 0.9, A), ("b", 2, 0.8, B), ("c", 2, 0.7, C)]
    assert kinds_of(found, truth) == ["hit", "classification", "hit"]
    tide = gains_of(found, truth)
    assert tide["ap"] == pytest.approx({"1": 0.5, "2": 0.5, "mean": 0.5})
    assert_gains(tide, "1", classification=0.5, false_negatives=0.5)
    assert_gains(tide, "2", classification=0.5, false_positives=0.5)
    assert_gains(tide, classification=0.5, false_positives=0.25, false_negatives=0.25)


@pytest.mark.parametrize(
    ("kind", "error"),
    [("duplicate", ("a", 1, 0.8, A)), ("background", ("a", 1, 0.8, FAR)), ("both", ("b", 1, 0.8, B_LOOSE))],
)
def test_error_that_is_repaired_by_leaving_it_out(kind, error):
    truth = [("a", 1, A, False), ("a", 1, C, False), ("b", 2, B, False)]
    found = [("a", 1, 0.9, A), error, ("a", 1, 0.7, C), ("b", 2, 0.9, B)]
    assert kinds_of(found, truth) == ["hit", kind, "hit", "hit"]
    tide = gains_of(found, truth)
    # Hit, error, hit over two objects: precision 1 and 2/3.
    assert tide["ap"]["1"] == pytest.approx((1 + 2 / 3) / 2)
    assert_gains(tide, "1", **{kind: 1 / 6, "false_positives": 1 / 6})


def test_missed_object():
    truth, found = [("a", 1, A, False), ("a", 1, B, False)], [("a", 1, 0.9, A)]
    tide = gains_of(found, truth, 1)
    assert_gains(tide, missed=0.5, false_negatives=0.5)
    assert tide["counts"] == {**dict.fromkeys(analyze.KINDS, 0), "missed": 1}


def test_thresholds_of_overlap():
    truth = [("a", 1, A, False), ("b", 2, A, False)]
    tenth, more, half = [1, 1, 10, 1], [1, 1, 10, 1.1], [1, 1, 10, 5]  # of A's 100 pixels: 10, 11, 50
    found = [("a", 1, 0.9, A), ("a", 1, 0.8, tenth), ("b", 1, 0.7, tenth), ("b", 1, 0.6, more), ("b", 1, 0.5, half),
             ("a", 1, 0.4, half), ("a", 1, 0.3, [1, 1, 10, 4.9])]
    assert kinds_of(found, truth) == [
        "hit", "localisation", "background", "both", "classification", "duplicate", "localisation"
    ]


def test_where_two_kinds_fit_place_goes_first_and_class_before_duplicate():
    near_a = [1, 3, 10, 12]  # IoU 80 / 120 with A
    truth = [("a", 1, A, False), ("a", 2, near_a, False)]
    loose = [1, 6, 10, 15]  # 50 / 150 with A, 70 / 130 with near_a
    assert kinds_of([("a", 1, 0.9, loose)], truth) == ["localisation"]
    assert kinds_of([("a", 1, 0.9, A), ("a", 1, 0.8, near_a)], truth) == ["hit", "classification"]


def test_only_the_best_error_of_a_target_becomes_its_hit():
    truth = [("a", 1, A, False), ("a", 1, B, False), ("a", 1, C, False)]
    found = [("a", 1, 0.9, A), ("a", 1, 0.8, B_LOOSE), ("a", 1, 0.7, B_LOOSE), ("a", 1, 0.6, C)]
    tide = gains_of(found, truth, 1)
    assert tide["ap"]["1"] == pytest.approx((1 + 2 / 4) / 3)
    assert tide["gain"]["1"]["localisation"] == pytest.approx(1 - 1.5 / 3)  # the other one is gone, not false


def test_error_on_a_found_object_is_left_out():
    truth = [("b", 1, B, False), ("b", 1, C, False)]
    found = [("b", 1, 0.9, B_LOOSE), ("b", 1, 0.8, B), ("b", 1, 0.7, C)]
    tide = gains_of(found, truth, 1)
    assert tide["ap"]["1"] == pytest.approx(2 / 3)
    assert_gains(tide, "1", localisation=1 / 3, false_positives=1 / 3)


def test_difficult_objects_are_never_missed_nor_hit():
    truth = [("a", 1, A, False), ("b", 1, B, True), ("c", 1, C, True)]
    found = [("b", 1, 0.95, B), ("b", 1, 0.9, B_LOOSE), ("c", 2, 0.85, C), ("a", 1, 0.8, A)]
    assert kinds_of(found, truth) == ["ignored", "localisation", "classification", "hit"]
    tide = gains_of(found, truth)
    assert tide["ap"]["1"] == pytest.approx(0.5)
    assert tide["counts"]["missed"] == tide["confident"]["missed"] == 0
    assert_gains(tide, "1", localisation=0.5, false_positives=0.5)
    errors = analyze.find_errors(*arrays(found, truth), 2)
    assert analyze.repaired_ap(errors, 2, ["classification"])[1] == pytest.approx(0.5)


def test_image_without_objects_has_background_only():
    truth, found = [("a", 1, A, False)], [("b", 1, 0.9, A), ("a", 1, 0.8, A)]
    assert kinds_of(found, truth, 1) == ["background", "hit"]
    assert_gains(gains_of(found, truth, 1), background=0.5, false_positives=0.5)


def test_no_detections_at_all():
    tide = gains_of([], [("a", 1, A, False)], 1)
    assert tide["ap"] == {"1": 0.0, "mean": 0.0}
    assert_gains(tide, missed=1.0, false_negatives=1.0)  # nothing to find and nothing claimed


def test_repair_of_the_missed_alone_gives_nothing_where_all_that_is_left_is_false():
    tide = gains_of([("a", 1, 0.9, FAR)], [("a", 1, A, False)], 1)
    assert_gains(tide)
    errors = analyze.find_errors(*arrays([("a", 1, 0.9, FAR)], [("a", 1, A, False)]), 1)
    assert analyze.repaired_ap(errors, 1, ["missed", "background"])[1] == 1.0


def test_class_without_objects_has_no_value_and_its_errors_count():
    truth, found = [("a", 1, A, False), ("b", 1, B, False)], [("a", 1, 0.9, A), ("b", 2, 0.8, B)]
    tide = gains_of(found, truth, 3)
    assert math.isnan(tide["ap"]["2"])
    assert math.isnan(tide["gain"]["2"]["classification"])
    assert tide["gain"]["mean"]["classification"] == pytest.approx(0.5)
    assert tide["counts"]["classification"] == 1


def test_nothing_at_all():
    tide = gains_of([], [], 1)
    assert math.isnan(tide["ap"]["mean"])
    assert tide["counts"] == dict.fromkeys(analyze.KINDS, 0)


def test_confident_counts_are_those_of_the_drawn_scores():
    truth = [("a", 1, A, False), ("a", 1, B, False)]
    found = [("a", 1, 0.9, FAR), ("a", 1, 0.39, FAR), ("a", 1, 0.39, A), ("a", 1, 0.4, B)]
    tide = gains_of(found, truth, 1)
    assert (tide["counts"]["background"], tide["confident"]["background"]) == (2, 1)
    assert (tide["counts"]["missed"], tide["confident"]["missed"]) == (0, 1)  # A is found, but not drawn


# -- Sums, and the loops

edges = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda e: (e[0], e[0] + e[1]))
boxes = st.tuples(edges, edges).map(lambda b: [b[0][0], b[1][0], b[0][1], b[1][1]])
detection = st.tuples(st.sampled_from("ab"), st.integers(1, 2), st.sampled_from([0.1, 0.5, 0.5, 0.9]), boxes)
ground_truth = st.tuples(st.sampled_from("ab"), st.integers(1, 2), boxes, st.booleans())
many, few = st.lists(detection, max_size=20), st.lists(ground_truth, max_size=8)


def slow_kind(found, truth):
    """The kind of a false detection, by plain loops."""
    image, label, _, box = found
    own = max((reference.iou(box, t[2], 1) for t in truth if t[0] == image and t[1] == label), default=0)
    other = max((reference.iou(box, t[2], 1) for t in truth if t[0] == image and t[1] != label), default=0)
    if 0.1 <= own < 0.5:
        return "localisation"
    if other >= 0.5:
        return "classification"
    if own >= 0.5:
        return "duplicate"
    return "background" if max(own, other) <= 0.1 else "both"


@settings(max_examples=200, deadline=None)
@given(many, few)
def test_kinds_agree_with_the_loops(found, truth):
    kinds = kinds_of(found, truth)
    for row, kind in enumerate(kinds):
        if kind not in ("hit", "ignored"):
            assert kind == slow_kind(found[row], truth)
    for label in (1, 2):
        ranked = sorted((i for i in range(len(found)) if found[i][1] == label), key=lambda i: -found[i][2])
        outcomes, _ = reference.voc_class(found, truth, label)
        assert [kinds[i] == "hit" for i in ranked if kinds[i] != "ignored"] == outcomes


@settings(max_examples=200, deadline=None)
@given(many, few)
def test_sums_of_the_analysis(found, truth):
    det, gt = arrays(found, truth)
    errors = analyze.find_errors(det, gt, 2)
    voc = ssd.evaluate_voc(det, gt, 2)
    base = analyze.repaired_ap(errors, 2)
    assert base == pytest.approx({k: voc[k]["ap_area"] for k in (1, 2)}, nan_ok=True)
    assert ((errors["kind"] >= 0) + errors["is_hit"] + errors["is_ignored"] == 1).all()
    # Every object that counts has a hit, or the place of an error that would be its hit, or is missed.
    place_or_class = np.isin(errors["kind"], [0, 1])
    covered = np.zeros(len(truth), dtype=bool)
    covered[errors["target"][place_or_class]] = True
    counts = ~gt["difficult"]
    states = errors["gt_found"].astype(int) + errors["gt_missed"] + (covered & ~errors["gt_found"])
    assert (states[counts] == 1).all()
    assert not errors["gt_missed"][~counts].any()
    perfect = {k: math.nan if math.isnan(base[k]) else 1.0 for k in (1, 2)}
    assert analyze.repaired_ap(errors, 2, analyze.KINDS) == pytest.approx(perfect, nan_ok=True)
    assert analyze.repaired_ap(errors, 2, analyze.SPECIAL_KINDS) == pytest.approx(perfect, nan_ok=True)
    gain = {kind: analyze.repaired_ap(errors, 2, [kind]) for kind in analyze.HEADINGS}
    for k in (k for k in (1, 2) if not math.isnan(base[k])):
        assert all(gain[kind][k] >= base[k] - 1e-12 for kind in gain)
        assert all(gain["false_positives"][k] >= gain[kind][k] - 1e-12 for kind in ("both", "duplicate", "background"))
        assert gain["false_negatives"][k] >= gain["missed"][k] - 1e-12


# -- Sizes, thresholds, calibration


def record(name, width, height, path=""):
    return ssd.Record(name, path, width, height, np.zeros((0, 4), np.float32), np.zeros(0, int), np.zeros(0, bool))


def test_sizes_by_hand():
    # Image 0 is 1000x1000: a box of 50 pixels has the relative size .05, one of 500 pixels .5. Image 1 is 100x100.
    records = [record("0", 1000, 1000), record("1", 100, 100)]
    small, large, other = [1, 1, 50, 50], [101, 101, 600, 600], [1, 1, 50, 50]
    truth = [(0, 1, small, False), (0, 1, large, False), (1, 2, other, False), (1, 2, [61, 61, 90, 90], True)]
    found = [(0, 1, 0.9, [701, 701, 750, 750]), (0, 1, 0.8, small), (1, 2, 0.7, other), (1, 2, 0.6, other),
             (0, 1, 0.95, [451, 451, 950, 950]), (1, 2, 0.95, [91, 1, 95, 5])]
    det, gt = arrays(found, truth)
    sizes = analyze.analyze_sizes(det, gt, analyze.find_errors(det, gt, 2), records, ("cat", "dog"))
    rows = {row["low"]: row for row in sizes["relative"]}
    assert [row["objects"] for row in sizes["relative"]] == [1, 0, 0, 2, 0, 0]
    # The false detections have the relative sizes .05, .5 and .05: each counts among objects of its size alone.
    assert (rows[0.0]["ap"], rows[0.0]["recall"]) == (0.5, 1)
    assert (rows[0.37]["ap"], rows[0.37]["recall"]) == (0.5, 0.5)  # cat 0, dog 1
    assert math.isnan(rows[0.1]["ap"])
    # In COCO's pixels both of 50 pixels are medium.
    assert (sizes["coco"]["cat"]["ar_medium"], sizes["coco"]["dog"]["ap_medium"]) == pytest.approx((1, 1))
    assert sizes["coco"]["cat"]["ap_medium"] == pytest.approx(0.5)
    assert sizes["coco"]["cat"]["ar_large"] == 0
    assert math.isnan(sizes["coco"]["dog"]["ap_small"])


def test_coco_sizes_of_one_class_are_the_module_s():
    rng = np.random.default_rng(3)
    low = rng.uniform(1, 300, (60, 2))
    side = np.exp(rng.uniform(np.log(8), np.log(200), (60, 1)))
    gt_boxes = np.concatenate((low, low + side), axis=1)
    truth = [(i % 5, 1, box, i % 7 == 0) for i, box in enumerate(gt_boxes.tolist())]
    found = [(t[0], 1, rng.random(), [v + d for v, d in zip(t[2], rng.normal(0, 4, 4), strict=True)]) for t in truth]
    det, gt = arrays(found, truth)
    coco = ssd.evaluate_coco(det, gt, 1)
    records = [record(str(i), 500, 500) for i in range(5)]
    sizes = analyze.analyze_sizes(det, gt, analyze.find_errors(det, gt, 1), records, ("cat",))
    assert sizes["coco"]["cat"] == pytest.approx({name: coco[name] for name in sizes["coco"]["cat"]})


def test_best_f1_by_hand():
    truth = [("a", 1, A, False), ("a", 1, B, False), ("a", 1, C, False), ("b", 1, A, False)]
    found = [("a", 1, 0.9, A), ("a", 1, 0.6, FAR), ("a", 1, 0.6, B), ("a", 1, 0.3, C), ("a", 1, 0.2, FAR)]
    row = ssd.evaluate_voc(*arrays(found, truth), 1)[1]
    scores, f1 = ssd.f1_curve(row)
    assert scores.tolist() == [0.9, 0.6, 0.3, 0.2]  # equal scores are taken or left together
    # Hits of detections: 1 of 1, 2 of 3, 3 of 4, 3 of 5; F1 is twice the hits over detections and objects.
    assert f1.tolist() == pytest.approx([2 / 5, 4 / 7, 6 / 8, 6 / 9])
    assert ssd.best_f1(row) == pytest.approx({"score_thresh": 0.3, "f1": 0.75, "precision": 0.75, "recall": 0.75})


def test_best_f1_of_nothing_is_nan():
    rows = ssd.evaluate_voc(*arrays([("a", 2, 0.5, A)], [("a", 1, A, False)]), 2)
    assert all(math.isnan(v) for k in (1, 2) for v in ssd.best_f1(rows[k]).values())
    only_false = ssd.evaluate_voc(*arrays([("a", 1, 0.5, FAR)], [("a", 1, A, False)]), 1)[1]
    assert ssd.best_f1(only_false)["f1"] == 0


def test_calibration_by_hand():
    truth = [("a", 1, A, False), ("a", 1, B, False), ("b", 1, A, True)]
    found = [("a", 1, 0.95, A), ("a", 1, 0.91, FAR), ("a", 1, 0.2, B), ("a", 1, 0.29, FAR), ("b", 1, 0.5, A)]
    result = analyze.calibrate(analyze.find_errors(*arrays(found, truth), 1))
    bins = result["bins"]
    assert [b["count"] for b in bins] == [0, 0, 2, 0, 0, 0, 0, 0, 0, 2]  # the ignored one is left out
    assert (bins[9]["score"], bins[9]["precision"]) == pytest.approx((0.93, 0.5))
    assert math.isnan(bins[0]["score"])
    assert result["ece"] == pytest.approx((2 * 0.43 + 2 * (0.5 - 0.245)) / 4)
    assert result["ece_confident"] == pytest.approx(0.43)
    assert math.isnan(analyze.calibrate(analyze.find_errors(*arrays([], truth), 1))["ece"])


# -- Mistakes


@pytest.fixture
def picture(tmp_path):
    """A record of a 200x100 picture: black, a white square from (50, 30) to (70, 50)."""
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[30:50, 50:70] = 255
    Image.fromarray(pixels).save(tmp_path / "p.png")
    return record("p", 200, 100, str(tmp_path / "p.png"))


@pytest.mark.parametrize(("box", "expected"), [([50, 30, 70, 50], (36, 16)), ([50, 0, 70, 20], (36, 0)),
                                              ([190, 90, 200, 100], (152, 52)), ([0, 0, 200, 100], (0, -50))])
def test_crop_keeps_the_box_in_sight(picture, box, expected):
    image, scale, corner = analyze.crop(picture, [box], side=240)
    assert image.size == (240, 240)
    assert tuple(corner.tolist()) == expected  # in the middle, moved where it would reach beyond the picture
    assert scale == pytest.approx(240 / (200 if box[2] - box[0] == 200 else 48))  # never more than the picture
    ys, xs = np.nonzero(np.asarray(image)[..., 0] > 127)
    if len(xs):  # the white square is where its coordinates are shown
        shown = (np.array([50, 30, 70, 50]) - np.tile(corner, 2)) * scale
        np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], shown.clip(0, 240), atol=2)


def test_mistakes_are_the_surest_false_ones_and_at_most_two_of_an_image():
    truth = [(0, 1, A, False), (1, 1, A, False)]
    found = [(0, 1, 0.99, A), (0, 1, 0.9, FAR), (0, 1, 0.8, B), (0, 1, 0.7, C), (1, 1, 0.6, FAR), (1, 1, 0.5, B)]
    errors = analyze.find_errors(*arrays(found, truth), 1)
    assert errors["order"][analyze.pick_mistakes(errors, 3)].tolist() == [1, 2, 4]


def test_misses_are_the_largest_objects_that_are_not_drawn():
    records = [record("0", 100, 100), record("1", 1000, 1000)]
    truth = [(0, 1, [1, 1, 20, 20], False), (1, 1, [1, 1, 90, 90], False), (0, 1, [41, 41, 99, 99], True),
             (0, 1, [50, 1, 59, 10], False), (0, 1, [1, 50, 40, 90], False)]
    found = [(0, 1, 0.9, [1, 50, 40, 90]), (0, 1, 0.3, [1, 1, 20, 20])]
    det, gt = arrays(found, truth)
    errors = analyze.find_errors(det, gt, 1)
    # 400 of 10,000 pixels; 100 of 10,000; 8,100 of 1,000,000. One is difficult, one is found.
    assert analyze.pick_misses(errors, records, gt, 9) == [0, 3, 1]
    assert analyze.pick_misses(errors, records, gt, 2) == [0, 3]
    assert analyze.surest_near(errors, det, gt, 0) == (1, 1.0)
    assert analyze.surest_near(errors, det, gt, 1) == (None, 0.0)


def test_hit_of_another_object_stands_beside_a_miss_only_if_it_covers_it():
    truth = [(0, 1, A, False), (0, 1, A, False), (0, 1, [1, 6, 10, 15], False)]  # A is annotated twice
    det, gt = arrays([(0, 1, 0.9, A), (0, 1, 0.1, [1, 9, 10, 18])], truth)
    errors = analyze.find_errors(det, gt, 1)
    assert analyze.surest_near(errors, det, gt, 1) == (0, 1.0)
    assert analyze.surest_near(errors, det, gt, 2) == (1, 70 / 130)


def test_sheet_says_what_each_mistake_is(picture):
    square, records = [51, 31, 70, 50], [picture] * 4
    truth = [(0, 1, square, False), (1, 2, square, False), (2, 1, square, False), (3, 1, square, False)]
    loose = [51, 41, 70, 60]  # 200 of 600 pixels
    found = [(0, 1, 0.95, square), (0, 1, 0.9, square), (1, 1, 0.8, square), (2, 1, 0.7, loose), (1, 1, 0.6, loose),
             (2, 2, 0.5, [151, 61, 190, 99])]
    det, gt = arrays(found, truth)
    errors = analyze.find_errors(det, gt, 2)
    figure = analyze.plot_mistakes(errors, det, gt, records, ("cat", "dog"))
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [
        "said cat 0.90\nfound already, IoU 1.00\np",
        "said cat 0.80\nwrong class: dog, IoU 1.00\np",
        "said cat 0.70\nloose: IoU 0.33\np",
        "said cat 0.60\nwrong class and loose: dog, IoU 0.33\np",
        "said dog 0.50\nnothing there\np",
        "missed dog\nnear it cat 0.80, IoU 1.00\np",
        "missed cat\nnear it cat 0.70, IoU 0.33\np",
        "missed cat\nnothing near it\np",
    ]


def test_nothing_to_find_and_nothing_found_is_drawn(picture):
    found, truth = {**arrays([], [])[0], "image_ids": np.zeros(0, int)}, ssd.truth_of([picture])
    result = {"detections": found, "classes": ssd.evaluate_voc(found, truth, 1)}
    numbers, errors = analyze.analyze(result, [picture], ("cat",))
    assert math.isnan(numbers["tide"]["gain"]["mean"]["missed"])
    assert next(s for s in analyze.tables(numbers).splitlines() if s.startswith("cat")).split()[1:] == ["-"] * 9
    figure = analyze.plot_mistakes(errors, found, truth, [picture], ("cat",))
    assert figure.get_suptitle().startswith("0 false detections")
    for draw in (
        lambda: analyze.plot_errors(numbers["tide"]), lambda: analyze.plot_sizes(numbers["sizes"]),
        lambda: analyze.plot_f1(result, numbers["best_f1"], ("cat",)),
        lambda: analyze.plot_calibration(numbers["calibration"]),
    ):
        draw().draw_without_rendering()


# -- The command


def test_command_writes_what_evaluate_writes_and_the_analysis(tiny_run, tmp_path, capsys):
    flags = ["--device", "cpu", "--amp", "off", "--workers", "0", "--score-thresh", ".001", "--output-dir"]
    assert analyze.main([str(tiny_run.final), *flags, str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert ssd.main(["--evaluate", str(tiny_run.final), *flags, str(tmp_path / "b")]) == 0
    mine, theirs = (json.loads((tmp_path / f / "plots/evaluation/evaluation.json").read_text()) for f in "ab")
    analysis = mine.pop("analysis")
    assert mine == theirs
    assert set(analysis) == {"tide", "sizes", "best_f1", "calibration"}
    assert analysis["tide"]["ap"]["mean"] == pytest.approx(mine["voc"]["map_area"])
    assert set(analysis["tide"]["gain"]) == {"angular", "round", "mean"}
    counts = analysis["tide"]["counts"]
    assert 0 < sum(counts[kind] for kind in analyze.KINDS[:5]) <= mine["num_detections"]
    assert sum(b["count"] for b in analysis["calibration"]["bins"]) == mine["num_detections"]  # none is difficult
    names = ("errors", "sizes", "f1", "calibration", "precision_recall", "confusion")
    paths = [tmp_path / "a/plots/evaluation" / f"{name}.png" for name in names] + [tmp_path / "a/plots/mistakes.png"]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert "AP@.5 (area) gained" in out
    assert "Expected calibration error" in out


def test_command_s_errors_are_one_line(tiny_run, make_voc, tmp_path, capsys):
    (tmp_path / "no.pth").write_text("no checkpoint")
    other = make_voc(tmp_path / "other")
    for path in (other / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("angular", "edgy"))
    for argv, message in (
        ([tmp_path / "no.pth"], "not readable as a checkpoint"),
        ([tmp_path / "none.pth"], "no such file"),
        ([tiny_run.final, "--data", other], "knows the classes angular, round"),
        ([tiny_run.final, "--test-split", "nowhere"], "no image list"),
        ([tiny_run.final, "--device", "nowhere"], "--device nowhere"),
    ):
        assert analyze.main([str(a) for a in [*argv, "--output-dir", tmp_path / "out"]]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert message in lines[0]
