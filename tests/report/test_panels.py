"""Panels: what runs have in common is drawn, and nothing else."""

import pytest

from dmgen.experiment.run import Run
from dmgen.report.panels import Curves
from dmgen.report.run_values import base_moments_in_common, targets_in_common

pytest.importorskip("matplotlib")


def test_values_that_runs_do_not_share_are_not_drawn_for_all(make_run):
    """Of two targets neither is that of both runs, and a base is that of its own prompt."""
    first = Run.load(make_run("a"))
    constraints = [{"moment": {"gender": "female"}, "target": 0.6}]
    other = Run.load(make_run("b", constraints=constraints, prompt="She"))
    equal, different = (first, first), (first, other)
    assert targets_in_common(equal) == {"female": 0.5}
    assert base_moments_in_common(equal).keys() == {"female"}
    assert targets_in_common(different) == base_moments_in_common(different) == {}
    labels = []
    for runs in (equal, different):
        (panel, *_) = Curves(runs, [("GDC++", 0), ("GDC", 0)]).moments()
        labels.append(panel.figure.axes[0].get_legend_handles_labels()[1])
    assert "base" in labels[0]
    assert "base" not in labels[1]
    assert panel.caption == "Not all runs request the same mean."
