"""What predict and video share: averaged flips, reading ahead, names of inputs and outputs, result files."""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import functools
import glob
import itertools
import json
import re
import signal
import sys
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ssd_object_detection as ssd
from ssd_tools.common import run_program
from ssd_tools.weights import load_weights

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}
TARGET_SUFFIXES = dict.fromkeys(VIDEO_SUFFIXES, ".mp4") | dict.fromkeys((".jpg", ".jpeg", ".jfif"), ".jpg")
RIBBON = "picamera"  # the source that picamera2 reads
FLIPS = {"off": (), "horizontal": ((3,),), "both": ((3,), (2,), (2, 3))}  # dimensions of (B, 3, H, W)
BATCH_SIZE = 8

Source = Path | str  # a file; or a camera's number, RIBBON, or an address
Found = dict[str, Any]  # `ssd.Detections.to_dict` of an image; of a video {"fps", "frames": a dict each}
Item = TypeVar("Item")
Result = TypeVar("Result")


# ---- the network ----


def unflip(values: Tensor, dims: Sequence[int], anchors_per_cell: Sequence[int]) -> Tensor:
    """Return outputs (B, A, n) of images flipped along dims in the order of the anchors of unflipped ones."""
    sizes = [cells * cells * count for cells, count in zip(ssd.FEATURE_MAPS, anchors_per_cell, strict=True)]
    parts = []
    for part, cells in zip(values.split(sizes, dim=1), ssd.FEATURE_MAPS, strict=True):
        grid = part.view(len(part), cells, cells, -1, part.shape[-1])  # (B, y, x, anchors, n)
        parts.append(grid.flip([dim - 1 for dim in dims]).flatten(1, 3))
    return torch.cat(parts, dim=1)  # (B, A, n)


class FlipDetector(ssd.Detector):
    """A detector that averages the outputs for an image and its flips; `flips` is an entry of FLIPS."""

    flips: tuple[tuple[int, ...], ...] = ()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means of probabilities, as their logarithm (B, A, K + 1), and of offsets (B, A, 4)."""
        cls_logits, box_deltas = self.model(images)
        if not self.flips:
            return cls_logits, box_deltas
        probabilities = F.softmax(cls_logits, dim=-1)
        per_cell = self.model.anchors_per_cell
        for dims in self.flips:
            cls_logits, offsets = self.model(images.flip(dims))
            sign_x = -1 if 3 in dims else 1
            sign_y = -1 if 2 in dims else 1
            signs = offsets.new_tensor([sign_x, sign_y, 1, 1])  # cx, cy, w, h
            probabilities = probabilities + unflip(F.softmax(cls_logits, dim=-1), dims, per_cell)
            box_deltas = box_deltas + unflip(offsets, dims, per_cell) * signs
        count = 1 + len(self.flips)
        return (probabilities / count).log(), box_deltas / count


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], *, depth: int = 2 * BATCH_SIZE
) -> Iterator[Result]:
    """Yield function(item) for each item, in order; threads, one a core, work up to `depth` items ahead."""
    waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(ssd.usable_cores()) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def open_or_error(source: Any) -> Image.Image | ssd.InputError:
    """Return the upright picture of what `ssd.open_image` takes, or the InputError that it raises."""
    try:
        return ssd.open_image(source)
    except ssd.InputError as error:
        return error


def detect_all(
    detector: ssd.Detector, sources: Iterable[Any], **settings: Any
) -> Iterator[tuple[Image.Image, ssd.Detections] | ssd.InputError]:
    """Yield (upright PIL image, Detections) for each of an iterable of images, or the InputError of it.

    Threads open the next images while the network works. settings: of `ssd.Detector.predict`.
    """
    opened = prefetch(open_or_error, sources)
    while batch := list(itertools.islice(opened, BATCH_SIZE)):
        pictures = [item for item in batch if not isinstance(item, ssd.InputError)]
        found: list[ssd.Detections] = []
        if pictures:
            found = detector.detect_in(pictures, **settings)
        results = iter(found)
        for item in batch:
            if isinstance(item, ssd.InputError):
                yield item
            else:
                yield item, next(results)


# ---- inputs and outputs ----


def is_stream(argument: str) -> bool:
    """Whether an argument is a camera's number, RIBBON or an address, rather than files."""
    is_camera = (argument.isdigit() or argument == RIBBON) and not Path(argument).exists()
    return is_camera or re.match(r"\w+://", argument) is not None


