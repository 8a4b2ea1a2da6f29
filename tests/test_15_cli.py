"""Command line: flags, recipes, mistakes, signals, full disks, and whole runs."""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from reference import assert_same_predictions

import ssd_object_detection as ssd

OFFLINE = urllib.error.URLError("no route to host")
AP = r"\d\.\d{4}"
TEST_LINE = re.compile(rf"Test mAP@\.5: {AP} \(area\), {AP} \(11-point\); mAP@\.75: {AP} \(area\)")
HERE = ["--device", "cpu", "--workers", "0"]  # what no checkpoint keeps


def actions():
    return [action for action in ssd.build_parser()._actions if action.dest != "help"]


def refused(capsys, argv):
    """Parse a command line that must be refused in one line with exit code 2; returns that line."""
    capsys.readouterr()
    try:
        code = ssd.main([str(a) for a in argv])
    except SystemExit as end:  # argparse's
        code = end.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def interrupt(*args, **more):
    raise KeyboardInterrupt


# ---- flags ----


@pytest.mark.parametrize("name", ssd.RECIPES)
def test_every_recipe_sets_every_setting_that_has_no_default(name):
    settings = {field.name for field in dataclasses.fields(ssd.Settings)}
    assert ssd.RECIPES[name].keys() == settings - ssd.DEFAULTS.keys()
    assert not ssd.RECIPES[name].keys() & set(ssd.MACHINE_FLAGS)


def test_every_setting_is_a_flag_or_an_entry_of_the_recipes_alone():
    settings = {field.name for field in dataclasses.fields(ssd.Settings)}
    flags = {action.dest for action in actions()}
    assert flags <= settings
    alone = {"backbone_lr", "momentum", "schedule", "clip_grad", "ema_decay", "focal_gamma"}
    assert settings - flags == alone


def test_each_flag_explains_itself_and_has_one_name():
    assert [action.dest for action in actions() if not action.help] == []
    switches = [action for action in actions() if len(action.option_strings) > 1]
    assert all(action.option_strings[1].startswith("--no-") for action in switches)


def test_help_ends_well_and_prints_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        ssd.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in actions():
        assert flag.option_strings[0] in text
    assert re.search(r"--patience PATIENCE [^-]+ \(default: 30\)", text)
    assert "(default: None)" not in text
    assert "SUPPRESS" not in text


# ---- defaults and recipes ----


@pytest.mark.parametrize("data", ["voc2007", "voc0712"])
def test_voc_starts_from_imagenet_weights_whose_first_blocks_stay(data):
    args = ssd.load_settings(["--data", data])[0]
    assert (args.recipe, args.pretrained, args.width) == ("voc", True, 1.0)
    assert args.frozen_blocks > 0
    assert ssd.load_settings(["--data", data, "--no-pretrained"])[0].frozen_blocks == 0
    assert ssd.load_settings([])[0].data == "voc2007"


def test_shapes_trains_a_narrow_network_from_scratch():
    args = ssd.load_settings(["--data", "shapes"])[0]
    assert (args.recipe, args.frozen_blocks) == ("shapes", 0)
    assert (args.pretrained, args.batch_norm, args.optimizer) == (False, "all", "adamw")
    assert args.width < 1
    assert args.epochs < 100


def test_the_paper_s_recipe_is_the_paper_s():
    args = ssd.load_settings(["--recipe", "paper"])[0]
    assert (args.loss, args.optimizer, args.lr, args.batch_size) == ("multibox", "sgd", 1e-3, 32)
    assert (args.schedule, args.ema_decay, args.warmup_epochs, args.clip_grad) == ("step", 0, 0, 0)
    assert (args.zoom_out, args.crop, args.color) == (0.5, 1, 0.5)
    assert (args.shadow, args.noise, args.blur) == (0, 0, 0)


@pytest.mark.parametrize("recipe", ssd.RECIPES)
def test_a_flag_beats_the_recipe(recipe):
    flags = [
        "--epochs",
        "3",
        "--lr",
        ".5",
        "--batch-norm",
        "all",
        "--no-pretrained",
        "--optimizer",
        "sgd",
        "--weight-decay",
        "0",
        "--test-split",
        "val",
        "--width",
        "1",
    ]
    args = ssd.load_settings(["--recipe", recipe, *flags])[0]
    given = {
        "epochs": 3,
        "lr": 0.5,
        "batch_norm": "all",
        "pretrained": False,
        "optimizer": "sgd",
        "weight_decay": 0.0,
        "test_split": "val",
        "width": 1.0,
    }
    assert {name: getattr(args, name) for name in given} == given
    for name in ssd.RECIPES[recipe].keys() - given.keys() - {"freeze_blocks"}:
        assert getattr(args, name) == ssd.RECIPES[recipe][name], name


