"""Evaluation: VOC average precision, thresholds, the whole way from a loader to a table."""

import dataclasses
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import ssd_object_detection as ssd

ANCHORS = ssd.make_anchors()
A_BOX, B_BOX, C_BOX, FAR = [1, 1, 10, 10], [21, 21, 30, 30], [41, 41, 50, 50], [81, 81, 90, 90]


def detections_of(rows):
    """Return (image_id, label, score, box) rows in the form that evaluate_voc takes."""
    image_ids, labels, scores, boxes_px = zip(*rows, strict=True) if rows else ((), (), (), ())
    return {
        "image_ids": np.array(image_ids, int),
        "labels": np.array(labels, int),
        "scores": np.array(scores, float),
        "boxes_voc": np.array(boxes_px, float).reshape(-1, 4),
    }


def truth_of(rows):
    """Return (image_id, label, box, difficult) rows in the form that evaluate_voc takes."""
    image_ids, labels, boxes_px, difficult = zip(*rows, strict=True) if rows else ((), (), (), ())
    return {
        "image_ids": np.array(image_ids, int),
        "labels": np.array(labels, int),
        "boxes_voc": np.array(boxes_px, float).reshape(-1, 4),
        "difficult": np.array(difficult, bool),
    }


def score(detections, truth, num_classes=1, **settings):
    return ssd.evaluate_voc(detections_of(detections), truth_of(truth), num_classes, **settings)


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
    # `hits` of 10 objects found without a miss: precision 1 at the recalls 0, .1, ..., hits / 10. All of them
    # count but 3 / 10, because the fourth number of MATLAB's 0:0.1:1 is 3 * .1 = .30000000000000004.
    recall = np.arange(1, hits + 1) / 10
    _, eleven = ssd.average_precision(recall, np.ones(hits))
    assert eleven == pytest.approx((hits + 1 - (hits == 3) if hits else 0) / 11)


# -- Hits and misses


def test_all_objects_found_is_one_and_none_is_zero():
    truth = [(0, 1, A_BOX, False), (1, 1, B_BOX, False)]
    perfect = score([(0, 1, 0.9, A_BOX), (1, 1, 0.8, B_BOX)], truth)[1]
    assert (perfect["ap_area"], perfect["ap11"], perfect["num_gt"]) == (1, 1, 2)
    nothing = score([], truth)[1]
    assert (nothing["ap_area"], nothing["ap11"], nothing["num_gt"]) == (0, 0, 2)
    assert len(nothing["recall"]) == len(nothing["precision"]) == 0


def test_hand_case_with_duplicate_and_wrong_place():
    truth = [(0, 1, A_BOX, False), (0, 1, B_BOX, False)]
    detections = [
        (0, 1, 0.9, A_BOX),  # hit
        (0, 1, 0.8, A_BOX),  # found before: false
        (0, 1, 0.7, FAR),  # false
        (0, 1, 0.6, B_BOX),  # hit
    ]
    result = score(detections, truth)[1]
    assert result["recall"].tolist() == [0.5, 0.5, 0.5, 1]
    assert result["precision"].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2])
    assert result["ap_area"] == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    assert result["ap11"] == pytest.approx((6 * 1 + 5 * 0.5) / 11)


def test_order_of_scores_decides_not_order_of_rows():
    late_hit = score([(0, 1, 0.2, A_BOX), (0, 1, 0.9, FAR)], [(0, 1, A_BOX, False)])[1]
    assert late_hit["precision"].tolist() == pytest.approx([0, 0.5])
    assert late_hit["ap_area"] == pytest.approx(0.5)


def test_tied_scores_stay_in_the_given_order():
    truth = [(0, 1, A_BOX, False)]
    rows = [(0, 1, 0.5, FAR)] * 20 + [(0, 1, 0.5, A_BOX)] + [(0, 1, 0.5, FAR)] * 20
    assert score(rows, truth)[1]["ap_area"] == pytest.approx(1 / 21)
    assert score(rows[20:], truth)[1]["ap_area"] == 1


def test_difficult_objects_count_neither_way():
    truth = [(0, 1, A_BOX, True), (0, 1, B_BOX, False)]
    result = score([(0, 1, 0.9, A_BOX), (0, 1, 0.8, A_BOX), (0, 1, 0.7, B_BOX)], truth)[1]
    assert (result["num_gt"], result["ap_area"]) == (1, 1)
    assert result["recall"].tolist() == [1]
    assert result["scores"].tolist() == [0.7]  # what is found on a difficult object is left out


