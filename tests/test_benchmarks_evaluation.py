"""The evaluator's benchmark: its arrays are what it says, and pycocotools judges the same detections."""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np

import ssd_object_detection as ssd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import evaluation


def test_arrays_have_hits_duplicates_and_background_and_are_seeded():
    det, gt = evaluation.make_arrays(40)
    again, _ = evaluation.make_arrays(40)
    assert all((det[name] == again[name]).all() for name in det)
    assert np.bincount(det["image_ids"]).tolist() == [200] * 40
    assert (det["boxes_voc"][:, 2:] > det["boxes_voc"][:, :2]).all()
    assert 0.03 < gt["difficult"].mean() < 0.25
    assert (gt["boxes_voc"] >= 1).all()
    assert (gt["boxes_voc"] <= [500, 375, 500, 375]).all()
    rows = [row for row in ssd.evaluate_voc(det, gt, 20).values() if row["num_gt"]]
    assert np.mean([row["recall"][-1] for row in rows]) > 0.9
    assert 0.6 < np.mean([row["ap_area"] for row in rows]) < 0.95


def test_pycocotools_finds_about_the_same_at_iou_50():
    det, gt = evaluation.make_arrays(40)
    with contextlib.redirect_stdout(io.StringIO()):
        judge = evaluation.make_judge(det, gt)
        judge.evaluate()
        judge.accumulate()
    theirs = judge.eval["precision"]
    assert theirs.shape[0] == 1  # one IoU
    assert theirs.shape[3:] == (1, 1)  # one range of areas, one limit of detections
    own = {label: row["ap_area"] for label, row in ssd.evaluate_voc(det, gt, 20).items() if row["num_gt"]}
    for label, ap in own.items():
        assert abs(theirs[0, :, label - 1].mean() - ap) < 0.1  # 101 recalls in place of the area
    assert abs(theirs[theirs > -1].mean() - np.mean(list(own.values()))) < 0.02
