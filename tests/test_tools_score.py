"""Detection files of the VOC devkit: written, read, refused where wrong, scored like the checkpoint."""

import json

import numpy as np
import pytest

import ssd_object_detection as ssd
from ssd_tools import score

CLASSES = ("cat", "dog")
NOTHING = {
    "image_ids": np.zeros(0, int),
    "labels": np.zeros(0, int),
    "scores": np.zeros(0),
    "boxes_voc": np.zeros((0, 4)),
}


@pytest.fixture
def records():
    """Five records `img_0` to `img_4` of 100x80 pixels, each with a cat at (10, 10) to (30, 30)."""
    box = np.array([[10, 10, 30, 30]], dtype=np.float32)
    return [ssd.Record(f"img_{i}", "", 100, 80, box, np.array([1]), np.array([False])) for i in range(5)]


def random_detections(count=60):
    rng = np.random.default_rng(1)
    low = rng.uniform(1, 60, (count, 2))
    return {
        "image_ids": rng.integers(5, size=count),
        "labels": np.sort(rng.integers(1, 3, count)),
        "scores": rng.random(count, dtype=np.float32),
        "boxes_voc": np.concatenate((low, low + rng.uniform(1, 20, (count, 2))), axis=1),
    }


# -- The files


def test_files_come_back_as_they_were(records, tmp_path):
    detections = random_detections()
    score.write_devkit_files(tmp_path / "new" / "folder", "test", detections, records, CLASSES)
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["comp4_det_test_cat.txt", "comp4_det_test_dog.txt"]
    image_id, *numbers = (tmp_path / "new" / "folder" / files[0]).read_text().splitlines()[0].split()
    assert image_id == f"img_{detections['image_ids'][0]}"
    assert [float(number) for number in numbers] == pytest.approx(
        [detections["scores"][0], *detections["boxes_voc"][0]]
    )
    back = score.read_devkit_files(tmp_path / "new" / "folder", "test", records, CLASSES)
    assert back["image_ids"].tolist() == detections["image_ids"].tolist()
    assert back["labels"].tolist() == detections["labels"].tolist()
    assert back["scores"].astype(np.float32).tolist() == detections["scores"].tolist()  # to the last bit
    np.testing.assert_allclose(back["boxes_voc"], detections["boxes_voc"], rtol=1e-8)


def test_two_classes_with_one_file_are_refused_before_anything_is_written(records, tmp_path):
    for read_or_write in (
        lambda: score.write_devkit_files(tmp_path / "out", "test", NOTHING, records, ("a/b", "cat", "a_b")),
        lambda: score.read_devkit_files(tmp_path / "out", "test", records, ("a/b", "cat", "a_b")),
    ):
        with pytest.raises(ssd.InputError) as error:
            read_or_write()
        assert str(error.value) == "the classes a/b and a_b would share comp4_det_test_a_b.txt: rename one"
        assert not (tmp_path / "out").exists()
    with pytest.raises(ssd.InputError, match="too long for the name of its file"):
        score.write_devkit_files(tmp_path / "out", "test", NOTHING, records, ("x" * 240,))


@pytest.mark.parametrize(("platform", "is_one_file"), [("linux", False), ("win32", True), ("darwin", True)])
def test_classes_that_differ_by_case_share_a_file_where_the_system_sees_none(
    platform, is_one_file, records, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.platform", platform)
    if is_one_file:
        with pytest.raises(ssd.InputError, match="the classes Cat and cat would share"):
            score.refuse_shared_files("test", ("Cat", "cat"))
    else:
        score.write_devkit_files(tmp_path, "test", NOTHING, records, ("Cat", "cat"))
        assert len(list(tmp_path.iterdir())) == 2


def test_names_of_images_may_have_blanks(tmp_path):
    records = [
        ssd.Record("my image 2", "", 9, 9, np.array([[0, 0, 5, 5.0]]), np.array([1]), np.array([False]))
    ]
    found = {
        "image_ids": np.array([0]),
        "labels": np.array([1]),
        "scores": np.array([0.5]),
        "boxes_voc": np.array([[1.0, 1, 5, 5]]),
    }
    score.write_devkit_files(tmp_path, "test", found, records, ("cat",))
    assert score.read_devkit_files(tmp_path, "test", records, ("cat",))["image_ids"].tolist() == [0]


def test_empty_files_are_no_detections(records, tmp_path):
    score.write_devkit_files(tmp_path, "val", NOTHING, records, ("cat",))
    assert (tmp_path / "comp4_det_val_cat.txt").read_text() == ""
    back = score.read_devkit_files(tmp_path, "val", records, ("cat",))
    shapes = {name: column.shape for name, column in NOTHING.items()}
    assert {name: column.shape for name, column in back.items()} == shapes
    assert ssd.score_detections(back, records, 1)["map_area"] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("img_0 .9 1 1 10", "line 2: 'img_0 .9 1 1 10': not 'image score xmin ymin xmax ymax'"),
        ("img_0 .9 1 1 10 10 1", "line 2: .*list test has no such image"),  # "img_0 .9" is none
        ("img_0 .9 1 1 10 nan", "line 2: .*not 'image score"),
        ("img_0 nan 1 1 10 10", "line 2: .*not 'image score"),
        ("img_0 .9 1 1 inf 10", "line 2: .*not 'image score"),
        ("img_0 .9 one 1 10 10", "line 2: .*not 'image score"),
        ("", "line 2: '': not 'image score"),
        ("nowhere .9 1 1 10 10", "line 2: 'nowhere .9 1 1 10 10': list test has no such image"),
    ],
)
def test_bad_line_is_named_with_its_file(records, tmp_path, line, message):
    path = tmp_path / "comp4_det_test_cat.txt"
    path.write_text(f"img_0 .9 1 1 10 10\n{line}\nimg_0 .8 1 1 10 10\n")
    with pytest.raises(ssd.InputError, match=message) as caught:
        score.read_devkit_files(tmp_path, "test", records, ("cat",))
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_file_that_is_no_text_is_refused(records, tmp_path):
    (tmp_path / "comp4_det_test_cat.txt").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ssd.InputError, match=r"line 1: .*not 'image score"):
        score.read_devkit_files(tmp_path, "test", records, ("cat",))


