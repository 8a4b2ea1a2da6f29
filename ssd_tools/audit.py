"""Check every image and annotation of a data set, before a long training.

    python -m ssd_tools.audit --data PATH [flags of a training: --classes, --val-split, --unlabelled ...]

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
import re
import sys
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import ssd_object_detection as ssd

VERSION = 3  # of audit.json
STOPS = (
    "image missing",
    "image unreadable",
    "annotation missing",
    "annotation unreadable",
    "image and annotation differ in size",
    "boxes of a list written otherwise",
    "image in two lists",
    "no object to train on",
)
LEAK = "same pixels in two lists"
KINDS = dict.fromkeys(STOPS, "stops a training") | {  # what is found: what comes of it
    LEAK: "what is trained on is measured on",
    "image of several frames": "the first one is used",
    "image turned by EXIF, annotated upright": "used upright",
    "image turned by EXIF, annotated as stored": "used as stored",
    "image turned by EXIF, both readings fit": "used upright; are its boxes upright too?",
    "image without annotation": "used as one without objects",
    "annotation without a size": "the image's own is used",
    "class names that differ by a slip": "kept apart",
    "object of another class": "left out",
    "box reversed": "left out; corners swapped, or a width and height?",
    "box without area or outside": "left out",
    "same box and class twice": "one is left out",
    "box beyond the image": "clipped",
    "box under a pixel": "kept; are the coordinates fractions?",
    "object that no anchor overlaps by half": "kept; see --anchors",
    "object under 8 pixels at 300x300": "kept, but hardly to be found: cut the images into tiles",
    "same pixels twice": "kept, in one list; blank ones, byte for byte as one measured on, leave training",
}
# An object that a training keeps: file and number, class, normalised xyxy, which of train, val, test have it.
Object = namedtuple("Object", "place name box lists")


def inspect_image(path: str, size: list | None) -> tuple[list | None, list]:
    """Return [width, height, digest of the pixels] of an image and its faults [kind, message].

    The former is None for an unreadable one. size: [width, height] by the annotation, None without.
    """
    pixels, faults = None, []
    try:
        pixels = np.asarray(ssd.open_image(path))
        upright = list(pixels.shape[1::-1])
        if size not in (None, upright):
            pixels = np.asarray(ssd.open_image(path, tuple(size)))
    except ssd.InputError as error:
        if pixels is None:
            return None, [["image unreadable", str(error)]]
        faults.append(["image and annotation differ in size", str(error)])
    with Image.open(path) as image:
        orientation = image.getexif().get(0x0112, 1)
        frames = 2  # where they cannot be counted: the file is cut off behind the first
        with contextlib.suppress(Exception):
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: with a preview
    if orientation in range(2, 9) and not faults:
        reading = "annotated upright" if size == upright else "annotated as stored"
        if size is None or orientation < 5 or upright[0] == upright[1]:  # half a turn, mirrored, a square
            reading = "both readings fit"
        faults.append([f"image turned by EXIF, {reading}", path])
    if frames > 1:
        faults.append(["image of several frames", path])
    height, width, _ = pixels.shape
    return [width, height, hashlib.sha1(pixels, usedforsecurity=False).hexdigest()], faults


def stamp_files(root: Path, image_id: str) -> tuple[list[str], list]:
    """Return the paths of an image and its annotation, and [time, size] of each, None for a missing one."""
    paths, stamps = [], []
    for kind, ending in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
        path = ssd.find_file(root, kind, image_id)
        stat = path and os.stat(path)
        paths.append(path or os.path.join(root, kind, image_id + ending))
        stamps.append(stat and [stat.st_mtime_ns, stat.st_size])
    return paths, stamps


def inspect_files(root: Path, image_id: str) -> dict:
    """Return what the audit must know of an image and its annotation.

    paths, stamps: of `stamp_files`; image: of `inspect_image`; annotation: [width, height, objects] as of
    `ssd.read_annotations`; faults: [kind, message] of the files.
    """
    paths, stamps = stamp_files(root, image_id)
    size, objects, faults = None, [], []
    if stamps[1]:
        try:
            *size, objects = ssd.parse_annotation(paths[1])
            if min(size) < 1:
                size = None
                faults.append(["annotation without a size", paths[1]])
        except ssd.InputError as error:
            faults.append(["annotation unreadable", str(error)])
    image, more = inspect_image(paths[0], size) if stamps[0] else (None, [["image missing", paths[0]]])
    size = size or (image or [0, 0])[:2]
    return {
        "paths": paths,
        "stamps": stamps,
        "image": image,
        "faults": faults + more,
        "annotation": [*size, objects if size[0] else []],
    }


def inspect_all(root: Path, image_ids: list[str]) -> dict[str, dict]:
    """Return {image_id: `inspect_files`}; files unchanged since ROOT/audit.json are not read again."""
    facts = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        saved = json.loads((root / "audit.json").read_text(encoding="utf-8"))
        if (saved["version"], saved["root"]) == (VERSION, str(root)):  # the paths begin with it
            facts = dict(saved["files"])
    ids = [i for i in image_ids if facts.get(i, {}).get("stamps") != stamp_files(root, i)[1]]
    with concurrent.futures.ThreadPoolExecutor(ssd.usable_cores()) as pool:  # decoding frees Python's lock
        found = pool.map(lambda image_id: inspect_files(root, image_id), ids)
        found = tqdm(found, f"checking {root}", len(ids), leave=False, disable=not sys.stderr.isatty())
        return facts | dict(zip(ids, found, strict=True))


def check_objects(annotation: tuple, path: str, classes, findings: dict) -> list[tuple]:
    """Return (place, class, normalised box) of the objects that `ssd.read_record` keeps, find the others.

    annotation: (width, height, objects); path: its file.
    """
    width, height, objects = annotation
    kept = {}
    for number, (name, (xmin, ymin, xmax, ymax), _) in enumerate(objects, start=1):
        place = f"{path}: object {number} ({name}) [{xmin:g}, {ymin:g}, {xmax:g}, {ymax:g}]"
        raw = (xmin - 1, ymin - 1, xmax, ymax)  # 1-based and inclusive -> 0-based edges
        box = (max(raw[0], 0), max(raw[1], 0), min(xmax, width), min(ymax, height))
        if name not in classes:
            findings["object of another class"].append(place)
        elif xmax < xmin or ymax < ymin:
            findings["box reversed"].append(place)
        elif min(xmax - xmin, ymax - ymin, box[2] - box[0], box[3] - box[1]) <= 0:
            findings["box without area or outside"].append(place)
        elif (name, box) in kept:
            findings["same box and class twice"].append(place)
        else:
            kept[name, box] = (place, name, np.float32(box) / np.float32([width, height] * 2))
            if max(abs(a - b) for a, b in zip(raw, box, strict=True)) > 1:  # one pixel: written 0-based
                findings["box beyond the image"].append(place)
            if min(box[2] - box[0], box[3] - box[1]) < 1:
                findings["box under a pixel"].append(place)
    return list(kept.values())


def check_images(images: dict, facts: dict, findings: dict) -> None:
    """Find images in two lists, and images of the same pixels. images: {(root, image id): lists}."""
    groups = defaultdict(list)  # digest: images
    for (root, image_id), lists in images.items():
        one = facts[root][image_id]
        if len(lists) > 1:
            findings["image in two lists"].append(f"{one['paths'][0]} ({', '.join(lists)})")
        if one["image"]:
            groups[one["image"][2]].append((one["paths"][0], lists, len(one["annotation"][2])))
    for (first, first_lists, first_objects), *others in groups.values():
        for path, lists, num_objects in others:
            is_leak = len({*first_lists, *lists}) > 1 and first_objects + num_objects > 0
            place = f"{path} ({', '.join(lists)}) has those of {first} ({', '.join(first_lists)})"
            findings[LEAK if is_leak else "same pixels twice"].append(place)


def check_all(images: dict, facts: dict, classes, args: argparse.Namespace, findings: dict) -> tuple:
    """Return the Objects that are kept and `ssd.best_anchor_iou` of each; fill findings, {kind: places}."""
    objects = []
    for (root, image_id), lists in images.items():
        one = facts[root][image_id]
        path = one["paths"][1]
        for kind, message in one["faults"]:
            findings[kind].append(message)
        if one["stamps"][1] is None:
            kind = {"negative": "image without annotation", "error": "annotation missing"}[args.unlabelled]
            findings[kind].append(f"{path}: no such file (see --unlabelled)")
        rows = check_objects(one["annotation"], path, classes, findings)
        objects += [Object(*row, lists) for row in rows]
    check_images(images, facts, findings)
    train_boxes = np.reshape([o.box for o in objects if "train" in o.lists], (-1, 4))
    is_voc = {*classes} == {*ssd.VOC_CLASSES}
    sizes = (
        ssd.choose_anchors(args.anchors, train_boxes, is_voc=is_voc) if len(train_boxes) else ssd.ANCHOR_SIZES
    )
    best = ssd.best_anchor_iou(np.reshape([o.box for o in objects], (-1, 4)), sizes)
    findings["object that no anchor overlaps by half"] += [
        one.place for one, iou in zip(objects, best, strict=True) if iou < 0.5
    ]
    findings["object under 8 pixels at 300x300"] += [
        one.place for one in objects if 300 * max(one.box[2:] - one.box[:2]) < 8
    ]
    if not any("train" in o.lists for o in objects):
        findings["no object to train on"].append("the training list")
    return objects, best


def check_lists(listed: dict, lists: dict, classes, findings: dict) -> tuple:
    """Return a training's classes; find what the module says of whole lists, {(root, role): annotations}."""
    train = next(iter(listed.values()), {})
    slips = findings["class names that differ by a slip"]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        found = ssd.annotated_classes(train)
        slips += told.getvalue().replace("warning: ", "").splitlines()
        classes = classes or found
        for (root, role), annotations in listed.items():
            try:
                ssd.read_records(root, lists[role], classes, annotations=annotations)
            except ssd.InputError as error:
                findings["boxes of a list written otherwise"].append(str(error))
    return classes


