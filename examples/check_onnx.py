"""Whether ONNX files find on this machine what PyTorch found elsewhere: detect_onnx.py MODEL --check.

Beside MODEL.onnx stand MODEL_check.npz, which ssd_tools.onnx wrote, and perhaps MODEL_int8.onnx.
"""

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime

FAR = 15.0  # pixels of the network's 300 from which two boxes are of different objects
# How far an object's box (pixels) and score may be off, and the share of objects that must agree.
FLOAT = (0.5, 0.001, 1.0)
INT8 = (FAR, 0.15, 0.9)

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes (D, 4) in pixels, scores (D,), labels (D,)


def compare(ours: Rows, theirs: Rows, score_thresh: np.ndarray) -> np.ndarray:
    """Return (box, score) differences (N, 2) between objects above the threshold and the other side's.

    An object that the other side lacks has infinite ones.
    """
    differences = []
    for (boxes, scores, labels), (other_boxes, other_scores, other_labels) in (
        (ours, theirs),
        (theirs, ours),
    ):
        for box, score, label in zip(boxes, scores, labels, strict=True):
            if label == 0 or score < score_thresh[label - 1]:
                continue
            distance = np.abs(other_boxes - box).max(axis=1)  # (D,)
            distance[other_labels != label] = np.inf
            nearest = distance.argmin()
            is_there = distance[nearest] < FAR
            pair = distance[nearest], abs(other_scores[nearest] - score)
            differences.append(pair if is_there else (np.inf, np.inf))
    return np.array(differences).reshape(-1, 2)


def run_check(path: Path, expected: dict[str, np.ndarray]) -> tuple[str, bool, float]:
    """Return (what was measured, whether it agrees, median milliseconds) of an ONNX file."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    thresholds = json.loads(about["score_thresh"])
    score_thresh = np.array([thresholds[name] for name in json.loads(about["classes"])])
    dtype = np.uint8 if "uint8" in session.get_inputs()[0].type else np.float32
    images = expected["images"].astype(dtype)  # (B, 3, 300, 300)
    differences = []
    times = []
    for repetition in range(4):
        for i, image in enumerate(images):
            start = time.perf_counter()
            boxes, scores, labels = session.run(None, {"images": image[None]})
            if repetition:
                times.append(1000 * (time.perf_counter() - start))
                continue
            side = images.shape[2]
            ours = side * boxes[0], scores[0], labels[0]
            theirs = side * expected["boxes"][i], expected["scores"][i], expected["labels"][i]
            differences.append(compare(ours, theirs, score_thresh))
    both = np.concatenate(differences)
    box_limit, score_limit, share = INT8 if json.loads(about.get("int8", "false")) else FLOAT
    good = ((both[:, 0] <= box_limit) & (both[:, 1] <= score_limit)).sum()
    there = both[np.isfinite(both[:, 0])]
    box, score = there.max(axis=0, initial=0.0)
    median, slow = np.percentile(times, (50, 95))
    latency = f"median {median:.1f} ms, 95th percentile {slow:.1f} ms"
    text = (
        f"{path.name}: of {len(both)} objects (both sides) {len(both) - len(there)} have no partner, boxes "
        f"within {box:.3f} pixels, scores within {score:.1e}; {latency}"
    )
    return text, bool(good >= share * len(both)), float(median)


def check(model: str) -> int:
    """Print how the float and the int8 file do on this machine; returns the exit code, 1 if none agrees."""
    named = Path(model)
    base = named.stem.removesuffix("_int8")
    check_set = named.with_name(f"{base}_check.npz")
    if not check_set.is_file():
        raise FileNotFoundError(f"no check set {check_set} beside it: python -m ssd_tools.onnx writes one")
    with np.load(check_set) as content:
        expected = dict(content)
    paths = [named, named.with_name(f"{base}.onnx"), named.with_name(f"{base}_int8.onnx")]
    fitting = []
    for path in dict.fromkeys(path for path in paths if path.is_file()):
        text, is_same, median = run_check(path, expected)
        verdict = "agrees" if is_same else "DIFFERS from PyTorch"
        print(f"{text}: {verdict}", flush=True)
        if is_same:
            fitting.append((median, path.name))
    if not fitting:
        print("take none: update onnxruntime, or export again")
        return 1
    print(f"take {min(fitting)[1]}")
    return 0
