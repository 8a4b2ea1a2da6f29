"""Bring a data set in another format into Pascal VOC's layout, which training reads.

    python -m ssd_tools.convert coco instances_train2017.json train2017 OUT  # val2017: another list
    python -m ssd_tools.convert yolo data.yaml OUT                           # Ultralytics; needs PyYAML
    python -m ssd_tools.convert flat FOLDER OUT                              # pictures beside their VOC XML

OUT gets JPEGImages (symbolic links, or copies where there can be none), Annotations and ImageSets/Main. Boxes
keep their fractions of a pixel, crowds become difficult, and pictures without objects stay. Up to a tenth of
the objects may be faulty: these are left out and counted, and the first is named. Sources are only read.
"""

import argparse
import collections
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import ssd_object_detection as ssd
from ssd_tools.common import optional_import, run_program
from ssd_tools.shapes import write_annotation

STAMP = "convert.json"  # in OUT: {source: [list, image id]}


def corner_text(value: float) -> str:
    """Return a corner of a box as it is written."""
    return f"{value:.8g}"


@dataclass
class Picture:
    """An image file and its objects, whose corners are as they will be written."""

    path: Path  # absolute
    width: int
    height: int
    objects: list[ssd.VocObject] = field(default_factory=list)

    def add(self, one: ssd.VocObject, place: str, faults: list[str]) -> None:
        """Append an object, or to faults what is wrong with its box; place: where it stands."""
        written = [float(corner_text(value)) for value in one.box_voc]
        xmin, ymin, xmax, ymax = written
        box_voc = (xmin, ymin, xmax, ymax)
        box_px, kinds = ssd.judge_box(box_voc, self.width, self.height)
        if box_px is None:
            corners = ", ".join(f"{value:g}" for value in box_voc)
            faults.append(f"{place}: {kinds[0]} (xmin, ymin, xmax, ymax: {corners})")
        else:
            self.objects.append(ssd.VocObject(one.name, box_voc, one.difficult))


Lists = dict[str, list[Picture]]  # the Pictures of each list


def make_object(name: str, edges_px: Sequence[float], difficult: bool = False) -> ssd.VocObject:
    """Return an object of 0-based edges x1, y1, x2, y2 in pixels."""
    ((xmin, ymin, xmax, ymax),) = ssd.to_voc_pixels(np.array(edges_px)).tolist()
    return ssd.VocObject(name, (xmin, ymin, xmax, ymax), difficult)


def open_picture(path: Path) -> Picture:
    """Return the Picture of a file, without objects, of its size when upright by its EXIF tag."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception as error:  # whatever a broken file makes Pillow raise
        raise ssd.InputError(f"{path}: not readable as an image ({type(error).__name__})") from None
    if ssd.read_orientation(path) in (5, 6, 7, 8):  # the sides are swapped
        return Picture(path, height, width)
    return Picture(path, width, height)


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Return those of some paths that training reads as images, sorted."""
    files = [path for path in paths if path.suffix.lower() in ssd.IMAGE_SUFFIXES and path.is_file()]
    return sorted(path for path in files if not ssd.is_hidden(path.name))


def class_names(path: Path, names: Mapping[Any, Any]) -> dict[Any, str]:
    """Return {class id: name} of a file, names as training reads them; InputError for one that is no text."""
    cleaned = {}
    for number, name in names.items():
        if not isinstance(name, (str, int, float)):
            raise ssd.InputError(f"{path}: the name of class {number} is no text, but {str(name)[:60]}")
        cleaned[number] = ssd.clean_name(str(name))
        if not cleaned[number] or re.search(r"[\0-\x1f]", str(name)):
            raise ssd.InputError(f"{path}: class {number} has no name of a class: {name!r}")
    return cleaned


def first_of(items: Sequence[object]) -> str:
    """Return the first of some items and how many follow, as text."""
    if len(items) == 1:
        return str(items[0])
    return f"{items[0]}, and {len(items) - 1} more"


# ---- COCO ----


