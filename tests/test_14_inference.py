"""Inference: any image in, boxes in its own pixels out."""

import concurrent.futures
import itertools
import json
import sys
import threading

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import ssd_object_detection as ssd

EVERYTHING = {"score_thresh": 0.0, "max_detections": 50}  # a network trained for two epochs is sure of nothing


@pytest.fixture(scope="module")
def detector(tiny_run):
    return ssd.load_detector(tiny_run.final, device="cpu", precision="off")


@pytest.fixture(scope="module")
def picture(tiny_voc):
    with Image.open(tiny_voc / "JPEGImages" / "test_0.jpg") as image:
        return image.convert("RGB")


class Pointer(torch.nn.Module):
    """A network that finds one box of class 2, where the red channel is bright; in place of a trained one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("anchors", ssd.make_anchors())

    def forward(self, images):
        cls_logits = torch.zeros(len(images), len(self.anchors), 3)
        cls_logits[..., 0] = 20
        box_deltas = torch.zeros(len(images), len(self.anchors), 4)
        for i, image in enumerate(images):
            ys, xs = (image[0].float() - image[2].float() > 120).nonzero(as_tuple=True)
            if len(xs):
                box = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / ssd.IMAGE_SIZE
                cls_logits[i, 5000] = torch.tensor([0.0, 0.0, 12.0])
                box_deltas[i, 5000] = ssd.encode(box, self.anchors[5000])
        return cls_logits, box_deltas


@pytest.fixture
def pointer():
    return ssd.Detector(Pointer(), ("blue", "red"))


def red_box(size, box):
    """Return a black picture (width, height) with a red rectangle of edges x1, y1, x2, y2."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2], 0] = 255
    return Image.fromarray(pixels)


def assert_same(ours, theirs, atol=0.01):
    assert ours.labels == theirs.labels
    assert ours.names == theirs.names
    np.testing.assert_allclose(ours.boxes_px, theirs.boxes_px, atol=atol)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)


@pytest.mark.parametrize(("size", "box"), [((300, 300), (60, 90, 150, 240)), ((640, 200), (320, 20, 600, 120)),
                                           ((150, 900), (30, 90, 90, 450)), ((2000, 1500), (400, 300, 1200, 900))])
def test_boxes_are_in_the_pixels_of_the_original_picture(pointer, size, box):
    found = pointer.predict(red_box(size, box))
    assert (found.labels, found.names) == ([2], ["red"])
    assert found.scores[0] > 0.9
    np.testing.assert_allclose(found.boxes_px[0], box, atol=1.5 * max(1, max(size) / 300))


def test_a_photo_turned_by_its_exif_tag_has_boxes_in_the_upright_picture(pointer, tmp_path):
    upright = red_box((200, 400), (20, 40, 120, 140))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned right by a quarter: stored turned left
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    with Image.open(tmp_path / "turned.jpg") as stored:
        assert stored.size == (400, 200)
    np.testing.assert_allclose(pointer.predict(tmp_path / "turned.jpg").boxes_px[0], (20, 40, 120, 140), atol=3)


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
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(picture), picture.convert("RGBA")):
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
    found = detector.predict(Image.effect_noise(size, 80), **EVERYTHING)
    assert len(found) > 0
    assert (found.boxes_px >= 0).all()
    assert (found.boxes_px <= np.array(size * 2)).all()
    assert (found.boxes_px[:, 2:] > found.boxes_px[:, :2]).all()
    assert found.scores == sorted(found.scores, reverse=True)
    assert found.draw(Image.effect_noise(size, 80)).size == size


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


def test_a_detector_takes_the_thresholds_that_its_run_found_on_the_validation_list(tiny_run):
    saved = ssd.load_checkpoint(tiny_run.final)["score_thresh"]
    assert saved
    assert set(saved) <= {"angular", "round"}
    assert all(0 < value < 1 for value in saved.values())
    detector = ssd.load_detector(tiny_run.final, device="cpu", precision="off")
    assert detector.score_thresh == {name: saved.get(name, ssd.DRAW_SCORE_THRESH) for name in ("angular", "round")}
    found = detector.predict(tiny_run.data / "JPEGImages" / "val_0.jpg")
    everything = detector.predict(tiny_run.data / "JPEGImages" / "val_0.jpg", score_thresh=0.0, max_detections=99_999)
    kept = [s for s, n in zip(everything.scores, everything.names, strict=True) if s >= np.float32(saved.get(n, 0.4))]
    assert found.scores == kept[: ssd.MAX_DETECTIONS]
    assert len(found) != sum(s >= ssd.DRAW_SCORE_THRESH for s in everything.scores)  # what the default would give


