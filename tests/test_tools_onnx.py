"""ssd_tools/onnx.py: ONNX against PyTorch, detection by detection and by mAP; smaller files."""

import contextlib
import importlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ssd_object_detection as ssd

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from ssd_tools import common  # noqa: E402
from ssd_tools import onnx as tool  # noqa: E402

THRESH = "0.001"  # a network trained for two epochs is sure of nothing


@pytest.fixture(scope="module")
def model(tiny_run):
    return ssd.model_from_checkpoint(ssd.load_checkpoint(tiny_run.final))


@pytest.fixture(scope="module")
def onnx_file(tiny_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    assert tool.main([str(tiny_run.final), "--output", str(path), "--score-thresh", THRESH]) == 0
    return path


@pytest.fixture
def refused(capsys):
    """A function that runs the tool, demands exit code 2 and one line, and returns it."""

    def run(*argv):
        capsys.readouterr()
        assert tool.main([str(a) for a in argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


def session_of(path):
    source = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])


def rows_of(outputs, image):
    """Return boxes, labels, scores of one image of the ONNX outputs, empty rows cut off."""
    boxes, scores, labels = (output[image] for output in outputs)
    count = int((labels > 0).sum())
    assert (labels[:count] > 0).all()  # the empty rows are the last
    assert not boxes[count:].any()
    assert not scores[count:].any()
    assert (np.diff(scores) <= 0).all()
    return boxes[:count], labels[:count], scores[:count]


# ---- a file ----


def test_the_file_finds_what_pytorch_finds_whatever_the_batch(onnx_file, model, tiny_voc):
    paths = sorted((tiny_voc / "JPEGImages").glob("*.jpg"))[:5]
    resize = ssd.resize_transform()
    images = np.stack([resize(image=np.asarray(ssd.open_image(p)))["image"] for p in paths]).transpose(
        0, 3, 1, 2
    )
    with torch.inference_mode():
        expected = ssd.detect(*model(torch.from_numpy(images)), model.anchors, score_thresh=float(THRESH))
    for size in (1, 3, 5):
        outputs = session_of(onnx_file).run(["boxes", "scores", "labels"], {"images": images[:size]})
        assert outputs[0].shape == (size, ssd.MAX_DETECTIONS, 4)
        for i, (boxes, labels, scores) in enumerate(expected[:size]):
            found = rows_of(outputs, i)
            assert len(found[1]) == len(labels) > 20
            assert found[1].tolist() == labels.tolist()
            np.testing.assert_allclose(found[0], boxes, atol=1e-4)
            np.testing.assert_allclose(found[2], scores, atol=1e-5)


def test_the_file_says_what_it_takes_and_knows_its_classes(onnx_file):
    session = session_of(onnx_file)
    (images,) = session.get_inputs()
    assert (images.name, images.type) == ("images", "tensor(uint8)")
    assert images.shape[1:] == [3, 300, 300]
    assert isinstance(images.shape[0], str)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["angular", "round"]
    assert [output.name for output in session.get_outputs()] == ["boxes", "scores", "labels"]


def test_a_float_file_gives_the_same(tiny_run, onnx_file, tmp_path, tiny_voc, capsys):
    path = tmp_path / "float.onnx"
    images = sorted(str(p) for p in (tiny_voc / "JPEGImages").glob("test_*.jpg"))
    argv = [str(tiny_run.final), "--output", str(path), "--score-thresh", THRESH]
    assert tool.main([*argv, "--input", "float32", "--max-detections", "30", "--images", *images]) == 0
    assert "120 detections in 4 images" in capsys.readouterr().out
    resized = [np.asarray(ssd.open_image(p).resize((300, 300))) for p in images]
    pixels = np.stack(resized).transpose(0, 3, 1, 2)
    small = session_of(path).run(None, {"images": pixels.astype(np.float32)})
    for ours, theirs in zip(small, session_of(onnx_file).run(None, {"images": pixels}), strict=True):
        np.testing.assert_allclose(ours, theirs[:, :30], atol=1e-4)


def test_the_graph_has_the_run_s_suppression_unless_another_is_given(tiny_run, tmp_path, capsys):
    saved = torch.load(tiny_run.final, weights_only=True)
    saved["args"]["nms_iou"] = 0.9
    torch.save(saved, tmp_path / "loose.pth")
    image = tiny_run.data / "JPEGImages" / "test_0.jpg"
    detector = ssd.load_detector(tiny_run.final, "cpu", "off")
    argv = [str(tmp_path / "loose.pth"), "--score-thresh", ".02", "--images", str(image)]
    counts = []
    for flags, nms_iou in (([], 0.9), (["--nms-iou", ".2"], 0.2)):
        assert tool.main([*argv, *flags]) == 0
        counts.append(len(detector.predict(image, score_thresh=0.02, nms_iou_thresh=nms_iou)))
        assert f"{counts[-1]} detections in 1 images" in capsys.readouterr().out
    assert counts[0] > counts[1] > 0


@pytest.mark.parametrize("num_anchors", [60, 700])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score_thresh": 0.0},
        {"score_thresh": 0.3, "nms_iou_thresh": 0.7},
        {"max_detections": 7},
        {"nms_iou_thresh": 0.0},
    ],
)
def test_the_graph_after_the_network_is_detect(num_anchors, settings):
    torch.manual_seed(num_anchors)
    batch, num_classes = 3, 4
    cls_logits = torch.randn(batch, num_anchors, num_classes + 1) * 2
    box_deltas = torch.randn(batch, num_anchors, 4)
    cls_logits[2, :, 0] += 30  # an image without a detection
    # Anchors at the border: some boxes lose their area when they are cut there.
    anchors = torch.rand(num_anchors, 4) * 0.3 + torch.tensor([-0.1, 0.4, 0.02, 0.02])
    boxes = ssd.decode(box_deltas, anchors).clamp(0, 1)
    assert (boxes[..., 0] == boxes[..., 2]).any()
    graph = tool.postprocess_graph(num_classes, num_anchors, **settings).SerializeToString()
    class_scores = cls_logits.softmax(-1)[..., 1:].transpose(1, 2).contiguous()
    inputs = {"class_scores": class_scores.numpy(), "anchor_boxes": boxes.numpy()}
    outputs = session_of(graph).run(None, inputs)
    for i, (boxes_, labels, scores) in enumerate(ssd.detect(cls_logits, box_deltas, anchors, **settings)):
        found = rows_of(outputs, i)
        assert found[1].tolist() == labels.tolist()
        np.testing.assert_allclose(found[0], boxes_, atol=1e-6)
        np.testing.assert_allclose(found[2], scores, atol=1e-6)
        assert len(labels) > 0 or (i == 2 and settings != {"score_thresh": 0.0})


