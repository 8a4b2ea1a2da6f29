"""Kill training runs at random moments, damage checkpoints and data, and count what comes of it.

    python benchmarks/faults.py --kills 200 --flips 200 --mutations 500

Prints the counts of each kind of trial as it ends. POSIX only: each run is a fork of this process, so that it
need not import torch again; it writes no plots and saves after every epoch, however short.
"""

import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import cv2
from common import ssd

from ssd_tools import audit, shapes

TIMES = {"seconds", "images_per_s", "data_wait"}
LISTS = ["--val-split", "val", "--test-split", "test"]
FLAGS = [*LISTS, "--recipe", "shapes", "--epochs", "3", "--workers", "0", "--device", "cpu", "--amp", "off"]


def run(
    main: Callable[[list[str]], int], argv: Sequence[object], *, kill_after: float | None = None
) -> tuple[int, str]:
    """Run main(argv) in a fork; returns its exit code, negative for a signal, and what it printed.

    kill_after: seconds until it is killed.
    """
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(output.fileno(), 2)
                sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
                ssd.save_figure = lambda figure, path: None
                ssd.SAVE_SECONDS = 0.0
                code = main([str(arg) for arg in argv])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read().decode(errors="replace")


def weights_of(path: Path) -> list[bytes]:
    """Return the weights of a checkpoint, averaged and not, as bytes, which == compares bit for bit."""
    saved = ssd.load_checkpoint(path)
    tensors = [*saved["model"].values(), *saved["train_state"]["model"].values()]
    return [tensor.numpy().tobytes() for tensor in tensors]


def metrics_of(checkpoints: Path) -> list[dict]:
    """Return the rows of metrics.jsonl, times apart."""
    path = checkpoints / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def kill_runs(flags: list, folder: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Kill runs and resume them, until there were enough kills and the last run has ended; returns counts."""
    whole, killed = folder / "whole" / "checkpoints", folder / "killed" / "checkpoints"
    began = time.perf_counter()
    run(ssd.main, [*flags, "--output-dir", whole.parent])
    seconds = time.perf_counter() - began
    expected = weights_of(whole / "last.pth"), metrics_of(whole)
    counts = collections.Counter({"kills": 0, "checkpoints looked at": 0, "unreadable": 0, "epochs lost": 0})
    while counts["kills"] < kills or killed.exists():
        how = ["--resume"] if (killed / "last.pth").exists() else flags
        kill_after = rng.uniform(0, 0.8 * seconds) if counts["kills"] < kills else None
        code, text = run(ssd.main, [*how, "--output-dir", killed.parent], kill_after=kill_after)
        saved_epochs = {}
        for path in killed.glob("*.pth"):
            counts["checkpoints looked at"] += 1
            try:
                saved_epochs[path.name] = ssd.load_checkpoint(path)["metrics"]["epoch"]
            except ssd.InputError as error:
                counts["unreadable"] += 1
                print(error)
        if code == -signal.SIGKILL:
            counts["kills"] += 1
            counts["epochs lost"] += max(0, len(metrics_of(killed)) - saved_epochs.get("last.pth", 0))
        elif code == 0:
            counts["runs ended"] += 1
            counts["of them bit-equal"] += (weights_of(killed / "last.pth"), metrics_of(killed)) == expected
            shutil.rmtree(killed.parent)
        else:
            raise SystemExit(f"a run ended with exit code {code}:\n{text}")
    return counts


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with a bit flipped in up to six of them, half of the time cut somewhere."""
    mutated = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        mutated[rng.randrange(len(mutated))] ^= 1 << rng.randrange(8)
    return bytes(mutated[: rng.choice([len(mutated), rng.randrange(len(mutated))])])


def damage_checkpoints(path: Path, flips: int, rng: random.Random) -> dict[str, int]:
    """Damage a checkpoint; each time it must be refused by name, or hold the same weights."""
    expected = weights_of(path)
    counts = {"damaged checkpoints": flips, "refused by name": 0, "with the same weights": 0}
    damaged = path.with_name("damaged.pth")
    for _ in range(flips):
        damaged.write_bytes(mutate(path.read_bytes(), rng))
        try:
            counts["with the same weights"] += weights_of(damaged) == expected
        except ssd.InputError as error:
            counts["refused by name"] += str(damaged) in str(error)
    return counts


def mutate_data(flags: list, data: Path, folder: Path, mutations: int, rng: random.Random) -> dict[str, int]:
    """Damage a file of the data; each time a training must stop and name it, or do without what is lost."""
    files = [path for kind in ("Annotations", "JPEGImages") for path in sorted((data / kind).iterdir())]
    counts = {
        "damaged annotations and images": mutations,
        "stopped, naming the file": 0,
        "trained through": 0,
        "ended otherwise": 0,
        "foretold by the audit": 0,
    }
    output = ["--output-dir", folder / "mutated"]
    for _ in range(mutations):
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(mutate(content, rng))
        audited, _ = run(audit.main, ["--data", data, *LISTS, *output])
        code, text = run(ssd.main, [*flags, *output, "--epochs", "1"])
        path.write_bytes(content)
        counts["foretold by the audit"] += (audited == 0) == (code == 0)
        if code == 0:
            counts["trained through"] += 1
        elif code == 2 and path.stem in text.splitlines()[-1]:
            counts["stopped, naming the file"] += 1
        else:
            counts["ended otherwise"] += 1
            print(f"{path.name}, exit code {code}:\n{text}")
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """Run all kinds of trials and print their counts."""
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--kills", type=ssd.natural_int, default=200, help="of training runs")
    add("--flips", type=ssd.natural_int, default=200, help="damaged checkpoints")
    add("--mutations", type=ssd.natural_int, default=500, help="damaged annotations and images")
    add("--seed", type=ssd.natural_int, default=0, help="of the moments and the damage")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    cv2.setNumThreads(0)  # threads do not survive a fork
    shapes.SPLITS.update(train=24, val=4, test=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = shapes.generate(folder / "shapes")
        flags = ["--data", data, *FLAGS]
        for trial in (
            lambda: kill_runs(flags, folder, args.kills, rng),
            lambda: damage_checkpoints(folder / "whole" / "checkpoints" / "last.pth", args.flips, rng),
            lambda: mutate_data(flags, data, folder, args.mutations, rng),
        ):
            for what, count in trial().items():
                print(f"{what:<45}{count:6d}", flush=True)


if __name__ == "__main__":
    main()
