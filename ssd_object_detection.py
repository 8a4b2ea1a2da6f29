"""Train, measure and use an SSD300 object detector (VGG16 backbone) from one file.

Commands:
    python ssd_object_detection.py --epochs 100                   # Pascal VOC 2007, fetched if missing
    python ssd_object_detection.py --data PATH                    # any folder in VOC layout
    python ssd_object_detection.py --data PATH --recipe small     # a narrow network, minutes on a CPU
    python ssd_object_detection.py --data shapes                  # no data, no GPU, minutes
    python ssd_object_detection.py --resume                       # go on after the last saved epoch
    python ssd_object_detection.py --evaluate checkpoints/FILE.pth
    python ssd_object_detection.py --predict dog.jpg --weights checkpoints/FILE.pth

    >>> from ssd_object_detection import load_detector
    >>> load_detector("checkpoints/FILE.pth").predict("dog.jpg")

Measured results, each with its command and machine: see README.md.

Shape letters: B images, A anchors (9,966), K foreground classes, G ground truths, D detections.
Boxes: `boxes` are normalised xyxy in [0, 1], `boxes_px` are pixels; `_cxcywh` is centre and size.
Class 0 is background everywhere; `num_classes` counts foreground classes only.

Papers: SSD (Liu et al. 2016, arXiv:1512.02325), VGG (Simonyan & Zisserman 2015, arXiv:1409.1556),
Focal loss (Lin et al. 2017, arXiv:1708.02002), ParseNet (Liu et al. 2016, arXiv:1506.04579),
The Pascal VOC Challenge (Everingham et al. 2010), He initialisation (He et al. 2015, arXiv:1502.01852).
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import datetime
import functools
import itertools
import json
import math
import os
import platform
import random
import re
import runpy
import shlex
import signal
import sys
import time
import urllib.error
import xml.etree.ElementTree as ElementTree
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # read at the import of albumentations: no network

import albumentations as A
import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import batched_nms
from tqdm import tqdm

# ---- 1. Constants ----

PathLike = str | Path

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)

IMAGE_SIZE = 300
FEATURE_MAPS = (37, 18, 18, 9, 5, 2)  # cells along each side of the six maps
STRIDES = (8, 16, 16, 32, 64, 128)  # pixels between neighbouring cells of each map
# SSD section 2.2 with s_min = .2, s_max = .88 in five steps, .1 for the first map as in section 3.1; the last
# number is only the second factor of the last map's geometric mean.
ANCHOR_SCALES = (0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05)
ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))  # w/h; each brings its inverse
VARIANCES = (0.1, 0.2)  # centre, size: the authors' released Caffe code
MAX_LOG_SIZE = math.log(1000 / 16)  # decode clamps log(w/anchor_w) here: exp() is finite in any precision

VGG16_BLOCKS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)  # VGG Table 1, column D
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # torchvision VGG16_Weights.IMAGENET1K_V1
IMAGENET_STD = (0.229, 0.224, 0.225)
CAFFE_MEAN = (123.68 / 255, 116.779 / 255, 103.939 / 255)  # torchvision VGG16_Weights.IMAGENET1K_FEATURES
CAFFE_STD = (1 / 255, 1 / 255, 1 / 255)
CAFFE_SCALE = 6.0  # root mean square of these weights' conv5_3 on VOC2007 images
L2_NORM_SCALE = 20.0  # ParseNet section 3.2, SSD section 3.1

FOCAL_GAMMA = 1.0  # Differs from paper: with its 2 (Focal loss section 5.1) mAP is lower (docs/recipes.md)
FOCAL_PRIOR = 0.01  # Focal loss section 4.1, "Initialization"
SCORE_THRESH = 0.01  # this and the next two: SSD section 2.2, "Inference"
NMS_IOU_THRESH = 0.45
MAX_DETECTIONS = 200
PRE_NMS_TOP_K = 1000  # Differs from paper: its code keeps 400 a class, too few for crowded images
DRAW_SCORE_THRESH = 0.4  # detections below it are left out of pictures

FORMAT_VERSION = 3  # of a checkpoint
SAVE_SECONDS = 20.0  # least time between two saves: a full-width checkpoint takes a second to write
MAX_SKIPPED_STEPS = 3  # in a row, for a gradient that is not finite, before a run stops
PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324", "#808000",
           "#000075")


class InputError(Exception):
    """A mistake that the user can mend: shown as one line on standard error, exit code 2."""


# ---- 2. Boxes ----


def encode(boxes: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Return the regression targets of boxes for their anchors (SSD Eq. 2, divided by the variances).

    boxes (..., 4): xyxy with x2 > x1 and y2 > y1, in the anchors' unit; anchors_cxcywh (..., 4), same leading
    shape or one that broadcasts. Returns (..., 4). A side shorter than 1e-6 counts as 1e-6.
    """
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    anchor_centre, anchor_size = anchors_cxcywh[..., :2], anchors_cxcywh[..., 2:]
    offset = (centre - anchor_centre) / anchor_size / VARIANCES[0]
    log_size = torch.log(size / anchor_size) / VARIANCES[1]
    return torch.cat((offset, log_size), dim=-1)


def decode(box_deltas: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Return the xyxy boxes (..., 4) that regression outputs mean; the inverse of `encode` (SSD Eq. 2).

    Sizes are bounded to 62.5 times the anchor's; the result is not clipped to the image.
    """
    anchor_centre, anchor_size = anchors_cxcywh[..., :2], anchors_cxcywh[..., 2:]
    centre = anchor_centre + box_deltas[..., :2] * VARIANCES[0] * anchor_size
    size = anchor_size * torch.exp((box_deltas[..., 2:] * VARIANCES[1]).clamp(max=MAX_LOG_SIZE))
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def box_iou(boxes: np.ndarray, others: np.ndarray, extra: float = 0.0) -> np.ndarray:
    """Return the IoU (...) of xyxy boxes (..., 4) and others (..., 4), whose leading shapes broadcast.

    extra is added to every side: 1 where boxes are pixels, both corners included. Of each pair one has area.
    """
    x1, y1, x2, y2 = (boxes[..., i] for i in range(4))
    left, top, right, bottom = (others[..., i] for i in range(4))
    width = np.minimum(x2, right) - np.maximum(x1, left) + extra
    height = np.minimum(y2, bottom) - np.maximum(y1, top) + extra
    shared = width.clip(min=0) * height.clip(min=0)
    area = (x2 - x1 + extra) * (y2 - y1 + extra)
    return shared / (area + (right - left + extra) * (bottom - top + extra) - shared)


# ---- 3. Anchors ----


def _anchor_sizes():
    """Return (w, h) of each map's anchors, fractions of the image (SSD section 2.2).

    Squares of s_k and sqrt(s_k * s_k+1), then for each ratio r the widths s_k * sqrt(r) and s_k / sqrt(r).
    """
    maps = []
    for scale, next_scale, ratios in zip(ANCHOR_SCALES[:-1], ANCHOR_SCALES[1:], ASPECT_RATIOS, strict=True):
        sizes = [(scale, scale), (math.sqrt(scale * next_scale),) * 2]
        for root in map(math.sqrt, ratios):
            sizes += [(scale * root, scale / root), (scale / root, scale * root)]
        maps.append(tuple(sizes))
    return tuple(maps)


ANCHOR_SIZES = _anchor_sizes()


def make_anchors(anchor_sizes: Sequence = ANCHOR_SIZES) -> Tensor:
    """Return the 9,966 anchors as cxcywh (A, 4), map by map, row by row, cell by cell (SSD section 2.2).

    anchor_sizes: the (w, h) of the anchors that each map's cells have. Neighbouring cells are a stride apart,
    the grid is centred in the image. Anchors may reach beyond its border.
    """
    # Differs from paper: its centres, (i + .5) / n, are 16.7 pixels apart on a map whose cells see every 16th
    # pixel: a box offset that grows towards the border, which no convolution can learn.
    anchors = []
    for cells, stride, sizes in zip(FEATURE_MAPS, STRIDES, anchor_sizes, strict=True):
        centres = 0.5 + (torch.arange(cells, dtype=torch.float64) - (cells - 1) / 2) * stride / IMAGE_SIZE
        cy, cx = torch.meshgrid(centres, centres, indexing="ij")
        grid = torch.stack((cx, cy), dim=-1).view(-1, 1, 2).expand(-1, len(sizes), -1)  # (cells^2, sizes, 2)
        size = torch.tensor(sizes, dtype=torch.float64).expand_as(grid)
        anchors.append(torch.cat((grid, size), dim=-1).view(-1, 4))
    return torch.cat(anchors).float()


# ---- 4. Matching ----


def match_anchors(gt_boxes: np.ndarray, anchors_xyxy: np.ndarray,
                  match_iou_thresh: float = 0.5) -> np.ndarray:
    """Return matched_gt (A,) int64: the ground truth that each anchor answers for, -1 for background.

    gt_boxes (G, 4), anchors_xyxy (A, 4): xyxy; G may be 0. An anchor takes the ground truth of highest IoU if
    that is match_iou_thresh or more. Besides, every ground truth owns one anchor that no other can take: they
    choose in turns, best overlap first, their best anchor still free (SSD section 2.2).
    """
    # Differs from paper: there two ground truths may prefer the same anchor, and one of them gets none.
    if len(gt_boxes) == 0:
        return np.full(len(anchors_xyxy), -1)
    iou = box_iou(gt_boxes[:, None], anchors_xyxy)  # (G, A)
    matched_gt = np.where(iou.max(axis=0) >= match_iou_thresh, iou.argmax(axis=0), -1)
    for gt in np.argsort(-iou.max(axis=1), kind="stable"):  # best overlap first
        anchor = iou[gt].argmax()
        matched_gt[anchor] = gt
        iou[:, anchor] = -1.0  # taken
    return matched_gt


def build_targets(matched_gt: Tensor, gt_boxes: Tensor, gt_labels: Tensor,
                  anchors_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels (B, A) int64, 0 is background, and box_targets (B, A, 4), without meaning there.

    matched_gt (B, A): of `match_anchors`; gt_boxes (B, G, 4): xyxy in [0, 1] and gt_labels (B, G) int64:
    1..K, filled up to the same G, 1 or more, in every image.
    """
    gt = matched_gt.long().clamp(min=0)
    labels = gt_labels.gather(1, gt) * (matched_gt >= 0)
    return labels, encode(gt_boxes.gather(1, gt[..., None].expand(-1, -1, 4)), anchors_cxcywh)


# ---- 5. Data ----


@dataclass(frozen=True)
class Record:
    """One annotated image. boxes_px (G, 4) float32: xyxy, 0-based edges, so that x2 - x1 is the width."""

    image_id: str
    image_path: str
    width: int
    height: int
    boxes_px: np.ndarray
    labels: np.ndarray  # (G,) int64, 1..K
    difficult: np.ndarray  # (G,) bool

    @property
    def boxes(self) -> np.ndarray:
        """Normalised xyxy (G, 4)."""
        return self.boxes_px / np.array([self.width, self.height] * 2, dtype=np.float32)


@dataclass(frozen=True)
class DataSplits:
    """A data set ready for use: class names (label 1 first) and the Records of each split."""

    name: str
    classes: tuple[str, ...]
    train: list[Record]
    val: list[Record]
    test: list[Record]
    lists: dict[str, str]  # which list below ImageSets/Main "train", "val" and "test" are; "": none


def read_split(root: PathLike, split: str) -> list[str]:
    """Return the image ids of ROOT/ImageSets/Main/SPLIT.txt: the first word of each line, each id once."""
    path = Path(root) / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))[:12])
        hint = f"lists there: {there}" if there else "is it a folder in VOC layout?"
        raise InputError(f"no image list {path}; {hint} (see --train-split, --val-split, --test-split)")
    text = path.read_text(encoding="utf-8", errors="replace")
    ids = [line.split()[0] for line in text.splitlines() if line.strip()]
    if not ids:
        raise InputError(f"the image list {path} is empty")
    return list(dict.fromkeys(ids))


def find_image(root: PathLike, image_id: str) -> str:
    """Return an image's path below ROOT/JPEGImages: the first of the usual endings that exists, or .jpg."""
    stem = os.path.join(root, "JPEGImages", image_id)
    suffixes = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".webp")
    return next((stem + suffix for suffix in suffixes if os.path.isfile(stem + suffix)), stem + ".jpg")


