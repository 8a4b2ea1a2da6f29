"""Train, measure and use an SSD300 object detector (VGG16 backbone) from one file.

Commands:
    python ssd_object_detection.py --data shapes                  # no data, no GPU, minutes
    python ssd_object_detection.py --epochs 100                   # Pascal VOC 2007, fetched if missing
    python ssd_object_detection.py --data PATH                    # any folder in VOC layout
    python ssd_object_detection.py --resume                       # go on after an interruption
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
import glob
import hashlib
import importlib
import itertools
import json
import math
import mmap
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import xml.etree.ElementTree as ElementTree
import xml.sax.saxutils
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # read when albumentations is imported: no network then

import albumentations as A
import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import batched_nms, box_convert
from tqdm import tqdm

# ---- 1. Constants ----

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
SHAPES_CLASSES = ("circle", "cross", "ring", "star", "triangle")

IMAGE_SIZE = 300
FEATURE_MAPS = (37, 18, 18, 9, 5, 2)  # cells along each side of the six maps
STRIDES = (8, 16, 16, 32, 64, 128)  # pixels between neighbouring cells of each map
# SSD section 2.2 with s_min = .2, s_max = .88 in five steps, .1 for the first map as in section 3.1; the
# last number is only the second factor of the last map's geometric mean.
ANCHOR_SCALES = (0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05)
ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))  # w/h; each brings its inverse
VARIANCES = (0.1, 0.2)  # centre, size: the authors' released Caffe code
MAX_LOG_SIZE = math.log(1000 / 16)  # decode clamps log(w/anchor_w) here, so that exp() stays finite in any precision

VGG16_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG Table 1, column D
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # torchvision VGG16_Weights.IMAGENET1K_V1
IMAGENET_STD = (0.229, 0.224, 0.225)
L2_NORM_SCALE = 20.0  # ParseNet section 3.2, SSD section 3.1

# Differs from paper: 2 (Focal loss section 5.1) gave less here than 3:1 mining, 1 as much or more (README, recipes).
FOCAL_GAMMA = 1.0
FOCAL_PRIOR = 0.01  # Focal loss section 4.1, "Initialization"
SCORE_THRESH, NMS_IOU_THRESH, MAX_DETECTIONS = 0.01, 0.45, 200  # SSD section 2.2, "Inference"
# Differs from paper: its code keeps 400 a class, with which crowded pictures (blood cells) end at a recall of .97.
PRE_NMS_TOP_K = 1000
DRAW_SCORE_THRESH = 0.4  # detections below it are left out of pictures

FORMAT_VERSION = 2  # of a checkpoint; `load_checkpoint` reads the older ones too
MAX_SKIPPED_STEPS = 3  # in a row, for a loss or gradient that is not finite, before a run stops
PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324", "#808000", "#000075")


class InputError(Exception):
    """A mistake that the user can mend: shown as one line on standard error, exit code 2."""


# ---- 2. Boxes ----


def encode(boxes, anchors_cxcywh):
    """Return the regression targets of boxes for their anchors (SSD Eq. 2, divided by the variances).

    boxes (..., 4): xyxy with x2 > x1 and y2 > y1, in the anchors' unit; anchors_cxcywh (..., 4), same leading
    shape or one that broadcasts. Returns (..., 4). A side shorter than 1e-6 counts as 1e-6.
    """
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    anchor_centre, anchor_size = anchors_cxcywh[..., :2], anchors_cxcywh[..., 2:]
    return torch.cat(
        ((centre - anchor_centre) / anchor_size / VARIANCES[0], torch.log(size / anchor_size) / VARIANCES[1]), dim=-1
    )


def decode(box_deltas, anchors_cxcywh):
    """Return the xyxy boxes (..., 4) that regression outputs mean; the inverse of `encode` (SSD Eq. 2).

    Sizes are bounded to 62.5 times the anchor's; the result is not clipped to the picture.
    """
    anchor_centre, anchor_size = anchors_cxcywh[..., :2], anchors_cxcywh[..., 2:]
    centre = anchor_centre + box_deltas[..., :2] * VARIANCES[0] * anchor_size
    size = anchor_size * torch.exp((box_deltas[..., 2:] * VARIANCES[1]).clamp(max=MAX_LOG_SIZE))
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


# ---- 3. Anchors ----


def _anchor_sizes():
    """Return (w, h) of each map's anchors, fractions of the picture (SSD section 2.2).

    The square of scale s_k, the square of sqrt(s_k * s_k+1), then for each ratio r the widths s_k * sqrt(r) and
    s_k / sqrt(r).
    """
    maps = []
    for scale, next_scale, ratios in zip(ANCHOR_SCALES[:-1], ANCHOR_SCALES[1:], ASPECT_RATIOS, strict=True):
        sizes = [(scale, scale), (math.sqrt(scale * next_scale),) * 2]
        for root in map(math.sqrt, ratios):
            sizes += [(scale * root, scale / root), (scale / root, scale * root)]
        maps.append(tuple(sizes))
    return tuple(maps)


ANCHOR_SIZES = _anchor_sizes()


def make_anchors(anchor_sizes=ANCHOR_SIZES):
    """Return the 9,966 anchors as cxcywh (A, 4), map by map, row by row, cell by cell (SSD section 2.2).

    anchor_sizes: the (w, h) of the anchors that each map's cells have. Neighbouring cells are a stride apart, the
    grid is centred in the picture. Anchors reach beyond its border: on BCCD cutting them there cost .007 mAP@.5.
    """
    # Differs from paper: its centres, (i + .5) / n, are 16.7 pixels apart on a map whose cells see every 16th pixel,
    # because the pooling rounds down: a box offset that grows towards the border, which no convolution can learn.
    anchors = []
    for cells, stride, sizes in zip(FEATURE_MAPS, STRIDES, anchor_sizes, strict=True):
        centres = 0.5 + (torch.arange(cells, dtype=torch.float64) - (cells - 1) / 2) * stride / IMAGE_SIZE
        cy, cx = torch.meshgrid(centres, centres, indexing="ij")
        grid = torch.stack((cx, cy), dim=-1).view(-1, 1, 2).expand(-1, len(sizes), -1)
        anchors.append(torch.cat((grid, torch.tensor(sizes, dtype=torch.float64).expand_as(grid)), dim=-1).view(-1, 4))
    return torch.cat(anchors).float()


def best_anchor_iou(boxes, anchor_sizes=ANCHOR_SIZES):
    """Return the highest IoU (N,) of boxes (N, 4), normalised xyxy, with any anchor.

    Of a map's anchors of one shape, the one whose centre is nearest along both axes overlaps a box most.
    """
    best, start, anchors = boxes.new_zeros(len(boxes)), 0, make_anchors(anchor_sizes)
    for cells, sizes in zip(FEATURE_MAPS, anchor_sizes, strict=True):
        grid = anchors[start : (start := start + cells * cells * len(sizes))].view(cells, cells, len(sizes), 4)
        away = (boxes[:, :2, None] + boxes[:, 2:, None]) / 2 - grid[0, :, 0, 0]  # a row's centres are a column's too
        x, y = away.abs().argmin(dim=2).unbind(1)
        near = box_convert(grid[y, x], "cxcywh", "xyxy")  # (N, sizes, 4)
        shared = torch.minimum(near[..., 2:], boxes[:, None, 2:]) - torch.maximum(near[..., :2], boxes[:, None, :2])
        shared, area = shared.clamp(min=0).prod(-1), (boxes[:, 2:] - boxes[:, :2]).prod(-1, keepdim=True)
        best = torch.maximum(best, (shared / (grid[y, x, :, 2:].prod(-1) + area - shared)).amax(dim=1))
    return best


def suggest_anchor_sizes(boxes):
    """Return anchor_sizes made for boxes (N, 4), normalised xyxy, by k-means on IoU (YOLO9000 section 2).

    A map's sizes are the centres of those boxes that are nearest to its scale; it keeps its own where these are fewer
    than it has sizes. The numbers of sizes stay, and with them the network's shape.
    """
    size, maps = (boxes[:, 2:] - boxes[:, :2]).double(), []
    edges = torch.tensor([math.sqrt(a * b) for a, b in itertools.pairwise(ANCHOR_SCALES[:-1])], dtype=torch.float64)
    home = torch.bucketize(size.prod(dim=1).sqrt(), edges)
    for number, sizes in enumerate(ANCHOR_SIZES):
        mine = size[home == number]
        if len(mine) < len(sizes):
            maps.append(sizes)
            continue
        ordered = mine[mine.prod(dim=1).argsort(stable=True)]
        centres = ordered[((torch.arange(len(sizes)) + 0.5) * len(mine) / len(sizes)).long()]
        for _ in range(100):
            shared = torch.minimum(mine[:, None], centres).prod(dim=-1)
            iou = shared / (mine.prod(dim=1, keepdim=True) + centres.prod(dim=1) - shared)
            nearest = iou.argmax(dim=1)
            groups = [mine[nearest == k] for k in range(len(sizes))]
            moved = torch.stack([g.mean(dim=0) if len(g) else c for g, c in zip(groups, centres, strict=True)])
            if torch.equal(moved, centres):
                break
            centres = moved
        maps.append(tuple(map(tuple, centres.tolist())))
    return tuple(maps)


# ---- 4. Matching ----


def counting_is_free(tensor):
    """Whether what is computed may depend on how many entries are true: on a GPU the host would wait for the number."""
    return tensor.device.type == "cpu"


def _overlaps(boxes, anchors_xyxy):
    """Return the IoU (R, A) of boxes (R, 4) and anchors: what torchvision's `box_iou` gives, in a fifth of its time."""
    (x1, y1, x2, y2), (left, top, right, bottom) = boxes.t()[..., None], anchors_xyxy.t().contiguous()
    width = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_(min=0)
    shared = torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_(min=0).mul_(width)
    union = torch.add((x2 - x1) * (y2 - y1), (right - left) * (bottom - top), out=width).sub_(shared)
    return shared.div_(union)


def _own_anchors(matched_gt, iou, valid, image, gt):
    """Give every ground truth an anchor of its own, in place; rows of iou (R, A) are those of image and gt (R,)."""
    best, favourite = iou.max(dim=1)
    choices = -1 - torch.arange(valid.shape[1], device=iou.device).expand_as(valid).clone()  # padding never agrees
    choices[image, gt] = torch.where(valid[image, gt], favourite, choices[image, gt])
    contested = torch.arange(len(valid), device=iou.device)
    if counting_is_free(iou):  # a favourite nobody else wants is its owner's: only the other images take turns
        matched_gt[image, favourite] = gt
        ordered = choices.sort(dim=1).values
        contested = contested[(ordered[:, 1:] == ordered[:, :-1]).any(dim=1)]
        if len(contested) == 0:
            return
    row, value = torch.zeros_like(choices), iou.new_full(valid.shape, -1.0)
    row[image, gt], value[image, gt] = torch.arange(len(gt), device=iou.device), best
    taken = torch.zeros_like(matched_gt[contested], dtype=torch.bool)
    for number in value[contested].argsort(dim=1, descending=True, stable=True).unbind(dim=1):
        anchor = iou[row[contested, number]].masked_fill(taken, -2.0).argmax(dim=1)
        is_real = valid[contested, number]
        matched_gt[contested, anchor] = torch.where(is_real, number, matched_gt[contested, anchor])
        taken.scatter_(1, anchor[:, None], (is_real | taken.gather(1, anchor[:, None])[:, 0])[:, None])


def match_anchors(gt_boxes, gt_labels, anchors_xyxy, match_iou_thresh=0.5):
    """Return matched_gt (B, A) int64: the ground truth that each anchor answers for, -1 for background.

    gt_boxes (B, G, 4): xyxy; gt_labels (B, G): 1..K, 0 marks padding; G may be 0. anchors_xyxy (A, 4).
    An anchor takes the ground truth of highest IoU if that is at least match_iou_thresh; besides, every ground
    truth owns one anchor that no other can take: they choose in turns, best overlap first, their best anchor
    still free (SSD section 2.2).
    """
    # Differs from paper: there two ground truths may prefer the same anchor, and one of them gets none.
    (batch, num_gt), num_anchors, valid = gt_labels.shape, len(anchors_xyxy), gt_labels > 0
    matched_gt = gt_labels.new_full((batch, num_anchors), -1, dtype=torch.int64)
    if batch * num_gt == 0:
        return matched_gt
    if counting_is_free(valid):
        image, gt = valid.nonzero(as_tuple=True)
        iou = _overlaps(gt_boxes[image, gt], anchors_xyxy)
        row, anchor = (iou >= match_iou_thresh).nonzero(as_tuple=True)
        place, value = image[row] * num_anchors + anchor, iou[row, anchor]
        best_iou = iou.new_zeros(matched_gt.numel()).scatter_reduce_(0, place, value, "amax")
        is_best = value == best_iou[place]
        matched_gt.view(-1).scatter_reduce_(0, place[is_best], gt[row[is_best]], "amin", include_self=False)
    else:
        image = torch.arange(batch, device=valid.device).repeat_interleave(num_gt)
        gt = torch.arange(num_gt, device=valid.device).repeat(batch)
        iou = _overlaps(gt_boxes[image, gt], anchors_xyxy).masked_fill_(~valid.view(-1, 1), -1.0)
        best_iou, best_gt = iou.view(batch, num_gt, num_anchors).max(dim=1)
        matched_gt = best_gt.masked_fill(best_iou < match_iou_thresh, -1)
    _own_anchors(matched_gt, iou, valid, image, gt)
    return matched_gt


def build_targets(gt_boxes, gt_labels, anchors_cxcywh, match_iou_thresh=0.5):
    """Return labels (B, A) int64, 0 is background, and box targets (B, A, 4), zero where the label is 0."""
    matched_gt = match_anchors(gt_boxes, gt_labels, box_convert(anchors_cxcywh, "cxcywh", "xyxy"), match_iou_thresh)
    labels, box_targets = torch.zeros_like(matched_gt), gt_boxes.new_zeros((*matched_gt.shape, 4))
    if gt_labels.shape[1] == 0:
        return labels, box_targets
    if counting_is_free(labels):  # few anchors answer for an object
        image, anchor = (matched_gt >= 0).nonzero(as_tuple=True)
        gt = matched_gt[image, anchor]
        labels[image, anchor] = gt_labels[image, gt]
        box_targets[image, anchor] = encode(gt_boxes[image, gt], anchors_cxcywh[anchor])
        return labels, box_targets
    is_positive, index = matched_gt >= 0, matched_gt.clamp(min=0)
    boxes = gt_boxes.gather(1, index[..., None].expand(-1, -1, 4))
    labels = torch.where(is_positive, gt_labels.gather(1, index), 0)
    return labels, torch.where(is_positive[..., None], encode(boxes, anchors_cxcywh), 0.0)


# ---- 5. Data ----


@dataclass(frozen=True)
class Record:
    """One annotated image. boxes_px (G, 4) float32: xyxy, 0-based edges, so that x2 - x1 is the width in pixels."""

    image_id: str
    image_path: str
    width: int
    height: int
    boxes_px: np.ndarray
    labels: np.ndarray  # (G,) int64, 1..K
    difficult: np.ndarray  # (G,) bool
    digest: str = ""  # of the pixels

    @property
    def boxes(self):
        """Normalised xyxy (G, 4)."""
        return self.boxes_px / np.array([self.width, self.height] * 2, dtype=np.float32)


@dataclass(frozen=True)
class DataSplits:
    """A data set ready for use: class names (label 1 first), Records of each split, what was mended on the way."""

    name: str
    classes: tuple
    train: list
    val: list
    test: list
    notes: list  # lines of the audit's table

    @property
    def digest(self):
        """Of the training pictures' pixels, in their order."""
        return hashlib.sha1("".join(r.digest for r in self.train).encode(), usedforsecurity=False).hexdigest()


def read_split(root, split):
    """Return the image ids of ROOT/ImageSets/Main/SPLIT.txt: the first word of each line, each id once.

    Raises InputError if there is none, or for an id that leaves the data folder.
    """
    path = Path(root) / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))[:12])
        hint = f"lists there: {there}" if there else "is it a folder in VOC layout?"
        raise InputError(f"no image list {path}; {hint} (see --train-split, --val-split, --test-split)")
    text = path.read_text(encoding="utf-8", errors="replace")
    ids = [line.split()[0] for line in text.splitlines() if line.strip()]
    if not ids:
        raise InputError(f"the image list {path} is empty")
    for image_id in ids:
        plain = PureWindowsPath(image_id)  # of both systems' separators
        if plain.anchor or ".." in plain.parts:
            raise InputError(f"the image list {path} names {image_id}, which leaves the data folder")
    return list(dict.fromkeys(ids))


def find_image(root, image_id):
    """Return the path of an image below ROOT/JPEGImages: the first that exists of the usual endings, else .jpg."""
    stem = os.path.join(root, "JPEGImages", image_id)
    suffixes = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".webp")
    return next((stem + suffix for suffix in suffixes if os.path.isfile(stem + suffix)), stem + ".jpg")


class _PlainTree(ElementTree.TreeBuilder):
    """Refuses a document type: without one no entity can be declared, so none is expanded or fetched."""

    def doctype(self, name, pubid, system):
        raise ElementTree.ParseError("it has a DOCTYPE")


