"""Matching, then the loss forward and backward, of one batch; against torchvision's SSD.

Both get the ground truth of the same pictures and random outputs for their own anchors: 9,966 here, 8,732 there. The
outputs are those of a network that calls most anchors background. `match` is the part that finds each anchor's label
and box targets (torchvision: its matcher alone, whose targets are made in the loss).

    python benchmarks/losses.py
    python benchmarks/losses.py --data data/VOCdevkit/VOC2007 --json losses.json
"""

import functools
import sys

import common
import torch
from common import ssd
from torchvision.ops import box_iou


def peer_match(model, targets, anchors):
    """Match as torchvision's SSD.forward does in training."""
    matched = []
    for boxes in (t["boxes"] for t in targets):
        if boxes.numel() == 0:
            matched.append(torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device))
        else:
            matched.append(model.proposal_matcher(box_iou(boxes, anchors)))
    return matched


def peer_loss(model, targets, anchors, outputs):
    """Match, lose, go backward."""
    matched = peer_match(model, targets, anchors)
    head = dict(zip(("cls_logits", "bbox_regression"), outputs, strict=True))
    sum(model.compute_loss(targets, head, [anchors] * len(targets), matched).values()).backward()
    for tensor in outputs:
        tensor.grad = None


def own_loss(batch, anchors, outputs, loss):
    """Match, lose, go backward."""
    targets = ssd.build_targets(batch["gt_boxes"], batch["gt_labels"], anchors)
    ssd.detection_loss(outputs, targets, loss=loss)["loss"].backward()
    for tensor in outputs:
        tensor.grad = None


def random_outputs(batch_size, num_anchors, num_classes, device):
    """Return class logits and box deltas that want gradients; about one anchor in a hundred looks like an object."""
    cls_logits = torch.randn(batch_size, num_anchors, num_classes + 1)
    cls_logits[..., 0] += 5
    outputs = cls_logits, torch.randn(batch_size, num_anchors, 4)
    return tuple(t.to(device).requires_grad_() for t in outputs)


def main(argv=None):
    """Measure by the flags; returns what --json holds."""
    parser = common.make_parser(__doc__, rounds=9)
    parser.add_argument("--batch-size", type=ssd.positive_int, default=32, help="pictures a call")
    args = parser.parse_args(argv)
    device, data, size = common.begin(args), common.load_data(args), args.batch_size
    batch, model = common.make_batch(data.train, device, batch_size=size), common.peer_model(len(data.classes), device)
    targets = common.peer_targets(batch)
    maps = [torch.zeros(size, 1, n, n, device=device) for n in (38, 19, 10, 5, 3, 1)]
    images = common.torchvision.models.detection.image_list.ImageList(
        torch.zeros(size, 3, 300, 300, device=device), [(300, 300)] * size)
    peer_anchors, anchors = model.anchor_generator(images, maps)[0], ssd.make_anchors().to(device)
    make = functools.partial(random_outputs, size, num_classes=len(data.classes), device=device)
    peer_outputs, outputs = make(len(peer_anchors)), make(len(anchors))
    cases = {
        "torchvision match": lambda: peer_match(model, targets, peer_anchors),
        "match": lambda: ssd.build_targets(batch["gt_boxes"], batch["gt_labels"], anchors),
        "torchvision match + loss": lambda: peer_loss(model, targets, peer_anchors, peer_outputs),
        "match + multibox loss": lambda: own_loss(batch, anchors, outputs, "multibox"),
        "match + focal loss": lambda: own_loss(batch, anchors, outputs, "focal"),
    }
    peer = {name: f"torchvision match{' + loss' if 'loss' in name else ''}" for name in cases}
    rows = common.rows_of(common.time_in_turns(cases, args.rounds, device), peer, images=size)
    objects = int((batch["gt_labels"] > 0).sum())
    return common.report(f"Matching and loss, forward and backward: batch {size}, {objects} objects, "
                         f"{len(data.classes)} classes", rows, args, batch_size=size, objects=objects)


if __name__ == "__main__":
    main()
    sys.exit(0)
