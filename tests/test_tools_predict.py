"""ssd_tools/predict.py: files, videos, cameras, streams; drawn copies, crops, annotations, averaged flips."""

import contextlib
import csv
import functools
import http.server
import io
import itertools
import json
import shutil
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pycocotools.coco
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor
from reference import Pointer, red_box

import ssd_object_detection as ssd
from ssd_tools import predict

EVERYTHING = {"score_thresh": 0.0, "max_detections": 50}  # after two epochs a network is sure of nothing
ORIENTATION = 0x0112  # the EXIF tag


@pytest.fixture
def pointer():
    return predict.FlipDetector(Pointer(), ("blue", "red"))


def turned(orientation):
    """Return EXIF data of an orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def predictions_in(folder):
    """Return the content of a folder's predictions.json."""
    return json.loads((folder / "predictions.json").read_text(encoding="utf-8"))


# ---- the network ----


@pytest.mark.parametrize(("flips", "turn"), [("horizontal", "FLIP_LEFT_RIGHT"), ("both", "FLIP_TOP_BOTTOM")])
def test_with_flip_averaging_a_flipped_image_gives_flipped_boxes(tiny_run, flips, turn):
    checkpoint = ssd.load_checkpoint(tiny_run.final)
    detector = predict.FlipDetector(ssd.model_from_checkpoint(checkpoint), checkpoint["classes"])
    image = ssd.open_image(tiny_run.data / "JPEGImages" / "test_0.jpg").resize((300, 300))
    flipped = image.transpose(Image.Transpose[turn])
    plain = detector.predict(image, **EVERYTHING)
    module = ssd.Detector(detector.model, detector.classes)
    assert plain.to_dict() == module.predict(image, **EVERYTHING).to_dict()
    detector.flips = predict.FLIPS[flips]
    here, there = detector.predict(image, **EVERYTHING), detector.predict(flipped, **EVERYTHING)
    assert here.scores[:10] == pytest.approx(there.scores[:10], abs=1e-4)
    assert here.scores[:10] != pytest.approx(plain.scores[:10], abs=1e-4)
    x1, y1, x2, y2 = here.boxes_px[:10].T
    back = (300 - x2, y1, 300 - x1, y2) if turn == "FLIP_LEFT_RIGHT" else (x1, 300 - y2, x2, 300 - y1)
    np.testing.assert_allclose(np.stack(back, 1), there.boxes_px[:10], atol=0.1)