@pytest.mark.parametrize(("head", "by"), [("box_heads.1.bias", 0.5), ("cls_heads.1.bias", 0.2)])
def test_a_file_that_differs_from_pytorch_is_refused_and_not_left(
    tiny_run, onnx_file, tmp_path, monkeypatch, refused, head, by
):
    monkeypatch.setattr(tool, "to_onnx", lambda *model, **settings: onnx.load(onnx_file))
    other = torch.load(tiny_run.final, weights_only=True)
    other["model"][head][::3] += by  # what PyTorch finds is no longer what the file finds
    torch.save(other, tmp_path / "other.pth")
    where = ("--output", tmp_path / "bad.onnx", "--score-thresh", THRESH)
    message = refused(tmp_path / "other.pth", *where)
    assert "refused, ONNX and PyTorch differ" in message
    assert [p.name for p in tmp_path.iterdir()] == ["other.pth"]


def test_differences_by_hand():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40.0]])
    labels, scores = np.array([1, 2]), np.array([0.9, 0.5])
    ours = boxes, labels, scores
    differ = tool.largest_differences
    assert differ(ours, ours) == (0, 0, 0)
    turned = boxes[::-1] + np.array([0, 0.25, 0, 0]), labels[::-1], np.array([0.5, 0.875])
    np.testing.assert_allclose(differ(ours, turned), (0, 0.25, 0.025))
    assert differ(ours, (boxes, np.array([1, 1]), scores))[0] == 2  # one too few, one too many
    assert differ(ours, (boxes + 6, labels, scores))[0] == 4  # other objects
    assert differ(ours, tuple(column[:1] for column in ours))[0] == 1
    assert differ(tuple(column[:0] for column in ours), ours) == (2, 0, 0)
    twice = tuple(np.repeat(column[:1], 2, axis=0) for column in ours)
    assert differ(twice, ours)[0] == 2  # no row is a partner twice


