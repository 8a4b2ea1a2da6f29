"""The real training loop, files to weights; against a loop around torchvision's ssd300_vgg16.

This project runs `train_one_epoch` as a training run does: augmentation, matching, loss, clipping, averaged
weights. The peer is a plain loop with torchvision's reference preset for SSD and as many workers. Both have
full width and random weights. A first epoch is not counted.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --device cuda --images 2500 --batch-size 32 --workers 16 --compile
"""

import argparse
import itertools
from collections.abc import Callable, Sequence

import common
import torch
from common import ssd


def own_epoch(
    args: argparse.Namespace,
    records: Sequence[ssd.Record],
    num_classes: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> Callable[[], None]:
    """Return a function that trains one more epoch."""
    options = {"batch_size": args.batch_size, "width": args.width, "compiled": args.compile}
    state, settings = common.make_state(num_classes, device, amp_dtype, **options)
    pixels = ssd.decode_all(records) if args.cache else None
    sizes = {"batch_size": args.batch_size, "workers": args.workers, "epochs": args.rounds + 1}
    loader = common.own_loader(records, device, **sizes, pixels=pixels)
    batches = itertools.chain.from_iterable([loader])  # its processes start with the first batch

    def epoch() -> None:
        ssd.train_one_epoch(state, loader, batches, ssd.detection_loss, settings, amp_dtype=amp_dtype)
        state.epoch += 1

    return epoch


def peer_epoch(
    args: argparse.Namespace,
    records: Sequence[ssd.Record],
    num_classes: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> Callable[[], None]:
    """Return a function that trains torchvision's SSD one more epoch."""
    model = common.peer_model(num_classes, device).train()
    optimizer = common.peer_optimizer(model)
    dataset = common.PeerDataset(records)
    loader = common.peer_loader(dataset, device, batch_size=args.batch_size, workers=args.workers)

    def epoch() -> None:
        for batch in loader:
            images, targets = common.peer_to_device(batch, device)
            common.peer_step(model, optimizer, images, targets, amp_dtype)

    return epoch


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure by the flags; returns what --json holds."""
    parser = common.make_speed_parser(__doc__, rounds=3)
    add = parser.add_argument
    add("--images", type=ssd.positive_int, default=8, help="images an epoch, at most")
    add("--batch-size", type=ssd.positive_int, default=4, help="images a step")
    add("--workers", type=ssd.natural_int, default=0, help="loader processes")
    add("--width", type=ssd.positive_float, default=1.0, help="of this project's network")
    add("--cache", action=argparse.BooleanOptionalAction, default=True, help="of this project's loader")
    add("--compile", action="store_true", help="compile this project's network")
    args = parser.parse_args(argv)
    device, data = common.begin(args)
    records = ssd.spread(data.train, args.images)
    dtype = ssd.pick_amp_dtype(device)
    inputs = args, records, len(data.classes), device, dtype
    cases: common.Cases = {"torchvision": peer_epoch(*inputs), "SSD300": own_epoch(*inputs)}
    times = common.time_one_by_one(cases, args.rounds, device)
    batch_size = min(args.batch_size, len(records))
    images = len(records) // batch_size * batch_size
    rows = common.rows_of(times, dict.fromkeys(cases, "torchvision"), images=images)
    cache = "on" if args.cache else "off"
    title = (
        f"Training: {images} images an epoch, batch {batch_size}, {args.workers} workers, "
        f"cache {cache}, {dtype or torch.float32}; ms are for an epoch"
    )
    return common.report(title, rows, args, device, batch_size=batch_size, workers=args.workers)


if __name__ == "__main__":
    main()
