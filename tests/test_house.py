"""The house rules: plain code, sizes, order, documentation, nothing at import, the module alone.

Each rule of form is a function that takes the tree of a file and returns [(line, what is wrong)].
BAD and GOOD hold an example that it finds, and one that it does not.
"""

import ast
import builtins
import inspect
import os
import re
import shutil
import subprocess
import symtable
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import ssd_object_detection as ssd

MODULE = Path(ssd.__file__).resolve()
ROOT = MODULE.parent
PACKAGE = "ssd_tools"
TOOLS = sorted((ROOT / PACKAGE).glob("*.py"))
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
    "Settings",
    "Training",
    "Inference",
    "Runs",
    "Command line",
]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(tree, *kinds):
    """Return the nodes of these kinds, at any depth."""
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def within(node, *kinds):
    """Return the nodes of these kinds inside a node, itself left out."""
    return [inner for inner in nodes(node, *kinds) if inner is not node]


def source(node, most=90):
    """Return a line of source code, cut off."""
    text = ast.unparse(node).replace("\n", " ")
    return text if len(text) <= most else f"{text[:most]} ..."


# ---- rules of form ----


def long_functions(tree):
    """No function or method has more than 60 lines."""
    lengths = [(f, f.end_lineno - f.lineno + 1) for f in nodes(tree, *FUNCTIONS)]
    return [(f.lineno, f"{f.name}: {length} lines") for f, length in lengths if length > 60]


def nested_conditionals(tree):
    """No conditional expression stands inside another."""
    return [(node.lineno, source(node)) for node in nodes(tree, ast.IfExp) if within(node, ast.IfExp)]


def busy_strings(tree):
    """No conditional expression and no f-string stands inside an f-string."""
    found = []
    for string in nodes(tree, ast.JoinedStr):
        for value in (part.value for part in string.values if isinstance(part, ast.FormattedValue)):
            if nodes(value, ast.IfExp, ast.JoinedStr):
                found.append((string.lineno, source(string)))
    return found


def has_choice(node):
    """Whether a conditional expression takes part in a value; not inside a comprehension or lambda of it."""
    if isinstance(node, (*COMPREHENSIONS, ast.Lambda)):
        return False
    return isinstance(node, ast.IfExp) or any(map(has_choice, ast.iter_child_nodes(node)))


def conditional_loops(tree):
    """No loop runs over what a conditional expression chooses."""
    loops = nodes(tree, ast.For, ast.AsyncFor, ast.comprehension)
    return [(loop.iter.lineno, source(loop.iter)) for loop in loops if has_choice(loop.iter)]


def unpacked_generators(tree):
    """No generator or list comprehension is unpacked into names."""
    found = []
    for node in nodes(tree, ast.Assign):
        is_generator = isinstance(node.value, (ast.GeneratorExp, ast.ListComp))
        is_unpacked = isinstance(node.targets[0], (ast.Tuple, ast.List))
        if is_generator and is_unpacked and not nodes(node.targets[0], ast.Starred):
            found.append((node.lineno, source(node)))
    return found


def is_call_of(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def is_truth(node):
    """Whether an expression is a truth value by its form."""
    is_negation = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return is_negation or isinstance(node, (ast.Compare, ast.BoolOp)) or is_call_of(node, "bool")


def multiplied_truths(tree):
    """Nothing is multiplied by a truth value to save an `if`; for masks there are `where` and indices."""
    found = []
    for node in nodes(tree, ast.BinOp, ast.AugAssign):
        factors = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.value]
        if isinstance(node.op, ast.Mult) and any(map(is_truth, factors)):
            found.append((node.lineno, source(node)))
    return found


def unpacked_computations(tree):
    """No assignment packs three or more computations into a line."""
    found = []
    for node in nodes(tree, ast.Assign):
        is_packed = isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)
        if not is_packed or len(node.value.elts) < 3:
            continue
        if not all(isinstance(value, ast.Constant) for value in node.value.elts):
            found.append((node.lineno, source(node)))
    return found


