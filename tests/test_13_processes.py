"""Training by several processes under torchrun, and compiling."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch._inductor.exc import InductorError

import ssd_object_detection as ssd

MODULE = Path(ssd.__file__)
CPU = torch.device("cpu")
TWO_PROCESSES = """
import sys
import torch
import test_13_processes as here
import ssd_object_detection as ssd

batch = torch.load("batch.pt")
with ssd.joined_processes("cpu"):
    gradients = here.gradients(batch)
    memory = here.memory_of_images(ssd.load_data(sys.argv[1]).train)
    found = {"gradients": gradients, "memory": memory}
    ssd.write_atomically("found.pt", lambda path: torch.save(found, path))
"""
DYING = """
import os, signal, sys
import ssd_object_detection as ssd

train_one_epoch = ssd.train_one_epoch

def dying(state, *args, **more):
    if state.epoch == 1 and ssd.process_rank()[0] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_one_epoch(state, *args, **more)

ssd.train_one_epoch = dying
sys.exit(ssd.main(sys.argv[1:]))
"""
FAULTY = """
import os, signal, sys, time
import ssd_object_detection as ssd

ssd.BEAT_SECONDS, ssd.SILENCE_SECONDS, ssd.GRACE_SECONDS = 0.5, 10.0, 2.0
train_one_epoch = ssd.train_one_epoch
fault, rank, others, *flags = sys.argv[1:]

def faulty(state, *args, **more):
    if state.epoch == 1 and ssd.process_rank()[0] == int(rank):
        if fault == "is switched off":
            os.kill(os.getppid(), signal.SIGSTOP)  # torchrun, with the store
        if fault != "has an error":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ssd.InputError("one.jpg cannot be read")
    if state.epoch == 1 and others == "notice nothing":
        time.sleep(3600)
    return train_one_epoch(state, *args, **more)

ssd.train_one_epoch = faulty
sys.exit(ssd.main(flags))
"""


class DoubleSSD300(ssd.SSD300):
    """The network in float64: float32 rounds gradients by 2e-6."""

    def __init__(self, *values, **more):
        super().__init__(*values, **more)
        self.double()


def gradients(batch):
    """Return {"loss name": gradient} of a step on this process's share of a batch; torchrun averages them."""
    rank, world = ssd.process_rank()
    part = {name: value[rank::world] for name, value in batch.items()}
    found = {}
    for loss in ("focal", "multibox"):
        torch.manual_seed(0)
        args = ssd.load_settings(
            [
                "--recipe",
                "small",
                "--no-pretrained",
                "--width",
                ".0625",
                "--no-compile",
                "--batch-norm",
                "none",
            ]
        )[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ssd, "SSD300", DoubleSSD300)
            state, _ = ssd.build_state(args, ssd.Machine(CPU, None, 0, False), 3)

        def criterion(outputs, targets, loss=loss, **more):
            return ssd.detection_loss(outputs, targets, loss=loss, **more)

        assert ssd.train_step(state, part, criterion, lr=1e-3, clip_grad=0.0, amp_dtype=None)
        found |= {f"{loss} {name}": p.grad for name, p in state.model.named_parameters()}
    return found


def memory_of_images(records):
    """Return (resident, share of it that is counted for this process) of the decoded images, in kB."""
    images = ssd.decode_all(records)
    for record, image in zip(records, images, strict=True):
        np.testing.assert_array_equal(image, record.read())
    torch.distributed.barrier()  # the other process has read them too
    found = {"Rss": 0, "Pss": 0}
    is_of_images = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(":")[0]:  # a mapping begins
            is_of_images = "memfd:decoded images" in line
        name, _, value = line.partition(":")
        if is_of_images and name in found:
            found[name] += int(value.split()[0])
    torch.distributed.barrier()
    return found["Rss"], found["Pss"]


def start_torchrun(*command, cwd):
    """Start torchrun with flags of its own, a script and the script's flags."""
    paths = os.pathsep.join([str(MODULE.parent), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, command)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code):
    """Wait for a process and demand its exit code; returns what it printed."""
    try:
        printed = process.communicate(timeout=300)[0]
    finally:
        process.kill()
    assert process.returncode == code, printed
    return printed


def torchrun(*command, cwd, code=0):
    """Run a script by torchrun in two processes and demand its exit code; returns what they printed."""
    return finish(start_torchrun("--standalone", "--nproc-per-node", "2", *command, cwd=cwd), code)


