"""ssd_tools/video.py: videos are drawn frame by frame; cameras and streams live, and opened again."""

import contextlib
import functools
import http.server
import io
import json
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from predicting import command, predictions_in, write_video
from reference import Pointer, red_box

import ssd_object_detection as ssd
from ssd_tools import inference, predict, video


@pytest.fixture
def pointer():
    return inference.FlipDetector(Pointer(), ("blue", "red"))


# ---- videos ----


class Announcing:
    """A cv2.VideoCapture that announces `count` frames at `fps`; it has one at each of `times` (seconds)."""

    def __init__(self, count, fps, times):
        self.values = {cv2.CAP_PROP_FRAME_COUNT: count, cv2.CAP_PROP_FPS: fps, cv2.CAP_PROP_POS_MSEC: 0.0}
        self.times = iter(times)

    def get(self, name):
        return self.values[name]

    def read(self):
        self.values[cv2.CAP_PROP_POS_MSEC] = 1000 * (time := next(self.times, 0.0))
        return time > 0, np.zeros((30, 40, 3), np.uint8)


def test_a_video_of_a_varying_rate_is_whole_if_its_last_second_is_read(pointer, tmp_path):
    whole = Announcing(120, 60.0, [(i + 1) / 20 for i in range(40)])  # as Matroska has it: two seconds at 60
    found = video.predict_video(pointer, whole, "whole.mkv", tmp_path / "whole.mp4")
    assert len(found["frames"]) == 40
    cut = Announcing(120, 60.0, [(i + 1) / 20 for i in range(20)])
    with pytest.raises(ssd.InputError, match=r"cut.mkv: not readable as a video \(20 of 120 frames\)"):
        video.predict_video(pointer, cut, "cut.mkv", tmp_path / "cut.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.mp4"]


def test_a_video_may_have_a_colon_in_its_name(pointer, tmp_path, monkeypatch):
    write_video(tmp_path / "in.avi", [(5, 20, 55, 80)] * 3)
    (tmp_path / "in.avi").rename(tmp_path / "12:30.avi")
    monkeypatch.chdir(tmp_path)
    assert video.predict_videos(pointer, [Path("12:30.avi")], tmp_path / "out") == []


def test_a_video_is_drawn_frame_by_frame(pointer, tmp_path):
    boxes = [(5 + 2 * i, 20, 55 + 2 * i, 80) for i in range(40)]
    write_video(tmp_path / "moving.avi", boxes)
    assert video.predict_videos(pointer, [tmp_path / "moving.avi"], tmp_path / "out") == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["moving.mp4", "predictions.json"]
    (found,) = predictions_in(tmp_path / "out").values()
    assert found["fps"] == 10
    assert len(found["frames"]) == 40
    for frame, box in zip(found["frames"], boxes, strict=True):
        np.testing.assert_allclose(frame["boxes_px"][0], box, atol=3)
    written = cv2.VideoCapture(str(tmp_path / "out" / "moving.mp4"))
    frames = list(video.read_frames(written))
    assert len(frames) == 40
    assert written.get(cv2.CAP_PROP_FPS) == 10
    assert frames[0].shape == (120, 160, 3)
    assert frames[0][50, 30, 0] > 150  # the red rectangle, not blue
    blank = np.zeros_like(frames[0])
    blank[20:80, 5:55, 0] = 255
    assert np.abs(frames[0].astype(int) - blank)[..., 1].max() > 50  # something is drawn on it


def test_a_video_that_breaks_off_is_a_problem_and_leaves_no_file(pointer, tmp_path):
    write_video(tmp_path / "cut.avi", [(5, 20, 55, 80)] * 40)
    content = (tmp_path / "cut.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    (problem,) = video.predict_videos(pointer, [tmp_path / "cut.avi"], tmp_path / "out")
    assert "cut.avi" in problem
    assert "of 40 frames" in problem
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]


# ---- cameras and streams ----


