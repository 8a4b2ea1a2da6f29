"""Check every image and annotation of a data set, before a long training.

    python -m ssd_tools.audit --data PATH [flags of a training: --classes, --val-split, --unlabelled ...]

It counts all faults, prints the first places of each kind and writes PATH/audit.json with all of them, and
plots/data.png. The next audit reads only files whose time or size changed. Exit code 0: a training can start.
1: something would stop it, or is both trained on and measured on. 2: a mistake in the command line.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import ssd_object_detection as ssd
from ssd_tools.common import run_program

VERSION = 5  # of audit.json
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
    "grey values in a tenth of 16 bits": "kept, nearly black; scale 12-bit values to 16 bits",
    "image turned by EXIF, annotated upright": "used upright",
    "image turned by EXIF, annotated as stored": "used as stored",
    "image turned by EXIF, both readings fit": "used upright; are its boxes upright too?",
    "image without annotation": "used as one without objects",
    "annotation without a size": "the image's own is used",
    "class names that differ by a slip": "kept apart; one class or two? see --classes",
    "class of one folder": "its objects in the other folders' images count as background",
    "object of another class": "left out",
    "box reversed": "left out; corners swapped, or a width and height?",
    "box not finite": "left out",
    "box without area": "left out",
    "box outside the image": "left out",
    "same box and class twice": "one is left out",
    "box beyond the image": "clipped",
    "box under a pixel": "kept; are the coordinates fractions?",
    "object that no anchor overlaps by half": "kept; see --anchors",
    "object under 8 pixels at 300x300": "kept, but hardly to be found: cut the images into tiles",
    "same pixels twice": "kept, in one list; blank ones, byte for byte as one measured on, leave training",
}
MOST_PLACES = 3  # of a kind that are printed
MOST_CLASSES = 20  # that are printed
MOST_BARS = 40  # classes in data.png

Size = tuple[int, int]  # width, height
Facts = dict[str, Any]  # what `inspect_files` returns
Findings = dict[str, list[str]]  # {kind: places}
ImageKey = tuple[Path, str]  # root, image id


class Object(NamedTuple):
    """An object that a training keeps."""

    place: str  # file and number
    name: str
    box: np.ndarray  # (4,) normalised xyxy
    lists: list[str]  # which of train, val, test have it


def count_frames(image: Image.Image) -> int:
    """Return the number of frames of an image; 2 where they cannot be counted: a later one is cut off."""
    if image.format == "MPO":  # a photo with a preview
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # whatever a broken file makes Pillow raise
        return 2


def turned_kind(orientation: int, size: Size | None, upright: Size) -> str:
    """Return the kind of an image with an EXIF orientation; upright: its size, size: by its annotation."""
    if ssd.is_turn_ambiguous(orientation, *(size or (0, 0))):
        return "image turned by EXIF, both readings fit"
    if size == upright:
        return "image turned by EXIF, annotated upright"
    return "image turned by EXIF, annotated as stored"


def inspect_image(path: str, size: Size | None) -> tuple[list | None, list]:
    """Return [width, height, digest of the pixels] of an image and its faults [kind, message].

    The former is None for an unreadable one. size: by the annotation, None without.
    """
    faults = []
    try:
        pixels = np.asarray(ssd.open_image(path))
    except ssd.InputError as error:
        return None, [["image unreadable", str(error)]]
    height, width, _ = pixels.shape
    upright = width, height
    if size is not None and size != upright:
        try:
            pixels = np.asarray(ssd.open_image(path, size))
        except ssd.InputError as error:
            faults.append(["image and annotation differ in size", str(error)])
    orientation = ssd.read_orientation(path)
    with Image.open(path) as image:
        num_frames = count_frames(image)
    if orientation in range(2, 9) and not faults:
        faults.append([turned_kind(orientation, size, upright), path])
    if num_frames > 1:
        faults.append(["image of several frames", path])
    if ssd.is_faint(path):
        faults.append(["grey values in a tenth of 16 bits", path])
    height, width, _ = pixels.shape
    digest = hashlib.sha1(pixels.tobytes(), usedforsecurity=False).hexdigest()
    return [width, height, digest], faults


def stamp_files(root: Path, image_id: str) -> tuple[list[str], list]:
    """Return the paths of an image and its annotation, and [time, size] of each, None for a missing one."""
    paths: list[str] = []
    stamps: list[list[int] | None] = []
    for kind in ("JPEGImages", "Annotations"):
        path = ssd.locate_file(root, kind, image_id)
        paths.append(path)
        if os.path.exists(path):
            stat = os.stat(path)
            stamps.append([stat.st_mtime_ns, stat.st_size])
        else:
            stamps.append(None)
    return paths, stamps


def inspect_files(root: Path, image_id: str) -> Facts:
    """Return what the audit must know of an image and its annotation.

    paths, stamps: of `stamp_files`; image: of `inspect_image`; annotation: the fields of an `ssd.Annotation`,
    without objects if its size is unknown; faults: [kind, message] of the files.
    """
    paths, stamps = stamp_files(root, image_id)
    annotation = ssd.Annotation(0, 0, ())
    size = None
    faults = []
    if stamps[1]:
        try:
            annotation = ssd.parse_annotation(paths[1])
            if annotation.width and annotation.height:
                size = annotation.width, annotation.height
            else:
                faults.append(["annotation without a size", paths[1]])
        except ssd.InputError as error:
            faults.append(["annotation unreadable", str(error)])
    image = None
    image_faults = [["image missing", paths[0]]]
    if stamps[0]:
        image, image_faults = inspect_image(paths[0], size)
    if size is None and image is None:
        annotation = ssd.Annotation(0, 0, ())
    elif size is None and image is not None:
        annotation = ssd.Annotation(image[0], image[1], annotation.objects)
    return {
        "paths": paths,
        "stamps": stamps,
        "image": image,
        "faults": faults + image_faults,
        "annotation": dataclasses.asdict(annotation),
    }


def annotation_of(facts: Facts) -> ssd.Annotation:
    """Return the Annotation that `inspect_files` found, or that audit.json had kept."""
    saved = facts["annotation"]
    objects = []
    for one in saved["objects"]:
        xmin, ymin, xmax, ymax = one["box_voc"]
        objects.append(ssd.VocObject(one["name"], (xmin, ymin, xmax, ymax), one["difficult"]))
    return ssd.Annotation(saved["width"], saved["height"], tuple(objects))


def inspect_all(root: Path, image_ids: Iterable[str]) -> dict[str, Facts]:
    """Return {image_id: `inspect_files`}; files unchanged since ROOT/audit.json are not read again."""
    facts: dict[str, Facts] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        saved = json.loads((root / "audit.json").read_text(encoding="utf-8"))
        if (saved["version"], saved["root"]) == (VERSION, str(root)):  # the paths begin with it
            facts = dict(saved["files"])
    ids = [i for i in image_ids if facts.get(i, {}).get("stamps") != stamp_files(root, i)[1]]
    with concurrent.futures.ThreadPoolExecutor(ssd.usable_cores()) as pool:  # decoding frees Python's lock
        found = pool.map(lambda image_id: inspect_files(root, image_id), ids)
        found = tqdm(found, f"checking {root}", len(ids), leave=False, disable=not sys.stderr.isatty())
        return facts | dict(zip(ids, found, strict=True))


def check_objects(
    annotation: ssd.Annotation, path: str, classes: Sequence[str], findings: Findings
) -> list[tuple[str, str, np.ndarray]]:
    """Return (place, class, normalised box) of the objects that a training keeps, find the others.

    path: the file of the annotation.
    """
    size = np.array([annotation.width, annotation.height] * 2, dtype=np.float32)
    kept: dict[tuple[str, ssd.Box], tuple[str, str, np.ndarray]] = {}
    for number, one in enumerate(annotation.objects, start=1):
        place = ssd.name_object(path, number, one)
        if one.name not in classes:
            findings["object of another class"].append(place)
            continue
        box_px, faults = ssd.judge_box(one.box_voc, annotation.width, annotation.height)
        if box_px is not None and (one.name, box_px) in kept:
            findings["same box and class twice"].append(place)
            continue
        for fault in faults:
            findings[fault].append(place)
        if box_px is not None:
            kept[one.name, box_px] = (place, one.name, np.array(box_px, dtype=np.float32) / size)
    return list(kept.values())


def check_images(
    images: Mapping[ImageKey, list[str]], facts: Mapping[Path, Facts], findings: Findings
) -> None:
    """Find images in two lists, and images of the same pixels. images: {(root, image id): lists}."""
    groups = defaultdict(list)  # digest: images
    for (root, image_id), lists in images.items():
        one = facts[root][image_id]
        if len(lists) > 1:
            findings["image in two lists"].append(f"{one['paths'][0]} ({', '.join(lists)})")
        if one["image"]:
            groups[one["image"][2]].append((one["paths"][0], lists, len(one["annotation"]["objects"])))
    for (first, first_lists, first_objects), *others in groups.values():
        for path, lists, num_objects in others:
            is_leak = len({*first_lists, *lists}) > 1 and first_objects + num_objects > 0
            place = f"{path} ({', '.join(lists)}) has those of {first} ({', '.join(first_lists)})"
            findings[LEAK if is_leak else "same pixels twice"].append(place)


def check_anchors(
    objects: Sequence[Object], classes: Sequence[str], mode: str | ssd.AnchorSizes, findings: Findings
) -> np.ndarray:
    """Return `ssd.best_anchor_iou` (N,) of objects, find what no anchor overlaps by half; mode: --anchors."""
    train_boxes = np.reshape([one.box for one in objects if "train" in one.lists], (-1, 4))
    sizes: ssd.AnchorSizes = ssd.ANCHOR_SIZES
    if len(train_boxes):
        sizes = ssd.choose_anchors(mode, train_boxes, classes)
    best = ssd.best_anchor_iou(np.reshape([one.box for one in objects], (-1, 4)), sizes)
    for one, iou in zip(objects, best, strict=True):
        if iou < 0.5:
            findings["object that no anchor overlaps by half"].append(one.place)
    return best


def check_all(
    images: Mapping[ImageKey, list[str]],
    facts: Mapping[Path, Facts],
    classes: Sequence[str],
    settings: ssd.Settings,
    findings: Findings,
) -> tuple[list[Object], np.ndarray]:
    """Return the Objects that are kept and `ssd.best_anchor_iou` of each; fill findings, {kind: places}."""
    objects = []
    bare_kinds = {"negative": "image without annotation", "error": "annotation missing"}
    for (root, image_id), lists in images.items():
        one = facts[root][image_id]
        path = one["paths"][1]
        for kind, message in one["faults"]:
            findings[kind].append(message)
        if one["stamps"][1] is None:
            findings[bare_kinds[settings.unlabelled]].append(f"{path}: no such file (see --unlabelled)")
        rows = check_objects(annotation_of(one), path, classes, findings)
        objects += [Object(*row, lists) for row in rows]
    check_images(images, facts, findings)
    best = check_anchors(objects, classes, settings.anchors, findings)
    small = [one.place for one in objects if 300 * max(one.box[2:] - one.box[:2]) < 8]
    findings["object under 8 pixels at 300x300"] += small
    if not any("train" in one.lists for one in objects):
        findings["no object to train on"].append("the training list")
    return objects, best


def check_lists(
    listed: Mapping[tuple[Path, str], dict[str, ssd.Annotation]],
    sources: Sequence[ssd.Source],
    settings: ssd.Settings,
    findings: Findings,
) -> Sequence[str]:
    """Return a training's classes; find what the module says of whole lists, {(root, role): annotations}."""
    train = [listed.get((source.root, "train"), {}) for source in sources]
    classes, found = ssd.choose_classes(sources, train, None)
    for finding in found:
        findings[finding.kind] += finding.places
    classes = settings.classes or classes
    lists = {source.root: source.lists for source in sources}
    for (root, role), annotations in listed.items():
        try:
            ssd.make_records(root, lists[root][role], annotations, classes)
        except ssd.InputError as error:
            findings["boxes of a list written otherwise"].append(str(error))
    return classes


