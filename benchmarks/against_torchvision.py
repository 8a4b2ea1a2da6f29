"""Train this project's SSD300 and torchvision's ssd300_vgg16 on the same files for as long; compare mAP.

    python benchmarks/against_torchvision.py --output-dir versus --seeds 0 1 2 \\
        --data data/VOCdevkit/VOC2007 --train-split train --test-split val --epochs 20

All flags but --output-dir and --seeds are this project's training flags, and its run comes first.
torchvision's network then trains for the seconds that the epochs took, on the same images, batch size, loader
processes, device and precision, by torchvision's reference recipe for SSD: its augmentation; SGD with
momentum .9, learning rate .002 at batch 32 (in proportion below), weight decay 5e-4, a warm-up of up to 1,000
steps, a tenth of the rate after 2/3 and after 11/12 of the time; of ImageNet weights the first block stays as
it is. Both start from the same convolutions (--backbone-weights: caffe, or a file of them), or both from
random ones (--no-pretrained). Both are measured once, at the end, by this project's evaluator.

The same command goes on where it was stopped: after this project's last saved epoch, or where torchvision's
network was half a minute before. What is finished is not repeated.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import common
import numpy as np
import recipes
import torch
import torchvision
from common import ssd

SAVE_SECONDS = 30.0  # of training between two saves of torchvision's network


def load_convolutions(model, state):
    """Copy VGG's 13 convolutions into torchvision's SSD300 and freeze its first block, as its recipe does."""
    classifier = state.get("classifier.0.weight")
    if classifier is not None and not classifier.isnan().any():
        raise ssd.InputError("torchvision's SSD300 starts from Caffe's weights: --backbone-weights caffe")
    convs = [layer for layer in model.backbone.modules() if isinstance(layer, torch.nn.Conv2d)][:13]
    own = [parameter for conv in convs for parameter in (conv.weight, conv.bias)]
    given = [value for name, value in state.items() if name.startswith("features.")]
    with torch.no_grad():
        for target, source in zip(own, given, strict=True):
            target.copy_(source)
    model.backbone.features[:4].requires_grad_(False)


class Peer:
    """torchvision's SSD300 in training for `budget` seconds; a file keeps its state, and gives it back.

    used: the flags of this project's run. A file written for another budget is of another comparison.
    """

    def __init__(self, used, num_classes, device, budget, path):
        torch.manual_seed(used.seed)
        self.model = torchvision.models.detection.ssd300_vgg16(
            weights=None, weights_backbone=None, num_classes=num_classes + 1
        )
        if used.pretrained:
            load_convolutions(self.model, ssd.fetch_backbone(used.backbone_weights))
        self.model.to(device)
        self.optimizer = common.peer_optimizer(self.model)
        self.used, self.device, self.budget, self.path = used, device, budget, path
        self.step, self.seconds = 0, 0.0
        state = ssd.load_tensors(path, "torchvision's state") if path.is_file() else {}
        if state.get("budget") == budget:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            torch.manual_seed(used.seed + self.step)  # of the augmentation

    def save(self):
        """Write the state, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "budget": self.budget,
        }
        ssd.write_atomically(self.path, lambda temporary: torch.save(state, temporary))

    def batches(self, num_images, batch_size):
        """Yield lists of indices, epoch after epoch, from the step on; the seed alone decides their order."""
        sampler = ssd.EpochBatchSampler(num_images, batch_size, self.used.seed, epochs=itertools.count())
        for batch in itertools.islice(sampler, self.step, None):
            yield [index for index, _ in batch]

    def train(self, records, amp_dtype):
        """Train until the budget is used, saving every half minute; saving does not count."""
        size = min(self.used.batch_size, len(records))
        warmup = min(1000, len(records) // size)
        options = {"workers": self.used.workers, "batch_sampler": self.batches(len(records), size)}
        self.model.train()
        saved_at = self.seconds
        began = time.perf_counter()
        for batch in common.peer_loader(common.PeerDataset(records, resize=False), self.device, **options):
            drops = (self.seconds >= self.budget * 2 / 3) + (self.seconds >= self.budget * 11 / 12)
            for group in self.optimizer.param_groups:
                group["lr"] = 0.002 * size / 32 * 0.1**drops * min(1.0, (self.step + 1) / warmup)
            images, targets = common.peer_to_device(batch, self.device)
            common.peer_step(self.model, self.optimizer, images, targets, amp_dtype).item()  # waits for it
            self.step += 1
            self.seconds += time.perf_counter() - began
            is_over = self.seconds >= self.budget
            if is_over or self.seconds - saved_at >= SAVE_SECONDS:
                self.save()
                saved_at = self.seconds
            if is_over:
                break
            began = time.perf_counter()

    @torch.no_grad()
    def detect(self, records, amp_dtype):
        """Return what it finds in the images of records, in the form that `evaluate_voc` takes."""
        dataset = common.PeerDataset(records, train=False, resize=False)
        options = {"batch_size": 8, "workers": self.used.workers, "train": False}
        self.model.eval()
        found = []
        for batch in common.peer_loader(dataset, self.device, **options):
            images, _ = common.peer_to_device(batch, self.device)
            with ssd.autocast(self.device, amp_dtype):
                found += self.model(images)
        return {
            "image_ids": np.repeat(np.arange(len(found)), [len(one["labels"]) for one in found]),
            "labels": torch.cat([one["labels"] for one in found]).cpu().numpy(),
            "scores": torch.cat([one["scores"] for one in found]).float().cpu().numpy(),
            "boxes_px": ssd.to_voc_pixels(torch.cat([one["boxes"] for one in found]).float().cpu().numpy()),
        }


def run_ours(flags, seed, output):
    """Train this project's network by its command line; returns its figures."""
    run = common.train([*flags, "--seed", str(seed)], output)
    return {"seconds": run["seconds"], "images": run["images"], **common.measure(run)}


def run_peer(used, budget, path):
    """Train torchvision's network by the flags that this project's run used; returns its figures."""
    used = argparse.Namespace(**used)
    device = ssd.pick_device(used.device)
    amp_dtype = ssd.prepare_device(used, device)
    names = (
        "data_root",
        "classes",
        "train_split",
        "val_split",
        "test_split",
        "val_fraction",
        "seed",
        "unlabelled",
    )
    data = ssd.load_data(used.data, **{name: getattr(used, name) for name in names})
    peer = Peer(used, len(data.classes), device, budget, path)
    print(f"torchvision's ssd300_vgg16: {peer.seconds:.0f} of {budget:.0f} s are over", flush=True)
    if peer.seconds < budget:
        peer.train(data.train, amp_dtype)
    detections = peer.detect(data.test, amp_dtype)
    images = peer.step * min(used.batch_size, len(data.train))
    figures = common.figures(detections, data.test, len(data.classes))
    return {"seconds": peer.seconds, "images": images, **figures}


def compare(flags, seed, folder):
    """Run with a seed what has no line in the folder's results.jsonl yet, and write these lines."""
    results, output = folder / "results.jsonl", folder / f"ours-{seed}"

    def line_of(variant, run):
        key = {"variant": variant, "flags": flags, "seed": seed}
        for line in recipes.read_lines(results):
            if key.items() <= line.items():
                return line
        line = key | run()
        with open(results, "a") as file:
            file.write(json.dumps(line) + "\n")
        return line

    ours = line_of("this project", lambda: run_ours(flags, seed, output))
    used = json.loads((output / "checkpoints" / "run.json").read_text())["flags"]
    line_of("torchvision", lambda: run_peer(used, ours["seconds"], folder / f"torchvision-{seed}.pth"))


def main(argv=None):
    """Run what is not finished and print the table; returns the exit code."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--output-dir", type=Path, required=True, help="where both are kept")
    parser.add_argument("--seeds", type=ssd.natural_int, nargs="+", default=[0, 1, 2], help="of both")
    args, flags = parser.parse_known_args(argv)
    flags = ["--val-split=", "--val-fraction", "0", *flags]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        for seed in args.seeds:
            compare(flags, seed, args.output_dir)
    except (RuntimeError, ssd.InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    lines = [line for line in recipes.read_lines(args.output_dir / "results.jsonl") if line["flags"] == flags]
    print(recipes.table(recipes.summarise(lines)))
    maps = {(line["variant"], line["seed"]): line["map_area"] or float("nan") for line in lines}
    ratios = [maps["this project", seed] / maps["torchvision", seed] for seed in args.seeds]
    print(f"mAP ratio: {statistics.mean(ratios):.3f} ({', '.join(f'{ratio:.3f}' for ratio in ratios)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
