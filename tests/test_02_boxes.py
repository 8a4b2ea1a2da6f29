import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ssd_object_detection as ssd

coordinate = st.floats(-0.5, 1.5, width=32)
side = st.floats(2**-8, 1.5, width=32)
cxcywh = st.tuples(coordinate, coordinate, side, side)


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
    low = torch.from_numpy(rng.uniform(0, 0.6, (len(anchors), 2))).float()
    boxes = torch.cat((low, low + torch.from_numpy(rng.uniform(0.05, 0.4, (len(anchors), 2))).float()), dim=1)
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
