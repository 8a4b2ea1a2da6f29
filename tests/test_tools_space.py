"""ssd_tools/hub.py --space: a page to try a model, by a stand-in for gradio, and by gradio where it is."""

import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import ssd_object_detection as ssd

for package in ("onnx", "onnxruntime", "onnxscript", "safetensors"):
    pytest.importorskip(package)

from ssd_tools import hub, onnx  # noqa: E402

ODD_NAMES = ['it\'s "a" <b>{x}</b> \\ $y$', "犬 %s"]


@pytest.fixture(scope="module")
def space(tiny_run, tmp_path_factory):
    """The exported folder of a model whose classes have ODD_NAMES; its checkpoint is odd.pth beside it."""
    folder = tmp_path_factory.mktemp("a 'space'")
    checkpoint = ssd.load_checkpoint(tiny_run.final)
    least = min(checkpoint["score_thresh"].values())
    checkpoint |= {
        "classes": ODD_NAMES,
        # One for both: the ONNX file finds 200 objects before the page drops those below their class's.
        "score_thresh": dict.fromkeys(ODD_NAMES, least),
        "test": {},
    }
    ssd.save_checkpoint(folder / "odd.pth", checkpoint)
    assert hub.main(["export", str(folder / "odd.pth"), str(folder / "tiny"), "--space"]) == 0
    return folder / "tiny"


@pytest.fixture(scope="module")
def pictures(tiny_voc, tmp_path_factory):
    """RGB, grey and transparent pictures, and one that its EXIF tag turns."""
    folder = tmp_path_factory.mktemp("pictures")
    picture = ssd.open_image(tiny_voc / "JPEGImages" / "test_1.jpg")
    picture.save(folder / "rgb.png")
    picture.convert("L").save(folder / "grey.png")
    transparent = picture.convert("RGBA")
    transparent.putalpha(100)
    transparent.save(folder / "rgba.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture.resize((400, 300)).save(folder / "turned.jpg", exif=exif)
    return sorted(folder.iterdir())


@pytest.fixture
def no_pictures_of(tmp_path):
    """What is not a picture that the page can read: none, text, half a file, grey of 16 bits."""
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (300, 300), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-200])
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "grey16.png")
    return [None, *(str(tmp_path / name) for name in ("text.jpg", "cut.png", "grey16.png"))]


def assert_found(rows, path, checkpoint):
    """Demand that the rows of the page's table are what the model finds in a picture."""
    found = ssd.load_detector(checkpoint, "cpu", "off").predict(path)
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
    labels = np.array([ODD_NAMES.index(row[1]) + 1 for row in rows])
    theirs = np.array([row[3:] for row in rows]), labels, np.array([row[2] for row in rows])
    ours = found.boxes_px, np.array(found.labels), np.array(found.scores)
    alone, pixels, score = onnx.largest_differences(ours, theirs)
    assert (alone, len(rows) > 5) == (0, True)
    assert pixels < 0.06  # rounded to one digit
    assert score < 0.0006


def test_the_folder_is_a_space_that_names_no_class_in_its_code(space):
    header = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header["title"] == "tiny"
    assert (header["sdk"], header["app_file"], header["pipeline_tag"]) == (
        "gradio",
        "app.py",
        "object-detection",
    )
    assert (space / "requirements.txt").read_text().split() == ["numpy", "onnxruntime>=1.25", "pillow"]
    code = (space / "app.py").read_text(encoding="utf-8")
    compile(code, "app.py", "exec")
    assert len(code.splitlines()) <= 40
    assert not any(name in code for name in ODD_NAMES)
    assert header["sdk_version"].startswith("6.31")
    assert "gradio 6.31 was tried" in code


def test_an_export_without_it_leaves_no_page_of_an_earlier_one(space, tiny_run, tmp_path):
    for flags in (["--space"], []):
        assert hub.main(["export", str(tiny_run.final), str(tmp_path / "out"), *flags]) == 0
        assert (tmp_path / "out" / "app.py").exists() == bool(flags)
    assert "sdk" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "requirements.txt").exists()


class PageError(Exception):
    """gr.Error, as far as the page uses it."""

    def __init__(self, message, print_exception):
        super().__init__(message)
        assert not print_exception


class Part:
    """A component, or the Interface, as far as the page uses it."""

    def __init__(self, *args, **more):
        self.more = more

    def launch(self, allowed_paths):
        assert all(Path(path).is_file() for path in allowed_paths)


def test_the_page_finds_what_predict_finds_and_says_what_it_cannot_read(
    space, pictures, no_pictures_of, monkeypatch
):
    parts = dict.fromkeys(("Image", "Slider", "Dataframe", "Interface"), Part)
    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace(Error=PageError, **parts))
    monkeypatch.delitem(sys.modules, "detect_onnx", raising=False)
    monkeypatch.syspath_prepend(str(space))
    monkeypatch.chdir(space)
    page = runpy.run_path("app.py")
    assert page["page"].more["description"] == "[Model card](gradio_api/file=README.md)"
    for path in pictures:
        drawn, rows = page["find"](str(path), 0)
        assert_found(rows, path, space.with_name("odd.pth"))
        upright = ssd.open_image(path)
        assert drawn.size == upright.size
        assert np.any(np.asarray(drawn) != np.asarray(upright))
        assert all(row[2] >= 0.3 for row in page["find"](str(path), 0.3)[1])
    for path in no_pictures_of:
        with pytest.raises(PageError, match="No readable picture"):
            page["find"](path, 0)
    monkeypatch.delitem(sys.modules, "detect_onnx")


def test_gradio_s_own_client_gets_the_boxes_of_predict(space, pictures, no_pictures_of):
    pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    program = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=space,
        env={**os.environ, "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_ANALYTICS_ENABLED": "False"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        address = program.stdout.readline().split()[-1]
        page = client.Client(address, verbose=False)
        for path in pictures:
            _, table = page.predict(client.handle_file(path), 0, api_name="/find")
            assert_found(table["data"], path, space.with_name("odd.pth"))
        for path in no_pictures_of:
            with pytest.raises(Exception, match="No readable picture"):
                page.predict(path and client.handle_file(path), 0, api_name="/find")
    finally:
        program.terminate()
        said = program.communicate(timeout=60)[0]
    assert "Traceback" not in said
