"""Measure named variants of the training command over several seeds: a JSON line a run, a table, a figure.

    python benchmarks/recipes.py --data data/BCCD --set bccd --seeds 0 1 2
    python benchmarks/recipes.py --data data/VOCdevkit/VOC2007 --set voc --only base multibox --pool
    python benchmarks/recipes.py --set bccd --draw               # table and figure again, from the JSON lines

A variant is a list of flags added to those of its set; "base" adds none; --trial is a flag of trials.py. A
run whose line is already in the results file (same variant, flags and seed) is not repeated, so the command
goes on where it was stopped. Each final checkpoint is measured on the test list, and on the lists of --pool
together, which is less noisy.
"""

import collections
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import numpy as np
import torch
from common import ROOT, ssd
from matplotlib.figure import Figure

# Flags of all runs of a set. `python tools/anchors.py --data PATH` makes plots/anchors.json.
SETS = {
    "bccd": "--recipe small --anchors plots/anchors.json --val-fraction 0",
    "bccd-narrow": "--recipe small --epochs 12 --val-fraction 0",
    "shapes": "",
    "voc-small": "--recipe scratch --width .125 --epochs 12 --batch-size 8 "
                 "--train-split train --test-split val --val-fraction 0",
    "voc": "--train-split train --test-split val --val-fraction 0",
}
VARIANTS = {
    "base": "",
    "multibox": "--loss multibox",
    "focal": "--loss focal",
    "alpha .25": "--focal-alpha .25",
    "DIoU": "--trial diou",
    "suggested anchors": "--anchors plots/anchors.json",
    "suggested anchors, mining": "--anchors plots/anchors.json --loss multibox",
    "ATSS": "--trial atss",
    "ATSS for small objects": "--trial atss-small",
    "zoom-out .5": "--zoom-out .5",
    "two blocks frozen": "--freeze-blocks 2",
    "AdamW": "--optimizer adamw --lr 2e-4 --weight-decay .05",
    "weight decay .01": "--weight-decay .01",
    "paper": "--recipe paper",  # for the set voc alone: it replaces the whole recipe
}
FIGURES = ("map_area", "map11", "coco_ap", "ap75", "pooled_map_area", "to_base", "pooled_coco_ap", "seconds")


