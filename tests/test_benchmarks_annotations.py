"""The benchmarks of many annotations: the index read in three ways gives the same data; a made-up COCO."""

import sys
from pathlib import Path

import pytest

import ssd_object_detection as ssd
from ssd_tools import convert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import annotations
import coco


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
