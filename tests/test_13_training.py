"""Training: schedule, optimizer, average, precision, one epoch, stopping, resuming."""

import collections
import copy
import itertools
import json
import math
import os

import pytest
import torch

import ssd_object_detection as ssd

TINY = ["--data", "shapes", "--width", ".0625", "--epochs", "10", "--device", "cpu", "--amp", "off", "--lr", ".01",
        "--warmup-epochs", "2"]
CPU = torch.device("cpu")


def tiny_args(*more):
    return ssd.parse_args([*TINY, *more])


def tiny_recipe(*more):
    args = tiny_args(*more)
    return ssd.Recipe(**{name: getattr(args, name) for name in ssd.Recipe._fields})


def tiny_state(*more, freeze=0, seed=0):
    """Return (TrainState, Recipe) of a narrow network of two classes."""
    ssd.set_seed(seed)
    args = tiny_args(*more)
    args.freeze_blocks = freeze
    return ssd.build_state(args, 2, CPU)[:2]


@pytest.fixture(scope="module")
def records(tiny_voc):
    return ssd.load_data(str(tiny_voc), val_split="val").train


def loader_of(records, batch_size=4, *, train=False):
    dataset = ssd.VocDataset(records, ssd.build_transform(train=train))
    return ssd.make_loader(dataset, sampler=ssd.EpochBatchSampler(len(records), batch_size))


@pytest.fixture(scope="module")
def batch(records):
    return ssd.to_device(next(iter(ssd.make_loader(ssd.VocDataset(records, ssd.build_transform(train=False)),
                                                   batch_size=4))), CPU)


@pytest.fixture(scope="module")
def pair(batch):
    """The batch's first two pictures: half precision is slow on processors that emulate it."""
    return {name: value[:2] for name, value in batch.items()}


def take_step(state, recipe, batch, amp_dtype=None):
    """Take one training step; returns the loss before it."""
    state.model.train()
    with ssd.autocast(CPU, amp_dtype):
        outputs = state.model(batch["images"])
    loss = ssd.make_criterion(state.model.anchors, recipe)(outputs, batch)["loss"]
    ssd.optimize(state, loss, recipe.clip_grad)
    return loss.item()


def no_skips():
    """A log for epochs in which no step is skipped."""
    return ssd.SkipLog([], None, 1)


def weights(state):
    return [p.detach().clone() for p in state.model.parameters()]


# ---- learning rate ----


