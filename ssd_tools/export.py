"""Turn a checkpoint into an ONNX model, or into a folder for Hugging Face and back.

    python -m ssd_tools.export onnx checkpoints/ssd_shapes_final.pth         # beside it, checked on images
    python -m ssd_tools.export onnx checkpoints/ssd_shapes_final.pth --int8  # smaller, refused if mAP falls
    python -m ssd_tools.export hf checkpoints/ssd_shapes_final.pth exported/  # weights, config, card, plots
    python -m ssd_tools.export hf checkpoints/ssd_shapes_final.pth exported/ --onnx --push OWNER/NAME
    python -m ssd_tools.export pth OWNER/NAME model.pth                      # and back, to train or measure

The ONNX model takes images (B, 3, 300, 300), RGB, uint8 or float 0..255.
It returns boxes (B, D, 4), normalised xyxy, scores (B, D) and labels (B, D), best first after non-maximum
suppression; rows of label 0 are empty. Batch norm is folded into the convolutions. Class names, the score
threshold of each class and the image size are in its metadata: examples/detect_onnx.py needs nothing else.
Needs the packages onnx, onnxscript and onnxruntime, or safetensors; --push needs huggingface_hub.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import json
import logging
import re
import shutil
import sys
import tempfile
import types
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

import ssd_object_detection as ssd
from ssd_object_detection import InputError
from ssd_tools import report

BOX_TOLERANCE, SCORE_TOLERANCE = 0.5, 1e-3  # pixels of the image; how far ONNX and PyTorch may differ
FAR = 5.0  # pixels from which two boxes are of different objects
CALIBRATION_IMAGES = 32  # whose activations give the ranges of 8-bit integers
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "detect_onnx.py"
INT8_RUNTIME = (
    1,
    25,
)  # onnxruntime that multiplies rightly on any CPU: microsoft/onnxruntime pull request 27671
HUB_FILES = ("config.json", "model.safetensors")  # what `load_published` reads


def optional_import(name, purpose):
    """Return a module that only some uses need; InputError that names the pip command if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise InputError(f"{purpose} needs the package {package}: pip install {package}") from None


# ---- ONNX ----

# What `ssd.detect` does, as an ONNX graph; `postprocess_graph` fills in {...}. B images, K classes,
# A anchors, T candidates a class, D detections.
POSTPROCESS = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
postprocess (float[B, {K}, {A}] class_scores, float[B, {A}, 4] anchor_boxes)
    => (float[B, {D}, 4] boxes, float[B, {D}] scores, int64[B, {D}] labels)
    <int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] anchors = {{{A}}}, int64[1] top_k = {{{T}}},
     int64[1] max_detections = {{{D}}}, float score_thresh = {{{score_thresh}}},
     float[1] nms_iou_thresh = {{{nms_iou_thresh}}}, float none = {{-1.0}}, float zero = {{0.0}},
     float[1] zeros = {{0.0}}, int64 no_label = {{0}}, int64[2] row = {{0, -1}}>
{{
    top_scores, top_anchors = TopK <axis = 2> (class_scores, top_k)
    least = ReduceMin (top_scores, two)
    bar = Max (least, score_thresh)
    is_strong = GreaterOrEqual (class_scores, bar)
    low, high = Split <axis = 2, num_outputs = 2> (anchor_boxes)
    sides = Sub (high, low)
    side = ReduceMin <keepdims = 0> (sides, two)
    has_area = Greater (side, zero)
    has_area_k = Unsqueeze (has_area, one)
    is_candidate = And (is_strong, has_area_k)
    candidates = Where (is_candidate, class_scores, none)

    selected = NonMaxSuppression (anchor_boxes, candidates, top_k, nms_iou_thresh, zeros)
    selected_scores = GatherND (candidates, selected)
    shape = Shape (candidates)
    nothing = ConstantOfShape (shape)
    kept = ScatterND (nothing, selected, selected_scores)
    flat = Reshape (kept, row)
    scores, index = TopK <axis = 1> (flat, max_detections)

    is_found = Greater (scores, zero)
    label0 = Div (index, anchors)
    label = Add (label0, one)
    labels = Where (is_found, label, no_label)
    anchor = Mod (index, anchors)
    anchor_index = Unsqueeze (anchor, two)
    anchor_box = GatherND <batch_dims = 1> (anchor_boxes, anchor_index)
    is_found_box = Unsqueeze (is_found, two)
    boxes = Where (is_found_box, anchor_box, zero)
}}
"""


class _Scores(torch.nn.Module):
    """The network with class scores (B, K, A) and boxes (B, A, 4) as outputs, which POSTPROCESS takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        cls_logits, box_deltas = self.model(images)
        class_scores = F.softmax(cls_logits, dim=-1)[..., 1:].transpose(1, 2)
        return class_scores, ssd.decode(box_deltas, self.model.anchors).clamp(0, 1)


