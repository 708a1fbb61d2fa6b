"""The house rules that a parser can hold: which room may import which, and what nobody may call."""

import ast
from pathlib import Path

import pytest

import dmgen

ROOT = Path(dmgen.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the ground up. A room imports from its own floor and from those below.
FLOORS = [
    {"validation", "storage", "table", "estimates", "old_paths"},
    {"constraints", "features"},
    {"models"},
    {"target"},
    {"evaluation"},
    {"training", "monte_carlo"},
    {"experiment"},
    {"report"},
    {"__init__"},
    {"cli", "__main__"},
]
GROUND_FLOOR_LIBRARIES = {"numpy", "scipy", "torch"}

# Global state of random generators, and loaders that run what they read.
FORBIDDEN_CALLS = {
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.set_rng_state",
    "np.random.seed",
    "numpy.random.seed",
    "random.seed",
    "torch.load",
    "np.load",
    "numpy.load",
    "torch.autograd.set_detect_anomaly",
}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def room_of(path):
    """The top-level module or package of dmgen that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(source):
    """Dotted names of all imports, wherever they stand: `from a import b` gives a.b."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += ["." * node.level + (node.module or "") + "." + a.name for a in node.names]
    return names


def dotted(node):
    """ "a.b.c" of an expression that is just that; "" of any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def calls(source):
    """Dotted names of everything that is called by name."""
    nodes = ast.walk(ast.parse(source))
    return {dotted(node.func) for node in nodes if isinstance(node, ast.Call)}


def floor_of(room):
    """The floor a room is on; KeyError for a room that the table does not know."""
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return floor
    raise KeyError(f"dmgen/{room} has no place in FLOORS: say what it may import")


def upward_imports(room, source):
    """The rooms on higher floors that a source imports."""
    names = imports(source)
    relative = [name for name in names if name.startswith(".")]
    rooms = {name.split(".")[1] for name in names if name.startswith("dmgen.")}
    # `from dmgen import EBM` and `import dmgen` need the whole house.
    rooms = {r if any(r in floor for floor in FLOORS) else "__init__" for r in rooms}
    rooms |= {"__init__"} if "dmgen" in names else set()
    return relative + sorted(r for r in rooms if floor_of(r) > floor_of(room))


def forbidden(source):
    """What a source calls or imports of the things that nobody may."""
    found = calls(source) & FORBIDDEN_CALLS
    for name in imports(source):
        found |= {name} & FORBIDDEN_CALLS
        found |= {name.split(".")[0]} & FORBIDDEN_MODULES
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_go_down_only(path):
    assert upward_imports(room_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sorted((ROOT / "estimates").glob("*.py")), ids=lambda p: p.stem)
def test_the_ground_floor_stands_on_numbers_alone(path):
    import sys

    names = imports(path.read_text(encoding="utf-8"))
    libraries = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"dmgen"}
    assert libraries <= GROUND_FLOOR_LIBRARIES


def test_only_one_room_works_with_transformers():
    knows = {
        str(path.relative_to(ROOT))
        for path in FILES
        for name in imports(path.read_text(encoding="utf-8"))
        if name.split(".")[0] in ("transformers", "peft")
    }
    # The command line quiets its messages and progress bars.
    allowed = {"models/causal_lm.py", "cli/app.py"}
    assert {f for f in knows if not f.startswith("models/hf/")} <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints(path):
    if room_of(path) not in ("cli", "__main__"):
        assert "print" not in calls(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_global_randomness_and_no_pickles(path):
    assert forbidden(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arguments_are_not_checked_by_assert(path):
    """`python -O` takes an assert away, and its message says nothing."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert [node.lineno for node in nodes if isinstance(node, ast.Assert)] == []


# ---------------------------------------------------------------- the checks themselves


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("target", "from dmgen.training.config import TrainerConfig", ["training"]),
        ("estimates", "from dmgen import report", ["report"]),
        ("target", "from dmgen import EBM", ["__init__"]),
        ("target", "import dmgen", ["__init__"]),
        ("estimates", "def f():\n    import dmgen.models.samples", ["models"]),
        ("evaluation", "from . import evaluate", ["..evaluate"]),
        ("training", "from dmgen.target.ebm import EBM\nfrom dmgen.estimates import weights", []),
        ("evaluation", "from dmgen.storage import read_rows", []),
    ],
)
def test_upward_imports_are_seen(room, source, found):
    assert upward_imports(room, source) == found


@pytest.mark.parametrize(
    "source",
    [
        "torch.manual_seed(0)",
        "def f():\n    np.random.seed(0)",
        "x = torch.load(p)",
        "import pickle",
        "from pickle import loads",
        "from torch import load",
    ],
)
def test_what_nobody_may_call_is_seen(source):
    assert forbidden(source)


def test_a_generator_of_ones_own_is_fine():
    assert not forbidden("torch.Generator().manual_seed(0)\ngenerator.manual_seed(1)\nload(x)")
    assert "print" in calls("if x:\n    print(x)")
    assert "print" not in calls("table.print(x)")


def test_a_new_room_must_be_given_a_place():
    with pytest.raises(KeyError, match="utils has no place"):
        floor_of("utils")