def id_text(value: object) -> str:
    """Return an id of a COCO JSON as text: some programs write a number here and "number" there."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def coco_path(name: str, images: Path) -> Path:
    """Return the absolute path of a file_name in the folder of images or beside it; %20 may mean a blank."""
    name = name.replace("\\", "/")
    plain = urllib.parse.unquote(name)
    places = [images / name, images / plain, images.parent / plain, images / PurePosixPath(plain).name]
    for place in places:
        if place.is_file():
            return Path(os.path.abspath(place))
    return Path(os.path.abspath(places[0]))


def coco_picture(row: dict[str, Any], images: Path) -> Picture:
    """Return the Picture of an image of a COCO JSON, without objects; images: the folder of its files."""
    path = coco_path(row["file_name"], images)
    if row.get("width") and row.get("height"):
        return Picture(path, int(row["width"]), int(row["height"]))
    return open_picture(path)


def add_coco_object(
    row: dict[str, Any], place: str, pictures: dict[str, Picture], names: dict[str, str], faults: list[str]
) -> None:
    """Add an annotation of a COCO JSON to its Picture, or to faults what is wrong with it."""
    try:
        x, y, width, height = map(float, row["bbox"])
        picture = pictures.get(id_text(row.get("image_id")))
        name = names.get(id_text(row.get("category_id")))
    except (KeyError, TypeError, ValueError):
        faults.append(f"{place} has no bbox of four numbers")
        return
    if picture is None:
        faults.append(f"{place}: no image has the id {row.get('image_id')!r}")
    elif name is None:
        faults.append(f"{place}: no category has the id {row.get('category_id')!r}")
    else:
        edges_px = (x, y, x + width, y + height)
        picture.add(make_object(name, edges_px, row.get("iscrowd") == 1), place, faults)


def without_outline(row: dict[str, Any]) -> dict[str, Any]:
    """Return a dict of a COCO JSON without its polygons, which are most of the file and not used."""
    row.pop("segmentation", None)
    return row


def read_coco(path: Path, images: Path, split: str | None) -> tuple[Lists, list[str]]:
    """Return ({list: [Picture]}, faults) of a COCO JSON of instances and the folder of its images."""
    if split is None:
        split = path.stem.removeprefix("instances_")
        if split.startswith("_annotations"):  # Roboflow: one in each of train, valid and test
            split = path.resolve().parent.name
    if not re.fullmatch(r"\w[\w .-]*", split):
        raise ssd.InputError(f"--list: the name of a list is letters and digits, not {split!r}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=without_outline)
        names = class_names(path, {id_text(row["id"]): row["name"] for row in content["categories"]})
        pictures = {id_text(row["id"]): coco_picture(row, images) for row in content["images"]}
        rows = list(content["annotations"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ssd.InputError(f"{path}: not a COCO JSON of instances ({problem})") from None
    if len(pictures) < len(content["images"]):
        raise ssd.InputError(f"{path}: two of its images have the same id")
    if len(names) < len(content["categories"]):
        raise ssd.InputError(f"{path}: two of its categories have the same id")
    faults: list[str] = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            row = {}
        name = row.get("id", f"number {number}")
        add_coco_object(row, f"{path}: annotation {name}", pictures, names, faults)
    return {split: list(pictures.values())}, faults


# ---- YOLO ----


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[int, str]]:
    """Return the dict of a data.yaml, all values as text, and {class id: name}."""
    yaml = optional_import("yaml", "reading data.yaml", "pyyaml")
    try:  # BaseLoader makes no boolean of a class that is called "no"
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
        if "train" not in content:
            raise KeyError("train")
        names = content.get("names") or [f"class_{number}" for number in range(int(content["nc"]))]
        if isinstance(names, str):
            raise ssd.InputError(f"{path}: names is text ({names[:60]}), not a list: write [cat, dog]")
        if not isinstance(names, dict):
            names = dict(enumerate(names))
        return content, class_names(path, {int(number): name for number, name in names.items()})
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ssd.InputError(f"{path}: not a data.yaml with train and names ({problem})") from None


def locate(name: str, folders: Iterable[Path]) -> Path:
    """Return the absolute path of a name in the first of some folders that has it; InputError: none has."""
    name = name.replace("\\", "/")
    names = (name, name.removeprefix("../"))  # Roboflow writes ../train/images for a folder beside data.yaml
    tried = [Path(os.path.abspath(folder / one)) for one in names for folder in folders]
    for path in tried:
        if path.exists():
            return path
    raise ssd.InputError(f"no file or folder {tried[0]}")


def label_file(image: Path) -> Path:
    """Return the label file of an image: labels/ in place of the last images/ of its path, ending .txt."""
    head, images, tail = image.as_posix().rpartition("/images/")
    if not images:
        return image.with_suffix(".txt")
    return Path(f"{head}/labels/{tail}").with_suffix(".txt")


def files_of(entry: str | list[str], folders: Sequence[Path]) -> list[Path]:
    """Return the images of an entry of data.yaml: a folder, a text file of paths, or several of them.

    InputError where there is none, or no label file of any.
    """
    files: list[Path] = []
    names = [entry] if isinstance(entry, str) else entry
    for name in names:
        path = locate(name, folders)
        if path.is_dir():
            files += image_files(path.rglob("*"))
        else:
            lines = [line.strip() for line in path.read_text("utf-8-sig", errors="replace").splitlines()]
            files += [locate(line, [path.parent, *folders]) for line in lines if line]
    if not any(label_file(file).is_file() for file in files):
        problem = f"{len(files)} images with no label"
        if files:
            problem += f", no {label_file(files[0])}"
        raise ssd.InputError(problem)
    return list(dict.fromkeys(files))


def parse_label(line: str, is_pose: bool) -> tuple[float, np.ndarray]:
    """Return (class id, points (N, 2)) of a line of a label file; ValueError if it is of neither kind.

    The points of a box are its centre and its size, others are the corners of a polygon.
    """
    label, *values = map(float, line.split())
    points = np.reshape(values[:4] if is_pose else values, (-1, 2))
    if len(points) < 2:
        raise ValueError("neither a box nor a polygon")
    return label, points


def read_labels(picture: Picture, names: dict[int, str], is_pose: bool, faults: list[str]) -> None:
    """Add its objects to a Picture, and wrong lines to faults. A picture without a label file has none.

    A line is `class cx cy width height` (is_pose: key points follow) or `class x y x y x y ...`, a polygon.
    """
    path = label_file(picture.path)
    if not path.is_file():
        return
    size = np.array([picture.width, picture.height])
    content = path.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}: line {number} ({line.strip()[:60]})"
        try:
            label, points = parse_label(line, is_pose)
        except ValueError:
            faults.append(f"{place} is neither a box nor a polygon")
            continue
        if not (points.min() >= -0.01 and points.max() <= 1.01):
            faults.append(f"{place} has other numbers than fractions from 0 to 1")
        elif label not in names:
            faults.append(f"{place}: no class {label:g} among the {len(names)} names")
        else:
            low, high = points.min(axis=0), points.max(axis=0)
            if len(points) == 2:
                low, high = points[0] - points[1] / 2, points[0] + points[1] / 2
            edges_px = [*(low * size).tolist(), *(high * size).tolist()]
            picture.add(make_object(names[int(label)], edges_px), place, faults)


def read_yolo(path: Path) -> tuple[Lists, list[str]]:
    """Return ({list: [Picture]}, faults) of a data.yaml; val or test without images or labels is left out."""
    content, names = read_yaml(path)
    given = content.get("path", "")
    folders = [path.parent / given, Path(given), path.parent]  # the last: `path` is of another machine
    lists: Lists = {}
    faults: list[str] = []
    for split in ("train", "val", "test"):
        if not content.get(split):
            continue
        try:
            files = files_of(content[split], folders)
        except ssd.InputError as error:
            if split == "train":
                raise ssd.InputError(f"{path}: train: {error}") from None
            print(f"warning: {path}: {split} is left out: {error}", file=sys.stderr)
            continue
        lists[split] = [open_picture(file) for file in files]
        for picture in lists[split]:
            read_labels(picture, names, "kpt_shape" in content, faults)
    return lists, faults


# ---- pictures with VOC XML beside them ----


def read_pair(file: Path, annotation: Path, faults: list[str]) -> Picture:
    """Return the Picture of an image file and its VOC XML."""
    found = ssd.parse_annotation(annotation)
    path = Path(os.path.abspath(file))
    picture = Picture(path, found.width, found.height)
    if not (found.width and found.height):
        picture = open_picture(path)
    for number, one in enumerate(found.objects, start=1):
        picture.add(one, f"{annotation}: object {number}", faults)
    return picture


def plain_stem(path: Path) -> str:
    """Return the name of a file without its ending, in Unicode's form NFC."""
    return unicodedata.normalize("NFC", path.stem)


