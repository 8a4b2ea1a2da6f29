"""The real training loop, files to weights: pictures a second, share of the time that waits for data, memory.

This project runs `train_one_epoch` as a training run does: augmentation, matching, loss, clipping, averaged weights.
The peer is a plain loop around torchvision's ssd300_vgg16 and its reference SSD preset with the same number of workers.
Both have full width and random weights. Utilisation (CUDA only) is the arithmetic of the network, three forward passes
a picture as torch counts them, against the measured speed of a large matrix product in the same precision.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --device cuda --images 2500 --batch-size 32 --workers 16 --cache ram --compile
"""

import statistics
import sys
import time
from pathlib import Path

import common
import torch
from augmentation import PeerDataset
from common import ssd
from training_step import sgd


def own_run(args, records, num_classes, device, amp_dtype):
    """Return a function that trains one more epoch and returns the row that a run logs."""
    size = min(args.batch_size, len(records))
    flags = ["--data", args.data, "--epochs", "1000", "--width", str(args.width), "--batch-size", str(size),
             "--no-pretrained", "--no-batch-norm", "--optimizer", "sgd", "--lr", "1e-4", "--device", str(device),
             "--amp", "auto" if amp_dtype else "off"]
    state, recipe, _ = ssd.build_state(ssd.parse_args(flags), num_classes, device)
    state.network = ssd.make_network(state, compiled=args.compile, amp_dtype=amp_dtype, batch_size=size)
    state.ideal_s = ssd.ideal_seconds(state.model, amp_dtype) if device.type == "cuda" else 0.0
    dataset = ssd.VocDataset(records, ssd.build_transform(train=True),
                             cache=ssd.open_cache(records, args.cache, args.data_root))
    loader = ssd.make_loader(dataset, workers=args.workers, pin_memory=device.type == "cuda",
                             sampler=ssd.EpochBatchSampler(len(records), size))
    criterion = ssd.make_criterion(state.model.anchors, recipe)

    skips = ssd.SkipLog(records, Path(args.data_root) / "nonfinite.json", 25)

    def epoch():
        row = ssd.train_one_epoch(state, loader, criterion, recipe, skips=skips, amp_dtype=amp_dtype)
        state.epoch, state.totals = state.epoch + 1, {}
        return row
    return epoch


def peer_run(args, records, num_classes, device, amp_dtype):
    """Return a function that trains torchvision's SSD one more epoch and returns its row."""
    model, size = common.peer_model(num_classes, device).train(), min(args.batch_size, len(records))
    optimizer = sgd(model)
    loader = torch.utils.data.DataLoader(
        PeerDataset(records, "PIL"), batch_size=size, shuffle=True, drop_last=True, num_workers=args.workers,
        pin_memory=device.type == "cuda", persistent_workers=args.workers > 0,
        multiprocessing_context="fork" if args.workers else None,
        collate_fn=lambda samples: tuple(zip(*samples, strict=True)))

    def epoch():
        images, waited, start, batches = 0, 0.0, time.perf_counter(), iter(loader)
        for _ in range(len(loader)):
            before = time.perf_counter()
            pictures, targets = next(batches)
            pictures = [p.to(device, torch.float32, non_blocking=True).div_(255) for p in pictures]
            targets = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]
            waited += time.perf_counter() - before
            with ssd.autocast(device, amp_dtype):
                loss = sum(model(pictures, targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            images += len(pictures)
        loss.item()
        seconds = time.perf_counter() - start
        return {"images_per_s": images / seconds, "data_wait": waited / seconds}
    return epoch


def main(argv=None):
    """Measure by the flags; returns what --json holds."""
    parser = common.make_parser(__doc__, rounds=3)
    parser.add_argument("--images", type=ssd.positive_int, default=8, help="pictures an epoch, at most")
    parser.add_argument("--batch-size", type=ssd.positive_int, default=4, help="pictures a step")
    parser.add_argument("--workers", type=ssd.natural_int, default=0, help="loader processes")
    parser.add_argument("--width", type=ssd.positive_float, default=1.0, help="of this project's network")
    parser.add_argument("--cache", choices=("off", "ram", "disk"), default="off", help="of this project's loader")
    parser.add_argument("--compile", action="store_true", help="compile this project's network")
    parser.add_argument("--no-peer", action="store_true", help="leave torchvision out")
    args = parser.parse_args(argv)
    device, data = common.begin(args), common.load_data(args)
    records, dtype = ssd.spread(data.train, args.images), ssd.pick_amp_dtype(device)
    runs = {} if args.no_peer else {"torchvision": peer_run(args, records, len(data.classes), device, dtype)}
    runs["SSD300"] = own_run(args, records, len(data.classes), device, dtype)
    found = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, epoch in runs.items():
            row = epoch()
            if number:  # the first epoch starts processes, fills the cache, chooses kernels
                found[name].append(row)
    rows, columns = [], ("images_per_s", "data_wait", "memory_gb", "utilisation")
    for name, epochs in found.items():
        row = {c: statistics.median(e[c] for e in epochs) for c in columns if c in epochs[0]}
        rows.append({"case": name, **row})
        if "torchvision" in found:
            rows[-1]["times_peer"] = row["images_per_s"] / rows[0]["images_per_s"]
    return common.report(f"Training end to end: {len(records)} pictures an epoch, batch {args.batch_size}, "
                         f"{args.workers} workers, cache {args.cache}, "
                         f"{str(dtype or torch.float32).removeprefix('torch.')}", rows, args,
                         batch_size=args.batch_size, workers=args.workers, width=args.width)


if __name__ == "__main__":
    main()
    sys.exit(0)
