"""Inference: any image in, boxes in its own pixels out."""

import concurrent.futures
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from reference import Pointer, red_box

import ssd_object_detection as ssd

EVERYTHING = {"score_thresh": 0.0, "max_detections": 50}  # two epochs make a network sure of nothing


@pytest.fixture(scope="module")
def detector(tiny_run):
    return ssd.load_detector(tiny_run.final, device="cpu", precision="off")


@pytest.fixture(scope="module")
def picture(tiny_voc):
    with Image.open(tiny_voc / "JPEGImages" / "test_0.jpg") as image:
        return image.convert("RGB")


@pytest.fixture
def pointer():
    return ssd.Detector(Pointer(), ("blue", "red"))


def assert_same(ours, theirs, atol=0.01):
    assert ours.labels == theirs.labels
    assert ours.names == theirs.names
    np.testing.assert_allclose(ours.boxes_px, theirs.boxes_px, atol=atol)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((300, 300), (60, 90, 150, 240)),
        ((640, 200), (320, 20, 600, 120)),
        ((150, 900), (30, 90, 90, 450)),
        ((2000, 1500), (400, 300, 1200, 900)),
    ],
)
def test_boxes_are_in_the_pixels_of_the_original_picture(pointer, size, box):
    found = pointer.predict(red_box(size, box))
    assert (found.labels, found.names) == ([2], ["red"])
    assert found.scores[0] > 0.9
    np.testing.assert_allclose(found.boxes_px[0], box, atol=1.5 * max(1, max(size) / 300))


def test_a_photo_turned_by_its_exif_tag_has_boxes_in_the_upright_picture(pointer, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned right by a quarter: stored turned left
    path = tmp_path / "turned.png"
    red_box((200, 400), (20, 40, 120, 140)).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    with Image.open(path) as opened:
        assert opened.size == (400, 200)
        for source in (path, opened):
            found = pointer.predict(source)
            np.testing.assert_allclose(found.boxes_px[0], (20, 40, 120, 140), atol=2)
            assert found.draw(source).size == (200, 400)


def test_a_box_at_the_border_ends_there(pointer):
    (box,) = pointer.predict(red_box((500, 400), (0, 0, 500, 400))).boxes_px
    np.testing.assert_allclose(box, (0, 0, 500, 400), atol=1e-3)
    assert box[2] <= 500
    assert box[3] <= 400


def test_nothing_found_is_an_empty_result(pointer):
    found = pointer.predict(Image.new("RGB", (40, 30)))
    assert len(found) == 0
    assert found.boxes_px.shape == (0, 4)
    assert found.to_dict() == {"boxes_px": [], "labels": [], "names": [], "scores": []}
    assert not np.asarray(found.draw(Image.new("RGB", (40, 30)))).any()


def test_path_picture_and_array_give_the_same_result(detector, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    expected = detector.predict(picture, **EVERYTHING)
    assert len(expected) == 50
    pixels = np.asarray(picture)
    for source in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        pixels,
        np.dstack((pixels, pixels[..., 0])),
        pixels[::-1][::-1],
        picture.convert("RGBA"),
    ):
        assert_same(detector.predict(source, **EVERYTHING), expected)


def test_grey_pictures_of_every_kind_give_the_same_result(detector, picture, tmp_path):
    grey = picture.convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "16 bit.png")
    with Image.open(tmp_path / "16 bit.png") as image:
        assert image.mode.startswith("I")
    expected = detector.predict(grey.convert("RGB"), **EVERYTHING)
    for source in (grey, np.asarray(grey), grey.convert("LA"), tmp_path / "16 bit.png"):
        assert_same(detector.predict(source, **EVERYTHING), expected)


def test_a_palette_picture_is_read_in_its_colours(pointer, tmp_path):
    red_box((200, 100), (20, 10, 120, 60)).quantize(4).save(tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.mode == "P"
    found = pointer.predict([tmp_path / "a.gif", red_box((200, 100), (20, 10, 120, 60)).quantize(4)])
    for one in found:
        np.testing.assert_allclose(one.boxes_px[0], (20, 10, 120, 60), atol=2)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (700, 2), (301, 299)])