def parse_annotation(path: PathLike) -> tuple[int, int, list[tuple[str, list[float], bool]]]:
    """Return (width, height, objects) of a VOC XML file; objects (name, [xmin, ymin, xmax, ymax], difficult).

    Coordinates are as written: 1-based, corners included. InputError names the file and the object.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise InputError(f"{path}: no such annotation file") from None
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:  # also of its encoding
        raise InputError(f"{path}: not readable as XML ({error})") from None
    try:
        width, height = (int(float(root.findtext(f"size/{side}"))) for side in ("width", "height"))
    except (TypeError, ValueError, OverflowError):
        width = height = 0
    if width < 1 or height < 1:
        raise InputError(f"{path}: no usable <size> with <width> and <height>")
    objects = []
    for number, node in enumerate(root.iter("object"), start=1):
        name = " ".join((node.findtext("name") or "").split())
        try:
            box = [float(node.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        except (TypeError, ValueError):
            box = [math.nan]
        if not name or not all(map(math.isfinite, box)):
            raise InputError(f"{path}: object {number} ({name or 'no name'}) has no full <name> and <bndbox>")
        objects.append((name, box, (node.findtext("difficult") or "0").strip() == "1"))
    return width, height, objects


def read_image(path: PathLike) -> np.ndarray:
    """Return an image file as RGB uint8 (H, W, 3), as stored: annotations ignore EXIF turns."""
    image = None
    with contextlib.suppress(cv2.error):  # of an image too large for OpenCV
        image = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise InputError(f"{path}: not readable as an image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_record(root: PathLike, image_id: str, classes: Sequence[str], *,
                only_listed: bool = False) -> tuple[Record, int]:
    """Return the Record of one image, boxes clipped to it, and how many were dropped: no area, or repeated.

    Raises InputError for an unreadable annotation, and for a class that is not among `classes` (only_listed
    leaves such objects out instead).
    """
    path = Path(root) / "Annotations" / f"{image_id}.xml"
    width, height, objects = parse_annotation(path)
    rows, dropped = {}, 0  # rows: (x1, y1, x2, y2, label) -> difficult
    for name, (xmin, ymin, xmax, ymax), is_difficult in objects:
        if name not in classes and only_listed:
            continue
        if name not in classes:
            raise InputError(f"{path}: class {name!r} is not among {', '.join(classes)}")
        x1, y1 = max(xmin - 1, 0), max(ymin - 1, 0)  # 1-based and inclusive -> 0-based edges
        x2, y2 = min(xmax, width), min(ymax, height)
        row = (x1, y1, x2, y2, classes.index(name) + 1)
        if xmax > xmin and ymax > ymin and x2 > x1 and y2 > y1 and row not in rows:
            rows[row] = is_difficult
        else:
            dropped += 1
    table = np.array(list(rows), dtype=np.float64).reshape(-1, 5)
    boxes_px, labels = table[:, :4].astype(np.float32), table[:, 4].astype(np.int64)
    difficult = np.array(list(rows.values()), dtype=bool)
    return Record(image_id, find_image(root, image_id), width, height, boxes_px, labels, difficult), dropped


def read_records(root: PathLike, split: str, classes: Sequence[str], *,
                 only_listed: bool = False) -> list[Record]:
    """Return the Records of an image list; say how many boxes were dropped. InputError if one is missing."""
    pairs = [read_record(root, i, classes, only_listed=only_listed) for i in read_split(root, split)]
    records = [record for record, _ in pairs]
    missing = [record.image_path for record in records if not os.path.isfile(record.image_path)]
    if missing:
        raise InputError(f"{missing[0]}: no such image, but list {split} names it ({len(missing)} missing)")
    if dropped := sum(count for _, count in pairs):
        print(f"warning: {root}, list {split}: {dropped} boxes without area or listed twice are left out "
              "(tools/audit.py names them)", file=sys.stderr)
    return records


def annotated_classes(root: PathLike, split: str) -> tuple[str, ...]:
    """Return the class names of a list's annotations, in alphabetical order."""
    names = set()
    for image_id in read_split(root, split):
        _, _, objects = parse_annotation(Path(root) / "Annotations" / f"{image_id}.xml")
        names.update(name for name, _, _ in objects)
    return tuple(sorted(names))


def fetch_voc(root: Path, split: str) -> None:
    """Fetch the archive with a list that root, DIR/VOCdevkit/VOC<year>, lacks; torchvision checks its MD5."""
    lists, target = root / "ImageSets" / "Main", root.parent.parent
    if split not in ("train", "val", "trainval", "test") or (lists / f"{split}.txt").is_file():
        return
    year, archive = root.name[3:], "test" if split == "test" else "trainval"
    print(f"{lists / split}.txt is missing: fetching Pascal VOC {year} {archive} into {target}", flush=True)
    try:
        torchvision.datasets.VOCDetection(str(target), year=year, image_set=archive, download=True)
    except (urllib.error.URLError, OSError, RuntimeError, ValueError) as error:
        there = ", ".join(sorted(p.stem for p in lists.glob("*.txt") if "_" not in p.stem)) or "none"
        raise InputError(f"Pascal VOC {year}: no list {split} in {lists} (there: {there}), and none could be "
                         f"fetched ({error}); use --data-root DIR where VOCdevkit is, --train-split and "
                         "--test-split for other lists, --data PATH, or --data shapes") from None


def find_data(data: str, data_root: PathLike, train_split: str | None, val_split: str | None,
              test_split: str | None) -> tuple[list[Path], dict[str, str]]:
    """Return (folders, {"train", "val", "test": list}) of `data`, see `load_data`; fetches what is missing.

    train_split None: trainval of VOC, train of a folder (trainval without it); test_split None: test, if any.
    """
    lists = {"train": train_split, "val": val_split or "", "test": test_split}
    if data in ("voc2007", "voc0712"):
        years = (2007, 2012) if data == "voc0712" else (2007,)
        roots = [Path(data_root) / "VOCdevkit" / f"VOC{year}" for year in years]
        lists["train"] = "trainval" if train_split is None else train_split
        lists["test"] = "test" if test_split is None else test_split
        for split in lists.values():
            fetch_voc(roots[0], split)
        fetch_voc(roots[-1], lists["train"])
        return roots, lists
    root = Path(data_root) / "shapes" if data == "shapes" else Path(data)
    if data == "shapes":
        script = Path(__file__).resolve().parent / "tools" / "shapes.py"
        if not script.is_file():
            raise InputError(f"--data shapes needs {script}, which draws the images")
        runpy.run_path(str(script))["generate"](root)
    if not root.is_dir():
        raise InputError(f"--data {data}: no such folder, and not voc2007, voc0712 or shapes")
    there = {path.stem for path in (root / "ImageSets" / "Main").glob("*.txt")}
    if train_split is None:
        lists["train"] = "trainval" if "trainval" in there and "train" not in there else "train"
    if test_split is None:
        lists["test"] = "test" if "test" in there else ""
    return [root], lists


def hold_out(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return (train, val): a seeded share of records, at least one unless the fraction is 0, is held out."""
    order = np.random.default_rng(seed).permutation(len(records)).tolist()
    held_out = set(order[: max(1, round(fraction * len(records))) if fraction else 0])
    train = [record for i, record in enumerate(records) if i not in held_out]
    return train, [records[i] for i in sorted(held_out)]


def load_data(data: str, *, data_root: PathLike = "data", classes: Sequence[str] | None = None,
              train_split: str | None = None, val_split: str | None = None, test_split: str | None = None,
              val_fraction: float = 0.1, seed: int = 0) -> DataSplits:
    """Return the DataSplits of `data`: "voc2007", "voc0712", "shapes" or the path of a folder in VOC layout.

    The lists: see `find_data`; "" is no test list. Without val_split a seeded val_fraction of the training
    list is held out. classes None: those of VOC, or of the training list. InputError for what is missing.
    """
    roots, lists = find_data(data, data_root, train_split, val_split, test_split)
    only_listed = classes is not None
    if data in ("voc2007", "voc0712"):
        name, classes = "pascal_voc", tuple(classes or VOC_CLASSES)
    else:
        name = re.sub(r"\W+", "_", roots[0].resolve().name.lower()).strip("_") or "custom"
        found = annotated_classes(roots[0], lists["train"])
        classes = tuple(classes or found)
        if absent := [c for c in classes if c not in found]:
            raise InputError(f"--classes: the training list has {', '.join(found)}, not {', '.join(absent)}")
    read = functools.partial(read_records, classes=classes, only_listed=only_listed)
    train = [record for root in roots for record in read(root, lists["train"])]
    test = read(roots[0], lists["test"]) if lists["test"] else []
    if lists["val"]:
        val = read(roots[0], lists["val"])
    else:
        train, val = hold_out(train, val_fraction, seed)
    if not any(len(record.labels) for record in train):
        raise InputError(f"{data}: no object to train on in list {lists['train']} (less --val-fraction)")
    counts = collections.Counter(record.image_path for record in [*train, *val, *test])
    if shared := [path for path, count in counts.items() if count > 1]:
        raise InputError(f"{shared[0]} is in two of the lists, as are {len(shared) - 1} more: mend them or "
                         "name others (--train-split, --val-split, --test-split)")
    return DataSplits(name, classes, train, val, test, lists)


def load_image(record: Record) -> np.ndarray:
    """Return the decoded image of a record; InputError if its size is not the one in its annotation."""
    image = read_image(record.image_path)
    if image.shape[:2] != (record.height, record.width):
        raise InputError(f"{record.image_path} has {image.shape[1]}x{image.shape[0]} pixels, its annotation "
                         f"says {record.width}x{record.height}: correct the file or its <size>")
    return image


def usable_cores() -> int:
    """Return how many cores this process may use, shared by torchrun's processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def decode_all(records: list[Record]) -> list[np.ndarray] | None:
    """Return the decoded images of records, which forked loader processes share; None if memory is short."""
    needed = sum(r.width * r.height * 3 for r in records) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 3:
        print(f"cache    off: the decoded images take {needed / 2**30:.0f} GiB of {memory / 2**30:.0f}")
        return None
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        images = pool.map(load_image, records)
        return list(tqdm(images, "decoding", len(records), leave=False, disable=not sys.stderr.isatty()))


class VocDataset(torch.utils.data.Dataset):
    """Images with their targets; an item, asked for by (index, epoch), depends on (seed, epoch, index) alone.

    So the order, number and restarts of loader processes change nothing. A sample is a dict that torch's own
    collate stacks: images uint8 (3, 300, 300) RGB, matched_gt (A,) int16 of `match_anchors`, gt_boxes (G, 4)
    and gt_labels (G,) filled up with zeros to the G of the image with most objects, indices. pixels: of
    `decode_all`, else each image is read from its file every time.
    """

    def __init__(self, records: list[Record], transform: A.Compose, anchors_cxcywh: Tensor, *, seed: int = 0,
                 pixels: list[np.ndarray] | None = None):
        self.records = records
        self.transform = transform
        centre, size = anchors_cxcywh.numpy()[:, :2], anchors_cxcywh.numpy()[:, 2:]
        self.anchors_xyxy = np.concatenate((centre - size / 2, centre + size / 2), axis=1)
        self.seed = seed
        self.pixels = pixels
        self.most_objects = max([1, *(len(record.labels) for record in records)])

    def __len__(self) -> int:
        return len(self.records)

    def augment(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return image uint8 (300, 300, 3), boxes float32 (G, 4) in [0, 1] and labels int64 (G,)."""
        record = self.records[index]
        image = self.pixels[index] if self.pixels else load_image(record)
        # One generator for all steps: Compose(seed=...) gives each the same stream, all their coins equal.
        rng = np.random.default_rng((self.seed, epoch, index))
        self.transform.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        out = self.transform(image=image, bboxes=record.boxes, rows=np.arange(len(record.labels)))
        rows = np.asarray(out["rows"], dtype=np.int64).reshape(-1)
        return out["image"], np.asarray(out["bboxes"], dtype=np.float32).reshape(-1, 4), record.labels[rows]

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        image, boxes, labels = self.augment(index, epoch)
        missing = self.most_objects - len(labels)
        arrays = {
            "images": np.ascontiguousarray(image.transpose(2, 0, 1)),
            "matched_gt": match_anchors(boxes, self.anchors_xyxy).astype(np.int16),
            "gt_boxes": np.pad(boxes, ((0, missing), (0, 0))),
            "gt_labels": np.pad(labels, (0, missing)),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"indices": index}


class EpochBatchSampler(torch.utils.data.Sampler):
    """Yield the batches of (index, epoch) of each of `epochs`, in an order by (seed, epoch) alone.

    One pass goes through all epochs, so that the loader prepares the next one while this one is validated.
    The last, smaller batch of an epoch is dropped (batch norm, static shapes) unless it is the only one. Of
    several processes each yields its part of the same batches: every world-th image from its rank on.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int = 0, *, epochs: Sequence[int] = (0,),
                 rank: int = 0, world: int = 1):
        self.num_samples = num_samples
        self.batch_size = min(batch_size, num_samples)
        self.steps_per_epoch = num_samples // self.batch_size
        self.seed, self.epochs = seed, epochs
        self.rank, self.world = rank, world
        if self.batch_size % world:
            raise InputError(f"{world} processes cannot share a batch of {self.batch_size} images: set "
                             "--batch-size to a multiple of them")

    def __len__(self) -> int:
        return self.steps_per_epoch * len(self.epochs)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in self.epochs:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples).tolist()
            for number in range(self.steps_per_epoch):
                batch = order[number * self.batch_size : (number + 1) * self.batch_size]
                yield [(index, epoch) for index in batch[self.rank :: self.world]]


def _init_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process ends the run
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = lambda *error: None  # errors reach the main process; its end breaks pipes, no news
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def make_loader(dataset: VocDataset, *, batch_size: int = 1, workers: int = 0, pin_memory: bool = False,
                batch_sampler: EpochBatchSampler | None = None) -> DataLoader:
    """Return a DataLoader: by an EpochBatchSampler to train, else complete and in order."""
    options = {"batch_sampler": batch_sampler} if batch_sampler else {"batch_size": batch_size}
    if workers:
        # The training loader is iterated once. (Kept processes of a pinning one delay an exit by 5 s each.)
        options |= {"persistent_workers": not batch_sampler, "prefetch_factor": 4}
        options |= {"worker_init_fn": _init_worker}
        options |= {"multiprocessing_context": "fork" if dataset.pixels else None}  # else each copies them
    generator = torch.Generator()  # else each pass would draw from torch's global one
    return DataLoader(dataset, num_workers=workers, pin_memory=pin_memory, generator=generator, **options)


# ---- 6. Augmentation ----


class _BoxGeometry(A.DualTransform):
    """A transform of image and boxes by the parameters that get_params_dependent_on_data draws."""

    _targets = (A.core.type_definitions.Targets.IMAGE, A.core.type_definitions.Targets.BBOXES)


class SSDZoomOut(_BoxGeometry):
    """Place the image at random on a mean-coloured canvas, up to max_ratio times larger (SSD section 3.6)."""

    # Differs from paper: image and canvas shrink together to at most twice the network's resolution, which
    # saves half the pipeline's time; and the photometric steps come later.

    def __init__(self, max_ratio: float = 4.0, p: float = 0.5):
        super().__init__(p=p)
        self.max_ratio = max_ratio
        self.fill = [round(255 * mean) for mean in IMAGENET_MEAN]

    def get_params_dependent_on_data(self, params, data):
        height, width = params["shape"][:2]
        ratio = self.py_random.uniform(1, self.max_ratio)
        scale = min(1.0, 2 * IMAGE_SIZE / (ratio * max(height, width)))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        canvas = (max(size[0], round(height * ratio * scale)), max(size[1], round(width * ratio * scale)))
        corner = tuple(self.py_random.randint(0, c - s) for c, s in zip(canvas, size, strict=True))
        return {"canvas": canvas, "size": size, "corner": corner}

    def apply(self, img, canvas, size, corner, **params):
        if size != img.shape[:2]:
            img = cv2.resize(img, size[::-1], interpolation=cv2.INTER_AREA)
        top, left = corner
        bottom, right = canvas[0] - size[0] - top, canvas[1] - size[1] - left
        return cv2.copyMakeBorder(img, top, bottom, left, right, cv2.BORDER_CONSTANT, value=self.fill)

    def apply_to_bboxes(self, bboxes, canvas, size, corner, **params):
        out = bboxes.copy()
        for axis in (0, 1):  # y, x
            columns = [1 - axis, 3 - axis]
            out[:, columns] = ((bboxes[:, columns] * size[axis] + corner[axis]) / canvas[axis]).clip(0, 1)
        return out


