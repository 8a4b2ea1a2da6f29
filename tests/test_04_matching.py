import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_convert

import ssd_object_detection as ssd

ANCHORS = ssd.make_anchors()
ANCHORS_XYXY = box_convert(ANCHORS, "cxcywh", "xyxy")


@st.composite
def coarse_boxes(draw, min_size=0, max_size=6):
    """Boxes on a grid of eighths: equal boxes and equal overlaps are frequent."""
    edges = st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True).map(sorted)
    pairs = draw(st.lists(st.tuples(edges, edges), min_size=min_size, max_size=max_size))
    return [[x[0] / 8, y[0] / 8, x[1] / 8, y[1] / 8] for x, y in pairs]


def padded(boxes_of_images):
    """Return gt_boxes, gt_labels of a batch in float64, each image padded with label 0."""
    count = max(map(len, boxes_of_images))
    gt_boxes = torch.zeros(len(boxes_of_images), count, 4, dtype=torch.float64)
    gt_labels = torch.zeros(len(boxes_of_images), count, dtype=torch.int64)
    for i, boxes in enumerate(boxes_of_images):
        gt_boxes[i, : len(boxes)] = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
        gt_labels[i, : len(boxes)] = torch.arange(1, len(boxes) + 1)
    return gt_boxes, gt_labels


def test_hand_case_of_threshold_and_of_the_owned_anchor():
    anchors = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [0, 0, 4, 1], [6, 6, 8, 8], [5, 5, 9, 9]])
    boxes, labels = torch.tensor([[[0.0, 0, 4, 4], [6, 6, 7, 7]]]), torch.tensor([[2, 1]])
    # Overlaps of the first box: 1, .75, .25, 0, 0; of the second: 0, 0, 0, .25, .0625.
    assert ssd.match_anchors(boxes, labels, anchors, 0.5).tolist() == [[0, 0, -1, 1, -1]]
    assert ssd.match_anchors(boxes, labels, anchors, 0.8).tolist() == [[0, -1, -1, 1, -1]]


def test_overlap_equal_to_the_threshold_matches():
    anchors = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2]])  # overlaps 1 and exactly .5
    boxes, labels = torch.tensor([[[0.0, 0, 4, 4]]]), torch.tensor([[1]])
    assert ssd.match_anchors(boxes, labels, anchors, 0.5).tolist() == [[0, 0]]
    assert ssd.match_anchors(boxes, labels, anchors, 0.51).tolist() == [[0, -1]]


def test_best_overlap_chooses_first_and_the_other_takes_what_is_left():
    anchors = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 1]])
    boxes = torch.tensor([[[0.0, 0, 4, 3], [0, 0, 4, 4]]])  # both like anchor 0 most, with .75 and 1
    labels = torch.tensor([[1, 1]])
    # Row 1 overlaps best and owns anchor 0; row 0 must take anchor 1 (overlap 1/3, under the threshold).
    assert ssd.match_anchors(boxes, labels, anchors, 0.5).tolist() == [[1, 0]]


def test_an_owned_anchor_is_kept_against_a_better_overlap():
    # Anchor 1 overlaps row 1 by .75, but row 0 owns it: row 1 owns anchor 0 (1.0), so row 0 is left with anchor 1.
    anchors = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3]])
    boxes, labels = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 4, 4]]]), torch.tensor([[1, 1]])
    assert ssd.match_anchors(boxes, labels, anchors, 0.5).tolist() == [[1, 0]]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(coarse_boxes(), min_size=1, max_size=3), coarse_boxes(min_size=6, max_size=14),
    st.sampled_from([0.0625, 0.3, 0.5, 0.75, 1.0]),
)
def test_matching_agrees_with_the_reference(images, anchors, thresh):
    gt_boxes, gt_labels = padded(images)
    matched = ssd.match_anchors(gt_boxes, gt_labels, torch.tensor(anchors, dtype=torch.float64), thresh)
    for i in range(len(images)):
        assert matched[i].tolist() == reference.match(gt_boxes[i].tolist(), gt_labels[i].tolist(), anchors, thresh)


def test_matching_agrees_with_the_reference_on_the_real_anchors():
    rng = np.random.default_rng(3)
    low = rng.uniform(0, 0.7, (2, 6, 2))
    boxes = torch.from_numpy(np.concatenate((low, low + rng.uniform(0.02, 0.3, low.shape)), axis=2))
    labels = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 1, 2, 0, 0, 0]])
    anchors = ANCHORS_XYXY.double()
    matched = ssd.match_anchors(boxes, labels, anchors)
    for i in range(2):
        assert matched[i].tolist() == reference.match(boxes[i].tolist(), labels[i].tolist(), anchors.tolist(), 0.5)


@settings(max_examples=50, deadline=None)
@given(coarse_boxes(min_size=1, max_size=5), st.integers(1, 4))
def test_every_ground_truth_gets_an_anchor_even_repeated_boxes(boxes, copies):
    gt_boxes, gt_labels = padded([boxes * copies])
    matched = ssd.match_anchors(gt_boxes.float(), gt_labels, ANCHORS_XYXY)
    assert set(range(len(boxes) * copies)) <= set(matched[0].tolist())


