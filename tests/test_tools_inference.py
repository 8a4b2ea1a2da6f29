"""ssd_tools/inference.py: averaged flips, reading ahead, inputs, targets, predictions.json."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from predicting import find_inputs, predictions_in
from reference import Pointer, red_box

import ssd_object_detection as ssd
from ssd_tools import inference

EVERYTHING = {"score_thresh": 0.0, "max_detections": 50}  # after two epochs a network is sure of nothing


@pytest.fixture
def pointer():
    return inference.FlipDetector(Pointer(), ("blue", "red"))


# ---- the network ----


@pytest.mark.parametrize(("flips", "turn"), [("horizontal", "FLIP_LEFT_RIGHT"), ("both", "FLIP_TOP_BOTTOM")])
def test_with_flip_averaging_a_flipped_image_gives_flipped_boxes(tiny_run, flips, turn):
    checkpoint = ssd.load_checkpoint(tiny_run.final)
    detector = inference.FlipDetector(ssd.model_from_checkpoint(checkpoint), checkpoint["classes"])
    image = ssd.open_image(tiny_run.data / "JPEGImages" / "test_0.jpg").resize((300, 300))
    flipped = image.transpose(Image.Transpose[turn])
    plain = detector.predict(image, **EVERYTHING)
    module = ssd.Detector(detector.model, detector.classes)
    assert plain.to_dict() == module.predict(image, **EVERYTHING).to_dict()
    detector.flips = inference.FLIPS[flips]
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

    results = inference.prefetch(work, numbers(), depth=5)
    release.set()
    assert next(results) == 0
    assert len(drawn) == 6  # never more than `depth` ahead of what was taken
    assert list(results) == [number * number for number in range(1, 100)]
    assert list(inference.prefetch(work, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(inference.prefetch(lambda number: 1 // number, [1, 0, 2]))


def test_the_next_image_is_opened_while_the_network_works(pointer, monkeypatch):
    opened, open_image, forward = threading.Event(), ssd.open_image, pointer.model.forward
    images = [red_box((50 + i, 40), (5, 5, 30, 30)) for i in range(inference.BATCH_SIZE + 1)]

    def noticing(source):
        if source is images[-1]:
            opened.set()
        return open_image(source)

    def waiting(batch):
        assert opened.wait(30), "the next batch was not opened while the first was in the network"
        return forward(batch)

    monkeypatch.setattr(ssd, "open_image", noticing)
    monkeypatch.setattr(pointer.model, "forward", waiting)
    sizes = [picture.size for picture, _ in inference.detect_all(pointer, images)]
    assert sizes == [image.size for image in images]


def test_an_unreadable_image_among_others_leaves_them_alone(pointer, monkeypatch, tmp_path):
    good, bad = red_box((80, 60), (10, 10, 50, 40)), tmp_path / "none.png"
    for batch_size, order in itertools.product((1, 2, 4), itertools.permutations((good, bad, bad, good))):
        monkeypatch.setattr(inference, "BATCH_SIZE", batch_size)
        results = list(inference.detect_all(pointer, order))
        assert len(results) == 4
        for source, result in zip(order, results, strict=True):
            if source is bad:
                assert isinstance(result, ssd.InputError)
                assert "none.png" in str(result)
            else:
                assert result[1].names == ["red"]


# ---- inputs and outputs ----


def test_folders_globs_and_files_name_inputs_once_and_in_order(tmp_path):
    for name in ("b.JPG", "a.png", "c.mp4", "notes.txt", "deep/d.webp", "[x].png", "odd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*arguments):
        return [path.relative_to(tmp_path).as_posix() for path in find_inputs(*arguments)]

    assert names(str(tmp_path)) == ["[x].png", "a.png", "b.JPG", "c.mp4"]
    assert names(f"{tmp_path}/*") == ["[x].png", "a.png", "b.JPG", "c.mp4"]
    assert names(f"{tmp_path}/**/*.webp") == ["deep/d.webp"]
    assert names(tmp_path / "odd", f"{tmp_path}/a.*", tmp_path / "a.png") == ["odd", "a.png"]
    assert names(tmp_path / "[x].png") == ["[x].png"]
    (tmp_path / "empty").mkdir()
    for argument in ("empty", "none.png", "*.bmp"):
        message = "no image or video in this folder" if argument == "empty" else "no such file"
        with pytest.raises(ssd.InputError, match=message) as caught:
            find_inputs(tmp_path / "a.png", tmp_path / argument)
        assert argument in str(caught.value)


@settings(deadline=None)
@given(names=st.lists(st.from_regex(r"[abc]/[xX](_[12])?\.(jpg|png|mp4)", fullmatch=True), unique=True))
def test_every_file_has_a_target_of_its_own(names):
    paths = [Path(name) for name in names]
    targets = inference.name_targets(paths, Path("out"))
    assert list(targets) == paths
    stems = {target.stem.casefold() for target in targets.values()}  # some systems know no upper case
    assert len(stems) == len(paths)  # crops and annotations differ too
    for path, target in targets.items():
        assert target.suffix == path.suffix
        assert target.stem.startswith(path.stem)


def test_predictions_are_a_line_an_image_or_a_frame(tmp_path):
    one = {"labels": [1], "names": ["red"]}
    report = {"a.png": one, 'odd "name".png': one, "b.mp4": {"fps": 29.97, "frames": [one, one, one]}}
    for content, lines in ((report, 2 + 2 + 5), ({}, 3)):
        inference.write_predictions(tmp_path / "predictions.json", content)
        assert predictions_in(tmp_path) == content
        assert len((tmp_path / "predictions.json").read_text().splitlines()) == lines


def test_a_password_is_not_told_whatever_it_holds():
    for address in (
        "rtsp://me:pass@robot/eye?user=a@b",
        "rtsp://me:p@ss@robot/eye?user=a@b",
        "rtsp://robot/eye?user=a@b",
    ):
        assert inference.public_name(address) == "rtsp://robot/eye?user=a@b"


def test_sources_are_told_from_files_and_have_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").touch()
    sources = ["0", "1", "rtsp://a:b@robot/live", "http://robot/live.mjpg?w=2", "http://robot:80"]
    paths = find_inputs(*sources)
    assert paths == ["0", Path("1"), *sources[2:]]
    targets = inference.name_targets(paths, Path("out"))
    assert [path.name for path in targets.values()] == [
        "camera_0.mp4",
        "1.png",
        "live.mp4",
        "live_1.mp4",
        "stream.mp4",
    ]
