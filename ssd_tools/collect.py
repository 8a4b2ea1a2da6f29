"""Make a data set in VOC layout of the pictures that predict saw: what `predict --save-voc` writes.

The annotations are there to be corrected, so nothing that is in the data set is ever written again: a picture
that it holds already is left out, and one of the same name gets another.
"""

import collections
import filecmp
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

import ssd_object_detection as ssd
from ssd_tools.common import read_json
from ssd_tools.convert import take_id
from ssd_tools.shapes import write_annotation

STAMP = "predict.json"  # in the data set: {image id: {"source": file, "doubt": text}}
LIST_FILE = Path("ImageSets", "Main", "train.txt")
MOST_LISTED = 3  # pictures that are printed as the most doubtful


class Doubt(NamedTuple):
    """How near a score of a picture is to its class's threshold."""

    distance: float  # 0: at the threshold; infinite: no score of at least half its threshold
    text: str


def voc_objects(found: ssd.Detections) -> list[tuple[str, list[int]]]:
    """Return what was found as `write_annotation` takes it, in whole pixels."""
    objects = []
    corners = ssd.to_voc_pixels(found.boxes_px).round().astype(int).tolist()
    for name, (xmin, ymin, xmax, ymax) in zip(found.names, corners, strict=True):
        objects.append((name, [xmin, ymin, max(xmin, xmax), max(ymin, ymax)]))
    return objects


def judge_doubt(detector: ssd.Detector, picture: Image.Image, **settings: Any) -> Doubt:
    """Return the Doubt of a picture by all scores of at least half their class's threshold.

    settings: of `ssd.Detector.predict`. The network runs once more, with the halved thresholds.
    """
    given = settings.pop("score_thresh", None)
    thresholds = detector.score_thresh
    if given is not None:
        thresholds = dict.fromkeys(detector.classes, given)
    # A class that is not asked for has a threshold above 1, which no score reaches.
    halves = [thresholds[name] / 2 if thresholds[name] <= 1 else 2.0 for name in detector.classes]
    least: Any = torch.tensor(halves, device=detector.model.anchors.device)  # (K,)
    (found,) = detector.detect_in([picture], score_thresh=least, **settings)
    doubt = Doubt(float("inf"), "no score of half its threshold")
    for name, score in zip(found.names, found.scores, strict=True):
        distance = abs(score - thresholds[name])
        if distance < doubt.distance:
            doubt = Doubt(distance, f"{name} {score:.2f}, threshold {thresholds[name]:.2f}")
    return doubt


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add the lines that a text file lacks to its end; what is there stays."""
    content = ""
    if path.exists():
        content = path.read_text(encoding="utf-8")
    known = content.splitlines()
    if known and not content.endswith("\n"):
        content += "\n"
    content += "".join(f"{line}\n" for line in lines if line not in known)
    ssd.write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


class Collection:
    """A data set that grows by pictures; InputError for a folder that this program did not make."""

    def __init__(self, folder: ssd.PathLike, *, only_hits: bool = False, empty: bool = False):
        self.folder = Path(folder)
        self.only_hits = only_hits
        self.empty = empty
        self.added: dict[str, tuple[Path, Doubt]] = {}  # by image id
        self.num_objects = 0
        self.num_known = 0
        is_used = self.folder.is_dir() and any(self.folder.iterdir())
        if is_used and not (self.folder / STAMP).is_file():
            raise ssd.InputError(
                f"--save-voc: {self.folder} is there and not of this program: name a new folder"
            )
        self.by_size: dict[int, list[Path]] = collections.defaultdict(list)
        self.taken: set[str] = set()
        for path in self.folder.glob("JPEGImages/*"):
            self.by_size[path.stat().st_size].append(path)
            self.taken.add(path.stem.casefold())
        for path in self.folder.glob("Annotations/*"):
            self.taken.add(path.stem.casefold())

    def add(self, path: Path, size: tuple[int, int], found: ssd.Detections, doubt: Doubt) -> None:
        """Copy a picture of an upright (width, height) and write its annotation, unless it is there."""
        if self.only_hits and not len(found):
            return
        for known in self.by_size[path.stat().st_size]:
            if filecmp.cmp(path, known, shallow=False):
                self.num_known += 1
                return

        for name in ("JPEGImages", "Annotations", LIST_FILE.parent):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not (self.folder / STAMP).exists():
            ssd.write_json(self.folder / STAMP, {})
        image_id = take_id(path, self.taken)
        suffix = path.suffix if path.suffix.lower() in ssd.IMAGE_SUFFIXES else ".png"
        target = self.folder / "JPEGImages" / f"{image_id}{suffix}"
        objects = [] if self.empty else voc_objects(found)
        width, height = size
        annotation = self.folder / "Annotations" / f"{image_id}.xml"

        # The picture comes last: what it is there for is not done again.
        write_annotation(annotation, target.name, (height, width, 3), objects)
        if suffix == path.suffix:
            ssd.write_atomically(target, lambda temporary: shutil.copyfile(path, temporary))
        else:
            ssd.open_image(path).save(target)
        self.by_size[target.stat().st_size].append(target)
        self.added[image_id] = (path, doubt)
        self.num_objects += len(objects)

    def close(self, classes: Iterable[str]) -> str:
        """Append the new pictures to the list, the most doubtful first; returns in words what was added."""
        text = f"{self.folder}: {len(self.added)} pictures added, {self.num_objects} objects"
        if self.num_known:
            text += f"; {self.num_known} were there already and keep their annotations"
        if not self.added:
            return text
        order = sorted(self.added, key=lambda image_id: self.added[image_id][1].distance)
        append_lines(self.folder / LIST_FILE, order)
        append_lines(self.folder / "classes.txt", classes)
        append_lines(self.folder / "labelmap.txt", [f"{name}:::" for name in classes])
        rows = read_json(self.folder / STAMP)
        for image_id in order:
            path, doubt = self.added[image_id]
            rows[image_id] = {"source": str(path), "doubt": doubt.text}
        ssd.write_json(self.folder / STAMP, rows)
        doubtful = [f"{image_id} ({self.added[image_id][1].text})" for image_id in order[:MOST_LISTED]]
        return f"{text}; the most doubtful: {', '.join(doubtful)}"