def is_settings(node):
    """Whether an expression is `args` or `settings`, or an attribute of this name."""
    return getattr(node, "attr", getattr(node, "id", "")) in ("args", "settings")


def changed_settings(tree):
    """Nothing is assigned to an attribute of `args` or `settings`: they are as they were parsed."""
    found = []
    for node in nodes(tree, ast.Attribute):
        if isinstance(node.ctx, (ast.Store, ast.Del)) and is_settings(node.value):
            found.append((node.lineno, source(node)))
    for call in nodes(tree, ast.Call):
        is_change = is_call_of(call, "setattr") or is_call_of(call, "delattr")
        if is_change and is_settings(call.args[0]):
            found.append((call.lineno, source(call)))
    return found


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
    if isinstance(node, DEFINITIONS):
        return {node.name}
    bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    imports = nodes(node, ast.Import, ast.ImportFrom)
    return bound | {(alias.asname or alias.name).split(".")[0] for n in imports for alias in n.names}


def uses_from_below(tree):
    """A definition uses only what stands at or above it."""
    defined = {*dir(builtins), "__file__", "__name__", "__doc__", "__package__"}
    below = []
    for node in tree.body:
        defined |= names_defined(node)
        below += [(node.lineno, name) for name in sorted(names_used(node) - defined)]
    return below


def undocumented(tree):
    """Public functions and classes have a docstring."""
    public = [node for node in tree.body if isinstance(node, DEFINITIONS) and not node.name.startswith("_")]
    return [(node.lineno, node.name) for node in public if not ast.get_docstring(node)]


def unannotated(tree):
    """Functions and methods say which types they take and return."""
    found = []
    for node in [*tree.body, *(method for owner in nodes(tree, ast.ClassDef) for method in owner.body)]:
        if not isinstance(node, FUNCTIONS):
            continue
        taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        taken += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
        missing = [a.arg for a in taken if a.annotation is None and a.arg not in ("self", "cls")]
        if missing:
            found.append((node.lineno, f"{node.name}: {', '.join(missing)}"))
        if node.returns is None and node.name != "__init__":
            found.append((node.lineno, f"{node.name}: what it returns"))
    return found


# Settings of packages, where they are read; benchmarks are scripts in a folder of their own.
MAY_ACT = (
    "os.environ.setdefault(",
    "Image.MAX_IMAGE_PIXELS =",
    "PngImagePlugin.MAX_TEXT",
    "sys.path.insert(0, str(Path(__file__)",
)


