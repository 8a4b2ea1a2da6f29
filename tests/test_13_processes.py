"""Training by several processes, profiling, compiling: what section 13 does beside the recipe."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ssd_object_detection as ssd

MODULE = Path(ssd.__file__)
GRADIENTS = """
import contextlib, types, torch
import ssd_object_detection as ssd

batch = torch.load("batch.pt")
torch.manual_seed(0)
model = ssd.SSD300(3, width=.0625, prior_prob=.01)
recipe = types.SimpleNamespace(match_iou=.5, loss="LOSS", focal_alpha=-1., focal_gamma=2., cls_weight=1., box_weight=1.)
with ssd.joined_processes(types.SimpleNamespace(device="cpu")):
    rank, world = ssd.process_rank()
    part = {name: value[rank::world] for name, value in batch.items()}
    state = types.SimpleNamespace(model=model)
    network = ssd.make_network(state, compiled=False, amp_dtype=None, batch_size=2)
    ssd.make_criterion(model.anchors, recipe)(network(part["images"]), part)["loss"].backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    ssd.write_atomically(f"gradients-{world}.pt", lambda path: torch.save(grads, path))
"""


def torchrun(processes, *command, cwd):
    """Run a script by torchrun, or plainly for one process."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    paths = os.pathsep.join([str(MODULE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *run, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("loss", ["focal", "multibox"])
def test_gradient_of_two_processes_is_that_of_one_with_the_whole_batch(tmp_path, loss):
    generator = torch.Generator().manual_seed(0)
    # Three objects in the first image, none in the second: each process counts other positives.
    gt_labels = torch.tensor([[1, 2, 3], [0, 0, 0], [2, 0, 0], [3, 1, 0]])
    low = torch.rand(4, 3, 2, generator=generator) * 0.5
    batch = {"images": torch.randint(0, 256, (4, 3, 300, 300), dtype=torch.uint8, generator=generator),
             "gt_boxes": torch.cat((low, low + 0.4), dim=2), "gt_labels": gt_labels}
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "gradients.py").write_text(GRADIENTS.replace("LOSS", loss))
    for processes in (1, 2):
        torchrun(processes, "gradients.py", cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"gradients-{n}.pt") for n in (1, 2))
    assert one.keys() == two.keys()
    scale = max(grad.abs().max() for grad in one.values())
    assert scale > 0.01
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-6 * max(1, scale), name


def test_two_processes_train_as_one_does(tiny_voc, flags_of, tmp_path):
    rows, weights = [], []
    for processes in (1, 2):
        flags = flags_of(tiny_voc, tmp_path / str(processes), "--no-batch-norm", "--clip-grad", "0", "--cache", "ram",
                         "--optimizer", "sgd", "--lr", ".001")
        done = torchrun(processes, MODULE, *flags, cwd=tmp_path)
        assert done.stdout.count("Test mAP@.5") == 1  # the second process is silent
        folder = tmp_path / str(processes) / "checkpoints"
        rows.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        weights.append(torch.load(folder / "last.pth")["train_state"]["model"])
    for one, two in zip(*rows, strict=True):
        for name in ("train_loss", "train_loss_cls", "train_loss_box", "val_map_area"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), name
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5, msg=name)


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
        return x.mean(dim=(2, 3)), x.amax(dim=(2, 3))


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler, so nothing to compile")
def test_compiled_network_gives_the_same_numbers(capfd):
    torch.manual_seed(0)
    model = Small()
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = ssd.compile_model(model, images)
    assert capfd.readouterr().err == ""
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
        results.append([*outputs, *(p.grad.clone() for p in model.parameters()), *model.buffers()])
        results[-1] = [value.detach().clone() for value in results[-1]]
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


def test_network_that_cannot_be_compiled_runs_as_it_is_with_one_warning(monkeypatch, capfd):
    def broken(model, **options):
        def run(images):
            raise RuntimeError("no compiler here\nand a long story")
        return run

    monkeypatch.setattr(torch, "compile", broken)
    model = Small()
    assert ssd.compile_model(model, torch.zeros(2, 3, 40, 40, dtype=torch.uint8)) is model
    assert capfd.readouterr().err == "warning: not compiled, and so slower: no compiler here\n"
