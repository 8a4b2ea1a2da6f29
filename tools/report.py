"""Write one HTML page about a run: results, curves, classes, pictures, mistakes, flags, machine. It needs no network.

    python tools/report.py                             # the run in ./checkpoints and ./plots -> plots/report.html
    python tools/report.py RUN --output report.html    # RUN is what --output-dir was, or a checkpoint

What was not recorded is left out or called not recorded. tools/export.py takes the model card's words from here.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import sys
from pathlib import Path

from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import ssd_object_detection as ssd  # noqa: E402
from ssd_object_detection import InputError  # noqa: E402

PLOTS = {
    "evaluation/precision_recall.png": "Precision and recall of each class on the test list",
    "loss.png": "Losses of training and validation",
    "training.png": "Validation mAP, learning rate and speed",
    "predictions.png": "Test pictures: truth dashed, detections solid",
    "augmentations.png": "Training pictures as the network sees them",
    "data.png": "Training data: classes, box sizes, what the anchors match",
}
MISTAKES = {  # shown with what is wrong; most are drawn by tools/analyze.py
    "evaluation/confusion.png": "Confusion matrix on the test list",
    "mistakes.png": "The surest false detections and the largest objects that were missed",
    "evaluation/errors.png": "AP that repairing each kind of error would gain",
    "evaluation/sizes.png": "AP and recall by the size of the object",
    "evaluation/f1.png": "F1 over the score threshold",
    "evaluation/calibration.png": "Share of hits over the score",
}
ERROR_KINDS = {  # those of tools/analyze.py
    "localisation": "have the right class and a loose box", "classification": "have the wrong class",
    "both": "have the wrong class and a loose box", "duplicate": "are on an object found already",
    "background": "are on nothing",
}
FEW_OBJECTS = 50  # a class with fewer of them is called uncertain
MAX_IMAGE_WIDTH = 1600  # pixels of an embedded picture


# ---- what a run left ----


def is_number(value):
    """Whether a value from a record is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def dig(content, *keys):
    """Return what lies below keys in nested dicts; an empty dict where one is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return {} if content is None else content


def with_voc(test):
    """Return a measurement with the numbers by VOC's rules on top, wherever the record has them."""
    return {**{k: v for k, v in test.items() if k not in ("voc", "checkpoint", "data", "split")}, **dig(test, "voc")}


def read_json(path):
    """Return the dict in a JSON file; an empty one if it is missing, damaged or something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_history(path):
    """Return the rows of a metrics.jsonl that can be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and is_number(row.get("epoch")):
            rows.append(row)
    return rows


def find_checkpoint(source):
    """Return the checkpoint of a run's folder: the newest final one, else best.pth, else last.pth."""
    source = Path(source)
    if source.is_file():
        return source
    folder = source / "checkpoints"
    final = sorted(folder.glob("ssd_*_final.pth"), key=lambda p: p.stat().st_mtime)
    found = final[-1:] or [p for p in (folder / "best.pth", folder / "last.pth") if p.is_file()]
    if not found:
        raise InputError(f"{source}: no checkpoint of a run in {folder}")
    return found[0]


def read_run(source, plots=None):
    """Return what is known of the run that wrote a checkpoint, as a dict.

    config, classes, flags, epoch; test: measured numbers, {} if none; environment, notes, wall_s, history, plots: of
    the run.json, metrics.jsonl and plots beside it, empty where these are missing or of a run with other flags.
    """
    source = Path(source)
    checkpoint, record = ssd.load_checkpoint(source), read_json(source.parent / "run.json")
    plots = Path(plots) if plots else source.resolve().parent.parent / "plots"
    flags, run_flags = checkpoint.get("args") or {}, record.get("flags") or {}
    free = ssd.RESUME_MAY_CHANGE
    is_same = bool(run_flags) and all(run_flags.get(k) == v for k, v in flags.items() if k not in free)
    record = record if is_same else {}
    test = checkpoint.get("test") or (record.get("chosen") == source.name and record.get("test")) or {}
    evaluation, test = read_json(plots / "evaluation" / "evaluation.json"), with_voc(test)
    is_its_own, later = Path(str(evaluation.get("checkpoint"))).name == source.name, with_voc(evaluation)
    if later.get("map_area") == test.get("map_area") if test else is_its_own:
        test |= later
    titles = {plots / name: title for name, title in (PLOTS | MISTAKES).items()}
    titles |= {p: p.stem.replace("_", " ") for p in sorted((plots / "evaluation").glob("*.png")) if p not in titles}
    pictures = titles.items() if is_same else ()
    return {
        "source": source, "config": checkpoint["config"], "classes": list(checkpoint["classes"]), "flags": flags,
        "epoch": (checkpoint.get("metrics") or {}).get("epoch"), "val": checkpoint.get("metrics") or {}, "test": test,
        "environment": record.get("environment") or {}, "notes": record.get("notes") or [],
        "wall_s": record.get("wall_s"), "history": read_history(source.parent / "metrics.jsonl") if is_same else [],
        "plots": [(path, title) for path, title in pictures if path.is_file()],
    }


