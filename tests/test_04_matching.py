import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_convert

import ssd_object_detection as ssd

ANCHORS = ssd.make_anchors()
ANCHORS_XYXY = box_convert(ANCHORS, "cxcywh", "xyxy").numpy()


@st.composite
def coarse_boxes(draw, min_size=0, max_size=6):
    """Boxes (G, 4) on a grid of eighths: equal boxes and equal overlaps are frequent."""
    edges = st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True).map(sorted)
    pairs = draw(st.lists(st.tuples(edges, edges), min_size=min_size, max_size=max_size))
    return np.array([[x[0], y[0], x[1], y[1]] for x, y in pairs], dtype=np.float64).reshape(-1, 4) / 8


def matched_of(boxes, anchors, *thresh):
    return ssd.match_anchors(np.array(boxes, dtype=float), np.array(anchors, dtype=float), *thresh).tolist()


def test_hand_case_of_threshold_and_of_the_owned_anchor():
    anchors = [[0, 0, 4, 4], [0, 0, 4, 3], [0, 0, 4, 1], [6, 6, 8, 8], [5, 5, 9, 9]]
    boxes = [[0, 0, 4, 4], [6, 6, 7, 7]]
    # Overlaps of the first box: 1, .75, .25, 0, 0; of the second: 0, 0, 0, .25, .0625.
    assert matched_of(boxes, anchors) == [0, 0, -1, 1, -1]
    assert matched_of(boxes, anchors, 0.8) == [0, -1, -1, 1, -1]


def test_overlap_equal_to_the_threshold_matches():
    anchors = [[0, 0, 4, 4], [0, 0, 4, 2]]  # overlaps 1 and exactly .5
    assert matched_of([[0, 0, 4, 4]], anchors, 0.5) == [0, 0]
    assert matched_of([[0, 0, 4, 4]], anchors, 0.51) == [0, -1]


def test_best_overlap_chooses_first_and_the_other_takes_what_is_left():
    anchors = [[0, 0, 4, 4], [0, 0, 4, 1]]
    boxes = [[0, 0, 4, 3], [0, 0, 4, 4]]  # both like anchor 0 most, with .75 and 1
    # Row 1 overlaps best and owns anchor 0; row 0 must take anchor 1 (overlap 1/3, under the threshold).
    assert matched_of(boxes, anchors) == [1, 0]


def test_an_owned_anchor_is_kept_against_a_better_overlap():
    # Anchor 1 overlaps row 1 by .75, but row 0 owns it: row 1 owns anchor 0 (1.0), so row 0 is left with it.
    anchors = [[0, 0, 4, 4], [0, 0, 4, 3]]
    assert matched_of([[0, 0, 1, 1], [0, 0, 4, 4]], anchors) == [1, 0]


def test_of_equal_overlaps_the_first_ground_truth_and_the_first_anchor_are_taken():
    anchors = [[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]]
    assert matched_of([[0, 0, 4, 4]], anchors, 2.0) == [0, -1, -1]
    assert matched_of([[0, 0, 4, 4], [0, 0, 4, 4]], anchors) == [0, 1, 0]


# -- Against a slow reference


@settings(max_examples=150, deadline=None)
@given(coarse_boxes(), coarse_boxes(min_size=6, max_size=14), st.sampled_from([0.0625, 0.3, 0.5, 0.75, 1.0]))
def test_matching_agrees_with_the_reference(boxes, anchors, thresh):
    matched = ssd.match_anchors(boxes, anchors, thresh)
    assert matched.tolist() == reference.match(boxes.tolist(), anchors.tolist(), thresh)


def test_matching_agrees_with_the_reference_on_the_real_anchors():
    rng = np.random.default_rng(3)
    low = rng.uniform(0, 0.7, (6, 2))
    boxes = np.concatenate((low, low + rng.uniform(0.02, 0.3, low.shape)), axis=1)
    anchors = ANCHORS_XYXY.astype(np.float64)
    expected = reference.match(boxes.tolist(), anchors.tolist(), 0.5)
    assert ssd.match_anchors(boxes, anchors).tolist() == expected


def random_image(rng):
    """Return boxes (G, 4), at most 100: scattered, tied, crowded or anchors themselves, and some copies."""
    count = int(101 * rng.random() ** 4)
    kind = rng.integers(4)
    if kind == 0:  # of any size, anywhere
        size = np.exp(rng.uniform(np.log(0.005), 0, (count, 2)))
        low = rng.random((count, 2)) * (1 - size)
        boxes = np.concatenate((low, low + size), axis=1)
    elif kind == 1:  # on a coarse grid
        low = rng.integers(0, 8, (count, 2))
        boxes = np.concatenate((low, rng.integers(low + 1, 9)), axis=1) / 8
    elif kind == 2:  # small ones in one place
        low = rng.uniform(0.2, 0.7, 2) + rng.normal(0, 0.02, (count, 2))
        boxes = np.concatenate((low, low + rng.uniform(0.01, 0.1, (count, 2))), axis=1)
    else:
        boxes = ANCHORS_XYXY[rng.integers(len(ANCHORS_XYXY), size=count)].astype(np.float64)
    is_copy = rng.random(count) < rng.choice([0, 0.3, 1])
    return boxes[np.where(is_copy, rng.integers(max(count, 1), size=count), np.arange(count))]


