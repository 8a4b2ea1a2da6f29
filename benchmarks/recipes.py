"""Measure named variants of the training command over several seeds: a JSON line a run, a table, a figure.

    python benchmarks/recipes.py --data data/BCCD --set bccd --seeds 0 1 2
    python benchmarks/recipes.py --data data/BCCD --set bccd --only base multibox --seeds 0 1 2 --parallel 2
    python benchmarks/recipes.py --draw                          # table and figure again, from the JSON lines

A variant is a list of flags added to those of its set; "base" adds none; --trial is a flag of benchmarks/trials.py,
where the alternatives to the module's own parts are. A run whose line is already in the results file (same variant,
flags and seed) is not repeated, so the command goes on where it was stopped. Besides the test list of the run itself
each final checkpoint is measured on the lists named by --pool together, which is less noisy. What only changes the
detection needs no training:

    python benchmarks/recipes.py --measure checkpoints/*_final.pth --pool val test --trials soft-nms top-400
"""

import argparse
import collections
import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ssd_object_detection as ssd  # noqa: E402
from benchmarks import trials  # noqa: E402

# What every run of a set has in common; README's BCCD command is multibox of bccd. VOC at full width needs a GPU.
# SUGGESTED stands for the file that --suggest-anchors writes for the data.
SETS = {
    "bccd": "--anchors SUGGESTED --width .125 --val-fraction 0 --epochs 28 --batch-size 4 --lr 3e-3 --zoom-out .2 "
            "--crop .6 --flip-average both",
    "bccd-narrow": "--width .125 --val-fraction 0 --epochs 12 --batch-size 4 --lr 3e-3 --zoom-out .2 --crop .6",
    "shapes": "",
    "voc-small": "--train-split train --test-split val --val-fraction 0 --width .125 --epochs 12 --batch-size 8",
    "voc": "--train-split train --test-split val --val-fraction 0 --no-pretrained --epochs 100",
}
VARIANTS = {
    "base": "",
    # Loss
    "multibox": "--loss multibox",
    "multibox from the prior": "--loss multibox --trial prior",
    "gamma 0": "--focal-gamma 0",
    "gamma .5": "--focal-gamma .5",
    "gamma 2": "--focal-gamma 2",
    "alpha .25": "--focal-alpha .25",
    "alpha .75": "--focal-alpha .75",
    "class weight 2": "--cls-weight 2",
    "box weight 2": "--box-weight 2",
    "GIoU": "--trial giou --box-weight 5",
    "DIoU": "--trial diou --box-weight 5",
    "CIoU": "--trial ciou --box-weight 5",
    "sigmoid focal": "--trial sigmoid --focal-alpha .25",
    "loss over images": "--trial per-image --clip-grad 0",
    "prior .1": "--trial prior-.1",
    "plain positives": "--trial plain-positives",
    "plain positives, gamma 2": "--trial plain-positives --focal-gamma 2",
    # Anchors and matching
    "clipped anchors": "--trial clipped",
    "suggested anchors": "--anchors SUGGESTED",
    "suggested anchors, mining": "--anchors SUGGESTED --loss multibox",
    "suggested anchors, mining from the prior": "--anchors SUGGESTED --loss multibox --trial prior",
    "suggested anchors, 28 epochs": "--anchors SUGGESTED --epochs 28",
    "suggested anchors, gamma .5": "--anchors SUGGESTED --focal-gamma .5",
    "suggested anchors, class weight 2": "--anchors SUGGESTED --cls-weight 2",
    "suggested anchors, class weight 4": "--anchors SUGGESTED --cls-weight 4",
    "suggested anchors, plain positives": "--anchors SUGGESTED --trial plain-positives",
    "suggested anchors, plain positives, gamma 2": "--anchors SUGGESTED --trial plain-positives --focal-gamma 2",
    "suggested anchors, plain positives, class weight 2": "--anchors SUGGESTED --trial plain-positives --cls-weight 2",
    "suggested anchors, plain positives, gamma 2, class weight 2":
        "--anchors SUGGESTED --trial plain-positives --focal-gamma 2 --cls-weight 2",
    "suggested anchors, plain positives, gamma 2, background doubled":
        "--anchors SUGGESTED --trial plain-positives --focal-gamma 2 --focal-alpha .3333 --cls-weight 3",
    "match IoU .4": "--match-iou .4",
    "match IoU .45": "--match-iou .45",
    "ATSS": "--trial atss",
    "no L2 norm": "--trial no-l2norm",
    # Augmentation
    "no zoom-out": "--zoom-out 0",
    "zoom-out .5": "--zoom-out .5",
    "no crop": "--crop 0",
    "crop 1": "--crop 1",
    "no colour": "--color 0",
    "no shadow, noise, blur": "--shadow 0 --noise 0 --blur 0",
    "turns by 90 degrees": "--trial turns",
    "upside down": "--trial upside-down",
    "plain last epochs": "--trial plain-end",
    "mosaic": "--trial mosaic",
    "mixup": "--trial mixup",
    # Optimisation
    "SGD": "--optimizer sgd --lr 1e-2 --weight-decay 5e-4",
    "lr / 2": "--lr 1.5e-3",
    "lr x 2": "--lr 6e-3",
    "weight decay .01": "--weight-decay .01",
    "weight decay .2": "--weight-decay .2",
    "step schedule": "--schedule step",
    "no EMA": "--ema-decay 0",
    "EMA .9": "--ema-decay .9",  # 612 steps never reach .99: the decay rises as (1 + step) / (10 + step)
    "no batch norm": "--no-batch-norm --lr 1e-3",
    "batch 8": "--batch-size 8",
    "36 epochs": "--epochs 36",
    "paper": "--recipe paper --warmup-epochs 1",
}
DETECTION_TRIALS = ("soft-nms", "diou-nms", "voting", "flip", "four-flips", "top-400", "nms-.4", "nms-.5")
FIGURES = ("map_area", "map11", "coco_ap", "ap75", "pooled_map_area", "to_base", "pooled_coco_ap", "seconds")
MEASURING = threading.Lock()


