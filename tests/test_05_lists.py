"""Folders and lists as other programs write them: what is read, and what is refused in one line."""

import shlex
import shutil

import pytest
from folders import annotation, ids, load, refusal, write
from PIL import Image

import ssd_object_detection as ssd
from ssd_tools import convert


def texts(data):
    return " | ".join(finding.text for finding in data.findings)


# ---- pictures of one stem ----


@pytest.mark.parametrize(
    ("line", "filename", "expected"),
    [
        ("x.png", "x.png", "x.png"),
        ("x.PNG", "", "x.png"),
        ("x", "x.png", "x.png"),
        ("x", "folder\\x.gif", "x.gif"),
        ("JPEGImages/x.gif", "X.GIF", "x.gif"),
    ],
)
def test_of_two_pictures_of_one_stem_the_list_or_the_annotation_names_one(tmp_path, line, filename, expected):
    root = write(tmp_path, ["x"], {"train": [line]})
    Image.new("RGB", (40, 30), "red").save(root / "JPEGImages" / "x.gif")
    (root / "Annotations" / "x.xml").write_text(annotation(filename=filename))
    (record,) = load(root).train
    assert record.image_path.endswith(expected)
    assert len(record.labels) == 1


def test_two_pictures_that_nothing_tells_apart_are_refused(tmp_path):
    root = write(tmp_path, ["x"], {"train": ["x"]})
    Image.new("RGB", (40, 30), "red").save(root / "JPEGImages" / "x.gif")
    message = refusal(load, root)
    assert "x.gif share a name" in message or "x.png share a name" in message
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    assert "share a name" in refusal(load, root)  # without a list too


def test_an_annotation_of_another_picture_is_not_shared(tmp_path):
    root = write(tmp_path, ["x"], {"train": ["x.png", "x.gif"]})
    Image.new("RGB", (40, 30), "red").save(root / "JPEGImages" / "x.gif")
    (root / "Annotations" / "x.xml").write_text(annotation(filename="x.png"))
    assert "x.gif.xml: no such annotation" in refusal(load, root)
    data = load(root, unlabelled="negative")
    assert [(record.image_id, len(record.labels)) for record in data.train] == [("x.png", 1), ("x.gif", 0)]
    (root / "Annotations" / "x.gif.xml").write_text(annotation("dog"))
    assert [record.labels.tolist() for record in load(root).train] == [[1], [2]]


@pytest.mark.parametrize("line", ["photo.2", "photo.2.png", "photo.jpg.3", "photo 2"])
def test_a_missing_name_finds_no_other_picture(tmp_path, line):
    root = write(tmp_path, ["photo", "a b"], {"train": [line, "a b"]})
    assert "no such image, but list train names it" in refusal(load, root)


def test_flat_pictures_of_one_stem_keep_their_own_annotation(tmp_path, capsys):
    folder = write(tmp_path / "in", ["x", "y"], pictures=".", annotations=".")
    Image.new("RGB", (40, 30), "red").save(folder / "x.gif")
    (folder / "x.xml").write_text(annotation(filename="x.png"))
    assert convert.main(["flat", str(folder), str(tmp_path / "out"), "--test-fraction", "0"]) == 0
    assert "without an XML of its own beside it" in capsys.readouterr().err
    assert sorted(record.image_path.rpartition("/")[2] for record in load(tmp_path / "out").train) == [
        "x.png",
        "y.png",
    ]
    (folder / "x.xml").write_text(annotation(filename="other.png"))
    assert convert.main(["flat", str(folder), str(tmp_path / "out2")]) == 2
    assert "is it of x.gif and x.png?" in capsys.readouterr().err


@pytest.mark.parametrize("has_list", [True, False])
def test_an_annotation_may_have_the_pictures_ending_in_its_name(tmp_path, has_list):
    root = write(tmp_path, ["a", "b.c"], {"train": ["a", "b.c"]} if has_list else None)
    for name in ("a", "b.c"):
        (root / "Annotations" / f"{name}.xml").rename(root / "Annotations" / f"{name}.png.xml")
    data = load(root)
    assert ids(data.train) == ["a", "b.c"]
    assert [len(record.labels) for record in data.train] == [1, 1]


def test_an_annotation_without_a_picture_of_its_name_says_what_it_names(tmp_path):
    root = write(tmp_path, ["a"])
    (root / "Annotations" / "a.xml").rename(root / "Annotations" / "0001.xml")
    (root / "Annotations" / "0001.xml").write_text(annotation(filename="a.png"))
    message = refusal(load, root)
    assert "0001.jpg: no such image, but an annotation" in message
    assert "its <filename> is a.png" in message