def some_anchors(rng, boxes):
    """Return more anchors than boxes: those that overlap them most, so that they compete, and ten others."""
    anchors = ANCHORS_XYXY[rng.permutation(len(ANCHORS_XYXY))[:1500]].astype(np.float64)
    if len(boxes) == 0:
        return anchors[:10]
    overlap = ssd.box_iou(boxes[:, None], anchors).max(axis=0)
    near = np.argpartition(-overlap, len(boxes) + 20)[: len(boxes) + 20]
    return anchors[rng.permutation(np.concatenate((near, np.arange(10))))]


@pytest.mark.slow
def test_matching_agrees_with_the_reference_on_a_thousand_images():
    sizes, num_copies, num_matched = [], 0, 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        boxes = random_image(rng)
        anchors = some_anchors(rng, boxes)
        matched = ssd.match_anchors(boxes, anchors)
        assert matched.tolist() == reference.match(boxes.tolist(), anchors.tolist(), 0.5), seed
        sizes.append(len(boxes))
        num_copies += len(boxes) - len(np.unique(boxes, axis=0))
        num_matched += (matched >= 0).sum()
    assert min(sizes) == 0
    assert max(sizes) == 100
    assert num_copies > 1000
    assert num_matched > sum(sizes) + 5_000  # by the threshold, not by ownership alone


@settings(max_examples=50, deadline=None)
@given(coarse_boxes(min_size=1, max_size=5), st.integers(1, 20))
def test_every_ground_truth_gets_an_anchor_even_repeated_boxes(boxes, copies):
    boxes = np.tile(boxes, (copies, 1)).astype(np.float32)
    matched = ssd.match_anchors(boxes, ANCHORS_XYXY)
    assert set(range(len(boxes))) <= set(matched.tolist())


def test_no_ground_truth_makes_every_anchor_background():
    matched = ssd.match_anchors(np.zeros((0, 4), np.float32), ANCHORS_XYXY)
    assert matched.shape == (9966,)
    assert matched.dtype == np.int64
    assert (matched == -1).all()


# -- Targets


def test_targets_carry_label_and_encoded_box_of_the_match():
    gt_boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.5, 0.4, 0.9, 0.8]])
    gt_labels = torch.tensor([7, 3])
    labels, box_targets = (part[0] for part in reference.targets([gt_boxes], [gt_labels]))
    matched = torch.from_numpy(ssd.match_anchors(gt_boxes.numpy(), ANCHORS_XYXY))
    assert labels.shape == (9966,)
    assert labels.dtype == torch.int64
    assert box_targets.shape == (9966, 4)
    assert box_targets.dtype == torch.float32
    is_positive = matched >= 0
    assert not labels[~is_positive].any()
    assert torch.isfinite(box_targets).all()
    assert labels.unique().tolist() == [0, 3, 7]
    assert torch.equal(labels[is_positive], gt_labels[matched[is_positive]])
    recovered = ssd.decode(box_targets, ANCHORS)[is_positive]
    torch.testing.assert_close(recovered, gt_boxes[matched[is_positive]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("thresh", [0.35, 0.5, 0.7])
def test_matching_uses_the_threshold(thresh):
    box = [0.2, 0.2, 0.6, 0.6]
    matched = ssd.match_anchors(np.array([box]), ANCHORS_XYXY, thresh)
    overlaps = [reference.iou(box, anchor) for anchor in ANCHORS_XYXY.tolist()]
    assert (matched == 0).sum() == max(1, sum(overlap >= thresh for overlap in overlaps))


def test_images_share_a_batch_whatever_they_hold():
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.5, 0.4, 0.9, 0.8]])
    labels, box_targets = reference.targets([torch.zeros(0, 4), boxes, boxes[1:]], [[], [7, 3], [3]])
    assert (labels.shape, labels.dtype) == ((3, 9966), torch.int64)
    assert box_targets.shape == (3, 9966, 4)
    assert torch.isfinite(box_targets).all()
    assert not labels[0].any()
    for row, (one, named) in enumerate([(boxes, [7, 3]), (boxes[1:], [3])], start=1):
        alone, targets = reference.targets([one], [named])
        assert torch.equal(labels[row], alone[0])
        assert torch.equal(box_targets[row][alone[0] > 0], targets[0][alone[0] > 0])


def test_targets_of_a_crowd_name_every_object():
    # Cells in a blood smear: 100 objects, each of its own label, many smaller than any anchor.
    rng = np.random.default_rng(0)
    low = torch.from_numpy(rng.uniform(0, 0.9, (100, 2))).float()
    gt_boxes = torch.cat((low, low + 0.03), dim=1)
    labels, _ = reference.targets([gt_boxes], [range(1, 101)])
    assert labels.unique().tolist() == list(range(101))