def on_two_machines(*command, folders, code=0):
    """Run a script by two torchruns of one process, as on two machines; returns what each printed.

    folders: the working folder of each. Both torchruns must end with the code; a first one that was frozen
    goes on when the second has ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    started = [
        start_torchrun(*where, "--node-rank", rank, *command, cwd=folder)
        for rank, folder in enumerate(folders)
    ]
    second = finish(started[1], code)
    if hasattr(signal, "SIGCONT"):
        started[0].send_signal(signal.SIGCONT)
    return [finish(started[0], code), second]


@pytest.fixture
def machines(tiny_voc, tmp_path):
    """The folders of two machines, with a copy of the data each."""
    folders = [tmp_path / "first machine", tmp_path / "second machine"]
    for folder in folders:
        shutil.copytree(tiny_voc, folder / "tiny_set")
    return folders


@pytest.fixture(scope="module")
def by_two(tiny_voc, tmp_path_factory):
    """What two processes found of a batch of four images, which is there too, and of the tiny data."""
    folder = tmp_path_factory.mktemp("two processes")
    generator = torch.Generator().manual_seed(0)
    # One process gets images with 3 and 1 objects, the other with none and 2: each counts other positives.
    labels = ([1, 2, 3], [], [2], [3, 1])
    low = [torch.rand(len(one), 2, generator=generator) * 0.5 for one in labels]
    batch = reference.batch([torch.cat((corner, corner + 0.4), dim=1) for corner in low], labels)
    batch["images"] = torch.randint(0, 256, (4, 3, 300, 300), dtype=torch.uint8, generator=generator)
    torch.save(batch, folder / "batch.pt")
    (folder / "script.py").write_text(TWO_PROCESSES)
    torchrun("script.py", tiny_voc, cwd=folder)
    return torch.load(folder / "found.pt") | {"batch": batch}


def test_gradient_of_two_processes_is_that_of_one_with_the_whole_batch(by_two):
    one, two = gradients(by_two["batch"]), by_two["gradients"]
    assert one.keys() == two.keys()
    for loss in ("focal", "multibox"):
        names = [name for name in one if name.startswith(loss)]
        size = torch.cat([one[name].flatten() for name in names]).norm()
        difference = torch.cat([(one[name] - two[name]).flatten() for name in names]).norm()
        assert size > 0.1
        assert difference < 1e-12 * size


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory without a file is Linux's")
def test_two_processes_hold_the_decoded_images_once(by_two):
    resident, share = by_two["memory"]
    assert resident > 0
    assert share == pytest.approx(resident / 2, rel=0.1)


def test_two_machines_train_as_one_does_and_each_resumes_the_other_s_run(
    tiny_voc, flags_of, machines, tmp_path
):
    """Two machines with a copy of the data each; the first one alone has the folder of the run."""
    same = ("--batch-norm", "none", "--optimizer", "sgd", "--lr", ".001", "--batch-size", "2")
    folders = {"one": tmp_path / "one", "two": machines[0] / "two"}
    assert ssd.main(flags_of(tiny_voc, folders["one"], *same)) == 0
    printed = on_two_machines(MODULE, *flags_of("tiny_set", "two", *same), folders=machines)
    assert printed[0].count("Test mAP@.5") == 1
    assert "mAP" not in printed[1]

    # From the checkpoint after the first epoch each goes on as the other did.
    go_on = ["--resume", "--workers", "0", "--device", "cpu", "--output-dir"]
    folders |= {"one resumed": machines[0] / "one", "two resumed": tmp_path / "two"}
    for world in ("one", "two"):
        (folders[f"{world} resumed"] / "checkpoints").mkdir(parents=True)
        last = folders[f"{world} resumed"] / "checkpoints" / "last.pth"
        shutil.copy(folders[world] / "checkpoints" / "previous.pth", last)
    on_two_machines(MODULE, *go_on, "one", "--data", "tiny_set", folders=machines)
    assert ssd.main([*go_on, str(folders["two resumed"]), "--data", str(tiny_voc)]) == 0
    assert [path.name for path in machines[1].iterdir()] == ["tiny_set"]

    rows, weights = {}, {}
    for name, folder in folders.items():
        lines = (folder / "checkpoints" / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
        weights[name] = ssd.load_checkpoint(folder / "checkpoints" / "last.pth")["train_state"]["model"]
    for name in folders:
        assert len(rows[name]) == 2
        for ours, theirs in zip(rows[name], rows["one"], strict=True):
            for column in ("train_loss", "train_loss_cls", "train_loss_box", "val_map_area"):
                assert ours[column] == pytest.approx(theirs[column], rel=1e-4, abs=1e-5), (name, column)
        for key, value in weights["one"].items():
            torch.testing.assert_close(weights[name][key], value, rtol=0, atol=1e-5, msg=f"{name} {key}")

    # Two machines measured the test list, each of them one batch: to the last digit as one does.
    final = folders["two"] / "checkpoints" / "ssd_tiny_set_final.pth"
    flags = ["--data", str(tiny_voc), "--device", "cpu", "--output-dir", str(tmp_path)]
    assert ssd.main(["--evaluate", str(final), *flags]) == 0
    alone = json.loads((tmp_path / "plots" / "evaluation" / "evaluation.json").read_text())
    measured = ssd.load_checkpoint(final)["test"]
    assert measured["map_area"] > 0
    for column in ("map_area", "map11", "map75", "per_class"):
        assert measured[column] == alone[column]


def test_a_process_that_dies_ends_the_others_and_the_run_can_go_on(tiny_voc, flags_of, tmp_path):
    """The second process kills itself in the second epoch, as the kernel does when memory runs out."""
    (tmp_path / "script.py").write_text(DYING)
    printed = torchrun("script.py", *flags_of(tiny_voc, tmp_path), cwd=tmp_path, code=1)
    assert re.search(r"exitcode.*-9|Signal 9|SIGKILL", printed)
    state = ssd.load_checkpoint(tmp_path / "checkpoints" / "last.pth", resumable=True)["train_state"]
    assert state["epoch"] == 1
    assert not list(tmp_path.rglob("*.pth.*.tmp"))


def lines_of_processes(printed):
    """Return the errors of its processes that a torchrun printed: our lines, and tracebacks, "[rank1]: "."""
    return [line for line in printed.splitlines() if re.match(r"error: |\[rank\d+\]: ", line)]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    ("fault", "rank", "others"),
    [
        ("has an error", 1, "lose the connection"),
        ("is killed", 0, "lose the connection"),
        ("has an error", 1, "notice nothing"),  # as when NCCL waits for it
        ("is killed", 1, "notice nothing"),
        ("is switched off", 0, "notice nothing"),
    ],
)
def test_a_process_that_stops_ends_the_other_machine_with_one_line(
    fault, rank, others, flags_of, machines, tmp_path
):
    script = tmp_path / "script.py"
    script.write_text(FAULTY)
    flags = flags_of("tiny_set", "run")
    printed = on_two_machines(script, fault, rank, others, *flags, folders=machines, code=1)
    cause = ["error: one.jpg cannot be read"] if fault == "has an error" else []
    assert lines_of_processes(printed[rank]) == cause
    lines = lines_of_processes(printed[1 - rank])
    assert [line.partition(" or ")[0] for line in lines] == ["error: another process stopped"]
    checkpoint = ssd.load_checkpoint(machines[0] / "run" / "checkpoints" / "last.pth", resumable=True)
    assert checkpoint["train_state"]["epoch"] == 1


def test_data_missing_on_one_machine_ends_the_other_with_one_line(flags_of, machines):
    shutil.rmtree(machines[1] / "tiny_set")
    printed = on_two_machines(MODULE, *flags_of("tiny_set", "run"), folders=machines, code=1)
    (cause,) = lines_of_processes(printed[1])
    assert "tiny_set" in cause
    lines = lines_of_processes(printed[0])
    assert [line.partition(" or ")[0] for line in lines] == ["error: another process stopped"]


def test_a_batch_that_processes_cannot_share_is_one_line():
    with pytest.raises(ssd.InputError, match="--batch-size"):
        ssd.EpochBatchSampler(8, 3, world=2)


# ---- compiling ----


def test_with_compile_the_compiled_network_trains_and_the_checkpoint_has_the_plain_names(
    tiny_voc, flags_of, tmp_path, monkeypatch, no_pictures
):
    calls = []

    class Compiled(nn.Module):
        def __init__(self, model, dynamic, mode):
            super().__init__()
            self.inner = model

        def forward(self, images):
            calls.append(len(images))
            return self.inner(images)

    monkeypatch.setattr(torch, "compile", Compiled)
    assert ssd.main(flags_of(tiny_voc, tmp_path, "--compile")) == 0
    assert calls == [4] * 4  # the training steps, of one size
    state = ssd.load_checkpoint(tmp_path / "checkpoints" / "last.pth")["train_state"]["model"]
    assert not [name for name in state if "inner" in name]


def test_a_network_that_cannot_be_compiled_is_one_line(tiny_voc, flags_of, tmp_path, monkeypatch, capfd):
    def broken(model, **options):
        def run(images):
            raise InductorError(RuntimeError("no compiler here\nand a long story"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    assert ssd.main(flags_of(tiny_voc, tmp_path, "--compile")) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: torch.compile failed (")
    assert "no compiler here" in line
    assert "--no-compile" in line
