"""Training by several processes, profiling, compiling: what section 13 does beside the recipe."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import ssd_object_detection as ssd

MODULE = Path(ssd.__file__)
SCRIPT = """
import types, torch
import test_13_processes as here
import ssd_object_detection as ssd

with ssd.joined_processes(types.SimpleNamespace(device="cpu")):
    grads = here.gradients(torch.load("batch.pt"))
    ssd.write_atomically("gradients.pt", lambda path: torch.save(grads, path))
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


def gradients(batch):
    """Return the gradients, by loss and weight, of this process's share of a batch; torchrun averages them."""
    rank, world = ssd.process_rank()
    part, found = {name: value[rank::world] for name, value in batch.items()}, {}
    for loss in ("focal", "multibox"):
        recipe = types.SimpleNamespace(match_iou=0.5, loss=loss, focal_alpha=-1.0, focal_gamma=1.0, cls_weight=1.0,
                                       box_weight=1.0)
        torch.manual_seed(0)
        model = ssd.SSD300(3, width=0.0625, prior_prob=0.01).double()  # float32's rounding makes 2e-6
        network = ssd.make_network(types.SimpleNamespace(model=model), compiled=False, amp_dtype=None, batch_size=2)
        ssd.make_criterion(model.anchors.float(), recipe)(network(part["images"]), part)["loss"].backward()
        found |= {f"{loss} {name}": p.grad for name, p in model.named_parameters()}
    return found


def torchrun(*command, cwd):
    """Run a script by torchrun in two processes; returns what they printed."""
    paths = os.pathsep.join([str(MODULE.parent), str(Path(__file__).parent)])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gradient_of_two_processes_is_that_of_one_with_the_whole_batch(tmp_path):
    generator = torch.Generator().manual_seed(0)
    # One process gets images with 3 and 1 objects, the other with none and 2: each counts other positives.
    gt_labels = torch.tensor([[1, 2, 3], [0, 0, 0], [2, 0, 0], [3, 1, 0]])
    low = torch.rand(4, 3, 2, generator=generator) * 0.5
    batch = {"images": torch.randint(0, 256, (4, 3, 300, 300), dtype=torch.uint8, generator=generator),
             "gt_boxes": torch.cat((low, low + 0.4), dim=2), "gt_labels": gt_labels}
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun("script.py", cwd=tmp_path)
    one, two = gradients(batch), torch.load(tmp_path / "gradients.pt")
    assert one.keys() == two.keys()
    for loss in ("focal", "multibox"):
        difference, size = (torch.cat([grad.flatten() for name, grad in grads.items() if name.startswith(loss)]).norm()
                            for grads in ({name: one[name] - two[name] for name in one}, one))
        assert size > 0.1
        assert difference < 1e-12 * size


def test_two_processes_train_as_one_does(tiny_voc, flags_of, tmp_path):
    same = ("--no-batch-norm", "--clip-grad", "0", "--optimizer", "sgd", "--lr", ".001")
    assert ssd.main(flags_of(tiny_voc, tmp_path / "1", *same)) == 0
    printed = torchrun(MODULE, *flags_of(tiny_voc, tmp_path / "2", *same, "--cache", "ram"), cwd=tmp_path)
    assert printed.count("Test mAP@.5") == 1  # the second process is silent
    rows, states = [], []
    for folder in (tmp_path / n / "checkpoints" for n in "12"):
        rows.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        states.append(torch.load(folder / "last.pth")["train_state"]["model"])
    assert [len(r) for r in rows] == [2, 2]
    for one, two in zip(*rows, strict=True):
        for name in ("train_loss", "train_loss_cls", "train_loss_box", "val_map_area"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), name
    # From the checkpoint after the first epoch each goes on as the other did.
    for number, go_on in (("1", functools.partial(torchrun, MODULE, cwd=tmp_path)), ("2", ssd.main)):
        part = tmp_path / f"{number} resumed"
        (part / "checkpoints").mkdir(parents=True)
        shutil.copy(tmp_path / number / "checkpoints" / "previous.pth", part / "checkpoints" / "last.pth")
        go_on("--resume", "--output-dir", part) if number == "1" else go_on(["--resume", "--output-dir", str(part)])
        states.append(torch.load(part / "checkpoints" / "last.pth")["train_state"]["model"])
    for state in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5, msg=name)


def test_a_process_that_dies_ends_the_others_with_a_message(tiny_voc, flags_of, tmp_path):
    """The second process kills itself in the second epoch, as the kernel does when memory runs out."""
    (tmp_path / "script.py").write_text(DYING)
    with pytest.raises(AssertionError) as caught:
        torchrun("script.py", *flags_of(tiny_voc, tmp_path), cwd=tmp_path)
    assert "exitcode: -9" in re.sub(" +", " ", str(caught.value)).replace("exitcode :", "exitcode:")
    assert ssd.load_checkpoint(tmp_path / "checkpoints" / "last.pth", resumable=True)["train_state"]["epoch"] == 1


# -- Profile


def test_profile_writes_a_trace_and_prints_the_costliest_operations(tiny_voc, flags_of, tmp_path, capfd):
    flags = flags_of(tiny_voc, tmp_path, "--profile", "1", "--batch-size", "2", "--epochs", "1")
    assert ssd.main(flags) == 0
    out = capfd.readouterr().out
    trace = json.loads((tmp_path / "plots" / "profile.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::convolution_backward" in names
    table = out[out.index("Self CPU %") :]
    assert len(re.findall(r"^ *\S.*\d+\.\d+%.*$", table[: table.index("Self CPU time total")], re.M)) == 10


def test_profile_of_more_steps_than_there_are_is_told(tiny_voc, flags_of, tmp_path, fails):
    line = fails(flags_of(tiny_voc, tmp_path, "--profile", "30"))
    assert "--profile 30 needs 33 steps, this run has 4" in line


# -- Compile


class Small(nn.Module):
    """Convolution, batch norm, L2 norm: what a compiler meets in SSD300, in a second."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*ssd._conv(3, 8, batch_norm=True), ssd.L2Norm(8))

    def forward(self, images):
        x = self.layers(images.float() / 255)
        return x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler, so nothing to compile")
def test_compiled_network_gives_the_same_numbers(capfd):
    torch.manual_seed(0)
    model = Small()
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = ssd.compile_model(model, images)
    assert "warning: not compiled" not in capfd.readouterr().err
    assert compiled is not model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    results = []
    for network in (compiled, model):
        model.load_state_dict(before)
        outputs = network(images)
        model.zero_grad()
        (outputs[0].square().sum() + outputs[1].sum()).backward()
        values = [*outputs, *model.buffers(), torch.cat([p.grad.flatten() for p in model.parameters()])]
        results.append([value.detach().clone() for value in values])
    for mine, plain in zip(*results, strict=True):  # the bias before a batch norm has a gradient of rounding only
        assert (mine - plain).float().norm() <= 1e-5 * plain.float().norm()


def test_network_that_cannot_be_compiled_runs_as_it_is_with_one_warning(monkeypatch, capfd):
    def broken(model, **options):
        def run(images):
            raise RuntimeError("no compiler here\nand a long story")
        return run

    monkeypatch.setattr(torch, "compile", broken)
    model = Small()
    assert ssd.compile_model(model, torch.zeros(2, 3, 40, 40, dtype=torch.uint8)) is model
    assert capfd.readouterr().err == "warning: not compiled, and so slower: no compiler here\n"