class SSDCrop(_BoxGeometry):
    """Cut out a random patch (SSD section 2.2, "Data augmentation").

    One of seven choices, equally likely: the whole image; a patch whose IoU with an object is at least .1,
    .3, .5, .7 or .9; any patch. A patch has .3 to 1 of each side and an aspect ratio of .5 to 2, and must
    hold the centre of an object: of `trials` patches the first that fits is taken, else the whole image.
    Objects whose centre is inside are kept, clipped to the patch. An image without objects takes any patch.
    """

    min_ious = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)  # None: the whole image

    def __init__(self, min_scale: float = 0.3, trials: int = 50, p: float = 1.0):
        super().__init__(p=p)
        self.min_scale = min_scale
        self.trials = trials

    def get_params_dependent_on_data(self, params, data):
        height, width = params["shape"][:2]
        whole = np.array([0, 0, width, height])
        min_iou = self.py_random.choice(self.min_ious)
        if min_iou is None:
            return {"patch": whole}
        drawn = self.random_generator.random((self.trials, 4))
        scale = self.min_scale + (1 - self.min_scale) * drawn[:, :2]
        size = np.maximum(1, np.round([width, height] * scale))
        corner = np.floor(([width, height] - size + 1) * drawn[:, 2:])
        patches = np.concatenate((corner, corner + size), axis=1)  # (trials, 4)
        aspect = size[:, 0] / size[:, 1]
        fits = (aspect >= 0.5) & (aspect <= 2)
        boxes = np.asarray(data["bboxes"], dtype=np.float64)[:, :4].reshape(-1, 4) * ([width, height] * 2)
        if len(boxes):
            fits &= self.centre_inside(boxes, patches[:, None]).any(axis=1)
            fits &= box_iou(boxes, patches[:, None]).max(axis=1) >= min_iou
        return {"patch": patches[fits.argmax()].astype(int) if fits.any() else whole}

    @staticmethod
    def centre_inside(boxes: np.ndarray, patch: np.ndarray) -> np.ndarray:
        """Whether centres of boxes (G, 4) are inside a patch (4,) or patches (N, 1, 4): (G,) or (N, G)."""
        centre = (boxes[:, :2] + boxes[:, 2:4]) / 2
        return ((centre > patch[..., :2]) & (centre < patch[..., 2:])).all(axis=-1)

    def apply(self, img, patch, **params):
        return img[patch[1] : patch[3], patch[0] : patch[2]]

    def apply_to_bboxes(self, bboxes, patch, **params):
        sides = np.array(params["shape"][1::-1] * 2)  # width, height, width, height
        out = bboxes[self.centre_inside(bboxes[:, :4] * sides, patch)]
        inside = (out[:, :4] * sides - np.tile(patch[:2], 2)) / np.tile(patch[2:] - patch[:2], 2)
        return np.column_stack((inside.clip(0, 1), out[:, 4:]))


class Shadow(A.RandomShadow):
    """albumentations' random shadow, painted in a tenth of its time."""

    def apply(self, img, vertices_list, intensities, **params):
        out = img.copy()
        for vertices, intensity in zip(vertices_list, intensities, strict=True):
            mask = cv2.fillPoly(np.zeros(img.shape[:2], np.uint8), [vertices], 1)
            cv2.copyTo(cv2.convertScaleAbs(out, alpha=1 - float(intensity)), mask, out)
        return out


class Noise(A.ImageOnlyTransform):
    """Gaussian noise of a standard deviation within std_range, cut from a table of two million numbers."""

    def __init__(self, std_range: tuple[float, float], p: float = 0.5):
        super().__init__(p=p)
        self.std_range = std_range
        self.table = np.random.default_rng(0).standard_normal(2**21, dtype=np.float32)

    def get_params_dependent_on_data(self, params, data):
        start = self.py_random.randrange(len(self.table) - math.prod(params["shape"]) + 1)
        return {"start": start, "std": 255 * self.py_random.uniform(*self.std_range)}

    def apply(self, img, start, std, **params):
        noise = self.table[start : start + img.size].reshape(img.shape)
        return cv2.addWeighted(img, 1.0, noise, std, 0.0, dtype=cv2.CV_8U)


def resize_transform() -> A.Resize:
    """Return the resize of training, evaluation and inference: area averaging to shrink, else linear."""
    return A.Resize(IMAGE_SIZE, IMAGE_SIZE, interpolation=cv2.INTER_LINEAR, area_for_downscale="image")


def build_transform(*, train: bool, zoom_out: float = 0.5, crop: float = 1.0, color: float = 0.5,
                    shadow: float = 0.2, noise: float = 0.2, blur: float = 0.1) -> A.Compose:
    """Return the albumentations pipeline, whose steps have these probabilities; not train: only the resize.

    The geometry comes first and ends at 300x300, so that the photometric steps see few pixels. `color` is for
    each of brightness +-32/255, contrast and saturation .5 to 1.5, hue +-18 degrees (SSD section 2.2).
    """
    options = {"check_each_transform": False} if train else {"clip": True}  # the steps keep boxes in [0, 1]
    bbox_params = A.BboxParams(format="albumentations", label_fields=["rows"], **options)
    if not train:
        return A.Compose([resize_transform()], bbox_params=bbox_params)
    steps = [
        SSDZoomOut(p=zoom_out),
        SSDCrop(p=crop),
        A.HorizontalFlip(p=0.5),
        resize_transform(),
        A.RandomBrightnessContrast(brightness_limit=32 / 255, contrast_limit=0, p=color),
        A.RandomBrightnessContrast(brightness_limit=0, contrast_limit=0.5, p=color),
        A.ColorJitter(brightness=(1, 1), contrast=(1, 1), saturation=(0.5, 1.5), hue=(0, 0), p=color),
        A.HueSaturationValue(hue_shift_limit=9, sat_shift_limit=0, val_shift_limit=0, p=color),  # of 180
        Shadow((0, 0, 1, 1), num_shadows_limit=(1, 2), shadow_intensity_range=(0.3, 0.6), p=shadow),
        Noise(std_range=(0.01, 0.05), p=noise),  # 2.5 to 13 of 255: a camera in poor light
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.2), p=blur),
    ]
    return A.Compose(steps, bbox_params=bbox_params)


# ---- 7. Model ----


class L2Norm(nn.Module):
    """Divide each pixel's channel vector by its length and multiply by a learned scale (ParseNet Eq. 1)."""

    def __init__(self, num_channels: int, scale: float = L2_NORM_SCALE):
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        # In float32 under autocast: the sum of 512 squares leaves half precision's range.
        return F.normalize(x.float(), dim=1).mul(self.weight[:, None, None]).to(x.dtype)


def _conv(c_in, c_out, kernel=3, *, stride=1, padding=None, batch_norm=False):
    """Return the layers convolution, batch norm if asked for, ReLU; padding keeps the size unless given."""
    if padding is None:
        padding = kernel // 2
    layers = [nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=padding)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(c_out))
    return [*layers, nn.ReLU(inplace=True)]