def parse_annotation(path):
    """Return (width, height, objects) of a VOC XML file; objects are (name, [xmin, ymin, xmax, ymax], difficult).

    Coordinates are as written: 1-based, corners included. Raises InputError that names the file and the object.
    """
    try:
        root = ElementTree.parse(path, ElementTree.XMLParser(target=_PlainTree())).getroot()
    except FileNotFoundError:
        raise InputError(f"{path}: no such annotation file") from None
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:  # also of the encoding it names
        raise InputError(f"{path}: not readable as XML ({error})") from None
    try:
        width, height = (int(float(root.findtext(f"size/{side}"))) for side in ("width", "height"))
        usable = width > 0 and height > 0
    except (TypeError, ValueError, OverflowError):
        usable = False
    if not usable:
        raise InputError(f"{path}: no usable <size> with <width> and <height>")
    objects = []
    for number, node in enumerate(root.iter("object"), start=1):
        name = " ".join((node.findtext("name") or "").split())
        try:
            box = [float(node.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        except (TypeError, ValueError):
            box = [math.nan]
        if not name or not all(map(math.isfinite, box)):
            raise InputError(f"{path}: object {number} ({name or 'no name'}) has no complete <name> and <bndbox>")
        objects.append((name, box, (node.findtext("difficult") or "0").strip() == "1"))
    return width, height, objects


def read_image(path):
    """Return an image file as RGB uint8 (H, W, 3), as stored: annotations count pixels before any EXIF rotation."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise InputError(f"{path}: not readable as an image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


# The audit: every image and annotation of the lists is read before anything is spent on them.

AUDIT_VERSION = 1  # of audit.json
# What it finds, and what is done about it. None: such an image stops the run, or is left out by --allow-bad-data.
AUDIT_KINDS = {
    "image missing": None, "image unreadable": None, "annotation missing": None, "annotation unreadable": None,
    "image and annotation differ in size": None, "unknown class": None, "image also in the test list": None,
    "image also in the validation list": "left out of training", "class not named by --classes": "left out",
    "box beyond the picture": "clipped", "box reversed, without area or outside": "dropped",
    "same box and class twice": "dropped", "object that no anchor overlaps by half": "see --suggest-anchors",
}


def inspect_image(path):
    """Return (width, height, digest of the pixels) of an image file that can be decoded to its end."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels: a decompression bomb")
            if image.format != "JPEG" or not Path(path).read_bytes().endswith(b"\xff\xd9"):  # JPEG's end mark
                image.load()  # unlike OpenCV it refuses a truncated file, but keeps Python's lock meanwhile
    except FileNotFoundError:
        raise InputError(f"{path}: no such image, but a list names it") from None
    except Exception as error:  # whatever a decoder meets in a damaged file
        raise InputError(f"{path}: not readable as an image ({' '.join(str(error).split())[:120]})") from None
    pixels = read_image(path)
    return pixels.shape[1], pixels.shape[0], hashlib.sha1(pixels, usedforsecurity=False).hexdigest()


def stamp_files(root, image_id):
    """Return the paths of an image and its annotation, and their [time, size] each, None for one that is missing."""
    paths = find_image(root, image_id), os.path.join(root, "Annotations", image_id + ".xml")
    stamps = []
    for path in paths:
        try:
            stat = os.stat(path)
            stamps.append([stat.st_mtime_ns, stat.st_size])
        except (OSError, ValueError):
            stamps.append(None)
    return paths, stamps


def inspect(root, image_id):
    """Return what the audit must know of an image and its annotation, as plain values.

    {"stamps": of `stamp_files`, "image": of `inspect_image`, "annotation": of `parse_annotation`, "faults": [[kind,
    message]]}; a part that cannot be read is missing and has a fault.
    """
    paths, stamps = stamp_files(root, image_id)
    facts, faults = {"stamps": stamps}, []
    for name, read, path, stamp in zip(("image", "annotation"), (inspect_image, parse_annotation), paths, stamps,
                                       strict=True):
        try:
            facts[name] = read(path)
        except InputError as error:
            faults.append([f"{name} {'unreadable' if stamp else 'missing'}", str(error)])
    if not faults and facts["image"][:2] != facts["annotation"][:2]:
        (width, height, _), (its_width, its_height, _) = facts["image"], facts["annotation"]
        faults.append(["image and annotation differ in size",
                       f"{paths[0]} is {width}x{height} pixels, its annotation says {its_width}x{its_height}"])
    return facts | {"faults": faults}


def inspect_all(root, image_ids):
    """Return {image_id: facts of `inspect`}, in parallel; files unchanged since ROOT/audit.json are not read again."""
    facts = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        saved = json.loads((Path(root) / "audit.json").read_text(encoding="utf-8"))
        facts = dict(saved["files"]) if saved["version"] == AUDIT_VERSION else {}
    ids = [i for i in dict.fromkeys(image_ids) if facts.get(i, {}).get("stamps") != stamp_files(root, i)[1]]
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())  # decoding and hashing run beside each other
    try:
        found = pool.map(functools.partial(inspect, root), ids)
        bar = tqdm(found, f"checking {root}", len(ids), leave=False, disable=not ids or not sys.stderr.isatty())
        return facts | dict(zip(ids, bar, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def write_audit(root, files, findings):
    """Write ROOT/audit.json, whole or not at all: counts and places of the findings, then the facts of each file."""
    path, counts = Path(root) / "audit.json", {kind: len(places) for kind, places in findings.items()}
    head = {"version": AUDIT_VERSION, "counts": counts, "findings": {k: list(v) for k, v in findings.items()}}
    rows = ",\n".join(f"{json.dumps(image_id)}: {json.dumps(facts)}" for image_id, facts in files.items())
    text = f'{json.dumps(head, indent=1)[:-2]},\n "files": {{\n{rows}\n}}}}\n'
    with contextlib.suppress(OSError, ValueError):
        if path.read_text(encoding="utf-8") == text:
            return
    try:
        temporary = path.with_name(f".audit.{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        print(f"warning: {path} was not written, so the next run reads all files again: {error}", file=sys.stderr)


def audit_table(findings):
    """Return the lines of the audit's table: how many, what, what was done about it, the first places."""
    rows = [(f"{kind}: {remedy or 'unusable'}", list(findings[kind])) for kind, remedy in AUDIT_KINDS.items()
            if findings.get(kind)]
    width = max((len(what) for what, _ in rows), default=0)
    return [f"{len(places):6d}  {what:<{width}}  {'; '.join(places[:3])}{'; ...' if len(places) > 3 else ''}"
            for what, places in rows]


def make_records(items, facts, classes, findings, *, only_listed=False, anchor_sizes=ANCHOR_SIZES):
    """Return the Records of items (root, image_id), those that cannot be used left out; findings gathers the reasons.

    facts: {root: what `inspect_all` returns}; classes: names, label 1 first; findings: {kind: {place: None}}. Boxes
    are clipped to the picture, and those without area, repeated, or (only_listed) of another class left out.
    """
    label_of = {name: label for label, name in enumerate(classes, start=1)}
    records, unmatched = [], []
    for root, image_id in items:
        one, kept = facts[root][image_id], {}
        bad = list(one["faults"])
        width, height, objects = one.get("annotation", (0, 0, ()))
        for number, (name, (xmin, ymin, xmax, ymax), difficult) in enumerate(objects, start=1):
            place = f"{image_id}.xml object {number} ({name})"
            raw = xmin - 1, ymin - 1, xmax, ymax  # 1-based and inclusive -> 0-based edges
            box = tuple(min(max(v, 0), side) for v, side in zip(raw, (width, height) * 2, strict=True))
            if name not in label_of and not only_listed:
                bad.append(("unknown class", f"{place} is of the class {name!r}; known: {', '.join(classes)}"))
            elif name not in label_of:
                findings["class not named by --classes"][place] = None
            elif xmax <= xmin or ymax <= ymin or box[2] <= box[0] or box[3] <= box[1]:
                findings["box reversed, without area or outside"][place] = None
            elif (name, box) in kept:
                findings["same box and class twice"][place] = None
            else:
                # One pixel off is a 0-based annotation, not a mistake.
                if max(abs(a - b) for a, b in zip(raw, box, strict=True)) > 1:
                    findings["box beyond the picture"][place] = None
                kept[name, box] = box, label_of[name], difficult, place
        for kind, message in bad:
            findings[kind][message] = None
        if bad:
            continue
        boxes, labels, difficult, places = zip(*kept.values(), strict=True) if kept else ((), (), (), ())
        boxes_px = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        labels, difficult = np.array(labels, dtype=np.int64), np.array(difficult, dtype=bool)
        records.append(Record(image_id, find_image(root, image_id), width, height, boxes_px, labels, difficult,
                              one["image"][2]))
        unmatched += places
    if unmatched:
        best = best_anchor_iou(torch.from_numpy(np.concatenate([r.boxes for r in records])), anchor_sizes)
        few = best < 0.5
        findings["object that no anchor overlaps by half"] |= {unmatched[i]: None for i in few.nonzero()[:, 0].tolist()}
    return records


def drop_shared(records, held, kind, findings):
    """Return the records whose pixels are not those of a held one; the others become findings of a kind."""
    theirs = {r.digest: r.image_path for r in held}
    shared = {f"{r.image_path} has the pixels of {theirs[r.digest]}": None for r in records if r.digest in theirs}
    if shared:
        findings[kind] |= shared
    return [r for r in records if r.digest not in theirs]


# The generated data set: drawn shapes on textured, cluttered backgrounds.

SHAPES_SPLITS = {"train": 400, "val": 40, "test": 150}
SHAPES_VERSION = {"version": 1, "seed": 2007, "splits": SHAPES_SPLITS, "classes": list(SHAPES_CLASSES)}


def _shape_outline(name, rng):
    """Return a shape in the unit circle, turned by up to 20 degrees: polygons (N, 2), of which a second is a hole."""
    turn = math.radians(rng.uniform(-20, 20))

    def polygon(radii, angles):
        return np.stack((np.cos(turn + angles), np.sin(turn + angles)), axis=1) * np.reshape(radii, (-1, 1))

    circle, up = np.arange(48) * math.pi / 24, -math.pi / 2
    if name == "cross":
        arm = rng.uniform(0.17, 0.22)
        reach, angle, corner = math.hypot(arm, 1), math.atan(arm), arm * math.sqrt(2)
        quarter = np.array([-angle, angle, math.pi / 4])
        return [polygon([reach, reach, corner] * 4, np.concatenate([quarter - up * k for k in range(4)]))]
    if name == "star":
        return [polygon([1.0, rng.uniform(0.48, 0.54)] * 5, up + np.arange(10) * math.pi / 5)]
    if name == "triangle":
        return [polygon(1.0, up + np.arange(3) * math.pi / 1.5)]
    return [polygon(1.0, circle)] + ([polygon(rng.uniform(0.62, 0.74), circle)] if name == "ring" else [])


def _texture(rng, height, width, contrast):
    """Return a float32 (H, W, 3) texture around a random colour: smooth noise of three scales, maybe stripes."""
    out = np.tile(rng.uniform(30, 225, 3).astype(np.float32), (height, width, 1))
    for cells in (3, 9, 40):
        noise = rng.normal(0, contrast / 2, (cells, cells, 3)).astype(np.float32)
        out += cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.4:
        angle, period = rng.uniform(0, math.pi), rng.uniform(6, 40)
        x, y = (np.arange(n, dtype=np.float32) * 2 * math.pi / period for n in (width, height))
        wave = np.sin(x * math.cos(angle) + y[:, None] * math.sin(angle))
        out += (contrast * 0.6 * wave)[..., None] * rng.uniform(-1, 1, 3).astype(np.float32)
    return out


def _paint(image, mask, rng):
    """Lay a texture that can be told from what is there over a float32 image, in place; mask is uint8 coverage."""
    x, y, width, height = cv2.boundingRect(mask)
    part, cover = image[y : y + height, x : x + width], mask[y : y + height, x : x + width]
    fill, behind = _texture(rng, height, width, contrast=10), part[cover > 127].mean(axis=0)
    if np.abs(fill[cover > 127].mean(axis=0) - behind).max() < 60:  # what nobody could see would teach nothing
        fill += np.where(behind > 127, -80, 80).astype(np.float32)
    part += (fill - part) * (cover[..., None] / np.float32(255))


def draw_shapes_image(rng):
    """Draw one picture; returns the image, uint8 (H, W, 3), and its objects as (name, [xmin, ymin, xmax, ymax]).

    Zero to six objects of 20 pixels to four fifths of the shorter side. A box bounds the visible part of its
    object, 1-based and inclusive as VOC writes it; at least 85% of every object stays visible.
    """
    height, width = (int(v) for v in rng.integers(280, 401, 2))
    image = _texture(rng, height, width, contrast=14)
    for _ in range(rng.integers(3, 11)):  # clutter: strokes that belong to no class
        points = np.cumsum(rng.normal(0, 28, (rng.integers(2, 6), 2)), axis=0) + rng.uniform(0, [width, height])
        color, thickness = rng.uniform(0, 255, 3).tolist(), int(rng.integers(1, 3))
        cv2.polylines(image, [points.astype(np.int32)], False, color, thickness, cv2.LINE_AA)
    placed, count = [], 0 if rng.random() < 0.08 else int(rng.integers(2, 7))  # placed: (name, visible mask, area)
    for _ in range(4 * count):
        if len(placed) == count:
            break
        name = SHAPES_CLASSES[rng.integers(len(SHAPES_CLASSES))]
        size = 20 * (0.8 * min(height, width) / 20) ** rng.uniform() ** 0.33
        outline = _shape_outline(name, rng)
        low, extent = outline[0].min(axis=0), np.ptp(outline[0], axis=0)
        corner = rng.uniform(0, np.maximum([width, height] - extent * size / extent.max(), 1))
        mask = np.zeros((height, width), np.uint8)
        polygons = [np.round(((p - low) * size / extent.max() + corner) * 16).astype(np.int32) for p in outline]
        cv2.fillPoly(mask, polygons, 255, cv2.LINE_AA, 4)
        solid = mask > 127
        if any(np.count_nonzero(visible & ~solid) < 0.85 * area for _, visible, area in placed):
            continue  # it would hide too much of another
        _paint(image, mask, rng)
        placed = [(n, visible & ~solid, area) for n, visible, area in placed] + [(name, solid, np.count_nonzero(solid))]
    objects = []
    for name, visible, _ in placed:
        ys, xs = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
        objects.append((name, [int(v) + 1 for v in (xs[0], ys[0], xs[-1], ys[-1])]))
    return np.clip(image + rng.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8), objects


def write_annotation(path, filename, shape, objects):
    """Write a VOC XML file; shape is (H, W, 3), objects are (name, [xmin, ymin, xmax, ymax]), 1-based inclusive."""
    def element(tag, content):
        inner = "".join(content) if isinstance(content, list) else xml.sax.saxutils.escape(str(content))
        return f"<{tag}>{inner}</{tag}>"

    def elements(tags, values):
        return [element(tag, value) for tag, value in zip(tags, values, strict=True)]

    nodes = elements(("filename", "size"), (filename, elements(("height", "width", "depth"), shape)))
    for name, box in objects:
        content = name, 0, elements(("xmin", "ymin", "xmax", "ymax"), box)
        nodes.append(element("object", elements(("name", "difficult", "bndbox"), content)))
    Path(path).write_text(element("annotation", nodes) + "\n", encoding="utf-8")


def generate_shapes(root):
    """Write the `shapes` data set in VOC layout below root, unless this version of it is there.

    Made in a temporary folder and renamed, so that an interrupted run leaves nothing half-made.
    """
    root = Path(root)
    stamp = root / "shapes.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(stamp.read_text()) == SHAPES_VERSION:
            return
    if root.exists() and not stamp.exists():
        raise InputError(f"{root} is there but was not made by --data shapes: move it, or set --data-root")
    making = root.with_name(f"{root.name}.{os.getpid()}.tmp")
    print(f"drawing the shapes data set into {root} ...", flush=True)
    try:
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (making / folder).mkdir(parents=True)
        for number, (split, count) in enumerate(SHAPES_SPLITS.items()):
            ids = [f"{split}_{i:04d}" for i in range(count)]
            for i, image_id in enumerate(ids):
                image, objects = draw_shapes_image(np.random.default_rng((SHAPES_VERSION["seed"], number, i)))
                Image.fromarray(image).save(making / "JPEGImages" / f"{image_id}.jpg", quality=90)
                write_annotation(making / "Annotations" / f"{image_id}.xml", f"{image_id}.jpg", image.shape, objects)
            (making / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        (making / stamp.name).write_text(json.dumps(SHAPES_VERSION))
        shutil.rmtree(root, ignore_errors=True)
        making.rename(root)
    except OSError as error:
        raise InputError(f"{root} could not be written: {error}") from None
    finally:
        shutil.rmtree(making, ignore_errors=True)


def voc_roots(data, data_root, train_split, val_split, test_split):
    """Return the folders of "voc2007" or "voc0712", 2007 first; lists that are missing are fetched by torchvision.

    The archives are verified by their MD5 sums. Raises InputError if one cannot be had.
    """
    voc2007, voc2012 = (Path(data_root) / "VOCdevkit" / f"VOC{year}" for year in (2007, 2012))
    wanted = [(voc2007, split) for split in (train_split, val_split, test_split)]
    wanted += [(voc2012, train_split)] if data == "voc0712" else []
    for root, split in wanted:
        lists = root / "ImageSets" / "Main"
        if split not in ("train", "val", "trainval", "test") or (lists / f"{split}.txt").is_file():
            continue
        year, archive = root.name[3:], "test" if split == "test" else "trainval"
        print(f"{lists / split}.txt is missing: fetching Pascal VOC {year} {archive} into {data_root} ...", flush=True)
        try:
            torchvision.datasets.VOCDetection(str(data_root), year=year, image_set=archive, download=True)
        except (urllib.error.URLError, OSError, RuntimeError, ValueError) as error:
            there = ", ".join(sorted(p.stem for p in lists.glob("*.txt") if "_" not in p.stem)) or "none"
            raise InputError(
                f"Pascal VOC {year}: no list {split} in {lists} (there: {there}) and none to fetch ({error}); "
                "use --data PATH for a folder in VOC layout, --data-root DIR where VOCdevkit is, --train-split and "
                "--test-split for the lists you have, or --data shapes, which needs no download"
            ) from None
    return [voc2007, voc2012] if data == "voc0712" else [voc2007]


def finish_audit(facts, findings, allow_bad_data):
    """Write each folder's audit.json; raises InputError, after the table, for images that cannot be used."""
    for root, files in facts.items():
        write_audit(root, files, findings)
    bad = [(kind, place) for kind, places in findings.items() if AUDIT_KINDS[kind] is None for place in places]
    if bad and allow_bad_data:
        print(f"--allow-bad-data leaves out {len(bad)} image(s), such as: {bad[0][1]}", flush=True)
    elif bad:
        print(*audit_table(findings), sep="\n", flush=True)
        raise InputError(f"{': '.join(bad[0])}{f', and {len(bad) - 1} more' if len(bad) > 1 else ''}: see "
                         f"{' and '.join(str(Path(root) / 'audit.json') for root in facts)}; mend the data, or leave "
                         "such images out with --allow-bad-data")


def load_data(
    data, *, data_root="data", classes=None, train_split="train", val_split=None, test_split=None,
    val_fraction=0.1, seed=0, allow_bad_data=False, anchor_sizes=ANCHOR_SIZES,
):
    """Return the DataSplits of `data`: "voc2007", "voc0712", "shapes" or the path of a folder in VOC layout.

    Without val_split a seeded val_fraction of the training list is held out (0: nothing); without test_split the
    test list is empty. classes None: the VOC classes, or those that the training list has. Every file is audited;
    ROOT/audit.json keeps what was found. Raises InputError for whatever is missing or malformed; allow_bad_data
    leaves such images out instead.
    """
    only_listed, findings = classes is not None, collections.defaultdict(dict)
    if data in ("voc2007", "voc0712"):
        name, classes = "pascal_voc", classes or VOC_CLASSES
        roots = voc_roots(data, data_root, train_split, val_split, test_split)
    else:
        roots = [Path(data_root) / "shapes" if data == "shapes" else Path(data)]
        if data == "shapes":
            generate_shapes(roots[0])
        elif not roots[0].is_dir():
            raise InputError(f"--data {data}: no such folder, and not voc2007, voc0712 or shapes")
        name = re.sub(r"\W+", "_", roots[0].resolve().name.lower()).strip("_") or "custom"
    train, val, test = ([(root, i) for root in where for i in read_split(root, split)] if split else []
                        for split, where in ((train_split, roots), (val_split, roots[:1]), (test_split, roots[:1])))
    facts = {root: inspect_all(root, [i for r, i in train + val + test if r == root]) for root in roots}
    found = sorted({o[0] for root, i in train for o in facts[root][i].get("annotation", (0, 0, ()))[2]})
    classes = tuple(classes or found)
    make = functools.partial(make_records, only_listed=only_listed, anchor_sizes=anchor_sizes)
    train, val, test = (make(items, facts, classes, findings) for items in (train, val, test))
    if not val_split and val_fraction > 0:
        order = np.random.default_rng(seed).permutation(len(train)).tolist()
        held_out = set(order[: max(1, round(val_fraction * len(train)))])
        val = [r for i, r in enumerate(train) if i in held_out]
        train = [r for i, r in enumerate(train) if i not in held_out]
    train, val = (drop_shared(part, test, "image also in the test list", findings) for part in (train, val))
    train = drop_shared(train, val, "image also in the validation list", findings)
    finish_audit(facts, findings, allow_bad_data)
    if not found:
        raise InputError(f"the list {train_split} of {data} names no image with an object")
    if only_listed and (absent := [c for c in classes if c not in found]):
        raise InputError(f"--classes: list {train_split} has no {', '.join(absent)}; it has {', '.join(found)}")
    if not train:
        raise InputError("nothing is left to train on: lower --val-fraction")
    return DataSplits(name, classes, train, val, test, audit_table(findings))


def free_memory():
    """Return the bytes that may still be taken on Linux: of the machine, or of the container if that is less."""
    free, group = math.inf, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, IndexError):
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free if math.isfinite(free) else 0


class ImageCache:
    """Decoded images of records, each decoded once, in a mapping that forked loader processes share and fill.

    The mapping is anonymous memory, or with a folder a file there that has no name: nothing outlives the run.
    """

    def __init__(self, records, folder=None):
        self.ends = np.cumsum([r.width * r.height * 3 for r in records])
        size = self.size_of(records)
        if folder is None:
            mapping = mmap.mmap(-1, size)
        else:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills up later would kill the process
                mapping = mmap.mmap(file.fileno(), size)
        self.pixels = np.frombuffer(mapping, np.uint8)
        self.is_there = self.pixels[size - len(records) :]

    @staticmethod
    def size_of(records):
        """Return the bytes of the decoded images and of a flag for each."""
        return sum(r.width * r.height * 3 + 1 for r in records)

    def read(self, index, record, load):
        """Return a copy of the image of a record; load() returns it the first time."""
        size = record.width * record.height * 3
        stored = self.pixels[self.ends[index] - size : self.ends[index]].reshape(record.height, record.width, 3)
        if not self.is_there[index]:
            stored[:] = load()
            self.is_there[index] = 1  # last: another process never sees half an image
        return stored.copy()


def open_cache(records, kind, folder, *, processes=1):
    """Return an ImageCache of records, or None, by --cache; says what it takes and why it takes less than asked for.

    A kind that lacks room falls back: ram to disk, disk to off. processes: how many on this machine keep one each.
    """
    need = ImageCache.size_of(records) * processes
    for place in {"ram": ("ram", "disk"), "disk": ("disk",), "off": ()}[kind]:
        Path(folder).mkdir(parents=True, exist_ok=True)
        free = free_memory() if place == "ram" else shutil.disk_usage(folder).free
        print(f"cache    {need / 2**30:.2f} GiB of decoded images in {place}, {free / 2**30:.1f} GiB free", flush=True)
        try:
            if need > 0.8 * free:
                raise OSError("less than a fifth of what is free would be left")
            return ImageCache(records, None if place == "ram" else folder)
        except (OSError, AttributeError) as error:  # AttributeError: no posix_fallocate, so not Linux
            print(f"warning: no cache in {place}: {error}", file=sys.stderr)
    return None


class VocDataset(torch.utils.data.Dataset):
    """Images with their boxes. An item is asked for by (index, epoch), and depends on (seed, epoch, index) alone.

    So the order, the number and the restarts of worker processes change nothing. A sample is a dict: image uint8
    (3, 300, 300) RGB, boxes float32 (G, 4) in [0, 1], labels int64 (G,), difficult bool (G,), index.
    """

    def __init__(self, records, transform, seed=0, cache=None):
        self.records, self.transform, self.seed, self.cache = records, transform, seed, cache

    def __len__(self):
        return len(self.records)

    @staticmethod
    def load(record):
        """Return the decoded image of a record; InputError if it has not the size that its annotation states."""
        image = read_image(record.image_path)
        if image.shape[:2] != (record.height, record.width):
            raise InputError(f"{record.image_path} is {image.shape[1]}x{image.shape[0]} pixels, its annotation says "
                             f"{record.width}x{record.height}: correct the file or its <size>")
        return image

    def __getitem__(self, key):
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        record, cache = self.records[index], self.cache
        load = functools.partial(self.load, record)
        image = load() if cache is None else cache.read(index, record, load)
        # One generator for all steps: Compose(seed=...) would give each step the same stream, all their coins equal.
        rng = np.random.default_rng((self.seed, epoch, index))
        self.transform.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        out = self.transform(image=image, bboxes=record.boxes, rows=np.arange(len(record.labels)))
        rows = np.asarray(out["rows"], dtype=np.int64).reshape(-1)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(out["image"].transpose(2, 0, 1))),
            "boxes": torch.from_numpy(np.asarray(out["bboxes"], dtype=np.float32).reshape(-1, 4)),
            "labels": torch.from_numpy(record.labels[rows]),
            "difficult": torch.from_numpy(record.difficult[rows]),
            "index": index,
        }


def collate(samples):
    """Stack samples: images (B, 3, H, W), gt_boxes (B, G, 4), gt_labels and gt_difficult (B, G), indices (B,).

    G is the largest count in the batch and may be 0; shorter lists are padded with label 0.
    """
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "images": torch.stack([s["image"] for s in samples]),
        "gt_boxes": pad([s["boxes"] for s in samples]),
        "gt_labels": pad([s["labels"] for s in samples]),
        "gt_difficult": pad([s["difficult"] for s in samples]),
        "indices": torch.tensor([s["index"] for s in samples]),
    }


