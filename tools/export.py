"""Turn a checkpoint into files that other programs read: an ONNX model, or a folder for Hugging Face.

    python tools/export.py onnx checkpoints/ssd_shapes_final.pth              # beside it, checked on real images
    python tools/export.py hf checkpoints/ssd_shapes_final.pth exported/      # weights, config, model card, plots
    python tools/export.py hf checkpoints/ssd_shapes_final.pth exported/ --onnx --push OWNER/NAME

The ONNX model takes images (B, 3, 300, 300), RGB, uint8 or float 0..255, and returns boxes (B, D, 4), normalised xyxy,
scores (B, D) and labels (B, D), best first after non-maximum suppression; rows of label 0 are empty.
Needs the packages onnx, onnxscript and onnxruntime, or safetensors; --push needs huggingface_hub.
"""

import argparse
import contextlib
import io
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import report  # noqa: E402

import ssd_object_detection as ssd  # noqa: E402
from ssd_object_detection import InputError  # noqa: E402

BOX_TOLERANCE, SCORE_TOLERANCE = 0.5, 1e-3  # pixels of the original image; how far ONNX and PyTorch may differ

EXAMPLE = '''\
"""python detect_onnx.py model.onnx picture.jpg: needs numpy, pillow and onnxruntime, nothing else."""
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
picture = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
small = picture.resize((300, 300), Image.Resampling.BILINEAR)
kind = np.uint8 if "uint8" in session.get_inputs()[0].type else np.float32
images = np.asarray(small).transpose(2, 0, 1)[None].astype(kind)
for box, score, label in zip(*(output[0] for output in session.run(None, {"images": images}))):
    if score >= 0.4:
        corners = (box * (picture.size * 2)).round().tolist()
        print(classes[label - 1], round(float(score), 3), corners)
        ImageDraw.Draw(picture).rectangle(corners, outline="red", width=3)
picture.save("detected.png")
'''

