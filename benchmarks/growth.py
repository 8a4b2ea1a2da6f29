"""What grows with the number of classes: the network, a training step, detection, measuring and scoring.

Each cell is measured in a process of its own on one core of a CPU, its times as CPU time, so that other
programs change them little; a peak is the memory beyond that of a process with the network (Linux).

    python benchmarks/growth.py                             # width .125, 1 to 1,000 classes
    python benchmarks/growth.py --width 1 --classes 20 1000 --batch-size 4 --images 4 --rounds 1

`step`: forward, loss and its gradient, AdamW, of recipe voc without frozen blocks, on random images of seven
objects each. `last` is the checkpoint that a run goes on from, `final` that of the weights alone. `detect`
and `measure` take --images made-up pictures, in batches as --evaluate makes them, and a network of random
weights whose scores are replaced by what a trained one gives: 300 anchors an image that are sure of a class,
and noise; or, `untrained`, by equal scores, which are all above the threshold up to 98 classes. `measure` is
the whole of --evaluate, from files to AP, `detect` the part after the network. `score`: AP of 1,000,000
detections, as in evaluation.py.
"""

import functools
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import annotations
import common
import evaluation
import numpy as np
import torch
from common import ssd
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

OBJECTS = 7  # of an image
SURE_ANCHORS = 300  # of an image
SCORED_IMAGES = 5000  # 200 detections each
Row = dict[str, float]


def random_records(count: int, num_classes: int, image_path: str) -> list[ssd.Record]:
    """Return Records of one picture of 400x300 pixels, each with its own random objects."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        corner = rng.uniform(0, (250, 150), (OBJECTS, 2))
        boxes_px = np.hstack((corner, corner + rng.uniform(20, 150, (OBJECTS, 2)))).astype(np.float32)
        labels = rng.integers(1, num_classes + 1, OBJECTS)
        difficult = np.zeros(OBJECTS, dtype=np.bool_)
        records.append(ssd.Record(str(number), image_path, 400, 300, boxes_px, labels, difficult))
    return records


def random_batch(records: list[ssd.Record]) -> dict[str, Tensor]:
    """Return a batch as the loader gives it: random pixels, the records' objects matched to the anchors."""
    anchors_xyxy = box_convert(ssd.make_anchors(), "cxcywh", "xyxy").numpy()
    matched = np.stack([ssd.match_anchors(record.boxes, anchors_xyxy) for record in records])
    return {
        "images": torch.randint(256, (len(records), 3, 300, 300), dtype=torch.uint8),
        "matched_gt": torch.from_numpy(matched),
        "gt_boxes": torch.from_numpy(np.stack([record.boxes for record in records])),
        "gt_labels": torch.from_numpy(np.stack([record.labels for record in records])),
    }


def made_scores(num_classes: int, *, is_trained: bool) -> Tensor:
    """Return the scores of an image's anchors (A, K + 1) that the docstring above describes."""
    count = len(ssd.make_anchors())
    if not is_trained:
        return torch.zeros(count, num_classes + 1)
    scores = torch.randn(count, num_classes + 1)
    background = 6 + math.log(num_classes)
    scores[:, 0] += background
    anchors = torch.randperm(count)[:SURE_ANCHORS]
    scores[anchors, torch.randint(1, num_classes + 1, (SURE_ANCHORS,))] += background + 2
    return scores


def peak_mb(before: float) -> float:
    """Return the most memory that this process has had, in MB beyond `before`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before


def median_ms(function: Callable[[], object], rounds: int) -> float:
    """Return the median CPU time of calls in ms; one call more comes first and is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times[1:])


