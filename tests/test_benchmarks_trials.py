"""benchmarks/trials.py: the alternatives that recipes are compared with do what their sources say."""

import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import ops

import ssd_object_detection as ssd
from benchmarks import trials

ANCHORS = ssd.make_anchors()
BOXES = torch.tensor([[0.1, 0.1, 0.3, 0.4], [0.5, 0.5, 0.9, 0.9], [0.52, 0.5, 0.9, 0.88]])


def batch_of(boxes=BOXES, labels=(1, 2, 1)):
    return {"gt_boxes": boxes[None], "gt_labels": torch.tensor([labels])}


def recipe(**more):
    values = {"match_iou": 0.5, "loss": "focal", "focal_alpha": -1.0, "focal_gamma": 1.0, "cls_weight": 1.0,
              "box_weight": 1.0}
    return types.SimpleNamespace(**values | more)


@pytest.mark.parametrize("name", [None, *trials.TRIALS])
def test_a_trial_exchanges_names_the_module_has_and_puts_them_back(name):
    before = dict(vars(ssd))
    with trials.applied(name):
        changed = {key for key in before if vars(ssd)[key] is not before[key]}
        assert changed == set(trials.TRIALS.get(name, ()))
    assert vars(ssd) == before


@pytest.mark.parametrize(("name", "function"), [("giou", ops.generalized_box_iou_loss),
                                                ("diou", ops.distance_box_iou_loss),
                                                ("ciou", ops.complete_box_iou_loss)])
def test_iou_losses_are_torchvision_s_over_the_positives(name, function):
    batch, generator = batch_of(), torch.Generator().manual_seed(0)
    labels, targets = ssd.build_targets(batch["gt_boxes"], batch["gt_labels"], ANCHORS)
    logits = torch.randn(1, len(ANCHORS), 3, generator=generator)
    noise = 0.3 * torch.randn(targets.shape, generator=generator)
    with trials.applied(name):
        criterion = ssd.make_criterion(ANCHORS, recipe(box_weight=5.0))
    exact, near = criterion((logits, targets), batch), criterion((logits, targets + noise), batch)
    assert exact["loss_box"].item() == pytest.approx(0, abs=1e-4)
    hits = labels[0] > 0
    found, true = (ssd.decode(deltas[0, hits], ANCHORS[hits]) for deltas in (targets + noise, targets))
    expected = function(found, true)
    assert near["loss_box"].item() == pytest.approx(5 * expected.mean().item(), rel=1e-4)
    plain = ssd.make_criterion(ANCHORS, recipe())((logits, targets + noise), batch)
    assert near["loss_cls"].item() == plain["loss_cls"].item()
    assert near["loss"].item() == pytest.approx((near["loss_cls"] + near["loss_box"]).item())


def test_the_loss_over_images_is_that_over_positives_times_their_number():
    batch = batch_of()
    positives = int((ssd.build_targets(batch["gt_boxes"], batch["gt_labels"], ANCHORS)[0] > 0).sum())
    outputs = torch.zeros(1, len(ANCHORS), 3), torch.zeros(1, len(ANCHORS), 4)
    with trials.applied("per-image"):
        criterion = ssd.make_criterion(ANCHORS, recipe())
    plain = ssd.make_criterion(ANCHORS, recipe())(outputs, batch)
    assert positives > 3
    for name, value in criterion(outputs, batch).items():
        assert value.item() == pytest.approx(positives * plain[name].item(), rel=1e-5)


def test_plain_positives_keep_their_cross_entropy_and_background_is_focused():
    labels = torch.tensor([[0, 1, 2, 3, 0]] * 2)
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    loss = trials.plain_positives_loss(logits, labels, gamma=2.0)
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    torch.testing.assert_close(loss[:, 1:4], plain[:, 1:4])
    torch.testing.assert_close(loss[:, [0, 4]], (1 - (-plain).exp())[:, [0, 4]] ** 2 * plain[:, [0, 4]])


def test_the_prior_s_heads_see_a_hundredth_of_objects_whatever_the_loss():
    with trials.applied("prior"):
        model = ssd.SSD300(3, width=0.0625)
    for head in model.cls_heads:
        probability = head.bias.view(-1, 4).softmax(dim=-1)[:, 1:].sum(dim=-1)
        torch.testing.assert_close(probability, torch.full_like(probability, 0.01))


