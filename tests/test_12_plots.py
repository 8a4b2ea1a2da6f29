"""Plots: figures of saved data, drawn without a display."""

import io
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageColor

import ssd_object_detection as ssd

RED = ImageColor.getrgb(ssd.PALETTE[0])


def row(epoch, **more):
    return {
        "epoch": epoch,
        "train_loss": 3.0 / epoch,
        "train_loss_cls": 2.0 / epoch,
        "train_loss_box": 1.0 / epoch,
        "lr": 1e-3,
        "images_per_s": 20.0,
        **more,
    }


def val(value=0.5):
    return {
        "val_loss": 3.5,
        "val_loss_cls": 2.5,
        "val_loss_box": 1.0,
        "val_map_area": value,
        "val_map11": value,
        "val_map75": value / 2,
    }


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


def images_of(sheet):
    """Return the images of a sheet as arrays."""
    return [np.asarray(axes.images[0].get_array()) for axes in sheet.axes if axes.images]


# -- Curves


@pytest.mark.parametrize("name", HISTORIES)
def test_the_curves_are_drawn_from_any_history(name):
    assert png_of(ssd.plot_losses(HISTORIES[name])).width > 300


def test_the_loss_plot_shows_each_loss_at_its_epoch():
    history = [row(1), row(2, **val()), row(3, **val())]
    for panel, key in zip(ssd.plot_losses(history).axes[:3], ("loss", "loss_cls", "loss_box"), strict=True):
        train, validation = panel.lines
        assert list(train.get_xdata()) == [1, 2, 3]
        assert list(train.get_ydata()) == [r[f"train_{key}"] for r in history]
        assert list(validation.get_xdata()) == [2, 3]
        assert list(validation.get_ydata()) == [r[f"val_{key}"] for r in history[1:]]
        assert [text.get_text() for text in panel.get_legend().get_texts()] == ["train", "validation"]
        assert panel.get_xlabel() == "epoch"
        assert panel.get_ylabel()


def test_the_plot_shows_map_rate_and_speed():
    left, middle, right = ssd.plot_losses([row(1, **val(0.25)), row(2, **val(0.75))]).axes[3:]
    assert [list(line.get_ydata()) for line in left.lines] == [[0.25, 0.75], [0.125, 0.375], [0.25, 0.75]]
    assert len(left.get_legend().get_texts()) == 3
    assert list(middle.lines[0].get_ydata()) == [1e-3, 1e-3]
    assert list(right.lines[0].get_ydata()) == [20, 20]


def test_the_plot_says_that_nothing_was_validated():
    assert ssd.plot_losses([row(1)]).axes[3].get_title() == "Validation mAP: not validated"


# -- Files


def test_a_figure_is_saved_as_png_below_folders_that_it_makes(tmp_path):
    ssd.save_figure(ssd.plot_losses([row(1)]), tmp_path / "a" / "b" / "c.png")
    with Image.open(tmp_path / "a" / "b" / "c.png") as image:
        assert image.format == "PNG"
        image.load()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["c.png"]


