"""One training step at full width, from a batch that is there; against torchvision's ssd300_vgg16.

Both train from random weights on the same images at 300x300, each fed as its own training loop feeds it:
uint8 batches here, a list of float images there. torchvision's step is forward, matching, loss, backward and
SGD. This project's is the `train_step` of a run: without matching, a step of the sample (see losses.py), but
with clipping and averaged weights.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --device cuda --batch-size 32 --compile --json training_step.json
"""

import argparse
import functools
from collections.abc import Callable, Sequence

import common
import torch
from common import ssd
from torch import Tensor


def peer_step(
    batch: dict, truth: common.Truth, num_classes: int, amp_dtype: torch.dtype | None
) -> Callable[[], Tensor]:
    """Return torchvision's step."""
    device = batch["images"].device
    model = common.peer_model(num_classes, device).train()
    images = [image.contiguous() for image in batch["images"].float().div(255)]
    inputs = images, common.peer_targets(truth, device)
    return functools.partial(common.peer_step, model, common.peer_optimizer(model), *inputs, amp_dtype)


def own_step(
    batch: dict, num_classes: int, amp_dtype: torch.dtype | None, *, compiled: bool = False
) -> Callable[[], dict | None]:
    """Return this project's step."""
    images = batch["images"]
    state, settings = common.make_state(
        num_classes, images.device, amp_dtype, batch_size=len(images), compiled=compiled
    )
    state.model.train()
    step = functools.partial(ssd.train_step, state, batch, ssd.detection_loss)
    rates = {"lr": settings.lr, "backbone_lr": settings.lr * settings.backbone_lr}
    return functools.partial(step, **rates, clip_grad=settings.clip_grad, amp_dtype=amp_dtype)


def make_cases(args: argparse.Namespace, batch: dict, truth: common.Truth, num_classes: int) -> common.Cases:
    """Return {case: step}; compiled is the fastest precision alone."""
    cases: common.Cases = {}
    for name, dtype in common.precisions(batch["images"].device).items():
        cases[f"torchvision {name}"] = peer_step(batch, truth, num_classes, dtype)
        cases[f"SSD300 {name}"] = own_step(batch, num_classes, dtype)
    if args.compile:
        cases[f"SSD300 {name} compiled"] = own_step(batch, num_classes, dtype, compiled=True)
    return cases


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure by the flags; returns what --json holds."""
    parser = common.make_speed_parser(__doc__, rounds=3)
    parser.add_argument("--batch-size", type=ssd.positive_int, default=4, help="images a step")
    parser.add_argument("--compile", action="store_true", help="measure the compiled network too")
    args = parser.parse_args(argv)
    device, data = common.begin(args)
    batch, truth = common.make_batch(data.train, device, batch_size=args.batch_size)
    times = common.time_in_turns(make_cases(args, batch, truth, len(data.classes)), args.rounds, device)
    peer_of = {name: f"torchvision {name.split()[1]}" for name in times}
    rows = common.rows_of(times, peer_of, images=args.batch_size)
    title = f"Training step, 300x300, full width, batch {args.batch_size}"
    return common.report(title, rows, args, device, batch_size=args.batch_size)


if __name__ == "__main__":
    main()
