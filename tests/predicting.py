"""Helpers of the tests of predict and video: what a folder got, a video to read, flags that are exact."""

import json
import os

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # as the tool does; read once, by the first video

import cv2
import numpy as np
from reference import red_box

from ssd_tools import inference, predict


def predictions_in(folder):
    """Return the content of a folder's predictions.json."""
    return json.loads((folder / "predictions.json").read_text(encoding="utf-8"))


def find_inputs(*arguments):
    """Return the inputs that predict finds."""
    return inference.find_inputs(arguments, predict.SUFFIXES, "image or video")


def write_video(path, boxes, size=(160, 120), fps=10):
    """Write a Motion JPEG video with a red rectangle in each frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, size)
    assert writer.isOpened()
    for box in boxes:
        writer.write(np.asarray(red_box(size, box))[..., ::-1])
    writer.release()


def command(*argv, out):
    """Return the arguments of a command that computes in float32 on the CPU and writes below `out`."""
    return [str(word) for word in (*argv, "--output-dir", out, "--device", "cpu", "--amp", "off")]
