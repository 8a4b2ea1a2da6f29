"""How long the annotations of a large data set take at the first start of a training, and at the second.

It makes up a folder of images of 64x48 pixels, each with seven objects of 80 classes, and reads it by
`load_data` in new processes: `parsed` without an index, `first` where the index is written, `second` where it
is used. Besides: what the records take in memory. With --folder the data set is kept for the next time.
--memory makes no files, but the columns that reading them would give, to see what a training holds (Linux).

    python benchmarks/annotations.py --images 20000
    python benchmarks/annotations.py --images 1700000 --memory
    python benchmarks/annotations.py --images 118000 --cores 16 --folder /tmp/made-up --json annotations.json
"""

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import multiprocessing.synchronize
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import ssd
from PIL import Image

CLASSES = 80
OBJECTS = 7  # of an image
READ = """
import json, os, resource, sys, time
cores, least, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
import ssd_object_detection as ssd
ssd.INDEX_LEAST = least
before = os.times()
began = time.perf_counter()
data = ssd.load_data(folder, val_fraction=0)
seconds = time.perf_counter() - began
used = [after - start for after, start in zip(os.times()[:4], before[:4])]
arrays = [value for value in vars(data.train).values() if hasattr(value, "nbytes")]
for texts in (data.train.image_ids, data.train.image_paths):
    arrays += vars(texts).values()
size = sum(array.nbytes for array in arrays) / len(data.train)
digest = hash(ssd.all_boxes(data.train).tobytes() + "".join(data.train.image_paths).encode())
print(json.dumps({"seconds": seconds, "cpu": sum(used), "bytes": size, "digest": digest}))
"""
SAMPLES = 20_000  # that a loader process reads before it is measured


def make_folder(folder: Path, count: int) -> None:
    """Write a made-up data set of so many images in VOC layout, unless it is there."""
    if (folder / "ImageSets" / "Main" / "train.txt").is_file():
        return
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "grey").save(buffer, "JPEG")
    rng = np.random.default_rng(0)
    for number in range(count):
        (folder / "JPEGImages" / f"{number:012d}.jpg").write_bytes(buffer.getvalue())
        corner = rng.integers(1, 40, (OBJECTS, 2))
        edge = corner + rng.integers(2, 9, (OBJECTS, 2))
        labels = rng.integers(CLASSES, size=(OBJECTS, 1))
        nodes = [
            f"<object><name>class {label}</name><difficult>0</difficult><bndbox><xmin>{x1}</xmin>"
            f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>\n"
            for label, x1, y1, x2, y2 in np.hstack((labels, corner, edge)).tolist()
        ]
        size = "<size><width>64</width><height>48</height><depth>3</depth></size>\n"
        text = f"<annotation>\n{size}{''.join(nodes)}</annotation>\n"
        (folder / "Annotations" / f"{number:012d}.xml").write_text(text)
    ids = "".join(f"{number:012d}\n" for number in range(count))
    (folder / "ImageSets" / "Main" / "train.txt").write_text(ids)
    time.sleep(ssd.UNSETTLED / 1e9 + 0.5)  # files that have just changed are not trusted


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of a program that imports this project and keeps its index in a folder."""
    paths = [str(Path(ssd.__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONHASHSEED": "0",
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", str(cache / "matplotlib")),
    }


def read(folder: Path, cache: Path, cores: int, least: int) -> dict[str, float]:
    """Return seconds, CPU seconds of all processes, bytes an image and a digest of reading a folder once."""
    command = [sys.executable, "-c", READ, str(cores), str(least), str(folder)]
    done = subprocess.run(command, env=environment(cache), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def made_annotations(count: int) -> ssd.Annotations:
    """Return made-up annotations of so many images, as an index holds them."""
    rng = np.random.default_rng(0)
    total = count * OBJECTS
    corners = rng.uniform(1, 300, (total, 2))
    columns = ssd.Columns(
        sizes=np.tile(np.array([640, 480], dtype=np.int32), (count, 1)),
        is_ambiguous=np.zeros(count, dtype=np.bool_),
        counts=np.full(count, OBJECTS, dtype=np.int32),
        names=tuple(f"class {number}" for number in range(CLASSES)),
        codes=rng.integers(CLASSES, size=total, dtype=np.int32),
        boxes_voc=np.hstack((corners, corners + rng.uniform(2, 150, (total, 2)))),
        difficult=np.zeros(total, dtype=np.bool_),
    )
    paths = ssd.Texts(f"data/made-up/JPEGImages/{number:016x}.jpg" for number in range(count))
    return ssd.Annotations(ssd.Texts(f"{number:016x}" for number in range(count)), paths, columns)


def memory_mb(kind: str) -> float:
    """Return a figure of this process in MB by its name in Linux's smaps_rollup, as "Rss"."""
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 2**10


