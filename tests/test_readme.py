"""The README is true: its blocks run, and its quick start is what `dmgen demo` does."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

import dmgen
from dmgen.cli import app
from dmgen.experiment.config import RunConfig

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
DEMO = RunConfig.from_mapping(app.DEMO)
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
QUICK_START = BLOCKS[0]
# The same code on fewer texts.
SMALLER = {
    "n_samples=10_240": "n_samples=800",
    "batch_size=128": "batch_size=8",
    f"n_steps={DEMO.n_steps}": "n_steps=2",
    "n_samples=2048": "n_samples=64",
}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for large, small in SMALLER.items():
        block = block.replace(large, small)
    exec(compile(block, "README.md", "exec"), {})


PRINTED = re.findall(
    r"```python\n((?:(?!```).)*?)```\n\n```text\n(.*?)```", README, flags=re.DOTALL
)


@pytest.mark.parametrize(("block", "printed"), PRINTED, ids=range(len(PRINTED)))
def test_what_is_said_to_be_printed_is_printed(block, printed, capsys):
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_the_quick_start_is_the_demo():
    for large in SMALLER:
        assert large in QUICK_START
    defaults = asdict(dmgen.TrainerConfig())
    for name, value in asdict(DEMO.trainer).items():
        if name == "checkpoint_every" or value == defaults[name]:
            continue
        shown = re.search(rf"\b{name}=([^,\s)]+)", QUICK_START)
        assert shown, name
        assert eval(shown[1]) == value, name
    assert DEMO.fit.n_samples == 10_240
    assert DEMO.evaluate.n_samples == 2048


@pytest.mark.parametrize("name", ["run", "test"])
def test_set_up_is_one_line_each(name):
    found = re.search(rf"<!-- {name} -->\n```sh\n(.+)\n```\n", README)
    assert found, f"the block after <!-- {name} -->"


def rooms_of_the_map():
    """The files that the map names, without their ending, by room; "" is the package itself."""
    block = re.search(r"## The house\n\n```\n(.*?)\n```", README, flags=re.DOTALL)[1]
    rooms, room = {"": set()}, ""
    for line in block.split("\n"):
        entry = re.match(r"[├└]── (\S+)", line)
        if entry and entry[1].endswith("/"):
            room = entry[1].rstrip("/")
            rooms[room] = set()
        elif entry:
            rooms[""].add(entry[1].removesuffix(".py"))
        elif line.startswith("│"):
            rooms[room] |= set(re.findall(r"\w+", line))
    return rooms


def test_the_map_is_the_tree():
    package = Path(dmgen.__file__).parent
    tree = {"": {path.stem for path in package.glob("*.py")} - {"__main__"}}
    for init in package.rglob("__init__.py"):
        if init.parent != package:
            room = init.parent.relative_to(package).as_posix()
            tree[room] = {path.stem for path in init.parent.glob("*.py")} - {"__init__"}
    assert rooms_of_the_map() == tree