def measure(checkpoint, data, splits, trial=None, **settings):
    """Return the figures of a checkpoint file on several lists of a VOC folder taken together, with a trial in place.

    settings: of detection, see `ssd.evaluate`. One at a time: a trial changes the module.
    """
    with MEASURING, trials.applied(trial):
        saved = ssd.load_checkpoint(checkpoint)
        ids = [image_id for split in splits for image_id in ssd.read_split(data, split)]
        records = ssd.make_records([(data, image_id) for image_id in ids], {data: ssd.inspect_all(data, ids)},
                                   tuple(saved["classes"]), collections.defaultdict(dict))
        device = ssd.pick_device()
        model = ssd.model_from_checkpoint(saved, checkpoint, device)
        dataset = ssd.VocDataset(records, ssd.build_transform(train=False))
        result = ssd.evaluate(model, ssd.make_loader(dataset, batch_size=8), amp_dtype=ssd.pick_amp_dtype(device),
                              **settings)
    coco = ssd.evaluate_coco(result["detections"], ssd.truth_of(records), len(saved["classes"]))
    return {"map_area": result["map_area"], "map11": result["map11"], "coco_ap": coco["ap"], "ap75": coco["ap75"],
            "ap_small": coco["ap_small"]}


def pooled(figures):
    """Return a measurement's figures under their names in a line."""
    return {f"pooled_{name}": value for name, value in figures.items()}


