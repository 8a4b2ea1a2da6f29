"""Say why a detector fails: run a checkpoint on its test list and take its errors apart.

    python tools/analyze.py checkpoints/ssd_shapes_final.pth
    python tools/analyze.py checkpoints/FILE.pth --data PATH --test-split val --output-dir DIR --device cpu

Takes every flag of `ssd_object_detection.py --evaluate`, with the same defaults (the data that the checkpoint was
trained for). Prints a few small tables; draws errors.png, sizes.png, f1.png and calibration.png beside the module's
precision_recall.png and confusion.png into OUTPUT_DIR/plots/evaluation, and OUTPUT_DIR/plots/mistakes.png; writes
evaluation.json as --evaluate does, with the numbers of this tool under "analysis".

The kinds of error are those of TIDE (Bolya et al. 2020, arXiv:2008.08115); `find_errors` and `repaired_ap` say how they
are counted here.
"""

import argparse
import collections
import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import ssd_object_detection as ssd

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1  # t_f and t_b of TIDE section 2.2
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
SPECIAL_KINDS = ("false_positives", "false_negatives")
HEADINGS = dict(zip((*KINDS, *SPECIAL_KINDS), ("class", "place", "both", "twice", "backgr", "missed", "allFP", "allFN"),
                    strict=True))
COCO_SIZES = ("small", "medium", "large")
RELATIVE_EDGES = (0.0, *ssd.ANCHOR_SCALES[:5], math.inf)  # of the box's side over the picture's: the anchors' scales
NUM_BINS = 10  # of the reliability curve


# -- Errors


def best_pairs(rows, targets, iou, count):
    """Return (target, iou), each (count,): the pair of largest IoU of each row (ties: first target), or -1 and 0."""
    order = np.lexsort((targets, -iou, rows))
    order = order[np.unique(rows[order], return_index=True)[1]]
    target, best = np.full(count, -1), np.zeros(count)
    target[rows[order]], best[rows[order]] = targets[order], iou[order]
    return target, best


