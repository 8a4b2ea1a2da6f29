"""--data with several folders: lists, classes, copies, and all that reads the saved data flags."""

import shutil

import pytest
from conftest import tiny_flags, write_voc
from folders import annotation, refusal
from PIL import Image

import ssd_object_detection as ssd
from ssd_tools import audit, onnx, report, score


def write(root, names, **lists):
    """Write pictures with an object each, {picture: class}, and lists of them; returns the folder's path."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, label in names.items():
        color = (ord(name[0]), len(root.name), len(name))
        Image.new("RGB", (40, 30), color).save(root / "JPEGImages" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(annotation(label))
    for split, lines in lists.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(lines))
    return str(root)


def paths(records):
    return ["/".join(record.image_path.split("/")[-3::2]) for record in records]


def texts(data, kind=None):
    return [finding.text for finding in data.findings if kind in (None, finding.kind)]


@pytest.fixture
def two(tmp_path):
    """Return the paths of two folders, whose pictures have the same names; only the second has more lists."""
    first = write(tmp_path / "first", {"a": "dog", "b": "cat"}, train=["a", "b"])
    names = {"a": "dog", "b": "ant", "c": "cat"}
    return first, write(tmp_path / "second", names, train=["a"], val=["b"], test=["c"])


def test_each_folder_is_split_as_it_would_be_alone_and_said_to_have_so_many_images(two):
    data = ssd.load_data(two, val_fraction=0.5)
    assert paths(data.val)[1:] == ["second/b.png"]
    assert sorted(paths(data.train) + paths(data.val)[:1]) == ["first/a.png", "first/b.png", "second/a.png"]
    assert paths(data.test) == ["second/c.png"]
    assert data.name == "first_second"
    assert texts(data, "images of a folder") == [
        f"{two[0]}: 1 train images (train), 1 val images (held out)",
        f"{two[1]}: 1 train images (train), 1 val images (val), 1 test images (test)",
    ]


def test_new_classes_follow_those_of_the_first_folder_and_one_of_a_folder_alone_is_warned_about(tmp_path):
    first = write(tmp_path / "first", {"a": "dog", "b": "cat"}, train=["a", "b"])
    second = write(tmp_path / "second", {"c": "ant", "d": "cat"}, train=["c", "d"])
    data = ssd.load_data((first, second), val_fraction=0)
    assert data.classes == ("cat", "dog", "ant")
    (warning,) = [finding.text for finding in data.findings if finding.is_warning]
    assert f"only {first} annotates dog; only {second} annotates ant: in the pictures of the other" in warning
    assert "background" in warning
    only_cats = ssd.load_data((first, second), val_fraction=0, classes=["cat"])
    assert not any(finding.is_warning for finding in only_cats.findings)


def test_names_that_differ_by_a_slip_are_found_across_folders(tmp_path):
    folders = [write(tmp_path / name, {name: label}) for name, label in (("one", "cat"), ("other", "Cat"))]
    assert "one class or two? Cat (1) and cat (1)" in "".join(texts(ssd.load_data(folders, val_fraction=0)))


def test_voc_and_a_folder_without_lists_have_the_classes_of_both_and_the_lists_of_voc(tmp_path):
    devkit = tmp_path / "VOCdevkit"
    write(devkit / "VOC2007", {"v": "cat", "w": "dog", "x": "dog"}, train=["v"], trainval=["v"], test=["w"])
    (devkit / "VOC2007" / "ImageSets" / "Main" / "val.txt").write_text("x")
    mine = write(tmp_path / "mine", {"a": "rover"})
    data = ssd.load_data(("voc2007", mine), data_root=tmp_path)  # one picture is not held out
    assert data.classes == (*ssd.VOC_CLASSES, "rover")
    assert paths(data.train) == ["VOC2007/v.png", "mine/a.png"]
    assert paths(data.test) == ["VOC2007/w.png"]
    assert data.name == "pascal_voc_mine"
    named = {"train_split": "trainval", "val_split": "val", "test_split": "test"}
    data = ssd.load_data(("voc2007", mine), data_root=tmp_path, **named)
    assert paths(data.train) == ["VOC2007/v.png", "mine/a.png"]
    assert paths(data.val) == ["VOC2007/x.png"]


def test_a_mistyped_folder_is_told_before_voc_is_fetched(tmp_path):
    message = refusal(ssd.load_data, ("voc2007", str(tmp_path / "mien")), data_root=tmp_path / "nowhere")
    assert message.startswith(f"--data: no folder {tmp_path / 'mien'}")


@pytest.mark.parametrize("flags", [{"val_split": "check"}, {"test_split": "check"}, {"train_split": "val"}])
def test_a_list_that_no_folder_has_or_one_does_not_train_on_is_refused(two, flags):
    message = refusal(ssd.load_data, two, **flags)
    assert message.startswith(f"no image list {two[0]}/ImageSets/Main/{next(iter(flags.values()))}.txt")


@pytest.mark.parametrize("again", ["first", "first/", "second/../first"])
def test_a_folder_that_is_named_twice_is_refused(two, tmp_path, again):
    assert f"{two[0]} twice" in refusal(ssd.load_data, (*two, f"{tmp_path}/{again}"))


def test_a_picture_that_another_folder_measures_on_is_not_trained_on(two, tmp_path):
    third = write(tmp_path / "third", {"d": "dog", "e": "cat"})
    shutil.copy(f"{two[1]}/JPEGImages/c.png", f"{third}/JPEGImages/d.png")
    data = ssd.load_data((*two, third), val_fraction=0)
    assert "third/d.png" not in paths(data.train)
    assert "third/e.png" in paths(data.train)
    (finding,) = [finding for finding in data.findings if finding.kind == "same pixels twice"]
    assert finding.is_warning
    assert finding.text.endswith(f"left out: 1, e.g. {third}/JPEGImages/d.png")


@pytest.mark.parametrize(("words", "value"), [(["A"], "A"), (["A", "B"], ("A", "B"))])
def test_one_folder_is_a_string_in_the_settings_and_several_are_a_tuple(words, value):
    assert ssd.load_settings(["--epochs", "1", "--data", *words])[0].data == value


def test_detection_files_of_two_pictures_of_one_name_are_refused(two, tmp_path):
    write(tmp_path / "first", {"c": "cat"}, test=["c"])
    settings, _ = ssd.load_settings(["--data", *two, "--output-dir", str(tmp_path)])
    assert "have one name in detection files" in refusal(score.score_files, str(tmp_path), settings)


def test_the_report_names_several_folders_without_their_places():
    assert report.data_name({"data": ["voc2007", "/home/me/mine"]}) == "voc2007 + mine"


def test_the_audit_reads_several_folders_and_names_a_class_of_one_alone(two, tmp_path, capsys):
    assert audit.main(["--data", *two, "--output-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "3 images        3 objects  (list train)" in printed
    assert f"only {two[0]} annotates cat" in printed
    assert f"{two[1]}: 1 train images (train)" in printed
    assert all((tmp_path / name / "audit.json").is_file() for name in ("first", "second"))


def test_a_run_on_two_folders_is_resumed_refined_measured_and_exported(tmp_path, capsys):
    first = write_voc(tmp_path / "first")
    second = write_voc(tmp_path / "second", {"train": 6, "val": 2}, seed=1)
    out = tmp_path / "out"
    words = tiny_flags(first, out)
    position = words.index("--data")
    words[position + 1 : position + 2] = [str(first), str(second)]
    assert ssd.main(words) == 0
    assert f"{first} {second}: 14 train images" in capsys.readouterr().out
    checkpoint = ssd.newest_final_checkpoint(out)
    assert checkpoint.name == "ssd_first_second_final.pth"

    cpu = ["--device", "cpu", "--epochs", "3", "--output-dir"]
    assert ssd.main(["--resume", *cpu, str(out)]) == 0
    assert ssd.main(["--init-from", str(checkpoint), *cpu, str(tmp_path / "more")]) == 0
    captured = capsys.readouterr()
    assert "not the training images" not in captured.err
    assert captured.out.count(f"{first} {second}: 14 train images") == 2

    asked = ["--evaluate", str(checkpoint), "--output-dir", str(tmp_path / "again"), "--device", "cpu"]
    assert ssd.main(asked) == 0
    assert f"{first} {second}, list test: 4 images" in capsys.readouterr().out
    settings, saved = ssd.load_settings(asked)
    assert len(onnx.calibration_records(settings, saved["classes"])) == 6
    assert len(onnx.example_images(settings.data)) == 16
    shutil.rmtree(second)
    assert ssd.main(asked) == 2
    assert f"no folder {second}" in capsys.readouterr().err