def choose_owner(annotation: Path, files: Sequence[Path]) -> Path:
    """Return the picture of an XML, of several of its name the one in its <filename>; else InputError."""
    if len(files) == 1:
        return files[0]
    name = ssd.named_picture(annotation)
    for file in files:
        if ssd.has_name(file, name):
            return file
    listed = " and ".join(file.name for file in files)
    raise ssd.InputError(f"{annotation}: is it of {listed}? Its <filename> must name one, not {name!r}")


def read_pairs(folder: Path, faults: list[str]) -> list[Picture]:
    """Return the Pictures of a folder that have an XML of the same name; those without one are left out."""
    files = image_files(folder.iterdir())
    by_stem: dict[str, list[Path]] = {}
    for file in files:
        by_stem.setdefault(plain_stem(file), []).append(file)
    annotations = [path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".xml"]
    annotations = [path for path in annotations if not ssd.is_hidden(path.name)]
    alone = [path for path in annotations if plain_stem(path) not in by_stem]
    if alone:
        raise ssd.InputError(f"no picture beside {first_of(alone)}")
    pairs = {choose_owner(path, by_stem[plain_stem(path)]): path for path in annotations}
    bare = [file for file in files if file not in pairs]
    if bare:
        print(f"warning: left out, without an XML of its own beside it: {first_of(bare)}", file=sys.stderr)
    return [read_pair(file, pairs[file], faults) for file in files if file in pairs]


