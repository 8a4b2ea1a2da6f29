"""Score the detection files of any program by the VOC rules, or write those of a checkpoint.

    python -m ssd_tools.score DETECTIONS --data PATH --test-split LIST --output-dir DIR
    python -m ssd_tools.score DETECTIONS --write checkpoints/FILE.pth [flags of --evaluate]

DETECTIONS is a folder with the files of the VOC devkit's task comp4, comp4_det_LIST_CLASS.txt for each class.
A line is a detection, `image score xmin ymin xmax ymax`, in pixels counted from 1 with both corners included.
The first command prints the class table and writes OUTPUT_DIR/plots/evaluation/evaluation.json, both as
`ssd_object_detection.py --evaluate` does. The second does what --evaluate does, and writes the files.
"""

import argparse
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ssd_object_detection as ssd
from ssd_tools.common import evaluate_again, load_evaluation, run_program

Arrays = dict[str, np.ndarray]  # columns of detections, a row each; see `ssd.evaluate_voc`


def devkit_path(folder: ssd.PathLike, split: str, class_name: str) -> Path:
    """Return the path of the devkit's file of a class."""
    return Path(folder) / f"comp4_det_{split}_{class_name.replace('/', '_')}.txt"


def refuse_shared_files(split: str, classes: Sequence[str]) -> None:
    """Raise InputError if two classes have the same devkit file, or one that a file system cannot hold."""
    taken: dict[str, str] = {}
    for name in classes:
        file_name = devkit_path("", split, name).name
        if len(file_name.encode()) > 255 or "\0" in file_name:
            raise ssd.InputError(f"the class {name[:60]!r} is too long for the name of its file: rename it")
        key = file_name
        if sys.platform in ("win32", "darwin"):  # "Cat" and "cat" are one file there
            key = file_name.casefold()
        if key in taken:
            raise ssd.InputError(f"the classes {taken[key]} and {name} would share {file_name}: rename one")
        taken[key] = name


def refuse_shared_ids(records: Sequence[ssd.Record]) -> None:
    """Raise InputError if two images, of different folders, have the same name in devkit files."""
    paths: dict[str, str] = {}
    for record in records:
        other = paths.setdefault(record.image_id, record.image_path)
        if other != record.image_path:
            raise ssd.InputError(
                f"{other} and {record.image_path} have one name in detection files: name one folder by --data"
            )


def write_devkit_files(
    folder: ssd.PathLike,
    split: str,
    detections: Mapping[str, np.ndarray],
    records: Sequence[ssd.Record],
    classes: Sequence[str],
) -> None:
    """Write detections, of `ssd.measure` on the records, as devkit files; a missing folder is made.

    InputError for classes whose files would be the same.
    """
    refuse_shared_files(split, classes)
    refuse_shared_ids(records)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for label, name in enumerate(classes, start=1):
        lines = []
        for row in np.flatnonzero(detections["labels"] == label):
            image_id = records[detections["image_ids"][row]].image_id
            numbers = [detections["scores"][row], *detections["boxes_voc"][row]]
            words = [image_id, *(f"{number:.9g}" for number in numbers)]
            lines.append(" ".join(words) + "\n")
        devkit_path(folder, split, name).write_text("".join(lines), encoding="utf-8")


def parse_line(line: str) -> tuple[str, list[float]]:
    """Return (image id, [score, xmin, ymin, xmax, ymax]) of a line; ValueError unless they are finite."""
    words = line.strip().rsplit(maxsplit=5)  # a name may have blanks
    numbers = [float(word) for word in words[1:]]
    if len(numbers) != 5 or not all(map(math.isfinite, numbers)):
        raise ValueError("not five finite numbers")
    return words[0], numbers