class EpochBatchSampler(torch.utils.data.Sampler):
    """Yield batches of (index, epoch) in an order that depends on (seed, epoch) alone; set `epoch` before use.

    The last, smaller batch is dropped (batch norm, static shapes) unless it is the only one. Of several processes
    each yields its part of the same batches: every world-th image from its rank on. `first` is the batch to begin
    with: a resumed epoch needs nothing else, no generator of the loader or its processes has a say.
    """

    def __init__(self, num_samples, batch_size, seed=0, rank=0, world=1):
        self.num_samples, self.batch_size, self.seed = num_samples, min(batch_size, num_samples), seed
        self.rank, self.world, self.epoch, self.first = rank, world, 0, 0
        if self.batch_size % world:
            raise InputError(f"a batch of {self.batch_size} images cannot be shared by {world} processes: set "
                             "--batch-size to a multiple of them")

    def __len__(self):
        return self.num_samples // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples).tolist()
        for start in range(self.first * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield [(i, self.epoch) for i in order[start + self.rank : start + self.batch_size : self.world]]


def _init_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends the run
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def make_loader(dataset, *, batch_size=1, workers=0, pin_memory=False, sampler=None, share=None):
    """Return a DataLoader: in order for evaluation, complete or a share (indices), by an EpochBatchSampler to train."""
    how = {"batch_sampler": sampler} if sampler is not None else {"batch_size": batch_size, "sampler": share}
    how["generator"] = torch.Generator()  # else each pass would draw from torch's global one
    if workers:
        how.update(persistent_workers=True, prefetch_factor=4, worker_init_fn=_init_worker)
        how.update({"multiprocessing_context": "fork"} if getattr(dataset, "cache", None) else {})  # else not shared
    return torch.utils.data.DataLoader(dataset, num_workers=workers, collate_fn=collate, pin_memory=pin_memory, **how)


# ---- 6. Augmentation ----


class _BoxGeometry(A.DualTransform):
    """A transform of image and boxes by the parameters that get_params_dependent_on_data draws."""

    _targets = (A.core.type_definitions.Targets.IMAGE, A.core.type_definitions.Targets.BBOXES)


class SSDZoomOut(_BoxGeometry):
    """Place the picture at random on a canvas up to max_ratio times larger, of the mean colour (SSD section 3.6).

    Picture and canvas are shrunk together where the canvas would have more than twice the network's resolution,
    which saves half the pipeline's time.
    """

    # Differs from paper: its canvas keeps the picture's resolution; and there the photometric steps come first.

    def __init__(self, max_ratio=4.0, p=0.5):
        super().__init__(p=p)
        self.max_ratio, self.fill = max_ratio, [round(255 * m) for m in IMAGENET_MEAN]

    def get_params_dependent_on_data(self, params, data):
        height, width = params["shape"][:2]
        ratio = self.py_random.uniform(1, self.max_ratio)
        scale = min(1.0, 2 * IMAGE_SIZE / (ratio * max(height, width)))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        canvas = (max(size[0], round(height * ratio * scale)), max(size[1], round(width * ratio * scale)))
        corner = tuple(self.py_random.randint(0, c - s) for c, s in zip(canvas, size, strict=True))
        return {"canvas": canvas, "size": size, "corner": corner}

    def apply(self, img, canvas, size, corner, **params):
        img = img if size == img.shape[:2] else cv2.resize(img, size[::-1], interpolation=cv2.INTER_AREA)
        (top, left), (bottom, right) = corner, np.subtract(canvas, size) - corner
        return cv2.copyMakeBorder(img, top, int(bottom), left, int(right), cv2.BORDER_CONSTANT, value=self.fill)

    def apply_to_bboxes(self, bboxes, canvas, size, corner, **params):
        out = bboxes.copy()
        for axis in (0, 1):  # y, x
            columns = [1 - axis, 3 - axis]
            out[:, columns] = ((bboxes[:, columns] * size[axis] + corner[axis]) / canvas[axis]).clip(0, 1)
        return out


class SSDCrop(_BoxGeometry):
    """Cut out a random patch (SSD section 2.2, "Data augmentation").

    One of seven choices, equally likely: the whole picture; a patch whose IoU with at least one object is no less
    than .1, .3, .5, .7 or .9; any patch. A patch has .3 to 1 of each side and an aspect ratio of .5 to 2, and must
    hold the centre of at least one object, else another is drawn, `trials` times; then the picture stays whole.
    Objects whose centre is inside are kept, clipped to the patch. A picture without objects takes any patch.
    """

    min_ious = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)  # None: the whole picture

    def __init__(self, min_scale=0.3, trials=50, p=1.0):
        super().__init__(p=p)
        self.min_scale, self.trials = min_scale, trials

    def get_params_dependent_on_data(self, params, data):
        height, width = params["shape"][:2]
        min_iou = self.py_random.choice(self.min_ious)
        boxes = np.asarray(data["bboxes"], dtype=np.float64)[:, :4].reshape(-1, 4) * [width, height, width, height]
        if min_iou is None:
            return {"patch": np.array([0, 0, width, height])}
        drawn = self.random_generator.random((self.trials, 4))
        size = np.maximum(1, np.round([width, height] * (self.min_scale + (1 - self.min_scale) * drawn[:, :2])))
        corner = np.floor(([width, height] - size + 1) * drawn[:, 2:])
        patches, aspect = np.concatenate((corner, corner + size), axis=1), size[:, 0] / size[:, 1]
        fits = (aspect >= 0.5) & (aspect <= 2)
        if len(boxes):
            fits &= self.centre_inside(boxes, patches[:, None]).any(axis=1)
            fits &= self.iou(boxes, patches[:, None]).max(axis=1) >= min_iou
        return {"patch": patches[fits.argmax()].astype(int) if fits.any() else np.array([0, 0, width, height])}

    @staticmethod
    def centre_inside(boxes, patch):
        """Whether each box (G, 4) has its centre strictly inside a patch (4,) or (N, 1, 4); bool (G,) or (N, G)."""
        centre = (boxes[:, :2] + boxes[:, 2:4]) / 2
        return ((centre > patch[..., :2]) & (centre < patch[..., 2:])).all(axis=-1)

    @staticmethod
    def iou(boxes, patch):
        """IoU of each box (G, 4) with a patch (4,) or (N, 1, 4); float (G,) or (N, G)."""
        sides = np.minimum(boxes[:, 2:4], patch[..., 2:]) - np.maximum(boxes[:, :2], patch[..., :2])
        shared = sides.clip(min=0).prod(axis=-1)
        area = (patch[..., 2:] - patch[..., :2]).prod(axis=-1)
        return shared / ((boxes[:, 2:4] - boxes[:, :2]).prod(axis=1) + area - shared)

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

    def __init__(self, std_range, p=0.5):
        super().__init__(p=p)
        self.std_range = std_range
        self.table = np.random.default_rng(0).standard_normal(2**21, dtype=np.float32)

    def get_params_dependent_on_data(self, params, data):
        start = self.py_random.randrange(len(self.table) - math.prod(params["shape"]) + 1)
        return {"start": start, "std": 255 * self.py_random.uniform(*self.std_range)}

    def apply(self, img, start, std, **params):
        noise = self.table[start : start + img.size].reshape(img.shape)
        return cv2.addWeighted(img, 1.0, noise, std, 0.0, dtype=cv2.CV_8U)


def resize_transform():
    """Return the resize of training, evaluation and inference: area averaging to shrink, linear to enlarge."""
    return A.Resize(IMAGE_SIZE, IMAGE_SIZE, interpolation=cv2.INTER_LINEAR, area_for_downscale="image")


def build_transform(*, train, zoom_out=0.5, crop=1.0, color=0.5, shadow=0.2, noise=0.2, blur=0.1):
    """Return the albumentations pipeline; the numbers are the probabilities of its steps (resize only if not train).

    The geometry comes first and ends at 300x300, so that the photometric steps see few pixels. Brightness within
    +-32/255, contrast and saturation .5 to 1.5, hue +-18 degrees, each at probability `color` (SSD section 2.2).
    """
    options = {"clip": True} if not train else {"check_each_transform": False}  # the steps keep boxes in [0, 1]
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
        A.HueSaturationValue(hue_shift_limit=9, sat_shift_limit=0, val_shift_limit=0, p=color),  # 2 degrees each
        Shadow(shadow_roi=(0, 0, 1, 1), num_shadows_limit=(1, 2), shadow_intensity_range=(0.3, 0.6), p=shadow),
        Noise(std_range=(0.01, 0.05), p=noise),  # 2.5 to 13 of 255: a camera in poor light
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.2), p=blur),
    ]
    return A.Compose(steps, bbox_params=bbox_params)


# ---- 7. Model ----


class L2Norm(nn.Module):
    """Divide each pixel's channel vector by its length and multiply by a learned scale per channel (ParseNet Eq. 1)."""

    def __init__(self, num_channels, scale=L2_NORM_SCALE):
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_channels,), scale))

    def forward(self, x):
        # In float32 under autocast: the sum of 512 squares leaves half precision's range.
        return F.normalize(x.float(), dim=1).mul(self.weight[:, None, None]).to(x.dtype)


def _conv(c_in, c_out, kernel=3, *, stride=1, padding=None, batch_norm=False):
    """Return the layers convolution, batch norm if asked for, ReLU; padding keeps the size unless given."""
    padding = kernel // 2 if padding is None else padding
    layers = [nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=padding)]
    return [*layers, *([nn.BatchNorm2d(c_out)] if batch_norm else []), nn.ReLU(inplace=True)]