def test_the_settings_reach_detection(detector, picture):
    assert len(detector.predict(picture, score_thresh=0.0, max_detections=7)) == 7
    assert len(detector.predict(picture, score_thresh=1.0)) == 0
    few = detector.predict(picture, score_thresh=0.0, nms_iou_thresh=0.05)
    many = detector.predict(picture, score_thresh=0.0, nms_iou_thresh=0.95)
    assert len(many) > len(few)
    best = detector.predict(picture, **EVERYTHING).scores
    assert detector.predict(picture, score_thresh=best[3], max_detections=50).scores == best[:4]


@pytest.mark.parametrize(("flips", "turn"), [("horizontal", "FLIP_LEFT_RIGHT"), ("both", "FLIP_TOP_BOTTOM")])
def test_with_flip_averaging_a_flipped_picture_gives_flipped_boxes(detector, picture, flips, turn):
    picture = picture.resize((300, 300))  # so that nothing is rounded otherwise in the flipped image
    flipped = picture.transpose(Image.Transpose[turn])
    plain = detector.predict(picture, **EVERYTHING)
    here, there = (detector.predict(p, flip_average=flips, **EVERYTHING) for p in (picture, flipped))
    assert here.scores[:10] == pytest.approx(there.scores[:10], abs=1e-4)
    assert here.scores[:10] != pytest.approx(plain.scores[:10], abs=1e-4)
    x1, y1, x2, y2 = here.boxes_px[:10].T
    back = (300 - x2, y1, 300 - x1, y2) if turn == "FLIP_LEFT_RIGHT" else (x1, 300 - y2, x2, 300 - y1)
    np.testing.assert_allclose(np.stack(back, 1), there.boxes_px[:10], atol=0.1)


def test_a_loaded_detector_is_the_averaged_network_in_evaluation_mode(tiny_run, detector):
    saved = torch.load(tiny_run.output / "checkpoints" / "best.pth", weights_only=True)
    assert detector.classes == ("angular", "round")
    assert not detector.model.training
    assert all(torch.equal(v, saved["model"][k]) for k, v in detector.model.state_dict().items())


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
    color = ssd.ImageDraw.ImageColor.getrgb(ssd.color_of(2))
    assert (drawn[y1 : y1 + 1, 150:250] == color).all()
    assert (drawn[200, x1] == color).all()


@pytest.mark.parametrize("wrong", [
    np.zeros((30, 30, 3), np.float32), torch.zeros(3, 30, 30), np.zeros((30, 30, 2), np.uint8), np.zeros(30, np.uint8),
    np.zeros((0, 30, 3), np.uint8), torch.zeros(30, 30, 5, dtype=torch.uint8), np.zeros((2, 30, 30, 3, 1), np.uint8),
])
def test_an_array_that_is_no_picture_is_refused(detector, wrong):
    with pytest.raises(ValueError, match="uint8"):
        detector.predict(wrong)


def test_arrays_and_tensors_of_every_kind_give_the_same_result(detector, picture):
    pixels = np.asarray(picture)
    tensor, expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1), detector.predict(picture, **EVERYTHING)
    deep = pixels.astype(np.uint16) * 257 - np.uint16(100) * (pixels > 0)  # 16 bits that are not twice the same 8
    for source in (tensor, deep, np.dstack((pixels, pixels[..., 0])), pixels[::-1][::-1]):
        assert_same(detector.predict(source, **EVERYTHING), expected)
    grey = np.asarray(picture.convert("L"))
    expected = detector.predict(picture.convert("L"), **EVERYTHING)
    for source in (grey[..., None], torch.from_numpy(grey.copy())[None], torch.from_numpy(grey.copy())):
        assert_same(detector.predict(source, **EVERYTHING), expected)


def test_an_array_or_tensor_of_four_dimensions_is_a_batch(pointer):
    pixels = np.stack([np.asarray(red_box((80, 60), box)) for box in ((10, 10, 50, 40), (20, 5, 70, 30))])
    for batch in (pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2), list(pixels), tuple(pixels)):
        first, second = pointer.predict(batch)
        np.testing.assert_allclose(first.boxes_px[0], (10, 10, 50, 40), atol=1)
        np.testing.assert_allclose(second.boxes_px[0], (20, 5, 70, 30), atol=1)
    assert len(pointer.predict(pixels[:1])) == 1


