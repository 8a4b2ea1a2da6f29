"""What the benchmarks share: flags, timing in turns, the table, the JSON file, and torchvision's side.

The peer is torchvision's SSD300 (`ssd300_vgg16`, random weights) with its reference augmentation for SSD.
Both are measured in one process, in turns, so that a neighbour's load or a changing clock meets them alike;
where loader processes work ahead, one after the other.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.models.detection.ssd import SSD
from torchvision.transforms import v2

import ssd_object_detection as ssd

ROOT = Path(ssd.__file__).resolve().parent
Truth = list[tuple[Tensor, Tensor]]  # of each image boxes (G, 4) in [0, 1] and labels (G,)
Cases = dict[str, Callable[[], object]]  # what is to be timed, by its name in the table
Times = dict[str, list[float]]  # seconds a call


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the defaults, and a program's docstring as it stands."""


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser without flags; doc is the program's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)


def make_speed_parser(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the flags of every benchmark of speed."""
    parser = make_parser(doc)
    add = parser.add_argument
    add("--data", default="shapes", help="shapes (drawn if missing) or a folder in VOC layout")
    add("--data-root", default="data", help="where shapes is or will be")
    add("--train-split", default="train", help="list of the images to use")
    add("--rounds", type=ssd.positive_int, default=rounds, help="rounds that the median is taken of")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--threads", type=ssd.positive_int, default=torch.get_num_threads(), help="of torch on a CPU")
    add("--json", metavar="FILE", help="write the table's numbers there too")
    return parser


def begin(args: argparse.Namespace) -> tuple[torch.device, ssd.DataSplits]:
    """Set up torch and OpenCV as training does; returns (device, DataSplits with nothing held out)."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = ssd.prepare_device(args.device)
    data = ssd.load_data(args.data, data_root=args.data_root, train_split=args.train_split, val_fraction=0)
    ssd.print_findings(data.findings)
    return machine.device, data


def precisions(device: torch.device) -> dict[str, torch.dtype | None]:
    """Return {name: autocast dtype or None} of what the hardware computes: fp32, and bfloat16 or float16."""
    dtype = ssd.pick_amp_dtype(device)
    return {"fp32": None} if dtype is None else {"fp32": None, str(dtype).removeprefix("torch."): dtype}


def make_batch(records: Sequence[ssd.Record], device: torch.device, *, batch_size: int) -> tuple[dict, Truth]:
    """Return (batch on a device, [(boxes, labels)]): resized images, and their ground truth on the CPU.

    boxes (G, 4) float32 in [0, 1], labels (G,) int64. Records are repeated if there are too few.
    """
    dataset = ssd.VocDataset(records, ssd.build_transform(train=False), ssd.make_anchors())
    indices = [i % len(dataset) for i in range(batch_size)]
    batch = torch.utils.data.default_collate([dataset[i] for i in indices])
    truth = []
    for i in indices:
        _, boxes, labels = dataset.augment(i)
        truth.append((torch.from_numpy(boxes), torch.from_numpy(labels)))
    return ssd.to_device(batch, device), truth


def make_state(
    num_classes: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    *,
    batch_size: int,
    width: float = 1.0,
    compiled: bool = False,
) -> tuple[ssd.TrainState, ssd.Settings]:
    """Return (TrainState, Settings) of a run of this project with random weights, by recipe voc's AdamW."""
    flags = f"--recipe voc --no-pretrained --width {width} --batch-size {batch_size}"
    settings, _ = ssd.load_settings(flags.split())
    machine = ssd.Machine(device, amp_dtype, workers=0, compiled=compiled)
    state, _ = ssd.build_state(settings, machine, num_classes)
    return state, settings


def own_loader(
    records: Sequence[ssd.Record],
    device: torch.device,
    *,
    batch_size: int,
    workers: int,
    epochs: int,
    pixels: list[np.ndarray] | None = None,
) -> DataLoader:
    """Return this project's training loader of so many epochs; pixels: of `ssd.decode_all`."""
    dataset = ssd.VocDataset(records, ssd.build_transform(train=True), ssd.make_anchors(), pixels=pixels)
    sampler = ssd.EpochBatchSampler(len(records), batch_size, epochs=range(epochs))
    return ssd.make_loader(dataset, workers=workers, pin_memory=device.type == "cuda", batch_sampler=sampler)


def peer_model(num_classes: int, device: torch.device) -> SSD:
    """Return torchvision's SSD300 with random weights; its class count includes the background."""
    return torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=num_classes + 1, topk_candidates=ssd.PRE_NMS_TOP_K
    ).to(device)