def postprocess_graph(
    num_classes,
    num_anchors,
    *,
    score_thresh=ssd.SCORE_THRESH,
    nms_iou_thresh=ssd.NMS_IOU_THRESH,
    max_detections=ssd.MAX_DETECTIONS,
    ir=10,
    opset=20,
):
    """Return what `ssd.detect` does after softmax and decoding as an ONNX model, see POSTPROCESS."""
    onnx = optional_import("onnx", "exporting to ONNX")
    values = {
        "K": num_classes,
        "A": num_anchors,
        "T": min(ssd.PRE_NMS_TOP_K, num_anchors),
        "D": min(max_detections, num_classes * num_anchors),
        "ir": ir,
        "opset": opset,
        "score_thresh": f"{max(score_thresh, 1e-30):.9e}",
        "nms_iou_thresh": f"{nms_iou_thresh:.9f}",
    }
    return onnx.parser.parse_model(POSTPROCESS.format(**values))


def to_half(model):
    """Return a copy of an SSD300 that convolves in float16; L2 norm and detection stay in float32."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.BatchNorm2d)):
            layer.half()
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].half(),))
    return model


def to_int8(network, pictures):
    """Return an ONNX network whose convolutions multiply 8-bit integers, in QDQ form.

    Weights have a scale for each output channel; the ranges of activations are those met in the pictures,
    arrays as the network takes them.
    """
    onnx = optional_import("onnx", "--int8")
    quantization = optional_import("onnxruntime.quantization", "--int8")
    version = optional_import("onnxruntime", "--int8").__version__
    if tuple(map(int, version.split(".")[:2])) < INT8_RUNTIME:
        raise InputError(
            f"--int8: onnxruntime {version} multiplies 8-bit integers wrongly on CPUs with AMX or "
            "AVX-VNNI: pip install --upgrade onnxruntime"
        )
    inputs = ({"images": picture} for picture in pictures)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        logging.disable(logging.WARNING)  # it advises a preparation that the exporter has done
        quantization.quantize_static(
            network,
            path,
            types.SimpleNamespace(get_next=lambda: next(inputs, None)),
            per_channel=True,
            op_types_to_quantize=["Conv", "Relu", "MaxPool"],  # L2 norm and detection stay in float
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        logging.disable(logging.NOTSET)
        return onnx.load(path)


def to_onnx(detector, *, dtype="uint8", half=False, calibration=None, **settings):
    """Return the ONNX model (a protocol buffer) of a Detector, with detection in its graph.

    dtype: "uint8" or "float32", that of its input; half: see `to_half`; calibration: pictures for `to_int8`;
    settings: of `ssd.detect`. Class names and their thresholds are in its metadata.
    """
    onnx = optional_import("onnx", "exporting to ONNX")
    optional_import("onnxscript", "exporting to ONNX")
    images = torch.zeros(2, 3, ssd.IMAGE_SIZE, ssd.IMAGE_SIZE, dtype=getattr(torch, dtype))
    names = ["class_scores", "anchor_boxes"]
    network = _Scores(to_half(detector.model) if half else detector.model).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own
        try:
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("B")},),
            )
        except ImportError as error:  # of what torch looks for in a newer one
            raise InputError(f"exporting to ONNX: {error}: pip install --upgrade onnx onnxscript") from None
    network = program.model_proto if calibration is None else to_int8(program.model_proto, calibration)
    post = postprocess_graph(
        len(detector.classes),
        len(detector.model.anchors),
        ir=network.ir_version,
        opset=network.opset_import[0].version,
        **settings,
    )
    whole = onnx.compose.merge_models(
        network,
        post,
        io_map=[(name, name) for name in names],
        name="ssd300",
        doc_string="SSD300 object detector with non-maximum suppression",
    )
    metadata = {
        "classes": detector.classes,
        "score_thresh": detector.score_thresh,
        "image_size": ssd.IMAGE_SIZE,
    }
    onnx.helper.set_model_props(whole, {name: json.dumps(value) for name, value in metadata.items()})
    del whole.opset_import[1:]  # the same again, which onnxruntime's tools refuse
    onnx.checker.check_model(whole, full_check=True)
    return whole


def largest_differences(ours, theirs):
    """Return how far two detections of one image differ: (rows without a partner, pixels, score).

    ours, theirs: arrays boxes_px (D, 4), labels (D,) and scores (D,). Partners have the same label and the
    nearest boxes, whatever the order of rows.
    """
    (boxes, labels, scores), (other_boxes, other_labels, other_scores) = ours, theirs
    distance = np.abs(boxes[:, None] - other_boxes).max(axis=2)  # (D, D of the other)
    distance[labels[:, None] != other_labels] = FAR
    row, column = linear_sum_assignment(distance.clip(max=FAR))
    is_pair = distance[row, column] < FAR
    row, column = row[is_pair], column[is_pair]
    alone = len(labels) + len(other_labels) - 2 * len(row)
    score_differences = np.abs(scores[row] - other_scores[column])
    return alone, distance[row, column].max(initial=0.0), score_differences.max(initial=0.0)


def open_onnx(path, threads=0):
    """Return an onnxruntime session of an ONNX file on the CPU; 0 threads: one for each core."""
    runtime = optional_import("onnxruntime", "checking an ONNX file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def network_input(pixels, dtype):
    """Return an image (H, W, 3) as the ONNX network takes it: (1, 3, 300, 300)."""
    return ssd.resize_transform()(image=pixels)["image"].transpose(2, 0, 1)[None].astype(dtype)


def find_objects(session, pixels):
    """Return what an ONNX file finds in an image (H, W, 3): boxes_px (D, 4), labels (D,), scores (D,)."""
    dtype = "uint8" if "uint8" in session.get_inputs()[0].type else "float32"
    boxes, scores, labels = (out[0] for out in session.run(None, {"images": network_input(pixels, dtype)}))
    is_real = labels > 0
    height, width = pixels.shape[:2]
    return boxes[is_real] * np.array([width, height] * 2), labels[is_real], scores[is_real]


def check_onnx(path, detector, images, **settings):
    """Compare an ONNX file with a Detector on image files; returns what was compared as text.

    Raises InputError if a detection has no partner, or boxes or scores differ by more than the tolerances.
    """
    session = open_onnx(path)
    worst, count = np.zeros(3), 0
    for image in images:
        picture = ssd.open_image(image)
        found = detector.detect_in([picture], **settings)[0]
        ours = found.boxes_px, np.array(found.labels), np.array(found.scores)
        worst = np.maximum(worst, largest_differences(ours, find_objects(session, np.asarray(picture))))
        count += len(found)
    alone = f"{int(worst[0])} without a partner in one image, " if worst[0] else ""
    summary = (
        f"{count} detections in {len(images)} images: {alone}boxes within {worst[1]:.4f} pixels, "
        f"scores within {worst[2]:.1e}"
    )
    if worst[0] or worst[1] > BOX_TOLERANCE or worst[2] > SCORE_TOLERANCE:
        raise InputError(f"the ONNX file is refused, ONNX and PyTorch differ: {summary}")
    return summary


def onnx_map(session, records, num_classes):
    """Return the mAP@.5 of an ONNX file on Records."""
    found = [find_objects(session, record.read()) for record in records]
    boxes_px, labels, scores = (np.concatenate(column) for column in zip(*found, strict=True))
    detections = {
        "image_ids": np.repeat(np.arange(len(records)), [len(one[1]) for one in found]),
        "labels": labels,
        "scores": scores,
        "boxes_px": ssd.to_voc_pixels(boxes_px),
    }
    return ssd.score_detections(detections, records, num_classes)["map_area"]


def check_map(path, detector, records, *, max_drop, **settings):
    """Compare the mAP of an ONNX file with a Detector's on Records; returns what was measured as text.

    Raises InputError if the file's is lower by more than max_drop.
    """
    model = detector.model
    dataset = ssd.VocDataset(records, ssd.build_transform(train=False), model.anchors.cpu())
    ours = ssd.evaluate(model, ssd.make_loader(dataset, batch_size=8), **settings)["map_area"]
    theirs = onnx_map(open_onnx(path), records, model.num_classes)
    summary = (
        f"mAP@.5 {theirs:.4f} in {len(records)} test images, {theirs - ours:+.4f} from PyTorch's {ours:.4f}"
    )
    if ours - theirs > max_drop:
        raise InputError(f"the ONNX file is refused: {summary}, --max-map-drop allows {max_drop:g}")
    return summary


def example_images(data, count=16):
    """Return image files of the data that a checkpoint was trained on, evenly spread."""
    voc = "data/VOCdevkit/VOC2007"
    known = {"shapes": "data/shapes", "voc2007": voc, "voc0712": voc}
    folder = Path(known.get(data, data)) / "JPEGImages"
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in ssd.IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"no image in {folder} to check the export with: name some with --images")
    return ssd.spread(paths, count)


def run_lists(checkpoint, data=None, test_split=None, max_images=None):
    """Return the Records to calibrate with and to measure on, by default of the run that made a checkpoint.

    The former are of its validation list, without one of its training list. max_images: measure on so many,
    evenly spread. InputError without a test list or an object in it.
    """
    saved = checkpoint["args"]
    lists = [saved.get("train_split"), saved.get("val_split"), test_split or saved.get("test_split")]
    (root, *_), lists = ssd.find_data(data or saved["data"], "data", *lists)
    if not lists["test"]:
        raise InputError(f"{root} has no test list to measure the mAP on: name one with --test-split")
    options = {"classes": checkpoint["classes"], "unlabelled": saved.get("unlabelled", "error")}
    read = functools.partial(ssd.read_records, root, **options)
    test = read(lists["test"])
    test = ssd.spread(test, max_images or len(test))
    if not any(len(record.labels) for record in test):
        raise InputError(f"{root}, list {lists['test']}: no object of the model's classes, so no mAP")
    return ssd.spread(read(lists["val"] or lists["train"]), CALIBRATION_IMAGES), test


def export_onnx(
    checkpoint,
    model,
    path,
    check,
    *,
    score_thresh=None,
    nms_iou_thresh=None,
    max_detections=ssd.MAX_DETECTIONS,
    **options,
):
    """Write an ONNX file, unless the check raises InputError; returns the check's text.

    check(path, detector, **settings of `ssd.detect`): `check_onnx` or `check_map`; score_thresh: None for .01
    or the least threshold of a class; nms_iou_thresh: None for that of the run; options: see `to_onnx`.
    """
    detector = ssd.Detector(model, checkpoint["classes"], score_thresh=checkpoint.get("score_thresh"))
    if score_thresh is None:
        score_thresh = min(ssd.SCORE_THRESH, *detector.score_thresh.values())
    if nms_iou_thresh is None:
        nms_iou_thresh = checkpoint["args"]["nms_iou"]
    settings = {
        "score_thresh": score_thresh,
        "nms_iou_thresh": nms_iou_thresh,
        "max_detections": max_detections,
    }
    whole = to_onnx(detector, **options, **settings)
    summary = ""

    def write(temporary):
        nonlocal summary
        temporary.write_bytes(whole.SerializeToString())
        summary = check(temporary, detector, **settings)

    ssd.write_atomically(path, write)
    return summary


# ---- the Hugging Face folder ----

USE = """\
```python
import json

from safetensors.torch import load_file

from ssd_object_detection import SSD300, Detector  # the one file beside this card

with open("config.json") as file:
    saved = json.load(file)
model = SSD300(**saved["config"])
model.load_state_dict(load_file("model.safetensors"))
detector = Detector(model, saved["classes"], score_thresh=saved["score_thresh"])
found = detector.predict("picture.jpg")
print(found.names, found.scores, found.boxes_px)  # pixels of the upright image, best first
```

