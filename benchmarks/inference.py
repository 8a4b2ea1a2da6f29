"""Detection in images of 300x300, network with decode and NMS; against torchvision's ssd300_vgg16.

The cases `files` begin with image files (Detector.predict; for torchvision Pillow, to float and the model's
own resize), the others with images that are there. `decode + NMS` is that part alone.

Random weights; the networks' outputs are exchanged for made ones in which about as many candidates pass the
.01 threshold as a trained network leaves, since the cost of NMS depends on it. Both keep at most 1,000 a
class and 200 in all.

    python benchmarks/inference.py
    python benchmarks/inference.py --device cuda --json inference.json
"""

import functools

import common
import torch
from common import ssd
from torchvision.ops import box_convert
from torchvision.transforms import v2

SIZE = ssd.IMAGE_SIZE


def made_outputs(anchors_cxcywh, truth, num_classes, device):
    """Return logits and deltas in which anchors near the objects call them, and a few others something."""
    generator = torch.Generator().manual_seed(0)
    shape = len(truth), len(anchors_cxcywh)
    cls_logits = torch.randn(*shape, num_classes + 1, generator=generator)
    cls_logits[..., 0] += 7.5
    labels = torch.zeros(shape, dtype=torch.int64)
    anchors_xyxy = box_convert(anchors_cxcywh, "cxcywh", "xyxy").numpy()
    for row, (boxes, gt_labels) in zip(labels, truth, strict=True):
        matched_gt = ssd.match_anchors(boxes.numpy(), anchors_xyxy, match_iou_thresh=0.4)
        row[matched_gt >= 0] = gt_labels[matched_gt[matched_gt >= 0]]
    cls_logits.scatter_add_(2, labels[..., None], 7.0 * (labels > 0)[..., None])
    box_deltas = torch.randn(*shape, 4, generator=generator)
    return cls_logits.to(device), box_deltas.to(device)


class MadeDetector(ssd.Detector):
    """Runs the network and goes on with outputs that were made beforehand."""

    outputs = None

    def forward(self, images):
        self.model(images)
        return self.outputs


def peer_cases(images, paths, truth, num_classes):
    """Return {case: function} of torchvision."""
    device = images.device
    peer = common.peer_model(num_classes, device).eval()
    anchors = common.peer_anchors(peer, device)
    anchors_cxcywh = box_convert(anchors.cpu() / SIZE, "xyxy", "cxcywh")
    outputs = made_outputs(anchors_cxcywh, truth, num_classes, device)
    head = dict(zip(("cls_logits", "bbox_regression"), outputs, strict=True))
    peer.head.register_forward_hook(lambda module, inputs, output: head)
    pixels = [image.contiguous() for image in images.float().div(255)]

    def open_file(path):
        image = v2.functional.to_image(common.Image.open(path).convert("RGB"))
        return v2.functional.to_dtype(image, torch.float32, scale=True).to(device)

    @torch.inference_mode()
    def detect(dtype, from_files):
        with ssd.autocast(device, dtype):
            return peer([open_file(path) for path in paths] if from_files else pixels)

    @torch.inference_mode()
    def decode_and_nms():
        return peer.postprocess_detections(head, [anchors] * len(images), [(SIZE, SIZE)] * len(images))

    cases = {"torchvision decode + NMS": decode_and_nms}
    for name, dtype in common.precisions(device).items():
        cases[f"torchvision {name} files"] = functools.partial(detect, dtype, from_files=True)
        cases[f"torchvision {name}"] = functools.partial(detect, dtype, from_files=False)
    return cases


def own_cases(images, paths, truth, num_classes):
    """Return {case: function} of this project."""
    device = images.device
    model = ssd.SSD300(num_classes).to(device, memory_format=torch.channels_last).eval()
    outputs = made_outputs(model.anchors.cpu(), truth, num_classes, device)

    @torch.inference_mode()
    def detect(dtype):
        with ssd.autocast(device, dtype):
            model(images)
        return ssd.detect(*outputs, model.anchors)

    cases = {"SSD300 decode + NMS": lambda: ssd.detect(*outputs, model.anchors)}
    for name, dtype in common.precisions(device).items():
        detector = MadeDetector(model, [str(k) for k in range(num_classes)], dtype)
        detector.outputs = outputs
        settings = {"batch_size": len(images), "score_thresh": ssd.SCORE_THRESH}
        cases[f"SSD300 {name} files"] = functools.partial(detector.predict, paths, **settings)
        cases[f"SSD300 {name}"] = functools.partial(detect, dtype)
    return cases


def main(argv=None):
    """Measure by the flags; returns what --json holds."""
    parser = common.make_speed_parser(__doc__, rounds=5)
    sizes = {"type": ssd.positive_int, "nargs": "+", "default": [1, 8]}
    parser.add_argument("--batch-sizes", **sizes, help="images a call")
    args = parser.parse_args(argv)
    device, data = common.begin(args)
    rows = []
    for size in args.batch_sizes:
        batch, truth = common.make_batch(data.train, device, batch_size=size)
        paths = [data.train[i % len(data.train)].image_path for i in range(size)]
        inputs = batch["images"], paths, truth, len(data.classes)
        cases = peer_cases(*inputs) | own_cases(*inputs)
        peer_of = {name: name.replace("SSD300", "torchvision") for name in cases}
        times = common.time_in_turns(cases, args.rounds, device)
        for row in common.rows_of(times, peer_of, images=size):
            rows.append({**row, "case": f"{row['case']}, batch {size}"})
    return common.report("Detection, 300x300, full width", rows, args, device)


if __name__ == "__main__":
    main()
