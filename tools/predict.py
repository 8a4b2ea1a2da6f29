"""Detect in images, folders and videos; write drawn copies, predictions.json, crops and annotations.

    python tools/predict.py photos/ holiday.mp4 --weights checkpoints/ssd_shapes_final.pth
    python tools/predict.py 'photos/**/*.jpg' --weights OWNER/NAME --classes cat,dog --save-crops --save-xml

The results are in plots/predictions: photos stay JPEG, other images become PNG, videos MP4 without sound.
Files that cannot be read are listed at the end; the exit code is then 1.
"""

import argparse
import collections
import concurrent.futures
import glob
import itertools
import os
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from export import load_weights
from shapes import write_annotation

import ssd_object_detection as ssd

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"} | VIDEO_SUFFIXES
TARGET_SUFFIXES = dict.fromkeys(VIDEO_SUFFIXES, ".mp4") | {".jpg": ".jpg", ".jpeg": ".jpg"}  # others: .png
FLIPS = {"off": (), "horizontal": ((3,),), "both": ((3,), (2,), (2, 3))}  # dimensions of (B, 3, H, W)
BATCH_SIZE = 8


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


def find_inputs(arguments):
    """Return the paths that files, folders and globs name, each once; InputError for one that names none."""
    paths = []
    for argument in arguments:
        named = Path(argument)
        there = named.iterdir() if named.is_dir() else map(Path, glob.glob(str(argument), recursive=True))
        found = sorted(path for path in there if path.suffix.lower() in SUFFIXES and path.is_file())
        if named.is_file():
            found = [named]
        if not found:
            missing = "image or video in this folder" if named.is_dir() else "such file"
            raise ssd.InputError(f"{argument}: no {missing}")
        paths += found
    return list(dict.fromkeys(paths))


def name_targets(paths, folder):
    """Return {path: path of its drawn copy in a folder}, all with different stems."""
    targets, taken = {}, set()
    for path in paths:
        numbered = (f"{path.stem}_{number}" for number in itertools.count(1))
        stem = next(stem for stem in itertools.chain([path.stem], numbered) if stem not in taken)
        taken.add(stem)
        targets[path] = folder / (stem + TARGET_SUFFIXES.get(path.suffix.lower(), ".png"))
    return targets


def boxes_as_stored(boxes_px, size, orientation):
    """Return boxes (D, 4) of an upright image (W, H) in the pixels of its file, EXIF orientation 1 to 8."""
    x, y = boxes_px[:, 0::2], boxes_px[:, 1::2]
    x = size[0] - x[:, ::-1] if orientation in (2, 3, 6, 7) else x
    y = size[1] - y[:, ::-1] if orientation in (3, 4, 7, 8) else y
    return np.stack((y, x) if orientation > 4 else (x, y), axis=2).reshape(-1, 4)


def write_crops(picture, found, target):
    """Write each object of an image as crops/CLASS/*.png beside the drawn copy `target`."""
    for number, (box, name) in enumerate(zip(found.boxes_px, found.names, strict=True)):
        folder = target.parent / "crops" / re.sub(r"\W", "_", name)
        folder.mkdir(parents=True, exist_ok=True)
        corners = *np.floor(box[:2]).tolist(), *np.ceil(box[2:]).tolist()
        picture.crop(corners).save(folder / f"{target.stem}_{number}.png")


def write_xml(path, picture, found, target):
    """Write the objects of the image file `path` as VOC annotation, Annotations/*.xml beside `target`."""
    with Image.open(path) as file:
        shape = file.height, file.width, 3
        orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
    boxes = ssd.to_voc_pixels(boxes_as_stored(found.boxes_px, picture.size, orientation))
    folder = target.parent / "Annotations"
    folder.mkdir(exist_ok=True)
    objects = list(zip(found.names, boxes.round().astype(int).tolist(), strict=True))
    write_annotation(folder / f"{target.stem}.xml", path.name, shape, objects)


def read_frames(video):
    """Yield the frames of a cv2.VideoCapture as RGB arrays."""
    while (read := video.read())[0]:
        yield cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)


