"""The house rules: sizes, order of definitions, documentation, nothing at import, the module alone."""

import ast
import builtins
import inspect
import os
import re
import shutil
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

import ssd_object_detection as ssd

MODULE = Path(ssd.__file__).resolve()
ROOT = MODULE.parent
TOOLS = sorted((ROOT / "ssd_tools").glob("*.py"))
PROGRAMS = [MODULE, *TOOLS, *sorted((ROOT / "benchmarks").glob("*.py"))]
SECTIONS = [
    "Constants",
    "Devices and processes",
    "Boxes, anchors, matching",
    "Data",
    "Augmentation",
    "Model",
    "Losses, detection, evaluation",
    "Run records",
    "Plots",
    "Training",
    "Inference",
    "Runs",
    "Command line",
]


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


# ---- sizes ----


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_no_function_has_more_than_60_lines(path):
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
    lengths = {function.name: function.end_lineno - function.lineno + 1 for function in functions}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_there_are_at_most_50_flags():
    actions = [action for action in ssd.build_parser()._actions if action.dest != "help"]
    assert 30 < len(actions) <= 50


def test_the_readme_has_at_most_250_lines():
    assert len(lines_of(ROOT / "README.md")) <= 250


# ---- order and form ----


def test_the_sections_stand_in_order_with_a_banner_each():
    banners = [re.fullmatch(r"# ---- (.+) ----", line) for line in lines_of(MODULE)]
    assert [banner[1] for banner in banners if banner] == SECTIONS


def names_used(node):
    """Return the names that a top-level statement, or any function in it, takes from its module."""
    tables = [symtable.symtable(ast.unparse(node), "module", "exec")]
    used = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_referenced()}
    for table in tables:  # which grows by the functions and classes within
        tables += table.get_children()
        used |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and s.is_global()}
    return used


def names_defined(node):
    """Return the names that a top-level statement binds in its module."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    imports = [n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
    return bound | {(alias.asname or alias.name).split(".")[0] for n in imports for alias in n.names}


def uses_from_below(tree):
    """Return [(line, name)] of what the top-level statements use but nothing at or above them defines."""
    defined = {*dir(builtins), "__file__", "__name__", "__doc__"}
    below = []
    for node in tree.body:
        defined |= names_defined(node)
        below += [(node.lineno, name) for name in sorted(names_used(node) - defined)]
    return below


def test_definitions_use_only_what_stands_above_them():
    assert uses_from_below(tree_of(MODULE)) == []


def test_the_check_of_the_order_finds_what_it_looks_for():
    bad = """
def first(items):
    def inner():
        return [later(item) for item in items]
    return inner

def later(item):
    return later(item - 1)
"""
    assert uses_from_below(ast.parse(bad)) == [(2, "later")]


def test_public_functions_and_classes_are_documented_and_annotated():
    missing = []
    for node in tree_of(MODULE).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            missing.append(f"{node.name}: no docstring")
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            missing += [f"{node.name}: {a.arg} has no annotation" for a in arguments if a.annotation is None]
            missing += [] if node.returns is not None else [f"{node.name}: no annotation of what it returns"]
    assert missing == []


def test_no_assignment_unpacks_three_or_more_computations():
    unpacked = {}
    for node in ast.walk(tree_of(MODULE)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and len(node.value.elts) > 2:
            is_constant = all(isinstance(value, ast.Constant) for value in node.value.elts)
            if isinstance(node.targets[0], ast.Tuple) and not is_constant:
                unpacked[node.lineno] = ast.unparse(node)
    assert unpacked == {}


def imported(path):
    """Return the modules that a file names in import statements at its top level."""
    found = set()
    for node in tree_of(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_tools_depend_on_the_module_and_the_module_on_no_tool():
    assert len(TOOLS) > 1
    own = {"ssd_tools", *(path.stem for path in TOOLS)}
    assert not {name.split(".")[0] for name in imported(MODULE)} & own
    for path in TOOLS:
        if path.stem in ("shapes", "__init__"):  # which the module loads for --data shapes
            assert not {name.split(".")[0] for name in imported(path)} & {*own, MODULE.stem}
        else:
            assert MODULE.stem in imported(path), path.name


# ---- importing ----

IMPORTING = """
import os, random, signal, socket, sys
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # of the next import, which is the test's own
import albumentations, cv2, matplotlib.figure, numpy as np, torch, torchvision, tqdm
del os.environ["NO_ALBUMENTATIONS_UPDATE"]