def measure_detection(args):
    """Print the table of finished checkpoints measured as they are and with each trial in place, without training."""
    lines = []
    for trial in (None, *args.trials):
        for number, path in enumerate(args.measure):
            start = time.time()
            figures = measure(path, args.data, ["test"], trial)
            figures |= pooled(measure(path, args.data, args.pool, trial)) if args.pool else {}
            lines.append({"variant": trial or "base", "flags": [], "seed": number, "checkpoint": path, **figures,
                          "seconds": time.time() - start})
    print(table(summarise(lines)))
    args.folder.mkdir(parents=True, exist_ok=True)
    ssd.write_text(args.folder / "detection.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def suggest_anchors(folder, data):
    """Return the file of anchors made for the training list of a data set."""
    path = folder / "plots" / "anchors.json"
    if not path.is_file():
        with contextlib.redirect_stdout(None):
            if ssd.main(["--suggest-anchors", "--data", data, "--output-dir", str(folder)]):
                raise SystemExit(2)
    return str(path)


def free_gpu_memory():
    """Return the GB of GPU memory that are free; None where there is no GPU."""
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else None


def memory_taken(lines):
    """Return the GB of GPU memory that runs took; the lines of a CPU's runs tell of another memory."""
    return [line["memory_gb"] for line in lines
            if "memory_gb" in line and line.get("environment", {}).get("device") != "cpu"]


def runs_that_fit(lines, free):
    """Return how many runs may go side by side in `free` GB, judged by the most that one has taken; one if unknown.

    What torch's allocator counts leaves out its cache's waste and CUDA's context: a quarter and 1 GB are added.
    """
    return max(1, int(free / (1.25 * max(memory_taken(lines), default=math.inf) + 1)))


def run_one(name, flags, seed, *, folder, parallel, pool, data):
    """Train one variant with one seed in a process of its own; returns its line, raises RuntimeError if it fails.

    parallel: how many runs share the cores.
    """
    output = folder / "runs" / f"{name.replace(' ', '_').replace('/', 'by').replace(',', '')}-{seed}"
    output.mkdir(parents=True, exist_ok=True)
    trial = flags[flags.index("--trial") + 1] if "--trial" in flags else None
    program = ROOT / ("benchmarks/trials.py" if trial else "ssd_object_detection.py")
    command = [sys.executable, str(program), *flags, "--seed", str(seed), "--output-dir", str(output)]
    threads = max(1, (os.cpu_count() or 1) // parallel)
    if parallel > 1 and torch.cuda.is_available() and "--workers" not in flags:
        command += ["--workers", str(threads)]  # the default is for a run that has the machine to itself
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = time.time()
    with open(output / "log.txt", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        raise RuntimeError(f"{name}, seed {seed}: exit code {code}, see {output / 'log.txt'}")
    record = json.loads((output / "checkpoints" / "run.json").read_text())
    if not record["test"]:
        raise RuntimeError(f"{name}, seed {seed}: the data has no test list: name one with --test-split in --flags")
    voc, coco = record["test"]["voc"], record["test"]["coco"]
    machine = {k: record["environment"][k] for k in ("python", "torch", "albumentations", "device", "cpu_count")}
    epochs = read_lines(output / "checkpoints" / "metrics.jsonl")
    line = {"variant": name, "flags": flags, "seed": seed, "map_area": voc["map_area"], "map11": voc["map11"],
            "coco_ap": coco["ap"], "ap75": coco["ap75"], "ap_small": coco["ap_small"], "seconds": time.time() - start,
            "memory_gb": epochs[-1]["memory_gb"], "threads": threads, "environment": machine}
    (checkpoint,) = (output / "checkpoints").glob("*_final.pth")
    return line | (pooled(measure(checkpoint, data, pool, trial, **record["test"]["detection"])) if pool else {})


def run_side_by_side(work, jobs, results, parallel):
    """Call work(job, number of jobs at a time) for each job, `parallel` at a time, on a GPU no more than fit it.

    results: the file of lines that work writes to. Where it does not tell what a run takes the first one goes alone.
    """
    jobs, free = list(jobs), free_gpu_memory()
    if free is not None and parallel > 1:
        if jobs and not memory_taken(read_lines(results)):
            work(jobs.pop(0), 1)
        fit = runs_that_fit(read_lines(results), free)
        if fit < parallel:
            print(f"{free:.0f} GB of GPU memory hold {fit} runs at a time", flush=True)
        parallel = min(parallel, fit)
    with ThreadPoolExecutor(parallel) as executor:
        try:
            list(executor.map(work, jobs, [parallel] * len(jobs)))
        except KeyboardInterrupt:
            executor.shutdown(cancel_futures=True)
            raise


def read_lines(path):
    """Return the lines of a results file; one that a crash cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{path}: left out a line that is not whole", file=sys.stderr)
    return lines


def to_base(line, lines):
    """Return a line's mAP, pooled if measured, less that of the base with the same seed; None if there is none.

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
    """Return [(flags, variant, {figure: values of the seeds})], by falling mean mAP, pooled if measured."""
    groups = collections.defaultdict(list)
    for line in lines:
        groups[line["variant"], tuple(line["flags"])].append(line | {"to_base": to_base(line, lines)})
    rows = [(flags, name, {f: [g[f] for g in group if g.get(f) is not None] for f in FIGURES})
            for (name, flags), group in groups.items()]
    return sorted(rows, key=lambda row: -np.mean(row[2]["pooled_map_area"] or row[2]["map_area"]))


def table(rows):
    """Return the table as text: mean and, with two seeds or more, the standard deviation of every figure.

    to_base is the difference to the base with the same seeds, in mAP.
    """
    width = max(10, *(len(name) for _, name, _ in rows))
    lines = [f"{'variant':<{width}}  seeds " + "".join(f"{f:>18}" for f in FIGURES)]
    for _, name, figures in rows:
        cells = ""
        for key, values in figures.items():
            digits = 0 if key == "seconds" else 4
            spread = f" ±{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            sign = "+" if key == "to_base" else ""
            cells += f"{f'{np.mean(values):{sign}.{digits}f}{spread}' if values else '-':>18}"
        lines.append(f"{name:<{width}}  {len(figures['map_area']):5d} {cells}")
    return "\n".join(lines)


def draw(rows):
    """Return the figure: every seed a dot, the mean a bar, best variant on top, the base as a line across."""
    figure = Figure(figsize=(13, 1.8 + 0.32 * len(rows)), layout="constrained")
    panels = [("map_area", "mAP@.5 (area), test"), ("coco_ap", "COCO AP, test")]
    if any(row[2]["pooled_map_area"] for row in rows):
        panels = [panels[0], ("pooled_map_area", "mAP@.5 (area), lists pooled"),
                  ("pooled_coco_ap", "COCO AP, lists pooled")]
    for axes, (key, title) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for place, (_, name, figures) in enumerate(rows):
            values = figures[key]
            color = "C1" if name == "base" else "C0"
            axes.plot(values, [place] * len(values), "o", color=color, alpha=0.5, markersize=5)
            if values:
                axes.plot(np.mean(values), place, "|", color=color, markersize=14, markeredgewidth=2.5)
            if values and name == "base":
                axes.axvline(np.mean(values), color="C1", linewidth=0.8, linestyle="--")
        axes.set(title=title, yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticklabels([f"{name} ({len(figures['map_area'])})" for _, name, figures in rows])
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("dots: seeds, bars: means; in brackets the number of seeds")
    return figure


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/BCCD", help="as the module's --data (default: %(default)s)")
    add("--set", choices=SETS, default="bccd", help="flags that all runs share (default: %(default)s)")
    add("--flags", default="", help="further flags for all runs, in one quoted string")
    add("--only", nargs="+", metavar="NAME", choices=VARIANTS, help="variants to run (default: all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--pool", nargs="*", metavar="LIST", help="lists to measure together (default: val test for bccd, else none)")
    add("--parallel", type=int, default=1, help="runs at a time, on a GPU no more than fit its memory; each gets its "
                                                "share of the cores (default: %(default)s)")
    add("--folder", type=Path, default=Path("benchmarks/results/recipes"), help="default: %(default)s")
    add("--draw", action="store_true", help="run nothing: table and figure of what is there")
    add("--measure", nargs="+", metavar="FILE", help="no training: measure these checkpoints, with --trials in place")
    add("--trials", nargs="+", choices=trials.TRIALS, default=DETECTION_TRIALS, help="default: all of detection")
    add("--list", action="store_true", help="print the variants and their flags")
    args = parser.parse_args(argv)
    if args.parallel < 1:
        parser.error("--parallel must be 1 or more")
    if args.pool is None:
        args.pool = ["val", "test"] if args.set.startswith("bccd") else []
    return args


def main(argv=None):
    """Run what is not there yet, then print the table and draw the figure; returns the exit code."""
    args = parse_args(argv)
    if args.list:
        print("\n".join(f"{name:<24} {flags}" for name, flags in VARIANTS.items()))
        return 0
    if args.measure:
        measure_detection(args)
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    results, picture, failures = args.folder / f"{args.set}.jsonl", args.folder / f"{args.set}.png", []
    shared = ["--data", args.data, *SETS[args.set].split(), *args.flags.split()]
    wanted = [(name, [*shared, *VARIANTS[name].split()], seed) for seed in args.seeds for name in args.only or VARIANTS]
    if any("SUGGESTED" in flags for _, flags, _ in wanted) and not args.draw:
        path = suggest_anchors(args.folder, args.data)
        wanted = [(name, [path if f == "SUGGESTED" else f for f in flags], seed) for name, flags, seed in wanted]
    done = {(line["variant"], tuple(line["flags"]), line["seed"]) for line in read_lines(results)}
    todo = [] if args.draw else [w for w in wanted if (w[0], tuple(w[1]), w[2]) not in done]

    def work(job, parallel):
        try:
            line = run_one(*job, folder=args.folder, parallel=parallel, pool=args.pool, data=args.data)
        except (RuntimeError, ssd.InputError) as error:
            failures.append(str(error))
            print(f"failed: {error}", file=sys.stderr, flush=True)
            return
        with open(results, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{line['variant']}, seed {line['seed']}: {line['map_area']:.4f}, {line['seconds']:.0f} s", flush=True)

    try:
        run_side_by_side(work, todo, results, args.parallel)
    except KeyboardInterrupt:  # the runs got it too; what waits is not started
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    if not (rows := summarise(read_lines(results))):
        print(f"{results}: no run there yet", file=sys.stderr)
        return 2
    print(table(rows))
    ssd.save_figure(draw(rows), picture)
    print(picture)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
