"""Say why a detector fails: run a checkpoint on its test list and take its errors apart.

    python -m ssd_tools.analyze checkpoints/FILE.pth
    python -m ssd_tools.analyze checkpoints/FILE.pth --data PATH --test-split val --output-dir DIR

Takes the flags of `ssd_object_detection.py --evaluate` after the checkpoint, with the same defaults, and does
what that does. Besides, it prints a few tables, draws precision_recall.png, confusion.png, errors.png,
sizes.png, f1.png and calibration.png into OUTPUT_DIR/plots/evaluation, and adds its numbers to
evaluation.json: "coco" (see ssd_tools.coco), "confusion" and "analysis". ssd_tools.mistakes shows the errors.

The kinds of error are those of TIDE (Bolya et al. 2020, arXiv:2008.08115).
"""

import itertools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import ssd_object_detection as ssd
from ssd_tools import coco, report
from ssd_tools.common import evaluate_again, evaluation_folder, read_json, run_on_checkpoint

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1  # t_f and t_b of TIDE section 2.2
HEADINGS = {  # of a table's columns: the six kinds of error, then the two sums of TIDE section 2.3
    "classification": "class",
    "localisation": "place",
    "both": "both",
    "duplicate": "twice",
    "background": "backgr",
    "missed": "missed",
    "false_positives": "allFP",
    "false_negatives": "allFN",
}
KINDS = tuple(HEADINGS)[:6]
MENDED_KINDS = ("classification", "localisation")  # their repair makes hits; those of the others are left out
RELATIVE_EDGES = (0.0, *ssd.ANCHOR_SCALES[:5], math.inf)  # of the box's side over the image's
NUM_BINS = 10  # of the reliability curve
NUM_LISTS = 500  # drawn from the test list, for the range of its AP
MAX_CONFUSION_CLASSES = 40  # a plot of more cannot be read

Arrays = dict[str, np.ndarray]  # columns of detections or objects, a row each; see `ssd.evaluate_voc`
Numbers = dict[str, Any]  # a part of evaluation.json
Curve = tuple[int, str, np.ndarray, np.ndarray]  # class label, text, x, y


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN of nothing."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


# ---- Errors ----


