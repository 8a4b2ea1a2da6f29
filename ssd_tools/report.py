"""Write one HTML page about a run, or about several side by side.

    python -m ssd_tools.report                           # the run of this folder -> plots/report.html
    python -m ssd_tools.report RUN --output report.html  # RUN is what --output-dir was, or a checkpoint
    python -m ssd_tools.report RUN RUN [RUN ...]         # what differs -> plots/comparison.html of the first
    python -m ssd_tools.report RUN --tensorboard         # TensorBoard's events -> checkpoints/tensorboard

The page needs no network. What was not recorded is left out or called not recorded. ssd_tools.hub takes
the words of its model card from here.
"""

import argparse
import base64
import contextlib
import functools
import html
import io
import json
import math
import re
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import ssd_object_detection as ssd
from ssd_tools.common import optional_import, read_json, run_program

PLOTS = {  # titles of what the module draws
    "loss.png": "Losses, validation mAP, learning rate and speed",
    "augmentations.png": "Training images as the network sees them",
    "predictions.png": "Test images: truth in white, detections coloured",
}
MISTAKES = {  # title of what ssd_tools.mistakes draws
    "mistakes.png": "The surest false detections and the largest objects that were missed"
}
ANALYSIS = {  # titles of what ssd_tools.analyze draws; others in plots/evaluation are shown with their name
    "evaluation/precision_recall.png": "Precision and recall of each class",
    "evaluation/confusion.png": "Confusion matrix",
    "evaluation/errors.png": "AP that repairing each kind of error would gain",
    "evaluation/sizes.png": "AP and recall by the size of the object",
    "evaluation/f1.png": "F1 over the score threshold",
    "evaluation/calibration.png": "Share of hits over the score",
}
ERROR_KINDS = {  # those of ssd_tools.analyze
    "localisation": "have the right class and a loose box",
    "classification": "have the wrong class",
    "both": "have the wrong class and a loose box",
    "duplicate": "are on an object found already",
    "background": "are on nothing",
}
ENVIRONMENT_NAMES = {
    "python": "Python",
    "torch": "PyTorch",
    "numpy": "NumPy",
    "cpu_count": "CPU cores",
    "platform": "system",
}  # others are called what their key is
LINE_STYLES = ("-", "--", "-.", ":")  # with the ten colours 40 lines that differ, also to the colour-blind
FEW_OBJECTS = 50  # a class with fewer of them is called uncertain
MAX_IMAGE_WIDTH = 1600  # pixels of an embedded image

EXTRA = ("coco", "confusion", "analysis", "mistakes")  # what the tools add to evaluation.json
# What a measurement says of a model; one that lacks some of it is not shown.
MEASURED = {
    "map_area",
    "map11",
    "map75",
    "per_class",
    "data",
    "split",
    "num_images",
    "precision",
    "detection",
}

Run = dict[str, Any]  # what `read_run` returns
Row = tuple[str, ...]  # of a table of text


# ---- what a run left ----


def is_number(value: object) -> bool:
    """Whether a value from a record is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def dig(content: Any, *keys: str) -> Any:
    """Return what lies below keys in nested dicts; an empty dict where one is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return {} if content is None else content


def dig_numbers(content: Any, *keys: str) -> list[float]:
    """Return the list of finite numbers below keys; an empty one if it is missing or holds something else."""
    found = dig(content, *keys)
    if isinstance(found, list) and all(map(is_number, found)):
        return found
    return []


def read_rows(path: Path, key: str) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl or steps.jsonl that can be read and have a number at key."""
    rows = []
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and is_number(row.get(key))]


def find_checkpoint(source: ssd.PathLike) -> Path:
    """Return the checkpoint of a run's folder: the newest final one, else best.pth, else last.pth."""
    source = Path(source)
    if source.is_file():
        return source
    final = ssd.newest_final_checkpoint(source)
    if final is not None:
        return final
    folder = source / "checkpoints"
    for path in (folder / "best.pth", folder / "last.pth"):
        if path.is_file():
            return path
    raise ssd.InputError(f"{source}: no checkpoint of a run in {folder}")


