"""Detect objects with an ONNX file of ssd_tools.export; needs numpy, pillow and onnxruntime 1.25 or newer.

python detect_onnx.py model.onnx picture.jpg ...    # draws picture_detected.png beside each picture
python detect_onnx.py model.onnx 0                  # camera 0, which needs OpenCV too; Ctrl-C ends it
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def resize_weights(old, new, shrinks):
    """Return the matrix (new, old) that resizes a side as OpenCV does; shrinks: whether each side does."""
    scale, target, source = 1 / (new / old), np.arange(new)[:, None], np.arange(old)
    if all(shrinks):  # areas are averaged
        right = np.minimum((target + 1) * scale, source + 1)
        return ((right - np.maximum(target * scale, source)).clip(min=0) / scale).astype(np.float32)
    place = (target + 0.5) * scale - 0.5
    if any(shrinks):  # OpenCV's area mode where it cannot average
        left = np.floor(target * scale)
        place = left + np.maximum(target + 1 - (left + 1) * (new / old), 0).astype(np.float32) % 1
    return (1 - np.abs(place.clip(0, old - 1) - source)).clip(min=0).astype(np.float32)


def detect(session, picture):
    """Return [(class name, score, [x1, y1, x2, y2] in pixels)] of an RGB PIL image, best first."""
    about = session.get_modelmeta().custom_metadata_map
    names, score_thresh, size = (json.loads(about[key]) for key in ("classes", "score_thresh", "image_size"))
    shrinks = [side >= size and max(picture.size) > size for side in picture.size]
    columns, rows = (resize_weights(side, size, shrinks) for side in picture.size)
    flat = np.tensordot(rows, np.asarray(picture, dtype=np.float32), (1, 0))  # (y, width, colour)
    small = np.tensordot(columns, flat, (1, 1)).round()  # (x, y, colour)
    images = small.T[None].astype(np.uint8 if "uint8" in session.get_inputs()[0].type else np.float32)
    boxes, scores, labels = (output[0] for output in session.run(None, {"images": images}))
    boxes_px = (boxes * (picture.size * 2)).tolist()
    kept = [i for i, label in enumerate(labels) if label and scores[i] >= score_thresh[names[label - 1]]]
    return [(names[labels[i] - 1], float(scores[i]), boxes_px[i]) for i in kept]


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    if sys.argv[2].isdigit():
        try:
            import cv2
        except ImportError:
            sys.exit("error: a camera needs OpenCV: pip install opencv-python-headless")
        camera = cv2.VideoCapture(int(sys.argv[2]))
        while (frame := camera.read()[1]) is not None:
            print(detect(session, Image.fromarray(frame[..., ::-1])), flush=True)
        sys.exit(f"error: no picture from camera {sys.argv[2]}")
    for path in map(Path, sys.argv[2:]):
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        for name, score, box in detect(session, picture):
            print(f"{path}: {name} {score:.3f} {[round(side, 1) for side in box]}")
            ImageDraw.Draw(picture).rectangle(box, outline="red", width=3)
        picture.save(path.with_name(f"{path.stem}_detected.png"))
