"""examples/detect_onnx.py: the boxes of the module, in a process that cannot import torch."""

import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ssd_object_detection as ssd

ROOT = Path(__file__).resolve().parent.parent
for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)

from ssd_tools import onnx  # noqa: E402

EXAMPLE = ROOT / "examples" / "detect_onnx.py"
ALONE = """
import runpy, sys
for name in ("torch", "torchvision", "cv2", "albumentations", "onnx", "scipy", "ssd_object_detection"):
    sys.modules[name] = None  # an import raises ImportError
sys.argv = sys.argv[1:]
sys.path.insert(0, str(__import__("pathlib").Path(sys.argv[0]).parent))  # as of a program that is started
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SIZES = [(640, 480), (300, 300), (500, 375)]  # of which both resizes make the same pixels
OTHER_SIZES = [(500, 281), (281, 500), (200, 250), (300, 400), (400, 300), (299, 301), (1200, 900), (33, 900)]


@pytest.fixture(scope="module")
def trained(tiny_voc, tiny_run, tmp_path_factory):
    """A checkpoint whose thresholds leave a part of the detections, other ones for each class."""
    path = tmp_path_factory.mktemp("trained") / "tiny.pth"
    checkpoint = ssd.load_checkpoint(tiny_run.final)
    picture = tiny_voc / "JPEGImages" / "test_0.jpg"
    found = ssd.load_detector(tiny_run.final, "cpu", "off").predict(picture, score_thresh=0)
    for name in checkpoint["classes"]:
        scores = [score for score, other in zip(found.scores, found.names, strict=True) if name == other]
        middle = len(scores) // 2  # between two of them, so that no rounding decides
        checkpoint["score_thresh"][name] = sum(scores[middle - 1 : middle + 1]) / 2
    ssd.save_checkpoint(path, checkpoint)
    return path


@pytest.fixture(scope="module")
def pictures(tiny_voc, tmp_path_factory):
    """A PNG of each of SIZES, and one that its EXIF tag turns."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        source = ssd.open_image(tiny_voc / "JPEGImages" / f"test_{number % 3}.jpg")
        source.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    source.save(folder / "turned.jpg", exif=exif, quality=95)
    return sorted(folder.iterdir())