def find_errors(detections, truth, num_classes):
    """Return the kind of error of each detection and which objects are missed (TIDE section 2.2).

    The arguments are those of `evaluate_voc`, whose assignment at IoU .5 says which detections are hits, ignored (on a
    difficult object of their class) or false. `own` is a false detection's largest IoU with the objects of its class in
    its image, `other` that with the objects of other classes. The first that fits is its kind:

        localisation    .1 <= own < .5
        classification  other >= .5
        duplicate       own >= .5: that object has its hit
        background      own <= .1 and other <= .1
        both            what remains: a wrong class and .1 < other < .5

    Its target is the object of that largest IoU. An object is found if it has a hit, and missed if it has none, is not
    difficult and is the target of no localisation or classification error. Difficult objects are never missed, and an
    error whose target is difficult is repaired by leaving the detection out.

    Returns a dict of arrays, detections (N,) best first: order (rows as given), image (the place of its id among all
    ids, sorted), label, score, is_hit, is_ignored, kind (index into KINDS, -1: no error), target (row of the truth, -1:
    none), iou (with the target), own_iou; objects (M,): gt_image, gt_label, gt_difficult, gt_found, gt_missed.
    """
    det, gt = ssd.check_detections(detections, truth, num_classes)
    order = np.argsort(-det["scores"], kind="stable")
    det = {name: column[order] for name, column in det.items()}
    is_hit, is_ignored = ssd.assign_voc(det, gt, FOREGROUND_IOU)
    images = [side["keys"] // (num_classes + 1) for side in (det, gt)]
    rows, targets, iou = ssd.overlap_pairs(images[0], det["boxes_px"], images[1], gt["boxes_px"], extra=1)
    is_own = det["labels"][rows] == gt["labels"][targets]
    (own_target, own), (other_target, other) = (
        best_pairs(rows[pick], targets[pick], iou[pick], len(order)) for pick in (is_own, ~is_own)
    )
    kind = np.select(
        [is_hit | is_ignored, (own >= BACKGROUND_IOU) & (own < FOREGROUND_IOU), other >= FOREGROUND_IOU,
         own >= FOREGROUND_IOU, (own <= BACKGROUND_IOU) & (other <= BACKGROUND_IOU)],
        [-1, *(KINDS.index(name) for name in ("localisation", "classification", "duplicate", "background"))],
        default=KINDS.index("both"),
    )
    is_other = np.isin(kind, [KINDS.index("classification"), KINDS.index("both")])
    is_other |= (kind == KINDS.index("background")) & (other > own)
    target, best = np.where(is_other, other_target, own_target), np.where(is_other, other, own)
    found, covered = np.zeros((2, len(gt["labels"])), dtype=bool)
    found[target[is_hit]] = True
    covered[target[np.isin(kind, [KINDS.index("classification"), KINDS.index("localisation")])]] = True
    return {"order": order, "image": images[0], "label": det["labels"], "score": det["scores"], "is_hit": is_hit,
            "is_ignored": is_ignored, "kind": kind, "target": target, "iou": best, "own_iou": own,
            "gt_image": images[1], "gt_label": gt["labels"], "gt_difficult": gt["difficult"], "gt_found": found,
            "gt_missed": ~found & ~covered & ~gt["difficult"]}


def repaired_ap(errors, num_classes, kinds=()):
    """Return {label: area AP at IoU .5} after the repair of some kinds of error (TIDE section 2.3).

    classification, localisation: the best-scored detection of each target that has no hit becomes a hit of the target's
    class, with its score; the others of these kinds are left out. both, duplicate, background: they are left out.
    missed: these objects no longer count. false_positives: every false detection is left out. false_negatives: objects
    without a hit no longer count. kinds () is the AP as it is; all of KINDS give 1.

    NaN for a class without objects. Where a repair leaves a class no object to find, its AP is 1 if no detection is
    left either, else 0.
    """
    label, is_hit, is_counted = errors["label"].copy(), errors["is_hit"].copy(), ~errors["is_ignored"]
    found, is_real = errors["gt_found"].copy(), ~errors["gt_difficult"]
    has_kind = np.isin(errors["kind"], [KINDS.index(name) for name in kinds if name in KINDS])
    is_mended = has_kind & np.isin(errors["kind"], [KINDS.index("classification"), KINDS.index("localisation")])
    is_counted &= ~has_kind
    mended, targets = np.flatnonzero(is_mended), errors["target"][is_mended]
    first = np.unique(targets, return_index=True)[1]  # best first, so the first of a target is its best
    first = first[(is_real & ~found)[targets[first]]]
    winners, targets = mended[first], targets[first]
    is_counted[winners] = is_hit[winners] = found[targets] = True
    label[winners] = errors["gt_label"][targets]
    if "false_positives" in kinds:
        is_counted &= is_hit
    is_asked = is_real & ~errors["gt_missed"] if "missed" in kinds else is_real.copy()
    if "false_negatives" in kinds:
        is_asked &= found
    aps = {}
    for k in range(1, num_classes + 1):
        hits, num_gt = is_hit[(label == k) & is_counted].cumsum(), int((is_asked & (errors["gt_label"] == k)).sum())
        if not (is_real & (errors["gt_label"] == k)).any():
            aps[k] = math.nan
        elif num_gt == 0:
            aps[k] = float(len(hits) == 0)
        else:
            aps[k] = ssd.average_precision(hits / num_gt, hits / np.arange(1, len(hits) + 1))[0]
    return aps


def mean(values):
    """Return the mean of what is not NaN; NaN of nothing."""
    values = [v for v in values if not math.isnan(v)]
    return float(np.mean(values)) if values else math.nan


def analyze_errors(errors, class_names):
    """Return {"ap", "gain", "counts", "confident"}: by class name and "mean" the AP, and for each kind the AP gained.

    A kind is repaired alone, the others left as they are, so gains need not sum to what is lost. The repair of a
    classification error changes two classes: the one that loses a false detection and the one that gains a hit.
    counts: errors of each kind; confident: those that score at least DRAW_SCORE_THRESH (missed: objects without such a
    hit).
    """
    def by_name(aps):
        return {**dict(zip(class_names, aps.values(), strict=True)), "mean": mean(aps.values())}

    ap = by_name(repaired_ap(errors, len(class_names)))
    repaired = {kind: by_name(repaired_ap(errors, len(class_names), [kind])) for kind in (*KINDS, *SPECIAL_KINDS)}
    gain = {name: {kind: repaired[kind][name] - ap[name] for kind in repaired} for name in ap}
    is_sure = errors["score"] >= ssd.DRAW_SCORE_THRESH
    counts = {kind: int((errors["kind"] == i).sum()) for i, kind in enumerate(KINDS)}
    confident = {kind: int((errors["kind"][is_sure] == i).sum()) for i, kind in enumerate(KINDS)}
    confident["missed"] = int(unseen_objects(errors).sum())
    return {"iou_foreground": FOREGROUND_IOU, "iou_background": BACKGROUND_IOU, "ap": ap, "gain": gain,
            "counts": {**counts, "missed": int(errors["gt_missed"].sum())}, "confident": confident}


def unseen_objects(errors):
    """Return bool (M,): objects that count and have no hit with a score of at least DRAW_SCORE_THRESH."""
    unseen = ~errors["gt_difficult"]
    unseen[errors["target"][errors["is_hit"] & (errors["score"] >= ssd.DRAW_SCORE_THRESH)]] = False
    return unseen


# -- Sizes, thresholds, calibration


def analyze_sizes(detections, truth, errors, records, class_names):
    """Return {"coco": {name: AP and AR by size}, "relative": [{"low", "high", "objects", "ap", "recall"}]}.

    coco: `evaluate_coco` of each class, small up to 32x32 pixels of the picture, large from 96x96. relative: by the
    square root of a box's share of its picture, whatever that measures in pixels; VOC area AP and recall at IoU .5,
    means over the classes that have such objects. There objects outside the range are ignored like difficult ones, and
    so are detections outside it that are on no object of their class.
    """
    coco, relative = {}, []
    for label, name in enumerate(class_names, start=1):
        one = [{key: np.asarray(column)[side["labels"] == label] for key, column in side.items()}
               for side in (detections, truth)]
        for side in one:
            side["labels"] = np.ones_like(side["labels"])
        figures = ssd.evaluate_coco(*one, 1)
        coco[name] = {f"{what}_{size}": figures[f"{what}_{size}"] for what in ("ap", "ar") for size in COCO_SIZES}
    sides_px = np.sqrt([r.width * r.height for r in records])

    def sizes(side):
        boxes = side["boxes_px"]
        return np.sqrt((boxes[:, 2:] - boxes[:, :2] + 1).clip(min=0).prod(axis=1)) / sides_px[side["image_ids"]]

    det_size, gt_size = sizes(detections), sizes(truth)
    is_on_object = np.zeros(len(det_size), dtype=bool)
    is_on_object[errors["order"]] = errors["own_iou"] >= FOREGROUND_IOU
    for low, high in itertools.pairwise(RELATIVE_EDGES):
        kept = is_on_object | ((det_size >= low) & (det_size < high))
        ignored = truth["difficult"] | (gt_size < low) | (gt_size >= high)
        rows = ssd.evaluate_voc({n: c[kept] for n, c in detections.items()}, {**truth, "difficult": ignored},
                                len(class_names)).values()
        recalls = [r["recall"][-1] if len(r["recall"]) else 0.0 for r in rows if r["num_gt"]]
        relative.append({"low": low, "high": min(high, 1.0), "objects": int((~ignored).sum()),
                         "ap": mean(r["ap_area"] for r in rows), "recall": mean(recalls)})
    return {"coco": coco, "relative": relative}


def calibrate(errors):
    """Return {"bins", "ece", "ece_confident"}: how often detections of a score are hits.

    bins: {"low", "high", "count", "score", "precision"} of ten equal ranges of the score, means NaN in an empty one.
    ece is the expected calibration error, the mean of |precision - score| over the bins, weighted by their counts;
    ece_confident the same of the detections at DRAW_SCORE_THRESH or more. Ignored detections are left out.
    """
    is_counted = ~errors["is_ignored"]
    score, is_hit = errors["score"][is_counted], errors["is_hit"][is_counted]

    def bins_of(score, is_hit):
        place, rows = np.clip((score * NUM_BINS).astype(int), 0, NUM_BINS - 1), []
        for i in range(NUM_BINS):
            inside = place == i
            count = int(inside.sum())
            means = [float(v[inside].mean()) if count else math.nan for v in (score, is_hit)]
            rows.append({"low": i / NUM_BINS, "high": (i + 1) / NUM_BINS, "count": count, "score": means[0],
                         "precision": means[1]})
        gaps = [b["count"] * abs(b["precision"] - b["score"]) for b in rows if b["count"]]
        return rows, sum(gaps) / len(score) if len(score) else math.nan

    is_sure = score >= ssd.DRAW_SCORE_THRESH
    bins, ece = bins_of(score, is_hit)
    return {"bins": bins, "ece": ece, "ece_confident": bins_of(score[is_sure], is_hit[is_sure])[1]}


def analyze(result, records, class_names):
    """Return (numbers, errors): everything that goes below "analysis", and what `find_errors` returns.

    result: what `evaluate` returns for the records.
    """
    detections, truth = result["detections"], ssd.truth_of(records)
    errors = find_errors(detections, truth, len(class_names))
    # Places among the sorted image ids are positions in records only if every record is named.
    ids = np.unique(np.concatenate((truth["image_ids"], detections["image_ids"])))
    errors |= {name: ids[errors[name]] for name in ("image", "gt_image")}
    numbers = {
        "tide": analyze_errors(errors, class_names),
        "sizes": analyze_sizes(detections, truth, errors, records, class_names),
        "best_f1": {name: ssd.best_f1(result["classes"][k]) for k, name in enumerate(class_names, start=1)},
        "calibration": calibrate(errors),
    }
    return numbers, errors


# -- Tables


def number(value, digits=3):
    """Return a number as the tables write it, NaN as a dash."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def tables(numbers):
    """Return the analysis as text: AP gained by kind, AP by size, the best thresholds, calibration."""
    tide, sizes = numbers["tide"], numbers["sizes"]
    width = max(9, *map(len, tide["ap"]))
    lines = ["AP@.5 (area) gained if that kind of error were repaired (TIDE):",
             f"{'':<{width}} {'AP':>7}" + "".join(f"{heading:>8}" for heading in HEADINGS.values())]
    for name, gain in tide["gain"].items():
        row = "".join(f"{number(gain[kind]):>8}" for kind in HEADINGS)
        lines.append(f"{name:<{width}} {number(tide['ap'][name]):>7}{row}")
    for title, counts in (("errors", tide["counts"]), (f"at {ssd.DRAW_SCORE_THRESH}", tide["confident"])):
        lines.append(f"{title:<{width}} {'':>7}" + "".join(f"{counts[kind]:8d}" for kind in KINDS))
    headings = [f"{what.upper()} {size}" for what in ("ap", "ar") for size in COCO_SIZES]
    headings += ["best F1", "at score", "precision", "recall"]
    lines += ["", "By COCO's sizes (AP and AR at IoU .5 to .95), and the threshold of the best F1 at IoU .5:",
              f"{'':<{width}}" + "".join(f"{heading:>10}" for heading in headings)]
    for name, row in sizes["coco"].items():
        best = numbers["best_f1"][name]
        values = [*row.values(), *(best[key] for key in ("f1", "score_thresh", "precision", "recall"))]
        lines.append(f"{name:<{width}}" + "".join(f"{number(v):>10}" for v in values))
    lines += ["", "By relative size (square root of the share of the picture), IoU .5:"]
    lines += [f"{row['low']:.2f} to {row['high']:.2f}: {row['objects']:6d} objects, AP {number(row['ap']):>5}, "
              f"recall {number(row['recall']):>5}" for row in sizes["relative"]]
    calibration = numbers["calibration"]
    lines += ["", f"Expected calibration error: {number(calibration['ece'])}; of detections at "
                  f"{ssd.DRAW_SCORE_THRESH} or more: {number(calibration['ece_confident'])}"]
    return "\n".join(lines)


# -- Plots


def heatmap(axes, values, rows, columns, title):
    """Draw a table of numbers from 0 to 1 as coloured cells; NaN stays white."""
    values = np.array(values, dtype=float).reshape(len(rows), len(columns))
    top = max(0.01, np.nanmax(values, initial=0.0)) if not np.isnan(values).all() else 1.0
    axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 0.6 * top else "black"
        axes.text(column, row, number(value), ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)


def plot_errors(tide):
    """Return errors.png: the AP gained by the repair of each kind, over all classes and for each."""
    kinds = [kind.replace("_", " ") for kind in HEADINGS]
    names = list(tide["gain"])
    figure = Figure(figsize=(14, 3.6 + 0.32 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    values = [0.0 if math.isnan(tide["gain"]["mean"][kind]) else tide["gain"]["mean"][kind] for kind in HEADINGS]
    left.barh(kinds, values, color=["C0"] * len(KINDS) + ["C7"] * len(SPECIAL_KINDS))
    left.bar_label(left.containers[0], fmt="%.3f", padding=3)
    left.invert_yaxis()
    left.margins(x=0.15)
    left.set(xlabel="mAP gained", title=f"If one kind were repaired: mAP@.5 {number(tide['ap']['mean'])} would gain")
    heatmap(right, [list(tide["gain"][n].values()) for n in names],
            [f"{n} (AP {number(tide['ap'][n])})" for n in names], kinds, "AP gained, by class")
    return figure


def plot_sizes(sizes):
    """Return sizes.png: COCO's AP and AR by size and class; AP and recall at IoU .5 by relative size."""
    names = list(sizes["coco"])
    figure = Figure(figsize=(14, 4 + 0.3 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2)
    columns = [f"{what} {size}" for what in ("AP", "AR") for size in COCO_SIZES]
    heatmap(left, [list(sizes["coco"][n].values()) for n in names], names, columns,
            "AP and AR at IoU .5 to .95 (small to 32, large from 96 pixels a side)")
    rows = sizes["relative"]
    place = np.arange(len(rows))
    for shift, key, label in ((-0.2, "ap", "AP (area)"), (0.2, "recall", "recall")):
        bars = right.bar(place + shift, [0.0 if math.isnan(r[key]) else r[key] for r in rows], 0.4, label=label)
        right.bar_label(bars, [number(r[key], 2) for r in rows], fontsize=8, padding=2)
    right.set_xticks(place, [f"{r['low']:.2f} to {r['high']:.2f}\n{r['objects']} objects" for r in rows])
    right.set(ylim=(0, 1.15), xlabel="side of the box over the picture's", title="At IoU .5, by relative size")
    right.legend(loc="upper center", ncols=2)
    return figure


def plot_f1(result, best, class_names):
    """Return f1.png: F1 over the score threshold of each class, its best marked, the highest first."""
    columns = 1 + (len(class_names) - 1) // 25
    figure = Figure(figsize=(8 + 2 * columns, 6), layout="constrained")
    axes = figure.subplots()
    rows = [(best[name], result["classes"][k], name) for k, name in enumerate(class_names, start=1)]
    rows = sorted((r for r in rows if not math.isnan(r[0]["f1"])), key=lambda r: -r[0]["f1"])
    for place, (best_row, row, name) in enumerate(rows):
        color, style = ssd.color_of(place + 1), ("-", "--", ":")[place // 10 % 3]
        label = f"{name} {best_row['f1']:.3f} at {best_row['score_thresh']:.2f}"
        axes.plot(*ssd.f1_curve(row), style, color=color, label=label)
        axes.plot(best_row["score_thresh"], best_row["f1"], "o", color=color)
    axes.axvline(ssd.DRAW_SCORE_THRESH, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="score threshold (dashed: if nothing was held out)", ylabel="F1",
             title="F1 at IoU .5 over the score threshold")
    axes.grid(alpha=0.3)
    if rows:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title="best F1", ncols=columns)
    return figure


def plot_calibration(calibration):
    """Return calibration.png: precision over mean score in ten ranges of the score, and how many each holds."""
    figure = Figure(figsize=(6.5, 7.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = [b for b in calibration["bins"] if b["count"]]
    top.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--", label="a score that is the precision")
    top.plot([b["score"] for b in bins], [b["precision"] for b in bins], "o-", label="this model")
    top.set(ylim=(0, 1.02), ylabel="share of hits", title="Reliability of the scores at IoU .5\nexpected calibration "
            f"error {number(calibration['ece'])}, at {ssd.DRAW_SCORE_THRESH} or more "
            f"{number(calibration['ece_confident'])}")
    top.legend(loc="upper left")
    top.grid(alpha=0.3)
    bars = bottom.bar([b["low"] + 0.5 / NUM_BINS for b in bins], [b["count"] for b in bins], 0.9 / NUM_BINS)
    bottom.bar_label(bars, fontsize=8)
    bottom.set(xlim=(0, 1), xlabel="score", ylabel="detections", yscale="log")
    bottom.set_ylim(0.5, 5 * max([b["count"] for b in bins], default=1))
    return figure


def pick_mistakes(errors, count):
    """Return rows of the false detections with the highest scores, at most two of an image."""
    rows, taken = [], collections.Counter()
    for row in np.flatnonzero(errors["kind"] >= 0).tolist():
        image = int(errors["image"][row])
        if len(rows) < count and taken[image] < 2:
            rows.append(row)
            taken[image] += 1
    return rows


def pick_misses(errors, records, truth, count):
    """Return rows of the largest objects, by their share of the picture, without a hit that would be drawn."""
    boxes = truth["boxes_px"]
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1)
    share = area / np.array([r.width * r.height for r in records])[truth["image_ids"]]
    unseen = np.flatnonzero(unseen_objects(errors))
    return unseen[np.argsort(-share[unseen], kind="stable")][:count].tolist()


def crop(record, boxes_px, side=330):
    """Return (image, scale, corner): a square part of a picture around boxes, with context, enlarged to side pixels."""
    boxes_px, image = np.asarray(boxes_px), Image.fromarray(ssd.read_image(record.image_path))
    low, high = boxes_px[:, :2].min(axis=0), boxes_px[:, 2:].max(axis=0)
    size = min(math.ceil(max(1.5 * (high - low).max(), 48.0)), max(image.size))
    spare = np.array(image.size) - size  # negative where the picture is shorter: black on both sides
    corner = np.where(spare < 0, spare // 2, np.clip((low + high - size) // 2, 0, spare.clip(min=0))).astype(int)
    part = image.crop((*corner.tolist(), *(corner + size).tolist()))
    return part.resize((side, side), Image.Resampling.BICUBIC), side / size, corner


def explain_mistake(errors, row, class_names):
    """Return what a false detection really is, in a line."""
    kind, target, iou = KINDS[errors["kind"][row]], errors["target"][row], errors["iou"][row]
    if kind == "background":
        return "nothing there" + (f" (IoU {iou:.2f})" if target >= 0 else "")
    name = class_names[errors["gt_label"][target] - 1] + (", difficult" if errors["gt_difficult"][target] else "")
    return {"classification": f"wrong class: {name}, IoU {iou:.2f}", "localisation": f"loose: IoU {iou:.2f}",
            "both": f"wrong class and loose: {name}, IoU {iou:.2f}",
            "duplicate": f"found already, IoU {iou:.2f}"}[kind]


def surest_near(errors, detections, truth, row):
    """Return (place in errors, IoU) of the surest detection on an object, IoU .1 or more; (None, 0) if there is none.

    A hit of another object is passed over unless it overlaps this one by IoU .5 or more too.
    """
    there = np.flatnonzero(errors["image"] == truth["image_ids"][row])  # best first
    boxes_px, keys = detections["boxes_px"][errors["order"][there]], np.zeros(len(there), dtype=int)
    near, _, iou = ssd.overlap_pairs(keys, boxes_px, np.zeros(1, dtype=int), truth["boxes_px"][[row]], extra=1)
    is_of_another = errors["is_hit"][there[near]] & (errors["target"][there[near]] != row)
    fitting = np.flatnonzero(iou >= np.where(is_of_another, FOREGROUND_IOU, BACKGROUND_IOU))
    return (int(there[near[fitting[0]]]), float(iou[fitting[0]])) if len(fitting) else (None, 0.0)


def describe_mistakes(errors, detections, truth, records, class_names, count):
    """Return two lists of (record, [place of a detection], [row of the truth], what to say): false ones and misses."""
    false, missed = [], []
    for place in pick_mistakes(errors, count):
        about = [] if KINDS[errors["kind"][place]] == "background" else [errors["target"][place]]
        said = f"said {class_names[errors['label'][place] - 1]} {errors['score'][place]:.2f}"
        record = records[errors["image"][place]]
        false.append((record, [place], about, f"{said}\n{explain_mistake(errors, place, class_names)}"))
    for row in pick_misses(errors, records, truth, count):
        place, iou = surest_near(errors, detections, truth, row)
        near = "nothing near it"
        if place is not None:
            near = f"near it {class_names[errors['label'][place] - 1]} {errors['score'][place]:.2f}, IoU {iou:.2f}"
            near += ", a hit of another" if errors["is_hit"][place] and errors["target"][place] != row else ""
        text = f"missed {class_names[truth['labels'][row] - 1]}\n{near}"
        missed.append((records[truth["image_ids"][row]], [] if place is None else [place], [row], text))
    return false, missed


def plot_mistakes(errors, detections, truth, records, class_names, count=12, columns=4):
    """Return mistakes.png: the false detections of the highest scores, then the largest objects that nothing shows.

    Solid: the detection, in its class's colour. Dashed white: the object that it is about. Every cell says what was
    said, what it really is, and where.
    """
    false, missed = describe_mistakes(errors, detections, truth, records, class_names, count)
    rows = [math.ceil(len(cells) / columns) for cells in (false, missed)]
    figure = Figure(figsize=(3.5 * columns, 4.2 * max(1, sum(rows)) + 0.8), layout="constrained")
    figure.suptitle(f"{len(false)} false detections of the highest scores, then {len(missed)} largest objects without "
                    f"a hit of {ssd.DRAW_SCORE_THRESH} or more\nsolid: detection; dashed: the object")
    axes = figure.subplots(max(1, sum(rows)), columns, squeeze=False)
    for cell in axes.flat:
        cell.axis("off")
    places = [*axes[: rows[0]].flat[: len(false)], *axes[rows[0] :].flat[: len(missed)]]
    for cell, (record, found, about, text) in zip(places, false + missed, strict=True):
        found, about = errors["order"][np.array(found, dtype=int)], np.array(about, dtype=int)
        solid, dashed = (boxes_px - np.array([1, 1, 0, 0])  # VOC pixels -> edges
                         for boxes_px in (detections["boxes_px"][found], truth["boxes_px"][about]))
        image, scale, corner = crop(record, np.concatenate((solid, dashed)))
        shift, colors = np.tile(corner, 2), [ssd.color_of(k) for k in detections["labels"][found].tolist()]
        ssd.draw_boxes(image, (solid - shift) * scale, [""] * len(found), colors)
        ssd.draw_boxes(image, (dashed - shift) * scale, [""] * len(about), ["white"] * len(about), dashed=True)
        cell.imshow(image)
        cell.set_title(f"{text}\n{record.image_id}", fontsize=9)
    return figure


# -- Command line


def parse_args(argv=None):
    """Return (namespace of the module's flags: those given, then the checkpoint's data, then defaults; checkpoint)."""
    parser = argparse.ArgumentParser(
        description="Say why a detector fails: errors by kind, size and score, and pictures of the worst.",
        epilog="Every flag of 'ssd_object_detection.py --evaluate' is taken too, with the same default: --data, "
               "--data-root, --test-split, --output-dir, --device, --score-thresh, --nms-iou, --batch-size ...",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pth file that training left")
    path, rest = parser.parse_known_args(argv)
    flags = ["--evaluate", path.checkpoint, *rest]
    return ssd.evaluation_args(flags, ssd.parse_args(flags))


def run(args, checkpoint):
    """Detect, analyze, print, draw and write by the flags."""
    plots, (data, _, result, about) = Path(args.output_dir) / "plots", ssd.evaluate_checkpoint(args, checkpoint)
    numbers, errors = analyze(result, data.test, data.classes)
    folder = plots / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    _, summary = ssd.report(result, data.test, data.classes, folder, **about, analysis=numbers)
    print(f"\n{tables(numbers)}\n")
    ssd.save_figure(plot_errors(numbers["tide"]), folder / "errors.png")
    ssd.save_figure(plot_sizes(numbers["sizes"]), folder / "sizes.png")
    ssd.save_figure(plot_f1(result, numbers["best_f1"], data.classes), folder / "f1.png")
    ssd.save_figure(plot_calibration(numbers["calibration"]), folder / "calibration.png")
    mistakes = plot_mistakes(errors, result["detections"], ssd.truth_of(data.test), data.test, data.classes)
    ssd.save_figure(mistakes, plots / "mistakes.png")
    print(f"{summary}\n{folder}\n{plots / 'mistakes.png'}")


def main(argv=None):
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    try:
        run(*parse_args(argv))
    except (ssd.InputError, OSError) as error:
        print(f"error: {str(error).strip().splitlines()[-1].split('InputError: ')[-1]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
