"""Measure named variants of the training command over several seeds: a JSON line a run, a table.

    python benchmarks/recipes.py --data data/BCCD --set bccd --only base multibox --pool val test
    python benchmarks/recipes.py --data data/VOCdevkit/VOC2007 --set gpu --seeds 0 --limit 800
    python benchmarks/recipes.py --set bccd --table              # the table again, from the JSON lines

A variant is a list of flags added to those of its set; "base" adds none. The runs are made in the order of
--only, all variants with the first seed before the second. A run whose line is already in the results file
(same variant, flags and seed) is not repeated, and one that was stopped goes on after its last saved epoch.
Runs draw no pictures. Each is measured on its test list, with --pool on other lists together too, which is
less noisy. The table is written beside the results file as Markdown and as JSON.

With --limit the program stops by itself before so many seconds: it leaves out a run that takes longer than
what is left, by the time that the same flags took before, or by the images to train on. A run that is not
finished then is stopped; it can go on.
"""

import collections
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
from common import ssd

SETS = {  # flags of all runs of a set
    "bccd": "--recipe small --anchors fit --val-split= --val-fraction 0",
    "bccd-narrow": "--recipe small --no-pretrained --anchors paper --epochs 12 --val-split= --val-fraction 0",
    "shapes": "--val-split= --val-fraction 0",
    "voc-small": "--recipe scratch --width .125 --epochs 12 --batch-size 8 "
    "--train-split train --test-split val --val-fraction 0",
    "gpu": "--train-split train --test-split val --val-fraction 0 --eval-interval 100",  # see LADDERS
    "rover": "--recipe rover --train-split train --test-split val --val-fraction 0 --eval-interval 100",
    "voc2007": "",  # this and the next: see voc.sh
    "voc0712": "",
}
VARIANTS = {
    "base": "",
    "multibox": "--loss multibox",
    "focal": "--loss focal",
    "fitted anchors": "--anchors fit",
    "fitted anchors, mining": "--anchors fit --loss multibox",
    "random start": "--no-pretrained",
    "zoom-out .5": "--zoom-out .5",
    "weight decay .01": "--weight-decay .01",
    # For the sets of VOC at full width. A recipe replaces the whole of the set's.
    "paper": "--recipe paper",
    "COCO start": "--backbone-weights coco",
    "batch 8": "--batch-size 8",
    "paper, batch 8": "--recipe paper --batch-size 8",
    "rate 1e-4": "--lr 1e-4",
    "rate 5e-4": "--lr 5e-4",
    "rate 2e-3": "--lr 2e-3",
    "no frozen block": "--freeze-blocks 0",
    "300 epochs": "--epochs 300",
    "width .5": "--width .5",
    "width .125": "--width .125",
    "300 epochs, weight decay .1": "--epochs 300 --weight-decay .1",
}
LADDERS = {  # the variants of a set, what is to be known first before the rest
    "gpu": (
        "base",
        "batch 8",
        "paper, batch 8",
        "focal",
        "rate 1e-4",
        "no frozen block",
        "300 epochs",
        "300 epochs, weight decay .1",
        "fitted anchors",
    ),
    "rover": ("base", "width .5", "width .125", "300 epochs", "rate 2e-3", "rate 5e-4", "multibox"),
}
FIGURES = (
    "map_area",
    "map11",
    "map75",
    "coco_ap",
    "ap75",
    "pooled_map_area",
    "to_base",
    "pooled_map75",
    "pooled_coco_ap",
    "images",
    "images_per_s",
    "minutes",
)
FIRST_IMAGES_PER_S = 1000.0  # assumed of a run with --limit while there is no line to judge by
FIRST_START_SECONDS = 60.0  # and of what a run does beside training
STOP_SECONDS = 20.0  # before the limit a run that is not finished is stopped


@dataclass(frozen=True)
class Job:
    """A run to make."""

    name: str  # of the variant
    flags: list[str]  # the module's, but --seed
    seed: int

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


def module_blob() -> str:
    """Return the module's object name in git: `git log --find-object=NAME` shows the commit."""
    content = (common.ROOT / "ssd_object_detection.py").read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()[:12]


