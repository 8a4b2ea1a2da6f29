import colorsys
import random

import albumentations as A
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ssd_object_detection as ssd

# A step alone that changes no geometry still stands in a pipeline that carries boxes.
pytestmark = pytest.mark.filterwarnings("ignore:Got processor for bboxes:UserWarning")

MEAN = [124, 116, 104]  # 255 times the ImageNet mean
BBOX = {"format": "albumentations", "label_fields": ["rows"], "clip": True, "filter_invalid_bboxes": True}
COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 10]], np.uint8)


@st.composite
def box_lists(draw, max_size=5):
    """Normalised boxes (G, 4) of at least 1/32 a side."""
    edges = st.lists(st.integers(0, 32), min_size=2, max_size=2, unique=True).map(sorted)
    pairs = draw(st.lists(st.tuples(edges, edges), max_size=max_size))
    return np.array([[x[0], y[0], x[1], y[1]] for x, y in pairs], dtype=np.float32).reshape(-1, 4) / 32


def run(transform, image, boxes, seed=0):
    """Apply a Compose or a single step with one generator for all; returns image, boxes, rows."""
    compose = transform
    if not isinstance(transform, A.Compose):
        compose = A.Compose([transform], bbox_params=A.BboxParams(**BBOX))
    rng = np.random.default_rng(seed)
    compose.set_random_state(rng, random.Random(seed))
    out = compose(image=image, bboxes=boxes, rows=np.arange(len(boxes)))
    rows = np.asarray(out["rows"], dtype=int).reshape(-1)
    return out["image"], np.asarray(out["bboxes"]).reshape(-1, 4), rows


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def coloured(height, width):
    """Return a grey image with a coloured rectangle in each quarter, and the boxes (4, 4) of these."""
    image, boxes = np.full((height, width, 3), 60, np.uint8), []
    for number, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        x1, x2 = (int((column / 2 + f) * width) for f in (0.1, 0.42 - 0.04 * number))
        y1, y2 = (int((row / 2 + f) * height) for f in (0.12, 0.4))
        image[y1:y2, x1:x2] = COLOURS[number]
        boxes.append([x1 / width, y1 / height, x2 / width, y2 / height])
    return image, np.array(boxes, np.float32)


def assert_colours(image, boxes, rows, extra=0):
    """Each box holds its own colour up to its border; just outside, unless the image ends, is another."""
    height, width = image.shape[:2]
    for (x1, y1, x2, y2), row in zip(boxes * [width, height, width, height], rows, strict=True):
        margin = 1.5 + extra
        top, left = int(np.ceil(y1 + margin)), int(np.ceil(x1 + margin))
        inside = image[top : int(y2 - margin), left : int(x2 - margin)]
        if inside.size:
            assert np.abs(inside.astype(int) - COLOURS[row]).max() <= 12
        cx, cy = int((x1 + x2) / 2), int((y1 + y2) / 2)
        outside = [(cx, y1 - margin - 2), (cx, y2 + margin + 1), (x1 - margin - 2, cy), (x2 + margin + 1, cy)]
        for x, y in outside:
            if 0 <= x < width and 0 <= y < height:
                assert np.abs(image[int(y), int(x)].astype(int) - COLOURS[row]).max() > 60


def assert_valid(boxes):
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def every_step():
    """The steps of the training pipeline, each sure to act."""
    steps = ssd.build_transform(train=True).transforms
    for step in steps:
        step.p = 1.0
    return {f"{number}_{type(step).__name__}": step for number, step in enumerate(steps)}


STEPS = every_step()


# -- Every step


@pytest.mark.parametrize(
    ("name", "color", "measure", "limit"),
    [
        ("4_RandomBrightnessContrast", (128, 128, 128), lambda p: p[0] - 128, 32),
        ("5_RandomBrightnessContrast", (100, 100, 100), lambda p: p[0] / 100 - 1, 0.5),
        ("6_ColorJitter", (150, 110, 110), lambda p: (p[0] - p[1]) / 40 - 1, 0.5),
        ("7_HueSaturationValue", (60, 200, 60), lambda p: 360 * colorsys.rgb_to_hsv(*p / 255)[0] - 120, 18),
    ],
)
def test_colours_change_as_much_as_in_the_paper(name, color, measure, limit):
    image = np.full((8, 8, 3), color, np.uint8)
    images = [run(STEPS[name], image, np.zeros((0, 4)), seed)[0] for seed in range(60)]
    found = [measure(one[0, 0].astype(float)) for one in images]
    assert -1.03 * limit <= min(found) < -0.8 * limit
    assert 0.8 * limit < max(found) <= 1.03 * limit