def test_a_flag_beats_a_saved_run_which_beats_the_recipe(tiny_run, tmp_path):
    saved = ssd.load_checkpoint(tiny_run.final)["args"]
    assert saved.keys() >= ssd.RECIPES["voc"].keys()
    for argv in (["--evaluate", str(tiny_run.final)], ["--resume", "--output-dir", str(tiny_run.output)]):
        args = ssd.load_settings([*argv, "--lr", ".25", "--recipe", "paper"])[0]
        assert (args.lr, args.recipe) == (0.25, "paper")
        assert (args.epochs, args.width, args.loss, args.schedule) == (2, 0.0625, "focal", "cosine")
        assert (args.data, args.val_split, args.score_thresh) == (str(tiny_run.data), "val", 0.001)
        assert args.device == "auto"  # of this machine, not of the one that trained
    # The lists of one data set say nothing of another's.
    args = ssd.load_settings(["--evaluate", str(tiny_run.final), "--data", str(tmp_path)])[0]
    assert (args.data, args.val_split, args.width) == (str(tmp_path), None, 0.0625)


# ---- mistakes on the command line ----


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", "-1"),
        ("--epochs", "0"),
        ("--epochs", "2.5"),
        ("--epochs", "many"),
        ("--val-fraction", "2"),
        ("--val-fraction", "-.1"),
        ("--val-fraction", "1.1"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--lr", "-1"),
        ("--batch-size", "0"),
        ("--width", "0"),
        ("--crop", "1.1"),
        ("--zoom-out", "nan"),
        ("--freeze-blocks", "6"),
        ("--amp", "fp8"),
        ("--loss", "hinge"),
        ("--optimizer", "adam"),
        ("--seed", "-1"),
        ("--workers", "-1"),
        ("--score-thresh", "2"),
        ("--nms-iou", "-1"),
        ("--patience", "-1"),
        ("--eval-interval", "0"),
        ("--weight-decay", "-1"),
        ("--warmup-epochs", "-1"),
        ("--recipe", "best"),
    ],
)
def test_a_bad_value_is_refused_with_a_message_that_names_the_flag(capsys, flag, value):
    assert f"argument {flag}: " in refused(capsys, [flag, value])


def test_a_typo_in_a_flag_is_refused_by_name(capsys):
    assert "--epoch-count" in refused(capsys, ["--epoch-count", "3"])
    assert "stray" in refused(capsys, ["stray"])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--weights", "a.pth"], ["--predict", "--weights"]),
        (["--width", "1.5"], ["--width", "--no-pretrained"]),
        (["--no-pretrained", "--freeze-blocks", "2"], ["--freeze-blocks"]),
        (["--width", ".5", "--freeze-blocks", "2"], ["--freeze-blocks"]),
        (["--data", "shapes", "--freeze-blocks", "2"], ["--freeze-blocks"]),
    ],
)
def test_a_contradiction_is_refused(capsys, argv, named):
    message = refused(capsys, argv)
    assert all(flag in message for flag in named)


def test_only_one_thing_is_done_at_a_time(capsys, tiny_run):
    last = tiny_run.output / "checkpoints" / "last.pth"
    pairs = (
        ["--resume", "--output-dir", tiny_run.output, "--predict", "b.jpg", "--weights", last],
        ["--evaluate", last, "--resume"],
        ["--evaluate", last, "--predict", "b.jpg", "--weights", last],
    )
    for argv in pairs:
        assert "--evaluate, --predict and --resume exclude one another" in refused(capsys, argv)


FLAGS = [flag for action in ssd.build_parser()._actions for flag in action.option_strings]
ODD_VALUES = ["", "-", "--", "-1", "0", "1e999", "nan", "a,b", ",", ".", "..", "shapes", "auto", "focal", "="]
words = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(ODD_VALUES),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
    st.tuples(st.sampled_from(FLAGS), st.sampled_from(ODD_VALUES)).map("=".join),
).filter(lambda word: word not in ("--evaluate=--", "--output-dir=--"))  # see the test below


