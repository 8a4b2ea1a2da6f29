"""Detection in pictures of 300x300, network with decode and NMS; against torchvision's ssd300_vgg16.

The cases "files" begin with picture files (Detector.predict; Pillow, to float and the model's own resize for
torchvision), the others with pictures that are there.

Random weights; the networks' outputs are exchanged for made ones in which about as many candidates pass the .01
threshold as a trained network leaves (`candidates`): the cost of NMS depends on it. `decode + NMS` is that part
alone. Both keep at most 1,000 a class and 200 in all.

    python benchmarks/inference.py
    python benchmarks/inference.py --device cuda --compile --json inference.json
"""

import functools
import sys

import common
import torch
from common import ssd
from PIL import Image
from torchvision.transforms import v2


def made_outputs(batch_size, anchors_xyxy, gt_boxes, gt_labels, num_classes):
    """Return class logits and box deltas in which anchors near the objects call them, and a few others something."""
    generator = torch.Generator().manual_seed(0)
    cls_logits = torch.randn(batch_size, len(anchors_xyxy), num_classes + 1, generator=generator)
    cls_logits[..., 0] += 7.5
    labels, _ = ssd.build_targets(gt_boxes.cpu(), gt_labels.cpu(), ssd.box_convert(anchors_xyxy, "xyxy", "cxcywh"), 0.4)
    cls_logits.scatter_add_(2, labels[..., None], 7.0 * (labels > 0)[..., None])
    return cls_logits, torch.randn(batch_size, len(anchors_xyxy), 4, generator=generator)


class MadeOutputs(torch.nn.Module):
    """Runs a network and returns outputs that were made beforehand."""

    def __init__(self, model, outputs):
        super().__init__()
        self.model, self.anchors, self.outputs = model, model.anchors, outputs

    def forward(self, images):
        self.model(images)
        return self.outputs


def open_for_peer(path, device):
    """Return a picture file as torchvision's detectors take it: float (3, H, W) in [0, 1]."""
    with Image.open(path) as image:
        picture = v2.functional.to_image(image.convert("RGB"))
    return v2.functional.to_dtype(picture, torch.float32, scale=True).to(device)


def make_cases(args, batch, paths, num_classes, size):
    """Return ({case: function}, candidates a picture) of one batch size; paths: that many picture files."""
    device, cases = batch["images"].device, {}
    peer = common.peer_model(num_classes, device).eval()
    model = ssd.SSD300(num_classes).to(device, memory_format=torch.channels_last).eval()
    part = {name: value[:size] for name, value in batch.items()}
    pictures = [image.contiguous() for image in part["images"].float().div(255)]
    maps = [torch.zeros(1, 1, n, n, device=device) for n in (38, 19, 10, 5, 3, 1)]
    pixels = peer.anchor_generator(common.torchvision.models.detection.image_list.ImageList(
        torch.zeros(1, 3, 300, 300, device=device), [(300, 300)]), maps)[0]
    make = functools.partial(made_outputs, size, gt_boxes=part["gt_boxes"], gt_labels=part["gt_labels"],
                             num_classes=num_classes)
    own = [t.to(device) for t in make(ssd.box_convert(model.anchors.cpu(), "cxcywh", "xyxy"))]
    theirs = dict(zip(("cls_logits", "bbox_regression"), (t.to(device) for t in make(pixels.cpu() / 300)), strict=True))
    peer.head.register_forward_hook(lambda module, inputs, output: theirs)

    def run_peer(dtype):
        with torch.inference_mode(), ssd.autocast(device, dtype):
            return peer(pictures)

    def run_own(dtype, network):
        with torch.inference_mode():
            with ssd.autocast(device, dtype):
                network(part["images"])
            return ssd.detect(*own, model.anchors)

    def run_peer_files(dtype):
        with torch.inference_mode(), ssd.autocast(device, dtype):
            return peer([open_for_peer(path, device) for path in paths])

    for name, dtype in common.precisions(device):
        detector = ssd.Detector(MadeOutputs(model, own), [str(k) for k in range(num_classes)], dtype)
        predict = functools.partial(detector.predict, paths, batch_size=size, score_thresh=ssd.SCORE_THRESH)
        cases |= {f"torchvision files {name}, batch {size}": functools.partial(run_peer_files, dtype),
                  f"SSD300 files {name}, batch {size}": predict}
        compiled = {" compiled": ssd.compile_model(model, part["images"], dtype)} if args.compile else {}
        networks = {"": model} | compiled
        cases[f"torchvision {name}, batch {size}"] = functools.partial(run_peer, dtype)
        for how, network in networks.items():
            cases[f"SSD300 {name}{how}, batch {size}"] = functools.partial(run_own, dtype, network)
    with torch.inference_mode():
        cases[f"torchvision decode + NMS, batch {size}"] = torch.inference_mode()(
            lambda: peer.postprocess_detections(theirs, [pixels] * size, [(300, 300)] * size))
        cases[f"SSD300 decode + NMS, batch {size}"] = lambda: ssd.detect(*own, model.anchors)
    counts = [int((t.softmax(-1)[..., 1:] > ssd.SCORE_THRESH).sum()) // size for t in (own[0], theirs["cls_logits"])]
    return cases, counts


def main(argv=None):
    """Measure by the flags; returns what --json holds."""
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--batch-sizes", type=ssd.positive_int, nargs="+", default=[1, 32], help="pictures a call")
    parser.add_argument("--compile", action="store_true", help="measure the compiled network too")
    args = parser.parse_args(argv)
    device, data = common.begin(args), common.load_data(args)
    batch, rows = common.make_batch(data.train, device, batch_size=max(args.batch_sizes)), []
    for size in args.batch_sizes:
        paths = [data.train[i % len(data.train)].image_path for i in range(size)]
        cases, (own, theirs) = make_cases(args, batch, paths, len(data.classes), size)
        peer = {name: name.replace("SSD300", common.PEER).replace(" compiled", "") for name in cases}
        times = common.time_in_turns(cases, args.rounds, device)
        counts = {name: {"candidates": float(theirs if name.startswith(common.PEER) else own)} for name in cases}
        rows += common.rows_of(times, peer, images=size, extra=counts)
    return common.report("Inference, 300x300, full width", rows, args)


if __name__ == "__main__":
    main()
    sys.exit(0)
