"""Command line: flags, defaults, mistakes, and whole runs."""

import ast
import contextlib
import errno
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

import ssd_object_detection as ssd

OFFLINE = urllib.error.URLError("no route to host")
TEST_LINE = re.compile(r"^Test mAP@\.5: \d\.\d{4} \(area\), \d\.\d{4} \(11-point\)$")


def actions():
    return [action for action in ssd.build_parser()._actions if action.dest != "help"]


def refused(capsys, argv):
    """Parse a command line that argparse must refuse; returns its message."""
    with pytest.raises(SystemExit) as caught:
        ssd.parse_args(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ---- importing ----


def test_importing_the_module_does_nothing(tmp_path):
    program = (
        "import os, random, socket, sys\n"
        "import numpy as np, torch\n"
        "def refuse(*args): raise OSError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "def state():\n"
        "    return (torch.get_rng_state().tolist(), str(random.getstate()), str(np.random.get_state()),\n"
        "            torch.get_num_threads(), list(sys.argv), os.getcwd(), sorted(os.listdir('.')))\n"
        "before = state()\n"
        "import ssd_object_detection\n"
        "assert state() == before\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(ssd.__file__).parent
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND", "NO_ALBUMENTATIONS_UPDATE")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program, "--epochs", "nonsense"], cwd=tmp_path, env=env, text=True,
                          capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- flags ----


def test_every_flag_is_read_outside_the_parser():
    tree = ast.parse(inspect.getsource(ssd))
    kept = [node for node in tree.body if getattr(node, "name", None) != "build_parser"]
    read = set()
    for node in (inner for outer in kept for inner in ast.walk(outer)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
            read.add(node.attr)
        elif isinstance(node, (ast.Tuple, ast.List)):  # names = ("data", ...), read by getattr(args, name)
            read |= {e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)}
    read |= {*ssd.Recipe._fields, *ssd.DETECTION_FLAGS.values()}  # read by getattr(args, name) as well
    assert {action.dest for action in actions()} <= read


def test_every_field_of_the_recipe_is_a_flag_and_is_read():
    assert set(ssd.Recipe._fields) <= {action.dest for action in actions()}
    source = inspect.getsource(ssd)
    assert [name for name in ssd.Recipe._fields if not re.search(rf"\brecipe\.{name}\b", source)] == []


def test_there_are_at_most_70_flags_and_each_explains_itself():
    assert 30 < len(actions()) <= 70
    assert [action.dest for action in actions() if not action.help] == []
    assert all(len(action.option_strings) == 1 or action.option_strings[1].startswith("--no-") for action in actions())


def test_help_ends_well_and_prints_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        ssd.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in actions():
        assert flag.option_strings[0] in text
    assert "--momentum" in text
    assert "AdamW's beta 1 (default: 0.9)" in text
    assert "largest gradient norm; 0: no limit (default: 10.0)" in text
    assert "(default: None)" not in text
    assert text.count("(default: ") > 40


# ---- defaults ----


def voc_lists(root, *names):
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.txt").write_text("a\n")
    return str(root)


@pytest.mark.parametrize("data", ["voc2007", "voc0712"])
def test_voc_starts_from_imagenet_weights_with_the_paper_s_sgd(data):
    args = ssd.parse_args(["--data", data])
    assert (args.train_split, args.val_split, args.test_split) == ("trainval", None, "test")
    assert (args.pretrained, args.width, args.batch_norm, args.optimizer) == (True, 1.0, False, "sgd")
    assert (args.lr, args.momentum, args.weight_decay) == (1e-3, 0.9, 5e-4)
    assert args.epochs == 100


def test_shapes_trains_a_narrow_network_from_scratch():
    args = ssd.parse_args(["--data", "shapes"])
    assert (args.train_split, args.val_split, args.test_split) == ("train", "val", "test")
    assert (args.pretrained, args.batch_norm, args.optimizer) == (False, True, "adamw")
    assert args.width < 1
    assert args.lr == ssd.DATA_DEFAULTS["shapes"]["lr"]
    assert args.weight_decay == ssd.SCRATCH_DEFAULTS["weight_decay"]
    assert args.epochs < 100


@pytest.mark.parametrize(("lists", "train", "test"), [
    (("train", "val", "test"), "train", "test"), (("train",), "train", None),
    (("trainval", "test"), "trainval", "test"), (("train", "trainval"), "train", None),
])
def test_a_folder_is_trained_on_the_lists_that_it_has(tmp_path, lists, train, test):
    args = ssd.parse_args(["--data", voc_lists(tmp_path / "mine", *lists)])
    assert (args.train_split, args.test_split) == (train, test)
    assert (args.pretrained, args.width, args.epochs) == (True, 1.0, 100)


def test_the_kind_of_start_chooses_optimizer_rate_decay_and_batch_norm():
    for flags in (["--no-pretrained"], ["--width", ".5"]):
        scratch = ssd.parse_args(flags)
        assert {name: getattr(scratch, name) for name in ssd.SCRATCH_DEFAULTS} == ssd.SCRATCH_DEFAULTS
        assert scratch.pretrained is False
    pretrained = ssd.parse_args(["--data", "shapes", "--width", "1"])
    assert pretrained.pretrained is True
    assert (pretrained.optimizer, pretrained.batch_norm) == ("sgd", False)


def test_a_flag_wins_over_the_data_set_and_the_kind_of_start():
    args = ssd.parse_args(["--data", "shapes", "--epochs", "3", "--lr", ".5", "--batch-size", "2", "--no-batch-norm",
                           "--optimizer", "sgd", "--weight-decay", "0", "--test-split", "val", "--workers", "0"])
    assert (args.epochs, args.lr, args.batch_size, args.batch_norm) == (3, 0.5, 2, False)
    assert (args.optimizer, args.weight_decay, args.test_split, args.workers) == ("sgd", 0.0, "val", 0)
    assert args.given == {"data", "epochs", "lr", "batch_size", "batch_norm", "optimizer", "weight_decay", "test_split",
                          "workers"}


def test_saved_flags_stand_between_those_given_and_the_defaults():
    args = ssd.parse_args(["--lr", ".5"], {"data": "shapes", "lr": 0.25, "epochs": 7, "classes": ["a", "b"]})
    assert (args.data, args.lr, args.epochs, args.classes) == ("shapes", 0.5, 7, ("a", "b"))
    assert args.width == ssd.DATA_DEFAULTS["shapes"]["width"]


# ---- mistakes on the command line ----


@pytest.mark.parametrize(("flag", "value"), [
    ("--epochs", "-1"), ("--epochs", "0"), ("--epochs", "2.5"), ("--epochs", "many"), ("--val-fraction", "2"),
    ("--val-fraction", "-.1"), ("--val-fraction", "1"), ("--lr", "0"), ("--lr", "nan"), ("--lr", "inf"), ("--lr", "-1"),
    ("--focal-alpha", "3"), ("--focal-alpha", "-.5"), ("--focal-gamma", "-1"), ("--classes", "a,,b"),
    ("--classes", "a,a"), ("--classes", ""), ("--batch-size", "0"), ("--width", "0"), ("--crop", "1.1"),
    ("--zoom-out", "nan"), ("--freeze-blocks", "6"), ("--amp", "fp8"),
    ("--loss", "hinge"), ("--optimizer", "adam"), ("--seed", "-1"), ("--workers", "-1"), ("--max-detections", "0"),
    ("--score-thresh", "2"), ("--nms-iou", "-1"), ("--match-iou", "1.5"), ("--ema-decay", "2"), ("--patience", "-1"),
    ("--eval-interval", "0"), ("--save-minutes", "-1"), ("--clip-grad", "-1"), ("--weight-decay", "-1"),
    ("--warmup-epochs", "-1"),
])
def test_a_bad_value_is_refused_with_a_message_that_names_the_flag(capsys, flag, value):
    message = refused(capsys, [flag, value])
    assert flag in message
    assert len(message) > len(flag) + 10


def test_a_momentum_that_an_optimizer_refuses_is_refused_by_its_flag(capsys):
    assert "--momentum" in refused(capsys, ["--data", "shapes", "--momentum", "1"])


def test_a_typo_in_a_flag_is_refused_by_name(capsys):
    assert "--epoch-count" in refused(capsys, ["--epoch-count", "3"])
    assert "stray" in refused(capsys, ["stray"])


@pytest.mark.parametrize(("argv", "named"), [
    (["--evaluate", "a.pth", "--predict", "b.jpg", "--weights", "a.pth"], ["--evaluate", "--predict"]),
    (["--evaluate", "a.pth", "--resume"], ["--evaluate", "--resume"]), (["--audit", "--resume"], ["--audit"]),
    (["--predict", "b.jpg"], ["--predict", "--weights"]), (["--weights", "a.pth"], ["--predict", "--weights"]),
    (["--save-crops"], ["--save-crops", "--predict"]), (["--evaluate", "a.pth", "--save-xml"], ["--save-xml"]),
    (["--pretrained", "--width", ".5"], ["--pretrained", "--width"]),
    (["--data", "shapes", "--pretrained"], ["--pretrained", "--width"]),
    (["--no-pretrained", "--backbone-weights", "vgg.pth"], ["--backbone-weights", "--no-pretrained"]),
    (["--no-pretrained", "--freeze-blocks", "2"], ["--freeze-blocks"]),
    (["--data", "shapes", "--freeze-blocks", "2"], ["--freeze-blocks"]),
])
def test_a_contradiction_is_refused_before_any_data_is_touched(capsys, monkeypatch, argv, named):
    def touched(*args, **more):
        raise AssertionError("the data was touched")

    monkeypatch.setattr(ssd, "load_data", touched)
    monkeypatch.setattr(ssd, "load_checkpoint", touched)
    message = refused(capsys, argv)
    assert all(flag in message for flag in named)
    with pytest.raises(SystemExit):
        ssd.main(argv)


# ---- mistakes that the data or a file shows ----


def test_a_missing_data_folder_is_one_line(fails, tmp_path):
    assert "--data" in fails(["--data", tmp_path / "none", "--output-dir", tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_list_is_one_line_that_names_it_and_those_there(fails, tiny_voc, flags_of, tmp_path):
    message = fails(flags_of(tiny_voc, tmp_path, "--train-split", "learn"))
    assert "learn.txt" in message
    assert "test, train, val" in message


def test_a_missing_checkpoint_is_one_line(fails, tmp_path):
    assert "none.pth" in fails(["--evaluate", tmp_path / "none.pth"])
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    assert "none.pth" in fails(["--predict", tmp_path / "a.png", "--weights", tmp_path / "none.pth"])


def test_a_missing_or_broken_picture_to_predict_is_one_line(fails, tiny_run, tmp_path, capfd):
    flags = ["--weights", tiny_run.final, "--device", "cpu", "--output-dir", tmp_path]
    assert "none.jpg" in fails(["--predict", tmp_path / "none.jpg", *flags])
    (tmp_path / "broken.jpg").write_text("no picture")
    capfd.readouterr()
    assert ssd.main(["--predict", str(tmp_path / "broken.jpg"), *map(str, flags)]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "broken.jpg" in line


def test_what_cannot_be_predicted_is_one_line(fails, tiny_run, tmp_path):
    picture, flags = tiny_run.data / "JPEGImages" / "test_0.jpg", ["--device", "cpu", "--output-dir", tmp_path]
    (tmp_path / "empty").mkdir()
    assert "no image or video" in fails(["--predict", tmp_path / "empty", "--weights", tiny_run.final, *flags])
    assert "no class cat" in fails(["--predict", picture, "--weights", tiny_run.final, "--classes", "cat", *flags])
    assert "lacks config.json" in fails(["--predict", picture, "--weights", tmp_path / "empty", *flags])
    results = tmp_path / "plots" / "predictions"
    results.mkdir(parents=True)
    shutil.copy(picture, results)
    assert "--output-dir" in fails(["--predict", results, "--weights", tiny_run.final, *flags])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_picture_that_breaks_after_the_audit_is_one_line_also_from_a_worker_process(
    fails, make_voc, flags_of, tmp_path, monkeypatch, workers
):
    data = make_voc(tmp_path / "voc", {"train": 4, "val": 1})
    picture = data / "JPEGImages" / "train_2.jpg"
    monkeypatch.setattr(ssd, "plot_augmentations", lambda *args: picture.write_text("no picture") and Figure())
    message = fails(flags_of(data, tmp_path / "out", "--workers", workers))
    assert "train_2.jpg" in message
    assert "not readable" in message
    assert (tmp_path / "out" / "checkpoints" / "last.pth").is_file()


def test_a_picture_of_another_size_than_its_annotation_says_is_one_line(fails, make_voc, flags_of, tmp_path):
    data = make_voc(tmp_path / "voc", {"train": 4, "val": 1})
    Image.new("RGB", (20, 10)).save(data / "JPEGImages" / "train_2.jpg")
    message = fails(flags_of(data, tmp_path / "out"))
    assert "train_2.jpg" in message
    assert "20x10" in message


def test_voc_without_a_network_names_the_flags_that_help(fails, tmp_path, monkeypatch):
    def offline(*args, **more):
        raise OFFLINE

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", offline)
    message = fails(["--data-root", tmp_path, "--output-dir", tmp_path / "out"])
    assert "no route to host" in message
    assert all(flag in message for flag in ("--data PATH", "--data-root", "--data shapes"))


def test_weights_without_a_network_name_the_flags_that_help(fails, tiny_voc, flags_of, tmp_path, monkeypatch):
    def offline(*args, **more):
        raise OFFLINE

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    message = fails(flags_of(tiny_voc, tmp_path, "--width", "1", "--pretrained"))
    assert "no route to host" in message
    assert all(flag in message for flag in ("--backbone-weights", "--no-pretrained"))


def test_backbone_weights_that_are_something_else_are_one_line(fails, tiny_voc, tiny_run, flags_of, tmp_path):
    flags = flags_of(tiny_voc, tmp_path / "out", "--width", "1", "--pretrained", "--backbone-weights")
    assert "none.pth" in fails([*flags, tmp_path / "none.pth"])
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "small.pth")
    fails([*flags, tmp_path / "small.pth"])
    assert fails([*flags, tiny_run.final])


def test_a_device_that_is_not_there_is_one_line_that_names_the_flag(fails, tiny_voc, flags_of, tmp_path):
    assert "--device" in fails(flags_of(tiny_voc, tmp_path, "--device", "cuda:99"))


def test_the_classes_of_another_data_set_are_one_line_that_names_both(fails, tiny_run, make_voc, tmp_path):
    other = make_voc(tmp_path / "other", {"train": 2, "test": 1}, empty_every=0)
    for path in (other / "Annotations").iterdir():
        path.write_text(path.read_text().replace("round", "wheel"))
    message = fails(["--evaluate", tiny_run.final, "--data", other, "--val-fraction", "0", "--device", "cpu"])
    assert "round" in message
    assert "wheel" in message
    assert "--data" in message


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "out"


def test_an_output_folder_that_cannot_be_made_is_one_line_before_training(
    fails, tiny_voc, flags_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(ssd, "fit", None)
    assert "--output-dir" in fails(flags_of(tiny_voc, below_a_file(tmp_path)))


def test_a_prediction_into_a_folder_that_cannot_be_made_is_one_line(fails, tiny_run, tmp_path):
    picture = tiny_run.data / "JPEGImages" / "test_0.jpg"
    assert "file" in fails(["--predict", picture, "--weights", tiny_run.final, "--device", "cpu",
                            "--output-dir", below_a_file(tmp_path)])


def test_an_evaluation_into_a_folder_that_cannot_be_made_ends_without_a_traceback(tiny_run, tmp_path, capsys):
    code = ssd.main(["--evaluate", str(tiny_run.final), "--device", "cpu", "--workers", "0",
                     "--output-dir", str(below_a_file(tmp_path))])
    assert code == 2
    assert re.search(r"^error: .*file", capsys.readouterr().err, re.M)


def test_a_loss_that_is_never_finite_stops_the_run_with_advice(
    tiny_voc, flags_of, tmp_path, monkeypatch, capsys, no_pictures
):
    whole = ssd.detection_loss
    monkeypatch.setattr(ssd, "detection_loss",
                        lambda *args, **more: {k: v * float("nan") for k, v in whole(*args, **more).items()})
    assert ssd.main(flags_of(tiny_voc, tmp_path)) == 2
    *skipped, message = capsys.readouterr().err.splitlines()
    assert len(skipped) == 2
    assert all("skipped" in line and "train_" in line for line in skipped)
    assert message.startswith("error: ")
    assert "nan" in message
    assert "--lr" in message
    report = json.loads((tmp_path / "checkpoints" / "nonfinite.json").read_text())
    assert [len(one["images"]) for one in report] == [4, 4]


# ---- the audit ----


ANCHOR_FILES = {  # content, what the message says of it
    "{": "cannot be read as JSON", "[[[0.1, 0.1]]]": "must hold 6 lists", "3": "must hold 6 lists",
    "[[[0.1]], [], [], [], [], []]": "must hold 6 lists", "[[],[],[],[],[],[]]": "must hold 6 lists",
    "[[[1,0]],[[1,1]],[[1,1]],[[1,1]],[[1,1]],[[1,1]]]": "must hold 6 lists",
}


@pytest.mark.parametrize("content", ANCHOR_FILES)
def test_a_bad_file_of_anchors_is_told_before_any_data_is_touched(content, tmp_path, capsys):
    path = tmp_path / "anchors.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        ssd.parse_args(["--anchors", str(path)])
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in message
    assert ANCHOR_FILES[content] in message


def test_suggested_anchors_can_be_trained_with_resumed_and_evaluated(tiny_voc, flags_of, tmp_path, capsys, no_pictures):
    out = tmp_path / "out"
    assert ssd.main(["--suggest-anchors", "--data", str(tiny_voc), "--output-dir", str(out)]) == 0
    printed, path = capsys.readouterr().out, out / "plots" / "anchors.json"
    means = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith(("present", "suggested"))]
    assert means[1] >= means[0] > 0.5
    sizes = json.loads(path.read_text())
    flags = flags_of(tiny_voc, out, "--anchors", str(path))
    assert ssd.main(flags) == 0
    path.unlink()  # the checkpoint has them
    assert ssd.main(["--resume", "--output-dir", str(out)]) == 0
    final = out / "checkpoints" / "ssd_tiny_set_final.pth"
    anchors = ssd.load_detector(final).model.anchors
    torch.testing.assert_close(anchors, ssd.make_anchors(sizes), rtol=0, atol=1e-6)
    assert not torch.equal(anchors, ssd.make_anchors())
    capsys.readouterr()
    assert ssd.main(["--evaluate", str(final), "--output-dir", str(tmp_path / "again")]) == 0
    assert "Test mAP@.5" in capsys.readouterr().out


def test_the_paper_s_recipe_yields_to_flags_given_and_a_resumed_run_keeps_both():
    args = ssd.parse_args(["--recipe", "paper", "--lr", ".002", "--width", ".25"])
    assert (args.loss, args.optimizer, args.lr, args.batch_size) == ("multibox", "sgd", 0.002, 32)
    assert (args.schedule, args.ema_decay, args.shadow, args.batch_norm, args.warmup_epochs) == ("step", 0, 0, False, 0)
    assert ssd.PAPER_RECIPE.keys() <= vars(args).keys()
    saved = {name: value for name, value in vars(args).items() if name != "given"}
    for argv in (["--resume"], ["--resume", "--recipe", "paper"]):
        again = ssd.parse_args(argv, saved)
        assert {n: v for n, v in vars(again).items() if n not in ("given", "resume")} == {
            n: v for n, v in saved.items() if n != "resume"}


def test_the_audit_prints_its_table_and_touches_nothing_but_its_file(make_voc, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = make_voc(tmp_path / "voc", {"train": 4, "val": 1})
    path = data / "Annotations" / "train_0.xml"
    path.write_text(re.sub("<xmax>.*?</xmax>", "<xmax>1</xmax>", path.read_text(), count=1))
    assert ssd.main(["--audit", "--data", str(data), "--val-split", "val"]) == 0
    out = capsys.readouterr().out
    assert "4 train, 1 val, 0 test images" in out
    assert re.search(r"^ +1  box reversed.*: dropped +train_0.xml object 1", out, re.M)
    assert [p.name for p in tmp_path.iterdir()] == ["voc"]
    assert (data / "audit.json").is_file()


def test_the_audit_of_bad_data_prints_its_table_and_fails(fails, make_voc, tmp_path, capfd):
    data = make_voc(tmp_path / "voc", {"train": 4, "val": 1})
    for number in (1, 2):
        (data / "JPEGImages" / f"train_{number}.jpg").write_text("no picture")
    message = fails(["--audit", "--data", data])
    assert "train_1.jpg" in message
    assert "and 1 more" in message
    assert "audit.json" in message
    assert ssd.main(["--audit", "--data", str(data), "--allow-bad-data"]) == 0
    assert "leaves out 2 image(s)" in capfd.readouterr().out


def test_a_run_leaves_bad_data_out_when_told(make_voc, flags_of, tmp_path, capsys, no_pictures):
    data = make_voc(tmp_path / "voc", {"train": 4, "val": 1})
    (data / "JPEGImages" / "train_1.jpg").write_text("no picture")
    flags = flags_of(data, tmp_path / "out", "--epochs", "1", "--batch-size", "1")
    assert ssd.main(flags) == 2
    assert not (tmp_path / "out").exists()
    assert ssd.main([*flags, "--allow-bad-data"]) == 0
    out = capsys.readouterr().out
    assert "3 train, 1 val" in out
    assert "train_1.jpg" in out


# ---- resuming ----


def test_resuming_without_a_run_is_one_line(fails, tmp_path):
    assert "last.pth" in fails(["--resume", "--output-dir", tmp_path])
    assert "mine.pth" in fails(["--resume", tmp_path / "mine.pth"])


def test_resuming_from_weights_alone_is_one_line(fails, tiny_run):
    message = fails(["--resume", tiny_run.final, "--output-dir", tiny_run.output])
    assert tiny_run.final.name in message
    assert "last.pth" in message


def test_resuming_with_other_flags_lists_each_difference(fails, tiny_run):
    message = fails(["--resume", "--output-dir", tiny_run.output, "--epochs", "5", "--lr", ".25", "--batch-size", "4"])
    assert "--epochs 5 (saved: 2)" in message
    assert "--lr 0.25 (saved: 0.005)" in message
    assert "--batch-size" not in message


def test_a_resumed_run_takes_the_saved_flags_and_those_that_may_change(tiny_run):
    argv = ["--resume", "--output-dir", str(tiny_run.output), "--patience", "7", "--width", ".0625"]
    args, checkpoint = ssd.resume_args(argv, ssd.parse_args(argv))
    assert (args.data, args.epochs, args.width, args.lr) == (str(tiny_run.data), 2, 0.0625, 0.005)
    assert (args.patience, args.output_dir) == (7, str(tiny_run.output))
    assert checkpoint["train_state"]["epoch"] == 2


def test_naming_the_saved_classes_again_is_no_contradiction(tiny_run, tmp_path):
    saved = ssd.load_checkpoint(tiny_run.output / "checkpoints" / "last.pth")
    saved["args"]["classes"] = ["angular", "round"]
    ssd.save_checkpoint(tmp_path / "last.pth", saved)
    argv = ["--resume", str(tmp_path / "last.pth"), "--classes", "angular,round"]
    assert ssd.resume_args(argv, ssd.parse_args(argv))[0].classes == ("angular", "round")


def test_an_interruption_while_reading_data_exits_130(tiny_voc, flags_of, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(ssd, "load_data", interrupt)
    assert ssd.main(flags_of(tiny_voc, tmp_path)) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_damaged_last_checkpoint_is_refused_and_the_previous_one_offered(fails, tiny_run, tmp_path):
    shutil.copytree(tiny_run.output / "checkpoints", tmp_path / "checkpoints")
    os.truncate(tmp_path / "checkpoints" / "last.pth", 5000)
    message = fails(["--resume", "--output-dir", tmp_path])
    assert "last.pth: not readable" in message
    assert message.endswith(f"the newest good one there is {tmp_path / 'checkpoints' / 'previous.pth'}")


def test_a_run_saved_by_the_first_format_is_resumed(tiny_run, flags_of, same_run, tmp_path, monkeypatch, no_pictures):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ssd, "plot_losses", interrupt)  # after the first epoch is saved
        assert ssd.main(flags_of(tiny_run.data, tmp_path)) == 130
    path = tmp_path / "checkpoints" / "last.pth"
    old = torch.load(path, weights_only=True)
    old["train_state"]["rng"] = old["train_state"]["rng"]["torch"]
    for name in ("audit", "allow_bad_data", "save_minutes", "deterministic"):
        del old["args"][name]
    del old["train_state"]["totals"], old["data"]
    torch.save(old | {"format_version": 1}, path)
    assert ssd.main(["--resume", "--output-dir", str(tmp_path)]) == 0
    same_run(tmp_path, tiny_run.output)


def test_a_resumed_run_whose_training_images_changed_is_one_line(fails, make_voc, flags_of, tmp_path, no_pictures):
    data = make_voc(tmp_path / "voc", {"train": 4, "val": 1})
    assert ssd.main(flags_of(data, tmp_path / "out", "--epochs", "1")) == 0
    (data / "ImageSets" / "Main" / "train.txt").write_text("train_0\ntrain_1\n")
    assert "training images" in fails(["--resume", "--output-dir", tmp_path / "out"])


# ---- whole runs ----


def png(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def script(flags):
    """Start the real program."""
    return subprocess.Popen([sys.executable, ssd.__file__, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


@pytest.mark.parametrize(("name", "workers"), [("SIGTERM", "1"), ("SIGINT", "0")])
def test_a_signal_ends_a_real_run_after_a_save_and_says_how_to_go_on(tiny_voc, flags_of, tmp_path, name, workers):
    last = tmp_path / "checkpoints" / "last.pth"
    flags = flags_of(tiny_voc, tmp_path, "--epochs", "9999", "--patience", "0", "--workers", workers,
                     "--eval-interval", "9999", "--save-minutes", "1e-9")
    process = script(flags)
    while not last.is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name), err
    assert f"--resume --output-dir {tmp_path}" in err
    assert "Traceback" not in out + err
    state = ssd.load_checkpoint(last, resumable=True)["train_state"]
    assert state["step"] > 0
    assert not list(tmp_path.rglob("*.tmp"))


def broken_disk(monkeypatch, broken):
    """Let flushing a file fail as on a full disk where broken(file name) says so."""
    whole = os.fsync

    def fsync(descriptor):
        if broken(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_disk_that_is_full_for_a_while_costs_warnings_and_not_the_run(
    tiny_run, flags_of, same_run, tmp_path, monkeypatch, capsys, no_pictures
):
    failures = iter([".best.pth", ".last.pth", ".metrics.jsonl"])
    due = [next(failures)]

    def broken(name):
        if due[0] is None or not name.startswith(due[0]):
            return False
        due[0] = next(failures, None)
        return True

    broken_disk(monkeypatch, broken)
    assert ssd.main(flags_of(tiny_run.data, tmp_path)) == 0
    said = capsys.readouterr()
    assert due == [None]
    assert "best.pth was not written, the next save tries again" in said.err
    assert "No space left" in said.err
    assert "saved nothing" in said.out
    same_run(tmp_path, tiny_run.output)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_run_whose_checkpoints_can_never_be_written_fails_and_leaves_the_earlier_ones(
    tiny_voc, flags_of, tmp_path, monkeypatch, capsys, no_pictures
):
    assert ssd.main(flags_of(tiny_voc, tmp_path, "--epochs", "1")) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").glob("*.pth")}
    broken_disk(monkeypatch, lambda name: ".pth" in name)
    assert ssd.main(flags_of(tiny_voc, tmp_path, "--epochs", "2")) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert "could not be written" in message
    (aside,) = [p for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()]
    assert {p.name: p.read_bytes() for p in aside.glob("*.pth")} == before


def test_a_run_ends_with_the_test_line_the_checkpoint_and_the_wall_time(tiny_run):
    assert tiny_run.code == 0
    assert tiny_run.err == ""
    *_, summary, path, wall = tiny_run.out.splitlines()
    assert TEST_LINE.match(summary)
    assert path == str(tiny_run.final)
    assert re.fullmatch(r"wall time \d+:\d\d:\d\d", wall)


def test_a_run_prints_what_runs_on_what_and_a_line_an_epoch(tiny_run):
    lines = tiny_run.out.splitlines()
    assert any("8 train, 4 val, 4 test images" in line for line in lines)
    assert any(torch.__version__ in line for line in lines)
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 2
    assert "2/2" in epochs[1]
    assert "mAP" in epochs[1]
    assert any(re.match(r"angular +\d+ ", line) for line in lines)


def test_a_run_leaves_checkpoints_records_and_pictures(tiny_run):
    checkpoints, plots = tiny_run.output / "checkpoints", tiny_run.output / "plots"
    names = {p.name for p in checkpoints.iterdir()}
    assert names == {"last.pth", "best.pth", "previous.pth", "ssd_tiny_set_final.pth", "metrics.jsonl", "run.json"}
    for name in ("loss", "training", "predictions", "data", "augmentations", "evaluation/precision_recall"):
        pixels = png(plots / f"{name}.png")
        assert pixels.std() > 1, name
    assert not list(tiny_run.output.rglob("*.tmp"))


FLAGS = [flag for action in ssd.build_parser()._actions for flag in action.option_strings]
ODD_VALUES = ["", "-", "--", "-1", "0", "1e999", "nan", "a,b", ",", ".", "..", "shapes", "auto", "cpu", "focal", "="]
words = st.one_of(
    st.sampled_from(FLAGS), st.sampled_from(ODD_VALUES), st.integers().map(str), st.floats().map(str),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
    st.tuples(st.sampled_from(FLAGS), st.sampled_from(ODD_VALUES)).map("=".join),
)


@settings(max_examples=1000, deadline=None, derandomize=True)  # the same lines each time
@given(st.lists(words, max_size=6))
@example(["--epochs=--"])
@example(["--data=--"])
@example(["--predict=--", "--weights", "x"])
def test_any_command_line_is_understood_or_refused_in_words(argv):
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            args = ssd.parse_args(argv)
        except SystemExit as end:
            code = end.code
    if code is not None:
        assert (code == 0 and "usage: " in out.getvalue()) or (code == 2 and "error: " in err.getvalue())
        return
    assert not err.getvalue()
    assert args.epochs >= 1
    assert args.batch_size >= 1
    assert 0 < args.lr < math.inf
    assert 0 <= args.val_fraction < 1


def test_evaluating_the_final_checkpoint_repeats_the_test_line(tiny_run, tmp_path, capsys):
    argv = ["--evaluate", str(tiny_run.final), "--output-dir", str(tmp_path), "--device", "cpu", "--amp", "off",
            "--workers", "0", "--score-thresh", ".001"]
    assert ssd.main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    trained = tiny_run.out.splitlines()
    assert printed[-1] == trained[-3]
    assert TEST_LINE.match(printed[-1])
    at = next(i for i, line in enumerate(trained) if line.startswith("class "))
    table = trained[at : at + 4]
    assert table[-1].startswith("mean ")
    assert all(line in printed for line in table)
    numbers = json.loads((tmp_path / "plots" / "evaluation" / "evaluation.json").read_text())
    final = ssd.load_checkpoint(tiny_run.final)
    assert numbers["voc"] == final["test"]["voc"]
    assert numbers["voc"]["map_area"] > 0
    assert numbers["coco"]["per_class"].keys() == {"angular", "round"}
    assert (numbers["checkpoint"], numbers["split"], numbers["num_images"]) == (str(tiny_run.final), "test", 4)
    assert numbers["detection"] == {"score_thresh": 0.001, "nms_iou_thresh": 0.45, "max_detections": 200,
                                    "flip_average": "off"}
    assert final["test"]["detection"]["flip_average"] == "off"
    for name in ("evaluation/precision_recall", "evaluation/confusion", "predictions"):
        png(tmp_path / "plots" / f"{name}.png")
    assert not (tmp_path / "checkpoints").exists()


def test_flip_averaging_is_measured_where_it_is_asked_for(tiny_run, tmp_path, capsys):
    found = []
    for name, flags in (("plain", []), ("two", ["--flip-average", "horizontal"]), ("four", ["--flip-average", "both"])):
        argv = ["--evaluate", str(tiny_run.final), "--output-dir", str(tmp_path / name), "--device", "cpu", "--workers",
                "0", "--amp", "off", *flags]
        assert ssd.main(argv) == 0
        found.append(json.loads((tmp_path / name / "plots" / "evaluation" / "evaluation.json").read_text()))
    assert [f["detection"]["flip_average"] for f in found] == ["off", "horizontal", "both"]
    assert all(a["voc"] != b["voc"] for a, b in itertools.combinations(found, 2))
    assert capsys.readouterr().out.count("Test mAP@.5") == 3


def test_a_checkpoint_is_measured_and_predicts_as_its_run_detected_unless_flags_say_otherwise(
    tiny_run, tmp_path, capsys
):
    saved, path = ssd.load_checkpoint(tiny_run.final), tmp_path / "four.pth"
    saved["args"] |= {"flip_average": "both", "max_detections": 7, "nms_iou": 0.6}
    ssd.save_checkpoint(path, saved)
    picture = str(tiny_run.data / "JPEGImages" / "test_0.jpg")

    def detection(*flags):
        assert ssd.main(["--evaluate", str(path), "--output-dir", str(tmp_path), "--device", "cpu", *flags]) == 0
        return json.loads((tmp_path / "plots" / "evaluation" / "evaluation.json").read_text())["detection"]

    run = {"score_thresh": 0.001, "nms_iou_thresh": 0.6, "max_detections": 7, "flip_average": "both"}
    assert detection() == detection("--data", str(tiny_run.data)) == run
    assert capsys.readouterr().out.splitlines()[-1].endswith(" (11-point), flips averaged: both")
    assert detection("--flip-average", "off", "--max-detections", "9") == run | {"flip_average": "off",
                                                                               "max_detections": 9}
    assert TEST_LINE.match(capsys.readouterr().out.splitlines()[-1])

    detector = ssd.load_detector(path, "cpu", "off")
    alone, plain = ssd.load_detector(tiny_run.final, "cpu", "off"), {"score_thresh": 0.0, "max_detections": 7}
    found = detector.predict(picture, score_thresh=0.0).to_dict()
    assert found == alone.predict(picture, nms_iou_thresh=0.6, flip_average="both", **plain).to_dict()
    assert detector.predict(picture, flip_average="off", nms_iou_thresh=0.45, **plain).to_dict() == alone.predict(
        picture, **plain).to_dict() != found
    argv = ["--predict", picture, "--weights", str(path), "--output-dir", str(tmp_path), "--device", "cpu", "--amp",
            "off", "--score-thresh", "0"]
    for flags, expected in (([], found), (["--max-detections", "3"], {k: v[:3] for k, v in found.items()})):
        assert ssd.main([*argv, *flags]) == 0
        report = json.loads((tmp_path / "plots" / "predictions" / "predictions.json").read_text())
        assert report[picture] == expected


def test_written_detections_are_scored_like_the_checkpoint(tiny_run, tmp_path, capsys):
    where = ["--output-dir", str(tmp_path)]
    argv = ["--evaluate", str(tiny_run.final), *where, "--device", "cpu", "--amp", "off", "--workers", "0",
            "--score-thresh", ".001", "--write-detections", str(tmp_path / "new" / "folder")]
    assert ssd.main(argv) == 0
    by_checkpoint = capsys.readouterr().out.splitlines()
    first = json.loads((tmp_path / "plots" / "evaluation" / "evaluation.json").read_text())
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {
        "comp4_det_test_angular.txt", "comp4_det_test_round.txt"
    }
    argv = ["--score-detections", str(tmp_path / "new" / "folder"), "--data", str(tiny_run.data), *where]
    assert ssd.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[1:] == by_checkpoint[1:]
    second = json.loads((tmp_path / "plots" / "evaluation" / "evaluation.json").read_text())
    assert {k: first[k] for k in ("voc", "coco", "confusion")} == {k: second[k] for k in ("voc", "coco", "confusion")}
    assert second["detections"] == str(tmp_path / "new" / "folder")
    assert "checkpoint" not in second


def test_scoring_errors_are_one_line(tiny_run, tmp_path, fails):
    flags = ["--data", tiny_run.data, "--output-dir", tmp_path / "out"]
    assert "comp4_det_test_angular.txt: no such file" in fails(["--score-detections", tmp_path, *flags])
    line = fails(["--score-detections", tmp_path, *flags, "--test-split", "nothing"])
    assert "no image list" in line
    assert not (tmp_path / "out").exists()


def test_predicting_writes_a_picture_each_and_one_report(tiny_run, tmp_path, capsys):
    pictures = [str(tiny_run.data / "JPEGImages" / f"test_{i}.jpg") for i in range(2)]
    argv = ["--predict", *pictures, "--weights", str(tiny_run.final), "--output-dir", str(tmp_path), "--device", "cpu",
            "--amp", "off", "--score-thresh", "0", "--max-detections", "5"]
    assert ssd.main(argv) == 0
    folder = tmp_path / "plots" / "predictions"
    assert {p.name for p in folder.iterdir()} == {"test_0.jpg", "test_1.jpg", "predictions.json"}
    report = json.loads((folder / "predictions.json").read_text())
    detector = ssd.load_detector(tiny_run.final, "cpu", "off")
    for path, line in zip(pictures, capsys.readouterr().out.splitlines(), strict=True):
        with Image.open(path) as image, Image.open(folder / Path(path).name) as drawn:
            assert (drawn.format, drawn.size) == ("JPEG", image.size)
        assert report[path] == detector.predict(path, score_thresh=0.0, max_detections=5).to_dict()
        assert len(report[path]["labels"]) == 5
        assert line.startswith(path)


def test_predicting_goes_on_behind_what_cannot_be_read_and_says_so(tiny_run, tmp_path, capfd):
    shutil.copytree(tiny_run.data / "JPEGImages", tmp_path / "in")
    (tmp_path / "in" / "broken.png").write_text("no picture")
    (tmp_path / "in" / "broken.mp4").write_text("no video")
    argv = ["--predict", str(tmp_path / "in"), str(tmp_path / "in" / "test_*.jpg"), "--weights", str(tiny_run.final),
            "--output-dir", str(tmp_path / "out"), "--device", "cpu", "--score-thresh", ".01", "--classes", "round",
            "--save-crops", "--save-xml"]
    assert ssd.main(argv) == 1
    out, err = capfd.readouterr()
    folder = tmp_path / "out" / "plots" / "predictions"
    report = json.loads((folder / "predictions.json").read_text())
    assert len(out.splitlines()) == len(report) == 16
    assert {name for found in report.values() for name in found["names"]} == {"round"}
    assert [line.split(":")[0] for line in err.splitlines()] == ["error"] * 2
    assert all(f"broken.{ending}" in err for ending in ("png", "mp4"))
    crops, annotations = list((folder / "crops" / "round").iterdir()), list((folder / "Annotations").iterdir())
    assert len(crops) == sum(len(found["names"]) for found in report.values())
    assert len(annotations) == 16


def test_a_second_run_keeps_the_first_one_s_files(tiny_voc, flags_of, tmp_path, monkeypatch):
    def interrupt(*args, **more):
        raise KeyboardInterrupt

    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "last.pth").write_text("precious")
    monkeypatch.setattr(ssd, "plot_data", interrupt)
    assert ssd.main(flags_of(tiny_voc, tmp_path)) == 130
    (aside,) = [p for p in checkpoints.iterdir() if p.is_dir()]
    assert (aside / "last.pth").read_text() == "precious"
    assert (checkpoints / "run.json").is_file()


def test_a_run_without_test_list_on_pictures_of_which_most_are_empty_says_so(make_voc, flags_of, tmp_path, capsys):
    data = make_voc(tmp_path / "voc", {"train": 4, "val": 1}, empty_every=2)
    ids = ["train_1", "train_3", "train_0"]
    (data / "ImageSets" / "Main" / "train.txt").write_text("\n".join(ids) + "\n")
    flags = flags_of(data, tmp_path / "out", "--epochs", "1", "--batch-size", "1", "--loss", "multibox")
    assert ssd.main(flags) == 0
    summary, path, _ = capsys.readouterr().out.splitlines()[-3:]
    assert "--test-split" in summary
    assert path.endswith("ssd_voc_final.pth")
    assert (tmp_path / "out" / "plots" / "predictions.png").is_file()


def test_a_held_out_share_without_an_object_does_not_cost_the_run(make_voc, flags_of, tmp_path, capsys):
    data = make_voc(tmp_path / "voc", {"train": 2, "val": 1, "test": 1}, empty_every=0)
    annotation = data / "Annotations" / "val_0.xml"
    annotation.write_text(re.sub("<object>.*</object>", "", annotation.read_text()))
    assert ssd.main(flags_of(data, tmp_path / "out", "--epochs", "1", "--batch-size", "2")) == 0
    assert TEST_LINE.match(capsys.readouterr().out.splitlines()[-3])