def test_prefetch_keeps_the_order_and_its_distance():
    release, drawn = threading.Event(), []

    def work(number):
        if number == 0:
            release.wait(30)
        return number * number

    def numbers():
        for number in range(100):
            drawn.append(number)
            yield number

    results = predict.prefetch(work, numbers(), depth=5)
    release.set()
    assert next(results) == 0
    assert len(drawn) == 6  # never more than `depth` ahead of what was taken
    assert list(results) == [number * number for number in range(1, 100)]
    assert list(predict.prefetch(work, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(predict.prefetch(lambda number: 1 // number, [1, 0, 2]))


def test_the_next_image_is_opened_while_the_network_works(pointer, monkeypatch):
    opened, open_image, forward = threading.Event(), ssd.open_image, pointer.model.forward
    images = [red_box((50 + i, 40), (5, 5, 30, 30)) for i in range(predict.BATCH_SIZE + 1)]

    def noticing(source):
        if source is images[-1]:
            opened.set()
        return open_image(source)

    def waiting(batch):
        assert opened.wait(30), "the next batch was not opened while the first was in the network"
        return forward(batch)

    monkeypatch.setattr(ssd, "open_image", noticing)
    monkeypatch.setattr(pointer.model, "forward", waiting)
    sizes = [picture.size for picture, _ in predict.detect_all(pointer, images)]
    assert sizes == [image.size for image in images]


def test_an_unreadable_image_among_others_leaves_them_alone(pointer, monkeypatch, tmp_path):
    good, bad = red_box((80, 60), (10, 10, 50, 40)), tmp_path / "none.png"
    for batch_size, order in itertools.product((1, 2, 4), itertools.permutations((good, bad, bad, good))):
        monkeypatch.setattr(predict, "BATCH_SIZE", batch_size)
        results = list(predict.detect_all(pointer, order))
        assert len(results) == 4
        for source, result in zip(order, results, strict=True):
            if source is bad:
                assert isinstance(result, ssd.InputError)
                assert "none.png" in str(result)
            else:
                assert result[1].names == ["red"]


# ---- files ----


def test_folders_globs_and_files_name_inputs_once_and_in_order(tmp_path):
    for name in ("b.JPG", "a.png", "c.mp4", "notes.txt", "deep/d.webp", "[x].png", "odd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*arguments):
        return [path.relative_to(tmp_path).as_posix() for path in predict.find_inputs(arguments)]

    assert names(str(tmp_path)) == ["[x].png", "a.png", "b.JPG", "c.mp4"]
    assert names(f"{tmp_path}/*") == ["[x].png", "a.png", "b.JPG", "c.mp4"]
    assert names(f"{tmp_path}/**/*.webp") == ["deep/d.webp"]
    assert names(tmp_path / "odd", f"{tmp_path}/a.*", tmp_path / "a.png") == ["odd", "a.png"]
    assert names(tmp_path / "[x].png") == ["[x].png"]
    (tmp_path / "empty").mkdir()
    for argument in ("empty", "none.png", "*.bmp"):
        message = "no image or video in this folder" if argument == "empty" else "no such file"
        with pytest.raises(ssd.InputError, match=message) as caught:
            predict.find_inputs([tmp_path / "a.png", tmp_path / argument])
        assert argument in str(caught.value)


@settings(deadline=None)
@given(names=st.lists(st.from_regex(r"[abc]/[xX](_[12])?\.(jpg|png|mp4)", fullmatch=True), unique=True))
def test_every_file_has_a_target_of_its_own(names):
    paths = [Path(name) for name in names]
    targets = predict.name_targets(paths, Path("out"))
    assert list(targets) == paths
    stems = {target.stem.casefold() for target in targets.values()}  # some systems know no upper case
    assert len(stems) == len(paths)  # crops and annotations differ too
    for path, target in targets.items():
        assert target.suffix == path.suffix
        assert target.stem.startswith(path.stem)


def test_files_of_the_same_name_keep_images_of_their_own(pointer, tmp_path, capsys):
    boxes, paths = [(20, 10, 120, 60), (50, 50, 150, 90), (5, 5, 100, 50)], []
    for name, box in zip(("a/x.png", "b/x.png", "c/x_1.png"), boxes, strict=True):
        paths.append(tmp_path / name)
        paths[-1].parent.mkdir()
        red_box((200, 100), box).save(paths[-1])
    out = tmp_path / "out" / "deep"
    predict.predict_files(pointer, paths, out, score_thresh=0.5)
    found = predictions_in(out)
    assert list(found) == [str(path) for path in paths]
    assert len({path.read_bytes() for path in out.glob("*.png")}) == 3
    *printed, last = capsys.readouterr().out.splitlines()
    assert last == str(out / "predictions.json")
    for path, box, line in zip(paths, boxes, printed, strict=True):
        np.testing.assert_allclose(found[str(path)]["boxes_px"][0], box, atol=2)
        assert line.startswith(f"{path}: red ")
        with Image.open(line.split(" -> ")[1]) as image:
            x, y = round(found[str(path)]["boxes_px"][0][0]), (box[1] + box[3]) // 2 + 15
            assert image.convert("RGB").getpixel((x, y)) == ImageColor.getrgb(ssd.color_of(2))


def test_a_file_without_a_detection_is_reported_with_the_best_score_of_the_classes_asked_for(
    tiny_run, tmp_path, capsys
):
    image = tiny_run.data / "JPEGImages" / "test_0.jpg"
    scores = {"angular": 0.0, "round": 0.0}
    detector = ssd.load_detector(tiny_run.final, "cpu", "off")
    found = detector.predict(image, score_thresh=0, max_detections=9999)
    for name, score in zip(found.names, found.scores, strict=True):
        scores[name] = max(scores[name], score)
    worse, better = sorted(scores, key=scores.get)
    for flags, name in (((), better), (("--classes", worse), worse)):
        flags = (*flags, "--score-thresh", 0.999)
        assert predict.main(command(image, "--weights", tiny_run.final, *flags, out=tmp_path)) == 0
        line = capsys.readouterr().out.splitlines()[0]
        assert f": nothing found (best below the threshold: {name} {scores[name]:.2f}) -> " in line
        assert predictions_in(tmp_path / "plots" / "predictions")[str(image)]["labels"] == []


def test_many_objects_are_printed_as_counts(pointer, tmp_path, capsys):
    pointer.detect_in = lambda pictures, **_: [
        ssd.Detections(np.zeros((8, 4), np.float32), [1] + [2] * 7, ["blue"] + ["red"] * 7, [0.9] * 8)
    ]
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    predict.predict_files(pointer, [tmp_path / "a.png"], tmp_path / "out")
    assert f"{tmp_path / 'a.png'}: red 7, blue 1 -> " in capsys.readouterr().out


def test_predictions_are_a_line_an_image_or_a_frame(tmp_path):
    one = {"labels": [1], "names": ["red"]}
    report = {"a.png": one, 'odd "name".png': one, "b.mp4": {"fps": 29.97, "frames": [one, one, one]}}
    for content, lines in ((report, 2 + 2 + 5), ({}, 3)):
        predict.write_predictions(tmp_path / "predictions.json", content)
        assert predictions_in(tmp_path) == content
        assert len((tmp_path / "predictions.json").read_text().splitlines()) == lines


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(200, 100), (120, 120)])
def test_annotations_of_a_prediction_are_read_by_the_data_section(pointer, tmp_path, orientation, size):
    (tmp_path / "JPEGImages").mkdir()
    path = tmp_path / "JPEGImages" / "a.png"
    red_box(size, (20, 10, 80, 60)).save(path, exif=turned(orientation))
    ys, xs = np.nonzero(np.asarray(ssd.open_image(path))[..., 0])  # of the upright image
    assert predict.predict_files(pointer, [path], tmp_path, save_xml=True) == []
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    data = ssd.load_data(str(tmp_path), val_fraction=0)
    assert data.classes == ("red",)
    (record,) = data.train
    assert np.array_equal(record.read(), ssd.open_image(path))
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    np.testing.assert_allclose(record.boxes_px, [box], atol=2)


def test_crops_are_the_objects_at_full_resolution(pointer, tmp_path):
    pointer.classes = ("blue", "red/brown")
    pointer.score_thresh = dict.fromkeys(pointer.classes, 0.5)
    red_box((900, 600), (300, 150, 750, 450)).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    Image.new("RGB", (30, 30)).save(tmp_path / "b.png")
    paths = [tmp_path / "a.jpg", tmp_path / "b.png"]
    predict.predict_files(pointer, paths, tmp_path / "out", save_crops=True)
    (crop,) = (tmp_path / "out" / "crops").rglob("*.png")
    assert crop.relative_to(tmp_path / "out").as_posix() == "crops/red_brown/a_0.png"
    with Image.open(crop) as image:
        assert abs(image.width - 450) < 8
        assert abs(image.height - 300) < 8
        assert image.getpixel((image.width // 2, image.height // 2))[0] > 200


def test_photos_stay_jpeg_and_others_become_png(pointer, tmp_path):
    names = ("a.jpg", "b.JPEG", "c.png", "d.bmp", "e.webp", "f.tif", "g.jfif")
    for name in names:
        red_box((60, 40), (5, 5, 30, 30)).save(tmp_path / name)
    found = predict.find_inputs([tmp_path])
    assert [path.name for path in found] == list(names)
    assert predict.predict_files(pointer, found, tmp_path / "out") == []
    kinds = {path.name: Image.open(path).format for path in (tmp_path / "out").glob("*.*g")}
    assert kinds == {
        "a.jpg": "JPEG",
        "b.jpg": "JPEG",
        "c.png": "PNG",
        "d.png": "PNG",
        "e.png": "PNG",
        "f.png": "PNG",
        "g.jpg": "JPEG",
    }


def test_unreadable_files_are_returned_and_the_others_done(pointer, tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    (tmp_path / "broken.mp4").write_text("no video")
    red_box((60, 40), (5, 5, 30, 30)).save(tmp_path / "good.png")
    paths = [tmp_path / name for name in ("broken.mp4", "broken.jpg", "good.png")]
    problems = predict.predict_files(pointer, paths, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.png", "predictions.json"]
    assert list(predictions_in(tmp_path / "out")) == [str(tmp_path / "good.png")]
    assert len(problems) == 2
    assert "broken.jpg" in problems[0]
    assert "broken.mp4" in problems[1]
    assert all("\n" not in problem for problem in problems)


def test_sources_where_the_results_go_are_left_alone(pointer, tmp_path):
    red_box((60, 40), (5, 5, 30, 30)).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ssd.InputError, match="--output-dir"):
        predict.predict_files(pointer, [tmp_path / "a.png"], tmp_path / "deep" / "..")
    assert (tmp_path / "a.png").read_bytes() == before


# ---- COCO, CSV, frames ----


def write_instances(path, images, categories, annotations=()):
    """Write a COCO JSON; images: {id: (file name, (width, height))}, categories: {id: name}."""
    path.write_text(
        json.dumps(
            {
                "images": [
                    {"id": number, "file_name": name, "width": size[0], "height": size[1]}
                    for number, (name, size) in images.items()
                ],
                "categories": [{"id": number, "name": name} for number, name in categories.items()],
                "annotations": list(annotations),
            }
        ),
        encoding="utf-8",
    )
    return path


def test_coco_results_with_ids_are_accepted_and_scored_by_pycocotools(pointer, tmp_path):
    boxes = {"a/x.png": (20, 10, 120, 60), "b/x.png": (50, 50, 150, 90), "猫 & <y>.png": (5, 5, 100, 50)}
    for name, box in boxes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        red_box((200, 100), box).save(tmp_path / name)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b_x.png").symlink_to(tmp_path / "b" / "x.png")  # as ssd_tools.convert names it
    rows = [
        {
            "id": number,
            "image_id": 10 * number,
            "category_id": 90,
            "iscrowd": 0,
            "area": 1.0,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
        }
        for number, (x1, y1, x2, y2) in enumerate(boxes.values(), 1)
    ]
    images = {10 * number: (name, (200, 100)) for number, name in enumerate(boxes, start=1)}
    truth = write_instances(tmp_path / "instances.json", images, {7: "blue", 90: "red", 3: "red"}, rows)
    paths = [tmp_path / "links" / "b_x.png", tmp_path / "猫 & <y>.png", tmp_path / "a" / "x.png"]
    results = tmp_path / "new" / "results.json"
    predict.predict_files(pointer, paths, tmp_path / "out", save_coco=results, coco_ids=truth)
    data = pycocotools.coco.COCO(str(truth))
    found = data.loadRes(str(results))
    for row in rows:
        (ours,) = found.loadAnns(found.getAnnIds(imgIds=[row["image_id"]]))
        assert ours["category_id"] == 90  # of two categories of one name the one in use
        np.testing.assert_allclose(ours["bbox"], row["bbox"], atol=4)
        name = images[row["image_id"]][0]
        assert ours["score"] == pytest.approx(
            pointer.predict(tmp_path / name).scores[0], abs=1e-7
        )  # not rounded


def test_coco_without_ids_is_a_data_set_that_stands_alone(pointer, tmp_path):
    red_box((200, 100), (20, 10, 120, 60)).save(tmp_path / "turned.png", exif=turned(8))
    Image.new("RGB", (30, 20)).save(tmp_path / "empty.png")
    (tmp_path / "broken.png").write_text("no image")
    paths = [tmp_path / name for name in ("broken.png", "empty.png", "turned.png")]
    assert len(predict.predict_files(pointer, paths, tmp_path / "out", save_coco=tmp_path / "a.json")) == 1
    data = pycocotools.coco.COCO(str(tmp_path / "a.json"))
    assert data.imgs == {
        1: {"id": 1, "file_name": str(tmp_path / "empty.png"), "width": 30, "height": 20},
        2: {"id": 2, "file_name": str(tmp_path / "turned.png"), "width": 100, "height": 200},  # upright
    }
    assert [one["name"] for one in data.loadCats(data.getCatIds())] == ["blue", "red"]
    (row,) = data.loadAnns(data.getAnnIds())
    x1, y1, x2, y2 = predictions_in(tmp_path / "out")[str(tmp_path / "turned.png")]["boxes_px"][0]
    assert (row["image_id"], row["category_id"], row["iscrowd"]) == (2, 2, 0)
    np.testing.assert_allclose(row["bbox"], [x1, y1, x2 - x1, y2 - y1], atol=0.011)
    assert row["area"] == pytest.approx(row["bbox"][2] * row["bbox"][3], abs=0.01)


@pytest.mark.parametrize(
    ("images", "categories", "message"),
    [
        ({1: ("other.png", (9, 9))}, {1: "blue", 2: "red"}, "none of its images is .*a.png"),
        ({1: ("a.png", (9, 9))}, {1: "blue"}, "no category red"),
        (
            {1: ("a.png", (9, 9)), 2: ("c/a.png", (9, 9))},
            {1: "blue", 2: "red"},
            ".*a.png and .*a.png are one image, 1",
        ),
    ],
)
def test_what_coco_ids_lacks_is_said_before_the_work(pointer, tmp_path, images, categories, message):
    for name in ("a.png", "b/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        red_box((60, 40), (5, 5, 30, 30)).save(tmp_path / name)
    paths = [tmp_path / "a.png", tmp_path / "b" / "a.png"]
    truth = write_instances(tmp_path / "instances.json", images, categories)
    files = {"save_coco": tmp_path / "found.json", "coco_ids": truth}
    with pytest.raises(ssd.InputError, match=rf"instances\.json: {message}"):
        predict.predict_files(pointer, paths, tmp_path / "out", **files)
    truth.write_text("[]")
    with pytest.raises(ssd.InputError, match=r"instances.json: not a COCO JSON"):
        predict.predict_files(pointer, paths, tmp_path / "out", **files)
    assert not files["save_coco"].exists()


def test_csv_has_a_line_for_each_box_of_images_and_frames(pointer, tmp_path):
    red_box((200, 100), (20, 10, 120, 60)).save(tmp_path / "a, 猫.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "empty.png")
    write_video(tmp_path / "moving.avi", [(5 + 2 * i, 20, 55 + 2 * i, 80) for i in range(3)])
    paths = [tmp_path / name for name in ("a, 猫.png", "empty.png", "moving.avi")]
    predict.predict_files(pointer, paths, tmp_path / "out", save_csv=tmp_path / "found.csv")
    with open(tmp_path / "found.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [str(paths[0]), *(f"{paths[2]}#{number}" for number in range(3))]
    assert [row["image"] for row in rows] == names
    found = predictions_in(tmp_path / "out")
    images = [found[str(paths[0])], *found[str(paths[2])]["frames"]]
    for row, one in zip(rows, images, strict=True):
        assert [row["class"], float(row["score"])] == [one["names"][0], one["scores"][0]]
        assert [float(row[edge]) for edge in ("x1", "y1", "x2", "y2")] == one["boxes_px"][0]
    assert list(rows[0]) == ["image", "class", "score", "x1", "y1", "x2", "y2"]


def test_of_several_frames_or_pages_the_first_is_used_and_that_is_said(pointer, tmp_path, capsys):
    frames = [red_box((60, 40), (5, 5, 30, 30)), *[Image.new("RGB", (60, 40), (0, 0, n)) for n in (9, 90)]]
    names = ("a.gif", "b.tif", "c.webp", "d.png")
    for name in names:
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "one.gif")
    paths = [tmp_path / name for name in (*names, "one.gif")]
    predict.predict_files(pointer, paths, tmp_path / "out")
    *lines, one, _ = capsys.readouterr().out.splitlines()
    for path, line in zip(paths, lines, strict=False):
        assert line.startswith(f"{path}: red ")
        assert " in the first of 3 frames or pages -> " in line
    assert len(lines) == 4
    assert " in the first of " not in one


def test_results_for_a_test_list_whose_annotations_are_kept_back(pointer, tmp_path):
    red_box((60, 40), (5, 5, 30, 30)).save(tmp_path / "a.png")
    truth = write_instances(tmp_path / "instances.json", {4: ("a.png", (60, 40))}, {1: "blue", 2: "red"})
    truth.write_text(
        json.dumps({k: v for k, v in json.loads(truth.read_text()).items() if k != "annotations"})
    )
    files = {"save_coco": tmp_path / "found.json", "coco_ids": truth}
    predict.predict_files(pointer, [tmp_path / "a.png"], tmp_path / "out", **files)
    (row,) = json.loads(files["save_coco"].read_text())
    assert (row["image_id"], row["category_id"]) == (4, 2)


# ---- videos ----


def write_video(path, boxes, size=(160, 120), fps=10):
    """Write a Motion JPEG video with a red rectangle in each frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, size)
    assert writer.isOpened()
    for box in boxes:
        writer.write(np.asarray(red_box(size, box))[..., ::-1])
    writer.release()


class Announcing:
    """A cv2.VideoCapture that announces `count` frames at `fps`; it has one at each of `times` (seconds)."""

    def __init__(self, count, fps, times):
        self.values = {cv2.CAP_PROP_FRAME_COUNT: count, cv2.CAP_PROP_FPS: fps, cv2.CAP_PROP_POS_MSEC: 0.0}
        self.times = iter(times)

    def get(self, name):
        return self.values[name]

    def read(self):
        self.values[cv2.CAP_PROP_POS_MSEC] = 1000 * (time := next(self.times, 0.0))
        return time > 0, np.zeros((30, 40, 3), np.uint8)


def test_a_video_of_a_varying_rate_is_whole_if_its_last_second_is_read(pointer, tmp_path):
    whole = Announcing(120, 60.0, [(i + 1) / 20 for i in range(40)])  # as Matroska has it: two seconds at 60
    found = predict.predict_video(pointer, whole, "whole.mkv", tmp_path / "whole.mp4")
    assert len(found["frames"]) == 40
    cut = Announcing(120, 60.0, [(i + 1) / 20 for i in range(20)])
    with pytest.raises(ssd.InputError, match=r"cut.mkv: not readable as a video \(20 of 120 frames\)"):
        predict.predict_video(pointer, cut, "cut.mkv", tmp_path / "cut.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.mp4"]


def test_a_video_may_have_a_colon_in_its_name(pointer, tmp_path, monkeypatch):
    write_video(tmp_path / "in.avi", [(5, 20, 55, 80)] * 3)
    (tmp_path / "in.avi").rename(tmp_path / "12:30.avi")
    monkeypatch.chdir(tmp_path)
    assert predict.predict_files(pointer, [Path("12:30.avi")], tmp_path / "out") == []


def test_a_video_is_drawn_frame_by_frame(pointer, tmp_path):
    boxes = [(5 + 2 * i, 20, 55 + 2 * i, 80) for i in range(40)]
    write_video(tmp_path / "moving.avi", boxes)
    assert predict.predict_files(pointer, [tmp_path / "moving.avi"], tmp_path / "out") == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["moving.mp4", "predictions.json"]
    (found,) = predictions_in(tmp_path / "out").values()
    assert found["fps"] == 10
    assert len(found["frames"]) == 40
    for frame, box in zip(found["frames"], boxes, strict=True):
        np.testing.assert_allclose(frame["boxes_px"][0], box, atol=3)
    video = cv2.VideoCapture(str(tmp_path / "out" / "moving.mp4"))
    frames = list(predict.read_frames(video))
    assert len(frames) == 40
    assert video.get(cv2.CAP_PROP_FPS) == 10
    assert frames[0].shape == (120, 160, 3)
    assert frames[0][50, 30, 0] > 150  # the red rectangle, not blue
    blank = np.zeros_like(frames[0])
    blank[20:80, 5:55, 0] = 255
    assert np.abs(frames[0].astype(int) - blank)[..., 1].max() > 50  # something is drawn on it


def test_a_video_that_breaks_off_is_a_problem_and_leaves_no_file(pointer, tmp_path):
    write_video(tmp_path / "cut.avi", [(5, 20, 55, 80)] * 40)
    content = (tmp_path / "cut.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    (problem,) = predict.predict_files(pointer, [tmp_path / "cut.avi"], tmp_path / "out")
    assert "cut.avi" in problem
    assert "of 40 frames" in problem
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]


def test_an_interrupted_prediction_keeps_what_was_found(pointer, tmp_path, monkeypatch):
    red_box((60, 40), (5, 5, 30, 30)).save(tmp_path / "a.png")
    write_video(tmp_path / "b.avi", [(5, 20, 55, 80)] * 3)

    def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict_video", interrupt)
    with pytest.raises(KeyboardInterrupt):
        predict.predict_files(pointer, [tmp_path / "a.png", tmp_path / "b.avi"], tmp_path / "out")
    assert list(predictions_in(tmp_path / "out")) == [str(tmp_path / "a.png")]


# ---- cameras and streams ----


class Camera:
    """A cv2.VideoCapture of red boxes, the number of the frame, modulo 256, in the green of pixel (0, 0).

    script: for each opening the number of frames until it breaks off, None: it cannot be opened.
    """

    script, opened = (), 0

    def __init__(self, *source):
        self.left = type(self).script[min(self.opened, len(self.script) - 1)]
        type(self).opened += 1
        self.number = 0

    def isOpened(self):
        return self.left is not None

    def get(self, which):
        return {cv2.CAP_PROP_FPS: 30.0}.get(which, -1.0)

    def read(self):
        if self.number >= self.left:
            return False, None
        self.number += 1
        pixels = np.array(red_box((160, 120), (20, 20, 80, 80)))
        pixels[0, 0, 1] = self.number % 256
        return True, pixels[..., ::-1]

    def release(self):
        pass


@pytest.fixture
def camera(monkeypatch):
    """Return a function that puts a Camera of a script in cv2's place."""

    def put(*script):
        kind = type("FakeCamera", (Camera,), {"script": script})
        monkeypatch.setattr(cv2, "VideoCapture", kind)
        monkeypatch.setattr(predict, "RETRY_PAUSE", 0.0)
        return kind

    return put


def interrupt_after(pointer, count, before=None):
    """Let the detector call before(picture), and press Ctrl-C once it has seen `count` pictures."""
    detect_in, seen = pointer.detect_in, []

    def interrupted(pictures, **settings):
        if len(seen) == count:
            raise KeyboardInterrupt
        seen.append(np.asarray(pictures[0])[0, 0, 1])
        if before:
            before(len(seen))
        return detect_in(pictures, **settings)

    pointer.detect_in = interrupted
    return seen


def test_a_camera_is_written_until_ctrl_c_with_its_rate_in_the_picture(pointer, tmp_path, camera, capsys):
    camera(10**9)
    interrupt_after(pointer, 5)
    assert predict.predict_files(pointer, ["0"], tmp_path) == []
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"camera_0.mp4", "camera_0.jsonl", "predictions.json"}
    assert predictions_in(tmp_path) == {}
    rows = [json.loads(line) for line in (tmp_path / "camera_0.jsonl").read_text().splitlines()]
    assert [row["names"] for row in rows] == [["red"]] * 5
    np.testing.assert_allclose(rows[0]["boxes_px"][0], (20, 20, 80, 80), atol=2)
    assert sorted(row["time"] for row in rows) == [row["time"] for row in rows]
    frames = list(predict.read_frames(predict_capture(tmp_path / "camera_0.mp4")))
    assert len(frames) >= 5
    corner = frames[0][100:, :100].astype(int)
    assert (corner.min(axis=2) > 150).sum() > 20  # white letters on black
    out = capsys.readouterr().out
    assert out.startswith("0: 5 of ")
    assert "red 5 -> " in out
    assert str(tmp_path / "camera_0.mp4") in out


def predict_capture(path, original=cv2.VideoCapture):
    """Return the real cv2.VideoCapture of a file."""
    return original(str(path))


def test_a_live_source_drops_frames_and_goes_on_with_the_newest(pointer, tmp_path, camera):
    kind = camera(10**9)
    read, busy, delivered, asked = kind.read, threading.Event(), threading.Event(), threading.Event()

    def paced(self):
        if self.number == 1:
            busy.wait(30)
        if self.number == 50:
            delivered.set()
            asked.wait(30)
        return read(self)

    def before(number):
        if number == 1:
            busy.set()
            assert delivered.wait(30)  # 49 more frames arrive while the network works on the first
        if number == 2:
            asked.set()

    kind.read = paced
    seen = interrupt_after(pointer, 3, before)
    predict.predict_files(pointer, ["0"], tmp_path)
    assert seen[:2] == [1, 50]
    assert len((tmp_path / "camera_0.jsonl").read_text().splitlines()) == 3


def test_a_stream_that_breaks_off_is_opened_again_and_that_is_said(pointer, tmp_path, camera, capsys):
    kind = camera(1, None, None, 10**9)
    seen = interrupt_after(pointer, 3)
    assert predict.predict_files(pointer, ["rtsp://me:secret@robot:554/eye?x=1"], tmp_path) == []
    assert kind.opened == 4
    assert len(seen) == 3
    out, err = capsys.readouterr()
    assert err == "rtsp://robot:554/eye?x=1: broke off, trying again\n"
    assert out.startswith("rtsp://robot:554/eye?x=1: 3 of ")
    assert (tmp_path / "eye.mp4").exists()
    assert "secret" not in out + err


def test_a_stream_that_stays_away_is_a_problem(pointer, tmp_path, camera):
    kind = camera(2, None)
    (problem,) = predict.predict_files(pointer, ["http://robot/eye"], tmp_path)
    assert problem == f"http://robot/eye: broke off and did not come back in {predict.RETRIES} tries"
    assert kind.opened == 1 + predict.RETRIES


def test_q_ends_a_window_and_nothing_is_written_into_a_video(pointer, tmp_path, camera, monkeypatch):
    camera(10**9)
    shown, keys = [], iter([-1, ord("x"), ord("q")])
    monkeypatch.setattr(cv2, "namedWindow", lambda *args: None)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    monkeypatch.setattr(cv2, "imshow", lambda title, frame: shown.append(frame))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: next(keys))
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *args: 1.0)
    assert predict.predict_files(pointer, ["0"], tmp_path, show=True) == []
    assert [frame.shape for frame in shown] == [(120, 160, 3)] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["camera_0.jsonl", "predictions.json"]


class Server(http.server.ThreadingHTTPServer):
    """A server on loopback in a thread; a context manager whose value is its address."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_a_video_file_on_a_server_is_read_to_its_end(pointer, tmp_path):
    (tmp_path / "served").mkdir()
    boxes = [(5 + 2 * i, 20, 55 + 2 * i, 80) for i in range(40)]
    write_video(tmp_path / "served" / "moving.avi", boxes)
    with Server(("127.0.0.1", 0), functools.partial(Files, directory=tmp_path / "served")) as address:
        assert predict.predict_files(pointer, [f"{address}/moving.avi"], tmp_path / "out") == []
    (found,) = predictions_in(tmp_path / "out").values()
    assert len(found["frames"]) == 40  # no frame of a file is dropped
    for frame, box in zip(found["frames"], boxes, strict=True):
        np.testing.assert_allclose(frame["boxes_px"][0], box, atol=3)
    assert (tmp_path / "out" / "moving.mp4").exists()


class MotionJpeg(http.server.BaseHTTPRequestHandler):
    """A network camera that ends each connection after 20 frames."""

    connections = 0

    def do_GET(self):
        type(self).connections += 1
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace;boundary=frame")
        self.end_headers()
        content = io.BytesIO()
        red_box((160, 120), (20, 20, 80, 80)).save(content, "jpeg")
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content.getvalue())}\r\n\r\n"
        with contextlib.suppress(ConnectionError):  # the reader is gone: the test is over
            for _ in range(20):
                self.wfile.write(head.encode() + content.getvalue() + b"\r\n")

    def log_message(self, *args):
        pass


def test_a_network_camera_is_live_and_opened_again(pointer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(predict, "RETRY_PAUSE", 0.0)
    detect_in = pointer.detect_in

    def until_the_third_connection(pictures, **settings):
        if MotionJpeg.connections > 2:
            raise KeyboardInterrupt
        return detect_in(pictures, **settings)

    pointer.detect_in = until_the_third_connection
    with Server(("127.0.0.1", 0), MotionJpeg) as address:
        assert predict.predict_files(pointer, [f"{address}/eye.mjpg"], tmp_path) == []
    assert {"eye.mp4", "eye.jsonl"} <= {path.name for path in tmp_path.iterdir()}
    rows = [json.loads(line) for line in (tmp_path / "eye.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["names"] == ["red"] for row in rows)
    assert set(capfd.readouterr().err.splitlines()) == {f"{address}/eye.mjpg: broke off, trying again"}


def test_a_password_is_not_told_whatever_it_holds():
    for address in (
        "rtsp://me:pass@robot/eye?user=a@b",
        "rtsp://me:p@ss@robot/eye?user=a@b",
        "rtsp://robot/eye?user=a@b",
    ):
        assert predict.public_name(address) == "rtsp://robot/eye?user=a@b"


def test_sources_are_told_from_files_and_have_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").touch()
    sources = ["0", "1", "rtsp://a:b@robot/live", "http://robot/live.mjpg?w=2", "http://robot:80"]
    paths = predict.find_inputs(sources)
    assert paths == ["0", Path("1"), *sources[2:]]
    targets = predict.name_targets(paths, Path("out"))
    assert [path.name for path in targets.values()] == [
        "camera_0.mp4",
        "1.png",
        "live.mp4",
        "live_1.mp4",
        "stream.mp4",
    ]


# ---- the command ----


def command(*argv, out):
    """Return the arguments of a command that computes in float32 on the CPU and writes below `out`."""
    return [str(word) for word in (*argv, "--output-dir", out, "--device", "cpu", "--amp", "off")]


def test_the_command_finds_what_the_module_finds(tiny_run, tmp_path, capsys):
    images = [tiny_run.data / "JPEGImages" / f"test_{i}.jpg" for i in range(2)]
    flags = ("--score-thresh", 0, "--max-detections", 5)
    assert predict.main(command(*images, "--weights", tiny_run.final, *flags, out=tmp_path)) == 0
    folder = tmp_path / "plots" / "predictions"
    assert {path.name for path in folder.iterdir()} == {"test_0.jpg", "test_1.jpg", "predictions.json"}
    found = predictions_in(folder)
    detector = ssd.load_detector(tiny_run.final, "cpu", "off")
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == str(folder / "predictions.json")
    for path, line in zip(images, lines, strict=True):
        with Image.open(path) as image, Image.open(folder / path.name) as drawn:
            assert (drawn.format, drawn.size) == ("JPEG", image.size)
        expected = detector.predict(images, score_thresh=0.0, max_detections=5)[images.index(path)]
        assert found[str(path)] == expected.to_dict()
        assert len(found[str(path)]["labels"]) == 5
        assert line.startswith(str(path))


def test_without_flags_the_thresholds_of_the_run_count(tiny_run, tmp_path):
    saved = torch.load(tiny_run.final, weights_only=True)
    saved["args"]["nms_iou"] = 0.9
    saved["score_thresh"] = {"round": 0.02, "angular": 0.05}
    torch.save(saved, tmp_path / "other.pth")
    image = tiny_run.data / "JPEGImages" / "test_0.jpg"
    detector = ssd.load_detector(tmp_path / "other.pth", "cpu", "off")
    for flags, nms_iou in (((), 0.9), (("--nms-iou", 0.2), 0.2)):
        assert predict.main(command(image, "--weights", tmp_path / "other.pth", *flags, out=tmp_path)) == 0
        found = predictions_in(tmp_path / "plots" / "predictions")[str(image)]
        assert found == detector.predict(image, nms_iou_thresh=nms_iou).to_dict()
        assert len(found["labels"]) > 1


def test_the_flag_for_flips_averages(tiny_run, tmp_path):
    image = tiny_run.data / "JPEGImages" / "test_0.jpg"
    scores = []
    for flips in ("off", "horizontal", "both"):
        flags = ("--flip-average", flips, "--score-thresh", 0)
        assert predict.main(command(image, "--weights", tiny_run.final, *flags, out=tmp_path)) == 0
        scores.append(predictions_in(tmp_path / "plots" / "predictions")[str(image)]["scores"])
    assert scores[0] != scores[1]
    assert scores[1] != scores[2]


def test_the_command_goes_on_behind_what_cannot_be_read_and_says_so(tiny_run, tmp_path, capfd):
    shutil.copytree(tiny_run.data / "JPEGImages", tmp_path / "in")
    (tmp_path / "in" / "broken.png").write_text("no image")
    (tmp_path / "in" / "broken.mp4").write_text("no video")
    inputs = (tmp_path / "in", tmp_path / "in" / "test_*.jpg")
    csv_file, coco_file = tmp_path / "a.csv", tmp_path / "a.json"
    images = {
        number: (f"{split}_{i}.jpg", (1, 1))
        for number, (split, i) in enumerate(
            [("train", i) for i in range(8)] + [(split, i) for split in ("val", "test") for i in range(4)]
        )
    }
    truth = write_instances(tmp_path / "instances.json", images | {99: ("broken.png", (1, 1))}, {5: "round"})
    flags = (
        "--score-thresh",
        0.01,
        "--classes",
        "round",
        "--save-crops",
        "--save-xml",
        "--save-csv",
        csv_file,
        "--save-coco",
        coco_file,
        "--coco-ids",
        truth,
    )
    assert predict.main(command(*inputs, "--weights", tiny_run.final, *flags, out=tmp_path / "out")) == 1
    out, err = capfd.readouterr()
    folder = tmp_path / "out" / "plots" / "predictions"
    found = predictions_in(folder)
    assert len(found) == 16
    written = ("predictions.json", "crops", "Annotations")
    assert out.splitlines()[16:] == [*(str(folder / name) for name in written), str(coco_file), str(csv_file)]
    assert {name for one in found.values() for name in one["names"]} == {"round"}
    assert [line.split(":")[0] for line in err.splitlines()] == ["error"] * 2
    assert all(f"broken.{ending}" in err for ending in ("png", "mp4"))
    crops = list((folder / "crops" / "round").iterdir())
    assert len(crops) == sum(len(one["names"]) for one in found.values())
    assert len(csv_file.read_text().splitlines()) == 1 + len(crops)
    results = json.loads(coco_file.read_text())
    assert len(results) == len(crops)
    assert {row["category_id"] for row in results} == {5}
    assert len(list((folder / "Annotations").iterdir())) == 16


@pytest.mark.parametrize("thresholds", [{"round": 0.02, "angular": 0.9}, None])
def test_classes_that_are_not_asked_for_do_not_use_up_the_detections(tiny_run, tmp_path, thresholds):
    saved = torch.load(tiny_run.final, weights_only=True)
    saved["score_thresh"] = thresholds or {}
    torch.save(saved, tmp_path / "other.pth")
    image = tiny_run.data / "JPEGImages" / "test_0.jpg"
    flags = ("--classes", "round", "--max-detections", 10, *(() if thresholds else ("--score-thresh", 0.02)))
    assert predict.main(command(image, "--weights", tmp_path / "other.pth", *flags, out=tmp_path)) == 0
    found = predictions_in(tmp_path / "plots" / "predictions")[str(image)]
    everything = (
        ssd.load_detector(tmp_path / "other.pth", "cpu", "off")
        .predict(image, score_thresh=0.02, max_detections=99_999)
        .to_dict()
    )
    scores = [s for s, name in zip(everything["scores"], everything["names"], strict=True) if name == "round"]
    assert found["scores"] == scores[:10]
    assert found["names"] == ["round"] * len(found["scores"])
    assert len(found["scores"]) > 1


def test_a_source_that_is_not_there_is_one_line(tiny_run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for argv, code, message in (
        (("97",), 1, "97: no such camera"),
        (("http://127.0.0.1:1/eye.mjpg",), 1, "http://127.0.0.1:1/eye.mjpg: not reachable, or no video"),
        (("rtsp://me:secret@127.0.0.1:1/eye",), 1, "rtsp://127.0.0.1:1/eye: not reachable, or no video"),
        (("0", "--show"), 2, "--show: there is no display; without it the video is written"),
    ):
        assert predict.main(command(*argv, "--weights", tiny_run.final, out=tmp_path)) == code
        assert capfd.readouterr().err == f"error: {message}\n"


def test_mistakes_are_one_line(tiny_run, tmp_path, capsys):
    image = tiny_run.data / "JPEGImages" / "test_0.jpg"
    (tmp_path / "empty").mkdir()
    results = tmp_path / "plots" / "predictions"
    results.mkdir(parents=True)
    shutil.copy(image, results)
    (tmp_path / "file").touch()
    for argv, message in (
        ((tmp_path / "none.jpg", "--weights", tiny_run.final), "none.jpg"),
        ((tmp_path / "empty", "--weights", tiny_run.final), "no image or video"),
        ((image, "--weights", tiny_run.final, "--classes", "cat"), "no class cat: the model knows angular"),
        ((image, "--weights", tmp_path / "empty"), "lacks config.json"),
        ((image, "--weights", tmp_path / "none.pth"), "none.pth"),
        ((results, "--weights", tiny_run.final), "--output-dir"),
    ):
        assert predict.main(command(*argv, out=tmp_path)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert predict.main(command(image, "--weights", tiny_run.final, out=tmp_path / "file")) == 2
    with pytest.raises(SystemExit):
        predict.main(command(image, "--weights", tiny_run.final, "--coco-ids", "a.json", out=tmp_path))
    assert "--coco-ids needs --save-coco" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_without_a_traceback(tiny_run, tmp_path, monkeypatch):
    def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict_files", interrupt)
    image = tiny_run.data / "JPEGImages" / "test_0.jpg"
    assert predict.main(command(image, "--weights", tiny_run.final, out=tmp_path)) == 130
