"""Detect in images, videos, cameras and streams; write drawn copies, predictions, crops, annotations.

    python -m ssd_tools.predict photos/ holiday.mp4 --weights checkpoints/ssd_shapes_final.pth
    python -m ssd_tools.predict 'photos/**/*.jpg' --weights FILE --classes cat,dog --save-crops --save-xml
    python -m ssd_tools.predict val2017 --weights FILE --save-coco found.json --coco-ids instances.json
    python -m ssd_tools.predict 0 --weights FILE --show                # a camera, in a window, until q
    python -m ssd_tools.predict rtsp://camera/stream --weights FILE    # written as MP4, until Ctrl-C

The results are in plots/predictions: photos stay JPEG, other images become PNG, videos MP4 without sound. A
live source leaves a line a frame in NAME.jsonl; frames that come while the network works are dropped. What
cannot be read is listed at the end; the exit code is then 1.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import glob
import itertools
import json
import os
import queue
import re
import signal
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import ssd_object_detection as ssd
from ssd_tools.export import load_weights
from ssd_tools.shapes import write_annotation

PAGED_SUFFIXES = {".gif", ".tif", ".tiff", ".webp", ".png"}  # of images that may have several frames
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}
SUFFIXES = {*ssd.IMAGE_SUFFIXES} | VIDEO_SUFFIXES
TARGET_SUFFIXES = dict.fromkeys(VIDEO_SUFFIXES, ".mp4") | dict.fromkeys((".jpg", ".jpeg", ".jfif"), ".jpg")
FLIPS = {"off": (), "horizontal": ((3,),), "both": ((3,), (2,), (2, 3))}  # dimensions of (B, 3, H, W)
BATCH_SIZE = 8
RETRIES, RETRY_PAUSE = 30, 1.0  # of a stream that broke off; seconds
TIMEOUT_MS = 10_000  # for a stream to open, or to deliver a frame
MOST_LISTED = 6  # objects of an image that are printed one by one


def unflip(values, dims, anchors_per_cell):
    """Return outputs (B, A, n) of images flipped along dims in the order of the anchors of unflipped ones."""
    sizes = [cells * cells * count for cells, count in zip(ssd.FEATURE_MAPS, anchors_per_cell, strict=True)]
    parts = []
    for part, cells in zip(values.split(sizes, dim=1), ssd.FEATURE_MAPS, strict=True):
        grid = part.view(len(part), cells, cells, -1, part.shape[-1])  # (B, y, x, anchors, n)
        parts.append(grid.flip([dim - 1 for dim in dims]).flatten(1, 3))
    return torch.cat(parts, dim=1)


class FlipDetector(ssd.Detector):
    """A detector that averages the outputs for an image and its flips; `flips` is an entry of FLIPS."""

    flips = ()

    def forward(self, images):
        """Return the means of probabilities, as their logarithm (B, A, K + 1), and of offsets (B, A, 4)."""
        cls_logits, box_deltas = self.model(images)
        if not self.flips:
            return cls_logits, box_deltas
        probabilities = F.softmax(cls_logits, dim=-1)
        per_cell = self.model.anchors_per_cell
        for dims in self.flips:
            cls_logits, offsets = self.model(images.flip(dims))
            signs = offsets.new_tensor([-1 if 3 in dims else 1, -1 if 2 in dims else 1, 1, 1])  # cx, cy, w, h
            probabilities = probabilities + unflip(F.softmax(cls_logits, dim=-1), dims, per_cell)
            box_deltas = box_deltas + unflip(offsets, dims, per_cell) * signs
        count = 1 + len(self.flips)
        return (probabilities / count).log(), box_deltas / count


def prefetch(function, items, *, depth=2 * BATCH_SIZE):
    """Yield function(item) for each item, in order; threads, one a core, work up to `depth` items ahead."""
    waiting = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(ssd.usable_cores()) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def detect_all(detector, sources, **settings):
    """Yield (upright PIL image, Detections) for each of an iterable of images, or the InputError of it.

    Threads open the next images while the network works. settings: of `ssd.Detector.predict`.
    """

    def open_or_error(source):
        try:
            return ssd.open_image(source)
        except ssd.InputError as error:
            return error

    opened = prefetch(open_or_error, sources)
    while batch := list(itertools.islice(opened, BATCH_SIZE)):
        pictures = [item for item in batch if not isinstance(item, ssd.InputError)]
        found = iter(detector.detect_in(pictures, **settings) if pictures else ())
        for item in batch:
            yield item if isinstance(item, ssd.InputError) else (item, next(found))


def is_stream(argument):
    """Whether an argument is a camera's number or an address, rather than files."""
    return bool(re.match(r"\w+://", argument)) or (argument.isdigit() and not Path(argument).exists())


