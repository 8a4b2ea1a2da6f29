"""Training: schedule, optimizer, average, precision, one step, one epoch, stopping, resuming."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import ssd_object_detection as ssd

TINY = [
    "--data",
    "shapes",
    "--width",
    ".0625",
    "--epochs",
    "10",
    "--device",
    "cpu",
    "--amp",
    "off",
    "--lr",
    ".01",
    "--warmup-epochs",
    "2",
]
CPU = torch.device("cpu")


def tiny_args(*more, **settings):
    """Return the Settings of a narrow network; `settings` are entries of the recipe that no flag sets."""
    return dataclasses.replace(ssd.load_settings([*TINY, *more])[0], **settings)


def tiny_state(*more, amp_dtype=None, seed=0, **settings):
    """Return (TrainState, args) of a narrow network of two classes."""
    torch.manual_seed(seed)
    args = tiny_args(*more, **settings)
    machine = ssd.Machine(CPU, amp_dtype, workers=0, compiled=False)
    return ssd.build_state(args, machine, 2)[0], args


def loss_of(args):
    return functools.partial(ssd.detection_loss, loss=args.loss)


@pytest.fixture(scope="module")
def records(tiny_voc):
    return ssd.load_data(str(tiny_voc), val_split="val").train


def loader_of(records, batch_size=4, *, train=False, epochs=(0,)):
    dataset = ssd.VocDataset(records, ssd.build_transform(train=train), ssd.make_anchors())
    sampler = ssd.EpochBatchSampler(len(records), batch_size, epochs=epochs)
    return ssd.make_loader(dataset, batch_sampler=sampler)


def train_once(state, loader, loss, args):
    return ssd.train_one_epoch(state, loader, iter(loader), loss, args)


@pytest.fixture(scope="module")
def batch(records):
    dataset = ssd.VocDataset(records, ssd.build_transform(train=False), ssd.make_anchors())
    return next(iter(ssd.make_loader(dataset, batch_size=4)))


@pytest.fixture(scope="module")
def pair(batch):
    """The batch's first two images: half precision is slow on processors that emulate it."""
    return {name: value[:2] for name, value in batch.items()}


def take_step(state, args, batch, amp_dtype=None):
    """Take one training step; returns the loss before it, None if it was skipped."""
    state.model.train()
    settings = {"lr": args.lr, "clip_grad": args.clip_grad, "amp_dtype": amp_dtype}
    losses = ssd.train_step(state, batch, loss_of(args), **settings)
    return losses and losses["loss"]


def weights(state):
    return [p.detach().clone() for p in state.model.parameters()]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def everything(state):
    """Return copies of all tensors of a state: weights, statistics, average and moments."""
    tensors = [*state.model.state_dict().values(), *state.ema.model.state_dict().values()]
    for moments in state.optimizer.state.values():
        tensors += [value for value in moments.values() if torch.is_tensor(value)]
    return [tensor.detach().clone() for tensor in tensors]


def epoch_of(path):
    return ssd.load_checkpoint(path)["metrics"]["epoch"]


def rows_of(checkpoints):
    return [json.loads(line) for line in (checkpoints / "metrics.jsonl").read_text().splitlines()]


def resume(folder, *flags):
    """Go on with a run in this process; returns the exit code."""
    return ssd.main(["--resume", "--output-dir", str(folder), "--device", "cpu", "--workers", "0", *flags])


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def imagenet(monkeypatch):
    """Random weights in place of the two downloads, {has batch norm: state dict}; sizes of filters differ."""
    torch.manual_seed(5)
    states = {}
    for has_norm, name in ((False, "vgg16"), (True, "vgg16_bn")):
        with torch.device("meta"):
            shapes = getattr(torchvision.models, name)().features.state_dict(prefix="features.")
        states[has_norm] = {key: torch.ones_like(value, device="cpu") for key, value in shapes.items()}
        for value in states[has_norm].values():
            if value.ndim == 4:
                value.mul_(torch.rand(len(value), 1, 1, 1))
        weights = getattr(torchvision.models, f"{name.upper()}_Weights")
        monkeypatch.setattr(weights, "get_state_dict", lambda *_, state=states[has_norm], **__: state)
    return states


@pytest.mark.parametrize(("batch_norm", "has_norm"), [("all", True), ("new", False), ("none", False)])
def test_a_full_width_network_starts_from_the_imagenet_filters(imagenet, batch_norm, has_norm):
    model = tiny_state("--width", "1", "--pretrained", "--batch-norm", batch_norm)[0].model
    assert torch.equal(model.blocks[0][0].weight, imagenet[has_norm]["features.0.weight"])


@pytest.mark.parametrize("batch_norm", ["all", "none"])
def test_a_narrow_network_s_first_layer_has_the_largest_imagenet_filters(imagenet, batch_norm):
    model = tiny_state("--width", ".25", "--pretrained", "--batch-norm", batch_norm)[0].model
    own = model.blocks[0][0].weight.detach()
    filters = imagenet[False]["features.0.weight"]  # without batch norm, whatever the network has
    largest = filters[:, 0, 0, 0].topk(len(own)).indices.sort().values
    ratio = own / filters[largest]
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.mean().item()))  # scaled as a whole


