"""Plots."""

import pytest

from dmgen.report import figures

pytest.importorskip("matplotlib")


def test_names_are_shown_as_they_are():
    """A pattern with two dollar signs is no formula."""
    pattern = r"^\d+$|^\w+$"
    figure, ax = figures.panel(f"Mean of {pattern}")
    for i, label in enumerate((pattern, "$5 to $9")):
        figures.draw_level(ax, i, label)
    figures.finish(ax)
    assert figures.to_data_uri(figure).startswith("data:image/svg+xml")
    assert ax.get_title(loc="left") == r"Mean of ^\d+\$|^\w+\$"
