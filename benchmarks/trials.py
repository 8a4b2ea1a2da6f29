"""Run the module with one part exchanged for an alternative, to see whether that one would earn a place in it.

    python benchmarks/trials.py --trial ciou --data data/BCCD --width .25 ...    # any command of the module
    python benchmarks/trials.py --trial soft-nms --evaluate checkpoints/ssd_bccd_final.pth
    python benchmarks/recipes.py --only base ciou atss ...                       # how they were compared

Here live the losses, matchings, augmentations and suppressions that were measured against the module's own; README,
"What the recipe was chosen by", has the table. Written for comparisons on a CPU, clarity before speed.
"""

import argparse
import contextlib
import functools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import albumentations as A
import torch
import torch.nn.functional as F
from torchvision import ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ssd_object_detection as ssd

# ---- Losses ----


def iou_box_loss(function):
    """Return a patch: the box loss is function(predicted, true boxes, xyxy) over positives, not smooth-L1."""
    def make_criterion(anchors, recipe, plain=ssd.make_criterion):
        rest = plain(anchors, recipe)

        def criterion(outputs, batch):
            labels, box_targets = ssd.build_targets(batch["gt_boxes"], batch["gt_labels"], anchors, recipe.match_iou)
            image, anchor = (labels > 0).nonzero(as_tuple=True)
            predicted = ssd.decode(outputs[1][image, anchor], anchors[anchor])
            true = ssd.decode(box_targets[image, anchor], anchors[anchor])
            divisor = max(len(labels), len(anchor))
            losses = rest(outputs, batch)
            loss_box = recipe.box_weight * function(predicted, true, reduction="sum") / divisor
            return {"loss": losses["loss_cls"] + loss_box, "loss_cls": losses["loss_cls"], "loss_box": loss_box}

        return criterion

    return {"make_criterion": make_criterion}


def per_image_loss():
    """Return a patch: losses are divided by the number of images, not of positives."""
    def make_criterion(anchors, recipe, plain=ssd.make_criterion):
        rest = plain(anchors, recipe)

        def criterion(outputs, batch):
            labels, _ = ssd.build_targets(batch["gt_boxes"], batch["gt_labels"], anchors, recipe.match_iou)
            factor = max(len(labels), int((labels > 0).sum())) / len(labels)
            return {name: value * factor for name, value in rest(outputs, batch).items()}

        return criterion

    return {"make_criterion": make_criterion}


class SigmoidHeads(ssd.SSD300):
    """The prior of Focal loss section 4.1 on each class's own sigmoid; background's logit says nothing."""

    def _initialise(self, prior_prob):
        super()._initialise(None)
        for head in self.cls_heads if prior_prob is not None else ():
            with torch.no_grad():
                head.bias.view(-1, self.num_classes + 1)[:, 1:] = -math.log((1 - prior_prob) / prior_prob)


class PriorHeads(ssd.SSD300):
    """The heads start from the focal loss's prior whatever the loss."""

    def _initialise(self, prior_prob):
        super()._initialise(ssd.FOCAL_PRIOR)


def sigmoid_focal_loss(cls_logits, labels, *, alpha=-1.0, gamma=ssd.FOCAL_GAMMA):
    """Return the focal loss of K sigmoids, summed over the classes (Focal loss Eq. 5); else as the module's."""
    truth = F.one_hot(labels, cls_logits.shape[-1])[..., 1:].float()
    return ops.sigmoid_focal_loss(cls_logits[..., 1:].float(), truth, alpha=alpha, gamma=gamma).sum(dim=-1)


def sigmoid_scores(cls_logits, dim=-1):
    """Return sigmoid scores where `detect` expects a softmax's: (..., K + 1), the first of them unused."""
    return cls_logits.sigmoid()


def plain_positives_loss(cls_logits, labels, *, alpha=-1.0, gamma=ssd.FOCAL_GAMMA, plain=ssd.focal_loss):
    """Return the focal loss with gamma 0 at positives (Ridnik et al. 2021, "Asymmetric loss"); else as the module's."""
    return torch.where(labels > 0, plain(cls_logits, labels, alpha=alpha, gamma=0.0),
                       plain(cls_logits, labels, alpha=alpha, gamma=gamma))


# ---- Anchors and matching ----