def alone(**chances):
    """Return the training pipeline with these probabilities, all others zero."""
    off = dict.fromkeys(("zoom_out", "crop", "color", "shadow", "noise", "blur"), 0.0)
    return ssd.build_transform(train=True, **off | chances)


def test_noise_is_that_of_a_camera_in_poor_light():
    transform, grey = alone(noise=1), np.full((300, 300, 3), 128, np.uint8)
    stds = [run(transform, grey, np.zeros((0, 4)), seed)[0].std() for seed in range(40)]
    assert 2.4 < min(stds) < 4
    assert 11 < max(stds) < 13.3


@pytest.mark.parametrize("name", ["color", "shadow", "noise", "blur"])
def test_colours_and_noise_are_as_strong_in_a_large_image_as_in_a_small_one(name):
    transform, boxes = alone(**{name: 1}), np.zeros((0, 4))
    for seed in range(4):
        small = run(transform, np.full((300, 300, 3), (90, 120, 160), np.uint8), boxes, seed)[0]
        large = run(transform, np.full((900, 900, 3), (90, 120, 160), np.uint8), boxes, seed)[0]
        np.testing.assert_array_equal(small, large)


def test_colours_change_the_canvas_around_an_image_too():
    transform, (image, _) = alone(zoom_out=1, color=1), coloured(150, 150)
    images = [run(transform, image, np.zeros((0, 4)), seed)[0] for seed in range(9)]
    corners = {tuple(image[row, column]) for image in images for row in (0, -1) for column in (0, -1)}
    assert len(corners) > 5  # the mean colour, brighter, darker, of another hue


@pytest.mark.parametrize("name", STEPS)
@settings(max_examples=12, deadline=None)
@given(boxes=box_lists(), seed=st.integers(0, 10**6))
def test_boxes_stay_valid_and_rows_known_through_every_step(name, boxes, seed):
    image, after, rows = run(STEPS[name], noise(48, 80, seed), boxes, seed)
    assert_valid(after)
    assert len(after) == len(rows) == len(set(rows.tolist()))
    assert set(rows.tolist()) <= set(range(len(boxes)))
    assert image.dtype == np.uint8
    assert image.ndim == 3
    if not name.endswith("SSDCrop"):  # the only step that may drop objects
        assert rows.tolist() == list(range(len(boxes)))


@settings(max_examples=60, deadline=None)
@given(boxes=box_lists(), seed=st.integers(0, 10**6), shape=st.sampled_from([(48, 80), (90, 31), (64, 64)]))
def test_boxes_stay_valid_through_the_whole_pipeline(boxes, seed, shape):
    image, after, rows = run(ssd.build_transform(train=True), noise(*shape, seed), boxes, seed)
    assert image.shape == (300, 300, 3)
    assert image.dtype == np.uint8
    assert_valid(after)
    assert len(after) == len(rows) == len(set(rows.tolist()))
    if len(boxes):
        assert len(after) >= 1  # a crop holds the centre of at least one object


@pytest.mark.parametrize("name", [*STEPS, "whole pipeline"])
def test_every_step_takes_an_image_without_objects(name):
    transform = STEPS.get(name, ssd.build_transform(train=True))
    for seed in range(10):
        image, boxes, rows = run(transform, noise(48, 80), np.zeros((0, 4), np.float32), seed)
        assert boxes.shape == (0, 4)
        assert rows.shape == (0,)
        assert image.size > 0


def test_colours_show_that_labels_stay_with_their_boxes_through_the_geometry():
    image, boxes = coloured(160, 240)
    transform = ssd.build_transform(train=True, color=0, shadow=0, noise=0, blur=0)
    kept = []
    for seed in range(60):
        out, after, rows = run(transform, image, boxes, seed)
        # Enlarged by up to 7, a border is as soft as a pixel was wide.
        assert_colours(out, after, rows, extra=6)
        kept.append(len(rows))
    assert set(kept) >= {1, 2, 4}


