"""Measure named variants of the training command over several seeds: a JSON line a run, a table.

    python benchmarks/recipes.py --data data/BCCD --set bccd --only base multibox --seeds 0 1 2
    python benchmarks/recipes.py --data data/VOCdevkit/VOC2007 --set voc --only base multibox --pool
    python benchmarks/recipes.py --set bccd --table              # the table again, from the JSON lines

A variant is a list of flags added to those of its set; "base" adds none. A run whose line is already in the
results file (same variant, flags and seed) is not repeated, and one that was stopped goes on after its last
saved epoch. Each final checkpoint is measured on the test list, and on the lists of --pool together, which is
less noisy. The table is written beside the results file as Markdown and as JSON.
"""

import collections
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    "voc": "--train-split train --test-split val --val-fraction 0",
    "voc2007": "",  # this and the next: see voc.sh
    "voc0712": "",
}
VARIANTS = {
    "base": "",
    "multibox": "--loss multibox",
    "fitted anchors": "--anchors fit",
    "fitted anchors, mining": "--anchors fit --loss multibox",
    "random start": "--no-pretrained",
    "zoom-out .5": "--zoom-out .5",
    "weight decay .01": "--weight-decay .01",
    "paper": "--recipe paper",  # for the sets of VOC at full width: it replaces the whole recipe
}
FIGURES = (
    "map_area",
    "map11",
    "coco_ap",
    "ap75",
    "pooled_map_area",
    "to_base",
    "pooled_coco_ap",
    "images",
    "minutes",
)


def run_one(name, flags, seed, *, folder, parallel, pool):
    """Train one variant with one seed in a process of its own; returns its line, RuntimeError if it fails.

    parallel: how many runs share the cores. pool: lists to measure together.
    """
    output = folder / f"{re.sub('[^a-zA-Z0-9.]+', '_', name)}-{seed}"
    output.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // parallel)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(output / "log.txt", "a") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
        run = common.train([*flags, "--seed", str(seed)], output, **options)
    line = {"variant": name, "flags": flags, "seed": seed, "seconds": run["seconds"], "threads": threads}
    line |= common.measure(run)
    if pool:
        line |= {f"pooled_{key}": value for key, value in common.measure(run, pool).items()}
    names = ("python", "torch", "albumentations", "device", "cpu_count")
    return line | {"environment": {name: run["environment"][name] for name in names}}


def read_lines(path):
    """Return the lines of a results file, none if it is not there."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []


def to_base(line, lines):
    """Return a line's mAP, pooled if measured, less that of the base with the same seed, None without one.

    The base's flags begin those of its variants.
    """
    bases = [
        b
        for b in lines
        if b["variant"] == "base"
        and b["seed"] == line["seed"]
        and line["flags"][: len(b["flags"])] == b["flags"]
    ]
    if line["variant"] == "base" or not bases:
        return None
    base = max(bases, key=lambda b: len(b["flags"]))
    key = "pooled_map_area" if "pooled_map_area" in line.keys() & base.keys() else "map_area"
    return line[key] - base[key]


def summarise(lines):
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


def table(rows):
    """Return the rows of `summarise` as Markdown."""
    cells = []
    for row in rows:
        cells.append({"variant": row["variant"], "seeds": str(row["seeds"])})
        for key in (key for key in FIGURES if any(key in other for other in rows)):
            digits = {"images": 0, "minutes": 1}.get(key, 4)
            texts = [f"{row[name]:.{digits}f}" for name in (key, f"{key}_std") if name in row]
            cells[-1][key] = " ±".join(texts) or None
    return common.markdown(cells)


def report(lines, path):
    """Print the table of the lines of a results file, and write it beside that as Markdown and as JSON."""
    rows = summarise(lines)
    machines = sorted({line["environment"]["device"] for line in lines})
    title = f"{path.stem}: means ± standard deviations of the seeds, trained on {', '.join(machines)}"
    text = f"{title}\n\n{table(rows)}\n"
    ssd.write_atomically(path.with_suffix(".md"), lambda temporary: temporary.write_text(text))
    ssd.write_json(path.with_suffix(".json"), {"trained_on": machines, "rows": rows})
    print(text)


def run_missing(args, results):
    """Run what has no line in the results file yet; returns how many runs failed."""
    shared = ["--data", args.data, *SETS[args.set].split(), *shlex.split(args.flags)]
    wanted = [(name, [*shared, *VARIANTS[name].split()], seed) for seed in args.seeds for name in args.only]
    done = [(line["variant"], line["flags"], line["seed"]) for line in read_lines(results)]
    jobs = [job for job in wanted if job not in done]

    folder = args.folder / "runs" / args.set

    def work(job):
        name, _, seed = job
        try:
            line = run_one(*job, folder=folder, parallel=args.parallel, pool=args.pool)
        except (RuntimeError, ssd.InputError) as error:
            print(f"failed: {name}, seed {seed}: {error}", file=sys.stderr, flush=True)
            return 1
        with open(results, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}, seed {seed}: {line['map_area']:.4f}, {line['seconds']:.0f} s", flush=True)
        return 0

    with ThreadPoolExecutor(args.parallel) as executor:
        try:
            return sum(executor.map(work, jobs))
        except KeyboardInterrupt:  # the runs got it too
            executor.shutdown(cancel_futures=True)
            raise


def main(argv=None):
    """Run what is not there yet, then print and write the table; returns the exit code."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/BCCD", help="as the module's --data")
    add("--set", choices=SETS, default="bccd", help="flags that all runs share")
    add("--flags", default="", help="further flags for all runs, in one quoted string")
    add("--only", nargs="+", metavar="NAME", choices=VARIANTS, default=list(VARIANTS), help="variants to run")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each variant")
    add("--pool", nargs="*", metavar="LIST", default=["val", "test"], help="lists to measure together too")
    add(
        "--parallel",
        type=ssd.positive_int,
        default=1,
        help="runs at a time, each with its share of the cores (beside a GPU say --workers in --flags)",
    )
    add("--folder", type=Path, default=Path("benchmarks/results/recipes"), help="where results are")
    add("--table", action="store_true", help="run nothing: the table of what is there")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / f"{args.set}.jsonl"
    try:
        failures = 0 if args.table else run_missing(args, results)
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
