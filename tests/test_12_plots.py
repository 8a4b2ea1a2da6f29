"""Plots: figures of saved data, drawing without a display."""

import io
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageColor

import ssd_object_detection as ssd

RED = (230, 25, 75)  # the first colour of the palette


def row(epoch, **more):
    return {"epoch": epoch, "train_loss": 3.0 / epoch, "train_loss_cls": 2.0 / epoch, "train_loss_box": 1.0 / epoch,
            "lr": 1e-3, "phase": "cosine", "images_per_s": 20.0, **more}


def val(value=0.5):
    return {"val_loss": 3.5, "val_loss_cls": 2.5, "val_loss_box": 1.0, "val_map_area": value, "val_map11": value}


HISTORIES = {
    "empty": [],
    "one epoch": [row(1, **val())],
    "without validation": [row(1), row(2)],
    "validated now and then": [row(1), row(2, **val()), row(3)],
    "NaN mAP": [row(1, **val(math.nan)), row(2, **val(math.nan))],
    "long": [row(epoch, **val()) for epoch in range(1, 101)],
}


def png_of(figure):
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def record(boxes_px, labels, size=(300, 300), path="none.jpg"):
    boxes_px = np.array(boxes_px, dtype=np.float32).reshape(-1, 4)
    return ssd.Record("id", str(path), *size, boxes_px, np.array(labels, dtype=np.int64), np.zeros(len(labels), bool))


def evaluation(curves):
    """Return what `evaluate` does of one (recall, precision, ap, num_gt) a class."""
    classes = {k: {"recall": np.array(r), "precision": np.array(p), "ap_area": ap, "ap11": ap, "num_gt": n}
               for k, (r, p, ap, n) in enumerate(curves, start=1)}
    aps = [c["ap_area"] for c in classes.values() if c["num_gt"]]
    mean = float(np.mean(aps)) if aps else math.nan
    return {"map_area": mean, "map11": mean, "classes": classes}


@pytest.mark.parametrize("name", HISTORIES)
def test_loss_and_training_plots_are_drawn_from_any_history(name):
    for plot in (ssd.plot_losses, ssd.plot_training):
        assert png_of(plot(HISTORIES[name])).width > 300


def test_the_loss_plot_shows_each_loss_at_its_epoch():
    history = [row(1), row(2, **val()), row(3, **val())]
    axes = ssd.plot_losses(history).axes
    for panel, key in zip(axes, ("loss", "loss_cls", "loss_box"), strict=True):
        train, validation = panel.lines
        assert list(train.get_xdata()) == [1, 2, 3]
        assert list(train.get_ydata()) == [r[f"train_{key}"] for r in history]
        assert list(validation.get_xdata()) == [2, 3]
        assert list(validation.get_ydata()) == [r[f"val_{key}"] for r in history[1:]]


def test_the_training_plot_shows_map_rate_and_speed():
    left, middle, right = ssd.plot_training([row(1, **val(0.25)), row(2, **val(0.75))]).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[0.25, 0.75], [0.25, 0.75]]
    assert list(middle.lines[0].get_ydata()) == [1e-3, 1e-3]
    assert list(right.lines[0].get_ydata()) == [20, 20]


def test_the_training_plot_says_that_nothing_was_validated():
    assert "no validation" in ssd.plot_training([row(1)]).axes[0].texts[0].get_text()


def test_the_data_plot_counts_objects_and_the_share_that_an_anchor_matches():
    # Squares of 30, 60 and 111 pixels at a cell's centre fit anchors; a 2-pixel box and a 290 x 8 strip fit none.
    centre = 18.5 / 37 * 300
    squares = [[centre - s / 2, centre - s / 2, centre + s / 2, centre + s / 2] for s in (30, 60, 2)]
    figure = ssd.plot_data([record(squares, [1, 1, 1]), record([[5, 100, 295, 108]], [2]), record([], [])],
                           ("a", "b", "c"))
    counts, _, shares = figure.axes
    assert [bar.get_width() for bar in counts.patches] == [3, 1, 0]
    assert [bar.get_width() for bar in shares.patches] == pytest.approx([2 / 3, 0, 0])
    assert "0.500" in shares.get_title()
    assert "4 objects in 3" in counts.get_title()