@settings(max_examples=40, deadline=None)
@given(coarse_boxes(max_size=4), st.integers(1, 3), st.booleans())
def test_padding_rows_never_match_and_change_nothing(boxes, padding, is_first):
    gt_boxes, gt_labels = padded([boxes])
    # Padding that lies exactly on an object would win if it counted.
    filler = gt_boxes[:, :1] if boxes else torch.tensor([[[0.2, 0.2, 0.4, 0.4]]], dtype=torch.float64)
    parts = [gt_boxes, filler.expand(-1, padding, -1)], [gt_labels, torch.zeros(1, padding, dtype=torch.int64)]
    more_boxes, more_labels = (torch.cat(p[::-1] if is_first else p, dim=1) for p in parts)
    plain = ssd.match_anchors(gt_boxes.float(), gt_labels, ANCHORS_XYXY)
    more = ssd.match_anchors(more_boxes.float(), more_labels, ANCHORS_XYXY)
    shift = padding if is_first else 0
    assert torch.equal(more, torch.where(plain >= 0, plain + shift, -1))


def test_images_of_a_batch_do_not_affect_one_another():
    images = [[[0.1, 0.1, 0.4, 0.5], [0.1, 0.1, 0.4, 0.5]], [], [[0.6, 0.2, 0.9, 0.9]]]
    gt_boxes, gt_labels = padded(images)
    together = ssd.match_anchors(gt_boxes.float(), gt_labels, ANCHORS_XYXY)
    for i in range(3):
        alone = ssd.match_anchors(gt_boxes[i : i + 1].float(), gt_labels[i : i + 1], ANCHORS_XYXY)
        assert torch.equal(together[i], alone[0])
    assert (together[1] == -1).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(coarse_boxes(), min_size=1, max_size=4), st.integers(1, 3), st.booleans())
def test_what_a_gpu_computes_is_the_same(images, copies, is_flipped):
    # Repeated boxes want the same anchors; flipped, the padding comes first.
    gt_boxes, gt_labels = padded([boxes * copies for boxes in images])
    gt_boxes, gt_labels = (t.flip(1) if is_flipped else t for t in (gt_boxes.float(), gt_labels))
    plain = ssd.build_targets(gt_boxes, gt_labels, ANCHORS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd, "counting_is_free", lambda tensor: False)
        dense = ssd.build_targets(gt_boxes, gt_labels, ANCHORS)
    assert torch.equal(plain[0], dense[0])
    assert torch.equal(plain[1], dense[1])


def test_no_ground_truth_makes_every_anchor_background():
    matched = ssd.match_anchors(torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.int64), ANCHORS_XYXY)
    assert matched.shape == (3, 9966)
    assert matched.dtype == torch.int64
    assert (matched == -1).all()


def test_targets_carry_label_and_encoded_box_of_the_match():
    gt_boxes = torch.tensor([[[0.1, 0.1, 0.4, 0.5], [0.5, 0.4, 0.9, 0.8]], [[0.2, 0.3, 0.6, 0.9], [0.0] * 4]])
    gt_labels = torch.tensor([[7, 3], [5, 0]])
    labels, boxes = ssd.build_targets(gt_boxes, gt_labels, ANCHORS)
    matched = ssd.match_anchors(gt_boxes, gt_labels, ANCHORS_XYXY)
    assert labels.shape == (2, 9966)
    assert labels.dtype == torch.int64
    assert boxes.shape == (2, 9966, 4)
    assert set(labels[0].tolist()) == {0, 3, 7}
    assert set(labels[1].tolist()) == {0, 5}
    for image in range(2):
        background = matched[image] < 0
        assert (labels[image][background] == 0).all()
        assert (boxes[image][background] == 0).all()
        for anchor in (~background).nonzero()[:, 0].tolist():
            gt = matched[image, anchor]
            assert labels[image, anchor] == gt_labels[image, gt]
        recovered = ssd.decode(boxes[image], ANCHORS)[~background]
        torch.testing.assert_close(recovered, gt_boxes[image][matched[image][~background]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("thresh", [0.35, 0.5, 0.7])
def test_targets_use_the_threshold(thresh):
    gt_boxes, gt_labels = torch.tensor([[[0.2, 0.2, 0.6, 0.6]]]), torch.tensor([[1]])
    labels, _ = ssd.build_targets(gt_boxes, gt_labels, ANCHORS, thresh)
    overlaps = [reference.iou([0.2, 0.2, 0.6, 0.6], a) for a in ANCHORS_XYXY.tolist()]
    assert labels.sum().item() == max(1, sum(o >= thresh for o in overlaps))


def test_targets_without_ground_truth_are_all_background():
    labels, boxes = ssd.build_targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), ANCHORS)
    assert labels.shape == (2, 9966)
    assert boxes.shape == (2, 9966, 4)
    assert not labels.any()
    assert not boxes.any()
