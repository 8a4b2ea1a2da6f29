"""What several programs share: exit codes, optional packages, the measurement of a checkpoint."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ssd_object_detection as ssd


def run_program(work: Callable[[], int | None]) -> int:
    """Call work() and return its exit code (None: 0); 2: a mistake to mend, told in one line; 130: Ctrl-C."""
    ssd.prepare_process()
    try:
        return work() or 0
    except (ssd.InputError, OSError) as error:
        print(f"error: {ssd.error_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def optional_import(name: str, purpose: str, package: str | None = None) -> Any:
    """Return a module that only some uses need; InputError that names the pip command if it is missing.

    package: the name that pip knows, if that is not the first part of the module's.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = package or name.split(".")[0]
        raise ssd.InputError(
            f"{purpose} needs the package {package}: pip install {package} ({error})"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the dict in a JSON file; an empty one if it is missing, damaged or something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def evaluation_folder(settings: ssd.Settings) -> Path:
    """Return the folder of evaluation.json and what belongs to it."""
    return Path(settings.output_dir) / "plots" / "evaluation"


def load_evaluation(path: ssd.PathLike, flags: Sequence[str] = ()) -> tuple[ssd.Settings, dict[str, Any]]:
    """Return the Settings of `--evaluate PATH` with further flags, and the checkpoint."""
    settings, checkpoint = ssd.load_settings(["--evaluate", str(path), *flags])
    assert checkpoint is not None  # --evaluate reads it
    return settings, checkpoint


def evaluate_again(settings: ssd.Settings, checkpoint: dict[str, Any]) -> ssd.Evaluation:
    """Measure a checkpoint as `--evaluate` does.

    What the tools added to evaluation.json stays if the same was measured before.
    """
    path = evaluation_folder(settings) / "evaluation.json"
    before = read_json(path)
    evaluation = ssd.evaluate_checkpoint(settings, checkpoint)
    if read_json(path).items() <= before.items():
        ssd.write_json(path, before)
    return evaluation


def run_on_checkpoint(
    run: Callable[[ssd.Settings, dict[str, Any]], None], argv: Sequence[str] | None, description: str
) -> int:
    """Call run(settings, checkpoint) by a command line of CHECKPOINT and flags; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s CHECKPOINT [flags of ssd_object_detection.py --evaluate]",
        epilog="The flags, with the same defaults: --data, --data-root, --test-split, --output-dir, "
        "--device, --score-thresh, --nms-iou, --batch-size ...",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pth file that training left")
    words = sys.argv[1:] if argv is None else list(argv)
    path = parser.parse_args(words[:1]).checkpoint

    def work() -> None:
        run(*load_evaluation(path, words[1:]))

    return run_program(work)
