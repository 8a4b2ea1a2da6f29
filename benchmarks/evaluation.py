"""The evaluator's speed against pycocotools, both on the same random arrays, and how far their values differ.

The arrays are seeded and made to look like a detector's at a low threshold: --objects objects an image of 12 to 280
pixels' geometric mean side on 500x375 pictures, of --classes classes (class k comes up in proportion to 1/k), a tenth
of them difficult. Of --detections detections an image four in ten are objects moved and stretched, six in seven of
those under the right class and with scores that rise with the overlap; the others lie anywhere, low scores first. So
images have hits, duplicates, loose boxes, wrong classes and background as real ones have.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --images 500 --json evaluation.json

Timed is the scoring alone, from arrays: `evaluate_voc`, `evaluate_coco`. pycocotools is timed twice, its evaluate() and
accumulate() alone, and with createIndex() and loadRes() of the same detections as one array, which it cannot do
without; the list of its ground truth dicts is made before the clock starts. For the VOC figures it is restricted to IoU
.5 and the area "all", for the COCO figures it runs its whole protocol. Both run on one core.

The difference of values: COCO, the largest over the twelve summary figures and each class's AP, AP50, AP75. VOC, whose
AP pycocotools does not compute, the largest over each class's area and 11-point AP against the plain loops of
tests/reference.py on the first --reference images.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import reference
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import ssd_object_detection as ssd

SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
           "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")


def make_arrays(*, images, objects, detections, classes, seed):
    """Return (detections, truth) as `evaluate_voc` takes them: what the module's docstring describes."""
    rng, size = np.random.default_rng(seed), np.array([500, 375])

    def boxes(count):
        side = np.exp(rng.uniform(np.log(12), np.log(280), (count, 1)))
        stretch = np.exp(rng.normal(0, 0.35, (count, 1)))
        sides = np.minimum(side * np.hstack((stretch, 1 / stretch)), size - 1)
        low = 1 + rng.random((count, 2)) * (size - sides)
        return np.hstack((low, low + sides - 1))

    share = 1 / np.arange(1, classes + 1)
    num_gt = rng.poisson(objects, images)
    gt_images = np.repeat(np.arange(images), num_gt)
    truth = {"image_ids": gt_images, "boxes_px": boxes(len(gt_images)), "difficult": rng.random(len(gt_images)) < 0.1,
             "labels": 1 + rng.choice(classes, len(gt_images), p=share / share.sum())}
    det_images = np.repeat(np.arange(images), detections)
    first = np.cumsum(num_gt) - num_gt
    near = (rng.random(len(det_images)) < 0.4) & (num_gt[det_images] > 0)
    source = first[det_images[near]] + (rng.random(near.sum()) * num_gt[det_images[near]]).astype(int)
    looseness = rng.choice([0.03, 0.1, 0.25], (len(source), 1))
    found, labels = boxes(len(det_images)), rng.integers(1, classes + 1, len(det_images))
    sides = truth["boxes_px"][source, 2:] - truth["boxes_px"][source, :2]
    found[near] = truth["boxes_px"][source] + rng.normal(0, 1, (len(source), 4)) * looseness * np.tile(sides, 2)
    found[near, 2:] = np.maximum(found[near, 2:], found[near, :2] + 1)
    labels[near] = np.where(rng.random(len(source)) < 6 / 7, truth["labels"][source], labels[near])
    scores = 0.01 + 0.3 * rng.random(len(det_images)) ** 3
    scores[near] = np.clip(0.9 - 2.5 * looseness[:, 0] + rng.normal(0, 0.15, len(source)), 0.01, 1)
    return {"image_ids": det_images, "labels": labels, "scores": scores.round(4), "boxes_px": found}, truth


def coco_rows(side):
    """Return image ids, labels and [x, y, width, height], as pycocotools takes them, of one side's arrays."""
    low, high = side["boxes_px"][:, :2] - 1, side["boxes_px"][:, 2:]
    return side["image_ids"], side["labels"], np.hstack((low, high - low))


def pycocotools_judge(detections, truth, *, images, classes, only_voc):
    """Return (COCOeval, seconds to build it, seconds to evaluate and accumulate)."""
    annotations = [
        {"id": number, "image_id": image, "category_id": label, "bbox": bbox, "area": bbox[2] * bbox[3],
         "iscrowd": crowd}
        for number, (image, label, bbox, crowd) in enumerate(
            zip(*(column.tolist() for column in (*coco_rows(truth), truth["difficult"].astype(int))), strict=True), 1)
    ]
    image_ids, labels, bboxes = coco_rows(detections)
    table = np.column_stack((image_ids, bboxes, detections["scores"], labels))
    coco = COCO()
    coco.dataset = {"images": [{"id": i} for i in range(images)], "annotations": annotations,
                    "categories": [{"id": k} for k in range(1, classes + 1)]}
    began = time.perf_counter()
    coco.createIndex()
    judge = COCOeval(coco, coco.loadRes(table), "bbox")
    if only_voc:
        judge.params.iouThrs, judge.params.maxDets = np.array([0.5]), [100]
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
    built = time.perf_counter()
    judge.evaluate()
    judge.accumulate()
    return judge, built - began, time.perf_counter() - built