def plain_label(name: str) -> str:
    """Return a class name as matplotlib's font can write it: no formula, codes for letters it lacks."""
    text = ssd.printable(name)
    return text.replace("$", r"\$")  # matplotlib reads a formula between two of them


def plot_data(objects: Sequence[Object], best: np.ndarray, classes: Sequence[str], num_images: int) -> Figure:
    """Return data.png of training objects, of which `best` are the anchor IoUs: counts, sizes, shares."""
    names = np.array([one.name for one in objects])
    if len(classes) > MOST_BARS:
        classes = sorted(classes, key=names.tolist().count)[:MOST_BARS]
    counts = [np.count_nonzero(names == name) for name in classes]
    shares = [np.mean(best[names == name] >= 0.5) if name in names else 0 for name in classes]
    labels = [plain_label(name) for name in classes]
    figure = Figure(figsize=(14, 4.6 + 0.13 * len(classes)), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.bar_label(left.barh(labels, counts, color="C0"), padding=3)
    left.set(title=f"{len(names)} objects in {num_images} training images", xmargin=0.15)
    width, height = 300 * np.array([one.box[2:] - one.box[:2] for one in objects]).T  # of the network's input
    middle.scatter(width, height, s=5, alpha=0.25, c=np.where(best >= 0.5, "C0", "C3"), linewidths=0)
    middle.set(title="Sizes at 300x300 (red: no anchor at IoU .5)", xlim=(0, 300), ylim=(0, 300))
    middle.set(xlabel="width, pixels", ylabel="height, pixels", aspect="equal")
    right.bar_label(right.barh(labels, shares, color="C2"), fmt="%.2f", padding=3)
    right.set(title=f"Matched by an anchor at IoU .5: {np.mean(best >= 0.5):.3f}", xlim=(0, 1.15))
    for axes, label in ((left, "objects (of more than 40 classes the rarest)"), (right, "share of objects")):
        axes.set(xlabel=label, ylim=(len(classes) - 0.4, -0.6))  # the first class on top
    return figure


# ---- the command line ----


def find_images(sources: Sequence[ssd.Source]) -> dict[ImageKey, list[str]]:
    """Return {(root, image id): which of train, val, test have it}."""
    images = defaultdict(list)
    for source in sources:
        for role, split in source.lists.items():
            if not split:
                continue
            for image_id in ssd.read_split(source.root, split):
                images[source.root, image_id].append(role)
    return images


def list_annotations(
    images: Mapping[ImageKey, list[str]], facts: Mapping[Path, Facts]
) -> dict[tuple[Path, str], dict[str, ssd.Annotation]]:
    """Return {(root, role): {image id: Annotation}}."""
    listed: dict[tuple[Path, str], dict[str, ssd.Annotation]] = defaultdict(dict)
    for (root, image_id), roles in images.items():
        annotation = annotation_of(facts[root][image_id])
        for role in roles:
            listed[root, role][image_id] = annotation
    return listed


def write_findings(facts: Mapping[Path, Facts], findings: Findings) -> None:
    """Write audit.json into each root, with a warning where that is impossible."""
    counts = {kind: len(places) for kind, places in findings.items()}
    for root, files in facts.items():
        content = {"version": VERSION, "root": str(root), "counts": counts, "findings": findings}
        try:
            ssd.write_json(root / "audit.json", content | {"files": files})
        except OSError as error:
            print(f"warning: {root / 'audit.json'} was not written: {error}", file=sys.stderr)


def print_data(
    images: Mapping[ImageKey, list[str]],
    lists: Mapping[str, str],
    objects: Sequence[Object],
    classes: Sequence[str],
) -> None:
    """Print a line for each list, and the classes."""
    for role, split in lists.items():
        if split:
            num_images = sum(role in roles for roles in images.values())
            num_objects = sum(role in one.lists for one in objects)
            print(f"{role:<5} {num_images:7d} images {num_objects:8d} objects  (list {split})")
    text = ", ".join(classes[:MOST_CLASSES])
    if len(classes) > MOST_CLASSES:
        text += ", ..."
    print(f"{len(classes)} classes: {text}")


def print_kinds(findings: Findings) -> None:
    """Print the count and the first places of each kind."""
    for kind, places in findings.items():
        lines = [f"{len(places):6d} {kind}: {KINDS[kind]}", *places[:MOST_PLACES]]
        if len(places) > MOST_PLACES:
            lines.append(f"... and {len(places) - MOST_PLACES} more in audit.json")
        print("\n         ".join(lines))


def run(settings: ssd.Settings) -> int:
    """Audit the data that the settings name; returns the exit code. InputError for a mistake of the user."""
    names = ("data_root", "train_split", "val_split", "test_split")
    splits = {name: getattr(settings, name) for name in names}
    sources = ssd.find_sources(settings.data, *splits.values())
    lists = ssd.join_lists(sources)
    images = find_images(sources)
    roots = [source.root for source in sources]
    facts = {root: inspect_all(root, [i for r, i in images if r == root]) for root in roots}

    # What is wrong with the files, their objects and whole lists.
    findings: Findings = {kind: [] for kind in KINDS}
    classes = check_lists(list_annotations(images, facts), sources, settings, findings)
    objects, best = check_all(images, facts, classes, settings, findings)
    findings = {kind: places for kind, places in findings.items() if places}
    write_findings(facts, findings)

    trained = np.flatnonzero(["train" in one.lists for one in objects])
    if len(trained):
        num_images = sum("train" in roles for roles in images.values())
        figure = plot_data([objects[i] for i in trained], best[trained], classes, num_images)
        ssd.save_figure(figure, Path(settings.output_dir) / "plots" / "data.png")
    print_data(images, lists, objects, classes)
    print_kinds(findings)
    faults = [kind for kind in (*STOPS, LEAK) if kind in findings]
    if faults:
        print(f"mend before a training: {', '.join(faults)}")
        return 1

    # The training's own reading, too, in case that stops at something else or finds what has no kind here.
    data = ssd.load_data(
        settings.data,
        classes=settings.classes,
        val_fraction=settings.val_fraction,
        unlabelled=settings.unlabelled,
        **splits,
    )
    ssd.print_findings(finding for finding in data.findings if finding.kind not in KINDS)
    print("a training can start")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"}.intersection(words):
        print(__doc__)
        return 0

    def work() -> int:
        settings, _ = ssd.load_settings(argv)
        return run(settings)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
