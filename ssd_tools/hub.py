"""Write a model as a folder for Hugging Face, upload it, and make a checkpoint of one again.

    python -m ssd_tools.hub export checkpoints/ssd_shapes_final.pth exported/   # weights, config, card, plots
    python -m ssd_tools.hub export checkpoints/ssd_shapes_final.pth exported/ --onnx --push OWNER/NAME
    python -m ssd_tools.hub export checkpoints/ssd_shapes_final.pth exported/ --space   # and a page to try it
    python -m ssd_tools.hub pth OWNER/NAME model.pth               # and back, to train or measure it

Needs safetensors; --push and OWNER/NAME need huggingface_hub, --onnx and --space what ssd_tools.onnx needs.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ssd_object_detection as ssd
from ssd_tools import onnx, report
from ssd_tools.common import load_evaluation, optional_import, run_program
from ssd_tools.weights import load_weights

HERE = Path(__file__).resolve().parent
EXAMPLES = [folder / "examples" / "detect_onnx.py" for folder in (HERE, HERE.parent)]  # installed; a checkout
EXAMPLE = EXAMPLES[0] if EXAMPLES[0].is_file() else EXAMPLES[1]
EXAMPLE_PARTS = (EXAMPLE.name, "camera_onnx.py", "check_onnx.py")

# A Hugging Face Space: with what its page was tried, the packages it needs beside gradio, and its files.
SPACE = {"sdk": "gradio", "sdk_version": "6.31.0", "python_version": "3.11", "app_file": "app.py"}
SPACE_PACKAGES = "numpy\nonnxruntime>=1.25\npillow\n"
SPACE_FILES = (
    "README.md",
    "app.py",
    "config.json",
    EXAMPLE.name,
    "model.onnx",
    "plots/*",
    "requirements.txt",
)

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

SPACE_USE = """\
`pip install -r requirements.txt gradio` and `python app.py` start a page that finds objects in a picture."""

LIMITS = """\
* Only the classes above, and only images like those of the training data, were measured.
* The input is 300x300: objects below a tenth of the image's side are matched by one anchor only.
* Scores rank detections; they are not calibrated probabilities.
* One seed: the spread over seeds is unknown."""

METRICS = {"map_area": "mAP@.5 (area)", "map11": "mAP@.5 (11-point)", "map75": "mAP@.75 (area)"}
BATCH_NORM_TEXTS = {
    "none": "without batch norm",
    "new": "batch norm in the new layers",
    "all": "with batch norm",
}


# ---- the model card ----


def front_matter(name: str, run: report.Run, licence: str | None, *, space: bool = False) -> str:
    """Return the card's header with the measured mAPs; JSON, which is YAML, so that no name breaks it.

    space: the folder is a Hugging Face Space, too.
    """
    header: dict[str, Any] = {
        "library_name": "pytorch",
        "pipeline_tag": "object-detection",
        "tags": ["ssd300", "vgg16"],
    }
    if licence:
        header["license"] = licence
    test = run["test"]
    if report.is_number(test.get("map_area")):
        metrics = [
            {"type": "mAP", "name": title, "value": round(test[key], 4)} for key, title in METRICS.items()
        ]
        data_name = report.data_name(test)
        data = {"name": data_name, "type": data_name, "split": test["split"]}
        result = {"task": {"type": "object-detection"}, "dataset": data, "metrics": metrics}
        header["model-index"] = [{"name": name, "results": [result]}]
    if space:
        header |= {"title": name.split("/")[-1], **SPACE}
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items()]
    return "\n".join(["---", *lines, "---"])


def model_in_words(run: report.Run) -> str:
    """Return a sentence on the network, where its weights began, and its classes."""
    flags = run["flags"]
    config = run["config"]
    classes = run["classes"]
    names = ", ".join(report.plain_markdown(name) for name in classes)
    start = "trained from scratch"
    if not flags:
        start = "its start not recorded"
    elif flags.get("init_from"):
        start = f"trained further from {Path(flags['init_from']).name}"
    elif flags.get("pretrained"):
        start = "from ImageNet weights"
    return (
        f"SSD300 with a VGG16 backbone, width {config['width']:g}, {BATCH_NORM_TEXTS[config['batch_norm']]}, "
        f"{start}, for {len(classes)} classes: {names}. Input: 300x300 pixels, RGB."
    )


def choice_in_words(flags: dict[str, Any]) -> str:
    """Return in words what chose the epoch that was kept."""
    if not flags:
        return "what chose the epoch was not recorded"
    if flags.get("val_split"):
        return f"list {flags['val_split']} chose the epoch"
    if flags.get("val_fraction"):
        return f"a held-out {flags['val_fraction']:.0%} of the training list chose the epoch"
    return "the last epoch was kept"


def card(
    name: str,
    run: report.Run,
    *,
    licence: str | None = None,
    data_licence: str | None = None,
    onnx_check: str | None = None,
    space: bool = False,
) -> str:
    """Return the model card from a run's own records; what was not recorded is called so."""
    header = front_matter(name, run, licence, space=space)
    parts = [header, f"# {name}", model_in_words(run), "## Use", USE]
    if onnx_check:
        parts += [
            f"`python {EXAMPLE.name} model.onnx picture.jpg` needs numpy, pillow and onnxruntime only.",
            f"Compared with PyTorch when it was written: {onnx_check}.",
        ]
    if space:
        parts += [SPACE_USE]
    parts += [
        "## Measured",
        report.protocol(run),
        report.markdown(report.table_rows(run["test"])),
        "## Errors",
        "\n".join(f"* {line}" for line in report.in_words(run)),
        "## Training",
        f"Data: {report.data_name(run['flags'])}; {choice_in_words(run['flags'])}.",
    ]
    if run["environment"]:
        parts += [f"```\n{report.command(run)}\n```", report.machine(run)]
    else:
        parts += ["Machine: not recorded."]
    parts += [f"![{title}](plots/{path.name})" for path, title in run["plots"]]
    weights = licence or "not stated"
    data = data_licence or "not stated"
    parts += ["## Limits", LIMITS, "## Licence", f"Code: MIT. Weights: {weights}. Training data: {data}."]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- the folder ----