def read_measurement(
    checkpoint: Mapping[str, Any], source: Path, evaluation: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (test, extra): the test numbers, and what the tools added, see EXTRA; {} where there are none.

    evaluation: the content of an evaluation.json. It counts where it has the mAP of the checkpoint's own
    numbers, or, for a checkpoint without any, where it names that checkpoint.
    """
    extra = {key: evaluation[key] for key in EXTRA if key in evaluation}
    test = checkpoint.get("test")
    if isinstance(test, dict) and test.keys() >= MEASURED:
        is_same = evaluation.get("map_area") == test["map_area"]
        return test, extra if is_same else {}
    if Path(str(evaluation.get("checkpoint"))).name != source.name:
        return {}, {}
    return {key: value for key, value in evaluation.items() if key not in EXTRA}, extra


def find_plots(folder: Path, *, measured: bool, extra: Mapping[str, Any]) -> list[tuple[Path, str]]:
    """Return [(path, title)] of the PNG files of a run in its plots folder.

    measured: whether the last measurement there is of this checkpoint, so that predictions.png is, too;
    extra: what the tools added to it, so that their pictures are of it.
    """
    titles = {folder / name: title for name, title in PLOTS.items() if measured or name != "predictions.png"}
    if measured and "mistakes" in extra:
        titles |= {folder / name: title for name, title in MISTAKES.items()}
    if measured and "analysis" in extra:
        titles |= {folder / name: title for name, title in ANALYSIS.items()}
        for path in sorted((folder / "evaluation").glob("*.png")):
            titles.setdefault(path, path.stem.replace("_", " "))
    return [(path, title) for path, title in titles.items() if path.is_file()]


def is_of_epoch(row: Mapping[str, Any], val: Mapping[str, Any]) -> bool:
    """Whether a row of metrics.jsonl is what a checkpoint recorded of its epoch, to the last digit."""
    return all(row.get(key) == val.get(key) for key in ("epoch", "train_loss"))


def read_run(source: ssd.PathLike, plots: ssd.PathLike | None = None) -> Run:
    """Return what is known of the run that wrote a checkpoint, as a dict.

    config, classes, flags, epoch, val: of the checkpoint; test, extra: see `read_measurement`;
    environment, wall_s, history, plots: of the run.json, metrics.jsonl and plots beside it, empty where these
    are missing or of another run.
    """
    source = Path(source)
    checkpoint = ssd.load_checkpoint(source)
    plots = Path(plots) if plots else source.resolve().parent.parent / "plots"
    evaluation = read_json(plots / "evaluation" / "evaluation.json")
    test, extra = read_measurement(checkpoint, source, evaluation)
    val = checkpoint.get("metrics") or {}
    run = {
        "source": source,
        "config": checkpoint["config"],
        "classes": list(checkpoint["classes"]),
        "flags": checkpoint["args"],
        "epoch": val.get("epoch"),
        "val": val,
        "test": test,
        "extra": extra,
        "environment": {},
        "wall_s": None,
        "history": [],
        "plots": [],
    }
    history = read_rows(source.parent / "metrics.jsonl", "epoch")
    if any(is_of_epoch(row, val) for row in history):  # the files are of the run that wrote the checkpoint
        record = read_json(source.parent / "run.json")
        measured = bool(test) and evaluation.get("map_area") == test.get("map_area")
        run |= {
            "environment": dig(record, "environment"),
            "wall_s": record.get("wall_s"),
            "history": history,
            "plots": find_plots(plots, measured=measured, extra=extra),
        }
    return run


# ---- in words and tables ----


def data_name(flags: Mapping[str, Any]) -> str:
    """Return the names of the data that the flags name, without their folders."""
    names = ssd.data_names(flags.get("data") or "unknown data")
    return " + ".join(Path(str(name)).name for name in names)


def command(run: Run) -> str:
    """Return the command that started the run, its absolute paths without their folders."""
    recorded = run["environment"].get("command") or "ssd_object_detection.py (flags not recorded)"
    words = [re.sub(r"(^|=)/.*/(?=.)", r"\1", word) for word in str(recorded).split(" ")]
    return " ".join(("python", *words))


def machine(run: Run) -> str:
    """Return one sentence on machine, versions and time."""
    env = run["environment"]
    names = ("python", "torch", "torchvision", "numpy")
    versions = ", ".join(f"{name} {env[name]}" for name in names if name in env)
    took = ""
    if is_number(run["wall_s"]):
        took = f" in {run['wall_s'] / 60:.1f} minutes"
    device = env.get("device", "a device that was not recorded")
    return f"Trained on {device} ({env.get('cpu_count')} cores){took}; {versions}."


def class_rows(test: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return [(name, row)] of a test's classes, best AP first, those without objects last."""

    def order(pair: tuple[str, dict[str, Any]]) -> float:
        ap = pair[1]["ap_area"]
        return -ap if is_number(ap) else 1.0

    return sorted(dig(test, "per_class").items(), key=order)


def protocol(run: Run) -> str:
    """Return how the test numbers were measured."""
    test = run["test"]
    if not is_number(test.get("map_area")):
        return "Not yet measured on a test list."
    objects = sum(row["num_gt"] for _, row in class_rows(test))
    detection = test["detection"]
    return (
        f"On list {test['split']} of {data_name(test)}, {test['num_images']} images with {objects} objects: "
        f"mAP@.5 **{test['map_area']:.4f}** (area), **{test['map11']:.4f}** (11-point); mAP@.75 "
        f"**{test['map75']:.4f}** (area). The VOC2007 devkit's rules: one hit an object at IoU .5 (.75) or "
        f"more, difficult objects count neither way. Scores from {detection['score_thresh']:g}, non-maximum "
        f"suppression at IoU {detection['nms_iou_thresh']:g}, at most {ssd.MAX_DETECTIONS} detections an "
        f"image, {test['precision']}."
    )


def table_rows(test: Mapping[str, Any]) -> list[Row]:
    """Return the per-class table as rows of text: the header, the classes, their mean."""

    def text(value: Any) -> str:
        return f"{value:.4f}" if is_number(value) else "no object"

    rows: list[Row] = [("class", "objects", "AP .5 (area)", "AP .5 (11-point)", "AP .75 (area)")]
    for name, row in class_rows(test):
        rows.append((name, str(row["num_gt"]), *(text(row[key]) for key in ("ap_area", "ap11", "ap75"))))
    if len(rows) > 1:
        rows.append(("mean", "", *(text(test[key]) for key in ("map_area", "map11", "map75"))))
    return rows


def plain_markdown(text: str) -> str:
    """Return text with escapes where Markdown or HTML would read a sign."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(text, quote=False))


def markdown(table: Iterable[Row]) -> str:
    """Return rows of text, header first, as a Markdown table, empty without a row."""
    head, *rows = [[plain_markdown(cell) for cell in row] for row in table]
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def errors_in_words(tide: Mapping[str, Any]) -> list[str]:
    """Return sentences on the kinds of error: how many score high, and which one costs most."""
    lines = []
    confident = dig(tide, "confident")
    counts = [(dig(confident, kind), text) for kind, text in ERROR_KINDS.items()]
    if all(is_number(count) for count, _ in counts):
        wrong = ", ".join(f"{count} {text}" for count, text in sorted(counts, reverse=True))
        lines.append(
            f"Of the detections that score {ssd.DRAW_SCORE_THRESH} or more, {wrong}; "
            f"{dig(confident, 'missed')} objects have no hit of that score."
        )
    mean = dig(tide, "gain", "mean")
    gains = [(value, kind) for kind, value in mean.items() if kind in (*ERROR_KINDS, "missed")]
    if gains and all(is_number(value) for value, _ in gains):
        value, kind = max(gains)
        what = "Finding what was missed"
        if kind in ERROR_KINDS:
            what = f"Mending the detections that {ERROR_KINDS[kind]}"
        lines.append(f"{what} would raise the mAP@.5 most, by {value:.4f}.")
    return lines


def analysis_in_words(extra: Mapping[str, Any]) -> list[str]:
    """Return sentences on what ssd_tools.analyze found; none if it was not recorded."""
    lines = []
    drawn = dig_numbers(extra, "analysis", "ap_ranges", "mean")
    if drawn:
        lines.append(
            "Of lists drawn at random from the test images 95 % have a mAP@.5 of {:.3f} to {:.3f}: so much "
            "do other images of the kind change it.".format(*drawn)
        )
    lines += errors_in_words(dig(extra, "analysis", "tide"))
    sizes = {size: dig(extra, "coco", f"ap_{size}") for size in ("small", "medium", "large")}
    if all(map(is_number, sizes.values())):
        shown = ", ".join(f"{size} {ap:.3f}" for size, ap in sizes.items())
        lines.append(f"COCO AP by the object's size (up to 32x32, up to 96x96, larger): {shown}.")
    ece = dig(extra, "analysis", "calibration", "ece")
    if is_number(ece):
        lines.append(f"A score differs from the share of hits it stands for by {ece:.3f} on average.")
    return lines


def classes_in_words(test: Mapping[str, Any]) -> list[str]:
    """Return sentences on the best and the worst class, and on classes with few objects."""
    lines = []
    rows = [(name, row) for name, row in class_rows(test) if is_number(row["ap_area"])]
    if len(rows) > 1:
        shown = [f"{name} (AP {row['ap_area']:.3f}, {row['num_gt']} objects)" for name, row in rows]
        lines.append(f"Best found class: {shown[0]}; worst: {shown[-1]}.")
    few = [f"{name} ({row['num_gt']})" for name, row in rows if row["num_gt"] < FEW_OBJECTS]
    if few:
        lines.append(f"Fewer than {FEW_OBJECTS} test objects, so an uncertain figure: {', '.join(few)}.")
    return lines


def training_in_words(run: Run) -> list[str]:
    """Return sentences on the gap between validation and test, and on the course of the validation loss."""
    lines = []
    val = run["val"].get("val_map_area")
    test = run["test"].get("map_area")
    if is_number(val) and is_number(test):
        direction = "higher" if test > val else "lower"
        lines.append(
            f"The validation mAP@.5 that chose epoch {run['epoch']} was {val:.4f}; the test's is "
            f"{abs(test - val):.4f} {direction}."
        )
    losses = [(row["val_loss"], row["epoch"]) for row in run["history"] if is_number(row.get("val_loss"))]
    if len(losses) > 2:
        least, at = min(losses)
        end, last = losses[-1]
        rise = end / least - 1
        course = " and stayed near that."
        if rise > 0.05:
            course = f" and {rise:.0%} higher at the end: the network learned its training images by heart."
        elif at == last:
            course = ", its last: more epochs may help."
        lines.append(f"The validation loss was lowest in epoch {at} of {last}{course}")
    return lines


def in_words(run: Run) -> list[str]:
    """Return sentences on what the model gets wrong, from the recorded numbers alone."""
    lines = classes_in_words(run["test"]) + analysis_in_words(run["extra"]) + training_in_words(run)
    return lines or ["Not analysed: no measurement was recorded."]


# ---- the page ----

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5c6675; --line: #d9dee5; --blue: #1f5fa8; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
nav { margin-bottom: .8rem; } nav a { display: inline-block; margin: 0 .9rem .3rem 0; color: var(--blue); }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th, td:first-child, .numbers td { overflow-wrap: break-word; }
.numbers :is(td, th):not(:first-child) { text-align: right; }
figure { margin: .8rem 0; } .single img { max-width: 44rem; } .scroll { overflow-x: auto; }
img { width: 100%; height: auto; display: block; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding: .25rem .2rem; } }
pre { overflow-x: auto; background: #f3f5f8; padding: .7rem; border-radius: .4rem; white-space: pre-wrap; }
summary { cursor: pointer; padding: .3rem 0; }
"""


def embed(image: Image.Image) -> str:
    """Return a PIL image as a data URI: as JPEG where that is smaller than PNG, at most 1,600 pixels wide."""
    image = image.convert("RGB")
    image.thumbnail((MAX_IMAGE_WIDTH, 10 * MAX_IMAGE_WIDTH))
    png = io.BytesIO()
    image.save(png, "png", optimize=True)
    jpeg = io.BytesIO()
    image.save(jpeg, "jpeg", quality=85)
    kind, content = "png", png.getvalue()
    if len(jpeg.getvalue()) <= len(content):
        kind, content = "jpeg", jpeg.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def figure(path: Path | IO[bytes], title: str) -> str:
    """Return an image, a file or a binary stream, with its caption as HTML."""
    with Image.open(path) as image:
        kind = "wide" if image.width > 1000 else "single"
        source = embed(image)
    text = html.escape(title, quote=True)
    return (
        f'<figure class="{kind}"><img src="{source}" alt="{text}" loading="lazy">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def table(rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """Return an HTML table of rows of text, header first."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    head, *body = rows
    lines = line(head, "th") + "".join(line(row, "td") for row in body)
    return f'<table class="{kind}">{lines}</table>'


def setting_text(value: Any) -> str:
    """Return the value of a flag in words."""
    if value is None or value == "":
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (list, tuple)):  # fitted anchors
            return f"{sum(map(len, value))} sizes of this data"
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def public_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's flags without folders of its machine: data and files by their names alone."""
    files = {name: Path(flags[name]).name for name in ("init_from", "backbone_weights") if flags.get(name)}
    return {**flags, "data": data_name(flags), **files}


def settings_of(flags: Mapping[str, Any]) -> dict[str, str]:
    """Return {name in words: value in words} of the flags that say how the run trained."""
    return {name.replace("_", " "): setting_text(value) for name, value in public_flags(flags).items()}


def changed_settings(flags: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    """Return (rows of the settings that differ from those of the run's recipe, rows of the others)."""
    argv = []
    if flags.get("recipe") in ssd.RECIPES:
        argv = ["--recipe", flags["recipe"]]
    settings, _ = ssd.load_settings(argv)
    defaults = settings_of(vars(settings))
    rows: list[Row] = list(settings_of(flags).items())
    changed = [row for row in rows if row[0] not in defaults or defaults[row[0]] != row[1]]
    return changed, [row for row in rows if row not in changed]


def settings_section(run: Run) -> str:
    """Return HTML of the command and the settings of a run, those of its recipe folded away."""
    changed, others = changed_settings(run["flags"])
    head = ("setting", "value")
    summary = f"<summary>{len(others)} settings of the recipe</summary>"
    details = f"<details>{summary}{table([head, *others])}</details>"
    return f"<pre>{html.escape(command(run))}</pre>{table([head, *changed])}{details}"


def environment_section(run: Run) -> str:
    """Return HTML of the machine and versions of a run."""
    recorded = run["environment"].items()
    rows = [(ENVIRONMENT_NAMES.get(name, name), value) for name, value in recorded if name != "command"]
    if not rows:
        return "<p>Not recorded.</p>"
    return table([("", ""), *rows])


def sections(run: Run) -> list[tuple[str, str]]:
    """Return [(title, HTML)] of a page, those without content left out."""
    figures = {path.name: figure(path, title) for path, title in run["plots"]}
    mistakes = "".join(fig for name, fig in figures.items() if name not in PLOTS)
    words = "".join(f"<li>{html.escape(line)}</li>" for line in in_words(run))
    measured = html.escape(protocol(run)).replace("**", "")
    classes = ""
    if class_rows(run["test"]):
        classes = table(table_rows(run["test"]), "numbers")
    found = {
        "Results": f"<p>{measured}</p>",
        "Curves": figures.get("loss.png", ""),
        "Classes": classes,
        "Gallery": figures.get("predictions.png", ""),
        "Mistakes": f"<ul>{words}</ul>{mistakes}",
        "Data": figures.get("augmentations.png", ""),
        "Settings": settings_section(run),
        "Environment": environment_section(run),
    }
    return [(title, content) for title, content in found.items() if content]


def epoch_text(run: Run) -> str:
    """Return which epoch a run kept, and of how many; a dash if that is not recorded."""
    if not run["epoch"]:
        return "-"
    return f"{run['epoch']} of {run['flags'].get('epochs')}"


def wall_text(run: Run) -> str:
    """Return how long a run took; a dash if that is not recorded."""
    if not is_number(run["wall_s"]):
        return "-"
    return f"{run['wall_s'] / 60:.1f} min"


def tiles(run: Run) -> list[tuple[str, str]]:
    """Return [(value, what it is)] for the top of the page."""
    test = run["test"]
    precision = test.get("precision")
    measured = {
        f"test mAP@.5, area, {precision}": test.get("map_area"),
        f"test mAP@.5, 11-point, {precision}": test.get("map11"),
        f"test mAP@.75, area, {precision}": test.get("map75"),
        "validation mAP@.5, area": run["val"].get("val_map_area"),
    }
    found = [(f"{value:.4f}", what) for what, value in measured.items() if is_number(value)]
    found += [(epoch_text(run), "epoch chosen"), (wall_text(run), "wall time")]
    return [(value, what) for value, what in found if value != "-"]


def document(title: str, body: str, style: str = "") -> str:
    """Return an HTML page, complete in itself; body is HTML, title is text."""
    title = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<title>{title}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}{style}</style></head><body><h1>{title}</h1>'
        f"{body}</body></html>\n"
    )


