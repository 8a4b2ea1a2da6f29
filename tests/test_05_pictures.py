"""Picture files as cameras and programs write them, and what is looked at before the first epoch."""

import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import OBJECT, load, refusal, write
from PIL import Image, features

import ssd_object_detection as ssd
from ssd_tools import audit

FOLDER = Path(ssd.__file__).parent


# ---- formats ----


@pytest.mark.parametrize(("ending", "feature"), [("avif", "avif"), ("jp2", "jpg_2000"), ("ppm", None)])
def test_formats_that_pillow_reads_are_trained_on(tmp_path, ending, feature):
    if feature and not features.check(feature):
        pytest.skip(f"this Pillow has no {ending}")
    root = write(tmp_path, [f"a.{ending}"], {"train": ["a"]})
    (record,) = load(root).train
    assert record.read().shape == (30, 40, 3)


def test_a_format_that_needs_a_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "a.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic")
    assert "pip install pillow-heif, or convert it" in refusal(ssd.open_image, path)


def test_a_heic_photo_is_found_and_not_called_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    root = write(tmp_path, ["a.png"], {"train": ["a"], "test": ["b"]})
    (root / "JPEGImages" / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "Annotations" / "b.xml").write_bytes((root / "Annotations" / "a.xml").read_bytes())
    assert "pillow-heif" in refusal(load, root)


def test_a_format_that_this_pillow_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    (tmp_path / "a.avif").write_bytes(b"")
    assert "this Pillow reads no AVIF: pip install --upgrade pillow" in refusal(
        ssd.open_image, tmp_path / "a.avif"
    )


def test_a_long_text_in_a_png_is_no_attack(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    text = b"note\0\0" + zlib.compress(b"x" * 3_000_000)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])  # behind the header
    assert ssd.open_image(tmp_path / "a.png").size == (8, 8)


def test_values_of_twelve_bits_in_sixteen_are_told(tmp_path, capsys):
    root = write(tmp_path, ["a.png", "b.png"], {"train": ["a", "b"]})
    grey = np.linspace(0, 4095, 1200).astype(np.uint16).reshape(30, 40)
    Image.fromarray(grey).save(root / "JPEGImages" / "b.png")
    (finding,) = load(root).findings
    assert finding.is_warning
    assert "less than a tenth of their range" in finding.text
    assert "b.png" in finding.text
    audit.main(["--data", str(root), "--output-dir", str(tmp_path / "out")])
    assert "1 grey values in a tenth of 16 bits" in capsys.readouterr().out
    Image.fromarray(grey * 16).save(root / "JPEGImages" / "b.png")
    assert not load(root).findings


def test_an_orientation_that_is_text_is_none(tmp_path):
    entry = struct.pack("<HHI4s", 0x0112, 2, 2, b"6\0\0\0")  # the type is ASCII
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert ssd.read_orientation(tmp_path / "a.jpg") == 1
    assert ssd.open_image(tmp_path / "a.jpg").size == (40, 30)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_does_not_hang(tmp_path):
    root = write(tmp_path, ["a.png", "b.png"], {"train": ["a", "b"]})
    (root / "JPEGImages" / "b.png").unlink()
    os.mkfifo(root / "JPEGImages" / "b.png")
    with pytest.raises(ssd.InputError, match="pipe"):
        ssd.open_image(root / "JPEGImages" / "b.png")
    assert ssd.read_orientation(root / "JPEGImages" / "b.png") == 1
    assert not ssd.is_faint(root / "JPEGImages" / "b.png")
    (root / "Annotations" / "b.xml").unlink()
    os.mkfifo(root / "Annotations" / "b.xml")
    assert "pipe" in refusal(load, root)
    (tmp_path / "folder.jpg").mkdir()
    assert "folder" in refusal(ssd.open_image, tmp_path / "folder.jpg")


# ---- before the first epoch ----


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_picture_to_measure_on_that_is_cut_off_stops_before_training(tmp_path, split):
    rng = np.random.default_rng(0)
    root = write(tmp_path, ["a.png", "b.jpg"], {"train": ["a"], split: ["b"]})
    path = root / "JPEGImages" / "b.jpg"
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:-800])
    assert f"{path}: not readable as an image" in refusal(load, root)


def test_a_test_list_of_other_classes_stops_before_training(tmp_path):
    root = write(tmp_path, ["a.png"], {"train": ["a"], "test": ["b"]})
    write(root, ["b.png"], {}, label="horse")
    assert "list test: nothing of cat (see --data, --test-split)" in refusal(load, root)


# ---- the lock of a run ----