@pytest.fixture
def record(tmp_path):
    """The coloured image with labels, as a record of a data set."""
    image, boxes = coloured(160, 240)
    Image.fromarray(image).save(tmp_path / "a.png")
    boxes_px = boxes * np.array([240, 160] * 2, np.float32)
    labels = np.array([4, 2, 3, 1])
    return ssd.Record("a", str(tmp_path / "a.png"), 240, 160, boxes_px, labels, np.zeros(4, bool))


def test_a_data_set_gives_each_box_the_label_of_its_object(record):
    transform = ssd.build_transform(train=True, color=0, shadow=0, noise=0, blur=0)
    dataset = ssd.VocDataset([record], transform, ssd.make_anchors())
    kept = []
    for epoch in range(30):
        image, boxes, labels = dataset.augment(0, epoch)
        assert boxes.dtype == np.float32
        assert labels.dtype == np.int64
        assert_colours(image, boxes, [record.labels.tolist().index(k) for k in labels], extra=6)
        kept.append(len(labels))
    assert min(kept) < 4


def test_a_sample_is_the_augmented_image_with_its_targets(record):
    anchors = ssd.make_anchors()
    dataset = ssd.VocDataset([record], ssd.build_transform(train=True), anchors, seed=4)
    for epoch in range(5):
        image, boxes, gt_labels = dataset.augment(0, epoch)
        sample = dataset[0, epoch]
        assert sample.keys() == {"images", "matched_gt", "gt_boxes", "gt_labels", "indices"}
        assert sample["images"].dtype == torch.uint8
        assert sample["images"].is_contiguous()
        assert np.array_equal(sample["images"].permute(1, 2, 0).numpy(), image)
        count = len(record.labels)  # what a crop loses is filled up with zeros
        assert (sample["gt_boxes"].shape, sample["gt_labels"].shape) == ((count, 4), (count,))
        assert np.array_equal(sample["gt_boxes"][: len(boxes)], boxes)
        assert np.array_equal(sample["gt_labels"][: len(boxes)], gt_labels)
        assert not sample["gt_boxes"][len(boxes) :].any()
        assert not sample["gt_labels"][len(boxes) :].any()
        centre, size = anchors.numpy()[:, :2], anchors.numpy()[:, 2:]
        anchors_xyxy = np.concatenate((centre - size / 2, centre + size / 2), axis=1)
        assert np.array_equal(sample["matched_gt"], ssd.match_anchors(boxes, anchors_xyxy))
        assert sample["indices"] == 0


def test_photometric_steps_leave_boxes_as_they_are():
    boxes = np.array([[0.1, 0.2, 0.5, 0.75], [0, 0, 1, 1]], np.float32)
    for name, step in list(STEPS.items())[4:]:
        image = noise(300, 300)
        out, after, _ = run(step, image, boxes, 3)
        np.testing.assert_allclose(after, boxes, atol=1e-6, err_msg=name)
        assert not np.array_equal(out, image), name


# -- Flip


@settings(max_examples=50, deadline=None)
@given(boxes=box_lists())
def test_flipping_twice_is_the_identity(boxes):
    image, flip = noise(20, 33), A.HorizontalFlip(p=1)
    once, boxes_once, _ = run(flip, image, boxes)
    twice, boxes_twice, rows = run(flip, once, boxes_once)
    np.testing.assert_array_equal(twice, image)
    np.testing.assert_allclose(boxes_twice, boxes, atol=1e-6)
    assert rows.tolist() == list(range(len(boxes)))
    if len(boxes):
        np.testing.assert_allclose(boxes_once[:, 0], 1 - boxes[:, 2], atol=1e-6)


def test_pipeline_flips_half_of_the_images_with_their_boxes():
    image, boxes = coloured(100, 100)
    transform = ssd.build_transform(train=True, zoom_out=0, crop=0, color=0, shadow=0, noise=0, blur=0)
    flipped = 0
    for seed in range(60):
        _, after, _ = run(transform, image, boxes, seed)
        mirrored = boxes.copy()
        mirrored[:, [0, 2]] = 1 - boxes[:, [2, 0]]
        is_flipped = np.allclose(after, mirrored, atol=1e-5)
        assert is_flipped or np.allclose(after, boxes, atol=1e-5)
        flipped += is_flipped
    assert 15 < flipped < 45


