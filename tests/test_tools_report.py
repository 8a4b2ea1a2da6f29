"""ssd_tools/report.py: one page that needs nothing else, true to the records, patient with missing ones."""

import base64
import copy
import html.parser
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ssd_object_detection as ssd
from ssd_tools import report

VOID = {"meta", "link", "img", "br"}


class Page(html.parser.HTMLParser):
    """Read a page: its text, headings, links (src and href), ids and tags; tags that do not pair fail."""

    def __init__(self, source):
        super().__init__()
        self.open, self.headings, self.links = [], [], []
        self.text, self.tags, self.ids = "", {}, set()
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.ids |= {value for name, value in attrs if name == "id"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += f"{data}\n"
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def run(tiny_run):
    return report.read_run(tiny_run.final)


def test_the_command_writes_a_page_that_is_complete_in_itself(tiny_run, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert report.main([str(tiny_run.output), "--output", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} == page.ids
    assert not re.search(r"url\(|@import|<script|https?://", source)
    assert page.tags["img"] == 3  # losses, gallery, augmentations
    assert 'name="viewport"' in source


def test_embedded_images_are_small_and_right(tiny_run, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 2000, 3), dtype=np.uint8)
    flat = np.zeros((40, 60, 3), np.uint8)
    for pixels, kind, size in ((noise, "JPEG", (1600, 240)), (flat, "PNG", (60, 40))):
        header, content = report.embed(Image.fromarray(pixels)).split(",")
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert (image.format, image.size) == (kind, size)
            assert abs(np.asarray(image).mean() - pixels.mean()) < 3
        assert header == f"data:image/{kind.lower()};base64"


def test_the_page_says_what_was_recorded(tiny_run, run):
    page = Page(report.page(run))
    test = ssd.load_checkpoint(tiny_run.final)["test"]
    assert page.headings == [
        "Results",
        "Curves",
        "Classes",
        "Gallery",
        "Mistakes",
        "Data",
        "Settings",
        "Environment",
    ]
    assert f"{run['epoch']} of 2\n" in page.text
    numbers = [f"{test[key]:.4f}" for key in ("map_area", "map11", "map75")]
    for text in (*numbers, torch.__version__, "angular", "round", str(test["num_images"])):
        assert text in page.text
    for name, row in test["per_class"].items():
        cells = [f"{row[key]:.4f}" for key in ("ap_area", "ap11", "ap75")]
        assert "\n".join((name, str(row["num_gt"]), *cells)) in page.text
    assert "\n".join(("mean", *numbers)) in page.text
    shown = page.text.split("settings of the recipe")[0].rpartition("setting\n")[2]
    assert "epochs\n2\n" in shown  # given
    assert "momentum" not in shown  # left alone
    words = ("weight decay\n0.05\n", "batch norm\nall\n", "anchors\nauto\n", "CPU cores\n")
    for text in (*words, "data\nTiny Set\n"):
        assert text in page.text
    assert "weight_decay" not in page.text
    assert str(tiny_run.output.parent) not in page.text  # no folders of this machine
    assert page.text.count(f", {test['precision']}") == 4  # beside each figure of the test


def test_files_of_this_machine_are_named_without_their_folders(run):
    flags = run["flags"] | {"init_from": "/home/me/secret/a.pth", "backbone_weights": "/home/me/vgg.pth"}
    settings = report.settings_of(flags)
    assert (settings["init from"], settings["backbone weights"]) == ("a.pth", "vgg.pth")
    told = "x.py --data /home/me/VOC2007/ --init-from=/home/me/secret/a.pth --lr 1e-3"
    assert report.command({"environment": {"command": told}}) == (
        "python x.py --data VOC2007/ --init-from=a.pth --lr 1e-3"
    )


def test_names_cannot_break_the_page(run):
    odd = copy.deepcopy(run)
    name = '<b>&"cat</b>'
    odd["classes"], odd["environment"] = [name, "round"], {"command": f"x.py {name}"}
    odd["test"]["per_class"] = {name: odd["test"]["per_class"]["angular"]}
    page = Page(report.page(odd))
    assert page.text.count(name) >= 4
    assert page.tags.get("b", 0) == 6  # the tiles


def test_records_of_another_run_are_left_alone(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.output, tmp_path / "run")
    history = folder / "checkpoints" / "metrics.jsonl"
    rows = report.read_rows(history, "epoch")
    assert len(rows) == 2
    for row in rows:
        row["train_loss"] += 1e-9
    history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = report.read_run(folder / "checkpoints" / tiny_run.final.name)
    assert (run["environment"], run["history"], run["plots"], run["wall_s"]) == ({}, [], [], None)
    assert run["test"]["map_area"] == ssd.load_checkpoint(tiny_run.final)["test"]["map_area"]
    assert Page(report.page(run)).headings == ["Results", "Classes", "Mistakes", "Settings", "Environment"]


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "a list"])
def test_missing_and_damaged_records_cost_their_section_only(tiny_run, tmp_path, damage):
    folder = shutil.copytree(tiny_run.output, tmp_path / "run")
    for name in ("checkpoints/run.json", "checkpoints/metrics.jsonl"):
        if damage == "missing":
            (folder / name).unlink()
        else:
            text = {"empty": "", "cut": (folder / name).read_text()[:-40], "a list": "[1]"}[damage]
            (folder / name).write_text(text)
    run = report.read_run(report.find_checkpoint(folder))
    page = Page(report.page(run))
    assert "Results" in page.headings
    assert run["environment"] == {}
    assert len(report.read_rows(folder / "checkpoints" / "metrics.jsonl", "epoch")) == (
        1 if damage == "cut" else 0
    )