def test_an_opened_photo_is_turned_as_its_file_is_and_so_is_its_drawing(pointer, tmp_path):
    exif = ssd.Image.Exif()
    exif[0x0112] = 6
    turned = red_box((200, 400), (20, 40, 120, 140)).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        found = pointer.predict(opened)
        drawn = found.draw(opened)
    np.testing.assert_allclose(found.boxes_px[0], (20, 40, 120, 140), atol=2)
    assert drawn.size == found.draw(tmp_path / "turned.png").size == (200, 400)


def test_only_the_classes_asked_for_are_reported_and_counted(detector, picture):
    everything = detector.predict(picture, score_thresh=0.0, max_detections=10_000)
    assert set(everything.names) == {"angular", "round"}
    for name in ("angular", "round"):
        found = detector.predict(picture, classes=[name], score_thresh=0.0, max_detections=40)
        rows = [i for i, other in enumerate(everything.names) if other == name][:40]
        assert found.names == [name] * 40
        np.testing.assert_allclose(found.scores, [everything.scores[i] for i in rows], atol=1e-6)
        np.testing.assert_allclose(found.boxes_px, everything.boxes_px[rows], atol=0.01)
    with pytest.raises(ssd.InputError, match="no class dog: the model knows angular, round"):
        detector.predict(picture, classes=["round", "dog"])


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


def test_the_next_picture_is_opened_while_the_network_works(pointer, monkeypatch):
    opened, open_image, forward = threading.Event(), ssd.open_image, pointer.model.forward
    pictures = [red_box((50, 40), (5, 5, 30, 30)), red_box((60, 40), (5, 5, 30, 30))]

    def noticing(source):
        if source is pictures[1]:
            opened.set()
        return open_image(source)

    def waiting(images):
        assert opened.wait(30), "the second picture was not opened while the first was in the network"
        return forward(images)

    monkeypatch.setattr(ssd, "open_image", noticing)
    monkeypatch.setattr(pointer.model, "forward", waiting)
    assert [p.size for p, _ in pointer.stream(pictures, batch_size=1)] == [(50, 40), (60, 40)]