# -- SSDCrop


def crop_params(boxes, shape, choice, seed, trials=50, min_scale=0.3):
    """The patch [x1, y1, x2, y2] that SSDCrop draws when its choice of rule is forced."""
    crop = ssd.SSDCrop(p=1)
    crop.min_scale, crop.trials = min_scale, trials
    source = random.Random(seed)
    source.choice = lambda options: choice
    crop.set_random_state(np.random.default_rng(seed), source)
    params = crop.get_params_dependent_on_data({"shape": (*shape, 3)}, {"bboxes": boxes})
    return np.asarray(params["patch"]).tolist()


def test_crop_rules_are_the_seven_of_the_paper_equally_likely():
    seen = []

    class Spy(random.Random):
        def choice(self, options):
            seen.append(tuple(options))
            return super().choice(options)

    crop = ssd.SSDCrop(p=1)
    crop.set_random_state(np.random.default_rng(0), Spy(0))
    crop.get_params_dependent_on_data({"shape": (50, 50, 3)}, {"bboxes": np.zeros((0, 4))})
    assert seen == [(None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)]


def test_crop_keeps_the_whole_image_on_none():
    for seed in range(20):
        assert crop_params(np.array([[0.1, 0.1, 0.3, 0.3]]), (60, 90), None, seed) == [0, 0, 90, 60]
        assert crop_params(np.zeros((0, 4)), (60, 90), None, seed) == [0, 0, 90, 60]