# ---- in words and tables ----


def data_name(flags):
    """Return the name of the data that the flags name, without its folder."""
    return Path(str(flags.get("data") or "unknown data")).name


def command(run):
    """Return the command that started the run, the program without its folder."""
    recorded = run["environment"].get("command") or "ssd_object_detection.py (flags not recorded)"
    program, *flags = str(recorded).split(" ")
    return " ".join(("python", Path(program).name, *flags))


def machine(run):
    """Return one sentence on machine, versions and time."""
    env, wall = run["environment"], run["wall_s"]
    versions = ", ".join(f"{name} {env[name]}" for name in ("python", "torch", "torchvision", "numpy") if name in env)
    took = f" in {wall / 60:.1f} minutes" if is_number(wall) else ""
    return (f"Trained on {env.get('device', 'a device that was not recorded')} ({env.get('cpu_count')} cores){took}; "
            f"{versions}.")


def class_rows(test):
    """Return [(name, row)] of a test's classes, best AP first, those without objects last."""
    rows = [(name, row) for name, row in (test.get("per_class") or {}).items() if isinstance(row, dict)]
    return sorted(rows, key=lambda pair: -pair[1]["ap_area"] if is_number(pair[1].get("ap_area")) else 1.0)


def protocol(run):
    """Return how the test numbers were measured."""
    test, flags = run["test"], run["flags"]
    if not is_number(test.get("map_area")):
        return "Not yet measured on a test list."
    objects = sum(row.get("num_gt") or 0 for _, row in class_rows(test))
    thresh = flags.get("score_thresh")
    thresh, flips = ssd.SCORE_THRESH if thresh is None else thresh, flags.get("flip_average", "off")
    return (f"On list {flags.get('test_split') or 'test'} of {data_name(flags)}, {objects} objects that count, measured"
            f" once after training: mAP@.5 **{test['map_area']:.4f}** (area), **{test['map11']:.4f}** (11-point). The "
            "VOC2007 devkit's rules: one hit an object at IoU .5 or more, difficult objects count neither way. Scores "
            f"from {thresh:g}, non-maximum suppression at IoU {flags.get('nms_iou')}, at most "
            f"{flags.get('max_detections')} detections a picture"
            f"{'' if flips == 'off' else f', outputs averaged over flips of the picture ({flips})'}.")


def table_rows(test):
    """Return the per-class table as rows of text, header first."""
    def text(value):
        return f"{value:.4f}" if is_number(value) else "no object"

    rows = [("class", "objects", "AP (area)", "AP (11-point)")]
    return rows + [(n, str(r.get("num_gt")), text(r.get("ap_area")), text(r.get("ap11"))) for n, r in class_rows(test)]


