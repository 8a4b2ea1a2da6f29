"""The programs that compare recipes, and recipes with torchvision, run on a tiny data set."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import against_torchvision
import common
import recipes
import trials

FLAGS = "--recipe small --width .0625 --epochs 1 --batch-size 4 --workers 0 --device cpu --amp off"


def line(variant, seed, value, **more):
    return {"variant": variant, "flags": ["--x", variant], "seed": seed, "map_area": value, "map11": value,
            "coco_ap": value / 2, "ap75": None, "seconds": 10.0 * seed + 60, **more}


def test_recipes_run_what_is_missing_and_nothing_twice(tiny_voc, tmp_path, capsys):
    argv = ["--data", str(tiny_voc), "--set", "shapes", "--flags", f"{FLAGS} --val-split val", "--seeds", "3",
            "--folder", str(tmp_path), "--pool", "val", "test"]
    assert recipes.main([*argv, "--only", "base"]) == 0
    assert recipes.main([*argv, "--only", "base", "ATSS"]) == 0
    capsys.readouterr()
    (tmp_path / "shapes.png").unlink()
    assert recipes.main([*argv, "--only", "base", "ATSS"]) == 0  # nothing left to run: drawn again
    lines = recipes.read_lines(tmp_path / "shapes.jsonl")
    assert [(row["variant"], row["seed"]) for row in lines] == [("base", 3), ("ATSS", 3)]
    assert lines[1]["flags"][-2:] == ["--trial", "atss"]
    for row in lines:
        checkpoints = tmp_path / "runs" / f"{row['variant']}-3" / "checkpoints"
        test = json.loads((checkpoints / "run.json").read_text())["test"]
        assert row["map_area"] == pytest.approx(test["map_area"], abs=1e-6)
        pooled = common.measure(checkpoints / "ssd_tiny_set_final.pth", tiny_voc, ["val", "test"], amp="off")
        assert row["pooled_map_area"] == pytest.approx(pooled["map_area"], abs=1e-6)
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| (base|ATSS) +\| 1 ", printed, re.M)) == 2
    assert (tmp_path / "shapes.png").stat().st_size > 10_000


def test_a_failed_run_is_told_and_leaves_no_line(tmp_path, capsys):
    argv = ["--data", str(tmp_path / "nowhere"), "--set", "shapes", "--only", "base", "--seeds", "0"]
    assert recipes.main([*argv, "--folder", str(tmp_path)]) == 2
    assert "base, seed 0: exit code 2, see " in capsys.readouterr().err
    assert not (tmp_path / "shapes.jsonl").exists()


def test_table_has_mean_and_spread_best_first():
    rows = recipes.summarise([line("low", 0, 0.25), line("high", 0, 0.5), line("high", 1, 0.7)])
    assert [name for name, _ in rows] == ["high", "low"]
    lines = recipes.table(rows).splitlines()
    high, low = ([cell.strip() for cell in row.split("|")[1:-1]] for row in lines[2:])
    assert high[:3] == ["high", "2", "0.6000 ±0.1414"]
    assert low[:3] == ["low", "1", "0.2500"]
    assert high[-1] == "65 ±7"
    assert low[5] == "-"
    (axes,) = recipes.draw(rows).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high (2)", "low (1)"]


def test_a_variant_is_compared_with_the_base_of_its_own_seeds_and_flags():
    lines = [line("base", seed, 0.5 + seed / 10, flags=["--epochs", "3"], pooled_map_area=0.6 + seed / 10)
             for seed in range(3)]
    lines += [line("base", 1, 0.1, flags=["--epochs", "4"])]
    lines += [line("one", seed, 0, flags=["--epochs", "3", "--x"], pooled_map_area=0.8) for seed in (1, 2, 5)]
    lines += [line("two", 1, 0.3, flags=["--epochs", "4", "--y"])]
    found = {name: figures["to_base"] for name, figures in recipes.summarise(lines)}
    assert found["one"] == pytest.approx([0.1, 0.0])  # seed 5 has no base
    assert found["two"] == pytest.approx([0.2])
    assert found["base"] == []


def test_every_variant_is_flags_that_the_command_knows():
    parser = common.ssd.build_parser()
    parser.add_argument("--trial", choices=trials.TRIALS)
    parser.add_argument("--anchors-made", dest="anchors")
    for name, flags in {**recipes.VARIANTS, **recipes.SETS}.items():
        assert parser.parse_args(flags.replace("--anchors", "--anchors-made").split()), name
    assert len(set(recipes.VARIANTS.values())) == len(recipes.VARIANTS)


def test_the_lines_measured_so_far_can_be_tabled():
    for path in sorted((common.ROOT / "benchmarks" / "results" / "recipes").glob("*.jsonl")):
        rows = recipes.summarise(recipes.read_lines(path))
        assert len(recipes.table(rows).splitlines()) == len(rows) + 2 > 2


def test_against_torchvision_compares_both_on_the_same_list(tiny_voc, tmp_path, capfd):
    flags = FLAGS.replace("--device cpu ", "").replace("--workers 0 ", "")
    argv = ["--data", str(tiny_voc), "--test-split", "test", "--batch-size", "2", "--device", "cpu",
            "--flags", flags, "--json", str(tmp_path / "out.json")]
    assert against_torchvision.main(argv) == 0
    ours, theirs = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert ours["images"] == pytest.approx(8, abs=2)
    assert theirs["images"] >= 2
    assert theirs["seconds"] >= ours["seconds"] > 0
    out = capfd.readouterr().out
    assert re.search(r"^\| this project +\| \d", out, re.M)
    assert re.search(r"^\| torchvision +\| \d", out, re.M)
    assert "mAP ratio: " in out