This runs in this folder; it needs torch, torchvision, albumentations 2.0.8, matplotlib, tqdm, safetensors."""

LIMITS = """\
* Only the classes above, and only images like those of the training data, were measured.
* The input is 300x300: objects below a tenth of the image's side are matched by one anchor only.
* Scores rank detections; they are not calibrated probabilities.
* One seed: the spread over seeds is unknown."""


def front_matter(name, run, licence):
    """Return the card's header with the measured mAPs; JSON, which is YAML, so that no name breaks it."""
    header = {"library_name": "pytorch", "pipeline_tag": "object-detection", "tags": ["ssd300", "vgg16"]}
    if licence:
        header["license"] = licence
    test = run["test"]
    if report.is_number(test.get("map_area")):
        titles = {"map_area": "mAP@.5 (area)", "map11": "mAP@.5 (11-point)", "map75": "mAP@.75 (area)"}
        metrics = [{"type": "mAP", "name": titles[key], "value": round(test[key], 4)} for key in titles]
        data_name = report.data_name(test)
        data = {"name": data_name, "type": data_name, "split": test["split"]}
        result = {"task": {"type": "object-detection"}, "dataset": data, "metrics": metrics}
        header["model-index"] = [{"name": name, "results": [result]}]
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items()]
    return "\n".join(["---", *lines, "---"])


