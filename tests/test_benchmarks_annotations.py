"""The benchmark of the index: it makes up a data set, reads it in three ways, which give the same data."""

import sys
from pathlib import Path

import pytest

import ssd_object_detection as ssd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import annotations


@pytest.mark.slow
def test_it_reads_the_made_up_data_in_three_ways(tmp_path, capsys):
    result = annotations.main(["--images", "30", "--folder", str(tmp_path / "data")])
    (times,) = result["rounds"]
    assert list(times) == ["parsed", "first", "second"]
    assert len({one["digest"] for one in times.values()}) == 1
    assert "30 images, 210 objects, 1 cores" in capsys.readouterr().out
    data = ssd.load_data(str(tmp_path / "data"), val_fraction=0)
    assert (len(data.train), int(ssd.count_objects(data.train).sum())) == (30, 210)
    assert data.findings == ()
