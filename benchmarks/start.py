"""What the first steps of a training leave of the features that it starts from.

    python benchmarks/start.py --data data/VOCdevkit/VOC2007 --train-split train --test-split val
    python benchmarks/start.py --steps 16 --data shapes --recipe small --json start.json

All flags but those of this program are the training's: it trains --steps steps of the run that they
describe, by the module's own loader and step. Then it compares the network with the one that it started
from, in pictures that are not trained on. A row is a VGG block, or fc7: the cosine of the features with
those at the start (the mean over the pictures), their root mean square at the start and now, and the share
of channels that are zero everywhere, at the start and now. Batch norm takes the statistics of the pictures,
four at a time. A start that is kept has cosines near 1 and no more zero channels than before.
"""

import copy
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import common
import numpy as np
import torch
from common import ssd
from torch import Tensor
from torch.utils.data import DataLoader

BLOCKS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc7")


class Comparison:
    """What the table says about one block, gathered from batches of pictures."""

    def __init__(self) -> None:
        self.cosines: list[Tensor] = []  # (B,) each
        self.squares_start: list[Tensor] = []  # mean squares, () each
        self.squares: list[Tensor] = []
        self.peaks_start: list[Tensor] = []  # largest values, (channels,) each
        self.peaks: list[Tensor] = []

    def add(self, start: Tensor, now: Tensor) -> None:
        """Add the features of a batch (B, channels, height, width) at the start and now."""
        self.cosines.append(torch.cosine_similarity(start.flatten(1), now.flatten(1)))
        self.squares_start.append(start.square().mean())
        self.squares.append(now.square().mean())
        self.peaks_start.append(start.amax(dim=(0, 2, 3)))
        self.peaks.append(now.amax(dim=(0, 2, 3)))

    def row(self, block: str) -> dict:
        """Return the block's row of the table."""
        return {
            "block": block,
            "cosine": torch.cat(self.cosines).mean().item(),
            "rms_start": torch.stack(self.squares_start).mean().sqrt().item(),
            "rms": torch.stack(self.squares).mean().sqrt().item(),
            "zero_start": share_of_zeros(self.peaks_start),
            "zero": share_of_zeros(self.peaks),
        }


def share_of_zeros(peaks: list[Tensor]) -> float:
    """Return the share of channels whose largest values (channels,) are nowhere above zero."""
    return (torch.stack(peaks) <= 0).all(dim=0).float().mean().item()