# ---- folders ----


@pytest.mark.parametrize(
    ("pictures", "annotations"),
    [
        ("images", "Annotations"),  # Label Studio
        ("images", "annotations"),
        ("images", "annotations/xmls"),  # Oxford-IIIT Pet
        ("JPEGImages", "annotations"),
        ("jpegimages", "ANNOTATIONS"),
        ("Images", "xml"),
    ],
)
def test_folders_of_other_names_are_read_and_told(tmp_path, pictures, annotations):
    root = write(tmp_path, ["a", "b"], {"train": ["a"]}, pictures, annotations)
    data = load(root)
    assert ids(data.train) == ["a"]
    assert len(data.train[0].labels) == 1
    for name, kind in ((pictures, "JPEGImages"), (annotations, "Annotations")):
        if name != kind:
            assert f"{name} is read as {kind}" in texts(data)


def test_endings_of_any_case_count_where_there_is_no_list(tmp_path):
    root = write(tmp_path, ["a", "b", "c"])
    (root / "Annotations" / "b.xml").rename(root / "Annotations" / "b.XML")
    (root / "JPEGImages" / "c.png").rename(root / "JPEGImages" / "c.PnG")
    assert ids(load(root).train) == ["a", "b", "c"]


def test_annotations_of_inner_folders_count_if_their_pictures_are_there(tmp_path):
    root = write(tmp_path, ["a"])
    write(root, ["b"], pictures="JPEGImages/cam1", annotations="Annotations/cam1")
    (root / "Annotations" / "backup").mkdir()
    shutil.copy(root / "Annotations" / "a.xml", root / "Annotations" / "backup" / "a.xml")
    assert ids(load(root).train) == ["a", "cam1/b"]


def test_hidden_files_of_macos_are_no_data(tmp_path):
    root = write(tmp_path, ["a", "b"], {"._train": ["rubbish"]})
    for path in [*root.glob("*/*.png"), *root.glob("*/*.xml")]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    assert ids(load(root).train) == ["a", "b"]
    write(root, [], {"train": ["._a.png", "a", "b"]})
    assert ids(load(root).train) == ["a", "b"]


def test_hidden_files_and_folders_are_no_data(tmp_path):
    root = write(tmp_path, ["a"])
    write(root, [".a"], pictures="Annotations", annotations="Annotations")
    write(root, ["a-copy"], pictures="JPEGImages/.copies", annotations="Annotations/.copies")
    assert ids(load(root).train) == ["a"]


@pytest.mark.parametrize("pictures", ["JPEGImages", "images"])
def test_folders_train_val_and_test_are_lists_where_there_are_none(tmp_path, pictures):
    for split, name in (("Train", "a"), ("valid", "b"), ("test", "c")):
        write(tmp_path, [name], pictures=f"{pictures}/{split}", annotations=f"Annotations/{split}")
    data = load(tmp_path)
    assert (ids(data.train), ids(data.val), ids(data.test)) == (["Train/a"], ["valid/b"], ["test/c"])
    assert "list test is what is in folders of that name" in texts(data)


# ---- lists ----


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "VALID"])
def test_a_validation_list_of_another_name_is_used(tmp_path, name):
    root = write(tmp_path, ["a", "b", "c"], {"train": ["a"], name: ["b"], "Test": ["c"]})
    data = load(root)
    assert data.lists == {"train": "train", "val": name, "test": "Test"}
    assert (ids(data.val), ids(data.test)) == (["b"], ["c"])


def test_val_goes_before_valid(tmp_path):
    root = write(tmp_path, ["a", "b", "c"], {"train": ["a"], "val": ["b"], "valid": ["c"]})
    assert load(root).lists["val"] == "val"


@pytest.mark.parametrize("where", ["ImageSets", ".", "imagesets/main", "annotations"])
def test_lists_beside_main_are_read_and_told(tmp_path, where):
    root = write(tmp_path, ["a", "b"], {"train": ["a"], "test": ["b"]}, where=where)
    (root / "README.txt").write_text("a text that is no list")
    data = load(root)
    assert (ids(data.train), ids(data.test)) == (["a"], ["b"])
    assert "list train is read from" in texts(data)


@pytest.mark.parametrize("where", ["ImageSets/Segmentation", "ImageSets/Layout", "splits"])
def test_lists_that_are_not_read_never_mean_that_there_are_none(tmp_path, where):
    root = write(tmp_path, ["a", "b"], {"train": ["a"], "test": ["b"]}, where=where)
    assert "move those of object detection there" in refusal(load, root)


