"""Kill a training run at random moments, damage its files and its data, and look at what is left each time.

    python benchmarks/faults.py --kills 200 --flips 200 --mutations 500

Prints what came of each kind of trial, as it ends, and writes all to faults.json in the working folder. POSIX only:
each run is a fork of this process, so that it does not import torch again.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ssd_object_detection as ssd

TIMES = {"seconds", "images_per_s", "data_wait", "memory_gb"}


def run(argv, kill_after=None, file_limit=None):
    """Run main(argv) in a fork, silent and without pictures; returns its exit code, negative for a signal."""
    if (child := os.fork()) == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        for name in ("plot_augmentations", "plot_data", "plot_losses", "plot_training", "draw_gallery"):
            setattr(ssd, name, lambda *args, **more: Figure())
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        code = 70
        with contextlib.suppress(SystemExit):
            code = ssd.main(argv)
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def describe(output):
    """Return the weights, averaged and not, and the metrics, times apart, that a run left; for comparison by ==."""
    last = ssd.load_checkpoint(output / "checkpoints" / "last.pth")
    rows = [json.loads(line) for line in (output / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    weights = [v.numpy().tobytes() for part in (last["model"], last["train_state"]["model"]) for v in part.values()]
    return weights, [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def kill_runs(flags, folder, kills, rng):
    """Kill runs until there were enough kills; returns (checkpoints looked at, unreadable, runs ended, runs equal)."""
    began = time.perf_counter()
    assert run([*flags, "--output-dir", str(folder / "whole")]) == 0
    whole, expected = time.perf_counter() - began, describe(folder / "whole")
    looked = unreadable = ended = equal = done = 0
    output = folder / "killed"
    while done < kills or output.exists():  # the last run is brought to its end
        started = (output / "checkpoints" / "last.pth").exists()
        argv = ["--resume", "--output-dir", str(output)] if started else [*flags, "--output-dir", str(output)]
        code = run(argv, rng.uniform(0, 0.8 * whole) if done < kills else None)
        done += code == -signal.SIGKILL
        for path in (output / "checkpoints").glob("*.pth"):
            looked += 1
            try:
                ssd.load_checkpoint(path)
            except ssd.InputError as error:
                unreadable += 1
                print(error)
        if code == 0:
            ended, equal = ended + 1, equal + (describe(output) == expected)
            shutil.rmtree(output)
        elif code != -signal.SIGKILL:
            raise SystemExit(f"a resumed run ended with exit code {code}")
    return {"kills": done, "checkpoints looked at": looked, "unreadable": unreadable, "runs ended": ended,
            "of them bit-equal": equal}


def damage_checkpoints(path, flips, rng):
    """Flip a bit or cut the end of a checkpoint; each time it must be refused by name, or hold the same weights."""
    content, refused, same = path.read_bytes(), 0, 0
    expected = {k: v.numpy().tobytes() for k, v in ssd.load_checkpoint(path)["model"].items()}
    copy = path.parent / "damaged" / "last.pth"
    copy.parent.mkdir(exist_ok=True)
    for number in range(flips):
        at = rng.randrange(len(content))
        bad = content[:at] if number % 4 == 0 else (
            content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
        copy.write_bytes(bad)
        try:
            same += {k: v.numpy().tobytes() for k, v in ssd.load_checkpoint(copy)["model"].items()} == expected
        except ssd.InputError as error:
            refused += str(copy) in str(error)
    return {"damaged checkpoints": flips, "refused by name": refused, "harmless": same}


def mutate_data(flags, root, folder, mutations, rng):
    """Damage annotations and pictures, ten at a time; each must be named by the audit or trained through."""
    named = through = crashed = 0
    for batch in range(mutations // 10):
        data = folder / f"mutated{batch}"
        shutil.copytree(root, data, ignore=shutil.ignore_patterns("audit.json"))
        names = [p for kind in ("Annotations", "JPEGImages") for p in sorted((data / kind).glob("train_*"))]
        chosen = rng.sample(names, 10)
        for path in chosen:
            content = bytearray(path.read_bytes())
            for _ in range(rng.randint(1, 6)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        argv = ["--data", str(data), "--output-dir", str(data / "out"), "--allow-bad-data", "--epochs", "1",
                "--batch-size", "1"]
        crashed += run([*flags, *argv]) != 0
        report = json.loads((data / "audit.json").read_text())
        found = " ".join(place for places in report["findings"].values() for place in places)
        mine = sum(path.name in found for path in chosen)
        named, through = named + mine, through + 10 - mine
        shutil.rmtree(data)
    return {"mutated files": named + through, "named by the audit": named, "trained through": through,
            "runs that failed": crashed}


def main():
    """Run all kinds of trials and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--kills", 200), ("--flips", 200), ("--mutations", 500), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    args, results = parser.parse_args(), {}
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ssd.SHAPES_SPLITS.update(train=24, val=4, test=2)
        data = folder / "data"
        with contextlib.redirect_stdout(None):
            ssd.generate_shapes(data / "shapes")
        flags = ["--data", str(data / "shapes"), "--val-split", "val", "--test-split", "test", "--width", ".0625",
                 "--batch-size", "4", "--epochs", "3", "--workers", "0", "--device", "cpu", "--amp", "off",
                 "--lr", ".005", "--no-pretrained", "--save-minutes", "1e-9", "--deterministic"]
        trials = (
            lambda: kill_runs(flags, folder, args.kills, rng),
            lambda: damage_checkpoints(folder / "whole" / "checkpoints" / "last.pth", args.flips, rng),
            lambda: {"exit code of a run that can save nothing":
                     run([*flags, "--output-dir", str(folder / "full")], file_limit=400_000)},
            lambda: mutate_data(flags, data / "shapes", folder, args.mutations, rng),
        )
        for trial in trials:
            results |= (counts := trial())
            for what, count in counts.items():
                print(f"{what:<45}{count:6d}", flush=True)
    Path("faults.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
