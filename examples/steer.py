"""Turn what detect_onnx.py prints of a camera into commands for a rover: forward, left, right or stop.

python detect_onnx.py model.onnx picamera | python steer.py person

It drives towards the largest object of the class and stops before it. A command is good until its frame is
MAX_AGE seconds old; then, and whenever anything is wrong, the command is stop, and the reason is a line on
standard error. The last command is stop: exit code 1 when the detector has ended, 0 for Ctrl-C, SIGTERM and a
closed terminal. It uses no package. Put your motors into `send`; nothing here can stop them after kill -9.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

MAX_AGE = 1.0  # seconds
NEAR = 0.7  # of the picture's height: an object that is taller is near enough
AHEAD = 0.15  # of its width: how far from the middle an object may be to be ahead
LONGEST = 1 << 20  # bytes of a line


def choose(frame: dict[str, Any], wanted: str) -> str:
    """Return the command for a frame; raises what Python raises where something is missing or no number."""
    width, height = frame["size"]
    boxes = [row["box"] for row in frame["boxes"] if row["class"] == wanted]
    if not boxes:
        return "stop"
    x1, y1, x2, y2 = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    side = (x1 + x2) / 2 / width - 0.5  # of the middle; negative is left
    is_far = 0 < y2 - y1 <= NEAR * height
    is_inside = abs(side) <= 0.5
    if not (is_far and is_inside):  # or NaN
        return "stop"
    if abs(side) <= AHEAD:
        return "forward"
    return "left" if side < 0 else "right"


def judge(line: bytes, wanted: str, now: float) -> tuple[str, float, str]:
    """Return (command, for how many seconds it is good, the reason of a stop) for a line at a time.

    A frame from the future is as bad as an old one: the clock was set, and no age can be told.
    """
    try:
        frame = json.loads(line)
        age = now - frame["time"]
        if not abs(age) <= MAX_AGE:  # or NaN
            return "stop", MAX_AGE, "the newest frame is stale"
        return choose(frame, wanted), MAX_AGE - max(age, 0.0), ""
    except Exception as error:  # whatever a line holds, it must not keep the rover driving
        return "stop", MAX_AGE, f"not a line of detect_onnx.py ({type(error).__name__}: {error})"


def steer(stream: int, wanted: str, send: Callable[[str], object]) -> str:
    """Send commands for the newest line of a file descriptor until it ends; returns why that is."""
    send("stop")
    said = ""
    rest = b""
    deadline = time.monotonic() + MAX_AGE  # when the last command is too old
    while True:
        reason = said
        if select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            content = os.read(stream, LONGEST)
            if not content:
                return "the detector has ended"
            *lines, rest = (rest + content).split(b"\n")
            rest = rest[-LONGEST:]
            if lines:  # only the newest counts
                command, seconds, reason = judge(lines[-1], wanted, time.time())
                send(command)
                deadline = time.monotonic() + seconds
        if time.monotonic() >= deadline:
            send("stop")
            reason = f"no new frame for {MAX_AGE:g} seconds"
            deadline = time.monotonic() + MAX_AGE
        if reason and reason != said:
            print(f"stop: {reason}", file=sys.stderr, flush=True)
        said = reason


def send(command: str) -> None:
    """Print a command; with motors, do it instead."""
    print(command, flush=True)


def main(wanted: str) -> int:
    """Steer by standard input; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end without a word when nobody reads the commands
    try:
        reason = steer(sys.stdin.fileno(), wanted, send)
    except KeyboardInterrupt:
        return 0
    finally:
        send("stop")
    print(f"stop: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: detect_onnx.py MODEL.onnx picamera | steer.py CLASS")
    sys.exit(main(sys.argv[1]))