def run_one(job: Job, args: Namespace, deadline: float | None) -> dict:
    """Train one variant with one seed in a process of its own; returns its line, RuntimeError if it fails."""
    output = args.folder / "runs" / args.set / f"{re.sub('[^a-zA-Z0-9.]+', '_', job.name)}-{job.seed}"
    output.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    began = time.monotonic()
    with open(output / "log.txt", "a") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
        run = common.train([*job.flags, "--seed", str(job.seed)], output, deadline=deadline, **options)
    if not run["test"]:
        raise RuntimeError("the data has no test list: name one with --test-split")
    line = {"variant": job.name, "flags": job.flags, "seed": job.seed}
    line |= {key: run["test"][key] for key in ("map_area", "map11", "map75")}
    line |= {key: run[key] for key in ("seconds", "images", "images_per_s")}
    line |= {"epochs": run["flags"]["epochs"], "batch_size": run["flags"]["batch_size"]}
    if args.pool:
        line |= {f"pooled_{key}": value for key, value in common.measure(run, args.pool).items()}
    line |= {"run_seconds": time.monotonic() - began, "threads": threads}
    names = ("version", "python", "torch", "albumentations", "device", "cpu_count")
    line["environment"] = {name: run["environment"][name] for name in names}
    return line | {"module": module_blob()}


def read_lines(path: Path) -> list[dict]:
    """Return the lines of a results file, none if it is not there."""
    if not path.is_file():
        return []
    return [json.loads(text) for text in path.read_text().splitlines()]


def is_base_of(line: dict, base: dict) -> bool:
    """Whether a line is the base of another: with the same seed, and flags that the other's begin with."""
    is_same_set = line["flags"][: len(base["flags"])] == base["flags"]
    return base["variant"] == "base" and base["seed"] == line["seed"] and is_same_set


def to_base(line: dict, lines: list[dict]) -> float | None:
    """Return a line's mAP, pooled if measured, less that of the base with the same seed, None without one."""
    bases = [other for other in lines if is_base_of(line, other)]
    if line["variant"] == "base" or not bases:
        return None
    base = max(bases, key=lambda other: len(other["flags"]))
    key = "map_area"
    if "pooled_map_area" in line and "pooled_map_area" in base:
        key = "pooled_map_area"
    return line[key] - base[key]


def summarise(lines: list[dict]) -> list[dict]:
    """Return a row for each variant, by falling mean mAP, pooled if measured.

    It has "variant", "seeds" and of each figure the mean and, with two seeds or more, the standard deviation,
    FIGURE_std. to_base is the difference to the base with the same seeds, in mAP.
    """
    groups = collections.defaultdict(list)
    for line in lines:
        more = {"to_base": to_base(line, lines), "minutes": line["seconds"] / 60}
        groups[line["variant"], tuple(line["flags"])].append(line | more)
    rows = []
    for (name, _), group in groups.items():
        row = {"variant": name, "seeds": len(group)}
        for key in FIGURES:
            values = [line[key] for line in group if line.get(key) is not None]
            if values:
                row[key] = float(np.mean(values))
            if len(values) > 1:
                row[f"{key}_std"] = float(np.std(values, ddof=1))
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get("pooled_map_area", row["map_area"]))


def table(rows: list[dict]) -> str:
    """Return the rows of `summarise` as Markdown."""
    measured = [key for key in FIGURES if any(key in row for row in rows)]
    cells = []
    for row in rows:
        texts = {"variant": row["variant"], "seeds": str(row["seeds"])}
        for key in measured:
            digits = {"images": 0, "images_per_s": 0, "minutes": 1}.get(key, 4)
            numbers = [f"{row[name]:.{digits}f}" for name in (key, f"{key}_std") if name in row]
            texts[key] = " ±".join(numbers) or None
        cells.append(texts)
    return common.markdown(cells)


def report(lines: list[dict], path: Path) -> None:
    """Print the table of the lines of a results file, and write it beside that as Markdown and as JSON."""
    rows = summarise(lines)
    machines = sorted({line["environment"]["device"] for line in lines})
    title = f"{path.stem}: means ± standard deviations of the seeds, trained on {', '.join(machines)}"
    text = f"{title}\n\n{table(rows)}\n"
    ssd.write_atomically(path.with_suffix(".md"), lambda temporary: temporary.write_text(text))
    ssd.write_json(path.with_suffix(".json"), {"trained_on": machines, "rows": rows})
    print(text)


def training_images(flags: list[str]) -> int:
    """Return how many images the training list of some flags has."""
    settings, _ = ssd.load_settings(flags)
    names = (*ssd.DATA_FLAGS, "data_root", "seed")
    return len(ssd.load_data(**{name: getattr(settings, name) for name in names}).train)


