"""The error analysis: every kind by hand, TIDE's sums as properties, the command on a tiny trained model."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import reference
from analyzing import FAR, A, B, C, arrays, record
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ssd_object_detection as ssd
from ssd_tools import analyze

B_LOOSE = [21, 26, 30, 35]  # shares 50 of 150 pixels with B


def kinds_of(detections, truth, num_classes=2):
    """The kind of each detection as given: a name of KINDS, "hit" or "ignored"."""
    det, gt = arrays(detections, truth)
    found, _ = analyze.find_errors(det, gt, num_classes)
    names = [None] * len(detections)
    for place, row in enumerate(np.argsort(-det["scores"], kind="stable").tolist()):
        names[row] = str(found["kind"][place]) or ("hit" if found["is_hit"][place] else "ignored")
    return names


def gains_of(detections, truth, num_classes=2):
    found, objects = analyze.find_errors(*arrays(detections, truth), num_classes)
    return analyze.analyze_errors(found, objects, [str(k) for k in range(1, num_classes + 1)])


def assert_gains(tide, name="mean", **expected):
    """Demand the gains named, 0 for every other kind."""
    assert tide["gain"][name] == pytest.approx(dict.fromkeys(analyze.HEADINGS, 0.0) | expected)


# -- Each kind by hand


def test_localisation_error():
    truth, found = [(0, 1, A, False), (1, 1, B, False)], [(0, 1, 0.9, A), (1, 1, 0.8, B_LOOSE)]
    assert kinds_of(found, truth, 1) == ["hit", "localisation"]
    tide = gains_of(found, truth, 1)
    assert tide["ap"]["mean"] == pytest.approx(0.5)
    # Moved onto B it is the second hit. B is not missed: something found its place.
    assert_gains(tide, localisation=0.5, false_negatives=0.5)
    assert (tide["counts"]["localisation"], tide["counts"]["missed"]) == (1, 0)


def test_classification_error_costs_both_classes():
    truth = [(0, 1, A, False), (1, 1, B, False), (2, 2, C, False)]
    found = [(0, 1, 0.9, A), (1, 2, 0.8, B), (2, 2, 0.7, C)]
    assert kinds_of(found, truth) == ["hit", "classification", "hit"]
    tide = gains_of(found, truth)
    assert tide["ap"] == pytest.approx({"1": 0.5, "2": 0.5, "mean": 0.5})
    assert_gains(tide, "1", classification=0.5, false_negatives=0.5)
    assert_gains(tide, "2", classification=0.5, false_positives=0.5)
    assert_gains(tide, classification=0.5, false_positives=0.25, false_negatives=0.25)


@pytest.mark.parametrize(
    ("kind", "error"),
    [("duplicate", (0, 1, 0.8, A)), ("background", (0, 1, 0.8, FAR)), ("both", (1, 1, 0.8, B_LOOSE))],
)
def test_error_that_is_repaired_by_leaving_it_out(kind, error):
    truth = [(0, 1, A, False), (0, 1, C, False), (1, 2, B, False)]
    found = [(0, 1, 0.9, A), error, (0, 1, 0.7, C), (1, 2, 0.9, B)]
    assert kinds_of(found, truth) == ["hit", kind, "hit", "hit"]
    tide = gains_of(found, truth)
    # Hit, error, hit over two objects: precision 1 and 2/3.
    assert tide["ap"]["1"] == pytest.approx((1 + 2 / 3) / 2)
    assert_gains(tide, "1", **{kind: 1 / 6, "false_positives": 1 / 6})


def test_missed_object():
    truth, found = [(0, 1, A, False), (0, 1, B, False)], [(0, 1, 0.9, A)]
    tide = gains_of(found, truth, 1)
    assert_gains(tide, missed=0.5, false_negatives=0.5)
    assert tide["counts"] == {**dict.fromkeys(analyze.KINDS, 0), "missed": 1}


def test_thresholds_of_overlap():
    truth = [(0, 1, A, False), (1, 2, A, False)]
    tenth, more, half = [1, 1, 10, 1], [1, 1, 10, 1.1], [1, 1, 10, 5]  # of A's 100 pixels: 10, 11, 50
    found = [
        (0, 1, 0.9, A),
        (0, 1, 0.8, tenth),
        (1, 1, 0.7, tenth),
        (1, 1, 0.6, more),
        (1, 1, 0.5, half),
        (0, 1, 0.4, half),
        (0, 1, 0.3, [1, 1, 10, 4.9]),
    ]
    assert kinds_of(found, truth) == [
        "hit",
        "localisation",
        "background",
        "both",
        "classification",
        "duplicate",
        "localisation",
    ]


def test_where_two_kinds_fit_place_goes_first_and_class_before_duplicate():
    near_a = [1, 3, 10, 12]  # IoU 80 / 120 with A
    truth = [(0, 1, A, False), (0, 2, near_a, False)]
    loose = [1, 6, 10, 15]  # 50 / 150 with A, 70 / 130 with near_a
    assert kinds_of([(0, 1, 0.9, loose)], truth) == ["localisation"]
    assert kinds_of([(0, 1, 0.9, A), (0, 1, 0.8, near_a)], truth) == ["hit", "classification"]


def test_only_the_best_error_of_a_target_becomes_its_hit():
    truth = [(0, 1, A, False), (0, 1, B, False), (0, 1, C, False)]
    found = [(0, 1, 0.9, A), (0, 1, 0.8, B_LOOSE), (0, 1, 0.7, B_LOOSE), (0, 1, 0.6, C)]
    tide = gains_of(found, truth, 1)
    assert tide["ap"]["1"] == pytest.approx((1 + 2 / 4) / 3)
    assert tide["gain"]["1"]["localisation"] == pytest.approx(1 - 1.5 / 3)  # the other one is gone, not false


def test_error_on_a_found_object_is_left_out():
    truth = [(1, 1, B, False), (1, 1, C, False)]
    found = [(1, 1, 0.9, B_LOOSE), (1, 1, 0.8, B), (1, 1, 0.7, C)]
    tide = gains_of(found, truth, 1)
    assert tide["ap"]["1"] == pytest.approx(2 / 3)
    assert_gains(tide, "1", localisation=1 / 3, false_positives=1 / 3)


def test_difficult_objects_are_never_missed_nor_hit():
    truth = [(0, 1, A, False), (1, 1, B, True), (2, 1, C, True)]
    found = [(1, 1, 0.95, B), (1, 1, 0.9, B_LOOSE), (2, 2, 0.85, C), (0, 1, 0.8, A)]
    assert kinds_of(found, truth) == ["ignored", "localisation", "classification", "hit"]
    tide = gains_of(found, truth)
    assert tide["ap"]["1"] == pytest.approx(0.5)
    assert tide["counts"]["missed"] == tide["confident"]["missed"] == 0
    assert_gains(tide, "1", localisation=0.5, false_positives=0.5)
    errors = analyze.find_errors(*arrays(found, truth), 2)
    assert analyze.repaired_ap(*errors, 2, ["classification"])[1] == pytest.approx(0.5)


def test_image_without_objects_has_background_only():
    truth, found = [(0, 1, A, False)], [(1, 1, 0.9, A), (0, 1, 0.8, A)]
    assert kinds_of(found, truth, 1) == ["background", "hit"]
    assert_gains(gains_of(found, truth, 1), background=0.5, false_positives=0.5)


def test_no_detections_at_all():
    tide = gains_of([], [(0, 1, A, False)], 1)
    assert tide["ap"] == {"1": 0.0, "mean": 0.0}
    assert_gains(tide, missed=1.0, false_negatives=1.0)  # nothing to find and nothing claimed


def test_repair_of_the_missed_alone_gives_nothing_where_all_that_is_left_is_false():
    assert_gains(gains_of([(0, 1, 0.9, FAR)], [(0, 1, A, False)], 1))
    errors = analyze.find_errors(*arrays([(0, 1, 0.9, FAR)], [(0, 1, A, False)]), 1)
    assert analyze.repaired_ap(*errors, 1, ["missed", "background"])[1] == 1.0


def test_class_without_objects_has_no_value_and_its_errors_count():
    truth, found = [(0, 1, A, False), (1, 1, B, False)], [(0, 1, 0.9, A), (1, 2, 0.8, B)]
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
    truth = [(0, 1, A, False), (0, 1, B, False)]
    found = [(0, 1, 0.9, FAR), (0, 1, 0.39, FAR), (0, 1, 0.39, A), (0, 1, 0.4, B)]
    tide = gains_of(found, truth, 1)
    assert (tide["counts"]["background"], tide["confident"]["background"]) == (2, 1)
    assert (tide["counts"]["missed"], tide["confident"]["missed"]) == (0, 1)  # A is found, but not drawn


# -- Sums, and the loops

edges = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda e: (e[0], e[0] + e[1]))
boxes = st.tuples(edges, edges).map(lambda b: [b[0][0], b[1][0], b[0][1], b[1][1]])
detection = st.tuples(st.integers(0, 1), st.integers(1, 2), st.sampled_from([0.1, 0.5, 0.5, 0.9]), boxes)
ground_truth = st.tuples(st.integers(0, 1), st.integers(1, 2), boxes, st.booleans())
many, few = st.lists(detection, max_size=20), st.lists(ground_truth, max_size=8)


def slow_kind(found, truth):
    """The kind of a false detection, by plain loops."""
    image, label, _, box = found
    there = [t for t in truth if t[0] == image]
    own = max((reference.iou(box, t[2], 1) for t in there if t[1] == label), default=0)
    other = max((reference.iou(box, t[2], 1) for t in there if t[1] != label), default=0)
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
def test_sums_of_the_analysis(detections, truth):
    det, gt = arrays(detections, truth)
    found, objects = analyze.find_errors(det, gt, 2)
    voc = ssd.evaluate_voc(det, gt, 2)
    base = analyze.repaired_ap(found, objects, 2)
    assert base == pytest.approx({k: voc[k]["ap_area"] for k in (1, 2)}, nan_ok=True)
    assert ((found["kind"] != "").astype(int) + found["is_hit"] + found["is_ignored"] == 1).all()
    # Every object that counts has a hit, or the place of an error that would be its hit, or is missed.
    covered = np.zeros(len(truth), dtype=bool)
    covered[found["target"][np.isin(found["kind"], ("classification", "localisation"))]] = True
    counts = ~gt["difficult"]
    states = objects["is_found"].astype(int) + objects["is_missed"] + (covered & ~objects["is_found"])
    assert (states[counts] == 1).all()
    assert not objects["is_missed"][~counts].any()
    perfect = {k: math.nan if math.isnan(base[k]) else 1.0 for k in (1, 2)}
    for kinds in (analyze.KINDS, ("false_positives", "false_negatives")):
        assert analyze.repaired_ap(found, objects, 2, kinds) == pytest.approx(perfect, nan_ok=True)
    gain = {kind: analyze.repaired_ap(found, objects, 2, [kind]) for kind in analyze.HEADINGS}
    for k in (k for k in (1, 2) if not math.isnan(base[k])):
        assert all(gain[kind][k] >= base[k] - 1e-12 for kind in gain)
        for kind in ("both", "duplicate", "background"):
            assert gain["false_positives"][k] >= gain[kind][k] - 1e-12
        assert gain["false_negatives"][k] >= gain["missed"][k] - 1e-12


# -- Other lists


def ranges_of(detections, truth, num_images, num_classes=2):
    found, objects = analyze.find_errors(*arrays(detections, truth), num_classes)
    names = [str(k) for k in range(1, num_classes + 1)]
    ranges, maps = analyze.draw_lists(found, objects, names, num_images)
    assert len(maps) == analyze.NUM_LISTS
    assert np.percentile(maps, (2.5, 97.5)) == pytest.approx(ranges["mean"], abs=1e-5, nan_ok=True)
    return ranges


@settings(max_examples=100, deadline=None)
@given(many, few)
def test_range_of_one_list_is_the_ap_of_its_images_as_often_as_drawn(detections, truth):
    detections = [(i, k, (n + 1) / 30, box) for n, (i, k, _, box) in enumerate(detections)]  # no two alike
    drawn = np.random.default_rng(0).integers(2, size=2)
    copies = (
        [(n, *row[1:]) for n, i in enumerate(drawn) for row in rows if row[0] == i]
        for rows in (detections, truth)
    )
    aps = [row["ap_area"] for row in ssd.evaluate_voc(*arrays(*copies), 2).values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze, "NUM_LISTS", 1)
        ranges = ranges_of(detections, truth, 2)
    expected = dict(zip(("1", "2", "mean"), [*aps, analyze.mean(aps)], strict=True))
    for name, ap in expected.items():
        assert ranges[name] == pytest.approx([ap, ap], nan_ok=True)


def test_range_is_as_wide_as_chance_makes_it():
    truth = [(image, 1, A, False) for image in range(100)]
    found = [(image, 1, 0.9 - image / 1000, A) for image in range(80)]  # an AP of .8, spread .04
    ranges = ranges_of(found, truth, 100, 2)
    assert ranges["1"] == pytest.approx([0.72, 0.88], abs=0.015)
    assert ranges["mean"] == ranges["1"] == ranges_of(found, truth, 100, 2)["1"]
    assert all(map(math.isnan, ranges["2"]))
    assert ranges_of(found[:40], truth[:40], 100, 1)["mean"] == pytest.approx([1, 1])


# -- Confusion


def confusion_of(detections, truth, num_classes=2):
    errors = analyze.find_errors(*arrays(detections, truth), num_classes)
    return analyze.confusion_matrix(*errors, num_classes)


def test_confusion_of_a_hand_case():
    truth = [(0, 1, A, False), (0, 2, B, False), (0, 2, C, True), (1, 1, A, False)]
    found = [
        (0, 1, 0.9, A),  # right
        (0, 1, 0.85, A),  # a second one on it: another error
        (0, 2, 0.8, A),  # wrong class, on an object that has its hit
        (0, 1, 0.7, B),  # wrong class
        (0, 2, 0.6, C),  # on a difficult object of its class: nowhere
        (0, 2, 0.5, FAR),  # nothing there
        (0, 2, 0.45, B_LOOSE),  # loose
        (1, 1, 0.39, A),  # below the threshold: missed
    ]
    assert confusion_of(found, truth).tolist() == [[0, 1, 2], [1, 1, 1], [1, 1, 0]]


def test_confusion_of_nothing_is_zero():
    assert confusion_of([], []).tolist() == [[0] * 3] * 3
    assert confusion_of([(0, 1, 0.9, A)], []).tolist() == [[0, 1, 0], [0] * 3, [0] * 3]


@settings(max_examples=100, deadline=None)
@given(many, few)
def test_confusion_agrees_with_the_kinds_of_error(detections, truth):
    found, objects = analyze.find_errors(*arrays(detections, truth), 2)
    matrix = analyze.confusion_matrix(found, objects, 2)
    real = objects["labels"][~objects["difficult"]]
    hits_and_missed = (matrix.diagonal() + matrix[:, 0])[1:]
    assert hits_and_missed.tolist() == np.bincount(real, minlength=3)[1:].tolist()
    counted = (found["scores"] >= 0.4) & ~found["is_ignored"]
    said = np.bincount(found["labels"][counted], minlength=3)
    assert matrix[:, 1:].sum(axis=0).tolist() == said[1:].tolist()
    confused = matrix[1:, 1:].sum() - matrix.diagonal().sum()
    assert confused == analyze.analyze_errors(found, objects, ["1", "2"])["confident"]["classification"]


def test_confusion_plot_writes_every_count_in_its_cell_and_names_both_axes():
    matrix = np.array([[0, 7, 0], [2, 30, 1], [0, 0, 0]])  # a class without objects has a row of zeros
    axes = analyze.plot_confusion(matrix, ["cat", "dog"]).axes[0]
    cells = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert cells == {(0, 1): "7", (1, 0): "2", (1, 1): "30", (1, 2): "1"}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["other errors", "cat", "dog"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["missed", "cat", "dog"]
    assert axes.images[0].get_array()[1].tolist() == pytest.approx([2 / 32, 30 / 32, 1 / 32])
    assert "IoU .5 or more" in axes.get_title()
    assert "most errors" not in axes.get_title()


def test_confusion_plot_of_many_classes_shows_the_worst_ones():
    names = [f"class {k}" for k in range(1, 101)]
    matrix = np.diag(np.full(101, 9))
    matrix[range(1, 101, 3), 0] = 4  # every third class: four objects missed
    matrix[0, 100] = 5  # and false detections of the last one
    matrix[2, 3] = 3  # a second one taken for a third
    figure = analyze.plot_confusion(matrix, names)
    axes = figure.axes[0]
    shown = [t.get_text() for t in axes.get_yticklabels()][1:]
    assert len(shown) == 40
    assert {f"class {k}" for k in (*range(1, 101, 3), 2, 3)} <= set(shown)
    assert shown == sorted(shown, key=names.index)
    assert "the 40 classes with the most errors of 100" in axes.get_title()
    assert max(figure.get_size_inches()) < 26
    row, column = shown.index("class 2") + 1, shown.index("class 3") + 1
    assert axes.images[0].get_array()[row, column] == pytest.approx(3 / 9)


# -- Sizes, thresholds, calibration


def test_sizes_by_hand():
    # Image 0 is 1000x1000: a box of 50 pixels has the relative size .05, one of 500 .5. Image 1 is 100x100.
    records = [record("0", 1000, 1000), record("1", 100, 100)]
    small, large, other = [1, 1, 50, 50], [101, 101, 600, 600], [1, 1, 50, 50]
    truth = [(0, 1, small, False), (0, 1, large, False), (1, 2, other, False), (1, 2, [61, 61, 90, 90], True)]
    found = [
        (0, 1, 0.9, [701, 701, 750, 750]),
        (0, 1, 0.8, small),
        (1, 2, 0.7, other),
        (1, 2, 0.6, other),
        (0, 1, 0.95, [451, 451, 950, 950]),
        (1, 2, 0.95, [91, 1, 95, 5]),
    ]
    det, gt = arrays(found, truth)
    ranges = analyze.analyze_sizes(analyze.find_errors(det, gt, 2)[0], gt, records, 2)
    rows = {row["low"]: row for row in ranges}
    assert [row["objects"] for row in ranges] == [1, 0, 0, 2, 0, 0]
    # The false detections have the relative sizes .05, .5, .05: each counts among objects of its size alone.
    assert (rows[0.0]["ap"], rows[0.0]["recall"]) == (0.5, 1)
    assert (rows[0.37]["ap"], rows[0.37]["recall"]) == (0.5, 0.5)  # cat 0, dog 1
    assert math.isnan(rows[0.1]["ap"])


def test_hit_counts_where_its_object_does():
    # An object of .2 of the picture's side, found by a box of .19.
    det, gt = arrays([(0, 1, 0.9, [1, 1, 18, 20])], [(0, 1, [1, 1, 20, 20], False)])
    ranges = analyze.analyze_sizes(analyze.find_errors(det, gt, 1)[0], gt, [record("0", 100, 100)], 1)
    rows = {row["low"]: row for row in ranges}
    assert (rows[0.2]["objects"], rows[0.2]["recall"], rows[0.2]["ap"]) == (1, 1, 1)
    assert rows[0.1]["objects"] == 0


def test_best_f1_by_hand():
    truth = [(0, 1, A, False), (0, 1, B, False), (0, 1, C, False), (1, 1, A, False)]
    found = [(0, 1, 0.9, A), (0, 1, 0.6, FAR), (0, 1, 0.6, B), (0, 1, 0.3, C), (0, 1, 0.2, FAR)]
    row = ssd.evaluate_voc(*arrays(found, truth), 1)[1]
    # Hits of detections: 1 of 1, 2 of 3, 3 of 4, 3 of 5; F1 is twice the hits over detections and objects.
    best = {"score_thresh": 0.3, "f1": 6 / 8, "precision": 0.75, "recall": 0.75}
    assert analyze.best_f1(row) == pytest.approx(best)
    assert ssd.best_thresholds({1: row}, ["cat"]) == {"cat": 0.3}


def test_best_f1_of_nothing_is_nan():
    rows = ssd.evaluate_voc(*arrays([(0, 2, 0.5, A)], [(0, 1, A, False)]), 2)
    assert all(math.isnan(v) for k in (1, 2) for v in analyze.best_f1(rows[k]).values())
    only_false = ssd.evaluate_voc(*arrays([(0, 1, 0.5, FAR)], [(0, 1, A, False)]), 1)[1]
    assert analyze.best_f1(only_false)["f1"] == 0


def test_calibration_by_hand():
    truth = [(0, 1, A, False), (0, 1, B, False), (1, 1, A, True)]
    found = [
        (0, 1, 0.95, A),
        (0, 1, 0.91, FAR),
        (0, 1, 0.2, B),
        (0, 1, 0.29, FAR),
        (1, 1, 0.5, A),
        (0, 1, 0.42, FAR),
    ]
    result = analyze.calibrate(analyze.find_errors(*arrays(found, truth), 1)[0])
    bins = result["bins"]
    assert [b["count"] for b in bins] == [0, 0, 2, 0, 1, 0, 0, 0, 0, 2]  # the ignored one is left out
    assert (bins[9]["score"], bins[9]["precision"]) == pytest.approx((0.93, 0.5))
    assert math.isnan(bins[0]["score"])
    assert result["ece"] == pytest.approx((2 * 0.43 + 0.42 + 2 * (0.5 - 0.245)) / 5)
    assert result["ece_confident"] == pytest.approx((2 * 0.43 + 0.42) / 3)
    assert math.isnan(analyze.calibrate(analyze.find_errors(*arrays([], truth), 1)[0])["ece"])


# -- Curves


def evaluation(curves):
    """Return what `ssd.measure` does of one (recall, precision, AP, objects) a class."""
    classes = {}
    for label, (recall, precision, ap, num_gt) in enumerate(curves, start=1):
        classes[label] = {
            "recall": np.array(recall),
            "precision": np.array(precision),
            "ap_area": ap,
            "scores": np.linspace(0.9, 0.1, len(recall)),
            "num_gt": num_gt,
        }
    return {"map_area": analyze.mean(row["ap_area"] for row in classes.values()), "classes": classes}


def test_precision_recall_has_a_curve_for_each_class_with_objects_best_first():
    curves = [
        ([0.5], [1.0], 0.5, 2),
        ([], [], math.nan, 0),
        ([0.5, 1.0], [1.0, 1.0], 1.0, 2),
        ([], [], 0.0, 3),
    ]
    figure = analyze.plot_precision_recall(evaluation(curves), ["a", "b", "c", "d"])
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["c 1.000", "a 0.500", "d 0.000"]
    assert [list(values) for values in lines[0].get_data()] == [[0.5, 1.0], [1.0, 1.0]]
    assert "0.500" in figure.axes[0].get_title()
    assert [line.get_color() for line in lines] == [ssd.color_of(k) for k in (3, 1, 4)]
    assert figure.axes[0].get_ylim()[1] > 1.03  # a curve at 1 is seen
    assert len(figure.legends[0].get_texts()) == 3


def test_f1_has_a_curve_and_a_mark_for_each_class_that_has_one():
    result = evaluation([([0.5], [1.0], 0.5, 2), ([], [], math.nan, 0), ([0.5, 1.0], [1.0, 1.0], 1.0, 2)])
    names = ["a", "b", "c"]
    best = {name: analyze.best_f1(result["classes"][k]) for k, name in enumerate(names, start=1)}
    lines = analyze.plot_f1(result, best, names).axes[0].lines
    assert [line.get_label() for line in lines[:2]] == ["c 1.000 at 0.100", "a 0.667 at 0.900"]
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines[2:4]]
    np.testing.assert_allclose(marks, [(0.1, 1.0), (0.9, 2 / 3)])


def test_curves_of_no_class_and_of_many_classes_are_drawn():
    names = [f"class {k}" for k in range(80)]
    for curves, count in (([([], [], math.nan, 0)], 0), ([([0.5], [1.0], 0.5, 2)] * 80, 80)):
        figure = analyze.plot_precision_recall(evaluation(curves), names[: len(curves)])
        lines = figure.axes[0].lines
        assert len(lines) == count
        looks = {(line.get_color(), line.get_linestyle()) for line in lines[:40]}
        assert len(looks) == min(count, 40)  # neither colour nor style is the only difference of neighbours
        assert len({line.get_linestyle() for line in lines[:4]}) == min(count, 4)
        figure.draw_without_rendering()


def test_nothing_to_find_and_nothing_found_is_drawn():
    records = [record("0", 200, 100)]
    found, truth = arrays([], [])[0], ssd.truth_of(records)
    classes = ssd.evaluate_voc(found, truth, 1)
    result = {"detections": found, "classes": classes, "map_area": math.nan}
    numbers = analyze.analyze(result, records, ("cat",))
    analysis = numbers["analysis"]
    assert math.isnan(analysis["tide"]["gain"]["mean"]["missed"])
    assert "a mAP@.5 of - to -." in analyze.tables(numbers)
    rows = [line.split() for line in analyze.tables(numbers).splitlines() if line.startswith("cat")]
    assert rows == [["cat", *"-" * 9], ["cat", *"-" * 12], ["cat", *"-" * 4]]
    for drawn in (
        analyze.plot_errors(analysis["tide"]),
        analyze.plot_f1(result, analysis["best_f1"], ("cat",)),
        analyze.plot_sizes(numbers["coco"]["per_class"], analysis["sizes"]),
        analyze.plot_calibration(analysis["calibration"]),
        analyze.plot_precision_recall(result, ("cat",)),
        analyze.plot_confusion(np.array(numbers["confusion"]["matrix"]), ("cat",)),
    ):
        drawn.draw_without_rendering()


# -- The command


@pytest.fixture(scope="module")
def analyzed(tiny_run, tmp_path_factory):
    """The output folder of the command on the tiny run, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("analyzed"), io.StringIO()
    flags = ["--device", "cpu", "--amp", "off", "--workers", "0", "--score-thresh", ".001"]
    flags = [str(tiny_run.final), *flags]
    with contextlib.redirect_stdout(printed):
        assert analyze.main([*flags, "--output-dir", str(folder / "a")]) == 0
    assert ssd.main(["--evaluate", *flags, "--output-dir", str(folder / "b")]) == 0
    return folder, printed.getvalue()


