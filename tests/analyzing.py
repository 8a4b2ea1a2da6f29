"""Helpers of the tests of analyze and mistakes: detections, objects and records by hand."""

import numpy as np

import ssd_object_detection as ssd

A, B, C, FAR = [1, 1, 10, 10], [21, 21, 30, 30], [41, 41, 50, 50], [81, 81, 90, 90]


def arrays(detections, truth):
    """(image, label, score, box) and (image, label, box, difficult) as `ssd.evaluate_voc` takes them."""
    images, labels, scores, boxes_voc = list(zip(*detections, strict=True)) or [[]] * 4
    det = {
        "image_ids": np.array(images, int),
        "labels": np.array(labels, int),
        "scores": np.array(scores, float),
        "boxes_voc": np.array(boxes_voc, float).reshape(-1, 4),
    }
    images, labels, boxes_voc, difficult = list(zip(*truth, strict=True)) or [[]] * 4
    gt = {
        "image_ids": np.array(images, int),
        "labels": np.array(labels, int),
        "difficult": np.array(difficult, bool),
        "boxes_voc": np.array(boxes_voc, float).reshape(-1, 4),
    }
    return det, gt


def record(name, width, height, path=""):
    nothing = np.zeros((0, 4), np.float32)
    return ssd.Record(name, path, width, height, nothing, np.zeros(0, int), np.zeros(0, bool))