def markdown(table):
    """Return rows of text, header first, as a Markdown table, empty without a row."""
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    if not rows:
        return ""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def further_figures(test):
    """Return [(name, number as text)] of the other numbers over all classes, names joined from nested keys."""
    left_out = {"map_area", "map11", "per_class", "analysis", "confusion", "iou_thresh"}
    found = []

    def walk(value, names):
        if is_number(value):
            name = " ".join(names).replace("_", " ").replace("num ", "number of ")
            name = re.sub(r"\b(coco|a[pr]\d*)\b", lambda m: m[0].upper(), name)
            found.append((name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
        elif isinstance(value, dict) and len(names) < 4:
            for key, inner in value.items():
                if key not in left_out:
                    walk(inner, [*names, str(key)])

    walk(test, [])
    return found


def analysis_in_words(test):
    """Return sentences on what tools/analyze.py found, and on object sizes by COCO's rules; none if not recorded."""
    lines, tide, thresh = [], dig(test, "analysis", "tide"), ssd.DRAW_SCORE_THRESH
    counts = [(dig(tide, "confident", kind), text) for kind, text in ERROR_KINDS.items()]
    if all(is_number(count) for count, _ in counts):
        wrong = ", ".join(f"{count} {text}" for count, text in sorted(counts, reverse=True))
        lines.append(f"Of the detections that score {thresh} or more, {wrong}; {dig(tide, 'confident', 'missed')} "
                     "objects have no hit of that score.")
    gains = [(value, kind) for kind, value in dig(tide, "gain", "mean").items() if kind in (*ERROR_KINDS, "missed")]
    if gains and all(is_number(value) for value, _ in gains):
        value, kind = max(gains)
        what = f"Mending the detections that {ERROR_KINDS[kind]}" if kind in ERROR_KINDS else "Finding what was missed"
        lines.append(f"{what} would raise the mAP@.5 most, by {value:.4f}.")
    sizes = [(size, dig(test, "coco", f"ap_{size}")) for size in ("small", "medium", "large")]
    if all(is_number(ap) for _, ap in sizes):
        lines.append("AP at IoU .5 to .95 by the object's size (COCO: up to 32x32, up to 96x96, larger): "
                     + ", ".join(f"{size} {ap:.3f}" for size, ap in sizes) + ".")
    if is_number(ece := dig(test, "analysis", "calibration", "ece")):
        lines.append(f"A score differs from the share of hits it stands for by {ece:.3f} on average.")
    return lines


def in_words(run):
    """Return sentences on what the model gets wrong, from the recorded numbers alone."""
    test, history, lines = run["test"], run["history"], []
    rows = [(name, row) for name, row in class_rows(test) if is_number(row.get("ap_area"))]
    if len(rows) > 1:
        (best, top), (worst, low) = rows[0], rows[-1]
        lines.append(f"Best found class: {best} (AP {top['ap_area']:.3f}, {top['num_gt']} objects); worst: {worst} "
                     f"(AP {low['ap_area']:.3f}, {low['num_gt']} objects).")
    if few := [f"{name} ({row['num_gt']})" for name, row in rows if row["num_gt"] < FEW_OBJECTS]:
        lines.append(f"Fewer than {FEW_OBJECTS} test objects, so an uncertain figure: {', '.join(few)}.")
    lines += analysis_in_words(test)
    val = run["val"].get("val_map_area")
    if is_number(val) and is_number(test.get("map_area")):
        gap = test["map_area"] - val
        lines.append(f"The validation mAP@.5 that chose epoch {run['epoch']} was {val:.4f}; the test's is "
                     f"{abs(gap):.4f} {'higher' if gap > 0 else 'lower'}.")
    losses = [(row["val_loss"], row["epoch"]) for row in history if is_number(row.get("val_loss"))]
    if len(losses) > 2:
        least, at = min(losses)
        rise = losses[-1][0] / least - 1
        end = ", its last: more epochs may help." if at == losses[-1][1] else " and stayed near that."
        if rise > 0.05:
            end = f" and {rise:.0%} higher at the end: the network began to learn its training pictures by heart."
        lines.append(f"The validation loss was lowest in epoch {at} of {losses[-1][1]}{end}")
    return lines or ["Not analysed: no measurement was recorded."]


# ---- the page ----

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5c6675; --line: #d9dee5; --blue: #1f5fa8; --orange: #c8641a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
nav { margin-bottom: .8rem; } nav a { display: inline-block; margin: 0 .9rem .3rem 0; } a { color: var(--blue); }
.tiles, .charts { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { white-space: nowrap; }
.numbers th { overflow-wrap: normal; } .numbers :is(td, th):not(:first-child) { text-align: right; }
.bar { height: .35rem; background: var(--blue); border-radius: .2rem; min-width: 1px; }
.wide { overflow-x: auto; } .wide img { min-width: 42rem; }
figure { margin: .8rem 0; } img, svg { max-width: 100%; width: 100%; height: auto; display: block; }
.wide img { max-width: none; } figure.single img { max-width: 44rem; }
pre { overflow-x: auto; background: #f3f5f8; padding: .7rem; border-radius: .4rem; white-space: pre-wrap; }
summary { cursor: pointer; padding: .3rem 0; }
"""


def ticks(low, high, count=4):
    """Return about `count` round numbers from low to high."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= count)
    return [round(step * i, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title, curves, top=None):
    """Return an SVG of curves [(name, colour, [(epoch, value)])] from 0 to `top`, or to the largest value."""
    curves = [(name, color, points) for name, color, points in curves if points]
    if not curves:
        return ""
    xs, ys = [p[0] for c in curves for p in c[2]], [p[1] for c in curves for p in c[2]]
    left, right, low, high = min(xs), max(max(xs), min(xs) + 1), 0.0, top or max(*ys, 1e-9) * 1.05

    def at(x, y):
        return 44 + (x - left) / (right - left) * 308, 182 - (min(y, high) - low) / (high - low) * 146

    parts = [f'<text x="4" y="15" font-weight="600">{html.escape(title)}</text>']
    for value in ticks(low, high):
        y = at(left, value)[1]
        parts.append(f'<path d="M44 {y:.1f}H352" stroke="#d9dee5"/><text x="40" y="{y + 4:.1f}" text-anchor="end">'
                     f"{value:g}</text>")
    for value in ticks(left, right, 6):
        if value == int(value):
            parts.append(f'<text x="{at(value, 0)[0]:.1f}" y="198" text-anchor="middle">{value:g}</text>')
    for number, (name, color, points) in enumerate(curves):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        x, y = at(*points[-1])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{color}"/>')
        parts.append(f'<text x="{352 - 84 * (len(curves) - 1 - number)}" y="30" text-anchor="end" fill="{color}">'
                     f"{html.escape(name)} {points[-1][1]:.3g}</text>")
    return (f'<svg viewBox="0 0 360 204" role="img" aria-label="{html.escape(title, quote=True)}" font-size="11" '
            f'font-family="system-ui, sans-serif" fill="#1c2430">{"".join(parts)}</svg>')


def charts(history):
    """Return the curves of a metrics.jsonl as SVGs."""
    def curve(name, color, key):
        return name, color, [(row["epoch"], row[key]) for row in history if is_number(row.get(key))]

    blue, orange = "#1f5fa8", "#c8641a"
    drawn = [chart(title, [curve("train", blue, f"train_{key}"), curve("val", orange, f"val_{key}")])
             for key, title in (("loss", "Loss"), ("loss_cls", "Class loss"), ("loss_box", "Box loss"))]
    maps = [curve("area", blue, "val_map_area"), curve("11-point", orange, "val_map11")]
    drawn.append(chart("Validation mAP@.5", maps, top=1))
    drawn.append(chart("Learning rate at the epoch's end", [curve("", blue, "lr")]))
    drawn.append(chart("Training images a second", [curve("", blue, "images_per_s")]))
    return [svg for svg in drawn if svg]


def embed(path):
    """Return a PNG file as a data URI: as JPEG where that is smaller, at most 1,600 pixels wide."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    if image.width > MAX_IMAGE_WIDTH:
        image.thumbnail((MAX_IMAGE_WIDTH, 10 * MAX_IMAGE_WIDTH))
    choices = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        choices.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, content = min(choices)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def figure(path, title):
    """Return a picture with its caption; one too wide for a phone scrolls sideways."""
    with Image.open(path) as image:
        is_wide = image.width > 1000
    text = html.escape(title, quote=True)
    return (f'<figure class="{"wide" if is_wide else "single"}"><img src="{embed(path)}" alt="{text}" loading="lazy">'
            f"<figcaption>{text}</figcaption></figure>")


def table(rows, kind=""):
    """Return an HTML table of rows of text, header first."""
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    head, *body = rows
    lines = line(head, "th") + "".join(line(row, "td") for row in body)
    return f'<table class="{kind}">{lines}</table>'


def class_table(test):
    """Return the per-class table with a bar of each AP."""
    head, *rows = table_rows(test)
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row, (_, numbers) in zip(rows, class_rows(test), strict=True):
        share = numbers["ap_area"] if is_number(numbers.get("ap_area")) else 0.0
        bar = f'<div class="bar" style="width:{100 * share:.1f}%"></div>'
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        lines.append(f"<tr><td>{html.escape(row[0])}{bar}</td>{cells}</tr>")
    return f'<table class="numbers">{"".join(lines)}</table>'


def changed_flags(flags):
    """Return (rows of the flags that differ from the parser's defaults, rows of the others)."""
    defaults = vars(ssd.build_parser().parse_args([]))
    changed, others = [], []
    for name, value in flags.items():
        rows = others if name in defaults and defaults[name] == value else changed
        rows.append((f"--{name.replace('_', '-')}", "chosen by the program" if value is None else value))
    return changed, others


def sections(run):
    """Return [(title, HTML)] of a page, those without content left out."""
    pictures = {path.name: figure(path, title) for path, title in run["plots"]}
    known = {Path(name).name for name in PLOTS}
    mistakes = "".join(fig for name, fig in pictures.items() if name not in known)
    words = "".join(f"<li>{html.escape(line)}</li>" for line in in_words(run))
    measured = html.escape(protocol(run)).replace("**", "")
    changed, others = changed_flags(run["flags"])
    more = further_figures(run["test"])
    rest = f"<summary>{len(others)} flags at their defaults</summary>{table([('flag', 'value'), *others])}"
    curves = "".join(f"<div>{svg}</div>" for svg in charts(run["history"]))
    env = [("", ""), *run["environment"].items()]
    return [(title, content) for title, content in (
        ("Results", f"<p>{measured}</p>"),
        ("Curves", f'<p class="soft">Over the epochs; the numbers are the last.</p><div class="charts">{curves}</div>'
         if curves else ""),
        ("Classes", class_table(run["test"]) if class_rows(run["test"]) else ""),
        ("Precision and recall", pictures.get("precision_recall.png", "")),
        ("Further figures", table([("figure", "value"), *more], "numbers") if more else ""),
        ("Gallery", pictures.get("predictions.png", "")),
        ("Mistakes", f"<ul>{words}</ul>{mistakes}"),
        ("Data", "".join(f"<p>{html.escape(str(note))}</p>" for note in run["notes"]) + pictures.get("data.png", "")
         + pictures.get("augmentations.png", "")),
        ("Flags", f"<pre>{html.escape(command(run))}</pre>{table([('flag', 'value'), *changed])}"
         f"<details>{rest}</details>"),
        ("Environment", table(env) if len(env) > 1 else "<p>Not recorded.</p>"),
    ) if content]


def page(run):
    """Return the HTML page of a run, complete in itself."""
    test, wall, config = run["test"], run["wall_s"], run["config"]
    names = {"map_area": "test mAP@.5, area", "map11": "test mAP@.5, 11-point"}
    tiles = [(f"{test[key]:.4f}", name) for key, name in names.items() if is_number(test.get(key))]
    val = run["val"].get("val_map_area")
    tiles += [(f"{val:.4f}", "validation mAP@.5, area")] if is_number(val) else []
    tiles += [(f"{run['epoch']} of {run['flags'].get('epochs')}", "epoch chosen")] if run["epoch"] else []
    tiles += [(f"{wall / 60:.1f} min", "wall time")] if is_number(wall) else []
    title = f"SSD300 on {data_name(run['flags'])}"
    shown = "".join(f'<div class="tile"><b>{html.escape(value)}</b>{html.escape(what)}</div>' for value, what in tiles)
    body = sections(run)
    links = "".join(f'<a href="#s{i}">{html.escape(name)}</a>' for i, (name, _) in enumerate(body))
    content = "".join(f'<section id="s{i}"><h2>{html.escape(n)}</h2>{c}</section>' for i, (n, c) in enumerate(body))
    summary = (f"{len(run['classes'])} classes: {', '.join(run['classes'])}. Width {config['width']:g}, batch norm "
               f"{'on' if config.get('batch_norm') else 'off'}. {run['source'].name}")
    started = run["environment"].get("started", "")
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{STYLE}</style></head><body><header><h1>{html.escape(title)}</h1>"
            f'<p class="soft">{html.escape(summary)} {html.escape(str(started))}</p><nav>{links}</nav></header>'
            f'<div class="tiles">{shown}</div>{content}</body></html>\n')


def main(argv=None):
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ssd._Formatter)
    parser.add_argument("run", nargs="?", default=".", help="the run's --output-dir, or one of its checkpoints")
    parser.add_argument("--output", metavar="FILE", help="default: report.html beside the run's plots")
    args = parser.parse_args(argv)
    try:
        source = find_checkpoint(args.run)
        path = Path(args.output) if args.output else source.resolve().parent.parent / "plots" / "report.html"
        ssd.write_text(path, page(read_run(source)))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
