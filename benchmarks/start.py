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
from typing import Any, cast

import common
import torch
from common import ssd
from torch import Tensor

BLOCKS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc7")


def share_of_zeros(peaks: list[Tensor]) -> float:
    """Return the share of channels whose largest values (channels,) are nowhere above zero."""
    return (torch.stack(peaks) <= 0).all(dim=0).float().mean().item()


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


def compare_features(start: ssd.SSD300, now: ssd.SSD300, records: Sequence[ssd.Record]) -> list[dict]:
    """Return the table's rows: the features of two networks in pictures. The networks are changed."""
    start_features = BlockFeatures(start.train())
    now_features = BlockFeatures(now.train())
    comparisons = {name: Comparison() for name in BLOCKS}
    for batch in ssd.plain_loader(records, now, batch_size=4, workers=0):
        images = batch["images"].to(now.anchors.device)
        before = start_features.of(images)
        after = now_features.of(images)
        for name in BLOCKS:
            comparisons[name].add(before[name], after[name])
    return [comparisons[name].row(name) for name in BLOCKS]


def begin(flags: Sequence[str]) -> tuple[ssd.Settings, ssd.Machine, ssd.DataSplits, ssd.TrainState]:
    """Return what a training by these flags has before its first step."""
    settings, source = ssd.load_settings(flags)
    if settings.resume or settings.evaluate or settings.predict:
        raise ssd.InputError("these are not the flags of a training's start: see --init-from")
    machine = ssd.prepare_device(
        settings.device, amp=settings.amp, workers=settings.workers, compiled=settings.compile
    )
    data, state, _ = ssd.begin_training(settings, machine)
    if settings.init_from is not None and source is not None:
        ssd.start_from(state, source, settings.init_from, data.classes)
    return settings, machine, data, state


def take_steps(
    settings: ssd.Settings, machine: ssd.Machine, data: ssd.DataSplits, state: ssd.TrainState, steps: int
) -> list[float]:
    """Train the first steps of a run, fewer if it has fewer; returns the class loss of each."""
    loader, _ = ssd.make_loaders(settings, machine, data, state)
    run_loss = functools.partial(ssd.detection_loss, loss=settings.loss, gamma=settings.focal_gamma)
    seen: list[Tensor] = []

    def loss(*values: Any, **options: Any) -> dict[str, Tensor]:
        losses = run_loss(*values, **options)
        seen.append(losses["loss_cls"].detach())
        return losses

    sampler = cast(ssd.EpochBatchSampler, loader.batch_sampler)
    steps = min(steps, settings.epochs * sampler.steps_per_epoch)
    batches = itertools.islice(iter(loader), steps)
    for _ in range(math.ceil(steps / sampler.steps_per_epoch)):
        ssd.train_one_epoch(state, loader, batches, loss, settings, amp_dtype=machine.amp_dtype)
        state.epoch += 1
    return [value.item() for value in seen]


def probe(flags: Sequence[str], steps: int, pictures: int) -> dict:
    """Train for some steps by the module's flags; returns what --json holds."""
    settings, machine, data, state = begin(flags)
    ssd.print_header(settings, machine, data, state.model)
    start = copy.deepcopy(state.model)
    losses = take_steps(settings, machine, data, state, steps)
    shown = ssd.spread(data.val or data.test or data.train, pictures)
    return {
        "steps": len(losses),
        "skipped": len(losses) - state.step,
        "pictures": len(shown),
        "loss_cls_first_8": statistics.mean(losses[:8]),
        "loss_cls_last_16": statistics.mean(losses[-16:]),
        "rows": compare_features(start, copy.deepcopy(state.model), shown),
        "flags": list(flags),
        "environment": ssd.environment(machine.device),
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
