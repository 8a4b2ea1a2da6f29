"""Turn a checkpoint into an ONNX model, checked against PyTorch on real images.

    python -m ssd_tools.onnx checkpoints/ssd_shapes_final.pth          # written beside it
    python -m ssd_tools.onnx checkpoints/ssd_shapes_final.pth --int8   # smaller, refused if the mAP falls

The model takes images (B, 3, 300, 300), RGB, uint8 or float 0..255. It returns boxes (B, D, 4), normalised
xyxy, scores (B, D) and labels (B, D), best first after non-maximum suppression; rows of label 0 are empty.
Batch norm is folded into the convolutions. Class names, the score threshold of each class and the image size
are in its metadata: examples/detect_onnx.py needs nothing else. Needs onnx, onnxscript and onnxruntime.
"""

import argparse
import contextlib
import functools
import io
import json
import logging
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import ssd_object_detection as ssd
from ssd_tools.common import load_evaluation, optional_import, run_program

BOX_TOLERANCE, SCORE_TOLERANCE = 0.5, 1e-3  # pixels of the image; how far ONNX and PyTorch may differ
FAR = 5.0  # pixels from which two boxes are of different objects
CHECK_IMAGES = 16
CALIBRATION_IMAGES = 32  # whose activations give the ranges of 8-bit integers
INT8_RUNTIME = (1, 25)  # onnxruntime that multiplies rightly on any CPU: microsoft/onnxruntime pull 27671

Check = Callable[..., str]  # check(path, detector, **settings of `ssd.detect`): what it found, or InputError
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes_px (D, 4), labels (D,), scores (D,) of an image


# ---- the graph ----

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


class _Scores(nn.Module):
    """The network with class scores (B, K, A) and boxes (B, A, 4) as outputs, which POSTPROCESS takes."""

    def __init__(self, model: ssd.SSD300) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        cls_logits, box_deltas = self.model(images)
        class_scores = F.softmax(cls_logits, dim=-1)[..., 1:].transpose(1, 2)  # (B, K, A)
        return class_scores, ssd.decode(box_deltas, self.model.anchors).clamp(0, 1)


def postprocess_graph(
    num_classes: int,
    num_anchors: int,
    *,
    score_thresh: float = ssd.SCORE_THRESH,
    nms_iou_thresh: float = ssd.NMS_IOU_THRESH,
    max_detections: int = ssd.MAX_DETECTIONS,
    ir: int = 10,
    opset: int = 20,
) -> Any:
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


def to_int8(network: Any, pictures: Iterable[np.ndarray]) -> Any:
    """Return an ONNX network whose convolutions multiply 8-bit integers, in QDQ form.

    Weights have a scale for each output channel; the ranges of activations are those met in the pictures,
    arrays as the network takes them.
    """
    onnx = optional_import("onnx", "--int8")
    quantization = optional_import("onnxruntime.quantization", "--int8")
    version = optional_import("onnxruntime", "--int8").__version__
    if tuple(map(int, version.split(".")[:2])) < INT8_RUNTIME:
        raise ssd.InputError(
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


def export_network(network: nn.Module, dtype: str, output_names: Sequence[str]) -> Any:
    """Return a network as an ONNX model by torch's exporter, for any batch of images of a dtype."""
    images = torch.zeros(2, 3, ssd.IMAGE_SIZE, ssd.IMAGE_SIZE, dtype=getattr(torch, dtype))
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
                output_names=output_names,
                dynamic_shapes=({0: torch.export.Dim("B")},),
            )
        except ImportError as error:  # of what torch looks for in a newer one
            hint = "pip install --upgrade onnx onnxscript"
            raise ssd.InputError(f"exporting to ONNX: {error}: {hint}") from None
    assert program is not None
    return program.model_proto


def to_onnx(
    detector: ssd.Detector,
    *,
    dtype: str = "uint8",
    calibration: Iterable[np.ndarray] | None = None,
    **settings: Any,
) -> Any:
    """Return the ONNX model (a protocol buffer) of a Detector, with detection in its graph.

    dtype: "uint8" or "float32", that of its input; calibration: pictures for `to_int8`; settings: of
    `ssd.detect`. Class names and their thresholds are in its metadata.
    """
    onnx = optional_import("onnx", "exporting to ONNX")
    optional_import("onnxscript", "exporting to ONNX")
    names = ["class_scores", "anchor_boxes"]
    network = export_network(_Scores(detector.model).eval(), dtype, names)
    if calibration is not None:
        network = to_int8(network, calibration)

    # The network's outputs become the inputs of the detection.
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
        "int8": calibration is not None,
    }
    onnx.helper.set_model_props(whole, {name: json.dumps(value) for name, value in metadata.items()})
    del whole.opset_import[1:]  # the same again, which onnxruntime's tools refuse
    onnx.checker.check_model(whole, full_check=True)
    return whole