def write_config(path: Path, checkpoint: dict[str, Any], run: report.Run, card: str | None) -> None:
    """Write config.json: what `weights.load_published` needs, test numbers and flags, no local folders.

    card: the address of the model card, None: not known.
    """
    test = {key: value for key, value in run["test"].items() if key != "checkpoint"}
    if test:
        test["data"] = report.data_name(test)
    content = {
        "model_type": "ssd300",
        "image_size": ssd.IMAGE_SIZE,
        "classes": run["classes"],
        "id2label": dict(enumerate(run["classes"], start=1)),
        **{key: checkpoint[key] for key in ("format_version", "version", "config", "score_thresh")},
        "test": test,
        "flags": report.public_flags(run["flags"]),
    }
    if card:
        content["card"] = card
    ssd.write_json(path, content)


def write_space(folder: Path) -> None:
    """Write the page of a Hugging Face Space beside model.onnx, and the packages that it needs."""
    shutil.copyfile(EXAMPLE.with_name("app.py"), folder / "app.py")
    (folder / "requirements.txt").write_text(SPACE_PACKAGES, encoding="utf-8")


def export_folder(
    checkpoint: dict[str, Any],
    model: ssd.SSD300,
    run: report.Run,
    folder: Path,
    *,
    name: str,
    onnx_images: Sequence[ssd.PathLike] = (),
    space: bool = False,
    address: str | None = None,
    **licences: str | None,
) -> None:
    """Write the folder for Hugging Face; with images to check it on, model.onnx too.

    space: with them also a page to try the model; address: where the card will be.
    """
    safetensors = optional_import("safetensors.torch", "writing model.safetensors")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model.safetensors").is_file():
        raise ssd.InputError(f"{folder} is there and not of this program: choose another folder to write")
    for stale in ("model.onnx", "app.py", "requirements.txt"):  # of an earlier export, maybe of another model
        (folder / stale).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in checkpoint["model"].items()}

    def write(temporary: Path) -> None:
        safetensors.save_file(state, temporary, {"format": "pt"})
        temporary.chmod(0o644)  # save_file lets its owner alone read it

    ssd.write_atomically(folder / "model.safetensors", write)
    write_config(folder / "config.json", checkpoint, run, address)
    shutil.copyfile(ssd.__file__, folder / "ssd_object_detection.py")
    for path, _ in run["plots"]:
        (folder / "plots").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "plots" / path.name)
    summary = None
    if onnx_images:
        check = functools.partial(onnx.check_onnx, images=onnx_images)
        summary = onnx.export_onnx(checkpoint, model, folder / "model.onnx", check)
        for part in EXAMPLE_PARTS:
            shutil.copyfile(EXAMPLE.with_name(part), folder / part)
    if space:
        write_space(folder)
    text = card(name, run, onnx_check=summary, space=space, **licences)
    ssd.write_atomically(folder / "README.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def push(folder: Path, repo: str, private: bool = False, *, space: bool = False) -> str:
    """Upload a folder to Hugging Face as a model, or its page as a Space; returns the address.

    InputError if that fails.
    """
    hub = optional_import("huggingface_hub", "--push")
    if not hub.get_token():
        raise ssd.InputError("--push: not logged in to Hugging Face: run `hf auth login`, or set HF_TOKEN")
    api = hub.HfApi()
    kind: dict[str, Any] = {"repo_id": repo, "repo_type": "model"}
    making: dict[str, Any] = {"private": private, "exist_ok": True}
    sending: dict[str, Any] = {"folder_path": folder, "commit_message": "Upload the model"}
    if space:
        kind["repo_type"] = "space"
        making["space_sdk"] = SPACE["sdk"]
        sending["allow_patterns"] = SPACE_FILES
    try:
        hub.utils.validate_repo_id(repo)
        api.create_repo(**kind, **making)
        return api.upload_folder(**kind, **sending).commit_url
    except Exception as error:  # a wrong name, no access, no network, a broken connection
        reasons: dict[Any, str] = {401: "the token is not valid: ", 403: "the token may not write there: "}
        status = getattr(getattr(error, "response", None), "status_code", None)
        problem = " ".join(str(error).split())[:200]
        raise ssd.InputError(f"--push {repo}: {reasons.get(status, '')}{problem}") from None


# ---- the command line ----


def run_export(args: argparse.Namespace) -> None:
    """Write the folder of a checkpoint, and upload it if asked to."""
    source = Path(args.checkpoint)
    settings, checkpoint = load_evaluation(source)
    model = ssd.model_from_checkpoint(checkpoint, source)
    images: Sequence[ssd.PathLike] = ()
    if args.onnx or args.space:
        images = args.images or onnx.example_images(settings.data)
    folder = Path(args.folder)
    export_folder(
        checkpoint,
        model,
        report.read_run(source),
        folder,
        name=args.push or folder.resolve().name,
        onnx_images=images,
        space=args.space,
        address=args.push and f"https://huggingface.co/{args.push}",
        licence=args.license,
        data_licence=args.data_license,
    )
    print("\n".join(str(path) for path in sorted(folder.rglob("*")) if path.is_file()))
    if args.push:
        print(push(folder, args.push, args.private))
        if args.space:
            print(push(folder, args.push, args.private, space=True))


def run_pth(args: argparse.Namespace) -> None:
    """Write the checkpoint of an exported folder or a Hugging Face id."""
    checkpoint = load_weights(args.source)
    ssd.model_from_checkpoint(checkpoint, args.source)  # InputError unless its weights fit
    ssd.save_checkpoint(args.output, checkpoint)
    print(args.output)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the two commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    export = commands.add_parser("export", help="write a folder for Hugging Face")
    export.set_defaults(run=run_export)
    add = export.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("folder", metavar="DIR")
    add("--license", metavar="ID", help="of the weights, as Hugging Face spells it: mit, cc-by-4.0, other")
    add("--data-license", metavar="TEXT", help="licence of the training data, in words")
    add("--onnx", action="store_true", help="add model.onnx, checked")
    add("--space", action="store_true", help="add model.onnx and a page to try it, for a Hugging Face Space")
    add("--images", nargs="+", metavar="FILE", help="images to check it with (default: 16 of the run's data)")
    add("--push", metavar="OWNER/NAME", help="upload the folder to this Hugging Face repository")
    add("--private", action="store_true", help="make that repository private")
    pth = commands.add_parser("pth", help="write a checkpoint for --init-from, --evaluate and --predict")
    pth.set_defaults(run=run_pth)
    pth.add_argument("source", metavar="SOURCE", help="an exported folder, or a Hugging Face id OWNER/NAME")
    pth.add_argument("output", metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 a mistake to mend."""
    args = build_parser().parse_args(argv)
    return run_program(functools.partial(args.run, args))


if __name__ == "__main__":
    sys.exit(main())
