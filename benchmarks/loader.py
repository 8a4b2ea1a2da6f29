"""The loader alone: pictures a second, decoded, augmented, collated and copied to the device, by number of workers.

The peer is torchvision's reference SSD preset of transforms v2 in a DataLoader of the same workers, its lists of
pictures copied one by one as its reference training does. Cases of this project: files read each epoch, and images kept
decoded (`--cache ram`). The first epoch, which starts the processes and fills the cache, is not counted.

    python benchmarks/loader.py --workers 0 1 2
    python benchmarks/loader.py --device cuda --workers 4 8 16 --images 1000 --json loader.json
"""

import sys

import common
import torch
from augmentation import PeerDataset
from common import ssd


def own_epochs(records, workers, batch_size, device, cache):
    """Return a function that runs one more epoch of this project's loader."""
    dataset = ssd.VocDataset(records, ssd.build_transform(train=True), cache=cache)
    sampler = ssd.EpochBatchSampler(len(records), batch_size)
    loader = ssd.make_loader(dataset, workers=workers, pin_memory=device.type == "cuda", sampler=sampler)

    def epoch():
        sampler.epoch += 1
        for batch in loader:
            ssd.to_device(batch, device)
    return epoch


def peer_epochs(records, workers, batch_size, device):
    """Return a function that runs one more epoch of torchvision's."""
    loader = torch.utils.data.DataLoader(
        PeerDataset(records, "PIL"), batch_size=min(batch_size, len(records)), shuffle=True, drop_last=True,
        num_workers=workers, pin_memory=device.type == "cuda", persistent_workers=workers > 0,
        collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
        multiprocessing_context="fork" if workers else None)

    def epoch():
        for images, targets in loader:
            [image.to(device, torch.float32, non_blocking=True) for image in images]
            [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]
    return epoch


def main(argv=None):
    """Measure by the flags; returns what --json holds."""
    parser = common.make_parser(__doc__, rounds=3)
    parser.add_argument("--workers", type=ssd.natural_int, nargs="+", default=[0, 1, 2], help="loader processes")
    parser.add_argument("--images", type=ssd.positive_int, default=256, help="pictures an epoch, at most")
    parser.add_argument("--batch-size", type=ssd.positive_int, default=32, help="pictures a batch")
    args = parser.parse_args(argv)
    device, data = common.begin(args), common.load_data(args)
    records, cases, peer = ssd.spread(data.train, args.images), {}, {}
    for workers in args.workers:
        its_peer = f"torchvision, {workers} workers"
        cases[its_peer] = peer_epochs(records, workers, args.batch_size, device)
        for name, cache in (("files", None), ("cache", ssd.open_cache(records, "ram", args.data_root))):
            cases[f"{name}, {workers} workers"] = own_epochs(records, workers, args.batch_size, device, cache)
        peer |= {name: its_peer for name in cases if name.endswith(f", {workers} workers")}
    times = common.time_in_turns(cases, args.rounds, device, least=0)
    size = min(args.batch_size, len(records))
    rows = common.rows_of(times, peer, images=len(records) // size * size)
    return common.report(f"Loader: {len(records)} pictures an epoch, batches of {size} (ms are for an epoch)", rows,
                         args, batch_size=size)


if __name__ == "__main__":
    main()
    sys.exit(0)