def test_the_analysis_and_its_pictures_are_shown_if_they_are_of_this_measurement(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.output, tmp_path / "run")
    plots = folder / "plots"
    evaluation = json.loads((plots / "evaluation" / "evaluation.json").read_text())
    evaluation |= {"analysis": {"calibration": {"ece": 0.0667}}, "mistakes": 9}
    (plots / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    for name in ("evaluation/worst_mistakes.png", "evaluation/errors.png", "mistakes.png"):
        shutil.copy(plots / "predictions.png", plots / name)
    page = Page(report.page(report.read_run(report.find_checkpoint(folder))))
    assert "by 0.067 on average" in page.text
    assert "worst mistakes" in page.text
    assert report.ANALYSIS["evaluation/errors.png"] in page.text
    assert page.tags["img"] == 6
    del evaluation["mistakes"]  # measured again without it: its picture is of an earlier measurement
    (plots / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    assert Page(report.page(report.read_run(report.find_checkpoint(folder)))).tags["img"] == 5
    del evaluation["analysis"]
    (plots / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    assert Page(report.page(report.read_run(report.find_checkpoint(folder)))).tags["img"] == 3
    evaluation["map_area"] /= 2  # a later measurement by other flags is not this result
    (plots / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    run = report.read_run(report.find_checkpoint(folder))
    assert run["extra"] == {}
    assert [path.name for path, _ in run["plots"]] == ["loss.png", "augmentations.png"]
    assert run["test"] == ssd.load_checkpoint(tiny_run.final)["test"]


def test_a_checkpoint_without_test_numbers_takes_those_of_its_own_evaluation(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.output, tmp_path / "run")
    path = folder / "plots" / "evaluation" / "evaluation.json"
    evaluation = json.loads(path.read_text()) | {"confusion": {}}
    for name, is_its_own in (("best.pth", True), ("last.pth", False)):
        path.write_text(json.dumps(evaluation | {"checkpoint": f"elsewhere/{name}"}))
        run = report.read_run(folder / "checkpoints" / "best.pth")
        assert run["test"].get("map_area") == (evaluation["map_area"] if is_its_own else None)
        assert "confusion" not in run["test"]
        assert ("Not yet measured" in report.page(run)) is not is_its_own


def test_the_analysis_is_put_in_words():
    confident = {"localisation": 5, "classification": 1, "both": 2, "duplicate": 3, "background": 9}
    confident["missed"] = 8
    gain = {"localisation": 0.01, "background": 0.02, "missed": 0.03, "false_positives": 0.9}
    tide = {"confident": confident, "gain": {"mean": gain}}
    extra = {
        "coco": {"ap_small": 0.1, "ap_medium": 0.25, "ap_large": 0.5},
        "analysis": {"tide": tide, "calibration": {"ece": 0.0667}, "ap_ranges": {"mean": [0.8682, 0.91789]}},
    }
    drawn, wrong, best, sizes, ece = report.analysis_in_words(extra)
    assert drawn.startswith(
        "Of lists drawn at random from the test images 95 % have a mAP@.5 of 0.868 to 0.918:"
    )
    assert wrong.startswith("Of the detections that score 0.4 or more, 9 are on nothing, 5 have the right")
    assert wrong.endswith("1 have the wrong class; 8 objects have no hit of that score.")
    assert best == "Finding what was missed would raise the mAP@.5 most, by 0.0300."
    gain["background"] = 0.04
    again = report.analysis_in_words(extra)[2]
    assert again == "Mending the detections that are on nothing would raise the mAP@.5 most, by 0.0400."
    assert sizes.endswith("small 0.100, medium 0.250, large 0.500.")
    assert "by 0.067 on average" in ece
    nothing = {"ap_ranges": {"mean": [None, None]}}  # of a list without objects
    assert report.analysis_in_words({"analysis": nothing}) == []
    assert report.analysis_in_words({"analysis": [], "coco": {"ap_small": None}}) == []


def test_commands_are_shown_without_the_folders_of_the_machine():
    run = {"environment": {"command": "/home/me/ssd_object_detection.py --data /home/me/voc/cats --epochs 2"}}
    assert report.command(run) == "python ssd_object_detection.py --data cats --epochs 2"
    assert "not recorded" in report.command({"environment": {}})


def test_the_chosen_checkpoint_is_the_final_one_else_the_best(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.output, tmp_path / "run")
    for name in (tiny_run.final.name, "best.pth", "last.pth"):
        assert report.find_checkpoint(folder).name == name
        assert report.find_checkpoint(folder / "checkpoints" / name).name == name
        if name == "last.pth":
            run = report.read_run(report.find_checkpoint(folder))
            assert "Not yet measured" in Page(report.page(run)).text
        (folder / "checkpoints" / name).unlink()
    with pytest.raises(ssd.InputError, match="no checkpoint of a run"):
        report.find_checkpoint(folder)


def test_tensorboard_gets_the_records_and_pictures(tiny_run, tmp_path, capsys, monkeypatch):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = shutil.copytree(tiny_run.output, tmp_path / "run")
    step = {"step": 3, "loss": 1.5, "lr": None}
    (folder / "checkpoints" / "steps.jsonl").write_text(json.dumps(step) + "\n")
    for source in (folder, folder / "checkpoints" / "best.pth"):  # the second time in place of the first
        assert report.main([str(source), "--tensorboard"]) == 0
        target = folder / "checkpoints" / "tensorboard"
        assert f"--logdir {target}" in capsys.readouterr().out
    events = loader.EventAccumulator(str(target)).Reload()
    rows = report.read_rows(folder / "checkpoints" / "metrics.jsonl", "epoch")
    written = [(event.step, event.value) for event in events.Scalars("epoch/train_loss")]
    assert written == [(row["epoch"], pytest.approx(row["train_loss"])) for row in rows]
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(3, 1.5)]
    assert {"loss", "predictions", "augmentations"} <= set(events.Tags()["images"])
    assert "step/lr" not in events.Tags()["scalars"]
    assert report.main([str(tmp_path), "--tensorboard"]) == 2
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert report.main([str(folder), "--tensorboard"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl" in first
    assert "pip install tensorboard" in second


def test_mistakes_are_one_line(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    unwritable = [tiny_run.final, "--output", tmp_path / "file" / "x"]
    for argv in (["nowhere"], [tmp_path / "file"], unwritable):
        assert report.main([str(a) for a in argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


@pytest.fixture
def two_runs(run):
    """A run and one that differs: in folder, rate, figures of a class, speed, and without validation loss."""
    other = copy.deepcopy(run)
    other["source"] = run["source"].parent.parent.parent / "other" / "checkpoints" / "best.pth"
    other["flags"] |= {"lr": 0.0004, "batch_norm": "none"}
    other["test"]["map_area"] = run["test"]["map_area"] + 0.0123
    other["test"]["per_class"]["round"]["ap_area"] = None
    other["wall_s"] = 754
    for row in other["history"]:
        row["images_per_s"] = 32.5
        del row["val_loss"]
    return [run, other]


def test_runs_side_by_side_show_what_differs(two_runs):
    run, other = two_runs
    names = report.name_runs(two_runs)
    assert names == ["out", "other"]
    figures = {row[0]: row[1:] for row in report.compared_figures(two_runs, names)}
    area = run["test"]["map_area"]
    assert figures["test mAP@.5, area"] == (f"{area:.4f}", f"{area + 0.0123:.4f} (+0.0123)")
    assert figures["measured with"] == ("float32", "float32")
    assert figures["wall time"][1] == "12.6 min"
    assert figures["training, images/s (median)"][1] == "32.5"
    settings = report.compared_settings(two_runs, names)
    assert settings[0] == ("setting", "out", "other")
    assert sorted(settings[1:]) == [("batch norm", "all", "none"), ("lr", "0.005", "0.0004")]
    classes = {row[0]: row[1:] for row in report.compared_classes(two_runs, names)}
    for name, values in classes.items():
        first = run["test"]["per_class"].get(name, {}).get("ap_area")
        if name == "round":
            assert values == (f"{first:.4f}", "-")
        if name == "angular":
            assert values == (f"{first:.4f}", f"{first:.4f} (+0.0000)")
    axes = report.plot_runs(two_runs, names).axes
    assert [cell.get_ylabel() for cell in axes] == ["validation mAP@.5", "training loss", "validation loss"]
    assert [[len(line.get_xdata()) for line in cell.lines] for cell in axes] == [[2, 2], [2, 2], [2, 0]]
    assert axes[0].lines[0].get_linestyle() != axes[0].lines[1].get_linestyle()
    page = Page(report.comparison(two_runs))
    assert page.headings == ["Results", "What differs", "Curves", "Classes"]
    assert page.tags["img"] == 1
    assert "different lists" not in page.text
    other["test"]["split"] = "val"
    assert "different lists" in Page(report.comparison(two_runs)).text


def test_a_run_on_more_folders_with_the_same_test_list_is_compared(two_runs):
    run, other = two_runs
    other["test"] = run["test"] | {"data": [run["test"]["data"], "mine"]}
    text = Page(report.comparison(two_runs)).text
    assert "different lists" not in text
    assert "the figures are compared as those of one list" in text
    other["test"]["num_images"] += 1
    assert "different lists" in Page(report.comparison(two_runs)).text


def test_drawn_lists_say_whether_a_difference_is_real(two_runs):
    run, other = two_runs
    maps = np.linspace(0.5, 0.7, 201)
    for one, values in ((run, maps), (other, maps[::-1] - 0.01)):
        one["extra"] = {"analysis": {"drawn_maps": values.tolist()}}
    assert report.drawn_ranges(two_runs)[1:] == ("0.505 to 0.695", "0.495 to 0.685 (-0.200 to +0.180)")
    other["extra"]["analysis"]["drawn_maps"] = (maps + 0.02).tolist()  # always better, list by list
    assert report.drawn_ranges(two_runs)[2] == "0.525 to 0.715 (+0.020 to +0.020)"
    assert report.drawn_ranges(two_runs) in report.compared_figures(two_runs, ["a", "b"])
    other["test"]["num_images"] += 1  # other images: nothing to compare list by list
    assert report.drawn_ranges(two_runs)[2] == "0.525 to 0.715"
    for nothing in ({}, {"analysis": {"drawn_maps": [None]}}):
        run["extra"] = nothing
        assert report.drawn_ranges(two_runs)[1:] == ("-", "0.525 to 0.715")
    assert report.drawn_ranges(two_runs[:1])[1:] == ("-",)


def test_runs_without_records_are_compared_too(run):
    empty = copy.deepcopy(run) | {"test": {}, "val": {}, "history": [], "environment": {}, "wall_s": None}
    empty["epoch"] = None
    page = Page(report.comparison([empty, empty]))
    assert "No setting." in page.text
    assert "wall time" not in page.text


def test_runs_of_one_folder_have_names_that_differ():
    runs = [{"source": Path(path)} for path in ("/a/x/checkpoints/1.pth", "/b/x/checkpoints/1.pth")]
    assert report.name_runs(runs) == ["a/x", "b/x"]
    same = [{"source": Path(f"/a/checkpoints/{name}.pth")} for name in ("best", "last")]
    assert report.name_runs(same) == ["1: best.pth", "2: last.pth"]


def test_the_command_compares_several_runs(tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run.output, tmp_path / "again")
    assert report.main([str(folder), str(tiny_run.output)]) == 0
    path = folder / "plots" / "comparison.html"
    assert str(path) in capsys.readouterr().out
    source = path.read_text(encoding="utf-8")
    assert "again" in Page(source).text
    assert not re.search(r"url\(|@import|<script|https?://", source)


def test_words_follow_the_numbers():
    row = {"ap_area": 0.9, "ap11": 0.8, "ap75": 0.7, "num_gt": 90}
    nothing = {"ap_area": None, "ap11": None, "ap75": None, "num_gt": 0}
    test = {
        "map_area": 0.7,
        "map11": 0.6,
        "map75": 0.5,
        "per_class": {"cat": {**row, "ap_area": 0.5, "num_gt": 9}, "dog": row, "emu": nothing},
    }
    run = {
        "test": test,
        "extra": {},
        "val": {"val_map_area": 0.75},
        "epoch": 4,
        "history": [{"epoch": e, "val_loss": v} for e, v in enumerate((3, 2, 2.5))],
    }
    best, few, gap, loss = report.in_words(run)
    assert best == "Best found class: dog (AP 0.900, 90 objects); worst: cat (AP 0.500, 9 objects)."
    assert few.endswith(": cat (9).")
    assert "chose epoch 4 was 0.7500; the test's is 0.0500 lower" in gap
    assert "lowest in epoch 1 of 2 and 25% higher at the end" in loss
    run["history"][2]["val_loss"] = 2.05
    assert report.in_words(run)[3].endswith("lowest in epoch 1 of 2 and stayed near that.")
    run["history"][2]["val_loss"] = 1.5
    assert report.in_words(run)[3].endswith("lowest in epoch 2 of 2, its last: more epochs may help.")
    nowhere = {"test": {}, "extra": {}, "val": {}, "history": []}
    assert report.in_words(nowhere) == ["Not analysed: no measurement was recorded."]
    head, *rows = report.table_rows(test)
    assert len(head) == 5
    assert rows == [
        ("dog", "90", "0.9000", "0.8000", "0.7000"),
        ("cat", "9", "0.5000", "0.8000", "0.7000"),
        ("emu", "0", "no object", "no object", "no object"),
        ("mean", "", "0.7000", "0.6000", "0.5000"),
    ]
    assert report.markdown([("a", "b|c"), ("1", "2")]) == "| a | b\\|c |\n| --- | --- |\n| 1 | 2 |"
    assert report.markdown(report.table_rows({})) == ""
