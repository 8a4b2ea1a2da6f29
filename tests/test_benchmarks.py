"""The benchmarks of speed, each with its smallest settings, and what benchmarks share."""

import importlib
import json
import random
import re
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import common
import faults

SETTINGS = {
    "training_step": ["--batch-size", "1"],
    "inference": ["--batch-sizes", "1", "9", "--width", ".0625"],
    "augmentation": ["--images", "2"],
    "losses": ["--batch-size", "2"],
    "loader": ["--workers", "0", "--images", "2", "--batch-size", "2"],
    "end_to_end": ["--images", "1", "--batch-size", "1", "--width", ".0625"],
    "evaluation": ["--images", "6"],
}


def parse(text):
    """Return the rows of the one Markdown table in a text, as dicts."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in row] for row in rows]
    assert re.fullmatch(r"-+", lines[1][0])
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


@pytest.mark.parametrize("name", SETTINGS)
def test_benchmark_prints_its_table_and_writes_its_json(name, tiny_voc, tmp_path, monkeypatch, capsys):
    fastest = dict(list(common.precisions(torch.device("cpu")).items())[-1:])
    monkeypatch.setattr(common, "precisions", lambda device: fastest)
    path = tmp_path / "result.json"
    flags = ["--rounds", "1", "--json", str(path), *SETTINGS[name]]
    if name != "evaluation":
        flags += ["--data", str(tiny_voc), "--device", "cpu"]
    importlib.import_module(name).main(flags)
    rows = parse(capsys.readouterr().out)
    result = json.loads(path.read_text())
    assert [row["case"] for row in rows] == [row["case"] for row in result["rows"]]
    peers = [row["case"].startswith(("torchvision", "pycocotools")) for row in rows]
    assert set(peers) == {True, False}
    for printed, row, is_peer in zip(rows, result["rows"], peers, strict=True):
        assert row["images_per_s"] > 0
        assert float(printed["images_per_s"].replace(",", "")) == pytest.approx(row["images_per_s"], rel=0.01)
        assert (row["times_peer"] == 1) == is_peer
    assert result["environment"]["torch"]


def test_ratio_is_of_the_medians():
    times = {"peer": [2.0, 1.0, 9.0], "own": [0.5, 0.25, 1.0]}
    peer, own = common.rows_of(times, {"own": "peer", "peer": "peer"}, images=4)
    assert (peer["images_per_s"], own["images_per_s"]) == (2.0, 8.0)
    assert (peer["times_peer"], own["times_peer"]) == (1.0, 4.0)
    assert own["ms"] == 500
    assert own["spread"] == pytest.approx(1.5)


def test_cases_are_timed_in_turn_and_told_after_a_round_that_does_not_count(capsys):
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = common.time_in_turns(cases, 3, torch.device("cpu"), least=0)
    assert calls == ["a", "b"] * 4
    assert [len(values) for values in times.values()] == [3, 3]
    told = re.findall(r"^round (\d)/3  (\w): [\d.]+ ms$", capsys.readouterr().err, re.M)
    assert told == [(str(number), name) for number in range(4) for name in "ab"]


def test_a_short_case_is_called_until_its_time_is_over():
    clock = [0.0]
    cases = {"short": lambda: clock.append(clock.pop() + 0.02), "long": lambda: clock.append(clock.pop() + 3)}
    options = {"least": 0.05, "clock": lambda: clock[0]}
    times = common.time_in_turns(cases, 2, torch.device("cpu"), **options)
    assert times["short"] == pytest.approx([0.02] * 2)
    assert times["long"] == pytest.approx([3.0] * 2)
    assert clock[0] == pytest.approx(3 * (3 * 0.02 + 3))  # three calls of the short one a round


def test_table_has_a_dash_for_what_is_missing():
    text = common.markdown([{"case": "one", "a": 0.25, "b": float("nan")}, {"case": "two", "c": 1234.5}])
    assert parse(text) == [
        {"case": "one", "a": "0.25", "b": "-", "c": "-"},
        {"case": "two", "a": "-", "b": "-", "c": "1,234"},
    ]


def test_peer_gets_the_boxes_of_its_own_image(tiny_voc):
    records = common.ssd.load_data(str(tiny_voc), val_fraction=0).train
    record = next(r for r in records if len(r.labels))
    image, target = common.PeerDataset([record], train=False)[0]
    assert image.shape == (3, 300, 300)
    assert image.dtype == torch.uint8
    torch.testing.assert_close(target["boxes"] / 300, torch.from_numpy(record.boxes), atol=0.01, rtol=0)
    batch, truth = common.make_batch([record], torch.device("cpu"), batch_size=2)
    assert batch["matched_gt"].shape == (2, len(common.ssd.make_anchors()))
    torch.testing.assert_close(truth[1][0], torch.from_numpy(record.boxes), atol=1e-5, rtol=0)
    (peer, _) = common.peer_targets(truth, torch.device("cpu"))
    torch.testing.assert_close(peer["boxes"], 300 * torch.from_numpy(record.boxes), atol=1e-2, rtol=0)


def test_a_fork_returns_exit_code_and_output_or_the_signal():
    def speak(argv):
        print(*argv)
        return 3

    assert faults.run(speak, ["a", Path("b")]) == (3, "a b\n")
    code, text = faults.run(lambda argv: 1 / 0, [])
    assert code == 70
    assert "ZeroDivisionError" in text
    assert faults.run(lambda argv: time.sleep(60), [], kill_after=0.05)[0] == -9


def test_damaged_checkpoints_are_refused_or_harmless(tiny_run):
    last = tiny_run.output / "checkpoints" / "last.pth"
    before = last.read_bytes()
    counts = faults.damage_checkpoints(last, 8, random.Random(0))
    (last.parent / "damaged.pth").unlink()
    assert last.read_bytes() == before
    assert counts["refused by name"] + counts["with the same weights"] == 8
    assert counts["refused by name"] > 0


def test_a_damaged_file_of_the_data_is_named_and_mended_again(make_voc, flags_of, tmp_path, monkeypatch):
    data = make_voc(tmp_path / "data", {"train": 2, "val": 1, "test": 1}, empty_every=0)
    files = [path for path in data.rglob("*.*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    monkeypatch.setattr(faults, "mutate", lambda content, rng: content[:50])
    counts = faults.mutate_data(flags_of(data, tmp_path), data, tmp_path, 2, random.Random(0))
    assert counts == {
        "damaged annotations and images": 2,
        "stopped, naming the file": 2,
        "trained through": 0,
        "ended otherwise": 0,
        "foretold by the audit": 2,
    }
    assert {path: path.read_bytes() for path in files} == before


def test_pictures_of_every_size_are_timed(tiny_voc, tmp_path, monkeypatch):
    photos = importlib.import_module("photos")
    monkeypatch.setattr(photos, "SIZES", {"VOC": (50, 40), "photo": (1600, 1200)})
    flags = ["--rounds", "1", "--images", "2", "--data", str(tiny_voc), "--json", str(tmp_path / "a.json")]
    rows = {row["case"]: row for row in photos.main(flags)["rows"]}
    assert {"VOC file", "photo file", "photo decoded", "photo open_small"} <= rows.keys()
    assert rows["VOC decoded"]["times_peer"] == 1
    assert rows["photo file"]["ms"] > 0