def plot_data(objects: list[Object], best: np.ndarray, classes, num_images: int) -> Figure:
    """Return data.png of training objects, of which `best` are the anchor IoUs: counts, sizes, shares."""
    names = np.array([o.name for o in objects])
    size = 300 * np.array([o.box[2:] - o.box[:2] for o in objects])  # pixels of the network's input
    classes = classes if len(classes) <= 40 else sorted(classes, key=names.tolist().count)[:40]
    counts = [np.count_nonzero(names == name) for name in classes]
    shares = [np.mean(best[names == name] >= 0.5) if name in names else 0 for name in classes]
    labels = [re.sub(r"[^\0-\u2e7f]", lambda letter: ascii(letter[0])[1:-1], name) for name in classes]
    labels = [name.replace("$", r"\$") for name in labels]  # matplotlib reads a formula between two of them
    figure = Figure(figsize=(14, 4.6 + 0.13 * len(classes)), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.bar_label(left.barh(labels, counts, color="C0"), padding=3)
    left.set(title=f"{len(names)} objects in {num_images} training images", xmargin=0.15)
    middle.scatter(*size.T, s=5, alpha=0.25, c=np.where(best >= 0.5, "C0", "C3"), linewidths=0)
    middle.set(title="Sizes at 300x300 (red: no anchor at IoU .5)", xlim=(0, 300), ylim=(0, 300))
    middle.set(xlabel="width, pixels", ylabel="height, pixels", aspect="equal")
    right.bar_label(right.barh(labels, shares, color="C2"), fmt="%.2f", padding=3)
    right.set(title=f"Matched by an anchor at IoU .5: {np.mean(best >= 0.5):.3f}", xlim=(0, 1.15))
    for axes, label in ((left, "objects (of more than 40 classes the rarest)"), (right, "share of objects")):
        axes.set(xlabel=label, ylim=(len(classes) - 0.4, -0.6))  # the first class on top
    return figure


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
    num_images = Counter(role for roles in images.values() for role in roles)
    findings = {kind: [] for kind in KINDS}
    listed = defaultdict(dict)  # (root, role): annotations
    for (root, image_id), roles in images.items():
        for role in roles:
            listed[root, role][image_id] = facts[root][image_id]["annotation"]
    given = args.classes or (ssd.VOC_CLASSES if args.data in ("voc2007", "voc0712") else None)
    classes = check_lists(listed, lists, given, findings)
    objects, best = check_all(images, facts, classes, args, findings)
    findings = {kind: places for kind, places in findings.items() if places}
    counts = {kind: len(places) for kind, places in findings.items()}
    for root in roots:
        content = {"version": VERSION, "root": str(root), "counts": counts, "findings": findings}
        try:
            ssd.write_json(root / "audit.json", content | {"files": facts[root]})
        except OSError as error:
            print(f"warning: {root / 'audit.json'} was not written: {error}", file=sys.stderr)
    trained = np.flatnonzero(["train" in o.lists for o in objects])
    if len(trained):
        figure = plot_data([objects[i] for i in trained], best[trained], classes, num_images["train"])
        ssd.save_figure(figure, Path(args.output_dir) / "plots" / "data.png")
    for role in filter(lists.get, lists):
        num_objects = sum(role in o.lists for o in objects)
        print(f"{role:<5} {num_images[role]:7d} images {num_objects:8d} objects  (list {lists[role]})")
    print(f"{len(classes)} classes: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}")
    for kind, places in findings.items():
        more = [f"... and {len(places) - 3} more in audit.json"] if len(places) > 3 else []
        print(f"{len(places):6d} {kind}: {KINDS[kind]}", *places[:3], *more, sep="\n         ")
    if faults := [kind for kind in (*STOPS, LEAK) if kind in findings]:
        print(f"mend before a training: {', '.join(faults)}")
        return 1
    with contextlib.redirect_stderr(io.StringIO()):  # its warnings are about what has just been listed
        ssd.load_data(
            args.data,
            classes=args.classes,
            val_fraction=args.val_fraction,
            unlabelled=args.unlabelled,
            **splits,
        )
    print("a training can start")
    return 0


def main(argv=None) -> int:
    """Run the program; returns the exit code."""
    if {"-h", "--help"}.intersection(sys.argv[1:] if argv is None else argv):
        print(__doc__)
        return 0
    try:
        return run(ssd.parse_args(argv))
    except (ssd.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