def predict_video(detector, path, target, **settings):
    """Detect in a video and write its frames, drawn on, as MP4; returns {"fps", "frames": a dict each}.

    Raises InputError where a tenth or more of the frames that it announces cannot be read.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # no chatter about broken videos
    video, output = cv2.VideoCapture(str(path)), cv2.VideoWriter()
    total = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    fps = video.get(cv2.CAP_PROP_FPS) or 25.0
    codec = cv2.VideoWriter.fourcc(*"mp4v")

    def draw(pair):
        picture, found = pair
        return found.draw(picture), found.to_dict()

    frames = []
    drawn = prefetch(draw, detect_all(detector, read_frames(video), **settings))
    try:
        for picture, found in tqdm(drawn, path.name, total or None, disable=not sys.stderr.isatty()):
            if not output.isOpened() and not output.open(str(target), codec, fps, picture.size):
                raise OSError(f"{target}: not writable as a video")
            output.write(cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR))
            frames.append(found)
    finally:
        output.release()
    if len(frames) <= 0.9 * total:
        target.unlink(missing_ok=True)
        raise ssd.InputError(f"{path}: not readable as a video ({len(frames)} of {total} frames)")
    return {"fps": fps, "frames": frames}


def predict_files(detector, paths, folder, *, save_crops=False, save_xml=False, **settings):
    """Detect in image and video files; writes a drawn copy of each and predictions.json into a folder.

    settings: of `ssd.Detector.predict`. Returns a line for each file that could not be read; raises
    InputError for a file that lies in the folder.
    """
    for path in paths:
        if path.resolve().parent == folder.resolve():
            raise ssd.InputError(f"{path} lies where the results go, to be overwritten: set --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    targets = name_targets(paths, folder)
    videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    images = [path for path in paths if path not in videos]

    def write(pair):
        path, result = pair
        if isinstance(result, ssd.InputError):
            return path, result
        picture, found = result
        found.draw(picture).save(targets[path], quality=92, compress_level=2)
        if save_crops:
            write_crops(picture, found, targets[path])
        if save_xml:
            write_xml(path, picture, found, targets[path])
        return path, found

    report, problems = {}, []
    results = zip(images, detect_all(detector, images, **settings), strict=True)
    try:
        for path, found in prefetch(write, results):
            if isinstance(found, ssd.InputError):
                problems.append(str(found))
                continue
            report[path] = found.to_dict()
            listed = ", ".join(map("{} {:.2f}".format, found.names, found.scores))
            print(f"{path}: {listed or 'nothing found'} -> {targets[path]}")
        for path in videos:
            try:
                report[path] = predict_video(detector, path, targets[path], **settings)
                print(f"{path}: {len(report[path]['frames'])} frames -> {targets[path]}")
            except ssd.InputError as error:
                problems.append(str(error))
    finally:  # an interruption keeps what was found
        done = {str(path): report[path] for path in paths if path in report}
        ssd.write_json(folder / "predictions.json", done)
    return problems


def parse_args(argv=None):
    """Return the namespace of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("inputs", nargs="+", metavar="PATH", help="images, videos, folders of them, or globs in quotes")
    add("--weights", required=True, metavar="FILE", help="checkpoint, exported folder or Hugging Face id")
    add("--output-dir", default=".", metavar="DIR", help="results go to DIR/plots/predictions")
    add("--classes", type=ssd.class_list, metavar="A,B", help="report these classes only")
    add("--save-crops", action="store_true", help="write each object to crops/CLASS, at full resolution")
    add("--save-xml", action="store_true", help="write VOC annotations of images, to correct and train on")
    add("--flip-average", choices=FLIPS, default="off", help="average over flips: 2 or 4 times the work")
    add("--score-thresh", type=ssd.unit_interval, help="least score (default: each class's of best F1)")
    add("--nms-iou", type=ssd.unit_interval, help="at which NMS drops the lower score (default: the run's)")
    add("--max-detections", type=ssd.positive_int, default=ssd.MAX_DETECTIONS, help="most of an image")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    return parser.parse_args(argv)


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
    try:
        paths = find_inputs(args.inputs)
        detector, nms_iou = make_detector(args)
        problems = predict_files(
            detector, paths, Path(args.output_dir) / "plots" / "predictions", save_crops=args.save_crops,
            save_xml=args.save_xml, nms_iou_thresh=nms_iou, max_detections=args.max_detections)
    except (ssd.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    sys.stderr.writelines(f"error: {problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
