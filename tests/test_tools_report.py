"""tools/report.py: one page that needs nothing else, true to the records and patient with those that are missing."""

import copy
import html.parser
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import ssd_object_detection as ssd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import report

VOID = {"meta", "link", "img", "br"}


class Page(html.parser.HTMLParser):
    """Read a page: its text, headings, links (src and href), ids, and tags counted; tags that do not pair fail."""

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.headings, self.links, self.tags, self.ids = [], "", [], [], {}, set()
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
    assert page.tags["img"] == 5  # precision-recall, confusion, gallery, data, augmentations; the curves are drawn anew
    assert page.tags["svg"] == 6
    assert 'name="viewport"' in source


def test_the_page_says_what_was_recorded(tiny_run, run):
    page = Page(report.page(run))
    test = ssd.load_checkpoint(tiny_run.final)["test"]["voc"]
    assert page.headings == ["Results", "Curves", "Classes", "Precision and recall", "Further figures", "Gallery",
                             "Mistakes", "Data", "Flags", "Environment"]
    assert f"{run['epoch']} of 2\n" in page.text
    for text in (f"{test['map_area']:.4f}", f"{test['map11']:.4f}", torch.__version__, "angular", "round"):
        assert text in page.text
    for name in run["flags"]:
        assert f"--{name.replace('_', '-')}\n" in page.text
    shown = page.text.split("flags at their defaults")[0].rpartition("flag\n")[2]
    assert "--epochs\n2\n" in shown  # given
    assert "--momentum" not in shown  # left alone


def test_names_cannot_break_the_page(run):
    odd = copy.deepcopy(run)
    name = '<b>&"cat</b>'
    odd["classes"], odd["notes"], odd["environment"] = [name, "round"], [f"note {name}"], {"command": f"x.py {name}"}
    odd["test"]["per_class"] = {name: odd["test"]["per_class"]["angular"]}
    page = Page(report.page(odd))
    assert page.text.count(name) >= 4
    assert page.tags.get("b", 0) == 5  # the tiles


def test_records_of_another_run_are_left_alone(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.output, tmp_path / "run")
    record = json.loads((folder / "checkpoints" / "run.json").read_text())
    record["flags"]["lr"] = 1.0
    (folder / "checkpoints" / "run.json").write_text(json.dumps(record))
    run = report.read_run(folder / "checkpoints" / tiny_run.final.name)
    assert (run["environment"], run["history"], run["plots"], run["wall_s"]) == ({}, [], [], None)
    assert run["test"]["map_area"] == ssd.load_checkpoint(tiny_run.final)["test"]["voc"]["map_area"]
    assert Page(report.page(run)).headings == ["Results", "Classes", "Further figures", "Mistakes", "Flags",
                                               "Environment"]


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
    assert len(report.read_history(folder / "checkpoints" / "metrics.jsonl")) == (1 if damage == "cut" else 0)


def test_further_numbers_and_pictures_of_the_evaluation_are_shown(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.output, tmp_path / "run")
    test = ssd.load_checkpoint(tiny_run.final)["test"]
    more = {**test, "checkpoint": str(tiny_run.final), "new": {"ap": 0.4321, "by": {"small": None}, "list": [1, 2]},
            "odd": "text", "flag": True}
    (folder / "plots" / "evaluation" / "evaluation.json").write_text(json.dumps(more))
    shutil.copy(folder / "plots" / "predictions.png", folder / "plots" / "evaluation" / "worst_mistakes.png")
    run = report.read_run(report.find_checkpoint(folder))
    figures = dict(report.further_figures(run["test"]))
    assert figures.pop("new AP") == "0.4321"
    assert figures["COCO AP50"] == f"{test['coco']['ap50']:.4g}"
    assert figures["number of images"] == "4"
    assert not {"new list", "new by small", "odd", "flag", "map area"} & figures.keys()
    page = Page(report.page(run))
    assert "new AP\n0.4321\n" in page.text
    assert "worst mistakes" in page.text
    more["voc"]["map_area"] /= 2  # a later measurement by other flags is not this result
    (folder / "plots" / "evaluation" / "evaluation.json").write_text(json.dumps(more))
    assert "new AP" not in dict(report.further_figures(report.read_run(report.find_checkpoint(folder))["test"]))


def test_a_record_of_the_first_format_is_read(tiny_run):
    test = ssd.load_checkpoint(tiny_run.final)["test"]
    first = {"map_area": test["voc"]["map_area"], "map11": test["voc"]["map11"], "per_class": test["voc"]["per_class"]}
    for record in (first, test):
        assert {k: report.with_voc(record)[k] for k in first} == first