def test_the_data_plot_takes_pictures_without_objects():
    figure = ssd.plot_data([record([], []), record([], [])], ("a",))
    assert png_of(figure).width > 300


def test_the_precision_recall_plot_has_a_curve_for_each_class_with_objects_best_first():
    curves = [([0.5], [1.0], 0.5, 2), ([], [], math.nan, 0), ([0.5, 1.0], [1.0, 1.0], 1.0, 2), ([], [], 0.0, 3)]
    figure = ssd.plot_precision_recall(evaluation(curves), ["a", "b", "c", "d"])
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["c 1.000", "a 0.500", "d 0.000"]
    assert "0.5000" in figure.axes[0].get_title()
    assert png_of(figure).width > 300


def test_the_precision_recall_plot_takes_a_list_without_objects_and_many_classes():
    assert png_of(ssd.plot_precision_recall(evaluation([([], [], math.nan, 0)]), ["a"])).width > 300
    many = [([0.5], [1.0], 0.5, 2)] * 80
    assert len(ssd.plot_precision_recall(evaluation(many), [f"class {i}" for i in range(80)]).axes[0].lines) == 80


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_a_sheet_takes_any_number_of_pictures(count):
    sheet = ssd.plot_sheet([Image.new("RGB", (20, 10 + i)) for i in range(count)], "title")
    assert sum(len(axes.images) for axes in sheet.axes) == count
    assert png_of(sheet).width > 300


def test_the_augmentation_sheet_shows_pictures_with_and_without_objects(tiny_voc):
    data = ssd.load_data(str(tiny_voc), val_split="val")
    dataset = ssd.VocDataset(data.train, ssd.build_transform(train=True))
    sheet = ssd.plot_augmentations(dataset, data.classes, count=5)
    assert sum(len(axes.images) for axes in sheet.axes) == 5


def test_the_prediction_sheet_shows_detections_solid_in_the_class_colour(tmp_path):
    Image.new("RGB", (450, 300)).save(tmp_path / "a.png")
    records = [record([[300, 20, 400, 120]], [1], (450, 300), tmp_path / "a.png")] * 2
    found = [(np.array([[50.0, 100, 250, 280]]), [1], [0.9]), (np.zeros((0, 4)), [], [])]
    sheet = ssd.plot_predictions(records, found, ["a"], "title")
    drawn, plain = (np.asarray(axes.images[0].get_array()) for axes in sheet.axes[:2])
    assert (drawn[150:200, 50] == RED).all()
    assert (plain == 255).all(axis=2).any()  # the truth
    assert not (plain == RED).all(axis=2).any()


