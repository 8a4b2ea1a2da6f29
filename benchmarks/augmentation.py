"""The training pipeline on one core, file to 300x300; against torchvision's reference SSD preset of transforms v2.

Both sides read the same files in the same order and end with a uint8 picture of 300x300 and its boxes. The preset is
photometric distortion, zoom-out, IoU crop, flip; the resize that torchvision leaves to its model follows, its
conversion to float is left out (in its favour). `tensor` decodes to a tensor, `PIL` by PIL: the faster is the peer.
`same steps` is this project's pipeline without shadow, noise and blur, which the preset lacks.

    python benchmarks/augmentation.py
    python benchmarks/augmentation.py --data data/VOCdevkit/VOC2007 --json augmentation.json
"""

import itertools
import statistics
import sys

import common
import torch
import torchvision
from common import ssd
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2


class PeerDataset(torch.utils.data.Dataset):
    """Records as torchvision's reference training reads them; an item is (image (3, 300, 300) uint8, target)."""

    def __init__(self, records, backend):
        steps = [v2.RandomPhotometricDistort(),
                 v2.RandomZoomOut(fill={tv_tensors.Image: (123.0, 117.0, 104.0), Image.Image: (123, 117, 104)}),
                 v2.RandomIoUCrop(), v2.RandomHorizontalFlip(p=0.5), v2.Resize((ssd.IMAGE_SIZE, ssd.IMAGE_SIZE))]
        steps += [v2.ToImage()] if backend == "PIL" else []
        self.transform = v2.Compose([*steps, v2.SanitizeBoundingBoxes(), v2.ToPureTensor()])
        self.records, self.backend = records, backend

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        if self.backend == "PIL":
            image = Image.open(record.image_path).convert("RGB")
        else:
            image = tv_tensors.Image(torchvision.io.read_image(record.image_path, torchvision.io.ImageReadMode.RGB))
        size = (record.height, record.width)
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(record.boxes_px), format="XYXY", canvas_size=size)
        return self.transform(image, {"boxes": boxes, "labels": torch.from_numpy(record.labels)})


def make_cases(records):
    """Return {case: a function that prepares the next picture}."""
    alike = {"shadow": 0.0, "noise": 0.0, "blur": 0.0}
    datasets = {
        "torchvision tensor": PeerDataset(records, "tensor"),
        "torchvision PIL": PeerDataset(records, "PIL"),
        "decode, resize only": ssd.VocDataset(records, ssd.build_transform(train=False)),
        "same steps": ssd.VocDataset(records, ssd.build_transform(train=True, **alike)),
        "all steps": ssd.VocDataset(records, ssd.build_transform(train=True)),
    }

    def prepare(dataset, is_peer):
        numbers = itertools.count()

        def run():
            number = next(numbers)
            index, epoch = number % len(records), number // len(records)
            return dataset[index] if is_peer else dataset[index, epoch]
        return run

    return {name: prepare(dataset, name.startswith(common.PEER)) for name, dataset in datasets.items()}


def main(argv=None):
    """Measure by the flags; returns what --json holds."""
    parser = common.make_parser(__doc__, rounds=9)
    parser.set_defaults(threads=1, device="cpu")
    parser.add_argument("--images", type=ssd.positive_int, default=100, help="pictures a round")
    args = parser.parse_args(argv)
    device, records = common.begin(args), ssd.spread(common.load_data(args).train, args.images)
    cases = {}
    for name, run in make_cases(records).items():
        cases[name] = lambda run=run: [run() for _ in records]
    times = common.time_in_turns(cases, args.rounds, device, least=0)
    best_peer = min((n for n in times if n.startswith(common.PEER)), key=lambda n: statistics.median(times[n]))
    rows = common.rows_of(times, dict.fromkeys(times, best_peer), images=len(records))
    for row in rows:
        row["ms"] /= len(records)
    size = statistics.mean(r.width * r.height for r in records) / 1e6
    return common.report(f"Augmentation on {args.threads} core: {len(records)} pictures of {size:.2f} megapixels on "
                         "average; ms are for one", rows, args, images=len(records), megapixels=size)


if __name__ == "__main__":
    main()
    sys.exit(0)
