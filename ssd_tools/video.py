"""Detect in videos, cameras and streams: write drawn videos and what was found, or show them in a window.

    python -m ssd_tools.video holiday.mp4 --weights checkpoints/ssd_shapes_final.pth
    python -m ssd_tools.video 0 --weights FILE --show                # a camera, in a window, until q
    python -m ssd_tools.video rtsp://camera/stream --weights FILE    # written as MP4, until Ctrl-C
    python -m ssd_tools.video picamera --weights FILE                # a Raspberry Pi's ribbon camera

The results are in plots/predictions: MP4 without sound, and predictions.json. A live source leaves a line a
frame in NAME.jsonl instead; frames that come while the network works are dropped. What cannot be read is
listed at the end; the exit code is then 1.
"""

import argparse
import collections
import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import ssd_object_detection as ssd
from ssd_tools import inference
from ssd_tools.inference import RIBBON, Found, Source, count_text, public_name

RETRIES, RETRY_PAUSE = 30, 1.0  # of a stream that broke off; seconds
TIMEOUT_MS = 10_000  # for a stream to open, or to deliver a frame
RIBBON_SIZE, RIBBON_FPS = (640, 480), 30.0  # of a ribbon camera's frames
MAX_FPS = 60.0  # of the video that a live source is written to

Put = Callable[[Image.Image, int], bool]  # write or show a picture so many times; whether to go on


# ---- reading and writing ----


class RibbonCamera:
    """A Raspberry Pi's ribbon camera, by picamera2, with what is used of a cv2.VideoCapture.

    InputError if it cannot be opened. A frame that does not come within TIMEOUT_MS counts as a break.
    """

    def __init__(self) -> None:
        try:
            from picamera2 import Picamera2

            self.camera = Picamera2()
            main = {"size": RIBBON_SIZE, "format": "RGB888"}  # which is BGR in memory
            self.camera.configure(self.camera.create_video_configuration(main=main))
            self.camera.start()
        except ImportError as error:
            advice = "apt install python3-picamera2, and python3 -m venv --system-site-packages"
            raise ssd.InputError(f"{RIBBON}: needs the package picamera2 ({error}): {advice}") from None
        except Exception as error:  # libcamera's: none is there, or another program has it
            raise ssd.InputError(f"{RIBBON}: no such camera ({ssd.error_line(error)})") from None

    def get(self, name: int) -> float:
        """Return the frame rate; 0 for all other properties."""
        return RIBBON_FPS if name == cv2.CAP_PROP_FPS else 0.0

    def read(self) -> tuple[bool, Any]:
        """Return (True, the next BGR frame), or (False, None) if the camera is lost."""
        try:
            return True, self.camera.capture_array("main", wait=TIMEOUT_MS / 1000)
        except Exception:  # TimeoutError, and what libcamera raises
            return False, None

    def release(self) -> None:
        """Close the camera."""
        with contextlib.suppress(Exception):
            self.camera.close()


def open_video(source: Source) -> cv2.VideoCapture:
    """Return a cv2.VideoCapture of a file, address or camera's number; InputError if it cannot be opened."""
    if source == RIBBON:
        return cast(cv2.VideoCapture, RibbonCamera())
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # no chatter about broken videos
    set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # OpenCV 4, and 5
    set_log_level(0)  # nor about missing cameras
    if isinstance(source, Path):
        video = cv2.VideoCapture(str(source.absolute()))  # a:b is no URL
        problem = "not readable as a video"
    elif source.isdigit():
        video = cv2.VideoCapture(int(source))
        problem = "no such camera"
    else:
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT_MS]
        video = cv2.VideoCapture(source, cv2.CAP_FFMPEG, limits)
        problem = "not reachable, or no video"
    if not video.isOpened():
        raise ssd.InputError(f"{public_name(source)}: {problem}")
    return video


def num_frames(video: cv2.VideoCapture) -> int:
    """Return the number of frames that a cv2.VideoCapture announces; 0 for a live source."""
    return max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))


def frame_rate(video: cv2.VideoCapture) -> float:
    """Return the frames per second that a cv2.VideoCapture announces; 25 if it announces none."""
    return video.get(cv2.CAP_PROP_FPS) or 25.0


