"""What a GPU does: the path without one, on tensors that only claim to be there; on one, what a CPU finds."""

import contextlib
import functools
import itertools
import math
import warnings

import pytest
import reference
import torch
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

import ssd_object_detection as ssd

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
FLAGS = [
    "--recipe",
    "small",
    "--no-pretrained",
    "--width",
    ".0625",
    "--no-compile",
    "--device",
    "cpu",
    "--amp",
    "off",
]
LOSSES = ("focal", "multibox")


def make_batch():
    """Return a batch of four images with 2, 0, 1 and 3 objects, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    low = [torch.rand(count, 2, generator=generator) * 0.5 for count in (2, 0, 1, 3)]
    boxes = [
        torch.cat((corner, corner + 0.1 + 0.4 * torch.rand(corner.shape, generator=generator)), dim=1)
        for corner in low
    ]
    batch = reference.batch(boxes, [[1, 2], [], [2], [1, 1, 2]])
    images = torch.randint(0, 256, (4, 3, 300, 300), dtype=torch.uint8, generator=generator)
    return batch | {"images": images, "indices": torch.arange(4)}


def make_state(device, *flags):
    """Return (TrainState, flags) of a narrow network of two classes on a device, the same weights on all."""
    torch.manual_seed(0)
    args = ssd.load_settings([*FLAGS, *flags])[0]
    machine = ssd.Machine(device, None, workers=0, compiled=bool(args.compile))
    return ssd.build_state(args, machine, 2)[0], args


def take_step(state, args, batch):
    """Take one training step; returns its losses, None if it was skipped."""
    state.model.train()
    settings = {"lr": args.lr, "clip_grad": args.clip_grad, "amp_dtype": None}
    loss = functools.partial(ssd.detection_loss, loss=args.loss)
    return ssd.train_step(state, batch, loss, **settings)


# ---- without a GPU: tensors that claim to be on one ----


def to_fake(module, device, memory_format=torch.preserve_format):
    """Move a module as Module.to does, which cannot swap parameters without numbers."""

    def move(tensor):
        return tensor.detach().to(device, memory_format=memory_format if tensor.ndim == 4 else None)

    for part in module.modules():
        for name, value in part._parameters.items():
            part._parameters[name] = torch.nn.Parameter(move(value), value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = move(value)
    return module


@pytest.fixture
def fake_batch(monkeypatch):
    """A batch on the CPU, in a world with a GPU where tensors have shapes and devices, but no numbers.

    What mixes devices raises, and what waits for the GPU raises DataDependentOutputException.
    """
    batch = make_batch()
    monkeypatch.setattr(torch.nn.Module, "to", to_fake)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield {name: mode.from_tensor(value) for name, value in batch.items()}


def test_the_fake_gpu_finds_what_it_is_for(fake_batch):
    there = fake_batch["gt_boxes"].to(CUDA)
    assert there.device.type == "cuda"
    with pytest.raises(DataDependentOutputException):
        there.sum().item()
    with pytest.raises(DataDependentOutputException):
        bool((there > 0).any())
    with pytest.raises(RuntimeError, match="device"):
        there + fake_batch["gt_boxes"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("batch_norm", ["none", "new", "all"])
def test_network_targets_and_loss_stay_on_the_gpu_and_never_wait_for_it(fake_batch, loss, batch_norm):
    model = ssd.SSD300(2, width=0.0625, batch_norm=batch_norm)
    model.to(CUDA, memory_format=torch.channels_last).freeze_blocks(2)
    batch = ssd.to_device(fake_batch, CUDA)
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    for training in (True, False):
        outputs = model.train(training)(batch["images"])
        targets = ssd.build_targets(batch, model.anchors)
        losses = ssd.detection_loss(outputs, targets, loss=loss)
        found = [*batch.values(), *outputs, *targets, *losses.values()]
        assert {value.device.type for value in found} == {"cuda"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_reads_numbers_from_the_device_in_one_place(monkeypatch, loss, optimizer):
    """On the device "meta", which has no numbers either, but other than the fake GPU a gradient."""
    device = torch.device("meta")
    monkeypatch.setattr(ssd, "autocast", lambda *values: contextlib.nullcontext())
    state, args = make_state(device, "--loss", loss, "--optimizer", optimizer)
    with pytest.raises(RuntimeError, match="meta tensor"):
        take_step(state, args, make_batch())
    asked = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append(tensor.device) or [1.0] * 4)
    assert take_step(state, args, make_batch()) == {"loss": 1.0, "loss_cls": 1.0, "loss_box": 1.0}
    assert asked == [device]
    assert state.step == 1
    assert {parameter.grad.device for parameter in state.model.parameters()} == {device}


# ---- without a GPU: compiling, but for the code that a compiler would write ----


@pytest.fixture
def fresh_compiler():
    """Counters at zero, and nothing compiled before."""
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


@pytest.mark.parametrize(("batch_norm", "frozen"), [("all", 2), ("new", 2), ("none", 0)])
def test_the_network_is_one_graph_in_training_and_one_in_evaluation(fresh_compiler, batch_norm, frozen):
    torch.manual_seed(0)
    model = ssd.SSD300(2, width=0.0625, batch_norm=batch_norm).freeze_blocks(frozen)
    network = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    images = make_batch()["images"][:2]

    def train_and_evaluate():
        model.train()
        outputs = network(images)
        sum(output.square().mean() for output in outputs).backward()
        model.eval()
        with torch.no_grad():
            return network(images)

    train_and_evaluate()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = train_and_evaluate()
    assert fresh_compiler["unique_graphs"] == 2
    with torch.no_grad():
        for ours, plain in zip(found, model(images), strict=True):
            torch.testing.assert_close(ours, plain)


def test_a_run_compiles_nothing_after_its_first_epoch(
    tiny_voc, flags_of, tmp_path, monkeypatch, no_pictures, fresh_compiler
):
    compile_, train_one_epoch, graphs = torch.compile, ssd.train_one_epoch, []

    def counting(*values, **more):
        graphs.append(counters["stats"]["unique_graphs"])
        return train_one_epoch(*values, **more)

    def compiled(model, *, dynamic, mode):
        return compile_(model, dynamic=dynamic, fullgraph=True, backend="eager")

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(ssd, "train_one_epoch", counting)
    assert ssd.main(flags_of(tiny_voc, tmp_path, "--compile", "--epochs", "3")) == 0
    before, *after = [*graphs, counters["stats"]["unique_graphs"]]
    assert before == 0
    assert after[0] > 0
    assert after == [after[0]] * 3


# ---- on a GPU ----


def assert_close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=tolerance, atol=tolerance)


@needs_gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_targets_losses_and_gradients_are_the_cpu_s(loss):
    batch, anchors = make_batch(), ssd.make_anchors()
    generator = torch.Generator().manual_seed(1)
    shapes = (4, len(anchors), 3), (4, len(anchors), 4)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    results = []
    for device in (CPU, CUDA):
        outputs = [tensor.to(device).requires_grad_() for tensor in made]
        labels, box_targets = ssd.build_targets(ssd.to_device(batch, device), anchors.to(device))
        losses = ssd.detection_loss(outputs, (labels, box_targets), loss=loss)
        gradients = torch.autograd.grad(losses["loss"], outputs)
        assert labels.device.type == losses["loss"].device.type == device.type
        results.append([labels, box_targets, *losses.values(), *gradients])
    assert torch.equal(results[0][0], results[1][0].cpu())
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


@needs_gpu
def test_detections_are_the_cpu_s():
    anchors, candidates = ssd.make_anchors(), 200
    generator = torch.Generator().manual_seed(2)
    cls_logits = torch.zeros(4, len(anchors), 3)
    cls_logits[..., 0] = 12
    for logits in cls_logits:  # scores far enough from one another
        chosen = torch.randperm(len(anchors), generator=generator)[:candidates]
        logits[chosen, 1 + chosen % 2] = 12 + torch.linspace(-3, 3, candidates)
    box_deltas = torch.randn(4, len(anchors), 4, generator=generator)
    found = [
        ssd.detect(cls_logits.to(device), box_deltas.to(device), anchors.to(device)) for device in (CPU, CUDA)
    ]
    for ours, theirs in zip(*found, strict=True):
        assert len(ours[0]) > 20
        assert torch.equal(ours[1], theirs[1].cpu())
        assert_close(ours[0], theirs[0])
        assert_close(ours[2], theirs[2])


@needs_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_have_the_cpu_s_losses_and_weights(optimizer):
    flags = ["--optimizer", optimizer, "--lr", "1e-3", "--batch-norm", "none"]
    (state, args), (other, _) = make_state(CPU, *flags), make_state(CUDA, *flags)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for _ in range(3):
            expected, found = (take_step(one, args, make_batch()) for one in (state, other))
            assert found == pytest.approx(expected, rel=0.01)
    assert_close(
        ssd.build_targets(make_batch(), state.model.anchors)[1],
        ssd.build_targets(ssd.to_device(make_batch(), CUDA), other.model.anchors)[1],
    )
    models = make_state(CPU, *flags)[0].model, state.model, other.model
    moved, differs = 0.0, 0.0
    for before, ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        moved += (ours - before).square().sum().item()
        differs += (ours - theirs.cpu()).square().sum().item()
    assert moved > 0
    assert math.sqrt(differs) < 0.2 * math.sqrt(moved)  # AdamW takes the sign of a gradient that is almost 0


@needs_gpu
@pytest.mark.parametrize("good_before", [0, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_fused_optimizer_skips_a_step_that_is_not_finite(optimizer, good_before):
    state, args = make_state(CUDA, "--optimizer", optimizer)
    assert all(group["fused"] for group in state.optimizer.param_groups)

    def everything():
        moments = itertools.chain.from_iterable(m.values() for m in state.optimizer.state.values())
        tensors = [*state.model.state_dict().values(), *state.ema.model.state_dict().values(), *moments]
        return [tensor.clone() for tensor in tensors if torch.is_tensor(tensor)]

    batch = make_batch()
    for _ in range(good_before):
        assert take_step(state, args, batch)
    before = everything()
    assert take_step(state, args, batch | {"images": batch["images"].float() * math.nan}) is None
    after = everything()
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert state.step == good_before
    assert take_step(state, args, batch)["loss"] > 0


@contextlib.contextmanager
def counted_waits():
    """Yield the list of warnings, one for each time that the device was waited for."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_waits_for_the_gpu_once(loss):
    state, args = make_state(CUDA, "--loss", loss)
    batch = {name: value.pin_memory() for name, value in make_batch().items()}
    take_step(state, args, batch)
    with counted_waits() as caught:
        assert take_step(state, args, batch)
    waits = [str(one.message) for one in caught if "called a synchronizing" in str(one.message)]
    assert len(waits) == 1, waits


@needs_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_of_the_cpu_goes_on_on_the_gpu_as_it_would_there(
    tiny_voc, flags_of, tmp_path, no_pictures, optimizer
):
    same = ["--optimizer", optimizer, "--lr", ".001", "--batch-norm", "none"]
    assert ssd.main(flags_of(tiny_voc, tmp_path, *same)) == 0
    checkpoints = tmp_path / "checkpoints"
    whole = ssd.load_checkpoint(checkpoints / "last.pth")["train_state"]
    (checkpoints / "previous.pth").replace(checkpoints / "last.pth")  # after the first of two epochs
    (checkpoints / "run.json").unlink()  # which says that the run is finished
    flags = ["--resume", "--output-dir", str(tmp_path), "--workers", "0", "--no-compile", "--device", "cuda"]
    assert ssd.main(flags) == 0
    state = ssd.load_checkpoint(checkpoints / "last.pth")["train_state"]
    assert (state["epoch"], state["step"]) == (whole["epoch"], whole["step"]) == (2, 4)
    for column in ("train_loss", "val_loss"):
        ours, theirs = state["history"][-1][column], whole["history"][-1][column]
        assert ours == pytest.approx(theirs, rel=0.02), column