# What `ssd.detect` does, as an ONNX graph: {...} is filled in by `postprocess_graph`. B images, K classes, A anchors,
# T candidates a class, D detections.
POSTPROCESS = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
postprocess (float[B, {K}, {A}] class_scores, float[B, {A}, 4] anchor_boxes)
    => (float[B, {D}, 4] boxes, float[B, {D}] scores, int64[B, {D}] labels)
{{
    one = Constant <value = int64[1] {{1}}> ()
    two = Constant <value = int64[1] {{2}}> ()
    anchors = Constant <value = int64[1] {{{A}}}> ()
    top_k = Constant <value = int64[1] {{{T}}}> ()
    max_detections = Constant <value = int64[1] {{{D}}}> ()
    score_thresh = Constant <value = float {{{score_thresh}}}> ()
    nms_iou_thresh = Constant <value = float[1] {{{nms_iou_thresh}}}> ()
    none = Constant <value = float {{-1.0}}> ()
    zero = Constant <value = float {{0.0}}> ()
    zeros = Constant <value = float[1] {{0.0}}> ()
    no_label = Constant <value = int64 {{0}}> ()
    row = Constant <value = int64[2] {{0, -1}}> ()

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
    """The network with its outputs as class scores (B, K, A) and boxes (B, A, 4), what the ONNX graph goes on from."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        cls_logits, box_deltas = self.model(images)
        class_scores = F.softmax(cls_logits, dim=-1)[..., 1:].transpose(1, 2)
        return class_scores, ssd.decode(box_deltas, self.model.anchors).clamp(0, 1)


def postprocess_graph(num_classes, num_anchors, *, score_thresh=ssd.SCORE_THRESH, nms_iou_thresh=ssd.NMS_IOU_THRESH,
                      max_detections=ssd.MAX_DETECTIONS, ir=10, opset=20):
    """Return what `ssd.detect` does after softmax and decoding as an ONNX model, see POSTPROCESS."""
    onnx = ssd.optional_import("onnx", "exporting to ONNX")
    sizes = {"K": num_classes, "A": num_anchors, "T": min(ssd.PRE_NMS_TOP_K, num_anchors),
             "D": min(max_detections, num_classes * num_anchors)}
    thresholds = {"score_thresh": f"{max(score_thresh, 1e-30):.9e}", "nms_iou_thresh": f"{nms_iou_thresh:.9f}"}
    return onnx.parser.parse_model(POSTPROCESS.format(**sizes, **thresholds, ir=ir, opset=opset))


def to_onnx(model, classes, *, kind="uint8", **settings):
    """Return the ONNX model (a protocol buffer) of an SSD300, with detection and non-maximum suppression in its graph.

    kind: "uint8" or "float", the type of its input; settings: of `ssd.detect`. The class names are in its metadata.
    """
    onnx = ssd.optional_import("onnx", "exporting to ONNX")
    ssd.optional_import("onnxscript", "exporting to ONNX")
    dtype = {"uint8": torch.uint8, "float": torch.float32}[kind]
    images = torch.zeros(2, 3, ssd.IMAGE_SIZE, ssd.IMAGE_SIZE, dtype=dtype)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            _Scores(model).eval(), (images,), dynamo=True, verbose=False, input_names=["images"],
            output_names=["class_scores", "anchor_boxes"], dynamic_shapes=({0: torch.export.Dim("B")},),
        )
    network = program.model_proto
    post = postprocess_graph(len(classes), len(model.anchors), ir=network.ir_version,
                             opset=network.opset_import[0].version, **settings)
    pairs = [(name, name) for name in ("class_scores", "anchor_boxes")]
    whole = onnx.compose.merge_models(network, post, io_map=pairs, name="ssd300",
                                      doc_string="SSD300 object detector with non-maximum suppression")
    onnx.helper.set_model_props(whole, {"classes": json.dumps(list(classes)), "image_size": str(ssd.IMAGE_SIZE)})
    onnx.checker.check_model(whole, full_check=True)
    return whole


def largest_differences(ours, theirs):
    """Return how far two detections of one image differ: (number of rows without a partner, pixels, score).

    ours, theirs: (boxes_px (D, 4), labels (D,), scores (D,)). Partners have the same label and the nearest box; each
    row has one partner at most. The order of rows whose scores agree within the tolerance does not count.
    """
    free, boxes, scores, alone = list(range(len(theirs[1]))), [0.0], [0.0], 0
    for box, label, score in zip(*ours, strict=True):
        near = [(np.abs(box - theirs[0][i]).max(), i) for i in free if theirs[1][i] == label]
        distance, i = min(near, default=(np.inf, -1))
        if distance > 10 * BOX_TOLERANCE:
            alone += 1
            continue
        free.remove(i)
        boxes.append(float(distance))
        scores.append(abs(float(score) - float(theirs[2][i])))
    return alone + len(free), max(boxes), max(scores)


def check_onnx(path, model, images, *, kind="uint8", **settings):
    """Compare an ONNX file with PyTorch on image files; returns what was compared as text.

    Raises InputError if a detection has no partner, or boxes or scores differ by more than the tolerances.
    """
    runtime = ssd.optional_import("onnxruntime", "checking an ONNX file")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    resize, worst, count = ssd.resize_transform(), np.zeros(3), 0
    opened = [ssd.open_image(image) for image in images]
    arrays = np.stack([resize(image=np.asarray(image))["image"] for image in opened]).transpose(0, 3, 1, 2)
    for start in range(0, len(opened), 8):
        part = arrays[start : start + 8]
        with torch.inference_mode():
            expected = ssd.detect(*model(torch.from_numpy(part)), model.anchors, **settings)
        outputs = session.run(None, {"images": part.astype({"uint8": np.uint8, "float": np.float32}[kind])})
        for image, (boxes, labels, scores), *row in zip(opened[start : start + 8], expected, *outputs, strict=True):
            is_real, side = row[2] > 0, np.array(image.size * 2)
            theirs = row[0][is_real] * side, row[2][is_real], row[1][is_real]
            found = largest_differences((boxes.numpy() * side, labels.numpy(), scores.numpy()), theirs)
            worst, count = np.maximum(worst, found), count + len(labels)
    alone = f"{int(worst[0])} without a partner in one image, " if worst[0] else ""
    summary = (f"{count} detections in {len(opened)} images: {alone}boxes within {worst[1]:.4f} pixels, scores within "
               f"{worst[2]:.1e}")
    if worst[0] or worst[1] > BOX_TOLERANCE or worst[2] > SCORE_TOLERANCE:
        raise InputError(f"the ONNX file is refused, ONNX and PyTorch differ: {summary}")
    return summary


def example_images(flags, given, count=16):
    """Return image files to check with: those given, else some of the data that a checkpoint was trained on."""
    if given:
        paths = [p for p in ssd.find_inputs(given) if p.suffix.lower() not in ssd.VIDEO_SUFFIXES]
        return ssd.spread(paths, max(count, len(given)))
    known = {"shapes": "shapes", "voc2007": "VOCdevkit/VOC2007", "voc0712": "VOCdevkit/VOC2007"}
    data, root = flags.get("data", ""), Path(flags.get("data_root", "data"))
    folder = (root / known[data] if data in known else Path(data)) / "JPEGImages"
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in ssd.IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"no image in {folder} to check the export with: name some with --images")
    return ssd.spread(paths, count)


def export_onnx(checkpoint, model, path, images, *, kind="uint8", **settings):
    """Write an ONNX file, unless it finds other things in the images than PyTorch; returns what was compared.

    settings: of `to_onnx`, None for those of the checkpoint's run, where they are known.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    settings = {key: value for key, value in ssd.detection_of(checkpoint).items() if key != "flip_average"} | given
    whole = to_onnx(model, checkpoint["classes"], kind=kind, **settings)
    summary = ""

    def write(temporary):
        nonlocal summary
        temporary.write_bytes(whole.SerializeToString())
        summary = check_onnx(temporary, model, images, kind=kind, **settings)

    ssd.write_atomically(path, write)
    return summary


# ---- the Hugging Face folder ----


def model_index(name, run):
    """Return the card's model-index: the measured mAPs, as Hugging Face lists results."""
    test, flags = run["test"], run["flags"]
    metrics = [{"type": "mAP", "name": f"mAP@.5 ({kind})", "value": round(test[key], 4)}
               for key, kind in (("map_area", "area"), ("map11", "11-point")) if report.is_number(test.get(key))]
    data_name = report.data_name(flags)
    data = {"name": data_name, "type": data_name, "split": flags.get("test_split") or "test"}
    return [{"name": name, "results": [{"task": {"type": "object-detection"}, "dataset": data, "metrics": metrics}]}]


def front_matter(name, run, licence):
    """Return the card's header. JSON is YAML, so that no name can break it."""
    header = {"license": licence, "library_name": "pytorch", "pipeline_tag": "object-detection", "inference": False,
              "tags": ["object-detection", "ssd", "ssd300", "vgg16"], "metrics": ["mAP"]}
    if report.is_number(run["test"].get("map_area")):
        header["model-index"] = model_index(name, run)
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


USE = """\
```python
from ssd_object_detection import load_detector  # the one file beside this card; its packages: {packages}

found = load_detector("{name}").predict("picture.jpg")  # this folder, or its Hugging Face id
print(found.names, found.scores, found.boxes_px)  # pixels of the upright picture, best first
```

`python ssd_object_detection.py --predict PATH --weights {name}` does the same for files, folders and videos."""


def write_card(folder, name, run, plots, *, licence=None, data_licence=None, onnx_check=None):
    """Write the model card README.md from a run's own records; what was not recorded is called not recorded."""
    flags, environment, config = run["flags"], run["environment"], run["config"]
    network = (f"SSD300 with a VGG16 backbone, width {config['width']:g}, "
               f"{'with' if config.get('batch_norm') else 'without'} batch norm, "
               f"{'from ImageNet weights' if flags.get('pretrained') else 'trained from scratch'}")
    parts = [front_matter(name, run, licence), f"# {name}",
             f"{network}, for {len(run['classes'])} classes: {', '.join(run['classes'])}. Input: 300x300 pixels, RGB.",
             "## Use", USE.format(name=name, packages="torch, torchvision, albumentations 2.0.8, matplotlib, tqdm")]
    if onnx_check:
        parts += ["`model.onnx` needs numpy, pillow and onnxruntime only:", f"```python\n{EXAMPLE}```",
                  f"Compared with PyTorch when it was written: {onnx_check}."
                  f"{'' if flags.get('flip_average', 'off') == 'off' else ' It does not average over flips.'}"]
    figures = [("figure", "value"), *report.further_figures(run["test"])]
    parts += ["## Measured", report.protocol(run), report.markdown(report.table_rows(run["test"])),
              report.markdown(figures)]
    parts += ["## Errors", "\n".join(f"* {line}" for line in report.in_words(run))]
    held_out = flags.get("val_split") or f"a seeded {flags.get('val_fraction')} of it"
    parts += ["## Training", f"Data: {report.data_name(flags)}; list {flags.get('train_split')} to train, {held_out} "
              f"to choose the epoch, {flags.get('test_split') or 'none'} to measure."]
    parts += [f"```\n{report.command(run)}\n```", report.machine(run)] if environment else ["Machine: not recorded."]
    parts += [f"![{title}](plots/{path.name})" for path, title in plots]
    parts += ["## Limits", "\n".join(f"* {line}" for line in (
        "Only the classes above, and only pictures like those of the training data, were measured.",
        "The input is 300x300: objects below a tenth of the picture's side are matched by one anchor only.",
        "Scores rank detections; they are not calibrated probabilities.", "One seed: the spread over seeds is unknown.",
    ))]
    parts += ["## Licence", f"Code: MIT. Weights: {licence or 'not stated'}. Training data: "
              f"{data_licence or 'not stated'}."]
    ssd.write_text(folder / "README.md", "\n\n".join(p for p in parts if p) + "\n")


def export_folder(checkpoint, model, run, folder, *, name, onnx_images=None, **licences):
    """Write the folder that `load_detector` and Hugging Face read: weights, config, card, plots, the module itself."""
    safetensors = ssd.optional_import("safetensors.torch", "writing model.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in checkpoint["model"].items()}
    ssd.write_atomically(folder / "model.safetensors", lambda to: safetensors.save_file(state, to, {"format": "pt"}))
    local = ("evaluate", "predict", "weights", "resume", "output_dir", "data_root", "backbone_weights")
    flags = {key: value for key, value in run["flags"].items() if key not in local}  # no folders of this machine
    flags["data"] = report.data_name(flags)
    ssd.write_json(folder / "config.json", {
        "model_type": "ssd300", "format_version": checkpoint["format_version"], "config": checkpoint["config"],
        "classes": list(checkpoint["classes"]), "image_size": ssd.IMAGE_SIZE,
        "id2label": dict(enumerate(checkpoint["classes"], start=1)), "score_thresh": checkpoint.get("score_thresh"),
        "test": run["test"], "flags": flags,
    })
    shutil.copyfile(ssd.__file__, folder / "ssd_object_detection.py")
    plots = []
    for path, title in run["plots"]:
        (folder / "plots").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "plots" / path.name)
        plots.append((path, title))
    check = export_onnx(checkpoint, model, folder / "model.onnx", onnx_images) if onnx_images else None
    write_card(folder, name, run, plots, onnx_check=check, **licences)


def push(folder, repo, private=False):
    """Upload a folder to Hugging Face; returns its address. InputError says what is wrong: package, login, access."""
    hub = ssd.optional_import("huggingface_hub", "--push")
    api = hub.HfApi()
    try:
        hub.utils.validate_repo_id(repo)
        if not hub.get_token():
            raise InputError("--push: not logged in to Hugging Face: run `hf auth login`, or set HF_TOKEN")
        api.create_repo(repo, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload the model").commit_url
    except hub.errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = {401: "the token is not valid", 403: "the token may not write there"}.get(status, "the hub refused")
        raise InputError(f"--push {repo}: {reason} ({str(error).strip().splitlines()[0]})") from None
    except InputError:
        raise
    except Exception as error:  # a wrong name, no network, a broken connection
        raise InputError(f"--push {repo}: {str(error).strip().splitlines()[0][:200]}") from None


def build_parser():
    """Return the parser of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ssd._Formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("onnx", help="write an ONNX model", formatter_class=ssd._Formatter).add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--output", metavar="FILE", help="default: CHECKPOINT with the ending .onnx")
    add("--input", choices=("uint8", "float"), default="uint8", help="type of the input, 0 to 255 in both cases")
    add("--score-thresh", type=ssd.unit_interval, default=ssd.SCORE_THRESH, help="least score")
    add("--nms-iou", type=ssd.unit_interval, help="IoU from which the lower score goes (default: as in the run)")
    add("--max-detections", type=ssd.positive_int, help="rows of the output (default: as in the run)")
    add("--images", nargs="+", metavar="PATH", help="images to check with (default: 16 of the data's folder)")
    add = commands.add_parser("hf", help="write a folder for Hugging Face", formatter_class=ssd._Formatter).add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("folder", metavar="DIR")
    add("--name", help="the model's name (default: that of --push, else of DIR)")
    add("--plots", metavar="DIR", help="the run's plots (default: ../plots beside the checkpoint's folder)")
    add("--license", metavar="ID", help="licence of the weights, as Hugging Face spells it: mit, cc-by-4.0, other ...")
    add("--data-license", metavar="TEXT", help="licence of the training data, in words")
    add("--onnx", action="store_true", help="add model.onnx, checked")
    add("--images", nargs="+", metavar="PATH", help="images to check it with (default: 16 of the data's folder)")
    add("--push", metavar="OWNER/NAME", help="upload the folder to this Hugging Face repository")
    add("--private", action="store_true", help="make that repository private")
    return parser


def run_export(args):
    """Do what the command line says."""
    source = Path(args.checkpoint)
    checkpoint = ssd.load_checkpoint(source)
    model = ssd.model_from_checkpoint(checkpoint, source)
    if args.command == "onnx":
        path = Path(args.output) if args.output else source.with_suffix(".onnx")
        summary = export_onnx(checkpoint, model, path, example_images(checkpoint["args"], args.images), kind=args.input,
                              score_thresh=args.score_thresh, nms_iou_thresh=args.nms_iou,
                              max_detections=args.max_detections)
        print(f"{summary}\n{path}")
        return
    folder = Path(args.folder)
    run = report.read_run(source, args.plots)
    images = example_images(checkpoint["args"], args.images) if args.onnx else None
    export_folder(checkpoint, model, run, folder, name=args.name or args.push or folder.resolve().name,
                  onnx_images=images, licence=args.license, data_licence=args.data_license)
    print("\n".join(str(p) for p in sorted(folder.rglob("*")) if p.is_file()))
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