def estimate(flags: list[str], lines: list[dict], num_images: int) -> float:
    """Return the seconds that a run will take, by the lines measured before.

    As long as the same flags took; or by the rate and the rest of the newest run of the same batch size, else
    of any; without one by what a GPU does at least. num_images: in the training list.
    """
    timed = [line for line in lines if "run_seconds" in line]
    same = [line["run_seconds"] for line in timed if line["flags"] == flags]
    if same:
        return max(same)
    settings, _ = ssd.load_settings(flags)
    alike = [line for line in timed if line["batch_size"] == settings.batch_size] or timed
    rate, rest = FIRST_IMAGES_PER_S, FIRST_START_SECONDS
    if alike:
        newest = alike[-1]
        rate = newest["images"] / newest["seconds"]
        rest = newest["run_seconds"] - newest["seconds"]
    return rest + settings.epochs * num_images / rate


def variants_of(args: Namespace) -> Sequence[str]:
    """Return the names of the variants to run: those of --only, else the ladder of the set, or base."""
    if args.only:
        return args.only
    return LADDERS.get(args.set, ["base"])


class Queue:
    """The runs that a set still lacks, in their order, and the time there is for them."""

    def __init__(self, args: Namespace, results: Path, began: float) -> None:
        self.args = args
        self.results = results
        self.deadline = None
        if args.limit:
            self.deadline = began + args.limit - STOP_SECONDS
        shared = ["--data", args.data, *SETS[args.set].split(), *shlex.split(args.flags)]
        self.num_images = training_images(shared) if args.limit else 0
        done = [(line["variant"], line["flags"], line["seed"]) for line in read_lines(results)]
        self.jobs = []
        for seed in args.seeds:
            for name in variants_of(args):
                flags = [*shared, *VARIANTS[name].split()]
                if (name, flags, seed) not in done:
                    self.jobs.append(Job(name, flags, seed))

    def work(self, job: Job) -> int:
        """Make one run if there is time for it and write its line; returns 1 if it failed, else 0."""
        if self.deadline is not None:
            needed = estimate(job.flags, read_lines(self.results), self.num_images)
            left = self.deadline - time.monotonic()
            if needed > left:
                print(
                    f"left out: {job}: needs about {needed:.0f} s, {max(0.0, left):.0f} s are left",
                    flush=True,
                )
                return 0
        try:
            line = run_one(job, self.args, self.deadline)
        except (RuntimeError, ssd.InputError) as error:
            print(f"failed: {job}: {error}", file=sys.stderr, flush=True)
            return 1
        with open(self.results, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{job}: {line['map_area']:.4f}, {line['seconds']:.0f} s", flush=True)
        return 0

    def run(self) -> int:
        """Make all runs, --parallel at a time; returns how many failed."""
        with ThreadPoolExecutor(self.args.parallel) as executor:
            try:
                return sum(executor.map(self.work, self.jobs))
            except KeyboardInterrupt:  # the runs got it too
                executor.shutdown(cancel_futures=True)
                raise


def parse_args(argv: Sequence[str] | None) -> Namespace:
    """Return the program's flags."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/BCCD", help="as the module's --data")
    add("--set", choices=SETS, default="bccd", help="flags that all runs share")
    add("--flags", default="", help="further flags for all runs, in one quoted string")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=VARIANTS,
        help="variants (default: base; of gpu a ladder)",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each variant")
    add("--pool", nargs="+", metavar="LIST", default=[], help="lists to measure together too")
    add("--limit", metavar="SECONDS", type=ssd.positive_float, help="stop by itself before this time is over")
    add(
        "--parallel",
        type=ssd.positive_int,
        default=1,
        help="runs at a time, each with its share of the cores (beside a GPU say --workers in --flags)",
    )
    add("--folder", type=Path, default=Path("benchmarks/results/recipes"), help="where results are")
    add("--table", action="store_true", help="run nothing: the table of what is there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet, then print and write the table; returns the exit code."""
    began = time.monotonic()
    args = parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / f"{args.set}.jsonl"
    failures = 0
    if not args.table:
        try:
            failures = Queue(args, results, began).run()
        except ssd.InputError as error:
            print(f"error: {ssd.error_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
    lines = read_lines(results)
    if not lines:
        print(f"{results}: no run there yet", file=sys.stderr)
        return 2
    report(lines, results)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
