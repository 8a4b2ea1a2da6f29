"""Detect in the newest frame of a camera, for a program that steers; part of detect_onnx.py.

Each frame is a line of JSON: {"time": when it came, seconds since 1970, "ms": from then to this line, "size":
[width, height], "boxes": [{"class", "score", "box": [x1, y1, x2, y2] in pixels}]}. Frames that come meanwhile
are dropped. A camera without a new frame for STALE seconds is lost: a line on standard error, exit code 1.
Ctrl-C and SIGTERM end with exit code 0.
"""

import json
import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

STALE = 5.0  # seconds without a new frame after which a camera is lost
SIZE = (640, 480)  # of a ribbon camera's frames

Read = Callable[[], np.ndarray]  # waits for a BGR frame (H, W, 3)


def open_picamera() -> tuple[Read, Callable[[], object]]:
    """Return (read, close) of the ribbon camera of a Raspberry Pi."""
    try:
        from picamera2 import Picamera2
    except ImportError as error:
        advice = "apt install python3-picamera2, and python3 -m venv --system-site-packages"
        raise ImportError(f"the ribbon camera needs picamera2 ({error}): {advice}") from None
    try:
        camera = Picamera2()
    except IndexError:  # of its list of cameras
        raise OSError("there is no camera: rpicam-hello --list-cameras") from None
    main = {"size": SIZE, "format": "RGB888"}  # which is BGR in memory
    camera.configure(camera.create_video_configuration(main=main))
    camera.start()
    return camera.capture_array, camera.close


def open_usb(number: int) -> tuple[Read, Callable[[], object]]:
    """Return (read, close) of a camera that OpenCV opens."""
    try:
        import cv2
    except ImportError:
        raise ImportError("a camera needs OpenCV: pip install opencv-python-headless") from None
    camera = cv2.VideoCapture(number)

    def read() -> np.ndarray:
        frame = camera.read()[1]
        if frame is None:
            raise OSError("no picture from this camera")
        return frame

    return read, camera.release


def read_on(name: str, newest: queue.Queue[Any], stopping: threading.Event) -> None:
    """Keep the newest (time, frame) of a camera in a queue of length 1; (time, the error) is the last."""
    try:
        read, close = open_picamera() if name == "picamera" else open_usb(int(name))
        while not stopping.is_set():
            frame = read()
            item = time.time(), np.ascontiguousarray(frame[..., 2::-1])  # RGB
            while not newest.empty():
                newest.get_nowait()
            newest.put(item)
        close()
    except Exception as error:
        while not newest.empty():
            newest.get_nowait()
        newest.put((time.time(), error))


def watch_camera(detect: Callable[[Image.Image], list[tuple]], name: str) -> None:
    """Print a line for the newest frame, again and again; raises what ends the camera."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    newest: queue.Queue[Any] = queue.Queue(1)
    stopping = threading.Event()
    reader = threading.Thread(target=read_on, args=(name, newest, stopping), daemon=True)
    reader.start()
    try:
        while True:
            try:
                arrived, frame = newest.get(timeout=STALE)
            except queue.Empty:
                raise TimeoutError(f"the camera is lost: no new frame for {STALE:g} seconds") from None
            if isinstance(frame, Exception):
                raise frame
            picture = Image.fromarray(frame)
            found = detect(picture)
            boxes = [{"class": label, "score": score, "box": box} for label, score, box in found]
            line = {"time": round(arrived, 3), "ms": 0.0, "size": picture.size, "boxes": boxes}
            line["ms"] = round(1000 * (time.time() - arrived), 1)
            print(json.dumps(line), flush=True)
    finally:
        stopping.set()
        reader.join(2)
