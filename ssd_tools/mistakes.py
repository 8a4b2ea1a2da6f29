"""Show what a detector gets wrong: its false detections and missed objects, as a table and as pictures.

    python -m ssd_tools.mistakes checkpoints/FILE.pth
    python -m ssd_tools.mistakes checkpoints/FILE.pth --data PATH --test-split val --output-dir DIR

Takes the flags of `ssd_object_detection.py --evaluate` after the checkpoint, with the same defaults, and does
what that does. Besides, it writes every error above the threshold to OUTPUT_DIR/plots/mistakes.csv, draws the
first hundred in mistakes.html and a few in mistakes.png, and adds their number to evaluation.json.
Of training images (`--test-split train`) loose boxes come last: the first are likely errors of annotation.

The kinds of error are those of ssd_tools.analyze.
"""

import csv
import html
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageColor, ImageOps

import ssd_object_detection as ssd
from ssd_tools import report
from ssd_tools.analyze import BACKGROUND_IOU, FOREGROUND_IOU, Arrays, find_errors, unseen_objects
from ssd_tools.common import evaluate_again, evaluation_folder, read_json, run_on_checkpoint

DESCRIPTIONS = {
    "classification": "wrong class",
    "localisation": "loose",
    "both": "wrong class and loose",
    "duplicate": "found already",
    "background": "nothing there",
}
COLUMNS = ("image", "kind", "said", "true", "score", "iou", "x1", "y1", "x2", "y2")  # of mistakes.csv
LOOSE_KINDS = ("localisation", "both")  # of training images seldom an error of the annotation
SHEET_LENGTH = 100  # errors in mistakes.html
CELL_SIDE = 300  # pixels of the picture of one error

# COLUMNS; text; index (of the record); row and target (of found and objects, None: none).
Mistake = dict[str, Any]


# ---- the list ----


def surest_near(found: Arrays, objects: Arrays, row: int) -> tuple[int | None, float, bool]:
    """Return (row of found, IoU, is a hit of another object) of the surest detection on a missed object.

    That overlaps it by IoU .1 or more, or by .5 where it is a hit of another object. (None, 0.0, False) if
    there is none.
    """
    there = np.flatnonzero(found["image_ids"] == objects["image_ids"][row])  # best first
    iou = ssd.box_iou(found["boxes_voc"][there], objects["boxes_voc"][row], extra=1.0)
    is_of_another = found["is_hit"][there] & (found["target"][there] != row)
    near = np.flatnonzero(iou >= np.where(is_of_another, FOREGROUND_IOU, BACKGROUND_IOU))
    if len(near) == 0:
        return None, 0.0, False
    return int(there[near[0]]), float(iou[near[0]]), bool(is_of_another[near[0]])


def false_detection(
    row: int, found: Arrays, objects: Arrays, records: Sequence[ssd.Record], class_names: Sequence[str]
) -> Mistake:
    """Return the Mistake of a false detection; its box is the detection's, in pixels of annotation files."""
    index = int(found["image_ids"][row])
    kind = str(found["kind"][row])
    said = class_names[found["labels"][row] - 1]
    score = round(float(found["scores"][row]), 4)
    iou = round(float(found["iou"][row]), 4)
    target = None
    true = ""
    text = f"said {said} {score:.2f}: {DESCRIPTIONS[kind]}"
    if kind != "background":
        target = int(found["target"][row])
        true = class_names[objects["labels"][target] - 1]
        text += f"\nobject: {true}, IoU {iou:.2f}"
        if objects["difficult"][target]:
            text += ", difficult"
    box = found["boxes_voc"][row].round(1).tolist()
    values = (records[index].image_id, kind, said, true, score, iou, *box)
    mistake = dict(zip(COLUMNS, values, strict=True))
    return {"index": index, "row": row, "target": target, "text": text, **mistake}


