import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou as torchvision_box_iou

import ssd_object_detection as ssd

coordinate = st.floats(-0.5, 1.5, width=32)
side = st.floats(2**-8, 1.5, width=32)
cxcywh = st.tuples(coordinate, coordinate, side, side)

# -- Encoding


def test_encode_gives_hand_computed_deltas():
    anchor = torch.tensor([0.5, 0.5, 0.2, 0.4])
    box = torch.tensor([0.32, 0.36, 0.72, 0.56])  # centre (.52, .46), size (.4, .2)
    # .02 / .2 / .1 = 1; -.04 / .4 / .1 = -1; ln(.4 / .2) / .2; ln(.2 / .4) / .2
    expected = torch.tensor([1.0, -1.0, math.log(2) / 0.2, -math.log(2) / 0.2])
    torch.testing.assert_close(ssd.encode(box, anchor), expected, rtol=0, atol=1e-5)


def test_decode_gives_hand_computed_boxes():
    anchor = torch.tensor([0.5, 0.5, 0.2, 0.4])
    deltas = torch.tensor([1.0, -1.0, math.log(2) / 0.2, -math.log(2) / 0.2])
    expected = torch.tensor([0.32, 0.36, 0.72, 0.56])
    torch.testing.assert_close(ssd.decode(deltas, anchor), expected, rtol=0, atol=1e-6)


def test_zero_deltas_mean_the_anchor_itself():
    anchors = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.9, 0.3, 0.1]])
    expected = torch.tensor([[0.4, 0.3, 0.6, 0.7], [-0.05, 0.85, 0.25, 0.95]])
    torch.testing.assert_close(ssd.decode(torch.zeros(2, 4), anchors), expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(cxcywh, cxcywh), min_size=1, max_size=8))
def test_decode_undoes_encode(pairs):
    box, anchor = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    # decode bounds a size to 62.5 times the anchor's: beyond it the two are not inverses by design
    anchor[:, 2:] = torch.maximum(anchor[:, 2:], box[:, 2:] / 60)
    boxes = torch.cat((box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2), dim=1)
    torch.testing.assert_close(ssd.decode(ssd.encode(boxes, anchor), anchor), boxes, rtol=0, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.floats(-15, 15)] * 4), cxcywh)
def test_encode_undoes_decode(deltas, anchor):
    deltas, anchor = torch.tensor(deltas, dtype=torch.float64), torch.tensor(anchor, dtype=torch.float64)
    torch.testing.assert_close(ssd.encode(ssd.decode(deltas, anchor), anchor), deltas, rtol=0, atol=1e-6)


def test_round_trip_holds_in_float32_for_all_anchors():
    anchors = ssd.make_anchors()
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.6, (len(anchors), 2))
    high = low + rng.uniform(0.05, 0.4, (len(anchors), 2))
    boxes = torch.from_numpy(np.concatenate((low, high), axis=1)).float()
    torch.testing.assert_close(ssd.decode(ssd.encode(boxes, anchors), anchors), boxes, rtol=0, atol=2e-5)


def test_encode_does_not_depend_on_the_unit():
    anchor, box = torch.tensor([0.5, 0.4, 0.2, 0.4]), torch.tensor([0.3, 0.2, 0.7, 0.5])
    torch.testing.assert_close(ssd.encode(box * 300, anchor * 300), ssd.encode(box, anchor))


def test_decode_bounds_sizes_so_that_no_output_overflows():
    anchor = torch.tensor([0.5, 0.5, 0.2, 0.1])
    box = ssd.decode(torch.tensor([0.0, 0.0, 1e30, 1e30]), anchor)
    assert torch.isfinite(box).all()
    torch.testing.assert_close(box[2:] - box[:2], 62.5 * anchor[2:])


def test_a_side_of_no_length_is_encoded_as_a_millionth():
    anchor = torch.tensor([0.5, 0.5, 0.1, 0.1])
    flat = ssd.encode(torch.tensor([0.5, 0.4, 0.5, 0.6]), anchor)
    assert flat[2].item() == pytest.approx(math.log(1e-6 / 0.1) / 0.2, rel=1e-5)
    assert torch.isfinite(flat).all()


@pytest.mark.parametrize("function", [ssd.encode, ssd.decode])
def test_leading_dimensions_broadcast(function):
    anchors = ssd.make_anchors()[100:107]
    values = torch.tensor([0.1, 0.2, 0.5, 0.7]).expand(3, 7, 4)
    out = function(values, anchors)
    assert out.shape == (3, 7, 4)
    torch.testing.assert_close(out[2], function(values[2], anchors))


