"""Detection in images of 300x300, network with decode and NMS; against torchvision's ssd300_vgg16.

The cases `files` begin with image files (Detector.predict; for torchvision Pillow, to float and the model's
own resize), the others with images that are there. `decode + NMS` is that part alone.

The networks' outputs are exchanged for made ones in which about as many candidates pass the .01 threshold as
a trained network leaves, since the cost of NMS depends on it. Both keep at most 1,000 a class, 200 in all.

On a CPU also what ssd_tools.onnx makes of the network, in ONNX Runtime and, if installed, in OpenVINO,
which computes the float32 file in bfloat16 where the CPU can. These files detect by themselves, without made
outputs: with random weights they and torchvision's SSDlite find nothing. Their `files` are read one by one.

    python benchmarks/inference.py --device cuda --json inference.json
    python benchmarks/inference.py --checkpoint FILE --data PATH --test-split LIST    # mAP@.5 on the list too
"""

import argparse
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torchvision
from common import ssd
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms import v2

from ssd_tools import onnx


def made_outputs(
    anchors_cxcywh: Tensor, truth: common.Truth, num_classes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return logits and deltas in which anchors near the objects call them, and a few others something."""
    generator = torch.Generator().manual_seed(0)
    shape = len(truth), len(anchors_cxcywh)
    cls_logits = torch.randn(*shape, num_classes + 1, generator=generator)
    cls_logits[..., 0] += 7.5
    labels = torch.zeros(shape, dtype=torch.int64)
    anchors_xyxy = box_convert(anchors_cxcywh, "cxcywh", "xyxy").numpy()
    for row, (boxes, gt_labels) in zip(labels, truth, strict=True):
        matched_gt = ssd.match_anchors(boxes.numpy(), anchors_xyxy, match_iou_thresh=0.4)
        row[matched_gt >= 0] = gt_labels[matched_gt[matched_gt >= 0]]
    cls_logits.scatter_add_(2, labels[..., None], 7.0 * (labels > 0)[..., None])
    box_deltas = torch.randn(*shape, 4, generator=generator)
    return cls_logits.to(device), box_deltas.to(device)


def peer_cases(images: Tensor, paths: list[str], truth: common.Truth, num_classes: int) -> common.Cases:
    """Return {case: function} of torchvision."""
    device = images.device
    peer = common.peer_model(num_classes, device).eval()
    anchors = common.peer_anchors(peer, device)
    anchors_cxcywh = box_convert(anchors.cpu() / ssd.IMAGE_SIZE, "xyxy", "cxcywh")
    outputs = made_outputs(anchors_cxcywh, truth, num_classes, device)
    head = dict(zip(("cls_logits", "bbox_regression"), outputs, strict=True))
    peer.head.register_forward_hook(lambda module, inputs, output: head)
    pixels = [image.contiguous() for image in images.float().div(255)]

    def open_file(path: str) -> Tensor:
        image = v2.functional.to_image(common.Image.open(path).convert("RGB"))
        return v2.functional.to_dtype(image, torch.float32, scale=True).to(device)

    @torch.inference_mode()
    def detect(dtype: torch.dtype | None, from_files: bool) -> list[dict]:
        with ssd.autocast(device, dtype):
            return peer([open_file(path) for path in paths] if from_files else pixels)

    @torch.inference_mode()
    def decode_and_nms() -> list[dict]:
        return peer.postprocess_detections(head, [anchors] * len(images), [images.shape[2:]] * len(images))

    small = (
        torchvision.models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=num_classes + 1, score_thresh=0.5
        )
        .to(device)
        .eval()
    )
    cases: common.Cases = {
        "torchvision decode + NMS": decode_and_nms,
        "torchvision SSDlite fp32": torch.inference_mode()(lambda: small(pixels)),
    }
    for name, dtype in common.precisions(device).items():
        cases[f"torchvision {name} files"] = functools.partial(detect, dtype, from_files=True)
        cases[f"torchvision {name}"] = functools.partial(detect, dtype, from_files=False)
    return cases


class OpenVinoInput:
    """What is used of an onnxruntime session's input."""

    type = "tensor(uint8)"


class OpenVinoSession:
    """A network compiled by OpenVINO, with what is used of an onnxruntime session."""

    def __init__(self, compiled: Callable[[dict], dict]) -> None:
        self.compiled = compiled

    def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs of the network for its named inputs."""
        return list(self.compiled(inputs).values())

    def get_inputs(self) -> list[OpenVinoInput]:
        """Return the description of the one input."""
        return [OpenVinoInput()]


def openvino_session(path: str, threads: int) -> OpenVinoSession:
    """Return an ONNX file in OpenVINO, with what is used of an onnxruntime session."""
    import openvino

    return OpenVinoSession(openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads}))


def make_sessions(detector: ssd.Detector, records: Sequence[ssd.Record], threads: int) -> dict:
    """Return {case: session} of the ONNX files of a Detector; their size is the attribute `megabytes`."""
    sessions = {}
    pictures = [onnx.network_input(record.read(), "uint8") for record in records]
    for name, calibration in (("fp32", None), ("int8", pictures)):
        content = onnx.to_onnx(detector, calibration=calibration).SerializeToString()
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            Path(file.name).write_bytes(content)
            sessions[f"ONNX Runtime {name}"] = onnx.open_onnx(file.name, threads)
            if importlib.util.find_spec("openvino"):
                sessions[f"OpenVINO {name}"] = openvino_session(file.name, threads)
        for case in [case for case in sessions if name in case]:
            sessions[case].megabytes = len(content) / 1e6
    return sessions


class MadeDetector(ssd.Detector):
    """A Detector that runs its network and goes on with made outputs."""

    made_outputs: tuple[Tensor, Tensor]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the made outputs."""
        super().forward(images)
        return self.made_outputs


def own_cases(model: ssd.SSD300, images: Tensor, paths: list[str], truth: common.Truth) -> common.Cases:
    """Return {case: function} of this project."""
    device, num_classes = images.device, model.num_classes
    outputs = made_outputs(model.anchors.cpu(), truth, num_classes, device)

    @torch.inference_mode()
    def detect(dtype: torch.dtype | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        with ssd.autocast(device, dtype):
            model(images)
        return ssd.detect(*outputs, model.anchors)

    cases: common.Cases = {"SSD300 decode + NMS": lambda: ssd.detect(*outputs, model.anchors)}
    for name, dtype in common.precisions(device).items():
        detector = MadeDetector(model, [str(k) for k in range(num_classes)], dtype)
        detector.made_outputs = outputs
        predict = functools.partial(detector.predict, batch_size=len(paths), score_thresh=0.01)
        cases[f"SSD300 {name} files"] = functools.partial(predict, paths)  # one batch, as `outputs` are
        cases[f"SSD300 {name}"] = functools.partial(detect, dtype)
    return cases


def measure_list(
    args: argparse.Namespace, model: ssd.SSD300, classes: Sequence[str], sessions: dict
) -> dict[str, float]:
    """Return {case: mAP@.5 on the list --test-split} of the sessions and of the network."""
    roots, _ = ssd.find_data(args.data, args.data_root, "", "", args.test_split)
    records, findings = ssd.read_records(roots[0], args.test_split, classes)
    ssd.print_findings(findings)
    maps = {name: onnx.onnx_map(session, records, len(classes)) for name, session in sessions.items()}
    loader = ssd.plain_loader(records, model, batch_size=1, workers=0)
    for name, dtype in common.precisions(model.anchors.device).items():
        maps[f"SSD300 {name}"] = ssd.measure(model, loader, amp_dtype=dtype)["map_area"]
    return maps


def find_by_onnx(session: Any, pixels: np.ndarray) -> tuple:
    """Return what an ONNX file finds in an image (H, W, 3), boxes in its pixels."""
    height, width = pixels.shape[:2]
    return onnx.find_objects(session, pixels, (width, height))


def find_in_files(find: Callable[[np.ndarray], tuple], paths: list[str]) -> list[tuple]:
    """Return what a function of images (H, W, 3) finds in image files, read one by one."""
    return [find(np.asarray(ssd.open_image(path))) for path in paths]


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure by the flags; returns what --json holds."""
    # The network, and what else detects with its weights.
    parser = common.make_speed_parser(__doc__, rounds=5)
    add = parser.add_argument
    add("--batch-sizes", type=ssd.positive_int, nargs="+", default=[1, 8], help="images a call")
    add("--width", type=ssd.positive_float, default=1.0, help="of a network with random weights")
    add("--checkpoint", metavar="FILE", help="a network trained on this data in its place")
    add("--test-split", metavar="LIST", help="measure the checkpoint's mAP on this list")
    args = parser.parse_args(argv)
    device, data = common.begin(args)
    name = f"width {args.width:g}"
    model = ssd.SSD300(len(data.classes), width=args.width, prior_prob=ssd.FOCAL_PRIOR)
    if args.checkpoint:
        saved = ssd.load_checkpoint(args.checkpoint)
        if tuple(saved["classes"]) != data.classes:
            parser.error(f"--checkpoint has other classes than --data: {', '.join(saved['classes'])}")
        name = args.checkpoint
        model = ssd.model_from_checkpoint(saved, args.checkpoint)
    sessions = {}
    if device.type == "cpu":
        sessions = make_sessions(ssd.Detector(model, data.classes), ssd.spread(data.train, 32), args.threads)
    model.to(device).to(memory_format=torch.channels_last)
    maps = {}
    if args.test_split:
        maps = measure_list(args, model, data.classes, sessions)

    # The cases of each batch size, and their rows.
    rows = []
    first = f"torchvision {next(iter(common.precisions(device)))}"
    for size in args.batch_sizes:
        batch, truth = common.make_batch(data.train, device, batch_size=size)
        paths = [data.train[i % len(data.train)].image_path for i in range(size)]
        cases = peer_cases(batch["images"], paths, truth, len(data.classes))
        cases |= own_cases(model, batch["images"], paths, truth)
        peer_of = {name: name.replace("SSD300", "torchvision") for name in cases}
        for case, session in sessions.items():
            cases[case] = functools.partial(session.run, None, {"images": batch["images"].numpy()})
            find = functools.partial(find_by_onnx, session)
            cases[f"{case} files"] = functools.partial(find_in_files, find, paths)
            peer_of |= {case: first, f"{case} files": f"{first} files"}
        for row in common.rows_of(common.time_in_turns(cases, args.rounds, device), peer_of, images=size):
            case = row["case"]
            more = {"MB": getattr(sessions.get(case), "megabytes", None), "mAP": maps.get(case)}
            rows.append({**row, "case": f"{case}, batch {size}", **more})
    return common.report(f"Detection, {name}", rows, args, device)


if __name__ == "__main__":
    main()