@settings(max_examples=500, deadline=None, derandomize=True)  # the same lines each time
@given(st.lists(words, max_size=6))
@example(["--epochs=--"])
@example(["--data=--"])
@example(["--predict=--", "--weights", "x"])
def test_any_command_line_is_understood_or_refused_in_words(argv):
    out, err, code = io.StringIO(), io.StringIO(), None
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),  # where no checkpoint is
    ):
        try:
            args = ssd.load_settings(argv)[0]
        except SystemExit as end:
            code = end.code
        except ssd.InputError:  # no checkpoint of that name
            return
    if code is not None:
        assert (code == 0 and "usage: " in out.getvalue()) or (code == 2 and "error: " in err.getvalue())
        return
    assert not err.getvalue()
    assert args.epochs >= 1
    assert args.batch_size >= 1
    assert 0 < args.lr < math.inf
    assert 0 <= args.val_fraction <= 1


@pytest.mark.parametrize("argv", [["--evaluate=--"], ["--resume", "--output-dir=--"]])
def test_two_dashes_are_no_path(capsys, argv):
    try:
        code, end = ssd.main(argv), ": no such file (a checkpoint)"  # Python 3.13 takes them for a path
    except SystemExit as stop:  # before, for no value
        code, end = stop.code, "(see --help)"
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(end)


# ---- mistakes that the data or a file shows ----