def test_boxes_stay_inside_pictures_of_any_size(detector, size):
    noise = Image.effect_noise(size, 80)
    found = detector.predict(noise, **EVERYTHING)
    assert len(found) > 0
    assert (found.boxes_px >= 0).all()
    assert (found.boxes_px <= np.array(size * 2)).all()
    assert (found.boxes_px[:, 2:] > found.boxes_px[:, :2]).all()
    assert found.scores == sorted(found.scores, reverse=True)
    assert found.draw(noise).size == size


def test_an_empty_list_gives_an_empty_list(detector):
    assert detector.predict([]) == []


def test_a_list_gives_a_list_in_its_order_whatever_the_batch_size(detector, tiny_voc):
    paths = sorted((tiny_voc / "JPEGImages").glob("t*_*.jpg"))[:5]
    single = [detector.predict(path, **EVERYTHING) for path in paths]
    assert isinstance(single[0], ssd.Detections)
    for batch_size in (1, 2, 16):
        batched = detector.predict(paths, batch_size=batch_size, **EVERYTHING)
        assert len(batched) == len(paths)
        for ours, theirs in zip(batched, single, strict=True):
            assert_same(ours, theirs)
    assert not np.allclose(single[0].boxes_px, single[1].boxes_px)


def test_each_class_has_its_own_threshold_unless_one_is_given():
    picture = red_box((90, 90), (9, 9, 60, 60))
    detector = ssd.Detector(Pointer(), ("blue", "red"), None, {"red": 0.0003})
    assert detector.score_thresh == {"blue": ssd.DRAW_SCORE_THRESH, "red": 0.0003}
    assert detector.predict(picture).names == ["red"]  # its score is 1 / (1 + 2 exp(-12)), far above
    detector.score_thresh["red"] = 1.0
    assert len(detector.predict(picture)) == 0
    assert detector.predict(picture, score_thresh=0.5).names == ["red"]


def test_a_detector_takes_the_thresholds_that_its_run_found_on_the_validation_list(tiny_run, detector):
    saved = ssd.load_checkpoint(tiny_run.final)["score_thresh"]
    assert saved
    assert set(saved) <= {"angular", "round"}
    assert all(0 < value < 1 for value in saved.values())
    assert detector.score_thresh == dict.fromkeys(("angular", "round"), ssd.DRAW_SCORE_THRESH) | saved
    image = tiny_run.data / "JPEGImages" / "val_0.jpg"
    found = detector.predict(image)
    everything = detector.predict(image, score_thresh=0.0, max_detections=99_999)
    pairs = zip(everything.scores, everything.names, strict=True)
    kept = [score for score, name in pairs if score >= np.float32(saved.get(name, ssd.DRAW_SCORE_THRESH))]
    assert found.scores == kept[: ssd.MAX_DETECTIONS]
    assert len(found) != sum(s >= ssd.DRAW_SCORE_THRESH for s in everything.scores)  # what the default gives


def test_the_settings_reach_detection(detector, picture):
    assert len(detector.predict(picture, score_thresh=0.0, max_detections=7)) == 7
    assert len(detector.predict(picture, score_thresh=1.0)) == 0
    few = detector.predict(picture, score_thresh=0.0, nms_iou_thresh=0.05)
    many = detector.predict(picture, score_thresh=0.0, nms_iou_thresh=0.95)
    assert len(many) > len(few)
    best = detector.predict(picture, **EVERYTHING).scores
    assert detector.predict(picture, score_thresh=best[3], max_detections=50).scores == best[:4]


def test_a_loaded_detector_is_the_averaged_network_in_evaluation_mode(tiny_run, detector):
    saved = torch.load(tiny_run.output / "checkpoints" / "best.pth", weights_only=True)
    assert detector.classes == ("angular", "round")
    assert not detector.model.training
    assert all(torch.equal(v, saved["model"][k]) for k, v in detector.model.state_dict().items())


