"""Anchors fitted to a data set: the best anchor of a box, sizes by k-means, --anchors."""

import itertools

import hypothesis.extra.numpy as hnp
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import box_convert, box_iou

import ssd_object_detection as ssd
from ssd_tools import shapes


def boxes_of(sizes, seed=0):
    """Return boxes (N, 4) of sizes (N, 2), each somewhere inside the image."""
    sizes = np.array(sizes)
    corner = np.random.default_rng(seed).random(sizes.shape) * (1 - sizes)
    return np.concatenate((corner, corner + sizes), axis=1).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(hnp.arrays(np.float32, (70, 4), elements=st.floats(0, 1, width=32)))
def test_the_best_anchor_is_that_of_all_of_them(corners):
    low = np.minimum(corners[:, :2], corners[:, 2:])
    high = np.maximum(corners[:, :2], corners[:, 2:]) + np.float32(0.01)
    boxes = np.concatenate((low, high), axis=1)
    every = box_convert(ssd.make_anchors(), "cxcywh", "xyxy")
    best = box_iou(torch.from_numpy(boxes), every).amax(dim=1).numpy()
    np.testing.assert_allclose(ssd.best_anchor_iou(boxes), best, atol=1e-5)


def test_the_best_anchor_of_given_sizes_is_one_of_them():
    sizes = ([(0.05, 0.09)], [(0.2, 0.1), (0.1, 0.3)], *ssd.ANCHOR_SIZES[2:])
    boxes = boxes_of([(0.05, 0.08), (0.3, 0.1), (0.12, 0.4), (0.8, 0.7)] * 10)
    every = box_convert(ssd.make_anchors(sizes), "cxcywh", "xyxy")
    assert len(every) == 37 * 37 + 18 * 18 * (2 + 6) + 81 * 6 + 25 * 4 + 4 * 4
    best = box_iou(torch.from_numpy(boxes), every).amax(dim=1).numpy()
    np.testing.assert_allclose(ssd.best_anchor_iou(boxes, sizes), best, atol=1e-5)


def test_no_boxes_have_no_best_anchor():
    assert ssd.best_anchor_iou(np.zeros((0, 4), np.float32)).shape == (0,)


def test_fitted_sizes_are_the_centres_of_groups_and_stay_the_module_s_where_there_are_few_boxes():
    groups = [(0.03, 0.05), (0.06, 0.03), (0.1, 0.1), (0.13, 0.14)]  # on the first map: below sqrt(.1 * .2)
    factors = [0.96, 0.98, 1.01, 1.02, 1.04]  # their mean is 1.002, not the middle one
    sizes = [(w * factor, h * factor) for w, h in groups for factor in factors]
    fitted = ssd.fit_anchor_sizes(boxes_of(sizes + [(0.9, 0.9)] * 3))
    np.testing.assert_allclose(sorted(fitted[0]), np.array(groups) * 1.002, atol=1e-6)
    assert fitted[1:] == ssd.ANCHOR_SIZES[1:]
    assert ssd.fit_anchor_sizes(np.zeros((0, 4), np.float32)) == ssd.ANCHOR_SIZES


def test_equal_boxes_give_equal_sizes():
    fitted = ssd.fit_anchor_sizes(boxes_of([(0.06, 0.08)] * 9))
    np.testing.assert_allclose(fitted[0], [(0.06, 0.08)] * 4, atol=1e-6)


def test_a_box_belongs_to_the_map_of_the_nearest_scale():
    edges = [(a * b) ** 0.5 for a, b in itertools.pairwise(ssd.ANCHOR_SCALES[:-1])]
    for number, count in enumerate(map(len, ssd.ANCHOR_SIZES)):
        low = edges[number - 1] if number else 0.02
        high = edges[number] if number < len(edges) else 0.98
        sides = np.linspace(low + 1e-3, high - 1e-3, count)
        fitted = ssd.fit_anchor_sizes(boxes_of(np.stack((sides, sides), axis=1)))
        np.testing.assert_allclose(fitted[number], np.stack((sides, sides), axis=1), atol=1e-6)
        others = [n for n in range(6) if n != number]
        assert [fitted[n] for n in others] == [ssd.ANCHOR_SIZES[n] for n in others]