def test_a_class_with_difficult_objects_only_has_no_value():
    result = score([(0, 1, 0.9, A_BOX)], [(0, 1, A_BOX, True)])[1]
    assert math.isnan(result["ap_area"])
    assert math.isnan(result["ap11"])
    assert result["num_gt"] == 0


def test_a_detection_takes_the_object_it_overlaps_most_even_if_that_is_found():
    # The second detection overlaps B by more than .5 too, but A more: as the devkit has it, it is false.
    truth = [(0, 1, [1, 1, 10, 10], False), (0, 1, [1, 3, 10, 12], False)]
    detections = [(0, 1, 0.9, [1, 1, 10, 10]), (0, 1, 0.8, [1, 1, 10, 11])]
    assert reference.iou(detections[1][3], truth[1][2], 1) > 0.5
    assert score(detections, truth)[1]["recall"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("difficult_first", [True, False])
def test_of_equal_overlaps_the_first_object_is_taken(difficult_first):
    # Two objects at equal distance above and below: which one is taken shows in whether it counts.
    truth = [(0, 1, [1, 1, 10, 10], difficult_first), (0, 1, [1, 5, 10, 14], not difficult_first)]
    result = score([(0, 1, 0.9, [1, 3, 10, 12])], truth)[1]
    assert result["num_gt"] == 1
    assert result["ap_area"] == (0 if difficult_first else 1)
    assert len(result["recall"]) == (0 if difficult_first else 1)


def test_overlap_counts_corners_as_pixels():
    # 10x10 and 10x5 pixels: IoU is exactly 50 / 100. Without the corners' pixels it would be 36 / 81 < .5.
    truth = [(0, 1, [1, 1, 10, 10], False)]
    assert score([(0, 1, 0.9, [1, 1, 10, 5])], truth)[1]["ap_area"] == 1
    assert reference.iou([1, 1, 10, 5], [1, 1, 10, 10]) < 0.5
    # And 49.9 of 100 is not enough.
    assert score([(0, 1, 0.9, [1, 1, 10, 4.99])], truth)[1]["ap_area"] == 0


def test_threshold_of_overlap_is_used():
    truth, detections = [(0, 1, [1, 1, 10, 10], False)], [(0, 1, 0.9, [1, 1, 10, 7])]  # IoU .7
    assert score(detections, truth, iou_thresh=0.65)[1]["ap_area"] == 1
    assert score(detections, truth, iou_thresh=0.75)[1]["ap_area"] == 0


def test_images_and_classes_are_kept_apart():
    truth = [(0, 1, A_BOX, False), (1, 2, B_BOX, False)]
    right_box_wrong_image = [(1, 1, 0.9, A_BOX), (0, 2, 0.9, B_BOX)]
    right_box_wrong_class = [(0, 2, 0.9, A_BOX), (1, 1, 0.9, B_BOX)]
    for detections in (right_box_wrong_image, right_box_wrong_class):
        result = score(detections, truth, num_classes=2)
        assert [result[k]["ap_area"] for k in (1, 2)] == [0, 0]
        assert [len(result[k]["recall"]) for k in (1, 2)] == [1, 1]


def test_a_class_without_ground_truth_is_nan_and_present():
    result = score([(0, 2, 0.9, FAR)], [(0, 1, A_BOX, False)], num_classes=3)
    assert list(result) == [1, 2, 3]
    assert result[1]["ap_area"] == 0
    assert all(math.isnan(result[k][name]) for k in (2, 3) for name in ("ap_area", "ap11"))


def test_no_truth_is_nan_with_and_without_detections():
    assert math.isnan(score([], [])[1]["ap_area"])
    assert math.isnan(score([(0, 1, 0.5, A_BOX)], [])[1]["ap_area"])


def test_detections_in_images_without_truth_are_false():
    result = score([(9, 1, 0.9, A_BOX), (0, 1, 0.8, A_BOX)], [(0, 1, A_BOX, False)])[1]
    assert result["precision"].tolist() == [0, 0.5]


def test_boxes_beyond_the_image_are_not_cut():
    truth = [(0, 1, [1, 1, 10, 10], False)]
    assert score([(0, 1, 0.9, [-9, 1, 10, 10])], truth)[1]["ap_area"] == 1  # 100 of 200 pixels
    assert score([(0, 1, 0.9, [-10, 1, 10, 10])], truth)[1]["ap_area"] == 0


def test_rows_of_one_image_are_one_image_in_whatever_order():
    truth = [(0, 1, A_BOX, False), (1, 1, B_BOX, False), (0, 1, B_BOX, False)]
    detections = [(0, 1, 0.9, B_BOX), (1, 1, 0.8, B_BOX), (0, 1, 0.7, A_BOX), (0, 1, 0.6, B_BOX)]
    assert score(detections, truth)[1]["recall"].tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1])