def test_a_missing_data_folder_is_one_line(fails, tmp_path):
    assert "--data" in fails(["--data", tmp_path / "none", "--output-dir", tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_list_is_one_line_that_names_it_and_those_there(fails, tiny_voc, flags_of, tmp_path):
    message = fails(flags_of(tiny_voc, tmp_path, "--train-split", "learn"))
    assert "learn.txt" in message
    assert "test, train, val" in message


def test_a_missing_checkpoint_is_one_line(fails, tmp_path):
    flags = ["--output-dir", tmp_path]
    assert "none.pth" in fails(["--evaluate", tmp_path / "none.pth", *flags])
    assert "none.pth" in fails(["--predict", "a.png", "--weights", tmp_path / "none.pth", *flags])
    assert "last.pth" in fails(["--resume", *flags])


def test_a_missing_or_broken_image_to_predict_is_one_line(fails, tiny_run, tmp_path):
    flags = ["--weights", tiny_run.final, "--device", "cpu", "--output-dir", tmp_path]
    assert "none.jpg" in fails(["--predict", tmp_path / "none.jpg", *flags])
    (tmp_path / "broken.jpg").write_text("no picture")
    assert "broken.jpg" in fails(["--predict", tmp_path / "broken.jpg", *flags])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_image_that_breaks_is_one_line_also_from_a_loader_process(
    fails, make_voc, flags_of, tmp_path, monkeypatch, workers
):
    data = make_voc(tmp_path / "voc", {"train": 4, "val": 1})
    image = data / "JPEGImages" / "train_2.jpg"
    monkeypatch.setattr(ssd, "plot_augmentations", lambda *args: image.write_text("no picture") and Figure())
    message = fails(flags_of(data, tmp_path / "out", "--no-cache", "--workers", workers))
    assert "train_2.jpg: not readable as an image (cannot identify" in message


@pytest.mark.parametrize("cache", ["--cache", "--no-cache"])
def test_an_image_of_another_size_than_its_annotation_says_is_one_line(
    fails, make_voc, flags_of, tmp_path, cache
):
    data = make_voc(tmp_path / "voc", {"train": 4, "val": 1})
    Image.new("RGB", (20, 10)).save(data / "JPEGImages" / "train_2.jpg")
    message = fails(flags_of(data, tmp_path / "out", cache))
    assert "train_2.jpg" in message
    assert "20x10" in message


def test_voc_without_a_network_names_the_flags_that_help(fails, tmp_path, monkeypatch):
    def offline(*args, **more):
        raise OFFLINE

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    message = fails(["--data-root", tmp_path, "--output-dir", tmp_path / "out"])
    assert "no route to host" in message
    assert all(flag in message for flag in ("--data", "--data-root"))


def test_weights_without_a_network_name_the_flags_that_help(fails, tiny_voc, flags_of, tmp_path, monkeypatch):
    def offline(*args, **more):
        raise OFFLINE

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    message = fails(flags_of(tiny_voc, tmp_path, "--width", "1", "--batch-norm", "none", "--pretrained"))
    assert "no route to host" in message
    assert all(flag in message for flag in ("--backbone-weights", "--no-pretrained"))


def test_backbone_weights_that_are_something_else_are_one_line(fails, tiny_run, flags_of, tmp_path):
    flags = flags_of(tiny_run.data, tmp_path / "out", "--width", "1", "--pretrained", "--backbone-weights")
    assert "none.pth" in fails([*flags, tmp_path / "none.pth"])
    assert "do not fit" in fails([*flags, tiny_run.final])


def test_a_device_that_is_not_there_is_one_line_that_names_the_flag(fails, tiny_voc, flags_of, tmp_path):
    assert "--device" in fails(flags_of(tiny_voc, tmp_path, "--device", "cuda:99"))


@pytest.mark.parametrize("task", ["train", "evaluate", "predict"])
def test_an_output_folder_that_cannot_be_made_ends_without_a_traceback(
    tiny_run, flags_of, tmp_path, monkeypatch, capsys, task
):
    monkeypatch.setattr(ssd, "fit", None)
    (tmp_path / "file").write_text("in the way")
    flags = {
        "train": flags_of(tiny_run.data, tmp_path),
        "evaluate": ["--evaluate", str(tiny_run.final)],
        "predict": [
            "--predict",
            str(tiny_run.data / "JPEGImages" / "test_0.jpg"),
            "--weights",
            str(tiny_run.final),
        ],
    }
    assert ssd.main([*flags[task], *HERE, "--output-dir", str(tmp_path / "file" / "out")]) == 2
    assert re.fullmatch(r"error: .*file.*", capsys.readouterr().err.splitlines()[-1])


# ---- resuming ----


def test_resuming_with_another_network_or_from_a_damaged_file_is_one_line(fails, tiny_run, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    content = (tiny_run.output / "checkpoints" / "last.pth").read_bytes()
    (checkpoints / "last.pth").write_bytes(content)
    flags = ["--resume", "--output-dir", tmp_path, *HERE]
    assert "of another network or optimizer" in fails([*flags, "--width", ".125"])
    (checkpoints / "last.pth").write_bytes(content[:5000])
    assert "last.pth: not readable" in fails(flags)
    (checkpoints / "last.pth").write_bytes(tiny_run.final.read_bytes())
    assert "no training state" in fails(flags)


def test_resuming_a_run_of_other_classes_is_one_line(fails, tiny_run, make_voc, tmp_path):
    other = make_voc(tmp_path / "other", {"train": 2, "val": 1, "test": 1}, empty_every=0)
    for path in (other / "Annotations").iterdir():
        path.write_text(path.read_text().replace("round", "wheel"))
    message = fails(["--resume", "--epochs", "3", "--output-dir", tiny_run.output, "--data", other, *HERE])
    assert "angular, round" in message
    assert "--init-from" in message


def test_a_run_goes_on_with_its_data_elsewhere_and_tells_other_data(tiny_run, tmp_path, capsys, no_pictures):
    other = tmp_path / "elsewhere"
    shutil.copytree(tiny_run.data, other)
    for epochs in ("3", "4"):
        out = tmp_path / epochs
        shutil.copytree(tiny_run.output, out)
        flags = ["--resume", "--epochs", epochs, "--output-dir", str(out), "--data", str(other), *HERE]
        assert ssd.main(flags) == 0
        told = capsys.readouterr().err
        assert ("not the training images and boxes of before" in told) == (epochs == "4")
        path = other / "Annotations" / "train_0.xml"  # and now a box is another one
        path.write_text(re.sub(r"<xmin>\d+", "<xmin>1", path.read_text(), count=1))


# ---- Ctrl-C and SIGTERM ----


def test_an_interruption_before_anything_is_saved_exits_130(
    tiny_voc, flags_of, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ssd, "load_data", interrupt)
    numbers = signal.SIGINT, signal.SIGTERM
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    assert ssd.main(flags_of(tiny_voc, tmp_path)) == 130
    assert "nothing was saved" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in numbers] == [ssd._stop] * 2


def test_the_command_to_go_on_with_is_one_for_a_shell(tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "my run" / "checkpoints").mkdir(parents=True)
    last = tiny_run.output / "checkpoints" / "last.pth"
    (tmp_path / "my run" / "checkpoints" / "last.pth").write_bytes(last.read_bytes())
    monkeypatch.setattr(ssd, "load_data", interrupt)
    for root, asked in (("data", 3), ("my data", 5)):  # which a saved run does not hold
        place = ["--output-dir", str(tmp_path / "my run"), "--data-root", root]
        assert ssd.main(["--resume", *place, *HERE]) == 130
        command = shlex.split(capsys.readouterr().err.split("go on with ")[1])
        args = ssd.load_settings(command)[0]
        assert (args.output_dir, args.data_root, len(command)) == (str(tmp_path / "my run"), root, asked)


def start(flags):
    """Start the real program, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, ssd.__file__, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("name", "workers", "send"),
    [
        ("SIGTERM", "1", os.kill),
        ("SIGINT", "0", os.kill),
        ("SIGTERM", "2", os.killpg),
        ("SIGINT", "1", os.killpg),  # to its loader processes too, as by torchrun
    ],
)
def test_a_signal_ends_a_real_run_after_a_save_and_the_command_it_prints_goes_on(
    tiny_voc, flags_of, tmp_path, no_pictures, name, workers, send
):
    checkpoints = tmp_path / "checkpoints"
    flags = ("--epochs", "9999", "--patience", "0", "--workers", workers, "--eval-interval", "9999")
    rows = checkpoints / "metrics.jsonl"
    process, deadline = start(flags_of(tiny_voc, tmp_path, *flags)), time.monotonic() + 120
    try:
        while not rows.is_file() or len(rows.read_text().splitlines()) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        send(process.pid, getattr(signal, name))
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:  # else it would go on for hours
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 128 + getattr(signal, name), err
    assert "Traceback" not in out + err
    assert not list(tmp_path.rglob("*.tmp"))
    epoch = ssd.load_checkpoint(checkpoints / "last.pth", resumable=True)["train_state"]["epoch"]
    assert epoch >= len(rows.read_text().splitlines())  # what waited in memory was written
    command = shlex.split(err.split("go on with ")[1])
    assert ssd.main([*command, *HERE, "--epochs", str(epoch + 1)]) == 0
    assert len(rows.read_text().splitlines()) == epoch + 1


# ---- full disks ----


def broken_disk(monkeypatch, broken):
    """Let flushing a file fail as on a full disk where broken(file name) says so; save after every epoch."""
    whole = os.fsync

    def fsync(descriptor):
        if broken(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(ssd, "SAVE_SECONDS", 0.0)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_disk_that_is_full_for_a_while_costs_warnings_and_not_the_run(
    tiny_run, flags_of, same_run, tmp_path, monkeypatch, capsys, no_pictures
):
    due = [".best.pth", ".last.pth", ".metrics.jsonl"]

    def broken(name):
        is_due = bool(due) and name.startswith(due[0])
        if is_due:
            due.pop(0)
        return is_due

    broken_disk(monkeypatch, broken)
    assert ssd.main(flags_of(tiny_run.data, tmp_path)) == 0
    assert due == []
    said = capsys.readouterr().err
    assert "best.pth waits for the next save" in said
    assert "No space left" in said
    same_run(tmp_path, tiny_run.output)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_run_whose_checkpoints_can_never_be_written_fails_and_leaves_the_earlier_ones(
    tiny_voc, flags_of, tmp_path, monkeypatch, capsys, no_pictures
):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "last.pth").write_text("precious")
    broken_disk(monkeypatch, lambda name: ".pth" in name)
    assert ssd.main(flags_of(tiny_voc, tmp_path)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert "could not be written" in message
    (aside,) = [p for p in checkpoints.iterdir() if p.is_dir()]
    assert (aside / "last.pth").read_text() == "precious"
    assert not list(checkpoints.glob("*.pth"))


# ---- whole runs ----


def png(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_a_run_ends_with_the_test_line_the_checkpoint_and_the_wall_time(tiny_run):
    assert tiny_run.code == 0
    assert tiny_run.err == ""
    *_, summary, path, wall = tiny_run.out.splitlines()
    assert TEST_LINE.fullmatch(summary)
    assert path == str(tiny_run.final)
    assert re.fullmatch(r"wall time \d+:\d\d:\d\d", wall)


def test_a_run_prints_what_runs_on_what_and_a_line_an_epoch(tiny_run):
    lines = tiny_run.out.splitlines()
    assert any("8 train images (train), 4 val images (val), 4 test images (test)" in line for line in lines)
    assert any(torch.__version__ in line for line in lines)
    assert any(line.startswith("recipe   small: 2 epochs, batch size 4") for line in lines)
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 2
    assert "2/2" in epochs[1]
    assert "mAP" in epochs[1]
    assert any(re.match(r"angular +\d+ ", line) for line in lines)


def test_a_run_leaves_checkpoints_records_and_pictures(tiny_run):
    checkpoints, plots = tiny_run.output / "checkpoints", tiny_run.output / "plots"
    expected = {"last.pth", "best.pth", "previous.pth", tiny_run.final.name, "metrics.jsonl", "run.json"}
    assert {p.name for p in checkpoints.iterdir()} == expected
    for name in ("loss", "predictions", "augmentations"):
        assert png(plots / f"{name}.png").std() > 1, name
    run = json.loads((checkpoints / "run.json").read_text())
    assert run["classes"] == ["angular", "round"]
    assert run["flags"]["lr"] == 0.005
    assert run["environment"]["torch"] == torch.__version__
    assert run["test"] == ssd.load_checkpoint(tiny_run.final)["test"]


def test_evaluating_the_final_checkpoint_repeats_what_training_printed(tiny_run, tmp_path, capsys):
    assert ssd.main(["--evaluate", str(tiny_run.final), "--output-dir", str(tmp_path), *HERE]) == 0
    printed = capsys.readouterr().out.splitlines()
    trained = tiny_run.out.splitlines()
    at = next(i for i, line in enumerate(trained) if line.startswith("class "))
    assert trained[at + 3].startswith("mean ")
    assert printed[1:] == trained[at:-2]  # the table and the test line
    numbers = json.loads((tmp_path / "plots" / "evaluation" / "evaluation.json").read_text())
    assert numbers == json.loads(json.dumps(ssd.load_checkpoint(tiny_run.final)["test"]))
    assert numbers["map_area"] > 0
    assert numbers["per_class"].keys() == {"angular", "round"}
    expected = {
        "checkpoint": str(tiny_run.final),
        "data": str(tiny_run.data),
        "split": "test",
        "num_images": 4,
        "precision": "float32",
        "detection": {"score_thresh": 0.001, "nms_iou_thresh": 0.45},
    }
    assert {name: numbers[name] for name in expected} == expected
    png(tmp_path / "plots" / "predictions.png")
    assert not (tmp_path / "checkpoints").exists()


def test_steps_are_logged_and_printed_and_a_resumed_run_keeps_them(
    tiny_voc, flags_of, tmp_path, capsys, no_pictures
):
    flags = flags_of(tiny_voc, tmp_path, "--log-every", "1")
    assert ssd.main([*flags, "--epochs", "1"]) == 0
    path = tmp_path / "checkpoints" / "steps.jsonl"
    first = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in first] == [1, 2]
    metrics = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([row["loss"] for row in first]) == pytest.approx(metrics[0]["train_loss"], rel=1e-5)
    assert first[-1]["lr"] == metrics[0]["lr"]
    assert first[0].keys() == {"step", "loss", "loss_cls", "loss_box", "lr", "images_per_s"}
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in printed] == ["1", "2"]
    assert (
        ssd.main(["--resume", "--epochs", "2", "--log-every", "2", "--output-dir", str(tmp_path), *HERE]) == 0
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[:2] == first
    assert [row["step"] for row in rows[2:]] == [4]


def test_a_finished_run_is_not_resumed(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(tiny_run.output, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert ssd.main(["--resume", "--output-dir", str(out), *HERE]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "is finished" in line
    assert "--init-from" in line
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_resumed_run_reports_the_time_of_all_its_parts(tiny_run, tmp_path, capsys, no_pictures):
    out = tmp_path / "out"
    shutil.copytree(tiny_run.output, out)
    last = ssd.load_checkpoint(out / "checkpoints" / "last.pth")
    last["train_state"]["history"][0]["seconds"] = 5000.0
    ssd.save_checkpoint(out / "checkpoints" / "last.pth", last)
    assert ssd.main(["--resume", "--epochs", "3", "--output-dir", str(out), *HERE]) == 0
    assert json.loads((out / "checkpoints" / "run.json").read_text())["wall_s"] > 5000
    assert re.search(r"wall time 1:2\d:", capsys.readouterr().out)


def test_classes_may_stand_in_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffred, ripe\n\ncat\ncat\n", encoding="utf-8")
    assert ssd.class_list(str(tmp_path / "names.txt")) == ("red, ripe", "cat")
    assert ssd.class_list("red, ripe,cat") == ("red", "ripe", "cat")
    (tmp_path / "names.txt").write_text("caf\u00e9\n", encoding="utf-16")
    assert ssd.class_list(str(tmp_path / "names.txt")) == ("caf\u00e9",)
    assert ssd.class_list("cafe\u0301,\u200bcaf\u00e9,") == ("caf\u00e9",)


@pytest.mark.parametrize("text", ["", " ", ",", "\u200b"])
def test_classes_that_name_none_are_one_line(text, capsys):
    with pytest.raises(SystemExit):
        ssd.main(["--classes", text])
    assert capsys.readouterr().err == "error: argument --classes: names no class (see --help)\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "names no class"),
        (b"\n \n", "names no class"),
        (b"\xff\xd8\xff\xe0", "no UTF-8"),
        (b"a\0b", "no UTF-8"),
    ],
)
def test_a_file_that_is_called_as_a_class_is_told(content, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").write_bytes(content)
    with pytest.raises(SystemExit):
        ssd.main(["--classes", "cat"])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument --classes: {problem}" in line
    assert 'the file cat was read; "cat," is the class' in line
    assert ssd.class_list("cat,") == ("cat",)


def test_flags_beat_how_a_run_was_measured(tiny_run, tmp_path, monkeypatch, no_pictures):
    evaluate, seen = ssd.measure, []
    monkeypatch.setattr(ssd, "measure", lambda *a, **more: seen.append(more) or evaluate(*a, **more))
    argv = ["--evaluate", str(tiny_run.final), "--output-dir", str(tmp_path), *HERE]
    assert ssd.main([*argv, "--nms-iou", ".6", "--score-thresh", ".1"]) == 0
    numbers = json.loads((tmp_path / "plots" / "evaluation" / "evaluation.json").read_text())
    assert numbers["detection"] == {"score_thresh": 0.1, "nms_iou_thresh": 0.6}
    assert numbers["detection"].items() <= seen[0].items()


def test_data_of_other_classes_is_measured_for_those_it_shares(tiny_run, make_voc, tmp_path, fails, capfd):
    other = make_voc(tmp_path / "other", {"test": 2}, empty_every=0)
    argv = ["--evaluate", tiny_run.final, "--data", other, "--output-dir", tmp_path, *HERE]
    annotations = sorted((other / "Annotations").iterdir())
    for path in annotations:
        path.write_text(path.read_text().replace("round", "wheel"))
    assert ssd.main([str(a) for a in argv]) == 0
    out = capfd.readouterr().out
    assert "left out: wheel" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["round"][0] == "0"  # objects of a class that the mean leaves out
    assert rows["mean"] == rows["angular"][2:]
    for path in annotations:
        path.write_text(path.read_text().replace("angular", "box"))
    message = fails(argv)
    assert "angular, round" in message
    assert "--data" in message


def test_predicting_writes_a_picture_each_and_one_report(tiny_run, tmp_path, capsys):
    images = [str(tiny_run.data / "JPEGImages" / f"test_{i}.jpg") for i in range(2)]
    flags = ["--weights", str(tiny_run.final), "--output-dir", str(tmp_path), "--device", "cpu"]
    folder = tmp_path / "plots" / "predictions"
    detector = ssd.load_detector(tiny_run.final, "cpu")
    for more, thresh in (([], None), (["--score-thresh", ".02", "--nms-iou", ".3"], 0.02)):
        assert ssd.main(["--predict", *images, *flags, *more]) == 0
        assert {p.name for p in folder.iterdir()} == {"test_0.png", "test_1.png", "predictions.json"}
        report = json.loads((folder / "predictions.json").read_text())
        first, *lines, last = capsys.readouterr().out.splitlines()
        assert first == f"weights  {tiny_run.final}"
        assert last == str(folder / "predictions.json")
        for path, line in zip(images, lines, strict=True):
            with Image.open(path) as image:
                assert png(folder / f"{Path(path).stem}.png").shape[1::-1] == image.size
            assert line.startswith(f"{path}: ")
        settings = {"score_thresh": thresh, "nms_iou_thresh": 0.3 if more else 0.45}
        for path, expected in zip(images, detector.predict(images, **settings), strict=True):
            assert_same_predictions(report[path], expected.to_dict())


def test_without_weights_the_newest_final_checkpoint_predicts(tiny_run, tmp_path, fails, capfd):
    image = str(tiny_run.data / "JPEGImages" / "test_0.jpg")
    argv = ["--predict", image, "--output-dir", str(tmp_path), *HERE]
    assert "--weights" in fails(argv)
    (tmp_path / "checkpoints").mkdir()
    for age, name in enumerate(("ssd_new_final.pth", "ssd_old_final.pth", "last.pth")):
        path = tmp_path / "checkpoints" / name
        shutil.copy(tiny_run.final, path)
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "checkpoints" / "last.pth").touch()
    assert ssd.main(argv) == 0
    assert f"weights  {tmp_path / 'checkpoints' / 'ssd_new_final.pth'}" in capfd.readouterr().out


def test_what_is_found_is_counted_by_class(tiny_run, tmp_path, capsys, no_pictures):
    image = str(tiny_run.data / "JPEGImages" / "test_0.jpg")
    flags = ["--weights", str(tiny_run.final), "--output-dir", str(tmp_path), "--score-thresh", ".01", *HERE]
    assert ssd.main(["--predict", image, *flags]) == 0
    names = ssd.load_detector(tiny_run.final, "cpu").predict(image, score_thresh=0.01).names
    counted = {f"{name} {names.count(name)}" for name in names}
    assert set(capsys.readouterr().out.splitlines()[1].split(": ")[1].split(" -> ")[0].split(", ")) == counted


def test_files_of_the_same_name_keep_pictures_of_their_own(tiny_run, tmp_path, capsys):
    images = [tmp_path / name for name in ("a/x.png", "b/x.png", "c/x_1.png")]
    for path in images:
        path.parent.mkdir()
        Image.new("RGB", (30, 30)).save(path)
    flags = ["--weights", str(tiny_run.final), "--output-dir", str(tmp_path), "--score-thresh", "1", *HERE]
    assert ssd.main(["--predict", *map(str, images), *flags]) == 0
    folder, targets = tmp_path / "plots" / "predictions", set()
    for path, line in zip(images, capsys.readouterr().out.splitlines()[1:-1], strict=True):
        source, target = re.fullmatch(
            r"(.*): nothing found, at best (?:angular|round) \d\.\d\d -> (.*)", line
        ).groups()
        assert source == str(path)
        targets.add(Path(target))
    assert targets == set(folder.glob("*.png"))
    assert len(targets) == 3
    report = json.loads((folder / "predictions.json").read_text())
    assert list(report) == [str(path) for path in images]


def test_a_run_without_test_list_on_images_of_which_most_are_empty_says_so(
    make_voc, flags_of, tmp_path, capsys
):
    data = make_voc(tmp_path / "voc", {"train": 4, "val": 1}, empty_every=2)
    ids = ["train_1", "train_3", "train_0"]
    (data / "ImageSets" / "Main" / "train.txt").write_text("\n".join(ids) + "\n")
    flags = flags_of(data, tmp_path / "out", "--epochs", "1", "--batch-size", "1", "--loss", "multibox")
    assert ssd.main(flags) == 0
    summary, path, _ = capsys.readouterr().out.splitlines()[-3:]
    assert "--test-split" in summary
    assert path.endswith("ssd_voc_final.pth")
    assert (tmp_path / "out" / "plots" / "predictions.png").is_file()


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_list_without_an_object_does_not_cost_the_run(make_voc, flags_of, tmp_path, no_pictures, split):
    data = make_voc(tmp_path / "voc", {"train": 2, "val": 1, "test": 1}, empty_every=0)
    annotation = data / "Annotations" / f"{split}_0.xml"
    annotation.write_text(re.sub("<object>.*</object>", "", annotation.read_text(), flags=re.S))
    assert ssd.main(flags_of(data, tmp_path / "out", "--batch-size", "2")) == 0
    final = ssd.load_checkpoint(tmp_path / "out" / "checkpoints" / "ssd_voc_final.pth")
    assert math.isnan(final["test"]["map_area"]) == (split == "test")
    if split == "val":  # no mAP can choose, so the newest weights are kept
        assert final["metrics"]["epoch"] == 2
