"""Draw the `shapes` data set: textured, cluttered pictures of circles, crosses, rings, stars and triangles.

    python -m ssd_tools.shapes data/shapes

writes 400 training, 40 validation and 150 test pictures in Pascal VOC's layout, the same ones every time,
in half a minute. `python ssd_object_detection.py --data shapes` does this by itself where they are missing.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

CLASSES = ("circle", "cross", "ring", "star", "triangle")
SPLITS = {"train": 400, "val": 40, "test": 150}
STAMP = {"version": 1, "seed": 2007, "splits": SPLITS, "classes": list(CLASSES)}  # what shapes.json holds


def _shape_outline(name, rng):
    """Return a shape in the unit circle, turned by up to 20 degrees: polygons (N, 2); a second is a hole."""
    turn = math.radians(rng.uniform(-20, 20))

    def polygon(radii, angles):
        return np.stack((np.cos(turn + angles), np.sin(turn + angles)), axis=1) * np.reshape(radii, (-1, 1))

    circle, up = np.arange(48) * math.pi / 24, -math.pi / 2
    if name == "cross":
        arm = rng.uniform(0.17, 0.22)
        reach, angle, corner = math.hypot(arm, 1), math.atan(arm), arm * math.sqrt(2)
        quarter = np.array([-angle, angle, math.pi / 4])
        return [polygon([reach, reach, corner] * 4, np.concatenate([quarter - up * k for k in range(4)]))]
    if name == "star":
        return [polygon([1.0, rng.uniform(0.48, 0.54)] * 5, up + np.arange(10) * math.pi / 5)]
    if name == "triangle":
        return [polygon(1.0, up + np.arange(3) * math.pi / 1.5)]
    return [polygon(1.0, circle)] + ([polygon(rng.uniform(0.62, 0.74), circle)] if name == "ring" else [])


def _texture(rng, height, width, contrast):
    """Return a float32 (H, W, 3) texture around a random colour: noise of three scales, maybe stripes."""
    out = np.tile(rng.uniform(30, 225, 3).astype(np.float32), (height, width, 1))
    for cells in (3, 9, 40):
        noise = rng.normal(0, contrast / 2, (cells, cells, 3)).astype(np.float32)
        out += cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.4:
        angle, period = rng.uniform(0, math.pi), rng.uniform(6, 40)
        x, y = (np.arange(n, dtype=np.float32) * 2 * math.pi / period for n in (width, height))
        wave = np.sin(x * math.cos(angle) + y[:, None] * math.sin(angle))
        out += (contrast * 0.6 * wave)[..., None] * rng.uniform(-1, 1, 3).astype(np.float32)
    return out


def _paint(image, mask, rng):
    """Lay a texture that stands out over a float32 image, in place; mask is uint8 coverage."""
    x, y, width, height = cv2.boundingRect(mask)
    part, cover = image[y : y + height, x : x + width], mask[y : y + height, x : x + width]
    fill, behind = _texture(rng, height, width, contrast=10), part[cover > 127].mean(axis=0)
    if (
        np.abs(fill[cover > 127].mean(axis=0) - behind).max() < 60
    ):  # what nobody could see would teach nothing
        fill += np.where(behind > 127, -80, 80).astype(np.float32)
    part += (fill - part) * (cover[..., None] / np.float32(255))


def draw_image(rng):
    """Draw one picture; returns the image, uint8 (H, W, 3), and its objects (name, [xmin, ymin, xmax, ymax]).

    Zero to six objects of 20 pixels to four fifths of the shorter side. A box bounds the visible part of its
    object, 1-based and inclusive as VOC writes it; at least 85% of every object stays visible.
    """
    height, width = (int(v) for v in rng.integers(280, 401, 2))
    image = _texture(rng, height, width, contrast=14)
    for _ in range(rng.integers(3, 11)):  # clutter: strokes that belong to no class
        points = np.cumsum(rng.normal(0, 28, (rng.integers(2, 6), 2)), axis=0) + rng.uniform(
            0, [width, height]
        )
        color, thickness = rng.uniform(0, 255, 3).tolist(), int(rng.integers(1, 3))
        cv2.polylines(image, [points.astype(np.int32)], False, color, thickness, cv2.LINE_AA)
    placed, count = (
        [],
        0 if rng.random() < 0.08 else int(rng.integers(2, 7)),
    )  # placed: (name, visible mask, area)
    for _ in range(4 * count):
        if len(placed) == count:
            break
        name = CLASSES[rng.integers(len(CLASSES))]
        size = 20 * (0.8 * min(height, width) / 20) ** rng.uniform() ** 0.33
        outline = _shape_outline(name, rng)
        low, extent = outline[0].min(axis=0), np.ptp(outline[0], axis=0)
        corner = rng.uniform(0, np.maximum([width, height] - extent * size / extent.max(), 1))
        mask = np.zeros((height, width), np.uint8)
        polygons = [
            np.round(((p - low) * size / extent.max() + corner) * 16).astype(np.int32) for p in outline
        ]
        cv2.fillPoly(mask, polygons, 255, cv2.LINE_AA, 4)
        solid = mask > 127
        if any(np.count_nonzero(visible & ~solid) < 0.85 * area for _, visible, area in placed):
            continue  # it would hide too much of another
        _paint(image, mask, rng)
        placed = [(n, visible & ~solid, area) for n, visible, area in placed] + [
            (name, solid, np.count_nonzero(solid))
        ]
    objects = []
    for name, visible, _ in placed:
        ys, xs = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
        objects.append((name, [int(v) + 1 for v in (xs[0], ys[0], xs[-1], ys[-1])]))
    return np.clip(image + rng.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8), objects


def write_annotation(path, filename, shape, objects):
    """Write a VOC XML file; shape: (H, W, 3); objects: (name, [xmin, ymin, xmax, ymax]), 1-based inclusive.

    A third entry of an object, true: it is difficult.
    """
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = filename
    size = ElementTree.SubElement(root, "size")
    for tag, value in zip(("height", "width", "depth"), shape, strict=True):
        ElementTree.SubElement(size, tag).text = str(value)
    for name, box, *is_difficult in objects:
        node = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(node, "name").text = name
        ElementTree.SubElement(node, "difficult").text = str(int(any(is_difficult)))
        corners = ElementTree.SubElement(node, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ElementTree.SubElement(corners, tag).text = str(value)
    ElementTree.ElementTree(root).write(path, encoding="utf-8")


def generate(root):
    """Write the `shapes` data set in VOC layout below root, unless this version of it is there; returns root.

    Raises OSError if root is another folder or cannot be written. Made in a temporary folder and renamed, so
    that an interrupted run leaves nothing half-made.
    """
    root = Path(root)
    stamp = root / "shapes.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(stamp.read_text()) == STAMP:
            return root
    if root.exists() and not stamp.exists():
        raise FileExistsError(
            f"{root} is there but is not the shapes data set: move it, or draw into another folder"
        )
    making = root.with_name(f"{root.name}.{os.getpid()}.tmp")
    print(f"drawing the shapes data set into {root} ...", flush=True)
    try:
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (making / folder).mkdir(parents=True)
        for number, (split, count) in enumerate(SPLITS.items()):
            ids = [f"{split}_{i:04d}" for i in range(count)]
            for i, image_id in enumerate(ids):
                image, objects = draw_image(np.random.default_rng((STAMP["seed"], number, i)))
                Image.fromarray(image).save(making / "JPEGImages" / f"{image_id}.jpg", quality=90)
                write_annotation(
                    making / "Annotations" / f"{image_id}.xml", f"{image_id}.jpg", image.shape, objects
                )
            (making / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        (making / stamp.name).write_text(json.dumps(STAMP))
        shutil.rmtree(root, ignore_errors=True)
        making.rename(root)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return root


def main():
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", metavar="DIR", help="the folder to write")
    try:
        print(generate(parser.parse_args().root))
        return 0
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
