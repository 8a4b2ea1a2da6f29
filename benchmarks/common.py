"""What the benchmarks share: their flags, timing in turns, the table, the JSON file, pictures to work on.

The peers are torchvision's SSD300 (`ssd300_vgg16`, random weights) and its reference SSD augmentation, measured in the
same process, round by round in turn, so that a neighbour's load or a clock that changes meets all of them alike.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torchvision

import ssd_object_detection as ssd

PEER = "torchvision"


def make_parser(doc, *, rounds):
    """Return a parser with the flags of every benchmark; doc is the script's docstring."""
    formatter = type("Formatter", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    parser.add_argument("--data", default="shapes", help="shapes (generated where missing) or a folder in VOC layout")
    parser.add_argument("--data-root", default="data", help="where shapes is or will be")
    parser.add_argument("--train-split", default="train", help="list of the pictures to use")
    parser.add_argument("--rounds", type=ssd.positive_int, default=rounds, help="rounds that the median is taken of")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on a CPU")
    parser.add_argument("--json", metavar="FILE", help="write the table's numbers there too")
    return parser


def begin(args):
    """Set what every measurement needs and return the device: threads, seed, freed memory kept for all cases alike."""
    torch.set_num_threads(args.threads)
    ssd.cv2.setNumThreads(0)
    ssd.set_seed(0)
    device = ssd.pick_device(args.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # both as training does it, for peer and module alike
    if device.type == "cpu":
        ssd.keep_freed_memory()
    return device


def load_data(args):
    """Return the DataSplits that the flags name, nothing held out."""
    return ssd.load_data(args.data, data_root=args.data_root, train_split=args.train_split, val_fraction=0)


def make_batch(records, device, *, batch_size):
    """Return a collated batch on a device, resized but not augmented; records are repeated where there are too few."""
    dataset = ssd.VocDataset(records, ssd.build_transform(train=False))
    return ssd.to_device(ssd.collate([dataset[i % len(dataset)] for i in range(batch_size)]), device)


def peer_targets(batch, size=ssd.IMAGE_SIZE):
    """Return the batch's ground truth as torchvision takes it: a list of boxes in pixels and labels."""
    targets = []
    for boxes, labels in zip(batch["gt_boxes"], batch["gt_labels"], strict=True):
        real = labels > 0
        targets.append({"boxes": boxes[real] * size, "labels": labels[real]})
    return targets


def peer_model(num_classes, device):
    """Return torchvision's SSD300 with random weights; its class count includes the background."""
    model = torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=num_classes + 1, topk_candidates=ssd.PRE_NMS_TOP_K)
    return model.to(device)


def precisions(device):
    """Return [(name, autocast dtype or None)] that the hardware itself computes: fp32, and bf16 or fp16."""
    dtype = ssd.pick_amp_dtype(device)
    return [("fp32", None)] + ([(str(dtype).removeprefix("torch."), dtype)] if dtype is not None else [])


def time_in_turns(cases, rounds, device, *, least=0.05):
    """Return {name: [seconds a call]}: after one untimed call each, `rounds` rounds of every case in turn.

    cases: {name: function}. A case shorter than `least` seconds is called several times a round. Waits for the device.
    """
    def run(function, calls):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, function in cases.items():
        run(function, 1)  # pays for lazy set-up, allocation, compilation
        calls[name] = max(1, round(least / max(run(function, 1), 1e-6))) if rounds > 1 else 1
    times = {name: [] for name in cases}
    for _ in range(rounds):
        for name, function in cases.items():
            times[name].append(run(function, calls[name]))
    return times


def rows_of(times, peer_of, *, images, extra=None):
    """Return a table row a case: median and spread of its times, images/s, and how many times its peer's speed.

    peer_of: {case: the case to compare with}. images: pictures a call, a number or {case: number}. extra: {case: dict
    of more columns}.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, values in times.items():
        count = images[name] if isinstance(images, dict) else images
        row = {"case": name, "ms": 1e3 * medians[name], "images_per_s": count / medians[name],
               "spread": (max(values) - min(values)) / medians[name]}
        peer = peer_of.get(name)
        if peer:
            peer_count = images[peer] if isinstance(images, dict) else images
            row["times_peer"] = row["images_per_s"] * medians[peer] / peer_count
        rows.append({**row, **(extra or {}).get(name, {})})
    return rows


def _cell(value):
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def report(title, rows, args, **facts):
    """Print one Markdown table of row dicts, and write it with versions, machine and facts to --json. Returns both."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *[[_cell(row.get(c)) for c in columns] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    environment = ssd.environment(ssd.pick_device(args.device)) | {"threads": torch.get_num_threads()}
    print(f"{title}\n{environment['device']}, {environment['threads']} thread(s), torch {environment['torch']}, "
          f"torchvision {environment['torchvision']}; medians of {args.rounds} round(s) taken in turn\n")
    print("\n".join(lines), flush=True)
    result = {"title": title, "rows": rows, **facts, "rounds": args.rounds, "environment": environment}
    if args.json:
        ssd.write_json(args.json, result)
    return result