def read_frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """Yield the frames of a cv2.VideoCapture as RGB arrays (H, W, 3)."""
    while True:
        is_read, frame = video.read()
        if not is_read:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


@contextlib.contextmanager
def video_file(path: Path, fps: float) -> Iterator[Put]:
    """Yield a function that writes PIL images into an MP4; OSError if that cannot be written."""
    writer = cv2.VideoWriter()
    codec = cv2.VideoWriter.fourcc(*"mp4v")

    def write(picture: Image.Image, times: int) -> bool:
        if not writer.isOpened() and not writer.open(str(path), codec, fps, picture.size):
            raise OSError(f"{path}: not writable as a video")
        frame = cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR)
        for _ in range(times):
            writer.write(frame)
        return True

    try:
        yield write
    finally:
        writer.release()


@contextlib.contextmanager
def window(title: str) -> Iterator[Put]:
    """Yield a function that shows PIL images until q or the window is closed; InputError without windows."""

    def show(picture: Image.Image, times: int) -> bool:
        cv2.imshow(title, cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR))
        is_quit = cv2.waitKey(1) & 0xFF == ord("q")
        return not is_quit and cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) > 0

    try:
        cv2.namedWindow(title, cv2.WINDOW_NORMAL)
    except cv2.error:
        raise ssd.InputError("--show: this OpenCV has no windows: pip install opencv-python") from None
    yield show
    cv2.destroyAllWindows()


def open_output(target: Path | None, fps: float, title: str) -> contextlib.AbstractContextManager[Put]:
    """Return the `video_file` of a path; of None the `window` of that title."""
    if target is None:
        return window(title)
    return video_file(target, fps)


# ---- a video that ends ----


def draw_found(result: tuple[Image.Image, ssd.Detections] | ssd.InputError) -> tuple[Image.Image, Found]:
    """Return the drawn copy of a picture and what was found in it."""
    assert not isinstance(result, ssd.InputError)  # a frame is no file
    picture, found = result
    return found.draw(picture), found.to_dict()