class SSD300(nn.Module):
    """SSD300 with a VGG16 backbone (SSD section 3): feature maps of 37, 18, 18, 9, 5 and 2 cells a side.

    forward(images): images (B, 3, 300, 300) RGB, uint8 or float in 0..255, normalised inside. Returns float32
    cls_logits (B, A, K + 1), class 0 is background, and box_deltas (B, A, 4), what `encode` makes of boxes.

    num_classes counts foreground classes; width multiplies every channel count; batch_norm puts one behind
    every convolution but the heads'; prior_prob is the heads' first foreground probability (Focal loss
    section 4.1), None leaves their bias at zero; anchor_sizes: see `make_anchors`.
    """

    # Differs from paper: its maps have 38, 19, 10, 5, 3, 1 cells and 8,732 anchors. Here VGG's pooling rounds
    # down, conv5_3 feeds a head of its own, fc6 is not dilated, nothing pools before it.

    def __init__(self, num_classes: int, *, width: float = 1.0, batch_norm: bool = False,
                 prior_prob: float | None = None, anchor_sizes: Sequence = ANCHOR_SIZES):
        super().__init__()
        self.num_classes = num_classes
        self.batch_norm = batch_norm
        self.frozen_blocks = 0
        ch = functools.partial(self.channels, width=width)
        conv = functools.partial(_conv, batch_norm=batch_norm)
        self.blocks = nn.ModuleList()
        c_in = 3
        for block in VGG16_BLOCKS:
            layers = []
            for c_out in map(ch, block):
                layers += conv(c_in, c_out)
                c_in = c_out
            self.blocks.append(nn.Sequential(*layers))
        self.l2_norm = L2Norm(ch(512))
        self.fc = nn.Sequential(*conv(ch(512), ch(1024)), *conv(ch(1024), ch(1024), 1))
        self.extras = nn.ModuleList([
            nn.Sequential(*conv(ch(1024), ch(256), 1), *conv(ch(256), ch(512), stride=2)),  # 18 -> 9
            nn.Sequential(*conv(ch(512), ch(128), 1), *conv(ch(128), ch(256), stride=2)),  # 9 -> 5
            nn.Sequential(*conv(ch(256), ch(128), 1), *conv(ch(128), ch(256), stride=2, padding=0)),  # 5 -> 2
        ])
        map_channels = [ch(c) for c in (512, 512, 1024, 512, 256, 256)]
        self.anchors_per_cell = [len(sizes) for sizes in anchor_sizes]
        pairs = list(zip(map_channels, self.anchors_per_cell, strict=True))
        self.cls_heads = nn.ModuleList(nn.Conv2d(c, n * (num_classes + 1), 3, padding=1) for c, n in pairs)
        self.box_heads = nn.ModuleList(nn.Conv2d(c, n * 4, 3, padding=1) for c, n in pairs)
        self.register_buffer("anchors", make_anchors(anchor_sizes))
        self.register_buffer("mean", torch.empty(1, 3, 1, 1))
        self.register_buffer("std", torch.empty(1, 3, 1, 1))
        self.set_normalisation(IMAGENET_MEAN, IMAGENET_STD)
        self._initialise(prior_prob)

    @staticmethod
    def channels(full: int, width: float) -> int:
        """Return a channel count at a width: a multiple of 8, at least 8."""
        return max(8, round(full * width / 8) * 8)

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set what images are normalised by, red, green, blue, as fractions of 255; a checkpoint keeps it."""
        self.mean.copy_(torch.tensor(mean).mul(255).view(1, 3, 1, 1))
        self.std.copy_(torch.tensor(std).mul(255).view(1, 3, 1, 1))

    @torch.no_grad()
    def _initialise(self, prior_prob):
        heads = {*self.cls_heads, *self.box_heads}
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            if conv in heads:
                nn.init.normal_(conv.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        if prior_prob is not None:
            for head in self.cls_heads:
                background = math.log((1 - prior_prob) / prior_prob * self.num_classes)
                head.bias.view(-1, self.num_classes + 1)[:, 0] = background

    def freeze_blocks(self, count: int) -> SSD300:
        """Keep the first `count` of the five VGG blocks as they are: no gradient, batch norm not updated."""
        self.frozen_blocks = count
        self.blocks[:count].requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> SSD300:
        """Switch between training and evaluation mode; frozen blocks stay in the latter."""
        super().train(mode)
        self.blocks[: self.frozen_blocks].eval()
        return self

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Return the six maps, finest first, of normalised images (B, 3, 300, 300)."""
        for number, block in enumerate(self.blocks[:4]):
            x = block(F.max_pool2d(x, 2) if number else x)
        maps = [self.l2_norm(x)]  # (B, 512, 37, 37)
        x = self.blocks[4](F.max_pool2d(x, 2))  # (B, 512, 18, 18)
        maps.append(x)
        for stage in (self.fc, *self.extras):  # 18, 9, 5, 2 cells
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images must be (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {tuple(images.shape)}")
        maps = self.feature_maps((images.float() - self.mean) / self.std)
        cls_logits = self._flatten(self.cls_heads, maps, self.num_classes + 1)
        box_deltas = self._flatten(self.box_heads, maps, 4)
        return cls_logits, box_deltas

    @staticmethod
    def _flatten(heads, maps, columns):
        """Return (B, A, columns): the heads' outputs in the order of the anchors."""
        outputs = [head(x).permute(0, 2, 3, 1) for head, x in zip(heads, maps, strict=True)]  # (B, y, x, n)
        return torch.cat([x.reshape(x.shape[0], -1, columns) for x in outputs], dim=1).float()


def load_tensors(path: PathLike, what: str) -> dict:
    """Return what torch.save wrote into a file, as data only; InputError if it is missing or something else.

    Each part of the file has a CRC-32, which torch.load does not look at.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file ({what})")
    try:
        if zipfile.is_zipfile(path):  # torch's older format is none
            with zipfile.ZipFile(path) as parts:
                if (part := parts.testzip()) is not None:
                    raise ValueError(f"damaged: the checksum of {part} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler meets in a foreign file
        problem = (str(error) or "it is empty").splitlines()[0][:120]
        raise InputError(f"{path}: not readable as {what} ({problem})") from None


def fetch_backbone(source: str = "caffe", *, batch_norm: bool = False) -> dict:
    """Return the state dict of ImageNet VGG16 weights: "caffe", "imagenet" or that of a file.

    "caffe" are the convolutions that VGG's authors trained, "imagenet" is torchvision's training, which has a
    classifier too and alone has batch norm. Both are fetched through torchvision and cached.
    """
    if source not in ("imagenet", "caffe"):
        return load_tensors(source, "backbone weights")
    kinds = torchvision.models.VGG16_BN_Weights if batch_norm else torchvision.models.VGG16_Weights
    weights = kinds.IMAGENET1K_V1 if batch_norm or source == "imagenet" else kinds.IMAGENET1K_FEATURES
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise InputError(f"ImageNet weights could not be had from {weights.url} ({error}): give that file "
                         "with --backbone-weights FILE, or train with --no-pretrained") from None


def load_backbone(model: SSD300, state: dict) -> bool:
    """Copy ImageNet weights, a state dict of torchvision's vgg16 or vgg16_bn, into a full-width SSD300.

    Where the weights have a classifier, fc6 (4096, 512, 7, 7) and fc7 (4096, 4096) are decimated: every
    fourth output and input, rows and columns 0, 3, 6 (DeepLab, arXiv:1412.7062; SSD section 3). The Caffe
    weights have none: fc6 and fc7 keep their random start, and the images are normalised as they want it.
    Returns whether there was a classifier, a bool. InputError if a weight is missing or of another shape.
    """
    state = state if isinstance(state, dict) else {}
    given = [v for k, v in state.items() if str(k).startswith("features.") and "num_batches" not in k]
    own = [v for k, v in model.blocks.state_dict().items() if "num_batches" not in k]
    fc = [state.get(f"classifier.{layer}.{kind}") for layer in (0, 3) for kind in ("weight", "bias")]
    fc_shapes = [None] * 4 if fc[0] is None else [(4096, 25088), (4096,), (4096, 4096), (4096,)]
    if [getattr(v, "shape", None) for v in given + fc] != [v.shape for v in own] + fc_shapes:
        raise InputError(f"the backbone weights do not fit: {len(given)} tensors named features.* for the "
                         f"{len(own)} of the VGG blocks, or other shapes: take torchvision's vgg16 (with "
                         "--batch-norm vgg16_bn)")
    has_classifier = fc[0] is not None and not fc[0].isnan().any()  # torchvision fills Caffe's with NaN
    is_caffe = not has_classifier and not model.batch_norm
    if is_caffe:
        model.set_normalisation(CAFFE_MEAN, [CAFFE_SCALE * std for std in CAFFE_STD])
    with torch.no_grad():
        for target, source in zip(own, given, strict=True):
            target.copy_(source)
            # Caffe's features are divided, so that new layers see numbers around 1: with ReLU it is enough to
            # divide the images and the biases.
            if is_caffe and target.ndim == 1:
                target.div_(CAFFE_SCALE)
        if has_classifier:
            fc6, fc7 = (layer for layer in model.fc if isinstance(layer, nn.Conv2d))
            fc6.weight.copy_(fc[0].view(4096, 512, 7, 7)[::4, :, ::3, ::3])
            fc6.bias.copy_(fc[1][::4])
            fc7.weight.copy_(fc[2][::4, ::4, None, None])
            fc7.bias.copy_(fc[3][::4])
    return bool(has_classifier)


def autocast(device: torch.device, amp_dtype: torch.dtype | None) -> torch.autocast:
    """Return the autocast context of a dtype; for None it does nothing."""
    return torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)


def to_device(batch: dict, device: torch.device) -> dict:
    """Copy a collated batch to a device without waiting; images in channels_last order, but on a CPU."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if device.type != "cpu":  # there the order of the weights decides
        moved["images"] = moved["images"].contiguous(memory_format=torch.channels_last)
    return moved


def targets_of(batch: dict, anchors_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
    """Return the targets of a collated batch for `detection_loss`, see `build_targets`."""
    return build_targets(batch["matched_gt"], batch["gt_boxes"], batch["gt_labels"], anchors_cxcywh)


# ---- 8. Losses ----


def focal_loss(cls_logits: Tensor, labels: Tensor, *, alpha: float = -1.0,
               gamma: float = FOCAL_GAMMA) -> Tensor:
    """Return -alpha_t (1 - p_t)^gamma log(p_t) per anchor, p a softmax (Focal loss Eq. 5).

    cls_logits (..., K + 1); labels (...) int64, 0 is background. alpha weighs objects, 1 - alpha background,
    -1 weighs neither; gamma 0 and alpha -1 is the cross-entropy. Returns (...).
    """
    # Differs from paper: a softmax over K + 1 classes in place of K sigmoids.
    log_pt = F.log_softmax(cls_logits.float(), dim=-1).gather(-1, labels[..., None])[..., 0]
    # clamp: below a gamma of 1 the slope of 0 ** gamma is NaN
    loss = -((1 - log_pt.exp()).clamp(min=1e-8) ** gamma) * log_pt
    return loss if alpha < 0 else torch.where(labels > 0, alpha, 1 - alpha) * loss


def mined_cross_entropy(cls_logits: Tensor, labels: Tensor, *, negatives_per_positive: int = 3) -> Tensor:
    """Return the cross-entropy per anchor (B, A), zero but at positives and each image's hardest negatives.

    An image keeps three negatives a positive (SSD section 2.2, "Hard negative mining"), ranked by their loss.
    """
    # Differs from paper: an image without objects keeps three negatives, so that it teaches background.
    logits = cls_logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    is_positive = labels > 0
    budget = negatives_per_positive * is_positive.sum(dim=1, keepdim=True).clamp(min=1)
    hardness = loss.detach().masked_fill(is_positive, -1.0)
    rank = hardness.argsort(dim=1, descending=True).argsort(dim=1)
    return loss * (is_positive | (rank < budget))


def detection_loss(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor], *, loss: str = "focal",
                   alpha: float = -1.0, gamma: float = FOCAL_GAMMA,
                   num_positive: Tensor | None = None) -> dict[str, Tensor]:
    """Return {"loss", "loss_cls", "loss_box"}: scalars, sums over the batch over its number of positives.

    outputs: cls_logits (B, A, K + 1), box_deltas (B, A, 4); targets: labels (B, A), box_targets (B, A, 4).
    The box loss is smooth-L1 over positives (SSD Eq. 1 and 2). The divisor is at least B: a batch without an
    object has a finite, moderate loss. num_positive: the divisor, where it is not that of this batch alone
    (several processes). Nothing here waits for the device.
    """
    cls_logits, box_deltas = outputs
    labels, box_targets = targets
    is_positive = labels > 0
    if num_positive is None:
        num_positive = is_positive.sum()
    # Differs from paper: its loss of a batch without objects is 0, and of one with few it is large.
    divisor = num_positive.clamp(min=len(labels))
    if loss == "focal":
        per_anchor = focal_loss(cls_logits, labels, alpha=alpha, gamma=gamma)
    else:
        per_anchor = mined_cross_entropy(cls_logits, labels)
    box = F.smooth_l1_loss(box_deltas, box_targets, reduction="none").sum(dim=-1)
    loss_cls = per_anchor.sum() / divisor
    loss_box = (box * is_positive).sum() / divisor
    return {"loss": loss_cls + loss_box, "loss_cls": loss_cls, "loss_box": loss_box}


# ---- 9. Detection ----


@torch.no_grad()
def detect(cls_logits: Tensor, box_deltas: Tensor, anchors_cxcywh: Tensor, *,
           score_thresh: float | Tensor = SCORE_THRESH, nms_iou_thresh: float = NMS_IOU_THRESH,
           max_detections: int = MAX_DETECTIONS) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Turn raw outputs into detections: B triples boxes (D, 4), labels (D,) 1..K, scores (D,), best first.

    cls_logits (B, A, K + 1), box_deltas (B, A, 4), anchors_cxcywh (A, 4). Boxes are normalised xyxy cut at
    the image's border. Per class the best 1,000 at or above score_thresh, a number or a tensor (K,), go
    through NMS, over all classes the best max_detections stay (SSD section 2.2). D may be 0.
    """
    scores = F.softmax(cls_logits.float(), dim=-1)[..., 1:]
    boxes = decode(box_deltas.float(), anchors_cxcywh).clamp(0, 1)
    has_area = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1, keepdim=True)  # after the cut
    is_candidate = scores >= score_thresh  # (B, A, K)
    if is_candidate.sum(dim=1).amax() > PRE_NMS_TOP_K:
        best = scores.topk(PRE_NMS_TOP_K, dim=1).indices
        is_candidate &= torch.zeros_like(is_candidate).scatter_(1, best, True)
    image, anchor, column = (is_candidate & has_area).nonzero(as_tuple=True)
    order = scores[image, anchor, column].argsort(descending=True, stable=True)
    order = order[image[order].argsort(stable=True)]  # image by image, best first
    counts = image.bincount(minlength=len(boxes)).tolist()
    columns = (boxes[image, anchor], column + 1, scores[image, anchor, column])
    results = []
    for found, label, score in zip(*(part[order].split(counts) for part in columns), strict=True):
        # Mostly the best few are enough: NMS never looks down the list.
        for count in (5 * max_detections, len(score)):
            keep = batched_nms(found[:count], score[:count], label[:count], nms_iou_thresh)[:max_detections]
            if len(keep) == max_detections or count >= len(score):
                break
        results.append((found[keep], label[keep], score[keep]))
    return results


# ---- 10. Evaluation ----


# The devkit's 0:0.1:1, which MATLAB counts up from 0 and down from 1: its fourth value is just above .3.
ELEVEN_RECALLS = np.concatenate((np.arange(6) * 0.1, 1 - np.arange(5)[::-1] * 0.1))


def average_precision(recall: np.ndarray, precision: np.ndarray) -> tuple[float, float]:
    """Return (area, 11-point) average precision of a curve: recall (N,) rising, precision (N,); N may be 0.

    Area: under the precision made monotone from the right (VOC 2010 on). 11-point: the mean over recall 0,
    .1, ..., 1 of the best precision at that recall or more (VOC 2007; Everingham et al. 2010, Eq. 1 and 2).
    """
    envelope = np.maximum.accumulate(np.concatenate((precision, [0.0]))[::-1])[::-1]
    area = float(np.sum(np.diff(np.concatenate(([0.0], recall))) * envelope[:-1]))
    return area, float(envelope[np.searchsorted(recall, ELEVEN_RECALLS)].mean())


def overlap_pairs(det_keys: np.ndarray, det_boxes: np.ndarray, gt_keys: np.ndarray,
                  gt_boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (det, gt, iou), each (P,): rows and IoU of all detections and truths of one key that overlap.

    Keys (N,) and (M,): integers; boxes (N, 4), (M, 4): VOC pixels. In the order of detections, then truths.
    """
    order = np.argsort(gt_keys, kind="stable")
    first = np.searchsorted(gt_keys[order], det_keys, side="left")
    count = np.searchsorted(gt_keys[order], det_keys, side="right") - first
    det = np.repeat(np.arange(len(det_keys)), count)  # one row a pair
    offset = np.arange(len(det)) - np.repeat(np.cumsum(count) - count, count)
    gt = order[np.repeat(first, count) + offset]
    iou = box_iou(det_boxes[det], gt_boxes[gt], extra=1.0)
    is_shared = iou > 0
    return det[is_shared], gt[is_shared], iou[is_shared]


def assign_voc(det: dict, gt: dict, num_classes: int,
               iou_thresh: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Return is_hit and is_ignored, bool (N,), by the rules of `evaluate_voc`; what is neither is false.

    det, gt: dicts of arrays as `evaluate_voc` takes them, det in score order.
    """
    det_keys, gt_keys = (side["image_ids"] * (num_classes + 1) + side["labels"] for side in (det, gt))
    rows, targets, iou = overlap_pairs(det_keys, det["boxes_px"], gt_keys, gt["boxes_px"])
    # Of each detection's pairs the one of largest overlap (ties: the first ground truth), if that is enough.
    best = np.lexsort((targets, -iou, rows))
    best = best[np.unique(rows[best], return_index=True)[1]]
    best = best[iou[best] >= iou_thresh]
    rows, targets = rows[best], targets[best]
    is_hit, is_ignored = np.zeros((2, len(det["labels"])), dtype=bool)
    is_difficult = gt["difficult"][targets]
    is_ignored[rows[is_difficult]] = True
    rows, targets = rows[~is_difficult], targets[~is_difficult]
    is_hit[rows[np.unique(targets, return_index=True)[1]]] = True  # the best-scored one of each ground truth
    return is_hit, is_ignored


def evaluate_voc(detections: dict, truth: dict, num_classes: int, iou_thresh: float = 0.5) -> dict[int, dict]:
    """Score detections by the VOC2007 devkit's rules: {label: {"ap_area", "ap11", "recall", ...}}.

    detections: {"image_ids" (N,) int, "labels" (N,) 1..K, "scores" (N,), "boxes_px" (N, 4)}; truth:
    {"image_ids" (M,), "labels" (M,), "boxes_px" (M, 4), "difficult" (M,) bool}. Boxes are VOC pixels:
    1-based, corners included. In score order (ties: as given) a detection takes the ground truth of its image
    and class that it overlaps most; at IoU >= iou_thresh it is a hit the first time and false after that, a
    difficult one counts neither way. recall, precision and scores are arrays along that order, num_gt counts
    what is not difficult. A class without such ground truth has NaN for both APs.
    """
    order = np.argsort(-detections["scores"], kind="stable")
    det = {name: column[order] for name, column in detections.items()}
    is_hit, is_ignored = assign_voc(det, truth, num_classes, iou_thresh)
    results = {}
    for label in range(1, num_classes + 1):
        counted = np.flatnonzero((det["labels"] == label) & ~is_ignored)
        hits = is_hit[counted].cumsum()
        num_gt = int(((truth["labels"] == label) & ~truth["difficult"]).sum())
        recall = hits / max(num_gt, 1)
        precision = hits / np.arange(1, len(hits) + 1)
        ap_area, ap11 = average_precision(recall, precision) if num_gt else (math.nan, math.nan)
        results[label] = {"ap_area": ap_area, "ap11": ap11, "recall": recall, "precision": precision,
                          "scores": det["scores"][counted], "num_gt": num_gt}
    return results


def f1_curve(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, F1) of a class of `evaluate_voc`: F1 of what scores at least that, a point a score."""
    last = np.flatnonzero(np.diff(row["scores"], append=-np.inf))  # detections of equal score come together
    precision, recall = row["precision"][last], row["recall"][last]
    return row["scores"][last], 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def best_thresholds(classes: dict[int, dict], class_names: Sequence[str]) -> dict[str, float]:
    """Return {name: the score of best F1 (ties: the highest)} of `evaluate_voc`'s classes that have one."""
    thresholds = {}
    for name, row in zip(class_names, classes.values(), strict=True):
        scores, f1 = f1_curve(row)
        if row["num_gt"] and len(scores):
            thresholds[name] = float(scores[f1.argmax()])
    return thresholds


def to_voc_pixels(boxes_px: np.ndarray) -> np.ndarray:
    """Return 0-based edges (N, 4) as VOC pixels, 1-based with corners included; sizes stay the same."""
    return np.asarray(boxes_px, dtype=np.float64).reshape(-1, 4) + np.array([1, 1, 0, 0])


def truth_of(records: list[Record]) -> dict[str, np.ndarray]:
    """Return the ground truth of records in the form that `evaluate_voc` takes; image ids are positions."""
    return {
        "image_ids": np.repeat(np.arange(len(records)), [len(r.labels) for r in records]),
        "labels": np.concatenate([r.labels for r in records]),
        "boxes_px": to_voc_pixels(np.concatenate([r.boxes_px for r in records])),
        "difficult": np.concatenate([r.difficult for r in records]),
    }


def score_detections(detections: dict, records: list[Record], num_classes: int) -> dict:
    """Score detections, image ids are positions in records, by the VOC rules; see `evaluate`."""
    truth = truth_of(records)
    classes = evaluate_voc(detections, truth, num_classes)
    strict = evaluate_voc(detections, truth, num_classes, iou_thresh=0.75)
    for label, row in classes.items():
        row["ap75"] = strict[label]["ap_area"]
    counted = [row for row in classes.values() if row["num_gt"]]
    means = {f"m{key}": float(np.mean([row[key] for row in counted])) if counted else math.nan
             for key in ("ap_area", "ap11", "ap75")}
    return {**means, "classes": classes, "detections": detections}


@torch.no_grad()
def evaluate(model: SSD300, loader: DataLoader, *, amp_dtype: torch.dtype | None = None,
             loss: Callable | None = None, **settings) -> dict:
    """Run a model over a loader of a VocDataset and score it by the VOC rules.

    Returns {"map_area", "map11": at IoU .5, "map75": area at IoU .75, "classes": as evaluate_voc, with
    "ap75", "detections": as it takes them}, and with loss(outputs, targets), see `detection_loss`, the means
    "loss", "loss_cls", "loss_box". settings: of `detect`. Classes without ground truth are left out of the
    mean APs, which are NaN if no class has any.
    """
    model.eval()
    device = model.anchors.device
    records = loader.dataset.records
    sizes = np.array([[record.width, record.height] * 2 for record in records])
    parts, losses = collections.defaultdict(list), collections.defaultdict(float)
    for batch in loader:
        batch = to_device(batch, device)
        with autocast(device, amp_dtype):
            outputs = model(batch["images"])
        if loss is not None:
            for name, value in loss(outputs, targets_of(batch, model.anchors)).items():
                losses[name] += value.item() * len(batch["images"]) / len(records)
        found = detect(*outputs, model.anchors, **settings)
        boxes, labels, scores = (torch.cat(column).cpu().numpy() for column in zip(*found, strict=True))
        indices = np.repeat(batch["indices"].tolist(), [len(one[0]) for one in found])
        parts["image_ids"].append(indices)
        parts["labels"].append(labels)
        parts["scores"].append(scores)
        parts["boxes_px"].append(to_voc_pixels(boxes * sizes[indices]))
    detections = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return {**score_detections(detections, records, model.num_classes), **losses}


def class_table(result: dict, class_names: Sequence[str]) -> str:
    """Return an evaluation as text: objects that count, recall and APs of each class, then the means."""
    width = max(10, *map(len, class_names))
    lines = [f"{'class':<{width}}  objects  recall  AP area  AP 11-point  AP at IoU .75"]
    for label, name in enumerate(class_names, start=1):
        row = result["classes"][label]
        recall = row["recall"][-1] if len(row["recall"]) else 0.0
        values = f"{recall:7.3f} {row['ap_area']:8.4f} {row['ap11']:12.4f} {row['ap75']:14.4f}"
        lines.append(f"{name:<{width}} {row['num_gt']:8d} {values if row['num_gt'] else '  no objects'}")
    means = f"{result['map_area']:8.4f} {result['map11']:12.4f} {result['map75']:14.4f}"
    lines.append(f"{'mean':<{width}} {'':8} {'':7} {means}")
    return "\n".join(lines)


# ---- 11. Run records ----

# Several processes, started by torchrun: all of it is here, but for DistributedDataParallel (`build_state`).


def process_rank() -> tuple[int, int]:
    """Return (rank, world): this process's number among torchrun's, and how many they are; alone (0, 1)."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def from_first_process(make: Callable[[], object]) -> object:
    """Return what make() returns; the first process alone calls it, the others wait and get a copy."""
    rank, world = process_rank()
    holder = [make() if rank == 0 else None]
    if world > 1:
        torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a float tensor over the processes, itself if there is only one."""
    world = process_rank()[1]
    if world > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= world
    return value


@contextlib.contextmanager
def joined_processes(name: str) -> Iterator[str]:
    """Join torchrun's processes, if it started this one; yields its --device. Only the first prints."""
    if "LOCAL_RANK" not in os.environ:
        yield name
        return
    is_cuda = name in ("auto", "cuda") and torch.cuda.is_available()
    if is_cuda:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    patience = datetime.timedelta(hours=6)  # the first process may have to download the data
    torch.distributed.init_process_group("nccl" if is_cuda else "gloo", timeout=patience)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null if process_rank()[0] else sys.stdout):
        yield name
    torch.distributed.destroy_process_group()


def write_atomically(path: PathLike, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), flush it to disk and rename it: readers see the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: PathLike, content: object, *, lines: bool = False) -> None:
    """Write JSON, whole or not at all; lines: a row of content a line. NaN, unknown to JSON, becomes null."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    text = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_checkpoint(path: PathLike, checkpoint: dict, previous: Path | None = None) -> None:
    """Write a checkpoint, a dict of tensors and plain values, whole or not at all; OSError if that fails.

    previous: the name under which the file that it replaces is kept.
    """
    def write(temporary):
        with open(temporary, "wb") as file:
            try:
                torch.save({"format_version": FORMAT_VERSION, **checkpoint}, file)
            except RuntimeError as error:  # what torch makes of a failing write
                raise OSError(*(getattr(error.__context__, "args", None) or error.args)) from None
        if previous is not None:
            second = temporary.with_suffix(".previous.tmp")
            with contextlib.suppress(OSError):  # there is none yet, or the file system has no hard links
                os.link(path, second)
                os.replace(second, previous)  # leaves both where they are the same file already
            second.unlink(missing_ok=True)

    write_atomically(path, write)


class CheckpointWriter:
    """Writes a run's checkpoints, at most every SAVE_SECONDS; what is due sooner waits in memory as a copy.

    So does what could not be written (a full disk). base: what every checkpoint holds beside its own content.
    """

    def __init__(self, folder: Path, base: dict):
        self.folder = folder
        self.base = base
        self.waiting = {}
        self.flushed_at = -math.inf

    def put(self, checkpoints: dict[str, dict]) -> None:
        """Take checkpoints {file name: content}, and write what waits if that is due."""
        self.waiting |= {name: {**self.base, **content} for name, content in checkpoints.items()}
        if time.monotonic() - self.flushed_at >= SAVE_SECONDS:
            self.flush()
        for name in checkpoints.keys() & self.waiting.keys():
            self.waiting[name] = copy.deepcopy(self.waiting[name])  # the weights will move on

    def flush(self) -> None:
        """Write what waits; what cannot be written costs a warning. The last.pth before is kept."""
        for name in sorted(self.waiting):  # best.pth before last.pth, which speaks of it
            previous = self.folder / "previous.pth" if name == "last.pth" else None
            try:
                save_checkpoint(self.folder / name, self.waiting[name], previous)
                del self.waiting[name]
            except OSError as error:
                print(f"warning: {self.folder / name} was not written, the next save tries again: {error}",
                      file=sys.stderr)
        self.flushed_at = time.monotonic()


def load_checkpoint(path: PathLike, *, resumable: bool = False) -> dict:
    """Return a checkpoint's dict; InputError if it is missing, damaged, of another format, not resumable."""
    checkpoint = load_tensors(path, "a checkpoint")
    keys = {"format_version", "model", "config", "classes"}
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        raise InputError(f"{path}: not a checkpoint of this program (it lacks model, config or classes)")
    if checkpoint["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path}: a checkpoint of format {checkpoint['format_version']}, this program reads "
                         f"{FORMAT_VERSION}: use the version of the program that wrote it, or train again")
    if resumable and "train_state" not in checkpoint:
        raise InputError(f"{path}: holds weights but no training state; resume from a last.pth")
    return checkpoint


