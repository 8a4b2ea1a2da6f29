"""Train this project's SSD300 and torchvision's ssd300_vgg16 on the same files for the same time, and compare mAP.

    python benchmarks/against_torchvision.py --data data/VOCdevkit/VOC2007 --train-split train --test-split val
    python benchmarks/against_torchvision.py --data data/shapes --images 16 --flags "--epochs 1 --batch-size 4"  # tiny

This project's command runs first; the seconds that its epochs took are the other's budget. torchvision's network is
trained by torchvision's reference recipe for SSD: photometric distortion, zoom-out, IoU crop and flip of transforms
v2; SGD with momentum .9, learning rate .002 at batch 32 (in proportion below), weight decay 5e-4, a warm-up of up to
1,000 steps, a tenth of the rate after 2/3 and after 11/12 of the budget. Both start from scratch, or both from ImageNet
weights (--imagenet), both use autocast where the device has bfloat16, and both are measured once, at the end, by this
project's evaluator.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision import tv_tensors
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ssd_object_detection as ssd  # noqa: E402


class ReferenceDataset(torch.utils.data.Dataset):
    """Records as torchvision's detectors take them: (float image in [0, 1], {"boxes" in pixels, "labels"})."""

    def __init__(self, records, *, train):
        self.records = records
        distort = [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=[123.0, 117.0, 104.0]), v2.RandomIoUCrop(),
                   v2.RandomHorizontalFlip(p=0.5), v2.SanitizeBoundingBoxes()]
        self.transform = v2.Compose([*(distort if train else []), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        image = tv_tensors.Image(torch.from_numpy(ssd.read_image(record.image_path)).permute(2, 0, 1).contiguous())
        boxes = tv_tensors.BoundingBoxes(record.boxes_px, format="XYXY", canvas_size=image.shape[1:])
        image, target = self.transform(image, {"boxes": boxes, "labels": torch.from_numpy(record.labels)})
        return image.as_subclass(torch.Tensor), {k: v.as_subclass(torch.Tensor) for k, v in target.items()}


def make_loader(records, *, train, batch_size, workers):
    """Return a loader of lists of images and targets; a last batch of one image, which batch norm cannot take, goes."""
    return torch.utils.data.DataLoader(
        ReferenceDataset(records, train=train), batch_size=min(batch_size, len(records)), shuffle=train,
        drop_last=train, num_workers=workers, persistent_workers=workers > 0,
        collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
    )


def train_reference(model, loader, *, seconds, device, amp_dtype):
    """Train by torchvision's recipe until the seconds are over; returns (images seen, seconds used)."""
    base_lr, step, images = 0.002 * loader.batch_size / 32, 0, 0
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=base_lr, momentum=0.9, weight_decay=5e-4)
    warmup, start = min(1000, len(loader)), time.perf_counter()
    model.train()
    while (elapsed := time.perf_counter() - start) < seconds:
        for batch, targets in loader:
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                break
            drops = (elapsed >= seconds * 2 / 3) + (elapsed >= seconds * 11 / 12)
            for group in optimizer.param_groups:
                group["lr"] = base_lr * 0.1**drops * min(1.0, (step + 1) / warmup)
            batch = [image.to(device, non_blocking=True) for image in batch]
            targets = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]
            with ssd.autocast(device, amp_dtype):
                loss = sum(model(batch, targets).values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step, images = step + 1, images + len(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images, time.perf_counter() - start


@torch.no_grad()
def detect_reference(model, loader, *, device, amp_dtype):
    """Return torchvision's detections on a loader's records in the form that `evaluate_voc` takes."""
    model.eval()
    parts, index = {"image_ids": [], "labels": [], "scores": [], "boxes_px": []}, 0
    for batch, _ in loader:
        with ssd.autocast(device, amp_dtype):
            found = model([image.to(device) for image in batch])
        for one in found:
            parts["image_ids"].append(np.full(len(one["labels"]), index))
            parts["labels"].append(one["labels"].cpu().numpy())
            parts["scores"].append(one["scores"].float().cpu().numpy())
            parts["boxes_px"].append(ssd.to_voc_pixels(one["boxes"].float().cpu().numpy()))
            index += 1
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def run_ours(args, data, output):
    """Train this project's network by its command line; returns (figures, seconds of its epochs, images seen)."""
    command = [sys.executable, str(ROOT / "ssd_object_detection.py"), "--data", str(data), "--train-split",
               args.train_split, "--test-split", args.test_split, "--val-fraction", "0", "--output-dir", str(output),
               "--workers", str(args.workers), "--device", args.device, "--seed", str(args.seed),
               *shlex.split(args.flags),
               "--pretrained" if args.imagenet else "--no-pretrained"]
    print("+", shlex.join(command), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f"this project's run failed with exit code {code}")
    rows = [json.loads(line) for line in (output / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    test = json.loads((output / "checkpoints" / "run.json").read_text())["test"]
    seconds = sum(row["seconds"] for row in rows)
    return figures(test["voc"], test["coco"]), seconds, sum(r["images_per_s"] * r["seconds"] for r in rows)


def figures(voc, coco):
    """Return what the table shows of an evaluation."""
    return {"map_area": voc["map_area"], "map11": voc["map11"], "coco_ap": coco["ap"], "ap75": coco["ap75"],
            "ap_small": coco["ap_small"]}


def table(rows):
    """Return the figures of both as text; "-" stands for one that the list cannot have (no object is small)."""
    names = list(rows["torchvision"])
    lines = [f"{'':<14}" + "".join(f"{name:>10}" for name in names)]
    for name, row in rows.items():
        digits = {n: 1 if n in ("seconds", "images") else 4 for n in names}
        cells = ("-" if row[n] is None or math.isnan(row[n]) else f"{row[n]:.{digits[n]}f}" for n in names)
        lines.append(f"{name:<14}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def shorten(root, images, splits, folder):
    """Return a VOC folder that borrows the files of root, with lists cut to their first images."""
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("JPEGImages", "Annotations"):
        (folder / name).symlink_to((root / name).resolve())
    for split in splits:
        ids = ssd.read_split(root, split)[:images]
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return folder


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/VOCdevkit/VOC2007"), help="VOC folder (default: %(default)s)")
    add("--train-split", default="train", help="default: %(default)s")
    add("--test-split", default="val", help="default: %(default)s")
    add("--flags", default="--epochs 100", help="further flags of this project's run (default: %(default)s)")
    add("--imagenet", action="store_true", help="both from ImageNet weights (default: both from scratch)")
    add("--batch-size", type=int, default=32, help="of torchvision's network (default: %(default)s)")
    add("--images", type=int, help="use only the first of each list: a trial")
    add("--workers", type=int, default=0, help="loader processes of both (default: %(default)s)")
    add("--device", default="auto", help="default: %(default)s")
    add("--seed", type=int, default=0, help="of both (default: %(default)s)")
    add("--json", type=Path, help="write the figures here too")
    return parser.parse_args(argv)


def main(argv=None):
    """Run both and print the table; returns the exit code."""
    args = parse_args(argv)
    device = ssd.pick_device(args.device)
    amp_dtype = ssd.pick_amp_dtype(device)
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data
        if args.images:
            data = shorten(data, args.images, {args.train_split, args.test_split}, Path(temporary) / "data")
        ours, seconds, seen = run_ours(args, data, Path(temporary) / "ours")
        splits = ssd.load_data(str(data), train_split=args.train_split, test_split=args.test_split, val_fraction=0)
        ssd.set_seed(args.seed)
        weights = torchvision.models.VGG16_Weights.IMAGENET1K_FEATURES if args.imagenet else None
        model = torchvision.models.detection.ssd300_vgg16(
            weights=None, weights_backbone=weights, num_classes=len(splits.classes) + 1
        ).to(device)
        loader = make_loader(splits.train, train=True, batch_size=args.batch_size, workers=args.workers)
        print(f"+ torchvision ssd300_vgg16 for {seconds:.1f} s", flush=True)
        images, used = train_reference(model, loader, seconds=seconds, device=device, amp_dtype=amp_dtype)
        loader = make_loader(splits.test, train=False, batch_size=args.batch_size, workers=args.workers)
        detections = detect_reference(model, loader, device=device, amp_dtype=amp_dtype)
    result = ssd.score_detections(detections, splits.test, len(splits.classes))
    coco = ssd.evaluate_coco(detections, ssd.truth_of(splits.test), len(splits.classes))
    rows = {"this project": {"seconds": seconds, "images": round(seen), **ours},
            "torchvision": {"seconds": used, "images": images, **figures(result, coco)}}
    theirs = rows["torchvision"]["map_area"]
    ratio = ours["map_area"] / theirs if theirs else float("nan")
    if args.json:
        about = {"environment": ssd.environment(device), "flags": args.flags, "data": str(args.data)}
        ssd.write_json(args.json, {**about, "rows": rows, "map_ratio": ratio})
    print(f"{table(rows)}\nmAP ratio: {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