# ---- checking a file ----


def largest_differences(ours: Columns, theirs: Columns) -> tuple[int, float, float]:
    """Return how far two detections of one image differ: (rows without a partner, pixels, score).

    Partners have the same label and the nearest boxes, whatever the order of rows.
    """
    boxes, labels, scores = ours
    other_boxes, other_labels, other_scores = theirs
    distance = np.abs(boxes[:, None] - other_boxes).max(axis=2)  # (D, D of the other)
    distance[labels[:, None] != other_labels] = FAR
    row, column = linear_sum_assignment(distance.clip(max=FAR))
    is_pair = distance[row, column] < FAR
    row = row[is_pair]
    column = column[is_pair]
    alone = len(labels) + len(other_labels) - 2 * len(row)
    score_differences = np.abs(scores[row] - other_scores[column])
    return alone, distance[row, column].max(initial=0.0), score_differences.max(initial=0.0)


def open_onnx(path: ssd.PathLike, threads: int = 0) -> Any:
    """Return an onnxruntime session of an ONNX file on the CPU; 0 threads: one for each core."""
    runtime = optional_import("onnxruntime", "checking an ONNX file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def network_input(pixels: np.ndarray, dtype: str) -> np.ndarray:
    """Return an image (H, W, 3) as the ONNX network takes it: (1, 3, 300, 300)."""
    return ssd.resize_transform()(image=pixels)["image"].transpose(2, 0, 1)[None].astype(dtype)


def find_objects(session: Any, pixels: np.ndarray, full_size: tuple[int, int]) -> Columns:
    """Return what an ONNX file finds in an image (H, W, 3): boxes_px (D, 4), labels (D,), scores (D,).

    full_size: (width, height) that the boxes are in pixels of.
    """
    dtype = "uint8" if "uint8" in session.get_inputs()[0].type else "float32"
    boxes, scores, labels = session.run(None, {"images": network_input(pixels, dtype)})
    is_real = labels[0] > 0  # (D,)
    boxes_px = boxes[0][is_real] * np.array(full_size * 2)
    return boxes_px, labels[0][is_real], scores[0][is_real]


def check_onnx(
    path: ssd.PathLike, detector: ssd.Detector, images: Sequence[ssd.PathLike], **settings: Any
) -> str:
    """Compare an ONNX file with a Detector on image files; returns what was compared as text.

    Raises InputError if a detection has no partner, or boxes or scores differ by more than the tolerances.
    """
    session = open_onnx(path)
    worst = np.zeros(3)  # detections alone, pixels, score
    count = 0
    for image in images:
        picture, full_size = ssd.open_small(image)
        (found,) = detector.detect_in([picture], sizes=[full_size], **settings)
        ours = found.boxes_px, np.array(found.labels), np.array(found.scores)
        theirs = find_objects(session, np.asarray(picture), full_size)
        worst = np.maximum(worst, largest_differences(ours, theirs))
        count += len(found)
    alone, pixels, score = worst.tolist()
    summary = f"{count} detections in {len(images)} images: "
    if alone:
        summary += f"{alone:.0f} without a partner in one image, "
    summary += f"boxes within {pixels:.4f} pixels, scores within {score:.1e}"
    if alone or pixels > BOX_TOLERANCE or score > SCORE_TOLERANCE:
        raise ssd.InputError(f"the ONNX file is refused, ONNX and PyTorch differ: {summary}")
    return summary


def onnx_map(session: Any, records: Sequence[ssd.Record], num_classes: int) -> float:
    """Return the mAP@.5 of an ONNX file on Records."""
    found = []
    for record in records:
        found.append(find_objects(session, record.read(), (record.width, record.height)))
    counts = [len(labels) for _, labels, _ in found]
    detections = {
        "image_ids": np.repeat(np.arange(len(records)), counts),
        "labels": np.concatenate([labels for _, labels, _ in found]),
        "scores": np.concatenate([scores for _, _, scores in found]),
        "boxes_voc": ssd.to_voc_pixels(np.concatenate([boxes_px for boxes_px, _, _ in found])),
    }
    return ssd.score_detections(detections, list(records), num_classes)["map_area"]


def check_map(
    path: ssd.PathLike,
    detector: ssd.Detector,
    records: Sequence[ssd.Record],
    *,
    max_drop: float,
    **settings: Any,
) -> str:
    """Compare the mAP of an ONNX file with a Detector's on Records; returns what was measured as text.

    Raises InputError if the file's is lower by more than max_drop.
    """
    model = detector.model
    loader = ssd.plain_loader(records, model, batch_size=8, workers=0)
    ours = ssd.measure(model, loader, **settings)["map_area"]
    theirs = onnx_map(open_onnx(path), records, model.num_classes)
    summary = (
        f"mAP@.5 {theirs:.4f} in {len(records)} test images, {theirs - ours:+.4f} from PyTorch's {ours:.4f}"
    )
    if ours - theirs > max_drop:
        raise ssd.InputError(f"the ONNX file is refused: {summary}, --max-map-drop allows {max_drop:g}")
    return summary


def example_images(data: str | Sequence[str], count: int = CHECK_IMAGES) -> list[Path]:
    """Return image files of the data that a checkpoint was trained on, evenly spread."""
    paths: list[Path] = []
    for name in ssd.data_names(data):
        root = Path(name)
        if ssd.is_voc(name):
            root = Path("data/VOCdevkit/VOC2007")
        elif name == "shapes":
            root = Path("data/shapes")
        folder = root / "JPEGImages"
        paths += sorted(path for path in folder.glob("*") if path.suffix.lower() in ssd.IMAGE_SUFFIXES)
    if not paths:
        raise ssd.InputError(f"no image in {folder} to check the export with: name some with --images")
    return ssd.spread(paths, count)


def records_to_measure(
    settings: ssd.Settings, classes: Sequence[str], max_images: int | None = None
) -> Sequence[ssd.Record]:
    """Return the Records to measure on: the test list, or max_images of it, evenly spread.

    InputError without a test list or an object in it.
    """
    split, _, found = ssd.read_test_list(settings, classes)
    records = ssd.spread(found, max_images or len(found))
    if not any(len(record.labels) for record in records):
        data = " ".join(ssd.data_names(settings.data))
        raise ssd.InputError(f"{data}, list {split}: no object of the model's classes, so no mAP")
    return records


def calibration_records(settings: ssd.Settings, classes: Sequence[str]) -> Sequence[ssd.Record]:
    """Return the Records to calibrate with, of the validation list, without one of the training list."""
    named = (settings.train_split, settings.val_split, settings.test_split)
    parts = []
    for source in ssd.find_sources(settings.data, settings.data_root, *named):
        split = source.lists["val"] or source.lists["train"]
        records, findings = ssd.read_records(source.root, split, classes, unlabelled=settings.unlabelled)
        ssd.print_findings(findings)
        parts.append(records)
    return ssd.spread(ssd.join_records(parts), CALIBRATION_IMAGES)


def check_images(settings: ssd.Settings, classes: Sequence[str]) -> list[Path]:
    """Return CHECK_IMAGES image files of the test list, evenly spread; without such a list, of the folder."""
    try:
        _, _, records = ssd.read_test_list(settings, classes)
    except ssd.InputError:
        return example_images(settings.data)
    return [Path(record.image_path) for record in ssd.spread(records, CHECK_IMAGES)]


def check_set_path(path: Path) -> Path:
    """Return where the check set of an ONNX file is: one for NAME.onnx and NAME_int8.onnx together."""
    return path.with_name(f"{path.stem.removesuffix('_int8')}_check.npz")


def write_check_set(
    path: Path, detector: ssd.Detector, images: Sequence[ssd.PathLike], **settings: Any
) -> None:
    """Write what PyTorch finds in image files, for `detect_onnx.py --check` on another machine.

    An .npz of images (N, 3, 300, 300) uint8, boxes (N, D, 4) normalised xyxy, scores (N, D) and labels
    (N, D), as the ONNX file returns them; rows of label 0 are empty. settings: of `ssd.detect`.
    """
    pixels = [network_input(np.asarray(ssd.open_image(image)), "uint8") for image in images]
    model = detector.model.eval()
    rows = []
    for picture in pixels:
        with torch.inference_mode():
            cls_logits, box_deltas = model(torch.from_numpy(picture).to(model.anchors.device))
            (found,) = ssd.detect(cls_logits, box_deltas, model.anchors, **settings)
        rows.append(found)
    boxes, labels, scores = zip(*rows, strict=True)

    def pad(values: Sequence[Tensor]) -> np.ndarray:
        return nn.utils.rnn.pad_sequence(list(values), batch_first=True).cpu().numpy()  # (N, D) or (N, D, 4)

    arrays: dict[str, Any] = {"boxes": pad(boxes), "scores": pad(scores), "labels": pad(labels)}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, images=np.concatenate(pixels), **arrays)

    ssd.write_atomically(path, write)