def test_a_folder_that_cannot_be_written_costs_the_plot_and_not_the_run(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    ssd.save_figure(Figure(), tmp_path / "file" / "a.png")
    error = capsys.readouterr().err
    assert error.startswith("warning: ")
    assert "a.png" in error
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_leaves_the_plot_before_whole(tmp_path, monkeypatch, capsys):
    ssd.save_figure(Figure(), tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()

    def half(self, path, **settings):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    ssd.save_figure(Figure(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert "No space left" in capsys.readouterr().err


# -- Sheets


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_a_sheet_takes_any_number_of_images(count):
    sheet = ssd.plot_sheet([Image.new("RGB", (20, 10 + i)) for i in range(count)], "title")
    assert len(images_of(sheet)) == count
    assert png_of(sheet).width > 300


def test_the_augmentation_sheet_shows_images_with_their_boxes(tiny_voc):
    data = ssd.load_data(str(tiny_voc), val_split="val")
    dataset = ssd.VocDataset(data.train, ssd.build_transform(train=True), ssd.make_anchors())
    images = images_of(ssd.plot_augmentations(dataset, data.classes, count=5))
    assert len(images) == 5
    _, _, labels = dataset.augment(0)
    colors = [ImageColor.getrgb(ssd.color_of(k)) for k in labels]
    assert colors
    assert all((images[0] == color).all(axis=2).any() for color in colors)


def record(boxes_px, size, path):
    boxes_px = np.array(boxes_px, dtype=np.float32).reshape(-1, 4)
    labels = np.ones(len(boxes_px), np.int64)
    return ssd.Record("id", str(path), *size, boxes_px, labels, np.zeros(len(labels), bool))


def found(*rows):
    """Return (image id, score, box) rows as `evaluate` returns detections of label 1."""
    image_ids, scores, boxes_px = zip(*rows, strict=True) if rows else ((), (), ())
    return {
        "image_ids": np.array(image_ids, int),
        "labels": np.ones(len(rows), int),
        "scores": np.array(scores),
        "boxes_voc": np.array(boxes_px, float).reshape(-1, 4),
    }


def test_the_prediction_sheet_shows_truth_in_white_and_detections_in_the_class_colour(tmp_path):
    Image.new("RGB", (900, 600)).save(tmp_path / "a.png")
    records = [record([[600, 40, 800, 240]], (900, 600), tmp_path / "a.png")] * 2
    box = [101, 201, 500, 560]
    detections = found((0, 0.9, box), (1, ssd.DRAW_SCORE_THRESH - 0.01, box))
    drawn, plain = images_of(ssd.plot_predictions(records, detections, ["a"], "title"))
    assert drawn.shape == plain.shape == (300, 450, 3)
    assert (drawn[150:250, 50] == RED).all()  # VOC pixel 101 is edge 100 of 900, 50 of 450
    assert not (plain == RED).all(axis=2).any()
    for image in (drawn, plain):
        assert (image[30:110, 300] == 255).all()


def test_the_prediction_sheet_takes_images_without_objects_and_without_detections(tmp_path):
    Image.new("RGB", (40, 60)).save(tmp_path / "a.png")
    records = [record([], (40, 60), tmp_path / "a.png")] * 13
    sheet = ssd.plot_predictions(records, found(), ["a"], "title")
    assert len(images_of(sheet)) == 12
    assert not any(image.any() for image in images_of(sheet))
    assert png_of(sheet).width > 300


# -- Boxes


def edges(pixels, box, color):
    """Return which pixels of the four edges of a box have a colour: top, right, bottom, left."""
    x1, y1, x2, y2 = box
    sides = pixels[y1, x1 : x2 + 1], pixels[y1 : y2 + 1, x2], pixels[y2, x1 : x2 + 1], pixels[y1 : y2 + 1, x1]
    return [(side == color).all(axis=1) for side in sides]


def test_a_box_is_drawn_in_its_colour_along_all_four_edges_on_a_copy():
    image = Image.new("RGB", (200, 150))
    pixels = np.asarray(ssd.draw_boxes(image, np.array([[30, 40, 160, 120]]), [""], ssd.PALETTE[:1]))
    assert all(edge.all() for edge in edges(pixels, (30, 40, 160, 120), RED))
    assert (pixels[50:115, 40:155] == 0).all()
    assert (pixels[:38] == 0).all()
    assert (pixels[:, 163:] == 0).all()
    assert not np.asarray(image).any()


def test_a_line_grows_with_the_image():
    def width(side):
        drawn = ssd.draw_boxes(Image.new("RGB", (side, side)), np.array([[50, 50, 150, 150]]), [""], ["red"])
        return (np.asarray(drawn)[100, :, 0] > 0).sum()

    assert width(2000) > 2 * width(200)


def test_captions_are_written_in_white_on_the_colour():
    def drawn(caption):
        image = Image.new("RGB", (300, 200))
        return np.asarray(ssd.draw_boxes(image, np.array([[50, 50, 200, 150]]), [caption], ssd.PALETTE[:1]))

    plain, captioned = drawn(""), drawn("dog 0.9")
    is_red = [(pixels == RED).all(axis=2).sum() for pixels in (plain, captioned)]
    assert is_red[1] > is_red[0] + 100
    assert not (plain > 180).all(axis=2).any()
    assert (captioned > 180).all(axis=2).sum() > 10  # smoothed edges leave few pixels of pure white


def test_no_boxes_draw_nothing():
    image = Image.new("RGB", (50, 50))
    drawn = ssd.draw_boxes(image, np.zeros((0, 4)), [], [])
    assert drawn is not image
    assert not np.asarray(drawn).any()


def test_boxes_and_captions_of_different_number_are_refused():
    with pytest.raises(ValueError, match=r"zip|mismatch"):
        ssd.draw_boxes(Image.new("RGB", (50, 50)), np.array([[1, 1, 9, 9]]), [], [])


# Linear RGB as people without red, green or blue cones see it (Machado et al. 2009, table 1, severity 1).
COLOUR_BLIND = {
    "nobody": np.eye(3),
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def lab(linear):
    """Return CIE L*a*b* of linear RGB (N, 3), D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear.clip(0, 1) @ np.transpose(to_xyz) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=1)


@pytest.mark.parametrize("eye", COLOUR_BLIND)
def test_colours_can_be_told_apart_from_one_another_and_from_white(eye):
    assert ssd.color_of(1) == ssd.color_of(1 + len(ssd.PALETTE)) == ssd.PALETTE[0]
    colors = np.array([ImageColor.getrgb(color) for color in (*ssd.PALETTE, "white")]) / 255
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    seen = lab(linear @ np.transpose(COLOUR_BLIND[eye]))
    distance = np.linalg.norm(seen[:, None] - seen, axis=2)[np.triu_indices(len(seen), 1)]
    assert distance.min() > 20  # 2.3 is just noticeable
    assert (
        1.05 / (linear[:-1] @ [0.2126, 0.7152, 0.0722] + 0.05)
    ).min() > 3  # white captions on it: WCAG, large


def test_captions_of_white_boxes_are_black_and_within_them():
    image = Image.new("RGB", (300, 200), (120, 120, 120))
    plain, drawn = (
        np.asarray(ssd.draw_boxes(image, np.array([[50, 50, 200, 150]]), [text], ["white"]))
        for text in ("", "dog")
    )
    ys, xs = np.nonzero((plain != drawn).any(axis=2))
    assert ys.min() > 100
    assert ys.max() <= 150
    assert xs.min() >= 50
    assert (drawn[ys, xs] < 60).any()  # letters


def test_a_spread_starts_at_the_first_ends_at_the_last_and_repeats_none():
    assert ssd.spread(list(range(100)), 4) == [0, 33, 66, 99]
    assert ssd.spread([1, 2], 12) == [1, 2]
    assert ssd.spread([7], 3) == [7]


def caption_area(corner, size=(300, 200), caption="triangle 0.99"):
    """Return the extent (height, width) of what a caption paints at a tiny box."""
    x, y = corner
    image, box = Image.new("RGB", size), np.array([[x, y, x, y]])
    blank, drawn = (np.asarray(ssd.draw_boxes(image, box, [text], ssd.PALETTE[:1])) for text in ("", caption))
    ys, xs = np.nonzero((drawn != blank).any(axis=2))
    return np.ptp(ys) + 1, np.ptp(xs) + 1


@pytest.mark.parametrize("corner", [(0, 0), (299, 0), (0, 199), (299, 199), (298, 100), (150, 1), (2, 100)])
def test_a_caption_at_the_border_stays_inside(corner):
    whole, there = caption_area((100, 100)), caption_area(corner)
    assert whole[1] > 50
    assert there == pytest.approx(whole, abs=2)  # two pixels: the box's own corner lies on it


def test_a_caption_grows_with_the_image():
    small, large = caption_area((100, 100)), caption_area((1000, 1000), (3000, 2000))
    assert large[0] > 4 * small[0]


def test_a_white_box_is_seen_on_a_white_image():
    pale = Image.new("RGB", (200, 150), "white")
    drawn = np.asarray(ssd.draw_boxes(pale, np.array([[30, 40, 160, 120]]), [""], ["white"]))
    assert (drawn[80] < 100).all(axis=1).sum() >= 4


@pytest.mark.parametrize("values", [(20.0, 20.1, 20.2), (20.0,), (1.0, 20.0)])
def test_a_curve_keeps_a_distance_from_the_upper_border(values):
    history = [row(epoch) | {"images_per_s": v} for epoch, v in enumerate(values, start=1)]
    axes = ssd.plot_losses(history).axes[5]
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 1.03 * max(values)