def find_inputs(arguments):
    """Return what arguments name, each once: Paths of files, folders and globs, a str for a stream.

    InputError for one that names nothing.
    """
    paths = []
    for argument in map(str, arguments):
        if is_stream(argument):
            paths.append(argument)
            continue
        named = Path(argument)
        there = named.iterdir() if named.is_dir() else map(Path, glob.glob(argument, recursive=True))
        found = sorted(path for path in there if path.suffix.lower() in SUFFIXES and path.is_file())
        if named.is_file():
            found = [named]
        if not found:
            missing = "image or video in this folder" if named.is_dir() else "such file"
            raise ssd.InputError(f"{argument}: no {missing}")
        paths += found
    return list(dict.fromkeys(paths))


def public_name(source):
    """Return a source as text without the user and password, up to the last @, that an address may hold."""
    return re.sub(r"//[^/?]*@", "//", str(source))


def name_targets(paths, folder):
    """Return {path or stream: path of its drawn copy in a folder}, whose stems differ in more than case."""
    targets, taken = {}, set()
    for path in paths:
        if isinstance(path, Path):
            base, suffix = path.stem, TARGET_SUFFIXES.get(path.suffix.lower(), ".png")
        else:
            named = Path(urllib.parse.urlsplit(path).path).stem
            base, suffix = f"camera_{path}" if path.isdigit() else named or "stream", ".mp4"
        numbered = (f"{base}_{number}" for number in itertools.count(1))
        stem = next(stem for stem in itertools.chain([base], numbered) if stem.casefold() not in taken)
        taken.add(stem.casefold())
        targets[path] = folder / (stem + suffix)
    return targets


def write_crops(picture, found, target):
    """Write each object of an image as crops/CLASS/*.png beside the drawn copy `target`."""
    for number, (box, name) in enumerate(zip(found.boxes_px, found.names, strict=True)):
        folder = target.parent / "crops" / re.sub(r"\W", "_", name)
        folder.mkdir(parents=True, exist_ok=True)
        corners = *np.floor(box[:2]).tolist(), *np.ceil(box[2:]).tolist()
        picture.crop(corners).save(folder / f"{target.stem}_{number}.png")


def write_xml(path, picture, found, target):
    """Write the objects of an upright image as a VOC annotation: Annotations/*.xml beside `target`."""
    folder = target.parent / "Annotations"
    folder.mkdir(exist_ok=True)
    boxes = ssd.to_voc_pixels(found.boxes_px).round().astype(int).tolist()
    objects = list(zip(found.names, boxes, strict=True))
    write_annotation(folder / f"{target.stem}.xml", path.name, (picture.height, picture.width, 3), objects)


# ---- videos, cameras and streams ----