def multiply_adds(model):
    """Return how many multiplications and additions a network takes for one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, ssd.IMAGE_SIZE, ssd.IMAGE_SIZE))
    return counter.get_total_flops() // 2


def test_the_rover_s_network_is_a_tenth_of_the_full_one_and_starts_from_imagenet(imagenet):
    settings, _ = ssd.load_settings(["--data", "voc2007", "--recipe", "rover"])
    machine = ssd.Machine(CPU, amp_dtype=None, workers=0, compiled=False)
    model = ssd.build_state(settings, machine, 20)[0].model
    assert 10 * multiply_adds(model) < multiply_adds(ssd.SSD300(20))
    filters = imagenet[False]["features.0.weight"]
    largest = filters[:, 0, 0, 0].topk(model.blocks[0][0].out_channels).indices.sort().values
    ratio = model.blocks[0][0].weight.detach() / filters[largest]
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.mean().item()))


def test_the_rover_s_recipe_trains_on_one_s_own_folder(tiny_voc, tmp_path, capsys, no_pictures):
    flags = ["--data", tiny_voc, "--recipe", "rover", "--epochs", "1", "--no-pretrained", "--workers", "0"]
    assert ssd.main([*map(str, flags), "--device", "cpu", "--output-dir", str(tmp_path)]) == 0
    assert "recipe   rover: 1 epochs" in capsys.readouterr().out
    final = ssd.load_checkpoint(tmp_path / "checkpoints" / "ssd_tiny_set_final.pth")
    assert final["classes"] == ["angular", "round"]
    assert final["config"]["width"] < 0.5


# ---- learning rate ----


def test_the_rate_rises_by_equal_steps_to_its_peak_and_then_falls():
    args, steps = tiny_args(), 5  # 10 epochs of 5 steps, 10 of them warm-up
    rates = [ssd.learning_rate(step, args, steps) for step in range(50)]
    assert rates[:10] == pytest.approx([0.01 * (i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[10] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_the_cosine_is_half_way_in_the_middle_and_a_hundredth_at_the_end():
    args = tiny_args()
    assert ssd.learning_rate(30, args, 5) == pytest.approx(0.01 * (0.01 + 0.99 / 2))
    assert ssd.learning_rate(50, args, 5) == pytest.approx(0.0001)
    quarter = 0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2
    assert ssd.learning_rate(20, args, 5) == pytest.approx(0.01 * quarter)
    assert ssd.learning_rate(10_000, args, 5) == pytest.approx(0.0001)


def test_without_a_warm_up_the_first_step_has_the_peak_rate():
    assert ssd.learning_rate(0, tiny_args("--warmup-epochs", "0", "--epochs", "1"), 1) == pytest.approx(0.01)


def test_the_step_schedule_drops_to_a_tenth_at_two_thirds_and_to_a_hundredth_at_five_sixths():
    args = tiny_args("--epochs", "6", "--warmup-epochs", "1", schedule="step")
    rates = [ssd.learning_rate(step, args, 2) for step in range(12)]
    assert rates == pytest.approx([0.005] + [0.01] * 7 + [0.001] * 2 + [0.0001] * 2)


def test_a_warm_up_longer_than_the_run_stays_finite_and_below_the_peak():
    args = tiny_args("--warmup-epochs", "5", "--epochs", "2")
    assert ssd.learning_rate(9, args, 5) == pytest.approx(0.01 * 10 / 25)


# ---- optimizer ----


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_falls_on_convolutions_and_not_on_biases_and_norms(name):
    state, args = tiny_state("--optimizer", name, "--weight-decay", ".03", momentum=0.7)
    assert isinstance(state.optimizer, {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name])
    groups = state.optimizer.param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(state.model.named_parameters())
    assert len(decay_of) == len(named)
    for name_, parameter in named.items():
        is_kernel = name_.endswith("weight") and parameter.ndim == 4
        assert decay_of[id(parameter)] == (0.03 if is_kernel else 0.0), name_
    for group in groups:
        assert group["lr"] == args.lr
        assert (group["momentum"] if name == "sgd" else group["betas"][0]) == 0.7


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "sgd"],
        ["--optimizer", "adamw"],
        ["--loss", "multibox", "--lr", ".0005"],  # other negatives are mined after each step
        ["--batch-norm", "none", "--optimizer", "sgd"],
    ],
)
def test_steps_lower_the_loss_of_a_fixed_batch(batch, flags):
    state, args = tiny_state("--lr", ".002", *flags)
    losses = [take_step(state, args, batch) for _ in range(4)]
    assert losses[1] < losses[0]
    assert losses[3] < losses[0]
    assert state.step == 4


def test_frozen_blocks_keep_their_weights_and_statistics_while_the_rest_learns(batch):
    state, args = tiny_state(freeze_blocks=2, init_from="trained.pth")
    before = copy.deepcopy(state.model.state_dict())
    for _ in range(2):
        take_step(state, args, batch)
    for name, value in state.model.state_dict().items():
        if name.startswith(("blocks.0.", "blocks.1.")):
            assert torch.equal(value, before[name]), name
        elif name.startswith(("blocks.", "fc.", "extras.", "cls_heads.")):
            assert not torch.equal(value, before[name]), name
    optimized = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in state.model.blocks[:2].parameters()}


def test_clipping_bounds_the_norm_of_a_step(batch):
    flags = ["--optimizer", "sgd", "--weight-decay", "0", "--lr", "1"]
    for clip, bounded in ((0.01, True), (0.0, False)):
        state, args = tiny_state(*flags, momentum=0.0, clip_grad=clip)
        before = flat(weights(state))
        take_step(state, args, batch)
        moved = (flat(weights(state)) - before).norm()
        assert (moved <= 0.0101) == bounded
        assert moved > 0.005


# ---- average ----


def test_the_average_follows_its_formula_for_weights_and_statistics():
    model = torch.nn.BatchNorm2d(1)
    ema = ssd.Ema(model, decay=0.3)
    expected = {"weight": 1.0, "running_mean": 0.0}
    for step, value in enumerate((3.0, -2.0, 8.0, 1.0), start=1):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(10 * value)
        ema.update(step)
        decay = (2 / 11, 3 / 12, 0.3, 0.3)[step - 1]  # rising, until it has its full value
        expected["weight"] = decay * expected["weight"] + (1 - decay) * value
        expected["running_mean"] = decay * expected["running_mean"] + (1 - decay) * 10 * value
        for name, number in expected.items():
            assert getattr(ema.model, name).item() == pytest.approx(number, rel=1e-6), (step, name)


def test_the_average_is_a_copy_that_needs_no_gradient_and_stays_in_evaluation_mode(batch):
    state, args = tiny_state(ema_decay=1.0)
    take_step(state, args, batch)
    assert not state.ema.model.training
    assert not any(p.requires_grad for p in state.ema.model.parameters())
    assert state.model.training
    pairs = zip(state.model.parameters(), state.ema.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_decay_of_zero_copies_the_network(batch):
    state, args = tiny_state(ema_decay=0.0)
    take_step(state, args, batch)
    averaged = state.ema.model.state_dict()
    for name, value in state.model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(averaged[name], value), name


# ---- precision and device ----


def test_the_precision_named_by_the_flag_is_taken():
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", None)):
        assert ssd.pick_amp_dtype(CPU, name) is dtype
        assert ssd.pick_amp_dtype(torch.device("cuda"), name) is dtype


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_takes_bfloat16_only_where_it_is_not_emulated(monkeypatch, native, dtype):
    def is_supported(including_emulation=True):
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert ssd.pick_amp_dtype(torch.device("cuda"), "auto") is dtype


@pytest.mark.parametrize(
    ("capabilities", "used", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False}, "AVX512", None),
        ({"avx512_bf16": True}, "AVX512", torch.bfloat16),
        ({"avx512_bf16": True}, "AVX2", None),  # ATEN_CPU_CAPABILITY=avx2
        ({}, "DEFAULT", None),
        ({"bf16": True}, "DEFAULT", torch.bfloat16),  # Arm
        ({"amx_bf16": True}, "AVX512", torch.bfloat16),
    ],
)
def test_a_cpu_takes_bfloat16_only_with_instructions_for_it(monkeypatch, capabilities, used, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    assert ssd.pick_amp_dtype(CPU, "auto") is dtype


def test_a_step_in_bfloat16_has_a_finite_loss_near_that_of_float32(pair):
    (state, args), (other, _) = tiny_state(), tiny_state(amp_dtype=torch.bfloat16)
    full = take_step(state, args, pair)
    half = take_step(other, args, pair, torch.bfloat16)
    assert half == pytest.approx(full, rel=0.05)
    assert half != full
    assert not other.scaler.is_enabled()
    assert all(torch.isfinite(p).all() for p in other.model.parameters())
    assert all(p.dtype == torch.float32 for p in other.model.parameters())


def test_a_step_in_float16_scales_the_loss_and_has_finite_weights(pair):
    state, args = tiny_state(amp_dtype=torch.float16)
    assert state.scaler.is_enabled()
    before = weights(state)
    try:
        for _ in range(25):  # the scale is lowered until a gradient fits
            loss = take_step(state, args, pair, torch.float16)
            if loss is not None:
                break
    except RuntimeError as error:
        pytest.skip(f"no float16 on this processor: {error}")
    assert math.isfinite(loss)
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(weights(state), before, strict=True))


def test_gradients_are_unscaled_before_they_are_clipped(batch):
    flags = ["--optimizer", "sgd", "--weight-decay", "0"]
    plain, args = tiny_state(*flags, momentum=0.0, clip_grad=0.5)
    scaled, _ = tiny_state(*flags, momentum=0.0, clip_grad=0.5)
    scaled.scaler = torch.amp.GradScaler("cpu")
    start = flat(weights(plain))
    take_step(plain, args, batch)
    take_step(scaled, args, batch)
    expected = flat(weights(plain)) - start
    moved = flat(weights(scaled)) - start
    assert expected.norm() > 1e-3
    assert (moved - expected).norm() < 1e-3 * expected.norm()


def test_a_gradient_that_overflows_float16_costs_a_step_and_lowers_the_scale(batch):
    state, args = tiny_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = everything(state)

    def overflowing(*values, **more):
        return {name: value * 1e36 for name, value in loss_of(args)(*values, **more).items()}

    assert ssd.train_step(state, batch, overflowing, lr=0.1, clip_grad=10.0, amp_dtype=None) is None
    assert_equal(everything(state), before)
    assert state.scaler.get_scale() == 2.0**15


def test_a_device_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ssd.pick_device("auto").type == "cpu"
    for name in ("nonsense", "cuda:77", "meta"):
        with pytest.raises(ssd.InputError, match=name) as caught:
            ssd.pick_device(name)
        assert len(str(caught.value).splitlines()) == 1


# ---- steps that are not finite ----


@pytest.mark.parametrize(
    ("flags", "settings"),
    [(["--optimizer", "sgd"], {}), (["--optimizer", "adamw"], {}), ([], {"clip_grad": 0.0})],
)
@pytest.mark.parametrize("good_before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(batch, flags, settings, good_before):
    (state, args), (other, _) = tiny_state(*flags, **settings), tiny_state(*flags, **settings)
    for _ in range(good_before):
        take_step(state, args, batch)
        take_step(other, args, batch)
    before = everything(state)
    poisoned = batch | {"images": batch["images"].float() * math.nan}  # which reaches the batch norms
    assert take_step(state, args, poisoned) is None
    assert_equal(everything(state), before)
    assert state.step == good_before
    assert take_step(state, args, batch) == take_step(other, args, batch)
    assert_equal(everything(state), everything(other))


@pytest.mark.parametrize(
    "poison",
    [
        pytest.param(lambda x: (x * math.inf).sum(), id="loss"),
        pytest.param(lambda x: (x - x.detach()).abs().pow(0.3).sum(), id="only its gradient"),
    ],
)
def test_a_loss_or_only_its_gradient_that_is_not_finite_is_found(batch, poison):
    state, _ = tiny_state()
    state.model.train()
    before = everything(state)

    def loss(outputs, targets, **more):
        return {"loss": poison(outputs[0])}

    assert ssd.train_step(state, batch, loss, lr=0.1, clip_grad=10.0, amp_dtype=None) is None
    assert_equal(everything(state), before)


def poisoning(args, *steps):
    """Return a loss that is NaN in the steps given, counted from 0."""
    whole, calls = loss_of(args), itertools.count()

    def loss(outputs, targets, **more):
        factor = math.nan if next(calls) in steps else 1.0
        return {name: value * factor for name, value in whole(outputs, targets, **more).items()}

    return loss


def test_a_skipped_step_is_named_counted_and_left_out_of_the_means(records, capsys):
    state, args = tiny_state()
    losses, loss = [], poisoning(args, 1)

    def watched(*values, **more):
        losses.append(loss(*values, **more))
        return losses[-1]

    loader = loader_of(records, 2)
    row = train_once(state, loader, watched, args)
    assert row["skipped"] == 1
    assert state.step == 3
    good = [one["loss"].item() for one in losses if math.isfinite(one["loss"].item())]
    assert row["train_loss"] == pytest.approx(sum(good) / 3, rel=1e-6)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: step skipped, epoch 1, step 2: ")
    names = [records[i].image_id for i, _ in list(loader.batch_sampler)[1]]
    assert line.endswith(", ".join(names))


def test_three_skipped_steps_in_a_row_end_the_epoch_and_name_the_images(records):
    state, args = tiny_state()
    before, loader = everything(state), loader_of(records, 2)
    with pytest.raises(ssd.InputError, match="3 in a row") as caught:
        train_once(state, loader, poisoning(args, 0, 1, 2), args)
    assert_equal(everything(state), before)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "--lr" in message
    assert ", ".join(records[i].image_id for i, _ in list(loader.batch_sampler)[2]) in message


def test_float16_may_skip_more_steps_while_it_seeks_its_scale(records):
    state, args = tiny_state()
    state.scaler = torch.amp.GradScaler("cpu")
    assert train_once(state, loader_of(records, 1), poisoning(args, *range(5)), args)["skipped"] == 5


def test_skipped_steps_count_over_epochs_of_one_step(records):
    state, args = tiny_state()
    loader, loss = loader_of(records, len(records)), poisoning(args, 0, 1, 3, 4, 5)
    rows = [train_once(state, loader, loss, args) for _ in range(5)]
    assert [row["skipped"] for row in rows] == [1, 1, 0, 1, 1]
    assert [math.isnan(row["train_loss"]) for row in rows] == [True, True, False, True, True]
    with pytest.raises(ssd.InputError, match="3 in a row"):
        train_once(state, loader, loss, args)


def test_a_run_without_a_scaler_goes_on_with_one():
    (old, _), (new, _) = tiny_state(), tiny_state(amp_dtype=torch.float16, seed=1)
    new.load_state_dict(old.state_dict(), old.ema.model.state_dict())
    assert_equal(everything(new), everything(old))
    old.load_state_dict(new.state_dict(), new.ema.model.state_dict())


def test_skipped_steps_with_good_ones_between_do_not_end_the_epoch(records):
    state, args = tiny_state()
    row = train_once(state, loader_of(records, 1), poisoning(args, 0, 1, 3, 4, 6, 7), args)
    assert row["skipped"] == 6


def test_a_run_that_gets_no_finite_gradient_ends_with_exit_code_2_and_loses_nothing(
    tiny_voc, flags_of, same_run, tmp_path, monkeypatch, capsys, no_pictures
):
    flags = ("--batch-size", "2", "--epochs", "3")  # four steps an epoch
    assert ssd.main(flags_of(tiny_voc, tmp_path / "whole", *flags)) == 0
    whole, calls = ssd.detection_loss, itertools.count()

    def broken(*values, num_positive=None, **more):
        is_broken = num_positive is not None and next(calls) >= 9  # validation is left alone
        losses = whole(*values, num_positive=num_positive, **more)
        return {name: value * math.nan for name, value in losses.items()} if is_broken else losses

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(ssd, "detection_loss", broken)
        assert ssd.main(flags_of(tiny_voc, tmp_path / "broken", *flags)) == 2
    *skipped, message = capsys.readouterr().err.splitlines()
    assert len(skipped) == 2
    assert all("epoch 3" in line and "train_" in line for line in skipped)
    assert message.startswith("error: epoch 3, step 4")
    saved = ssd.load_checkpoint(tmp_path / "broken" / "checkpoints" / "last.pth", resumable=True)
    assert saved["train_state"]["epoch"] == 2  # it waited in memory
    assert resume(tmp_path / "broken") == 0
    same_run(tmp_path / "broken", tmp_path / "whole")


# ---- one epoch ----


def test_an_epoch_returns_finite_means_and_counts_its_steps(records):
    state, args = tiny_state()
    loader = loader_of(records, 3, train=True)  # 8 images: two steps, the rest is dropped
    row = train_once(state, loader, loss_of(args), args)
    assert state.step == 2
    assert state.epoch == 0  # `fit` counts epochs
    for name in ("train_loss", "train_loss_cls", "train_loss_box", "images_per_s", "data_wait"):
        assert math.isfinite(row[name]), name
    assert row["train_loss"] == pytest.approx(row["train_loss_cls"] + row["train_loss_box"], rel=1e-5)
    assert row["lr"] == ssd.learning_rate(1, args, 2)
    assert {group["lr"] for group in state.optimizer.param_groups} == {row["lr"]}


def test_each_epoch_asks_for_its_own_order_and_augmentation(records):
    state, args = tiny_state()
    loader, seen = loader_of(records, 8, train=True, epochs=(0, 1, 0)), []

    def watched(outputs, targets, **more):
        seen.append([value.clone() for value in targets])
        return loss_of(args)(outputs, targets, **more)

    batches = iter(loader)
    for epoch in (0, 1, 0):
        state.epoch = state.step = epoch
        ssd.train_one_epoch(state, loader, batches, watched, args)
    assert next(batches, None) is None
    assert_equal(seen[0], seen[2])
    assert not torch.equal(seen[0][0], seen[1][0])
    rows = [sorted(labels.sum().item() for labels in targets[0]) for targets in seen]
    assert rows[0] != pytest.approx(rows[1])  # not the same samples in another order


@pytest.mark.parametrize("empty_every", [1, 2])
def test_batches_in_which_some_or_all_images_have_no_object_train(make_voc, tmp_path, empty_every):
    root = make_voc(tmp_path / "voc", {"train": 4}, empty_every=empty_every)
    records, _ = ssd.read_records(root, "train", ("angular", "round"))
    assert sum(len(r.labels) == 0 for r in records) == 4 // empty_every
    state, args = tiny_state()
    before = weights(state)
    row = train_once(state, loader_of(records, 2, train=True), loss_of(args), args)
    assert math.isfinite(row["train_loss"])
    assert row["train_loss_cls"] > 0
    assert (row["train_loss_box"] == 0) == (empty_every == 1)
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(weights(state), before, strict=True))


def test_a_few_images_are_learnt_by_heart(records):
    state, args = tiny_state("--epochs", "50")
    loader = loader_of(records[:4])
    for epoch in range(args.epochs):
        state.epoch = epoch
        train_once(state, loader, loss_of(args), args)
    dataset = ssd.VocDataset(records[:4], ssd.build_transform(train=False), ssd.make_anchors())
    assert ssd.measure(state.ema.model, ssd.make_loader(dataset, batch_size=4))["map_area"] > 0.95


# ---- fit ----


def run_fit(monkeypatch, folder, maps, *flags, val=True):
    """Run `fit` on a script: maps are the validation mAPs in turn. Returns (state, validated epochs)."""
    state, args = tiny_state(*flags)
    values, validated = iter(maps), []
    row = {
        "train_loss": 1.0,
        "train_loss_cls": 0.5,
        "train_loss_box": 0.5,
        "lr": 1e-3,
        "images_per_s": 1.0,
        "data_wait": 0.0,
        "skipped": 0,
    }

    def evaluate(model, loader, *, amp_dtype, loss, nms_iou_thresh, is_shared):
        assert model is state.ema.model  # whose weights are saved
        assert (amp_dtype, nms_iou_thresh) == (torch.bfloat16, args.nms_iou)
        validated.append(state.epoch + 1)  # an epoch is finished when it is validated
        value = next(values)
        return {
            "loss": 1.0,
            "loss_cls": 0.5,
            "loss_box": 0.5,
            "classes": {},
            "map_area": value,
            "map11": 1 - value,
            "map75": 1 - value,
        }  # the area alone chooses

    def train(state, loader, batches, loss, args, *, amp_dtype):
        assert amp_dtype is torch.bfloat16
        return dict(row)

    monkeypatch.setattr(ssd, "train_one_epoch", train)
    monkeypatch.setattr(ssd, "measure", evaluate)
    writer = ssd.CheckpointWriter(folder, {"config": {}, "classes": []})
    ssd.fit(
        state,
        ("loader", "loader" if val else None),
        args,
        loss=None,
        amp_dtype=torch.bfloat16,
        writer=writer,
        redraw=lambda state: None,
    )
    writer.flush()
    return state, validated


def test_training_stops_after_the_patience_without_a_better_map(monkeypatch, tmp_path, capsys):
    state, _ = run_fit(monkeypatch, tmp_path, [0.1, 0.3, 0.2, 0.3, 0.29, 0.9], "--patience", "3")
    assert state.epoch == epoch_of(tmp_path / "last.pth") == 5
    assert (state.best_map, state.best_epoch) == (0.3, 2)
    assert epoch_of(tmp_path / "best.pth") == 2
    assert "--patience" in capsys.readouterr().out


def test_patience_zero_never_stops(monkeypatch, tmp_path):
    state, _ = run_fit(monkeypatch, tmp_path, [0.5] + [0.1] * 9, "--patience", "0")
    assert state.epoch == 10
    assert state.best_epoch == 1


def test_patience_counts_validations_and_not_epochs(monkeypatch, tmp_path):
    flags = ["--patience", "2", "--eval-interval", "2"]
    state, validated = run_fit(monkeypatch, tmp_path, [0.5, 0.1, 0.1, 0.1], *flags)
    assert validated == [2, 4, 6]
    assert state.epoch == 6


def test_a_run_that_stopped_early_does_not_train_on_when_it_is_resumed(monkeypatch, tmp_path):
    state, _ = run_fit(monkeypatch, tmp_path, [0.5, 0.1, 0.1], "--patience", "2")
    monkeypatch.setattr(ssd, "train_one_epoch", None)
    writer = ssd.CheckpointWriter(tmp_path, {"config": {}, "classes": []})
    args = tiny_args("--patience", "2")
    ssd.fit(state, ("loader", "loader"), args, loss=None, amp_dtype=None, writer=writer, redraw=None)
    assert state.epoch == 3


def test_validation_keeps_its_interval_and_always_follows_the_last_epoch(monkeypatch, tmp_path):
    flags = ["--epochs", "5", "--eval-interval", "2"]
    state, validated = run_fit(monkeypatch, tmp_path, [0.1, 0.2, 0.3], *flags)
    assert validated == [2, 4, 5]
    rows = rows_of(tmp_path)
    assert ["val_map_area" in row for row in rows] == [False, True, False, True, True]
    assert state.history == rows


def test_without_held_out_images_there_is_no_best_checkpoint(monkeypatch, tmp_path):
    _, validated = run_fit(monkeypatch, tmp_path, [], "--epochs", "2", val=False)
    assert validated == []
    assert epoch_of(tmp_path / "last.pth") == 2
    assert not (tmp_path / "best.pth").exists()


def test_a_validation_list_without_an_object_keeps_the_newest_weights_as_best(monkeypatch, tmp_path):
    run_fit(monkeypatch, tmp_path, [math.nan] * 3, "--epochs", "3")
    assert epoch_of(tmp_path / "best.pth") == 3

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


# ---- resuming ----


def test_a_saved_state_comes_back_with_both_sets_of_weights_moments_and_counters(tmp_path, batch):
    state, args = tiny_state()
    take_step(state, args, batch)
    state.epoch, state.best_map, state.best_epoch, state.history = 3, 0.25, 2, [{"epoch": 1}]
    averaged = state.ema.model.state_dict()
    ssd.save_checkpoint(
        tmp_path / "last.pth",
        {"model": averaged, "config": {}, "classes": [], "train_state": state.state_dict()},
    )
    loaded = ssd.load_checkpoint(tmp_path / "last.pth", resumable=True)
    other, _ = tiny_state(seed=1)
    other.load_state_dict(loaded["train_state"], loaded["model"])
    assert (other.epoch, other.step, other.history) == (3, 1, [{"epoch": 1}])
    assert (other.best_map, other.best_epoch) == (0.25, 2)
    assert_equal(everything(other), everything(state))
    assert not torch.equal(other.model.l2_norm.weight, other.ema.model.l2_norm.weight)
    assert take_step(other, args, batch) == take_step(state, args, batch)
    assert_equal(everything(other), everything(state))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.contiguous_format, torch.channels_last), (torch.channels_last, torch.contiguous_format)],
)
def test_moments_take_the_memory_order_of_their_parameter(batch, optimizer, before, after):
    """A run of a GPU, in channels_last, goes on on a CPU and the other way round."""

    def state_in(order):
        state, args = tiny_state("--optimizer", optimizer)
        state.model.to(memory_format=order)
        return state, args

    (state, args), (other, _) = state_in(before), state_in(after)
    take_step(state, args, batch)
    saved = copy.deepcopy((state.state_dict(), state.ema.model.state_dict()))
    other.load_state_dict(*saved)
    kernels = [p for p in other.model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels
    for parameter in kernels:
        assert parameter.is_contiguous(memory_format=after)
        for value in other.optimizer.state[parameter].values():
            assert value.shape != parameter.shape or value.stride() == parameter.stride()
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in zip(state.model.parameters(), other.model.parameters(), strict=True):
        gradient = torch.randn(ours.shape, generator=generator)
        ours.grad = torch.empty_like(ours).copy_(gradient)
        theirs.grad = torch.empty_like(theirs).copy_(gradient)
    state.optimizer.step()
    other.optimizer.step()
    for ours, theirs in zip(weights(state), weights(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


KILLED = """
import os, signal, sys
import ssd_object_detection as ssd