def acts_at_import(tree):
    """A file defines and imports; it does nothing when it is imported."""
    allowed = (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    found = []
    for number, node in enumerate(tree.body):
        is_docstring = number == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_program = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        changes_others = isinstance(node, ast.Assign) and bool(nodes(node.targets[0], ast.Attribute))
        is_definition = isinstance(node, allowed) and not changes_others
        if not (is_docstring or is_program or is_definition or source(node).startswith(MAY_ACT)):
            found.append((node.lineno, source(node)))
    return found


BAD = {
    long_functions: "class A:\n def f(self):\n" + "  pass\n" * 60,
    nested_conditionals: "a = 1 if b else (2, 3 if c else 4)",
    busy_strings: "a = f'x{f\"{b}\" + c}', f'{b if c else 0:>{d}}'",
    conditional_loops: "for a in enumerate(b if c else ()):\n pass\nd = [e for e in (b if c else a)]",
    unpacked_generators: "a, b = (c for c in d)\n[a, b] = [c for c in d]",
    multiplied_truths: "a = [b] * bool(c)\na *= bool(b)\na = (b > c) * d\na = (b or c) * d\na = b * (not c)",
    unpacked_computations: "a, b, c = 1, d + 1, e()",
    changed_settings: (
        "self.args.a = 1\nsettings.b += 1\nsetattr(args, name, 1)\nwith a as args.c:\n pass\n"
        "for settings.d in e:\n pass\ndel args.e"
    ),
    uses_from_below: (
        "def first(items):\n def inner():\n  return [later(item) for item in items]\n return inner\n\n"
        "def later(item):\n return later(item - 1)"
    ),
    undocumented: "def f():\n pass\nclass A:\n pass",
    unannotated: (
        "def f(a: int, *b, c) -> int: ...\nclass A:\n def g(self, **d) -> None: ...\n def h(self): ..."
    ),
    acts_at_import: "print(1)\nfor a in b:\n pass\nif a:\n b = 1\nos.a = 1\nos.environ['b'] = 1",
}
FOUND = {  # how many there are in BAD
    nested_conditionals: 1,
    busy_strings: 2,
    conditional_loops: 2,
    unpacked_generators: 2,
    multiplied_truths: 5,
    changed_settings: 6,
    undocumented: 2,
    unannotated: 3,
    acts_at_import: 5,
}
GOOD = {
    long_functions: "def f():\n" + " pass\n" * 59 + "\n" * 60 + "def g():\n pass",
    nested_conditionals: "a = (1 if b else 2), (3 if c else 4)",
    busy_strings: "a = f'{b:>{c}} {d + 1} {e!r}' + ('f' if g else '')",
    conditional_loops: "for a in b:\n c = d if a else e\nf = [g for g in sorted(h if i else j for i in k)]",
    unpacked_generators: "a, b = c\n(d,) = e(f)\ng = (h for h in i)\na, *b = [h for h in i]",
    multiplied_truths: "a = b * c\na *= 2\na = bool(b) + (c > d)\na = [0] * b",
    unpacked_computations: "a, b = c(), d()\ne, f, g = 0, 0, 0\nh, i, j = k",
    changed_settings: "args = parse()\nother.args = args.a\nsettings[0] = settings.b",
    uses_from_below: "import a\n\ndef e(f):\n return f\n\ndef b(c):\n return b(c + a.d) + len(e(c))",
    undocumented: "def f():\n 'Say so.'\ndef _g():\n pass",
    unannotated: (
        "def f(a: int, *b: int) -> int:\n return max(b, key=lambda c: c)\nclass A:\n def __init__(self): ..."
    ),
    acts_at_import: "'Doc.'\nimport a\nb = a.c()\nb['e'] = 2\nd: int = 1\nif __name__ == '__main__':\n a.d()",
}
RULES = list(BAD)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule):
    found = [(path, line, what) for path in PROGRAMS for line, what in rule(tree_of(path))]
    listed = [f"{path.relative_to(ROOT).as_posix()}:{line}: {what}" for path, line, what in found]
    assert not listed, "\n".join([rule.__doc__, *listed])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_finds_what_it_looks_for_and_nothing_else(rule):
    assert len(rule(ast.parse(BAD[rule]))) == FOUND.get(rule, 1)
    assert rule(ast.parse(GOOD[rule])) == []


# ---- sizes ----


def test_there_are_at_most_50_flags():
    actions = [action for action in ssd.build_parser()._actions if action.dest != "help"]
    assert 30 < len(actions) <= 50


def test_the_readme_has_at_most_250_lines():
    assert len(lines_of(ROOT / "README.md")) <= 250


# ---- files beside the code ----


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = project.get("version") or ssd.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert (citation["version"], newest[1]) == (version, version)


@pytest.mark.parametrize(
    "name", [".github/workflows/ci.yml", ".github/ISSUE_TEMPLATE/bug.yml", ".pre-commit-config.yaml"]
)
def test_a_file_of_settings_can_be_read(name):
    assert yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


# ---- order ----


def test_the_sections_stand_in_order_with_a_banner_each():
    banners = [re.fullmatch(r"# ---- (.+) ----", line) for line in lines_of(MODULE)]
    assert [banner[1] for banner in banners if banner] == SECTIONS


