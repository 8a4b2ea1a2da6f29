"""COCO at the size of train2017: the time of the converter, of reading what it wrote, and until a first step.

It makes up a JSON of instances as COCO's is (polygons, crowds, images without boxes) and pictures of 640x480,
names of eight files; converts them; reads them as annotations.py does; and starts a narrow training on them
twice until its first step, the first time without an index of annotations. With --folder all of it is kept,
but the converted folder and the runs, for the next time.

    python benchmarks/coco.py                               # 118,000 images, 860,000 boxes, some 1.5 GB
    python benchmarks/coco.py --images 400 --boxes 2900     # a try
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import annotations
import common
import numpy as np
from common import ssd
from PIL import Image

CLASSES = 80
FILES = 8  # pictures that all others are further names of
WIDTH, HEIGHT = 640, 480
CORNERS = 24  # of a polygon
TRAIN = [
    *("--recipe", "scratch", "--width", ".0625", "--batch-size", "8"),
    *("--val-fraction", ".04", "--workers", "0", "--log-every", "1"),
]


def draw_pictures(folder: Path, rng: np.random.Generator) -> list[Path]:
    """Write pictures with shapes and noise, about as large as COCO's files; returns their paths."""
    paths = []
    for number in range(FILES):
        coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = smooth + rng.normal(0, 12, smooth.shape)
        paths.append(folder / f"picture{number}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def make_rows(count: int, images: int, rng: np.random.Generator) -> list[str]:
    """Return the annotations of a JSON, a text each; one in 100 is a crowd, one image in 100 is empty."""
    rows = []
    for number in range(count):
        image = int(rng.integers(images))
        if image % 100 == 0:
            image = min(image + 1, images - 1)
        width, height = np.round(rng.uniform(8, (WIDTH / 2, HEIGHT / 2)), 2).tolist()
        x, y = np.round(rng.uniform(0, (WIDTH - width, HEIGHT - height)), 2).tolist()
        points = rng.uniform((x, y), (x + width, y + height), (CORNERS, 2))
        row = {
            "segmentation": [points.round(2).ravel().tolist()],
            "area": width * height,
            "iscrowd": int(number % 100 == 0),
            "image_id": 3 * image + 9,
            "bbox": [x, y, width, height],
            "category_id": int(rng.integers(1, CLASSES + 1)),
            "id": number + 1,
        }
        rows.append(json.dumps(row))
    return rows


def make_source(folder: Path, images: int, boxes: int) -> None:
    """Write made-up instances_train2017.json and train2017, unless they are there."""
    path = folder / "instances_train2017.json"
    if path.is_file():
        return
    rng = np.random.default_rng(0)
    pictures = folder / "train2017"
    pictures.mkdir(parents=True)
    files = draw_pictures(folder, rng)
    entries = []
    for image in range(images):
        name = f"{3 * image + 9:012d}.jpg"
        os.link(files[image % FILES], pictures / name)
        address = f"http://images.example.org/train2017/{name}"
        entry = {"license": 3, "file_name": name, "coco_url": address, "height": HEIGHT, "width": WIDTH}
        entries.append(json.dumps(entry | {"date_captured": "2013-11-14 11:18:45", "id": 3 * image + 9}))
    categories = json.dumps([{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)])
    rows = make_rows(boxes, images, rng)
    content = (
        f'"images": [{", ".join(entries)}], "annotations": [{", ".join(rows)}], "categories": {categories}'
    )
    path.write_text(f"{{{content}}}")
    time.sleep(ssd.UNSETTLED / 1e9 + 0.5)  # files that have just changed are not trusted


def run_measured(command: list[str], cache: Path, last_line: str = "") -> dict[str, float]:
    """Return seconds, CPU seconds and peak memory in MB of a program, its processes included.

    It is killed after a line of output that begins with last_line, if that is given.
    """
    environment = annotations.environment(cache)
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if last_line and line.startswith(last_line):
                process.kill()
                break
        seconds = time.perf_counter() - began
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode > 0:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in a MB
    return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / unit}


def measure(folder: Path, made: Path, cores: int) -> dict[str, dict[str, float]]:
    """Return {what: figures} of converting the source in folder, reading the result and starting twice."""
    out = made / "coco"
    shutil.rmtree(out, ignore_errors=True)
    tool = [sys.executable, "-m", "ssd_tools.convert", "coco", "--list", "train"]
    source = [str(folder / "instances_train2017.json"), str(folder / "train2017")]
    results = {"convert": run_measured([*tool, *source, str(out)], made)}
    time.sleep(ssd.UNSETTLED / 1e9 + 0.5)
    for name, least in {"parsed": 10**12, "first": 1, "second": 1}.items():
        results[f"read: {name}"] = annotations.read(out, made / "cache", cores, least)
    assert len({one.pop("digest") for one in results.values() if "digest" in one}) == 1
    for name in ("first", "second"):
        command = [sys.executable, str(common.ROOT / "ssd_object_detection.py"), "--data", str(out), *TRAIN]
        command += ["--output-dir", str(made / name)]
        results[f"first step: {name} start"] = run_measured(command, made / "cache of training", "step 1 ")
    return results


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure by the flags; returns what --json holds."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--images", type=ssd.positive_int, default=118_000, help="images to make up")
    add("--boxes", type=ssd.positive_int, default=860_000, help="their boxes")
    add("--cores", type=ssd.positive_int, default=1, help="that the reading may use")
    add("--folder", type=Path, metavar="DIR", help="where the JSON is or will be (default: not kept)")
    add("--json", metavar="FILE", help="write the result")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder and args.folder.parent)))
        folder = args.folder or made / "source"
        make_source(folder, args.images, args.boxes)
        results = measure(folder, made, args.cores)
    print(f"\n{args.images} images, {args.boxes} boxes\n")
    print(common.markdown([{"what": name, **figures} for name, figures in results.items()]))
    result = {"images": args.images, "boxes": args.boxes, "results": results}
    if args.json:
        ssd.write_json(args.json, result | {"environment": ssd.environment("cpu")})
    return result


if __name__ == "__main__":
    main()