class SSD300(nn.Module):
    """SSD300 with a VGG16 backbone (SSD section 3): feature maps of 37, 18, 18, 9, 5 and 2 cells a side.

    forward(images): images (B, 3, 300, 300) RGB, uint8 or float in 0..255, normalised inside. Returns float32
    cls_logits (B, A, K + 1), class 0 is background, and box_deltas (B, A, 4), what `encode` makes of boxes.

    num_classes counts foreground classes; width multiplies every channel count (1.0: the paper's); batch_norm puts
    one behind every convolution but the heads'; prior_prob sets the heads' first foreground probability (focal loss
    section 4.1, spread over the classes of a softmax), None leaves the bias at zero. anchor_sizes: see `make_anchors`.
    Raises ValueError for images of another shape.
    """

    # Differs from paper: maps of 37, 18, 18, 9, 5, 2 cells with 9,966 anchors (SSD: 38, 19, 10, 5, 3, 1 with 8,732):
    # VGG's pooling rounds down, conv5_3 feeds a head of its own, fc6 is not dilated, nothing pools before it.

    def __init__(self, num_classes, *, width=1.0, batch_norm=False, prior_prob=None, anchor_sizes=ANCHOR_SIZES):
        super().__init__()
        self.num_classes = num_classes
        ch = functools.partial(self.channels, width=width)
        conv = functools.partial(_conv, batch_norm=batch_norm)
        self.blocks, c_in = nn.ModuleList(), 3
        for block in VGG16_BLOCKS:
            layers = []
            for c_out in map(ch, block):
                layers, c_in = layers + conv(c_in, c_out), c_out
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
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).mul(255).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).mul(255).view(1, 3, 1, 1))
        self.frozen_blocks = 0
        self._initialise(prior_prob)

    @staticmethod
    def channels(full, width):
        """Return a channel count at a width: a multiple of 8, at least 8."""
        return max(8, round(full * width / 8) * 8)

    def _initialise(self, prior_prob):
        heads = {*self.cls_heads, *self.box_heads}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module in heads:
                    nn.init.normal_(module.weight, std=0.01)
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        if prior_prob is not None:
            background = math.log((1 - prior_prob) / prior_prob * self.num_classes)
            for head in self.cls_heads:
                with torch.no_grad():
                    head.bias.view(-1, self.num_classes + 1)[:, 0] = background

    def freeze_blocks(self, count):
        """Keep the first `count` of the five VGG blocks as they are: no gradient, batch norm in evaluation mode."""
        self.frozen_blocks = count
        self.blocks[:count].requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        self.blocks[: self.frozen_blocks].eval()
        return self

    def feature_maps(self, x):
        """Return the six maps, finest first, of normalised images (B, 3, 300, 300)."""
        for block in self.blocks[:4]:
            x = block(x if x.shape[1] == 3 else F.max_pool2d(x, 2))
        maps = [self.l2_norm(x)]
        maps.append(self.blocks[4](F.max_pool2d(x, 2)))
        maps.append(self.fc(maps[-1]))
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return maps

    def forward(self, images):
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images must be (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {tuple(images.shape)}")
        maps = self.feature_maps((images.float() - self.mean) / self.std)
        outputs = []
        for heads, last in ((self.cls_heads, self.num_classes + 1), (self.box_heads, 4)):
            flat = [h(m).permute(0, 2, 3, 1).reshape(m.shape[0], -1, last) for h, m in zip(heads, maps, strict=True)]
            outputs.append(torch.cat(flat, dim=1).float())
        return tuple(outputs)


def load_tensors(path, what):
    """Return what torch.save wrote into a file, as data only; raises InputError if it is missing or something else.

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


def load_backbone(model, state):
    """Copy ImageNet weights, the state dict of torchvision's vgg16 or vgg16_bn, into a full-width SSD300.

    The convolutions are copied; fc6 (4096, 512, 7, 7) and fc7 (4096, 4096) are decimated: every fourth output and
    input, rows and columns 0, 3, 6 (DeepLab, arXiv:1412.7062; SSD section 3). With batch norm fc6 and fc7 start
    from the same weights. Raises InputError if a weight is missing or of another shape.
    """
    own = {k: v for k, v in model.blocks.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in state.items() if k.startswith("features.") and not k.endswith("num_batches_tracked")}
    if [v.shape for v in own.values()] != [v.shape for v in given.values()]:
        raise InputError(
            f"the backbone weights do not fit: this network's VGG blocks have {len(own)} tensors, the file has "
            f"{len(given)} named features.*; take torchvision's vgg16, or vgg16_bn with --batch-norm"
        )
    try:
        fc6 = state["classifier.0.weight"].view(4096, 512, 7, 7)[::4, :, ::3, ::3], state["classifier.0.bias"][::4]
        fc7 = state["classifier.3.weight"][::4, ::4, None, None], state["classifier.3.bias"][::4]
    except KeyError as error:
        raise InputError(f"the backbone weights lack {error}: take IMAGENET1K_V1, which has the classifier") from None
    with torch.no_grad():
        for target, source in zip(own.values(), given.values(), strict=True):
            target.copy_(source)
        convs = [m for m in model.fc if isinstance(m, nn.Conv2d)]
        for layer, (weight, bias) in zip(convs, (fc6, fc7), strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)


def fetch_backbone(path=None, *, batch_norm=False):
    """Return the state dict of ImageNet VGG16 weights: from a file, or fetched through torchvision and cached."""
    if path is not None:
        return load_tensors(path, "backbone weights")
    models = torchvision.models
    weights = models.VGG16_BN_Weights.IMAGENET1K_V1 if batch_norm else models.VGG16_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"the ImageNet VGG16 weights could not be fetched from {weights.url} ({error}): give that file with "
            "--backbone-weights FILE, or train from scratch with --no-pretrained"
        ) from None


def autocast(device, amp_dtype):
    """Return the autocast context of a dtype; for None it does nothing."""
    return torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)


def compile_model(model, images, amp_dtype=None, mode=None):
    """Return model compiled for batches of the shape of images (B, 3, H, W); where that fails, one warning and model.

    mode: of torch.compile. A trial step pays for forward and backward now. Weights, gradients and batch norm's
    statistics stay as they were.
    """
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        compiled = torch.compile(model, dynamic=False, mode=mode)
        with autocast(images.device, amp_dtype):
            sum(output.sum() for output in compiled(images)).backward()
        return compiled
    except Exception as error:  # of the compiler, of the C++ or Triton behind it
        problem = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        print(f"warning: not compiled, and so slower: {problem}", file=sys.stderr)
        return model
    finally:
        model.zero_grad(set_to_none=True)
        for buffer, value in saved:
            buffer.copy_(value)


def to_device(batch, device):
    """Copy a collated batch to a device without waiting for it; images in channels_last order but on a CPU."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if torch.device(device).type != "cpu":  # there the order of the weights decides
        moved["images"] = moved["images"].contiguous(memory_format=torch.channels_last)
    return moved


# ---- 8. Losses ----


def focal_loss(cls_logits, labels, *, alpha=-1.0, gamma=FOCAL_GAMMA):
    """Return -alpha_t (1 - p_t)^gamma log(p_t) per anchor, p a softmax (Focal loss Eq. 5).

    cls_logits (..., K + 1); labels (...) int64, 0 is background. alpha weighs objects and 1 - alpha background,
    -1 weighs neither; gamma 0 and alpha -1 is the cross-entropy. Returns (...).
    """
    # Differs from paper: a softmax over K + 1 classes in place of K sigmoids.
    log_pt = F.log_softmax(cls_logits.float(), dim=-1).gather(-1, labels[..., None])[..., 0]
    loss = -((1 - log_pt.exp()).clamp(min=1e-8) ** gamma) * log_pt  # clamp: the slope of 0 ** gamma is NaN below 1
    if alpha < 0:
        return loss
    return torch.where(labels > 0, alpha, 1 - alpha) * loss


def mined_cross_entropy(cls_logits, labels, *, negatives_per_positive=3):
    """Return the cross-entropy per anchor (B, A), zero but at the positives and each image's hardest negatives.

    An image keeps three negatives a positive (SSD section 2.2, "Hard negative mining"), ranked by their loss.
    """
    # Differs from paper: an image without objects keeps three negatives, so that it teaches background.
    logits, is_positive, is_free = cls_logits.float(), labels > 0, counting_is_free(labels)
    budget = negatives_per_positive * is_positive.sum(dim=1, keepdim=True).clamp(min=1)
    with torch.no_grad():  # a negative's loss is the logarithm of 1 + this; image by image it stays in the cache
        parts = [(x[..., 1:] - x[..., :1]).exp_().sum(dim=-1) for x in logits.split(1 if is_free else len(logits))]
        hardness = torch.cat(parts).masked_fill_(is_positive, -1.0)
        count = min(int(budget.max()), labels.shape[1]) if is_free else labels.shape[1]
        order = hardness.topk(count, dim=1).indices
        is_hard = torch.arange(count, device=labels.device) < budget
        chosen = is_positive | torch.zeros_like(is_positive).scatter_(1, order, is_hard)
    if is_free:  # few anchors have a loss
        rows = chosen.view(-1).nonzero()[:, 0]
        kept = F.cross_entropy(logits.flatten(0, 1)[rows], labels.view(-1)[rows], reduction="none")
        return torch.zeros_like(logits[..., 0]).masked_scatter(chosen, kept)
    return F.cross_entropy(logits.flatten(0, 1), labels.view(-1), reduction="none").view_as(labels) * chosen


def average_over_processes(value):
    """Return the mean of a float tensor, changed in place, over torchrun's processes; itself if there is only one."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


def detection_loss(outputs, targets, *, loss="focal", alpha=-1.0, gamma=FOCAL_GAMMA, cls_weight=1.0,
                   box_weight=1.0):
    """Return {"loss", "loss_cls", "loss_box"}: scalars, sums over the batch divided by its number of positives.

    outputs: cls_logits (B, A, K + 1), box_deltas (B, A, 4); targets: labels (B, A), box targets (B, A, 4). The box
    loss is smooth-L1 over positives (SSD Eq. 1 and 2). The divisor is at least B: a batch without an object has a
    finite, moderate loss. Under torchrun the positives are those of all processes, so that the mean of their gradients
    is that of one process with the whole batch. Nothing here waits for the device.
    """
    (cls_logits, box_deltas), (labels, box_targets) = outputs, targets
    is_positive = labels > 0
    # Differs from paper: its loss of a batch without objects is 0, and of one with few it is large.
    positives = is_positive.sum()
    if torch.is_grad_enabled():  # the mean over processes, as their gradients are; evaluation has unequal batches
        positives = average_over_processes(positives.float())
    divisor = positives.clamp(min=len(labels))
    if loss == "focal":
        per_anchor = focal_loss(cls_logits, labels, alpha=alpha, gamma=gamma)
    else:
        per_anchor = mined_cross_entropy(cls_logits, labels)
    if counting_is_free(labels):
        box = F.smooth_l1_loss(box_deltas[is_positive], box_targets[is_positive], reduction="sum")
    else:
        box = (F.smooth_l1_loss(box_deltas, box_targets, reduction="none").sum(dim=-1) * is_positive).sum()
    loss_cls, loss_box = cls_weight * per_anchor.sum() / divisor, box_weight * box / divisor
    return {"loss": loss_cls + loss_box, "loss_cls": loss_cls, "loss_box": loss_box}


# ---- 9. Detection ----


@torch.no_grad()
def detect(
    cls_logits, box_deltas, anchors, *,
    score_thresh=SCORE_THRESH, nms_iou_thresh=NMS_IOU_THRESH, max_detections=MAX_DETECTIONS,
):
    """Turn raw outputs into detections: a list of B triples boxes (D, 4), labels (D,) 1..K, scores (D,), best first.

    cls_logits (B, A, K + 1), box_deltas (B, A, 4), anchors_cxcywh (A, 4). Boxes are normalised xyxy cut at the
    picture's border. Per class the best 1,000 at or above score_thresh, a number or a tensor (K,), go through NMS,
    over all classes the best max_detections stay (SSD section 2.2), None: all. D may be 0.
    """
    scores = F.softmax(cls_logits.float(), dim=-1)[..., 1:]
    boxes = decode(box_deltas.float(), anchors).clamp(0, 1)
    results = []
    for image_boxes, image_scores in zip(boxes, scores, strict=True):
        chosen = image_scores >= score_thresh
        if chosen.sum(dim=0).amax() > PRE_NMS_TOP_K:
            best = image_scores.topk(PRE_NMS_TOP_K, dim=0).indices
            chosen &= torch.zeros_like(chosen).scatter_(0, best, True)
        anchor, label = chosen.nonzero(as_tuple=True)
        score, order = image_scores[anchor, label].sort(descending=True, stable=True)
        candidates, label = image_boxes[anchor[order]], label[order] + 1
        whole = (candidates[:, 2:] > candidates[:, :2]).all(dim=1)  # cutting may leave no area
        candidates, score, label = candidates[whole], score[whole], label[whole]
        few = len(score) if max_detections is None else 5 * max_detections
        for count in (few, len(score)):  # mostly the best few are enough: NMS never looks down the list
            keep = batched_nms(candidates[:count], score[:count], label[:count], nms_iou_thresh)[:max_detections]
            if len(keep) == max_detections or count >= len(score):
                break
        results.append((candidates[keep], label[keep], score[keep]))
    return results


# Flips of a picture (dimensions of its tensor that are reversed) whose outputs are averaged with its own.
FLIPS = {"off": (), "horizontal": ((3,),), "both": ((3,), (2,), (2, 3))}


def average_with_flips(model, images, outputs, flips):
    """Return a model's outputs for images averaged with those for their flips, FLIPS[flips]: probabilities and offsets.

    Raises ValueError for a name that is not in FLIPS.
    """
    if flips not in FLIPS:
        raise ValueError(f"flip_average must be one of {', '.join(FLIPS)}, not {flips!r}")
    if not FLIPS[flips]:
        return outputs

    def unflipped(values, dims):  # (B, A, n): the cells of each map in the order of the picture
        maps = values.split([c * c * n for c, n in zip(FEATURE_MAPS, model.anchors_per_cell, strict=True)], dim=1)
        cells = (part.view(len(part), c, c, -1, part.shape[-1]) for part, c in zip(maps, FEATURE_MAPS, strict=True))
        return torch.cat([part.flip([d - 1 for d in dims]).flatten(1, 3) for part in cells], dim=1)

    scores, offsets = F.softmax(outputs[0], dim=-1), outputs[1]
    for dims in FLIPS[flips]:
        cls_logits, box_deltas = model(images.flip(dims))
        signs = box_deltas.new_tensor([-1 if 3 in dims else 1, -1 if 2 in dims else 1, 1, 1])  # of cx, cy, w, h
        scores = scores + F.softmax(unflipped(cls_logits, dims), dim=-1)
        offsets = offsets + unflipped(box_deltas, dims) * signs
    return scores.div(1 + len(FLIPS[flips])).log(), offsets / (1 + len(FLIPS[flips]))


# ---- 10. Evaluation ----


# The devkit's 0:0.1:1, which MATLAB counts up from 0 and down from 1: its fourth value is 3 * .1, just above .3.
ELEVEN_RECALLS = np.concatenate((np.arange(6) * 0.1, 1 - np.arange(5)[::-1] * 0.1))
COCO_IOU_THRESHES = np.linspace(0.5, 0.95, 10)
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}  # pixels
COCO_MAX_DETECTIONS = 100  # an image and class


def average_precision(recall, precision):
    """Return (area, 11-point) average precision of a curve: recall (N,) rising, precision (N,); N may be 0.

    Area: under the precision made monotone from the right (VOC 2010 on). 11-point: the mean over recall 0, .1, ...,
    1 of the best precision at that recall or more (VOC 2007; Everingham et al. 2010, Eq. 1 and 2).
    """
    envelope = np.maximum.accumulate(np.concatenate((precision, [0.0]))[::-1])[::-1]
    area = float(np.sum(np.diff(np.concatenate(([0.0], recall))) * envelope[:-1]))
    return area, float(envelope[np.searchsorted(recall, ELEVEN_RECALLS)].mean())


def check_detections(detections, truth, num_classes):
    """Return (det, gt), the dicts that `evaluate_voc` takes as arrays of fixed types, each with "keys".

    A key is one integer an image and class. Raises ValueError for columns of different length, a label outside 1..K,
    a score that is NaN, or a box that is not finite.
    """
    columns = {"image_ids": None, "labels": np.int64, "scores": np.float64, "boxes_px": np.float64, "difficult": bool}
    sides = []
    for name, given in (("detections", detections), ("truth", truth)):
        side = {k: np.asarray(given[k], dtype=t) for k, t in columns.items() if k in given}
        side["boxes_px"] = side["boxes_px"].reshape(-1, 4)
        if len({len(column) for column in side.values()}) > 1:
            raise ValueError(f"{name}: columns of different length: { {k: len(v) for k, v in side.items()} }")
        wrong = {"labels": (side["labels"] < 1) | (side["labels"] > num_classes),
                 "scores": np.isnan(side.get("scores", 0.0)), "boxes_px": ~np.isfinite(side["boxes_px"]).all(axis=1)}
        for column, what in (("labels", f"outside 1..{num_classes}"), ("scores", "NaN"), ("boxes_px", "not finite")):
            if wrong[column].any():
                row = int(wrong[column].argmax())
                count, value = int(wrong[column].sum()), side[column][row]
                raise ValueError(f"{name}: {count} {column} {what}, the first in row {row}: {value}")
        sides.append(side)
    det, gt = sides
    image = np.unique(np.concatenate((gt["image_ids"], det["image_ids"])), return_inverse=True)[1]
    for side, rows in ((gt, image[: len(gt["labels"])]), (det, image[len(gt["labels"]) :])):
        side["keys"] = rows * (num_classes + 1) + side["labels"]
    return det, gt


def overlap_pairs(det_keys, det_boxes, gt_keys, gt_boxes, *, extra=0.0, is_crowd=None):
    """Return (det, gt, iou), each (P,): rows and IoU of every detection and ground truth of one key that overlap.

    Boxes (N, 4) and (M, 4): xyxy; `extra` is added to every side, 1 where boxes are pixels with corners included. In
    the order of detections, then ground truths. What lies on a crowd, bool (M,), is shared by the detection's own area.
    """
    order = np.argsort(gt_keys, kind="stable")
    first = np.searchsorted(gt_keys[order], det_keys, side="left")
    count = np.searchsorted(gt_keys[order], det_keys, side="right") - first
    det = np.repeat(np.arange(len(det_keys)), count)  # one row a pair
    offset = np.arange(len(det)) - np.repeat(np.cumsum(count) - count, count)
    gt = order[np.repeat(first, count) + offset]
    a, b = det_boxes[det], gt_boxes[gt]
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]) + extra
    rows = np.flatnonzero((sides > 0).all(axis=1))
    det, gt, a, b, shared = det[rows], gt[rows], a[rows], b[rows], sides[rows].prod(axis=1)
    det_area, gt_area = ((box[:, 2:] - box[:, :2] + extra).prod(axis=1) for box in (a, b))
    rest = gt_area - shared if is_crowd is None else np.where(is_crowd[gt], 0.0, gt_area - shared)
    return det, gt, shared / (det_area + rest)


def assign_voc(det, gt, iou_thresh=0.5):
    """Return is_hit and is_ignored, bool (N,), by the rules of `evaluate_voc`; what is neither is false.

    det, gt: what `check_detections` returns, det in score order.
    """
    rows, targets, iou = overlap_pairs(det["keys"], det["boxes_px"], gt["keys"], gt["boxes_px"], extra=1)
    best = np.lexsort((targets, -iou, rows))
    best = best[np.unique(rows[best], return_index=True)[1]]
    best = best[iou[best] >= iou_thresh]
    is_hit, is_ignored = np.zeros((2, len(det["keys"])), dtype=bool)
    is_ignored[rows[best]] = gt["difficult"][targets[best]]
    best = best[~gt["difficult"][targets[best]]]
    is_hit[rows[best[np.unique(targets[best], return_index=True)[1]]]] = True
    return is_hit, is_ignored


def evaluate_voc(detections, truth, num_classes, iou_thresh=0.5):
    """Score detections by the VOC2007 devkit's rules: {label: {"ap_area", "ap11", "recall", "precision", ...}}.

    detections: {"image_ids" (N,), "labels" (N,) 1..K, "scores" (N,), "boxes_px" (N, 4)}; truth: {"image_ids" (M,),
    "labels" (M,), "boxes_px" (M, 4), "difficult" (M,) bool}. Boxes are VOC pixels: 1-based, corners included; they may
    reach beyond the picture, and one without area overlaps nothing. Rows of one image id are one image. In score
    order (ties: as given) a detection takes the ground truth of its image and class that it overlaps most (ties: the
    first); at IoU >= iou_thresh it is a hit the first time and false after that, a difficult one counts neither way.
    recall, precision and scores are arrays along that order, num_gt counts what is not difficult. A class without
    such ground truth has NaN for both APs. Raises ValueError for what `check_detections` names.
    """
    det, gt = check_detections(detections, truth, num_classes)
    order = np.argsort(-det["scores"], kind="stable")
    det = {name: column[order] for name, column in det.items()}
    labels, scores = det["labels"], det["scores"]
    is_hit, is_ignored = assign_voc(det, gt, iou_thresh)
    results = {}
    for label in range(1, num_classes + 1):
        counted = np.flatnonzero((labels == label) & ~is_ignored)
        hits = is_hit[counted].cumsum()
        num_gt = int(((gt["labels"] == label) & ~gt["difficult"]).sum())
        recall, precision = hits / max(num_gt, 1), hits / np.arange(1, len(hits) + 1)
        ap_area, ap11 = average_precision(recall, precision) if num_gt else (math.nan, math.nan)
        results[label] = {"ap_area": ap_area, "ap11": ap11, "recall": recall, "precision": precision,
                          "scores": scores[counted], "num_gt": num_gt}
    return results


def f1_curve(row):
    """Return (scores, F1) of a class of `evaluate_voc`: F1 of what scores at least that, a point a score."""
    last = np.flatnonzero(np.diff(row["scores"], append=-np.inf))
    precision, recall = row["precision"][last], row["recall"][last]
    return row["scores"][last], 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def best_f1(row):
    """Return {"score_thresh", "f1", "precision", "recall"} where F1 is largest (ties: the highest score).

    All NaN for a class without objects or detections.
    """
    if not row["num_gt"] or not len(row["scores"]):
        return dict.fromkeys(("score_thresh", "f1", "precision", "recall"), math.nan)
    scores, f1 = f1_curve(row)
    best = int(f1.argmax())
    place = np.flatnonzero(row["scores"] >= scores[best])[-1]
    return {"score_thresh": float(scores[best]), "f1": float(f1[best]), "precision": float(row["precision"][place]),
            "recall": float(row["recall"][place])}


def advise_thresholds(classes, class_names):
    """Return {name: the score threshold of the best F1} of what `evaluate_voc` returns, where there is one."""
    best = {name: best_f1(classes[label])["score_thresh"] for label, name in enumerate(class_names, start=1)}
    return {name: thresh for name, thresh in best.items() if not math.isnan(thresh)}


def match_coco(pairs, rank, gt_ignored, is_crowd):
    """Return is_matched and is_ignored, bool (N, areas, thresholds): COCO's greedy assignment at every setting at once.

    pairs: what `overlap_pairs` returns; rank (N,): a detection's place in the score order of its image and class.
    gt_ignored (M, areas). In that order a detection takes the free ground truth it overlaps most (ties: the last),
    an ignored one only if no other is left; a crowd stays free. The loop goes over ranks, all images side by side.
    """
    det, gt, iou = (column[pairs[2] >= COCO_IOU_THRESHES[0]] for column in pairs)
    order = np.lexsort((gt, iou, det, rank[det]))
    det, gt, iou = det[order], gt[order], iou[order]
    shape = (gt_ignored.shape[1], len(COCO_IOU_THRESHES))
    is_matched, is_ignored = np.zeros((2, len(rank), *shape), dtype=bool)
    is_taken, area = np.zeros((len(is_crowd), *shape), dtype=bool), np.arange(shape[0])[None, :, None]
    ends = np.searchsorted(rank[det], np.arange(COCO_MAX_DETECTIONS + 1))
    for start, end in itertools.pairwise(ends.tolist()):
        if start == end:
            continue
        d, g = det[start:end], gt[start:end]
        is_open = (iou[start:end, None, None] >= COCO_IOU_THRESHES) & ~is_taken[g]
        key = np.arange(end - start)[:, None, None] + (end - start) * ~gt_ignored[g][..., None]
        firsts = np.flatnonzero(np.diff(d, prepend=-1))
        best = np.maximum.reduceat(np.where(is_open, key, -1), firsts, axis=0)
        chosen, found = g[best % (end - start)], best >= 0
        is_matched[d[firsts]], is_ignored[d[firsts]] = found, found & gt_ignored[chosen, area]
        row, *setting = np.nonzero(found & ~is_crowd[chosen])
        is_taken[chosen[(row, *setting)], *setting] = True
    return is_matched, is_ignored


def evaluate_coco(detections, truth, num_classes):
    """Score detections as pycocotools does; the arguments are those of `evaluate_voc`, difficult objects are crowds.

    Returns {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small",
    "ar_medium", "ar_large", "per_class": {label: {"ap", "ap50", "ap75"}}}; NaN where there is no ground truth. AP is
    the mean over IoU .5, .55, ..., .95 of the mean precision at 101 recalls, AR the mean recall; at most 100
    detections an image and class (1 and 10 for ar1 and ar10), ties in the order of image ids, then as given.
    """
    det, gt = check_detections(detections, truth, num_classes)
    det_boxes, gt_boxes = (side["boxes_px"] - np.array([1, 1, 0, 0]) for side in (det, gt))  # edges
    order = np.lexsort((-det["scores"], det["keys"]))
    keys = det["keys"][order]
    rank = np.arange(len(order)) - np.searchsorted(keys, keys)
    order, rank = order[rank < COCO_MAX_DETECTIONS], rank[rank < COCO_MAX_DETECTIONS]
    keys, det_boxes, labels, scores = det["keys"][order], det_boxes[order], det["labels"][order], det["scores"][order]
    det_area, gt_area = ((b[:, 2:] - b[:, :2]).prod(axis=1)[:, None] for b in (det_boxes, gt_boxes))
    low, high = np.array(list(COCO_AREAS.values())).T
    gt_ignored = gt["difficult"][:, None] | (gt_area < low) | (gt_area > high)
    pairs = overlap_pairs(keys, det_boxes, gt["keys"], gt_boxes, is_crowd=gt["difficult"])
    is_matched, is_ignored = match_coco(pairs, rank, gt_ignored, gt["difficult"])
    is_ignored |= ~is_matched & ((det_area < low) | (det_area > high))[..., None]

    precision = np.full((num_classes, *is_matched.shape[1:], len(COCO_RECALLS)), math.nan)
    recall = np.full((num_classes, 3, *is_matched.shape[1:]), math.nan)  # of the best 1, 10, 100 detections
    for k in range(num_classes):
        rows = np.flatnonzero(labels == k + 1)
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        counted, hits = ~is_ignored[rows], is_matched[rows] & ~is_ignored[rows]
        num_gt = (~gt_ignored[gt["labels"] == k + 1]).sum(axis=0)
        for a, t in itertools.product(np.flatnonzero(num_gt), range(len(COCO_IOU_THRESHES))):
            places = np.flatnonzero(hits[:, a, t])
            found = np.arange(1, len(places) + 1)
            curve = np.append(found / (counted[:, a, t].cumsum()[places] + np.spacing(1)), 0.0)
            envelope = np.maximum.accumulate(curve[::-1])[::-1]
            precision[k, a, t] = envelope[np.searchsorted(found / num_gt[a], COCO_RECALLS)]
            recall[k, :, a, t] = [np.count_nonzero(rank[rows[places]] < best) / num_gt[a] for best in (1, 10, 100)]

    def mean(values):
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else math.nan

    result = {"ap": mean(precision[:, 0]), "ap50": mean(precision[:, 0, 0]), "ap75": mean(precision[:, 0, 5])}
    result |= {f"ap{name}": mean(precision[:, a]) for a, name in enumerate(COCO_AREAS) if name}
    result |= {f"ar{best}": mean(recall[:, i, 0]) for i, best in enumerate((1, 10, 100))}
    result |= {f"ar{name}": mean(recall[:, 2, a]) for a, name in enumerate(COCO_AREAS) if name}
    classes = enumerate(precision[:, 0], start=1)
    return {**result, "per_class": {k: {"ap": mean(p), "ap50": mean(p[0]), "ap75": mean(p[5])} for k, p in classes}}


def confusion_matrix(detections, truth, num_classes, *, score_thresh=DRAW_SCORE_THRESH, iou_thresh=0.5):
    """Return int64 (K + 1, K + 1): rows are true classes, columns detected ones, 0 is background (missed, or false).

    The arguments are those of `evaluate_voc`. Of the pairs at IoU >= iou_thresh, whatever their classes, those of
    equal class go first, then the largest overlap; each box is used once. Difficult objects, and what is found on
    them, count nowhere.
    """
    det, gt = check_detections(detections, truth, num_classes)
    det = {name: column[det["scores"] >= score_thresh] for name, column in det.items()}
    images = [side["keys"] // (num_classes + 1) for side in (det, gt)]
    rows, targets, iou = overlap_pairs(images[0], det["boxes_px"], images[1], gt["boxes_px"], extra=1)
    found, taken = np.full(len(images[0]), -1), np.full(len(images[1]), -1)
    for i in np.lexsort((-iou, det["labels"][rows] != gt["labels"][targets])):
        if iou[i] >= iou_thresh and found[rows[i]] < 0 and taken[targets[i]] < 0:
            found[rows[i]], taken[targets[i]] = targets[i], rows[i]
    matrix, counts = np.zeros((num_classes + 1,) * 2, dtype=np.int64), ~gt["difficult"]
    detected = np.where(taken >= 0, np.append(det["labels"], 0)[taken], 0)
    np.add.at(matrix, (gt["labels"][counts], detected[counts]), 1)
    np.add.at(matrix[0], det["labels"][found < 0], 1)
    return matrix


def to_voc_pixels(boxes_px):
    """Return 0-based edges (N, 4) as VOC pixels, 1-based with corners included; sizes stay the same."""
    return np.asarray(boxes_px, dtype=np.float64).reshape(-1, 4) + np.array([1, 1, 0, 0])


def truth_of(records):
    """Return the ground truth of records in the form that `evaluate_voc` takes; image ids are positions."""
    return {
        "image_ids": np.repeat(np.arange(len(records)), [len(r.labels) for r in records]),
        "labels": np.concatenate([r.labels for r in records]),
        "boxes_px": to_voc_pixels(np.concatenate([r.boxes_px for r in records])),
        "difficult": np.concatenate([r.difficult for r in records]),
    }


def score_detections(detections, records, num_classes):
    """Score detections, image ids are positions in records, by the VOC rules at IoU .5; see `evaluate`."""
    classes = evaluate_voc(detections, truth_of(records), num_classes)
    aps = np.array([(c["ap_area"], c["ap11"]) for c in classes.values() if c["num_gt"]]).reshape(-1, 2)
    map_area, map11 = aps.mean(axis=0).tolist() if len(aps) else (math.nan, math.nan)
    return {"map_area": map_area, "map11": map11, "classes": classes, "detections": detections}


@torch.no_grad()
def evaluate(model, loader, *, amp_dtype=None, criterion=None, flip_average="off", **settings):
    """Run a model over a loader of a VocDataset and score it by the VOC rules at IoU .5.

    Returns {"map_area", "map11", "classes": as evaluate_voc, "detections": as it takes them}, and with a criterion
    (outputs, batch -> losses) the means "loss", "loss_cls", "loss_box". flip_average: detections, but not losses, are
    of `average_with_flips`. settings: of `detect`. Classes without ground truth are left out of the mean APs, which
    are NaN if no class has any.
    """
    model.eval()
    device, records, parts, losses = model.anchors.device, loader.dataset.records, collections.defaultdict(list), {}
    for batch in loader:
        batch = to_device(batch, device)
        with autocast(device, amp_dtype):
            outputs = model(batch["images"])
            final = average_with_flips(model, batch["images"], outputs, flip_average)
        if criterion is not None:
            for name, value in criterion(outputs, batch).items():
                losses[name] = losses.get(name, 0.0) + value.item() * len(batch["images"]) / len(records)
        found = detect(*final, model.anchors, **settings)
        for index, (boxes, labels, scores) in zip(batch["indices"].tolist(), found, strict=True):
            size = np.array([records[index].width, records[index].height] * 2)
            parts["image_ids"].append(np.full(len(labels), index))
            parts["labels"].append(labels.cpu().numpy())
            parts["scores"].append(scores.cpu().numpy())
            parts["boxes_px"].append(to_voc_pixels(boxes.cpu().numpy() * size))
    detections = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    if len(loader.sampler) < len(records):  # this process had a share of them
        shares = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, (detections, losses))
        order = np.concatenate([d["image_ids"] for d, _ in shares]).argsort(kind="stable")
        detections = {name: np.concatenate([d[name] for d, _ in shares])[order] for name in detections}
        losses = {name: sum(part[name] for _, part in shares) for name in losses}
    return {**score_detections(detections, records, model.num_classes), **losses}


def summarize(result, coco, matrix, class_names):
    """Return every number of an evaluation as plain values, classes by name: what evaluation.json holds."""
    names = list(enumerate(class_names, start=1))
    voc = {n: {key: result["classes"][k][key] for key in ("ap11", "ap_area", "num_gt")} for k, n in names}
    return {
        "voc": {"iou_thresh": 0.5, "map11": result["map11"], "map_area": result["map_area"], "per_class": voc},
        "coco": {**coco, "per_class": {name: coco["per_class"][k] for k, name in names}},
        "confusion": {"score_thresh": DRAW_SCORE_THRESH, "iou_thresh": 0.5, "classes": ["background", *class_names],
                      "matrix": matrix.tolist()},
        "num_detections": len(result["detections"]["labels"]),
    }


def class_table(result, coco, class_names):
    """Return an evaluation as text: objects that count, recall and AP of each class, then COCO's other figures."""
    def number(value, width):
        return f"{'-' if math.isnan(value) else format(value, '.4f'):>{width}}"

    width = max(10, *map(len, class_names))
    lines = [f"{'class':<{width}}  objects  recall  AP area  AP 11-point  AP .5:.95"]
    for label, name in enumerate(class_names, start=1):
        row, ap = result["classes"][label], coco["per_class"][label]["ap"]
        recall = row["recall"][-1] if len(row["recall"]) else 0.0
        values = f"{recall:7.3f} {row['ap_area']:8.4f} {row['ap11']:12.4f} {ap:10.4f}"
        lines.append(f"{name:<{width}} {row['num_gt']:8d} {values if row['num_gt'] else '  no object to find'}")
    maps = f"{number(result['map_area'], 8)} {number(result['map11'], 12)} {number(coco['ap'], 10)}"
    lines.append(f"{'mean':<{width}} {'':8} {'':7} {maps}")
    for kind in ("ap50 ap75 ap_small ap_medium ap_large", "ar1 ar10 ar100 ar_small ar_medium ar_large"):
        figures = ", ".join(f"{key[2:].strip('_')} {number(coco[key], 0)}" for key in kind.split())
        lines.append(f"COCO {kind[:2].upper()}: {figures}")
    return "\n".join(lines)


# ---- 11. Run records ----


def process_rank():
    """Return (rank, world): the number of this process among torchrun's, and how many they are; alone (0, 1)."""
    distributed = torch.distributed
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def write_atomically(path, write):
    """Call write(temporary path), flush it to disk and rename it to path: readers see the old file or the new one.

    Under torchrun the first process alone writes.
    """
    if process_rank()[0] > 0:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def to_json(content, indent=None):
    """Return JSON text; NaN, for which JSON has no word, becomes null."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda name: None), indent=indent)


def write_json(path, content):
    """Write a JSON file, whole or not at all."""
    write_text(path, to_json(content, indent=1))


def write_devkit_files(folder, split, detections, records, classes):
    """Write the devkit's comp4_det_SPLIT_CLASS.txt, one a class: image id, score and VOC pixels of every detection."""
    for label, name in enumerate(classes, start=1):
        rows = np.flatnonzero(detections["labels"] == label)
        values = np.column_stack((detections["scores"][rows], detections["boxes_px"][rows])).tolist()
        ids = [records[i].image_id for i in detections["image_ids"][rows]]
        lines = [" ".join((i, *(f"{v:.9g}" for v in row))) + "\n" for i, row in zip(ids, values, strict=True)]
        write_text(Path(folder) / f"comp4_det_{split}_{name}.txt", "".join(lines))


def read_devkit_files(folder, split, records, classes):
    """Return the detections, image ids as positions in records, of a folder of comp4_det_SPLIT_CLASS.txt files.

    Raises InputError for a class without a file (an empty one is legal) and a line that is not an image of the list
    and five finite numbers.
    """
    position, rows = {r.image_id: i for i, r in enumerate(records)}, []
    for label, name in enumerate(classes, start=1):
        path = Path(folder) / f"comp4_det_{split}_{name}.txt"
        if not path.is_file():
            raise InputError(f"{path}: no such file; each class needs one, an empty one where nothing was detected")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            image_id, *values = line.split() or [""]
            try:
                score, *box = map(float, values)
                usable = len(box) == 4 and all(map(math.isfinite, (score, *box)))
            except ValueError:
                usable = False
            if not usable or image_id not in position:
                what = "not 'image score xmin ymin xmax ymax'" if not usable else f"list {split} has no such image"
                raise InputError(f"{path}, line {number}: {line.strip()[:80]!r}: {what}")
            rows.append((position[image_id], label, score, box))
    image_ids, labels, scores, boxes_px = zip(*rows, strict=True) if rows else ((), (), (), ())
    return {"image_ids": np.array(image_ids, dtype=np.int64), "labels": np.array(labels, dtype=np.int64),
            "scores": np.array(scores, dtype=np.float64), "boxes_px": np.array(boxes_px).reshape(-1, 4)}


def save_checkpoint(path, checkpoint, previous=None):
    """Write a checkpoint: a dict of tensors and plain values, format_version first; OSError if that fails.

    previous: the name under which the file that it replaces is kept.
    """
    def write(temporary):
        with open(temporary, "wb") as file:
            try:
                torch.save({"format_version": FORMAT_VERSION, **checkpoint}, file)
            except RuntimeError as error:  # what torch makes of a failing write
                raise OSError(*(getattr(error.__context__, "args", None) or (str(error).splitlines()[0],))) from None
        if previous is not None:
            second = temporary.with_suffix(".previous.tmp")
            with contextlib.suppress(OSError):  # there is none yet, or the file system has no hard links
                os.link(path, second)
                os.replace(second, previous)  # does nothing, leaves both, where they are the same file already
            second.unlink(missing_ok=True)

    write_atomically(path, write)


def _read_checkpoint(path, resumable):
    checkpoint = load_tensors(path, "a checkpoint")
    if not isinstance(checkpoint, dict) or not {"format_version", "model", "config", "classes"} <= checkpoint.keys():
        raise InputError(f"{path}: not a checkpoint of ssd_object_detection.py (it lacks model, config or classes)")
    if checkpoint["format_version"] > FORMAT_VERSION:
        raise InputError(f"{path}: written by a newer version (format {checkpoint['format_version']})")
    if resumable and "train_state" not in checkpoint:
        raise InputError(f"{path}: holds weights but no training state; resume from a last.pth")
    if checkpoint["format_version"] == 1 and "train_state" in checkpoint:  # made at an epoch's end, torch's RNG alone
        state = checkpoint["train_state"]
        state |= {"totals": {}, "rng": {"torch": state["rng"]}}
    return checkpoint


def load_checkpoint(path, *, resumable=False):
    """Return a checkpoint's dict, one of an older format brought up to date.

    Raises InputError if the file is missing, damaged or no checkpoint of this module (resumable: of a run to go on
    with), and names the newest good one beside it.
    """
    try:
        return _read_checkpoint(path, resumable)
    except InputError as error:
        others = [p for p in Path(path).parent.glob("*.pth") if p.is_file() and p != Path(path)]
        for other in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True):
            with contextlib.suppress(InputError):
                _read_checkpoint(other, resumable)
                error = InputError(f"{error}; the newest good one there is {other}")
                break
        raise error from None


