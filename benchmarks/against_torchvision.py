"""Train this project's SSD300 and torchvision's ssd300_vgg16 on the same files for as long; compare mAP.

    python benchmarks/against_torchvision.py --data data/VOCdevkit/VOC2007 --imagenet --flags "--epochs 20"

This project's command runs first; the seconds that its epochs took are the other's budget. torchvision's
network is trained by torchvision's reference recipe for SSD: its augmentation; SGD with momentum .9, learning
rate .002 at batch 32 (in proportion below), weight decay 5e-4, a warm-up of up to 1,000 steps, a tenth of the
rate after 2/3 and after 11/12 of the budget. Both start from random weights, or both from ImageNet weights
(--imagenet), both use autocast where the device has bfloat16, and both are measured once, at the end, by this
project's evaluator.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch
import torchvision
from common import ROOT, ssd


def train_peer(model, loader, *, seconds, device, amp_dtype):
    """Train by torchvision's recipe until the seconds are over; returns (images seen, seconds used)."""
    base_lr = 0.002 * loader.batch_size / 32
    optimizer = common.peer_optimizer(model)
    warmup = min(1000, len(loader))
    step, images = 0, 0
    model.train()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for batch in loader:
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                break
            drops = (elapsed >= seconds * 2 / 3) + (elapsed >= seconds * 11 / 12)
            for group in optimizer.param_groups:
                group["lr"] = base_lr * 0.1**drops * min(1.0, (step + 1) / warmup)
            pixels, targets = common.peer_to_device(batch, device)
            common.peer_step(model, optimizer, pixels, targets, amp_dtype)
            step += 1
            images += len(pixels)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images, time.perf_counter() - start


@torch.no_grad()
def detect_peer(model, loader, *, device, amp_dtype):
    """Return torchvision's detections on a loader's records in the form that `evaluate_voc` takes."""
    model.eval()
    found = []
    for batch in loader:
        pixels, _ = common.peer_to_device(batch, device)
        with ssd.autocast(device, amp_dtype):
            found += model(pixels)
    return {
        "image_ids": np.repeat(np.arange(len(found)), [len(one["labels"]) for one in found]),
        "labels": torch.cat([one["labels"] for one in found]).cpu().numpy(),
        "scores": torch.cat([one["scores"] for one in found]).float().cpu().numpy(),
        "boxes_px": ssd.to_voc_pixels(torch.cat([one["boxes"] for one in found]).float().cpu().numpy()),
    }


def run_ours(args, output):
    """Train this project's network by its command line; returns its row of the table."""
    command = [sys.executable, str(ROOT / "ssd_object_detection.py"), "--data", args.data,
               "--train-split", args.train_split, "--test-split", args.test_split, "--val-fraction", "0",
               "--output-dir", str(output), "--workers", str(args.workers), "--device", args.device,
               "--seed", str(args.seed), "--recipe", "voc" if args.imagenet else "scratch",
               *shlex.split(args.flags), "--pretrained" if args.imagenet else "--no-pretrained"]
    print("+", shlex.join(command), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f"this project's run failed with exit code {code}")
    rows = [json.loads(line) for line in (output / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    (final,) = (output / "checkpoints").glob("*_final.pth")
    return {"case": "this project", "seconds": sum(row["seconds"] for row in rows),
            "images": sum(row["images_per_s"] * row["seconds"] for row in rows),
            **common.measure(final, args.data, [args.test_split], device=args.device)}


def run_peer(args, seconds, device, amp_dtype):
    """Train torchvision's network for as many seconds; returns its row of the table."""
    lists = {"train_split": args.train_split, "test_split": args.test_split}
    splits = ssd.load_data(args.data, **lists, val_fraction=0)
    torch.manual_seed(args.seed)
    weights = torchvision.models.VGG16_Weights.IMAGENET1K_FEATURES if args.imagenet else None
    model = torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=weights, num_classes=len(splits.classes) + 1).to(device)
    print(f"+ torchvision ssd300_vgg16 for {seconds:.1f} s", flush=True)
    sizes = {"batch_size": args.batch_size, "workers": args.workers}
    train = common.peer_loader(common.PeerDataset(splits.train, resize=False), device, **sizes)
    images, used = train_peer(model, train, seconds=seconds, device=device, amp_dtype=amp_dtype)
    test = common.PeerDataset(splits.test, train=False, resize=False)
    test_loader = common.peer_loader(test, device, **sizes, train=False)
    detections = detect_peer(model, test_loader, device=device, amp_dtype=amp_dtype)
    return {"case": "torchvision", "seconds": used, "images": images,
            **common.figures(detections, splits.test, len(splits.classes))}


def main(argv=None):
    """Run both and print the table; returns the exit code."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/VOCdevkit/VOC2007", help="a folder in VOC layout")
    add("--train-split", default="train", help="list to train on")
    add("--test-split", default="val", help="list to measure on")
    add("--flags", default="--epochs 100", help="further flags of this project's run")
    add("--imagenet", action="store_true", help="both from ImageNet weights")
    add("--batch-size", type=ssd.positive_int, default=32, help="of torchvision's network")
    add("--workers", type=ssd.natural_int, default=0, help="loader processes of both")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--seed", type=ssd.natural_int, default=0, help="of both")
    add("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    device = ssd.pick_device(args.device)
    amp_dtype = ssd.pick_amp_dtype(device)
    with tempfile.TemporaryDirectory() as output:
        ours = run_ours(args, Path(output))
    theirs = run_peer(args, ours["seconds"], device, amp_dtype)
    ratio = ours["map_area"] / theirs["map_area"] if theirs["map_area"] else float("nan")
    if args.json:
        about = {"environment": ssd.environment(device), "flags": args.flags, "data": args.data}
        ssd.write_json(args.json, {**about, "rows": [ours, theirs], "map_ratio": ratio})
    print(f"{common.markdown([ours, theirs])}\nmAP ratio: {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