def best_targets(
    rows: np.ndarray, targets: np.ndarray, iou: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (target, iou), each (count,): each row's pair of largest IoU (ties: first), or -1 and 0."""
    pairs = ssd.best_pairs(rows, targets, iou)
    target = np.full(count, -1)
    largest = np.zeros(count)
    target[rows[pairs]] = targets[pairs]
    largest[rows[pairs]] = iou[pairs]
    return target, largest


def overlaps(det: Arrays, gt: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (row of det, row of gt, IoU) of all pairs of an image that overlap, whatever their classes."""
    return ssd.overlap_pairs(det["image_ids"], det["boxes_voc"], gt["image_ids"], gt["boxes_voc"])


def find_errors(detections: Arrays, truth: Arrays, num_classes: int) -> tuple[Arrays, Arrays]:
    """Return (found, objects): detections with their kind of error, objects with whether they are missed.

    The arguments are those of `ssd.evaluate_voc`, whose assignment at IoU .5 says which detections are hits,
    ignored (on a difficult object of their class) or false. `own` is a false detection's largest IoU with the
    objects of its class in its image, `other` that with the objects of other classes. Its kind is the first
    that fits (TIDE section 2.2):

        localisation    .1 <= own < .5
        classification  other >= .5
        duplicate       own >= .5: that object has its hit
        background      own <= .1 and other <= .1
        both            what remains: a wrong class and .1 < other < .5

    Its target is the object of that largest IoU. An object is found if it has a hit, and missed if it has
    none, is not difficult and is the target of no localisation or classification error.

    found: the detections, best first, with is_hit, is_ignored, kind (text, "": no error), target (row of the
    truth, -1: none), iou (with the target) and own_iou. objects: the truth with is_found and is_missed.
    """
    order = np.argsort(-detections["scores"], kind="stable")
    found = {name: column[order] for name, column in detections.items()}
    is_hit, is_ignored = ssd.assign_voc(found, truth, num_classes, FOREGROUND_IOU)
    rows, targets, iou = overlaps(found, truth)
    is_own = found["labels"][rows] == truth["labels"][targets]
    own_target, own = best_targets(rows[is_own], targets[is_own], iou[is_own], len(order))
    other_target, other = best_targets(rows[~is_own], targets[~is_own], iou[~is_own], len(order))
    rules = {
        "": is_hit | is_ignored,
        "localisation": (own >= BACKGROUND_IOU) & (own < FOREGROUND_IOU),
        "classification": other >= FOREGROUND_IOU,
        "duplicate": own >= FOREGROUND_IOU,
        "background": (own <= BACKGROUND_IOU) & (other <= BACKGROUND_IOU),
    }
    kind = np.select(list(rules.values()), list(rules), default="both")
    is_of_other = np.isin(kind, ("classification", "both")) | ((kind == "background") & (other > own))
    target = np.where(is_of_other, other_target, own_target)
    found |= {
        "is_hit": is_hit,
        "is_ignored": is_ignored,
        "kind": kind,
        "target": target,
        "iou": np.where(is_of_other, other, own),
        "own_iou": own,
    }
    is_found = np.zeros(len(truth["labels"]), dtype=bool)
    is_found[target[is_hit]] = True
    is_missed = ~is_found & ~truth["difficult"]
    is_missed[target[np.isin(kind, MENDED_KINDS)]] = False
    return found, {**truth, "is_found": is_found, "is_missed": is_missed}


def repaired_ap(
    found: Arrays, objects: Arrays, num_classes: int, kinds: Sequence[str] = ()
) -> dict[int, float]:
    """Return {label: area AP at IoU .5} after the repair of some kinds of error (TIDE section 2.3).

    classification, localisation: the best-scored detection of each target that has no hit and is not
    difficult becomes a hit of the target's class, with its score; others of these kinds are left out. both,
    duplicate, background: they are left out. missed: these objects no longer count. false_positives: false
    detections are left out. false_negatives: objects without a hit no longer count. kinds () is the AP as it
    is; all of KINDS give 1. NaN for a class without objects; where a repair leaves it none to find, its AP is
    1 if no detection is left either, else 0.
    """
    labels = found["labels"].copy()
    is_hit = found["is_hit"].copy()
    is_found = objects["is_found"].copy()
    is_real = ~objects["difficult"]
    is_chosen = np.isin(found["kind"], [kind for kind in kinds if kind in KINDS])
    is_counted = ~found["is_ignored"] & ~is_chosen
    mended = np.flatnonzero(is_chosen & np.isin(found["kind"], MENDED_KINDS))
    mended = mended[(is_real & ~is_found)[found["target"][mended]]]
    mended = mended[np.unique(found["target"][mended], return_index=True)[1]]  # the best of each target
    is_counted[mended] = True
    is_hit[mended] = True
    is_found[found["target"][mended]] = True
    labels[mended] = objects["labels"][found["target"][mended]]
    if "false_positives" in kinds:
        is_counted &= is_hit
    is_asked = is_real.copy()
    if "missed" in kinds:
        is_asked &= ~objects["is_missed"]
    if "false_negatives" in kinds:
        is_asked &= is_found
    aps = {}
    for label in range(1, num_classes + 1):
        hits = is_hit[(labels == label) & is_counted].cumsum()
        is_own = objects["labels"] == label
        num_gt = int((is_asked & is_own).sum())
        if not (is_real & is_own).any():
            aps[label] = math.nan
        elif num_gt == 0:
            aps[label] = float(len(hits) == 0)
        else:
            aps[label] = ssd.average_precision(hits / num_gt, hits / np.arange(1, len(hits) + 1))[0]
    return aps


def unseen_objects(found: Arrays, objects: Arrays) -> np.ndarray:
    """Return bool (M,): objects that count and have no hit with a score of at least DRAW_SCORE_THRESH."""
    is_unseen = ~objects["difficult"]
    is_unseen[found["target"][found["is_hit"] & (found["scores"] >= ssd.DRAW_SCORE_THRESH)]] = False
    return is_unseen


def analyze_errors(found: Arrays, objects: Arrays, class_names: Sequence[str]) -> Numbers:
    """Return {"ap", "gain", "counts", "confident"}: by class and "mean" the AP, and what repairs gain.

    A kind is repaired alone, the others left as they are, so gains need not sum to what is lost. counts:
    errors of each kind; confident: those that score DRAW_SCORE_THRESH or more (missed: objects without such).
    """
    aps = {}
    for kind in ("", *HEADINGS):
        by_label = repaired_ap(found, objects, len(class_names), [kind])
        values = [*by_label.values(), mean(by_label.values())]
        aps[kind] = dict(zip([*class_names, "mean"], values, strict=True))
    gain = {name: {kind: aps[kind][name] - aps[""][name] for kind in HEADINGS} for name in aps[""]}
    is_sure = found["scores"] >= ssd.DRAW_SCORE_THRESH
    counts = {kind: int((found["kind"] == kind).sum()) for kind in KINDS}
    confident = {kind: int((found["kind"][is_sure] == kind).sum()) for kind in KINDS}
    counts["missed"] = int(objects["is_missed"].sum())
    confident["missed"] = int(unseen_objects(found, objects).sum())
    return {"ap": aps[""], "gain": gain, "counts": counts, "confident": confident}


# ---- Confusion, sizes, thresholds, calibration ----


def confusion_matrix(found: Arrays, objects: Arrays, num_classes: int) -> np.ndarray:
    """Return int64 (K + 1, K + 1): rows are true classes, columns detected ones, 0 is background.

    found, objects: of `find_errors`; detections below DRAW_SCORE_THRESH are left out. A hit and an error of
    kind classification count in the row of their object's class, whether or not the object has a hit of its
    own. Row 0 holds the other false detections: loose, second ones, on nothing. Column 0 holds the objects
    without a hit of that score. Ignored detections and missed difficult objects count nowhere.
    """
    is_on_object = found["is_hit"] | (found["kind"] == "classification")
    true = np.append(objects["labels"], 0)[np.where(is_on_object, found["target"], -1)]
    counted = (found["scores"] >= ssd.DRAW_SCORE_THRESH) & ~found["is_ignored"]
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    np.add.at(matrix, (true[counted], found["labels"][counted]), 1)
    np.add.at(matrix[:, 0], objects["labels"][unseen_objects(found, objects)], 1)
    return matrix


def analyze_sizes(
    found: Arrays, truth: Arrays, records: Sequence[ssd.Record], num_classes: int
) -> list[Numbers]:
    """Return [{"low", "high", "objects", "ap", "recall"}] by the square root of a box's share of its image.

    VOC area AP and recall at IoU .5, means over the classes that have such objects. Objects outside the range
    are ignored like difficult ones, and so are detections outside it that are on no object of their class.
    """
    side_px = np.sqrt([record.width * record.height for record in records])

    def relative_size(side: Arrays) -> np.ndarray:
        boxes = side["boxes_voc"]
        area = (boxes[:, 2:] - boxes[:, :2] + 1).clip(min=0).prod(axis=1)
        return np.sqrt(area) / side_px[side["image_ids"]]

    size = relative_size(found)
    gt_size = relative_size(truth)
    is_on_object = found["own_iou"] >= FOREGROUND_IOU
    ranges = []
    for low, high in itertools.pairwise(RELATIVE_EDGES):
        kept = is_on_object | ((size >= low) & (size < high))
        ignored = truth["difficult"] | (gt_size < low) | (gt_size >= high)
        det = {name: found[name][kept] for name in ("image_ids", "labels", "scores", "boxes_voc")}
        rows = ssd.evaluate_voc(det, {**truth, "difficult": ignored}, num_classes).values()
        recalls = [row["recall"].max(initial=0.0) for row in rows if row["num_gt"]]
        ranges.append(
            {
                "low": low,
                "high": min(high, 1.0),
                "objects": int((~ignored).sum()),
                "ap": mean(row["ap_area"] for row in rows),
                "recall": mean(recalls),
            }
        )
    return ranges


def best_f1(row: dict[str, Any]) -> dict[str, float]:
    """Return {"score_thresh", "f1", "precision", "recall"} where F1 of a class of `evaluate_voc` is best.

    Ties: the highest score. All NaN for a class without objects or detections.
    """
    if not row["num_gt"] or not len(row["scores"]):
        return dict.fromkeys(("score_thresh", "f1", "precision", "recall"), math.nan)
    scores, f1 = ssd.f1_curve(row)
    best = f1.argmax()
    last = np.flatnonzero(row["scores"] >= scores[best])[-1]
    return {
        "score_thresh": float(scores[best]),
        "f1": float(f1[best]),
        "precision": float(row["precision"][last]),
        "recall": float(row["recall"][last]),
    }


def calibrate(found: Arrays) -> Numbers:
    """Return {"bins", "ece", "ece_confident"}: how often detections of a score are hits.

    bins: {"low", "high", "count", "score", "precision"} of ten ranges of the score, NaN in an empty one.
    ece is the expected calibration error: the mean of |precision - score| over the bins, weighted by counts;
    ece_confident that of the bins from DRAW_SCORE_THRESH on. Ignored detections are left out.
    """
    is_counted = ~found["is_ignored"]
    scores = found["scores"][is_counted]
    is_hit = found["is_hit"][is_counted]
    place = (scores * NUM_BINS).astype(int).clip(0, NUM_BINS - 1)
    bins = []
    for number in range(NUM_BINS):
        inside = place == number
        count = int(inside.sum())
        score = float(scores[inside].mean()) if count else math.nan
        precision = float(is_hit[inside].mean()) if count else math.nan
        bins.append(
            {
                "low": number / NUM_BINS,
                "high": (number + 1) / NUM_BINS,
                "count": count,
                "score": score,
                "precision": precision,
            }
        )

    def error(rows: Sequence[Numbers]) -> float:
        if not rows:
            return math.nan
        gaps = [abs(row["precision"] - row["score"]) for row in rows]
        return float(np.average(gaps, weights=[row["count"] for row in rows]))

    filled = [row for row in bins if row["count"]]
    sure = [row for row in filled if row["low"] >= ssd.DRAW_SCORE_THRESH]
    return {"bins": bins, "ece": error(filled), "ece_confident": error(sure)}


def draw_lists(
    found: Arrays, objects: Arrays, class_names: Sequence[str], num_images: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Return (ranges, maps): what AP and mAP (area, IoU .5) lists drawn from this one have (Efron 1979).

    NUM_LISTS lists of as many images are drawn with replacement, always the same ones: of two models, drawn
    from the same list, the differences of maps say whether it can tell them apart. ranges: {name: [low,
    high]} by class and "mean", within which 95 % lie (NaN for a class without objects; a list without any of
    a class does not count for it). maps: of each drawn list. found, objects: of `find_errors`.
    """
    is_counted = ~found["is_ignored"]
    is_real = ~objects["difficult"]
    parts = []  # of each class: images of its detections, best first, which are hits, images of its objects
    for label in range(1, len(class_names) + 1):
        own = is_counted & (found["labels"] == label)
        asked = is_real & (objects["labels"] == label)
        parts.append((found["image_ids"][own], found["is_hit"][own], objects["image_ids"][asked]))
    rng = np.random.default_rng(0)
    aps = np.full((NUM_LISTS, len(class_names)), math.nan)
    for row in aps:
        times = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        for k, (images, is_hit, images_of_objects) in enumerate(parts):
            num_gt = times[images_of_objects].sum()
            drawn = times[images]
            if num_gt:
                hits = (drawn * is_hit).cumsum()
                row[k] = ssd.average_precision(hits / num_gt, hits / drawn.cumsum().clip(min=1))[0]
    maps = list(map(mean, aps))
    ranges = {}
    for name, values in zip([*class_names, "mean"], [*aps.T, maps], strict=True):
        known = [value for value in values if not math.isnan(value)] or [math.nan]
        ranges[name] = np.percentile(known, (2.5, 97.5)).tolist()
    return ranges, np.round(maps, 5).tolist()


def analyze(result: Mapping[str, Any], records: Sequence[ssd.Record], class_names: Sequence[str]) -> Numbers:
    """Return what is added to evaluation.json; result: what `ssd.measure` returns for the records."""
    detections = result["detections"]
    truth = ssd.truth_of(records)
    num_classes = len(class_names)
    found, objects = find_errors(detections, truth, num_classes)
    ranges, maps = draw_lists(found, objects, class_names, len(records))
    return {
        "coco": coco.by_name(coco.coco_figures(detections, truth, num_classes), class_names),
        "confusion": {
            "score_thresh": ssd.DRAW_SCORE_THRESH,
            "iou_thresh": FOREGROUND_IOU,
            "classes": ["background", *class_names],
            "matrix": confusion_matrix(found, objects, num_classes).tolist(),
        },
        "analysis": {
            "tide": analyze_errors(found, objects, class_names),
            "sizes": analyze_sizes(found, truth, records, num_classes),
            "best_f1": {name: best_f1(result["classes"][k]) for k, name in enumerate(class_names, start=1)},
            "calibration": calibrate(found),
            "ap_ranges": ranges,
            "drawn_maps": maps,
        },
    }


# ---- Tables ----


def text_of(value: float | str, digits: int = 3) -> str:
    """Return a number as the tables write it: an integer as it is, NaN as a dash."""
    if isinstance(value, (int, str)):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def tables(numbers: Numbers) -> str:
    """Return the analysis as text: AP gained by kind, its range, AP by size, best thresholds, calibration."""
    tide = numbers["analysis"]["tide"]
    best = numbers["analysis"]["best_f1"]
    calibration = numbers["analysis"]["calibration"]
    width = max(9, *map(len, tide["ap"]))

    def row(name: str, cells: Iterable[float | str]) -> str:
        return f"{name:<{width}}" + "".join(f"{text_of(cell):>10}" for cell in cells)

    lines = [
        "AP@.5 (area) gained if that kind of error were repaired (TIDE):",
        row("", ["AP", *HEADINGS.values()]),
    ]
    lines += [row(name, [tide["ap"][name], *gain.values()]) for name, gain in tide["gain"].items()]
    lines.append(row("errors", ["", *tide["counts"].values()]))
    lines.append(row(f"at {ssd.DRAW_SCORE_THRESH}", ["", *tide["confident"].values()]))
    low, high = map(text_of, numbers["analysis"]["ap_ranges"]["mean"])
    lines.append(
        f"Of {NUM_LISTS} lists drawn at random from these images 95 % have a mAP@.5 of {low} to {high}."
    )
    lines += ["", coco.table(numbers["coco"])]
    columns = {"f1": "F1", "score_thresh": "at score", "precision": "precision", "recall": "recall"}
    lines += ["", "The score threshold of the best F1 at IoU .5:", row("", columns.values())]
    lines += [row(name, [top[key] for key in columns]) for name, top in best.items()]
    lines += ["", "By relative size (square root of the share of the image), IoU .5:"]
    for size in numbers["analysis"]["sizes"]:
        lines.append(
            f"{size['low']:.2f} to {size['high']:.2f}: {size['objects']:6d} objects, "
            f"AP {text_of(size['ap']):>5}, recall {text_of(size['recall']):>5}"
        )
    lines += [
        "",
        f"Expected calibration error: {text_of(calibration['ece'])}; of detections at "
        f"{ssd.DRAW_SCORE_THRESH} or more: {text_of(calibration['ece_confident'])}",
    ]
    return "\n".join(lines)


# ---- Plots ----


def plot_curves(curves: Sequence[Curve], legend_title: str, **settings: Any) -> Figure:
    """Return a Figure of curves (class label, text, x, y) in the unit square; settings: of the axes."""
    columns = max(1, math.ceil(len(curves) / 25))
    figure = Figure(figsize=(8 + 2 * columns, 6), layout="constrained")
    axes = figure.subplots()
    for label, text, x, y in curves:
        turn = label - 1 + (label - 1) // len(ssd.PALETTE)  # another style where the colours begin again
        style = report.LINE_STYLES[turn % len(report.LINE_STYLES)]
        axes.plot(x, y, style, color=ssd.color_of(label), label=text)
    axes.set(xlim=(0, 1.01), ylim=(0, 1.05), **settings)
    axes.grid(alpha=0.3)
    if curves:
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside right upper", title=legend_title, ncols=columns, handlelength=3)
    return figure


def plot_precision_recall(result: Mapping[str, Any], class_names: Sequence[str]) -> Figure:
    """Return precision_recall.png: a curve a class with its area AP in the legend, best first."""
    rows = [(k, row) for k, row in result["classes"].items() if row["num_gt"]]
    curves = [
        (k, f"{class_names[k - 1]} {row['ap_area']:.3f}", row["recall"], row["precision"])
        for k, row in sorted(rows, key=lambda pair: -pair[1]["ap_area"])
    ]
    title = f"Precision and recall at IoU .5, mAP {text_of(result['map_area'])} (area)"
    return plot_curves(curves, "AP (area)", xlabel="recall", ylabel="precision", title=title)


def plot_f1(
    result: Mapping[str, Any], best: Mapping[str, dict[str, float]], class_names: Sequence[str]
) -> Figure:
    """Return f1.png: F1 over the score threshold of each class, the highest first, its best marked."""
    labels = [k for k, name in enumerate(class_names, start=1) if not math.isnan(best[name]["f1"])]
    curves, marks = [], []
    for label in sorted(labels, key=lambda label: -best[class_names[label - 1]]["f1"]):
        name = class_names[label - 1]
        top = best[name]
        text = f"{name} {top['f1']:.3f} at {top['score_thresh']:.3f}"
        curves.append((label, text, *ssd.f1_curve(result["classes"][label])))
        marks.append((top["score_thresh"], top["f1"], ssd.color_of(label)))
    figure = plot_curves(
        curves,
        "best F1",
        ylabel="F1",
        title="F1 at IoU .5 over the score threshold",
        xlabel=f"score threshold (line: {ssd.DRAW_SCORE_THRESH}, the default)",
    )
    axes = figure.axes[0]
    for x, y, color in marks:
        axes.plot(x, y, "o", color=color)
    axes.axvline(ssd.DRAW_SCORE_THRESH, color="black", linewidth=0.8)
    return figure


def plot_confusion(matrix: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Return confusion.png of a `confusion_matrix`: counts, coloured by their share of the class's objects.

    Of more than 40 classes it shows those with the most errors: missed, false, or taken for another.
    """
    num_objects = matrix.diagonal() + matrix[:, 0]
    num_objects[0] = matrix[0].sum()
    share = matrix / num_objects.clip(min=1)[:, None]
    wrong = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
    worst = np.argsort(-wrong[1:], kind="stable")[:MAX_CONFUSION_CLASSES] + 1
    shown = np.concatenate(([0], np.sort(worst)))
    matrix = matrix[np.ix_(shown, shown)]
    share = share[np.ix_(shown, shown)]
    names = [class_names[label - 1] for label in shown[1:]]
    size = max(7.0, 3.5 + 0.5 * len(shown))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1),
        shrink=0.8,
        label="share of the class's objects (first row: of its sum)",
    )
    for row, column in zip(*np.nonzero(matrix), strict=True):
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=color, fontsize=8)
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(shown)), ["missed", *names], **slanted)
    axes.set_yticks(range(len(shown)), ["other errors", *names])
    title = (
        f"Detections of {ssd.DRAW_SCORE_THRESH} or more by the object they cover (IoU .5 or more)\n"
        "An object may be hit and also be taken for another class. Other errors: loose boxes,\n"
        "second boxes on one object, nothing there. Missed: objects without a hit"
    )
    if len(worst) < len(class_names):
        title += f"\nthe {len(worst)} classes with the most errors of {len(class_names)}"
    axes.set(xlabel="detected", ylabel="true")
    axes.set_title(title, fontsize=10)
    return figure


def draw_heatmap(
    axes: Axes, values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], title: str
) -> None:
    """Draw a table of numbers from 0 to 1 as coloured cells; NaN stays white."""
    table = np.array(values, dtype=float).reshape(len(rows), len(columns))
    top = max(0.01, np.nan_to_num(table).max(initial=0.0))
    axes.imshow(table, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        color = "white" if value > 0.6 * top else "black"
        axes.text(column, row, text_of(value), ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)


def plot_errors(tide: Numbers) -> Figure:
    """Return errors.png: the AP gained by the repair of each kind, over all classes and for each."""
    kinds = [kind.replace("_", " ") for kind in HEADINGS]
    names = list(tide["gain"])
    figure = Figure(figsize=(14, 3.6 + 0.32 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    values = np.nan_to_num(list(tide["gain"]["mean"].values()))
    bars = left.barh(kinds, values, color=["C0"] * len(KINDS) + ["C7"] * 2)
    left.bar_label(bars, fmt="%.3f", padding=3)
    left.invert_yaxis()
    left.margins(x=0.15)
    title = f"If one kind were repaired: mAP@.5 {text_of(tide['ap']['mean'])} would gain"
    left.set(xlabel="mAP gained", title=title)
    draw_heatmap(
        right,
        [[tide["gain"][name][kind] for kind in KINDS] for name in names],
        [f"{name} (AP {text_of(tide['ap'][name])})" for name in names],
        KINDS,
        "AP gained, by class",
    )
    return figure


def plot_sizes(per_class: Mapping[str, dict[str, float]], ranges: Sequence[Numbers]) -> Figure:
    """Return sizes.png: COCO's AP and AR by size and class; AP and recall at IoU .5 by relative size."""
    figure = Figure(figsize=(15, 4 + 0.3 * len(per_class)), layout="constrained")
    left, right = figure.subplots(1, 2)
    figures = [f"{what}_{size}" for what in ("ap", "ar") for size in coco.SIZES]
    headings = [f"{name[:2].upper()} {name[3:]}" for name in figures]
    values = [[row[name] for name in figures] for row in per_class.values()]
    title = "AP and AR at IoU .5 to .95 (small to 32, large from 96 pixels a side)"
    draw_heatmap(left, values, list(per_class), headings, title)
    place = np.arange(len(ranges))
    for shift, key, label in ((-0.2, "ap", "AP (area)"), (0.2, "recall", "recall")):
        bars = right.bar(place + shift, np.nan_to_num([row[key] for row in ranges]), 0.4, label=label)
        right.bar_label(bars, [text_of(row[key]) for row in ranges], fontsize=8, padding=2)
    labels = [f"{row['low']:.2f} to {row['high']:.2f}\n{row['objects']} objects" for row in ranges]
    right.set_xticks(place, labels)
    right.set(ylim=(0, 1.15), xlabel="box side over image side", title="At IoU .5, by relative size")
    right.legend(loc="upper center", ncols=2)
    return figure


def plot_calibration(calibration: Numbers) -> Figure:
    """Return calibration.png: precision over mean score in ten ranges of the score, and their counts."""
    figure = Figure(figsize=(6.5, 7.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = [row for row in calibration["bins"] if row["count"]]
    top.plot([0, 1], [0, 1], "--", color="black", linewidth=0.8, label="a score that is the precision")
    top.plot([row["score"] for row in bins], [row["precision"] for row in bins], "o-", label="this model")
    ece = text_of(calibration["ece"])
    ece_confident = text_of(calibration["ece_confident"])
    title = f"expected calibration error {ece}, at {ssd.DRAW_SCORE_THRESH} or more {ece_confident}"
    top.set(ylim=(0, 1.05), ylabel="share of hits", title=f"Reliability of the scores at IoU .5\n{title}")
    top.legend(loc="upper left")
    top.grid(alpha=0.3)
    counts = [row["count"] for row in bins]
    bars = bottom.bar([row["low"] + 0.5 / NUM_BINS for row in bins], counts, 0.9 / NUM_BINS)
    bottom.bar_label(bars, fontsize=8)
    bottom.set(xlim=(0, 1), xlabel="score", ylabel="detections", yscale="log")
    bottom.set_ylim(0.5, 5 * max(counts, default=1))
    return figure


# ---- Command line ----


def run(settings: ssd.Settings, checkpoint: dict[str, Any]) -> None:
    """Evaluate the checkpoint, analyze, print, draw and write by the settings."""
    coco.import_pycocotools()  # before the work
    evaluation = evaluate_again(settings, checkpoint)
    classes = evaluation.classes
    result = evaluation.result
    numbers = analyze(result, evaluation.records, classes)
    print(f"\n{tables(numbers)}\n")
    folder = evaluation_folder(settings)
    path = folder / "evaluation.json"
    ssd.write_json(path, read_json(path) | numbers)
    analysis = numbers["analysis"]
    figures = {
        "precision_recall": plot_precision_recall(result, classes),
        "confusion": plot_confusion(np.array(numbers["confusion"]["matrix"]), classes),
        "errors": plot_errors(analysis["tide"]),
        "sizes": plot_sizes(numbers["coco"]["per_class"], analysis["sizes"]),
        "f1": plot_f1(result, analysis["best_f1"], classes),
        "calibration": plot_calibration(analysis["calibration"]),
    }
    for name, figure in figures.items():
        ssd.save_figure(figure, folder / f"{name}.png")
    written = ", ".join(f"{name}.png" for name in figures)
    print(f"{folder}: evaluation.json, {written}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    matplotlib.rcParams["text.parse_math"] = False  # a class name may hold a $
    return run_on_checkpoint(run, argv, "Say why a detector fails: its errors by kind, size and score.")


if __name__ == "__main__":
    sys.exit(main())