def test_the_rate_rises_by_equal_steps_to_its_peak_and_then_falls():
    recipe, steps = tiny_recipe(), 5  # 10 epochs of 5 steps, 10 of them warm-up
    rates, phases = zip(*(ssd.learning_rate(step, recipe, steps) for step in range(50)), strict=True)
    assert list(rates[:10]) == pytest.approx([0.01 * (i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[10] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert phases == ("warm-up",) * 10 + ("cosine",) * 40


def test_the_cosine_is_half_way_in_the_middle_and_a_hundredth_at_the_end():
    recipe = tiny_recipe()
    assert ssd.learning_rate(30, recipe, 5)[0] == pytest.approx(0.01 * (0.01 + 0.99 / 2))
    assert ssd.learning_rate(50, recipe, 5)[0] == pytest.approx(0.0001)
    assert ssd.learning_rate(20, recipe, 5)[0] == pytest.approx(0.01 * (0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2))
    assert ssd.learning_rate(10_000, recipe, 5)[0] == pytest.approx(0.0001)


def test_without_a_warm_up_the_first_step_has_the_peak_rate():
    recipe = tiny_recipe("--warmup-epochs", "0", "--epochs", "1")
    assert ssd.learning_rate(0, recipe, 1) == (pytest.approx(0.01), "cosine")


def test_the_step_schedule_drops_to_a_tenth_at_two_thirds_and_to_a_hundredth_at_five_sixths():
    recipe = tiny_recipe("--schedule", "step", "--epochs", "6", "--warmup-epochs", "1")
    rates = [ssd.learning_rate(step, recipe, 2)[0] for step in range(12)]
    assert rates == pytest.approx([0.005] + [0.01] * 7 + [0.001] * 2 + [0.0001] * 2)


def test_a_warm_up_longer_than_the_run_stays_finite_and_below_the_peak():
    recipe = tiny_recipe("--warmup-epochs", "5", "--epochs", "2")
    assert ssd.learning_rate(9, recipe, 5)[0] == pytest.approx(0.01 * 10 / 25)


# ---- optimizer ----


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_falls_on_convolutions_and_not_on_biases_and_norms(name):
    state, recipe = tiny_state("--optimizer", name, "--weight-decay", ".03")
    assert isinstance(state.optimizer, {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name])
    decay_of = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    named = dict(state.model.named_parameters())
    assert len(decay_of) == len(named)
    for name_, parameter in named.items():
        is_kernel = name_.endswith("weight") and parameter.ndim == 4
        assert decay_of[id(parameter)] == (0.03 if is_kernel else 0.0), name_
    assert decay_of[id(state.model.l2_norm.weight)] == 0
    assert recipe.weight_decay == 0.03


@pytest.mark.parametrize("flags", [["--optimizer", "sgd"], ["--optimizer", "adamw"], ["--loss", "multibox"],
                                   ["--no-batch-norm", "--optimizer", "sgd"]])
def test_steps_lower_the_loss_of_a_fixed_batch(batch, flags):
    state, recipe = tiny_state("--lr", ".002", *flags)
    losses = [take_step(state, recipe, batch) for _ in range(4)]
    assert losses[1] < losses[0]
    assert losses[3] < losses[0]
    assert state.step == 4


def test_frozen_blocks_keep_their_weights_and_statistics_while_the_rest_learns(batch):
    state, recipe = tiny_state(freeze=2)
    before = copy.deepcopy(state.model.state_dict())
    for _ in range(2):
        take_step(state, recipe, batch)
    for name, value in state.model.state_dict().items():
        if name.startswith(("blocks.0.", "blocks.1.")):
            assert torch.equal(value, before[name]), name
        elif name.startswith(("blocks.", "fc.", "extras.", "cls_heads.")):
            assert not torch.equal(value, before[name]), name
    optimized = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in state.model.blocks[:2].parameters()}


def test_clipping_bounds_the_norm_of_a_step(batch):
    flags = ["--optimizer", "sgd", "--momentum", "0", "--weight-decay", "0", "--lr", "1"]
    for clip, bounded in (("0.01", True), ("0", False)):
        state, recipe = tiny_state(*flags, "--clip-grad", clip)
        state.optimizer.param_groups[0]["lr"] = state.optimizer.param_groups[1]["lr"] = 1.0
        before = weights(state)
        take_step(state, recipe, batch)
        moved = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(weights(state), before, strict=True)))
        assert (moved <= 0.0101) == bounded
        assert moved > 0.005


# ---- average ----


def test_the_average_follows_its_formula_for_weights_and_statistics():
    model = torch.nn.BatchNorm2d(1)
    ema = ssd.Ema(model, decay=0.4)
    expected = {"weight": 1.0, "running_mean": 0.0}
    for step, value in enumerate((3.0, -2.0, 8.0, 1.0), start=1):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(10 * value)
            model.num_batches_tracked.fill_(step)
        ema.update(step)
        decay = min(0.4, (1 + step) / (10 + step))  # 2/11, 3/12, 4/13, 5/14: still rising
        expected = {"weight": decay * expected["weight"] + (1 - decay) * value,
                    "running_mean": decay * expected["running_mean"] + (1 - decay) * 10 * value}
        for name, number in expected.items():
            assert getattr(ema.model, name).item() == pytest.approx(number, rel=1e-6), (step, name)
    assert ema.model.num_batches_tracked.item() == 4
    assert expected["weight"] == pytest.approx(2.528472, abs=1e-6)  # 2.63636, -0.84091, 5.27972 on the way


def test_the_decay_stops_at_its_full_value():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = ssd.Ema(model, decay=0.5)
    with torch.no_grad():
        ema.model.weight.fill_(0.0)
        model.weight.fill_(1.0)
    ema.update(1000)
    assert ema.model.weight.item() == pytest.approx(0.5)