def test_clipped_anchors_end_at_the_border_and_inner_ones_are_left_alone():
    clipped = trials.clipped_anchors()
    low, high = clipped[:, :2] - clipped[:, 2:] / 2, clipped[:, :2] + clipped[:, 2:] / 2
    assert low.min() > -1e-6
    assert high.max() < 1 + 1e-6
    assert (clipped[:, 2:] > 0).all()
    torch.testing.assert_close(clipped[0], torch.tensor([0.035, 0.035, 0.07, 0.07]))  # from .02 - .05 to .02 + .05
    inside = ((ANCHORS[:, :2] - ANCHORS[:, 2:] / 2 >= 0) & (ANCHORS[:, :2] + ANCHORS[:, 2:] / 2 <= 1)).all(dim=1)
    assert 5000 < inside.sum() < len(ANCHORS)
    torch.testing.assert_close(clipped[inside], ANCHORS[inside])
    with trials.applied("clipped"):
        assert torch.equal(ssd.SSD300(2, width=0.0625).anchors, clipped)


def test_sigmoids_without_focusing_are_the_binary_cross_entropy_and_score_by_themselves():
    labels = torch.tensor([[0, 1, 2, 3, 0]] * 2)
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    truth = F.one_hot(labels, 4)[..., 1:].float()
    expected = F.binary_cross_entropy_with_logits(logits[..., 1:], truth, reduction="none").sum(dim=-1)
    torch.testing.assert_close(trials.sigmoid_focal_loss(logits, labels, gamma=0.0), expected)
    with trials.applied("sigmoid"):
        model = ssd.SSD300(3, width=0.0625, prior_prob=0.1)
        scored = torch.full((1, len(ANCHORS), 4), -20.0)
        scored[0, 100, 1:] = torch.tensor([0.0, 1.0, -20.0])
        ((_, labels, scores),) = ssd.detect(scored, torch.zeros(1, len(ANCHORS), 4), ANCHORS)
    assert sorted(scores.tolist()) == pytest.approx([0.5, 1 / (1 + math.exp(-1))])
    assert labels.tolist() == [2, 1]
    bias = model.cls_heads[0].bias.view(-1, 4)
    torch.testing.assert_close(bias[:, 1:].sigmoid(), torch.full((4, 3), 0.1))


def test_atss_takes_candidates_above_mean_plus_deviation_whose_centre_is_inside():
    matched = trials.atss_match(BOXES[None, :2], torch.tensor([[1, 2]]), ops.box_convert(ANCHORS, "cxcywh", "xyxy"))[0]
    for number, box in enumerate(BOXES[:2]):
        rows = (matched == number).nonzero()[:, 0]
        centre = ANCHORS[rows, :2]
        iou = ops.box_iou(box[None], ops.box_convert(ANCHORS[rows], "cxcywh", "xyxy"))[0]
        assert len(rows) > 3
        assert ((centre > box[:2]) & (centre < box[2:])).all()
        assert iou.min() > 0.2
    nothing = trials.atss_match(torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.int64), ANCHORS)
    assert (nothing == -1).all()


def test_atss_gives_crowded_objects_an_anchor_each():
    boxes = torch.tensor([[0.4 + d, 0.4, 0.43 + d, 0.43] for d in (0, 0.005, 0.01, 0.015)])
    labels = torch.tensor([[1, 1, 1, 1, 0]])
    padded = torch.cat((boxes, torch.zeros(1, 4)))[None]
    matched = trials.atss_match(padded, labels, ops.box_convert(ANCHORS, "cxcywh", "xyxy"))
    assert set(matched.unique().tolist()) == {-1, 0, 1, 2, 3}


def samples_of(count=4):
    return [{"image": torch.full((3, 300, 300), 50 * i, dtype=torch.uint8), "index": i,
             "boxes": torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.7, 0.7, 0.9, 0.8]]), "labels": torch.tensor([1, 2 + i]),
             "difficult": torch.tensor([False, True])} for i in range(count)]


def test_mosaic_keeps_each_quarter_s_pixels_and_the_objects_centred_there():
    out = trials.Mosaic.combine(samples_of(), torch.Generator().manual_seed(0))
    assert out["index"] == 0
    assert [out["image"][0, y, x].item() for y in (5, 295) for x in (5, 295)] == [0, 50, 100, 150]
    # The first object's centre is in the first quarter, the second's in the last, wherever they meet (60 to 240).
    assert out["labels"].tolist() == [1, 5]
    assert out["difficult"].tolist() == [False, True]
    assert ((out["boxes"] >= 0) & (out["boxes"] <= 1)).all()


def test_mixup_is_a_weighted_mean_with_the_objects_of_both():
    out = trials.Mixup.combine(samples_of(), torch.Generator().manual_seed(0))
    assert out["labels"].tolist() == [1, 2, 1, 3]
    assert 50 * 0.3 <= out["image"].float().mean() <= 50 * 0.7
    assert len(out["boxes"]) == len(out["difficult"]) == 4


