"""What the benchmarks share: flags, timing in turns, the table, the JSON file, and torchvision's side.

The peer is torchvision's SSD300 (`ssd300_vgg16`, random weights) with its reference augmentation for SSD.
Both are measured in one process, in turns, so that a neighbour's load or a changing clock meets them alike;
where loader processes work ahead, one after the other.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torchvision
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

import ssd_object_detection as ssd

ROOT = Path(ssd.__file__).resolve().parent


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the defaults, and a program's docstring as it stands."""


def make_parser(doc):
    """Return a parser without flags; doc is the program's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)


def make_speed_parser(doc, *, rounds):
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


def begin(args):
    """Set up torch and OpenCV as training does; returns (device, DataSplits with nothing held out)."""
    torch.set_num_threads(args.threads)
    device = ssd.pick_device(args.device)
    ssd.prepare_device(argparse.Namespace(seed=0, workers=0, compile=False, amp="off"), device)
    data = ssd.load_data(args.data, data_root=args.data_root, train_split=args.train_split, val_fraction=0)
    return device, data


def precisions(device):
    """Return {name: autocast dtype or None} of what the hardware computes: fp32, and bfloat16 or float16."""
    dtype = ssd.pick_amp_dtype(device)
    return {"fp32": None} if dtype is None else {"fp32": None, str(dtype).removeprefix("torch."): dtype}


def make_batch(records, device, *, batch_size):
    """Return (batch on a device, [(boxes, labels)]): resized images, and their ground truth on the CPU.

    boxes (G, 4) float32 in [0, 1], labels (G,) int64. Records are repeated if there are too few.
    """
    dataset = ssd.VocDataset(records, ssd.build_transform(train=False), ssd.make_anchors())
    indices = [i % len(dataset) for i in range(batch_size)]
    batch = torch.utils.data.default_collate([dataset[i] for i in indices])
    truth = [tuple(map(torch.from_numpy, dataset.augment(i)[1:])) for i in indices]
    return ssd.to_device(batch, device), truth


def make_state(num_classes, device, amp_dtype, *, batch_size, width=1.0, compiled=False):
    """Return (TrainState, flags) of a run of this project with random weights, by recipe voc's AdamW."""
    args = ssd.parse_args(
        [
            "--recipe",
            "voc",
            "--no-pretrained",
            "--freeze-blocks",
            "0",
            "--width",
            str(width),
            "--lr",
            "1e-4",
            "--batch-size",
            str(batch_size),
            "--device",
            str(device),
            "--compile" if compiled else "--no-compile",
        ]
    )
    state, _ = ssd.build_state(args, num_classes, device, amp_dtype)
    return state, args


def own_loader(records, device, *, batch_size, workers, epochs, pixels=None):
    """Return this project's training loader of so many epochs; pixels: of `ssd.decode_all`."""
    dataset = ssd.VocDataset(records, ssd.build_transform(train=True), ssd.make_anchors(), pixels=pixels)
    sampler = ssd.EpochBatchSampler(len(records), batch_size, epochs=range(epochs))
    return ssd.make_loader(dataset, workers=workers, pin_memory=device.type == "cuda", batch_sampler=sampler)


def peer_model(num_classes, device):
    """Return torchvision's SSD300 with random weights; its class count includes the background."""
    return torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=num_classes + 1, topk_candidates=ssd.PRE_NMS_TOP_K
    ).to(device)


def peer_anchors(model, device):
    """Return the 8,732 anchors of torchvision's SSD300, xyxy in pixels."""
    size = ssd.IMAGE_SIZE
    maps = [torch.zeros(1, 1, cells, cells, device=device) for cells in (38, 19, 10, 5, 3, 1)]
    images = torch.zeros(1, 3, size, size, device=device)
    listed = torchvision.models.detection.image_list.ImageList(images, [(size, size)])
    return model.anchor_generator(listed, maps)[0]