def test_the_average_is_a_copy_that_needs_no_gradient_and_stays_in_evaluation_mode(batch):
    state, recipe = tiny_state("--ema-decay", "1")
    take_step(state, recipe, batch)
    assert not state.ema.model.training
    assert not any(p.requires_grad for p in state.ema.model.parameters())
    assert state.model.training
    pairs = zip(state.model.parameters(), state.ema.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_decay_of_zero_copies_the_network(batch):
    state, recipe = tiny_state("--ema-decay", "0")
    take_step(state, recipe, batch)
    for (name, a), b in zip(state.model.state_dict().items(), state.ema.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# ---- precision ----


def test_the_precision_named_by_the_flag_is_taken():
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", None)):
        assert ssd.pick_amp_dtype(CPU, name) is dtype
        assert ssd.pick_amp_dtype(torch.device("cuda"), name) is dtype


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_takes_bfloat16_only_where_it_is_not_emulated(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert ssd.pick_amp_dtype(torch.device("cuda"), "auto") is dtype


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx2": True, "avx512_bf16": False}, None), ({"avx512_bf16": True}, torch.bfloat16), ({}, None),
     ({"amx_bf16": True}, torch.bfloat16)],
)
def test_a_cpu_takes_bfloat16_only_with_instructions_for_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert ssd.pick_amp_dtype(CPU, "auto") is dtype


def test_a_step_in_bfloat16_has_a_finite_loss_near_that_of_float32(pair):
    state, recipe = tiny_state()
    other, _ = tiny_state()
    full, half = take_step(state, recipe, pair), take_step(other, recipe, pair, torch.bfloat16)
    assert half == pytest.approx(full, rel=0.05)
    assert half != full
    assert all(torch.isfinite(p).all() for p in other.model.parameters())
    assert all(p.dtype == torch.float32 for p in other.model.parameters())


def test_a_step_in_float16_scales_the_loss_and_has_finite_weights(pair):
    state, recipe = tiny_state("--amp", "fp16")
    assert state.scaler.is_enabled()
    try:
        loss = take_step(state, recipe, pair, torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no float16 on this processor: {error}")
    assert math.isfinite(loss)
    assert all(torch.isfinite(p).all() for p in state.model.parameters())


def test_only_float16_needs_the_scaler():
    assert not tiny_state("--amp", "bf16")[0].scaler.is_enabled()
    assert not tiny_state("--amp", "off")[0].scaler.is_enabled()


def test_gradients_are_unscaled_before_they_are_clipped(batch):
    flags = ["--optimizer", "sgd", "--momentum", "0", "--weight-decay", "0", "--clip-grad", ".5"]
    (plain, recipe), (scaled, _) = tiny_state(*flags), tiny_state(*flags, "--amp", "fp16")
    start = weights(plain)
    for state in (plain, scaled):
        take_step(state, recipe, batch)
    moved, expected = (torch.cat([(a - old).flatten() for a, old in zip(weights(state), start, strict=True)])
                       for state in (scaled, plain))
    assert expected.norm() > 1e-3
    assert (moved - expected).norm() < 0.05 * expected.norm()  # their memory orders differ, and so their rounding


def test_a_gradient_that_overflows_float16_costs_a_step_and_not_the_weights(batch):
    state, _ = tiny_state("--amp", "fp16")
    before, scale = weights(state), state.scaler.get_scale()
    state.model.train()
    loss = sum(out.sum() for out in state.model(batch["images"])) * math.inf
    ssd.optimize(state, loss, 10.0)
    assert all(torch.equal(a, b) for a, b in zip(weights(state), before, strict=True))
    assert state.scaler.get_scale() < scale


def test_a_device_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ssd.pick_device("auto").type == "cpu"
    for name in ("nonsense", "cuda:77"):
        with pytest.raises(ssd.InputError, match=name) as caught:
            ssd.pick_device(name)
        assert len(str(caught.value).splitlines()) == 1


# ---- one epoch ----


def test_an_epoch_returns_finite_means_and_counts_its_steps(records):
    state, recipe = tiny_state()
    loader = loader_of(records, 3, train=True)  # 8 images: two steps, the rest is dropped
    means = ssd.train_one_epoch(state, loader, ssd.make_criterion(state.model.anchors, recipe), recipe,
                                skips=no_skips())
    assert state.step == 2
    assert state.epoch == 0  # `fit` counts epochs
    for name in ("train_loss", "train_loss_cls", "train_loss_box", "images_per_s", "data_wait"):
        assert math.isfinite(means[name]), name
    assert means["train_loss"] == pytest.approx(means["train_loss_cls"] + means["train_loss_box"], rel=1e-5)
    assert (means["lr"], means["phase"]) == ssd.learning_rate(1, recipe, 2)
    assert {group["lr"] for group in state.optimizer.param_groups} == {means["lr"]}


def test_an_epoch_s_means_are_those_of_its_steps(records):
    state, recipe = tiny_state()
    seen = []

    def criterion(outputs, batch):
        losses = ssd.make_criterion(state.model.anchors, recipe)(outputs, batch)
        seen.append(losses["loss"].item())
        return losses

    means = ssd.train_one_epoch(state, loader_of(records, 2), criterion, recipe, skips=no_skips())
    assert len(seen) == 4
    assert means["train_loss"] == pytest.approx(sum(seen) / 4, rel=1e-5)


def test_each_epoch_asks_for_its_own_order_and_augmentation(records):
    state, recipe = tiny_state()
    loader, seen = loader_of(records, 8, train=True), []

    def criterion(outputs, batch):
        order = batch["indices"].argsort()
        seen.append((batch["indices"].tolist(), batch["images"][order].clone()))
        return ssd.make_criterion(state.model.anchors, recipe)(outputs, batch)

    for epoch in (0, 1, 0):
        state.epoch = state.step = epoch
        ssd.train_one_epoch(state, loader, criterion, recipe, skips=no_skips())
    assert seen[0][0] != seen[1][0]
    assert not torch.equal(seen[0][1], seen[1][1])
    assert seen[0][0] == seen[2][0]
    assert torch.equal(seen[0][1], seen[2][1])


@pytest.mark.parametrize("empty_every", [1, 2])
def test_batches_in_which_some_or_all_pictures_have_no_object_train(make_voc, tmp_path, empty_every):
    root = make_voc(tmp_path / "voc", {"train": 4}, empty_every=empty_every)
    ids = ssd.read_split(root, "train")
    records = ssd.make_records([(root, i) for i in ids], {root: ssd.inspect_all(root, ids)}, ("angular", "round"),
                               collections.defaultdict(dict))
    assert sum(len(r.labels) == 0 for r in records) == 4 // empty_every
    state, recipe = tiny_state()
    before = weights(state)
    means = ssd.train_one_epoch(state, loader_of(records, 2, train=True),
                                ssd.make_criterion(state.model.anchors, recipe), recipe,
                                skips=no_skips())
    assert math.isfinite(means["train_loss"])
    assert means["train_loss_cls"] > 0
    assert (means["train_loss_box"] == 0) == (empty_every == 1)
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(weights(state), before, strict=True))


# ---- fit ----


def run_fit(monkeypatch, tmp_path, maps, *flags, val=True):
    """Run `fit` on a script: maps are the validation mAPs in turn. Returns (state, path chosen, validated epochs)."""
    state, recipe = tiny_state(*flags)
    values, validated = iter(maps), []
    row = {"train_loss": 1.0, "train_loss_cls": 0.5, "train_loss_box": 0.5, "lr": 1e-3, "phase": "cosine",
           "images_per_s": 1.0, "data_wait": 0.0, "memory_gb": 1.0, "skipped": 0}

    def evaluate(*args, **settings):
        validated.append(state.epoch + 1)  # an epoch is finished when it is validated
        return {"loss": 1.0, "loss_cls": 0.5, "loss_box": 0.5, "map_area": (value := next(values)), "map11": value,
                "classes": {}}

    monkeypatch.setattr(ssd, "train_one_epoch", lambda *args, **more: dict(row))
    monkeypatch.setattr(ssd, "evaluate", evaluate)
    saver = ssd.Saver(state, tmp_path, {"config": {}, "classes": []}, 0)
    chosen = ssd.fit(state, (loader_of([None]), "loader" if val else None), recipe, amp_dtype=None, saver=saver,
                     settings={}, redraw=lambda state: None, stop=ssd.StopSignals())
    return state, chosen, validated


def test_training_stops_after_the_patience_without_a_better_map(monkeypatch, tmp_path, capsys):
    state, chosen, _ = run_fit(monkeypatch, tmp_path, [0.1, 0.3, 0.2, 0.3, 0.29, 0.9], "--patience", "3")
    assert state.epoch == 5
    assert (state.best_map, state.best_epoch) == (0.3, 2)
    assert chosen.name == "best.pth"
    assert ssd.load_checkpoint(chosen)["metrics"]["epoch"] == 2
    assert "--patience" in capsys.readouterr().out


def test_patience_zero_never_stops(monkeypatch, tmp_path):
    state, _, _ = run_fit(monkeypatch, tmp_path, [0.5] + [0.1] * 9, "--patience", "0")
    assert state.epoch == 10
    assert state.best_epoch == 1


def test_patience_counts_validations_and_not_epochs(monkeypatch, tmp_path):
    flags = ["--patience", "2", "--eval-interval", "2"]
    state, _, validated = run_fit(monkeypatch, tmp_path, [0.5, 0.1, 0.1, 0.1], *flags)
    assert validated == [2, 4, 6]
    assert state.epoch == 6


def test_validation_keeps_its_interval_and_always_follows_the_last_epoch(monkeypatch, tmp_path):
    state, _, validated = run_fit(monkeypatch, tmp_path, [0.1, 0.2, 0.3], "--epochs", "5", "--eval-interval", "2")
    assert validated == [2, 4, 5]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["val_map_area" in row for row in rows] == [False, True, False, True, True]
    assert state.history == rows


def test_without_held_out_pictures_the_last_checkpoint_is_the_one_to_test(monkeypatch, tmp_path):
    _, chosen, validated = run_fit(monkeypatch, tmp_path, [], "--epochs", "2", val=False)
    assert validated == []
    assert chosen == tmp_path / "last.pth"
    assert chosen.is_file()
    assert not (tmp_path / "best.pth").exists()


def test_a_validation_list_without_an_object_still_leaves_a_checkpoint_to_test(monkeypatch, tmp_path):
    _, chosen, _ = run_fit(monkeypatch, tmp_path, [math.nan, math.nan], "--epochs", "2")
    assert ssd.load_checkpoint(chosen)["metrics"]["epoch"] in (1, 2)


def test_metrics_with_a_map_that_is_not_a_number_stay_json(monkeypatch, tmp_path):
    run_fit(monkeypatch, tmp_path, [0.5, math.nan], "--epochs", "2")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_saved_state_comes_back_with_both_sets_of_weights_moments_and_counters(tmp_path, batch):
    state, recipe = tiny_state()
    take_step(state, recipe, batch)
    state.epoch, state.best_map, state.best_epoch, state.history = 3, 0.25, 2, [{"epoch": 1}]
    averaged = state.ema.model.state_dict()
    ssd.save_checkpoint(tmp_path / "last.pth", {"model": averaged, "config": {}, "classes": [],
                                                "train_state": state.state_dict()})
    random_numbers = torch.rand(5)
    loaded = ssd.load_checkpoint(tmp_path / "last.pth")
    other, _ = tiny_state(seed=1)
    other.load_state_dict(loaded["train_state"], loaded["model"])
    assert torch.equal(torch.rand(5), random_numbers)
    assert (other.epoch, other.step, other.best_map, other.best_epoch, other.history) == (3, 1, 0.25, 2, [{"epoch": 1}])
    for ours, theirs in ((other.model, state.model), (other.ema.model, state.ema.model)):
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert not torch.equal(other.model.l2_norm.weight, other.ema.model.l2_norm.weight)
    assert take_step(other, recipe, batch) == take_step(state, recipe, batch)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(state), strict=True))


