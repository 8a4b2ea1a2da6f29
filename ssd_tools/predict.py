"""Detect in images: write drawn copies, predictions, crops and annotations. Videos and streams are done, too.

    python -m ssd_tools.predict photos/ holiday.mp4 --weights checkpoints/ssd_shapes_final.pth
    python -m ssd_tools.predict 'photos/**/*.jpg' --weights FILE --classes cat,dog --save-crops --save-xml
    python -m ssd_tools.predict photos/ --weights FILE --save-voc mine      # to correct and train on
    python -m ssd_tools.predict val2017 --weights FILE --save-coco found.json --coco-ids instances.json

The results are in plots/predictions: photos stay JPEG, other images become PNG. Videos, cameras and streams
are handed to ssd_tools.video, which can also show them in a window. What cannot be read is listed at the end;
the exit code is then 1.
"""

import argparse
import collections
import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ssd_object_detection as ssd
from ssd_tools import collect, inference, video
from ssd_tools.inference import Found, Source, count_text
from ssd_tools.shapes import write_annotation

PAGED_SUFFIXES = {".gif", ".tif", ".tiff", ".webp", ".png"}  # of images that may have several frames
SUFFIXES = {*ssd.IMAGE_SUFFIXES} | inference.VIDEO_SUFFIXES
MOST_LISTED = 6  # objects of an image that are printed one by one

Size = tuple[int, int]  # width, height
ByImage = Mapping[Path, tuple[Size, ssd.Detections]]  # what was found in image files


# ---- what is written of an image ----


def name_folders(classes: Sequence[str]) -> dict[str, str]:
    """Return a folder's name for each class, numbered where two would share one: a/b, a_b, A_B."""
    taken: set[str] = set()
    return {name: inference.free_name(re.sub(r"\W", "_", name)[:60], taken, 2) for name in classes}


def write_crops(
    picture: Image.Image, found: ssd.Detections, target: Path, folders: Mapping[str, str]
) -> None:
    """Write each object of an image as crops/CLASS/*.png beside the drawn copy; folders: {class: CLASS}."""
    for number, (box, name) in enumerate(zip(found.boxes_px, found.names, strict=True)):
        folder = target.parent / "crops" / folders[name]
        folder.mkdir(parents=True, exist_ok=True)
        x1, y1 = np.floor(box[:2]).tolist()
        x2, y2 = np.ceil(box[2:]).tolist()
        picture.crop((x1, y1, x2, y2)).save(folder / f"{target.stem}_{number}.png")


def write_xml(path: Path, picture: Image.Image, found: ssd.Detections, target: Path) -> None:
    """Write the objects of an upright image as a VOC annotation: Annotations/*.xml beside `target`."""
    folder = target.parent / "Annotations"
    folder.mkdir(exist_ok=True)
    objects = collect.voc_objects(found)
    write_annotation(folder / f"{target.stem}.xml", path.name, (picture.height, picture.width, 3), objects)


def count_frames(path: Path) -> int:
    """Return the number of frames or pages of a readable image file of PAGED_SUFFIXES, 1 of others."""
    if path.suffix.lower() in PAGED_SUFFIXES:
        with contextlib.suppress(Exception), Image.open(path) as image:  # a later frame may be broken
            return getattr(image, "n_frames", 1)
    return 1


def describe(detector: ssd.Detector, picture: Image.Image, found: ssd.Detections, **settings: Any) -> str:
    """Return in words what was found in an image: many as counts a class; of nothing the best score."""
    if len(found) > MOST_LISTED:
        return count_text(found.names)
    if len(found):
        return ", ".join(map("{} {:.2f}".format, found.names, found.scores))
    # A class that is not asked for has a threshold above 1; the others may score anything here.
    is_asked = torch.tensor([detector.score_thresh[name] <= 1 for name in detector.classes])
    asked = torch.where(is_asked, 0.0, 2.0).to(detector.model.anchors.device)
    settings = {**settings, "score_thresh": asked, "max_detections": 1}
    (best,) = detector.detect_in([picture], **settings)
    text = "nothing found"
    for name, score in zip(best.names, best.scores, strict=True):
        text += f" (best below the threshold: {name} {score:.2f})"
    return text


# ---- COCO's files ----


