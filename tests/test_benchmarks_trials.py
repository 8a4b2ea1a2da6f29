"""benchmarks/trials.py: the alternatives that recipes are compared with do what their sources say."""

import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_convert, distance_box_iou_loss

import ssd_object_detection as ssd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import trials

ANCHORS = ssd.make_anchors()
ANCHORS_XYXY = box_convert(ANCHORS, "cxcywh", "xyxy").numpy()
BOXES = np.array([[0.1, 0.1, 0.3, 0.4], [0.5, 0.5, 0.9, 0.9], [0.3, 0.6, 0.34, 0.74]], dtype=np.float32)


@pytest.fixture
def no_step(monkeypatch):
    """Return the list of (args, options) that run_training was called with; it does nothing else."""
    calls = []
    monkeypatch.setattr(ssd, "run_training", lambda args, **options: calls.append((args, options)) or 0)
    return calls


def test_the_diou_loss_is_torchvision_s_over_the_positives():
    labels, targets = reference.targets([torch.from_numpy(BOXES)], [[1, 2, 1]])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, len(ANCHORS), 3, generator=generator)
    noisy = targets + 0.3 * torch.randn(targets.shape, generator=generator)

    def loss(deltas, **more):
        return trials.diou_detection_loss((logits, deltas), (labels, targets), anchors_cxcywh=ANCHORS, **more)

    hits = labels[0] > 0
    found, true = (ssd.decode(deltas[0, hits], ANCHORS[hits]) for deltas in (noisy, targets))
    expected = distance_box_iou_loss(found, true)
    near = loss(noisy)
    assert loss(targets)["loss_box"].item() == pytest.approx(0, abs=1e-4)
    assert near["loss_box"].item() == pytest.approx(5 * expected.mean().item(), rel=1e-4)
    plain = ssd.detection_loss((logits, noisy), (labels, targets))
    assert near["loss_cls"].item() == plain["loss_cls"].item()
    assert near["loss"].item() == pytest.approx((near["loss_cls"] + near["loss_box"]).item())
    doubled = loss(noisy, num_positive=2.0 * hits.sum())
    assert doubled["loss"].item() == pytest.approx(near["loss"].item() / 2)


def test_atss_takes_near_candidates_of_high_iou_whose_centre_is_inside():
    matched = trials.atss_match(BOXES, ANCHORS_XYXY)
    centres = ANCHORS[:, :2].numpy()
    for gt, box in enumerate(BOXES):
        iou = ssd.box_iou(box, ANCHORS_XYXY)
        inside = ((centres > box[:2]) & (centres < box[2:])).all(axis=1)
        distance = np.linalg.norm(centres - (box[:2] + box[2:]) / 2, axis=1)
        candidates, start = [], 0
        for cells, sizes in zip(ssd.FEATURE_MAPS, ssd.ANCHOR_SIZES, strict=True):
            count = cells**2 * len(sizes)
            nearest = sorted(range(start, start + count), key=lambda a: distance[a])
            candidates += nearest[: 9 * len(sizes)]
            start += count
        threshold = iou[candidates].mean() + iou[candidates].std(ddof=1)
        expected = {a for a in candidates if iou[a] >= threshold and inside[a]} | {int(iou.argmax())}
        assert set(np.flatnonzero(matched == gt).tolist()) == expected
        assert len(expected) > 3


def test_atss_gives_crowded_objects_an_anchor_each():
    boxes = np.array([[0.4 + d, 0.4, 0.43 + d, 0.43] for d in (0, 0.005, 0.01, 0.015)], dtype=np.float32)
    assert set(trials.atss_match(boxes, ANCHORS_XYXY).tolist()) == {-1, 0, 1, 2, 3}
    assert (trials.atss_match(np.zeros((0, 4), np.float32), ANCHORS_XYXY) == -1).all()


corner = st.floats(0, 0.6)
side = st.floats(0.05, 0.4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(corner, corner, side, side), max_size=5))
def test_atss_leaves_large_objects_to_the_module_s_matching(drawn):
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in drawn], dtype=np.float32).reshape(-1, 4)
    matched = trials.atss_match(boxes, ANCHORS_XYXY, largest=0.0)
    assert np.array_equal(matched, ssd.match_anchors(boxes, ANCHORS_XYXY))


def test_an_atss_sample_differs_from_the_module_s_in_its_targets_alone(tiny_voc):
    records = ssd.load_data(str(tiny_voc), val_fraction=0).train
    transform = ssd.build_transform(train=True)
    plain, atss, small = (kind(records, transform, ANCHORS, seed=1)
                          for kind in (ssd.VocDataset, trials.AtssDataset, trials.SmallAtssDataset))
    differ = 0
    for index in range(len(records)):
        own, other = plain[index, 2], atss[index, 2]
        assert own.keys() == other.keys()
        assert torch.equal(own["images"], other["images"])
        assert {name: value.shape for name, value in own.items() if name != "indices"} == {
            name: value.shape for name, value in other.items() if name != "indices"}
        differ += not torch.equal(own["matched_gt"], other["matched_gt"])
        assert torch.equal(own["gt_boxes"], other["gt_boxes"])
        boxes = plain.augment(index, 2)[1]
        largest = small.largest if index % 2 else np.inf
        kind = (small if index % 2 else atss)[index, 2]
        assert np.array_equal(kind["matched_gt"], trials.atss_match(boxes, ANCHORS_XYXY, largest=largest))
        if (np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)) > 0.1).all():
            assert torch.equal(small[index, 2]["matched_gt"], own["matched_gt"])
    assert differ > len(records) // 3


def test_a_trial_passes_its_part_to_the_training(no_step, tiny_voc, flags_of, tmp_path):
    flags = flags_of(tiny_voc, tmp_path, "--loss", "multibox", "--seed", "5")
    for trial in trials.TRIALS:
        assert trials.main(["--trial", trial, *flags]) == 0
    assert all(args.seed == 5 for args, _ in no_step)
    diou, atss, small = (options for _, options in no_step)
    assert diou["loss"].keywords["loss"] == "multibox"
    assert atss == {"dataset_class": trials.AtssDataset}
    assert small == {"dataset_class": trials.SmallAtssDataset}


@pytest.mark.parametrize("trial", ["diou", "atss-small"])
def test_a_trial_trains(trial, tiny_voc, flags_of, tmp_path):
    assert trials.main(["--trial", trial, *flags_of(tiny_voc, tmp_path, "--epochs", "1")]) == 0
    assert (tmp_path / "checkpoints" / "ssd_tiny_set_final.pth").is_file()


def test_a_trial_refuses_to_evaluate(no_step, tiny_run):
    with pytest.raises(SystemExit):
        trials.main(["--trial", "diou", "--evaluate", str(tiny_run.final)])
    assert no_step == []
