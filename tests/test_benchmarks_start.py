"""The probe of a training's first steps: what it says of features, and that it trains as a run does."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import ssd_object_detection as ssd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import start
from start import BLOCKS


def probe(flags_of, data, tmp_path, *more):
    path = tmp_path / "start.json"
    assert start.main([*flags_of(data, tmp_path), "--pictures", "3", "--json", str(path), *more]) == 0
    return json.loads(path.read_text())


def test_it_takes_the_first_steps_of_the_run(tiny_voc, flags_of, tmp_path, capsys):
    result = probe(flags_of, tiny_voc, tmp_path, "--steps", "3")
    assert (result["steps"], result["skipped"], result["pictures"]) == (3, 0, 3)
    assert [row["block"] for row in result["rows"]] == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc7"]
    assert all(0 < row["cosine"] < 1 and row["rms"] > 0 for row in result["rows"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("3 steps: class loss ")
    assert "| fc7 " in printed
    # The same as the run itself, whose epochs have two steps.
    flags = flags_of(tiny_voc, tmp_path / "run", "--log-every", "1", "--test-split", "")
    assert ssd.main(flags) == 0
    rows = (tmp_path / "run" / "checkpoints" / "steps.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss_cls"] for row in rows[:3]]
    assert result["loss_cls_first_8"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_it_ends_with_the_run_and_starts_from_a_checkpoint(tiny_voc, tiny_run, tmp_path):
    flags = ["--init-from", str(tiny_run.final), "--data", str(tiny_voc), "--val-split", "val"]
    flags += ["--epochs", "1", "--workers", "0", "--device", "cpu"]
    path = tmp_path / "start.json"
    assert start.main([*flags, "--steps", "9", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["steps"] == 2


def test_a_mistake_is_one_line(tmp_path, capsys):
    assert start.main(["--data", str(tmp_path / "nowhere")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_a_block_that_stays_has_cosine_one_and_a_dead_channel_is_counted():
    before = torch.rand(2, 4, 3, 3)
    now = before.clone()
    now[:, 1] = 0
    now[0, 2] = 0  # but not in the other picture
    same, changed = start.Comparison(), start.Comparison()
    for features in (before, before / 2):
        same.add(features, 2 * features)
    changed.add(before, now)
    row = same.row("conv1")
    assert row["cosine"] == pytest.approx(1)
    assert row["rms"] == pytest.approx(2 * row["rms_start"])
    mean_square = (before.square().mean() + (before / 2).square().mean()) / 2
    assert row["rms_start"] == pytest.approx(math.sqrt(mean_square))
    assert (row["zero_start"], row["zero"]) == (0, 0)
    row = changed.row("conv1")
    assert row["cosine"] < 0.99
    assert (row["zero_start"], row["zero"]) == (0, 0.25)


def test_the_default_recipe_keeps_its_start(tiny_voc, tmp_path):
    torch.manual_seed(0)
    weights = {name: value.half() for name, value in ssd.vgg_tensors(ssd.SSD300(1)).items()}
    torch.save(weights, tmp_path / "vgg16.pth")
    flags = [
        "--data",
        str(tiny_voc),
        "--recipe",
        "voc",
        "--width",
        ".125",
        "--epochs",
        "30",
        "--batch-size",
        "4",
    ]
    flags += ["--backbone-weights", str(tmp_path / "vgg16.pth"), "--workers", "0", "--device", "cpu"]
    result = start.probe([*flags, "--amp", "off"], steps=40, pictures=4)
    conv5 = result["rows"][BLOCKS.index("conv5")]
    assert conv5["cosine"] > 0.75  # .88; by one rate for all layers and larger heads .40
    assert conv5["zero"] <= conv5["zero_start"]
    assert result["loss_cls_last_16"] < 0.7 * result["loss_cls_first_8"]