def test_command_adds_to_what_evaluate_writes(analyzed):
    folder, _ = analyzed
    paths = [folder / name / "plots" / "evaluation" / "evaluation.json" for name in "ab"]
    mine, theirs = (json.loads(path.read_text()) for path in paths)
    coco, confusion, analysis = (mine.pop(name) for name in ("coco", "confusion", "analysis"))
    assert mine == theirs
    assert set(coco["per_class"]) == {"angular", "round"}
    assert confusion["classes"] == ["background", "angular", "round"]
    num_gt = [mine["per_class"][name]["num_gt"] for name in ("angular", "round")]
    assert np.array(confusion["matrix"])[1:].sum(axis=1).tolist() == num_gt
    assert set(analysis) == {"tide", "sizes", "best_f1", "calibration", "ap_ranges", "drawn_maps"}
    low, high = analysis["ap_ranges"]["mean"]
    assert 0 <= low < mine["map_area"] < high <= 1
    assert analysis["tide"]["ap"]["mean"] == pytest.approx(mine["map_area"])
    assert set(analysis["tide"]["gain"]) == {"angular", "round", "mean"}
    counts = analysis["tide"]["counts"]
    num_detections = sum(row["count"] for row in analysis["calibration"]["bins"])  # no object is difficult
    assert 0 < sum(counts[kind] for kind in analyze.KINDS[:5]) <= num_detections


