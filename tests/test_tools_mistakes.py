"""ssd_tools/mistakes.py: what the list, the page and the pictures say of each error."""

import csv
import json

import numpy as np
import pytest
from analyzing import FAR, A, C, arrays, record
from PIL import Image, ImageColor

import ssd_object_detection as ssd
from ssd_tools import analyze, mistakes

# ---- the list and the pictures ----


@pytest.fixture
def picture(tmp_path):
    """A record of a 200x100 picture: black, a white square from (50, 30) to (70, 50)."""
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[30:50, 50:70] = 255
    Image.fromarray(pixels).save(tmp_path / "p.png")
    return record("p", 200, 100, str(tmp_path / "p.png"))


def drawn(record, *, detection=None, label=1, truth=None):
    """The picture of an error on a record, as an int array."""
    found = {"boxes_voc": np.array([detection], float), "labels": np.array([label])}
    error = {"row": None if detection is None else 0, "target": None if truth is None else 0}
    image = mistakes.draw_error(record, error, found, {"boxes_voc": np.array([truth], float)})
    return np.asarray(image).astype(int)


def extent(mask):
    """The edges x1, y1, x2, y2 of the true part of a picture, as shares of its side."""
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / len(mask)


def test_object_is_drawn_where_it_is(picture):
    pixels = drawn(picture, detection=[51, 31, 70, 50])
    assert pixels.shape == (300, 300, 3)
    # 24 pixels to each side of its centre are shown: a white square in its outline.
    box = np.array([14, 14, 34, 34]) / 48
    is_outline = (np.abs(pixels - ImageColor.getrgb(ssd.color_of(1))) < 30).all(axis=2)
    np.testing.assert_allclose(extent(is_outline), box, atol=0.02)
    np.testing.assert_allclose(extent(pixels.min(axis=2) > 200), box, atol=0.02)


@pytest.mark.parametrize(
    ("box", "expected"),
    [([1, 1, 40, 40], (1 / 6, 1 / 6, 1, 1)), ([1, 1, 200, 100], (4 / 208, 54 / 208, 204 / 208, 154 / 208))],
)
def test_what_is_outside_the_image_is_gray(picture, box, expected):
    pixels = drawn(picture, truth=box)
    np.testing.assert_allclose(extent(np.abs(pixels - 128).max(axis=2) > 20), expected, atol=0.02)


def test_truth_is_seen_on_pale_pictures(tmp_path):
    Image.new("RGB", (100, 100), "white").save(tmp_path / "pale.png")
    pixels = drawn(record("pale", 100, 100, str(tmp_path / "pale.png")), truth=[31, 31, 70, 70])
    assert (pixels.max(axis=2) < 50).sum() > 4 * 150  # a black edge around the white line


def test_errors_are_the_surest_first_then_missed_objects_the_largest_first():
    records = [record("a", 100, 100), record("b", 1000, 1000)]
    truth = [(0, 1, A, False), (1, 2, A, False), (1, 1, [101, 101, 160, 160], False), (0, 2, C, False)]
    found = [(0, 1, 0.99, A), (0, 1, 0.9, FAR), (1, 1, 0.8, A), (0, 2, 0.39, FAR)]
    errors = mistakes.list_errors(*analyze.find_errors(*arrays(found, truth), 2), records, ("cat", "dog"))
    rows = [tuple(error[name] for name in mistakes.COLUMNS) for error in errors]
    assert rows == [
        ("a", "background", "cat", "", 0.9, 0.0, *FAR),
        ("b", "classification", "cat", "dog", 0.8, 1.0, *A),
        ("a", "missed", "", "dog", "", "", *C),
        ("b", "missed", "", "cat", "", "", 101, 101, 160, 160),
        ("b", "missed", "cat", "dog", 0.8, 1.0, *A),
    ]


def test_sheet_has_one_error_an_image():
    def error(kind, index, score):
        return {"kind": kind, "index": index, "score": score}

    errors = [
        error("background", 0, 0.5),
        error("background", 1, 0.6),
        error("missed", 1, ""),
        error("missed", 2, 0.3),
        error("localisation", 1, 0.9),
        error("localisation", 3, 0.7),
    ]
    picked = mistakes.pick_errors(errors, 2)
    assert picked == [errors[4], errors[5], errors[3]]
    assert mistakes.pick_errors(errors, 9) == [errors[4], errors[5], errors[0], errors[3]]


def test_misses_are_the_largest_objects_that_are_not_drawn():
    records = [record("0", 100, 100), record("1", 1000, 1000)]
    truth = [
        (0, 1, [1, 1, 20, 20], False),
        (1, 1, [1, 1, 90, 90], False),
        (0, 1, [41, 41, 99, 99], True),
        (0, 1, [50, 1, 59, 10], False),
        (0, 1, [1, 50, 40, 90], False),
    ]
    found = [(0, 1, 0.9, [1, 50, 40, 90]), (0, 1, 0.3, [1, 1, 20, 20])]
    errors = mistakes.list_errors(*analyze.find_errors(*arrays(found, truth), 1), records, ["cat"])
    # 400 of 10,000 pixels; 100 of 10,000; 8,100 of 1,000,000. One is difficult, one is found.
    assert [error["target"] for error in errors] == [0, 3, 1]
    assert [error["text"] for error in errors] == [
        "missed cat\nnear it cat 0.30, IoU 1.00",
        *["missed cat\nnothing near it"] * 2,
    ]


