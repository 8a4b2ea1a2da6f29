import math

import pytest
import torch

import ssd_object_detection as ssd

COUNTS = (5476, 1944, 1944, 486, 100, 16)  # 37*37*4, 18*18*6, 18*18*6, 9*9*6, 5*5*4, 2*2*4
FIRST = (0, 5476, 7420, 9364, 9850, 9950)  # row of each map's first anchor


@pytest.fixture(scope="module")
def anchors():
    return ssd.make_anchors()


def test_there_are_9966_anchors_of_float32(anchors):
    assert anchors.shape == (9966, 4)
    assert anchors.dtype == torch.float32
    assert sum(COUNTS) == 9966


def test_each_map_has_its_count_and_its_scale(anchors):
    # The first anchor of every cell is the square of the map's scale.
    scales, counts_per_cell = (0.1, 0.2, 0.37, 0.54, 0.71, 0.88), (4, 6, 6, 6, 4, 4)
    for start, count, scale, per_cell in zip(FIRST, COUNTS, scales, counts_per_cell, strict=True):
        squares = anchors[start : start + count : per_cell, 2:]
        torch.testing.assert_close(squares, torch.full_like(squares, scale))


def test_first_cell_has_hand_computed_anchors(anchors):
    centre = 6 / 300  # 37 centres 8 pixels apart span 288: 6 pixels stay free on either side
    sizes = [(0.1, 0.1), (0.1414214, 0.1414214), (0.1414214, 0.0707107), (0.0707107, 0.1414214)]
    expected = torch.tensor([[centre, centre, w, h] for w, h in sizes])
    torch.testing.assert_close(anchors[:4], expected, rtol=0, atol=1e-6)


def test_first_cell_of_the_second_map_has_ratios_two_and_three(anchors):
    centre = 14 / 300  # 18 centres 16 pixels apart span 272
    sizes = [
        (0.2, 0.2),
        (0.2720294, 0.2720294),  # sqrt(.2 * .37)
        (0.2828427, 0.1414214),
        (0.1414214, 0.2828427),
        (0.3464102, 0.1154701),
        (0.1154701, 0.3464102),
    ]
    expected = torch.tensor([[centre, centre, w, h] for w, h in sizes])
    torch.testing.assert_close(anchors[5476:5482], expected, rtol=0, atol=1e-6)


def test_last_anchor_is_the_tall_one_of_the_last_cell(anchors):
    expected = torch.tensor([214 / 300, 214 / 300, 0.6222540, 1.2445079])  # .88 / sqrt(2), .88 * sqrt(2)
    torch.testing.assert_close(anchors[-1], expected, rtol=0, atol=1e-6)


def test_last_map_takes_its_geometric_mean_with_1_05(anchors):
    assert anchors[-3, 2].item() == pytest.approx(math.sqrt(0.88 * 1.05), abs=1e-6)


MAPS = [  # first row, cells a side, anchors a cell, first centre and stride in pixels
    (0, 37, 4, 6, 8),
    (5476, 18, 6, 14, 16),
    (7420, 18, 6, 14, 16),
    (9364, 9, 6, 22, 32),
    (9850, 5, 4, 22, 64),
    (9950, 2, 4, 86, 128),
]


@pytest.mark.parametrize(("start", "cells", "per_cell", "first", "stride"), MAPS)
def test_cells_go_row_by_row_from_the_top_left(anchors, start, cells, per_cell, first, stride):
    centres = anchors[start : start + cells * cells * per_cell, :2].view(cells, cells, per_cell, 2)
    for row, column in ((0, 0), (0, cells - 1), (cells - 1, 0), (cells // 2, 1)):
        expected = torch.tensor([first + column * stride, first + row * stride]) / 300
        torch.testing.assert_close(centres[row, column], expected.expand(per_cell, 2))


@pytest.mark.parametrize("index", range(4))  # the two coarsest maps are all border
def test_neighbouring_centres_are_as_far_apart_as_what_the_cells_see(index):
    # A bright line moved by one stride moves the map by one cell.
    torch.manual_seed(0)
    model = ssd.SSD300(1, width=0.0625).eval()
    _, cells, _, _, stride = MAPS[index]

    def seen(x):
        images = torch.zeros(2, 3, 300, 300)
        images[0, :, :, x : x + 2] = 40.0
        with torch.no_grad():
            drawn, blank = model.feature_maps(images)[index]
        return (drawn - blank)[:, cells // 2]

    here, there = seen(140 - stride // 2), seen(140 + stride // 2)
    middle = cells // 2
    assert here[:, middle].abs().max() > 0
    moved = there[:, middle : middle + 2]
    torch.testing.assert_close(here[:, middle - 1 : middle + 1], moved, rtol=1e-3, atol=1e-5)


def test_ratios_are_width_by_height_and_keep_the_area(anchors):
    width, height = anchors[:, 2], anchors[:, 3]
    ratios = (width / height).view(-1)[5476:5482]
    torch.testing.assert_close(ratios, torch.tensor([1, 1, 2, 1 / 2, 3, 1 / 3]))
    area = width * height
    torch.testing.assert_close(area[5478:5482], area[5476].expand(4))


def test_no_anchor_occurs_twice(anchors):
    assert len(torch.unique(anchors, dim=0)) == 9966


def test_anchors_reach_beyond_the_image_by_default(anchors):
    low, high = anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2
    assert low.min() < -0.3
    assert high.max() > 1.3


def test_given_sizes_stand_on_the_same_grid(anchors):
    sizes = ([(0.05, 0.09)], [(0.2, 0.1), (0.1, 0.3)], *ssd.ANCHOR_SIZES[2:])
    given = ssd.make_anchors(sizes)
    first, second = 37 * 37, 18 * 18 * 2
    assert len(given) == first + second + 9966 - COUNTS[0] - COUNTS[1]
    assert torch.equal(given[:first, :2], anchors[: COUNTS[0] : 4, :2])
    assert torch.equal(given[:first, 2:], torch.tensor([0.05, 0.09]).expand(first, 2))
    assert torch.equal(given[first : first + second, 2:].view(-1, 2, 2)[100], torch.tensor(sizes[1]))
    assert torch.equal(given[first + second :], anchors[FIRST[2] :])


def test_another_number_of_maps_is_a_value_error():
    with pytest.raises(ValueError, match="zip"):
        ssd.make_anchors(ssd.ANCHOR_SIZES[:5])
