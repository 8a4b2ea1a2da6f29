"""examples/detect_onnx.py: the boxes of the module, in a process that cannot import torch."""

import os
import re
import runpy
import subprocess
import sys
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


def run_alone(*argv):
    command = [sys.executable, "-c", ALONE, EXAMPLE, *argv]
    return subprocess.run(
        list(map(str, command)),
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_it_finds_what_predict_finds(dtype, trained, pictures, tmp_path):
    model = tmp_path / "tiny.onnx"
    assert onnx.main([str(trained), "--output", str(model), "--input", dtype]) == 0
    done = run_alone(model, *pictures)
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
        with Image.open(path.with_name(f"{path.stem}_detected.png")) as drawn:
            assert drawn.size == ssd.open_image(path).size
            assert np.abs(np.asarray(drawn).astype(int) - np.asarray(ssd.open_image(path))).max() > 50
    for path in pictures:
        path.with_name(f"{path.stem}_detected.png").unlink()
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


def test_a_camera_needs_opencv_and_says_so(trained, tmp_path):
    model = tmp_path / "tiny.onnx"
    assert onnx.main([str(trained), "--output", str(model)]) == 0
    done = run_alone(model, "0")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: a camera needs OpenCV: pip install opencv-python-headless"]


def test_it_stays_small_and_needs_three_packages():
    source = EXAMPLE.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 90
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, flags=re.MULTILINE))
    assert imported == {"json", "sys", "pathlib", "numpy", "onnxruntime", "PIL"}