def find_image_id(path: Path, known: Mapping[str, Sequence[tuple[str, Any]]]) -> Any:
    """Return the id of an image file; None: unknown. known: {file name: [(name with folders, id)]}.

    A link, such as ssd_tools.convert makes, has the name of the file that it leads to.
    """
    places = [path]
    if path.is_symlink():
        places.insert(0, path.parent / path.readlink())
    for place in places:
        rows = known.get(place.name, ())
        fitting = [row for row in rows if place.absolute().as_posix().endswith(f"/{row[0]}")]
        if fitting:
            return max(fitting, key=lambda row: len(row[0]))[1]
        if len(rows) == 1:
            return rows[0][1]
    return None


def read_instances(instances: ssd.PathLike) -> tuple[dict[str, list[tuple[str, Any]]], dict[str, Any]]:
    """Return ({file name: [(name with folders, image id)]}, {class: category id}) of a COCO JSON."""
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
    return known, category_ids


def read_coco_ids(
    instances: ssd.PathLike, paths: Iterable[Path], classes: Iterable[str]
) -> tuple[dict[Path, Any], dict[str, Any]]:
    """Return ({path: image id}, {class: category id}) of image files and classes by a COCO JSON.

    InputError for one that the JSON lacks, and for two files that are one image there.
    """
    known, category_ids = read_instances(instances)
    missing = [name for name in classes if name not in category_ids]
    if missing:
        raise ssd.InputError(f"{instances}: no category {', '.join(missing)} (see --classes)")
    image_ids = {path: find_image_id(path, known) for path in paths}
    owners: dict[Any, Path] = {}
    for path, image_id in image_ids.items():
        if image_id is None:
            raise ssd.InputError(f"{instances}: none of its images is {path}")
        if image_id in owners:
            raise ssd.InputError(f"{instances}: {owners[image_id]} and {path} are one image, {image_id}")
        owners[image_id] = path
    return image_ids, category_ids