@pytest.mark.parametrize("min_iou", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_crop_enforces_overlap_centre_aspect_and_scale(min_iou):
    height, width = 120, 160
    boxes = np.array([[0.05, 0.1, 0.85, 0.95], [0.6, 0.6, 0.9, 0.8], [0.0, 0.0, 0.1, 0.1]])
    boxes_px, patches = boxes * [width, height, width, height], []
    for seed in range(80):
        patch = crop_params(boxes, (height, width), min_iou, seed, trials=200)
        if patch == [0, 0, width, height]:
            continue  # none of the trials fitted
        x1, y1, x2, y2 = patch
        patches.append(patch)
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert 0.3 * width - 1 <= x2 - x1
        assert 0.3 * height - 1 <= y2 - y1
        assert 0.5 <= (x2 - x1) / (y2 - y1) <= 2
        assert max(reference.iou(box, patch) for box in boxes_px.tolist()) >= min_iou
        centres = (boxes_px[:, :2] + boxes_px[:, 2:]) / 2
        assert any(x1 < cx < x2 and y1 < cy < y2 for cx, cy in centres)
    assert len(patches) > 5
    if min_iou <= 0.1:  # small and large patches, wide and tall ones all occur
        sides = np.array([[p[2] - p[0], p[3] - p[1]] for p in patches])
        assert (sides.min(axis=0) < [0.45 * width, 0.45 * height]).all()
        assert (sides.max(axis=0) > [0.85 * width, 0.85 * height]).all()


def test_overlap_is_asked_of_one_object_not_of_all():
    # Two distant objects: no patch can overlap both by .5, but one that fits the first is enough.
    boxes = np.array([[0.0, 0.0, 0.4, 0.4], [0.9, 0.9, 1.0, 1.0]])
    patches = [crop_params(boxes, (100, 100), 0.5, seed, trials=500) for seed in range(10)]
    assert any(p != [0, 0, 100, 100] for p in patches)


def test_crop_that_cannot_satisfy_its_rule_keeps_the_whole_image():
    # A patch of .3 of each side or more overlaps this speck by less than .1.
    for seed in range(10):
        assert crop_params(np.array([[0.5, 0.5, 0.51, 0.51]]), (100, 100), 0.1, seed) == [0, 0, 100, 100]


def test_crop_of_an_image_without_objects_takes_any_patch():
    patches = [crop_params(np.zeros((0, 4)), (100, 100), 0.9, seed) for seed in range(20)]
    assert sum(p != [0, 0, 100, 100] for p in patches) >= 15


def test_crop_keeps_objects_whose_centre_is_inside_and_clips_them():
    crop = ssd.SSDCrop(p=1)
    # In sixteenths: whole and inside; centre inside, cut; overlapping, centre outside; centre on the edge.
    boxes = np.array([[5, 5, 7, 8], [2, 6, 9, 12], [0, 5, 5, 8], [2, 5, 6, 8]], np.float32) / 16
    crop.get_params_dependent_on_data = lambda params, data: {"patch": np.array([32, 32, 96, 80])}
    image, after, rows = run(crop, noise(128, 128), boxes)
    np.testing.assert_array_equal(image, noise(128, 128)[32:80, 32:96])
    assert rows.tolist() == [0, 1]
    # In pixels of the patch: (8, 8, 24, 32) and (-16, 16, 40, 64) of 64x48.
    expected = [[8 / 64, 8 / 48, 24 / 64, 32 / 48], [0, 16 / 48, 40 / 64, 1]]
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_crop_moves_boxes_with_their_pixels():
    image, boxes = coloured(120, 200)
    sizes = set()
    for seed in range(40):
        out, after, rows = run(ssd.SSDCrop(p=1), image, boxes, seed)
        assert_colours(out, after, rows)
        sizes.add(out.shape[:2])
    assert len(sizes) > 10


# -- SSDZoomOut


@pytest.mark.parametrize("shape", [(120, 200), (333, 250), (500, 400)])
def test_zoom_out_moves_boxes_with_their_pixels(shape):
    image, boxes = coloured(*shape)
    for seed in range(15):
        out, after, rows = run(ssd.SSDZoomOut(p=1), image, boxes, seed)
        assert rows.tolist() == [0, 1, 2, 3]
        assert_colours(out, after, rows)


def test_zoom_out_fills_with_the_mean_colour_around_the_image():
    image = np.zeros((60, 90, 3), np.uint8)
    for seed in range(10):
        out, after, _ = run(ssd.SSDZoomOut(p=1), image, np.array([[0, 0, 1, 1]], np.float32), seed)
        height, width = out.shape[:2]
        x1, y1, x2, y2 = np.round(after[0] * [width, height, width, height]).astype(int)
        assert (x2 - x1, y2 - y1) == (90, 60)
        assert not out[y1:y2, x1:x2].any()
        around = np.ones((height, width), bool)
        around[y1:y2, x1:x2] = False
        assert (out[around] == MEAN).all()


def test_zoom_out_enlarges_the_canvas_up_to_its_limit():
    def shapes(transform, count):
        images = [run(transform, noise(30, 40), np.zeros((0, 4)), seed)[0] for seed in range(count)]
        return np.array([image.shape[:2] for image in images])

    ratios = shapes(ssd.SSDZoomOut(p=1), 100) / [30, 40]
    np.testing.assert_allclose(ratios[:, 0], ratios[:, 1], atol=0.05)  # the aspect ratio stays
    assert ratios.min() >= 1
    assert ratios.max() <= 4.02
    assert ratios.min() < 1.3
    assert ratios.max() > 3.7
    limited = ssd.SSDZoomOut(p=1)
    limited.max_ratio = 2
    largest = (shapes(limited, 50) / [30, 40]).max()
    assert 1.7 < largest <= 2


def test_zoom_out_places_the_image_anywhere_on_the_canvas():
    corners = []
    for seed in range(60):
        out, after, _ = run(ssd.SSDZoomOut(p=1), noise(40, 40), np.array([[0, 0, 1, 1]], np.float32), seed)
        free = np.array(out.shape[1::-1]) - 40
        if (free > 20).all():
            corners.append(np.round(after[0, :2] * out.shape[1::-1]) / free)
    corners = np.array(corners)
    assert (corners.min(axis=0) < 0.2).all()
    assert (corners.max(axis=0) > 0.8).all()
    assert abs(np.corrcoef(corners.T)[0, 1]) < 0.5


def test_zoom_out_canvas_has_at_most_twice_the_networks_resolution():
    whole = np.array([[0, 0, 1, 1]], np.float32)
    for seed in range(12):
        out, after, _ = run(ssd.SSDZoomOut(p=1), noise(500, 400), whole, seed)
        assert max(out.shape) <= 601
        side = (after[0, 2:] - after[0, :2]) * out.shape[1::-1]
        assert side[0] / side[1] == pytest.approx(0.8, abs=0.02)  # the image keeps its shape


# -- Shadow and noise


def test_shadow_is_that_of_albumentations():
    options = {"shadow_roi": (0, 0, 1, 1), "num_shadows_limit": (1, 2), "p": 1}
    options["shadow_intensity_range"] = (0.3, 0.6)
    image = noise(120, 90)
    for seed in range(10):
        ours = run(ssd.Shadow(**options), image, np.zeros((0, 4)), seed)[0]
        theirs = run(A.RandomShadow(**options), image, np.zeros((0, 4)), seed)[0]
        # Theirs cuts fractions off, twice where shadows overlap.
        assert np.abs(ours.astype(int) - theirs).max() <= 2
        assert (ours < image).mean() > 0.02


def test_noise_has_the_distribution_of_albumentations():
    image = np.full((300, 300, 3), 128, np.uint8)
    for std in (0.01, 0.03, 0.05):
        # Theirs cuts fractions off.
        for step, std_error, kurtosis_error in ((ssd.Noise, 0.05, 0.1), (A.GaussNoise, 0.5, 1)):
            out = run(step((std, std), p=1), image, np.zeros((0, 4)), 5)[0].astype(float) - 128
            assert abs(out.mean()) < 0.6
            assert out.std() == pytest.approx(255 * std, abs=std_error)
            assert abs((out**4).mean() / out.var() ** 2 - 3) < kurtosis_error  # of a Gaussian: 3
            assert abs(np.corrcoef(out[:, 1:].ravel(), out[:, :-1].ravel())[0, 1]) < 0.02
            assert abs(np.corrcoef(out[..., 0].ravel(), out[..., 1].ravel())[0, 1]) < 0.02


def test_noise_saturates_and_differs_from_image_to_image():
    stds = []
    for value in (0, 255):
        image = np.full((300, 300, 3), value, np.uint8)
        step = ssd.Noise((0.01, 0.05), p=1)
        out = [run(step, image, np.zeros((0, 4)), seed)[0].astype(int) for seed in range(20)]
        assert all(0.3 < (o == value).mean() < 0.7 for o in out)  # what would lie outside stays at the end
        stds += [np.abs(o - value).max() for o in out]
        assert not any(np.array_equal(out[0], o) for o in out[1:])
    assert min(stds) < 22
    assert max(stds) > 45


# -- Resize and evaluation


def test_evaluation_pipeline_only_resizes():
    image, boxes = coloured(150, 210)
    transform = ssd.build_transform(train=False)
    out, after, rows = run(transform, image, boxes)
    assert out.shape == (300, 300, 3)
    np.testing.assert_allclose(after, boxes, atol=1e-6)
    assert rows.tolist() == [0, 1, 2, 3]
    assert_colours(out, after, rows)
    np.testing.assert_array_equal(run(transform, image, boxes, seed=9)[0], out)


def test_resize_averages_areas_when_it_shrinks():
    # Stripes one pixel wide: sampling single pixels would give black or white, areas give their mean.
    image = np.zeros((600, 600, 3), np.uint8)
    image[:, ::2] = 200
    out = run(ssd.resize_transform(), image, np.zeros((0, 4)))[0]
    assert np.abs(out.astype(int) - 100).max() <= 1


def test_probability_zero_switches_a_step_off():
    image = noise(300, 300)
    off = dict.fromkeys(("zoom_out", "crop", "color", "shadow", "noise", "blur"), 0.0)
    for seed in range(10):
        out = run(ssd.build_transform(train=True, **off), image, np.zeros((0, 4)), seed)[0]
        assert np.array_equal(out, image) or np.array_equal(out, image[:, ::-1])


@pytest.mark.parametrize("name", ["zoom_out", "crop", "color", "shadow", "noise", "blur"])
def test_each_probability_switches_its_own_step_on(name):
    image = np.asarray(Image.fromarray(noise(20, 20)).resize((300, 300)))
    chances = {n: float(n == name) for n in ("zoom_out", "crop", "color", "shadow", "noise", "blur")}
    boxes = np.array([[0.3, 0.3, 0.7, 0.7]], np.float32)
    changed = [run(ssd.build_transform(train=True, **chances), image, boxes, seed)[0] for seed in range(4)]
    assert any(not np.array_equal(out, image) and not np.array_equal(out, image[:, ::-1]) for out in changed)