def open_video(source):
    """Return a cv2.VideoCapture of a file, address or camera's number; InputError if it cannot be opened."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # no chatter about broken videos
    set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # OpenCV 4, and 5
    set_log_level(0)  # nor about missing cameras
    if isinstance(source, Path):
        video, problem = cv2.VideoCapture(str(source.absolute())), "not readable as a video"  # a:b is no URL
    elif source.isdigit():
        video, problem = cv2.VideoCapture(int(source)), "no such camera"
    else:
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT_MS]
        video, problem = cv2.VideoCapture(source, cv2.CAP_FFMPEG, limits), "not reachable, or no video"
    if not video.isOpened():
        raise ssd.InputError(f"{public_name(source)}: {problem}")
    return video


def num_frames(video):
    """Return the number of frames that a cv2.VideoCapture announces; 0 for a live source."""
    return max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))


def read_frames(video):
    """Yield the frames of a cv2.VideoCapture as RGB arrays."""
    while (read := video.read())[0]:
        yield cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)


@contextlib.contextmanager
def video_output(path, fps, title):
    """Yield put(picture, times), which writes a PIL image `times` times into an MP4, or shows it: path None.

    It returns whether to go on: False after q or a closed window. InputError if OpenCV has no windows.
    """
    writer, codec = cv2.VideoWriter(), cv2.VideoWriter.fourcc(*"mp4v")

    def write(picture, times=1):
        if not writer.isOpened() and not writer.open(str(path), codec, fps, picture.size):
            raise OSError(f"{path}: not writable as a video")
        frame = cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR)
        for _ in range(times):
            writer.write(frame)
        return True

    def show(picture, times=1):
        cv2.imshow(title, cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR))
        is_quit = cv2.waitKey(1) & 0xFF == ord("q")
        return not is_quit and cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) > 0

    if path is not None:
        try:
            yield write
        finally:
            writer.release()
        return
    try:
        cv2.namedWindow(title, cv2.WINDOW_NORMAL)
    except cv2.error:
        raise ssd.InputError("--show: this OpenCV has no windows: pip install opencv-python") from None
    yield show
    cv2.destroyAllWindows()


def predict_video(detector, video, name, target, **settings):
    """Detect in all frames of a cv2.VideoCapture; returns {"fps", "frames": a dict each}.

    The drawn frames go where `video_output` puts them. Raises InputError where a tenth or more of what the
    video announces, in frames and in seconds, cannot be read.
    """
    total = num_frames(video)  # Matroska: seconds times rate, of a varying rate more frames than there are
    fps = video.get(cv2.CAP_PROP_FPS) or 25.0
    reached = 0.0  # seconds

    def timed_frames():
        nonlocal reached
        for frame in read_frames(video):
            reached = max(reached, video.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            yield frame

    def draw(pair):
        picture, found = pair
        return found.draw(picture), found.to_dict()

    frames = []
    drawn = prefetch(draw, detect_all(detector, timed_frames(), **settings))
    with video_output(target, fps, name) as put:
        for picture, found in tqdm(drawn, name, total or None, disable=not sys.stderr.isatty()):
            frames.append(found)
            if not put(picture):
                return {"fps": fps, "frames": frames}
    if max(len(frames), reached * fps) <= 0.9 * total:
        if target is not None:
            target.unlink(missing_ok=True)
        hint = "; download it first, its server may not serve parts of files" if "://" in name else ""
        raise ssd.InputError(f"{name}: not readable as a video ({len(frames)} of {total} frames){hint}")
    return {"fps": fps, "frames": frames}


class NewestFrame:
    """Iterate over (time.monotonic() at arrival, RGB frame) of a live source: always the newest frame.

    A thread reads on while a frame is worked on, and drops what nobody took. A source that breaks off is
    opened again, in up to RETRIES tries, and that is printed; then the iteration ends with InputError.
    """

    def __init__(self, source, video):
        self.source, self.video = source, video
        self.num_read = 0
        self.waiting = queue.Queue(1)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _put(self, item):
        with contextlib.suppress(queue.Empty):
            self.waiting.get_nowait()
        self.waiting.put(item)  # there is room: no other thread puts

    def _read(self):
        try:
            is_open = True
            while is_open and not self.stopping.is_set():
                is_read, frame = self.video.read()
                if is_read:
                    self.num_read += 1
                    self._put((time.monotonic(), frame))
                else:
                    is_open = self._reopen()
        finally:
            self._put(None)  # nobody waits for a thread that ended

    def _reopen(self):
        print(f"{public_name(self.source)}: broke off, trying again", file=sys.stderr)
        self.video.release()
        for _ in range(RETRIES):
            if self.stopping.wait(RETRY_PAUSE):
                return False
            with contextlib.suppress(ssd.InputError):
                self.video = open_video(self.source)
                return True
        return False

    def __iter__(self):
        while item := self.waiting.get():
            yield item[0], cv2.cvtColor(item[1], cv2.COLOR_BGR2RGB)
        name = public_name(self.source)
        raise ssd.InputError(f"{name}: broke off and did not come back in {RETRIES} tries")

    def stop(self):
        """End the thread and release the source."""
        self.stopping.set()
        self.thread.join(TIMEOUT_MS / 1000)
        self.video.release()


def write_status(picture, text):
    """Write a line of text into the lower left corner of a PIL image."""
    font = ImageFont.load_default(max(12, round(max(picture.size) / 40)))
    place = (4, picture.height - 4)
    ImageDraw.Draw(picture).text(place, text, "white", font, anchor="lb", stroke_width=2, stroke_fill="black")


def predict_live(detector, frames, name, fps, target, *, show=False, **settings):
    """Detect in a NewestFrame until q or Ctrl-C; returns what was done, in words.

    Each frame is drawn with the rate and its latency, from arrival on, and shown, or written to `target` as
    often as keeps the time. target.jsonl gets a line a frame: time (seconds since 1970) and what was found.
    """
    log_path = target.with_suffix(".jsonl")
    ends, latencies = collections.deque(maxlen=30), collections.deque(maxlen=10_000)  # seconds
    counts, number, num_written, start = collections.Counter(), 0, 0, time.monotonic()
    with (
        contextlib.suppress(KeyboardInterrupt),
        open(log_path, "w", encoding="utf-8") as log,
        video_output(None if show else target, fps, name) as put,
    ):
        for arrived, frame in frames:
            arrived_at = time.time() - (time.monotonic() - arrived)
            picture = Image.fromarray(frame)
            (found,) = detector.detect_in([picture], **settings)
            drawn = found.draw(picture)
            ends.append(time.monotonic())
            latencies.append(ends[-1] - arrived)
            number += 1
            counts.update(found.names)
            rate = (len(ends) - 1) / (ends[-1] - ends[0]) if len(ends) > 1 else 0.0
            write_status(drawn, f"{rate:.1f} frames/s, {1000 * latencies[-1]:.0f} ms")
            print(json.dumps({"time": round(arrived_at, 3), **found.to_dict()}), file=log, flush=True)
            times = round((ends[-1] - start) * fps) - num_written
            times = min(max(1, times), round(fps) or 1)  # a second at most: writing takes its time too
            num_written += times
            if not put(drawn, times):
                break
    if not number:
        return f"no frame of {name}"
    middle, slow = np.percentile(1000 * np.array(latencies), (50, 95))
    return (
        f"{number} of {frames.num_read} frames, {number / (ends[-1] - start):.1f} a second, latency "
        f"{middle:.0f} ms (95 %: {slow:.0f}); {count_text(counts)} -> {'window' if show else target}, "
        f"{log_path}"
    )


# ---- the files of a prediction ----


def count_text(names):
    """Return how often each of some names occurs, the most frequent first, as text."""
    counts = collections.Counter(names).most_common()
    return ", ".join(f"{name} {count}" for name, count in counts) or "nothing found"


def describe(detector, picture, found, **settings):
    """Return in words what was found in an image: many as counts a class; of nothing the best score."""
    if len(found) > MOST_LISTED:
        return count_text(found.names)
    if len(found):
        return ", ".join(map("{} {:.2f}".format, found.names, found.scores))
    asked = [0.0 if detector.score_thresh[name] <= 1 else 2.0 for name in detector.classes]
    asked = torch.tensor(asked, device=detector.model.anchors.device)
    (best,) = detector.detect_in([picture], **{**settings, "score_thresh": asked, "max_detections": 1})
    scores = map(" (best below the threshold: {} {:.2f})".format, best.names, best.scores)
    return "nothing found" + "".join(scores)


def write_predictions(path, report):
    """Write predictions.json: {path: what was found}, an image or a frame of a video a line."""

    def text(found):
        if "frames" not in found:
            return json.dumps(found)
        frames = ",\n".join(map(json.dumps, found["frames"]))
        return f'{{"fps": {found["fps"]}, "frames": [\n{frames}\n]}}'

    rows = ",\n".join(f"{json.dumps(name)}: {text(found)}" for name, found in report.items())
    content = f"{{\n{rows}\n}}\n"
    ssd.write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def find_image_id(path, known):
    """Return the id of an image file; None: unknown. known: {file name: [(name with folders, id)]}.

    A link, such as ssd_tools.convert makes, has the name of the file that it leads to.
    """
    for place in [path.parent / path.readlink(), path] if path.is_symlink() else [path]:
        rows = known[place.name]
        fitting = [row for row in rows if place.absolute().as_posix().endswith(f"/{row[0]}")]
        if fitting or len(rows) == 1:
            return max(fitting or rows, key=lambda row: len(row[0]))[1]
    return None


def read_coco_ids(instances, paths, classes):
    """Return ({path: image id}, {class: category id}) of image files and classes by a COCO JSON.

    InputError for one that the JSON lacks, and for two files that are one image there.
    """
    try:
        content = json.loads(Path(instances).read_text(encoding="utf-8-sig"))
        used = {row["category_id"] for row in content.get("annotations", ())}  # a test list has none
        rows = sorted(content["categories"], key=lambda row: row["id"] in used)  # of equal names the used one
        category_ids = {" ".join(row["name"].split()): row["id"] for row in rows}
        known = collections.defaultdict(list)
        for row in content["images"]:
            file_name = row["file_name"].replace("\\", "/")
            known[Path(file_name).name].append((file_name, row["id"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ssd.InputError(f"{instances}: not a COCO JSON of instances ({problem})") from None
    if missing := [name for name in classes if name not in category_ids]:
        raise ssd.InputError(f"{instances}: no category {', '.join(missing)} (see --classes)")
    image_ids = {path: find_image_id(path, known) for path in paths}
    owners = {}
    for path, image_id in image_ids.items():
        if image_id is None:
            raise ssd.InputError(f"{instances}: none of its images is {path}")
        if image_id in owners:
            raise ssd.InputError(f"{instances}: {owners[image_id]} and {path} are one image, {image_id}")
        owners[image_id] = path
    return image_ids, category_ids


def coco_rows(detections, image_ids, category_ids):
    """Return {path: (size, Detections)} as the list of dicts that COCO's results are, in full precision."""
    rows = []
    for path, (_, found) in detections.items():
        columns = found.boxes_px.astype(float).tolist(), found.names, found.scores
        for (x1, y1, x2, y2), name, score in zip(*columns, strict=True):
            row = {"image_id": image_ids[path], "category_id": category_ids[name], "score": score}
            rows.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    return rows