def missed_object(
    target: int, found: Arrays, objects: Arrays, records: Sequence[ssd.Record], class_names: Sequence[str]
) -> Mistake:
    """Return the Mistake of a missed object; its box is the object's, what was said that of `surest_near`."""
    index = int(objects["image_ids"][target])
    true = class_names[objects["labels"][target] - 1]
    row, overlap, is_of_another = surest_near(found, objects, target)
    said: str = ""
    score: float | str = ""
    iou: float | str = ""
    text = f"missed {true}\nnothing near it"
    if row is not None:
        said = class_names[found["labels"][row] - 1]
        score = round(float(found["scores"][row]), 4)
        iou = round(overlap, 4)
        text = f"missed {true}\nnear it {said} {score:.2f}, IoU {iou:.2f}"
    if is_of_another:
        text += ", a hit of another"
    box = objects["boxes_voc"][target].round(1).tolist()
    values = (records[index].image_id, "missed", said, true, score, iou, *box)
    mistake = dict(zip(COLUMNS, values, strict=True))
    return {"index": index, "row": row, "target": target, "text": text, **mistake}


def list_errors(
    found: Arrays, objects: Arrays, records: Sequence[ssd.Record], class_names: Sequence[str]
) -> list[Mistake]:
    """Return the false detections of DRAW_SCORE_THRESH or more, the surest first, then the missed objects.

    These are the objects without a hit of that score, the largest first. found, objects: of `find_errors`.
    """
    sides = found, objects, records, class_names
    is_sure = found["scores"] >= ssd.DRAW_SCORE_THRESH
    false_rows = np.flatnonzero((found["kind"] != "") & is_sure).tolist()
    boxes = objects["boxes_voc"]
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1)
    image_area = np.array([record.width * record.height for record in records])
    share = area / image_area[objects["image_ids"]]
    unseen = np.flatnonzero(unseen_objects(found, objects))
    largest_first = unseen[np.argsort(-share[unseen], kind="stable")].tolist()
    false = [false_detection(row, *sides) for row in false_rows]
    return false + [missed_object(target, *sides) for target in largest_first]