def test_missing_file_is_named(records, tmp_path):
    with pytest.raises(ssd.InputError, match=r"comp4_det_test_dog\.txt: no such file; each class needs one"):
        score.read_devkit_files(tmp_path, "test", records, ("dog",))


def test_files_of_another_program_are_scored_by_the_voc_rules(records, tmp_path):
    # Edges 10 to 30 are the pixels 11 to 30. Windows line ends, tabs, scores above 1, boxes beyond the image.
    lines = [
        "img_0 7.5 11 11 30 30",
        "img_1\t3\t11 11 30 20",
        "img_2 2e0 -50 -50 300 300",
        "img_3 -1 11 11 30 19",
    ]
    (tmp_path / "comp4_det_test_cat.txt").write_bytes("\r\n".join(lines).encode())
    detections = score.read_devkit_files(tmp_path, "test", records, ("cat",))
    result = ssd.score_detections(detections, records, 1)
    # IoU 1, 200 / 400, little, 180 / 400: hit, hit, false, false of 5 objects.
    assert result["classes"][1]["recall"].tolist() == pytest.approx([0.2, 0.4, 0.4, 0.4])
    assert result["map_area"] == pytest.approx(0.4)
    assert result["map75"] == pytest.approx(0.2)


# -- The command


def run(*argv):
    assert score.main([str(a) for a in argv]) == 0


def test_written_detections_are_scored_like_the_checkpoint(tiny_run, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    flags = ["--device", "cpu", "--amp", "off", "--workers", "0", "--score-thresh", ".001"]
    run(folder, "--write", tiny_run.final, *flags, "--output-dir", tmp_path / "a")
    by_checkpoint = capsys.readouterr().out.splitlines()
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["comp4_det_test_angular.txt", "comp4_det_test_round.txt"]
    run(folder, "--data", tiny_run.data, "--test-split", "test", "--output-dir", tmp_path / "b")
    by_files = capsys.readouterr().out.splitlines()
    assert by_files[0] == f"{folder} on {tiny_run.data}, list test: 4 images"
    assert by_files[1:] == by_checkpoint[1:]
    paths = [tmp_path / name / "plots" / "evaluation" / "evaluation.json" for name in "ab"]
    first, second = (json.loads(path.read_text()) for path in paths)
    assert 0 < first["map_area"] < 1
    assert second.pop("detections") == str(folder)
    assert first.pop("checkpoint") == str(tiny_run.final)
    assert list(second) == list(first)
    # What only the program that detected knows is not in its files.
    assert second.pop("precision") is second.pop("detection") is None
    assert second == {key: first[key] for key in second}  # to the last bit


def test_classes_may_be_named(tiny_run, tmp_path, capsys):
    (tmp_path / "comp4_det_test_round.txt").write_text("")
    run(tmp_path, "--data", tiny_run.data, "--classes", "round", "--output-dir", tmp_path / "out")
    numbers = json.loads((tmp_path / "out/plots/evaluation/evaluation.json").read_text())
    assert list(numbers["per_class"]) == ["round"]
    assert numbers["map_area"] == 0
    assert numbers["per_class"]["round"]["num_gt"] > 0


def test_images_without_annotations_count_as_training_counts_them(make_voc, tmp_path):
    data = make_voc(
        tmp_path / "data", {"test": 2}, empty_every=0
    )  # no training list is there, and none is needed
    (data / "Annotations" / "test_1.xml").unlink()
    for name in ("angular", "round"):
        (tmp_path / f"comp4_det_test_{name}.txt").write_text("")
    where = ["--data", data, "--test-split", "test", "--output-dir", tmp_path / "out"]
    assert score.main([str(a) for a in (tmp_path, *where)]) == 2
    run(tmp_path, *where, "--unlabelled", "negative")


def test_errors_are_one_line(tiny_run, make_voc, tmp_path, capsys):
    where = ["--data", tiny_run.data, "--output-dir", tmp_path / "out"]
    without_test = make_voc(tmp_path / "set", splits={"train": 2})
    for argv, message in (
        ([tmp_path, *where], "comp4_det_test_angular.txt: no such file"),
        ([tmp_path, *where, "--test-split", "nothing"], "no image list"),
        ([tmp_path, "--data", without_test], "has no test list: name one with --test-split"),
        ([tmp_path, "--write", tmp_path / "none.pth"], "no such file (a checkpoint)"),
    ):
        assert score.main([str(a) for a in argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert message in lines[0]
    assert not (tmp_path / "out").exists()