def is_video(source: Source) -> bool:
    """Whether a source is a video file, a camera or a stream, rather than an image file."""
    return isinstance(source, str) or source.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(arguments: Iterable[object], suffixes: Collection[str], kind: str) -> list[Source]:
    """Return what arguments name, each once: Paths of files, folders and globs, a str for a stream.

    Of folders and globs the files that end in one of suffixes; kind: what these are, in words. InputError for
    an argument that names nothing.
    """
    sources: list[Source] = []
    for argument in map(str, arguments):
        named = Path(argument)
        if is_stream(argument):
            sources.append(argument)
            continue
        if named.is_file():
            sources.append(named)
            continue
        if named.is_dir():
            there = list(named.iterdir())
            missing = f"{kind} in this folder"
        else:
            there = [Path(path) for path in glob.glob(argument, recursive=True)]
            missing = "such file"
        found = sorted(path for path in there if path.suffix.lower() in suffixes and path.is_file())
        if not found:
            raise ssd.InputError(f"{argument}: no {missing}")
        sources += found
    return list(dict.fromkeys(sources))


def public_name(source: Source) -> str:
    """Return a source as text without the user and password, up to the last @, that an address may hold."""
    return re.sub(r"//[^/?]*@", "//", str(source))


def target_name(source: Source) -> tuple[str, str]:
    """Return (stem, suffix) of the drawn copy of a source."""
    if isinstance(source, Path):
        return source.stem, TARGET_SUFFIXES.get(source.suffix.lower(), ".png")
    if source.isdigit():
        return f"camera_{source}", ".mp4"
    return Path(urllib.parse.urlsplit(source).path).stem or "stream", ".mp4"


def free_name(base: str, taken: set[str], first: int) -> str:
    """Return a name, numbered from `first` on where it is taken but for its case; it is taken then too."""
    name = base
    for number in itertools.count(first):
        if name.casefold() not in taken:
            break
        name = f"{base}_{number}"
    taken.add(name.casefold())
    return name


def name_targets(sources: Iterable[Source], folder: Path) -> dict[Source, Path]:
    """Return {source: path of its drawn copy in a folder}, whose stems differ in more than case."""
    targets: dict[Source, Path] = {}
    taken: set[str] = set()
    for source in sources:
        base, suffix = target_name(source)
        targets[source] = folder / (free_name(base, taken, 1) + suffix)
    return targets