def predict_video(
    detector: ssd.Detector, video: cv2.VideoCapture, name: str, target: Path | None, **settings: Any
) -> Found:
    """Detect in all frames of a cv2.VideoCapture; returns {"fps", "frames": a dict each}.

    The drawn frames go where `open_output` puts them. Raises InputError where a tenth or more of what the
    video announces, in frames and in seconds, cannot be read.
    """
    total = num_frames(video)  # Matroska: seconds times rate, of a varying rate more frames than there are
    fps = frame_rate(video)
    reached = 0.0  # seconds

    def timed_frames() -> Iterator[np.ndarray]:
        nonlocal reached
        for frame in read_frames(video):
            reached = max(reached, video.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            yield frame

    frames: list[Found] = []
    drawn = inference.prefetch(draw_found, inference.detect_all(detector, timed_frames(), **settings))
    with open_output(target, fps, name) as put:
        for picture, found in tqdm(drawn, name, total or None, disable=not sys.stderr.isatty()):
            frames.append(found)
            if not put(picture, 1):
                return {"fps": fps, "frames": frames}
    if max(len(frames), reached * fps) <= 0.9 * total:
        if target is not None:
            target.unlink(missing_ok=True)
        problem = f"{name}: not readable as a video ({len(frames)} of {total} frames)"
        if "://" in name:
            problem += "; download it first, its server may not serve parts of files"
        raise ssd.InputError(problem)
    return {"fps": fps, "frames": frames}


# ---- a live source ----


class NewestFrame:
    """Iterate over (time.monotonic() at arrival, RGB frame) of a live source: always the newest frame.

    A thread reads on while a frame is worked on, and drops what nobody took. A source that breaks off is
    opened again, in up to RETRIES tries, and that is printed; then the iteration ends with InputError.
    """

    def __init__(self, source: str, video: cv2.VideoCapture) -> None:
        self.source = source
        self.video = video
        self.num_read = 0
        self.waiting: queue.Queue[tuple[float, np.ndarray] | None] = queue.Queue(1)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _put(self, item: tuple[float, np.ndarray] | None) -> None:
        with contextlib.suppress(queue.Empty):
            self.waiting.get_nowait()
        self.waiting.put(item)  # there is room: no other thread puts

    def _read(self) -> None:
        try:
            is_open = True
            while is_open and not self.stopping.is_set():
                is_read, frame = self.video.read()
                if is_read:
                    self.num_read += 1
                    self._put((time.monotonic(), frame))
                else:
                    is_open = self._reopen()
        finally:
            self._put(None)  # nobody waits for a thread that ended

    def _reopen(self) -> bool:
        print(f"{public_name(self.source)}: broke off, trying again", file=sys.stderr)
        self.video.release()
        for _ in range(RETRIES):
            if self.stopping.wait(RETRY_PAUSE):
                return False
            with contextlib.suppress(ssd.InputError):
                self.video = open_video(self.source)
                return True
        return False

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        while item := self.waiting.get():
            arrived, frame = item
            yield arrived, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        name = public_name(self.source)
        raise ssd.InputError(f"{name}: broke off and did not come back in {RETRIES} tries")

    def stop(self) -> None:
        """End the thread and release the source."""
        self.stopping.set()
        self.thread.join(TIMEOUT_MS / 1000)
        self.video.release()


class LiveCounts:
    """What is counted of a live source: frames, their rate and latency, and the objects found."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.ends: collections.deque[float] = collections.deque(maxlen=30)
        self.latencies: collections.deque[float] = collections.deque(maxlen=10_000)  # milliseconds
        self.names: collections.Counter[str] = collections.Counter()
        self.num_frames = 0

    def add(self, arrived: float, names: Sequence[str]) -> None:
        """Count a frame that is done now and arrived then, by time.monotonic()."""
        self.num_frames += 1
        self.ends.append(time.monotonic())
        self.latencies.append(1000 * (self.ends[-1] - arrived))
        self.names.update(names)

    @property
    def seconds(self) -> float:
        """The time from the start to the end of the last frame."""
        return self.ends[-1] - self.start

    def status(self) -> str:
        """Return the rate of the last frames and the latency of the last one, as text."""
        rate = 0.0
        if len(self.ends) > 1:
            rate = (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])
        return f"{rate:.1f} frames/s, {self.latencies[-1]:.0f} ms"

    def summary(self, num_read: int) -> str:
        """Return how many of the frames that were read are done, how fast, and what was found, as text."""
        middle, slow = np.percentile(np.array(self.latencies), (50, 95))
        return (
            f"{self.num_frames} of {num_read} frames, {self.num_frames / self.seconds:.1f} a second, "
            f"latency {middle:.0f} ms (95 %: {slow:.0f}); {count_text(self.names.elements())}"
        )


def write_status(picture: Image.Image, text: str) -> None:
    """Write a line of text into the lower left corner of a PIL image."""
    font = ImageFont.load_default(max(12, round(max(picture.size) / 40)))
    place = (4, picture.height - 4)
    ImageDraw.Draw(picture).text(place, text, "white", font, anchor="lb", stroke_width=2, stroke_fill="black")


def predict_live(
    detector: ssd.Detector,
    frames: NewestFrame,
    name: str,
    fps: float,
    target: Path,
    *,
    show: bool = False,
    **settings: Any,
) -> str:
    """Detect in a NewestFrame until q or Ctrl-C; returns what was done, in words.

    Each frame is drawn with the rate and its latency, from arrival on, and shown, or written to `target` as
    often as keeps the time. target.jsonl gets a line a frame: time (seconds since 1970) and what was found.
    """
    log_path = target.with_suffix(".jsonl")
    output = open_output(None if show else target, fps, name)
    counts = LiveCounts()
    num_written = 0
    with contextlib.suppress(KeyboardInterrupt), open(log_path, "w", encoding="utf-8") as log, output as put:
        for arrived, frame in frames:
            arrived_at = time.time() - (time.monotonic() - arrived)
            picture = Image.fromarray(frame)
            (found,) = detector.detect_in([picture], **settings)
            drawn = found.draw(picture)
            counts.add(arrived, found.names)
            write_status(drawn, counts.status())
            print(json.dumps({"time": round(arrived_at, 3), **found.to_dict()}), file=log, flush=True)
            # As many copies as keep the time, a second at most: writing takes its time too.
            missing = max(1, round(counts.seconds * fps) - num_written)
            times = min(missing, round(fps) or 1)
            num_written += times
            if not put(drawn, times):
                break
    if counts.num_frames == 0:
        return f"no frame of {name}"
    place = "window" if show else target
    return f"{counts.summary(frames.num_read)} -> {place}, {log_path}"


# ---- the command line ----


def predict_source(
    detector: ssd.Detector, source: Source, target: Path, *, show: bool = False, **settings: Any
) -> Found | ssd.InputError:
    """Detect in a video, camera or stream; returns what was found, {} if it is live, or the InputError."""
    name = public_name(source)
    frames = None
    try:
        video = open_video(source)
        fps = frame_rate(video)
        if isinstance(source, str) and num_frames(video) == 0:
            frames = NewestFrame(source, video)
            text = predict_live(detector, frames, name, min(fps, MAX_FPS), target, show=show, **settings)
            print(f"{name}: {text}")
            return {}
        found = predict_video(detector, video, name, None if show else target, **settings)
    except ssd.InputError as error:
        return error
    finally:
        if frames is not None:
            frames.stop()
    names = [object_name for frame in found["frames"] for object_name in frame["names"]]
    place = "window" if show else target
    print(f"{name}: {len(found['frames'])} frames, {count_text(names)} -> {place}")
    return found


def predict_sources(
    detector: ssd.Detector, sources: Iterable[Source], targets: Mapping[Source, Path], **settings: Any
) -> Iterator[tuple[Source, Found | ssd.InputError]]:
    """Yield (source, what `predict_source` returns) one after the other; targets: {source: drawn copy}."""
    for source in sources:
        yield source, predict_source(detector, source, targets[source], **settings)


def predict_videos(
    detector: ssd.Detector,
    sources: Sequence[Source],
    folder: Path,
    *,
    show: bool = False,
    save_csv: ssd.PathLike | None = None,
    **settings: Any,
) -> list[str]:
    """Detect in videos, cameras and streams; writes drawn copies and predictions.json into a folder.

    show: in a window, not into files; save_csv: a file to write; settings: of `ssd.Detector.predict`. Returns
    a line for each source that could not be read; raises InputError for one that lies in the folder.
    """
    inference.prepare_folders(sources, folder, save_csv)
    targets = inference.name_targets(sources, folder)
    results = predict_sources(detector, sources, targets, show=show, **settings)
    problems = inference.write_results(results, sources, folder, save_csv)
    print(folder / "predictions.json")
    if save_csv is not None:
        print(save_csv)
    return problems


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the namespace of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="SOURCE",
        help="videos, folders of them, globs in quotes, a camera's number, picamera, or a stream's address",
    )
    parser.add_argument("--show", action="store_true", help="in a window, until q, not in a file")
    inference.add_flags(parser)
    return parser.parse_args(argv)


def require_display() -> None:
    """Raise InputError where no window can be shown."""
    displays = {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if sys.platform not in ("darwin", "win32") and not displays:
        raise ssd.InputError("--show: there is no display; without it the video is written")


def run(args: argparse.Namespace) -> int:
    """Detect by the flags; returns the exit code: 0 done, 1 a source could not be read."""
    sources = inference.find_inputs(args.inputs, inference.VIDEO_SUFFIXES, "video")
    for source in sources:
        if isinstance(source, Path) and source.suffix.lower() in ssd.IMAGE_SUFFIXES:
            raise ssd.InputError(f"{source} is an image: use python -m ssd_tools.predict")
    if args.show:
        require_display()
    detector, settings = inference.make_detector(args)
    folder = inference.results_folder(args)
    files = {"show": args.show, "save_csv": args.save_csv}
    return inference.report_problems(predict_videos(detector, sources, folder, **files, **settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 unreadable sources, 2 a mistake, 130 stopped."""
    return inference.run_predictions(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