def test_mixed_sets_mix_in_training_only_and_by_seed(tiny_voc):
    data = ssd.load_data(str(tiny_voc), val_fraction=0)
    for name in ("mosaic", "mixup"):
        with trials.applied(name):
            plain = ssd.VocDataset(data.train, ssd.build_transform(train=False))
            mixed = ssd.VocDataset(data.train, ssd.build_transform(train=True, zoom_out=0, crop=0, color=0, shadow=0,
                                                                   noise=0, blur=0))
        for index in range(len(data.train)):
            assert len(plain[index]["labels"]) == len(data.train[index].labels)
            assert torch.equal(mixed[index, 3]["image"], mixed[index, 3]["image"])
        counts = [len(mixed[i, e]["labels"]) != len(data.train[i].labels) for i in range(8) for e in range(4)]
        assert 4 < sum(counts) < 28


def test_the_plain_end_shows_the_last_epochs_pictures_as_they_are_or_mirrored(tiny_voc):
    args = ssd.parse_args(["--data", str(tiny_voc), "--epochs", "20", "--val-fraction", "0", "--workers", "0"])
    with trials.applied("plain-end"):
        dataset = ssd.make_loaders(args, ssd.load_splits(args), pin_memory=False)[0].dataset
        early = [dataset[0, epoch]["image"] for epoch in range(4)]
        late = [dataset[0, epoch]["image"] for epoch in range(17, 20)]
        image = ssd.VocDataset(dataset.records, ssd.build_transform(train=False))[0]["image"]
    is_plain = [[torch.equal(x, image) or torch.equal(x, image.flip(2)) for x in part] for part in (early, late)]
    assert all(is_plain[1])
    assert not any(is_plain[0])


def test_turns_keep_objects_with_their_pixels():
    image = np.zeros((300, 300, 3), np.uint8)
    image[30:60, 150:240] = 255
    seen = set()
    with trials.applied("turns"):
        transform = ssd.build_transform(train=True, zoom_out=0, crop=0, color=0, shadow=0, noise=0, blur=0)
    for _ in range(20):
        out = transform(image=image, bboxes=np.array([[0.5, 0.1, 0.8, 0.2]]), rows=[0])
        x1, y1, x2, y2 = (np.asarray(out["bboxes"])[0, :4] * 300).round().astype(int)
        assert (out["image"][y1:y2, x1:x2] == 255).all()
        assert (out["image"] == 255).sum() == 30 * 90 * 3
        seen.add((x1, y1))
    assert len(seen) > 4


SCORES = torch.tensor([0.9, 0.8, 0.7])


def test_soft_nms_lowers_scores_by_the_overlap():
    kept, scores = trials.soft_nms(BOXES, SCORES, 0.45)
    iou = ops.box_iou(BOXES[1:2], BOXES[2:])[0, 0].item()
    assert iou > 0.8
    assert torch.equal(kept, BOXES)
    assert scores.tolist() == pytest.approx([0.9, 0.8, 0.7 * math.exp(-iou**2 / 0.5)])
    assert len(trials.soft_nms(BOXES[:0], SCORES[:0], 0.45)[0]) == 0


def test_diou_nms_keeps_a_box_that_is_as_much_displaced_as_it_overlaps():
    side = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.14, 0.0, 0.54, 0.4]])  # IoU .48, distance .04 of the diagonal
    assert len(ops.nms(side, SCORES[:2], 0.45)) == 1
    assert trials.diou_nms(side, SCORES[:2], 0.45)[1].tolist() == pytest.approx([0.9, 0.8])
    assert torch.equal(trials.diou_nms(BOXES, SCORES, 0.45)[0], BOXES[:2])
    assert len(trials.diou_nms(BOXES[:0], SCORES[:0], 0.45)[0]) == 0


def test_voting_moves_a_box_to_the_weighted_mean_of_those_that_agree():
    kept, scores = trials.voting_nms(BOXES, SCORES, 0.45)
    iou = ops.box_iou(BOXES[1:2], BOXES[2:])[0, 0]
    assert scores.tolist() == pytest.approx([0.9, 0.8])
    torch.testing.assert_close(kept[0], BOXES[0])
    torch.testing.assert_close(kept[1], (0.8 * BOXES[1] + 0.7 * iou * BOXES[2]) / (0.8 + 0.7 * iou))


def test_suppression_that_drops_what_nms_drops_is_detect_itself():
    generator = torch.Generator().manual_seed(0)
    logits, deltas = 2 * torch.randn(2, len(ANCHORS), 3, generator=generator), torch.zeros(2, len(ANCHORS), 4)

    def plain(boxes, scores, thresh):
        kept = ops.nms(boxes, scores, thresh)
        return boxes[kept], scores[kept]

    again = trials.suppression(plain)
    for one, two in zip(ssd.detect(logits, deltas, ANCHORS), again["detect"](logits, deltas, ANCHORS), strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b)