class Camera:
    """A cv2.VideoCapture of red boxes, the number of the frame, modulo 256, in the green of pixel (0, 0).

    script: for each opening the number of frames until it breaks off, None: it cannot be opened.
    """

    script, opened = (), 0

    def __init__(self, *source):
        self.left = type(self).script[min(self.opened, len(self.script) - 1)]
        type(self).opened += 1
        self.number = 0

    def isOpened(self):
        return self.left is not None

    def get(self, which):
        return {cv2.CAP_PROP_FPS: 30.0}.get(which, -1.0)

    def read(self):
        if self.number >= self.left:
            return False, None
        self.number += 1
        pixels = np.array(red_box((160, 120), (20, 20, 80, 80)))
        pixels[0, 0, 1] = self.number % 256
        return True, pixels[..., ::-1]

    def release(self):
        pass


@pytest.fixture
def camera(monkeypatch):
    """Return a function that puts a Camera of a script in cv2's place."""

    def put(*script):
        kind = type("FakeCamera", (Camera,), {"script": script})
        monkeypatch.setattr(cv2, "VideoCapture", kind)
        monkeypatch.setattr(video, "RETRY_PAUSE", 0.0)
        return kind

    return put


def interrupt_after(pointer, count, before=None):
    """Let the detector call before(picture), and press Ctrl-C once it has seen `count` pictures."""
    detect_in, seen = pointer.detect_in, []

    def interrupted(pictures, **settings):
        if len(seen) == count:
            raise KeyboardInterrupt
        seen.append(np.asarray(pictures[0])[0, 0, 1])
        if before:
            before(len(seen))
        return detect_in(pictures, **settings)

    pointer.detect_in = interrupted
    return seen


def test_a_camera_is_written_until_ctrl_c_with_its_rate_in_the_picture(pointer, tmp_path, camera, capsys):
    camera(10**9)
    interrupt_after(pointer, 5)
    assert video.predict_videos(pointer, ["0"], tmp_path) == []
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"camera_0.mp4", "camera_0.jsonl", "predictions.json"}
    assert predictions_in(tmp_path) == {}
    rows = [json.loads(line) for line in (tmp_path / "camera_0.jsonl").read_text().splitlines()]
    assert [row["names"] for row in rows] == [["red"]] * 5
    np.testing.assert_allclose(rows[0]["boxes_px"][0], (20, 20, 80, 80), atol=2)
    assert sorted(row["time"] for row in rows) == [row["time"] for row in rows]
    frames = list(video.read_frames(capture_of(tmp_path / "camera_0.mp4")))
    assert len(frames) >= 5
    corner = frames[0][100:, :100].astype(int)
    assert (corner.min(axis=2) > 150).sum() > 20  # white letters on black
    out = capsys.readouterr().out
    assert out.startswith("0: 5 of ")
    assert "red 5 -> " in out
    assert str(tmp_path / "camera_0.mp4") in out


def capture_of(path, original=cv2.VideoCapture):
    """Return the real cv2.VideoCapture of a file."""
    return original(str(path))


def test_a_live_source_drops_frames_and_goes_on_with_the_newest(pointer, tmp_path, camera):
    kind = camera(10**9)
    read, busy, delivered, asked = kind.read, threading.Event(), threading.Event(), threading.Event()

    def paced(self):
        if self.number == 1:
            busy.wait(30)
        if self.number == 50:
            delivered.set()
            asked.wait(30)
        return read(self)

    def before(number):
        if number == 1:
            busy.set()
            assert delivered.wait(30)  # 49 more frames arrive while the network works on the first
        if number == 2:
            asked.set()

    kind.read = paced
    seen = interrupt_after(pointer, 3, before)
    video.predict_videos(pointer, ["0"], tmp_path)
    assert seen[:2] == [1, 50]
    assert len((tmp_path / "camera_0.jsonl").read_text().splitlines()) == 3