def test_mistakes_are_one_line(tiny_run, tmp_path, refused, monkeypatch):
    assert "none.pth" in refused(tmp_path / "none.pth")
    assert "broken.jpg" in refused(tiny_run.final, "--images", tmp_path / "broken.jpg")
    away = torch.load(tiny_run.final, weights_only=True)
    away["args"]["data"] = str(tmp_path / "gone")
    torch.save(away, tmp_path / "away.pth")
    assert "--images" in refused(tmp_path / "away.pth")
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "__version__", "1.24.4")
        assert "--upgrade onnxruntime" in refused(tiny_run.final, "--int8")
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", lambda *_, **__: importlib.import_module("onnxscript.torch_3"))
        assert "no module named 'onnxscript.torch_3': pip install" in refused(tiny_run.final).lower()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install onnx" in refused(tiny_run.final)


# ---- smaller files ----


@pytest.fixture(scope="module")
def smaller(tiny_run, tmp_path_factory):
    """The path of a file of 8-bit integers, and what was printed when it was made."""
    folder = tmp_path_factory.mktemp("smaller")
    shutil.copy(tiny_run.final, folder / "tiny.pth")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        # .05: 2 epochs make a network whose few right boxes are as good as random
        argv = [str(folder / "tiny.pth"), "--int8", "--score-thresh", THRESH]
        assert tool.main([*argv, "--max-map-drop", ".05"]) == 0
    return folder / "tiny_int8.onnx", out.getvalue()


def test_a_smaller_file_is_smaller_and_finds_nearly_the_same(smaller, onnx_file, model, tiny_voc):
    path, _ = smaller
    size = onnx_file.stat().st_size
    graph_size = 200_000  # what is no weight
    assert path.stat().st_size < 0.25 * size + 2 * graph_size
    picture = np.asarray(ssd.open_image(tiny_voc / "JPEGImages" / "test_0.jpg"))
    _, _, scores = tool.find_objects(session_of(onnx_file), picture, picture.shape[1::-1])
    found = tool.find_objects(session_of(path), picture, picture.shape[1::-1])
    assert abs(found[2][:20] - scores[:20]).max() < 0.05
    assert len(found[1]) > 20


def test_what_is_reduced_are_the_convolutions(smaller):
    int8 = onnx.load(smaller[0]).graph
    made_by = {name: node for node in int8.node for name in node.output}
    convolutions = [node for node in int8.node if node.op_type == "Conv"]
    assert len(convolutions) == 33
    for node in convolutions:
        image, weight = (made_by[name] for name in node.input[:2])
        assert image.op_type == weight.op_type == "DequantizeLinear"
    scales = {value.name: value for value in int8.initializer}
    channels = scales[made_by[convolutions[0].input[1]].input[1]].dims
    assert list(channels) == [8]  # one for each output channel


def test_the_loss_of_map_is_measured_on_the_test_list(smaller, tiny_run, tiny_voc):
    test = ssd.load_data(str(tiny_voc), val_split="val").test
    theirs = ssd.load_checkpoint(tiny_run.final)["test"]["map_area"]
    path, printed = smaller
    value = tool.onnx_map(session_of(path), test, 2)
    line, written, check_set = printed.splitlines()
    assert line.startswith(f"mAP@.5 {value:.4f} in 4 test images, ")
    assert line.endswith(f"from PyTorch's {theirs:.4f}")
    assert written == str(path)
    assert Path(check_set) == path.with_name("tiny_check.npz")


