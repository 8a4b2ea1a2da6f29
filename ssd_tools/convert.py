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
import itertools
import json
import os
import re
import shutil
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

import ssd_object_detection as ssd
from ssd_tools.shapes import write_annotation

STAMP = "convert.json"  # in OUT: {source: [list, image id]}


@dataclass
class Picture:
    """An image file and its objects: (class, [x1, y1, x2, y2], is difficult), 0-based edges in pixels."""

    path: Path  # absolute
    width: int
    height: int
    objects: list = field(default_factory=list)

    def add(self, name, box, place, faults, is_difficult=False):
        """Append an object, or to faults what is wrong with its box; place: where it stands."""
        x1, y1, x2, y2 = box
        inside = min(x2, self.width) - max(x1, 0), min(y2, self.height) - max(y1, 0)
        if np.isfinite(box).all() and min(x2 - x1, y2 - y1) > 1 and min(inside) > 0:  # as `ssd.read_record`
            self.objects.append((name, box, is_difficult))
        else:
            corners = ", ".join(f"{value:g}" for value in box)
            faults.append(f"{place}: box [{corners}] is a pixel or less across, or outside the picture")


def open_picture(path):
    """Return the Picture of a file, without objects, of its size when upright by its EXIF tag."""
    try:
        with Image.open(path) as image:
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return Picture(path, *(image.size[::-1] if is_turned else image.size))
    except Exception as error:  # whatever a broken file makes Pillow raise
        raise ssd.InputError(f"{path}: not readable as an image ({type(error).__name__})") from None


def image_files(paths):
    """Return those of some paths that training reads as images, sorted."""
    return sorted(path for path in paths if path.suffix.lower() in ssd.IMAGE_SUFFIXES and path.is_file())


def first_of(items):
    """Return the first of some items and how many follow, as text."""
    return f"{items[0]}, and {len(items) - 1} more" if len(items) > 1 else str(items[0])


# ---- COCO ----