def model_from_checkpoint(checkpoint, path="checkpoint", device="cpu"):
    """Return the SSD300 that a checkpoint describes, with its averaged weights, in evaluation mode on a device."""
    # Older checkpoints say whether their anchors were clipped; the anchors themselves are among the weights.
    model = SSD300(**{key: value for key, value in checkpoint["config"].items() if key != "clip_anchors"})
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise InputError(f"{path}: the weights do not fit the network: {' '.join(str(error).split())[:300]}") from None
    return model.to(device, memory_format=torch.channels_last).eval()


def set_seed(seed, *, deterministic=False):
    """Seed Python's, NumPy's and torch's generators; data order and augmentation have their own (see VocDataset).

    deterministic: torch takes the algorithms that give the same bits each time, and warns where it has none.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic


def get_rng():
    """Return the states of Python's, NumPy's, torch's and each CUDA device's generators as plain values and tensors.

    Loader processes have none worth saving: a sample depends on (seed, epoch, index) alone, see VocDataset.
    """
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": cuda}


def set_rng(states):
    """Go back to what `get_rng` returned, as far as it is there and there are devices for it."""
    torch.set_rng_state(states["torch"])
    if "python" in states:
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
    for device, state in zip(range(torch.cuda.device_count()), states.get("cuda", []), strict=False):
        torch.cuda.set_rng_state(state, device)


class StopSignals:
    """While entered, SIGINT (Ctrl-C) and SIGTERM (a machine that is taken away) raise KeyboardInterrupt.

    Within `waiting` they only set `signum`, and the exception is raised by `check` or at the end of the block. A second
    signal ends the process at once: the files are whole then too, since each is renamed when it is complete.
    """

    def __init__(self):
        self.signum, self.waits, self.before = 0, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        self.signum = signum
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        print("\nstopping; a second signal ends at once", file=sys.stderr, flush=True)
        if not self.waits:
            self.check()

    def check(self):
        if self.signum:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def waiting(self):
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
        self.check()


def environment(device):
    """Return what a result depends on beside the flags: versions, machine, device; plain values."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "albumentations": A.__version__, "numpy": np.__version__, "platform": platform.platform(),
        "cpu_count": os.cpu_count(), "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "command": " ".join(sys.argv), "started": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def prepare_folders(checkpoints, plots, *, keep):
    """Make a run's folders; an earlier run's files move to a subfolder named for their time, unless keep is true."""
    try:
        for folder in (checkpoints, plots):
            folder.mkdir(parents=True, exist_ok=True)
        for path in checkpoints.glob(".*.tmp"):  # a run that was killed while it wrote
            path.unlink()
        earlier = [p for p in checkpoints.iterdir() if p.suffix in (".pth", ".jsonl", ".json")]
        if keep or not any(p.suffix == ".pth" for p in earlier):
            return
        newest = datetime.datetime.fromtimestamp(max(p.stat().st_mtime for p in earlier))
        names = (f"earlier-{newest:%Y%m%d-%H%M%S}{f'-{n}' if n else ''}" for n in itertools.count())
        aside = next(checkpoints / name for name in names if not (checkpoints / name).exists())
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
    except OSError as error:
        raise InputError(f"--output-dir: {error}") from None
    print(f"the files of an earlier run are now in {aside}")


# ---- 12. Plots ----


def save_figure(figure, path):
    """Write a figure as PNG, whole or not at all; a failure (a full disk) costs the picture, not the run."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        options = {"format": "png", "dpi": 100, "pil_kwargs": {"compress_level": 2}}  # twice as fast, a third larger
        write_atomically(path, lambda temporary: figure.savefig(temporary, **options))
    except OSError as error:
        print(f"warning: {path} was not written: {error}", file=sys.stderr)


def _series(history, key):
    """Return epochs and values of a metric, epochs that lack it left out."""
    pairs = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def _line_axes(axes, history, curves, title, ylabel):
    for key, label, style in curves:
        x, y = _series(history, key)
        if x:
            axes.plot(x, y, style, label=label, marker="." if len(x) < 40 else None)
    axes.set(title=title, xlabel="epoch", ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if len(curves) > 1 and axes.lines:
        axes.legend()


def plot_losses(history):
    """Return loss.png: total, class and box loss of training and validation over the epochs of metrics.jsonl."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, (key, title) in zip(
        figure.subplots(1, 3), (("loss", "Loss"), ("loss_cls", "Class loss"), ("loss_box", "Box loss")), strict=True
    ):
        curves = [(f"train_{key}", "train", "C0-"), (f"val_{key}", "validation", "C1-")]
        _line_axes(axes, history, curves, title, "sum / positives")
        axes.set_ylim(bottom=0)
    return figure


def plot_training(history):
    """Return training.png: validation mAP, learning rate, images per second over the epochs of metrics.jsonl."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    curves = [("val_map_area", "area", "C2-"), ("val_map11", "11-point", "C4--")]
    _line_axes(left, history, curves, "Validation mAP@.5", "mAP")
    left.set_ylim(0, 1)
    if not left.lines:
        left.text(0.5, 0.5, "no validation images", ha="center", transform=left.transAxes)
    _line_axes(middle, history, [("lr", "learning rate", "C3-")], "Learning rate at the epoch's end", "learning rate")
    _line_axes(right, history, [("images_per_s", "images/s", "C0-")], "Training speed", "images/s")
    for axes in (middle, right):
        axes.set_ylim(0, axes.get_ylim()[1])
    return figure


def plot_data(records, classes, anchor_sizes=ANCHOR_SIZES):
    """Return data.png: objects per class, box sizes, and the share of objects that some anchor matches at IoU .5."""
    labels = np.concatenate([r.labels for r in records])
    boxes = torch.from_numpy(np.concatenate([r.boxes for r in records]))
    best = best_anchor_iou(boxes, anchor_sizes).numpy()
    figure = Figure(figsize=(14, 4.6 + 0.1 * len(classes)), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    counts = np.bincount(labels, minlength=len(classes) + 1)[1:]
    left.barh(classes, counts, color="C0")
    left.bar_label(left.containers[0], padding=3)
    left.set(title=f"{len(labels)} objects in {len(records)} training images", xlabel="objects")
    left.margins(x=0.15)
    left.invert_yaxis()
    size = (boxes[:, 2:] - boxes[:, :2]).numpy() * IMAGE_SIZE
    middle.scatter(size[:, 0], size[:, 1], s=5, alpha=0.25, c=np.where(best >= 0.5, "C0", "C3"), linewidths=0)
    middle.set(title="Box sizes at 300x300 (red: no anchor at IoU .5)", xlabel="width, pixels", ylabel="height, pixels")
    middle.set(xlim=(0, IMAGE_SIZE), ylim=(0, IMAGE_SIZE), aspect="equal")
    share = [float((best[labels == k] >= 0.5).mean()) if counts[k - 1] else 0.0 for k in range(1, len(classes) + 1)]
    right.barh(classes, share, color="C2")
    right.bar_label(right.containers[0], fmt="%.2f", padding=3)
    total = float((best >= 0.5).mean()) if len(best) else 0.0
    right.set(title=f"Matched by an anchor at IoU .5: {total:.3f}", xlabel="share of objects", xlim=(0, 1.15))
    right.invert_yaxis()
    return figure


def color_of(label):
    """Return the colour of a class; classes ten apart share one."""
    return PALETTE[(label - 1) % len(PALETTE)]


def plot_precision_recall(result, class_names):
    """Return precision_recall.png: a curve a class with its area AP in the legend, best first."""
    columns = 1 + (len(class_names) - 1) // 25
    figure = Figure(figsize=(8 + 2 * columns, 6), layout="constrained")
    axes = figure.subplots()
    rows = [(result["classes"][label], name) for label, name in enumerate(class_names, start=1)]
    rows = sorted((r for r in rows if r[0]["num_gt"]), key=lambda r: -r[0]["ap_area"])
    for number, (row, name) in enumerate(rows):
        style = ("-", "--", ":")[number // 10 % 3]
        label, color = f"{name} {row['ap_area']:.3f}", color_of(number + 1)
        axes.plot(row["recall"], row["precision"], style, color=color, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title(f"Precision and recall at IoU .5, mAP {result['map_area']:.4f} (area)")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title="AP (area)", ncols=columns)
    return figure


def plot_confusion(matrix, class_names):
    """Return confusion.png of a `confusion_matrix`: counts, coloured by their share of the true class's row."""
    size = 3.5 + 0.5 * len(matrix)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    share = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    figure.colorbar(axes.imshow(share, cmap="Blues", vmin=0, vmax=1), label="share of the row", shrink=0.8)
    for row, column in zip(*np.nonzero(matrix), strict=True):
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, f"{matrix[row, column]}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(matrix)), ["none: missed", *class_names], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(matrix)), ["none: false", *class_names])
    axes.set(xlabel="detected", ylabel="true", title=f"Confusion at score {DRAW_SCORE_THRESH} or more, IoU .5")
    return figure


def draw_boxes(image, boxes_px, captions, colors, *, dashed=False):
    """Draw boxes with captions on a PIL image, in place, and return it; line width and text follow its size."""
    draw = ImageDraw.Draw(image)
    line, font = max(2, round(max(image.size) / 250)), ImageFont.load_default(max(11, round(max(image.size) / 36)))
    boxes_px = np.asarray(boxes_px).reshape(-1, 4).tolist()
    for (x1, y1, x2, y2), caption, color in zip(boxes_px, captions, colors, strict=True):
        if dashed:
            corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)])
            for a, b in itertools.pairwise(corners):
                dashes = max(1, round(np.abs(b - a).sum() / (5 * line)))
                for i in range(dashes):
                    draw.line((*(a + (b - a) * i / dashes), *(a + (b - a) * (i + 0.55) / dashes)), color, line)
        else:
            draw.rectangle((x1, y1, x2, y2), outline=color, width=line)
        if caption:
            left, top, right, bottom = draw.textbbox((0, 0), caption, font=font)
            width, height = right - left + 6, bottom - top + 6
            x = min(max(0, x1), max(0, image.width - width))
            y = y1 - height if y1 >= height else max(0, min(y1, image.height - height))
            draw.rectangle((x, y, x + width, y + height), fill=color)
            draw.text((x + 3 - left, y + 3 - top), caption, fill="white", font=font)
    return image


def spread(records, count):
    """Return `count` records, or all if there are fewer, evenly spread over a list."""
    return [records[i] for i in np.linspace(0, len(records) - 1, min(count, len(records))).astype(int)]


def plot_sheet(images, title, columns=4):
    """Return a sheet of PIL images in cells of the same size, as high as the tallest picture needs."""
    rows, tallest = max(1, math.ceil(len(images) / columns)), max((i.height / i.width for i in images), default=1.0)
    figure = Figure(figsize=(3.4 * columns, 3.4 * rows * min(tallest, 1.5) + 0.5), layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for cell in axes:
        cell.axis("off")
    for cell, image in zip(axes, images, strict=False):
        cell.imshow(image)
    return figure


def plot_augmentations(dataset, classes, count=16):
    """Return augmentations.png: training images as the network sees them in the first epoch, with their boxes."""
    images, side = [], 450
    for index in spread(range(len(dataset)), count):
        sample = dataset[index, 0]
        image, labels = Image.fromarray(sample["image"].numpy().transpose(1, 2, 0)), sample["labels"].tolist()
        names, colors = [classes[k - 1] for k in labels], [color_of(k) for k in labels]
        images.append(draw_boxes(image.resize((side, side)), sample["boxes"].numpy() * side, names, colors))
    return plot_sheet(images, "Augmented training images and their boxes")


def plot_predictions(records, detections, classes, title):
    """Return predictions.png: truth dashed in white, detections solid with class and score.

    detections: a list parallel to records of (boxes_px (D, 4), labels, scores).
    """
    images = []
    for record, (boxes_px, labels, scores) in zip(records, detections, strict=True):
        image = Image.fromarray(read_image(record.image_path))
        scale = 450 / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size])
        truth = record.boxes_px * scale
        draw_boxes(image, truth, [""] * len(truth), ["white"] * len(truth), dashed=True)
        captions = [f"{classes[k - 1]} {s:.2f}" for k, s in zip(labels, scores, strict=True)]
        images.append(draw_boxes(image, np.asarray(boxes_px) * scale, captions, [color_of(k) for k in labels]))
    return plot_sheet(images, title)


# ---- 13. Training ----


Recipe = collections.namedtuple(
    "Recipe",
    "epochs optimizer lr momentum weight_decay warmup_epochs schedule clip_grad ema_decay loss focal_alpha focal_gamma "
    "cls_weight box_weight match_iou patience eval_interval",
)
Recipe.__doc__ = "How to train; each field is the flag of that name and is explained there."


def pick_device(name="auto"):
    """Return the torch.device of a name; "auto" is the first CUDA device, else the CPU. InputError if it is absent."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not to be had here ({str(error).splitlines()[0]})") from None
    return device


def pick_amp_dtype(device, amp="auto"):
    """Return the autocast dtype of --amp, None for float32.

    "auto" is bfloat16 where the hardware multiplies it, float16 on older GPUs, float32 on a CPU without bfloat16
    instructions, which would emulate it many times slower.
    """
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else None


def keep_freed_memory():
    """Tell glibc to keep freed memory: the kernel's fresh pages cost about a quarter of a CPU training step."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


def make_optimizer(model, recipe):
    """Return SGD or AdamW; weight decay falls on weights of two dimensions or more, not on biases and norms."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": recipe.weight_decay},
              {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]
    fused = params[0].device.type in ("cpu", "cuda")
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, fused=fused)
        for p in params if recipe.momentum else ():  # torch leaves it uninitialised if the first step is skipped
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=fused)


def learning_rate(step, recipe, steps_per_epoch):
    """Return (rate, phase) of a step: a linear warm-up to recipe.lr, then its schedule.

    cosine: to a hundredth; step: a tenth from 2/3 of all steps on, a hundredth from 5/6 (SSD section 3.1, scaled).
    """
    warmup, total = round(recipe.warmup_epochs * steps_per_epoch), recipe.epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / warmup, "warm-up"
    if recipe.schedule == "step":
        drops = (3 * step >= 2 * total) + (6 * step >= 5 * total)
        return recipe.lr * 0.1**drops, f"step {drops}"
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return recipe.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2), "cosine"


class Ema:
    """An exponential moving average of a model, batch norm statistics included; `model` is the averaged copy.

    The decay rises as (1 + step) / (10 + step) to its full value, so that early weights are soon forgotten.
    """

    def __init__(self, model, decay):
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self.averaged, self.current = map(list, zip(*(p for p in pairs if p[0].is_floating_point()), strict=True))
        self.counters = [p for p in pairs if not p[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step):
        """Move the average towards the model's weights; step counts from 1."""
        torch._foreach_lerp_(self.averaged, self.current, 1 - min(self.decay, (1 + step) / (10 + step)))
        for mine, theirs in self.counters:
            mine.copy_(theirs)


class NormGuard:
    """Keeps the statistics of a model's batch norms as the last good step left them: the forward pass changes them
    before anybody knows whether its loss is finite."""

    def __init__(self, model):
        self.buffers = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
        self.good = self.flat()

    def flat(self):
        """Return all statistics as one vector."""
        return torch.cat([b.flatten() for b in self.buffers]) if self.buffers else torch.zeros(0)

    def settle(self, ok):
        """Keep the present statistics if ok, a bool scalar on the device, else go back to the good ones."""
        if self.buffers:
            self.good = torch.where(ok, self.flat(), self.good)
            torch._foreach_copy_(self.buffers, list(self.good.split([b.numel() for b in self.buffers])))


def make_criterion(anchors, recipe):
    """Return criterion(outputs, batch) -> {"loss", "loss_cls", "loss_box"}, see `detection_loss`."""
    def criterion(outputs, batch):
        return detection_loss(outputs, build_targets(batch["gt_boxes"], batch["gt_labels"], anchors, recipe.match_iou),
                              loss=recipe.loss, alpha=recipe.focal_alpha, gamma=recipe.focal_gamma,
                              cls_weight=recipe.cls_weight, box_weight=recipe.box_weight)

    return criterion


