"""The page of several runs."""

import pytest
from pages import assert_self_contained, parsed, words_of

from dmgen.experiment.run import Run
from dmgen.report import write_comparison
from dmgen.report.comparison import group_names

pytest.importorskip("matplotlib")


def test_a_comparison_groups_the_seeds(make_run, tmp_path):
    folders = [
        make_run("a", seed=0),
        make_run("b", seed=1, moment=0.33),
        make_run("c", method="GDC", moment=0.31),
        make_run("d", method="GDC", seed=1, n_steps=3, verdict=None),
    ]
    names = group_names([Run.load(f) for f in folders])
    assert names == [("GDC++", 0), ("GDC++", 1), ("GDC", 0), ("GDC", 1)]
    page, *pictures = write_comparison(folders, tmp_path / "compare.html", png=True)
    tree, text = parsed(page)
    assert_self_contained(tree, text)
    said = words_of(tree)
    assert "4 runs, 2 settings compared" in said
    assert said.count("Half of the texts are about women") == 1
    assert "0.330 ± 0.010 (not met)" in said
    assert "not measured yet" in said
    assert "band: from the lowest to the highest seed" in said
    assert len(pictures) >= 8


def test_settings_that_differ_are_in_the_name(make_run):
    folders = [make_run("a", rate=1e-4), make_run("b", rate=2e-4), make_run("c", rate=2e-4)]
    names = group_names([Run.load(f) for f in folders])
    assert [name for name, _ in names] == [
        "GDC++, learning_rate=0.0001",
        "GDC++, learning_rate=0.0002",
        "GDC++, learning_rate=0.0002",
    ]
    assert len(set(names)) == 3  # the same run twice is told apart by its folder
    alike = [make_run(name) for name in ("a/run", "b/run", "c/run")]
    assert len(set(group_names([Run.load(f) for f in alike]))) == 3


def test_a_comparison_takes_two(make_run, tmp_path):
    with pytest.raises(ValueError, match="two run folders at least, got 1"):
        write_comparison([make_run("a")], tmp_path / "page.html")
