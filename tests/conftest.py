"""Shared fixtures: a tiny data set in VOC layout, flags that train on it, one finished run of two epochs."""

import contextlib
import io
import json
import types

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import ssd_object_detection as ssd
from ssd_tools import shapes

FAST_FILES = (
    "test_02_boxes",
    "test_03_anchors",
    "test_03_fitted_anchors",
    "test_04_matching",
    "test_05_data",
    "test_05_index",
    "test_06_augmentation",
    "test_08_losses",
    "test_09_detection",
    "test_10_evaluation",
    "test_11_records",
    "test_15_cli",
    "test_house",
    "test_tools_score",
    "test_tools_shapes",
)
TRAINING = {"tiny_run", "flags_of", "same_run"}  # fixtures of tests that train
TINY_SPLITS = {"train": 8, "val": 4, "test": 4}
ROUND = ("circle", "ring")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep what programs write into the user's cache apart from the user's own; returns the folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the fast lane: the tests of FAST_FILES that train nothing and are not marked slow."""
    for item in items:
        is_slow = item.get_closest_marker("slow") or TRAINING & set(item.fixturenames)
        if item.path.stem in FAST_FILES and not is_slow:
            item.add_marker(pytest.mark.fast)


def write_voc(root, splits=None, seed=0, empty_every=4):
    """Write drawn images of the classes `angular` and `round` in VOC layout; returns root.

    Every empty_every-th has no object: 1 leaves all of them empty, 0 none.
    """
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, count in (splits or TINY_SPLITS).items():
        ids = [f"{split}_{i}" for i in range(count)]
        for i, image_id in enumerate(ids):
            image, objects = shapes.draw_image(rng)
            if empty_every and i % empty_every == empty_every - 1:
                image = rng.integers(90, 130, image.shape).astype(np.uint8)
                objects = []
            else:
                while len({name in ROUND for name, _ in objects}) < 2:  # both classes in each image
                    image, objects = shapes.draw_image(rng)
            objects = [("round" if name in ROUND else "angular", box) for name, box in objects]
            Image.fromarray(image).save(root / "JPEGImages" / f"{image_id}.jpg")
            annotation = root / "Annotations" / f"{image_id}.xml"
            shapes.write_annotation(annotation, f"{image_id}.jpg", image.shape, objects)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root


def tiny_flags(data, output, *more):
    """Return the command line of a training run of two epochs that takes a few seconds on a CPU."""
    return [
        "--data",
        str(data),
        "--output-dir",
        str(output),
        "--val-split",
        "val",
        "--recipe",
        "small",
        "--no-pretrained",
        "--width",
        ".0625",
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--lr",
        ".005",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--amp",
        "off",
        "--score-thresh",
        ".001",
        *more,
    ]


@pytest.fixture(scope="session")
def make_voc():
    """The function that writes a data set."""
    return write_voc


@pytest.fixture(scope="session")
def flags_of():
    """The function that returns the flags of a tiny run."""
    return tiny_flags


@pytest.fixture(scope="session")
def tiny_voc(tmp_path_factory):
    """A folder `Tiny Set` of 8 training, 4 validation and 4 test images; not to be changed."""
    return write_voc(tmp_path_factory.mktemp("voc") / "Tiny Set")


@pytest.fixture(scope="session")
def tiny_run(tiny_voc, tmp_path_factory):
    """A finished run: data, output, flags, code, out and err (what it printed), final (the checkpoint)."""
    output = tmp_path_factory.mktemp("run") / "out"
    flags, out, err = tiny_flags(tiny_voc, output), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = ssd.main(flags)
    final = output / "checkpoints" / "ssd_tiny_set_final.pth"
    return types.SimpleNamespace(
        data=tiny_voc,
        output=output,
        flags=flags,
        code=code,
        final=final,
        out=out.getvalue(),
        err=err.getvalue(),
    )


MAY_DIFFER = ("seconds", "images_per_s", "data_wait", "args", "checkpoint")  # times and paths


def assert_same(ours, theirs, where):
    """Demand that two values of a checkpoint are equal, tensors bit for bit; times and paths apart."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            if key not in MAY_DIFFER:
                assert_same(ours[key], theirs[key], f"{where} {key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where} {i}")
    else:
        assert torch.equal(ours, theirs) if torch.is_tensor(theirs) else ours == theirs, where


def rows_of(output):
    """Return the rows of a run's metrics.jsonl."""
    text = (output / "checkpoints" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def same_run():
    """A function that demands that two runs left the same bits and metrics, times and paths apart."""

    def compare(output, other):
        names = [path.name for path in (other / "checkpoints").glob("*.pth") if path.name != "previous.pth"]
        assert names
        for name in names:
            ours = torch.load(output / "checkpoints" / name, weights_only=True)
            theirs = torch.load(other / "checkpoints" / name, weights_only=True)
            assert_same(ours, theirs, name)
        assert_same(rows_of(output), rows_of(other), "metrics.jsonl")

    return compare


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the pictures of a run, which take most of its time."""
    for name in ("plot_augmentations", "plot_losses", "plot_predictions"):
        monkeypatch.setattr(ssd, name, lambda *args, **more: Figure())


@pytest.fixture
def fails(capfd):
    """A function that runs main, demands exit code 2 and one line on standard error, which it returns."""

    def run(argv):
        capfd.readouterr()
        code = ssd.main([str(a) for a in argv])
        lines = capfd.readouterr().err.splitlines()
        assert code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run