def export_onnx(
    checkpoint: dict[str, Any],
    model: ssd.SSD300,
    path: Path,
    check: Check,
    *,
    score_thresh: float | None = None,
    nms_iou_thresh: float | None = None,
    max_detections: int = ssd.MAX_DETECTIONS,
    **options: Any,
) -> str:
    """Write an ONNX file, unless the check raises InputError; returns the check's text.

    check: `check_onnx` or `check_map`; score_thresh: None for .01 or the least threshold of a class;
    nms_iou_thresh: None for that of the run; options: see `to_onnx`.
    """
    detector = ssd.Detector(model, checkpoint["classes"], score_thresh=checkpoint["score_thresh"])
    if score_thresh is None:
        score_thresh = min(ssd.SCORE_THRESH, *detector.score_thresh.values())
    if nms_iou_thresh is None:
        nms_iou_thresh = checkpoint["args"].get("nms_iou", ssd.NMS_IOU_THRESH)
    settings: dict[str, Any] = {
        "score_thresh": score_thresh,
        "nms_iou_thresh": nms_iou_thresh,
        "max_detections": max_detections,
    }
    whole = to_onnx(detector, **options, **settings)
    summary = ""

    def write(temporary: Path) -> None:
        nonlocal summary
        temporary.write_bytes(whole.SerializeToString())
        summary = check(temporary, detector, **settings)

    ssd.write_atomically(path, write)
    return summary


