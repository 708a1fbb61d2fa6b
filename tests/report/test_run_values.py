"""Measurements and frames of runs."""

from dataclasses import replace

import pytest
from conftest import make_evaluation

from dmgen.estimates.score import Score
from dmgen.experiment.run import Run
from dmgen.report.run_values import evaluations_frame, measurements, metrics_frame


def test_an_interval_of_a_fraction_ends_at_one():
    score = Score(0.999, 0.001, 100)
    evaluation = replace(
        make_evaluation(), distinct={("policy", 3): score}, length={"policy": score}
    )
    by_name = {m.name: m for m in measurements(evaluation)}
    low, high = by_name["distinct_3"].interval
    assert high == 1.0
    assert by_name["length"].interval == (low, pytest.approx(0.999 + (0.999 - low)))


def test_frames_have_a_row_a_step_and_an_evaluation(make_run):
    runs = [Run.load(make_run("a")), Run.load(make_run("b", n_steps=3, verdict=None))]
    names = [("GDC++", 0), ("GDC++", 1)]
    metrics = metrics_frame(runs, names)
    assert metrics["seed"].tolist() == [0] * 6 + [1] * 3
    (row,) = evaluations_frame(runs, names).to_dict("records")
    assert (row["step"], row["samples"], row["final"]) == (6, 384.0, True)
    assert (row["E[female]"], row["kl_policy_base"], row["excess"]) == (0.327, 0.638, -0.175)
    assert row["E[female]_low"] == pytest.approx(0.297)