def read_coco(path, images, split):
    """Return ({list: [Picture]}, faults) of a COCO JSON of instances and the folder of its images."""
    split = path.stem.removeprefix("instances_") if split is None else split
    if not re.fullmatch(r"\w[\w .-]*", split):
        raise ssd.InputError(f"--list: the name of a list is letters and digits, not {split!r}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        names = {row["id"]: str(row["name"]) for row in content["categories"]}
        pictures = {}
        for row in content["images"]:
            file = Path(os.path.abspath(images / row["file_name"].replace("\\", "/")))
            size = (row.get("width"), row.get("height"))
            pictures[row["id"]] = Picture(file, *map(int, size)) if all(size) else open_picture(file)
        rows = content["annotations"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ssd.InputError(f"{path}: not a COCO JSON of instances ({problem})") from None
    if len(pictures) < len(content["images"]):
        raise ssd.InputError(f"{path}: two of its images have the same id")
    faults = []
    for number, row in enumerate(rows, start=1):
        row = row if isinstance(row, dict) else {}
        place = f"{path}: annotation {row.get('id', f'number {number}')}"
        try:
            x, y, width, height = map(float, row["bbox"])
            picture, name = pictures.get(row.get("image_id")), names.get(row.get("category_id"))
        except (KeyError, TypeError, ValueError):
            faults.append(f"{place} has no bbox of four numbers")
            continue
        if picture is None:
            faults.append(f"{place}: no image has the id {row.get('image_id')}")
        elif name is None:
            faults.append(f"{place}: no category has the id {row.get('category_id')}")
        else:
            picture.add(name, [x, y, x + width, y + height], place, faults, row.get("iscrowd") == 1)
    return {split: list(pictures.values())}, faults


# ---- YOLO ----


def read_yaml(path):
    """Return the dict of a data.yaml, all values as text, and {class id: name}."""
    try:
        import yaml
    except ImportError:
        raise ssd.InputError("data.yaml needs PyYAML: pip install pyyaml") from None
    try:  # BaseLoader makes no boolean of a class that is called "no"
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
        if "train" not in content:
            raise KeyError("train")
        names = content.get("names") or [f"class_{number}" for number in range(int(content["nc"]))]
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        return content, {int(number): name for number, name in pairs}
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ssd.InputError(f"{path}: not a data.yaml with train and names ({problem})") from None


def locate(name, folders):
    """Return the absolute path of a name in the first of some folders that has it; InputError: none has."""
    names = (name, name.removeprefix("../"))  # Roboflow writes ../train/images for a folder beside data.yaml
    tried = [Path(os.path.abspath(folder / one)) for one in names for folder in folders]
    found = next((path for path in tried if path.exists()), None)
    if found is None:
        raise ssd.InputError(f"no file or folder {tried[0]}")
    return found


def files_of(entry, folders):
    """Return the images of an entry of data.yaml: a folder, a text file of paths, or several of them.

    InputError where there is none, or no label file of any.
    """
    files = []
    for name in [entry] if isinstance(entry, str) else entry:
        path = locate(name, folders)
        if path.is_dir():
            files += image_files(path.rglob("*"))
        else:
            lines = [line.strip() for line in path.read_text("utf-8-sig", errors="replace").splitlines()]
            files += [locate(line, [path.parent, *folders]) for line in lines if line]
    if not any(label_file(file).is_file() for file in files):
        missing = f", no {label_file(files[0])}" if files else ""
        raise ssd.InputError(f"{len(files)} images with no label{missing}")
    return list(dict.fromkeys(files))


def label_file(image):
    """Return the label file of an image: labels/ in place of the last images/ of its path, ending .txt."""
    head, images, tail = image.as_posix().rpartition("/images/")
    return Path(f"{head}/labels/{tail}" if images else image).with_suffix(".txt")


def read_labels(picture, names, is_pose, faults):
    """Add its objects to a Picture, and wrong lines to faults. A picture without a label file has none.

    A line is `class cx cy width height` (is_pose: key points follow) or `class x y x y x y ...`, a polygon.
    """
    path, size = label_file(picture.path), np.array([picture.width, picture.height])
    content = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}: line {number} ({line.strip()[:60]})"
        try:
            label, *values = map(float, line.split())
            points = np.reshape(values[:4] if is_pose else values, (-1, 2))
        except ValueError:
            points = ()
        if len(points) < 2:
            faults.append(f"{place} is neither a box nor a polygon")
        elif not (points.min() >= -0.01 and points.max() <= 1.01):
            faults.append(f"{place} has other numbers than fractions from 0 to 1")
        elif label not in names:
            faults.append(f"{place}: no class {label:g} among the {len(names)} names")
        else:
            is_box = len(points) == 2
            low = points[0] - points[1] / 2 if is_box else points.min(axis=0)
            high = points[0] + points[1] / 2 if is_box else points.max(axis=0)
            picture.add(names[label], [*(low * size).tolist(), *(high * size).tolist()], place, faults)


def read_yolo(path):
    """Return ({list: [Picture]}, faults) of a data.yaml; val or test without images or labels is left out."""
    content, names = read_yaml(path)
    given = content.get("path", "")
    folders = [path.parent / given, Path(given), path.parent]  # the last: `path` is of another machine
    lists, faults = {}, []
    for split in ("train", "val", "test"):
        if content.get(split):
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


def read_pairs(folder, faults):
    """Return the Pictures of a folder that have an XML of the same name; those without one are left out."""
    files = image_files(folder.iterdir())
    annotations = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".xml"}
    if alone := sorted(annotations.keys() - {file.stem for file in files}):
        raise ssd.InputError(f"no picture beside {first_of([annotations[stem] for stem in alone])}")
    if bare := [file for file in files if file.stem not in annotations]:
        print(f"warning: left out, without an XML beside it: {first_of(bare)}", file=sys.stderr)
    pictures = []
    for file in files:
        if path := annotations.get(file.stem):
            width, height, objects = ssd.parse_annotation(path)
            file = Path(os.path.abspath(file))
            pictures.append(Picture(file, width, height) if min(width, height) > 0 else open_picture(file))
            for number, (name, (xmin, ymin, xmax, ymax), is_difficult) in enumerate(objects, start=1):
                box = [xmin - 1, ymin - 1, xmax, ymax]  # 1-based and inclusive -> 0-based edges
                pictures[-1].add(name, box, f"{path}: object {number}", faults, is_difficult)
    return pictures


def read_flat(folder, test_fraction, seed):
    """Return ({list: [Picture]}, faults) of FOLDER/train, valid and test, or of FOLDER, split by a seed."""
    faults = []
    pictures = read_pairs(folder, faults)
    lists = {}
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        if (folder / name).is_dir():
            lists[split] = read_pairs(folder / name, faults)
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


def check(lists, faults, out, source):
    """Raise InputError for faulty sources, or an OUT inside them; `source` is their folder or file."""
    pictures = [picture for found in lists.values() for picture in found]
    total = len(faults) + sum(len(picture.objects) for picture in pictures)
    if len(faults) > max(1, total / 10):
        raise ssd.InputError(f"{len(faults)} of {total} objects are faulty: {first_of(faults)}")
    if not pictures:
        raise ssd.InputError(f"{source}: no picture")
    names = {name for picture in pictures for name, _, _ in picture.objects}
    if odd := [name for name in names if not name.strip() or re.search(r"[\0-\x1f]", name)]:
        raise ssd.InputError(f"{source}: no name of a class: {odd[0]!r}")
    if missing := [picture.path for picture in pictures if not picture.path.is_file()]:
        raise ssd.InputError(f"no such picture: {first_of(missing)}")
    if unknown := [p.path for p in pictures if p.path.suffix.lower() not in ssd.IMAGE_SUFFIXES]:
        raise ssd.InputError(f"training reads {', '.join(ssd.IMAGE_SUFFIXES)}, not {first_of(unknown)}")
    for folder in {source, *(picture.path.parent for picture in pictures)}:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ssd.InputError(f"{out} is inside the source {folder}: choose another folder to write")