def test_a_subclass_may_change_what_the_network_s_outputs_are(detector, picture):
    class Flipping(ssd.Detector):
        def forward(self, images):
            return self.model(images.flip(3))

    flipping = Flipping(detector.model, detector.classes)
    turned = picture.resize((300, 300)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    expected = detector.predict(picture.resize((300, 300)), **EVERYTHING)
    assert_same(flipping.predict(turned, **EVERYTHING), expected)


def test_a_result_is_ready_for_json(pointer):
    found = pointer.predict(red_box((200, 100), (20, 10, 120, 60)))
    content = json.loads(json.dumps(found.to_dict()))
    assert content["labels"] == [2]
    assert content["names"] == ["red"]
    np.testing.assert_allclose(content["boxes_px"][0], found.boxes_px[0], atol=0.01)
    np.testing.assert_allclose(content["scores"], found.scores, atol=1e-4)


def test_drawing_marks_the_box_on_a_copy(pointer):
    picture = red_box((400, 400), (100, 100, 300, 300))
    before = picture.tobytes()
    drawn = np.asarray(pointer.predict(picture).draw(picture))
    assert picture.tobytes() == before
    x1, y1, _, _ = np.round(pointer.predict(picture).boxes_px[0]).astype(int)
    color = ImageColor.getrgb(ssd.color_of(2))
    assert (drawn[y1 : y1 + 1, 150:250] == color).all()
    assert (drawn[200, x1] == color).all()


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((30, 30, 3), np.float32), np.zeros((30, 30, 5), np.uint8), np.zeros((2, 30, 30, 3), np.uint8)],
)
def test_an_array_that_is_no_picture_is_refused(detector, wrong):
    with pytest.raises(TypeError):
        detector.predict(wrong)


def test_threads_may_share_a_detector(detector, tiny_voc):
    paths = sorted((tiny_voc / "JPEGImages").glob("*.jpg"))[:6]
    expected = [detector.predict(path, **EVERYTHING) for path in paths]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(lambda p: detector.predict(p, **EVERYTHING), paths * 3)):
            assert_same(found, expected[number % len(paths)])


def test_a_prediction_leaves_no_gradient_and_keeps_the_generators(detector, picture):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    detector.predict(picture)
    assert all(p.grad is None for p in detector.model.parameters())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\xff\xd8\xff\xe0" + bytes(50)])
def test_a_missing_or_broken_picture_is_one_line_that_names_the_file(detector, tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ssd.InputError, match=r"broken\.jpg") as caught:
        detector.predict([path])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_picture_cut_short_is_one_line_that_names_the_file(detector, picture, tmp_path, ending):
    path = tmp_path / f"cut.{ending}"
    picture.save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ssd.InputError, match="cut"):
        detector.predict(path)


def test_a_folder_in_place_of_a_picture_is_one_line_that_names_it(detector, tmp_path):
    with pytest.raises(ssd.InputError, match=tmp_path.name):
        detector.predict(tmp_path)


def test_supervision_gets_the_same_objects():
    supervision = pytest.importorskip("supervision")
    boxes = np.array([[1, 2, 30, 40], [5, 6, 7, 8]], np.float32)
    given = ssd.Detections(boxes, [2, 1], ["dog", "cat"], [0.9, 0.5]).to_supervision()
    assert isinstance(given, supervision.Detections)
    assert given.xyxy.tolist() == boxes.tolist()
    assert (given.confidence.tolist(), given.class_id.tolist()) == ([0.9, 0.5], [2, 1])
    assert given.data["class_name"].tolist() == ["dog", "cat"]
    assert len(ssd.Detections(np.zeros((0, 4), np.float32), [], [], []).to_supervision()) == 0


@pytest.mark.parametrize("name", ["none.pth", "deep/er/none", "none"])
def test_a_missing_checkpoint_is_one_line(tmp_path, name):
    with pytest.raises(ssd.InputError, match="no such file"):
        ssd.load_detector(tmp_path / name)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5], [1.0, 0.25]], np.float32), [[0, 128], [255, 64]]),
        (np.array([[0, 257], [65535, 2570]], np.int32), [[0, 1], [255, 10]]),
    ],
)
def test_grey_images_of_floats_and_of_32_bits_are_scaled(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(ssd.open_image(tmp_path / "a.tif"))[..., 0].tolist() == expected


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0.0, 37.5]], np.float32),
        np.array([[-1.0, 0.5]], np.float32),
        np.array([[np.nan, 0.5]], np.float32),
        np.array([[0, 2**24]], np.int32),
    ],
)
def test_grey_images_of_an_unknown_range_are_refused_by_name(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ssd.InputError, match=r"a\.tif: its grey values"):
        ssd.open_image(tmp_path / "a.tif")
