"""Matching, and the loss with its gradient, of one batch; against torchvision's SSD.

Both get the ground truth of the same images and random outputs for their own anchors, 9,966 here and 8,732
there: those of a network that calls most anchors background.

`match` finds each anchor's label and box targets, one image after the other, on one core: here a step of the
sample, done in a loader process. torchvision's matcher runs on the device in the training step and returns
indices; the targets are made in its loss. `loss` begins with what was matched and ends with the gradient.

    python benchmarks/losses.py
    python benchmarks/losses.py --data data/VOCdevkit/VOC2007 --json losses.json
"""

from collections.abc import Sequence

import common
import torch
from common import ssd
from torch import Tensor
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_convert, box_iou


def peer_match(model: SSD, targets: list[dict[str, Tensor]], anchors: Tensor) -> list[Tensor]:
    """Match as torchvision's SSD.forward does in training; returns a tensor of indices for each image."""
    matched = []
    for target in targets:
        if len(target["boxes"]):
            matched.append(model.proposal_matcher(box_iou(target["boxes"], anchors)))
        else:
            matched.append(torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device))
    return matched


def random_outputs(
    batch_size: int, num_anchors: int, num_classes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return logits and deltas that require gradients; about one anchor in a hundred looks like an object."""
    cls_logits = torch.randn(batch_size, num_anchors, num_classes + 1)
    cls_logits[..., 0] += 5
    box_deltas = torch.randn(batch_size, num_anchors, 4)
    return cls_logits.to(device).requires_grad_(), box_deltas.to(device).requires_grad_()


def make_cases(batch: dict, truth: common.Truth, num_classes: int) -> common.Cases:
    """Return {case: function} for a batch of `common.make_batch`."""
    device = batch["images"].device
    size = len(truth)
    peer = common.peer_model(num_classes, device)
    peer_anchors = common.peer_anchors(peer, device)
    peer_targets = common.peer_targets(truth, device)
    peer_matched = peer_match(peer, peer_targets, peer_anchors)
    peer_outputs = random_outputs(size, len(peer_anchors), num_classes, device)
    peer_head = dict(zip(("cls_logits", "bbox_regression"), peer_outputs, strict=True))
    anchors = ssd.make_anchors()
    outputs = random_outputs(size, len(anchors), num_classes, device)
    on_device = anchors.to(device)
    anchors_xyxy = box_convert(anchors, "cxcywh", "xyxy").numpy()

    def peer_loss() -> None:
        losses = peer.compute_loss(peer_targets, peer_head, [peer_anchors] * size, peer_matched)
        torch.autograd.grad(sum(losses.values()), peer_outputs)

    def own_loss(loss: str) -> None:
        targets = ssd.build_targets(batch, on_device)  # torchvision's loss encodes the boxes too
        torch.autograd.grad(ssd.detection_loss(outputs, targets, loss=loss)["loss"], outputs)

    return {
        "torchvision match": lambda: peer_match(peer, peer_targets, peer_anchors),
        "match": lambda: [ssd.match_anchors(boxes.numpy(), anchors_xyxy) for boxes, _ in truth],
        "torchvision loss": peer_loss,
        "multibox loss": lambda: own_loss("multibox"),
        "focal loss": lambda: own_loss("focal"),
    }


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure by the flags; returns what --json holds."""
    parser = common.make_speed_parser(__doc__, rounds=9)
    parser.add_argument("--batch-size", type=ssd.positive_int, default=32, help="images a call")
    args = parser.parse_args(argv)
    device, data = common.begin(args)
    batch, truth = common.make_batch(data.train, device, batch_size=args.batch_size)
    times = common.time_in_turns(make_cases(batch, truth, len(data.classes)), args.rounds, device)
    peer_of = {name: f"torchvision {name.split()[-1]}" for name in times}
    rows = common.rows_of(times, peer_of, images=args.batch_size)
    objects = sum(len(labels) for _, labels in truth)
    title = f"Matching and loss: batch {args.batch_size}, {objects} objects, {len(data.classes)} classes"
    return common.report(title, rows, args, device, batch_size=args.batch_size, objects=objects)


if __name__ == "__main__":
    main()