def imported(tree):
    """Return the modules that a file names in import statements, wherever they stand."""
    found = {alias.name for node in nodes(tree, ast.Import) for alias in node.names}
    for node in nodes(tree, ast.ImportFrom):
        found |= {f"{node.module or PACKAGE}.{alias.name}" for alias in node.names}
    return found


def test_tools_depend_on_the_module_and_the_module_on_no_tool_but_shapes():
    assert len(TOOLS) > 1
    own = {PACKAGE, *(path.stem for path in TOOLS)}
    tools_of = {name for name in imported(tree_of(MODULE)) if name.split(".")[0] in own}
    assert {name for name in tools_of if not name.startswith(f"{PACKAGE}.shapes")} == set()
    shapes = imported(tree_of(ROOT / PACKAGE / "shapes.py"))  # which the module runs for --data shapes
    assert {name.split(".")[0] for name in shapes} & {*own, MODULE.stem} == set()


# ---- settings ----

PARSING = ("build_parser", "parse_given", "load_settings", "check_settings", "print_header")


def strings_in(node, own, module):
    """Return the strings of a tuple that is written out, or named in the function or the module."""
    if isinstance(node, ast.Name):
        if node.id in own:
            return strings_in(own[node.id], {}, module)
        return {name for name in getattr(module, node.id, ()) if isinstance(name, str)}
    if isinstance(node, ast.Starred):
        return strings_in(node.value, own, module)
    if isinstance(node, (ast.Tuple, ast.List)):
        return set().union(*(strings_in(part, own, module) for part in node.elts))
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def names_looped_over(function, module):
    """Return the strings that a function's comprehensions take as names for getattr(args, name)."""
    own = {}
    for node in nodes(function, ast.Assign):
        if isinstance(node.targets[0], ast.Name):
            own[node.targets[0].id] = node.value
    names = set()
    for node in nodes(function, *COMPREHENSIONS):
        calls = [call for call in nodes(node, ast.Call) if is_call_of(call, "getattr")]
        if any(is_settings(call.args[0]) for call in calls):
            names |= strings_in(node.generators[0].iter, own, module)
    return names


def settings_used(tree, module):
    """Return the settings that a function reads which neither parses nor prints them: of args or settings."""
    used = set()
    for function in (node for node in tree.body if isinstance(node, DEFINITIONS)):
        if function.name in PARSING:
            continue
        for node in nodes(function, ast.Attribute):
            is_own = function.name == "Settings" and getattr(node.value, "id", "") == "self"
            if isinstance(node.ctx, ast.Load) and (is_settings(node.value) or is_own):
                used.add(node.attr)
        used |= names_looped_over(function, module)
    return used


def test_every_flag_and_every_entry_of_a_recipe_is_used():
    flags = {action.dest for action in ssd.build_parser()._actions if action.dest != "help"}
    entries = {name for recipe in ssd.RECIPES.values() for name in recipe}
    printed_only = {"recipe"}  # which chose the others
    assert (flags | entries) - settings_used(tree_of(MODULE), ssd) == printed_only


def test_the_check_of_flags_finds_one_that_nothing_uses():
    code = """
NAMES = ("e", "f")
def run(args, other):
    names = ("a", "b")
    more = {name: getattr(args, name) for name in (*names, "c")} | {n: getattr(args, n) for n in NAMES}
    unrelated = ("lost", other.lost, [getattr(other, name) for name in ("lost",)])
    args.lost = args.d
def print_header(args):
    print(args.lost)
"""
    module = type("module", (), {"NAMES": ("e", "f")})
    assert settings_used(ast.parse(code), module) == {*"abcdef"}


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
assert not {"tools", "ssd_tools", "shapes"} & set(sys.modules)
"""


def clean_environment(**more):
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND", "NO_ALBUMENTATIONS_UPDATE", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1", **more}


@pytest.mark.slow
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