def test_fitted_sizes_fit_their_boxes_better_and_keep_the_network_s_shape():
    rng = np.random.default_rng(1)
    scale = rng.random(500) * 0.6 + 0.05
    ratio = rng.random(500) * 0.3 + 0.5
    boxes = boxes_of(np.stack((scale * ratio**0.5, scale / ratio**0.5), axis=1))
    fitted = ssd.fit_anchor_sizes(boxes)
    assert list(map(len, fitted)) == list(map(len, ssd.ANCHOR_SIZES))
    assert ssd.best_anchor_iou(boxes, fitted).mean() > ssd.best_anchor_iou(boxes).mean() + 0.02
    assert fitted == ssd.fit_anchor_sizes(boxes)


def small_objects(tmp_path):
    """Return a data set whose objects no anchor of the paper overlaps by half."""
    root = tmp_path / "small"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    objects = [("cat", (x, y, x + 6, y + 8)) for x in (0, 80, 160) for y in (0, 40, 80, 120)]
    for number in range(6):
        Image.new("RGB", (200, 160)).save(root / "JPEGImages" / f"{number}.jpg")
        shapes.write_annotation(
            root / "Annotations" / f"{number}.xml", f"{number}.jpg", (160, 200, 3), objects
        )
    (root / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{number}\n" for number in range(6)))
    return root


def test_auto_fits_where_the_paper_s_anchors_do_not_reach_and_never_for_voc(tmp_path, capsys):
    boxes = np.concatenate([record.boxes for record in ssd.load_data(str(small_objects(tmp_path))).train])
    assert np.mean(ssd.best_anchor_iou(boxes) >= 0.5) < ssd.LEAST_REACH
    fitted = ssd.choose_anchors("auto", boxes, ["nail"])
    assert fitted == ssd.choose_anchors("fit", boxes, ["nail"]) == ssd.fit_anchor_sizes(boxes)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "0.0%" in lines[0]
    reached = boxes_of([(0.2, 0.2), (0.5, 0.5), (0.3, 0.15)])
    assert ssd.choose_anchors("auto", reached, ["nail"]) == ssd.ANCHOR_SIZES
    assert ssd.choose_anchors("auto", boxes, ssd.VOC_CLASSES) == ssd.ANCHOR_SIZES
    assert ssd.choose_anchors("paper", boxes, ["nail"]) == ssd.ANCHOR_SIZES
    assert ssd.choose_anchors(fitted, reached, ["nail"]) == fitted  # of a saved run
    assert capsys.readouterr().out == ""


def test_many_boxes_are_thinned_out(monkeypatch):
    boxes = boxes_of(np.full((9000, 2), 0.05))
    seen = []
    monkeypatch.setattr(ssd, "fit_anchor_sizes", lambda boxes: [seen.append(len(boxes)), ssd.ANCHOR_SIZES][1])
    ssd.choose_anchors("fit", boxes, ["nail"])
    assert seen == [3000]


def test_auto_fits_where_more_than_two_of_a_hundred_boxes_are_not_reached():
    for small, is_fitted in ((1, False), (3, True)):
        boxes = boxes_of([(0.2, 0.2)] * (100 - small) + [(0.02, 0.02)] * small)
        assert (ssd.choose_anchors("auto", boxes, ["nail"]) != ssd.ANCHOR_SIZES) == is_fitted


def test_fitted_anchors_are_trained_with_resumed_refined_and_evaluated(
    flags_of, tmp_path, capsys, no_pictures
):
    data, out = small_objects(tmp_path), tmp_path / "out"
    assert ssd.main(flags_of(data, out, "--epochs", "1", "--val-split", "")) == 0
    assert "anchors  fitted" in capsys.readouterr().out
    final = next((out / "checkpoints").glob("*_final.pth"))
    trained = ssd.load_detector(final).model.anchors
    assert not torch.equal(trained, ssd.make_anchors())
    assert ssd.main(["--resume", "--epochs", "2", "--output-dir", str(out)]) == 0
    assert torch.equal(ssd.load_detector(final).model.anchors, trained)
    more = ["--epochs", "1", "--output-dir", str(tmp_path / "more")]
    assert ssd.main(["--init-from", str(final), *more]) == 0
    assert "kept the heads of: cat" in capsys.readouterr().out
    assert ssd.main(["--init-from", str(final), "--anchors", "paper", *more]) == 0
    assert "new heads, because the anchors differ" in capsys.readouterr().out
    assert ssd.main(["--evaluate", str(final), "--test-split", "train", "--output-dir", str(tmp_path)]) == 0
    assert "Test mAP@.5" in capsys.readouterr().out