def coco_dataset(detections, classes):
    """Return {path: ((width, height), Detections)} as a COCO data set, which has scores."""
    image_ids = {path: number for number, path in enumerate(detections, start=1)}
    category_ids = {name: number for number, name in enumerate(classes, start=1)}
    rows = coco_rows(detections, image_ids, category_ids)
    return {
        "images": [
            {"id": image_ids[path], "file_name": str(path), "width": width, "height": height}
            for path, ((width, height), _) in detections.items()
        ],
        "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
        "annotations": [
            {"id": number, **row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
            for number, row in enumerate(rows, start=1)
        ],
    }


def write_csv(path, report):
    """Write what was found as CSV, a box a line: pixels; frame N of a video is the image FILE#N."""

    def write(temporary):
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("image", "class", "score", "x1", "y1", "x2", "y2"))
            for name, found in report.items():
                frames = {f"{name}#{number}": one for number, one in enumerate(found.get("frames", ()))}
                for image, one in (frames or {name: found}).items():
                    columns = one["names"], one["scores"], one["boxes_px"]
                    table.writerows((image, *row[:2], *row[2]) for row in zip(*columns, strict=True))

    ssd.write_atomically(path, write)


def count_frames(path):
    """Return the number of frames or pages of a readable image file of PAGED_SUFFIXES, 1 of others."""
    if path.suffix.lower() in PAGED_SUFFIXES:
        with contextlib.suppress(Exception), Image.open(path) as image:  # a later frame may be broken
            return getattr(image, "n_frames", 1)
    return 1


