"""One training step at full width: forward, loss, backward, SGD step; against torchvision's ssd300_vgg16.

Both train from random weights on the same pictures at 300x300, each fed as its own training loop feeds it: uint8
batches here, a list of float pictures there. Memory is the most that one case held: on CUDA what torch allocated, on a
CPU what a process of its own came to hold beyond what it held before the model was made.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --device cuda --batch-size 32 --compile --json training_step.json
"""

import functools
import gc
import resource
import subprocess
import sys

import common
import torch
from common import ssd


def sgd(model, **options):
    """Return SGD as SSD is trained."""
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, **options)


def peer_step(batch, num_classes, amp_dtype):
    """Return torchvision's step."""
    device = batch["images"].device
    model = common.peer_model(num_classes, device).train()
    optimizer, targets = sgd(model), common.peer_targets(batch)
    images = [image.contiguous() for image in batch["images"].float().div(255)]

    def step():
        with ssd.autocast(device, amp_dtype):
            loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def own_step(batch, num_classes, amp_dtype, compiled=False, mode=None):
    """Return this project's step; mode "reduce-overhead" replays CUDA graphs."""
    device = batch["images"].device
    order = torch.contiguous_format if device.type == "cpu" and amp_dtype is None else torch.channels_last
    model = ssd.SSD300(num_classes, prior_prob=ssd.FOCAL_PRIOR)  # as `build_state` has it
    model = model.to(device, memory_format=order).train()
    optimizer = sgd(model, fused=True)
    network = ssd.compile_model(model, batch["images"], amp_dtype, mode) if compiled else model

    def step():
        with ssd.autocast(device, amp_dtype):
            outputs = network(batch["images"])
        targets = ssd.build_targets(batch["gt_boxes"], batch["gt_labels"], model.anchors)
        loss = ssd.detection_loss(outputs, targets)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return step


def make_cases(args, batch, num_classes):
    """Return {case: a function that makes its step}, so that a case is built alone for its memory."""
    cases = {}
    for name, dtype in common.precisions(batch["images"].device):
        cases[f"torchvision {name}"] = lambda dtype=dtype: peer_step(batch, num_classes, dtype)
        cases[f"SSD300 {name}"] = lambda dtype=dtype: own_step(batch, num_classes, dtype)
        if args.compile:
            make = functools.partial(own_step, batch, num_classes, dtype, compiled=True)
            cases[f"SSD300 {name} compiled"] = make
            if batch["images"].is_cuda and dtype is not None:  # a second compilation: for the precision that is used
                cases[f"SSD300 {name} CUDA graphs"] = functools.partial(make, mode="reduce-overhead")
    return cases


def memory(name, make, argv, device):
    """Return the most memory (MB) that a case holds during two steps."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step = make()
        step()
        step()
        return torch.cuda.max_memory_allocated(device) / 2**20
    done = subprocess.run([sys.executable, __file__, *argv, "--memory-of", name], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the memory of {name} could not be measured:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def main(argv=None):
    """Measure by the flags; returns what --json holds."""
    parser = common.make_parser(__doc__, rounds=3)
    parser.add_argument("--batch-size", type=ssd.positive_int, help="pictures a step (default: 4, on CUDA 32)")
    parser.add_argument("--compile", action="store_true", help="measure the compiled network too")
    parser.add_argument("--memory", action="store_true", help="measure memory too (always done on CUDA)")
    parser.add_argument("--memory-of", metavar="CASE", help="print only the memory that a case takes")
    argv = sys.argv[1:] if argv is None else [str(a) for a in argv]
    args = parser.parse_args(argv)
    device, data = common.begin(args), common.load_data(args)
    size = args.batch_size or (32 if device.type == "cuda" else 4)
    batch = common.make_batch(data.train, device, batch_size=size)
    makers = make_cases(args, batch, len(data.classes))
    if args.memory_of:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step = makers[args.memory_of]()
        step()
        step()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
        return None
    extra = {}
    if args.memory or device.type == "cuda":
        extra = {name: {"memory_MB": memory(name, make, argv, device)} for name, make in makers.items()}
    times = common.time_in_turns({name: make() for name, make in makers.items()}, args.rounds, device)
    peer = {name: f"torchvision {name.split()[1]}" for name in makers}
    rows = common.rows_of(times, peer, images=size, extra=extra)
    return common.report(f"Training step, 300x300, full width, batch {size}", rows, args, batch_size=size)


if __name__ == "__main__":
    main()
    sys.exit(0)
