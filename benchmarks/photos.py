"""Training samples of the same pictures at several sizes, up to photos of 12 megapixels; one core.

A sample is what a loader process hands out: all steps, and the matching of boxes to anchors. `file` reads
the JPEG each time, `decoded` has the images in memory as --cache keeps them. The pictures are those of the
data, resized, with noise and JPEG quality 90. `open_image` reads a picture at its own size, `open_small` at
the size that training, evaluation and prediction use. `full file` and `full decoded` are samples of large
pictures that are not shrunk, as this project made them up to commit d10166a. Times are those of the CPU,
so that other programs change them little.

    python benchmarks/photos.py --data data/VOCdevkit/VOC2007
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import numpy as np
from common import ssd
from PIL import Image

SIZES = {
    "300": (400, 300),
    "VOC": (500, 375),
    "COCO": (640, 480),
    "1080": (1440, 1080),
    "photo": (4000, 3000),
}


class FullRecord(ssd.Record):
    """A Record that reads its picture at the picture's own size."""

    def read(self) -> np.ndarray:
        """Return the decoded image, RGB uint8 (H, W, 3)."""
        return np.asarray(ssd.open_image(self.image_path, (self.width, self.height)))


def resize_record(record: ssd.Record, size: tuple[int, int], folder: Path) -> ssd.Record:
    """Return a Record whose picture has another size (width, height), or that of a portrait."""
    width, height = size
    if record.height > record.width:
        width, height = height, width
    rng = np.random.default_rng(0)
    picture = ssd.open_image(record.image_path).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, dtype=np.int16) + rng.integers(-3, 4, (height, width, 1), dtype=np.int16)
    path = folder / f"{record.image_id.replace('/', '_')}.jpg"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    factor = np.array([width / record.width, height / record.height] * 2, dtype=np.float32)
    boxes_px = record.boxes_px * factor
    return dataclasses.replace(record, image_path=str(path), width=width, height=height, boxes_px=boxes_px)


def make_cases(records: list[ssd.Record], folder: Path) -> common.Cases:
    """Return {case: a function that does its work for all pictures once}."""
    work: dict[str, Callable[[int, int], object]] = {}

    def opener(read: Callable[[str], object], paths: list[str]) -> Callable[[int, int], object]:
        return lambda index, epoch: read(paths[index])

    def sampler(dataset: ssd.VocDataset) -> Callable[[int, int], object]:
        return lambda index, epoch: dataset[index, epoch]

    def add_samples(name: str, kind: str, resized: list[ssd.Record]) -> None:
        transform = ssd.build_transform(train=True)
        pixels = [record.read() for record in resized]
        from_file = ssd.VocDataset(resized, transform, ssd.make_anchors())
        decoded = ssd.VocDataset(resized, transform, ssd.make_anchors(), pixels=pixels)
        work[f"{name} {kind}file"] = sampler(from_file)
        work[f"{name} {kind}decoded"] = sampler(decoded)

    for name, size in SIZES.items():
        (folder / name).mkdir()
        resized = [resize_record(record, size, folder / name) for record in records]
        add_samples(name, "", resized)
        if min(size) > ssd.LARGE_SIDE:
            add_samples(name, "full ", [FullRecord(**vars(record)) for record in resized])
        paths = [record.image_path for record in resized]
        work[f"{name} open_image"] = opener(ssd.open_image, paths)
        work[f"{name} open_small"] = opener(ssd.open_small, paths)

    return common.run_epochs(work, len(records))


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure by the flags; returns what --json holds. The ratio is to the same work at VOC's size."""
    parser = common.make_speed_parser(__doc__, rounds=5)
    parser.set_defaults(threads=1, device="cpu")
    parser.add_argument("--images", type=ssd.positive_int, default=20, help="images a round")
    args = parser.parse_args(argv)
    device, data = common.begin(args)
    records = ssd.spread(data.train, args.images)
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(records, Path(folder))
        times = common.time_in_turns(cases, args.rounds, device, least=0, clock=time.process_time)
    peers = {name: f"VOC {name.split()[-1]}" for name in times}
    rows = common.rows_of(times, peers, images=len(records))
    for row in rows:
        row["ms"] /= len(records)
        row["p95_ms"] /= len(records)
    title = f"Pictures by size: {len(records)} images; ms are for one, times_peer is to VOC's size"
    return common.report(title, rows, args, device, images=len(records))


if __name__ == "__main__":
    main()
