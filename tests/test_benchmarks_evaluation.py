"""The evaluator's benchmark: its arrays are what it says, and a tiny run prints and writes every number."""

import json

import numpy as np

import ssd_object_detection as ssd
from benchmarks import evaluation


def test_arrays_have_hits_duplicates_and_background_and_are_seeded():
    sizes = {"images": 40, "objects": 3.0, "detections": 200, "classes": 20, "seed": 1}
    (det, gt), (again, _) = (evaluation.make_arrays(**sizes) for _ in range(2))
    assert all((det[name] == again[name]).all() for name in det)
    assert np.bincount(det["image_ids"]).tolist() == [200] * 40
    assert (det["boxes_px"][:, 2:] > det["boxes_px"][:, :2]).all()
    assert 0.03 < gt["difficult"].mean() < 0.25
    assert (gt["boxes_px"] >= 1).all()
    assert (gt["boxes_px"] <= [500, 375, 500, 375]).all()
    rows = ssd.evaluate_voc(det, gt, 20)
    assert np.mean([r["recall"][-1] for r in rows.values() if r["num_gt"]]) > 0.9
    assert 0.2 < np.mean([r["ap_area"] for r in rows.values() if r["num_gt"]]) < 0.95
    assert ssd.evaluate_coco(det, gt, 20)["ap"] > 0.1


def test_tiny_run_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    flags = "--images 6 --detections 30 --classes 3 --reference 4 --rounds 1 --json"
    result = evaluation.main([*flags.split(), str(path)])
    assert json.loads(path.read_text()) == result
    assert set(result["rows"]) == {"voc", "coco"}
    for row in result["rows"].values():
        assert row["largest_difference"] < 1e-9
        assert row["ratio_with_loading"] > row["ratio"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 images, ")
    assert [line.split()[0] for line in lines[1:]] == ["figures", "voc", "coco", "voc:"]


def test_a_wrong_value_shows_in_the_difference(monkeypatch):
    true_voc, true_coco = ssd.evaluate_voc, ssd.evaluate_coco
    sizes = {"images": 6, "objects": 3.0, "detections": 30, "classes": 3, "seed": 0}
    det, gt = evaluation.make_arrays(**sizes)
    spoilt = true_coco(det, gt, 3)
    judge, _, _ = evaluation.pycocotools_judge(det, gt, images=6, classes=3, only_voc=False)
    spoilt["per_class"][2]["ap75"] += 0.25
    assert abs(evaluation.coco_difference(judge, spoilt, 3) - 0.25) < 1e-9
    monkeypatch.setattr(ssd, "evaluate_voc", lambda *args: {
        k: {**row, "ap11": row["ap11"] + 0.125} for k, row in true_voc(*args).items()})
    assert abs(evaluation.voc_difference(det, gt, images=6, classes=3) - 0.125) < 1e-9