def read_some(
    records: ssd.Records, gate: multiprocessing.synchronize.Barrier, answer: multiprocessing.SimpleQueue
) -> None:
    """Read random records in a loader process; answers its share of the memory, when all have read."""
    for index in np.random.default_rng(os.getpid()).integers(len(records), size=SAMPLES).tolist():
        records[index]
    gate.wait()
    answer.put(memory_mb("Pss"))
    gate.wait()


def loader_memory(records: ssd.Records, count: int) -> float:
    """Return the MB that so many loader processes take together that read records, beyond this process."""
    before = memory_mb("Pss")
    context = multiprocessing.get_context("fork")  # as the loader's processes begin
    gate = context.Barrier(count + 1)
    answer = context.SimpleQueue()
    processes = [context.Process(target=read_some, args=(records, gate, answer)) for _ in range(count)]
    for process in processes:
        process.start()
    gate.wait()
    after = memory_mb("Pss")
    gate.wait()
    after += sum(answer.get() for _ in processes)
    for process in processes:
        process.join()
    return after - before


def measure_memory(count: int, loaders: int) -> dict[str, float]:
    """Return bytes of records an image, and MB: held, at the most while made, and of loader processes."""
    before = memory_mb("Rss")
    annotations = made_annotations(count)
    records, _ = ssd.make_records(Path("data/made-up"), "train", annotations, annotations.columns.names)
    ssd.refuse_shared_images(records, records[:0])
    del annotations
    gc.collect()
    arrays = [array for array in vars(records).values() if isinstance(array, np.ndarray)]
    for texts in (records.image_ids, records.image_paths):
        arrays += vars(texts).values()
    held = memory_mb("Rss") - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before
    size = sum(array.nbytes for array in arrays) / count
    return {"bytes": size, "held": held, "peak": peak, "loaders": loader_memory(records, loaders)}


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure by the flags; returns what --json holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--images", type=ssd.positive_int, default=20000, help="images to make up (default: 20000)")
    add("--cores", type=ssd.positive_int, default=1, help="that a start may use (default: 1)")
    add("--rounds", type=ssd.positive_int, default=1, help="of all three (default: 1)")
    add("--folder", type=Path, metavar="DIR", help="where the data set is or will be (default: not kept)")
    add("--json", metavar="FILE", help="write the result")
    add("--memory", action="store_true", help="only what so many images take in memory, without files")
    add("--loaders", type=ssd.positive_int, default=16, help="processes of --memory (default: 16)")
    args = parser.parse_args(argv)
    if args.memory:
        memory = measure_memory(args.images, args.loaders)
        print(
            f"{args.images} images: {memory['bytes']:.0f} bytes an image, {memory['held']:.0f} MB in all, "
            f"{memory['peak']:.0f} MB while they are made; {args.loaders} loader processes take "
            f"{memory['loaders']:.0f} MB more together"
        )
        return memory
    rounds: list[dict[str, dict[str, float]]] = []
    with contextlib.ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = args.folder or made / "data"
        make_folder(folder, args.images)
        for number in range(args.rounds):
            cache = made / f"cache {number}"
            least = {"parsed": 10**12, "first": 1, "second": 1}
            rounds.append({name: read(folder, cache, args.cores, least[name]) for name in least})
    result = {"images": args.images, "cores": args.cores, "rounds": rounds}
    print(f"{args.images} images, {args.images * OBJECTS} objects, {args.cores} cores")
    for times in rounds:
        assert len({one["digest"] for one in times.values()}) == 1, "the index changed the data"
        for name, one in times.items():
            share = one["seconds"] / times["parsed"]["seconds"]
            print(f"{name:<7} {one['seconds']:7.2f} s  {one['cpu']:7.2f} s of CPU  {share:6.3f} of parsed")
    print(f"records take {rounds[0]['second']['bytes']:.0f} bytes an image")
    if args.json:
        ssd.write_json(args.json, result | {"environment": ssd.environment("cpu")})
    return result


if __name__ == "__main__":
    main()