def coco_rows(
    detections: ByImage, image_ids: Mapping[Path, Any], category_ids: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return what was found as the list of dicts that COCO's results are, in full precision."""
    rows = []
    for path, (_, found) in detections.items():
        columns = found.boxes_px.astype(float).tolist(), found.names, found.scores
        for (x1, y1, x2, y2), name, score in zip(*columns, strict=True):
            row = {"image_id": image_ids[path], "category_id": category_ids[name], "score": score}
            rows.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    return rows


def coco_dataset(detections: ByImage, classes: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Return what was found as a COCO data set, which has scores."""
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


# ---- the files of a prediction ----


def predict_images(
    detector: ssd.Detector,
    paths: Sequence[Path],
    targets: Mapping[Source, Path],
    *,
    save_crops: bool = False,
    save_xml: bool = False,
    doubts: dict[Path, collect.Doubt] | None = None,
    **settings: Any,
) -> Iterator[tuple[Path, tuple[Size, ssd.Detections] | ssd.InputError]]:
    """Detect in image files, write drawn copies; yields (path, ((W, H), Detections) or InputError).

    doubts: a dict that gets the Doubt of each path, before it is yielded.
    """
    folders = name_folders(detector.classes)

    def write(
        pair: tuple[Path, tuple[Image.Image, ssd.Detections] | ssd.InputError],
    ) -> tuple[Path, tuple[Size, ssd.Detections] | ssd.InputError, str]:
        path, result = pair
        if isinstance(result, ssd.InputError):
            return path, result, ""
        picture, found = result
        found.draw(picture).save(targets[path], quality=92, compress_level=2)
        if save_crops:
            write_crops(picture, found, targets[path], folders)
        if save_xml:
            write_xml(path, picture, found, targets[path])
        if doubts is not None:
            doubts[path] = collect.judge_doubt(detector, picture, **settings)
        text = describe(detector, picture, found, **settings)
        count = count_frames(path)
        if count > 1:
            text += f" in the first of {count} frames or pages"
        return path, (picture.size, found), text

    results = zip(paths, inference.detect_all(detector, paths, **settings), strict=True)
    for path, result, text in inference.prefetch(write, results):
        if text:
            print(f"{path}: {text} -> {targets[path]}")
        yield path, result


def predict_files(
    detector: ssd.Detector,
    sources: Sequence[Source],
    folder: Path,
    *,
    save_crops: bool = False,
    save_xml: bool = False,
    save_coco: ssd.PathLike | None = None,
    coco_ids: ssd.PathLike | None = None,
    save_csv: ssd.PathLike | None = None,
    collection: collect.Collection | None = None,
    **settings: Any,
) -> list[str]:
    """Detect in files and streams; writes a drawn copy of each and predictions.json into a folder.

    settings: of `ssd.Detector.predict`; save_coco, save_csv: files to write; coco_ids: the COCO JSON whose
    ids save_coco has; collection: a data set that gets the images. Returns a line for each input that could
    not be read; raises InputError for a file that lies in the folder or is not in coco_ids.
    """
    inference.prepare_folders(sources, folder, save_coco, save_csv)
    targets = inference.name_targets(sources, folder)
    videos = [source for source in sources if inference.is_video(source)]
    images = [Path(source) for source in sources if not inference.is_video(source)]
    detections: dict[Path, tuple[Size, ssd.Detections]] = {}
    if coco_ids is not None:
        asked = [name for name in detector.classes if detector.score_thresh[name] <= 1]
        ids = read_coco_ids(coco_ids, images, asked)

    def results() -> Iterator[tuple[Source, Found | ssd.InputError]]:
        doubts: dict[Path, collect.Doubt] = {}
        saving: dict[str, Any] = {"save_crops": save_crops, "save_xml": save_xml}
        if collection is not None:
            saving["doubts"] = doubts
        for path, result in predict_images(detector, images, targets, **saving, **settings):
            if isinstance(result, ssd.InputError):
                yield path, result
                continue
            detections[path] = result
            if collection is not None:
                collection.add(path, *result, doubts[path])
            yield path, result[1].to_dict()
        yield from video.predict_sources(detector, videos, targets, **settings)

    try:
        problems = inference.write_results(results(), sources, folder, save_csv)
    finally:  # an interruption keeps what was found
        if save_coco is not None and coco_ids is not None:
            ssd.write_json(save_coco, coco_rows(detections, *ids))
        elif save_coco is not None:
            ssd.write_json(save_coco, coco_dataset(detections, detector.classes))
        if collection is not None:
            print(collection.close(detector.classes))
    written = [folder / name for name in ("crops", "Annotations") if (folder / name).is_dir()]
    files = [file for file in (save_coco, save_csv) if file is not None]
    print(folder / "predictions.json", *written, *files, sep="\n")
    return problems


# ---- the command line ----


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the namespace of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="SOURCE",
        help="images, videos, folders of them, globs in quotes, a camera's number, or a stream's address",
    )
    inference.add_flags(parser)
    add("--save-crops", action="store_true", help="write each object to crops/CLASS, at full resolution")
    add("--save-xml", action="store_true", help="write VOC annotations of images, to correct and train on")
    add(
        "--save-voc",
        metavar="DIR",
        help="add the images to a data set to correct and train on; its list begins with the most doubtful: "
        "those with a score nearest to its class's threshold",
    )
    add("--only-hits", action="store_true", help="--save-voc: only images in which something was found")
    add("--empty", action="store_true", help="--save-voc: these show nothing of the classes, write no object")
    add("--save-coco", metavar="FILE", help="write the boxes of images as a COCO data set with scores")
    add("--coco-ids", metavar="INSTANCES.json", help="write --save-coco as COCO's results, with ids of this")
    args = parser.parse_args(argv)
    if args.coco_ids and not args.save_coco:
        parser.error("--coco-ids needs --save-coco")
    if (args.only_hits or args.empty) and not args.save_voc:
        parser.error("--only-hits and --empty need --save-voc")
    return args


def refuse_videos(sources: Iterable[Source]) -> None:
    """Raise InputError for a source that is no image file."""
    for source in sources:
        if inference.is_video(source):
            name = inference.public_name(source)
            raise ssd.InputError(
                f"--save-voc takes images, not {name}: ffmpeg -i VIDEO -r 1 photos/%05d.jpg makes them"
            )


def run(args: argparse.Namespace) -> int:
    """Detect by the flags; returns the exit code: 0 done, 1 an input could not be read."""
    sources = inference.find_inputs(args.inputs, SUFFIXES, "image or video")
    collection = None
    if args.save_voc:
        refuse_videos(sources)
        collection = collect.Collection(args.save_voc, only_hits=args.only_hits, empty=args.empty)
    detector, settings = inference.make_detector(args)
    problems = predict_files(
        detector,
        sources,
        inference.results_folder(args),
        save_crops=args.save_crops,
        save_xml=args.save_xml,
        save_coco=args.save_coco,
        coco_ids=args.coco_ids,
        save_csv=args.save_csv,
        collection=collection,
        **settings,
    )
    return inference.report_problems(problems)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 unreadable files, 2 a mistake, 130 stopped."""
    return inference.run_predictions(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
