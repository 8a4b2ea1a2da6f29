"""The benchmarks of many annotations, a made-up COCO, and what grows with the number of classes."""

import sys
from pathlib import Path

import pytest

import ssd_object_detection as ssd
from ssd_tools import convert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import annotations
import coco
import growth


@pytest.mark.slow
def test_it_reads_the_made_up_data_in_three_ways(tmp_path, capsys):
    result = annotations.main(["--images", "30", "--folder", str(tmp_path / "data")])
    (times,) = result["rounds"]
    assert list(times) == ["parsed", "first", "second"]
    assert len({one["digest"] for one in times.values()}) == 1
    assert "30 images, 210 objects, 1 cores" in capsys.readouterr().out
    data = ssd.load_data(str(tmp_path / "data"), val_fraction=0)
    assert (len(data.train), int(data.train.counts.sum())) == (30, 210)
    assert data.findings == ()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_memory_of_records_and_of_loader_processes_is_told(capsys):
    memory = annotations.main(["--images", "3000", "--memory", "--loaders", "2"])
    assert 200 < memory["bytes"] < 300
    told = capsys.readouterr().out
    assert told.startswith(f"3000 images: {memory['bytes']:.0f} bytes an image")
    assert f"2 loader processes take {memory['loaders']:.0f} MB more" in told


def test_a_made_up_coco_is_converted_with_its_crowds_and_empty_images(tmp_path):
    coco.make_source(tmp_path, 200, 1400)
    source = [str(tmp_path / "instances_train2017.json"), str(tmp_path / "train2017")]
    assert convert.main(["coco", *source, str(tmp_path / "out")]) == 0
    data = ssd.load_data(str(tmp_path / "out"), train_split="train2017", val_fraction=0)
    counts = data.train.counts
    assert (len(counts), counts.sum(), len(data.classes)) == (200, 1400, 80)
    assert (counts[[0, 100]] == 0).all()
    assert data.train.difficult.sum() == 14
    assert data.train[0].read().shape == (480, 640, 3)


def test_a_program_is_measured_until_a_line_of_its_output(tmp_path, capfd):
    code = "import time; print('step 1 done', flush=True); time.sleep(60); print('end')"
    used = coco.run_measured([sys.executable, "-c", code], tmp_path, "step 1 ")
    assert capfd.readouterr().out == "step 1 done\n"
    assert min(used.values()) > 0
    with pytest.raises(SystemExit, match="exit code 3"):
        coco.run_measured([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peaks are read from /proc")
def test_a_row_for_each_number_of_classes(tmp_path, capsys):
    flags = ["--width", ".0625", "--batch-size", "1", "--images", "3", "--rounds", "1"]
    result = growth.main(["--classes", "1", "90", *flags, "--json", str(tmp_path / "growth.json")])
    one, many = result["rows"]
    assert (one["classes"], many["classes"]) == (1, 90)
    assert min(value for name, value in one.items() if not name.endswith("peak_mb")) > 0
    assert one["detections_an_image"] == many["detections_an_image"] == 200
    for name in ("parameters_m", "final_mb", "last_mb"):
        assert one[name] < many[name]
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]) == 4


@pytest.mark.parametrize("num_classes", [1, 300])
def test_made_up_scores_are_those_of_a_trained_network(num_classes):
    probs = growth.made_scores(num_classes, is_trained=True).softmax(dim=-1)
    assert 0 < (probs[:, 1:].amax(dim=1) > 0.5).sum() <= growth.SURE_ANCHORS
    assert (probs[:, 0] > 0.9).float().mean() > 0.9