def peer_anchors(model: SSD, device: torch.device) -> Tensor:
    """Return the 8,732 anchors of torchvision's SSD300, xyxy in pixels."""
    size = ssd.IMAGE_SIZE
    maps = [torch.zeros(1, 1, cells, cells, device=device) for cells in (38, 19, 10, 5, 3, 1)]
    images = torch.zeros(1, 3, size, size, device=device)
    listed = torchvision.models.detection.image_list.ImageList(images, [(size, size)])
    return model.anchor_generator(listed, maps)[0]


def peer_targets(truth: Truth, device: torch.device) -> list[dict[str, Tensor]]:
    """Return the ground truth of `make_batch` as torchvision takes it: boxes in pixels, labels."""
    size = ssd.IMAGE_SIZE
    return [{"boxes": boxes.to(device) * size, "labels": labels.to(device)} for boxes, labels in truth]


class PeerDataset(torch.utils.data.Dataset):
    """Records as torchvision's reference training reads them: uint8 image (3, 300, 300), {"boxes", "labels"}.

    train: with the reference augmentation for SSD of transforms v2: photometric distortion, zoom-out, IoU
    crop, flip. Its transforms are faster on PIL images than on tensors, so images are decoded by PIL.
    """

    def __init__(self, records: Sequence[ssd.Record], *, train: bool = True) -> None:
        self.records = records
        steps = []
        if train:
            steps += [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=(123, 117, 104))]
            steps += [v2.RandomIoUCrop(), v2.RandomHorizontalFlip(p=0.5)]
        steps += [v2.Resize((ssd.IMAGE_SIZE, ssd.IMAGE_SIZE))]
        self.transform = v2.Compose([*steps, v2.ToImage(), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.records[index]
        image = Image.open(record.image_path).convert("RGB")
        size = (record.height, record.width)
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(record.boxes_px), format="XYXY", canvas_size=size)
        return self.transform(image, {"boxes": boxes, "labels": torch.from_numpy(record.labels)})


def peer_loader(dataset: PeerDataset, device: torch.device, *, batch_size: int, workers: int) -> DataLoader:
    """Return a shuffled DataLoader of lists of images and targets, without a smaller last batch."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=min(batch_size, len(dataset)),
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
        collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
    )


def peer_to_device(batch: tuple, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return a batch of `peer_loader` as torchvision's model takes it: float images in [0, 1], targets."""
    images = [image.to(device, non_blocking=True).float().div_(255) for image in batch[0]]  # converted there
    targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in batch[1]]
    return images, targets


def peer_optimizer(model: SSD) -> torch.optim.Optimizer:
    """Return SGD as SSD is trained, with a small learning rate."""
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(params, lr=1e-4, momentum=0.9, weight_decay=5e-4)


def peer_step(
    model: SSD,
    optimizer: torch.optim.Optimizer,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    amp_dtype: torch.dtype | None,
) -> Tensor:
    """Take a training step as torchvision's reference does; returns the loss, still on the device."""
    with ssd.autocast(images[0].device, amp_dtype):
        loss = sum(model(images, targets).values())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def run_until(command: list[str], deadline: float | None, **options: Any) -> None:
    """Run a training command until it ends or until a deadline of time.monotonic(), when it is interrupted.

    options: of `subprocess.Popen`. RuntimeError if it was interrupted, which it can go on after, or failed.
    """
    with subprocess.Popen(command, **options) as process:
        try:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise RuntimeError("stopped at the limit; the same command goes on") from None
        except KeyboardInterrupt:  # which the process got too
            process.wait()
            raise
    if code:
        raise RuntimeError(f"training ended with exit code {code}")


def train(flags: list[str], output: Path, *, deadline: float | None = None, **options: Any) -> dict:
    """Run this project's training command in a process of its own; a run that was stopped goes on.

    flags: the module's; output: its --output-dir; deadline, options: of `run_until`. Returns run.json, with
    the "checkpoint" to measure, the "seconds" of all epochs together, validation included, the "images"
    trained on (steps times batch size), and the median "images_per_s" of the epochs after the first.
    """
    checkpoints = output / "checkpoints"
    given = output / "flags.json"
    last = checkpoints / "last.pth"
    is_same = given.is_file() and json.loads(given.read_text()) == flags
    if not is_same:  # a run that ends before it saves anything must not go on from this one
        last.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    ssd.write_json(given, flags)
    command = [sys.executable, str(ROOT / "benchmarks" / "bare.py"), *flags, "--output-dir", str(output)]
    if is_same and last.is_file():
        command.append("--resume")
    try:
        run_until(command, deadline, **options)
    except RuntimeError as error:
        raise RuntimeError(f"{error}, see {output}") from None
    run = json.loads((checkpoints / "run.json").read_text())
    state = ssd.load_checkpoint(last)["train_state"]
    history = state["history"]
    rates = [row["images_per_s"] for row in history[1:] or history]
    return run | {
        "checkpoint": ssd.newest_final_checkpoint(output),
        "seconds": sum(row["seconds"] for row in history),
        "images": state["step"] * run["flags"]["batch_size"],
        "images_per_s": statistics.median(rates),
    }