@dataclass
class TrainState:
    """What a run carries from step to step; `state_dict` is what last.pth keeps of it beside the averaged weights.

    It can be saved between any two steps: batch order and augmentation follow from epoch and step.
    """

    model: SSD300
    ema: Ema
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    norms: NormGuard
    epoch: int = 0  # epochs finished, their validation included
    step: int = 0  # batches trained on, the skipped ones included
    best_map: float = -1.0
    best_epoch: int = 0
    history: list = field(default_factory=list)  # the rows of metrics.jsonl
    totals: dict = field(default_factory=dict)  # of the unfinished epoch: sums of the losses, and "steps" not skipped
    network: object = None  # runs forward in training: the model, or what compiles or distributes it
    ideal_s: float = 0.0  # seconds that an image's arithmetic would take at the GPU's full speed; 0 on a CPU

    def __post_init__(self):
        self.network = self.network or self.model

    def state_dict(self):
        """Return tensors and plain values only."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        plain = {name: getattr(self, name) for name in ("epoch", "step", "best_map", "best_epoch", "history", "totals")}
        return {**parts, **plain, "rng": get_rng()}

    def load_state_dict(self, state, averaged):
        """Go back to a saved state; averaged: the weights of the average. ValueError if it is of another network."""
        try:
            for name in ("model", "optimizer", "scaler"):
                getattr(self, name).load_state_dict(state[name])
            self.ema.model.load_state_dict(averaged)
            for name in ("epoch", "step", "best_map", "best_epoch", "history"):
                setattr(self, name, state[name])
            self.totals = {name: value.to(self.model.anchors.device) for name, value in state["totals"].items()}
            set_rng(state["rng"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the training state does not fit: {' '.join(str(error).split())[:300]}") from None
        self.norms = NormGuard(self.model)


def ideal_seconds(model, amp_dtype):
    """Return the seconds that one training image takes a GPU which does nothing but multiply large matrices.

    Three forward passes (a backward pass is two), counted by torch, at the measured speed of 8192^3 in this precision.
    """
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval().to("meta")(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta"))
    side, rounds = 8192, 20
    matrix = torch.randn(side, side, device=model.anchors.device, dtype=amp_dtype or torch.float32)
    for count in (3, rounds):  # the first ones warm up
        torch.cuda.synchronize(matrix.device)
        start = time.perf_counter()
        for _ in range(count):
            matrix @ matrix
        torch.cuda.synchronize(matrix.device)
    return 3 * counter.get_total_flops() * (time.perf_counter() - start) / (2 * side**3 * rounds)


def speed(state, images, seconds, waited):
    """Return {"images_per_s" of all processes, "data_wait", "memory_gb" at most so far} and on a GPU "utilisation"."""
    device, memory = state.model.anchors.device, 0.0
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError, ValueError, IndexError):
        memory = memory or int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    utilisation = {"utilisation": state.ideal_s * images / seconds} if state.ideal_s else {}
    return {"images_per_s": images * process_rank()[1] / seconds, "data_wait": waited / seconds,
            "memory_gb": memory, **utilisation}


def speed_text(row):
    """Return what `speed` found, for the bar and the log."""
    share = f"  {row['utilisation']:.0%} of peak" if "utilisation" in row else ""
    return f"{row['images_per_s']:.0f} img/s  wait {row['data_wait']:.0%}{share}  {row['memory_gb']:.1f} GB"


def profile_steps(optimizer, count, path):
    """Trace `count` training steps from the fourth on; then print the ten costliest operations and write the trace."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []

    def finish(profiler):
        hook.remove()
        order = "self_device_time_total" if len(kinds) > 1 else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=45), flush=True)
        write_atomically(path, lambda temporary: profiler.export_chrome_trace(str(temporary)))
        print(f"{path}: {count} steps, to be opened in chrome://tracing or ui.perfetto.dev", flush=True)

    plan = torch.profiler.schedule(skip_first=2, wait=0, warmup=1, active=count, repeat=1)
    profiler = torch.profiler.profile(activities=kinds, schedule=plan, on_trace_ready=finish)
    hook = optimizer.register_step_post_hook(lambda *_: profiler.step())
    profiler.start()


def optimize(state, loss, clip_grad):
    """Take one optimizer step on a scalar loss: backward, unscale, clip the gradients' norm, step, average.

    Returns whether the step was taken, a bool scalar on the device: it is skipped if the loss or the gradients' norm
    is not finite. Weights, moments, statistics and average then stay as they were.
    """
    # Reading `ok` here would stall the device in every step. So the skip happens there: a fused optimizer's kernels
    # do nothing where `found_inf` is 1, as for GradScaler, whose own step is left out since it sets that too.
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad or math.inf)
    ok = norm.isfinite()
    if process_rank()[1] == 1:  # of several processes each has a loss of its own, but the norm is that of all
        ok = ok & loss.detach().isfinite()
    if state.optimizer.defaults["fused"]:
        state.optimizer.grad_scale, state.optimizer.found_inf = None, (~ok).float()
        state.optimizer.step()
    elif ok:  # other devices have to wait
        state.optimizer.step()
    state.scaler.update()
    state.norms.settle(ok)
    state.step += 1
    state.ema.update(state.step)
    return ok


class NotFiniteError(InputError):
    """The loss or its gradient was not finite in several steps in a row."""


class SkipLog:
    """Names the steps that `optimize` skipped, and stops the run after `limit` in a row.

    report: the file that then says what these steps were shown. `read` is to be called now and then: only there the
    host waits for the device.
    """

    def __init__(self, records, report, limit):
        self.records, self.report, self.limit, self.pending, self.in_a_row = records, report, limit, [], []

    def add(self, step, batch, losses, ok):
        """Keep what may have to be told of a step."""
        told = {name: batch[name] for name in ("indices", "gt_labels", "gt_boxes")}
        self.pending.append((ok, step, told, {name: value.detach() for name, value in losses.items()}))

    def read(self):
        """Tell of the skipped ones among the steps added since; raises NotFiniteError."""
        flags = torch.stack([one[0] for one in self.pending]).tolist()
        for ok, (_, step, batch, losses) in zip(flags, self.pending, strict=True):
            if ok:
                self.in_a_row = []
                continue
            losses = {name: repr(value.item()) for name, value in losses.items()}
            images = [{"image": self.records[i].image_id, "labels": labels[labels > 0].tolist(),
                       "boxes": boxes[labels > 0].tolist()} for i, labels, boxes in zip(
                          batch["indices"].tolist(), batch["gt_labels"], batch["gt_boxes"], strict=True)]
            self.in_a_row.append({"step": step, "losses": losses, "images": images})
            print(f"warning: step {step} skipped, its gradient is not finite ({losses}); images: "
                  f"{', '.join(image['image'] for image in images)}", file=sys.stderr)
        self.pending = []
        if len(self.in_a_row) >= self.limit:
            write_json(self.report, self.in_a_row)
            raise NotFiniteError(
                f"{len(self.in_a_row)} steps in a row, up to {step}, had no finite loss and gradient "
                f"({self.in_a_row[-1]['losses']}): lower --lr, lengthen --warmup-epochs or set --amp off; "
                f"{self.report} says what they were shown; the weights saved are from before")


def train_one_epoch(state, loader, criterion, recipe, *, skips, amp_dtype=None, between_steps=lambda: None):
    """Train to the end of an epoch; returns the means of the losses, lr, phase, skipped, and what `speed` finds.

    It begins where state.step stands. skips: a SkipLog. between_steps() is called after each step.
    """
    device, steps = state.model.anchors.device, len(loader)
    sampler, first = loader.batch_sampler, state.step - state.epoch * steps
    sampler.epoch, sampler.first = state.epoch, first
    state.model.train()
    images, waited, start = 0, 0.0, time.perf_counter()
    bar = tqdm(total=steps, initial=first, desc=f"epoch {state.epoch + 1}/{recipe.epochs}", leave=False,
               disable=not sys.stderr.isatty() or process_rank()[0] > 0)
    batches = iter(loader if first < steps else ())
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        # torch raises from this signal, anywhere in a step; without it a dead process is told of by next(batches).
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in range(first + 1, steps + 1):
        before = time.perf_counter()
        batch = to_device(next(batches), device)
        waited += time.perf_counter() - before
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, recipe, steps)[0]
        with autocast(device, amp_dtype):
            outputs = state.network(batch["images"])
        losses = criterion(outputs, batch)
        ok = optimize(state, losses["loss"], recipe.clip_grad)
        for name, value in {**losses, "steps": torch.ones_like(losses["loss"])}.items():
            state.totals[name] = state.totals.get(name, 0.0) + torch.where(ok, value.detach(), 0.0)
        skips.add(state.step, batch, losses, ok)
        images += len(batch["images"])
        if number % 10 == 0 or number == steps:  # the only place that waits for the device
            skips.read()
            loss, seconds = (state.totals["loss"] / state.totals["steps"]).item(), time.perf_counter() - start
            left = (steps * (recipe.epochs - state.epoch) - number) * seconds / (number - first)
            bar.set_postfix_str(f"loss {loss:.3f} lr {group['lr']:.1e} "
                                f"{speed_text(speed(state, images, seconds, waited))} "
                                f"eta {datetime.timedelta(seconds=round(left))}")
            bar.update(number - bar.n)
        between_steps()
    bar.close()
    seconds, (lr, phase) = time.perf_counter() - start, learning_rate(state.step - 1, recipe, steps)
    good = state.totals["steps"].item()
    means = {f"train_{name}": average_over_processes(total / good).item()
             for name, total in state.totals.items() if name != "steps"}
    return {**means, "lr": lr, "phase": phase, "skipped": steps - round(good), **speed(state, images, seconds, waited)}


def epoch_line(row, epochs, saved):
    """Return the printed line of an epoch, a row of metrics.jsonl."""
    def losses(prefix):
        return f"{row[prefix + 'loss']:.3f} (cls {row[prefix + 'loss_cls']:.3f} box {row[prefix + 'loss_box']:.3f})"

    val = f"  val {losses('val_')}  mAP {row['val_map_area']:.4f}" if "val_loss" in row else ""
    return (f"epoch {row['epoch']:3d}/{epochs}  train {losses('train_')}{val}  lr {row['lr']:.2e} {row['phase']}  "
            f"{row['seconds']:.1f} s  {speed_text(row)}  "
            f"{f'skipped {skipped} steps  ' if (skipped := row['skipped']) else ''}saved {saved}")


class Saver:
    """Writes a run's checkpoints into a folder; what cannot be written is `waiting`, and tried again with the next.

    base: what every checkpoint holds beside weights and metrics. minutes: see `save_when_due`; 0 is never.
    """

    def __init__(self, state, folder, base, minutes):
        self.state, self.folder, self.base, self.minutes = state, folder, base, minutes
        self.waiting, self.saved_at = {}, time.monotonic()

    def save(self, name, previous=None, **more):
        """Write a checkpoint of the averaged weights, and those that wait."""
        metrics = self.state.history[-1] if self.state.history else {}
        weights = self.state.ema.model.state_dict()
        self.waiting[name] = {**self.base, "model": weights, "metrics": metrics, **more}, previous
        for name, (checkpoint, previous) in list(self.waiting.items()):
            try:
                save_checkpoint(self.folder / name, checkpoint, previous)
                del self.waiting[name]
            except OSError as error:
                self.waiting[name] = copy.deepcopy((checkpoint, previous))  # the weights will move on
                print(f"warning: {self.folder / name} was not written, the next save tries again: {error}",
                      file=sys.stderr)

    def save_last(self):
        """Write last.pth, from which a run can go on; the one before becomes previous.pth."""
        self.save("last.pth", self.folder / "previous.pth", train_state=self.state.state_dict())
        self.saved_at = time.monotonic()

    def save_when_due(self):
        """Write last.pth if the last time was `minutes` ago."""
        if 0 < 60 * self.minutes <= time.monotonic() - self.saved_at:
            self.save_last()


def fit(state, loaders, recipe, *, amp_dtype, saver, settings, redraw, stop):
    """Train until the epochs or the patience run out, writing checkpoints and metrics.jsonl after every epoch.

    loaders: training, and validation or None. settings: of `evaluate`. redraw(state) draws the plots. A signal (stop:
    StopSignals) or an error ends the run after last.pth is written. Returns the path of the checkpoint to test:
    best.pth, or last.pth if nothing was held out or best.pth is lost. Raises InputError if in the end a checkpoint
    cannot be written.
    """
    (train_loader, val_loader), folder = loaders, saver.folder
    criterion = make_criterion(state.model.anchors, recipe)
    limit = 25 if state.scaler.is_enabled() else min(MAX_SKIPPED_STEPS, len(train_loader))  # float16 seeks its scale
    skips = SkipLog(train_loader.dataset.records, folder / "nonfinite.json", limit)

    def between_steps():
        stop.check()
        saver.save_when_due()

    while state.epoch < recipe.epochs:
        if val_loader is not None and 0 < recipe.patience * recipe.eval_interval <= state.epoch - state.best_epoch:
            print(f"stopped early: no better validation mAP in {recipe.patience} evaluations (--patience)")
            break
        start, saved, epoch = time.perf_counter(), "last", state.epoch + 1
        try:
            with stop.waiting():
                row = train_one_epoch(state, train_loader, criterion, recipe, skips=skips, amp_dtype=amp_dtype,
                                      between_steps=between_steps)
            if val_loader is not None and (epoch == recipe.epochs or epoch % recipe.eval_interval == 0):
                result = evaluate(state.ema.model, val_loader, amp_dtype=amp_dtype, criterion=criterion, **settings)
                row |= {f"val_{name}": result[name] for name in ("loss", "loss_cls", "loss_box", "map_area", "map11")}
                saver.base["score_thresh"] = advise_thresholds(result["classes"], saver.base["classes"])
        except BaseException as error:
            if not isinstance(error, NotFiniteError):  # the last good checkpoint is of before its first skipped step
                state.norms.settle(torch.zeros((), dtype=torch.bool, device=state.model.anchors.device))
                saver.save_last()
            stop.check()  # a signal explains a loader process that died
            raise
        row = {"epoch": epoch, "step": state.step, **row, "seconds": round(time.perf_counter() - start, 3)}
        with stop.waiting():
            state.epoch, state.totals = epoch, {}
            state.history.append(row)
            if "val_map_area" in row and (state.best_epoch == 0 or row["val_map_area"] > state.best_map):
                best_map = -1.0 if math.isnan(row["val_map_area"]) else row["val_map_area"]  # NaN: no object to find
                state.best_map, state.best_epoch, saved = best_map, epoch, "last, best"
                saver.save("best.pth")
            saver.save_last()
            with contextlib.suppress(OSError):  # the rows are in last.pth, and written again after the next epoch
                write_text(folder / "metrics.jsonl", "".join(to_json(r) + "\n" for r in state.history))
            print(epoch_line(row, recipe.epochs, "nothing" if saver.waiting else saved), flush=True)
        redraw(state)
    if saver.waiting:
        saver.save_last()
    if saver.waiting:
        raise InputError(f"the training is over, but {' and '.join(saver.waiting)} could not be written to {folder}")
    best = folder / "best.pth"
    return best if val_loader is not None and best.is_file() else folder / "last.pth"


def sparingly(function, share=0.05):
    """Return a function that calls another, or does nothing where that would take more than `share` of the time."""
    due = 0.0

    def call(*values):
        nonlocal due
        if (began := time.perf_counter()) >= due:
            function(*values)
            due = (now := time.perf_counter()) + (now - began) / share

    return call


def draw_curves(history, folder):
    """Write loss.png and training.png of what was recorded after each epoch."""
    save_figure(plot_losses(history), folder / "loss.png")
    save_figure(plot_training(history), folder / "training.png")


def draw_gallery(model, loader, classes, path, *, amp_dtype, title, settings):
    """Write predictions.png: a model's detections on the loader's images, with the truth dashed.

    settings: of `evaluate`; the score threshold is DRAW_SCORE_THRESH.
    """
    records = loader.dataset.records
    found = evaluate(model, loader, amp_dtype=amp_dtype, **settings | {"score_thresh": DRAW_SCORE_THRESH})["detections"]
    boxes_px = found["boxes_px"] - np.array([1, 1, 0, 0])  # VOC pixels -> edges
    mine = [found["image_ids"] == i for i in range(len(records))]
    parts = [(boxes_px[m], found["labels"][m].tolist(), found["scores"][m].tolist()) for m in mine]
    title = f"{title}: detections (solid, score at least {DRAW_SCORE_THRESH}) and truth (dashed)"
    save_figure(plot_predictions(records, parts, classes, title), path)


# ---- 14. Inference ----


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}
HUB_FILES = ("config.json", "model.safetensors")  # what load_detector reads of a published model
# The flags of detection, by the settings of `evaluate` that they are.
DETECTION_FLAGS = {"score_thresh": "score_thresh", "nms_iou_thresh": "nms_iou", "max_detections": "max_detections",
                   "flip_average": "flip_average"}


def open_image(source):
    """Return an image as a new RGB PIL image, turned upright by its EXIF tag; transparency is left out.

    source: a path, a PIL image, an array (H, W), (H, W, 1), RGB (H, W, 3) or RGBA (H, W, 4), or a tensor with the
    channels first; arrays and tensors are uint8, or uint16 over its full range. Raises ValueError for another array,
    InputError for an unreadable file.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        pixels = source if isinstance(source, np.ndarray) else source.cpu().numpy()
        pixels = np.moveaxis(pixels, 0, -1) if isinstance(source, torch.Tensor) and pixels.ndim == 3 else pixels
        pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        pixels = (pixels / 257).round().astype(np.uint8) if pixels.dtype == np.uint16 else pixels
        if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,), (4,)) or pixels.ndim < 2 or pixels.size == 0:
            raise ValueError("an image array must be uint8 (H, W), (H, W, 3) or (H, W, 4), a tensor uint8 (3, H, W); "
                             f"this {type(source).__name__} is {source.dtype} {tuple(source.shape)}")
        source = Image.fromarray(pixels)
    try:
        with contextlib.nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # whatever a broken file makes Pillow raise
        raise InputError(f"{source}: not readable as an image ({' '.join(str(error).split())[:120]})") from None
    if upright.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would cut at 255
        upright = Image.fromarray((np.asarray(upright) / 257.0).clip(0, 255).round().astype(np.uint8))
    return upright.convert("RGB")


@dataclass
class Detections:
    """What was found in one image, best first. boxes_px (D, 4): xyxy in pixels of the upright picture."""

    boxes_px: np.ndarray
    labels: list
    names: list
    scores: list

    def __len__(self):
        return len(self.labels)

    def to_dict(self):
        """Return plain lists and numbers, ready for JSON."""
        boxes_px = [[round(v, 2) for v in box] for box in self.boxes_px.tolist()]
        scores = [round(s, 4) for s in self.scores]
        return {"boxes_px": boxes_px, "labels": self.labels, "names": self.names, "scores": scores}

    def draw(self, image):
        """Return a PIL copy of an image, see `open_image`, with the boxes, class names and scores drawn on it."""
        captions = [f"{n} {s:.2f}" for n, s in zip(self.names, self.scores, strict=True)]
        return draw_boxes(open_image(image), self.boxes_px, captions, [color_of(k) for k in self.labels])


def ahead(function, items, *, threads=None, depth=16):
    """Yield function(item) for each item, in order; threads, one a core up to 8, work up to `depth` items ahead."""
    waiting = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Detector:
    """A trained model with its class names; see `load_detector`. Several threads may share one."""

    def __init__(self, model, classes, amp_dtype=None, score_thresh=None, **settings):
        """score_thresh: {class name: threshold} for where `predict` is given none; DRAW_SCORE_THRESH for the others.

        settings: what `predict` does without being given, see `stream`.
        """
        self.settings = settings
        self.model, self.classes, self.amp_dtype = model.eval(), tuple(classes), amp_dtype
        self.score_thresh = {name: (score_thresh or {}).get(name, DRAW_SCORE_THRESH) for name in self.classes}
        self._resize = resize_transform()

    def predict(self, images, **settings):
        """Detect objects in an image or in several: a list, or an array or tensor of four dimensions.

        An image is whatever `open_image` takes, of any size; settings: see `stream`. Returns a Detections, or a list
        of them. Raises InputError that names an unreadable file.
        """
        is_many = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        results = []
        for picture, found in self.stream(images if is_many else [images], **settings):
            if found is None:
                raise picture
            results.append(found)
        return results if is_many else results[0]

    def stream(self, images, *, batch_size=8, classes=None, **settings):
        """Yield (upright PIL image, Detections) for each of an iterable of images; (InputError, None) if unreadable.

        Other threads open and shrink the next images while the network works. classes: names to report, None for
        all; settings: score_thresh (None: that of each class in self.score_thresh), nms_iou_thresh, max_detections,
        see `detect`, and flip_average, see `evaluate`. A checkpoint's detector has those of its run as defaults, but
        for score_thresh.
        """
        labels, opened = self.labels_of(classes), ahead(self._open, images, depth=2 * batch_size)
        for batch in iter(lambda: list(itertools.islice(opened, batch_size)), []):
            readable = [pair for pair in batch if pair[1] is not None]
            found = iter(self._detect(*zip(*readable, strict=True), labels, **self.settings | settings) if readable
                         else ())
            yield from ((picture, None if array is None else next(found)) for picture, array in batch)

    def labels_of(self, classes=None):
        """Return the labels of class names, of all for None; raises InputError for a name the model does not know."""
        if unknown := [name for name in classes or () if name not in self.classes]:
            raise InputError(f"no class {', '.join(unknown)}: the model knows {', '.join(self.classes)}")
        return [k for k, name in enumerate(self.classes, start=1) if classes is None or name in classes]

    def _open(self, source):
        try:
            picture = open_image(source)
        except InputError as error:
            return error, None
        return picture, self._resize(image=np.asarray(picture))["image"]

    @torch.inference_mode()
    def _detect(self, pictures, arrays, wanted, score_thresh=None, max_detections=MAX_DETECTIONS, flip_average="off",
                **more):
        """Return the Detections of the wanted labels in pictures, of which arrays are 300x300 copies."""
        anchors, results = self.model.anchors, []
        if score_thresh is None:
            score_thresh = torch.tensor(list(self.score_thresh.values()), device=anchors.device)
        batch = to_device({"images": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)}, anchors.device)
        with autocast(anchors.device, self.amp_dtype):
            outputs = self.model(batch["images"])
            outputs = average_with_flips(self.model, batch["images"], outputs, flip_average)
        found = detect(*outputs, anchors, score_thresh=score_thresh, max_detections=None, **more)
        for picture, (boxes, labels, scores) in zip(pictures, found, strict=True):
            keep = torch.isin(labels, labels.new_tensor(wanted)).nonzero()[:max_detections, 0]
            boxes_px = boxes[keep].cpu().numpy() * np.array(picture.size * 2, dtype=np.float32)
            labels = labels[keep].tolist()
            names = [self.classes[k - 1] for k in labels]
            results.append(Detections(boxes_px, labels, names, scores[keep].tolist()))
        return results


def optional_import(name, purpose):
    """Return a module that only some uses need; raises InputError that names the pip command if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise InputError(f"{purpose} needs the package {package}: pip install {package}") from None