# -- Against the loops


def assert_agrees(detections, truth, num_classes, iou_thresh=0.5):
    result = score(detections, truth, num_classes, iou_thresh=iou_thresh)
    for label in range(1, num_classes + 1):
        outcomes, num_gt = reference.voc_class(detections, truth, label, iou_thresh)
        area, eleven = reference.voc_ap(outcomes, num_gt)
        assert result[label]["num_gt"] == num_gt
        assert len(result[label]["recall"]) == len(outcomes)
        is_hit = np.diff(result[label]["recall"], prepend=0) > 0
        assert is_hit.tolist() == outcomes
        assert result[label]["ap_area"] == pytest.approx(area, abs=1e-9, nan_ok=True)
        assert result[label]["ap11"] == pytest.approx(eleven, abs=1e-9, nan_ok=True)


# Few places and few scores: equal overlaps, repeated boxes and tied scores are the rule.
edges = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda e: (e[0], e[0] + e[1]))
boxes = st.tuples(edges, edges).map(lambda b: [b[0][0], b[1][0], b[0][1], b[1][1]])
detection = st.tuples(st.integers(0, 1), st.integers(1, 2), st.sampled_from([0.1, 0.5, 0.5, 0.9]), boxes)
ground_truth = st.tuples(st.integers(0, 1), st.integers(1, 2), boxes, st.booleans())


@settings(max_examples=300, deadline=None)
@given(st.lists(detection, max_size=25), st.lists(ground_truth, max_size=12), st.sampled_from([0.5, 0.75]))
def test_evaluation_agrees_with_the_loops(detections, truth, iou_thresh):
    assert_agrees(detections, truth, num_classes=2, iou_thresh=iou_thresh)


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


# -- Thresholds


def test_the_best_threshold_is_that_of_the_best_f1_by_hand():
    truth = [(0, 1, A_BOX, False), (0, 1, B_BOX, False), (0, 2, C_BOX, False)]
    # F1 at .9: 2 * 1 * .5 / 1.5 = .667; at .8: .5; at .7: 2 * .667 * 1 / 1.667 = .8; at .6: 2 * .5 / 1.5.
    detections = [(0, 1, 0.9, A_BOX), (0, 1, 0.8, FAR), (0, 1, 0.7, B_BOX), (0, 1, 0.6, FAR)]
    result = score([*detections, (0, 3, 0.9, FAR)], truth, num_classes=3)
    scores, f1 = ssd.f1_curve(result[1])
    assert scores.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert f1.tolist() == pytest.approx([2 / 3, 1 / 2, 4 / 5, 2 / 3])
    # The dog is not found, and there is no owl to find: neither has a threshold.
    assert ssd.best_thresholds(result, ("cat", "dog", "owl")) == {"cat": 0.7}


def test_detections_of_equal_score_pass_a_threshold_together():
    rows = [(0, 1, 0.9, A_BOX), (0, 1, 0.9, FAR), (0, 1, 0.5, B_BOX)]
    result = score(rows, [(0, 1, A_BOX, False), (0, 1, B_BOX, False)])
    scores, f1 = ssd.f1_curve(result[1])
    assert scores.tolist() == [0.9, 0.5]
    assert f1.tolist() == pytest.approx([1 / 2, 4 / 5])
    assert ssd.best_thresholds(result, ("cat",)) == {"cat": 0.5}


def test_of_equal_f1_the_highest_score_is_the_threshold():
    # One of two found: 2 * 1 * .5 / 1.5 at .9, and 2 * .5 * 1 / 1.5 with all four detections.
    rows = [(0, 1, 0.9, A_BOX), (0, 1, 0.8, FAR), (0, 1, 0.7, FAR), (0, 1, 0.6, B_BOX)]
    result = score(rows, [(0, 1, A_BOX, False), (0, 1, B_BOX, False)])
    assert ssd.best_thresholds(result, ("cat",)) == {"cat": 0.9}