def test_hit_of_another_object_stands_beside_a_miss_only_if_it_covers_it():
    truth = [(0, 1, A, False), (0, 1, A, False), (0, 1, [1, 6, 10, 15], False)]  # A is annotated twice
    found = [(0, 1, 0.9, A), (0, 1, 0.1, [1, 9, 10, 18])]
    sides = analyze.find_errors(*arrays(found, truth), 1)
    errors = mistakes.list_errors(*sides, [record("0", 50, 50)], ["cat"])
    assert {error["target"]: error["text"].splitlines()[1] for error in errors} == {
        1: "near it cat 0.90, IoU 1.00, a hit of another",
        2: "near it cat 0.10, IoU 0.54",
    }


def test_pictures_say_what_each_mistake_is(picture, tmp_path):
    square, records = [51, 31, 70, 50], [picture] * 4
    truth = [(0, 1, square, False), (1, 2, square, True), (2, 1, square, False), (3, 1, square, False)]
    loose = [51, 41, 70, 60]  # 200 of 600 pixels
    found = [
        (0, 1, 0.95, square),
        (0, 1, 0.9, square),
        (1, 1, 0.8, square),
        (2, 1, 0.7, loose),
        (1, 1, 0.6, loose),
        (2, 2, 0.5, [151, 61, 190, 99]),
    ]
    sides = analyze.find_errors(*arrays(found, truth), 2)
    errors = mistakes.list_errors(*sides, records, ("cat", "dog"))
    texts = [
        "said cat 0.90: found already\nobject: cat, IoU 1.00",
        "said cat 0.80: wrong class\nobject: dog, IoU 1.00, difficult",
        "said cat 0.70: loose\nobject: cat, IoU 0.33",
        "said cat 0.60: wrong class and loose\nobject: dog, IoU 0.33, difficult",
        "said dog 0.50: nothing there",
        "missed cat\nnear it cat 0.70, IoU 0.33",
        "missed cat\nnothing near it",
    ]
    assert [error["text"] for error in errors] == texts
    figure = mistakes.plot_mistakes(errors, records, *sides)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [f"{texts[place]}\np" for place in (0, 1, 2, 6)]  # one of each image
    assert figure.get_suptitle().startswith("3 false detections of the highest scores, then 1 largest")
    page = mistakes.mistakes_page(errors, records, *sides, "Mistakes <1>")
    assert page.count("<img") == 7
    assert "7 of 7 errors" in page
    assert "Mistakes &lt;1&gt;" in page
    assert "3. said cat 0.70: loose<br>object: cat, IoU 0.33<br>p" in page
    mistakes.save_photographs(figure, tmp_path / "sheet.png")
    colors = {color for _, color in Image.open(tmp_path / "sheet.png").convert("RGB").getcolors()}
    assert ImageColor.getrgb(ssd.color_of(1)) in colors
    assert len(colors) <= 256


def test_nothing_to_find_and_nothing_found_is_drawn(picture):
    errors = analyze.find_errors(arrays([], [])[0], ssd.truth_of([picture]), 1)
    assert mistakes.list_errors(*errors, [picture], ("cat",)) == []
    figure = mistakes.plot_mistakes([], [picture], *errors)
    assert figure.get_suptitle().startswith("0 false detections")
    figure.draw_without_rendering()


# ---- the command ----


def test_the_command_writes_what_the_analysis_counts_and_keeps_it(tiny_run, tmp_path, capsys):
    flags = ["--output-dir", tmp_path, "--device", "cpu", "--amp", "off", "--workers", "0"]
    argv = [*map(str, (tiny_run.final, *flags)), "--score-thresh"]
    plots = tmp_path / "plots"
    path = plots / "evaluation" / "evaluation.json"
    for main in (analyze.main, mistakes.main, analyze.main):
        assert main([*argv, ".001"]) == 0
    evaluation = json.loads(path.read_text())
    with open(plots / "mistakes.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = evaluation["analysis"]["tide"]["confident"]
    assert {kind: sum(row["kind"] == kind for row in rows) for kind in analyze.KINDS} == counts
    assert evaluation["mistakes"] == len(rows) > 0
    assert (
        f"{plots}: mistakes.csv ({len(rows)} errors), mistakes.html, mistakes.png" in capsys.readouterr().out
    )
    with Image.open(plots / "mistakes.png") as image:
        assert min(image.size) > 300
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert (plots / "mistakes.png").stat().st_size < 1.5e6
    assert mistakes.main([*argv, ".002"]) == 0
    assert "analysis" not in json.loads(path.read_text())  # it was of another measurement


def test_training_images_have_their_loose_boxes_last(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(ssd, "DRAW_SCORE_THRESH", 0.05)
    monkeypatch.setattr(mistakes, "mistakes_page", lambda *_: "")  # hundreds of pictures
    argv = [tiny_run.final, "--test-split", "train", "--output-dir", tmp_path, "--score-thresh", ".001"]
    assert mistakes.main([*map(str, argv), "--device", "cpu", "--amp", "off", "--workers", "0"]) == 0
    with open(tmp_path / "plots" / "mistakes.csv", encoding="utf-8", newline="") as file:
        is_loose = [row["kind"] in mistakes.LOOSE_KINDS for row in csv.DictReader(file)]
    assert {False, True} == set(is_loose)
    assert is_loose == sorted(is_loose)