# ---- command line ----


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--output", metavar="FILE", help="default: CHECKPOINT ending in .onnx or _int8.onnx")
    add(
        "--input",
        choices=("uint8", "float32"),
        default="uint8",
        help="type of the input, 0 to 255 in both cases (default: uint8)",
    )
    add("--score-thresh", type=ssd.unit_interval, help="least score (default: .01, or a class's lower one)")
    add("--nms-iou", type=ssd.unit_interval, help="IoU at which NMS drops the weaker (default: the run's)")
    add(
        "--max-detections",
        type=ssd.positive_int,
        default=ssd.MAX_DETECTIONS,
        help=f"rows of the output (default: {ssd.MAX_DETECTIONS})",
    )
    add("--images", nargs="+", metavar="FILE", help="images to check with (default: 16 of the test list)")
    add("--int8", action="store_true", help="convolve in 8-bit integers")
    measured = parser.add_argument_group("the images to check with, and what --int8 is measured on")
    add = measured.add_argument
    add("--data", nargs="+", metavar="PATH", help="folders in VOC layout (default: the run's)")
    add("--test-split", metavar="LIST", help="default: the run's, or test")
    add("--max-images", type=ssd.positive_int, metavar="N", help="measure on N images of it, evenly spread")
    add(
        "--max-map-drop",
        type=ssd.unit_interval,
        default=0.01,
        metavar="X",
        help="refuse the file if it loses more mAP@.5 (default: .01)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the ONNX file that the command line asks for."""
    source = Path(args.checkpoint)
    data_flags = []
    if args.data:
        data_flags += ["--data", *args.data]
    if args.test_split:
        data_flags += ["--test-split", args.test_split]
    settings, checkpoint = load_evaluation(source, data_flags)
    classes = checkpoint["classes"]
    model = ssd.model_from_checkpoint(checkpoint, source)
    options = {
        "nms_iou_thresh": args.nms_iou,
        "score_thresh": args.score_thresh,
        "max_detections": args.max_detections,
        "dtype": args.input,
    }
    check: Check
    if args.int8:
        test = records_to_measure(settings, classes, args.max_images)
        images = args.images or [record.image_path for record in ssd.spread(test, CHECK_IMAGES)]
        check = functools.partial(check_map, records=test, max_drop=args.max_map_drop)
    else:
        images = args.images or check_images(settings, classes)
        check = functools.partial(check_onnx, images=images)
    ending = ".onnx"
    if args.int8:
        ending = "_int8.onnx"
        calibration = calibration_records(settings, classes)
        options["calibration"] = (network_input(record.read(), args.input) for record in calibration)
    path = Path(args.output or source.with_name(source.stem + ending))
    check_path = check_set_path(path)

    def check_and_keep(temporary: ssd.PathLike, detector: ssd.Detector, **detection: Any) -> str:
        summary = check(temporary, detector, **detection)
        write_check_set(check_path, detector, images, **detection)
        return summary

    print(export_onnx(checkpoint, model, path, check_and_keep, **options))
    print(path, check_path, sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    words = sys.argv[1:] if argv is None else [*argv]
    if words and words[-1].endswith(".pth"):
        words = words[-1:] + words[:-1]  # not one more folder of --data
    args = build_parser().parse_args(words)
    return run_program(functools.partial(run, args))


if __name__ == "__main__":
    sys.exit(main())