def test_a_class_of_which_nothing_is_right_has_no_threshold():
    result = score([(0, 1, 0.08, FAR), (0, 1, 0.03, FAR)], [(0, 1, A_BOX, False)])
    assert ssd.best_thresholds(result, ("cat",)) == {}  # so prediction takes the usual one


# -- The whole evaluation


class Stub(nn.Module):
    """Answers each image, known by its constant colour, with given boxes on the first anchors."""

    def __init__(self, answers, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.answers = answers
        self.modes = []
        self.register_buffer("anchors", ANCHORS)

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
        path = str(tmp_path / f"{number}.png")
        Image.new("RGB", (width, height), (number,) * 3).save(path)
        low = rng.uniform(0, 0.1, (count, 2)) + np.arange(count)[:, None] * 0.33  # apart from one another
        boxes = np.concatenate((low, low + rng.uniform(0.1, 0.22, (count, 2))), axis=1)
        boxes_px = (boxes * [width, height, width, height]).astype(np.float32)
        labels = rng.integers(1, 3, count)
        made.append(ssd.Record(str(number), path, width, height, boxes_px, labels, np.zeros(count, bool)))
    return made


def loader_of(records, batch_size=2):
    dataset = ssd.VocDataset(records, ssd.build_transform(train=False), ANCHORS)
    return ssd.make_loader(dataset, batch_size=batch_size)


def perfect_answers(records):
    return {n: list(zip(r.boxes.tolist(), r.labels.tolist(), strict=True)) for n, r in enumerate(records)}


def test_perfect_detections_have_map_one(records):
    model = Stub(perfect_answers(records), num_classes=2).train()
    result = ssd.measure(model, loader_of(records))
    assert [result[name] for name in ("map_area", "map11", "map75")] == pytest.approx([1, 1, 1])
    assert not any(model.modes)  # evaluation mode
    found = result["detections"]
    assert [len(column) for column in found.values()] == [8] * 4
    # The images' own pixels, as VOC counts them: corners from 1, both included.
    first = found["boxes_voc"][found["image_ids"] == 0]
    np.testing.assert_allclose(first, records[0].boxes_px + np.array([1, 1, 0, 0]), atol=0.01)


def test_the_batch_size_changes_nothing(records):
    model = Stub(perfect_answers(records), num_classes=2)
    results = [ssd.measure(model, loader_of(records, size)) for size in (1, 5)]
    for name in ("image_ids", "labels", "scores", "boxes_voc"):
        np.testing.assert_allclose(results[0]["detections"][name], results[1]["detections"][name], atol=1e-4)


def test_detections_of_another_image_are_false(records):
    answers = perfect_answers(records)
    swapped = {**answers, 0: answers[2], 2: answers[0]}
    assert ssd.measure(Stub(swapped, num_classes=2), loader_of(records))["map_area"] < 0.9


def test_the_strict_figures_ask_for_an_overlap_of_three_quarters():
    record = ssd.Record(
        "a",
        "a.png",
        100,
        100,
        np.array([[0, 0, 10, 10], [20, 20, 30, 30]], np.float32),
        np.array([1, 2]),
        np.zeros(2, bool),
    )
    # Of VOC pixels: an IoU of .7 with the first object, of .8 with the second.
    detections = detections_of([(0, 1, 0.9, [1, 1, 10, 7]), (0, 2, 0.9, [21, 21, 30, 28])])
    result = ssd.score_detections(detections, [record], 2)
    assert [result["classes"][k]["ap_area"] for k in (1, 2)] == [1, 1]
    assert [result["classes"][k]["ap75"] for k in (1, 2)] == [0, 1]
    assert (result["map_area"], result["map75"]) == (1, 0.5)


def test_classes_without_ground_truth_are_left_out_of_the_means(records):
    result = ssd.measure(Stub(perfect_answers(records), num_classes=5), loader_of(records))
    assert [result[name] for name in ("map_area", "map11", "map75")] == pytest.approx([1, 1, 1])
    assert list(result["classes"]) == [1, 2, 3, 4, 5]
    assert math.isnan(result["classes"][4]["ap_area"])


def test_no_detection_at_all_has_map_zero(records):
    result = ssd.measure(Stub({n: [] for n in range(5)}, num_classes=2), loader_of(records))
    assert result["map_area"] == result["map11"] == result["map75"] == 0
    assert result["detections"]["boxes_voc"].shape == (0, 4)


def test_no_ground_truth_at_all_has_no_map(records):
    result = ssd.measure(Stub({1: [([0.1, 0.1, 0.4, 0.4], 1)]}, num_classes=2), loader_of([records[1]]))
    assert all(math.isnan(result[name]) for name in ("map_area", "map11", "map75"))
    assert len(result["detections"]["labels"]) == 1


def test_settings_reach_detect(records):
    model = Stub(perfect_answers(records), num_classes=2)
    result = ssd.measure(model, loader_of(records), max_detections=1)
    assert np.bincount(result["detections"]["image_ids"], minlength=5).tolist() == [1, 0, 1, 1, 1]
    assert len(ssd.measure(model, loader_of(records), score_thresh=0.9999)["detections"]["scores"]) == 0


def test_losses_are_means_over_the_images(records):
    calls = []

    def loss(outputs, targets):
        calls.append([tuple(tensor.shape) for tensor in (*outputs, *targets)])
        value = torch.tensor(float(len(calls)))
        return {"loss": value, "loss_cls": 2 * value, "loss_box": 3 * value}

    result = ssd.measure(Stub(perfect_answers(records), num_classes=2), loader_of(records), loss=loss)
    assert calls == [[(n, 9966, 3), (n, 9966, 4), (n, 9966), (n, 9966, 4)] for n in (2, 2, 1)]
    mean = (2 * 1 + 2 * 2 + 1 * 3) / 5  # of the batches' losses 1, 2 and 3
    assert [result[k] for k in ("loss", "loss_cls", "loss_box")] == pytest.approx([mean, 2 * mean, 3 * mean])


def test_without_a_loss_there_is_none_in_the_result(records):
    assert "loss" not in ssd.measure(Stub(perfect_answers(records), num_classes=2), loader_of(records))


@pytest.mark.parametrize(("num_classes", "images"), [(20, 32), (80, 32), (1000, 6)])
def test_networks_of_many_classes_are_measured_on_fewer_images_at_once(records, num_classes, images):
    model = ssd.SSD300(num_classes, width=0.0625)
    loader = ssd.plain_loader([*records] * 8, model, batch_size=64, workers=0)
    assert len(next(iter(loader))["images"]) == images


def test_truth_and_pixels_follow_the_voc_convention(records):
    truth = ssd.truth_of(records)
    assert truth["image_ids"].tolist() == [0, 0, 2, 2, 2, 3, 4, 4]
    assert truth["labels"].tolist() == np.concatenate([r.labels for r in records]).tolist()
    np.testing.assert_allclose(truth["boxes_voc"][5], records[3].boxes_px[0] + np.array([1, 1, 0, 0]))
    hard = dataclasses.replace(records[2], difficult=np.array([False, True, False]))
    mixed = [*records[:2], hard, *records[3:]]
    assert ssd.truth_of(mixed)["difficult"].tolist() == [False] * 3 + [True] + [False] * 4
    answers = perfect_answers(records)
    del answers[2][1]  # not found, which costs nothing
    assert ssd.measure(Stub(answers, num_classes=2), loader_of(mixed))["map_area"] == pytest.approx(1)
    # Edges 0 to 10 are the ten pixels 1 to 10.
    assert ssd.to_voc_pixels([[0, 0, 10, 20]]).tolist() == [[1, 1, 10, 20]]
    assert ssd.to_voc_pixels(np.zeros((0, 4))).shape == (0, 4)


def test_the_table_names_every_class_and_the_mean(records):
    result = ssd.measure(Stub(perfect_answers(records), num_classes=3), loader_of(records))
    lines = ssd.class_table(result, ("cat", "dog", "unicorn")).splitlines()
    assert [line.split()[0] for line in lines] == ["class", "cat", "dog", "unicorn", "mean", "Test"]
    counts = np.bincount(np.concatenate([r.labels for r in records]), minlength=3)
    assert [int(line.split()[1]) for line in lines[1:3]] == counts[1:].tolist()
    assert lines[1].split()[2:] == ["1.000", "1.0000", "1.0000", "1.0000"]
    assert lines[3].split()[1:] == ["0", "no", "objects"]
    assert lines[4].split()[1:] == ["1.0000", "1.0000", "1.0000"]
    assert len(lines[0]) == len(lines[1]) == len(lines[4])  # the columns stand below their heads
