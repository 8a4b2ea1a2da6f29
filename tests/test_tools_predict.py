"""ssd_tools/predict.py: drawn copies of images, crops, annotations, COCO and CSV; videos are handed on."""

import csv
import json
import shutil

import numpy as np
import pycocotools.coco
import pytest
import torch
from PIL import Image, ImageColor
from predicting import command, find_inputs, predictions_in, write_video
from reference import Pointer, red_box

import ssd_object_detection as ssd
from ssd_tools import inference, predict, video

ORIENTATION = 0x0112  # the EXIF tag


@pytest.fixture
def pointer():
    return inference.FlipDetector(Pointer(), ("blue", "red"))


def turned(orientation):
    """Return EXIF data of an orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


# ---- files ----


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


def test_crops_of_two_classes_never_share_a_folder():
    folders = predict.name_folders(("a/b", "a_b", "A b", "cat", "x" * 300))
    assert list(folders.values()) == ["a_b", "a_b_2", "A_b_3", "cat", "x" * 60]


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
    found = find_inputs(tmp_path)
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


def test_an_interrupted_prediction_keeps_what_was_found(pointer, tmp_path, monkeypatch):
    red_box((60, 40), (5, 5, 30, 30)).save(tmp_path / "a.png")
    write_video(tmp_path / "b.avi", [(5, 20, 55, 80)] * 3)

    def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "predict_video", interrupt)
    with pytest.raises(KeyboardInterrupt):
        predict.predict_files(pointer, [tmp_path / "a.png", tmp_path / "b.avi"], tmp_path / "out")
    assert list(predictions_in(tmp_path / "out")) == [str(tmp_path / "a.png")]


# ---- the command ----


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