def run_one(name, flags, seed, *, folder, parallel, pool):
    """Train one variant with one seed in a process of its own; returns its line, RuntimeError if it fails.

    parallel: how many runs share the cores. pool: lists to measure together.
    """
    output = folder / "runs" / f"{re.sub('[^a-zA-Z0-9.]+', '_', name)}-{seed}"
    output.mkdir(parents=True, exist_ok=True)
    program = "benchmarks/trials.py" if "--trial" in flags else "ssd_object_detection.py"
    command = [sys.executable, str(ROOT / program), *flags, "--seed", str(seed), "--output-dir", str(output)]
    threads = max(1, (os.cpu_count() or 1) // parallel)
    if parallel > 1 and torch.cuda.is_available() and "--workers" not in flags:
        command += ["--workers", str(threads)]  # the default is for a run that has the machine to itself
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = time.time()
    with open(output / "log.txt", "w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    seconds = time.time() - start
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}, see {output / 'log.txt'}")
    record = json.loads((output / "checkpoints" / "run.json").read_text())
    if not record["test"]:
        raise RuntimeError("the data has no test list: name one with --test-split in --flags")
    used = record["flags"]
    lists = [used[name] for name in ("train_split", "val_split", "test_split")]
    root = ssd.find_data(used["data"], used["data_root"], *lists)[0][0]
    (checkpoint,) = (output / "checkpoints").glob("*_final.pth")
    line = {"variant": name, "flags": flags, "seed": seed, "seconds": seconds, "threads": threads}
    settings = {"device": used["device"], "amp": used["amp"], **record["test"]["detection"]}
    measure = functools.partial(common.measure, checkpoint, root, **settings)
    line |= measure([record["test"]["split"]])
    if pool:
        line |= {f"pooled_{key}": value for key, value in measure(pool).items()}
    names = ("python", "torch", "albumentations", "device", "cpu_count")
    return line | {"environment": {name: record["environment"][name] for name in names}}


def read_lines(path):
    """Return the lines of a results file, none if it is not there."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []


def to_base(line, lines):
    """Return a line's mAP, pooled if measured, less that of the base with the same seed, None without one.

    The base's flags begin those of its variants.
    """
    bases = [b for b in lines if b["variant"] == "base" and b["seed"] == line["seed"]
             and line["flags"][: len(b["flags"])] == b["flags"]]
    if line["variant"] == "base" or not bases:
        return None
    base = max(bases, key=lambda b: len(b["flags"]))
    key = "pooled_map_area" if "pooled_map_area" in line.keys() & base.keys() else "map_area"
    return line[key] - base[key]


def summarise(lines):
    """Return [(variant, {figure: values of the seeds})], by falling mean mAP, pooled if measured."""
    groups = collections.defaultdict(list)
    for line in lines:
        groups[line["variant"], tuple(line["flags"])].append(line | {"to_base": to_base(line, lines)})
    rows = [(name, {key: [line[key] for line in group if line.get(key) is not None] for key in FIGURES})
            for (name, _), group in groups.items()]
    return sorted(rows, key=lambda row: -np.mean(row[1]["pooled_map_area"] or row[1]["map_area"]))


def table(rows):
    """Return the table of `summarise`: mean and, with two seeds or more, the standard deviation.

    to_base is the difference to the base with the same seeds, in mAP.
    """
    lines = []
    for name, figures in rows:
        line = {"variant": name, "seeds": str(len(figures["map_area"]))}
        for key, values in figures.items():
            digits = 0 if key == "seconds" else 4
            line[key] = f"{np.mean(values):.{digits}f}" if values else None
            if len(values) > 1:
                line[key] += f" ±{np.std(values, ddof=1):.{digits}f}"
        lines.append(line)
    return common.markdown(lines)


def draw(rows):
    """Return the figure: every seed a dot, the mean a bar, the best variant on top, the base in orange."""
    figure = Figure(figsize=(9, 1.5 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (name, figures) in enumerate(rows):
        values = figures["pooled_map_area"] or figures["map_area"]
        color = "C1" if name == "base" else "C0"
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.5)
        axes.plot(np.mean(values), place, "|", color=color, markersize=14, markeredgewidth=2.5)
    names = [f"{name} ({len(figures['map_area'])})" for name, figures in rows]
    axes.set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.5, -0.5),
             xlabel="mAP@.5 (area), pooled if measured; dots: seeds, bars: means, in brackets: seeds")
    axes.grid(axis="x", alpha=0.3)
    return figure


def run_missing(args, results):
    """Run what has no line in the results file yet; returns how many runs failed."""
    shared = ["--data", args.data, *SETS[args.set].split(), *shlex.split(args.flags)]
    wanted = [(name, [*shared, *VARIANTS[name].split()], seed) for seed in args.seeds for name in args.only]
    done = [(line["variant"], line["flags"], line["seed"]) for line in read_lines(results)]
    jobs = [job for job in wanted if job not in done]

    def work(job):
        name, _, seed = job
        try:
            line = run_one(*job, folder=args.folder, parallel=args.parallel, pool=args.pool)
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
    """Run what is not there yet, then print the table and draw the figure; returns the exit code."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/BCCD", help="as the module's --data")
    add("--set", choices=SETS, default="bccd", help="flags that all runs share")
    add("--flags", default="", help="further flags for all runs, in one quoted string")
    add("--only", nargs="+", metavar="NAME", choices=VARIANTS, default=list(VARIANTS), help="variants to run")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each variant")
    add("--pool", nargs="*", metavar="LIST", default=["val", "test"], help="lists to measure together too")
    add("--parallel", type=ssd.positive_int, default=1,
        help="runs at a time, each with its share of the cores; a GPU must hold them together")
    add("--folder", type=Path, default=Path("benchmarks/results/recipes"), help="where results are")
    add("--draw", action="store_true", help="run nothing: table and figure of what is there")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / f"{args.set}.jsonl"
    failures = 0 if args.draw else run_missing(args, results)
    rows = summarise(read_lines(results))
    if not rows:
        print(f"{results}: no run there yet", file=sys.stderr)
        return 2
    print(table(rows))
    ssd.save_figure(draw(rows), results.with_suffix(".png"))
    print(results.with_suffix(".png"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
