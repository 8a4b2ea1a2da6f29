"""The speed of the VOC scorer, against pycocotools restricted to IoU .5, on the same random arrays.

The arrays are seeded and look like a detector's at a low threshold: 3 objects an image of 500x375, 12 to 280
pixels large, of 20 classes (class k in proportion to 1/k), a tenth of them difficult. Of 200 detections an
image four in ten are objects moved and stretched, six in seven of those under the right class and with scores
that rise with the overlap; the others lie anywhere, with low scores.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --images 500 --json evaluation.json

Timed is the scoring alone, from arrays, on one core: `evaluate_voc` at IoU .5 against pycocotools' evaluate()
and accumulate(). The dicts that pycocotools reads and its index are made before the clock starts.
"""

import contextlib
import io
from collections.abc import Sequence

import common
import numpy as np
from common import ssd
from pycocotools.cocoeval import COCOeval

from ssd_tools import coco

IMAGE = np.array([500, 375])
OBJECTS, DETECTIONS, CLASSES = 3, 200, 20


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return boxes (N, 4) in VOC pixels, 12 to 280 pixels large, anywhere in an image."""
    side = np.exp(rng.uniform(np.log(12), np.log(280), (count, 1)))
    stretch = np.exp(rng.normal(0, 0.35, (count, 1)))
    sides = np.minimum(side * np.hstack((stretch, 1 / stretch)), IMAGE - 1)
    low = 1 + rng.random((count, 2)) * (IMAGE - sides)
    return np.hstack((low, low + sides - 1))


def make_arrays(images: int, seed: int = 0, classes: int = CLASSES) -> tuple[dict, dict]:
    """Return (detections, truth) as `evaluate_voc` takes them: what the docstring above describes."""
    rng = np.random.default_rng(seed)
    num_gt = rng.poisson(OBJECTS, images)
    gt_images = np.repeat(np.arange(images), num_gt)
    share = 1 / np.arange(1, classes + 1)
    gt_labels = 1 + rng.choice(classes, len(gt_images), p=share / share.sum())
    gt_boxes = random_boxes(rng, len(gt_images))
    truth = {
        "image_ids": gt_images,
        "labels": gt_labels,
        "boxes_voc": gt_boxes,
        "difficult": rng.random(len(gt_images)) < 0.1,
    }

    image_ids = np.repeat(np.arange(images), DETECTIONS)  # all anywhere at first
    count = len(image_ids)
    boxes_voc = random_boxes(rng, count)
    labels = rng.integers(1, classes + 1, count)
    scores = 0.01 + 0.3 * rng.random(count) ** 3

    near = np.flatnonzero((rng.random(count) < 0.4) & (num_gt[image_ids] > 0))  # then some near an object
    first = np.cumsum(num_gt) - num_gt
    source = first[image_ids[near]] + (rng.random(len(near)) * num_gt[image_ids[near]]).astype(int)
    looseness = rng.choice([0.03, 0.1, 0.25], (len(near), 1))
    sides = np.tile(gt_boxes[source, 2:] - gt_boxes[source, :2], 2)
    boxes_voc[near] = gt_boxes[source] + rng.normal(0, 1, (len(near), 4)) * looseness * sides
    boxes_voc[near, 2:] = np.maximum(boxes_voc[near, 2:], boxes_voc[near, :2] + 1)
    is_right = rng.random(len(near)) < 6 / 7
    labels[near[is_right]] = gt_labels[source[is_right]]
    scores[near] = np.clip(0.9 - 2.5 * looseness[:, 0] + rng.normal(0, 0.15, len(near)), 0.01, 1)
    detections = {"image_ids": image_ids, "labels": labels, "scores": scores.round(4), "boxes_voc": boxes_voc}
    return detections, truth


def make_judge(detections: dict, truth: dict) -> COCOeval:
    """Return a COCOeval of both, restricted to IoU .5 and objects of all sizes."""
    judge = coco.make_judge(detections, truth, CLASSES)
    judge.params.iouThrs, judge.params.maxDets = np.array([0.5]), [100]
    judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
    return judge


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure by the flags, print the table; returns what --json holds."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--images", type=ssd.positive_int, default=5000, help="images")
    add("--rounds", type=ssd.positive_int, default=3, help="rounds that the median is taken of")
    add("--json", metavar="FILE", help="write the table's numbers there too")
    args = parser.parse_args(argv)
    detections, truth = make_arrays(args.images)
    device = ssd.pick_device("cpu")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        judge = make_judge(detections, truth)
        cases: common.Cases = {
            "pycocotools": lambda: (judge.evaluate(), judge.accumulate()),
            "evaluate_voc": lambda: ssd.evaluate_voc(detections, truth, CLASSES),
        }
        times = common.time_in_turns(cases, args.rounds, device, least=0)
    rows = common.rows_of(times, dict.fromkeys(times, "pycocotools"), images=args.images)
    counts = f"{len(truth['labels'])} objects, {len(detections['labels'])} detections, {CLASSES} classes"
    return common.report(f"VOC scorer: {args.images} images, {counts}", rows, args, device)


if __name__ == "__main__":
    main()