def write_card(folder, name, run, *, licence=None, data_licence=None, onnx_check=None):
    """Write the model card README.md from a run's own records; what was not recorded is called so."""
    flags, config, classes = run["flags"], run["config"], run["classes"]
    kinds = {"none": "without batch norm", "new": "batch norm in the new layers", "all": "with batch norm"}
    start = "from ImageNet weights" if flags["pretrained"] else "trained from scratch"
    if flags.get("init_from"):
        start = f"trained further from {Path(flags['init_from']).name}"
    chosen = "the last epoch was kept"
    if flags["val_split"]:
        chosen = f"list {flags['val_split']} chose the epoch"
    elif flags["val_fraction"]:
        chosen = f"a held-out {flags['val_fraction']:.0%} of the training list chose the epoch"
    parts = [
        front_matter(name, run, licence),
        f"# {name}",
        f"SSD300 with a VGG16 backbone, width {config['width']:g}, {kinds[config['batch_norm']]}, {start}, "
        f"for {len(classes)} classes: {', '.join(classes)}. Input: 300x300 pixels, RGB.",
        "## Use",
        USE,
    ]
    if onnx_check:
        parts += [
            f"`python {EXAMPLE.name} model.onnx picture.jpg` needs numpy, pillow and onnxruntime only.",
            f"Compared with PyTorch when it was written: {onnx_check}.",
        ]
    parts += [
        "## Measured",
        report.protocol(run),
        report.markdown(report.table_rows(run["test"])),
        "## Errors",
        "\n".join(f"* {line}" for line in report.in_words(run)),
        "## Training",
        f"Data: {report.data_name(flags)}; {chosen}.",
    ]
    if run["environment"]:
        parts += [f"```\n{report.command(run)}\n```", report.machine(run)]
    else:
        parts += ["Machine: not recorded."]
    parts += [f"![{title}](plots/{path.name})" for path, title in run["plots"]]
    weights, data = licence or "not stated", data_licence or "not stated"
    parts += ["## Limits", LIMITS, "## Licence", f"Code: MIT. Weights: {weights}. Training data: {data}."]
    text = "\n\n".join(part for part in parts if part) + "\n"
    ssd.write_atomically(folder / "README.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_config(path, checkpoint, run):
    """Write config.json: what `load_published` needs, the test numbers and the flags, no local folders."""
    test = {key: value for key, value in run["test"].items() if key != "checkpoint"}
    if test:
        test["data"] = report.data_name(test)
    ssd.write_json(
        path,
        {
            "model_type": "ssd300",
            "image_size": ssd.IMAGE_SIZE,
            "classes": run["classes"],
            "id2label": dict(enumerate(run["classes"], start=1)),
            **{key: checkpoint[key] for key in ("format_version", "config", "score_thresh")},
            "test": test,
            "flags": report.public_flags(run["flags"]),
        },
    )


def export_folder(checkpoint, model, run, folder, *, name, onnx_images=None, **licences):
    """Write the folder for Hugging Face; with images to check it on, model.onnx too."""
    safetensors = optional_import("safetensors.torch", "writing model.safetensors")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} is there and not of this program: choose another folder to write")
    (folder / "model.onnx").unlink(missing_ok=True)  # of an earlier export, maybe of another model
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in checkpoint["model"].items()}

    def write(temporary):
        safetensors.save_file(state, temporary, {"format": "pt"})

    ssd.write_atomically(folder / "model.safetensors", write)
    write_config(folder / "config.json", checkpoint, run)
    shutil.copyfile(ssd.__file__, folder / "ssd_object_detection.py")
    for path, _ in run["plots"]:
        (folder / "plots").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "plots" / path.name)
    summary = None
    if onnx_images:
        check = functools.partial(check_onnx, images=onnx_images)
        summary = export_onnx(checkpoint, model, folder / "model.onnx", check)
        shutil.copyfile(EXAMPLE, folder / EXAMPLE.name)
    write_card(folder, name, run, onnx_check=summary, **licences)