def run_alone(*argv, path="", cwd=None):
    command = [sys.executable, "-c", ALONE, EXAMPLE, *argv]
    return subprocess.run(
        list(map(str, command)),
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=cwd,
    )


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_it_finds_what_predict_finds(dtype, trained, pictures, tmp_path):
    model = tmp_path / "tiny.onnx"
    assert onnx.main([str(trained), "--output", str(model), "--input", dtype]) == 0
    done = run_alone(model, *pictures, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    detector = ssd.load_detector(trained, "cpu", "off")
    total = 0
    for path in pictures:
        line = rf"^{re.escape(str(path))}: (\w+) ([\d.]+) \[(.+)\]$"
        lines = re.findall(line, done.stdout, flags=re.MULTILINE)
        boxes_px = np.array([list(map(float, box.split(", "))) for _, _, box in lines])
        labels = np.array([detector.classes.index(name) + 1 for name, _, _ in lines])
        scores = np.array([float(score) for _, score, _ in lines])
        found = detector.predict(path)
        ours = found.boxes_px, np.array(found.labels), np.array(found.scores)
        alone, pixels, score = onnx.largest_differences(ours, (boxes_px, labels, scores))
        assert alone == 0
        assert pixels < 0.06  # printed with one digit
        assert score < 0.0006  # and with three
        total += len(found)
        with Image.open(tmp_path / f"{path.stem}_detected.png") as drawn:
            assert drawn.size == ssd.open_image(path).size
            assert np.abs(np.asarray(drawn).astype(int) - np.asarray(ssd.open_image(path))).max() > 50
    assert not list(pictures[0].parent.glob("*_detected.png"))  # the data folder stays as it was
    assert total > 100


@pytest.mark.parametrize("size", SIZES + OTHER_SIZES)
def test_it_resizes_as_the_module_does(size):
    resize_weights = runpy.run_path(str(EXAMPLE))["resize_weights"]
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    shrinks = [side >= 300 and max(size) > 300 for side in size]
    columns, rows = (resize_weights(side, 300, shrinks) for side in size)
    small = np.einsum("xi,yj,jic->yxc", columns, rows, pixels.astype(np.float32), optimize=True).round()
    expected = ssd.resize_transform()(image=pixels)["image"]
    assert np.abs(small - expected).max() <= 1


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """tiny.onnx, tiny_int8.onnx and their check set in a folder."""
    folder = tmp_path_factory.mktemp("exported")
    for flags in ((), ("--int8", "--max-map-drop", "1")):
        name = "tiny_int8.onnx" if flags else "tiny.onnx"
        assert onnx.main([str(trained), "--output", str(folder / name), *flags]) == 0
    return folder


def the_line(done, code):
    """Return the one line on standard error of a program that ended with a code."""
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_a_bad_picture_is_one_line_and_the_next_are_looked_at(exported, pictures, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(pictures[0].read_bytes()[:2000])
    done = run_alone(exported / "tiny.onnx", "gone.jpg", "text.jpg", cut, pictures[0], cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["gone.jpg", "text.jpg", str(cut)]
    assert (tmp_path / f"{pictures[0].stem}_detected.png").is_file()
    assert not (tmp_path / "cut_detected.png").exists()


def test_pictures_of_one_name_each_keep_their_drawn_copy_and_no_input_is_written_over(exported, tmp_path):
    names = ("x/a.jpg", "y/a.jpg", "a.png", "a_detected.png")
    for number, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (300 + number, 200)).save(path)
    given = (tmp_path / names[-1]).read_bytes()
    done = run_alone(exported / "tiny.onnx", *names, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = ("a_detected2.png", "a_detected3.png", "a_detected4.png", "a_detected_detected.png")
    widths = [Image.open(tmp_path / name).width for name in drawn]
    assert widths == [300, 301, 302, 303]
    assert (tmp_path / names[-1]).read_bytes() == given


def test_what_is_no_model_of_ours_is_one_line(exported, pictures, tmp_path):
    whole = (exported / "tiny.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    assert "cut.onnx" in the_line(run_alone(tmp_path / "cut.onnx", pictures[0]), 1)
    assert "gone.onnx" in the_line(run_alone(tmp_path / "gone.onnx", pictures[0]), 1)
    import onnx as package

    newer = package.load(exported / "tiny.onnx")
    newer.ir_version = 99
    package.save(newer, tmp_path / "newer.onnx")
    assert "IR version" in the_line(run_alone(tmp_path / "newer.onnx", pictures[0]), 1)
    del newer.metadata_props[:]
    newer.ir_version = 10
    package.save(newer, tmp_path / "other.onnx")
    assert "not a file of ssd_tools.onnx" in the_line(run_alone(tmp_path / "other.onnx", pictures[0]), 1)
    assert the_line(run_alone(exported / "tiny.onnx"), 1).startswith("usage: ")


# ---- is it right on this machine ----


def test_the_check_agrees_and_says_which_file_to_take(exported):
    done = run_alone(exported / "tiny.onnx", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    float_line, int8_line, advice = done.stdout.splitlines()
    assert float_line.startswith("tiny.onnx: of ")
    assert "0 have no partner" in float_line
    assert float_line.endswith(": agrees")
    assert int8_line.startswith("tiny_int8.onnx: of ")
    assert re.search(r"median [\d.]+ ms, 95th percentile [\d.]+ ms", int8_line)
    assert advice in ("take tiny.onnx", "take tiny_int8.onnx")


def test_a_machine_that_computes_something_else_is_told_so(exported, tmp_path):
    (tmp_path / "tiny.onnx").write_bytes((exported / "tiny.onnx").read_bytes())
    assert "no check set" in the_line(run_alone(tmp_path / "tiny.onnx", "--check"), 1)
    with np.load(exported / "tiny_check.npz") as content:
        arrays = dict(content)
    assert arrays["images"].dtype == np.uint8
    assert arrays["images"].shape[1:] == (3, 300, 300)
    arrays["scores"] *= 0.9
    np.savez(tmp_path / "tiny_check.npz", **arrays)
    done = run_alone(tmp_path / "tiny.onnx", "--check")
    assert done.returncode == 1
    assert "DIFFERS from PyTorch" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("take none")


# ---- cameras ----

STAND_IN = """
import itertools, time
import numpy as np

class Picamera2:
    def __init__(self):
        if {cameras} == 0:
            [][0]
        self.numbers = itertools.count(1)

    def create_video_configuration(self, main):
        assert main["format"] == "RGB888"
        return main

    def configure(self, main):
        self.size = main["size"]

    def start(self):
        pass

    def capture_array(self, name="main"):
        number = next(self.numbers)
        if number > {frames}:
            {end}
        time.sleep(0.01)
        return np.full((*self.size[::-1], 3), (0, 0, 200), np.uint8)  # red, as BGR

    def close(self):
        print("closed", flush=True)
"""


@pytest.fixture
def picamera(tmp_path):
    """A function that writes a stand-in of picamera2 and returns its folder."""

    def write(cameras=1, frames=10**9, end="time.sleep(60)"):
        (tmp_path / "picamera2.py").write_text(STAND_IN.format(cameras=cameras, frames=frames, end=end))
        return tmp_path

    return write


def test_a_ribbon_camera_prints_a_line_of_json_a_frame_until_sigterm(exported, picamera):
    for number in (signal.SIGTERM, signal.SIGINT):
        program = subprocess.Popen(
            [sys.executable, "-c", ALONE, EXAMPLE, exported / "tiny.onnx", "picamera"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(picamera())},
        )
        rows = [json.loads(program.stdout.readline()) for _ in range(3)]
        program.send_signal(number)
        rest, errors = program.communicate(timeout=60)
        assert (program.returncode, errors) == (0, "")
        assert rest.splitlines()[-1] == "closed"
        assert all(set(row) == {"time", "ms", "size", "boxes"} for row in rows)
        assert rows[0]["size"] == [640, 480]
        assert rows[0]["time"] < rows[1]["time"] < rows[2]["time"]
        for box in rows[0]["boxes"]:
            assert box["class"] in ("angular", "round")
            assert len(box["box"]) == 4


def test_the_picture_of_a_ribbon_camera_is_rgb_and_the_newest(picamera, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    monkeypatch.syspath_prepend(str(picamera()))
    camera_onnx = importlib.import_module("camera_onnx")
    ages = []

    def slow(picture):
        ages.append(picture.getpixel((0, 0)))
        if len(ages) == 3:
            raise KeyboardInterrupt
        time.sleep(0.3)  # thirty frames come meanwhile
        return []

    with pytest.raises(KeyboardInterrupt):
        camera_onnx.watch_camera(slow, "picamera")
    sys.modules.pop("picamera2")
    assert set(ages) == {(200, 0, 0)}
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines()[:2])
    assert second["time"] - first["time"] > 0.2  # and not the frame that came next


@pytest.mark.parametrize(
    ("stand_in", "message"),
    [
        ({"cameras": 0}, "there is no camera"),
        ({"frames": 2, "end": "raise RuntimeError('unplugged')"}, "unplugged"),
        ({"frames": 2}, "the camera is lost: no new frame for 5 seconds"),
    ],
)
def test_no_camera_and_a_lost_one_are_one_line_and_exit_code_1(exported, picamera, stand_in, message):
    done = run_alone(exported / "tiny.onnx", "picamera", path=picamera(**stand_in))
    assert message in the_line(done, 1)


def test_a_rover_stops_when_its_camera_is_lost(exported, picamera):
    detector = f"{sys.executable} {EXAMPLE} {exported / 'tiny.onnx'} picamera"
    steer = f"{sys.executable} {EXAMPLE.with_name('steer.py')} round"
    folder = picamera(frames=20, end="raise RuntimeError('unplugged')")
    done = subprocess.run(
        ["sh", "-c", f"{detector} | {steer}"],
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 1
    first, *_, last = done.stdout.splitlines()
    assert (first, last) == ("stop", "stop")
    assert "unplugged" in done.stderr
    assert done.stderr.splitlines()[-1] == "stop: the detector has ended"


def test_a_camera_names_the_package_that_it_needs(exported):
    for name, hint in (("0", "pip install opencv-python-headless"), ("picamera", "python3-picamera2")):
        assert hint in the_line(run_alone(exported / "tiny.onnx", name), 1)


def test_it_stays_small_and_needs_three_packages():
    source = EXAMPLE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 100
    for path in EXAMPLE.parent.glob("*_onnx.py"):
        imported = set(re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
        assert imported - sys.stdlib_module_names <= {"numpy", "onnxruntime", "PIL"}