def test_a_folder_that_cannot_be_written_costs_the_picture_and_not_the_run(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    ssd.save_figure(Figure(), tmp_path / "file" / "a.png")
    error = capsys.readouterr().err
    assert error.startswith("warning: ")
    assert "a.png" in error
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_confusion_plot_writes_every_count_in_its_cell_and_names_both_axes():
    matrix = np.array([[0, 7, 0], [2, 30, 1], [0, 0, 0]])  # a class without objects has a row of zeros
    axes = ssd.plot_confusion(matrix, ["cat", "dog"]).axes[0]
    cells = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert cells == {(0, 1): "7", (1, 0): "2", (1, 1): "30", (1, 2): "1"}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["none: false", "cat", "dog"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["none: missed", "cat", "dog"]
    assert axes.images[0].get_array()[1].tolist() == pytest.approx([2 / 33, 30 / 33, 1 / 33])
    assert png_of(ssd.plot_confusion(np.zeros((21, 21), int), [f"class {i}" for i in range(20)])).width > 900


def test_a_figure_is_saved_as_png_below_folders_that_it_makes(tmp_path):
    ssd.save_figure(ssd.plot_losses([row(1)]), tmp_path / "a" / "b" / "c.png")
    with Image.open(tmp_path / "a" / "b" / "c.png") as image:
        assert image.format == "PNG"
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["c.png"]


def edges(pixels, box, color):
    """Return which pixels of the four edges of a box have a colour: top, right, bottom, left."""
    x1, y1, x2, y2 = box
    sides = pixels[y1, x1 : x2 + 1], pixels[y1 : y2 + 1, x2], pixels[y2, x1 : x2 + 1], pixels[y1 : y2 + 1, x1]
    return [(side == color).all(axis=1) for side in sides]


def test_a_box_is_drawn_in_its_colour_along_all_four_edges():
    image = Image.new("RGB", (200, 150))
    assert ssd.draw_boxes(image, [[30, 40, 160, 120]], [""], ["#e6194b"]) is image
    pixels = np.asarray(image)
    assert all(edge.all() for edge in edges(pixels, (30, 40, 160, 120), RED))
    assert (pixels[45:115, 35:155] == 0).all()
    assert (pixels[:38] == 0).all()
    assert (pixels[:, 163:] == 0).all()


def test_a_dashed_box_leaves_gaps_on_all_four_edges():
    image = ssd.draw_boxes(Image.new("RGB", (200, 150)), [[30, 40, 160, 120]], [""], ["white"], dashed=True)
    for edge in edges(np.asarray(image), (30, 40, 160, 120), (255, 255, 255)):
        assert 0.35 < edge.mean() < 0.85
        assert np.count_nonzero(np.diff(edge.astype(int)) == -1) >= 5


def test_a_line_grows_with_the_picture():
    small, large = (np.asarray(ssd.draw_boxes(Image.new("RGB", (side, side)), [[50, 50, 150, 150]], [""], ["red"]))
                    for side in (200, 2000))
    assert (large[100, :, 0] > 0).sum() > 2 * (small[100, :, 0] > 0).sum()


def caption_area(corner, size=(300, 200)):
    """Return the extent (height, width) of what a caption paints at a tiny box."""
    x, y = corner
    blank = ssd.draw_boxes(Image.new("RGB", size), [[x, y, x, y]], [""], ["#e6194b"])
    drawn = ssd.draw_boxes(Image.new("RGB", size), [[x, y, x, y]], ["triangle 0.99"], ["#e6194b"])
    ys, xs = np.nonzero((np.asarray(drawn) != np.asarray(blank)).any(axis=2))
    return np.ptp(ys) + 1, np.ptp(xs) + 1


@pytest.mark.parametrize("corner", [(0, 0), (299, 0), (0, 199), (299, 199), (298, 100), (150, 1), (150, 12), (2, 100)])
def test_a_caption_at_the_border_stays_inside(corner):
    whole, there = caption_area((100, 100)), caption_area(corner)
    assert whole[1] > 50
    assert there == pytest.approx(whole, abs=2)  # two pixels: the box's own corner lies on it


def test_captions_are_written_in_white_on_the_colour():
    pixels = np.asarray(ssd.draw_boxes(Image.new("RGB", (300, 200)), [[50, 50, 200, 150]], ["dog 0.9"], ["#e6194b"]))
    above = pixels[:50]
    assert (above == RED).all(axis=2).sum() > 100
    assert (above > 180).all(axis=2).sum() > 20  # smoothed edges leave few pixels of pure white


def test_no_boxes_draw_nothing():
    assert not np.asarray(ssd.draw_boxes(Image.new("RGB", (50, 50)), np.zeros((0, 4)), [], [])).any()


def test_boxes_and_captions_of_different_number_are_refused():
    with pytest.raises(ValueError, match="zip"):
        ssd.draw_boxes(Image.new("RGB", (50, 50)), [[1, 1, 9, 9]], [], [])


def test_colours_repeat_after_the_palette_and_can_be_told_apart():
    assert ssd.color_of(1) == ssd.color_of(1 + len(ssd.PALETTE))
    assert len({ImageColor.getrgb(ssd.color_of(k)) for k in range(1, 11)}) == 10
    assert ImageColor.getrgb(ssd.color_of(1)) == RED


def test_a_spread_starts_at_the_first_ends_at_the_last_and_repeats_none():
    assert ssd.spread(list(range(100)), 4) == [0, 33, 66, 99]
    assert ssd.spread([1, 2], 12) == [1, 2]
    assert ssd.spread([7], 3) == [7]
