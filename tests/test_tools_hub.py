"""ssd_tools/hub.py: the folder for Hugging Face, its card, there and back; ssd_tools/weights.py reads it."""

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from reference import assert_same_predictions

import ssd_object_detection as ssd

pytest.importorskip("safetensors")
huggingface = pytest.importorskip("huggingface_hub")

from ssd_tools import common, hub, predict, weights  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def hf_folder(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    argv = [
        "export",
        str(tiny_run.final),
        str(folder),
        "--license",
        "cc-by-4.0",
        "--data-license",
        "drawn: free",
    ]
    assert hub.main(argv) == 0
    return folder


@pytest.fixture
def refused(capsys):
    """A function that runs the tool, demands exit code 2 and one line, and returns it."""

    def run(*argv):
        capsys.readouterr()
        assert hub.main([str(a) for a in argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


# ---- the folder ----


def test_the_folder_detects_as_the_checkpoint_does(hf_folder, tiny_run, tiny_voc, tmp_path):
    picture = str(tiny_voc / "JPEGImages" / "test_1.jpg")
    found = []
    for source in (hf_folder, tiny_run.final):
        flags = ["--weights", str(source), "--output-dir", str(tmp_path), "--device", "cpu", "--amp", "off"]
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
    assert hub.main(["pth", str(hf_folder), str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    back, first = ssd.load_checkpoint(path), ssd.load_checkpoint(tiny_run.final)
    names = ("classes", "score_thresh", "format_version", "version")
    assert back["model"].keys() == first["model"].keys()
    assert all(torch.equal(value, first["model"][name]) for name, value in back["model"].items())
    assert [back[name] for name in names] == [first[name] for name in names]
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
    assert "kept the heads of: angular, round" in capsys.readouterr().out


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
    data = huggingface.ModelCard(card).data
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
    assert "not of this program" in refused("export", tiny_run.final, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    for _ in range(2):
        assert hub.main(["export", str(tiny_run.final), str(tmp_path / "out")]) == 0
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
    assert hub.main(["export", str(out / "checkpoints" / tiny_run.final.name), str(tmp_path / "hf")]) == 0
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
    assert hub.main(["export", str(tmp_path / "own.pth"), str(tmp_path / "out")]) == 0
    back = ssd.model_from_checkpoint(weights.load_weights(tmp_path / "out"))
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in model.state_dict().items())
    assert len(back.anchors) == sum(cells * cells for cells in ssd.FEATURE_MAPS)


def test_what_was_not_recorded_is_not_claimed(tiny_run, tmp_path):
    alone = torch.load(tiny_run.final, weights_only=True)
    del alone["test"]
    (tmp_path / "x").mkdir()
    torch.save(alone, tmp_path / "x" / "alone.pth")
    assert hub.main(["export", str(tmp_path / "x" / "alone.pth"), str(tmp_path / "out")]) == 0
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
        common.optional_import("safetensors.torch", "reading x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"lacks config\.json and model\.safetensors"),
        ({"config.json": "{}"}, r"lacks model\.safetensors"),
        ({"config.json": "{", "model.safetensors": "x"}, "not a model of this module"),
        ({"config.json": "{}", "model.safetensors": "x"}, "not a model of this module"),
        (
            {"config.json": '{"format_version": 2}', "model.safetensors": "x"},
            f"of format 2, .* reads formats 4 to {ssd.FORMAT_VERSION}",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ssd.InputError, match=message) as caught:
        weights.load_weights(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["checkpoints/none.pth", "none.pth", "deep/er/none", "none"])
def test_a_missing_file_is_not_looked_for_on_the_network(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ssd.InputError, match="no such file"):
        weights.load_weights(missing)


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
from ssd_tools import hub, weights
folder, picture = sys.argv[1:]
pairs = ("bad", "me/tiny"), ("good", "forbidden/tiny"), ("good", "not a name"), ("good", "me/tiny")
for token, repo in pairs:
    os.environ["HF_TOKEN"] = "hf_" + token
    try:
        print(json.dumps(hub.push(folder, repo)))
    except ssd.InputError as error:
        print(json.dumps(f"refused: {error}"))
print(json.dumps(hub.push(folder, "me/tiny", space=True)))
checkpoint = weights.load_weights("me/tiny")
detector = ssd.Detector(ssd.model_from_checkpoint(checkpoint), checkpoint["classes"])
print(json.dumps(detector.predict(picture, score_thresh=0.0).to_dict()))
try:
    weights.load_weights("me/other")
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
    bad_token, forbidden, bad_name, url, _, found, missing = map(json.loads, done.stdout.splitlines())
    assert "the token is not valid" in bad_token
    assert "the token may not write there" in forbidden
    assert bad_name.startswith("refused: --push not a name")
    assert url.endswith("/me/tiny/commit/c")
    files = {p.relative_to(hf_folder).as_posix() for p in hf_folder.rglob("*") if p.is_file()}
    assert Hub.files.keys() == files
    uploads = [path for _, path, _ in Hub.log if "/commit/" in path]
    assert [path.split("/commit/")[0] for path in uploads] == ["/api/models/me/tiny", "/api/spaces/me/tiny"]
    detector = ssd.load_detector(tiny_run.final, "cpu", "off")
    assert_same_predictions(found, detector.predict(picture, score_thresh=0.0).to_dict())  # another process
    assert missing.startswith("me/other: no such file or folder, nor on Hugging Face")
    assert all("\n" not in text for text in (bad_token, forbidden, bad_name, missing))


def test_pushing_without_a_login_or_a_network_is_one_line(hf_folder, monkeypatch):
    monkeypatch.setattr(huggingface, "get_token", lambda: None)
    with pytest.raises(ssd.InputError, match="not logged in"):
        hub.push(hf_folder, "me/tiny")
    monkeypatch.setattr(huggingface, "get_token", lambda: "hf_good")
    monkeypatch.setattr(huggingface.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ssd.InputError, match="--push me/tiny: ") as caught:
        hub.push(hf_folder, "me/tiny")
    assert "\n" not in str(caught.value)
