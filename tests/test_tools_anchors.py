"""tools/anchors.py: the best anchor of a box, and anchor sizes made for the boxes of a data set."""

import itertools
import json

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_convert, box_iou

import ssd_object_detection as ssd
from tools import anchors


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
    np.testing.assert_allclose(anchors.best_anchor_iou(boxes), best, atol=1e-5)


def test_the_best_anchor_of_given_sizes_is_one_of_them():
    sizes = ([(0.05, 0.09)], [(0.2, 0.1), (0.1, 0.3)], *ssd.ANCHOR_SIZES[2:])
    boxes = boxes_of([(0.05, 0.08), (0.3, 0.1), (0.12, 0.4), (0.8, 0.7)] * 10)
    every = box_convert(ssd.make_anchors(sizes), "cxcywh", "xyxy")
    assert len(every) == 37 * 37 + 18 * 18 * (2 + 6) + 81 * 6 + 25 * 4 + 4 * 4
    best = box_iou(torch.from_numpy(boxes), every).amax(dim=1).numpy()
    np.testing.assert_allclose(anchors.best_anchor_iou(boxes, sizes), best, atol=1e-5)


def test_no_boxes_have_no_best_anchor():
    assert anchors.best_anchor_iou(np.zeros((0, 4), np.float32)).shape == (0,)


def test_the_overlap_of_sizes_is_that_of_boxes_with_a_common_corner():
    iou = anchors.size_iou(np.array([[0.2, 0.4], [0.1, 0.1]]), np.array([[0.4, 0.2], [0.2, 0.4], [0.1, 0.1]]))
    np.testing.assert_allclose(iou, [[1 / 3, 1, 1 / 8], [1 / 8, 1 / 8, 1]])


def test_suggested_sizes_are_the_centres_of_groups_and_stay_the_module_s_where_there_are_few_boxes():
    groups = [(0.03, 0.05), (0.06, 0.03), (0.1, 0.1), (0.13, 0.14)]  # on the first map: below sqrt(.1 * .2)
    factors = [0.96, 0.98, 1.01, 1.02, 1.04]  # their mean is 1.002, not the middle one
    sizes = [(w * factor, h * factor) for w, h in groups for factor in factors]
    suggested = anchors.suggest_anchor_sizes(boxes_of(sizes + [(0.9, 0.9)] * 3))
    np.testing.assert_allclose(sorted(suggested[0]), np.array(groups) * 1.002, atol=1e-6)
    assert suggested[1:] == ssd.ANCHOR_SIZES[1:]
    assert anchors.suggest_anchor_sizes(np.zeros((0, 4), np.float32)) == ssd.ANCHOR_SIZES


def test_equal_boxes_give_equal_sizes():
    suggested = anchors.suggest_anchor_sizes(boxes_of([(0.06, 0.08)] * 9))
    np.testing.assert_allclose(suggested[0], [(0.06, 0.08)] * 4, atol=1e-6)


def test_a_box_belongs_to_the_map_of_the_nearest_scale():
    edges = [(a * b) ** 0.5 for a, b in itertools.pairwise(ssd.ANCHOR_SCALES[:-1])]
    for number, count in enumerate(map(len, ssd.ANCHOR_SIZES)):
        low = edges[number - 1] if number else 0.02
        high = edges[number] if number < len(edges) else 0.98
        sides = np.linspace(low + 1e-3, high - 1e-3, count)
        suggested = anchors.suggest_anchor_sizes(boxes_of(np.stack((sides, sides), axis=1)))
        np.testing.assert_allclose(suggested[number], np.stack((sides, sides), axis=1), atol=1e-6)
        others = [n for n in range(6) if n != number]
        assert [suggested[n] for n in others] == [ssd.ANCHOR_SIZES[n] for n in others]


def test_suggested_sizes_fit_their_boxes_better_and_keep_the_network_s_shape():
    rng = np.random.default_rng(1)
    scale = rng.random(500) * 0.6 + 0.05
    ratio = rng.random(500) * 0.3 + 0.5
    boxes = boxes_of(np.stack((scale * ratio**0.5, scale / ratio**0.5), axis=1))
    suggested = anchors.suggest_anchor_sizes(boxes)
    assert list(map(len, suggested)) == list(map(len, ssd.ANCHOR_SIZES))
    assert anchors.best_anchor_iou(boxes, suggested).mean() > anchors.best_anchor_iou(boxes).mean() + 0.02
    assert suggested == anchors.suggest_anchor_sizes(boxes)


def test_the_program_writes_a_file_that_a_training_reads(tiny_voc, tmp_path, capsys):
    assert anchors.main(["--data", str(tiny_voc), "--output-dir", str(tmp_path)]) == 0
    path = tmp_path / "plots" / "anchors.json"
    out = capsys.readouterr().out
    records = ssd.load_data(str(tiny_voc), val_fraction=0).train
    boxes = np.concatenate([record.boxes for record in records])
    assert out.startswith(f"{len(boxes)} training boxes of {tiny_voc}")
    assert f"--anchors {path}" in out
    suggested = anchors.suggest_anchor_sizes(boxes)
    rows = [("present", ssd.ANCHOR_SIZES), ("suggested", suggested)]
    for line, (name, sizes) in zip(out.splitlines()[2:4], rows, strict=True):
        best = anchors.best_anchor_iou(boxes, sizes)
        numbers = [np.mean(best >= 0.5), np.mean(best >= 0.7), best.mean()]
        assert line.split() == [name, *(f"{number:.4f}" for number in numbers)]
    read = ssd.parse_args(["--anchors", str(path)]).anchors
    np.testing.assert_allclose(np.concatenate(read), np.concatenate(suggested), atol=6e-5)


def test_suggested_anchors_can_be_trained_with_resumed_and_evaluated(tiny_voc, flags_of, tmp_path, capsys):
    out = tmp_path / "out"
    assert anchors.main(["--data", str(tiny_voc), "--output-dir", str(out)]) == 0
    path = out / "plots" / "anchors.json"
    sizes = json.loads(path.read_text())
    assert ssd.main(flags_of(tiny_voc, out, "--anchors", str(path), "--epochs", "1")) == 0
    path.unlink()  # the checkpoint has them
    assert ssd.main(["--resume", "--epochs", "2", "--output-dir", str(out)]) == 0
    final = out / "checkpoints" / "ssd_tiny_set_final.pth"
    trained = ssd.load_detector(final).model.anchors
    torch.testing.assert_close(trained, ssd.make_anchors(sizes), rtol=0, atol=1e-6)
    assert not torch.equal(trained, ssd.make_anchors())
    capsys.readouterr()
    assert ssd.main(["--evaluate", str(final), "--output-dir", str(tmp_path / "again")]) == 0
    assert "Test mAP@.5" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--data", "nowhere"], ["--train-split", "none"], ["--classes", "walrus"]])
def test_a_mistake_is_told_in_one_line(flags, tiny_voc, tmp_path, capsys):
    assert anchors.main(["--data", str(tiny_voc), "--output-dir", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert flags[1] in error
    assert not list(tmp_path.iterdir())