def take_id(path, taken):
    """Return an id for a file, its stem behind folders where it must, and add it casefolded to the set taken.

    An id is a line of a list, and one that ends with a blank and 1 would make it a list of one class.
    """
    folders = path.parts[-2:0:-1]
    joined = itertools.accumulate(folders, lambda name, folder: f"{folder}_{name}", initial=path.stem)
    numbered = (f"{path.stem}_{number}" for number in itertools.count(2))
    for name in itertools.chain(joined, numbered):
        line = " ".join(unicodedata.normalize("NFC", name).splitlines()).strip().replace("\\", "_")
        image_id = re.sub(r"\s(?=(-1|0|1)$)", "_", line)
        if image_id.casefold() not in taken:
            taken.add(image_id.casefold())
            return image_id


def write_picture(out, image_id, picture):
    """Write JPEGImages/ID.*, a link to the source or a copy of it, and Annotations/ID.xml."""
    target = out / "JPEGImages" / f"{image_id}{picture.path.suffix}"
    target.unlink(missing_ok=True)  # of a run that was interrupted; nothing is written through a link
    try:
        target.symlink_to(picture.path)
    except OSError:
        shutil.copyfile(picture.path, target)
    objects = [
        (name, [f"{value:.8g}" for value in ssd.to_voc_pixels(box)[0]], is_difficult)
        for name, box, is_difficult in picture.objects
    ]
    shape = picture.height, picture.width, 3
    write_annotation(out / "Annotations" / f"{image_id}.xml", target.name, shape, objects)


def describe(split, pictures):
    """Return the counts of a list as text."""
    objects = [one for picture in pictures for one in picture.objects]
    counts = collections.Counter(name for name, _, _ in objects)
    empty = sum(not picture.objects for picture in pictures)
    difficult = sum(is_difficult for _, _, is_difficult in objects)
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return (
        f"{split}: {len(pictures)} pictures ({empty} without objects), {len(objects)} objects ("
        f"{difficult} difficult or crowds): {listed}"
    )


def write_voc(out, lists):
    """Write {list: [Picture]} into a new folder, or as further lists into one that this program wrote.

    The stamp is written first and the lists last, so the same command mends an interrupted run.
    """
    main, done = out / "ImageSets" / "Main", {}
    if (out / STAMP).is_file():
        done = json.loads((out / STAMP).read_text(encoding="utf-8"))
    elif out.exists() and any(out.iterdir()):
        raise ssd.InputError(f"{out} is there and not of this program: choose another folder to write")
    if finished := [split for split in lists if (main / f"{split}.txt").exists()]:
        raise ssd.InputError(f"{out} has a list {finished[0]} already: delete {out}, or write to another")
    done = {source: entry for source, entry in done.items() if entry[0] not in lists}
    taken = {image_id.casefold() for _, image_id in done.values()}
    for split, pictures in lists.items():
        for source in (str(picture.path) for picture in pictures):
            if source in done:
                raise ssd.InputError(f"{source} is in the list {done[source][0]} already: name it once")
            done[source] = split, take_id(Path(source), taken)
    for folder in (main, out / "JPEGImages", out / "Annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    ssd.write_json(out / STAMP, done)
    for split, pictures in lists.items():
        ids = [done[str(picture.path)][1] for picture in pictures]
        pairs = zip(ids, pictures, strict=True)
        for image_id, picture in tqdm(pairs, split, len(ids), disable=not sys.stderr.isatty()):
            write_picture(out, image_id, picture)
        if ids:
            text = "".join(f"{image_id}\n" for image_id in ids)
            (main / f"{split}.txt").write_text(text, encoding="utf-8")
            print(describe(split, pictures))


def parse_args(argv=None):
    """Return the namespace of the command line; its `read` is the function of the format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(required=True, metavar="FORMAT")
    coco = kinds.add_parser("coco", help="a JSON of instances and the folder of its images")
    coco.add_argument("source", type=Path, metavar="INSTANCES.json")
    coco.add_argument("images", type=Path, metavar="IMAGES", help="the folder that the file names are in")
    coco.add_argument("--list", metavar="NAME", help="of the list (default: the JSON's, without instances_)")
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
        help="the share drawn for the list test, without such folders",
    )
    flat.add_argument("--seed", type=ssd.natural_int, default=0, help="of that draw")
    flat.set_defaults(read=lambda args: read_flat(args.source, args.test_fraction, args.seed))
    for kind in (coco, yolo, flat):
        kind.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    args = parse_args(argv)
    try:
        lists, faults = args.read(args)
        check(lists, faults, args.out, getattr(args, "images", args.source))
        write_voc(args.out, lists)
    except (ssd.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if faults:
        print(f"warning: faulty and left out ({len(faults)}): {first_of(faults)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