def load_published(source):
    """Return the checkpoint dict of a folder that `tools/export.py hf` wrote, or of a Hugging Face id OWNER/NAME."""
    folder = Path(source)
    if not folder.is_dir():
        hub = optional_import("huggingface_hub", f"{source}: no such file, and as a Hugging Face id it")
        try:
            folder = Path(hub.snapshot_download(str(source), allow_patterns=HUB_FILES))
        except Exception as error:  # no network, no such model, no access
            raise InputError(f"{source}: no such file or folder, and no model to be had from the Hugging Face hub "
                             f"({' '.join(str(error).split())[:160]})") from None
    if missing := [name for name in HUB_FILES if not (folder / name).is_file()]:
        raise InputError(f"{source}: lacks {' and '.join(missing)}, which tools/export.py hf writes")
    reader = optional_import("safetensors.torch", f"{source}: reading model.safetensors")
    try:
        content = json.loads((folder / HUB_FILES[0]).read_text(encoding="utf-8"))
        published = {name: content[name] for name in ("format_version", "config", "classes")}
        published |= {"score_thresh": content.get("score_thresh"), "args": content.get("flags")}
        return published | {"model": reader.load_file(folder / HUB_FILES[1])}
    except Exception as error:  # whatever is wrong with a foreign file
        raise InputError(f"{source}: not a model of this module ({type(error).__name__}: {error})") from None


def detection_of(checkpoint):
    """Return the settings of `evaluate` that a checkpoint's run had, those that are known, but for score_thresh."""
    flags = checkpoint.get("args") or {}
    return {key: flags[flag] for key, flag in DETECTION_FLAGS.items() if flag in flags and key != "score_thresh"}


def load_detector(source, device="auto", precision="auto"):
    """Return the Detector of a checkpoint (.pth), of a folder of `tools/export.py hf`, or of a Hugging Face id.

    device and precision as the flags --device and --amp.
    """
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and Path(source).suffix not in (".pth", ".pt")
    published = Path(source).is_dir() or (is_hub_id and not Path(source).exists())
    checkpoint, device = load_published(source) if published else load_checkpoint(source), pick_device(device)
    model = model_from_checkpoint(checkpoint, source, device)
    amp_dtype = pick_amp_dtype(device, precision)
    return Detector(model, checkpoint["classes"], amp_dtype, checkpoint.get("score_thresh"), **detection_of(checkpoint))


def find_inputs(arguments):
    """Return the paths that files, folders and globs name (of the last two: images and videos by ending), each once."""
    paths = []
    for argument in arguments:
        named, suffixes = Path(argument), IMAGE_SUFFIXES | VIDEO_SUFFIXES
        there = named.iterdir() if named.is_dir() else map(Path, glob.glob(str(argument), recursive=True))
        found = [named] if named.is_file() else sorted(p for p in there if p.suffix.lower() in suffixes and p.is_file())
        if not found:
            raise InputError(f"{argument}: {'no image or video in this folder' if named.is_dir() else 'no such file'}")
        paths += found
    return list(dict.fromkeys(paths))


def boxes_as_stored(boxes_px, size, orientation):
    """Return boxes (D, 4) of an upright picture of size (W, H) in the pixels of its file, turned by EXIF 1 to 8."""
    x, y = boxes_px[:, 0::2], boxes_px[:, 1::2]
    x = size[0] - x[:, ::-1] if orientation in (2, 3, 6, 7) else x
    y = size[1] - y[:, ::-1] if orientation in (3, 4, 7, 8) else y
    return np.stack((y, x) if orientation > 4 else (x, y), axis=2).reshape(-1, 4)


def write_image_result(picture, found, path, target, *, save_crops=False, save_xml=False):
    """Write a drawn picture; if asked for, crops/CLASS/*.png and Annotations/*.xml beside it. path: the source."""
    found.draw(picture).save(target, quality=92, compress_level=2)
    for number, (box, name) in enumerate(zip(found.boxes_px, found.names, strict=True) if save_crops else ()):
        folder = target.parent / "crops" / re.sub(r"\W", "_", name)
        folder.mkdir(parents=True, exist_ok=True)
        corners = *np.floor(box[:2]).tolist(), *np.ceil(box[2:]).tolist()
        picture.crop(corners).save(folder / f"{target.stem}_{number}.png")
    if save_xml:
        with Image.open(path) as file:
            shape, turned = (file.height, file.width, 3), file.getexif().get(ExifTags.Base.Orientation, 1)
        boxes = to_voc_pixels(boxes_as_stored(found.boxes_px, picture.size, turned)).round().astype(int).tolist()
        folder = target.parent / "Annotations"
        folder.mkdir(exist_ok=True)
        objects = list(zip(found.names, boxes, strict=True))
        write_annotation(folder / f"{target.stem}.xml", path.name, shape, objects)


def predict_video(detector, path, target, **settings):
    """Detect in a video; writes its frames, drawn on, as MP4 without sound; returns {"fps", "frames"}.

    Raises InputError for a video of which a tenth or more of the announced frames cannot be read.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read at the first video: no chatter about broken ones
    video, output = cv2.VideoCapture(str(path)), cv2.VideoWriter()
    total, fps = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))), video.get(cv2.CAP_PROP_FPS) or 25.0

    def read(_):
        is_read, frame = video.read()
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) if is_read else None

    def write(pair):
        (picture, found), codec = pair, cv2.VideoWriter.fourcc(*"mp4v")
        if not (output.isOpened() or output.open(str(target), codec, fps, picture.size)):
            raise OSError(f"{target}: not writable as a video")
        output.write(cv2.cvtColor(np.asarray(found.draw(picture)), cv2.COLOR_RGB2BGR))
        return found.to_dict()

    try:  # one thread reads and one writes: frames keep their order
        frames = itertools.takewhile(lambda frame: frame is not None, ahead(read, itertools.count(), threads=1))
        written = ahead(write, detector.stream(frames, **settings), threads=1)
        found = list(tqdm(written, path.name, total or None, unit="frame", disable=not sys.stderr.isatty()))
    finally:
        output.release()
    if len(found) <= 0.9 * total:
        target.unlink(missing_ok=True)
        raise InputError(f"{path}: not readable as a video ({len(found)} of {total} frames)")
    return {"fps": fps, "frames": found}


def predict_files(detector, paths, folder, *, save_crops=False, save_xml=False, **settings):
    """Detect in image and video files; writes a drawn copy of each and predictions.json into a folder.

    JPEG stays JPEG, other images become PNG, videos MP4; reading, the network and writing overlap. settings: see
    `Detector.stream`. Returns a line for each file that could not be read; raises InputError for a file in `folder`.
    """
    paths, folder, report, problems, targets = [Path(p) for p in paths], Path(folder), {}, [], {}
    detector.labels_of(settings.get("classes"))
    if inside := [p for p in paths if p.resolve().parent == folder.resolve()]:
        raise InputError(f"{inside[0]} lies where the results go and might be overwritten: set --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    endings, taken = dict.fromkeys(VIDEO_SUFFIXES, ".mp4") | {".jpg": ".jpg", ".jpeg": ".jpg"}, set()
    for path in paths:
        names = (f"{path.stem}{f'_{n}' if n else ''}" for n in itertools.count())
        taken.add(name := next(n for n in names if n not in taken))
        targets[path] = folder / (name + endings.get(path.suffix.lower(), ".png"))
    images = [p for p in paths if p.suffix.lower() not in VIDEO_SUFFIXES]

    def write(item):
        path, (picture, found) = item
        if found is not None:
            write_image_result(picture, found, path, targets[path], save_crops=save_crops, save_xml=save_xml)
        return item

    try:
        for path, (picture, found) in ahead(write, zip(images, detector.stream(images, **settings), strict=True)):
            if found is None:
                problems.append(str(picture))
                continue
            report[path] = found.to_dict()
            listed = ", ".join(f"{n} {s:.2f}" for n, s in zip(found.names, found.scores, strict=True))
            print(f"{path}: {listed or 'nothing found'} -> {targets[path]}")
        for path in [p for p in paths if p not in images]:
            try:
                report[path] = predict_video(detector, path, targets[path], **settings)
                print(f"{path}: {len(report[path]['frames'])} frames -> {targets[path]}")
            except InputError as error:
                problems.append(str(error))
    finally:  # an interruption keeps what was found
        write_json(folder / "predictions.json", {str(p): report[p] for p in paths if p in report})
    return problems


# ---- 15. Command line ----

# What the data set, and then the kind of start, choose where no flag is given.
_FOLDER = {"train_split": "train", "epochs": 100, "batch_size": 16, "width": 1.0, "zoom_out": 0.5, "crop": 1.0,
           "color": 0.5, "shadow": 0.2, "noise": 0.2, "blur": 0.1}
_VOC = _FOLDER | {"train_split": "trainval", "test_split": "test", "batch_size": 32}
_SHAPES = {"test_split": "test", "val_split": "val", "epochs": 10, "batch_size": 4, "width": 0.0625, "lr": 5e-3,
           "zoom_out": 0.0, "crop": 0.3, "color": 0.1, "shadow": 0.1, "noise": 0.1}
DATA_DEFAULTS = {"voc2007": _VOC, "voc0712": _VOC, "shapes": _FOLDER | _SHAPES, "folder": _FOLDER}
PRETRAINED_DEFAULTS = {"batch_norm": False, "optimizer": "sgd", "lr": 1e-3, "weight_decay": 5e-4}  # SSD section 3.1
SCRATCH_DEFAULTS = {"batch_norm": True, "optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05}
# SSD sections 2.2, 3.1 and 3.6; its ImageNet start is the default at --width 1, batch norm came later.
PAPER_RECIPE = {"loss": "multibox", "optimizer": "sgd", "lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4,
                "batch_size": 32, "schedule": "step", "warmup_epochs": 0.0, "clip_grad": 0.0, "ema_decay": 0.0,
                "batch_norm": False, "zoom_out": 0.5, "crop": 1.0, "color": 0.5, "shadow": 0.0, "noise": 0.0,
                "blur": 0.0}
DATA_FLAGS = ("data", "data_root", "classes", "train_split", "val_split", "test_split", "val_fraction", "seed",
              "allow_bad_data")
RESUME_MAY_CHANGE = {"resume", "device", "workers", "output_dir", "data_root", "patience", "save_minutes", "cache",
                     "compile", "profile"}


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


def class_list(text):
    """argparse type: class names parted by commas."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty or a repeated class name")
    return names


def anchor_file(path):
    """argparse type: a JSON file that holds (w, h) pairs for each of the six maps, as --suggest-anchors writes it."""
    try:
        maps = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read as JSON: {error}") from None
    form = f"{path} must hold {len(FEATURE_MAPS)} lists, each of [width, height] pairs, fractions of the picture"
    try:
        sizes = tuple([[float(w), float(h)] for w, h in pairs] for pairs in maps)
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(form) from None
    if len(sizes) != len(FEATURE_MAPS) or not all(sizes) or not all(0 < v < 10 for s in sizes for p in s for v in p):
        raise argparse.ArgumentTypeError(form)
    return sizes


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or "default" in action.help else super()._get_help_string(action)


_BY_DATA, _BY_START = "default: chosen by the data set", "default: chosen by the kind of start"
_SWITCH = argparse.BooleanOptionalAction


def _add_data_flags(parser):
    add = parser.add_argument_group("data").add_argument
    add("--data", default="voc2007", help="voc2007, voc0712, shapes (generated) or a folder in VOC layout")
    add("--data-root", metavar="DIR", default="data", help="where VOCdevkit and shapes are or will be")
    add("--classes", type=class_list, help="names a,b,c (default: VOC's, or those annotated; --predict: all)")
    add("--train-split", metavar="LIST", help=f"list below ImageSets/Main to train on ({_BY_DATA})")
    add("--val-split", metavar="LIST", help="list that chooses the best checkpoint (default: see --val-fraction)")
    add("--test-split", metavar="LIST", help=f"list to measure on once, at the end ({_BY_DATA})")
    add("--val-fraction", type=below_one, default=0.1,
        help="seeded share of the training list held out where no --val-split is given; 0: train on everything")
    add("--allow-bad-data", action="store_true", help="leave out images that cannot be used, in place of stopping")
    add("--cache", choices=("off", "ram", "disk"), default="off",
        help="keep training images decoded, in memory or in a nameless file below --data-root")
    add("--workers", type=natural_int,
        help="loader processes (default: one a core up to 16 beside a GPU, else 1, on two cores 0)")


def _add_training_flags(parser):
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=("focal", "multibox"), default="focal",
        help="softmax focal, or softmax with 3:1 mining (BCCD, three seeds: mAP@.5 .864 +-.008 and .859 +-.005; with "
             "--anchors made for the data .867 +-.007 and .875 +-.003; VOC2007 from scratch, width .125, six epochs, "
             "one seed: .048 and .020; shapes, one seed: .951 and .927)")
    add("--focal-alpha", type=alpha_weight, default=-1.0,
        help="weight of objects against background; -1: none (BCCD, one seed: mAP@.5 .855, COCO AP .514 with -1, .852 "
             "and .522 with .75)")
    add("--focal-gamma", type=natural_float, default=FOCAL_GAMMA,
        help="focusing exponent (BCCD, three seeds: mAP@.5 .864 with 1, .846 with 2)")
    add("--cls-weight", type=positive_float, default=1.0,
        help="factor on the class loss (BCCD, three seeds: mAP@.5 .864 with 1, .855 with 2; with --anchors made for "
             "the data .867 and .872)")
    add("--box-weight", type=positive_float, default=1.0, help="factor on the box loss")
    add("--match-iou", type=unit_interval, default=0.5,
        help="IoU from which an anchor answers for an object (BCCD, one seed: mAP@.5 .855, COCO AP .514 with .5, .863 "
             "and .498 with .4)")

    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=("own", "paper"), default="own",
        help="paper: mining, SGD, steps, batch 32, no averaging, no shadow, noise or blur; flags given still count")
    add("--epochs", type=positive_int, help=f"passes over the training images ({_BY_DATA})")
    add("--batch-size", type=positive_int, help=f"images a step ({_BY_DATA})")
    add("--optimizer", choices=("sgd", "adamw"),
        help=f"{_BY_START}; BCCD from scratch, one seed: mAP@.5 .855 with adamw, .817 with sgd and --lr 1e-2")
    add("--lr", type=positive_float, help=f"learning rate after the warm-up ({_BY_START})")
    add("--momentum", type=below_one, default=0.9, help="of SGD; AdamW's beta 1")
    add("--weight-decay", type=natural_float,
        help=f"not on biases and norms ({_BY_START}; BCCD, one seed: mAP@.5 .855 with .05, .854 with .2)")
    add("--warmup-epochs", type=natural_float, default=1.0, help="linear warm-up")
    add("--schedule", choices=("cosine", "step"), default="cosine",
        help="learning rate after the warm-up: a cosine, or a tenth at 2/3 and again at 5/6 of the epochs (BCCD, one "
             "seed: mAP@.5 .855 and .833)")
    add("--clip-grad", type=natural_float, default=10.0, help="largest gradient norm; 0: no limit")
    add("--ema-decay", type=unit_interval, default=0.998,
        help="of the averaged weights, which are measured and saved (BCCD, one seed: mAP@.5 .855, with 0 .852)")
    add("--patience", type=natural_int, default=30, help="evaluations without a better mAP before stopping; 0: never")
    add("--eval-interval", type=positive_int, default=1, help="epochs between validations")
    add("--save-minutes", type=natural_float, default=10.0,
        help="time between checkpoints within an epoch; 0: only at its end")
    add("--deterministic", action=_SWITCH, default=False,
        help="the same bits from the same flags on the same machine, where torch can; slower on a GPU")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--compile", action=_SWITCH, help="compile the network to train it faster (default: on CUDA)")
    add("--profile", metavar="N", type=natural_int, default=0,
        help="trace N training steps into OUTPUT_DIR/plots/profile.json, print the costliest operations; 0: none")
    add("--seed", type=natural_int, default=0, help="of weights, order, augmentation and the held-out share")


def build_parser():
    """Return the parser; a default of None is chosen later by the data set or the kind of start (`fill_defaults`)."""
    parser = argparse.ArgumentParser(
        description="Train, measure and use an SSD300 object detector. It trains unless told otherwise.",
        formatter_class=_Formatter,
    )
    add = parser.add_argument_group("what to do").add_argument
    add("--evaluate", metavar="FILE", help="measure a checkpoint on the test list, print the per-class table")
    add("--write-detections", metavar="DIR", help="with --evaluate: write the VOC devkit's comp4_det_*.txt files too")
    add("--score-detections", metavar="DIR", help="measure such files, of any program, on the test list of --data")
    add("--predict", metavar="PATH", nargs="+", help="detect in images, videos, folders and globs (needs --weights)")
    add("--weights", metavar="FILE", help="for --predict: a checkpoint, an exported folder or a Hugging Face id")
    add("--save-crops", action="store_true", help="with --predict: write each object found in an image as one, too")
    add("--save-xml", action="store_true", help="with --predict: write an annotation in VOC's form for each image, too")
    add("--resume", metavar="FILE", nargs="?", const="auto",
        help="go on with an interrupted run; without FILE: OUTPUT_DIR/checkpoints/last.pth")
    add("--audit", action="store_true", help="check all files of the lists, as before every training, and stop")
    add("--suggest-anchors", action="store_true",
        help="fit anchors to the training boxes, print what they match, write OUTPUT_DIR/plots/anchors.json, and stop")
    add("--output-dir", metavar="DIR", default=".", help="where checkpoints/ and plots/ are written")

    _add_data_flags(parser)
    add = parser.add_argument_group("network").add_argument
    add("--width", type=positive_float, help=f"factor on every channel count ({_BY_DATA})")
    add("--batch-norm", action=_SWITCH,
        help="batch norm after every convolution (default: when training from scratch; BCCD, one seed: mAP@.5 .855, "
             "without and with --lr 1e-3 .836)")
    add("--pretrained", action=_SWITCH, help="start from ImageNet VGG16 weights (default: at width 1)")
    add("--backbone-weights", metavar="FILE", help="torchvision's vgg16 or vgg16_bn weights, to save the download")
    add("--freeze-blocks", metavar="N", type=int, choices=range(6), default=0,
        help="keep the first N of the five VGG blocks as they are (4: ten convolutions)")
    add("--anchors", metavar="FILE", type=anchor_file,
        help="anchor sizes, as --suggest-anchors writes them (BCCD, three seeds: mAP@.5 .867 and COCO AP .539, else "
             ".864 and .526)")

    add = parser.add_argument_group("augmentation, as probabilities",
        "BCCD, three seeds: mAP@.5 .864 +-.008; without shadow, noise and blur .861 +-.003").add_argument
    add("--zoom-out", type=unit_interval,
        help=f"SSD zoom-out, up to 4 times ({_BY_DATA}; BCCD, one seed: mAP@.5 .855 with .2, .842 with 0, .830 with "
             ".5)")
    add("--crop", type=unit_interval,
        help=f"SSD crop, whose first choice is the whole picture ({_BY_DATA}; BCCD, one seed: mAP@.5 .855 with .6, "
             "with 0 .860, with 1 .845)")
    add("--color", type=unit_interval, help=f"each of brightness, contrast, saturation and hue ({_BY_DATA})")
    add("--shadow", type=unit_interval, help=f"random shadow ({_BY_DATA})")
    add("--noise", type=unit_interval, help=f"Gaussian noise such as a camera makes ({_BY_DATA})")
    add("--blur", type=unit_interval, help=f"Gaussian blur ({_BY_DATA})")

    _add_training_flags(parser)
    add = parser.add_argument_group("detection").add_argument
    add("--score-thresh", type=unit_interval,
        help=f"least score (default: {SCORE_THRESH} to measure; to predict, each class's best F1 on the validation "
             f"list, {DRAW_SCORE_THRESH} where there was none)")
    add("--nms-iou", type=unit_interval, default=NMS_IOU_THRESH, help="IoU from which the lower score of a class goes")
    add("--max-detections", type=positive_int, default=MAX_DETECTIONS, help="most detections an image")
    add("--flip-average", choices=FLIPS, default="off",
        help="average each picture's output with that of its mirror image, in twice the time, or with its flips both "
             "ways, in four times, to measure and predict (BCCD test, three seeds: mAP@.5 .891 and .901, else .884)")
    return parser


