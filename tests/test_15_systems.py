"""Training without what Windows and macOS lack, simulated on Linux."""

import os
import subprocess
import sys
from pathlib import Path

import ssd_object_detection as ssd

WITHOUT = """
import ctypes, multiprocessing, os, sys
sys.path.insert(0, FOLDER)
import ssd_object_detection as ssd  # torch itself knows where it runs
for name in ("sysconf", "fork", "mkfifo"):
    if hasattr(os, name):
        delattr(os, name)
real = ctypes.CDLL
def cdll(name, *args, **options):
    if name is None:
        raise TypeError("as on Windows")
    return real(name, *args, **options)
ctypes.CDLL = cdll
multiprocessing.get_all_start_methods = lambda: ["spawn"]
multiprocessing.context.DefaultContext.get_all_start_methods = lambda self: ["spawn"]
if __name__ == "__main__":
    sys.exit(ssd.main(FLAGS))
"""


def test_a_training_runs_without_what_windows_lacks(tiny_voc, tmp_path):
    flags = ["--data", str(tiny_voc), "--recipe", "scratch", "--width", ".0625", "--device", "cpu"]
    flags += ["--epochs", "1", "--batch-size", "2", "--workers", "0", "--output-dir", str(tmp_path / "out")]
    script = tmp_path / "train.py"
    folder = str(Path(ssd.__file__).parent)
    script.write_text(WITHOUT.replace("FOLDER", repr(folder)).replace("FLAGS", repr(flags)))
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "out" / "checkpoints").glob("*_final.pth"))
