"""The training pipeline on one core, file to 300x300; against torchvision's reference preset for SSD.

Both read the same files in the same order and end with a uint8 image of 300x300 and its boxes. The preset
(transforms v2) is photometric distortion, zoom-out, IoU crop, flip; the resize that torchvision leaves to its
model follows, its conversion to float is left out (in its favour). `same steps` is this project's pipeline
without shadow, noise and blur, which the preset lacks. `sample` is what a loader process hands out: all
steps, and the matching of the boxes to anchors.

    python benchmarks/augmentation.py
    python benchmarks/augmentation.py --data data/VOCdevkit/VOC2007 --json augmentation.json
"""

from collections.abc import Callable, Sequence
from typing import Any

import common
from common import ssd


def make_cases(records: Sequence[ssd.Record]) -> common.Cases:
    """Return {case: a function that prepares all images once}, each time as in another epoch."""

    def dataset(**options: Any) -> ssd.VocDataset:
        return ssd.VocDataset(records, ssd.build_transform(**options), ssd.make_anchors())

    peer = common.PeerDataset(records)
    full = dataset(train=True)
    prepare: dict[str, Callable[[int, int], object]] = {
        "torchvision": lambda index, epoch: peer[index],
        "decode, resize only": dataset(train=False).augment,
        "same steps": dataset(train=True, shadow=0.0, noise=0.0, blur=0.0).augment,
        "all steps": full.augment,
        "sample": lambda index, epoch: full[index, epoch],
    }

    return common.run_epochs(prepare, len(records))


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure by the flags; returns what --json holds."""
    parser = common.make_speed_parser(__doc__, rounds=9)
    parser.set_defaults(threads=1, device="cpu")
    parser.add_argument("--images", type=ssd.positive_int, default=100, help="images a round")
    args = parser.parse_args(argv)
    device, data = common.begin(args)
    records = ssd.spread(data.train, args.images)
    times = common.time_in_turns(make_cases(records), args.rounds, device, least=0)
    rows = common.rows_of(times, dict.fromkeys(times, "torchvision"), images=len(records))
    for row in rows:
        row["ms"] /= len(records)
        row["p95_ms"] /= len(records)
    size = sum(r.width * r.height for r in records) / len(records) / 1e6
    title = f"Augmentation: {len(records)} images of {size:.2f} megapixels on average; ms are for one"
    return common.report(title, rows, args, device, images=len(records), megapixels=size)


if __name__ == "__main__":
    main()
