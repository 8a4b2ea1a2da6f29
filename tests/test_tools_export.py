"""ssd_tools/export.py: ONNX against PyTorch, the Hugging Face folder there and back."""

import base64
import contextlib
import http.server
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import ssd_object_detection as ssd

ROOT = Path(__file__).resolve().parent.parent
onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("safetensors")
hub = pytest.importorskip("huggingface_hub")

from ssd_tools import export, predict  # noqa: E402

THRESH = "0.001"  # a network trained for two epochs is sure of nothing


@pytest.fixture(scope="module")
def model(tiny_run):
    return ssd.model_from_checkpoint(ssd.load_checkpoint(tiny_run.final))


@pytest.fixture(scope="module")
def onnx_file(tiny_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    assert export.main(["onnx", str(tiny_run.final), "--output", str(path), "--score-thresh", THRESH]) == 0
    return path


@pytest.fixture(scope="module")
def hf_folder(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    argv = ["hf", str(tiny_run.final), str(folder), "--license", "cc-by-4.0", "--data-license", "drawn: free"]
    assert export.main(argv) == 0
    return folder


@pytest.fixture
def refused(capsys):
    """A function that runs the tool, demands exit code 2 and one line, and returns it."""

    def run(*argv):
        capsys.readouterr()
        assert export.main([str(a) for a in argv]) == 2
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


# ---- ONNX ----


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
    argv = ["onnx", str(tiny_run.final), "--output", str(path), "--score-thresh", THRESH]
    assert export.main([*argv, "--input", "float32", "--max-detections", "30", "--images", *images]) == 0
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
    argv = ["onnx", str(tmp_path / "loose.pth"), "--score-thresh", ".02", "--images", str(image)]
    counts = []
    for flags, nms_iou in (([], 0.9), (["--nms-iou", ".2"], 0.2)):
        assert export.main([*argv, *flags]) == 0
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
    graph = export.postprocess_graph(num_classes, num_anchors, **settings).SerializeToString()
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
    monkeypatch.setattr(export, "to_onnx", lambda *model, **settings: onnx.load(onnx_file))
    other = torch.load(tiny_run.final, weights_only=True)
    other["model"][head][::3] += by  # what PyTorch finds is no longer what the file finds
    torch.save(other, tmp_path / "other.pth")
    where = ("--output", tmp_path / "bad.onnx", "--score-thresh", THRESH)
    message = refused("onnx", tmp_path / "other.pth", *where)
    assert "refused, ONNX and PyTorch differ" in message
    assert [p.name for p in tmp_path.iterdir()] == ["other.pth"]


def test_differences_by_hand():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40.0]])
    labels, scores = np.array([1, 2]), np.array([0.9, 0.5])
    ours = boxes, labels, scores
    differ = export.largest_differences
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
    assert "none.pth" in refused("onnx", tmp_path / "none.pth")
    assert "broken.jpg" in refused("onnx", tiny_run.final, "--images", tmp_path / "broken.jpg")
    away = torch.load(tiny_run.final, weights_only=True)
    away["args"]["data"] = str(tmp_path / "gone")
    torch.save(away, tmp_path / "away.pth")
    assert "--images" in refused("onnx", tmp_path / "away.pth")
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "__version__", "1.24.4")
        assert "--upgrade onnxruntime" in refused("onnx", tiny_run.final, "--int8")
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", lambda *_, **__: importlib.import_module("onnxscript.torch_3"))
        assert "no module named 'onnxscript.torch_3': pip install" in refused("onnx", tiny_run.final).lower()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install onnx" in refused("onnx", tiny_run.final)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refused("hf", tiny_run.final, tmp_path / "out")


# ---- smaller files ----