def prepare_folders(sources: Iterable[Source], folder: Path, *files: ssd.PathLike | None) -> None:
    """Make the folder of the results and those of further files; InputError if a source lies in the first."""
    for source in sources:
        if isinstance(source, Path) and source.resolve().parent == folder.resolve():
            raise ssd.InputError(f"{source} lies where the results go, to be overwritten: set --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file is not None:
            Path(file).parent.mkdir(parents=True, exist_ok=True)


def count_text(names: Iterable[str]) -> str:
    """Return how often each of some names occurs, the most frequent first, as text."""
    counts = collections.Counter(names).most_common()
    return ", ".join(f"{name} {count}" for name, count in counts) or "nothing found"


def found_text(found: Found) -> str:
    """Return what was found as JSON: an image a line, or a frame of a video."""
    if "frames" not in found:
        return json.dumps(found)
    frames = ",\n".join(map(json.dumps, found["frames"]))
    return f'{{"fps": {found["fps"]}, "frames": [\n{frames}\n]}}'


def write_predictions(path: Path, report: dict[str, Found]) -> None:
    """Write predictions.json: {source: what was found}, an image or a frame of a video a line."""
    rows = ",\n".join(f"{json.dumps(name)}: {found_text(found)}" for name, found in report.items())
    content = f"{{\n{rows}\n}}\n"
    ssd.write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def found_by_image(report: dict[str, Found]) -> Iterator[tuple[str, Found]]:
    """Yield (image, what was found in it); frame N of a video is the image FILE#N."""
    for name, found in report.items():
        if "frames" not in found:
            yield name, found
            continue
        for number, frame in enumerate(found["frames"]):
            yield f"{name}#{number}", frame


def write_csv(path: ssd.PathLike, report: dict[str, Found]) -> None:
    """Write what was found as CSV, a box a line, in pixels; see `found_by_image`."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("image", "class", "score", "x1", "y1", "x2", "y2"))
            for image, found in found_by_image(report):
                columns = found["names"], found["scores"], found["boxes_px"]
                for name, score, box in zip(*columns, strict=True):
                    table.writerow((image, name, score, *box))

    ssd.write_atomically(path, write)


def write_results(
    results: Iterable[tuple[Source, Found | ssd.InputError]],
    sources: Iterable[Source],
    folder: Path,
    save_csv: ssd.PathLike | None = None,
) -> list[str]:
    """Write predictions.json, and a CSV, of results in the order of the sources; an interruption keeps them.

    results: (source, what was found; {}: nothing to keep; or the InputError). Returns a line for each error.
    """
    report: dict[str, Found] = {public_name(source): {} for source in sources}
    problems = []
    try:
        for source, found in results:
            if isinstance(found, ssd.InputError):
                problems.append(str(found))
            else:
                report[public_name(source)] = found
    finally:
        done = {name: found for name, found in report.items() if found}
        write_predictions(folder / "predictions.json", done)
        if save_csv is not None:
            write_csv(save_csv, done)
    return problems


# ---- the command line ----


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that predict and video have in common."""
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="checkpoint, exported folder or Hugging Face id")
    add("--output-dir", default=".", metavar="DIR", help="results go to DIR/plots/predictions")
    add("--classes", type=ssd.class_list, metavar="A,B", help="report these classes only")
    add("--save-csv", metavar="FILE", help="write a line a box: image, class, score, x1, y1, x2, y2")
    add("--flip-average", choices=FLIPS, default="off", help="average over flips: 2 or 4 times the work")
    add("--score-thresh", type=ssd.unit_interval, help="least score (default: each class's of best F1)")
    add("--nms-iou", type=ssd.unit_interval, help="IoU at which NMS drops the weaker (default: the run's)")
    add("--max-detections", type=ssd.positive_int, default=ssd.MAX_DETECTIONS, help="most of an image")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")


def make_detector(args: argparse.Namespace) -> tuple[FlipDetector, dict[str, Any]]:
    """Return (FlipDetector, settings of `ssd.Detector.predict`) by the flags and the checkpoint."""
    checkpoint = load_weights(args.weights)
    device = ssd.pick_device(args.device)
    model = ssd.model_from_checkpoint(checkpoint, args.weights, device)
    amp_dtype = ssd.pick_amp_dtype(device, args.amp)
    detector = FlipDetector(model, checkpoint["classes"], amp_dtype, checkpoint["score_thresh"])
    detector.flips = FLIPS[args.flip_average]
    known = detector.classes
    if args.score_thresh is not None:
        detector.score_thresh = dict.fromkeys(known, args.score_thresh)
    if args.classes:
        unknown = [name for name in args.classes if name not in known]
        if unknown:
            raise ssd.InputError(f"no class {', '.join(unknown)}: the model knows {', '.join(known)}")
        detector.score_thresh |= dict.fromkeys(set(known) - set(args.classes), 2.0)  # no score reaches it
    nms_iou = args.nms_iou
    if nms_iou is None:
        nms_iou = checkpoint["args"].get("nms_iou", ssd.NMS_IOU_THRESH)
    return detector, {"nms_iou_thresh": nms_iou, "max_detections": args.max_detections}


def results_folder(args: argparse.Namespace) -> Path:
    """Return the folder that the results go to."""
    return Path(args.output_dir) / "plots" / "predictions"


def run_predictions(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Call run(args) and return the exit code; SIGTERM ends it as Ctrl-C does: a video is closed, not cut."""
    with contextlib.suppress(ValueError):  # only the main thread may have handlers
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_program(functools.partial(run, args))


def report_problems(problems: Sequence[str]) -> int:
    """Print a line for each input that could not be read; returns the exit code, 1 if there is one."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0