@pytest.mark.parametrize("function", [ssd.encode, ssd.decode])
def test_no_boxes_give_no_boxes(function):
    assert function(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


# -- VOC's pixels


def test_voc_pixels_count_from_one_and_include_both_corners():
    edges = [[0, 0, 10, 20], [0.5, 4, 40, 30]]  # edges 0 to 10 are the ten pixels 1 to 10
    pixels = [[1, 1, 10, 20], [1.5, 5, 40, 30]]
    assert ssd.to_voc_pixels(edges).tolist() == pixels
    assert ssd.from_voc_pixels(pixels).tolist() == edges
    for function in (ssd.to_voc_pixels, ssd.from_voc_pixels):
        assert function(np.zeros((0, 4), np.float32)).shape == (0, 4)
        assert function(np.zeros(4, np.float32)).dtype == np.float64


# -- Overlap


def random_boxes(rng, *shape, side=1.0):
    """Return float64 xyxy boxes (*shape, 4) that have an area."""
    low = rng.uniform(0, 0.7 * side, (*shape, 2))
    return np.concatenate((low, low + rng.uniform(0.02 * side, 0.5 * side, (*shape, 2))), axis=-1)


def test_iou_has_the_hand_computed_values():
    box = np.array([0.0, 0.0, 4.0, 2.0])
    others = np.array(
        [
            [0, 0, 4, 2],
            [2, 0, 6, 2],
            [0, 0, 2, 1],
            [1, 1, 3, 5],  # itself; half of each; a quarter; 2 of 14
            [4, 0, 6, 2],
            [5, 0, 6, 2],
            [6, 6, 9, 9],  # edge to edge; apart along x; apart along both axes
        ],
        dtype=float,
    )
    assert ssd.box_iou(box, others).tolist() == pytest.approx([1, 4 / 12, 2 / 8, 2 / 14, 0, 0, 0])


def test_extra_counts_the_corners_as_pixels_of_the_box():
    ten, half = np.array([1.0, 1, 10, 10]), np.array([1.0, 1, 10, 5])  # 10 x 10 and 10 x 5 pixels
    assert ssd.box_iou(ten, half, extra=1.0) == pytest.approx(0.5)
    assert ssd.box_iou(ten, half) == pytest.approx(36 / 81)
    pixel = np.array([3.0, 3, 3, 3])
    assert ssd.box_iou(pixel, pixel, extra=1.0) == 1
    beside = np.array([4.0, 3, 4, 3])
    assert ssd.box_iou(pixel, beside, extra=1.0) == 0
    # Corners that touch share one pixel: 1 of 4 + 4 - 1.
    assert ssd.box_iou(np.array([1.0, 1, 2, 2]), np.array([2.0, 2, 3, 3]), extra=1.0) == pytest.approx(1 / 7)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 12)] * 4), min_size=2, max_size=8), st.sampled_from([0.0, 1.0]))
def test_iou_agrees_with_the_reference(corners, extra):
    boxes = [[min(x), min(y), max(x), max(y)] for x, y in ((c[:2], c[2:]) for c in corners)]
    boxes = [[x1, y1, x2 + (x1 == x2), y2 + (y1 == y2)] for x1, y1, x2, y2 in boxes]
    array = np.array(boxes, dtype=np.float64)
    expected = [[reference.iou(a, b, extra) for b in boxes] for a in boxes]
    np.testing.assert_array_equal(ssd.box_iou(array[:, None], array, extra), expected)


def test_iou_agrees_with_torchvision_in_float32():
    rng = np.random.default_rng(0)
    boxes, others = random_boxes(rng, 30).astype(np.float32), random_boxes(rng, 50).astype(np.float32)
    iou = ssd.box_iou(boxes[:, None], others)
    assert iou.dtype == np.float32
    expected = torchvision_box_iou(torch.from_numpy(boxes), torch.from_numpy(others))
    np.testing.assert_allclose(iou, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "other_shape", "expected"),
    [
        ((), (), ()),
        ((7,), (7,), (7,)),
        ((7,), (), (7,)),
        ((3, 1), (7,), (3, 7)),
        ((7,), (3, 1), (3, 7)),
        ((2, 3, 1), (2, 1, 5), (2, 3, 5)),
        ((0, 1), (7,), (0, 7)),
        ((3, 1), (0,), (3, 0)),
        ((0,), (0,), (0,)),
    ],
)
def test_leading_shapes_of_boxes_broadcast(shape, other_shape, expected):
    rng = np.random.default_rng(0)
    boxes, others = random_boxes(rng, *shape, side=20), random_boxes(rng, *other_shape, side=20)
    iou = ssd.box_iou(boxes, others, extra=1.0)
    assert iou.shape == expected
    boxes, others = np.broadcast_to(boxes, (*expected, 4)), np.broadcast_to(others, (*expected, 4))
    for place in np.ndindex(*expected):
        assert iou[place] == reference.iou(boxes[place], others[place], extra=1.0)
