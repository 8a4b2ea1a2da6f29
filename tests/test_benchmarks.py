"""The benchmarks of speed, each with its smallest settings: the table is parsed and agrees with the JSON file."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SETTINGS = {
    "training_step": ["--batch-size", "1"],
    "inference": ["--batch-sizes", "1"],
    "augmentation": ["--images", "2"],
    "losses": ["--batch-size", "2"],
    "loader": ["--workers", "0", "--images", "2", "--batch-size", "2"],
    "end_to_end": ["--images", "1", "--batch-size", "1", "--width", ".0625"],
}


@pytest.fixture
def benchmark(monkeypatch):
    """A function that imports a benchmark by name; its neighbours are found as when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ["common", *SETTINGS]:
        sys.modules.pop(name, None)


def parse(text):
    """Return the rows of the one Markdown table in a text, as dicts."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert re.fullmatch(r"-+", lines[1][0])
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


@pytest.mark.parametrize("name", SETTINGS)
def test_benchmark_prints_its_table_and_writes_its_json(name, benchmark, tiny_voc, tmp_path, capsys):
    path = tmp_path / "result.json"
    flags = ["--data", str(tiny_voc), "--data-root", str(tmp_path), "--rounds", "1", "--device", "cpu"]
    benchmark(name).main([*flags, *SETTINGS[name], "--json", str(path)])
    rows, result = parse(capsys.readouterr().out), json.loads(path.read_text())
    assert [row["case"] for row in rows] == [row["case"] for row in result["rows"]]
    assert {row["case"].startswith("torchvision") for row in rows} == {True, False}
    for printed, row in zip(rows, result["rows"], strict=True):
        assert row["images_per_s"] > 0
        assert float(printed["images_per_s"].replace(",", "")) == pytest.approx(row["images_per_s"], rel=0.01)
        assert row["times_peer"] > 0
    assert result["environment"]["torch"]
    assert result["environment"]["threads"] >= 1


def test_ratio_is_of_the_medians_and_by_picture(benchmark):
    common = benchmark("common")
    times = {"peer": [2.0, 1.0, 9.0], "own": [0.5, 0.25, 1.0]}
    peer, own = common.rows_of(times, {"own": "peer", "peer": "peer"}, images={"peer": 4, "own": 2})
    assert (peer["images_per_s"], own["images_per_s"]) == (2.0, 4.0)
    assert (peer["times_peer"], own["times_peer"]) == (1.0, 2.0)
    assert own["ms"] == 500
    assert own["spread"] == pytest.approx(1.5)


def test_cases_are_timed_in_turn(benchmark):
    common, calls = benchmark("common"), []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = common.time_in_turns(cases, 3, common.torch.device("cpu"), least=0)
    assert calls[-6:] == ["a", "b"] * 3
    assert [len(v) for v in times.values()] == [3, 3]
