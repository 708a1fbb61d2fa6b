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


def module_of(path):
    """The dotted name of a file's module."""
    return ".".join(("dmgen", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    )


def cycles(graph):
    """The groups of modules that import one another, of two or more."""

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            for name in graph.get(todo.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    todo.append(name)
        return seen

    reach = {name: reached(name) for name in graph}
    return {
        tuple(sorted(other for other in graph if other in reach[name] and name in reach[other]))
        for name in graph
        if name in reach[name]
    }


def module_graph(sources):
    """What each module imports of dmgen, by module; a package's own names count as its file."""
    graph = {}
    for module, source in sources.items():
        names = [n for n in imports(source) if n.startswith("dmgen")]
        # `from a import b` is a.b where that is a module, else a name in a.
        found = {n if n in sources else n.rpartition(".")[0] for n in names}
        graph[module] = {name for name in found if name in sources and name != module}
    return graph


def test_no_module_imports_itself_by_a_detour():
    sources = {module_of(p): p.read_text(encoding="utf-8") for p in FILES}
    assert cycles(module_graph(sources)) == set()


# Pure formulas whose signatures are public.
LOG_COLUMNS = {("training/objectives.py", "advantage")}


def log_columns(node):
    """Parameters of a function that are columns of log-probabilities."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [
        a.arg
        for a in arguments
        if a.arg.startswith("log_") and a.annotation and "Tensor" in ast.unparse(a.annotation)
    ]


def functions(source):
    """All functions of a source."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def n_lines(node):
    """Lines of a function without its docstring."""
    documented = ast.get_docstring(node) is not None
    doc = node.body[0].end_lineno - node.body[0].lineno + 1 if documented else 0
    return node.end_lineno - node.lineno + 1 - doc


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_log_columns_travel_as_one_value(path):
    if room_of(path) == "estimates":
        return
    name = path.relative_to(ROOT).as_posix()
    loose = [
        f.name
        for f in functions(path.read_text(encoding="utf-8"))
        if len(log_columns(f)) > 2 and (name, f.name) not in LOG_COLUMNS
    ]
    assert loose == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    assert [(f.name, n_lines(f)) for f in functions(source) if n_lines(f) > 45] == []


def test_the_trainer_is_short():
    assert len((ROOT / "training" / "trainer.py").read_text().splitlines()) <= 250


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


def test_a_cycle_is_seen():
    sources = {"dmgen.a": "from dmgen.b import x", "dmgen.b": "from dmgen import a", "dmgen.c": ""}
    assert cycles(module_graph(sources)) == {("dmgen.a", "dmgen.b")}
    sources["dmgen.b"] = "from dmgen.c import a"
    assert cycles(module_graph(sources)) == set()


def test_loose_columns_and_long_functions_are_seen():
    (node,) = functions("def f(log_a: Tensor, log_b: Tensor | None, log_z: float, x: Tensor): ...")
    assert log_columns(node) == ["log_a", "log_b"]
    (node,) = functions('def f():\n    """One.\n\n    Two.\n    """\n    return 1')
    assert n_lines(node) == 2