def measure(run: dict, splits: list[str]) -> dict[str, float]:
    """Return the figures of a run of `train` on lists of its data together; COCO's where pycocotools is."""
    used = run["flags"]
    lists = [used[name] for name in ("train_split", "val_split", "test_split")]
    root = ssd.find_data(used["data"], used["data_root"], *lists)[0][0]
    saved = ssd.load_checkpoint(run["checkpoint"])
    classes = saved["classes"]
    records: list[ssd.Record] = []
    for split in splits:
        listed, findings = ssd.read_records(root, split, classes, unlabelled=used["unlabelled"])
        ssd.print_findings(findings)
        records += listed

    # As the run itself measures.
    machine = ssd.prepare_device(used["device"], amp=used["amp"], workers=used["workers"])
    model = ssd.model_from_checkpoint(saved, run["checkpoint"], machine.device)
    loader = ssd.plain_loader(records, model, batch_size=8, workers=machine.workers)
    result = ssd.measure(model, loader, amp_dtype=machine.amp_dtype, **run["test"]["detection"])
    figures = {key: result[key] for key in ("map_area", "map11", "map75")}
    if importlib.util.find_spec("pycocotools"):
        from ssd_tools.coco import coco_figures

        coco = coco_figures(result["detections"], ssd.truth_of(records), len(classes))
        figures |= {"coco_ap": coco["ap"], "ap75": coco["ap75"], "ap_small": coco["ap_small"]}
    return figures


def run_epochs(work: dict[str, Callable[[int, int], object]], count: int) -> Cases:
    """Return {case: a function that does work(index, epoch) for all images}, each time in another epoch."""

    def run(function: Callable[[int, int], object], epochs: Iterator[int]) -> None:
        epoch = next(epochs)
        for index in range(count):
            function(index, epoch)

    return {name: functools.partial(run, function, itertools.count()) for name, function in work.items()}


def time_in_turns(
    cases: Cases,
    rounds: int,
    device: torch.device,
    *,
    least: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Return {name: [seconds a call]} of cases {name: function}: `rounds` rounds of every case in turn.

    A case is called until `least` seconds are over, and a round before is not counted: it pays for set-up,
    allocation, compilation. Waits for the device after each call. Every time is printed as it comes.
    clock: in seconds; `time.process_time` leaves out what other programs take of a busy machine.
    """
    times: Times = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, function in cases.items():
            calls, seconds = 0, 0.0
            start = clock()
            while calls == 0 or seconds < least:
                function()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                calls += 1
                seconds = clock() - start
            times[name].append(seconds / calls)
            line = f"round {number}/{rounds}  {name}: {1e3 * seconds / calls:.1f} ms"
            print(line, file=sys.stderr, flush=True)
    return {name: values[1:] for name, values in times.items()}


def time_one_by_one(cases: Cases, rounds: int, device: torch.device) -> Times:
    """Return what `time_in_turns` does, for cases whose loader processes go on into their next epoch."""
    return {name: time_in_turns({name: case}, rounds, device, least=0)[name] for name, case in cases.items()}


def rows_of(times: Times, peer_of: dict[str, str], *, images: int) -> list[dict]:
    """Return a table row for each case: median, 95th percentile, spread, images/s, times its peer's speed.

    peer_of: {case: the case to compare with}. images: images a call.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, values in times.items():
        spread = (max(values) - min(values)) / medians[name]
        rows.append(
            {
                "case": name,
                "ms": 1e3 * medians[name],
                "images_per_s": images / medians[name],
                "p95_ms": 1e3 * torch.tensor(values).quantile(0.95).item(),
                "spread": spread,
                "times_peer": medians[peer_of[name]] / medians[name],
            }
        )
    return rows


def _cell(value: str | float | None) -> str:
    if value is None or value != value:  # NaN
        return "-"
    if isinstance(value, str):
        return value
    if abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}"


def markdown(rows: list[dict]) -> str:
    """Return row dicts as one Markdown table; "-" stands for None, NaN and what a row lacks."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] for cells in table]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def report(
    title: str, rows: list[dict], args: argparse.Namespace, device: torch.device, **facts: Any
) -> dict:
    """Print the table, and write it with versions, machine and facts to --json; returns what that holds."""
    machine = ssd.environment(device) | {"threads": torch.get_num_threads()}
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "torchvision", "threads"))
    print(f"{title}\n{machine['device']}, {versions}; medians of {args.rounds} rounds\n\n{markdown(rows)}")
    result = {"title": title, "rows": rows, **facts, "rounds": args.rounds, "environment": machine}
    if args.json:
        ssd.write_json(args.json, result)
    return result
