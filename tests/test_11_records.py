"""Run records: checkpoints, atomic writes, what a run leaves behind."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
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


def one_line_error(call, *args):
    with pytest.raises(ssd.InputError) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path, checkpoint):
    ssd.save_checkpoint(tmp_path / "a.pth", checkpoint)
    loaded = ssd.load_checkpoint(tmp_path / "a.pth")
    assert loaded["format_version"] == ssd.FORMAT_VERSION
    assert loaded["classes"] == ["a", "b"]
    model = ssd.model_from_checkpoint(loaded)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["model"][name]), name


def test_an_older_checkpoint_with_clipped_anchors_keeps_them(checkpoint):
    checkpoint["config"]["clip_anchors"] = True
    checkpoint["model"]["anchors"] = checkpoint["model"]["anchors"].clamp(0.1, 0.9)
    assert torch.equal(ssd.model_from_checkpoint(checkpoint).anchors, checkpoint["model"]["anchors"])


@pytest.mark.parametrize("name", ["last.pth", "best.pth", "ssd_tiny_set_final.pth"])
def test_every_checkpoint_of_a_run_loads_as_data_only(tiny_run, name):
    loaded = torch.load(tiny_run.output / "checkpoints" / name, weights_only=True)
    assert {"format_version", "model", "config", "classes", "args"} <= loaded.keys()
    assert ("train_state" in loaded) == (name == "last.pth")


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


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    ssd.write_text(path, "new: ä")
    assert path.read_text(encoding="utf-8") == "new: ä"
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


@pytest.mark.parametrize("keep", [0, 1, 100, 5000])
def test_a_truncated_checkpoint_is_one_line_that_names_the_file(tmp_path, checkpoint, keep):
    path = tmp_path / "cut.pth"
    ssd.save_checkpoint(path, checkpoint)
    path.write_bytes(path.read_bytes()[:keep])
    assert "cut.pth" in one_line_error(ssd.load_checkpoint, path)


class Foreign:
    """Something that a checkpoint never holds."""


@pytest.mark.parametrize(
    "content",
    [b"hello\n", b"\x89PNG\r\n\x1a\n" + bytes(100), pickle.dumps({"a": 1}, protocol=2),
     pickle.dumps(Foreign(), protocol=2), bytes(1000)],
    ids=["text", "png", "pickle", "object", "zeros"],
)
def test_a_foreign_file_is_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "foreign.pth"
    path.write_bytes(content)
    assert "foreign.pth" in one_line_error(ssd.load_checkpoint, path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(3), {"format_version": 1, "model": {}}])
def test_a_torch_file_that_is_no_checkpoint_is_one_line_that_names_the_file(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    assert "other.pth" in one_line_error(ssd.load_checkpoint, tmp_path / "other.pth")


def test_a_checkpoint_with_code_inside_is_refused(tmp_path, checkpoint):
    torch.save({"format_version": 1, **checkpoint, "extra": Foreign()}, tmp_path / "code.pth")
    assert "code.pth" in one_line_error(ssd.load_checkpoint, tmp_path / "code.pth")


def test_a_missing_checkpoint_is_one_line_that_names_the_file(tmp_path):
    assert "none.pth" in one_line_error(ssd.load_checkpoint, tmp_path / "none.pth")
    assert tmp_path.name in one_line_error(ssd.load_checkpoint, tmp_path)


def test_a_checkpoint_of_a_newer_format_is_one_line_that_names_the_file(tmp_path, checkpoint):
    path = tmp_path / "newer.pth"
    torch.save({"format_version": ssd.FORMAT_VERSION + 1, **checkpoint}, path)
    message = one_line_error(ssd.load_checkpoint, path)
    assert "newer.pth" in message
    assert str(ssd.FORMAT_VERSION + 1) in message


def test_weights_of_another_network_are_one_line_that_names_the_file(checkpoint):
    checkpoint["model"].popitem()
    assert "x.pth" in one_line_error(ssd.model_from_checkpoint, checkpoint, "x.pth")
    checkpoint["config"]["num_classes"] = 7
    assert "x.pth" in one_line_error(ssd.model_from_checkpoint, checkpoint, "x.pth")


def test_files_of_an_earlier_run_are_moved_aside_whole(tmp_path, capsys):
    checkpoints, plots = tmp_path / "checkpoints", tmp_path / "plots"
    checkpoints.mkdir()
    contents = {"last.pth": "a", "best.pth": "b", "metrics.jsonl": "c", "run.json": "d"}
    for name, text in contents.items():
        (checkpoints / name).write_text(text)
    (checkpoints / "README.md").write_text("stays")
    ssd.prepare_folders(checkpoints, plots, keep=False)
    assert plots.is_dir()
    assert (checkpoints / "README.md").read_text() == "stays"
    (aside,) = [p for p in checkpoints.iterdir() if p.is_dir()]
    assert {p.name: p.read_text() for p in aside.iterdir()} == contents
    assert aside.name in capsys.readouterr().out
    assert not list(checkpoints.glob("*.pth"))


def test_two_runs_that_end_in_the_same_second_are_both_kept(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for text in ("first", "second"):
        checkpoints.mkdir(exist_ok=True)
        path = checkpoints / "last.pth"
        path.write_text(text)
        ssd.os.utime(path, (1.6e9, 1.6e9))
        ssd.prepare_folders(checkpoints, tmp_path / "plots", keep=False)
    assert sorted(p.read_text() for p in checkpoints.rglob("last.pth")) == ["first", "second"]


def test_a_resumed_run_keeps_its_files_in_place(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "last.pth").write_text("a")
    ssd.prepare_folders(checkpoints, tmp_path / "plots", keep=True)
    assert (checkpoints / "last.pth").read_text() == "a"


def test_metrics_are_one_json_object_an_epoch(tiny_run):
    rows = [strict_json(line) for line in (tiny_run.output / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["step"] for row in rows] == [2, 4]
    keys = {"train_loss", "train_loss_cls", "train_loss_box", "val_loss", "val_loss_cls", "val_loss_box",
            "val_map_area", "val_map11", "lr", "phase", "images_per_s", "data_wait", "memory_gb", "seconds"}
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
    final = ssd.load_checkpoint(tiny_run.final)
    assert record["test"]["voc"] == final["test"]["voc"]
    assert set(record["test"]["voc"]["per_class"]) == {"angular", "round"}
    assert re.search(rf"^Test mAP@\.5: {record['test']['voc']['map_area']:.4f} ", tiny_run.out, re.M)


def test_a_mean_without_a_value_is_written_as_json_that_others_can_read(tmp_path):
    ssd.write_json(tmp_path / "a.json", {"map": float("nan"), "rows": [1.5, float("inf")]})
    content = strict_json((tmp_path / "a.json").read_text())
    assert content["rows"][0] == 1.5


def test_a_seed_fixes_all_three_generators():
    drawn = []
    for _ in range(2):
        ssd.set_seed(3)
        drawn.append((ssd.random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    ssd.set_seed(4)
    assert all(a != b for a, b in zip(drawn[0], (ssd.random.random(), np.random.rand(), torch.rand(1).item()),
                                      strict=True))


def test_a_seed_asks_for_deterministic_algorithms_only_where_told():
    ssd.set_seed(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    ssd.set_seed(0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_all_generators_go_on_where_they_stood(tmp_path):
    def draw():
        return ssd.random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()

    ssd.set_seed(1)
    draw()  # NumPy keeps the second of two normal numbers
    torch.save(ssd.get_rng(), tmp_path / "rng.pth")
    expected = draw()
    ssd.set_seed(2)
    ssd.set_rng(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert draw() == expected


# ---- damage ----


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_a_flipped_bit_of_a_weight_is_found(tmp_path, checkpoint, share):
    path = tmp_path / "flipped.pth"
    ssd.save_checkpoint(path, checkpoint)
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 4
    path.write_bytes(bytes(content))
    torch.load(path, weights_only=True)  # torch does not mind
    message = one_line_error(ssd.load_checkpoint, path)
    assert "flipped.pth" in message
    assert "checksum" in message


def test_the_newest_good_checkpoint_beside_a_damaged_one_is_named(tmp_path, checkpoint):
    for age, name in enumerate(("last.pth", "cut.pth", "new.pth", "old.pth", "older.pth")):
        state = {"train_state": {}} if name in ("old.pth", "older.pth") else {}
        ssd.save_checkpoint(tmp_path / name, checkpoint | state)
        ssd.os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    for name in ("last.pth", "cut.pth"):
        ssd.os.truncate(tmp_path / name, 2000)
    assert one_line_error(ssd.load_checkpoint, tmp_path / "last.pth").endswith(f"is {tmp_path / 'new.pth'}")
    with pytest.raises(ssd.InputError) as caught:
        ssd.load_checkpoint(tmp_path / "last.pth", resumable=True)
    assert str(caught.value).endswith(f"is {tmp_path / 'old.pth'}")


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


def test_a_process_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path):
    program = (
        "import sys, torch, ssd_object_detection as ssd\n"
        "for number in range(10 ** 6):\n"
        "    checkpoint = {'model': {'w': torch.full((300_000,), number)}, 'config': {}, 'classes': [], 'n': number}\n"
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
            assert loaded["n"] >= seen
            seen = loaded["n"]
            assert all((tmp_path / "previous.pth").exists() for _ in range(1000))
    finally:
        process.kill()
        process.wait()
    for name in ("last.pth", "previous.pth"):
        loaded = ssd.load_checkpoint(tmp_path / name)
        assert (loaded["model"]["w"] == loaded["n"]).all()
    ssd.prepare_folders(tmp_path, tmp_path / "plots", keep=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pth", "plots", "previous.pth"]


# ---- signals ----


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_a_second_one_would_end_the_process(signum):
    before, stop = signal.getsignal(signum), ssd.StopSignals()
    steps = []
    with pytest.raises(KeyboardInterrupt), stop:  # noqa: PT012
        with stop.waiting():
            stop.check()
            os.kill(os.getpid(), signum)
            steps.append("finished")
            assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        steps.append("never")
    assert steps == ["finished"]
    assert stop.signum == signum
    assert signal.getsignal(signum) == before


def test_a_signal_elsewhere_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), ssd.StopSignals():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
