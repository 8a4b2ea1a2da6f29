"""What several programs share: errors as one line, optional packages, the measurement of a checkpoint."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ssd_object_detection as ssd


def error_line(error: Exception) -> str:
    """Return an error as one line; one that a loader process raised comes with a traceback before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].split("InputError: ")[-1]


def run_program(work: Callable[[], int | None]) -> int:
    """Call work() and return its exit code (None: 0); 2: a mistake to mend, told in one line; 130: Ctrl-C."""
    try:
        return work() or 0
    except (ssd.InputError, OSError) as error:
        print(f"error: {error_line(error)}", file=sys.stderr)
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


def evaluation_folder(args: argparse.Namespace) -> Path:
    """Return the folder of evaluation.json and what belongs to it."""
    return Path(args.output_dir) / "plots" / "evaluation"


def measure_checkpoint(args: argparse.Namespace) -> tuple[dict, list[ssd.Record], dict, dict]:
    """Measure a checkpoint as `--evaluate` does; returns what `ssd.evaluate_checkpoint` does.

    What the tools added to evaluation.json stays if the same was measured before.
    """
    path = evaluation_folder(args) / "evaluation.json"
    before = read_json(path)
    measured = ssd.evaluate_checkpoint(args)
    if read_json(path).items() <= before.items():
        ssd.write_json(path, before)
    return measured


def run_on_checkpoint(
    run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None, description: str
) -> int:
    """Call run(flags) for a command line of CHECKPOINT and the flags of --evaluate; returns the exit code."""
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
        run(ssd.parse_args(["--evaluate", path, *words[1:]]))

    return run_program(work)