def clipped_anchors(anchor_sizes=ssd.ANCHOR_SIZES, plain=ssd.make_anchors):
    """Return the module's anchors, cxcywh (A, 4), cut at the picture's border, as in the authors' code."""
    return ops.box_convert(ops.box_convert(plain(anchor_sizes), "cxcywh", "xyxy").clamp(0, 1), "xyxy", "cxcywh")


def atss_match(gt_boxes, gt_labels, anchors_xyxy, match_iou_thresh=0.5, *, nearest=9):
    """Match as `match_anchors` does, but by ATSS (Zhang et al. 2020, algorithm 1): no threshold is given.

    Of each feature map the `nearest` cells' anchors are candidates; the threshold of an object is the mean plus the
    standard deviation of their IoUs; a positive's centre lies inside its object. Each object still owns one anchor.
    """
    centres = (anchors_xyxy[:, :2] + anchors_xyxy[:, 2:]) / 2
    matched_gt = gt_labels.new_full((len(gt_labels), len(anchors_xyxy)), -1, dtype=torch.int64)
    for row, boxes, labels in zip(matched_gt, gt_boxes, gt_labels, strict=True):
        gts = (labels > 0).nonzero()[:, 0]
        if len(gts) == 0:
            continue
        boxes = boxes[gts]
        iou = ops.box_iou(boxes, anchors_xyxy)
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        distance = torch.cdist(middle, centres)
        is_candidate, start = torch.zeros_like(iou, dtype=torch.bool), 0
        for cells, sizes in zip(ssd.FEATURE_MAPS, ssd.ANCHOR_SIZES, strict=True):
            count = cells**2 * len(sizes)
            wanted = min(count, nearest * len(sizes))
            chosen = start + distance[:, start : start + count].topk(wanted, dim=1, largest=False).indices
            is_candidate.scatter_(1, chosen, True)
            start += count
        thresholds = torch.stack([values[mask].mean() + values[mask].std()
                                  for values, mask in zip(iou, is_candidate, strict=True)])
        inside = ((centres > boxes[:, None, :2]) & (centres < boxes[:, None, 2:])).all(dim=-1)
        iou_of_positives = iou.masked_fill(~(is_candidate & inside & (iou >= thresholds[:, None])), -1.0)
        best, index = iou_of_positives.max(dim=0)
        row[best >= 0] = gts[index[best >= 0]]
        valid = torch.ones(1, len(gts), dtype=torch.bool)
        own = torch.full((1, len(anchors_xyxy)), -1)
        ssd._own_anchors(own, iou, valid, torch.zeros(len(gts), dtype=torch.int64), torch.arange(len(gts)))
        row[own[0] >= 0] = gts[own[0][own[0] >= 0]]
    return matched_gt


# ---- Augmentation ----


def add_step(step):
    """Return a patch: a step of the training pipeline before its resize."""
    def build_transform(*, train, plain=ssd.build_transform, **probabilities):
        pipeline = plain(train=train, **probabilities)
        if not train:
            return pipeline
        return A.Compose([step, *pipeline.transforms], bbox_params=pipeline.processors["bboxes"].params)

    return {"build_transform": build_transform}


class Mixed(ssd.VocDataset):
    """Half of the training samples (those with a flip in their pipeline) are made of several by `combine`."""

    def sample(self, index, epoch):
        """Return one augmented sample."""
        return super().__getitem__((index, epoch))

    def __getitem__(self, key):
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        rng = torch.Generator().manual_seed(((self.seed * 1000 + epoch) * 100_003 + index) % 2**63)
        if len(self.transform.transforms) == 1 or torch.rand((), generator=rng) < 0.5:
            return self.sample(index, epoch)
        others = torch.randint(len(self.records), (3,), generator=rng).tolist()
        return self.combine([self.sample(i, epoch) for i in (index, *others)], rng)