@pytest.mark.parametrize("name", ["train.csv", "train", "Test.lst", "val.TSV"])
def test_lists_in_another_form_never_mean_that_there_are_none(tmp_path, name):
    root = write(tmp_path, ["a", "b"])
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / name).write_text("a")
    assert f"{name}: image lists are read as" in refusal(load, root)


def test_several_images_in_a_line_are_refused_but_not_an_image_and_its_annotation(tmp_path):
    root = write(tmp_path, ["a", "b"], {"train": ["a b"]})
    assert "the line 'a b' of a list names several images" in refusal(load, root)
    write(root, [], {"train": ["JPEGImages/a.png Annotations/a.xml", "Annotations/b.xml"]})
    assert ids(load(root).train) == ["a", "b"]


def test_a_list_in_utf_16_without_its_mark_is_refused(tmp_path):
    root = write(tmp_path, ["a"], {"train": ["a"]})
    (root / "ImageSets" / "Main" / "train.txt").write_bytes("a\nb\n".encode("utf-16-le"))
    assert "save it as UTF-8" in refusal(load, root)


@pytest.mark.parametrize(
    "line",
    [
        "/somewhere/else/JPEGImages/my photo.png",
        "C:\\data\\images\\my photo.png",
        "./JPEGImages/my photo.png",
        "../set/JPEGImages/my photo.png",
        "data/images/my photo",
        '"my photo"',
        "'my photo.png'",
        "my photo,",
        '"JPEGImages/my photo.png";',
    ],
)
def test_a_line_may_be_a_path_or_in_quotes(tmp_path, line):
    root = write(tmp_path, ["my photo", "other"], {"train": [line, "other"]})
    data = load(root, unlabelled="negative")
    assert ids(data.train) == ["my photo", "other"]
    assert [len(record.labels) for record in data.train] == [1, 1]


def test_an_absolute_path_of_the_folder_itself_is_its_image(tmp_path):
    root = write(tmp_path, ["a"])
    write(root, [], {"train": [str(root / "JPEGImages" / "a.png")]})
    assert ids(load(root).train) == ["a"]


def test_a_picture_elsewhere_is_read_with_the_annotation_beside_it(tmp_path):
    write(tmp_path / "other", ["a"], pictures="JPEGImages", annotations="JPEGImages")
    root = write(tmp_path / "set", ["a"], {"train": [str(tmp_path / "other" / "JPEGImages" / "a.png")]})
    (tmp_path / "other" / "JPEGImages" / "a.xml").write_text(annotation("dog"))
    data = load(root)
    assert data.classes == ("dog",)
    assert data.train[0].image_path.startswith(str(tmp_path / "other"))


def test_two_paths_that_come_to_one_name_are_refused(tmp_path):
    root = write(tmp_path, ["a"], {"train": ["/x/cam1/a.png", "/x/cam2/a.png"]})
    assert "both name the image a" in refusal(load, root)


def test_names_that_end_like_flags_are_names(tmp_path):
    root = write(tmp_path, ["photo 0", "photo 1"], {"train": ["photo 0", "photo 1.png"]})
    assert ids(load(root).train) == ["photo 0", "photo 1"]


# ---- what cannot be read: the advice works ----


def advised(message):
    """Return the words of the command that a message advises, without python -m ssd_tools.convert."""
    command = message.partition("python -m ssd_tools.convert ")[2]
    return shlex.split(command.partition(" (see --train-split")[0])


def write_coco(path, image):
    box = '{"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 20, 20]}'
    images = f'[{{"id": 7, "file_name": "{image}", "width": 40, "height": 30}}]'
    path.write_text(
        f'{{"images": {images}, "categories": [{{"id": 1, "name": "cat"}}], "annotations": [{box}]}}'
    )


def roboflow_voc(root):
    write(root / "train", ["a"], pictures=".", annotations=".")
    write(root / "valid", ["b"], pictures=".", annotations=".")
    return root


def roboflow_coco(root):
    for split in ("valid", "train"):
        write(root / split, ["a"], pictures=".", annotations="../elsewhere")
        write_coco(root / split / "_annotations.coco.json", "a.png")
    shutil.rmtree(root / "elsewhere")
    return root


def coco_file(root):
    write(root, ["a"], pictures="train2017", annotations="annotations")
    (root / "annotations" / "a.xml").unlink()
    write_coco(root / "annotations" / "instances_train2017.json", "a.png")
    return root / "annotations" / "instances_train2017.json"