class BlockFeatures:
    """The outputs of a network's blocks and of fc7 in its last forward pass, `outputs`."""

    def __init__(self, model: ssd.SSD300) -> None:
        self.model = model
        self.outputs: dict[str, Tensor] = {}
        for name, layer in zip(BLOCKS, (*model.blocks, model.fc), strict=True):
            layer.register_forward_hook(functools.partial(self._keep, name))

    def _keep(self, name: str, layer: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        self.outputs[name] = output.float()

    @torch.no_grad()
    def of(self, images: Tensor) -> dict[str, Tensor]:
        """Return {block: features (B, channels, height, width)} of images (B, 3, 300, 300)."""
        self.model(images)
        return self.outputs


def compare_features(start: ssd.SSD300, now: ssd.SSD300, records: list[ssd.Record]) -> list[dict]:
    """Return the table's rows: the features of two networks in pictures. The networks are changed."""
    dataset = ssd.VocDataset(records, ssd.build_transform(train=False), now.anchors.cpu())
    start_features = BlockFeatures(start.train())
    now_features = BlockFeatures(now.train())
    comparisons = {name: Comparison() for name in BLOCKS}
    for batch in ssd.make_loader(dataset, batch_size=4):
        images = batch["images"].to(now.anchors.device)
        before = start_features.of(images)
        after = now_features.of(images)
        for name in BLOCKS:
            comparisons[name].add(before[name], after[name])
    return [comparisons[name].row(name) for name in BLOCKS]


@dataclass(frozen=True)
class Run:
    """A training that is about to begin."""

    settings: ssd.Settings
    machine: ssd.Machine
    data: ssd.DataSplits
    state: ssd.TrainState
    loader: DataLoader


def begin_run(flags: Sequence[str]) -> Run:
    """Prepare a training by the module's flags, as the module does."""
    settings, source = ssd.load_settings(flags)
    machine = ssd.prepare_device(
        settings.device, amp=settings.amp, workers=settings.workers, compiled=settings.compile
    )
    torch.manual_seed(settings.seed)
    names = (*ssd.DATA_FLAGS, "data_root", "seed")
    data = ssd.load_data(**{name: getattr(settings, name) for name in names})
    ssd.print_findings(data.findings)
    boxes = np.concatenate([record.boxes for record in data.train])
    sizes = ssd.choose_anchors(settings.anchors, boxes, data.classes)
    state, _ = ssd.build_state(settings, machine, len(data.classes), sizes)
    if settings.init_from is not None and source is not None:
        ssd.start_from(state, source, settings.init_from, data.classes)
    loader, _ = ssd.make_loaders(settings, machine, data, state)
    ssd.print_header(settings, machine, data, state.model)
    return Run(settings, machine, data, state, loader)


def train_steps(run: Run, steps: int) -> list[float]:
    """Take the first steps of a run, at most all; returns the class loss of each."""
    settings = run.settings
    detection_loss = functools.partial(ssd.detection_loss, loss=settings.loss, gamma=settings.focal_gamma)
    seen: list[Tensor] = []

    def loss(outputs: tuple, targets: tuple, *, num_positive: Tensor) -> dict[str, Tensor]:
        losses = detection_loss(outputs, targets, num_positive=num_positive)
        seen.append(losses["loss_cls"].detach())
        return losses

    steps_per_epoch = cast(ssd.EpochBatchSampler, run.loader.batch_sampler).steps_per_epoch
    steps = min(steps, settings.epochs * steps_per_epoch)
    batches = itertools.islice(iter(run.loader), steps)
    for _ in range(math.ceil(steps / steps_per_epoch)):
        amp_dtype = run.machine.amp_dtype
        ssd.train_one_epoch(run.state, run.loader, batches, loss, settings, amp_dtype=amp_dtype)
        run.state.epoch += 1
    return [value.item() for value in seen]


def probe(flags: Sequence[str], steps: int, pictures: int) -> dict:
    """Train for some steps by the module's flags; returns what --json holds."""
    run = begin_run(flags)
    start = copy.deepcopy(run.state.model)
    losses = train_steps(run, steps)
    shown = ssd.spread(run.data.val or run.data.test or run.data.train, pictures)
    rows = compare_features(start, copy.deepcopy(run.state.model), shown)
    return {
        "steps": len(losses),
        "skipped": len(losses) - run.state.step,
        "pictures": len(shown),
        "loss_cls_first_8": statistics.mean(losses[:8]),
        "loss_cls_last_16": statistics.mean(losses[-16:]),
        "rows": rows,
        "flags": list(flags),
        "environment": ssd.environment(run.machine.device),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train and print the table; returns the exit code."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--steps", type=ssd.positive_int, default=64, help="steps to train")
    parser.add_argument(
        "--pictures", type=ssd.positive_int, default=16, help="pictures to compare features in"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args, flags = parser.parse_known_args(argv)
    try:
        result = probe(flags, args.steps, args.pictures)
    except (ssd.InputError, OSError) as error:
        print(f"error: {ssd.error_line(error)}", file=sys.stderr)
        return 2
    print(f"\n{common.markdown(result['rows'])}\n")
    first, last = result["loss_cls_first_8"], result["loss_cls_last_16"]
    print(f"{result['steps']} steps: class loss {first:.2f} in the first 8, {last:.2f} in the last 16")
    if args.json:
        ssd.write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