def measure_step(num_classes: int, width: float, batch_size: int, images: int, rounds: int) -> Row:
    """Return figures of the network, of its checkpoints and of a training step."""
    machine = ssd.prepare_device("cpu")
    state, settings = common.make_state(
        num_classes, machine.device, machine.amp_dtype, batch_size=batch_size, width=width
    )
    batch = random_batch(random_records(batch_size, num_classes, ""))
    loss = functools.partial(ssd.detection_loss, loss=settings.loss)
    step = functools.partial(
        ssd.train_step, state, batch, loss, lr=settings.lr, clip_grad=0, amp_dtype=machine.amp_dtype
    )
    before = annotations.memory_mb("Rss")
    step_ms = median_ms(step, rounds) / batch_size
    row: Row = {
        "parameters_m": sum(p.numel() for p in state.model.parameters()) / 1e6,
        "step_ms_an_image": step_ms,
        "step_peak_mb": peak_mb(before),
    }
    with tempfile.TemporaryDirectory() as folder:
        last = ssd.checkpoints_of(state, {})["last.pth"]
        final = {name: value for name, value in last.items() if name != "train_state"}
        for name, content in {"final": final, "last": last}.items():
            ssd.save_checkpoint(Path(folder, name), content)
            row[f"{name}_mb"] = Path(folder, name).stat().st_size / 1e6
    return row


def measure_detection(
    num_classes: int, width: float, batch_size: int, images: int, rounds: int, *, is_trained: bool
) -> Row:
    """Return figures of detecting and of measuring a list."""
    machine = ssd.prepare_device("cpu")
    torch.manual_seed(0)
    model = ssd.SSD300(num_classes, width=width).eval()
    scores = made_scores(num_classes, is_trained=is_trained)
    model.register_forward_hook(lambda _, images, outputs: (outputs[0].copy_(scores), outputs[1]))
    name = "measure" if is_trained else "untrained"
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(256, size=(300, 400, 3), dtype=np.uint8)
        path = Path(folder, "picture.jpg")
        Image.fromarray(pixels).save(path)
        records = random_records(images, num_classes, str(path))
        loader = ssd.plain_loader(records, model, batch_size=ssd.MEASURE_BATCH, workers=0)
        batch = next(iter(loader))["images"]
        before = annotations.memory_mb("Rss")
        start = time.process_time()
        result = ssd.measure(model, loader, amp_dtype=machine.amp_dtype)
        row = {
            f"{name}_ms_an_image": 1e3 * (time.process_time() - start) / images,
            f"{name}_peak_mb": peak_mb(before),
        }
    if is_trained:
        row["detections_an_image"] = len(result["detections"]["labels"]) / images
        with torch.no_grad():
            logits, deltas = model(batch)
        time_ms = median_ms(lambda: ssd.detect(logits, deltas, model.anchors), rounds)
        row["detect_ms_an_image"] = time_ms / len(logits)
    return row


def measure_scoring(num_classes: int, width: float, batch_size: int, images: int, rounds: int) -> Row:
    """Return the seconds that the AP of a million detections takes."""
    detections, truth = evaluation.make_arrays(SCORED_IMAGES, classes=num_classes)
    return {"score_s": median_ms(lambda: ssd.evaluate_voc(detections, truth, num_classes), rounds) / 1e3}


PARTS: tuple[Callable[..., Row], ...] = (
    measure_step,
    functools.partial(measure_detection, is_trained=True),
    functools.partial(measure_detection, is_trained=False),
    measure_scoring,
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure by the flags, print the table; returns what --json holds."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--classes", type=ssd.positive_int, nargs="+", default=[1, 20, 80, 365, 1000], help="their numbers")
    add("--width", type=ssd.positive_float, default=0.125, help="factor on every channel count")
    add("--batch-size", type=ssd.positive_int, default=8, help="of a step")
    add("--images", type=ssd.positive_int, default=64, help="pictures to measure on")
    add("--rounds", type=ssd.positive_int, default=3, help="calls that a median is taken of")
    add("--json", metavar="FILE", help="write the table's numbers there too")
    args = parser.parse_args(argv)
    rows = []
    for num_classes in args.classes:
        row: dict[str, Any] = {"classes": num_classes}
        settings = (num_classes, args.width, args.batch_size, args.images, args.rounds)
        for part in PARTS:  # one process each, for the peaks
            with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
                row |= pool.apply(part, settings)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    print(common.markdown(rows))
    result = {"rows": rows, **vars(args), "environment": ssd.environment("cpu")}
    if args.json:
        ssd.write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