def read_flat(folder: Path, test_fraction: float, seed: int) -> tuple[Lists, list[str]]:
    """Return ({list: [Picture]}, faults) of FOLDER/train, valid and test, or of FOLDER, split by a seed."""
    if not folder.is_dir():
        raise ssd.InputError(f"no folder {folder}")
    if ssd.has_voc_layout(folder):
        command = f"python ssd_object_detection.py --data {shlex.quote(str(folder))}"
        raise ssd.InputError(f"{folder} has pictures and annotations in folders of their own: use {command}")
    faults: list[str] = []
    pictures = read_pairs(folder, faults)
    lists: Lists = {}
    for inner in sorted(folder.iterdir()):
        split = ssd.LIST_NAMES.get(inner.name.casefold())
        if split is None or not inner.is_dir():
            continue
        if split in lists:
            raise ssd.InputError(f"{inner} is the second folder for the list {split}: move its files")
        lists[split] = read_pairs(inner, faults)
    if lists and pictures:
        raise ssd.InputError(f"{folder} has pictures both in it and in {', '.join(lists)}: move those of it")
    if not lists:
        order = np.random.default_rng(seed).permutation(len(pictures)).tolist()
        count = round(test_fraction * len(pictures))
        lists = {
            "train": [pictures[i] for i in sorted(order[count:])],
            "test": [pictures[i] for i in sorted(order[:count])],
        }
        print(
            f"{folder} has no folders train, valid or test: {count} of its {len(pictures)} pictures are "
            f"drawn for the list test (--test-fraction {test_fraction:g} --seed {seed})"
        )
    return lists, faults


# ---- the folder in VOC layout ----


def check(lists: Lists, faults: Sequence[str], out: Path, source: Path) -> None:
    """Raise InputError for faulty sources, or an OUT inside them; `source` is their folder or file."""
    pictures = [picture for found in lists.values() for picture in found]
    total = len(faults) + sum(len(picture.objects) for picture in pictures)
    if len(faults) > max(1, total / 10):
        raise ssd.InputError(f"{len(faults)} of {total} objects are faulty: {first_of(faults)}")
    if not pictures:
        raise ssd.InputError(f"{source}: no picture")
    paths = [picture.path for picture in pictures]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ssd.InputError(f"no such picture: {first_of(missing)}")
    unknown = [path for path in paths if path.suffix.lower() not in ssd.IMAGE_SUFFIXES]
    if unknown:
        raise ssd.InputError(f"training reads {', '.join(ssd.IMAGE_SUFFIXES)}, not {first_of(unknown)}")
    for folder in {source, *(path.parent for path in paths)}:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ssd.InputError(f"{out} is inside the source {folder}: choose another folder to write")


def possible_ids(path: Path) -> Iterator[str]:
    """Yield the stem of a file, then with more and more folders in front, then numbered without end."""
    name = path.stem
    yield name
    for folder in path.parts[-2:0:-1]:
        name = f"{folder}_{name}"
        yield name
    for number in itertools.count(2):
        yield f"{path.stem}_{number}"


def take_id(path: Path, taken: set[str]) -> str:
    """Return an id for a file, the first of `possible_ids` that is free; add it casefolded to the set taken.

    An id is a line of a list, and one that ends with a blank and 1 would make it a list of one class.
    """
    for name in possible_ids(path):
        line = " ".join(unicodedata.normalize("NFC", name).splitlines()).strip().replace("\\", "_")
        image_id = re.sub(r"\s(?=(-1|0|1)$)", "_", line)
        if image_id.casefold() not in taken:
            taken.add(image_id.casefold())
            return image_id
    raise AssertionError("there is always another number")


def write_picture(out: Path, image_id: str, picture: Picture) -> None:
    """Write JPEGImages/ID.*, a link to the source or a copy of it, and Annotations/ID.xml."""
    target = out / "JPEGImages" / f"{image_id}{picture.path.suffix}"
    target.unlink(missing_ok=True)  # of a run that was interrupted; nothing is written through a link
    try:
        target.symlink_to(picture.path)
    except OSError:
        shutil.copyfile(picture.path, target)
    objects = []
    for one in picture.objects:
        corners = [corner_text(value) for value in one.box_voc]
        objects.append((one.name, corners, one.difficult))
    shape = picture.height, picture.width, 3
    write_annotation(out / "Annotations" / f"{image_id}.xml", target.name, shape, objects)