def coco_difference(judge, mine, classes):
    """Return the largest difference over the summary figures and the classes' AP, AP50 and AP75."""
    judge.summarize()
    pairs = list(zip(judge.stats, (mine[name] for name in SUMMARY), strict=True))
    for label in range(1, classes + 1):
        precision = judge.eval["precision"][:, :, label - 1, 0, 2]
        theirs = precision.mean(), precision[0].mean(), precision[5].mean()
        pairs += zip(theirs, (mine["per_class"][label][name] for name in ("ap", "ap50", "ap75")), strict=True)
    theirs, own = np.array(pairs, dtype=float).T  # pycocotools writes -1 where there is no ground truth
    return float(np.abs(np.where(theirs == -1, np.nan, theirs) - own)[theirs != -1].max(initial=0.0))


def voc_difference(detections, truth, *, images, classes):
    """Return the largest difference of area and 11-point AP from the loops, on the first `images` images."""
    det, gt = ({name: column[side["image_ids"] < images] for name, column in side.items()}
               for side in (detections, truth))
    mine, largest = ssd.evaluate_voc(det, gt, classes), 0.0
    det_rows = list(zip(*(det[n].tolist() for n in ("image_ids", "labels", "scores", "boxes_px")), strict=True))
    gt_rows = list(zip(*(gt[n].tolist() for n in ("image_ids", "labels", "boxes_px", "difficult")), strict=True))
    for label in range(1, classes + 1):
        outcomes, num_gt = reference.voc_class(det_rows, gt_rows, label)
        theirs, own = reference.voc_ap(outcomes, num_gt), (mine[label]["ap_area"], mine[label]["ap11"])
        if num_gt:
            largest = max(largest, *(abs(a - b) for a, b in zip(theirs, own, strict=True)))
    return largest


def median_time(function, rounds):
    """Return (seconds, what the function returned): the median of `rounds` calls."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - began)
    return statistics.median(times), result


def main(argv=None):
    """Measure by the flags, print the table; returns what --json holds."""
    formatter = type("Formatter", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--images", type=ssd.positive_int, default=5000, help="images")
    add("--objects", type=ssd.positive_float, default=3.0, help="objects an image, on average")
    add("--detections", type=ssd.positive_int, default=200, help="detections an image")
    add("--classes", type=ssd.positive_int, default=20, help="classes")
    add("--reference", type=ssd.natural_int, default=150, metavar="N", help="images whose VOC APs the loops check")
    add("--rounds", type=ssd.positive_int, default=3, help="calls of the module, the median counts; one of the peer")
    add("--seed", type=ssd.natural_int, default=0, help="of the arrays")
    add("--json", metavar="FILE", help="write the table's numbers there too")
    args = parser.parse_args(argv)
    sizes = {name: getattr(args, name) for name in ("images", "objects", "detections", "classes", "seed")}
    detections, truth = make_arrays(**sizes)
    print(f"{args.images} images, {len(truth['labels'])} objects, {len(detections['labels'])} detections, "
          f"{args.classes} classes, seed {args.seed}")
    rows = {}
    for name, function in (("voc", ssd.evaluate_voc), ("coco", ssd.evaluate_coco)):
        own, mine = median_time(lambda function=function: function(detections, truth, args.classes), args.rounds)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            judge, build, score = pycocotools_judge(detections, truth, images=args.images, classes=args.classes,
                                                    only_voc=name == "voc")
            if name == "coco":
                difference = coco_difference(judge, mine, args.classes)
        if name == "voc":
            difference = voc_difference(detections, truth, images=args.reference, classes=args.classes)
        del judge
        rows[name] = {"own_s": own, "pycocotools_s": score, "pycocotools_with_loading_s": build + score,
                      "ratio": score / own, "ratio_with_loading": (build + score) / own,
                      "largest_difference": difference}
    print(f"{'figures':<8} {'own s':>8} {'pycocotools s':>14} {'ratio':>6} {'with loading s':>15} {'ratio':>6} "
          f"{'largest difference':>19}")
    for name, row in rows.items():
        print(f"{name:<8} {row['own_s']:8.3f} {row['pycocotools_s']:14.3f} {row['ratio']:6.1f} "
              f"{row['pycocotools_with_loading_s']:15.3f} {row['ratio_with_loading']:6.1f} "
              f"{row['largest_difference']:19.2e}")
    print(f"voc: difference from the loops of tests/reference.py on {min(args.reference, args.images)} images; "
          "coco: from pycocotools on all")
    result = {"arrays": sizes, "rounds": args.rounds, "reference_images": args.reference, "rows": rows}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
