"""The program that compares recipes, run on a tiny data set."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import common
import recipes

FLAGS = "--recipe small --no-pretrained --width .0625 --epochs 1 --batch-size 4 --workers 0 --device cpu"
FLAGS += " --amp off"


def line(variant, seed, value, **more):
    return {
        "variant": variant,
        "flags": ["--x", variant],
        "seed": seed,
        "map_area": value,
        "map11": value,
        "coco_ap": value / 2,
        "ap75": None,
        "seconds": 10.0 * seed + 60,
        "environment": {"device": "abacus"},
        **more,
    }


def test_recipes_run_what_is_missing_and_nothing_twice(tiny_voc, tiny_run, tmp_path, monkeypatch, capsys):
    calls = []

    def train(flags, output, **options):  # really, see the test below
        calls.append(output.name)
        shutil.copytree(tiny_run.output, output, dirs_exist_ok=True)
        run = json.loads((output / "checkpoints" / "run.json").read_text())
        checkpoint = output / "checkpoints" / tiny_run.final.name
        return run | {"checkpoint": checkpoint, "seconds": 1.0, "images": 16, "images_per_s": 16.0}

    monkeypatch.setattr(common, "train", train)
    argv = [
        "--data",
        str(tiny_voc),
        "--set",
        "shapes",
        "--flags",
        f"{FLAGS} --val-split val",
        "--seeds",
        "3",
        "--folder",
        str(tmp_path),
        "--pool",
        "val",
        "test",
    ]
    assert recipes.main([*argv, "--only", "base"]) == 0
    assert recipes.main([*argv, "--only", "base", "multibox"]) == 0
    printed = capsys.readouterr().out
    lines = recipes.read_lines(tmp_path / "shapes.jsonl")
    assert [(row["variant"], row["seed"]) for row in lines] == [("base", 3), ("multibox", 3)]
    assert lines[1]["flags"][-2:] == ["--loss", "multibox"]
    for row in lines:
        checkpoints = tmp_path / "runs" / "shapes" / f"{row['variant']}-3" / "checkpoints"
        run = json.loads((checkpoints / "run.json").read_text())
        assert row["map_area"] == run["test"]["map_area"]
        assert row["map75"] == run["test"]["map75"]
        assert (row["images"], row["images_per_s"], row["batch_size"]) == (16, 16.0, 4)
        assert len(row["module"]) == 12
        run["checkpoint"] = checkpoints / "ssd_tiny_set_final.pth"
        pooled = common.measure(run, ["val", "test"])
        assert row["pooled_map_area"] == pytest.approx(pooled["map_area"], abs=1e-6)
        assert row["pooled_coco_ap"] == pytest.approx(pooled["coco_ap"], abs=1e-6)
    table = (tmp_path / "shapes.md").read_text()
    assert len(re.findall(r"^\| (base|multibox) +\| 1 ", table, re.M)) == 2
    assert table.splitlines()[0].endswith("trained on cpu")
    assert printed.endswith(f"{table}\n")
    assert recipes.main([*argv, "--only", "base", "multibox"]) == 0  # nothing left to run
    assert capsys.readouterr().out == f"{table}\n"
    assert calls == ["base-3", "multibox-3"]


def test_a_run_that_was_stopped_goes_on_and_other_flags_begin_anew(tiny_voc, flags_of, tmp_path, monkeypatch):
    flags = flags_of(tiny_voc, tmp_path)
    del flags[2:4]  # --output-dir
    whole = common.train([*flags, "--epochs", "2"], tmp_path)
    assert whole["images"] == pytest.approx(16, abs=4)
    assert whole["seconds"] > 0
    assert whole["images_per_s"] > 0
    assert list(tmp_path.rglob("*.png")) == []  # no pictures
    last = tmp_path / "checkpoints" / "last.pth"
    (tmp_path / "checkpoints" / "previous.pth").replace(last)  # as if it had ended after the first epoch
    record = json.loads((tmp_path / "checkpoints" / "run.json").read_text())
    (tmp_path / "checkpoints" / "run.json").write_text(json.dumps({"flags": record["flags"]}))
    run = common.train([*flags, "--epochs", "2"], tmp_path, stdout=subprocess.DEVNULL)
    assert run["flags"]["resume"]
    assert run["test"]["map_area"] == whole["test"]["map_area"]
    assert common.ssd.load_checkpoint(last)["metrics"]["epoch"] == 2
    run = common.train([*flags, "--epochs", "1"], tmp_path, stdout=subprocess.DEVNULL)
    assert not run["flags"]["resume"]
    assert run["images"] == pytest.approx(8, abs=2)
    for _ in range(2):  # the second time it must not go on from the run before
        with pytest.raises(RuntimeError, match="exit code 2"):
            common.train([*flags, "--epochs", "1", "--classes", "none"], tmp_path, stderr=subprocess.DEVNULL)


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def stop(*values, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "train", stop)
    assert recipes.main(["--set", "shapes", "--folder", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


def test_a_failed_run_is_told_and_leaves_no_line(tmp_path, capsys):
    argv = ["--data", str(tmp_path / "nowhere"), "--set", "shapes", "--only", "base", "--seeds", "0"]
    assert recipes.main([*argv, "--folder", str(tmp_path)]) == 2
    assert "base, seed 0: training ended with exit code 2, see " in capsys.readouterr().err
    assert not (tmp_path / "shapes.jsonl").exists()


def test_a_queue_stops_before_its_limit_and_goes_on_another_time(tiny_voc, tmp_path, monkeypatch, capsys):
    clock = [100.0]
    asked = []

    def train(flags, output, *, deadline, **options):
        asked.append((output.name, deadline))
        if output.name == "base-1":
            raise RuntimeError("stopped at the limit")
        seconds = {"base": 200.0, "batch_8": 90.0, "multibox": 30.0}[output.name[:-2]]
        clock[0] += seconds + 10
        test = {"map_area": 0.5, "map11": 0.4, "map75": 0.2, "split": "val", "detection": {}}
        used = {"epochs": 100, "batch_size": 8 if output.name == "batch_8-0" else 32}
        names = ("version", "python", "torch", "albumentations", "device", "cpu_count")
        environment = dict.fromkeys(names, "one")
        run = {"test": test, "flags": used, "environment": environment}
        return run | {"seconds": seconds, "images": 800, "images_per_s": 4.0}

    monkeypatch.setattr(common, "train", train)
    monkeypatch.setattr(recipes.time, "monotonic", lambda: clock[0])
    flags = "--train-split train --test-split val --no-pretrained"  # 8 images
    argv = ["--set", "gpu", "--data", str(tiny_voc), "--flags", flags, "--folder", str(tmp_path)]
    argv += ["--only", "base", "batch 8", "300 epochs", "multibox", "--seeds", "0"]
    assert recipes.main([*argv, "--limit", "600"]) == 0
    # 210 s, then 100 s: 270 s are left until 20 s before the limit, too few for 3 times 200 s.
    assert asked == [("base-0", 680.0), ("batch_8-0", 680.0), ("multibox-0", 680.0)]
    (left_out,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("left out")]
    assert left_out == "left out: 300 epochs, seed 0: needs about 610 s, 270 s are left"
    lines = recipes.read_lines(tmp_path / "gpu.jsonl")
    assert [row["variant"] for row in lines] == ["base", "batch 8", "multibox"]
    assert [row["run_seconds"] for row in lines] == [210, 100, 40]
    asked.clear()
    argv += ["0", "1", "--only", "base", "multibox"]
    assert recipes.main([*argv, "--limit", "240"]) == 1  # the base's second seed was not finished
    assert asked == [("base-1", 670.0), ("multibox-1", 670.0)]
    assert "failed: base, seed 1: stopped at the limit" in capsys.readouterr().err


def test_a_run_takes_as_long_as_before_or_as_its_images_do():
    lines = [
        line("old", 0, 0.5),  # of a version that kept no times
        line("a", 0, 0.5, run_seconds=90.0, seconds=80.0, images=8000, batch_size=32),
        line("a", 1, 0.5, run_seconds=95.0, seconds=80.0, images=8000, batch_size=32),
        line("b", 0, 0.5, run_seconds=50.0, seconds=40.0, images=2000, batch_size=8),
    ]
    assert recipes.estimate(["--x", "a"], lines, 1000) == 95
    new = ["--epochs", "10"]
    assert recipes.estimate([*new, "--batch-size", "32"], lines, 1000) == 15 + 100
    assert recipes.estimate([*new, "--batch-size", "8"], lines, 1000) == 10 + 200
    assert recipes.estimate([*new, "--batch-size", "4"], lines, 1000) == 10 + 200  # the newest
    assert recipes.estimate(new, lines[:1], 1000) == 60 + 10


def test_a_training_is_interrupted_at_the_deadline(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = common.time.monotonic()
    with pytest.raises(RuntimeError, match="stopped at the limit"):
        common.run_until(command, began + 0.5, stderr=subprocess.DEVNULL)
    assert common.time.monotonic() - began < 30


def test_the_module_is_named_as_git_names_it():
    command = ["git", "hash-object", str(common.ROOT / "ssd_object_detection.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no git here")
    assert done.stdout.startswith(recipes.module_blob())


def test_tables_have_mean_and_spread_best_first(tmp_path, capsys):
    lines = [line("low", 0, 0.25), line("high", 0, 0.5), line("high", 1, 0.7)]
    recipes.report(lines, tmp_path / "some.jsonl")
    title, _, header, _, high, low = (tmp_path / "some.md").read_text().splitlines()
    names, high, low = ([cell.strip() for cell in row.split("|")[1:-1]] for row in (header, high, low))
    assert names == ["variant", "seeds", "map_area", "map11", "coco_ap", "minutes"]  # ap75 was not measured
    assert high == ["high", "2", "0.6000 ±0.1414", "0.6000 ±0.1414", "0.3000 ±0.0707", "1.1 ±0.1"]
    assert low == ["low", "1", "0.2500", "0.2500", "0.1250", "1.0"]
    assert title == "some: means ± standard deviations of the seeds, trained on abacus"
    content = json.loads((tmp_path / "some.json").read_text())
    assert content["trained_on"] == ["abacus"]
    assert [row["variant"] for row in content["rows"]] == ["high", "low"]
    assert content["rows"][0]["map_area"] == pytest.approx(0.6)
    assert content["rows"][0]["map_area_std"] == pytest.approx(0.1414, abs=1e-4)
    assert "map_area_std" not in content["rows"][1]


def test_a_variant_is_compared_with_the_base_of_its_own_seeds_and_flags():
    lines = [
        line("base", seed, 0.5 + seed / 10, flags=["--epochs", "3"], pooled_map_area=0.6 + seed / 10)
        for seed in range(3)
    ]
    lines += [line("base", 1, 0.1, flags=["--epochs", "4"])]
    lines += [line("one", seed, 0, flags=["--epochs", "3", "--x"], pooled_map_area=0.8) for seed in (1, 2, 5)]
    lines += [line("two", 1, 0.3, flags=["--epochs", "4", "--y"])]
    found = {row["variant"]: row for row in recipes.summarise(lines)}
    assert found["one"]["to_base"] == pytest.approx((0.1 + 0.0) / 2)  # seed 5 has no base
    assert found["one"]["seeds"] == 3
    assert found["two"]["to_base"] == pytest.approx(0.2)
    assert "to_base" not in found["base"]


def test_every_variant_is_flags_that_the_command_knows():
    parser = common.ssd.build_parser()
    parser.add_argument("--anchors-made", dest="anchors")
    for name, flags in {**recipes.VARIANTS, **recipes.SETS}.items():
        assert parser.parse_args(flags.replace("--anchors", "--anchors-made").split()), name
    assert len(set(recipes.VARIANTS.values())) == len(recipes.VARIANTS)


@pytest.mark.parametrize("name", recipes.LADDERS)
def test_a_ladder_climbs_variants_that_differ_from_its_base(name):
    settings = set()
    for variant in recipes.LADDERS[name]:
        argv = [*recipes.SETS[name].split(), *recipes.VARIANTS[variant].split()]
        settings.add(repr(common.ssd.load_settings(argv)[0]))
    assert recipes.LADDERS[name][0] == "base"
    assert len(settings) == len(recipes.LADDERS[name]) > 1


def test_the_lines_measured_so_far_can_be_tabled():
    for path in sorted((common.ROOT / "benchmarks" / "results" / "recipes").glob("*.jsonl")):
        rows = recipes.summarise(recipes.read_lines(path))
        assert len(recipes.table(rows).splitlines()) == len(rows) + 2 > 2