def read_devkit_files(
    folder: ssd.PathLike, split: str, records: Sequence[ssd.Record], classes: Sequence[str]
) -> Arrays:
    """Return detections, image ids as positions in records, in the form that `ssd.evaluate_voc` takes.

    Raises InputError for a class without a file (an empty one is legal), for two that share one, and for a
    line that is not an image of the list and five finite numbers.
    """
    refuse_shared_files(split, classes)
    refuse_shared_ids(records)
    position = {record.image_id: index for index, record in enumerate(records)}
    image_ids: list[int] = []
    labels: list[int] = []
    rows: list[list[float]] = []  # score, xmin, ymin, xmax, ymax of each detection
    for label, name in enumerate(classes, start=1):
        path = devkit_path(folder, split, name)
        if not path.is_file():
            raise ssd.InputError(f"{path}: no such file; each class needs one, empty if nothing was detected")
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            where = f"{path}, line {number}: {line.strip()[:80]!r}"
            try:
                image_id, numbers = parse_line(line)
            except ValueError:
                raise ssd.InputError(f"{where}: not 'image score xmin ymin xmax ymax'") from None
            if image_id not in position:
                raise ssd.InputError(f"{where}: list {split} has no such image")
            image_ids.append(position[image_id])
            labels.append(label)
            rows.append(numbers)
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    return {
        "image_ids": np.array(image_ids, dtype=np.int64),
        "labels": np.array(labels, dtype=np.int64),
        "scores": table[:, 0],
        "boxes_voc": table[:, 1:],
    }


def parse_args(
    argv: Sequence[str] | None = None,
) -> tuple[argparse.Namespace, ssd.Settings, dict[str, Any] | None]:
    """Return the tool's own flags, the module's Settings, and the checkpoint of --write, if any."""
    parser = argparse.ArgumentParser(
        description="Score detection files by the VOC rules, or write those of a checkpoint.",
        usage="%(prog)s DETECTIONS [--write CHECKPOINT] [flags of ssd_object_detection.py]",
        epilog="To score: --data, --data-root, --test-split, --unlabelled, --classes (default: VOC's, or "
        "those that the list's annotations have) and --output-dir. With --write: every flag of --evaluate.",
        allow_abbrev=False,
    )
    parser.add_argument("detections", metavar="DETECTIONS", help="the folder of the files")
    parser.add_argument("--write", metavar="CHECKPOINT", help="write a checkpoint's detections as such files")
    own, flags = parser.parse_known_args(argv)
    if own.write:
        return own, *load_evaluation(own.write, flags)
    settings, _ = ssd.load_settings(flags)
    return own, settings, None


def write_checkpoint(folder: str, settings: ssd.Settings, checkpoint: dict[str, Any]) -> None:
    """Measure a checkpoint on the test list and write its detections into the folder."""
    refuse_shared_files("LIST", checkpoint["classes"])  # before the measurement
    evaluation = evaluate_again(settings, checkpoint)
    detections = evaluation.result["detections"]
    split = evaluation.numbers["split"]
    write_devkit_files(folder, split, detections, evaluation.records, evaluation.classes)


def score_files(folder: str, settings: ssd.Settings) -> None:
    """Score the files of a folder on the test list: print the table, write evaluation.json."""
    split, classes, records = ssd.read_test_list(settings)
    detections = read_devkit_files(folder, split, records, classes)
    data = " ".join(ssd.data_names(settings.data))
    print(f"{folder} on {data}, list {split}: {len(records)} images")
    result = ssd.score_detections(detections, records, len(classes))
    about = {  # the keys of a checkpoint's evaluation.json, but for the first
        "detections": folder,
        "data": settings.data,
        "split": split,
        "num_images": len(records),
        "precision": None,
        "detection": None,
    }
    ssd.write_evaluation(settings, about, result, classes)


def run(argv: Sequence[str] | None) -> None:
    """Score files, or write those of a checkpoint, by the command line."""
    own, settings, checkpoint = parse_args(argv)
    if checkpoint is None:
        score_files(own.detections, settings)
    else:
        write_checkpoint(own.detections, settings, checkpoint)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    return run_program(functools.partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())
