"""The two programs that compare recipes, run on a tiny data set."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
FLAGS = "--val-split val --width .0625 --epochs 1 --batch-size 4 --workers 0 --device cpu --amp off --lr .005"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipes():
    return load("recipes")


def line(variant, seed, value, **more):
    return {"variant": variant, "flags": ["--x", variant], "seed": seed, "map_area": value, "map11": value,
            "coco_ap": value / 2, "ap75": None, "seconds": 10.0 * seed + 60, **more}


def test_recipes_run_what_is_missing_and_nothing_twice(recipes, tiny_voc, tmp_path, capsys):
    argv = ["--data", str(tiny_voc), "--set", "shapes", "--flags", FLAGS, "--only", "base", "gamma 0", "--pool", "val",
            "test", "--folder", str(tmp_path)]
    assert recipes.main([*argv, "--seeds", "3", "--only", "base"]) == 0
    assert recipes.main([*argv, "--seeds", "3"]) == 0
    capsys.readouterr()
    (tmp_path / "shapes.png").unlink()
    assert recipes.main([*argv, "--seeds", "3"]) == 0  # nothing left to run: drawn again from the lines
    lines = [json.loads(text) for text in (tmp_path / "shapes.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["seed"]) for row in lines] == [("base", 3), ("gamma 0", 3)]
    assert lines[1]["flags"][-2:] == ["--focal-gamma", "0"]
    for row in lines:
        run = tmp_path / "runs" / f"{row['variant'].replace(' ', '_')}-3" / "checkpoints" / "run.json"
        assert json.loads(run.read_text())["test"]["voc"]["map_area"] == row["map_area"]
        assert 0 <= row["pooled_map_area"] <= 1
        assert 0.1 < row["memory_gb"] < 20
    printed = capsys.readouterr().out
    assert len(re.findall(r"^(base|gamma 0) +1 ", printed, re.M)) == 2
    assert (tmp_path / "shapes.png").stat().st_size > 10_000


def test_trials_and_suggested_anchors_are_run_and_checkpoints_measured_with_trials(recipes, tiny_voc, tmp_path, capsys):
    argv = ["--data", str(tiny_voc), "--set", "shapes", "--pool", "val", "test", "--folder", str(tmp_path)]
    more = ["--seeds", "0", "--flags", FLAGS]
    assert recipes.main([*argv, *more, "--only", "suggested anchors", "sigmoid focal", "--parallel", "2"]) == 0
    lines = {row["variant"]: row for row in recipes.read_lines(tmp_path / "shapes.jsonl")}
    assert lines["suggested anchors"]["flags"][-2:] == ["--anchors", str(tmp_path / "plots" / "anchors.json")]
    assert lines["sigmoid focal"]["flags"][-4:-2] == ["--trial", "sigmoid"]
    assert all(0 <= row["pooled_map_area"] <= 1 for row in lines.values())
    checkpoint = tmp_path / "runs" / "suggested_anchors-0" / "checkpoints" / "ssd_tiny_set_final.pth"
    capsys.readouterr()
    assert recipes.main([*argv, "--measure", str(checkpoint), "--trials", "nms-.5", "flip"]) == 0
    printed, found = capsys.readouterr().out, recipes.read_lines(tmp_path / "detection.jsonl")
    assert [row["variant"] for row in found] == ["base", "nms-.5", "flip"]
    plain = recipes.measure(checkpoint, tiny_voc, ["val", "test"])
    assert found[0]["pooled_map_area"] == plain["map_area"] == lines["suggested anchors"]["pooled_map_area"]
    assert len(re.findall(r"^(base|nms-.5|flip) +1 ", printed, re.M)) == 3


def test_a_failed_run_is_told_and_leaves_no_line(recipes, tmp_path, capsys):
    argv = ["--data", str(tmp_path / "nowhere"), "--set", "shapes", "--only", "base", "--folder", str(tmp_path)]
    assert recipes.main([*argv, "--seeds", "0"]) == 2
    assert "base, seed 0: exit code 2, see " in capsys.readouterr().err
    assert not (tmp_path / "shapes.jsonl").exists()


def test_runs_side_by_side_are_no_more_than_the_gpu_holds(recipes, tmp_path, monkeypatch, capsys):
    results, together = tmp_path / "lines.jsonl", []

    def work(job, parallel):
        together.append((job, parallel))
        with open(results, "a") as file:
            file.write(json.dumps(line(job, 0, 0.5, memory_gb=4.0)) + "\n")

    monkeypatch.setattr(recipes, "free_gpu_memory", lambda: None)
    recipes.run_side_by_side(work, ["a", "b"], results, 5)
    assert sorted(together) == [("a", 5), ("b", 5)]  # without a GPU as many as were asked for
    results.unlink()
    together.clear()
    monkeypatch.setattr(recipes, "free_gpu_memory", lambda: 20.0)
    recipes.run_side_by_side(work, ["a", "b", "c"], results, 5)
    assert together[0] == ("a", 1)  # shows that a run takes 4 GB: three of 6 GB fit
    assert sorted(together[1:]) == [("b", 3), ("c", 3)]
    assert "20 GB of GPU memory hold 3 runs at a time" in capsys.readouterr().out
    together.clear()
    recipes.run_side_by_side(work, ["d", "e"], results, 2)
    assert sorted(together) == [("d", 2), ("e", 2)]  # known by now
    on_cpu = line("c", 0, 0.5, memory_gb=0.1, environment={"device": "cpu"})
    assert recipes.runs_that_fit([on_cpu], 20.0) == 1  # says nothing of a GPU's memory
    assert recipes.runs_that_fit([], 20.0) == recipes.runs_that_fit([line("a", 0, 0.5, memory_gb=99.0)], 20.0) == 1


def test_table_has_mean_and_spread_best_first(recipes, tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = [line("low", 0, 0.25), line("high", 0, 0.5), line("high", 1, 0.7)]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"variant": "cut sh')
    rows = recipes.summarise(recipes.read_lines(path))
    assert [name for _, name, _ in rows] == ["high", "low"]
    _, high, low = recipes.table(rows).splitlines()
    assert high.split()[:4] == ["high", "2", "0.6000", "±0.1414"]
    assert low.split()[:3] == ["low", "1", "0.2500"]
    assert "65 ±7" in high
    assert " - " in low
    assert len(recipes.draw(rows).axes) == 2


def test_a_variant_is_compared_with_the_base_of_its_own_seeds_and_flags(recipes):
    lines = [line("base", seed, 0.5 + seed / 10, flags=["--epochs", "3"], pooled_map_area=0.6 + seed / 10)
             for seed in range(3)]
    lines += [line("base", 1, 0.1, flags=["--epochs", "4"])]
    lines += [line("one", seed, 0, flags=["--epochs", "3", "--x"], pooled_map_area=0.8) for seed in (1, 2, 5)]
    lines += [line("two", 1, 0.3, flags=["--epochs", "4", "--y"])]
    found = {name: figures["to_base"] for _, name, figures in recipes.summarise(lines)}
    assert found["one"] == pytest.approx([0.1, 0.0])  # seed 5 has no base
    assert found["two"] == pytest.approx([0.2])
    assert found["base"] == []
    assert re.search(r"^two +1 .* [+]0[.]2000 ", recipes.table(recipes.summarise(lines)), re.M)


def test_every_variant_is_flags_that_the_command_knows(recipes):
    parser = recipes.ssd.build_parser()
    parser.add_argument("--trial", choices=recipes.trials.TRIALS)
    parser.add_argument("--anchors-made", dest="anchors")
    for name, flags in {**recipes.VARIANTS, **recipes.SETS}.items():
        assert parser.parse_args(flags.replace("--anchors SUGGESTED", "--anchors-made x").split()), name
    assert set(recipes.DETECTION_TRIALS) <= recipes.trials.TRIALS.keys()
    assert len(set(recipes.VARIANTS.values())) == len(recipes.VARIANTS)


def test_against_torchvision_compares_both_on_the_same_list(tiny_voc, tmp_path, capfd):
    flags = FLAGS.replace("--val-split val ", "").replace("--device cpu ", "").replace("--workers 0 ", "")
    argv = ["--data", str(tiny_voc), "--test-split", "test", "--images", "3", "--batch-size", "2", "--device", "cpu",
            "--flags", flags, "--json", str(tmp_path / "out.json")]
    assert load("against_torchvision").main(argv) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    ours, theirs = result["rows"]["this project"], result["rows"]["torchvision"]
    assert ours["images"] == pytest.approx(3, abs=1)
    assert theirs["images"] >= 2
    assert theirs["seconds"] >= ours["seconds"] > 0
    out = capfd.readouterr().out
    assert re.search(r"^this project +\d", out, re.M)
    assert re.search(r"^torchvision +\d", out, re.M)
    assert "mAP ratio: " in out


def test_the_table_beside_torchvision_has_room_for_what_a_list_cannot_have():
    row = {"seconds": 12.34, "images": 5, "map_area": 0.25, "ap_small": None}
    text = load("against_torchvision").table({"this project": row, "torchvision": {**row, "ap_small": float("nan")}})
    assert [line.split()[-4:] for line in text.splitlines()] == [
        ["seconds", "images", "map_area", "ap_small"], ["12.3", "5.0", "0.2500", "-"],
        ["12.3", "5.0", "0.2500", "-"]]