def write_mistakes(path: Path, errors: Sequence[Mistake]) -> None:
    """Write mistakes.csv: see COLUMNS."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(errors)

    ssd.write_atomically(path, write)


# ---- the pictures ----


def draw_error(record: ssd.Record, error: Mistake, found: Arrays, objects: Arrays) -> Image.Image:
    """Return a PIL image of an error and what is around it: its object in white, its detection coloured."""
    boxes, colors = [], []
    if error["row"] is not None:  # first, so that it is drawn over the object
        boxes.append(found["boxes_voc"][error["row"]])
        colors.append(ssd.color_of(int(found["labels"][error["row"]])))
    if error["target"] is not None:
        boxes.append(objects["boxes_voc"][error["target"]])
        colors.append("white")
    edges = ssd.from_voc_pixels(np.array(boxes))

    # A square around the boxes is cut out of the image, with gray where it leaves the image.
    low = edges[:, :2].min(axis=0)
    high = edges[:, 2:].max(axis=0)
    reach = min(max(0.75 * (high - low).max(), 24.0), 0.52 * max(record.width, record.height))
    corner = (low + high) / 2 - reach
    border = math.ceil(reach)
    whole = ssd.open_image(record.image_path, (record.width, record.height))
    picture = ImageOps.expand(whole, border, "gray")
    x1, y1, x2, y2 = (np.concatenate((corner, corner + 2 * reach)) + border).tolist()
    picture = picture.resize((CELL_SIDE, CELL_SIDE), Image.Resampling.BICUBIC, (x1, y1, x2, y2))
    edges = (edges - np.tile(corner, 2)) * CELL_SIDE / (2 * reach)
    return ssd.draw_boxes(picture, edges, [""] * len(colors), colors)


def pick_errors(errors: Sequence[Mistake], count: int) -> list[Mistake]:
    """Return the surest false detections, then the first missed objects, `count` of each, one an image."""
    missed = [error for error in errors if error["kind"] == "missed"]
    false = [error for error in errors if error["kind"] != "missed"]
    picked: list[Mistake] = []
    taken: set[int] = set()
    for group in (sorted(false, key=lambda error: -error["score"]), missed):
        end = len(picked) + count
        for error in group:
            if len(picked) < end and error["index"] not in taken:
                taken.add(error["index"])
                picked.append(error)
    return picked


def plot_mistakes(
    errors: Sequence[Mistake],
    records: Sequence[ssd.Record],
    found: Arrays,
    objects: Arrays,
    count: int = 12,
    columns: int = 4,
) -> Figure:
    """Return mistakes.png: `pick_errors` of `list_errors`, each with what it is."""
    picked = pick_errors(errors, count)
    num_missed = sum(error["kind"] == "missed" for error in picked)
    height = max(1, math.ceil(len(picked) / columns))
    figure = Figure(figsize=(3.2 * columns, 3.8 * height + 0.8), layout="constrained")
    figure.suptitle(
        f"{len(picked) - num_missed} false detections of the highest scores, then {num_missed} "
        f"largest objects without a hit of {ssd.DRAW_SCORE_THRESH} or more\n"
        "coloured: detection; white: the object as annotated; one error an image"
    )
    grid = figure.subplots(height, columns, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    for axes, error in zip(grid, picked, strict=False):
        drawn = draw_error(records[error["index"]], error, found, objects)
        axes.imshow(drawn, interpolation="nearest")  # the lines, one pixel wide, stay sharp
        axes.set_title(f"{error['text']}\n{error['image']}", fontsize=9)
    return figure


def save_photographs(figure: Figure, path: Path) -> None:
    """Write a figure of photographs as PNG of 256 colours, a third of the bytes of one of all colours."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    of_boxes = [part for color in (*ssd.PALETTE, "white", "black") for part in ImageColor.getrgb(color)]
    palette = Image.new("P", (1, 1))
    of_photographs = picture.quantize(256 - len(of_boxes) // 3, Image.Quantize.MAXCOVERAGE)  # rare ones, too
    palette.putpalette(of_boxes + (of_photographs.getpalette() or []))
    picture = picture.quantize(palette=palette)
    ssd.write_atomically(path, lambda temporary: picture.save(temporary, "png", optimize=True))


def mistakes_page(
    errors: Sequence[Mistake], records: Sequence[ssd.Record], found: Arrays, objects: Arrays, title: str
) -> str:
    """Return mistakes.html: the first hundred errors in the order of mistakes.csv, complete in itself."""
    cells = ""
    for number, error in enumerate(errors[:SHEET_LENGTH], start=1):
        source = report.embed(draw_error(records[error["index"]], error, found, objects))
        text = html.escape(f"{number}. {error['text']}\n{error['image']}").replace("\n", "<br>")
        cells += f'<figure><img src="{source}" alt="" loading="lazy"><figcaption>{text}</figcaption></figure>'
    about = (
        f"{min(SHEET_LENGTH, len(errors))} of {len(errors)} errors, in the order of mistakes.csv. "
        "Coloured: the detection; white: the object as annotated."
    )
    columns = "repeat(auto-fill, minmax(10rem, 1fr))"
    style = f".sheet {{ display: grid; gap: 0 .8rem; grid-template-columns: {columns} }}"
    return report.document(title, f'<p class="soft">{about}</p><div class="sheet">{cells}</div>', style)


# ---- the command line ----


def run(settings: ssd.Settings, checkpoint: dict[str, Any]) -> None:
    """Measure the checkpoint, list, draw and write its mistakes by the settings."""
    evaluation = evaluate_again(settings, checkpoint)
    records = evaluation.records
    classes = evaluation.classes
    truth = ssd.truth_of(records)
    found, objects = find_errors(evaluation.result["detections"], truth, len(classes))
    errors = list_errors(found, objects, records, classes)
    split = evaluation.numbers["split"]
    if split in ("train", "trainval", settings.train_split):
        errors.sort(key=lambda error: error["kind"] in LOOSE_KINDS)
    plots = Path(settings.output_dir) / "plots"
    write_mistakes(plots / "mistakes.csv", errors)
    title = f"Mistakes of {Path(str(settings.evaluate)).name} on list {split}"
    page = mistakes_page(errors, records, found, objects, title)
    ssd.write_atomically(plots / "mistakes.html", lambda temporary: temporary.write_text(page, "utf-8"))
    save_photographs(plot_mistakes(errors, records, found, objects), plots / "mistakes.png")
    path = evaluation_folder(settings) / "evaluation.json"
    ssd.write_json(path, read_json(path) | {"mistakes": len(errors)})
    print(f"{plots}: mistakes.csv ({len(errors)} errors), mistakes.html, mistakes.png, predictions.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    matplotlib.rcParams["text.parse_math"] = False  # a class name may hold a $
    return run_on_checkpoint(run, argv, "Show what a detector gets wrong, as a table and as pictures.")


if __name__ == "__main__":
    sys.exit(main())
