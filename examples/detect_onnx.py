"""Detect objects with an ONNX file of ssd_tools.onnx; needs numpy, pillow and onnxruntime 1.25 or newer.

python detect_onnx.py model.onnx picture.jpg ...    # draws picture_detected.png where it is started
python detect_onnx.py model.onnx picamera           # or 0: camera_onnx.py, a JSON line a frame, until Ctrl-C
python detect_onnx.py model.onnx --check            # check_onnx.py: does it find the same on this machine?
"""

import json
import os
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
    shrinks = [side >= size and max(picture.size) > size for side in picture.size]
    columns = resize_weights(picture.width, size, shrinks)
    rows = resize_weights(picture.height, size, shrinks)
    flat = np.tensordot(rows, np.asarray(picture, dtype=np.float32), (1, 0))  # (y, width, colour)
    return np.tensordot(columns, flat, (1, 1)).round().T  # (colour, y, x)


def detect(session: onnxruntime.InferenceSession, picture: Image.Image, least: float = 0) -> list[tuple]:
    """Return [(class name, score, [x1, y1, x2, y2] in pixels)], best first; least: 0 is each class's own."""
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    images = resize(picture, about["image_size"])[None]
    if "uint8" in session.get_inputs()[0].type:
        images = images.astype(np.uint8)
    boxes, scores, labels = session.run(None, {"images": images})
    names = [about["classes"][label - 1] for label in labels[0] if label > 0]  # rows of label 0 are empty
    found = zip(names, scores[0].tolist(), (boxes[0] * (picture.size * 2)).tolist(), strict=False)
    return [row for row in found if row[1] >= (least or about["score_thresh"][row[0]])]


def draw_detected(session: onnxruntime.InferenceSession, path: Path, taken: set[Path]) -> None:
    """Print what is found in a picture and draw a copy in the current folder, under a name not taken."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    for name, score, box in detect(session, picture):
        print(f"{path}: {name} {score:.3f} {[round(side, 1) for side in box]}")
        ImageDraw.Draw(picture).rectangle(box, outline="red", width=3)
    copies = (Path(f"{path.stem}_detected{end}.png").resolve() for end in ("", *range(2, 2 + len(taken))))
    target = next(copy for copy in copies if copy not in taken)
    picture.save(target)
    taken.add(target)


def main(model: str, *names: str) -> int:
    """Detect in pictures or a camera; returns the exit code: 0 done, 1 a picture could not be read."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    if "score_thresh" not in session.get_modelmeta().custom_metadata_map:
        raise ValueError("not a file of ssd_tools.onnx")
    if names[0] == "--check":
        import check_onnx  # beside this file

        return check_onnx.check(model)
    if names[0] == "picamera" or names[0].isdigit():
        import camera_onnx

        camera_onnx.watch_camera(lambda picture: detect(session, picture), names[0])
    code = 0
    taken = {Path(name).resolve() for name in names}  # no input is written over
    for path in map(Path, names):
        try:
            draw_detected(session, path, taken)
        except Exception as error:  # Pillow raises many
            print(f"error: {path}: {error}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: detect_onnx.py MODEL.onnx PICTURE... | picamera | 0 | --check")
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(0)
    except Exception as error:  # another onnxruntime, a cut file, no camera, a lost one
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"error: {' '.join(sys.argv[1:])}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)  # a lost picamera would never close