def test_a_stream_that_breaks_off_is_opened_again_and_that_is_said(pointer, tmp_path, camera, capsys):
    kind = camera(1, None, None, 10**9)
    seen = interrupt_after(pointer, 3)
    assert video.predict_videos(pointer, ["rtsp://me:secret@robot:554/eye?x=1"], tmp_path) == []
    assert kind.opened == 4
    assert len(seen) == 3
    out, err = capsys.readouterr()
    assert err == "rtsp://robot:554/eye?x=1: broke off, trying again\n"
    assert out.startswith("rtsp://robot:554/eye?x=1: 3 of ")
    assert (tmp_path / "eye.mp4").exists()
    assert "secret" not in out + err


def test_a_stream_that_stays_away_is_a_problem(pointer, tmp_path, camera):
    kind = camera(2, None)
    (problem,) = video.predict_videos(pointer, ["http://robot/eye"], tmp_path)
    assert problem == f"http://robot/eye: broke off and did not come back in {video.RETRIES} tries"
    assert kind.opened == 1 + video.RETRIES


PICAMERA2 = """
import numpy as np

class Picamera2:
    def create_video_configuration(self, main):
        assert main["format"] == "RGB888"
        return main
    def configure(self, main):
        self.frame = np.zeros((*main["size"][::-1], 3), np.uint8)
        self.frame[100:300, 100:300, 2] = 255  # red, as BGR
        self.left = {frames}
    def start(self):
        pass
    def capture_array(self, name="main", wait=None):
        self.left -= 1
        if self.left < 0:
            raise TimeoutError
        return self.frame
    def close(self):
        pass
"""


@pytest.fixture
def ribbon(monkeypatch, tmp_path_factory):
    """A function that puts a stand-in of picamera2 on the path, which is lost after some frames."""

    def put(frames):
        folder = tmp_path_factory.mktemp("ribbon")
        (folder / "picamera2.py").write_text(PICAMERA2.format(frames=frames))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "picamera2", raising=False)
        monkeypatch.setattr(video, "RETRY_PAUSE", 0.0)

    yield put
    sys.modules.pop("picamera2", None)


def test_a_ribbon_camera_is_a_live_source(pointer, tmp_path, ribbon, capsys):
    ribbon(10**9)
    interrupt_after(pointer, 3)
    (source,) = inference.find_inputs(["picamera"], inference.VIDEO_SUFFIXES, "video")
    assert video.predict_videos(pointer, [source], tmp_path) == []
    rows = [json.loads(line) for line in (tmp_path / "picamera.jsonl").read_text().splitlines()]
    assert [row["names"] for row in rows] == [["red"]] * 3
    np.testing.assert_allclose(rows[0]["boxes_px"][0], (100, 100, 300, 300), atol=4)
    assert capsys.readouterr().out.startswith("picamera: 3 of ")


def test_a_lost_ribbon_camera_is_opened_again_and_one_that_is_not_there_is_a_line(
    pointer, tmp_path, ribbon, capsys, monkeypatch
):
    ribbon(1)
    interrupt_after(pointer, 3)
    assert video.predict_videos(pointer, ["picamera"], tmp_path) == []
    assert "picamera: broke off, trying again" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "picamera2", None)
    (problem,) = video.predict_videos(pointer, ["picamera"], tmp_path)
    assert problem.startswith("picamera: needs the package picamera2")
    assert "apt install python3-picamera2" in problem


def test_q_ends_a_window_and_nothing_is_written_into_a_video(pointer, tmp_path, camera, monkeypatch):
    camera(10**9)
    shown, keys = [], iter([-1, ord("x"), ord("q")])
    monkeypatch.setattr(cv2, "namedWindow", lambda *args: None)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    monkeypatch.setattr(cv2, "imshow", lambda title, frame: shown.append(frame))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: next(keys))
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *args: 1.0)
    assert video.predict_videos(pointer, ["0"], tmp_path, show=True) == []
    assert [frame.shape for frame in shown] == [(120, 160, 3)] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["camera_0.jsonl", "predictions.json"]


