"""Detect objects with an ONNX file of ssd_tools.onnx; needs numpy, pillow and onnxruntime 1.25 or newer.

python detect_onnx.py model.onnx picture.jpg ...    # draws picture_detected.png beside each picture
python detect_onnx.py model.onnx 0                  # camera 0, which needs OpenCV too; Ctrl-C ends it
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def resize_weights(old: int, new: int, shrinks: list[bool]) -> np.ndarray:
    """Return the matrix (new, old) that resizes a side as OpenCV does; shrinks: whether each side does."""
    scale = 1 / (new / old)
    target = np.arange(new)[:, None]
    source = np.arange(old)
    if all(shrinks):  # areas are averaged
        right = np.minimum((target + 1) * scale, source + 1)
        return ((right - np.maximum(target * scale, source)).clip(min=0) / scale).astype(np.float32)
    place = (target + 0.5) * scale - 0.5
    if any(shrinks):  # OpenCV's area mode where it cannot average
        left = np.floor(target * scale)
        place = left + np.maximum(target + 1 - (left + 1) * (new / old), 0).astype(np.float32) % 1
    return (1 - np.abs(place.clip(0, old - 1) - source)).clip(min=0).astype(np.float32)


def resize(picture: Image.Image, size: int) -> np.ndarray:
    """Return an RGB PIL image as float32 (3, size, size), resized as in training."""
    width, height = picture.size
    shrinks = [side >= size and max(picture.size) > size for side in picture.size]
    columns = resize_weights(width, size, shrinks)
    rows = resize_weights(height, size, shrinks)
    flat = np.tensordot(rows, np.asarray(picture, dtype=np.float32), (1, 0))  # (y, width, colour)
    return np.tensordot(columns, flat, (1, 1)).round().T  # (colour, y, x)


def detect(
    session: onnxruntime.InferenceSession, picture: Image.Image
) -> list[tuple[str, float, list[float]]]:
    """Return [(class name, score, [x1, y1, x2, y2] in pixels)] of an RGB PIL image, best first."""
    about = session.get_modelmeta().custom_metadata_map
    names = json.loads(about["classes"])
    score_thresh = json.loads(about["score_thresh"])
    images = resize(picture, json.loads(about["image_size"]))[None]
    if "uint8" in session.get_inputs()[0].type:
        images = images.astype(np.uint8)
    boxes, scores, labels = session.run(None, {"images": images})
    found = []
    for box, score, label in zip(boxes[0] * (picture.size * 2), scores[0], labels[0], strict=True):
        name = names[label - 1]
        if label > 0 and score >= score_thresh[name]:  # rows of label 0 are empty
            found.append((name, float(score), box.tolist()))
    return found


def watch_camera(session: onnxruntime.InferenceSession, number: int) -> None:
    """Print what a camera sees until Ctrl-C."""
    try:
        import cv2
    except ImportError:
        sys.exit("error: a camera needs OpenCV: pip install opencv-python-headless")
    camera = cv2.VideoCapture(number)
    while (frame := camera.read()[1]) is not None:
        print(detect(session, Image.fromarray(frame[..., ::-1])), flush=True)
    sys.exit(f"error: no picture from camera {number}")


def draw_detected(session: onnxruntime.InferenceSession, path: Path) -> None:
    """Print what is found in a picture and write a drawn copy beside it."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    for name, score, box in detect(session, picture):
        print(f"{path}: {name} {score:.3f} {[round(side, 1) for side in box]}")
        ImageDraw.Draw(picture).rectangle(box, outline="red", width=3)
    picture.save(path.with_name(f"{path.stem}_detected.png"))


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    if sys.argv[2].isdigit():
        watch_camera(session, int(sys.argv[2]))
    for path in map(Path, sys.argv[2:]):
        draw_detected(session, path)
