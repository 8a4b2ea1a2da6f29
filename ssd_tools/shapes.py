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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import cv2
import numpy as np
from PIL import Image

CLASSES = ("circle", "cross", "ring", "star", "triangle")
SPLITS = {"train": 400, "val": 40, "test": 150}
SEED = 2007
STAMP = {"version": 1, "seed": SEED, "splits": SPLITS, "classes": list(CLASSES)}  # what shapes.json holds

Shape = tuple[str, list[int]]  # class, [xmin, ymin, xmax, ymax] in VOC's pixels


def _shape_outline(name: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Return a shape in the unit circle, turned by up to 20 degrees: polygons (N, 2); a second is a hole."""
    turn = math.radians(rng.uniform(-20, 20))

    def polygon(radii: float | list[float], angles: np.ndarray) -> np.ndarray:
        return np.stack((np.cos(turn + angles), np.sin(turn + angles)), axis=1) * np.reshape(radii, (-1, 1))

    up = -math.pi / 2
    circle = np.arange(48) * math.pi / 24
    if name == "cross":
        arm = rng.uniform(0.17, 0.22)
        reach = math.hypot(arm, 1)
        corner = arm * math.sqrt(2)
        angle = math.atan(arm)
        quarter = np.array([-angle, angle, math.pi / 4])
        return [polygon([reach, reach, corner] * 4, np.concatenate([quarter - up * k for k in range(4)]))]
    if name == "star":
        return [polygon([1.0, rng.uniform(0.48, 0.54)] * 5, up + np.arange(10) * math.pi / 5)]
    if name == "triangle":
        return [polygon(1.0, up + np.arange(3) * math.pi / 1.5)]
    outline = [polygon(1.0, circle)]
    if name == "ring":
        outline.append(polygon(rng.uniform(0.62, 0.74), circle))
    return outline


def _texture(rng: np.random.Generator, height: int, width: int, contrast: float) -> np.ndarray:
    """Return a float32 (H, W, 3) texture around a random colour: noise of three scales, maybe stripes."""
    out = np.tile(rng.uniform(30, 225, 3).astype(np.float32), (height, width, 1))
    for cells in (3, 9, 40):
        noise = rng.normal(0, contrast / 2, (cells, cells, 3)).astype(np.float32)
        out += cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.4:
        angle = rng.uniform(0, math.pi)
        period = rng.uniform(6, 40)
        x = np.arange(width, dtype=np.float32) * 2 * math.pi / period
        y = np.arange(height, dtype=np.float32) * 2 * math.pi / period
        wave = np.sin(x * math.cos(angle) + y[:, None] * math.sin(angle))
        out += (contrast * 0.6 * wave)[..., None] * rng.uniform(-1, 1, 3).astype(np.float32)
    return out


def _paint(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Lay a texture that stands out over a float32 image, in place; mask is uint8 coverage."""
    x, y, width, height = cv2.boundingRect(mask)
    part = image[y : y + height, x : x + width]
    cover = mask[y : y + height, x : x + width]
    fill = _texture(rng, height, width, contrast=10)
    behind = part[cover > 127].mean(axis=0)
    contrast = np.abs(fill[cover > 127].mean(axis=0) - behind).max()
    if contrast < 60:  # what nobody could see would teach nothing
        fill += np.where(behind > 127, -80, 80).astype(np.float32)
    part += (fill - part) * (cover[..., None] / np.float32(255))


def _draw_clutter(image: np.ndarray, rng: np.random.Generator) -> None:
    """Draw strokes that belong to no class over a float32 image, in place."""
    height, width = image.shape[:2]
    for _ in range(rng.integers(3, 11)):
        steps = rng.normal(0, 28, (rng.integers(2, 6), 2))
        points = np.cumsum(steps, axis=0) + rng.uniform(0, [width, height])
        color = rng.uniform(0, 255, 3).tolist()
        thickness = int(rng.integers(1, 3))
        cv2.polylines(image, [points.astype(np.int32)], False, color, thickness, cv2.LINE_AA)


def _shape_mask(name: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return the uint8 coverage (H, W) of a shape of random size somewhere in a picture."""
    size = 20 * (0.8 * min(height, width) / 20) ** rng.uniform() ** 0.33
    outline = _shape_outline(name, rng)
    low = outline[0].min(axis=0)
    extent = np.ptp(outline[0], axis=0)
    corner = rng.uniform(0, np.maximum([width, height] - extent * size / extent.max(), 1))
    polygons = [np.round(((p - low) * size / extent.max() + corner) * 16).astype(np.int32) for p in outline]
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, polygons, 255, cv2.LINE_AA, 4)
    return mask


def _draw_shapes(image: np.ndarray, rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """Draw shapes over a float32 image, in place; returns (class, bool (H, W): what is visible) of each."""
    height, width = image.shape[:2]
    count = 0
    if rng.random() >= 0.08:
        count = int(rng.integers(2, 7))
    names: list[str] = []
    visible: list[np.ndarray] = []
    areas: list[int] = []
    for _ in range(4 * count):
        if len(names) == count:
            break
        name = CLASSES[rng.integers(len(CLASSES))]
        mask = _shape_mask(name, height, width, rng)
        solid = mask > 127
        left = [np.count_nonzero(one & ~solid) for one in visible]
        if any(now < 0.85 * area for now, area in zip(left, areas, strict=True)):
            continue  # it would hide too much of another
        _paint(image, mask, rng)
        visible = [one & ~solid for one in visible] + [solid]
        names.append(name)
        areas.append(int(np.count_nonzero(solid)))
    return list(zip(names, visible, strict=True))


def draw_image(rng: np.random.Generator) -> tuple[np.ndarray, list[Shape]]:
    """Draw one picture; returns the image, uint8 (H, W, 3), and its objects (name, [xmin, ymin, xmax, ymax]).

    Zero to six objects of 20 pixels to four fifths of the shorter side. A box bounds the visible part of its
    object, 1-based and inclusive as VOC writes it; at least 85% of every object stays visible.
    """
    height, width = rng.integers(280, 401, 2).tolist()
    image = _texture(rng, height, width, contrast=14)
    _draw_clutter(image, rng)
    objects = []
    for name, visible in _draw_shapes(image, rng):
        ys = np.flatnonzero(visible.any(axis=1)) + 1
        xs = np.flatnonzero(visible.any(axis=0)) + 1
        objects.append((name, [int(xs[0]), int(ys[0]), int(xs[-1]), int(ys[-1])]))
    noisy = image + rng.normal(0, 4, (height, width, 1))
    return np.clip(noisy, 0, 255).astype(np.uint8), objects


def write_annotation(
    path: str | Path, filename: str, shape: Sequence[int], objects: Iterable[tuple[Any, ...]]
) -> None:
    """Write a VOC XML file; shape: (H, W, 3); objects: (name, [xmin, ymin, xmax, ymax]), 1-based inclusive.

    A third entry of an object, true: it is difficult.
    """
    height, width, depth = shape
    parts = [
        f"<annotation><filename>{escape(filename)}</filename>",
        f"<size><height>{height}</height><width>{width}</width><depth>{depth}</depth></size>",
    ]
    for name, (xmin, ymin, xmax, ymax), *is_difficult in objects:
        parts += [
            f"<object><name>{escape(name)}</name><difficult>{int(any(is_difficult))}</difficult>",
            f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>",
            "</object>",
        ]
    text = f"{''.join(parts)}</annotation>"
    Path(path).write_text(text, encoding="utf-8", errors="xmlcharrefreplace")


def _write_split(root: Path, number: int, split: str, count: int) -> None:
    """Draw the pictures of a list, the first, second or third, into a folder in VOC layout."""
    ids = [f"{split}_{i:04d}" for i in range(count)]
    for i, image_id in enumerate(ids):
        image, objects = draw_image(np.random.default_rng((SEED, number, i)))
        Image.fromarray(image).save(root / "JPEGImages" / f"{image_id}.jpg", quality=90)
        annotation = root / "Annotations" / f"{image_id}.xml"
        write_annotation(annotation, f"{image_id}.jpg", image.shape, objects)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")


def generate(root: str | Path) -> Path:
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
            _write_split(making, number, split, count)
        (making / stamp.name).write_text(json.dumps(STAMP))
        shutil.rmtree(root, ignore_errors=True)
        making.rename(root)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", metavar="DIR", help="the folder to write")
    args = parser.parse_args(argv)
    try:
        print(generate(args.root))
        return 0
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