@pytest.fixture(scope="module")
def smaller(tiny_run, tmp_path_factory):
    """Files {"half", "int8": path} with what was printed, {path: text}."""
    folder, files, printed = tmp_path_factory.mktemp("smaller"), {}, {}
    shutil.copy(tiny_run.final, folder / "tiny.pth")
    for name in ("half", "int8"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            # .05: 2 epochs make a network whose few right boxes are as good as random
            argv = ["onnx", str(folder / "tiny.pth"), f"--{name}", "--score-thresh", THRESH]
            assert export.main([*argv, "--max-map-drop", ".05"]) == 0
        files[name] = folder / f"tiny_{name}.onnx"
        printed[name] = out.getvalue()
    return files, printed


def test_smaller_files_are_smaller_and_find_nearly_the_same(smaller, onnx_file, model, tiny_voc):
    files, _ = smaller
    size = onnx_file.stat().st_size
    graph_size = 200_000  # what is no weight
    assert files["half"].stat().st_size < 0.5 * size + graph_size
    assert files["int8"].stat().st_size < 0.25 * size + 2 * graph_size
    picture = np.asarray(ssd.open_image(tiny_voc / "JPEGImages" / "test_0.jpg"))
    _, _, scores = export.find_objects(session_of(onnx_file), picture)
    for name, tolerance in (("half", 0.002), ("int8", 0.05)):
        found = export.find_objects(session_of(files[name]), picture)
        assert abs(found[2][:20] - scores[:20]).max() < tolerance
        assert len(found[1]) > 20


def test_what_is_reduced_are_the_convolutions(smaller):
    half, int8 = (onnx.load(smaller[0][name]).graph for name in ("half", "int8"))
    kinds = {weight.name: weight.data_type for weight in half.initializer}
    weights = [node.input[1] for node in half.node if node.op_type == "Conv"]
    assert len(weights) == 33
    assert {kinds[name] for name in weights} == {onnx.TensorProto.FLOAT16}
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
    for name, path in smaller[0].items():
        value = export.onnx_map(session_of(path), test, 2)
        line, written = smaller[1][name].splitlines()
        assert line.startswith(f"mAP@.5 {value:.4f} in 4 test images, ")
        assert line.endswith(f"from PyTorch's {theirs:.4f}")
        assert written == str(path)


def test_the_map_of_a_file_is_what_evaluate_measures(onnx_file, model, tiny_voc):
    records = ssd.load_data(str(tiny_voc), val_fraction=0).train
    dataset = ssd.VocDataset(records, ssd.build_transform(train=False), model.anchors)
    expected = ssd.evaluate(model, ssd.make_loader(dataset), score_thresh=float(THRESH))["map_area"]
    assert export.onnx_map(session_of(onnx_file), records, 2) == pytest.approx(expected, abs=1e-6)
    assert expected > 0


def test_a_file_that_loses_map_is_refused_and_not_left(tiny_run, tmp_path, refused, monkeypatch):
    shutil.copy(tiny_run.final, tmp_path / "tiny.pth")
    maps = iter([0.485, 0.495])
    monkeypatch.setattr(export, "onnx_map", lambda *args: next(maps))
    monkeypatch.setattr(ssd, "evaluate", lambda *args, **more: {"map_area": 0.5})
    line = refused("onnx", tmp_path / "tiny.pth", "--half")
    assert "mAP@.5 0.4850 in 4 test images, -0.0150 from PyTorch's 0.5000" in line
    assert "--max-map-drop allows 0.01" in line
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.pth"]
    assert export.main(["onnx", str(tmp_path / "tiny.pth"), "--half"]) == 0  # .005 lower
    assert (tmp_path / "tiny_half.onnx").is_file()


def test_the_lists_are_those_of_the_run_unless_others_are_named(tiny_run, make_voc, tmp_path, refused):
    checkpoint = ssd.load_checkpoint(tiny_run.final)

    def names(*lists):
        return [sorted({record.image_id.split("_")[0] for record in records}) for records in lists]

    assert names(*export.run_lists(checkpoint)) == [["val"], ["test"]]
    bare = make_voc(tmp_path / "bare", {"val": 1, "test": 2}, empty_every=0)
    (bare / "Annotations" / "test_1.xml").unlink()
    negative = checkpoint | {"args": checkpoint["args"] | {"unlabelled": "negative"}}
    assert len(export.run_lists(negative, str(bare))[1]) == 2
    calibration, test = export.run_lists(checkpoint, test_split="train", max_images=3)
    assert (names(calibration, test), len(test)) == ([["val"], ["train"]], 3)
    other = make_voc(tmp_path / "other", {"train": 2, "val": 2, "empty": 1}, empty_every=3)
    calibration, _ = export.run_lists(checkpoint, str(other), "val")
    assert Path(calibration[0].image_path).is_relative_to(other)
    assert "--test-split" in refused("onnx", tiny_run.final, "--int8", "--data", other)
    make_voc(tmp_path / "none", {"train": 1, "val": 1, "test": 1}, empty_every=1)
    half = ("onnx", tiny_run.final, "--half", "--data")
    assert "no object of the model's classes" in refused(*half, tmp_path / "none")
    assert "no folder" in refused(*half, tmp_path / "nowhere")


def test_batch_norm_is_folded(tiny_run, onnx_file):
    assert ssd.load_checkpoint(tiny_run.final)["config"]["batch_norm"] == "all"
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(onnx_file).graph.node}