def test_the_map_of_a_file_is_what_evaluate_measures(onnx_file, model, tiny_voc):
    records = ssd.load_data(str(tiny_voc), val_fraction=0).train
    loader = ssd.plain_loader(records, model, batch_size=1, workers=0)
    expected = ssd.measure(model, loader, score_thresh=float(THRESH))["map_area"]
    assert tool.onnx_map(session_of(onnx_file), records, 2) == pytest.approx(expected, abs=1e-6)
    assert expected > 0


def test_a_file_that_loses_map_is_refused_and_not_left(tiny_run, tmp_path, refused, monkeypatch):
    blind = torch.load(tiny_run.final, weights_only=True)
    for name, value in blind["model"].items():
        if name.startswith("cls_heads.") and name.endswith(".bias"):
            value.view(-1, 3)[:, 0] += 30  # all is background
    torch.save(blind, tmp_path / "blind.pth")
    assert tool.main([str(tmp_path / "blind.pth"), "--score-thresh", THRESH]) == 0
    file_of_nothing = onnx.load(tmp_path / "blind.onnx")
    monkeypatch.setattr(tool, "to_onnx", lambda *model, **settings: file_of_nothing)
    theirs = ssd.load_checkpoint(tiny_run.final)["test"]["map_area"]
    where = ("--output", tmp_path / "int8.onnx", "--score-thresh", THRESH)
    command = (tiny_run.final, "--int8", *where, "--max-map-drop")
    line = refused(*command, 0)
    assert f"mAP@.5 0.0000 in 4 test images, -{theirs:.4f} from PyTorch's {theirs:.4f}" in line
    assert "--max-map-drop allows 0" in line
    assert {path.name for path in tmp_path.iterdir()} == {"blind.pth", "blind.onnx", "blind_check.npz"}
    assert tool.main([*map(str, command), "1"]) == 0
    assert (tmp_path / "int8.onnx").is_file()


def test_the_lists_are_those_of_the_run_unless_others_are_named(tiny_run, make_voc, tmp_path, refused):
    def lists(*flags, max_images=None):
        settings, checkpoint = common.load_evaluation(tiny_run.final, list(map(str, flags)))
        classes = checkpoint["classes"]
        test = tool.records_to_measure(settings, classes, max_images)
        return tool.calibration_records(settings, classes), test

    def names(*lists):
        return [sorted({record.image_id.split("_")[0] for record in records}) for records in lists]

    assert names(*lists()) == [["val"], ["test"]]
    bare = make_voc(tmp_path / "bare", {"val": 1, "test": 2}, empty_every=0)
    (bare / "Annotations" / "test_1.xml").unlink()
    assert len(lists("--data", bare, "--unlabelled", "negative")[1]) == 2
    calibration, test = lists("--test-split", "train", max_images=3)
    assert (names(calibration, test), len(test)) == ([["val"], ["train"]], 3)
    other = make_voc(tmp_path / "other", {"train": 2, "val": 2, "empty": 1}, empty_every=3)
    calibration, _ = lists("--data", other, "--test-split", "val")
    assert Path(calibration[0].image_path).is_relative_to(other)
    assert "--test-split" in refused(tiny_run.final, "--int8", "--data", other)
    make_voc(tmp_path / "none", {"train": 1, "val": 1, "test": 1}, empty_every=1)
    int8 = (tiny_run.final, "--int8", "--data")
    assert "no object of the model's classes" in refused(*int8, tmp_path / "none")
    assert "no folder" in refused(*int8, tmp_path / "nowhere")


def test_batch_norm_is_folded(tiny_run, onnx_file):
    assert ssd.load_checkpoint(tiny_run.final)["config"]["batch_norm"] == "all"
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(onnx_file).graph.node}
