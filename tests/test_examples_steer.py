"""examples/steer.py and ssd-detect.service: the rover stops whenever it does not know what is before it."""

import json
import os
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

if os.name != "posix":
    pytest.skip("steer.py is for Linux", allow_module_level=True)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STEER = EXAMPLES / "steer.py"
NOW = 1_800_000_000.0


def line_of(*boxes, now=NOW, name="person", size=(640, 480)):
    """Return a line of detect_onnx.py with objects of one class."""
    rows = [{"class": name, "score": 0.9, "box": box} for box in boxes]
    return json.dumps({"time": now, "ms": 80.0, "size": size, "boxes": rows}).encode()


@pytest.fixture(scope="module")
def judge():
    """A function that returns the command for a line, and why it is a stop."""
    function = runpy.run_path(str(STEER))["judge"]

    def judge_line(line):
        command, _, reason = function(line, "person", NOW)
        return command, reason

    return judge_line


LEFT, MIDDLE, RIGHT = [0, 200, 100, 300], [300, 200, 360, 300], [500, 200, 640, 300]


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (line_of(LEFT), "left"),
        (line_of(MIDDLE), "forward"),
        (line_of(RIGHT), "right"),
        (line_of(LEFT, RIGHT), "right"),  # the larger one
        (line_of(MIDDLE, now=NOW - 0.9), "forward"),
        (line_of([300, 0, 360, 400]), "stop"),  # near
        (line_of(), "stop"),
        (line_of(MIDDLE, name="chair"), "stop"),
    ],
)
def test_a_fresh_frame_is_a_command(judge, line, command):
    assert judge(line) == (command, "")


@pytest.mark.parametrize("age", [1.1, 3600, -1.1, float("nan"), float("inf")])
def test_a_stale_frame_is_a_stop(judge, age):
    assert judge(line_of(MIDDLE, now=NOW - age)) == ("stop", "the newest frame is stale")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"closed",
        b"\xff\xfe",
        b"3",
        b"null",
        b"[" * 100_000,
        line_of(MIDDLE)[:-5],
        line_of(MIDDLE).replace(b"time", b"date"),
        line_of(MIDDLE).replace(b'"time": ', b'"time": "now", "was": '),
        line_of(MIDDLE, size=(0, 480)),
        line_of(MIDDLE, size=(640,)),
        line_of([300, 200, 360]),
        line_of(["a", "b", "c", "d"]),
    ],
)
def test_what_is_no_line_of_the_detector_is_a_stop(judge, line):
    command, reason = judge(line)
    assert command == "stop"
    assert reason.startswith("not a line of detect_onnx.py (")


@pytest.mark.parametrize(
    "box", [[float("nan"), 200, 360, 300], [300, float("nan"), 360, 300], [1e9, 0, 2e9, 9]]
)
def test_a_box_that_is_nowhere_is_a_stop(judge, box):
    assert judge(line_of(box))[0] == "stop"


# ---- as a program ----


@pytest.fixture
def program():
    """steer.py, with pipes, after the stop that it begins with."""
    process = subprocess.Popen(
        [sys.executable, STEER, "person"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout.readline() == b"stop\n"
    yield process
    process.kill()
    process.communicate()


def drive(program):
    """Hand frames over until one is followed: a busy machine may be late for the first."""
    command = b"stop\n"
    while command == b"stop\n":
        program.stdin.write(line_of(MIDDLE, now=time.time()) + b"\n")
        command = program.stdout.readline()
    assert command == b"forward\n"


def wait_for_stop(program):
    """Read on, while the pipe to the program is open, until it stops."""
    commands = set(iter(program.stdout.readline, b"stop\n"))
    assert commands <= {b"forward\n"}


def test_it_stops_when_nothing_comes_any_more(program):
    drive(program)
    wait_for_stop(program)
    assert program.stderr.readline() == b"stop: no new frame for 1 seconds\n"
    drive(program)  # and goes on when something does


def test_it_stops_when_what_comes_is_no_line(program):
    drive(program)
    while not select.select([program.stdout], [], [], 0.05)[0]:
        program.stdin.write(b'{"time": ')  # bytes, but never a line
    wait_for_stop(program)


@pytest.mark.parametrize(("newest", "command"), [(RIGHT, "right"), (None, "stop")])
def test_only_the_newest_of_several_lines_counts(newest, command, tmp_path):
    last = b"closed" if newest is None else line_of(newest, now=time.time() + 0.5)
    path = tmp_path / "lines"
    path.write_bytes(b"\n".join([line_of(LEFT, now=time.time()), last, b""]))
    commands = []
    with path.open("rb") as stream:
        reason = runpy.run_path(str(STEER))["steer"](stream.fileno(), "person", commands.append)
    assert (commands, reason) == (["stop", command], "the detector has ended")


def test_it_stops_and_fails_when_the_detector_ends(program):
    drive(program)
    out, errors = program.communicate()
    assert out.endswith(b"stop\n")
    assert program.returncode == 1
    assert errors.splitlines()[-1] == b"stop: the detector has ended"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_stops_when_it_is_told_to_end(program, number):
    drive(program)
    program.send_signal(number)
    assert program.stdout.read().endswith(b"stop\n")
    assert program.wait() == 0


# ---- the service ----


def test_the_service_starts_what_is_there():
    text = (EXAMPLES / "ssd-detect.service").read_text(encoding="utf-8")
    (command,) = re.findall(r"^ExecStart=(.+)$", text, re.MULTILINE)
    programs = re.findall(r"venv/bin/python (\S+)", command)
    assert programs == ["detect_onnx.py", "steer.py"]
    assert all((EXAMPLES / name).is_file() for name in programs)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_accepts_the_service():
    command = ["systemd-analyze", "verify", "--man=no", EXAMPLES / "ssd-detect.service"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