def with_contents(parts: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Return HTML of [(title, HTML)] as sections, behind links to them."""
    links = "".join(f'<a href="#s{number}">{title}</a>' for number, (title, _) in enumerate(parts))
    content = "".join(
        f'<section id="s{number}"><h2>{title}</h2>{body}</section>'
        for number, (title, body) in enumerate(parts)
    )
    return links, content


def page(run: Run) -> str:
    """Return the HTML page of a run."""
    config = run["config"]
    summary = (
        f"{len(run['classes'])} classes: {', '.join(run['classes'])}. Width {config['width']:g}, "
        f"batch norm: {config['batch_norm']}. {run['source'].name} {run['environment'].get('started', '')}"
    )
    shown = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b>{html.escape(what)}</div>'
        for value, what in tiles(run)
    )
    links, content = with_contents(sections(run))
    return document(
        f"SSD300 on {data_name(run['flags'])}",
        f'<p class="soft">{html.escape(summary)}</p><nav>{links}</nav>'
        f'<div class="tiles">{shown}</div>{content}',
    )


# ---- several runs side by side ----


def name_runs(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: the last parts of its folder, as many as make the names differ."""
    folders = [run["source"].resolve().parent.parent.parts for run in runs]
    for count in range(1, max(map(len, folders)) + 1):
        names = ["/".join(folder[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {run['source'].name}" for number, run in enumerate(runs, start=1)]


def with_difference(value: Any, first: Any) -> str:
    """Return a figure as text, with its difference from the first run's in brackets."""
    if not is_number(value):
        return "-"
    if not is_number(first):
        return f"{value:.4f}"
    return f"{value:.4f} ({value - first:+.4f})"


def compared(what: str, values: Sequence[Any]) -> Row:
    """Return a row of text: what it is, the first run's figure, those of the others with their difference."""
    first, *others = values
    return (what, with_difference(first, None), *(with_difference(value, first) for value in others))


def measured_on(run: Run) -> str:
    """Return the list and the data that a run was measured on, as text; a dash if on none."""
    test = run["test"]
    return f"{test['split']} of {data_name(test)}" if test else "-"


def warn_of_lists(runs: Sequence[Run]) -> str:
    """Return a paragraph if the runs were measured on lists that differ, or perhaps in name alone; or ""."""
    tests = [run["test"] for run in runs if run["test"]]
    if len({measured_on(run) for run in runs if run["test"]}) < 2:
        return ""
    contents = set()
    for test in tests:
        counts = {name: values.get("num_gt") for name, values in test.get("per_class", {}).items()}
        present = sorted((name, count) for name, count in counts.items() if count)
        contents.add((test["split"], test.get("num_images"), tuple(present)))
    if len(contents) == 1 and tests[0].get("per_class"):
        return (
            "<p>The data have different names, but their test lists have as many images, and as many objects "
            "of each class: the figures are compared as those of one list.</p>"
        )
    return "<p>The runs were measured on different lists: their figures cannot be compared.</p>"


def drawn_ranges(runs: Sequence[Run]) -> Row:
    """Return a row of text: where 95 % of ssd_tools.analyze's drawn lists have their mAP, and its difference.

    The difference, in brackets, is that of the same drawn lists, so of runs measured on the first one's list.
    """

    def of_95(values: Any, form: str) -> str:
        return " to ".join(form.format(value) for value in np.percentile(values, (2.5, 97.5)))

    lists = [(measured_on(run), run["test"].get("num_images")) for run in runs]
    maps = [dig_numbers(run["extra"], "analysis", "drawn_maps") for run in runs]
    cells: list[str] = []
    for one, values in zip(lists, maps, strict=True):
        text = "-"
        if values:
            text = of_95(values, "{:.3f}")
        if cells and values and one == lists[0] and len(values) == len(maps[0]):
            text += f" ({of_95(np.subtract(values, maps[0]), '{:+.3f}')})"
        cells.append(text)
    return ("mAP@.5 of 95 % of lists drawn from the test images", *cells)


def about_run(run: Run) -> dict[str, str]:
    """Return {what it is: text} of how a run was measured and trained."""
    test = run["test"]
    speeds = [row["images_per_s"] for row in run["history"] if is_number(row.get("images_per_s"))]
    speed = "-"
    if speeds:
        speed = f"{statistics.median(speeds):.1f}"
    return {
        "measured with": test.get("precision", "-"),
        "test list": measured_on(run),
        "test images": str(test.get("num_images", "-")),
        "epoch chosen": epoch_text(run),
        "wall time": wall_text(run),
        "training, images/s (median)": speed,
        "device": run["environment"].get("device", "-"),
    }


def compared_figures(runs: Sequence[Run], names: Sequence[str]) -> list[Row]:
    """Return rows of text: a figure a row, a run a column; rows without any value are left out."""
    figures = {
        "test mAP@.5, area": "map_area",
        "test mAP@.5, 11-point": "map11",
        "test mAP@.75, area": "map75",
    }
    rows: list[Row] = [("", *names)]
    rows += [compared(what, [run["test"].get(key) for run in runs]) for what, key in figures.items()]
    rows.append(drawn_ranges(runs))
    rows.append(compared("validation mAP@.5, area", [run["val"].get("val_map_area") for run in runs]))
    columns = [about_run(run) for run in runs]
    rows += [(what, *(column[what] for column in columns)) for what in columns[0]]
    return [row for row in rows if set(row[1:]) != {"-"}]


def compared_settings(runs: Sequence[Run], names: Sequence[str]) -> list[Row]:
    """Return rows of text: the settings that are not the same in all runs."""
    settings = [settings_of(run["flags"]) for run in runs]
    rows: list[Row] = [("setting", *names)]
    for name in dict.fromkeys(name for one in settings for name in one):
        values = [one.get(name, "-") for one in settings]
        if len(set(values)) > 1:
            rows.append((name, *values))
    return rows


def compared_classes(runs: Sequence[Run], names: Sequence[str]) -> list[Row]:
    """Return rows of text: the area AP at IoU .5 of each class."""
    tests = [dig(run["test"], "per_class") for run in runs]
    classes = dict.fromkeys(name for test in tests for name in test)
    rows = [compared(name, [dig(test, name, "ap_area") for test in tests]) for name in classes]
    return [("AP .5 (area)", *names), *rows]


def plot_runs(runs: Sequence[Run], names: Sequence[str]) -> Figure:
    """Return a Figure: the runs' validation mAP, and their losses in training and validation, by epoch."""
    titles = {
        "val_map_area": "validation mAP@.5",
        "train_loss": "training loss",
        "val_loss": "validation loss",
    }
    rows = [row for run in runs for row in run["history"]]
    curves = [(key, title) for key, title in titles.items() if any(is_number(row.get(key)) for row in rows)]
    figure = Figure(figsize=(7, 0.5 + 2.8 * max(1, len(curves))), layout="constrained")
    axes = figure.subplots(max(1, len(curves)), 1, sharex=True, squeeze=False)[:, 0]
    for cell, (key, title) in zip(axes, curves, strict=False):
        for place, (run, name) in enumerate(zip(runs, names, strict=True)):
            points = [(row["epoch"], row[key]) for row in run["history"] if is_number(row.get(key))]
            style = LINE_STYLES[place % len(LINE_STYLES)]
            epochs = [epoch for epoch, _ in points]
            values = [value for _, value in points]
            cell.plot(epochs, values, style, color=f"C{place}", label=name, marker=".")
        cell.margins(y=0.1)
        cell.set_ylabel(title)
        cell.grid(alpha=0.3)
    if curves:
        axes[0].legend()
    axes[-1].set_xlabel("epoch")
    return figure


def scrolling(rows: Iterable[Row], kind: str = "") -> str:
    """Return a table that scrolls sideways where many runs do not fit."""
    return f'<div class="scroll">{table(rows, kind)}</div>'


def comparison(runs: Sequence[Run]) -> str:
    """Return the HTML page of several runs."""
    names = name_runs(runs)
    picture = io.BytesIO()
    plot_runs(runs, names).savefig(picture, format="png", dpi=120)
    settings = compared_settings(runs, names)
    differences = "<p>No setting.</p>"
    if len(settings) > 1:
        differences = scrolling(settings)
    parts = [
        ("Results", warn_of_lists(runs) + scrolling(compared_figures(runs, names), "numbers")),
        ("What differs", differences),
        ("Curves", figure(picture, "By epoch")),
        ("Classes", scrolling(compared_classes(runs, names), "numbers")),
    ]
    links, content = with_contents(parts)
    return document(
        f"{len(runs)} runs side by side",
        f'<p class="soft">In brackets: the difference from {html.escape(names[0])}.</p>'
        f"<nav>{links}</nav>{content}",
    )


# ---- the command line ----


def write_tensorboard(source: Path) -> Path:
    """Write the event files of a run from its records and pictures; returns their folder."""
    board_module = optional_import("torch.utils.tensorboard", "--tensorboard", "tensorboard")
    folder = source.resolve().parents[1] if source.is_file() else source  # of a checkpoint, or a run's own
    checkpoints = folder / "checkpoints"
    target = checkpoints / "tensorboard"
    rows = {
        "epoch": read_rows(checkpoints / "metrics.jsonl", "epoch"),
        "step": read_rows(checkpoints / "steps.jsonl", "step"),
    }
    if not rows["epoch"]:
        raise ssd.InputError(f"{folder}: no metrics.jsonl of a run in {checkpoints}")
    shutil.rmtree(target, ignore_errors=True)  # the rows are all there each time
    with board_module.SummaryWriter(target) as board:
        for key, rows_of_key in rows.items():
            for row in rows_of_key:
                numbers = {name: value for name, value in row.items() if is_number(value)}
                for name, value in numbers.items():
                    board.add_scalar(f"{key}/{name}", value, row[key])
        for path in sorted((folder / "plots").glob("*.png")):
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            board.add_image(path.stem, pixels, rows["epoch"][-1]["epoch"], dataformats="HWC")
    return target


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the namespace of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "runs",
        nargs="*",
        default=["."],
        metavar="RUN",
        help="a run's --output-dir, or one of its checkpoints (default: this folder)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="default: report.html, of several comparison.html, in the first run's plots",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write RUN/checkpoints/tensorboard instead, also while the run goes on",
    )
    return parser.parse_args(argv)


def write_pages(args: argparse.Namespace) -> None:
    """Write the page of one run or of several, or TensorBoard's event files, by the flags."""
    if args.tensorboard:
        folders = [str(write_tensorboard(Path(source))) for source in args.runs]
        print(*folders, f"look at them: tensorboard --logdir {folders[0]}", sep="\n")
        return
    runs = [read_run(find_checkpoint(source)) for source in args.runs]
    if len(runs) == 1:
        name = "report.html"
        content = page(runs[0])
    else:
        name = "comparison.html"
        content = comparison(runs)
    path = Path(args.output or runs[0]["source"].resolve().parent.parent / "plots" / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    ssd.write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    args = parse_args(argv)
    return run_program(functools.partial(write_pages, args))


if __name__ == "__main__":
    sys.exit(main())
