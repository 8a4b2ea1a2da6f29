"""ssd_tools/collect.py: what predict saw becomes a data set, whose corrected annotations stay."""

import shutil

import numpy as np
import pytest
from PIL import Image
from predicting import command
from reference import Pointer, red_box

import ssd_object_detection as ssd
from ssd_tools import collect, inference, predict


@pytest.fixture
def pointer():
    return inference.FlipDetector(Pointer(), ("blue", "red"))


def collect_into(pointer, folder, paths, **flags):
    """Run a detector over pictures, which become a data set; returns the ids in its list."""
    predict.predict_files(
        pointer,
        paths,
        folder.parent / "drawn",
        collection=collect.Collection(folder, **flags),
        score_thresh=0.5,
    )
    return (folder / collect.LIST_FILE).read_text().split()


def draw(path, box=None, size=(200, 100)):
    """Write a picture with a red rectangle, or a black one that shows nothing."""
    path.parent.mkdir(exist_ok=True)
    picture = Image.new("RGB", size)
    if box is not None:
        picture = red_box(size, box)
    picture.save(path)
    return path


def test_what_was_seen_is_a_data_set_that_training_reads(pointer, tmp_path):
    paths = [draw(tmp_path / "photos" / "a.png", (20, 10, 120, 60)), draw(tmp_path / "photos" / "b.png")]
    assert sorted(collect_into(pointer, tmp_path / "mine", paths)) == ["a", "b"]
    data = ssd.load_data(str(tmp_path / "mine"), val_fraction=0)
    boxes = {record.image_id: record.boxes_px for record in data.train}
    np.testing.assert_allclose(boxes["a"], [(20, 10, 120, 60)], atol=2)
    assert len(boxes["b"]) == 0
    assert (tmp_path / "mine" / "classes.txt").read_text().split() == ["blue", "red"]
    assert (tmp_path / "mine" / "JPEGImages" / "a.png").read_bytes() == paths[0].read_bytes()


def test_a_corrected_annotation_stays_when_the_command_is_given_again(pointer, tmp_path, capsys):
    first = draw(tmp_path / "photos" / "a.png", (20, 10, 120, 60))
    collect_into(pointer, tmp_path / "mine", [first])
    corrected = tmp_path / "mine" / "Annotations" / "a.xml"
    corrected.write_text(corrected.read_text().replace("red", "blue"))
    content = corrected.read_text()
    other = draw(tmp_path / "other" / "a.png", (50, 50, 150, 90))  # of the same name
    assert collect_into(pointer, tmp_path / "mine", [first, other]) == ["a", "other_a"]
    assert corrected.read_text() == content
    assert "1 were there already and keep their annotations" in capsys.readouterr().out


def test_false_alarms_become_images_without_objects(pointer, tmp_path):
    paths = [draw(tmp_path / "photos" / "a.png", (20, 10, 120, 60)), draw(tmp_path / "photos" / "b.png")]
    assert collect_into(pointer, tmp_path / "mine", paths, only_hits=True, empty=True) == ["a"]
    assert len(ssd.parse_annotation(tmp_path / "mine" / "Annotations" / "a.xml").objects) == 0


def test_the_list_begins_with_the_picture_whose_score_is_nearest_to_the_threshold(tmp_path):
    found = ssd.Detections(np.zeros((0, 4), np.float32), [], [], [])
    one = collect.Collection(tmp_path / "mine")
    for name, distance in (("sure", 0.4), ("nothing", float("inf")), ("doubtful", 0.01)):
        path = draw(tmp_path / "photos" / f"{name}.png", size=(20 + len(name), 20))
        one.add(path, (20 + len(name), 20), found, collect.Doubt(distance, name))
    assert "the most doubtful: doubtful" in one.close(["red"])
    assert (tmp_path / "mine" / collect.LIST_FILE).read_text().split() == ["doubtful", "sure", "nothing"]


def test_doubt_is_of_scores_above_and_below_the_threshold(pointer, tmp_path):
    picture = red_box((200, 100), (20, 10, 120, 60))
    (found,) = pointer.detect_in([picture])
    score = max(found.scores)
    for threshold in (score - 0.05, min(score + 0.05, 1.0)):
        doubt = collect.judge_doubt(pointer, picture, score_thresh=threshold)
        assert doubt.distance <= 0.0501
        assert doubt.text == f"red {score:.2f}, threshold {threshold:.2f}"


def test_what_cannot_be_collected_is_said_in_one_line(tiny_run, tmp_path, capsys):
    picture = shutil.copy(tiny_run.data / "JPEGImages" / "test_0.jpg", tmp_path / "a.jpg")
    foreign = tmp_path / "foreign"
    (foreign / "Annotations").mkdir(parents=True)
    flags = ("--weights", tiny_run.final, "--save-voc")
    for source, folder, words in (
        (picture, foreign, "not of this program"),
        ("0", tmp_path / "new", "ffmpeg"),
    ):
        assert predict.main(command(source, *flags, folder, out=tmp_path)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert predict.main(command(picture, *flags, tmp_path / "new", out=tmp_path)) == 0
    assert (tmp_path / "new" / "Annotations" / "a.xml").is_file()