train_one_epoch = ssd.train_one_epoch

def killed(state, *args, **more):
    if state.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_one_epoch(state, *args, **more)

ssd.SAVE_SECONDS = 1e9
ssd.train_one_epoch = killed
ssd.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def three_epochs(tiny_voc, flags_of, tmp_path_factory):
    """The folder of an uninterrupted run of three epochs."""
    folder = tmp_path_factory.mktemp("whole")
    assert ssd.main(flags_of(tiny_voc, folder, "--epochs", "3")) == 0
    return folder


def test_a_run_killed_after_an_epoch_that_was_not_saved_goes_on_to_the_same_bits(
    tiny_voc, flags_of, three_epochs, same_run, tmp_path, no_pictures
):
    same = {"PYTHONPATH": str(Path(ssd.__file__).parent), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, *flags_of(tiny_voc, tmp_path, "--epochs", "3")]
    done = subprocess.run(
        command, env=os.environ | same, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = tmp_path / "checkpoints"
    assert len(rows_of(checkpoints)) == 2
    assert ssd.load_checkpoint(checkpoints / "last.pth", resumable=True)["train_state"]["epoch"] == 1
    torch.manual_seed(12345)
    np.random.seed(12345)
    assert resume(tmp_path, "--workers", "1", "--no-cache") == 0
    same_run(tmp_path, three_epochs)


@pytest.mark.parametrize(("place", "call"), [("train_step", 6), ("best_thresholds", 3)])  # of the third epoch
def test_an_interrupted_run_saves_its_last_epoch_and_goes_on_to_the_same_bits(
    tiny_voc, flags_of, three_epochs, same_run, tmp_path, monkeypatch, capsys, no_pictures, place, call
):
    whole, calls = getattr(ssd, place), itertools.count(1)

    def interrupt(*args, **more):
        if next(calls) == call:
            raise KeyboardInterrupt
        return whole(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ssd, place, interrupt)
        assert ssd.main(flags_of(tiny_voc, tmp_path, "--epochs", "3")) == 130
    assert f"--resume --output-dir {tmp_path}" in capsys.readouterr().err
    saved = ssd.load_checkpoint(tmp_path / "checkpoints" / "last.pth", resumable=True)
    assert saved["train_state"]["epoch"] == 2
    assert not (tmp_path / "checkpoints" / "ssd_tiny_set_final.pth").exists()
    assert resume(tmp_path) == 0
    same_run(tmp_path, three_epochs)


def test_a_finished_run_can_be_trained_longer(tiny_run, tmp_path, no_pictures):
    shutil.copytree(tiny_run.output / "checkpoints", tmp_path / "checkpoints")
    assert resume(tmp_path, "--epochs", "3") == 0
    assert [row["epoch"] for row in rows_of(tmp_path / "checkpoints")] == [1, 2, 3]
    args = ssd.load_checkpoint(tmp_path / "checkpoints" / "last.pth")["args"]
    assert (args["epochs"], args["lr"]) == (3, 0.005)


def test_a_flag_beats_the_saved_weight_decay(tiny_run, tmp_path, no_pictures):
    shutil.copytree(tiny_run.output / "checkpoints", tmp_path / "checkpoints")
    assert resume(tmp_path, "--epochs", "3", "--weight-decay", ".5") == 0
    saved = ssd.load_checkpoint(tmp_path / "checkpoints" / "last.pth", resumable=True)
    groups = saved["train_state"]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [saved["args"]["weight_decay"], 0.0] == [0.5, 0.0]


def test_resuming_with_another_optimizer_is_one_line(tiny_run, tmp_path, no_pictures, fails):
    shutil.copytree(tiny_run.output / "checkpoints", tmp_path / "checkpoints")
    flags = ["--epochs", "3", "--optimizer", "sgd", "--device", "cpu", "--workers", "0"]
    assert "not of SGD" in fails(["--resume", "--output-dir", tmp_path, *flags])


def test_a_run_resumed_without_its_best_checkpoint_measures_the_best_to_come(tiny_run, tmp_path, no_pictures):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name, epochs in (("previous.pth", 1), ("last.pth", 2)):  # one epoch is left; none is
        saved = ssd.load_checkpoint(tiny_run.output / "checkpoints" / name, resumable=True)
        saved["train_state"] |= {"best_map": 0.99, "best_epoch": epochs}  # which no epoch to come will reach
        ssd.save_checkpoint(checkpoints / "last.pth", saved)
        for stale in ("best.pth", "run.json", tiny_run.final.name):  # by run.json the run would be finished
            (checkpoints / stale).unlink(missing_ok=True)
        assert resume(tmp_path) == 0
        assert (checkpoints / "best.pth").is_file() == (epochs == 1)
        assert epoch_of(checkpoints / "ssd_tiny_set_final.pth") == 2


def test_the_final_checkpoint_is_the_best_and_not_the_last(tiny_run, tmp_path, no_pictures):
    source, checkpoints = tiny_run.output / "checkpoints", tmp_path / "checkpoints"
    checkpoints.mkdir()
    shutil.copy(source / "last.pth", checkpoints)
    shutil.copy(source / "previous.pth", checkpoints / "best.pth")  # after the first of two epochs
    assert resume(tmp_path) == 0  # nothing is left to train
    assert epoch_of(checkpoints / tiny_run.final.name) == 1


# ---- from the flags to the run ----


def test_the_flags_reach_the_loss_the_loaders_and_the_generators(
    tiny_voc, flags_of, tmp_path, monkeypatch, no_pictures
):
    seen = {}

    def stop(state, loaders, args, **more):
        seen.update(more, loaders=loaders)
        raise ssd.InputError("far enough")

    monkeypatch.setattr(ssd, "fit", stop)
    chances = {"zoom-out": 0.1, "crop": 0.2, "color": 0.3, "shadow": 0.4, "noise": 0.6, "blur": 0.7}
    more = [word for name, chance in chances.items() for word in (f"--{name}", str(chance))]
    flags = ["--loss", "multibox", "--seed", "7", "--amp", "bf16", *more]
    assert ssd.main(flags_of(tiny_voc, tmp_path, *flags)) == 2
    assert seen["loss"].keywords == {"loss": "multibox", "gamma": 1.0}
    assert seen["amp_dtype"] is torch.bfloat16
    assert torch.initial_seed() == 7
    train, val = seen["loaders"]
    chances = {type(step).__name__: step.p for step in train.dataset.transform.transforms}
    assert (chances["SSDZoomOut"], chances["SSDCrop"], chances["ColorJitter"]) == (0.1, 0.2, 0.3)
    assert (chances["Shadow"], chances["Noise"], chances["GaussianBlur"]) == (0.4, 0.6, 0.7)
    assert (train.dataset.seed, train.batch_sampler.seed) == (7, 7)
    assert list(train.batch_sampler.epochs) == [0, 1]
    assert len(train.dataset.pixels) == len(train.dataset) == 8
    assert len(val.dataset.transform.transforms) == 1
    assert {record.image_id.split("_")[0] for record in val.dataset.records} == {"val"}


def test_each_process_loads_its_own_share(records, monkeypatch):
    state, args = tiny_state("--batch-size", "4", "--workers", "0")
    data = ssd.DataSplits("a", ("angular", "round"), records, [], [], {})
    monkeypatch.setattr(ssd, "process_rank", lambda: (1, 2))
    machine = ssd.Machine(CPU, None, workers=0, compiled=False)
    loader, val_loader = ssd.make_loaders(args, machine, data, state)
    assert (loader.batch_sampler.rank, loader.batch_sampler.world, val_loader) == (1, 2, None)
    assert [len(batch["indices"]) for batch in itertools.islice(loader, 2)] == [2, 2]


def test_the_prior_is_of_the_focal_loss_alone_and_a_resumed_run_fetches_nothing(monkeypatch):
    for loss, bias in (("focal", math.log(0.99 / 0.01 * 2)), ("multibox", 0.0)):
        head = tiny_state("--loss", loss)[0].model.cls_heads[0]
        assert head.bias.view(-1, 3)[:, 0].tolist() == pytest.approx([bias] * 4)
    monkeypatch.setattr(ssd, "fetch_backbone", lambda *_, **__: pytest.fail("fetched"))
    tiny_state("--width", ".25", "--pretrained", resume=True)


# ---- starting from a checkpoint ----


def start_of(folder, *flags):
    """Return the state, before its first step, of a run with --init-from and these flags."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ssd,
            "fit",
            lambda state, *args, **more: (
                seen.append(state) or (_ for _ in ()).throw(ssd.InputError("far enough"))
            ),
        )
        flags = ["--output-dir", folder, "--device", "cpu", "--workers", "0", *flags]
        assert ssd.main(list(map(str, flags))) == 2
    return seen[0]


def test_a_run_starts_from_the_weights_of_another_with_its_recipe_and_its_own_schedule(
    tiny_run, tmp_path, capsys, no_pictures
):
    saved = ssd.load_checkpoint(tiny_run.final)
    state = start_of(tmp_path, "--init-from", tiny_run.final, "--epochs", "5")
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, saved["model"][name]), name
        assert torch.equal(state.ema.model.state_dict()[name], value), name
    assert (state.epoch, state.step, state.best_epoch, state.history) == (0, 0, 0, [])
    assert not state.optimizer.state
    out = capsys.readouterr().out
    assert "kept the heads of: angular, round" in out
    assert "recipe   small: 5 epochs" in out


def test_heads_of_shared_classes_are_kept_and_others_begin_anew(
    tiny_run, make_voc, tmp_path, capsys, no_pictures
):
    root = make_voc(tmp_path / "other")
    for path in (root / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("<name>angular</name>", "<name>zigzag</name>"))
    state = start_of(tmp_path, "--init-from", tiny_run.final, "--data", root)
    assert "kept the heads of: round" in capsys.readouterr().out
    saved = ssd.load_checkpoint(tiny_run.final)["model"]
    shared, fresh = [0, 1], 2  # background and round stand first now
    for number, count in enumerate(state.model.anchors_per_cell):
        for part in ("weight", "bias"):
            name = f"cls_heads.{number}.{part}"
            own = state.model.state_dict()[name].view(count, 3, -1)
            old = saved[name].view(count, 3, -1)
            assert torch.equal(own[:, shared], old[:, [0, 2]])
            assert not torch.equal(own[:, fresh], old[:, 1])
        name = f"box_heads.{number}.weight"
        assert torch.equal(state.model.state_dict()[name], saved[name])


def test_a_class_called_background_keeps_its_head(make_voc, tmp_path, capsys, no_pictures, flags_of):
    root = make_voc(tmp_path / "named")
    for path in (root / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("<name>angular</name>", "<name>background</name>"))
    assert ssd.main(flags_of(root, tmp_path / "first", "--epochs", "1")) == 0
    source = tmp_path / "first" / "checkpoints" / "ssd_named_final.pth"
    state = start_of(tmp_path / "second", "--init-from", source)
    assert "kept the heads of: background, round" in capsys.readouterr().out
    saved = ssd.load_checkpoint(source)["model"]
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_other_anchors_get_new_heads(tiny_run, tmp_path, capsys, monkeypatch, no_pictures):
    sizes = [[[0.1 * (k + 1), 0.1] for k, _ in enumerate(pairs)] for pairs in ssd.ANCHOR_SIZES]
    monkeypatch.setattr(ssd, "fit_anchor_sizes", lambda boxes: sizes)
    state = start_of(tmp_path, "--init-from", tiny_run.final, "--anchors", "fit")
    assert "new heads" in capsys.readouterr().out
    saved = ssd.load_checkpoint(tiny_run.final)["model"]
    for name, value in state.model.state_dict().items():
        if "_heads." not in name and name != "anchors":
            assert torch.equal(value, saved[name]), name
        elif name.endswith("weight"):
            assert not torch.equal(value, saved[name]), name
    assert torch.equal(state.model.anchors, ssd.make_anchors(sizes))


def test_a_run_from_a_checkpoint_trains_and_resumes(tiny_run, tmp_path, no_pictures):
    flags = ["--init-from", tiny_run.final, "--epochs", "1", "--output-dir", tmp_path, "--device", "cpu"]
    assert ssd.main([*map(str, flags), "--workers", "0"]) == 0
    assert resume(tmp_path, "--epochs", "2") == 0
    assert [row["epoch"] for row in rows_of(tmp_path / "checkpoints")] == [1, 2]


@pytest.mark.parametrize("flag", [("--recipe", "voc"), ("--width", ".5"), ("--batch-norm", "none")])
def test_another_network_than_that_of_a_checkpoint_to_start_from_is_refused(tiny_run, capsys, flag):
    assert ssd.main(["--init-from", str(tiny_run.final), *flag]) == 2
    assert "--init-from keeps its run's recipe, width and batch norm" in capsys.readouterr().err


def test_blocks_of_a_checkpoint_may_be_frozen(tiny_run, tmp_path, no_pictures):
    state = start_of(tmp_path, "--init-from", tiny_run.final, "--freeze-blocks", "3")
    assert [all(p.requires_grad for p in block.parameters()) for block in state.model.blocks] == [
        False,
        False,
        False,
        True,
        True,
    ]


# ---- whole runs ----


def test_training_on_every_image_tests_the_last_checkpoint(tiny_voc, flags_of, tmp_path, no_pictures):
    flags = flags_of(tiny_voc, tmp_path, "--epochs", "1", "--val-fraction", "0")
    at = flags.index("--val-split")
    flags[at + 1] = ""
    assert ssd.main(flags) == 0
    assert not (tmp_path / "checkpoints" / "best.pth").exists()
    final = ssd.load_checkpoint(tmp_path / "checkpoints" / "ssd_tiny_set_final.pth")
    last = ssd.load_checkpoint(tmp_path / "checkpoints" / "last.pth")
    assert all(torch.equal(v, last["model"][k]) for k, v in final["model"].items())
    assert "train_state" not in final


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
)
def test_an_error_for_want_of_memory_names_the_flags_that_help(error):
    assert "--batch-size" in ssd.advise(error)
    assert "--workers" in ssd.advise(RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly"))
    assert ssd.advise(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_run_out_of_memory_advises_and_can_go_on_as_if_nothing_had_been(
    tiny_run, flags_of, same_run, tmp_path, monkeypatch, capsys, no_pictures
):
    whole, calls = ssd.detection_loss, itertools.count()

    def loss(*args, **more):
        if next(calls) == 4:  # in the second epoch
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ssd, "detection_loss", loss)
        assert ssd.main(flags_of(tiny_run.data, tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--batch-size" in line
    assert "--resume" in line
    assert resume(tmp_path) == 0
    same_run(tmp_path, tiny_run.output)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the process must inherit the patch")
def test_a_loader_process_that_dies_ends_the_run_with_advice(
    tiny_run, flags_of, tmp_path, monkeypatch, capsys, no_pictures
):
    read, main_process = ssd.open_small, os.getpid()

    def die(path, size):
        if os.getpid() != main_process and "train" in str(path):
            os._exit(1)
        return read(path, size)

    monkeypatch.setattr(ssd, "open_small", die)
    assert ssd.main(flags_of(tiny_run.data, tmp_path, "--workers", "1", "--no-cache")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--workers" in line
