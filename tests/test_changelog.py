"""CHANGELOG.md names the current version and every path that has moved."""

from pathlib import Path

import dmgen
from dmgen.old_paths import MOVED

CHANGELOG = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_version_has_an_entry():
    assert f"\n## {dmgen.__version__} (" in CHANGELOG


def test_each_moved_path_is_in_the_table():
    for old, new in MOVED.items():
        homes = ", ".join(f"`{home}`" for home in new)
        assert f"\n| `{old}` | {homes} |\n" in CHANGELOG
