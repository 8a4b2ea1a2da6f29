"""Check every image and annotation of a data set, before a long training.

    python tools/audit.py --data PATH --val-split val --test-split test

It counts all faults, prints the first places of each kind and writes PATH/audit.json with all of them, and
plots/data.png. The next audit reads only files whose time or size changed. Exit code 0: a training can start.
1: something would stop it, or is both trained on and measured on. 2: a mistake in the command line.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import ssd_object_detection as ssd  # noqa: E402
from tools.anchors import add_data_flags, best_anchor_iou  # noqa: E402

VERSION = 2  # of audit.json
STOPS = (
    "image missing", "image unreadable", "annotation missing", "annotation unreadable",
    "image and annotation differ in size", "unknown class", "image in two lists", "no object to train on",
)
LEAK = "same pixels in two lists"
KINDS = dict.fromkeys(STOPS, "stops a training") | {  # what is found: what comes of it
    LEAK: "what is trained on is measured on",
    "image incomplete": "used as far as it can be decoded",
    "class not named by --classes": "left out",
    "box reversed, without area or outside": "left out",
    "same box and class twice": "left out",
    "box beyond the image": "clipped",
    "box under a pixel": "kept; are the coordinates fractions?",
    "object that no anchor overlaps by half": "kept; see tools/anchors.py",
    "same pixels twice": "kept, in one list or without an object; part of a list may be held out",
}


class Object(NamedTuple):
    """An object that a training keeps."""

    place: str  # file and number
    name: str
    box: np.ndarray  # normalised xyxy
    lists: list[str]  # which of train, val, test name its image


def inspect_image(path: str) -> tuple[list | None, bool]:
    """Return [width, height, digest of the pixels] of an image, or None, and whether its file is complete."""
    try:
        pixels = ssd.read_image(path)  # OpenCV makes up what is missing at the end, Pillow refuses
    except (ssd.InputError, cv2.error):  # the latter: more pixels than OpenCV accepts
        return None, False
    is_complete = Path(path).read_bytes().endswith(b"\xff\xd9")  # JPEG's end mark, which spares Pillow's time
    if not is_complete:
        with contextlib.suppress(Exception), Image.open(path) as image:  # whatever a decoder meets
            image.load()
            is_complete = True
    height, width, _ = pixels.shape
    return [width, height, hashlib.sha1(pixels, usedforsecurity=False).hexdigest()], is_complete


def read_annotation(path: str) -> tuple[list | None, list, list[str]]:
    """Return ([width, height] or None, objects [number, name, box], faults) of a VOC XML file.

    `parse_annotation` stops at the first fault: it gets the size and each object in documents of their own.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        return None, [], [f"{path}: not readable as XML ({error})"]
    size, objects, faults = None, [], []
    any_size = ElementTree.fromstring("<size><width>1</width><height>1</height></size>")
    parts = [root.findall("size"), *([any_size, node] for node in root.iter("object"))]
    for number, nodes in enumerate(parts):  # 0 is the size
        document = ElementTree.Element("annotation")
        document.extend(nodes)
        try:
            width, height, found = ssd.parse_annotation(io.BytesIO(ElementTree.tostring(document)))
        except ssd.InputError as error:
            message = str(error).split(": ", 1)[1].replace("object 1", f"object {number}", 1)
            faults.append(f"{path}: {message}")
            continue
        size = size if number else [width, height]
        objects += [[number, name, box] for name, box, _ in found[:1]]
    return size, objects, faults


def stamp_files(root: Path, image_id: str) -> tuple[list[str], list]:
    """Return the paths of an image and its annotation, and [time, size] of each, None for a missing one."""
    paths = [ssd.find_image(root, image_id), os.path.join(root, "Annotations", f"{image_id}.xml")]
    stats = [os.stat(path) if os.path.isfile(path) else None for path in paths]
    return paths, [stat and [stat.st_mtime_ns, stat.st_size] for stat in stats]


def inspect_files(root: Path, image_id: str) -> dict:
    """Return what the audit must know of an image and its annotation.

    image: of `inspect_image`; size, objects: of `read_annotation`; faults: [kind, message] of the files.
    """
    (image_path, annotation_path), stamps = stamp_files(root, image_id)
    image, is_complete = inspect_image(image_path) if stamps[0] else (None, False)
    size, objects, messages = read_annotation(annotation_path) if stamps[1] else (None, [], [])
    faults = [["annotation unreadable", message] for message in messages]
    if not image:
        faults.append(["image unreadable" if stamps[0] else "image missing", image_path])
    elif not is_complete:
        faults.append(["image incomplete", image_path])
    if not stamps[1]:
        faults.append(["annotation missing", f"{annotation_path} (needed without objects too)"])
    if image and size and image[:2] != size:
        hint = ": annotated as its EXIF mark turns it?" if image[1::-1] == size else ""
        what = f"{image_path} is {image[0]}x{image[1]} pixels, not {size[0]}x{size[1]}{hint}"
        faults.append(["image and annotation differ in size", what])
    return {"stamps": stamps, "image": image, "size": size, "objects": objects, "faults": faults}