# ---- the Hugging Face folder ----


def test_the_folder_detects_as_the_checkpoint_does(hf_folder, tiny_run, tiny_voc, tmp_path):
    picture = str(tiny_voc / "JPEGImages" / "test_1.jpg")
    found = []
    for weights in (hf_folder, tiny_run.final):
        flags = ["--weights", str(weights), "--output-dir", str(tmp_path), "--device", "cpu", "--amp", "off"]
        for thresh in ([], ["--score-thresh", "0"]):
            assert predict.main([picture, *flags, *thresh]) == 0
            found.append(json.loads((tmp_path / "plots" / "predictions" / "predictions.json").read_text()))
    assert found[:2] == found[2:]
    assert len(found[1][picture]["labels"]) > max(20, len(found[0][picture]["labels"]))
    assert {p.name for p in hf_folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "plots",
        "ssd_object_detection.py",
    }
    assert (hf_folder / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_folder_becomes_a_checkpoint_that_is_measured_and_trained_further(
    hf_folder, tiny_run, tmp_path, capsys, no_pictures
):
    path = tmp_path / "back.pth"
    assert export.main(["pth", str(hf_folder), str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    back, first = ssd.load_checkpoint(path), ssd.load_checkpoint(tiny_run.final)
    assert back["model"].keys() == first["model"].keys()
    assert all(torch.equal(value, first["model"][name]) for name, value in back["model"].items())
    assert [back[name] for name in ("classes", "score_thresh")] == [first["classes"], first["score_thresh"]]
    flags = [
        "--data",
        str(tiny_run.data),
        "--device",
        "cpu",
        "--amp",
        "off",
        "--workers",
        "0",
        "--output-dir",
    ]
    assert ssd.main(["--evaluate", str(path), *flags, str(tmp_path / "a")]) == 0
    measured = json.loads((tmp_path / "a" / "plots" / "evaluation" / "evaluation.json").read_text())
    assert measured["map_area"] == first["test"]["map_area"]
    assert ssd.main(["--init-from", str(path), "--epochs", "1", *flags, str(tmp_path / "b")]) == 0
    assert "it knows angular, round" in capsys.readouterr().out


def test_the_config_is_complete_and_names_no_folder_of_the_author(hf_folder, tiny_run, tiny_voc):
    text = (hf_folder / "config.json").read_text(encoding="utf-8")
    config, checkpoint = json.loads(text), ssd.load_checkpoint(tiny_run.final)
    assert config["id2label"] == {"1": "angular", "2": "round"}
    assert config["config"] == json.loads(json.dumps(checkpoint["config"]))
    assert config["score_thresh"] == checkpoint["score_thresh"]
    assert config["test"]["map_area"] == checkpoint["test"]["map_area"]
    assert config["test"]["data"] == config["flags"]["data"] == tiny_voc.name
    assert config["flags"]["epochs"] == 2
    assert str(tiny_voc) not in text
    assert str(tiny_run.output) not in text


def test_the_card_tells_what_the_run_recorded(hf_folder, tiny_run, tiny_voc):
    card = (hf_folder / "README.md").read_text(encoding="utf-8")
    test = ssd.load_checkpoint(tiny_run.final)["test"]
    data = hub.ModelCard(card).data
    assert (data.license, data.pipeline_tag) == ("cc-by-4.0", "object-detection")
    assert [(e.metric_type, e.metric_value, e.dataset_split) for e in data.eval_results] == [
        ("mAP", round(test[key], 4), "test") for key in ("map_area", "map11", "map75")
    ]
    for name, row in test["per_class"].items():
        aps = " | ".join(f"{row[key]:.4f}" for key in ("ap_area", "ap11", "ap75"))
        assert f"| {name} | {row['num_gt']} | {aps} |" in card
    assert f"**{test['map_area']:.4f}** (area)" in card
    assert "Training data: drawn: free" in card
    assert f"torch {torch.__version__}" in card
    assert str(tiny_voc.parent) not in card
    for line in card.splitlines():  # each picture named is there
        if line.startswith("!["):
            assert (hf_folder / line.split("](")[1].rstrip(")")).is_file()
    assert card.count("![") == len(list((hf_folder / "plots").iterdir())) > 2


def test_the_card_s_program_loads_the_model_in_the_folder(hf_folder, tiny_run, tiny_voc, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "downloaded")
    picture = shutil.copy(tiny_voc / "JPEGImages" / "test_1.jpg", folder / "picture.jpg")
    program = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        text=True,
        capture_output=True,
        check=True,
    )
    found = ssd.load_detector(tiny_run.final, "cpu", "off").predict(picture)
    assert len(found) > 0
    assert done.stdout.startswith(f"{found.names} {found.scores} ")


def test_a_folder_of_something_else_is_refused_and_one_of_its_own_renewed(tiny_run, tmp_path, refused):
    (tmp_path / "README.md").write_text("mine")
    assert "not of this program" in refused("hf", tiny_run.final, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    for _ in range(2):
        assert export.main(["hf", str(tiny_run.final), str(tmp_path / "out")]) == 0
        assert not (tmp_path / "out" / "model.onnx").exists()
        (tmp_path / "out" / "model.onnx").touch()  # of another model


def test_a_model_trained_further_says_so_and_names_no_folder(tiny_run, tmp_path, no_pictures):
    flags = [
        "--data",
        str(tiny_run.data),
        "--device",
        "cpu",
        "--amp",
        "off",
        "--workers",
        "0",
        "--epochs",
        "1",
    ]
    out = tmp_path / "secret"
    assert ssd.main([f"--init-from={tiny_run.final}", *flags, "--output-dir", str(out)]) == 0
    assert export.main(["hf", str(out / "checkpoints" / tiny_run.final.name), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert f"trained further from {tiny_run.final.name}" in card
    assert "list val chose the epoch" in card  # which no flag had named
    assert "from scratch" not in card
    for text in (card, (tmp_path / "hf" / "config.json").read_text(encoding="utf-8")):
        assert str(tiny_run.output.parent) not in text
        assert str(tmp_path) not in text


def test_a_model_with_anchors_of_its_own_comes_back(tiny_run, tmp_path):
    config = {"num_classes": 2, "width": 0.0625, "batch_norm": "none", "anchor_sizes": [[(0.1, 0.2)]] * 6}
    model = ssd.SSD300(**config)
    checkpoint = {**ssd.load_checkpoint(tiny_run.final), "config": config, "model": model.state_dict()}
    ssd.save_checkpoint(tmp_path / "own.pth", checkpoint)
    assert export.main(["hf", str(tmp_path / "own.pth"), str(tmp_path / "out")]) == 0
    back = ssd.model_from_checkpoint(export.load_weights(tmp_path / "out"))
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in model.state_dict().items())
    assert len(back.anchors) == sum(cells * cells for cells in ssd.FEATURE_MAPS)


def test_what_was_not_recorded_is_not_claimed(tiny_run, tmp_path):
    alone = torch.load(tiny_run.final, weights_only=True)
    del alone["test"]
    (tmp_path / "x").mkdir()
    torch.save(alone, tmp_path / "x" / "alone.pth")
    assert export.main(["hf", str(tmp_path / "x" / "alone.pth"), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Not yet measured" in card
    assert "Machine: not recorded." in card
    assert "Weights: not stated. Training data: not stated." in card
    assert not {"**", "model-index", "![", "license:", "None"} & set(card.replace("\n", " ").split(" "))
    assert not (tmp_path / "out" / "plots").exists()


# ---- what others exported ----


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ssd.InputError, match=r"^reading x needs the package safetensors: pip install safet"):
        export.optional_import("safetensors.torch", "reading x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"lacks config\.json and model\.safetensors"),
        ({"config.json": "{}"}, r"lacks model\.safetensors"),
        ({"config.json": "{", "model.safetensors": "x"}, "not a model of this module"),
        ({"config.json": "{}", "model.safetensors": "x"}, "not a model of this module"),
        (
            {"config.json": '{"format_version": 2}', "model.safetensors": "x"},
            f"format 2, this program reads {ssd.FORMAT_VERSION}",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ssd.InputError, match=message) as caught:
        export.load_weights(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["checkpoints/none.pth", "none.pth", "deep/er/none", "none"])
def test_a_missing_file_is_not_looked_for_on_the_network(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ssd.InputError, match="no such file"):
        export.load_weights(missing)


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the Hugging Face hub that an upload and a download need; `files` are kept."""

    files, log = {}, []

    def reply(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.log.append(("POST", self.path, self.headers.get("Authorization")))
        if "forbidden" in self.path or b"forbidden" in body:
            return self.reply({"error": "no"}, 403)
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.reply({"error": "who are you"}, 401)
        if self.path.endswith("/repos/create"):
            return self.reply({"url": f"http://{self.headers['Host']}/me/tiny", "id": "me/tiny"})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return self.reply({"files": [{"path": path, **regular} for path in paths]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/me/tiny/commit/c"
            return self.reply({"commitOid": "c" * 40, "commitUrl": url})
        return self.reply({"errors": [], "warnings": []})  # the check of the card's header

    def do_GET(self):
        self.log.append((self.command, self.path, self.headers.get("Authorization")))
        name = self.path.split("/resolve/")[-1].split("/", 1)[-1]
        if self.path.startswith("/me/tiny/resolve/") and name in self.files:
            content = self.files[name]
            etag = f'"{hash(content)}"'
            return self.reply(content, ETag=etag, X_Repo_Commit="c" * 40, Accept_Ranges="bytes")
        if self.path.startswith("/api/models/me/tiny/tree/"):
            sizes = {name: len(content) for name, content in self.files.items()}
            more = {"type": "file", "oid": "a" * 40}
            return self.reply([{"path": name, "size": size, **more} for name, size in sizes.items()])
        if self.path.startswith("/api/models/me/tiny"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            more = {"sha": "c" * 40, "private": False, "tags": []}
            return self.reply({"id": "me/tiny", "siblings": siblings, **more})
        return self.reply({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


PUSH_AND_LOAD = """
import json, os, sys
import ssd_object_detection as ssd
from ssd_tools import export
folder, picture = sys.argv[1:]
pairs = ("bad", "me/tiny"), ("good", "forbidden/tiny"), ("good", "not a name"), ("good", "me/tiny")
for token, repo in pairs:
    os.environ["HF_TOKEN"] = "hf_" + token
    try:
        print(json.dumps(export.push(folder, repo)))
    except ssd.InputError as error:
        print(json.dumps(f"refused: {error}"))
checkpoint = export.load_weights("me/tiny")
detector = ssd.Detector(ssd.model_from_checkpoint(checkpoint), checkpoint["classes"])
print(json.dumps(detector.predict(picture, score_thresh=0.0).to_dict()))
try:
    export.load_weights("me/other")
except ssd.InputError as error:
    print(json.dumps(str(error)))
"""


def test_a_pushed_model_comes_back_from_the_hub(hf_folder, tiny_run, tiny_voc, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    picture = str(tiny_voc / "JPEGImages" / "test_1.jpg")
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
    }
    argv = [sys.executable, "-c", PUSH_AND_LOAD, str(hf_folder), picture]
    try:
        done = subprocess.run(argv, env=environment, text=True, capture_output=True, timeout=240)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, (done.stderr, Hub.log)
    bad_token, forbidden, bad_name, url, found, missing = map(json.loads, done.stdout.splitlines())
    assert "the token is not valid" in bad_token
    assert "the token may not write there" in forbidden
    assert bad_name.startswith("refused: --push not a name")
    assert url.endswith("/me/tiny/commit/c")
    files = {p.relative_to(hf_folder).as_posix() for p in hf_folder.rglob("*") if p.is_file()}
    assert Hub.files.keys() == files
    detector = ssd.load_detector(tiny_run.final, "cpu", "off")
    assert found == detector.predict(picture, score_thresh=0.0).to_dict()
    assert missing.startswith("me/other: no such file or folder, nor on Hugging Face")
    assert all("\n" not in text for text in (bad_token, forbidden, bad_name, missing))


def test_pushing_without_a_login_or_a_network_is_one_line(hf_folder, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ssd.InputError, match="not logged in"):
        export.push(hf_folder, "me/tiny")
    monkeypatch.setattr(hub, "get_token", lambda: "hf_good")
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ssd.InputError, match="--push me/tiny: ") as caught:
        export.push(hf_folder, "me/tiny")
    assert "\n" not in str(caught.value)