def model_from_checkpoint(checkpoint: dict, path: PathLike = "checkpoint", device: str = "cpu") -> SSD300:
    """Return the SSD300 that a checkpoint describes, with its averaged weights, in evaluation mode."""
    model = SSD300(**checkpoint["config"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: the weights do not fit the network: {problem}") from None
    return model.to(device, memory_format=torch.channels_last).eval()


def environment(device: str | torch.device) -> dict:
    """Return what a result depends on beside the flags: versions, machine, device; plain values."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "torchvision": torchvision.__version__, "albumentations": A.__version__, "cpu_count": os.cpu_count(),
        "platform": platform.platform(), "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "command": " ".join(sys.argv), "started": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def prepare_folders(checkpoints: Path, plots: Path, *, keep: bool) -> None:
    """Make a run's folders; unless keep is true an earlier run's files move to checkpoints/earlier-TIME."""
    for folder in (checkpoints, plots):
        folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoints.glob(".*.tmp"):  # a run that was killed while it wrote
        path.unlink()
    earlier = [p for p in checkpoints.iterdir() if p.suffix in (".pth", ".jsonl", ".json")]
    if keep or not any(p.suffix == ".pth" for p in earlier):
        return
    aside = checkpoints / f"earlier-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    aside.mkdir()
    for path in earlier:
        path.rename(aside / path.name)
    print(f"the files of an earlier run are now in {aside}")


# ---- 12. Plots ----


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all; a failure (a full disk) costs the picture, not the run."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        options = {"format": "png", "dpi": 100, "pil_kwargs": {"compress_level": 2}}  # twice as fast
        write_atomically(path, lambda temporary: figure.savefig(temporary, **options))
    except OSError as error:
        print(f"warning: {path} was not written: {error}", file=sys.stderr)


def _line_axes(axes, history, curves, title, ylabel):
    """Draw curves (key, label, style) of the rows of metrics.jsonl that have them."""
    for key, label, style in curves:
        rows = [row for row in history if row.get(key) is not None]
        if rows:
            epochs, values = [row["epoch"] for row in rows], [row[key] for row in rows]
            axes.plot(epochs, values, style, label=label, marker="." if len(rows) < 40 else None)
    axes.set(title=title, xlabel="epoch", ylabel=ylabel)
    axes.update_datalim([(1, 0)])  # so that the margin above is one of the whole height
    axes.autoscale_view()
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend()


def plot_losses(history: list[dict]) -> Figure:
    """Return loss.png: total, class and box loss over the epochs of metrics.jsonl."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    titles = {"loss": "Loss", "loss_cls": "Class loss", "loss_box": "Box loss"}
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        curves = [(f"train_{key}", "train", "C0-"), (f"val_{key}", "validation", "C1-")]
        _line_axes(axes, history, curves, title, "sum / positives")
    return figure


def plot_training(history: list[dict]) -> Figure:
    """Return training.png: validation mAP, learning rate and speed over the epochs of metrics.jsonl."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    maps = [("val_map_area", "IoU .5, area", "C2-"), ("val_map11", "IoU .5, 11-point", "C4--"),
            ("val_map75", "IoU .75, area", "C5:")]
    _line_axes(left, history, maps, "Validation mAP", "mAP")
    left.set_ylim(0, 1)
    if not left.lines:
        left.text(0.5, 0.5, "no validation images", ha="center", transform=left.transAxes)
    _line_axes(middle, history, [("lr", "", "C3-")], "Learning rate at the epoch's end", "learning rate")
    _line_axes(right, history, [("images_per_s", "", "C0-")], "Training speed", "images/s")
    return figure


def color_of(label: int) -> str:
    """Return the colour of a class; classes ten apart share one."""
    return PALETTE[(label - 1) % len(PALETTE)]


def draw_boxes(image: Image.Image, boxes_px: np.ndarray, captions: list[str],
               colors: list[str]) -> Image.Image:
    """Return a copy of a PIL image with boxes and captions drawn on it; lines and text follow its size."""
    # torchvision's draw_bounding_boxes clips captions at the right and hides white boxes on pale images.
    out = image.copy()
    draw = ImageDraw.Draw(out)
    line = max(2, round(max(image.size) / 250))
    font = ImageFont.load_default(max(12, round(max(image.size) / 32)))
    boxes = np.asarray(boxes_px).round().tolist()
    for (x1, y1, x2, y2), color in zip(boxes, colors, strict=True):
        if color == "white":
            draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=line + 2)
        draw.rectangle((x1, y1, x2, y2), outline=color, width=line)
    for (x1, y1, _, _), caption, color in zip(boxes, captions, colors, strict=True):
        if caption:
            _, _, width, height = draw.textbbox((2, 1), caption, font=font)
            left, top = max(0, min(x1, out.width - width - 2)), max(0, y1 - height - 1)
            draw.rectangle((left, top, left + width + 1, top + height + 1), fill=color)
            draw.text((left + 2, top + 1), caption, fill="white", font=font)
    return out


def spread(items: Sequence, count: int) -> list:
    """Return `count` items, or all if there are fewer, evenly spread over a list."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def plot_sheet(images: list[Image.Image], title: str, columns: int = 4) -> Figure:
    """Return a sheet of PIL images in cells of the same size, as high as the tallest image needs."""
    rows = max(1, math.ceil(len(images) / columns))
    tallest = max((image.height / image.width for image in images), default=1.0)
    figure = Figure(figsize=(3.4 * columns, 3.4 * rows * min(tallest, 1.5) + 0.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for cell in axes:
        cell.axis("off")
    for cell, image in zip(axes, images, strict=False):
        cell.imshow(image)
    return figure


def plot_augmentations(dataset: VocDataset, classes: Sequence[str], count: int = 16) -> Figure:
    """Return augmentations.png: training images as the network first sees them, with their boxes."""
    images, side = [], 450
    for index in spread(range(len(dataset)), count):
        image, boxes, labels = dataset.augment(index)
        names, colors = [classes[k - 1] for k in labels], [color_of(k) for k in labels]
        images.append(draw_boxes(Image.fromarray(image).resize((side, side)), boxes * side, names, colors))
    return plot_sheet(images, "Augmented training images and their boxes")


def plot_predictions(records: list[Record], detections: dict, classes: Sequence[str], title: str) -> Figure:
    """Return predictions.png: twelve records, evenly spread, with truth in white and coloured detections.

    detections: of `evaluate`, image ids are positions in records; those below DRAW_SCORE_THRESH are left out.
    """
    images = []
    for index in spread(range(len(records)), 12):
        record = records[index]
        image = Image.fromarray(read_image(record.image_path))
        scale = 450 / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size])
        count = len(record.labels)
        image = draw_boxes(image, record.boxes_px * scale, [""] * count, ["white"] * count)
        drawn = (detections["image_ids"] == index) & (detections["scores"] >= DRAW_SCORE_THRESH)
        labels, scores = detections["labels"][drawn].tolist(), detections["scores"][drawn].tolist()
        captions = [f"{classes[k - 1]} {score:.2f}" for k, score in zip(labels, scores, strict=True)]
        edges = detections["boxes_px"][drawn] - np.array([1, 1, 0, 0])  # VOC pixels -> edges
        images.append(draw_boxes(image, edges * scale, captions, [color_of(k) for k in labels]))
    return plot_sheet(images, f"{title}: truth (white), detections of {DRAW_SCORE_THRESH} or more (coloured)")


# ---- 13. Training ----

# From here on `args` is the namespace of the command line: what a setting means stands in --help, once.


def pick_device(name: str = "auto") -> torch.device:
    """Return the torch.device of a name; "auto" is the first GPU, else the CPU. InputError if absent."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    return device


def pick_amp_dtype(device: torch.device, amp: str = "auto") -> torch.dtype | None:
    """Return the autocast dtype of --amp, None for float32.

    "auto" is bfloat16 where the hardware multiplies it, float16 on older GPUs, float32 on a CPU without such
    instructions, which would emulate it many times slower.
    """
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else None


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: fresh pages cost about a quarter of a CPU training step."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


def make_optimizer(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """Return SGD or AdamW; weights of two dimensions or more decay, biases and norms do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]
    fused = params[0].device.type in ("cpu", "cuda")
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.momentum, 0.999), fused=fused)


