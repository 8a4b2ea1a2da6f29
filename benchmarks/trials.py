"""Train with one part of the module exchanged for an alternative that is still open.

    python benchmarks/trials.py --trial diou --data data/BCCD --recipe small    # any training command
    python benchmarks/recipes.py --only base DIoU ATSS                          # compare them

The validation loss of ATSS runs cannot be compared, since validation images are matched as ever; their mAP
can. docs/recipes.md has what was measured, also of the alternatives that lost and have no code any more.
"""

import functools
import sys

import common
import numpy as np
import torch
from common import ssd
from torchvision.ops import distance_box_iou_loss


def diou_detection_loss(outputs, targets, *, anchors_cxcywh, box_weight=5.0, num_positive=None, **settings):
    """Return `ssd.detection_loss` with the DIoU loss (Zheng et al. 2020) as box loss, times box_weight."""
    losses = ssd.detection_loss(outputs, targets, num_positive=num_positive, **settings)
    labels, box_targets = targets
    is_positive = labels > 0
    if num_positive is None:
        num_positive = is_positive.sum()
    anchors = anchors_cxcywh.to(labels.device).expand_as(box_targets)[is_positive]
    found = ssd.decode(outputs[1][is_positive], anchors)
    true = ssd.decode(box_targets[is_positive], anchors)
    total = box_weight * distance_box_iou_loss(found, true, reduction="sum")
    loss_box = total / num_positive.clamp(min=len(labels))
    return losses | {"loss_box": loss_box, "loss": losses["loss_cls"] + loss_box}


def atss_candidates(distance, nearest=9):
    """Return the anchors of the `nearest` cells of each map, by their distance (A,) from a point."""
    parts, start = [], 0
    for cells, sizes in zip(ssd.FEATURE_MAPS, ssd.ANCHOR_SIZES, strict=True):
        count = cells**2 * len(sizes)
        parts.append(start + distance[start : start + count].argsort(kind="stable")[: nearest * len(sizes)])
        start += count
    return np.concatenate(parts)


def atss_match(gt_boxes, anchors_xyxy, *, largest=np.inf):
    """Match as `ssd.match_anchors` does, but small objects by ATSS (Zhang et al. 2020, algorithm 1).

    gt_boxes (G, 4); anchors_xyxy (A, 4), as many a cell as the module's own. Small: the root of the area is
    at most `largest`. Of a small object's candidates those are positive whose centre lies in it and whose IoU
    is at least the mean plus the standard deviation of the candidates' IoUs; of another object all anchors
    from IoU .5. Every object still owns one anchor. Returns matched_gt (A,), -1 for background.
    """
    owner = ssd.match_anchors(gt_boxes, anchors_xyxy, match_iou_thresh=2.0)  # no IoU is that high
    if len(gt_boxes) == 0:
        return owner
    iou = ssd.box_iou(gt_boxes[:, None], anchors_xyxy)
    is_positive = iou >= 0.5
    centres = (anchors_xyxy[:, :2] + anchors_xyxy[:, 2:]) / 2
    size = np.sqrt((gt_boxes[:, 2:] - gt_boxes[:, :2]).prod(axis=1))
    for gt in np.flatnonzero(size <= largest):
        low, high = gt_boxes[gt, :2], gt_boxes[gt, 2:]
        candidates = atss_candidates(np.linalg.norm(centres - (low + high) / 2, axis=1))
        values = iou[gt, candidates]
        is_inside = ((centres > low) & (centres < high)).all(axis=1)
        is_positive[gt] = False
        is_positive[gt, candidates] = values >= values.mean() + values.std(ddof=1)
        is_positive[gt] &= is_inside
    best = np.where(is_positive, iou, -1.0).argmax(axis=0)
    matched_gt = np.where(is_positive.any(axis=0), best, -1)
    return np.where(owner >= 0, owner, matched_gt)


class AtssDataset(ssd.VocDataset):
    """A VocDataset whose samples are matched by `atss_match`."""

    largest = np.inf

    def __getitem__(self, key):
        sample = super().__getitem__(key)
        boxes = sample["gt_boxes"][sample["gt_labels"] > 0].numpy()
        matched_gt = atss_match(boxes, self.anchors_xyxy, largest=self.largest)
        return sample | {"matched_gt": torch.from_numpy(matched_gt.astype(np.int16))}


class SmallAtssDataset(AtssDataset):
    """ATSS for objects below a tenth of the image's side, which IoU .5 gives an anchor or none."""

    largest = 0.1


def diou_options(args):
    """Return what `ssd.run_training` takes for the DIoU loss."""
    settings = {"loss": args.loss, "alpha": args.focal_alpha, "gamma": args.focal_gamma}
    anchors = ssd.make_anchors(args.anchors or ssd.ANCHOR_SIZES)
    return {"loss": functools.partial(diou_detection_loss, anchors_cxcywh=anchors, **settings)}


TRIALS = {  # {name: a function of the flags that returns options of `ssd.run_training`}
    "diou": diou_options,
    "atss": lambda args: {"dataset_class": AtssDataset},
    "atss-small": lambda args: {"dataset_class": SmallAtssDataset},
}


def main(argv=None):
    """Train by the module's flags with a trial in place; returns the exit code."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--trial", choices=TRIALS, required=True, help="what to exchange")
    given, flags = parser.parse_known_args(argv)
    args = ssd.parse_args(flags)
    if args.evaluate or args.predict:
        parser.error("a trial changes training alone")
    with ssd.joined_processes(args.device) as args.device:
        return ssd.run_training(args, **TRIALS[given.trial](args))


if __name__ == "__main__":
    sys.exit(main())