class Mosaic(Mixed):
    """Four pictures meet at a random point, each keeping its own quarter (Bochkovskiy et al. 2020, uncropped)."""

    @staticmethod
    def combine(samples, rng):
        x, y = (60 + 180 * torch.rand(2, generator=rng)).int().tolist()
        size, image = ssd.IMAGE_SIZE, torch.empty_like(samples[0]["image"])
        windows = ((0, 0, x, y), (x, 0, size, y), (0, y, x, size), (x, y, size, size))
        parts = {name: [] for name in ("boxes", "labels", "difficult")}
        for sample, (left, top, right, bottom) in zip(samples, windows, strict=True):
            image[:, top:bottom, left:right] = sample["image"][:, top:bottom, left:right]
            window = torch.tensor([left, top, right, bottom]) / size
            centre = (sample["boxes"][:, :2] + sample["boxes"][:, 2:]) / 2
            kept = ((centre > window[:2]) & (centre < window[2:])).all(dim=1)
            parts["boxes"].append(torch.cat((torch.maximum(sample["boxes"][kept, :2], window[:2]),
                                             torch.minimum(sample["boxes"][kept, 2:], window[2:])), dim=1))
            for name in ("labels", "difficult"):
                parts[name].append(sample[name][kept])
        return {"image": image, "index": samples[0]["index"], **{n: torch.cat(p) for n, p in parts.items()}}


class Mixup(Mixed):
    """Two pictures lie over one another, the objects of both count (Zhang et al. 2019, "Bag of freebies")."""

    @staticmethod
    def combine(samples, rng):
        share = 0.3 + 0.4 * torch.rand((), generator=rng)
        first, second = samples[:2]
        image = (share * first["image"] + (1 - share) * second["image"]).round().to(torch.uint8)
        both = {name: torch.cat((first[name], second[name])) for name in ("boxes", "labels", "difficult")}
        return {"image": image, "index": first["index"], **both}


class PlainEnd(ssd.VocDataset):
    """In the last epochs training samples are flipped and nothing else (Ge et al. 2021, "YOLOX", section 2.1)."""

    plain_from = math.inf
    plain = ssd.build_transform(train=True, zoom_out=0, crop=0, color=0, shadow=0, noise=0, blur=0)

    def __getitem__(self, key):
        if isinstance(key, tuple) and key[1] >= self.plain_from:
            self.transform = self.plain
        return super().__getitem__(key)


def plain_end(share=0.15):
    """Return a patch: the last `share` of the epochs, one at least, are a `PlainEnd`."""
    def make_loaders(args, data, *, plain=ssd.make_loaders, **options):
        loaders = plain(args, data, **options)
        loaders[0].dataset.plain_from = args.epochs - max(1, round(share * args.epochs))
        return loaders

    return {"VocDataset": PlainEnd, "make_loaders": make_loaders}


# ---- Detection ----


def candidates(cls_logits, box_deltas, anchors, score_thresh):
    """Yield each image's boxes (N, 4), labels (N,) and scores (N,) that `detect` hands to NMS, best first."""
    boxes = ssd.decode(box_deltas.float(), anchors).clamp(0, 1)
    for image_boxes, logits in zip(boxes, cls_logits, strict=True):
        scores, anchor = logits.float().softmax(dim=-1)[:, 1:].topk(ssd.PRE_NMS_TOP_K, dim=0)
        row, label = (scores >= score_thresh).nonzero(as_tuple=True)
        found, score = image_boxes[anchor[row, label]], scores[row, label]
        order = score.argsort(descending=True, stable=True)
        yield found[order], label[order] + 1, score[order]


def suppression(suppress):
    """Return a patch: suppress(boxes, scores, thresh) of one class returns what stays, as (boxes, scores)."""
    @torch.no_grad()
    def detect(cls_logits, box_deltas, anchors, *, score_thresh=ssd.SCORE_THRESH, nms_iou_thresh=ssd.NMS_IOU_THRESH,
               max_detections=ssd.MAX_DETECTIONS):
        results = []
        for boxes, labels, scores in candidates(cls_logits, box_deltas, anchors, score_thresh):
            parts = [(boxes[:0], labels[:0], scores[:0])]
            for label in labels.unique().tolist():
                mine = labels == label
                kept, score = suppress(boxes[mine], scores[mine], nms_iou_thresh)
                parts.append((kept, torch.full((len(kept),), label), score))
            found = [torch.cat(part) for part in zip(*parts, strict=True)]
            order = found[2].argsort(descending=True, stable=True)[:max_detections]
            results.append(tuple(part[order] for part in found))
        return results

    return {"detect": detect}