def inspect_all(root: Path, image_ids: list[str]) -> dict[str, dict]:
    """Return {image_id: `inspect_files`}; files unchanged since ROOT/audit.json are not read again."""
    facts = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        saved = json.loads((root / "audit.json").read_text(encoding="utf-8"))
        facts = dict(saved["files"]) if saved["version"] == VERSION else {}
    ids = [i for i in image_ids if facts.get(i, {}).get("stamps") != stamp_files(root, i)[1]]
    with concurrent.futures.ThreadPoolExecutor(ssd.usable_cores()) as pool:  # decoding frees Python's lock
        found = pool.map(lambda image_id: inspect_files(root, image_id), ids)
        found = tqdm(found, f"checking {root}", len(ids), leave=False, disable=not sys.stderr.isatty())
        return facts | dict(zip(ids, found, strict=True))


def check_objects(facts: dict, path: str, classes, only_listed: bool, findings: dict) -> list[tuple]:
    """Return (place, class, normalised box) of the objects that `ssd.read_record` keeps, find the others.

    facts: of `inspect_files`; path: of the annotation; only_listed: objects of other classes are no fault.
    """
    if not (facts["size"] or facts["image"]):
        return []
    width, height = facts["size"] or facts["image"][:2]
    kept = {}
    for number, name, (xmin, ymin, xmax, ymax) in facts["objects"]:
        place = f"{path} object {number} ({name})"
        raw = (xmin - 1, ymin - 1, xmax, ymax)  # 1-based and inclusive -> 0-based edges
        box = (max(raw[0], 0), max(raw[1], 0), min(xmax, width), min(ymax, height))
        if name not in classes:
            findings["class not named by --classes" if only_listed else "unknown class"].append(place)
        elif xmax <= xmin or ymax <= ymin or box[2] <= box[0] or box[3] <= box[1]:
            findings["box reversed, without area or outside"].append(place)
        elif (name, box) in kept:
            findings["same box and class twice"].append(place)
        else:
            kept[name, box] = (place, name, np.float32(box) / np.float32([width, height] * 2))
            if max(abs(a - b) for a, b in zip(raw, box, strict=True)) > 1:  # one pixel: written 0-based
                findings["box beyond the image"].append(place)
            if min(box[2] - box[0], box[3] - box[1]) < 1:
                findings["box under a pixel"].append(place)
    return list(kept.values())


def check_lists(images: dict, facts: dict, findings: dict) -> None:
    """Find images in two lists, and images of the same pixels. images: {(root, image id): lists}."""
    groups = defaultdict(list)  # digest: images
    for (root, image_id), lists in images.items():
        path, one = ssd.find_image(root, image_id), facts[root][image_id]
        if len(lists) > 1:
            findings["image in two lists"].append(f"{path} ({', '.join(lists)})")
        if one["image"]:
            groups[one["image"][2]].append((path, lists, len(one["objects"])))
    for (first, first_lists, first_objects), *others in groups.values():
        for path, lists, num_objects in others:
            is_leak = len({*first_lists, *lists}) > 1 and first_objects + num_objects > 0
            place = f"{path} ({', '.join(lists)}) has those of {first} ({', '.join(first_lists)})"
            findings[LEAK if is_leak else "same pixels twice"].append(place)


def check_all(images: dict, facts: dict, classes, only_listed: bool, anchor_sizes) -> tuple:
    """Return ({kind: places}, the Objects that are kept, `best_anchor_iou` of each)."""
    findings = {kind: [] for kind in KINDS}
    objects = []
    for (root, image_id), lists in images.items():
        for kind, message in facts[root][image_id]["faults"]:
            findings[kind].append(message)
        path = os.path.join(root, "Annotations", f"{image_id}.xml")
        rows = check_objects(facts[root][image_id], path, classes, only_listed, findings)
        objects += [Object(*row, lists) for row in rows]
    check_lists(images, facts, findings)
    best = best_anchor_iou(np.array([o.box for o in objects]).reshape(-1, 4), anchor_sizes)
    unmatched = np.flatnonzero(best < 0.5)
    findings["object that no anchor overlaps by half"] = [objects[i].place for i in unmatched]
    slivers = set(findings["box under a pixel"])
    if not any("train" in o.lists and o.place not in slivers for o in objects):
        findings["no object to train on"].append("the training list")
    return {kind: places for kind, places in findings.items() if places}, objects, best


