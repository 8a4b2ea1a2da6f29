"""The loader alone: images a second, decoded, augmented, collated and copied to the device, by its processes.

The peer is torchvision's reference preset for SSD in a DataLoader of as many workers, its lists of images
copied one by one as its reference training does. This project's samples are matched to the anchors as well.
`files` reads the files in each epoch, `cache` keeps the decoded images. A first epoch is not counted.

    python benchmarks/loader.py --workers 0 1 2
    python benchmarks/loader.py --device cuda --workers 4 8 16 --images 1000 --json loader.json
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import common
import torch
from common import ssd


def next_epoch(
    batches: Iterator, steps: int, to_device: Callable, device: torch.device
) -> Callable[[], None]:
    """Return a function that takes so many more batches of an iterator to the device."""

    def run() -> None:
        for batch in itertools.islice(batches, steps):
            to_device(batch, device)

    return run


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure by the flags; returns what --json holds."""
    parser = common.make_speed_parser(__doc__, rounds=3)
    add = parser.add_argument
    add("--workers", type=ssd.natural_int, nargs="+", default=[0, 1, 2], help="loader processes")
    add("--images", type=ssd.positive_int, default=256, help="images an epoch, at most")
    add("--batch-size", type=ssd.positive_int, default=32, help="images a batch")
    args = parser.parse_args(argv)
    device, data = common.begin(args)
    records = ssd.spread(data.train, args.images)
    pixels = ssd.decode_all(records)
    size = min(args.batch_size, len(records))
    cases: common.Cases = {}
    for workers in args.workers:
        sizes = {"batch_size": size, "workers": workers}
        peer = common.peer_loader(common.PeerDataset(records), device, **sizes)
        steps = len(peer)
        endless = itertools.chain.from_iterable(itertools.repeat(peer))
        cases[f"torchvision, {workers} workers"] = next_epoch(endless, steps, common.peer_to_device, device)
        for name, decoded in (("files", None), ("cache", pixels)):
            own = common.own_loader(records, device, **sizes, epochs=args.rounds + 1, pixels=decoded)
            batches = itertools.chain.from_iterable([own])  # its processes start with the first batch
            cases[f"{name}, {workers} workers"] = next_epoch(batches, steps, ssd.to_device, device)
    times = common.time_one_by_one(cases, args.rounds, device)
    peer_of = {name: f"torchvision,{name.split(',')[1]}" for name in cases}
    rows = common.rows_of(times, peer_of, images=len(records) // size * size)
    title = f"Loader: {len(records)} images an epoch, batches of {size}; ms are for an epoch"
    return common.report(title, rows, args, device, batch_size=size)


if __name__ == "__main__":
    main()
