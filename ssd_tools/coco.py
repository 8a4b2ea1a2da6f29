"""Score a checkpoint as COCO does, by pycocotools: AP over IoU .5 to .95, by size, and average recall.

    python -m ssd_tools.coco checkpoints/FILE.pth
    python -m ssd_tools.coco checkpoints/FILE.pth --data PATH --test-split val --output-dir DIR

Takes the flags of `ssd_object_detection.py --evaluate` after the checkpoint, with the same defaults, and does
what that does. Besides, it prints COCO's figures and writes them to OUTPUT_DIR/plots/evaluation/coco.json. An
object is small up to 32x32 pixels of its image, and large from 96x96.
"""

import contextlib
import io
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import ssd_object_detection as ssd
from ssd_tools.common import evaluate_again, evaluation_folder, optional_import, run_on_checkpoint

SIZES = ("small", "medium", "large")
LIMITS = (1, 10, 100)  # detections an image and class that average recall allows

Arrays = Mapping[str, np.ndarray]  # columns of detections or objects, a row each; see `ssd.evaluate_voc`
Figures = dict[str, Any]  # what `coco_figures` returns


def import_pycocotools() -> tuple[Any, Any]:
    """Return the classes (COCO, COCOeval); InputError if pycocotools is not installed."""
    purpose = "measuring as COCO does"
    coco = optional_import("pycocotools.coco", purpose)
    judge = optional_import("pycocotools.cocoeval", purpose)
    return coco.COCO, judge.COCOeval


def to_coco_rows(side: Arrays) -> list[dict[str, Any]]:
    """Return detections or truth, see `coco_figures`, as a list of COCO's annotation dicts, ids from 1."""
    edges = ssd.from_voc_pixels(side["boxes_voc"])
    corner = edges[:, :2]
    size = edges[:, 2:] - corner
    columns = {
        "image_id": np.asarray(side["image_ids"], dtype=np.int64),
        "category_id": np.asarray(side["labels"], dtype=np.int64),
        "bbox": np.concatenate((corner, size), axis=1),
        "area": size.prod(axis=1),
    }
    if "scores" in side:
        columns["score"] = np.asarray(side["scores"], dtype=np.float64)
    else:
        columns["iscrowd"] = np.asarray(side["difficult"], dtype=np.int64)
    rows: list[dict[str, Any]] = []
    for values in zip(*(column.tolist() for column in columns.values()), strict=True):
        rows.append({"id": len(rows) + 1, **dict(zip(columns, values, strict=True))})
    return rows


def to_figures(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """Return COCO's twelve figures; NaN where there is no ground truth.

    precision (IoUs, recalls, ..., areas, limits) and recall (IoUs, ..., areas, limits) of COCOeval, of one
    class or of all; -1 where there is no ground truth.
    """
    parts = {"ap": precision[..., 0, 2], "ap50": precision[0, ..., 0, 2], "ap75": precision[5, ..., 0, 2]}
    parts |= {f"ap_{size}": precision[..., area, 2] for area, size in enumerate(SIZES, start=1)}
    parts |= {f"ar{limit}": recall[..., 0, place] for place, limit in enumerate(LIMITS)}
    parts |= {f"ar_{size}": recall[..., area, 2] for area, size in enumerate(SIZES, start=1)}
    figures = {}
    for name, values in parts.items():
        valid = values[values > -1]
        figures[name] = float(valid.mean()) if len(valid) else math.nan
    return figures


def make_judge(detections: Arrays, truth: Arrays, num_classes: int) -> Any:
    """Return pycocotools' COCOeval of the arguments of `coco_figures`; it prints what it does."""
    coco_class, judge_class = import_pycocotools()
    images = np.unique(np.concatenate((truth["image_ids"], detections["image_ids"]))).astype(np.int64)
    sides = []
    for side in (truth, detections):
        coco = coco_class()
        coco.dataset = {
            "images": [{"id": image} for image in images.tolist()],
            "categories": [{"id": label} for label in range(1, num_classes + 1)],
            "annotations": to_coco_rows(side),
        }
        coco.createIndex()
        sides.append(coco)
    return judge_class(*sides, "bbox")


def coco_figures(detections: Arrays, truth: Arrays, num_classes: int) -> Figures:
    """Score detections with pycocotools; the arguments are those of `ssd.evaluate_voc`, in VOC pixels.

    Difficult objects are crowds. Returns {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1",
    "ar10", "ar100", "ar_small", "ar_medium", "ar_large", "per_class": {label: the same twelve}}: floats, NaN
    where there is no ground truth. Raises InputError if pycocotools is not installed.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        judge = make_judge(detections, truth, num_classes)
        judge.evaluate()
        judge.accumulate()
    precision, recall = judge.eval["precision"], judge.eval["recall"]
    per_class = {k + 1: to_figures(precision[:, :, k], recall[:, k]) for k in range(num_classes)}
    return {**to_figures(precision, recall), "per_class": per_class}


def table(figures: Figures) -> str:
    """Return the figures of `by_name` as text: a row a class, then that of all classes."""
    rows = {**figures["per_class"], "all": figures}
    names = [name for name in figures if name != "per_class"]
    headings = [re.sub("_([sml]).*", r"\1", name).upper() for name in names]  # AP, AP50, ..., APS, ...
    width = max(9, *map(len, rows))
    lines = [
        "COCO's AP and AR at IoU .5 to .95 (S: up to 32x32 pixels, L: from 96x96; difficult: crowds):",
        " " * width + "".join(f"{heading:>8}" for heading in headings),
    ]
    for row_name, row in rows.items():
        cells = ["-" if math.isnan(row[name]) else f"{row[name]:.4f}" for name in names]
        lines.append(f"{row_name:<{width}}" + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)


def by_name(figures: Figures, classes: Sequence[str]) -> Figures:
    """Return the figures with the classes' names in place of their labels."""
    return {**figures, "per_class": dict(zip(classes, figures["per_class"].values(), strict=True))}


def run(settings: ssd.Settings, checkpoint: dict[str, Any]) -> None:
    """Evaluate the checkpoint; print COCO's figures and write coco.json."""
    import_pycocotools()  # before the work
    evaluation = evaluate_again(settings, checkpoint)
    classes = evaluation.classes
    truth = ssd.truth_of(evaluation.records)
    figures = by_name(coco_figures(evaluation.result["detections"], truth, len(classes)), classes)
    print(f"\n{table(figures)}")
    path = evaluation_folder(settings) / "coco.json"
    about = ("checkpoint", "data", "split", "num_images", "precision", "detection")
    ssd.write_json(path, {name: evaluation.numbers[name] for name in about} | figures)
    print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    return run_on_checkpoint(run, argv, "Score a checkpoint as COCO does.")


if __name__ == "__main__":
    sys.exit(main())