def plot_data(objects: list[Object], best: np.ndarray, classes, num_images: int) -> Figure:
    """Return data.png: objects per class, box sizes, and the share of objects matched by an anchor at IoU .5.

    objects: of the training list, at least one; best (N,): `best_anchor_iou` of each.
    """
    names = np.array([o.name for o in objects])
    size = 300 * np.array([o.box[2:] - o.box[:2] for o in objects])  # pixels of the network's input
    counts = [np.count_nonzero(names == name) for name in classes]
    shares = [np.mean(best[names == name] >= 0.5) if name in names else 0 for name in classes]
    labels = [name.replace("$", r"\$") for name in classes]  # matplotlib reads a formula between two of them
    figure = Figure(figsize=(14, min(4.6 + 0.13 * len(classes), 100)), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.bar_label(left.barh(labels, counts, color="C0"), padding=3)
    left.set(title=f"{len(names)} objects in {num_images} training images", xlabel="objects", xmargin=0.15)
    middle.scatter(*size.T, s=5, alpha=0.25, c=np.where(best >= 0.5, "C0", "C3"), linewidths=0)
    middle.set(title="Box sizes at 300x300 (red: no anchor at IoU .5)", xlim=(0, 300), ylim=(0, 300))
    middle.set(xlabel="width, pixels", ylabel="height, pixels", aspect="equal")
    right.bar_label(right.barh(labels, shares, color="C2"), fmt="%.2f", padding=3)
    right.set(title=f"Matched by an anchor at IoU .5: {np.mean(best >= 0.5):.3f}", xlim=(0, 1.15))
    right.set_xlabel("share of objects")
    for axes in (left, right):
        axes.set_ylim(len(classes) - 0.4, -0.6)  # the first class on top
    return figure


def print_findings(findings: dict) -> None:
    """Print of each kind how many there are, what comes of them, and the first places."""
    for kind, places in findings.items():
        more = [f"... and {len(places) - 3} more in audit.json"] if len(places) > 3 else []
        print(f"{len(places):6d} {kind}: {KINDS[kind]}", *places[:3], *more, sep="\n         ")


def run(args: argparse.Namespace) -> int:
    """Audit the data that the flags name; returns the exit code. InputError for a mistake of the user."""
    splits = {name: getattr(args, name) for name in ("data_root", "train_split", "val_split", "test_split")}
    roots, lists = ssd.find_data(args.data, **splits)
    images = defaultdict(list)
    for role, split in lists.items():
        for root in roots if role == "train" else roots[:1]:
            for image_id in ssd.read_split(root, split) if split else ():
                images[root, image_id].append(role)
    facts = {root: inspect_all(root, [i for r, i in images if r == root]) for root in roots}
    train = [facts[root][image_id] for (root, image_id), roles in images.items() if "train" in roles]
    classes = args.classes or sorted({name for one in train for _, name, _ in one["objects"]})
    if args.data in ("voc2007", "voc0712"):
        classes = args.classes or ssd.VOC_CLASSES
    findings, objects, best = check_all(images, facts, classes, bool(args.classes), args.anchors)
    counts = {kind: len(places) for kind, places in findings.items()}
    for root in roots:
        content = {"version": VERSION, "counts": counts, "findings": findings, "files": facts[root]}
        try:
            ssd.write_json(root / "audit.json", content)
        except OSError as error:
            print(f"warning: {root / 'audit.json'} was not written: {error}", file=sys.stderr)
    trained = np.flatnonzero(["train" in o.lists for o in objects])
    if len(trained):
        figure = plot_data([objects[i] for i in trained], best[trained], classes, len(train))
        ssd.save_figure(figure, Path(args.output_dir) / "plots" / "data.png")
    for role in filter(lists.get, lists):
        num_images = sum(role in roles for roles in images.values())
        num_objects = sum(role in o.lists for o in objects)
        print(f"{role:<5} {num_images:7d} images {num_objects:8d} objects  (list {lists[role]})")
    print(f"{len(classes)} classes: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}")
    print_findings(findings)
    if faults := [kind for kind in (*STOPS, LEAK) if kind in findings]:
        print(f"mend before a training: {', '.join(faults)}")
        return 1
    with contextlib.redirect_stderr(io.StringIO()):  # its warning is about what has just been listed
        ssd.load_data(args.data, classes=args.classes, val_fraction=args.val_fraction, **splits)
    print("a training can start")
    return 0


def main(argv=None) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(description="Check every image and annotation of a data set.")
    add_data_flags(parser)
    add = parser.add_argument
    add("--val-split", metavar="LIST", help="list that chooses the best checkpoint")
    add("--val-fraction", type=ssd.below_one, default=0.1, help="share held out without --val-split")
    add("--test-split", metavar="LIST", help="list to measure on (default: test, if there is one); '': none")
    add("--anchors", metavar="FILE", type=ssd.anchor_file, default=ssd.ANCHOR_SIZES,
        help="anchor sizes by tools/anchors.py")
    try:
        return run(parser.parse_args(argv))
    except (ssd.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