def flags_given(argv):
    """Return the names of the flags that stand on a command line."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def fill_defaults(args):
    """Fill what is None in a namespace, in place: by the data set, then by the kind of start."""
    is_named = args.data in ("voc2007", "voc0712", "shapes")
    chosen = dict(DATA_DEFAULTS[args.data if is_named else "folder"])
    if not is_named:  # a folder's default lists are those it has
        has = {p.stem for p in (Path(args.data) / "ImageSets" / "Main").glob("*.txt")}
        chosen["train_split"] = "trainval" if "trainval" in has and "train" not in has else "train"
        chosen |= {"test_split": "test"} if "test" in has else {}
    width = args.width or chosen["width"]
    pretrained = width == 1 if args.pretrained is None else args.pretrained
    cores = os.cpu_count() or 1
    # On two cores a loader process keeps torch's threads waiting for one another: it costs more than it gives.
    workers = min(16, cores) if args.device != "cpu" and torch.cuda.is_available() else int(cores > 2)
    by_start = PRETRAINED_DEFAULTS if pretrained else SCRATCH_DEFAULTS
    values = {**by_start, **chosen, "pretrained": pretrained, "workers": workers}
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def parse_args(argv=None, saved=None):
    """Return the complete namespace: flags given, then those `saved` with a run, then defaults.

    `given` names the flags on the command line. Contradictions end the program by parser.error, before any data is
    touched.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if empty := [name for name, value in vars(args).items() if value == []]:  # argparse's reading of --flag=--
        parser.error(f"argument --{empty[0].replace('_', '-')}: expected a value, not --")
    args.given = flags_given(argv)
    saved = saved or {}
    chosen = saved if saved or args.recipe == "own" else PAPER_RECIPE
    for name in chosen.keys() - args.given:
        setattr(args, name, tuple(chosen[name]) if isinstance(chosen[name], list) else chosen[name])
    actions = "evaluate", "score_detections", "predict", "resume", "audit", "suggest_anchors"
    if len(chosen := [f"--{name.replace('_', '-')}" for name in actions if getattr(args, name)]) > 1:
        parser.error(f"{' and '.join(chosen)} exclude one another")
    if args.write_detections and not args.evaluate:
        parser.error("--write-detections needs --evaluate")
    if bool(args.predict) != bool(args.weights):
        parser.error("--predict and --weights go together")
    if (args.save_crops or args.save_xml) and not args.predict:
        parser.error("--save-crops and --save-xml need --predict")
    fill_defaults(args)
    if args.pretrained and args.width != 1:
        parser.error(f"--pretrained needs --width 1: there are no ImageNet weights of width {args.width:g}")
    if args.backbone_weights and not args.pretrained:
        parser.error("--backbone-weights contradicts --no-pretrained and any --width but 1")
    if args.freeze_blocks and not args.pretrained:
        parser.error("--freeze-blocks needs pretrained weights: frozen random ones never learn")
    return args


def print_header(args, data, model, *, amp_dtype, steps):
    """Print what runs on what: versions, device, precision, data, network, recipe; chosen defaults included."""
    env = environment(model.anchors.device)
    numbers = [p.numel() for p in model.parameters()], [p.numel() for p in model.parameters() if p.requires_grad]
    is_cpu = model.anchors.device.type == "cpu"
    print(f"SSD300   python {env['python']}, torch {env['torch']}, torchvision {env['torchvision']}, "
          f"albumentations {env['albumentations']}")
    print(f"device   {env['device']}{f' ({torch.get_num_threads()} threads)' if is_cpu else ''}, "
          f"{str(amp_dtype or torch.float32).removeprefix('torch.')}, loader processes: {args.workers}")
    print(f"data     {args.data}: {len(data.train)} train, {len(data.val)} val, {len(data.test)} test images; "
          f"{sum(len(r.labels) for r in data.train)} training objects of {len(data.classes)} classes")
    for note in data.notes:
        print(f"         {note}")
    print(f"network  width {args.width:g}, batch norm {'on' if args.batch_norm else 'off'}, "
          f"{'ImageNet weights' if args.pretrained else 'from scratch'}; {sum(numbers[0]):,} parameters, "
          f"{sum(numbers[1]):,} of them trained; {len(model.anchors):,} anchors")
    print(f"recipe   {args.epochs} epochs of {steps} steps of {min(args.batch_size, len(data.train))} images; "
          f"{args.optimizer}, lr {args.lr:g}, weight decay {args.weight_decay:g}; {args.loss} loss; seed {args.seed}")
    if is_cpu and args.width == 1:
        print("         full width on a CPU is slow: --width .25 is about a sixteenth of the work")
    sys.stdout.flush()


def load_splits(args):
    """Return the DataSplits that the flags name."""
    named = {name: getattr(args, name) for name in DATA_FLAGS if name != "data"}
    return load_data(args.data, **named, anchor_sizes=args.anchors or ANCHOR_SIZES)


def detect_settings(args):
    """Return the settings of `evaluate` that the flags give; the score threshold is SCORE_THRESH if none gives one."""
    settings = {key: getattr(args, flag) for key, flag in DETECTION_FLAGS.items()}
    return settings | ({"score_thresh": SCORE_THRESH} if args.score_thresh is None else {})


def build_state(args, num_classes, device, resumed=None):
    """Return (TrainState, network config) by the flags: a new network, or the one of a resumed checkpoint."""
    config = {"num_classes": num_classes, "width": args.width, "batch_norm": args.batch_norm,
              **({"anchor_sizes": list(args.anchors)} if args.anchors else {})}
    model = SSD300(**config, prior_prob=FOCAL_PRIOR if args.loss == "focal" else None)
    if args.pretrained and resumed is None:
        load_backbone(model, fetch_backbone(args.backbone_weights, batch_norm=args.batch_norm))
    # In channels_last order the backward pass takes a CPU 1.3 (--width .25) to 1.7 times (1) as long in float32.
    is_plain = device.type == "cpu" and pick_amp_dtype(device, args.amp) is None
    order = torch.contiguous_format if is_plain else torch.channels_last
    model.freeze_blocks(args.freeze_blocks).to(device, memory_format=order)
    recipe = Recipe(**{name: getattr(args, name) for name in Recipe._fields})
    use_scaler = pick_amp_dtype(device, args.amp) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=use_scaler)
    state = TrainState(model, Ema(model, recipe.ema_decay), make_optimizer(model, recipe), scaler, NormGuard(model))
    if resumed is not None:
        try:
            state.load_state_dict(resumed["train_state"], resumed["model"])
        except ValueError as error:
            raise InputError(f"the checkpoint to resume from is of another network: {error}") from None
    return state, recipe, config


def report(result, records, classes, folder, **about):
    """Print the tables of an evaluation, write its plots and evaluation.json; returns the numbers and their summary."""
    detections, truth = result["detections"], truth_of(records)
    coco = evaluate_coco(detections, truth, len(classes))
    matrix = confusion_matrix(detections, truth, len(classes))
    print(class_table(result, coco, classes))
    save_figure(plot_precision_recall(result, classes), folder / "precision_recall.png")
    save_figure(plot_confusion(matrix, classes), folder / "confusion.png")
    numbers = about | {"num_images": len(records)} | summarize(result, coco, matrix, classes)
    write_json(folder / "evaluation.json", numbers)
    flips = about.get("detection", {}).get("flip_average", "off")
    return numbers, (f"Test mAP@.5: {result['map_area']:.4f} (area), {result['map11']:.4f} (11-point)"
                     f"{'' if flips == 'off' else f', flips averaged: {flips}'}")


@contextlib.contextmanager
def joined_processes(args):
    """Join the processes that torchrun started, if it did; each gets a device, and all but the first are silent."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    torch.distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if process_rank()[0] else sys.stdout):
            yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """Let torchrun's first process do something, such as a download, before the others do it."""
    rank, world = process_rank()
    if rank > 0:
        torch.distributed.barrier()
    yield
    if world > 1 and rank == 0:
        torch.distributed.barrier()


def make_network(state, *, compiled, amp_dtype, batch_size):
    """Return what runs forward in training: the model, compiled if asked for, its gradients averaged by torchrun."""
    model, device = state.model, state.model.anchors.device
    if process_rank()[1] > 1 and device.type == "cuda":
        # Few images a GPU make batch norm noisy, so its statistics are those of all. There is no such layer for CPUs.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = model
    if compiled:
        images = torch.zeros(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8, device=device)
        network = compile_model(model.train(), images.contiguous(memory_format=torch.channels_last), amp_dtype)
    if process_rank()[1] > 1:
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    return network


def prepare_speed(args, state, *, amp_dtype, batch_size, steps):
    """Set up by the flags what makes training fast and what measures it; batch_size of a process, steps of the run."""
    is_cuda = state.model.anchors.device.type == "cuda"
    torch.backends.cudnn.benchmark = is_cuda and not args.deterministic  # the shapes stay the same
    compiled = is_cuda if args.compile is None else args.compile
    state.network = make_network(state, compiled=compiled, amp_dtype=amp_dtype, batch_size=batch_size)
    state.ideal_s = ideal_seconds(state.model, amp_dtype) if is_cuda else 0.0
    if args.profile + 3 > steps and args.profile:
        raise InputError(f"--profile {args.profile} needs {args.profile + 3} steps, this run has {steps}")
    if args.profile:
        profile_steps(state.optimizer, args.profile, Path(args.output_dir) / "plots" / "profile.json")


def make_gallery_loader(records):
    """Return the loader of twelve images, evenly spread, for `draw_gallery`."""
    return make_loader(VocDataset(spread(records, 12), build_transform(train=False)), batch_size=12)


def make_loaders(args, data, *, pin_memory):
    """Return the loaders of training, of validation (None if nothing is held out) and of the gallery's images."""
    rank, world = process_rank()
    cache = open_cache(data.train, args.cache, args.data_root, processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    steps = ("zoom_out", "crop", "color", "shadow", "noise", "blur")
    augment, plain = build_transform(train=True, **{s: getattr(args, s) for s in steps}), build_transform(train=False)
    make = functools.partial(make_loader, workers=args.workers, pin_memory=pin_memory)
    sampler = EpochBatchSampler(len(data.train), args.batch_size, args.seed, rank, world)
    train_loader, val_loader = make(VocDataset(data.train, augment, args.seed, cache), sampler=sampler), None
    if data.val:
        share = range(rank, len(data.val), world) if len(data.val) >= world else None
        val_loader = make(VocDataset(data.val, plain), batch_size=args.batch_size, share=share)
    return train_loader, val_loader, make_gallery_loader(data.test or data.val or data.train)


def measure_test_list(args, data, model, checkpoint):
    """Return (result of `evaluate` on the test list, what `report` says of the measurement).

    checkpoint: the model's file.
    """
    loader = make_loader(VocDataset(data.test, build_transform(train=False)), batch_size=args.batch_size,
                         workers=args.workers, pin_memory=model.anchors.device.type == "cuda")
    settings = detect_settings(args)
    about = {"checkpoint": str(checkpoint), "data": args.data, "split": args.test_split, "detection": settings}
    return evaluate(model, loader, amp_dtype=pick_amp_dtype(model.anchors.device, args.amp), **settings), about


def finish_training(args, data, chosen, gallery, *, device):
    """Measure the chosen checkpoint on the test list and save it as the final one; returns (path, content, summary)."""
    final = load_checkpoint(chosen)
    final.pop("train_state", None)
    model, summary = model_from_checkpoint(final, chosen, device), "no test list, so no test mAP: see --test-split"
    gallery(model, title=f"{chosen.name}, epoch {final['metrics']['epoch']}")
    path = chosen.with_name(f"ssd_{data.name}_final.pth")
    if data.test:
        result, about = measure_test_list(args, data, model, path)
        folder = Path(args.output_dir) / "plots" / "evaluation"
        final["test"], summary = report(result, data.test, data.classes, folder, **about)
    save_checkpoint(path, final)
    return path, final, summary


def run_training(args, stop, resumed=None):
    """Train by the flags, measure once on the test list, save the final checkpoint; returns the exit code.

    resumed: the checkpoint to go on from. stop: StopSignals.
    """
    began, device = time.perf_counter(), pick_device(args.device)
    amp_dtype, is_cuda, (rank, world) = pick_amp_dtype(device, args.amp), device.type == "cuda", process_rank()
    if not is_cuda:
        keep_freed_memory()
    set_seed(args.seed, deterministic=args.deterministic)
    cv2.setNumThreads(0)
    checkpoints, plots = Path(args.output_dir) / "checkpoints", Path(args.output_dir) / "plots"
    with first_process_first():
        data = load_splits(args)
    known = None if resumed is None else (resumed["classes"], resumed.get("data", data.digest))
    if known not in (None, (list(data.classes), data.digest)):
        raise InputError(f"{args.data} has other training images or classes than when the run to resume was saved")
    with first_process_first():
        state, recipe, config = build_state(args, len(data.classes), device, resumed)
    is_lost = rank == 0 and state.best_epoch > 0 and not (checkpoints / "best.pth").is_file()
    if is_lost:
        print(f"warning: {checkpoints / 'best.pth'} of epoch {state.best_epoch} is missing: the best of the epochs to "
              "come will be measured in its place", file=sys.stderr)
    if average_over_processes(torch.tensor(float(is_lost), device=device)) > 0:  # the first process decides for all
        state.best_map, state.best_epoch = -1.0, state.epoch
    if rank == 0:
        prepare_folders(checkpoints, plots, keep=resumed is not None)
    flags = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items() if k != "given"}
    base = {"config": config, "classes": list(data.classes), "args": flags, "data": data.digest}
    train_loader, val_loader, gallery_loader = make_loaders(args, data, pin_memory=is_cuda)
    print_header(args, data, state.model, amp_dtype=amp_dtype, steps=len(train_loader))
    record = {"flags": flags, "environment": environment(device), "classes": list(data.classes), "notes": data.notes}
    write_json(checkpoints / "run.json", record)
    save_figure(plot_augmentations(train_loader.dataset, data.classes), plots / "augmentations.png")
    save_figure(plot_data(data.train, data.classes, args.anchors or ANCHOR_SIZES), plots / "data.png")
    settings = detect_settings(args)
    gallery = functools.partial(draw_gallery, loader=gallery_loader, classes=data.classes,
                                path=plots / "predictions.png", amp_dtype=amp_dtype, settings=settings)

    @sparingly
    def redraw(state):
        draw_curves(state.history, plots)
        gallery(state.ema.model, title=f"After epoch {state.epoch}")

    prepare_speed(args, state, amp_dtype=amp_dtype, batch_size=train_loader.batch_sampler.batch_size // world,
                  steps=(recipe.epochs - state.epoch) * len(train_loader))
    chosen = fit(state, (train_loader, val_loader), recipe, amp_dtype=amp_dtype,
                 saver=Saver(state, checkpoints, base, args.save_minutes), settings=settings,
                 redraw=redraw if rank == 0 else lambda state: None, stop=stop)
    if rank > 0:
        return 0
    draw_curves(state.history, plots)
    path, final, summary = finish_training(args, data, chosen, gallery, device=device)
    seconds = time.perf_counter() - began
    write_json(checkpoints / "run.json", record | {"test": final.get("test"), "chosen": chosen.name, "wall_s": seconds})
    print(f"{summary}\n{path}\nwall time {datetime.timedelta(seconds=round(seconds))}")
    return 0


def evaluate_checkpoint(args, checkpoint):
    """Return (data, model, result of `evaluate`, about) of a checkpoint on the test list that the flags name.

    about: what `report` says of the measurement.
    """
    device, data = pick_device(args.device), load_splits(args)
    if list(data.classes) != list(checkpoint["classes"]):
        raise InputError(f"{args.evaluate} knows the classes {', '.join(checkpoint['classes'])}; {args.data} has "
                         f"{', '.join(data.classes)}: name the data it was trained for with --data")
    if not data.test:
        raise InputError(f"{args.data} has no test list: name one with --test-split")
    model = model_from_checkpoint(checkpoint, args.evaluate, device)
    print(f"{args.evaluate} on {args.data}, list {args.test_split}: {len(data.test)} images")
    return data, model, *measure_test_list(args, data, model, args.evaluate)


def run_evaluation(args, checkpoint):
    """Measure a checkpoint on the test list of its own data set, or of the one that the flags name."""
    plots, (data, model, result, about) = Path(args.output_dir) / "plots", evaluate_checkpoint(args, checkpoint)
    if args.write_detections:
        folder = Path(args.write_detections)
        folder.mkdir(parents=True, exist_ok=True)
        write_devkit_files(folder, args.test_split, result["detections"], data.test, data.classes)
    _, summary = report(result, data.test, data.classes, plots / "evaluation", **about)
    draw_gallery(model, make_gallery_loader(data.test), data.classes, plots / "predictions.png",
                 amp_dtype=pick_amp_dtype(model.anchors.device, args.amp), title=Path(args.evaluate).name,
                 settings=about["detection"])
    print(summary)
    return 0


def run_scoring(args):
    """Score a folder of the devkit's detection files, whatever program wrote them, on the test list of the data."""
    data, folder = load_splits(args), Path(args.score_detections)
    if not data.test:
        raise InputError(f"{args.data} has no test list: name one with --test-split")
    detections = read_devkit_files(folder, args.test_split, data.test, data.classes)
    print(f"{folder} on {args.data}, list {args.test_split}: {len(data.test)} images")
    result = score_detections(detections, data.test, len(data.classes))
    print(report(result, data.test, data.classes, Path(args.output_dir) / "plots" / "evaluation",
                 detections=str(folder), data=args.data, split=args.test_split)[1])
    return 0


def run_prediction(args):
    """Detect in what the command line names; returns 1 if something could not be read, listed at the end, else 0."""
    paths, folder = find_inputs(args.predict), Path(args.output_dir) / "plots" / "predictions"
    detector = load_detector(args.weights, args.device, args.amp)
    given = {key: getattr(args, flag) for key, flag in DETECTION_FLAGS.items() if flag in args.given}
    problems = predict_files(detector, paths, folder, save_crops=args.save_crops, save_xml=args.save_xml,
                             classes=args.classes, **given)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def resume_args(argv, args):
    """Return (args, checkpoint) of the run to go on with; InputError for flags that contradict it."""
    path = Path(args.output_dir) / "checkpoints" / "last.pth" if args.resume == "auto" else Path(args.resume)
    checkpoint = load_checkpoint(path, resumable=True)
    saved = {k: v for k, v in checkpoint["args"].items() if k not in ("resume", "output_dir")}
    differ = [f"--{name.replace('_', '-')} {getattr(args, name)} (saved: {value})" for name, value in saved.items()
              if name in args.given - RESUME_MAY_CHANGE
              and getattr(args, name) != (tuple(value) if isinstance(value, list) else value)]
    if differ:
        raise InputError(f"{path} was made with other flags: {'; '.join(differ)}; leave these out or start a new run")
    return parse_args(argv, saved), checkpoint


def evaluation_args(argv, args):
    """Return (args, checkpoint) to evaluate, detecting as its run did, and on its data unless --data names others."""
    checkpoint = load_checkpoint(args.evaluate)
    kept = {*DETECTION_FLAGS.values(), *(() if "data" in args.given else DATA_FLAGS)}
    return parse_args(argv, {name: value for name, value in checkpoint["args"].items() if name in kept}), checkpoint


def run_audit(args):
    """Check every file of the lists and print what was found; InputError for what would stop a training."""
    began, data = time.perf_counter(), load_splits(args)
    print(f"{args.data}: {len(data.train)} train, {len(data.val)} val, {len(data.test)} test images; "
          f"{sum(len(r.labels) for r in data.train + data.val + data.test)} objects of {len(data.classes)} classes; "
          f"{time.perf_counter() - began:.1f} s")
    print(*data.notes or ["nothing to mend"], sep="\n")
    return 0


def run_suggestion(args):
    """Print what the anchors match of the training boxes, and what anchors made for these would; writes the latter."""
    data, path = load_splits(args), Path(args.output_dir) / "plots" / "anchors.json"
    boxes = torch.from_numpy(np.concatenate([r.boxes for r in data.train]))
    suggested = suggest_anchor_sizes(boxes)
    print(f"{len(boxes)} training boxes of {args.data}: the share that some anchor overlaps by an IoU of")
    print("anchors     .5      .7      mean of the best IoU")
    for name, sizes in (("present", args.anchors or ANCHOR_SIZES), ("suggested", suggested)):
        best = best_anchor_iou(boxes, sizes)
        print(f"{name:<10} {(best >= 0.5).float().mean():.4f}  {(best >= 0.7).float().mean():.4f}  {best.mean():.4f}")
    for cells, pairs in zip(FEATURE_MAPS, suggested, strict=True):
        print(f"{cells:3d} cells: " + ", ".join(f"{w:.3f} x {h:.3f}" for w, h in pairs))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json([[[round(v, 4) for v in pair] for pair in pairs] for pairs in suggested]) + "\n")
    print(f"{path}\ntrain with them: --anchors {path}")
    return 0


def advise(error, args):
    """Return what helps against an error for want of memory; None for another error."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        cache = ", or set --cache off" if args.cache == "ram" else ""
        return (f"out of memory: lower --batch-size (now {args.batch_size}), --width or --workers (now {args.workers})"
                f"{cache}")
    if "DataLoader worker" in str(error):
        return ("a loader process died, most often for want of memory or, in a container, of /dev/shm: lower --workers "
                f"(now {args.workers}) or --batch-size (now {args.batch_size}); --workers 0 shows any other cause")
    return None


def main(argv=None):
    """Run the command line; returns the exit code.

    0 done, 1 done but for unreadable files, 2 a mistake to mend, 130 or 143 stopped by SIGINT or SIGTERM.
    """
    args, stop = parse_args(argv), StopSignals()
    try:
        with stop:
            if args.predict:
                return run_prediction(args)
            if args.evaluate:
                return run_evaluation(*evaluation_args(argv, args))
            if args.score_detections:
                return run_scoring(args)
            if args.audit:
                return run_audit(args)
            if args.suggest_anchors:
                return run_suggestion(args)
            args, checkpoint = resume_args(argv, args) if args.resume else (args, None)
            with joined_processes(args):
                return run_training(args, stop, checkpoint)
    except InputError as error:  # raised in a loader process it comes with that process's traceback before it
        print(f"error: {str(error).strip().splitlines()[-1].split('InputError: ')[-1]}", file=sys.stderr)
        return 2
    except OSError as error:  # an unwritable folder, a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if (advice := advise(error, args)) is None:
            raise
        print(f"error: {advice}; --resume goes on from the last save", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        last = Path(args.output_dir) / "checkpoints" / "last.pth"
        where = "" if args.output_dir == "." else f" --output-dir {args.output_dir}"
        how = f"go on from {last} with --resume{where}" if last.is_file() else "nothing was saved for --resume yet"
        print(f"\ninterrupted; {how}", file=sys.stderr)
        return 128 + (stop.signum or signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
