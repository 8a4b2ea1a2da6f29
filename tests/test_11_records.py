"""Run records: checkpoints, atomic writes, what a run leaves behind."""

import gzip
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import ssd_object_detection as ssd


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def strict_json(text):
    """Parse JSON; NaN and Infinity, which Python alone accepts, are refused."""
    return json.loads(text, parse_constant=refuse_constant)


@pytest.fixture
def checkpoint():
    config = {"num_classes": 2, "width": 0.0625}
    return {"model": ssd.SSD300(**config).state_dict(), "config": config, "classes": ["a", "b"]}


def input_error(call, *args, **settings):
    """Return the one line of the InputError that a call raises."""
    with pytest.raises(ssd.InputError) as error:
        call(*args, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- Several processes


def test_a_process_alone_is_the_first_of_one():
    assert ssd.process_rank() == (0, 1)
    made = []
    assert ssd.from_first_process(lambda: made) is made
    value = torch.tensor(3.0)
    assert ssd.mean_over_processes(value) is value


def test_without_torchrun_nothing_is_joined(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with ssd.joined_processes("cpu") as device:
        print("heard")
    assert device == "cpu"
    assert capsys.readouterr().out == "heard\n"


# -- Atomic writes


def test_a_failing_writer_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        ssd.write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stays_readable_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename within one file system

    ssd.write_atomically(path, write)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_what_others_can_read(tmp_path):
    ssd.write_json(tmp_path / "a.json", {"map": math.nan, "rows": [1.5, math.inf], "name": "ä"})
    assert strict_json((tmp_path / "a.json").read_text()) == {"map": None, "rows": [1.5, None], "name": "ä"}
    ssd.write_json_lines(tmp_path / "a.jsonl", [{"epoch": 1, "map": math.nan}, {"epoch": 2}])
    rows = [strict_json(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == [{"epoch": 1, "map": None}, {"epoch": 2}]


# -- Checkpoints


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path, checkpoint):
    ssd.save_checkpoint(tmp_path / "a.pth", checkpoint)
    loaded = ssd.load_checkpoint(tmp_path / "a.pth")
    assert loaded["format_version"] == ssd.FORMAT_VERSION
    assert loaded["classes"] == ["a", "b"]
    model = ssd.model_from_checkpoint(loaded)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["model"][name]), name


@pytest.mark.parametrize("name", ["last.pth", "best.pth", "ssd_tiny_set_final.pth"])
def test_every_checkpoint_of_a_run_loads_as_data_only(tiny_run, name):
    loaded = torch.load(tiny_run.output / "checkpoints" / name, weights_only=True)
    assert {"format_version", "model", "config", "classes", "args", "score_thresh"} <= loaded.keys()
    assert ("train_state" in loaded) == (name == "last.pth")


@pytest.mark.parametrize("keep", [0, 1, 100, 5000])
def test_a_truncated_checkpoint_is_one_line_that_names_the_file(tmp_path, checkpoint, keep):
    path = tmp_path / "cut.pth"
    ssd.save_checkpoint(path, checkpoint)
    path.write_bytes(path.read_bytes()[:keep])
    assert "cut.pth" in input_error(ssd.load_checkpoint, path)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_a_flipped_bit_of_a_weight_is_found(tmp_path, checkpoint, share):
    path = tmp_path / "flipped.pth"
    ssd.save_checkpoint(path, checkpoint)
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 4
    path.write_bytes(bytes(content))
    torch.load(path, weights_only=True)  # torch does not mind
    message = input_error(ssd.load_checkpoint, path)
    assert "flipped.pth" in message
    assert "checksum" in message


class Foreign:
    """Something that a checkpoint never holds."""


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        pickle.dumps({"a": 1}, protocol=2),
        pickle.dumps(Foreign(), protocol=2),
        bytes(1000),
    ],
    ids=["text", "png", "pickle", "object", "zeros"],
)
def test_a_foreign_file_is_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "foreign.pth"
    path.write_bytes(content)
    assert "foreign.pth" in input_error(ssd.load_checkpoint, path)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        {"blocks.0.0.weight": torch.zeros(3)},
        [1, 2],
        torch.zeros(3),
        {"format_version": ssd.FORMAT_VERSION, "model": {}},
        {"format_version": ssd.FORMAT_VERSION, "config": {}, "classes": ["cat"]},
        {"format_version": ssd.FORMAT_VERSION, "config": {}, "classes": ["cat"], "model": None},
        {"format_version": ssd.FORMAT_VERSION, "config": {}, "classes": None, "model": {}},
        {"format_version": ssd.FORMAT_VERSION, "config": {}, "classes": [1, 2], "model": {}},
    ],
)
def test_a_torch_file_that_is_no_checkpoint_is_one_line_that_names_the_file(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    message = input_error(ssd.load_checkpoint, tmp_path / "other.pth")
    assert "other.pth" in message
    assert "not a checkpoint" in message


def test_a_checkpoint_with_code_inside_is_refused(tmp_path, checkpoint):
    ssd.save_checkpoint(tmp_path / "code.pth", {**checkpoint, "extra": Foreign()})
    assert "code.pth" in input_error(ssd.load_checkpoint, tmp_path / "code.pth")


def test_a_missing_checkpoint_is_one_line_that_names_the_file(tmp_path):
    assert "none.pth: no such file" in input_error(ssd.load_checkpoint, tmp_path / "none.pth")
    assert tmp_path.name in input_error(ssd.load_checkpoint, tmp_path)


@pytest.mark.parametrize("version", [ssd.OLDEST_FORMAT_VERSION - 1, ssd.FORMAT_VERSION + 1, "4"])
def test_a_checkpoint_of_another_format_is_one_line_that_names_file_and_format(tmp_path, checkpoint, version):
    path = tmp_path / "other.pth"
    torch.save({"format_version": version, "version": "9.9", **checkpoint}, path)
    message = input_error(ssd.load_checkpoint, path)
    assert f"other.pth: of format {version}, written by version 9.9" in message
    assert f"formats {ssd.OLDEST_FORMAT_VERSION} to {ssd.FORMAT_VERSION}" in message


@pytest.mark.parametrize("name", ["num_classes", "width", "batch_norm", "anchor_sizes"])
def test_a_network_without_an_entry_has_the_default_or_is_one_line(name, tmp_path):
    config = {"num_classes": 2, "width": 0.01, "batch_norm": "new", "anchor_sizes": ssd.ANCHOR_SIZES}
    model = ssd.SSD300(**config).state_dict()
    del config[name]
    path = tmp_path / "part.pth"
    ssd.save_checkpoint(path, {"model": model, "config": config, "classes": ["cat", "dog"]})
    if name in ("num_classes", "anchor_sizes"):
        assert ssd.load_detector(path, "cpu").classes == ("cat", "dog")
    else:
        assert "part.pth: the weights do not fit the network" in input_error(ssd.load_detector, path, "cpu")


def test_a_training_state_that_lacks_something_is_one_line(tiny_run, tmp_path, fails):
    shutil.copytree(tiny_run.output, tmp_path / "out")
    path = tmp_path / "out" / "checkpoints" / "last.pth"
    for name in ("log", "optimizer", "step"):
        last = torch.load(tiny_run.output / "checkpoints" / "last.pth", weights_only=True)
        del last["train_state"][name]
        torch.save(last, path)
        line = fails(
            [
                "--resume",
                "--epochs",
                "3",
                "--output-dir",
                tmp_path / "out",
                "--device",
                "cpu",
                "--workers",
                "0",
            ]
        )
        assert f"the run to resume is of another network or optimizer: '{name}'" in line


def test_class_names_of_a_checkpoint_are_those_of_the_data_today(tmp_path, checkpoint):
    checkpoint |= {"classes": ["cafe\u0301", "dog"], "score_thresh": {"cafe\u0301": 0.3}}
    checkpoint["config"]["num_classes"] = 2
    ssd.save_checkpoint(tmp_path / "old.pth", checkpoint)
    saved = ssd.load_checkpoint(tmp_path / "old.pth")
    assert saved["classes"] == ["caf\u00e9", "dog"]
    assert saved["score_thresh"] == {"caf\u00e9": 0.3}
    checkpoint["classes"] = ["cafe\u0301", "caf\u00e9"]  # two outputs stay two classes
    ssd.save_checkpoint(tmp_path / "old.pth", checkpoint)
    assert ssd.load_checkpoint(tmp_path / "old.pth")["classes"] == checkpoint["classes"]


def test_weights_alone_cannot_be_resumed(tmp_path, checkpoint):
    path = tmp_path / "final.pth"
    ssd.save_checkpoint(path, checkpoint)
    message = input_error(ssd.load_checkpoint, path, resumable=True)
    assert "final.pth" in message
    assert "last.pth" in message
    ssd.save_checkpoint(path, {**checkpoint, "train_state": {}})
    assert ssd.load_checkpoint(path, resumable=True)["train_state"] == {}


def test_json_has_a_line_an_object_and_keeps_every_text(tmp_path):
    objects = [{"name": "a [b]  {c}", "box": [1.5, 2, 3, 4]}, {"name": "d\n", "box": [1.5, 2]}]
    content = {"objects": objects, "flags": {f"flag {number}": "x" * 20 for number in range(20)}}
    ssd.write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == content
    assert text.splitlines()[1].startswith(' "objects": [{"name": "a [b]  {c}", "box": [1.5, 2, 3, 4]}, ')
    assert max(map(len, text.splitlines())) <= 110


def test_weights_of_another_network_are_one_line_that_names_the_file(checkpoint):
    checkpoint["model"].popitem()
    assert "x.pth" in input_error(ssd.model_from_checkpoint, checkpoint, "x.pth")
    checkpoint["config"]["num_classes"] = 7
    assert "x.pth" in input_error(ssd.model_from_checkpoint, checkpoint, "x.pth")


def test_the_checkpoint_before_is_kept_under_its_own_name(tmp_path, checkpoint):
    path, previous = tmp_path / "last.pth", tmp_path / "previous.pth"
    for number in range(3):
        ssd.save_checkpoint(path, {**checkpoint, "number": number}, previous)
        assert ssd.load_checkpoint(path)["number"] == number
        assert previous.exists() == (number > 0)
        assert number == 0 or ssd.load_checkpoint(previous)["number"] == number - 1
    previous.unlink()
    os.link(path, previous)  # where a kill between the two renamings leaves them
    ssd.save_checkpoint(path, {**checkpoint, "number": 3}, previous)
    assert (ssd.load_checkpoint(path)["number"], ssd.load_checkpoint(previous)["number"]) == (3, 2)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of a process are POSIX's")
def test_a_disk_that_is_full_leaves_the_old_checkpoint_and_nothing_else(tmp_path, checkpoint):
    import resource

    path = tmp_path / "last.pth"
    ssd.save_checkpoint(path, {**checkpoint, "number": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # a real write that the kernel refuses
    try:
        with pytest.raises(OSError, match="File too large"):
            ssd.save_checkpoint(path, {**checkpoint, "number": 2}, tmp_path / "previous.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert ssd.load_checkpoint(path)["number"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path):
    program = (
        "import sys, torch, ssd_object_detection as ssd\n"
        "for number in range(10 ** 6):\n"
        "    model = {'w': torch.full((300_000,), number)}\n"
        "    checkpoint = {'model': model, 'config': {}, 'classes': [], 'number': number}\n"
        "    ssd.save_checkpoint(sys.argv[1] + '/last.pth', checkpoint, sys.argv[1] + '/previous.pth')\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(ssd.__file__).parent)}
    path, seen = tmp_path / "last.pth", -1
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=env)
    try:
        while not (tmp_path / "previous.pth").exists():
            assert process.poll() is None
            time.sleep(0.01)
        for _ in range(20):  # and while it runs every look finds a whole file
            loaded = ssd.load_checkpoint(path)
            assert loaded["number"] >= seen
            seen = loaded["number"]
            assert all((tmp_path / "previous.pth").exists() for _ in range(1000))
    finally:
        process.kill()
        process.wait()
    for name in ("last.pth", "previous.pth"):
        loaded = ssd.load_checkpoint(tmp_path / name)
        assert (loaded["model"]["w"] == loaded["number"]).all()
    ssd.prepare_folders(tmp_path, tmp_path / "plots", keep=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pth", "plots", "previous.pth"]


# -- When checkpoints are written


@pytest.fixture
def clock(monkeypatch):
    """What the module takes for time.monotonic(): clock.now, in seconds."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(ssd, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def writer(tmp_path, clock):
    return ssd.CheckpointWriter(tmp_path, {"config": {}, "classes": ["a"]})


def numbers_in(folder):
    """Return {file name: its number} of the checkpoints in a folder."""
    return {path.name: ssd.load_checkpoint(path)["number"] for path in folder.glob("*.pth")}


def numbered(number):
    return {"model": {}, "number": number}


def test_checkpoints_are_written_at_most_every_twenty_seconds(writer, clock, tmp_path):
    writer.put({"last.pth": numbered(1), "best.pth": numbered(1)})
    assert numbers_in(tmp_path) == {"last.pth": 1, "best.pth": 1}
    assert writer.waiting == {}
    assert ssd.load_checkpoint(tmp_path / "last.pth")["classes"] == ["a"]
    clock.now += 10
    writer.put({"last.pth": numbered(2), "best.pth": numbered(2)})
    clock.now += 9.9
    writer.put({"last.pth": numbered(3)})
    assert numbers_in(tmp_path) == {"last.pth": 1, "best.pth": 1}
    clock.now += 0.1
    writer.put({"last.pth": numbered(4)})
    assert numbers_in(tmp_path) == {"last.pth": 4, "best.pth": 2, "previous.pth": 1}
    assert writer.waiting == {}


def test_a_flush_writes_what_waits(writer, tmp_path):
    writer.put({"last.pth": numbered(1)})
    writer.put({"last.pth": numbered(2)})
    writer.flush()
    assert numbers_in(tmp_path) == {"last.pth": 2, "previous.pth": 1}
    stamp = (tmp_path / "last.pth").stat().st_mtime_ns
    writer.flush()  # nothing waits
    assert (tmp_path / "last.pth").stat().st_mtime_ns == stamp
    assert numbers_in(tmp_path) == {"last.pth": 2, "previous.pth": 1}


def test_what_waits_is_a_copy_that_later_steps_do_not_change(writer, tmp_path):
    weight, history = torch.zeros(3), [1]
    writer.put({"last.pth": numbered(0)})
    writer.put({"last.pth": {"model": {"w": weight}, "history": history}})
    weight += 1
    history.append(2)
    writer.flush()
    loaded = ssd.load_checkpoint(tmp_path / "last.pth")
    assert loaded["model"]["w"].tolist() == [0, 0, 0]
    assert loaded["history"] == [1]


def test_a_full_disk_costs_a_warning_and_is_tried_again(writer, clock, tmp_path, monkeypatch, capsys):
    save = ssd.save_checkpoint

    def refuse_last(path, *args):
        if path.name == "last.pth":
            raise OSError(28, "No space left on device")
        save(path, *args)

    monkeypatch.setattr(ssd, "save_checkpoint", refuse_last)
    weight = torch.zeros(1)
    writer.put({"last.pth": numbered(1) | {"model": {"w": weight}}, "best.pth": numbered(1)})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "last.pth" in lines[0]
    assert "No space left" in lines[0]
    assert numbers_in(tmp_path) == {"best.pth": 1}
    assert list(writer.waiting) == ["last.pth"]
    weight += 1
    monkeypatch.setattr(ssd, "save_checkpoint", save)
    clock.now += 19
    writer.put({"best.pth": numbered(2)})  # a disk that is full is not tried at every epoch either
    assert numbers_in(tmp_path) == {"best.pth": 1}
    clock.now += 1
    writer.put({})
    assert numbers_in(tmp_path) == {"best.pth": 2, "last.pth": 1}
    assert ssd.load_checkpoint(tmp_path / "last.pth")["model"]["w"] == 0
    assert capsys.readouterr().err == ""


def test_best_is_written_before_last_which_speaks_of_it(writer, monkeypatch):
    # Killed between the two, a run goes on from an older last.pth and finds the same best once more; in the
    # other order last.pth would count on a best.pth that is of an older epoch.
    written = []
    writer.put({"last.pth": numbered(1)})
    monkeypatch.setattr(ssd, "save_checkpoint", lambda path, *args: written.append(path.name))
    writer.put({"last.pth": numbered(2)})
    writer.put({"best.pth": numbered(3), "last.pth": numbered(3)})
    writer.flush()
    assert written == ["best.pth", "last.pth"]


# -- What a run leaves behind


def test_files_of_an_earlier_run_are_moved_aside_whole(tmp_path, capsys):
    checkpoints, plots = tmp_path / "checkpoints", tmp_path / "plots"
    checkpoints.mkdir()
    contents = {"last.pth": "a", "best.pth": "b", "metrics.jsonl": "c", "run.json": "d"}
    for name, text in contents.items():
        (checkpoints / name).write_text(text)
    (checkpoints / "README.md").write_text("stays")
    (checkpoints / ".last.pth.123.tmp").write_text("of a run that was killed")
    (plots / "evaluation").mkdir(parents=True)
    for name in ("evaluation/mistakes.png", "loss.png", "mistakes.html", "notes.txt", "example.jpg"):
        (plots / name).write_text(name)
    ssd.prepare_folders(checkpoints, plots, keep=False)
    assert {p.name for p in plots.iterdir() if p.is_file()} == {
        "notes.txt",
        "example.jpg",
    }  # no result of a run
    (earlier,) = [p for p in plots.iterdir() if p.is_dir()]
    assert (earlier / "evaluation" / "mistakes.png").read_text() == "evaluation/mistakes.png"
    assert {p.name for p in earlier.iterdir()} == {"evaluation", "loss.png", "mistakes.html"}
    assert (checkpoints / "README.md").read_text() == "stays"
    (aside,) = [p for p in checkpoints.iterdir() if p.is_dir()]
    assert {p.name: p.read_text() for p in aside.iterdir()} == contents
    assert aside.name in capsys.readouterr().out
    assert sorted(p.name for p in checkpoints.iterdir()) == ["README.md", aside.name]


def test_two_runs_that_end_in_the_same_second_are_both_kept(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for text in ("first", "second"):
        checkpoints.mkdir(exist_ok=True)
        path = checkpoints / "last.pth"
        path.write_text(text)
        os.utime(path, (1.6e9, 1.6e9))
        ssd.prepare_folders(checkpoints, tmp_path / "plots", keep=False)
    assert sorted(p.read_text() for p in checkpoints.rglob("last.pth")) == ["first", "second"]


def test_a_resumed_run_keeps_its_files_in_place(tmp_path, capsys):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "last.pth").write_text("a")
    ssd.prepare_folders(checkpoints, tmp_path / "plots", keep=True)
    assert (checkpoints / "last.pth").read_text() == "a"
    assert capsys.readouterr().out == ""


def test_an_output_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "checkpoints"
    with pytest.raises(OSError, match=str(folder)):
        ssd.prepare_folders(folder, tmp_path / "plots", keep=False)


def test_metrics_are_one_json_object_an_epoch(tiny_run):
    text = (tiny_run.output / "checkpoints" / "metrics.jsonl").read_text()
    rows = [strict_json(line) for line in text.splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    keys = {
        "train_loss",
        "train_loss_cls",
        "train_loss_box",
        "val_loss",
        "val_loss_cls",
        "val_loss_box",
        "val_map_area",
        "val_map11",
        "val_map75",
        "lr",
        "skipped",
        "images_per_s",
        "data_wait",
        "seconds",
    }
    for row in rows:
        assert keys <= row.keys()
        assert row["train_loss"] == pytest.approx(row["train_loss_cls"] + row["train_loss_box"], rel=1e-4)


def test_run_json_holds_flags_versions_and_the_test_result(tiny_run):
    record = strict_json((tiny_run.output / "checkpoints" / "run.json").read_text())
    assert record["flags"]["epochs"] == 2
    assert record["flags"]["data"] == str(tiny_run.data)
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["device"] == "cpu"
    assert record["classes"] == ["angular", "round"]
    assert record["wall_s"] >= 0
    final = ssd.load_checkpoint(tiny_run.final)
    assert {"map_area", "map11", "map75"} <= record["test"].keys()
    assert record["test"] == final["test"]
    assert set(record["test"]["per_class"]) == {"angular", "round"}
    assert re.search(rf"^Test mAP@\.5: {record['test']['map_area']:.4f} ", tiny_run.out, re.M)


# ---- checkpoints of earlier formats ----


@pytest.fixture
def format_4(tmp_path):
    """A last.pth of format 4, as version 0.1.0 wrote it: width .01, one epoch, classes angular and round."""
    path = tmp_path / "checkpoints" / "last.pth"
    path.parent.mkdir()
    packed = Path(__file__).parent / "data" / "format_4_last.pth.gz"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


def test_a_checkpoint_of_format_4_detects(format_4):
    assert torch.load(format_4, weights_only=True)["format_version"] == 4
    detector = ssd.load_detector(format_4, "cpu", "off")
    assert detector.classes == ("angular", "round")
    image = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    found = detector.predict(image, score_thresh=0.0, max_detections=3)
    assert len(found) == 3


def test_a_run_of_format_4_goes_on_with_one_learning_rate(format_4, make_voc, no_pictures):
    data = make_voc(format_4.parents[1] / "Tiny", {"train": 4, "val": 2, "test": 2})
    flags = [
        "--output-dir",
        str(format_4.parents[1]),
        "--data",
        str(data),
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    settings, source = ssd.load_settings(["--resume", *flags, "--epochs", "2"])
    assert (settings.backbone_lr, settings.recipe, settings.width) == (1.0, "small", 0.01)
    assert source["version"] == "0.1.0"
    assert ssd.main(["--resume", *flags, "--epochs", "2"]) == 0
    saved = ssd.load_checkpoint(format_4)
    assert saved["format_version"] == ssd.FORMAT_VERSION
    assert [row["epoch"] for row in saved["train_state"]["history"]] == [1, 2]
    assert saved["train_state"]["step"] == 4


def test_a_checkpoint_without_flags_and_thresholds_is_used_with_the_defaults(tiny_run, tmp_path):
    checkpoint = torch.load(tiny_run.final, weights_only=True)
    for name in ("args", "score_thresh", "version"):
        del checkpoint[name]
    torch.save(checkpoint, tmp_path / "bare.pth")
    detector = ssd.load_detector(tmp_path / "bare.pth", "cpu")
    assert set(detector.score_thresh.values()) == {ssd.DRAW_SCORE_THRESH}
    settings, _ = ssd.load_settings(["--evaluate", str(tmp_path / "bare.pth")])
    assert (settings.recipe, settings.data) == ("voc", "voc2007")