# ---- whole runs ----


def test_training_on_every_picture_tests_the_last_checkpoint(tiny_voc, flags_of, tmp_path):
    flags = flags_of(tiny_voc, tmp_path, "--epochs", "1", "--val-fraction", "0")
    at = flags.index("--val-split")
    del flags[at : at + 2]
    assert ssd.main(flags) == 0
    run = json.loads((tmp_path / "checkpoints" / "run.json").read_text())
    assert run["chosen"] == "last.pth"
    assert not (tmp_path / "checkpoints" / "best.pth").exists()
    final = ssd.load_checkpoint(tmp_path / "checkpoints" / "ssd_tiny_set_final.pth")
    last = ssd.load_checkpoint(tmp_path / "checkpoints" / "last.pth")
    assert all(torch.equal(v, last["model"][k]) for k, v in final["model"].items())
    assert "train_state" not in final


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tiny_run, flags_of, same_run, tmp_path, monkeypatch, capsys
):
    def interrupt(history):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ssd, "plot_losses", interrupt)  # after the first epoch is saved
        assert ssd.main(flags_of(tiny_run.data, tmp_path)) == 130
    assert "--resume" in capsys.readouterr().err
    checkpoints = tmp_path / "checkpoints"
    assert len((checkpoints / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (checkpoints / tiny_run.final.name).exists()
    torch.manual_seed(12345)
    assert ssd.main(["--resume", "--output-dir", str(tmp_path)]) == 0
    same_run(tmp_path, tiny_run.output)


class Killed(BaseException):
    """Stands for kill -9: nothing of the module runs after it."""


@pytest.mark.parametrize(("kill_at", "workers"), [(1, "1"), (2, "0"), (3, "1")])
def test_a_run_killed_at_any_step_and_resumed_equals_an_uninterrupted_one_bit_for_bit(
    tiny_run, flags_of, same_run, tmp_path, monkeypatch, no_pictures, kill_at, workers
):
    step, steps = ssd.optimize, []

    def optimize(*args):
        if len(steps) >= kill_at:
            patch.setattr(ssd.Saver, "save_last", lambda self: None)
            raise Killed
        steps.append(1)
        return step(*args)

    flags = flags_of(tiny_run.data, tmp_path, "--save-minutes", "1e-9", "--workers", workers, "--deterministic")
    with monkeypatch.context() as patch:
        patch.setattr(ssd, "optimize", optimize)
        with pytest.raises(Killed):
            ssd.main(flags)
    state = ssd.load_checkpoint(tmp_path / "checkpoints" / "last.pth")["train_state"]
    assert (state["step"], state["epoch"]) == (kill_at, kill_at // 2)  # two steps an epoch
    torch.manual_seed(12345)
    assert ssd.main(["--resume", "--output-dir", str(tmp_path)]) == 0
    same_run(tmp_path, tiny_run.output)


def test_a_run_interrupted_while_it_validates_evaluates_that_epoch_again(
    tiny_run, flags_of, same_run, tmp_path, monkeypatch, no_pictures
):
    def interrupt(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ssd, "evaluate", interrupt)
        assert ssd.main(flags_of(tiny_run.data, tmp_path)) == 130
    state = ssd.load_checkpoint(tmp_path / "checkpoints" / "last.pth")["train_state"]
    assert (state["step"], state["epoch"]) == (2, 0)
    assert ssd.main(["--resume", "--output-dir", str(tmp_path)]) == 0
    same_run(tmp_path, tiny_run.output)


def test_a_run_that_stopped_early_does_not_train_on_when_it_is_resumed(monkeypatch, tmp_path):
    state, _, _ = run_fit(monkeypatch, tmp_path, [0.5, 0.1, 0.1], "--patience", "2")
    monkeypatch.setattr(ssd, "train_one_epoch", None)
    saver = ssd.Saver(state, tmp_path, {}, 0)
    recipe = tiny_recipe("--patience", "2")
    chosen = ssd.fit(state, (loader_of([None]), "loader"), recipe, amp_dtype=None, saver=saver, settings={},
                     redraw=None, stop=ssd.StopSignals())
    assert state.epoch == 3
    assert chosen.name == "best.pth"


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
])
def test_an_error_for_want_of_memory_names_the_flags_that_help(error):
    args = tiny_args("--batch-size", "7", "--workers", "3")
    assert "--batch-size (now 7)" in ssd.advise(error, args)
    assert "--workers (now 3)" in ssd.advise(RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly"), args)
    assert ssd.advise(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), args) is None


def test_a_run_out_of_memory_saves_advises_and_can_go_on_as_if_nothing_had_been(
    tiny_run, flags_of, same_run, tmp_path, monkeypatch, capsys, no_pictures
):
    whole, calls = ssd.make_criterion, itertools.count()

    def make_criterion(*args):
        def criterion(outputs, batch):
            if next(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(*args)(outputs, batch)

        return criterion

    monkeypatch.setattr(ssd, "make_criterion", make_criterion)
    assert ssd.main(flags_of(tiny_run.data, tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--batch-size (now 4)" in line
    assert "--resume" in line
    assert ssd.main(["--resume", "--output-dir", str(tmp_path)]) == 0
    same_run(tmp_path, tiny_run.output)  # the half step left nothing, in the batch norms' statistics neither


def test_a_loader_process_that_dies_ends_the_run_with_advice_after_saving(
    tiny_run, flags_of, tmp_path, monkeypatch, capsys, no_pictures
):
    read, main_process = ssd.read_image, os.getpid()

    def die(path):
        if os.getpid() != main_process and "train" in str(path):
            os._exit(1)
        return read(path)

    monkeypatch.setattr(ssd, "read_image", die)
    assert ssd.main(flags_of(tiny_run.data, tmp_path, "--workers", "1")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--workers (now 1)" in line
    assert ssd.load_checkpoint(tmp_path / "checkpoints" / "last.pth", resumable=True)["train_state"]["step"] == 0


# ---- steps that are not finite ----


@pytest.mark.parametrize("flags", [["--optimizer", "sgd"], ["--optimizer", "adamw"], ["--clip-grad", "0"]])
@pytest.mark.parametrize("good_before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(batch, flags, good_before):
    (state, recipe), (other, _) = tiny_state(*flags), tiny_state(*flags)
    for _ in range(good_before):
        take_step(state, recipe, batch)
        take_step(other, recipe, batch)
    poisoned = batch | {"images": batch["images"].float() * math.nan}  # reaches the batch norms' statistics too
    take_step(state, recipe, poisoned)
    for model, theirs in ((state.model, other.model), (state.ema.model, other.ema.model)):
        for (name, a), b in zip(model.state_dict().items(), theirs.state_dict().values(), strict=True):
            if model is state.model and not name.endswith("num_batches_tracked"):
                assert torch.equal(a, b), name
            assert a.isfinite().all(), name
    assert state.step == good_before + 1
    for _ in range(2):  # the moments were left alone too
        assert take_step(state, recipe, batch) == take_step(other, recipe, batch)
    assert all(torch.equal(a, b) for a, b in zip(weights(state), weights(other), strict=True))


@pytest.mark.parametrize("poison", [lambda w: (w * math.inf).sum(), lambda w: (w - w.detach()).abs().pow(0.3).sum()],
                         ids=["loss", "gradient"])
def test_a_loss_or_only_its_gradient_that_is_not_finite_is_found(batch, poison):
    state, recipe = tiny_state()
    before = weights(state)
    assert not ssd.optimize(state, poison(state.model.l2_norm.weight), recipe.clip_grad)
    assert all(torch.equal(a, b) for a, b in zip(weights(state), before, strict=True))
    state.optimizer.zero_grad()
    assert ssd.optimize(state, sum(p.square().sum() for p in state.model.parameters()), recipe.clip_grad)


def poisoning(recipe, state, *steps):
    """Return a criterion whose loss is NaN in the steps given, counted from 0."""
    whole, calls = ssd.make_criterion(state.model.anchors, recipe), itertools.count()

    def criterion(outputs, batch):
        factor = math.nan if next(calls) in steps else 1.0
        return {name: value * factor for name, value in whole(outputs, batch).items()}

    return criterion


def test_a_skipped_step_is_named_counted_and_left_out_of_the_means(records, tmp_path, capsys):
    state, recipe = tiny_state()
    losses, criterion = [], poisoning(recipe, state, 1)

    def watched(outputs, batch):
        losses.append(criterion(outputs, batch))
        return losses[-1]

    loader = loader_of(records, 2)
    row = ssd.train_one_epoch(state, loader, watched, recipe, skips=ssd.SkipLog(records, tmp_path / "r.json", 3))
    assert row["skipped"] == 1
    good = [one["loss"].item() for one in losses if math.isfinite(one["loss"].item())]
    assert len(good) == 3
    assert row["train_loss"] == pytest.approx(sum(good) / 3, rel=1e-6)
    said = capsys.readouterr().err
    assert "step 2 skipped" in said
    names = [records[i].image_id for i, _ in list(loader.batch_sampler)[1]]
    assert ", ".join(names) in said
    assert not (tmp_path / "r.json").exists()


def test_steps_skipped_in_a_row_stop_the_run_with_a_report(records, tmp_path):
    state, recipe = tiny_state()
    before = weights(state)
    skips = ssd.SkipLog(records, tmp_path / "r.json", 3)
    with pytest.raises(ssd.NotFiniteError, match="--lr") as caught:
        ssd.train_one_epoch(state, loader_of(records, 2), poisoning(recipe, state, 0, 1, 2, 3), recipe, skips=skips)
    assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(a, b) for a, b in zip(weights(state), before, strict=True))
    report = json.loads((tmp_path / "r.json").read_text())
    assert [one["step"] for one in report] == [1, 2, 3, 4]
    assert report[0]["losses"].keys() == {"loss", "loss_cls", "loss_box"}
    assert sorted(i["image"] for one in report for i in one["images"]) == sorted(r.image_id for r in records)
    of = {r.image_id: r for r in records}
    for image in (i for one in report for i in one["images"]):
        assert image["labels"] == of[image["image"]].labels.tolist()
        theirs = torch.from_numpy(of[image["image"]].boxes)
        torch.testing.assert_close(torch.tensor(image["boxes"]).view(-1, 4), theirs)


def test_skipped_steps_with_good_ones_between_do_not_stop_the_run(records, tmp_path):
    state, recipe = tiny_state()
    skips = ssd.SkipLog(records, tmp_path / "r.json", 3)
    row = ssd.train_one_epoch(state, loader_of(records, 1), poisoning(recipe, state, 0, 1, 3, 4, 6, 7), recipe,
                              skips=skips)
    assert row["skipped"] == 6


def test_the_guard_reads_the_device_once_in_ten_steps(records, monkeypatch):
    state, recipe = tiny_state()
    reads = []
    skips = ssd.SkipLog([], None, 1)
    monkeypatch.setattr(skips, "read", lambda: reads.append(len(skips.pending)) or skips.pending.clear())
    ssd.train_one_epoch(state, loader_of([records[0]] * 12, 1), ssd.make_criterion(state.model.anchors, recipe), recipe,
                        skips=skips)
    assert reads == [10, 2]


def test_a_run_resumed_without_its_best_checkpoint_says_so_and_measures_the_best_to_come(
        tiny_voc, flags_of, tmp_path, capfd, no_pictures):
    assert ssd.main(flags_of(tiny_voc, tmp_path / "whole")) == 0
    lone = tmp_path / "lone" / "checkpoints"
    lone.mkdir(parents=True)
    for name, epochs in (("previous.pth", 1), ("last.pth", 2)):  # one epoch is left; none is
        saved = ssd.load_checkpoint(tmp_path / "whole" / "checkpoints" / name, resumable=True)
        saved["train_state"] |= {"best_map": 0.99, "best_epoch": epochs}  # a map that no epoch to come will reach
        ssd.save_checkpoint(lone / "last.pth", saved)
        (lone / "best.pth").unlink(missing_ok=True)
        capfd.readouterr()
        assert ssd.main(["--resume", "--output-dir", str(lone.parent)]) == 0
        said = capfd.readouterr().err
        assert f"{lone / 'best.pth'} of epoch {epochs} is missing" in said
        assert (lone / "best.pth").is_file() == (epochs == 1)
        assert ssd.load_checkpoint(lone / "ssd_tiny_set_final.pth")["metrics"]["epoch"] == 2


def test_what_is_done_sparingly_takes_its_share_of_the_time_at_most(monkeypatch):
    clock, calls = [100.0], []
    monkeypatch.setattr(ssd.time, "perf_counter", lambda: clock[0])

    def slow(value):
        calls.append((value, clock[0]))
        clock[0] += 2.0

    slow = ssd.sparingly(slow, share=0.1)
    for value in range(100):
        slow(value)
        clock[0] += 1.0
    assert calls == [(0, 100.0), (20, 122.0), (40, 144.0), (60, 166.0), (80, 188.0)]  # 20 s of other work between