def yolo(root):
    pytest.importorskip("yaml")
    write(root, ["a"], pictures="images/train", annotations="labels/train")
    (root / "labels" / "train" / "a.xml").unlink()
    (root / "labels" / "train" / "a.txt").write_text("0 .5 .5 .5 .5")
    (root / "data.yaml").write_text("train: images\\train\nnames: [cat]\n")
    return root


@pytest.mark.parametrize("make", [roboflow_voc, roboflow_coco, coco_file, yolo])
def test_the_command_that_a_refusal_advises_makes_a_data_set(tmp_path, make):
    source = make(tmp_path / "my set")
    words = advised(refusal(load, source))
    assert convert.main(words) == 0
    main = tmp_path / "my set_voc" / "ImageSets" / "Main"
    out = words[-1]
    splits = sorted(path.stem for path in (ssd.Path(out) / "ImageSets" / "Main").glob("*.txt"))
    assert splits
    assert ids(load(out, train_split=splits[0], val_split="", test_split="").train)
    assert main.parent.parent.exists() or make is coco_file


def test_a_folder_of_something_else_names_what_is_there(tmp_path):
    for name in ("photos", "notes"):
        (tmp_path / name).mkdir()
    message = refusal(load, tmp_path)
    assert "folders there: notes, photos" in message
    (tmp_path / "set.zip").write_bytes(b"PK")
    assert "is a file, not a folder in VOC layout; unpack it" in refusal(load, tmp_path / "set.zip")


def test_json_that_is_not_coco_is_not_advised_to_be_converted_as_such(tmp_path):
    write(tmp_path, ["a"], pictures=".", annotations="elsewhere")
    shutil.rmtree(tmp_path / "elsewhere")
    (tmp_path / "a.json").write_text('{"shapes": [], "imagePath": "a.png"}')  # labelme
    message = refusal(load, tmp_path)
    assert "convert coco" not in message
    assert "of COCO, YOLO and flat folders" in message


def test_the_folder_inside_another_is_named(tmp_path):
    write(tmp_path / "VOCdevkit" / "VOC2007", ["a"], {"train": ["a"]})
    assert f"try --data {tmp_path}/VOCdevkit/VOC2007" in refusal(load, tmp_path)


def test_a_picture_in_a_format_that_is_not_read_is_named(tmp_path):
    root = write(tmp_path, ["a"], {"train": ["a", "b"]})
    (root / "JPEGImages" / "b.pcx").write_bytes(b"")
    assert "b.pcx: convert it; images are read as .jpg" in refusal(load, root)


def test_the_second_list_of_one_export_joins_the_first(tmp_path, capsys):
    root = roboflow_coco(tmp_path / "export")
    for split in ("train", "valid"):
        folder = root / split
        assert (
            convert.main(["coco", str(folder / "_annotations.coco.json"), str(folder), str(tmp_path / "out")])
            == 0
        )
    data = load(tmp_path / "out")
    assert data.lists == {"train": "train", "val": "valid", "test": ""}
    words = [
        "coco",
        str(root / "valid" / "_annotations.coco.json"),
        str(root / "valid"),
        str(tmp_path / "out"),
    ]
    capsys.readouterr()
    assert convert.main(words) == 2
    assert "--list" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["images/my%20photo.png", "my%20photo.png", "images/my photo.png", "/gone/my photo.png"]
)
def test_names_of_a_coco_file_are_found_as_label_tools_write_them(tmp_path, name):
    write(tmp_path / "in", ["my photo"], pictures="images", annotations="elsewhere")
    write_coco(tmp_path / "in" / "result.json", name)
    text = (tmp_path / "in" / "result.json").read_text().replace('"image_id": 7', '"image_id": "7"')
    (tmp_path / "in" / "result.json").write_text(text)
    words = [
        "coco",
        str(tmp_path / "in" / "result.json"),
        str(tmp_path / "in" / "images"),
        str(tmp_path / "out"),
    ]
    assert convert.main([*words, "--list", "train"]) == 0
    assert [len(record.labels) for record in load(tmp_path / "out").train] == [1]


def test_flat_pictures_with_folders_of_their_own_need_no_conversion(tmp_path, capsys):
    root = write(tmp_path / "in", ["a"], pictures="images")
    assert convert.main(["flat", str(root), str(tmp_path / "out")]) == 2
    assert f"use python ssd_object_detection.py --data {root}" in capsys.readouterr().err
    assert ids(load(root).train) == ["a"]