class Server(http.server.ThreadingHTTPServer):
    """A server on loopback in a thread; a context manager whose value is its address."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_a_video_file_on_a_server_is_read_to_its_end(pointer, tmp_path):
    (tmp_path / "served").mkdir()
    boxes = [(5 + 2 * i, 20, 55 + 2 * i, 80) for i in range(40)]
    write_video(tmp_path / "served" / "moving.avi", boxes)
    with Server(("127.0.0.1", 0), functools.partial(Files, directory=tmp_path / "served")) as address:
        assert video.predict_videos(pointer, [f"{address}/moving.avi"], tmp_path / "out") == []
    (found,) = predictions_in(tmp_path / "out").values()
    assert len(found["frames"]) == 40  # no frame of a file is dropped
    for frame, box in zip(found["frames"], boxes, strict=True):
        np.testing.assert_allclose(frame["boxes_px"][0], box, atol=3)
    assert (tmp_path / "out" / "moving.mp4").exists()


class MotionJpeg(http.server.BaseHTTPRequestHandler):
    """A network camera that ends each connection after 20 frames."""

    connections = 0

    def do_GET(self):
        type(self).connections += 1
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace;boundary=frame")
        self.end_headers()
        content = io.BytesIO()
        red_box((160, 120), (20, 20, 80, 80)).save(content, "jpeg")
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content.getvalue())}\r\n\r\n"
        with contextlib.suppress(ConnectionError):  # the reader is gone: the test is over
            for _ in range(20):
                self.wfile.write(head.encode() + content.getvalue() + b"\r\n")

    def log_message(self, *args):
        pass


def test_a_network_camera_is_live_and_opened_again(pointer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(video, "RETRY_PAUSE", 0.0)
    detect_in = pointer.detect_in

    def until_the_third_connection(pictures, **settings):
        if MotionJpeg.connections > 2:
            raise KeyboardInterrupt
        return detect_in(pictures, **settings)

    pointer.detect_in = until_the_third_connection
    with Server(("127.0.0.1", 0), MotionJpeg) as address:
        assert video.predict_videos(pointer, [f"{address}/eye.mjpg"], tmp_path) == []
    assert {"eye.mp4", "eye.jsonl"} <= {path.name for path in tmp_path.iterdir()}
    rows = [json.loads(line) for line in (tmp_path / "eye.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["names"] == ["red"] for row in rows)
    assert set(capfd.readouterr().err.splitlines()) == {f"{address}/eye.mjpg: broke off, trying again"}


# ---- the command ----


def test_a_source_that_is_not_there_is_one_line(tiny_run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for argv, code, message in (
        (("97",), 1, "97: no such camera"),
        (("http://127.0.0.1:1/eye.mjpg",), 1, "http://127.0.0.1:1/eye.mjpg: not reachable, or no video"),
        (("rtsp://me:secret@127.0.0.1:1/eye",), 1, "rtsp://127.0.0.1:1/eye: not reachable, or no video"),
        (("0", "--show"), 2, "--show: there is no display; without it the video is written"),
    ):
        assert video.main(command(*argv, "--weights", tiny_run.final, out=tmp_path)) == code
        assert capfd.readouterr().err == f"error: {message}\n"


def test_images_are_left_to_predict(tiny_run, tmp_path, capsys):
    image = tiny_run.data / "JPEGImages" / "test_0.jpg"
    for argument, message in (
        (image, f"{image} is an image: use python -m ssd_tools.predict"),
        (image.parent, f"{image.parent}: no video in this folder"),
    ):
        assert video.main(command(argument, "--weights", tiny_run.final, out=tmp_path)) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_the_command_writes_what_predict_writes_of_a_video(tiny_run, tmp_path, capsys):
    write_video(tmp_path / "moving.avi", [(5 + 2 * i, 20, 55 + 2 * i, 80) for i in range(5)])
    found = []
    for name, main in (("a", video.main), ("b", predict.main)):
        flags = ("--weights", tiny_run.final, "--score-thresh", 0.01, "--save-csv", tmp_path / f"{name}.csv")
        assert main(command(tmp_path / "moving.avi", *flags, out=tmp_path / name)) == 0
        folder = tmp_path / name / "plots" / "predictions"
        found.append((predictions_in(folder), (tmp_path / f"{name}.csv").read_text()))
        assert str(folder / "moving.mp4") in capsys.readouterr().out
    assert found[0] == found[1]