def predict_images(detector, paths, targets, *, save_crops=False, save_xml=False, **settings):
    """Detect in image files, write drawn copies; yields (path, ((W, H), Detections) or InputError)."""

    def write(pair):
        path, result = pair
        if isinstance(result, ssd.InputError):
            return path, result, ""
        picture, found = result
        found.draw(picture).save(targets[path], quality=92, compress_level=2)
        if save_crops:
            write_crops(picture, found, targets[path])
        if save_xml:
            write_xml(path, picture, found, targets[path])
        text = describe(detector, picture, found, **settings)
        if (count := count_frames(path)) > 1:
            text = f"{text} in the first of {count} frames or pages"
        return path, (picture.size, found), text

    results = zip(paths, detect_all(detector, paths, **settings), strict=True)
    for path, result, text in prefetch(write, results):
        if text:
            print(f"{path}: {text} -> {targets[path]}")
        yield path, result


def predict_moving(detector, source, target, *, show=False, **settings):
    """Detect in a video, camera or stream; returns what was found, {} if it is live, or the InputError."""
    name = public_name(source)
    frames = None
    try:
        video = open_video(source)
        fps = video.get(cv2.CAP_PROP_FPS) or 25.0
        if isinstance(source, str) and not num_frames(video):
            frames = NewestFrame(source, video)
            text = predict_live(detector, frames, name, min(fps, 60.0), target, show=show, **settings)
            print(f"{name}: {text}")
            return {}
        found = predict_video(detector, video, name, None if show else target, **settings)
    except ssd.InputError as error:
        return error
    finally:
        if frames:
            frames.stop()
    names = [name for frame in found["frames"] for name in frame["names"]]
    where = "window" if show else target
    print(f"{name}: {len(found['frames'])} frames, {count_text(names)} -> {where}")
    return found