def load_published(source):
    """Return the checkpoint dict of a folder by `export_folder`, or of a Hugging Face id OWNER/NAME."""
    folder = Path(source)
    if not folder.is_dir():
        hub = optional_import("huggingface_hub", f"{source}: no such file, and as a Hugging Face id it")
        try:
            folder = Path(hub.snapshot_download(str(source), allow_patterns=HUB_FILES))
        except Exception as error:  # no network, no such model, no access
            problem = " ".join(str(error).split())[:160]
            raise InputError(f"{source}: no such file or folder, nor on Hugging Face ({problem})") from None
    missing = [name for name in HUB_FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{source}: lacks {' and '.join(missing)}, which ssd_tools.export hf writes")
    reader = optional_import("safetensors.torch", f"{source}: reading model.safetensors")
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if saved["format_version"] != ssd.FORMAT_VERSION:
            raise ValueError(f"format {saved['format_version']}, this program reads {ssd.FORMAT_VERSION}")
        checkpoint = {name: saved[name] for name in ("format_version", "config", "classes", "score_thresh")}
        return checkpoint | {"args": saved["flags"], "model": reader.load_file(folder / "model.safetensors")}
    except Exception as error:  # whatever is wrong with a foreign file
        raise InputError(f"{source}: not a model of this module ({type(error).__name__}: {error})") from None


def load_weights(source):
    """Return the checkpoint dict of a .pth file, or of what `load_published` takes."""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and Path(source).suffix not in (".pth", ".pt")
    if Path(source).is_dir() or (is_hub_id and not Path(source).exists()):
        return load_published(source)
    return ssd.load_checkpoint(source)


def push(folder, repo, private=False):
    """Upload a folder to Hugging Face and return its address; InputError if that fails."""
    hub = optional_import("huggingface_hub", "--push")
    if not hub.get_token():
        raise InputError("--push: not logged in to Hugging Face: run `hf auth login`, or set HF_TOKEN")
    api = hub.HfApi()
    try:
        hub.utils.validate_repo_id(repo)
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload the model")
        return done.commit_url
    except Exception as error:  # a wrong name, no access, no network, a broken connection
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = {401: "the token is not valid: ", 403: "the token may not write there: "}.get(status, "")
        raise InputError(f"--push {repo}: {reason}{' '.join(str(error).split())[:200]}") from None


# ---- command line ----


def build_parser():
    """Return the parser of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    onnx = commands.add_parser("onnx", help="write an ONNX model")
    add = onnx.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--output", metavar="FILE", help="default: CHECKPOINT ending in .onnx, _half.onnx or _int8.onnx")
    add(
        "--input",
        choices=("uint8", "float32"),
        default="uint8",
        help="type of the input, 0 to 255 in both cases (default: uint8)",
    )
    add("--score-thresh", type=ssd.unit_interval, help="least score (default: .01, or a class's lower one)")
    add("--nms-iou", type=ssd.unit_interval, help="at which NMS drops the lower score (default: the run's)")
    add(
        "--max-detections",
        type=ssd.positive_int,
        default=ssd.MAX_DETECTIONS,
        help=f"rows of the output (default: {ssd.MAX_DETECTIONS})",
    )
    add("--images", nargs="+", metavar="FILE", help="images to check with (default: 16 of the run's data)")
    smaller = onnx.add_mutually_exclusive_group()
    smaller.add_argument("--half", action="store_true", help="convolve in float16")
    smaller.add_argument("--int8", action="store_true", help="convolve in 8-bit integers")
    add = onnx.add_argument_group("what --half and --int8 are measured on, in place of --images").add_argument
    add("--data", metavar="PATH", help="a folder in VOC layout (default: the run's)")
    add("--test-split", metavar="LIST", help="default: the run's, or test")
    add("--max-images", type=ssd.positive_int, metavar="N", help="measure on N images of it, evenly spread")
    add(
        "--max-map-drop",
        type=ssd.unit_interval,
        default=0.01,
        metavar="X",
        help="refuse the file if it loses more mAP@.5 (default: .01)",
    )
    add = commands.add_parser("hf", help="write a folder for Hugging Face").add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("folder", metavar="DIR")
    add("--license", metavar="ID", help="of the weights, as Hugging Face spells it: mit, cc-by-4.0, other")
    add("--data-license", metavar="TEXT", help="licence of the training data, in words")
    add("--onnx", action="store_true", help="add model.onnx, checked")
    add("--images", nargs="+", metavar="FILE", help="images to check it with (default: 16 of the run's data)")
    add("--push", metavar="OWNER/NAME", help="upload the folder to this Hugging Face repository")
    add("--private", action="store_true", help="make that repository private")
    text = "write a checkpoint for --init-from, --evaluate and --predict"
    add = commands.add_parser("pth", help=text).add_argument
    add("checkpoint", metavar="SOURCE", help="a folder that hf wrote, or a Hugging Face id OWNER/NAME")
    add("output", metavar="FILE")
    return parser


def run_onnx(args, checkpoint, model, source):
    """Write the ONNX file that the command line asks for."""
    settings = {
        "nms_iou_thresh": args.nms_iou,
        "score_thresh": args.score_thresh,
        "max_detections": args.max_detections,
        "dtype": args.input,
        "half": args.half,
    }
    if args.half or args.int8:
        calibration, test = run_lists(checkpoint, args.data, args.test_split, args.max_images)
        check = functools.partial(check_map, records=test, max_drop=args.max_map_drop)
    else:
        images = args.images or example_images(checkpoint["args"]["data"])
        check = functools.partial(check_onnx, images=images)
    if args.int8:
        settings["calibration"] = (network_input(record.read(), args.input) for record in calibration)
    ending = "_half" * args.half + "_int8" * args.int8 + ".onnx"
    path = Path(args.output or source.with_name(source.stem + ending))
    print(export_onnx(checkpoint, model, path, check, **settings))
    print(path)


def run_export(args):
    """Do what the command line asks for."""
    source = Path(args.checkpoint)
    checkpoint = load_weights(args.checkpoint) if args.command == "pth" else ssd.load_checkpoint(source)
    model = ssd.model_from_checkpoint(checkpoint, source)
    if args.command == "pth":
        ssd.save_checkpoint(args.output, checkpoint)
        print(args.output)
        return
    if args.command == "onnx":
        run_onnx(args, checkpoint, model, source)
        return
    images = (args.images or example_images(checkpoint["args"]["data"])) if args.onnx else None
    folder = Path(args.folder)
    export_folder(
        checkpoint,
        model,
        report.read_run(source),
        folder,
        name=args.push or folder.resolve().name,
        onnx_images=images,
        licence=args.license,
        data_licence=args.data_license,
    )
    print("\n".join(str(path) for path in sorted(folder.rglob("*")) if path.is_file()))
    if args.push:
        print(push(folder, args.push, args.private))


def main(argv=None):
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    args = build_parser().parse_args(argv)
    try:
        run_export(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
