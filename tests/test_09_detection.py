import pytest
import torch
from torchvision.ops import nms

import ssd_object_detection as ssd


def anchors_of(boxes):
    """cxcywh anchors for xyxy boxes: with zero deltas they are what detect finds."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), dim=1)


def logits_of(probabilities):
    """Logits (1, A, K + 1) whose softmax has the given foreground probabilities (A, K)."""
    foreground = torch.tensor(probabilities, dtype=torch.float32)
    return torch.cat((1 - foreground.sum(dim=1, keepdim=True), foreground), dim=1).log()[None]


def detect(boxes, probabilities, **settings):
    anchors = anchors_of(boxes)
    (found,) = ssd.detect(logits_of(probabilities), torch.zeros(1, len(anchors), 4), anchors, **settings)
    return found


BOXES = [
    [0.1, 0.1, 0.5, 0.5],
    [0.1, 0.1, 0.5, 0.45],  # IoU .875 with the first
    [0.6, 0.6, 0.9, 0.9],
    [0.1, 0.3, 0.5, 0.7],  # IoU 1/3 with the first
]
PROBABILITIES = [[0.6, 0.3], [0.7, 0.2], [0.05, 0.9], [0.5, 0.004]]


def test_hand_case_of_suppression_per_class():
    boxes, labels, scores = detect(BOXES, PROBABILITIES)
    # Class 1: box 1 (.7) removes box 0 (.6); boxes 3 (IoU .28 with box 1) and 2 stay.
    # Class 2: box 0 (.3) removes box 1 (.2); box 2 stays, box 3 is below .01.
    expected = [(0.9, 2, 2), (0.7, 1, 1), (0.5, 1, 3), (0.3, 2, 0), (0.05, 1, 2)]
    assert scores.tolist() == pytest.approx([e[0] for e in expected], abs=1e-5)
    assert labels.tolist() == [e[1] for e in expected]
    torch.testing.assert_close(boxes, torch.tensor([BOXES[e[2]] for e in expected]))
    assert labels.dtype == torch.int64


def test_overlap_threshold_of_suppression_is_used():
    assert len(detect(BOXES, PROBABILITIES, nms_iou_thresh=0.9)[0]) == 7  # nothing is removed
    _, labels, scores = detect(BOXES, PROBABILITIES, nms_iou_thresh=0.2)  # box 1 now removes box 3 too
    assert labels.tolist() == [2, 1, 2, 1]
    assert scores.tolist() == pytest.approx([0.9, 0.7, 0.3, 0.05], abs=1e-5)


def test_scores_below_the_threshold_are_left_out():
    _, _, scores = detect(BOXES, PROBABILITIES, score_thresh=0.4)
    assert scores.tolist() == pytest.approx([0.9, 0.7, 0.5], abs=1e-5)


def test_each_class_may_have_its_own_threshold():
    _, labels, scores = detect(BOXES, PROBABILITIES, score_thresh=torch.tensor([0.55, 0.25]))
    # Without one: .9 (2), .7 (1), .5 (1), .3 (2), .05 (1).
    assert labels.tolist() == [2, 1, 2]
    assert scores.tolist() == pytest.approx([0.9, 0.7, 0.3], abs=1e-5)


def test_a_score_equal_to_the_threshold_is_kept():
    logits = logits_of([[0.25]])
    score = logits.softmax(dim=-1)[0, 0, 1].item()
    for thresh, count in ((score, 1), (score + 1e-6, 0)):
        ((boxes, _, _),) = ssd.detect(logits, torch.zeros(1, 1, 4), anchors_of(BOXES[0]), score_thresh=thresh)
        assert len(boxes) == count


def test_most_detections_are_the_best_of_all_classes():
    _, labels, scores = detect(BOXES, PROBABILITIES, max_detections=3)
    assert scores.tolist() == pytest.approx([0.9, 0.7, 0.5], abs=1e-5)
    assert labels.tolist() == [2, 1, 1]


def test_background_is_never_reported():
    _, labels, _ = detect(BOXES[:1], [[0.001, 0.002]])
    assert labels.tolist() == []
    _, labels, scores = detect(BOXES[:1], [[0.02, 0.03]])
    assert labels.tolist() == [2, 1]  # one box may carry two classes
    assert scores.tolist() == pytest.approx([0.03, 0.02], abs=1e-6)


def test_at_most_1000_boxes_of_a_class_enter_suppression():
    # 30 x 40 boxes that do not touch, so that suppression removes none.
    boxes = [[x / 40, y / 60, (x + 0.9) / 40, (y + 0.9) / 60] for x in range(30) for y in range(40)]
    scores = [0.2 + 0.0005 * i for i in range(1200)]
    _, labels, found = detect(boxes, [[s, 0.05] for s in scores], max_detections=10_000)
    assert (labels == 1).sum() == 1000
    assert (labels == 2).sum() == 1000
    assert found[labels == 1].tolist() == pytest.approx(sorted(scores, reverse=True)[:1000], abs=1e-5)


def test_boxes_are_cut_at_the_border():
    boxes, _, _ = detect([[-0.2, 0.3, 0.4, 1.7], [0.6, -0.1, 1.2, 0.2]], [[0.9], [0.8]])
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 0.3, 0.4, 1.0], [0.6, 0.0, 1.0, 0.2]]))


def test_boxes_that_lie_outside_are_removed():
    outside = [[1.1, 0.1, 1.4, 0.5], [0.2, -0.5, 0.4, -0.1]]
    boxes, _, scores = detect([*outside, [0.2, 0.2, 0.4, 0.4]], [[0.9], [0.8], [0.5]])
    assert scores.tolist() == pytest.approx([0.5], abs=1e-5)
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_box_outputs_are_decoded_for_their_anchor():
    anchors = ssd.make_anchors()
    truth = torch.tensor([[0.2, 0.3, 0.5, 0.8], [0.6, 0.1, 0.9, 0.3]])
    rows = torch.tensor([4321, 9900])
    deltas = torch.zeros(1, 9966, 4)
    deltas[0, rows] = ssd.encode(truth, anchors[rows])
    logits = torch.zeros(1, 9966, 4)
    logits[..., 0] = 12.0
    logits[0, rows, torch.tensor([3, 1])] = torch.tensor([20.0, 18.0])
    ((boxes, labels, _),) = ssd.detect(logits, deltas, anchors)
    assert labels.tolist() == [3, 1]
    torch.testing.assert_close(boxes, truth, rtol=0, atol=1e-5)


def test_images_of_a_batch_are_told_apart():
    anchors = anchors_of(BOXES)
    first, second = logits_of(PROBABILITIES), logits_of([[0.001, 0.001]] * 4)
    third = logits_of([[0.1, 0.2]] * 4)
    found = ssd.detect(torch.cat((first, second, third)), torch.zeros(3, 4, 4), anchors)
    assert len(found) == 3
    torch.testing.assert_close(found[0][2], detect(BOXES, PROBABILITIES)[2])
    torch.testing.assert_close(found[2][2], detect(BOXES, [[0.1, 0.2]] * 4)[2])
    boxes, labels, scores = found[1]
    assert boxes.shape == (0, 4)
    assert labels.shape == scores.shape == (0,)


def slow_detect(logits, deltas, anchors, score_thresh, nms_iou_thresh, max_detections):
    """One class at a time, for one image."""
    probability, boxes = logits.softmax(dim=-1), ssd.decode(deltas, anchors).clamp(0, 1)
    found = []
    for label in range(1, logits.shape[1]):
        rows = [i for i in range(len(boxes)) if probability[i, label] >= score_thresh]
        rows = sorted(rows, key=lambda i: -probability[i, label].item())[: ssd.PRE_NMS_TOP_K]
        rows = [i for i in rows if boxes[i, 2] > boxes[i, 0] and boxes[i, 3] > boxes[i, 1]]
        kept = nms(boxes[rows].view(-1, 4), probability[rows, label], nms_iou_thresh)
        found += [(probability[rows[k], label].item(), label, boxes[rows[k]].tolist()) for k in kept.tolist()]
    return sorted(found, key=lambda d: -d[0])[:max_detections]


@pytest.mark.parametrize("seed", range(4))
def test_detection_agrees_with_a_loop_over_classes(seed, monkeypatch):
    monkeypatch.setattr(ssd, "PRE_NMS_TOP_K", 100)
    generator = torch.Generator().manual_seed(seed)
    anchors = ssd.make_anchors()[torch.randperm(9966, generator=generator)[:700]]
    logits = 2 * torch.randn(2, 700, 4, generator=generator)
    deltas = 2 * torch.randn(2, 700, 4, generator=generator)
    settings = {"score_thresh": 0.1, "nms_iou_thresh": 0.45, "max_detections": 150}
    for image, (boxes, labels, scores) in enumerate(ssd.detect(logits, deltas, anchors, **settings)):
        expected = slow_detect(logits[image], deltas[image], anchors, **settings)
        assert len(expected) > 100
        assert labels.tolist() == [e[1] for e in expected]
        assert scores.tolist() == pytest.approx([e[0] for e in expected], abs=1e-6)
        torch.testing.assert_close(boxes, torch.tensor([e[2] for e in expected]))


def test_what_stands_below_many_copies_of_one_box_is_found():
    # 300 copies score best: of five times the 20 detections asked for, suppression leaves one.
    others = [[x / 10, 0.8, (x + 1) / 10, 0.9] for x in range(6)]
    boxes, _, scores = detect([BOXES[0]] * 300 + others, [[0.9]] * 300 + [[0.5]] * 6, max_detections=20)
    torch.testing.assert_close(boxes, torch.tensor([BOXES[0], *others]))
    assert scores.tolist() == pytest.approx([0.9] + [0.5] * 6, abs=1e-5)


@pytest.mark.parametrize("most", [5, 30, 80, 400])
def test_what_is_kept_does_not_depend_on_how_many_are_asked_for(most):
    generator = torch.Generator().manual_seed(1)
    anchors = ssd.make_anchors()[torch.randperm(9966, generator=generator)[:600]]
    logits = 2 * torch.randn(1, 600, 4, generator=generator)
    deltas = torch.randn(1, 600, 4, generator=generator)
    (few,) = ssd.detect(logits, deltas, anchors, nms_iou_thresh=0.1, max_detections=most)
    (every,) = ssd.detect(logits, deltas, anchors, nms_iou_thresh=0.1, max_detections=10_000)
    assert len(every[0]) > 80
    for one, other in zip(few, every, strict=True):
        assert torch.equal(one, other[:most])


def test_extreme_outputs_give_valid_boxes():
    anchors = ssd.make_anchors()[:50]
    deltas = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0)) * 1000
    ((boxes, _, scores),) = ssd.detect(torch.randn(1, 50, 3) * 100, deltas, anchors, nms_iou_thresh=1.0)
    assert torch.isfinite(boxes).all()
    assert torch.isfinite(scores).all()
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_detection_leaves_no_gradient():
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    ((boxes, _, scores),) = ssd.detect(logits, torch.zeros(1, 2, 4), anchors_of(BOXES[:2]))
    assert not boxes.requires_grad
    assert not scores.requires_grad