HOLD = """
import sys, time
sys.path.insert(0, {folder!r})
from pathlib import Path
import ssd_object_detection as ssd
with ssd.held_folder(Path({place!r})):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path):
    code = HOLD.format(folder=str(FOLDER), place=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ssd.InputError) as error, ssd.held_folder(tmp_path):
            pass
        assert f"process {holder.pid} on " in str(error.value)
        assert "--output-dir" in str(error.value)
        holder.kill()
        holder.wait()
    assert (tmp_path / "run.lock").is_file()  # a killed run leaves the file, not the lock
    with ssd.held_folder(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / "run.lock").read_text()
    assert not (tmp_path / "run.lock").exists()


def test_a_second_training_in_a_folder_changes_nothing_there(tmp_path, tiny_voc, capsys):
    code = HOLD.format(folder=str(FOLDER), place=str(tmp_path / "checkpoints"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        flags = ["--data", str(tiny_voc), "--recipe", "scratch", "--width", ".0625", "--device", "cpu"]
        assert ssd.main([*flags, "--workers", "0", "--output-dir", str(tmp_path)]) == 2
        assert "a run goes on there" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["run.lock"]
        holder.kill()


# ---- consoles and fonts ----


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_of_eight_bits_prints_any_class(encoding):
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import ssd_object_detection as ssd; "
    code += "ssd.prepare_process(); print('\\u732b \\u043a\\u043e\\u0442')"
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "\\u732b \\u043a\\u043e\\u0442\n"


@pytest.mark.parametrize("name", ["\u0e41\u0e21\u0e27", "\u092c\u093f\u0932\u094d\u0932\u0940", "\u732b"])
def test_class_names_without_glyphs_print_no_warning(tmp_path, name):
    figure = ssd.Figure()
    figure.subplots().set_title(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ssd.save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()
    assert ssd.printable(name).isascii()


def test_a_pickle_is_refused_in_a_whole_sentence(tmp_path):
    torch.save({"model": os.getcwd}, tmp_path / "a.pth")
    message = refusal(ssd.load_checkpoint, tmp_path / "a.pth")
    assert "it holds Python objects, which could run code, not only weights" in message


# ---- large pictures ----


def photo(path, size, orientation=None, **options):
    """Write a picture with a white rectangle at .25 to .5 of each side; returns its path."""
    pixels = np.full((size[1], size[0], 3), 40, np.uint8)
    pixels[size[1] // 4 : size[1] // 2, size[0] // 4 : size[0] // 2] = 255
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("size", [(4000, 3000), (1700, 2300), (1024, 751)])
def test_a_large_picture_is_kept_small_and_its_parts_stay_where_they_are(tmp_path, ending, size):
    path = photo(tmp_path / f"a.{ending}", size)
    image, full_size = ssd.open_small(path, size)
    assert full_size == size
    assert min(image.size) == ssd.LARGE_SIDE
    assert np.asarray(image).nbytes <= 3_000_000
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 150)
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(np.array(edges) / (image.size * 2), [0.25, 0.25, 0.5, 0.5], atol=0.002)


def test_a_small_picture_is_read_as_before(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (750, 1000, 3), np.uint8)).save(tmp_path / "a.jpg")
    small = ssd.open_small(tmp_path / "a.jpg").image
    np.testing.assert_array_equal(np.asarray(small), np.asarray(Image.open(tmp_path / "a.jpg")))


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("is_stored", [False, True])
def test_a_large_turned_photo_is_read_as_its_annotation_means_it(tmp_path, orientation, is_stored):
    path = photo(tmp_path / "a.jpg", (2000, 1600), orientation)
    full = ssd.open_image(path, (2000, 1600) if is_stored else None)
    small, full_size = ssd.open_small(path, full.size)
    assert full_size == full.size
    reduced = np.asarray(full.resize(small.size, Image.Resampling.BOX), dtype=float)
    assert np.abs(reduced - np.asarray(small, dtype=float)).mean() < 1
    with pytest.raises(ssd.InputError, match="2000x1601"):
        ssd.open_small(path, (2000, 1601))


def test_boxes_of_a_large_photo_are_in_its_own_pixels(tmp_path):
    torch.manual_seed(0)
    detector = ssd.Detector(ssd.SSD300(1, width=0.0625), ["cat"])
    path = photo(tmp_path / "a.jpg", (2400, 1800))
    found = detector.predict(str(path), score_thresh=0.0, max_detections=50)
    assert found.boxes_px.max() > 1800
    whole = detector.predict(Image.open(path), score_thresh=0.0, max_detections=50)
    np.testing.assert_allclose(found.boxes_px[0], whole.boxes_px[0], atol=12)  # decoded otherwise
    assert found.draw(str(path)).size == (2400, 1800)


def test_the_memory_of_decoded_images_is_known_before(tmp_path):
    root = write(tmp_path, ["a.png"], {"train": ["a"]})
    photo(root / "JPEGImages" / "a.png", (2000, 1500))
    (root / "Annotations" / "a.xml").write_text(f"<annotation>{OBJECT.format('cat')}</annotation>")
    (record,) = load(root).train
    assert (record.width, record.height) == (2000, 1500)
    assert ssd.decoded_bytes([record, record]) == 2 * record.read().nbytes == 2 * 3 * 750 * 1000
    assert ssd.decoded_bytes([]) == 0