def test_command_draws_its_pictures_and_prints_its_tables(analyzed):
    folder, printed = analyzed
    names = ("errors", "sizes", "f1", "calibration", "precision_recall", "confusion")
    plots = folder / "a" / "plots"
    for path in [plots / "evaluation" / f"{name}.png" for name in names]:
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    for text in (
        "AP@.5 (area) gained",
        "Of 500 lists drawn at random",
        "COCO's AP and AR",
        "best F1",
        "Expected calibration error",
        str(plots),
    ):
        assert text in printed


def test_command_s_errors_are_one_line(tiny_run, make_voc, tmp_path, capsys):
    (tmp_path / "no.pth").write_text("no checkpoint")
    other = make_voc(tmp_path / "other")
    for path in (other / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("angular", "edgy").replace("round", "smooth"))
    for argv, message in (
        ([tmp_path / "no.pth"], "not readable as a checkpoint"),
        ([tmp_path / "none.pth"], "no such file"),
        ([tiny_run.final, "--data", other], "nothing of angular, round (see --data, --test-split)"),
        ([tiny_run.final, "--test-split", "nowhere"], "no image list"),
        ([tiny_run.final, "--device", "nowhere"], "--device nowhere"),
    ):
        assert analyze.main([str(a) for a in [*argv, "--output-dir", tmp_path / "out"]]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert message in lines[0]