def learning_rate(step: int, args: Namespace, steps_per_epoch: int) -> float:
    """Return the rate of a step, counted from 0: a linear warm-up to args.lr, then its schedule.

    cosine: to a hundredth; step: a tenth from 2/3 of all steps on, a hundredth from 5/6 (SSD section 3.1).
    """
    warmup = round(args.warmup_epochs * steps_per_epoch)
    total = args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "step":
        drops = (3 * step >= 2 * total) + (6 * step >= 5 * total)
        return args.lr * 0.1**drops
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return args.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


class Ema:
    """An exponential moving average of a model, batch norm statistics included; `model` is the averaged copy.

    The decay rises as (1 + step) / (10 + step) to its full value, so that early weights are soon forgotten.
    """

    # torch's AveragedModel reads a counter on the device in each update, which stalls a GPU.

    def __init__(self, model: SSD300, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self.averaged = [averaged for averaged, _ in pairs if averaged.is_floating_point()]
        self.current = [current for _, current in pairs if current.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the model's weights; step counts from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averaged, self.current, 1 - decay)


@dataclass
class TrainState:
    """What a run carries from epoch to epoch; order and augmentation follow from the epoch."""

    model: SSD300
    ema: Ema
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    network: nn.Module  # runs forward in training: the model, or what compiles or distributes it
    epoch: int = 0  # epochs finished, their validation included
    step: int = 0  # optimizer steps taken
    best_map: float = -1.0
    best_epoch: int = 0
    history: list[dict] = field(default_factory=list)  # the rows of metrics.jsonl

    def state_dict(self) -> dict:
        """Return tensors and plain values only; the averaged weights are kept beside it."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        plain = ("epoch", "step", "best_map", "best_epoch", "history")
        return parts | {name: getattr(self, name) for name in plain}

    def load_state_dict(self, state: dict, averaged: dict) -> None:
        """Go back to a saved state and the average's weights; InputError if they are of another network."""
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        try:
            if state["optimizer"]["param_groups"][0].keys() != groups[0].keys():
                raise ValueError(f"not of {type(self.optimizer).__name__}")
            for name in ("model", "optimizer", "scaler"):
                getattr(self, name).load_state_dict(state[name])
            self.ema.model.load_state_dict(averaged)
        except (KeyError, ValueError, RuntimeError) as error:
            problem = " ".join(str(error).split())[:300]
            raise InputError(f"the run to resume is of another network or optimizer: {problem}") from None
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # a flag beats the saved run
        for name in ("epoch", "step", "best_map", "best_epoch", "history"):
            setattr(self, name, state[name])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == parameter.shape:  # a fused step needs the memory order of the parameter
                    moments[name] = torch.empty_like(parameter).copy_(value)


def train_step(state: TrainState, batch: dict, loss: Callable, *, lr: float, clip_grad: float,
               amp_dtype: torch.dtype | None) -> dict[str, float] | None:
    """Take one optimizer step on a batch of the loader; returns its losses, or None if the step was skipped.

    It is skipped if its gradient is not finite: weights, moments, average and batch norm statistics then stay
    as they were. clip_grad: largest norm of the gradient, 0 is no limit.
    """
    batch = to_device(batch, state.model.anchors.device)
    buffers = list(state.model.buffers())  # the forward pass changes batch norm's
    before = [buffer.clone() for buffer in buffers]
    with autocast(state.model.anchors.device, amp_dtype):
        outputs = state.network(batch["images"])
    num_positive = mean_over_processes((batch["matched_gt"] >= 0).sum().float())
    losses = loss(outputs, targets_of(batch, state.model.anchors), num_positive=num_positive)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(losses["loss"]).backward()
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad or math.inf)
    norm, *values = torch.stack((norm, *losses.values())).tolist()  # the only place that waits for the device
    is_finite = math.isfinite(norm)  # of all processes' mean gradient, so that all of them agree
    if is_finite:
        state.optimizer.step()
        state.step += 1
        state.ema.update(state.step)
    else:
        torch._foreach_copy_(buffers, before)
    state.scaler.update()
    return dict(zip(losses, values, strict=True)) if is_finite else None


def train_one_epoch(state: TrainState, loader: DataLoader, batches: Iterator, loss: Callable,
                    args: Namespace, *, amp_dtype: torch.dtype | None = None) -> dict:
    """Train for an epoch; returns columns of metrics.jsonl, data_wait is the share of time the loader took.

    batches: iter(loader), which goes on into the next epoch. Raises InputError that names the images after
    three steps in a row whose gradient was not finite.
    """
    records, sampler = loader.dataset.records, loader.batch_sampler
    steps = sampler.steps_per_epoch
    limit = min(steps, 25 if state.scaler.is_enabled() else MAX_SKIPPED_STEPS)  # float16 seeks its scale
    state.model.train()
    totals = collections.defaultdict(float)
    skipped = in_a_row = 0
    waited, start = 0.0, time.perf_counter()
    is_quiet = not sys.stderr.isatty() or process_rank()[0] > 0
    bar = tqdm(itertools.islice(batches, steps), f"epoch {state.epoch + 1}/{args.epochs}", steps, leave=False,
               disable=is_quiet)
    ready = start
    for number, batch in enumerate(bar, start=1):
        waited += time.perf_counter() - ready
        lr = learning_rate(state.epoch * steps + number - 1, args, steps)
        losses = train_step(state, batch, loss, lr=lr, clip_grad=args.clip_grad, amp_dtype=amp_dtype)
        if losses is None:
            skipped += 1
            in_a_row += 1
            names = ", ".join(records[i].image_id for i in batch["indices"])
            what = f"epoch {state.epoch + 1}, step {number}: the gradient is not finite; images: {names}"
            if in_a_row == limit:
                raise InputError(f"{what}; {limit} in a row: lower --lr or set --amp off")
            print(f"warning: step skipped, {what}", file=sys.stderr)
        else:
            in_a_row = 0
            for name, value in losses.items():
                totals[name] += value
            bar.set_postfix_str(f"loss {totals['loss'] / (number - skipped):.3f} lr {lr:.1e}", refresh=False)
        ready = time.perf_counter()
    seconds = time.perf_counter() - start
    sums = torch.tensor(list(totals.values()), device=state.model.anchors.device)
    means = mean_over_processes(sums / (steps - skipped)).tolist()
    row = {f"train_{name}": mean for name, mean in zip(totals, means, strict=True)}
    row |= {"lr": lr, "skipped": skipped, "data_wait": waited / seconds}
    return row | {"images_per_s": steps * sampler.batch_size / seconds}


def epoch_line(row: dict, epochs: int) -> str:
    """Return the printed line of an epoch, a row of metrics.jsonl."""
    val = f"  val {row['val_loss']:.3f}  mAP {row['val_map_area']:.4f}" if "val_loss" in row else ""
    skipped = f"  skipped {row['skipped']} steps" if row["skipped"] else ""
    parts = f"cls {row['train_loss_cls']:.3f} box {row['train_loss_box']:.3f}"
    speed = f"{row['seconds']:.1f} s  {row['images_per_s']:.0f} img/s  wait {row['data_wait']:.0%}"
    return (f"epoch {row['epoch']:3d}/{epochs}  train {row['train_loss']:.3f} ({parts}){val}  "
            f"lr {row['lr']:.2e}  {speed}{skipped}")


def fit(state: TrainState, loaders: tuple, args: Namespace, *, loss: Callable, amp_dtype: torch.dtype | None,
        writer: CheckpointWriter, redraw: Callable[[TrainState], None]) -> None:
    """Train until the epochs or the patience run out, giving checkpoints to the writer after every epoch.

    loaders: training, and validation or None. loss: as `detection_loss`, but for its settings. redraw(state)
    draws the plots. The first process alone validates, writes and draws.
    """
    train_loader, val_loader = loaders
    batches = iter(train_loader)

    def validate():
        settings = {"amp_dtype": amp_dtype, "nms_iou_thresh": args.nms_iou}
        result = evaluate(state.ema.model, val_loader, loss=loss, **settings)
        columns = ("loss", "loss_cls", "loss_box", "map_area", "map11", "map75")
        thresholds = best_thresholds(result["classes"], writer.base["classes"])
        return {f"val_{name}": result[name] for name in columns} | {"score_thresh": thresholds}

    while state.epoch < args.epochs:
        if val_loader and 0 < args.patience * args.eval_interval <= state.epoch - state.best_epoch:
            print(f"stopped early: no better validation mAP in {args.patience} evaluations (--patience)")
            break
        start = time.perf_counter()
        row = {"epoch": state.epoch + 1}
        row |= train_one_epoch(state, train_loader, batches, loss, args, amp_dtype=amp_dtype)
        if val_loader and (row["epoch"] == args.epochs or row["epoch"] % args.eval_interval == 0):
            row |= from_first_process(validate)
        row["seconds"] = round(time.perf_counter() - start, 3)
        state.epoch += 1
        state.history.append(row)
        checkpoint = {"model": state.ema.model.state_dict(), "metrics": row}
        checkpoint["score_thresh"] = row.get("score_thresh", {})
        checkpoints = {}
        # Not `>`: NaN, the mAP of a list without an object, cannot choose, so the newest weights are kept.
        if "val_map_area" in row and not row["val_map_area"] <= state.best_map:
            state.best_map, state.best_epoch = row["val_map_area"], state.epoch
            checkpoints["best.pth"] = checkpoint
        checkpoints["last.pth"] = {**checkpoint, "train_state": state.state_dict()}
        if process_rank()[0] == 0:
            writer.put(checkpoints)
            with contextlib.suppress(OSError):  # a full disk: the rows are in last.pth too
                write_json(writer.folder / "metrics.jsonl", state.history, lines=True)
            print(epoch_line(row, args.epochs), flush=True)
            redraw(state)


def build_state(args: Namespace, num_classes: int, device: torch.device,
                amp_dtype: torch.dtype | None) -> tuple[TrainState, dict]:
    """Return (TrainState, network config) by the flags; all processes get the first one's weights."""
    config = {"num_classes": num_classes, "width": args.width, "batch_norm": args.batch_norm,
              "anchor_sizes": args.anchors or ANCHOR_SIZES}
    model = SSD300(**config, prior_prob=FOCAL_PRIOR if args.loss == "focal" else None)
    rank, world = process_rank()
    if args.pretrained and not args.resume and rank == 0:
        load_backbone(model, fetch_backbone(args.backbone_weights, batch_norm=args.batch_norm))
    # In channels_last order a CPU's float32 backward pass takes 1.3 to 1.7 times as long.
    is_plain = device.type == "cpu" and amp_dtype is None
    model.to(device, memory_format=torch.contiguous_format if is_plain else torch.channels_last)
    model.freeze_blocks(args.freeze_blocks)
    if world > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # there is no such layer for CPUs
    # CUDA graphs: loader processes beside it slow down the launching of 500 kernels a step.
    mode = "reduce-overhead" if device.type == "cuda" and world == 1 else None
    network = torch.compile(model, dynamic=False, mode=mode) if args.compile else model
    if world > 1:
        ids = [device] if device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(network, device_ids=ids)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    return TrainState(model, Ema(model, args.ema_decay), make_optimizer(model, args), scaler, network), config


# ---- 14. Inference ----


def open_image(source: PathLike | Image.Image | np.ndarray) -> Image.Image:
    """Return an image as a new RGB PIL image, turned upright by its EXIF tag; transparency is left out.

    source: a path, a PIL image, or an array (H, W), RGB (H, W, 3) or RGBA (H, W, 4), uint8, grey also uint16.
    Raises InputError for an unreadable file, TypeError for another array.
    """
    if isinstance(source, np.ndarray):
        source = Image.fromarray(source)
    try:
        is_open = isinstance(source, Image.Image)
        with contextlib.nullcontext(source) if is_open else Image.open(source) as image:
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # whatever a broken file makes Pillow raise
        problem = " ".join(str(error).split())[:120]
        raise InputError(f"{source}: not readable as an image ({problem})") from None
    if upright.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would cut at 255
        upright = Image.fromarray((np.asarray(upright) / 257.0).clip(0, 255).round().astype(np.uint8))
    return upright.convert("RGB")


@dataclass(eq=False)
class Detections:
    """What was found in one image, best first. boxes_px (D, 4): xyxy in pixels of the upright image."""

    boxes_px: np.ndarray
    labels: list[int]
    names: list[str]
    scores: list[float]

    def __len__(self) -> int:
        return len(self.labels)

    def to_dict(self) -> dict:
        """Return plain lists and numbers, ready for JSON."""
        boxes_px = [[round(v, 2) for v in box] for box in self.boxes_px.tolist()]
        scores = [round(s, 4) for s in self.scores]
        return {"boxes_px": boxes_px, "labels": self.labels, "names": self.names, "scores": scores}

    def draw(self, image: PathLike | Image.Image | np.ndarray) -> Image.Image:
        """Return a PIL copy of an image, see `open_image`, with boxes, class names and scores drawn on it."""
        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        return draw_boxes(open_image(image), self.boxes_px, captions, [color_of(k) for k in self.labels])


class Detector:
    """A trained model with its class names; see `load_detector`. Several threads may share one.

    score_thresh: {class name: threshold} for where `predict` is given none; DRAW_SCORE_THRESH for the others.
    """

    def __init__(self, model: SSD300, classes: Sequence[str], amp_dtype: torch.dtype | None = None,
                 score_thresh: dict[str, float] | None = None):
        self.model = model.eval()
        self.classes = tuple(classes)
        self.amp_dtype = amp_dtype
        self.score_thresh = dict.fromkeys(self.classes, DRAW_SCORE_THRESH) | (score_thresh or {})
        self._resize = resize_transform()

    def predict(self, images: object, *, batch_size: int = 8, **settings) -> Detections | list[Detections]:
        """Detect objects in an image, or in each of a list; an image is whatever `open_image` takes.

        settings: score_thresh (a number; None: that of each class in self.score_thresh), nms_iou_thresh and
        max_detections, see `detect`. Returns a Detections, or a list. InputError names an unreadable file.
        """
        if not isinstance(images, (list, tuple)):
            return self.predict([images], **settings)[0]
        results = []
        with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
            for start in range(0, len(images), batch_size):
                pictures = list(pool.map(open_image, images[start : start + batch_size]))
                results += self.detect_in(pictures, **settings)
        return results

    @torch.inference_mode()
    def detect_in(self, pictures: list[Image.Image], *, score_thresh: float | None = None,
                  **settings) -> list[Detections]:
        """Return the Detections of a batch of RGB PIL images; settings: see `predict`."""
        anchors = self.model.anchors
        if score_thresh is None:
            thresholds = [self.score_thresh[name] for name in self.classes]
            score_thresh = torch.tensor(thresholds, device=anchors.device)
        arrays = np.stack([self._resize(image=np.asarray(picture))["image"] for picture in pictures])
        batch = to_device({"images": torch.from_numpy(arrays).permute(0, 3, 1, 2)}, anchors.device)
        with autocast(anchors.device, self.amp_dtype):
            outputs = self.forward(batch["images"])
        results = []
        found = detect(*outputs, anchors, score_thresh=score_thresh, **settings)
        for picture, (boxes, labels, scores) in zip(pictures, found, strict=True):
            boxes_px = boxes.cpu().numpy() * np.array(picture.size * 2, dtype=np.float32)
            names = [self.classes[k - 1] for k in labels.tolist()]
            results.append(Detections(boxes_px, labels.tolist(), names, scores.tolist()))
        return results

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's outputs for images (B, 3, 300, 300); a subclass may average several."""
        return self.model(images)


def load_detector(path: PathLike, device: str = "auto", precision: str = "auto") -> Detector:
    """Return the Detector of a checkpoint (.pth); device and precision as the flags --device and --amp."""
    checkpoint = load_checkpoint(path)
    picked = pick_device(device)
    model = model_from_checkpoint(checkpoint, path, picked)
    amp_dtype = pick_amp_dtype(picked, precision)
    return Detector(model, checkpoint["classes"], amp_dtype, checkpoint.get("score_thresh"))


# ---- 15. Command line ----

# What --recipe chooses; a flag given beside it wins. What is no flag stands here alone.
RECIPES = {
    "voc": {  # ImageNet start, a GPU
        "width": 1.0, "pretrained": True, "batch_norm": False, "freeze_blocks": 2, "batch_size": 32,
        "epochs": 100, "optimizer": "adamw", "lr": 1e-4, "momentum": 0.9, "weight_decay": 0.05, "loss": "focal",
        "warmup_epochs": 1.0, "schedule": "cosine", "clip_grad": 10.0, "ema_decay": 0.998,
        "zoom_out": 0.5, "crop": 1.0, "color": 0.5, "shadow": 0.2, "noise": 0.2, "blur": 0.1,
    },
}
RECIPES["scratch"] = RECIPES["voc"] | {
    "pretrained": False, "batch_norm": True, "freeze_blocks": 0, "lr": 2e-3,
}
RECIPES["small"] = RECIPES["scratch"] | {  # minutes on two CPU cores for a few hundred images
    "width": 0.125, "batch_size": 4, "lr": 3e-3, "epochs": 28, "zoom_out": 0.2, "crop": 0.6,
}
RECIPES["shapes"] = RECIPES["small"] | {  # the default of --data shapes
    "width": 0.0625, "lr": 5e-3, "epochs": 10, "zoom_out": 0.0, "crop": 0.3, "color": 0.1, "shadow": 0.1,
    "noise": 0.1, "val_split": "val",
}
RECIPES["paper"] = RECIPES["voc"] | {  # SSD sections 2.2, 3.1 and 3.6
    "optimizer": "sgd", "lr": 1e-3, "weight_decay": 5e-4, "loss": "multibox", "schedule": "step",
    "warmup_epochs": 0.0, "clip_grad": 0.0, "ema_decay": 0.0,
    "shadow": 0.0, "noise": 0.0, "blur": 0.0,
}
OPTIONAL_FLAGS = ("evaluate", "predict", "weights", "classes", "train_split", "val_split", "test_split",
                  "workers", "anchors", "compile", "score_thresh")  # None unless given
DATA_FLAGS = ("data", "classes", "train_split", "val_split", "val_fraction", "test_split")
MACHINE_FLAGS = ("device", "workers", "output_dir", "data_root", "cache", "compile", "resume", "evaluate",
                 "predict", "weights")  # not saved with a run


def _number(name, kind, accepts):
    """Return an argparse type that turns text into a number and accepts a range."""
    def parse(text):
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text} is not {name}")
        return value

    parse.__name__ = name
    return parse