def predict_files(
    detector,
    paths,
    folder,
    *,
    show=False,
    save_crops=False,
    save_xml=False,
    save_coco=None,
    coco_ids=None,
    save_csv=None,
    **settings,
):
    """Detect in files and streams; writes a drawn copy of each and predictions.json into a folder.

    settings: of `ssd.Detector.predict`; show: videos and streams in a window; save_coco, save_csv: files to
    write; coco_ids: the COCO JSON whose ids save_coco has. Returns a line for each input that could not be
    read; raises InputError for a file that lies in the folder or is not in coco_ids.
    """
    for path in paths:
        if isinstance(path, Path) and path.resolve().parent == folder.resolve():
            raise ssd.InputError(f"{path} lies where the results go, to be overwritten: set --output-dir")
    for place in (folder, *(Path(path).parent for path in (save_coco, save_csv) if path)):
        place.mkdir(parents=True, exist_ok=True)
    targets = name_targets(paths, folder)
    is_image = {p: isinstance(p, Path) and p.suffix.lower() not in VIDEO_SUFFIXES for p in paths}
    images = [path for path in paths if is_image[path]]
    report = dict.fromkeys(map(public_name, paths))  # in the order of the inputs
    detections, problems = {}, []  # detections: {path: (size, Detections)} of images
    if coco_ids:
        asked = [name for name in detector.classes if detector.score_thresh[name] <= 1]
        ids = read_coco_ids(coco_ids, images, asked)

    def keep(source, found):
        if isinstance(found, ssd.InputError):
            problems.append(str(found))
        elif found:
            report[public_name(source)] = found

    try:
        saving = {"save_crops": save_crops, "save_xml": save_xml}
        for path, result in predict_images(detector, images, targets, **saving, **settings):
            if isinstance(result, ssd.InputError):
                keep(path, result)
            else:
                detections[path] = result
                keep(path, result[1].to_dict())
        for source in (path for path in paths if not is_image[path]):
            keep(source, predict_moving(detector, source, targets[source], show=show, **settings))
    finally:  # an interruption keeps what was found
        done = {name: found for name, found in report.items() if found}
        write_predictions(folder / "predictions.json", done)
        if save_coco:
            ssd.write_json(
                save_coco,
                coco_rows(detections, *ids) if coco_ids else coco_dataset(detections, detector.classes),
            )
        if save_csv:
            write_csv(save_csv, done)
    written = [folder / name for name in ("crops", "Annotations") if (folder / name).is_dir()]
    written += [path for path in (save_coco, save_csv) if path]
    print("\n".join(map(str, (folder / "predictions.json", *written))))
    return problems