def soft_nms(boxes, scores, thresh, *, sigma=0.5, least=ssd.SCORE_THRESH):
    """Lower scores by exp(-IoU^2 / sigma) of each better box (Bodla et al. 2017, Eq. 3) instead of dropping boxes."""
    boxes, scores, kept = boxes, scores.clone(), []
    iou = ops.box_iou(boxes, boxes)
    for _ in range(min(len(scores), ssd.MAX_DETECTIONS)):
        best = scores.argmax()
        if scores[best] < least:
            break
        kept.append((best, scores[best].clone()))
        scores *= torch.exp(-iou[best] ** 2 / sigma)
        scores[best] = -1
    if not kept:
        return boxes[:0], scores[:0]
    return boxes[torch.stack([i for i, _ in kept])], torch.stack([s for _, s in kept])


def diou_nms(boxes, scores, thresh):
    """Drop a box whose IoU with a better one, less the distance of centres, is above thresh (Zheng et al. 2020)."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    corner = torch.minimum(boxes[:, None, :2], boxes[:, :2]), torch.maximum(boxes[:, None, 2:], boxes[:, 2:])
    diagonal = ((corner[1] - corner[0]) ** 2).sum(dim=-1).clamp(min=1e-12)
    measure = ops.box_iou(boxes, boxes) - ((centre[:, None] - centre) ** 2).sum(dim=-1) / diagonal
    left, kept = torch.arange(len(boxes)), []
    while len(left):
        kept.append(left[0])
        left = left[1:][measure[left[0], left[1:]] <= thresh]
    kept = torch.stack(kept) if kept else left
    return boxes[kept], scores[kept]


def voting_nms(boxes, scores, thresh, *, agree=0.7):
    """Move each box that NMS keeps to the mean of those that overlap it by `agree`, weighed by score and IoU."""
    kept = ops.nms(boxes, scores, thresh)
    iou = ops.box_iou(boxes[kept], boxes)
    weight = (iou >= agree) * scores * iou
    return weight @ boxes / weight.sum(dim=1, keepdim=True), scores[kept]


# What each trial puts in place of names of the module.
TRIALS = {
    "giou": iou_box_loss(ops.generalized_box_iou_loss),
    "diou": iou_box_loss(ops.distance_box_iou_loss),
    "ciou": iou_box_loss(ops.complete_box_iou_loss),
    "per-image": per_image_loss(),
    "sigmoid": {"focal_loss": sigmoid_focal_loss, "SSD300": SigmoidHeads,
                "F": SimpleNamespace(**{**vars(F), "softmax": sigmoid_scores})},
    "prior": {"SSD300": PriorHeads},
    "prior-.1": {"FOCAL_PRIOR": 0.1},
    "plain-positives": {"focal_loss": plain_positives_loss},
    "no-l2norm": {"L2Norm": lambda channels: torch.nn.Identity()},
    "clipped": {"make_anchors": clipped_anchors},
    "atss": {"match_anchors": atss_match},
    "turns": add_step(A.RandomRotate90(p=1.0)),
    "mosaic": {"VocDataset": Mosaic},
    "mixup": {"VocDataset": Mixup},
    "plain-end": plain_end(),
    "upside-down": add_step(A.VerticalFlip(p=0.5)),
    "soft-nms": suppression(soft_nms),
    "diou-nms": suppression(diou_nms),
    "voting": suppression(voting_nms),
    "flip": {"evaluate": functools.partial(ssd.evaluate, flip_average="horizontal")},
    "four-flips": {"evaluate": functools.partial(ssd.evaluate, flip_average="both")},
    "top-400": {"PRE_NMS_TOP_K": 400},
    **{f"nms-{t}": {"detect": functools.partial(ssd.detect, nms_iou_thresh=float(t))} for t in (".4", ".5", ".55")},
}


@contextlib.contextmanager
def applied(name):
    """Exchange the names of trial `name` in the module, and put them back; None: nothing."""
    before = {key: getattr(ssd, key) for key in TRIALS.get(name, {})}
    try:
        vars(ssd).update(TRIALS.get(name, {}))
        yield
    finally:
        vars(ssd).update(before)


def main(argv=None):
    """Run the module's command line with a trial in place; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", choices=TRIALS, required=True, help="what to exchange")
    args, rest = parser.parse_known_args(argv)
    with applied(args.trial):
        return ssd.main(rest)


if __name__ == "__main__":
    sys.exit(main())