def peer_targets(truth, device):
    """Return the ground truth of `make_batch` as torchvision takes it: boxes in pixels, labels."""
    size = ssd.IMAGE_SIZE
    return [{"boxes": boxes.to(device) * size, "labels": labels.to(device)} for boxes, labels in truth]


class PeerDataset(torch.utils.data.Dataset):
    """Records as torchvision's reference training reads them: (uint8 image (3, H, W), {"boxes", "labels"}).

    train: with the reference augmentation for SSD of transforms v2: photometric distortion, zoom-out, IoU
    crop, flip. resize: to 300x300, which else is left to torchvision's model. Its transforms are faster on
    PIL images than on tensors, so images are decoded by PIL.
    """

    def __init__(self, records, *, train=True, resize=True):
        self.records = records
        steps = []
        if train:
            steps += [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=(123, 117, 104))]
            steps += [v2.RandomIoUCrop(), v2.RandomHorizontalFlip(p=0.5)]
        if resize:
            steps += [v2.Resize((ssd.IMAGE_SIZE, ssd.IMAGE_SIZE))]
        self.transform = v2.Compose([*steps, v2.ToImage(), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()])

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        image = Image.open(record.image_path).convert("RGB")
        size = (record.height, record.width)
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(record.boxes_px), format="XYXY", canvas_size=size)
        return self.transform(image, {"boxes": boxes, "labels": torch.from_numpy(record.labels)})


def peer_loader(dataset, device, *, batch_size=1, workers, train=True, batch_sampler=None):
    """Return a DataLoader of lists of images and targets; train: shuffled, without a smaller last batch."""
    batching = {"batch_size": min(batch_size, len(dataset)), "shuffle": train, "drop_last": train}
    if batch_sampler is not None:
        batching = {"batch_sampler": batch_sampler}
    return torch.utils.data.DataLoader(
        dataset,
        **batching,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
        collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
    )


def peer_to_device(batch, device):
    """Return a batch of `peer_loader` as torchvision's model takes it: float images in [0, 1], targets."""
    images = [image.to(device, non_blocking=True).float().div_(255) for image in batch[0]]  # converted there
    targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in batch[1]]
    return images, targets


def peer_optimizer(model):
    """Return SGD as SSD is trained, with a small learning rate."""
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(params, lr=1e-4, momentum=0.9, weight_decay=5e-4)


def peer_step(model, optimizer, images, targets, amp_dtype):
    """Take a training step as torchvision's reference does; returns the loss, still on the device."""
    with ssd.autocast(images[0].device, amp_dtype):
        loss = sum(model(images, targets).values())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def figures(detections, records, num_classes):
    """Return VOC's and COCO's figures of detections in the form that `ssd.evaluate_voc` takes."""
    from ssd_tools.coco import coco_figures  # needs pycocotools, which the benchmarks of speed do without

    voc = ssd.score_detections(detections, records, num_classes)
    coco = coco_figures(detections, ssd.truth_of(records), num_classes)
    return {
        "map_area": voc["map_area"],
        "map11": voc["map11"],
        "coco_ap": coco["ap"],
        "ap75": coco["ap75"],
        "ap_small": coco["ap_small"],
    }