def describe(split: str, pictures: Sequence[Picture]) -> str:
    """Return the counts of a list as text."""
    objects = [one for picture in pictures for one in picture.objects]
    counts = collections.Counter(one.name for one in objects)
    empty = sum(not picture.objects for picture in pictures)
    difficult = sum(one.difficult for one in objects)
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return (
        f"{split}: {len(pictures)} pictures ({empty} without objects), {len(objects)} objects ("
        f"{difficult} difficult or crowds): {listed}"
    )


def read_stamp(out: Path) -> dict[str, list[str]]:
    """Return what STAMP says of a folder to write, {} of a new one; InputError for one of another program."""
    if (out / STAMP).is_file():
        return json.loads((out / STAMP).read_text(encoding="utf-8"))
    if out.exists() and any(out.iterdir()):
        raise ssd.InputError(f"{out} is there and not of this program: choose another folder to write")
    return {}


def write_voc(out: Path, lists: Lists) -> None:
    """Write {list: [Picture]} into a new folder, or as further lists into one that this program wrote.

    The stamp is written first and the lists last, so the same command mends an interrupted run.
    """
    main_folder = out / "ImageSets" / "Main"
    stamp = read_stamp(out)
    for split in lists:
        if (main_folder / f"{split}.txt").exists():
            hint = "give this one another name with --list (coco), or write to a new folder"
            raise ssd.InputError(f"{out} has a list {split} already: {hint}")

    # Each source gets an id; those of lists that an interrupted run left are given again.
    done = {source: entry for source, entry in stamp.items() if entry[0] not in lists}
    taken = {image_id.casefold() for _, image_id in done.values()}
    for split, pictures in lists.items():
        for picture in pictures:
            source = str(picture.path)
            if source in done:
                raise ssd.InputError(f"{source} is in the list {done[source][0]} already: name it once")
            done[source] = [split, take_id(picture.path, taken)]

    for folder in (main_folder, out / "JPEGImages", out / "Annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    ssd.write_json(out / STAMP, done)
    for split, pictures in lists.items():
        ids = [done[str(picture.path)][1] for picture in pictures]
        pairs = zip(ids, pictures, strict=True)
        for image_id, picture in tqdm(pairs, split, len(ids), disable=not sys.stderr.isatty()):
            write_picture(out, image_id, picture)
        if ids:
            text = "".join(f"{image_id}\n" for image_id in ids)
            (main_folder / f"{split}.txt").write_text(text, encoding="utf-8")
            print(describe(split, pictures))


# ---- the command line ----


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the namespace of the command line; its `read` is the function of the format."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(required=True, metavar="FORMAT")
    coco = kinds.add_parser("coco", help="a JSON of instances and the folder of its images")
    coco.add_argument("source", type=Path, metavar="INSTANCES.json")
    coco.add_argument("images", type=Path, metavar="IMAGES", help="the folder that the file names are in")
    coco.add_argument(
        "--list",
        metavar="NAME",
        help="of the list (default: the JSON's, without instances_; its folder's for _annotations.coco.json)",
    )
    coco.set_defaults(read=lambda args: read_coco(args.source, args.images, args.list))
    yolo = kinds.add_parser("yolo", help="a data.yaml of Ultralytics, and label files")
    yolo.add_argument("source", type=Path, metavar="DATA.yaml")
    yolo.set_defaults(read=lambda args: read_yolo(args.source))
    flat = kinds.add_parser("flat", help="pictures with VOC XML beside them, maybe in train, valid and test")
    flat.add_argument("source", type=Path, metavar="FOLDER")
    flat.add_argument(
        "--test-fraction",
        type=ssd.unit_interval,
        default=0.1,
        metavar="X",
        help="without such folders: share of the pictures to draw for the list test (default: .1)",
    )
    flat.add_argument("--seed", type=ssd.natural_int, default=0, help="of that draw (default: 0)")
    flat.set_defaults(read=lambda args: read_flat(args.source, args.test_fraction, args.seed))
    for kind in (coco, yolo, flat):
        kind.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Read the source, check it and write the folder by the flags."""
    lists, faults = args.read(args)
    check(lists, faults, args.out, getattr(args, "images", args.source))
    write_voc(args.out, lists)
    if faults:
        print(f"warning: faulty and left out ({len(faults)}): {first_of(faults)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    args = parse_args(argv)
    return run_program(functools.partial(run, args))


if __name__ == "__main__":
    sys.exit(main())
