"""Slow reference versions of the module's array operations, and a network that finds red boxes."""

import math

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_convert

import ssd_object_detection as ssd

ANCHORS = ssd.make_anchors()
ANCHORS_XYXY = box_convert(ANCHORS, "cxcywh", "xyxy").numpy()


def iou(a, b, extra=0.0):
    """IoU of two xyxy boxes; extra 1 counts corners as pixels of the box, as VOC does."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + extra
    height = min(a[3], b[3]) - max(a[1], b[1]) + extra
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    area_a = (a[2] - a[0] + extra) * (a[3] - a[1] + extra)
    area_b = (b[2] - b[0] + extra) * (b[3] - b[1] + extra)
    return shared / (area_a + area_b - shared)


def read_record(root, image_id, annotation, classes):
    """The Record of an image, object by object, and the places of its objects whose boxes are left out."""
    kept, dropped = ssd.keep_objects(annotation, classes)
    record = ssd.Record(
        image_id,
        ssd.locate_file(root, "JPEGImages", image_id),
        annotation.width,
        annotation.height,
        boxes_px=np.array([box_px for box_px, _ in kept], dtype=np.float32).reshape(-1, 4),
        labels=np.array([label for _, label in kept], dtype=np.int64),
        difficult=np.array([annotation.objects[i].difficult for i in kept.values()], dtype=np.bool_),
    )
    return record, ssd.name_dropped(root, image_id, annotation, dropped) if dropped else []


def match(gt_boxes, anchors, thresh):
    """Matched ground truth of each anchor for one image, -1 for background; more anchors than boxes."""
    rows = range(len(gt_boxes))
    overlap = [[iou(box, anchor) for anchor in anchors] for box in gt_boxes]
    matched = [-1] * len(anchors)
    for a in range(len(anchors)):
        for g in rows:
            if overlap[g][a] >= thresh and (matched[a] < 0 or overlap[g][a] > overlap[matched[a]][a]):
                matched[a] = g
    free = set(range(len(anchors)))
    for g in sorted(rows, key=lambda g: (-max(overlap[g]), g)):
        owned = min(free, key=lambda a: (-overlap[g][a], a))
        matched[owned] = g
        free.remove(owned)
    return matched


def mined(losses, labels, negatives_per_positive=3):
    """For one image, whether each anchor counts: every positive, and the hardest negatives."""
    positives = [a for a in range(len(labels)) if labels[a] > 0]
    negatives = sorted((a for a in range(len(labels)) if labels[a] == 0), key=lambda a: -losses[a])
    kept = set(positives) | set(negatives[: negatives_per_positive * max(1, len(positives))])
    return [a in kept for a in range(len(labels))]


def voc_class(detections, truth, label, iou_thresh=0.5):
    """Return (hits and misses in score order, number of ground truths that count) of one class.

    detections: (image_id, label, score, box) in the order given; truth: (image_id, label, box, difficult).
    """
    objects = [t for t in truth if t[1] == label]
    is_found = [False] * len(objects)
    outcomes = []
    of_class = [d for d in detections if d[1] == label]
    ranked = sorted(of_class, key=lambda d: -d[2])  # stable: ties stay as given
    for image_id, _, _, box in ranked:
        best, best_iou = None, -math.inf
        for row, (gt_image, _, gt_box, _) in enumerate(objects):
            overlap = iou(box, gt_box, extra=1.0)
            if gt_image == image_id and overlap > 0 and overlap > best_iou:
                best, best_iou = row, overlap
        if best is None or best_iou < iou_thresh:
            outcomes.append(False)
        elif not objects[best][3]:
            outcomes.append(not is_found[best])
            is_found[best] = True
    return outcomes, sum(not t[3] for t in objects)


def voc_ap(outcomes, num_gt):
    """Return (area, 11-point) average precision of hits and misses in score order."""
    if num_gt == 0:
        return math.nan, math.nan
    recall, precision, hits = [], [], 0
    for rank, is_hit in enumerate(outcomes, start=1):
        hits += is_hit
        recall.append(hits / num_gt)
        precision.append(hits / rank)
    eleven = 0.0
    for point in (0, 0.1, 0.2, 3 * 0.1, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1):  # MATLAB's 0:0.1:1, to the last bit
        eleven += max((p for r, p in zip(recall, precision, strict=True) if r >= point), default=0.0) / 11
    mrec, mpre = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    area = sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)) if mrec[i] != mrec[i - 1])
    return area, eleven


class Pointer(torch.nn.Module):
    """A network that finds one box of class 2, where the red channel is bright; in place of a trained one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("anchors", ssd.make_anchors())

    def forward(self, images):
        cls_logits = torch.zeros(len(images), len(self.anchors), 3)
        cls_logits[..., 0] = 20
        box_deltas = torch.zeros(len(images), len(self.anchors), 4)
        for i, image in enumerate(images):
            ys, xs = (image[0].float() - image[2].float() > 120).nonzero(as_tuple=True)
            if len(xs):
                box = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / ssd.IMAGE_SIZE
                cls_logits[i, 5000] = torch.tensor([0.0, 0.0, 12.0])
                box_deltas[i, 5000] = ssd.encode(box, self.anchors[5000])
        return cls_logits, box_deltas


def red_box(size, box):
    """Return a black picture (width, height) with a red rectangle of edges x1, y1, x2, y2."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2], 0] = 255
    return Image.fromarray(pixels)


def batch(boxes, labels):
    """The targets' part of a batch of images with boxes (G, 4), tensors, and labels (G,), sequences."""
    most = max([1, *map(len, boxes)])
    matched = [ssd.match_anchors(one.numpy(), ANCHORS_XYXY).astype(np.int16) for one in boxes]
    out = {
        "matched_gt": torch.from_numpy(np.stack(matched)),
        "gt_boxes": torch.zeros(len(boxes), most, 4),
        "gt_labels": torch.zeros(len(boxes), most, dtype=torch.int64),
    }
    for row, (one, named) in enumerate(zip(boxes, labels, strict=True)):
        out["gt_boxes"][row, : len(one)] = one
        out["gt_labels"][row, : len(one)] = torch.as_tensor(list(named), dtype=torch.int64)
    return out


def targets(boxes, labels):
    """labels (B, A) and box_targets (B, A, 4) of images, see `batch`."""
    return ssd.build_targets(batch(boxes, labels), ANCHORS)


def assert_same_predictions(found, expected):
    """Demand that two images' detections, as dicts of JSON, are the same but for the last rounded digits."""
    assert found["labels"] == expected["labels"]
    assert found["names"] == expected["names"]
    np.testing.assert_allclose(found["boxes_px"], expected["boxes_px"], atol=0.05)
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=5e-4)