def train(flags, output, **options):
    """Run this project's training command in a process of its own; a run that was stopped goes on.

    flags: the module's; output: its --output-dir, a Path. options: of `subprocess.Popen`. Returns run.json,
    with the "checkpoint" to measure, the "seconds" of all epochs together, validation included, and the
    "images" trained on, steps times batch size. RuntimeError if it fails.
    """
    checkpoints, given = output / "checkpoints", output / "flags.json"
    is_same = given.is_file() and json.loads(given.read_text()) == flags
    if not is_same:  # a run that ends before it saves anything must not go on from this one
        (checkpoints / "last.pth").unlink(missing_ok=True)
    going_on = ["--resume"] if is_same and (checkpoints / "last.pth").is_file() else []
    output.mkdir(parents=True, exist_ok=True)
    ssd.write_json(given, flags)
    command = [sys.executable, str(ROOT / "ssd_object_detection.py"), *flags, "--output-dir", str(output)]
    with subprocess.Popen([*command, *going_on], **options) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # which the process got too: it saves what waits
            process.wait()
            raise
    if code:
        raise RuntimeError(f"training ended with exit code {code}, see {output}")
    (final,) = checkpoints.glob("*_final.pth")
    run = json.loads((checkpoints / "run.json").read_text())
    state = ssd.load_checkpoint(checkpoints / "last.pth")["train_state"]
    return run | {
        "checkpoint": final,
        "seconds": sum(row["seconds"] for row in state["history"]),
        "images": state["step"] * run["flags"]["batch_size"],
    }


def measure(run, splits=()):
    """Return `figures` of a run of `train` on lists of its data together; none: on its test list."""
    if not run["test"]:
        raise RuntimeError("the data has no test list: name one with --test-split")
    used = run["flags"]
    lists = [used[name] for name in ("train_split", "val_split", "test_split")]
    root = ssd.find_data(used["data"], used["data_root"], *lists)[0][0]
    saved = ssd.load_checkpoint(run["checkpoint"])
    classes = saved["classes"]
    splits = splits or [run["test"]["split"]]
    options = {"classes": classes, "unlabelled": used["unlabelled"]}
    records = [record for split in splits for record in ssd.read_records(root, split, **options)]
    model = ssd.model_from_checkpoint(saved, run["checkpoint"], ssd.pick_device(used["device"]))
    dataset = ssd.VocDataset(records, ssd.build_transform(train=False), model.anchors.cpu())
    loader = ssd.make_loader(dataset, batch_size=8, workers=used["workers"])
    dtype = ssd.pick_amp_dtype(model.anchors.device, used["amp"])
    result = ssd.evaluate(model, loader, amp_dtype=dtype, **run["test"]["detection"])
    return figures(result["detections"], records, len(classes))


def time_in_turns(cases, rounds, device, *, least=0.05):
    """Return {name: [seconds a call]} of cases {name: function}: `rounds` rounds of every case in turn.

    A case is called until `least` seconds are over, and a round before is not counted: it pays for set-up,
    allocation, compilation. Waits for the device after each call. Every time is printed as it comes.
    """
    times = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, function in cases.items():
            calls, seconds = 0, 0.0
            start = time.perf_counter()
            while calls == 0 or seconds < least:
                function()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                calls += 1
                seconds = time.perf_counter() - start
            times[name].append(seconds / calls)
            line = f"round {number}/{rounds}  {name}: {1e3 * seconds / calls:.1f} ms"
            print(line, file=sys.stderr, flush=True)
    return {name: values[1:] for name, values in times.items()}


def time_one_by_one(cases, rounds, device):
    """Return what `time_in_turns` does, for cases whose loader processes go on into their next epoch."""
    return {name: time_in_turns({name: case}, rounds, device, least=0)[name] for name, case in cases.items()}


def rows_of(times, peer_of, *, images):
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


def _cell(value):
    if value is None or value != value:  # NaN
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def markdown(rows):
    """Return row dicts as one Markdown table; "-" stands for None, NaN and what a row lacks."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] for cells in table]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def report(title, rows, args, device, **facts):
    """Print the table, and write it with versions, machine and facts to --json; returns what that holds."""
    machine = ssd.environment(device) | {"threads": torch.get_num_threads()}
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "torchvision", "threads"))
    print(f"{title}\n{machine['device']}, {versions}; medians of {args.rounds} rounds\n\n{markdown(rows)}")
    result = {"title": title, "rows": rows, **facts, "rounds": args.rounds, "environment": machine}
    if args.json:
        ssd.write_json(args.json, result)
    return result