def parse_args(argv=None):
    """Return the namespace of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="SOURCE",
        help="images, videos, folders of them, globs in quotes, a camera's number, or a stream's address",
    )
    add("--weights", required=True, metavar="FILE", help="checkpoint, exported folder or Hugging Face id")
    add("--output-dir", default=".", metavar="DIR", help="results go to DIR/plots/predictions")
    add("--classes", type=ssd.class_list, metavar="A,B", help="report these classes only")
    add("--show", action="store_true", help="videos and streams in a window, until q, not in a file")
    add("--save-crops", action="store_true", help="write each object to crops/CLASS, at full resolution")
    add("--save-xml", action="store_true", help="write VOC annotations of images, to correct and train on")
    add("--save-coco", metavar="FILE", help="write the boxes of images as a COCO data set with scores")
    add("--coco-ids", metavar="INSTANCES.json", help="write --save-coco as COCO's results, with ids of this")
    add("--save-csv", metavar="FILE", help="write a line a box: image, class, score, x1, y1, x2, y2")
    add("--flip-average", choices=FLIPS, default="off", help="average over flips: 2 or 4 times the work")
    add("--score-thresh", type=ssd.unit_interval, help="least score (default: each class's of best F1)")
    add("--nms-iou", type=ssd.unit_interval, help="at which NMS drops the lower score (default: the run's)")
    add("--max-detections", type=ssd.positive_int, default=ssd.MAX_DETECTIONS, help="most of an image")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    args = parser.parse_args(argv)
    if args.coco_ids and not args.save_coco:
        parser.error("--coco-ids needs --save-coco")
    return args


def make_detector(args):
    """Return (FlipDetector, IoU of non-maximum suppression) by the flags and what the checkpoint holds."""
    checkpoint = load_weights(args.weights)
    device = ssd.pick_device(args.device)
    model = ssd.model_from_checkpoint(checkpoint, args.weights, device)
    amp_dtype = ssd.pick_amp_dtype(device, args.amp)
    detector = FlipDetector(model, checkpoint["classes"], amp_dtype, checkpoint["score_thresh"])
    detector.flips = FLIPS[args.flip_average]
    if args.score_thresh is not None:
        detector.score_thresh = dict.fromkeys(detector.classes, args.score_thresh)
    if args.classes:
        known = detector.classes
        if unknown := [name for name in args.classes if name not in known]:
            raise ssd.InputError(f"no class {', '.join(unknown)}: the model knows {', '.join(known)}")
        detector.score_thresh |= dict.fromkeys(set(known) - set(args.classes), 2.0)  # no score reaches it
    return detector, checkpoint["args"]["nms_iou"] if args.nms_iou is None else args.nms_iou


def main(argv=None):
    """Run the command line; returns the exit code: 0 done, 1 files unreadable, 2 a mistake, 130 stopped."""
    args = parse_args(argv)
    with contextlib.suppress(ValueError):  # only the main thread may have handlers
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a video is closed, not cut
    try:
        paths = find_inputs(args.inputs)
        displays = {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
        if args.show and sys.platform not in ("darwin", "win32") and not displays:
            raise ssd.InputError("--show: there is no display; without it the video is written")
        detector, nms_iou = make_detector(args)
        problems = predict_files(
            detector,
            paths,
            Path(args.output_dir) / "plots" / "predictions",
            show=args.show,
            save_crops=args.save_crops,
            save_xml=args.save_xml,
            save_coco=args.save_coco,
            coco_ids=args.coco_ids,
            save_csv=args.save_csv,
            nms_iou_thresh=nms_iou,
            max_detections=args.max_detections,
        )
    except (ssd.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    sys.stderr.writelines(f"error: {problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