def test_ahead_keeps_the_order_and_its_distance():
    begun, release, drawn = [], threading.Event(), []

    def work(number):
        begun.append(number)
        if number == 0:
            release.wait(30)
        return number * number

    results = ssd.ahead(work, (drawn.append(n) or n for n in range(100)), threads=3, depth=5)
    release.set()
    assert next(results) == 0
    assert len(drawn) == 6  # never more than `depth` ahead of what was taken
    assert list(results) == [n * n for n in range(1, 100)]
    assert list(ssd.ahead(work, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(ssd.ahead(lambda n: 1 // n, [1, 0, 2]))


def test_an_unreadable_picture_in_a_stream_leaves_the_others_alone(pointer, tmp_path):
    good, bad = red_box((80, 60), (10, 10, 50, 40)), tmp_path / "none.png"
    for order in itertools.permutations((good, bad, bad, good)):
        for batch_size in (1, 2, 4):
            results = list(pointer.stream(order, batch_size=batch_size))
            assert [found is None for _, found in results] == [source is bad for source in order]
            assert all("none.png" in str(error) for error, found in results if found is None)
            assert all(found.names == ["red"] for _, found in results if found is not None)


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


def test_files_of_the_same_name_keep_pictures_of_their_own(pointer, tmp_path, capsys):
    boxes, paths = [(20, 10, 120, 60), (50, 50, 150, 90), (5, 5, 100, 50)], []
    for name, box in zip(("a/x.png", "b/x.png", "c/x_1.png"), boxes, strict=True):
        paths.append(tmp_path / name)
        paths[-1].parent.mkdir()
        red_box((200, 100), box).save(paths[-1])
    ssd.predict_files(pointer, paths, tmp_path / "out" / "deep", score_thresh=0.5)
    out = tmp_path / "out" / "deep"
    report = json.loads((out / "predictions.json").read_text())
    assert list(report) == [str(p) for p in paths]
    drawn = {p.read_bytes() for p in out.glob("*.png")}
    assert len(drawn) == 3
    printed = capsys.readouterr().out.splitlines()
    for path, box, line in zip(paths, boxes, printed, strict=True):
        np.testing.assert_allclose(report[str(path)]["boxes_px"][0], box, atol=2)
        assert line.startswith(f"{path}: red ")
        picture = line.split(" -> ")[1]
        with Image.open(picture) as image:
            x, y = round(report[str(path)]["boxes_px"][0][0]), (box[1] + box[3]) // 2 + 15
            assert image.convert("RGB").getpixel((x, y)) == ssd.ImageDraw.ImageColor.getrgb(ssd.color_of(2))


def test_a_file_without_a_detection_is_reported_as_such(pointer, tmp_path, capsys):
    Image.new("RGB", (30, 30)).save(tmp_path / "dark.png")
    ssd.predict_files(pointer, [tmp_path / "dark.png"], tmp_path / "out")
    assert "nothing found" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())[str(tmp_path / "dark.png")]["labels"] == []


# ---- files ----


def test_folders_globs_and_files_name_inputs_once_and_in_order(tmp_path):
    for name in ("b.JPG", "a.png", "c.mp4", "notes.txt", "deep/d.webp", "[x].png", "odd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    def names(*arguments):
        return [p.relative_to(tmp_path).as_posix() for p in ssd.find_inputs(arguments)]

    assert names(str(tmp_path)) == ["[x].png", "a.png", "b.JPG", "c.mp4"]
    assert names(f"{tmp_path}/*") == ["[x].png", "a.png", "b.JPG", "c.mp4"]
    assert names(f"{tmp_path}/**/*.webp") == ["deep/d.webp"]
    assert names(tmp_path / "odd", f"{tmp_path}/a.*", tmp_path / "a.png") == ["odd", "a.png"]
    assert names(tmp_path / "[x].png") == ["[x].png"]
    (tmp_path / "empty").mkdir()
    for argument, message in (("empty", "no image or video in this folder"), ("none.png", "no such file"),
                              ("*.bmp", "no such file")):
        with pytest.raises(ssd.InputError, match=message) as caught:
            ssd.find_inputs([tmp_path / "a.png", tmp_path / argument])
        assert argument in str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_go_back_to_the_pixels_of_a_turned_file(tmp_path, orientation):
    stored, box = (70, 40), (8, 5, 30, 21)
    exif = Image.Exif()
    exif[0x0112] = orientation
    red_box(stored, box).save(tmp_path / "a.png", exif=exif)
    upright = ssd.open_image(tmp_path / "a.png")
    ys, xs = np.nonzero(np.asarray(upright)[..., 0])
    seen = np.array([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]] * 2, dtype=np.float32)
    np.testing.assert_array_equal(ssd.boxes_as_stored(seen, upright.size, orientation), [box, box])
    assert ssd.boxes_as_stored(np.zeros((0, 4), np.float32), upright.size, orientation).shape == (0, 4)


def test_annotations_of_a_prediction_are_read_by_the_data_section(pointer, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    (tmp_path / "JPEGImages").mkdir()
    boxes = {"a": (20, 10, 120, 60), "turned": (30, 40, 90, 80)}
    for name, box in boxes.items():
        more = {"exif": exif} if name == "turned" else {}
        red_box((200, 100), box).save(tmp_path / "JPEGImages" / f"{name}.png", **more)
    assert ssd.predict_files(pointer, (tmp_path / "JPEGImages").iterdir(), tmp_path, save_xml=True) == []
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nturned\n")
    data = ssd.load_data(str(tmp_path), val_fraction=0)
    assert data.classes == ("red",)
    assert data.notes == []
    for record in data.train:
        assert (record.width, record.height) == (200, 100)
        np.testing.assert_allclose(record.boxes_px, [boxes[record.image_id]], atol=2)
        assert ssd.VocDataset([record], ssd.build_transform(train=False))[0]["boxes"].shape == (1, 4)


def test_crops_are_the_objects_at_full_resolution(pointer, tmp_path):
    pointer.classes = ("blue", "red/brown")
    red_box((900, 600), (300, 150, 750, 450)).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    Image.new("RGB", (30, 30)).save(tmp_path / "b.png")
    ssd.predict_files(pointer, [tmp_path / "a.jpg", tmp_path / "b.png"], tmp_path / "out", save_crops=True)
    (crop,) = (tmp_path / "out" / "crops").rglob("*.png")
    assert crop.relative_to(tmp_path / "out").as_posix() == "crops/red_brown/a_0.png"
    with Image.open(crop) as image:
        assert abs(image.width - 450) < 8
        assert abs(image.height - 300) < 8
        assert image.getpixel((image.width // 2, image.height // 2))[0] > 200


def test_photos_stay_jpeg_and_others_become_png(pointer, tmp_path):
    names = ("a.jpg", "b.JPEG", "c.png", "d.bmp", "e.webp", "f.tif")
    for name in names:
        red_box((60, 40), (5, 5, 30, 30)).save(tmp_path / name)
    assert ssd.predict_files(pointer, [tmp_path / n for n in names], tmp_path / "out") == []
    kinds = {p.name: Image.open(p).format for p in (tmp_path / "out").iterdir() if p.suffix != ".json"}
    assert kinds == {"a.jpg": "JPEG", "b.jpg": "JPEG", "c.png": "PNG", "d.png": "PNG", "e.png": "PNG", "f.png": "PNG"}


def test_unreadable_files_are_returned_and_the_others_done(pointer, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    (tmp_path / "broken.mp4").write_text("no video")
    red_box((60, 40), (5, 5, 30, 30)).save(tmp_path / "good.png")
    paths = [tmp_path / name for name in ("broken.mp4", "broken.jpg", "good.png")]
    problems = ssd.predict_files(pointer, paths, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good.png", "predictions.json"]
    assert list(json.loads((tmp_path / "out" / "predictions.json").read_text())) == [str(tmp_path / "good.png")]
    assert ["broken.jpg" in problems[0], "broken.mp4" in problems[1], len(problems)] == [True, True, 2]
    assert all("\n" not in problem for problem in problems)


def test_sources_where_the_results_go_are_left_alone(pointer, tmp_path):
    red_box((60, 40), (5, 5, 30, 30)).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ssd.InputError, match="--output-dir"):
        ssd.predict_files(pointer, [tmp_path / "a.png"], tmp_path / "." / "")
    assert (tmp_path / "a.png").read_bytes() == before


def write_video(path, boxes, size=(160, 120), fps=10):
    """Write a Motion JPEG video with a red rectangle in each frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, size)
    assert writer.isOpened()
    for box in boxes:
        writer.write(np.asarray(red_box(size, box))[..., ::-1])
    writer.release()


def test_a_video_is_drawn_frame_by_frame(pointer, tmp_path):
    boxes = [(5 + 2 * i, 20, 55 + 2 * i, 80) for i in range(40)]
    write_video(tmp_path / "moving.avi", boxes)
    assert ssd.predict_files(pointer, [tmp_path / "moving.avi"], tmp_path / "out", batch_size=3) == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["moving.mp4", "predictions.json"]
    (report,) = json.loads((tmp_path / "out" / "predictions.json").read_text()).values()
    assert report["fps"] == 10
    assert len(report["frames"]) == 40
    for frame, box in zip(report["frames"], boxes, strict=True):
        np.testing.assert_allclose(frame["boxes_px"][0], box, atol=3)
    video, count = cv2.VideoCapture(str(tmp_path / "out" / "moving.mp4")), 0
    while (read := video.read())[0]:
        assert read[1].shape == (120, 160, 3)
        count += 1
    assert (count, video.get(cv2.CAP_PROP_FPS)) == (40, 10)


def test_a_video_that_breaks_off_is_a_problem_and_leaves_no_file(pointer, tmp_path):
    write_video(tmp_path / "cut.avi", [(5, 20, 55, 80)] * 40)
    content = (tmp_path / "cut.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    (problem,) = ssd.predict_files(pointer, [tmp_path / "cut.avi"], tmp_path / "out")
    assert "cut.avi" in problem
    assert "of 40 frames" in problem
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.json"]


def test_an_interrupted_prediction_keeps_what_was_found(pointer, tmp_path, monkeypatch):
    red_box((60, 40), (5, 5, 30, 30)).save(tmp_path / "a.png")
    write_video(tmp_path / "b.avi", [(5, 20, 55, 80)] * 3)

    def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(ssd, "predict_video", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ssd.predict_files(pointer, [tmp_path / "a.png", tmp_path / "b.avi"], tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "predictions.json").read_text())) == [str(tmp_path / "a.png")]


# ---- published models; tests/test_tools_export.py has the round trip ----


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ssd.InputError, match=r"^reading x needs the package safetensors: pip install safetensors$"):
        ssd.optional_import("safetensors.torch", "reading x")


@pytest.mark.parametrize(("files", "message"), [
    ({}, r"lacks config\.json and model\.safetensors"), ({"config.json": "{}"}, r"lacks model\.safetensors"),
    ({"config.json": "{", "model.safetensors": "x"}, "not a model of this module"),
    ({"config.json": "{}", "model.safetensors": "x"}, "not a model of this module"),
])
def test_a_folder_that_is_no_model_is_one_line(tmp_path, files, message):
    pytest.importorskip("safetensors")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ssd.InputError, match=message) as caught:
        ssd.load_detector(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["checkpoints/none.pth", "none.pth", "deep/er/none", "none"])
def test_a_missing_file_is_not_looked_for_on_the_network(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ssd.InputError, match="no such file"):
        ssd.load_detector(missing)