class Argv(list):
    def refuse(self, *args):
        raise AssertionError("sys.argv was read")
    __getitem__ = __iter__ = __len__ = refuse

def refuse(*args, **more):
    raise AssertionError("a device was asked for")

def watch(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise AssertionError(f"{args[0]} was opened to be written")
    if event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "os.remove", "shutil.")):
        raise AssertionError(f"{event} {args}")

def state():
    numbers = torch.get_rng_state().tolist(), str(random.getstate()), str(np.random.get_state())
    threads = torch.get_num_threads(), cv2.getNumThreads()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return numbers, threads, handlers, os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()

before = state()
for name in ("is_available", "device_count", "current_device", "init", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
sys.argv = Argv()
sys.addaudithook(watch)
import ssd_object_detection
assert state() == before
assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"
assert "matplotlib.pyplot" not in sys.modules
assert "ssd_tools" not in sys.modules and "shapes" not in sys.modules
"""


def clean_environment(**more):
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND", "NO_ALBUMENTATIONS_UPDATE", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1", **more}


def test_importing_the_module_does_nothing(tmp_path):
    env = clean_environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
    source = MODULE.read_text(encoding="utf-8")
    assert source.index('setdefault("NO_ALB') < source.index("\nimport albumentations")  # which reads it


# ---- the module alone ----

GOING_ON = """
import sys
import ssd_object_detection as ssd

image, *flags = sys.argv[1:]
final = "checkpoints/ssd_mine_final.pth"
assert ssd.main(["--resume", "--epochs", "2", *flags]) == 0
assert ssd.main(["--evaluate", final, *flags]) == 0
assert ssd.main(["--predict", image, "--weights", final, *flags]) == 0
assert ssd.main(["--data", "shapes", *flags]) == 2
print(ssd.__file__)
"""


def test_the_module_alone_prints_its_help_trains_resumes_measures_and_predicts(make_voc, flags_of, tmp_path):
    data = make_voc(tmp_path / "mine")
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(MODULE, folder)

    def run(*command):
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=folder,
            env=clean_environment(),
            text=True,
            capture_output=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), done.stderr.splitlines()

    assert run(MODULE.name, "--help")[0][0].startswith("usage: ssd_object_detection.py")
    trained, _ = run(MODULE.name, *flags_of(data, ".", "--epochs", "1"))
    images = "8 train images (train), 4 val images (val), 4 test images (test)"  # two steps of four
    assert any(images in line for line in trained)
    flags = ["--device", "cpu", "--workers", "0"]
    out, err = run("-c", GOING_ON, data / "JPEGImages" / "test_0.jpg", *flags)
    assert len([line for line in out if line.startswith("epoch ")]) == 1
    assert len([line for line in out if line.startswith("Test mAP@.5")]) == 2
    assert out[-1] == str(folder / MODULE.name)
    (line,) = err
    assert line.startswith("error: --data shapes needs ")
    assert (folder / "plots" / "predictions" / "test_0.png").is_file()
    assert {path.name for path in folder.iterdir()} == {MODULE.name, "checkpoints", "plots"}


def test_the_module_s_docstring_names_the_commands_and_its_flags_exist():
    flags = {flag for action in ssd.build_parser()._actions for flag in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", inspect.getdoc(ssd)))
    assert {"--data", "--resume", "--evaluate", "--predict"} <= named <= flags