def test_the_analysis_is_put_in_words():
    test = {"coco": {"ap_small": 0.1, "ap_medium": 0.25, "ap_large": 0.5}, "analysis": {
        "tide": {"confident": {"localisation": 5, "classification": 1, "both": 2, "duplicate": 3, "background": 9,
                               "missed": 8},
                 "gain": {"mean": {"localisation": 0.01, "background": 0.02, "missed": 0.03, "false_positives": 0.9}}},
        "calibration": {"ece": 0.0667}}}
    wrong, gain, sizes, ece = report.analysis_in_words(test)
    assert wrong.startswith("Of the detections that score 0.4 or more, 9 are on nothing, 5 have the right class and a")
    assert wrong.endswith("1 have the wrong class; 8 objects have no hit of that score.")
    assert gain == "Finding what was missed would raise the mAP@.5 most, by 0.0300."
    test["analysis"]["tide"]["gain"]["mean"]["background"] = 0.04
    again = report.analysis_in_words(test)[1]
    assert again == "Mending the detections that are on nothing would raise the mAP@.5 most, by 0.0400."
    assert sizes.endswith("small 0.100, medium 0.250, large 0.500.")
    assert "by 0.067 on average" in ece
    assert report.analysis_in_words({"analysis": [], "coco": {"ap_small": None}}) == []


def test_the_chosen_checkpoint_is_the_final_one_else_the_best(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.output, tmp_path / "run")
    for name in (tiny_run.final.name, "best.pth", "last.pth"):
        assert report.find_checkpoint(folder).name == name
        assert report.find_checkpoint(folder / "checkpoints" / name).name == name
        if name == "last.pth":
            assert "Not yet measured" in Page(report.page(report.read_run(report.find_checkpoint(folder)))).text
        (folder / "checkpoints" / name).unlink()
    with pytest.raises(ssd.InputError, match="no checkpoint of a run"):
        report.find_checkpoint(folder)


def test_mistakes_are_one_line(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    unwritable = [tiny_run.final, "--output", tmp_path / "file" / "x"]
    for argv in (["nowhere"], [tmp_path / "file"], unwritable):
        assert report.main([str(a) for a in argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


def test_words_follow_the_numbers():
    row = {"ap_area": 0.9, "ap11": 0.8, "num_gt": 90}
    run = {"test": {"map_area": 0.7, "map11": 0.6, "per_class": {
        "cat": {**row, "ap_area": 0.5, "num_gt": 9}, "dog": row, "emu": {"ap_area": None, "ap11": None, "num_gt": 0}}},
        "val": {"val_map_area": 0.75}, "epoch": 4,
        "history": [{"epoch": e, "val_loss": v} for e, v in enumerate((3, 2, 2.5))]}
    best, few, gap, loss = report.in_words(run)
    assert best == "Best found class: dog (AP 0.900, 90 objects); worst: cat (AP 0.500, 9 objects)."
    assert few.endswith(": cat (9).")
    assert "chose epoch 4 was 0.7500; the test's is 0.0500 lower" in gap
    assert "lowest in epoch 1 of 2 and 25% higher at the end" in loss
    run["history"][2]["val_loss"] = 1.5
    assert report.in_words(run)[3].endswith("lowest in epoch 2 of 2, its last: more epochs may help.")
    assert report.in_words({"test": {}, "val": {}, "history": []}) == ["Not analysed: no measurement was recorded."]
    assert report.table_rows(run["test"])[1:] == [("dog", "90", "0.9000", "0.8000"), ("cat", "9", "0.5000", "0.8000"),
                                                  ("emu", "0", "no object", "no object")]


def test_ticks_are_round_and_inside():
    assert report.ticks(0, 1) == [0, 0.5, 1]
    assert report.ticks(0, 6.2) == [0, 2, 4, 6]
    assert report.ticks(0, 0.0051) == [0, 0.002, 0.004]
    assert report.ticks(1, 30, 6) == [5, 10, 15, 20, 25, 30]
    assert report.ticks(3, 3) == [3]


def test_a_curve_lies_where_its_numbers_say():
    svg = report.chart("Loss <1>", [("train", "#123", [(1, 4.0), (3, 1.0), (5, 0.0)]), ("val", "#456", [])], top=4)
    assert 'points="44.0,36.0 198.0,145.5 352.0,182.0"' in svg
    assert svg.count("<polyline") == 1
    assert "Loss &lt;1&gt;" in svg
    assert "<polyline" in report.chart("one epoch", [("", "#123", [(1, 0.0)])])
    assert report.chart("nothing", [("", "#123", [])]) == ""