positive_int = _number("an integer of 1 or more", int, lambda v: v >= 1)
natural_int = _number("an integer of 0 or more", int, lambda v: v >= 0)
positive_float = _number("a number above 0", float, lambda v: 0 < v < math.inf)
natural_float = _number("a number of 0 or more", float, lambda v: 0 <= v < math.inf)
unit_interval = _number("a number from 0 to 1", float, lambda v: 0 <= v <= 1)
below_one = _number("a number from 0 to below 1", float, lambda v: 0 <= v < 1)
alpha_weight = _number("a number from 0 to 1, or -1 for none", float, lambda v: v == -1 or 0 <= v <= 1)


def class_list(text: str) -> tuple[str, ...]:
    """argparse type: class names parted by commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def anchor_file(path: str) -> list:
    """argparse type: a JSON file of (w, h) pairs for each of the six maps, as tools/anchors.py writes it."""
    form = f"{path} must hold {len(FEATURE_MAPS)} lists of [width, height] pairs, fractions of the image"
    try:
        sizes = [[(float(w), float(h)) for w, h in pairs] for pairs in json.loads(Path(path).read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{form} ({error})") from None
    in_range = all(0 < side < 10 for pairs in sizes for pair in pairs for side in pair)
    if len(sizes) != len(FEATURE_MAPS) or not all(sizes) or not in_range:
        raise argparse.ArgumentTypeError(form)
    return sizes


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def _add_training_flags(parser):
    switch, none = argparse.BooleanOptionalAction, argparse.SUPPRESS
    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=RECIPES, default=none,
        help="what the flags without a printed default are (default: voc, or shapes for --data shapes)")
    add("--epochs", type=positive_int, default=none, help="passes over the training images")
    add("--batch-size", type=positive_int, default=none, help="images a step, of all processes together")
    add("--loss", choices=("focal", "multibox"), default=none, help="focal, or cross-entropy with 3:1 mining")
    add("--focal-alpha", type=alpha_weight, default=-1.0, help="weight of objects to background; -1: none")
    add("--focal-gamma", type=natural_float, default=FOCAL_GAMMA, help="focusing exponent")
    add("--optimizer", choices=("sgd", "adamw"), default=none, help="SGD with momentum, or AdamW")
    add("--lr", type=positive_float, default=none, help="learning rate after the warm-up")
    add("--weight-decay", type=natural_float, default=none, help="not on biases and norms")
    add("--warmup-epochs", type=natural_float, default=none, help="linear warm-up before the schedule")
    add("--patience", type=natural_int, default=30, help="validations without a better mAP to stop after")
    add("--eval-interval", type=positive_int, default=1, help="epochs between validations")
    add("--seed", type=natural_int, default=0, help="of weights, order, augmentation and the held-out share")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--compile", action=switch, default=none, help="compile the network (default: on CUDA)")

    add = parser.add_argument_group("detection").add_argument
    add("--score-thresh", type=unit_interval, default=none,
        help=f"least score (default: {SCORE_THRESH} to measure; to predict that of each class's best F1 in "
             f"validation, {DRAW_SCORE_THRESH} without)")
    add("--nms-iou", type=unit_interval, default=NMS_IOU_THRESH, help="IoU of boxes that are one object")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. Where help prints no default the recipe, the data or the device chooses it."""
    parser = _Parser(description="Train, measure and use an SSD300 object detector.",
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    none = argparse.SUPPRESS

    add = parser.add_argument_group("what to do (default: train)").add_argument
    add("--evaluate", metavar="FILE", default=none, help="measure a checkpoint on the test list")
    add("--predict", metavar="IMAGE", nargs="+", default=none, help="detect in images (needs --weights)")
    add("--weights", metavar="FILE", default=none, help="for --predict: a checkpoint")
    add("--resume", action="store_true", help="go on with the run of --output-dir after its last saved epoch")
    add("--output-dir", metavar="DIR", default=".", help="where checkpoints/ and plots/ are written")

    add = parser.add_argument_group("data").add_argument
    add("--data", default=none, help="voc2007 (default), voc0712, shapes or a folder in VOC layout")
    add("--data-root", metavar="DIR", default="data", help="where VOCdevkit and shapes are or will be")
    add("--classes", type=class_list, default=none, help="names a,b,c (default: VOC's, or those annotated)")
    add("--train-split", metavar="LIST", default=none, help="training list (default: trainval of VOC, train)")
    add("--val-split", metavar="LIST", default=none, help="list that chooses the best checkpoint")
    add("--val-fraction", type=below_one, default=0.1, help="else a share of the training list does")
    add("--test-split", metavar="LIST", default=none,
        help="list to measure on once, at the end (default: test, if there is one); '': none")
    add("--cache", action=switch, default=True, help="keep decoded training images in memory")
    add("--workers", type=natural_int, default=none, help="loader processes (default: by device and cores)")

    add = parser.add_argument_group("network").add_argument
    add("--width", type=positive_float, default=none, help="factor on every channel count")
    add("--batch-norm", action=switch, default=none, help="batch norm after every convolution")
    add("--pretrained", action=switch, default=none, help="start from ImageNet VGG16 weights")
    add("--backbone-weights", metavar="KIND", default="caffe",
        help="caffe (the authors' convolutions), imagenet (torchvision's training) or a file of either")
    add("--freeze-blocks", metavar="N", type=int, choices=range(6), default=none,
        help="keep the first N of the five VGG blocks as they are")
    add("--anchors", metavar="FILE", type=anchor_file, default=none, help="anchor sizes by tools/anchors.py")

    add = parser.add_argument_group("augmentation, as probabilities").add_argument
    add("--zoom-out", type=unit_interval, default=none, help="SSD zoom-out, up to 4 times")
    add("--crop", type=unit_interval, default=none, help="SSD crop, whose first choice is the whole image")
    add("--color", type=unit_interval, default=none, help="each of brightness, contrast, saturation and hue")
    add("--shadow", type=unit_interval, default=none, help="random shadow")
    add("--noise", type=unit_interval, default=none, help="Gaussian noise such as a camera makes")
    add("--blur", type=unit_interval, default=none, help="Gaussian blur")
    _add_training_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Return all flags: those given, then those of the run to resume or evaluate, then the recipe's.

    A contradiction ends the program before any data is touched. InputError for an unreadable checkpoint.
    """
    parser = build_parser()
    given, _ = parser.parse_known_args(argv)
    if [] in vars(given).values():  # argparse's reading of --flag=--
        parser.error("a flag needs a value, not --")
    recipe = getattr(given, "recipe", "shapes" if getattr(given, "data", "") == "shapes" else "voc")
    parser.set_defaults(**dict.fromkeys(OPTIONAL_FLAGS), data="voc2007", recipe=recipe)
    parser.set_defaults(**RECIPES[recipe])
    if given.resume or hasattr(given, "evaluate"):
        path = getattr(given, "evaluate", Path(given.output_dir) / "checkpoints" / "last.pth")
        saved = load_checkpoint(path, resumable=given.resume)["args"]
        is_elsewhere = hasattr(given, "data") and not given.resume
        parser.set_defaults(**{k: v for k, v in saved.items() if not (is_elsewhere and k in DATA_FLAGS)})
    args = parser.parse_args(argv)
    if bool(args.predict) != bool(args.weights):
        parser.error("--predict and --weights go together")
    if sum(map(bool, (args.predict, args.evaluate, args.resume))) > 1:
        parser.error("--evaluate, --predict and --resume exclude one another")
    if args.pretrained and args.width != 1:
        parser.error(f"--width {args.width:g} has no ImageNet weights: add --no-pretrained")
    if args.freeze_blocks and not args.pretrained:
        parser.error("--freeze-blocks needs pretrained weights: frozen random ones never learn")
    return args


def print_header(args: Namespace, data: DataSplits, model: SSD300, amp_dtype: torch.dtype | None) -> None:
    """Print what runs on what: versions, device, precision, data, network, recipe."""
    env = environment(model.anchors.device)
    versions = ", ".join(f"{name} {env[name]}" for name in ("python", "torch", "torchvision"))
    precision = str(amp_dtype or torch.float32).removeprefix("torch.")
    lists = ", ".join(f"{name} {split}" for name, split in data.lists.items() if split)
    counts = f"{len(data.train)} train, {len(data.val)} val, {len(data.test)} test images"
    objects = sum(len(record.labels) for record in data.train)
    start = f"ImageNet weights ({args.backbone_weights})" if args.pretrained else "from scratch"
    parameters = [p.numel() for p in model.parameters()]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    print(f"SSD300   {versions}")
    print(f"device   {env['device']}, {precision}, loader processes: {args.workers}")
    print(f"data     {args.data} (lists: {lists}): {counts}; {objects} training objects, "
          f"{len(data.classes)} classes")
    print(f"network  width {args.width:g}, batch norm {'on' if args.batch_norm else 'off'}, {start}; "
          f"{sum(parameters):,} parameters, {sum(trained):,} of them trained; {len(model.anchors):,} anchors")
    print(f"recipe   {args.recipe}: {args.epochs} epochs, batch size {args.batch_size}, {args.optimizer}, lr "
          f"{args.lr:g}, weight decay {args.weight_decay:g}, {args.loss} loss, seed {args.seed}", flush=True)


def prepare_device(args: Namespace, device: torch.device) -> torch.dtype | None:
    """Set up torch and OpenCV for a device, fill the flags that it decides; returns the autocast dtype."""
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        torch.backends.cudnn.benchmark = True  # the shapes stay the same
    cv2.setNumThreads(0)
    torch.manual_seed(args.seed)  # order and augmentation have generators of their own, see VocDataset
    if args.workers is None:  # beside a GPU all but two cores' worth; on a CPU torch's threads want the cores
        cores = usable_cores()
        args.workers = int(cores > 2) if device.type == "cpu" else max(1, min(16, cores - 2))
    if args.compile is None:
        args.compile = device.type == "cuda"
    return pick_amp_dtype(device, args.amp)


def plain_loader(args: Namespace, records: list[Record], model: SSD300) -> DataLoader:
    """Return the loader of records as they are, resized only."""
    dataset = VocDataset(records, build_transform(train=False), model.anchors.cpu())
    return make_loader(dataset, batch_size=args.batch_size, workers=args.workers)


def make_loaders(args: Namespace, data: DataSplits, state: TrainState, dataset_class: type) -> tuple:
    """Return the loaders of the epochs to come, and of validation (None if nothing is held out)."""
    model = state.model
    steps = ("zoom_out", "crop", "color", "shadow", "noise", "blur")
    transform = build_transform(train=True, **{name: getattr(args, name) for name in steps})
    pixels = decode_all(data.train) if args.cache else None
    train = dataset_class(data.train, transform, model.anchors.cpu(), seed=args.seed, pixels=pixels)
    rank, world = process_rank()
    epochs = range(state.epoch, args.epochs)
    sampler = EpochBatchSampler(len(train), args.batch_size, args.seed, epochs=epochs, rank=rank, world=world)
    is_cuda = model.anchors.device.type == "cuda"
    train_loader = make_loader(train, workers=args.workers, pin_memory=is_cuda, batch_sampler=sampler)
    return train_loader, plain_loader(args, data.val, model) if data.val else None


def measure(args: Namespace, records: list[Record], classes: Sequence[str], model: SSD300, *, checkpoint: str,
            split: str) -> tuple[dict, dict]:
    """Measure a model on test records: print the table, write evaluation.json and predictions.png into plots.

    checkpoint, split: names for evaluation.json. Returns (its numbers, the result of `evaluate`).
    """
    amp_dtype = pick_amp_dtype(model.anchors.device, args.amp)
    score_thresh = SCORE_THRESH if args.score_thresh is None else args.score_thresh
    settings = {"score_thresh": score_thresh, "nms_iou_thresh": args.nms_iou}
    result = evaluate(model, plain_loader(args, records, model), amp_dtype=amp_dtype, **settings)
    columns = ("ap_area", "ap11", "ap75", "num_gt")
    rows = [{key: row[key] for key in columns} for row in result["classes"].values()]
    numbers = {
        "checkpoint": checkpoint, "data": args.data, "split": split, "num_images": len(records),
        "precision": str(amp_dtype or torch.float32).removeprefix("torch."), "detection": settings,
        **{key: result[key] for key in ("map_area", "map11", "map75")},
        "per_class": dict(zip(classes, rows, strict=True)),
    }
    plots = Path(args.output_dir) / "plots"
    (plots / "evaluation").mkdir(parents=True, exist_ok=True)
    write_json(plots / "evaluation" / "evaluation.json", numbers)
    print(class_table(result, classes))
    print(f"Test mAP@.5: {result['map_area']:.4f} (area), {result['map11']:.4f} (11-point); mAP@.75: "
          f"{result['map75']:.4f} (area)")
    figure = plot_predictions(records, result["detections"], classes, Path(checkpoint).name)
    save_figure(figure, plots / "predictions.png")
    return numbers, result


def resume_state(state: TrainState, classes: Sequence[str], checkpoints: Path) -> None:
    """Bring a state back to where last.pth left it; InputError for other classes or another network."""
    saved = load_checkpoint(checkpoints / "last.pth", resumable=True)
    if list(saved["classes"]) != list(classes):
        raise InputError(f"the data has the classes {', '.join(classes)}, the run to resume was trained for "
                         f"{', '.join(saved['classes'])}")
    state.load_state_dict(saved["train_state"], saved["model"])
    has_best = from_first_process((checkpoints / "best.pth").is_file)
    if state.best_epoch > 0 and not has_best:
        print(f"warning: no {checkpoints / 'best.pth'}: the best epoch to come replaces it", file=sys.stderr)
        state.best_map, state.best_epoch = -1.0, state.epoch


def evaluate_checkpoint(args: Namespace) -> tuple[dict, list[Record], SSD300, dict, dict]:
    """Measure args.evaluate on the test list; returns (checkpoint, records, model, numbers, result)."""
    device = pick_device(args.device)
    prepare_device(args, device)
    checkpoint = load_checkpoint(args.evaluate)
    classes = checkpoint["classes"]
    (root, *_), lists = find_data(args.data, args.data_root, "", "", args.test_split)  # no other list
    split = lists["test"]
    if not split:
        raise InputError(f"{args.data} has no test list: name one with --test-split")
    found = annotated_classes(root, split)
    unknown = [name for name in found if name not in classes]
    if found and len(unknown) == len(found):
        raise InputError(f"{args.data}, list {split} has the classes {', '.join(found)}; the model knows "
                         f"{', '.join(classes)}: name the data it was trained for with --data")
    if unknown:
        print(f"not known to the checkpoint, so left out: {', '.join(unknown)}")
    records = read_records(root, split, classes, only_listed=True)
    model = model_from_checkpoint(checkpoint, args.evaluate, device)
    print(f"{args.evaluate} on {args.data}, list {split}: {len(records)} images")
    numbers, result = measure(args, records, classes, model, checkpoint=str(args.evaluate), split=split)
    return checkpoint, records, model, numbers, result


def finish_training(args: Namespace, data: DataSplits, checkpoints: Path) -> dict | None:
    """Save the chosen checkpoint as the final one, measure it on the test list; returns the numbers."""
    best = checkpoints / "best.pth"
    final = load_checkpoint(best if data.val and best.is_file() else checkpoints / "last.pth")
    final.pop("train_state", None)
    args.evaluate = str(checkpoints / f"ssd_{data.name}_final.pth")
    save_checkpoint(args.evaluate, final)
    if data.test:
        final["test"] = evaluate_checkpoint(args)[3]
        save_checkpoint(args.evaluate, final)
    else:
        print("no test list, so no test mAP: see --test-split")
    print(args.evaluate)
    return final.get("test")


def run_training(args: Namespace, *, loss: Callable | None = None, dataset_class: type = VocDataset) -> int:
    """Train by the flags, measure once on the test list, save the final checkpoint; returns the exit code.

    loss and dataset_class stand in for `detection_loss` with the flags' settings, and for VocDataset.
    """
    began = time.perf_counter()
    device = pick_device(args.device)
    amp_dtype = prepare_device(args, device)
    checkpoints, plots = Path(args.output_dir) / "checkpoints", Path(args.output_dir) / "plots"
    names = ("data_root", "classes", "train_split", "val_split", "test_split", "val_fraction", "seed")
    data = from_first_process(lambda: load_data(args.data, **{name: getattr(args, name) for name in names}))
    state, config = build_state(args, len(data.classes), device, amp_dtype)
    if args.resume:
        resume_state(state, data.classes, checkpoints)
    loaders = make_loaders(args, data, state, dataset_class)
    print_header(args, data, state.model, amp_dtype)
    flags = {name: value for name, value in vars(args).items() if name not in MACHINE_FLAGS}
    writer = CheckpointWriter(checkpoints, {"config": config, "classes": list(data.classes), "args": flags})
    record = {"flags": dict(vars(args)), "environment": environment(device), "classes": list(data.classes)}
    is_first = process_rank()[0] == 0
    if is_first:
        prepare_folders(checkpoints, plots, keep=args.resume)
        write_json(checkpoints / "run.json", record)
        save_figure(plot_augmentations(loaders[0].dataset, data.classes), plots / "augmentations.png")
    shown = spread(data.test or data.val or data.train, 12)
    gallery = make_loader(VocDataset(shown, build_transform(train=False), state.model.anchors.cpu()))
    drawn_at = -math.inf

    def redraw(state, least=60.0):  # seconds: an epoch may be shorter than its pictures
        nonlocal drawn_at
        if time.monotonic() - drawn_at < least:
            return
        save_figure(plot_losses(state.history), plots / "loss.png")
        save_figure(plot_training(state.history), plots / "training.png")
        found = evaluate(state.ema.model, gallery, amp_dtype=amp_dtype)["detections"]
        figure = plot_predictions(shown, found, data.classes, f"After epoch {state.epoch}")
        save_figure(figure, plots / "predictions.png")
        drawn_at = time.monotonic()

    options = {"loss": args.loss, "alpha": args.focal_alpha, "gamma": args.focal_gamma}
    loss = loss or functools.partial(detection_loss, **options)
    try:
        fit(state, loaders, args, loss=loss, amp_dtype=amp_dtype, writer=writer, redraw=redraw)
    finally:  # whatever ended the run
        writer.flush()
    if writer.waiting:
        raise InputError(f"the training is over, but {' and '.join(writer.waiting)} could not be written")
    if is_first:
        redraw(state, least=0.0)
        test = finish_training(args, data, checkpoints)
        seconds = round(time.perf_counter() - began)
        write_json(checkpoints / "run.json", record | {"test": test, "wall_s": seconds})
        print(f"wall time {datetime.timedelta(seconds=seconds)}")
    return 0


def run_prediction(args: Namespace) -> int:
    """Detect in images: write a drawn copy of each and predictions.json; returns the exit code."""
    detector = load_detector(args.weights, args.device, args.amp)
    found = detector.predict(args.predict, score_thresh=args.score_thresh, nms_iou_thresh=args.nms_iou)
    folder = Path(args.output_dir) / "plots" / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    taken = set()
    for path, one in zip(args.predict, found, strict=True):
        names = (f"{Path(path).stem}{f'_{n}' if n else ''}.png" for n in itertools.count())
        target = folder / next(name for name in names if name not in taken)
        taken.add(target.name)
        one.draw(path).save(target)
        listed = ", ".join(f"{name} {score:.2f}" for name, score in zip(one.names, one.scores, strict=True))
        print(f"{path}: {listed or 'nothing found'} -> {target}")
    results = {path: one.to_dict() for path, one in zip(args.predict, found, strict=True)}
    write_json(folder / "predictions.json", results)
    return 0


def advise(error: Exception) -> str | None:
    """Return what helps against an error for want of memory or of a compiler; None for another error."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory: lower --batch-size or --workers, or set --no-cache"
    if "DataLoader worker" in str(error):
        return ("a loader process died, mostly for want of memory or, in a container, of /dev/shm: lower "
                "--workers or --batch-size; --workers 0 shows any other cause")
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({str(error).strip().splitlines()[0][:160]}): set --no-compile"
    return None


def _stop(signum, frame):
    signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once
    raise KeyboardInterrupt(signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a mistake to mend, 130 or 143 if stopped."""
    args = None
    with contextlib.suppress(ValueError):  # only the main thread may have handlers
        signal.signal(signal.SIGINT, _stop)
        signal.signal(signal.SIGTERM, _stop)
    try:
        args = parse_args(argv)
        if args.predict:
            return run_prediction(args)
        if args.evaluate:
            evaluate_checkpoint(args)
            return 0
        with joined_processes(args.device) as args.device:
            return run_training(args)
    except InputError as error:  # raised in a loader process it comes with that process's traceback
        problem = str(error).strip().splitlines()[-1].split("InputError: ")[-1]
    except OSError as error:  # an unwritable folder, a full disk
        problem = str(error)
    except (MemoryError, RuntimeError) as error:
        if (advice := advise(error)) is None:
            raise
        problem = f"{advice}; --resume goes on from the last save"
    except KeyboardInterrupt as stop:
        folder = Path(args.output_dir if args else ".")
        is_saved = (folder / "checkpoints" / "last.pth").is_file()
        again = f"go on with --resume --output-dir {shlex.quote(str(folder))}"
        how = again if is_saved else "nothing was saved yet"
        print(f"\nstopped; {how}", file=sys.stderr)
        return 128 + (stop.args or (signal.SIGINT,))[0]
    print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
