"""Make anchor sizes for a data set, by k-means on the IoU of its training boxes (YOLO9000 section 2).

    python tools/anchors.py --data PATH
    python ssd_object_detection.py --data PATH --anchors plots/anchors.json

prints how well the boxes are overlapped by the module's anchors and by the new ones, and writes the latter.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np
from torchvision.ops import box_convert

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import ssd_object_detection as ssd  # noqa: E402


def best_anchor_iou(boxes: np.ndarray, anchor_sizes=ssd.ANCHOR_SIZES) -> np.ndarray:
    """Return the highest IoU (N,) of boxes (N, 4), normalised xyxy, with any anchor."""
    anchors = box_convert(ssd.make_anchors(anchor_sizes), "cxcywh", "xyxy").numpy()
    best = np.zeros(len(boxes), dtype=np.float32)
    for start in range(0, len(boxes), 64):  # 64 x 9,966 IoUs fit a processor's cache
        part = slice(start, start + 64)
        best[part] = ssd.box_iou(boxes[part, None], anchors).max(axis=1)
    return best


def size_iou(sizes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU (N, M) of sizes (N, 2) and others (M, 2), (w, h) of boxes with a corner in common."""
    boxes = np.concatenate((np.zeros_like(sizes), sizes), axis=1)
    other_boxes = np.concatenate((np.zeros_like(others), others), axis=1)
    return ssd.box_iou(boxes[:, None], other_boxes)


def cluster_sizes(sizes: np.ndarray, count: int) -> np.ndarray:
    """Return the centres (count, 2) of sizes (N, 2), N >= count, by k-means on IoU.

    It starts from `count` sizes at equal steps of their order by area, so the result needs no seed.
    """
    by_area = sizes[np.argsort(sizes.prod(axis=1), kind="stable")]
    centres = by_area[((np.arange(count) + 0.5) * len(sizes) / count).astype(int)]
    for _ in range(100):
        nearest = size_iou(sizes, centres).argmax(axis=1)
        moved = centres.copy()
        for k in set(nearest.tolist()):  # a centre that is nearest to nothing stays
            moved[k] = sizes[nearest == k].mean(axis=0)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def suggest_anchor_sizes(boxes: np.ndarray) -> tuple:
    """Return anchor sizes, in the form of `ssd.ANCHOR_SIZES`, made for boxes (N, 4), normalised xyxy.

    A map's sizes are the centres of the boxes whose scale is nearest to the map's. It keeps its own sizes
    where these boxes are fewer. The numbers of sizes stay, and with them the network's shape.
    """
    sizes = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
    edges = [math.sqrt(scale * following) for scale, following in itertools.pairwise(ssd.ANCHOR_SCALES[:-1])]
    map_of = np.digitize(np.sqrt(sizes.prod(axis=1)), edges)
    suggested = []
    for number, present in enumerate(ssd.ANCHOR_SIZES):
        mine = sizes[map_of == number]
        if len(mine) >= len(present):
            present = tuple((float(w), float(h)) for w, h in cluster_sizes(mine, len(present)))
        suggested.append(present)
    return tuple(suggested)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a training list; they mean what they mean to ssd_object_detection.py."""
    add = parser.add_argument
    add("--data", default="voc2007", help="voc2007 (default), voc0712, shapes or a folder in VOC layout")
    add("--data-root", metavar="DIR", default="data", help="where VOCdevkit and shapes are or will be")
    add("--classes", type=ssd.class_list, help="names a,b,c (default: VOC's, or those annotated)")
    add("--train-split", metavar="LIST", help="list below ImageSets/Main to train on")
    add("--output-dir", metavar="DIR", default=".", help="where plots/ is written")


def run(args: argparse.Namespace) -> None:
    """Print both tables and write plots/anchors.json; InputError for data that cannot be read."""
    data = ssd.load_data(args.data, data_root=args.data_root, classes=args.classes,
                         train_split=args.train_split, test_split="", val_fraction=0)
    boxes = np.concatenate([record.boxes for record in data.train])
    suggested = suggest_anchor_sizes(boxes)
    print(f"{len(boxes)} training boxes of {args.data}: the share that some anchor overlaps by an IoU of")
    print("anchors     .5      .7      mean of the best IoU")
    for name, sizes in (("present", ssd.ANCHOR_SIZES), ("suggested", suggested)):
        best = best_anchor_iou(boxes, sizes)
        print(f"{name:<10} {np.mean(best >= 0.5):.4f}  {np.mean(best >= 0.7):.4f}  {best.mean():.4f}")
    for cells, pairs in zip(ssd.FEATURE_MAPS, suggested, strict=True):
        print(f"{cells:3d} cells: " + ", ".join(f"{w:.3f} x {h:.3f}" for w, h in pairs))
    path = Path(args.output_dir) / "plots" / "anchors.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    ssd.write_json(path, [[[round(side, 4) for side in pair] for pair in pairs] for pairs in suggested])
    print(f"{path}\ntrain with them: --anchors {path}")


def main(argv=None) -> int:
    """Run the program; returns 0, or 2 for a mistake of the user, told in one line."""
    parser = argparse.ArgumentParser(description="Make anchor sizes for a data set.")
    add_data_flags(parser)
    try:
        run(parser.parse_args(argv))
    except (ssd.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
