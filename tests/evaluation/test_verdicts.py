"""Verdicts: the rule, its calibration over repeats, and the n that decides."""

import math

import numpy as np
import pytest

from dmgen.estimates.intervals import student, wilson
from dmgen.estimates.score import Score
from dmgen.evaluation.verdicts import interval, n_to_decide, verdict

N = 2048
REPEATS = 400


def rate(k, n):
    """The plain mean of n zeros and ones, k of them ones."""
    p = k / n
    return Score(p, math.sqrt(p * (1 - p) / (n - 1)), n)


def verdicts(p, target, seed=0):
    draws = np.random.default_rng(seed).binomial(N, p, size=REPEATS)
    return [verdict(rate(k, N), target, binary=True) for k in draws.tolist()]


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("value", "stderr", "said"),
    [
        (0.5, 0.01, "met"),
        (0.53, 0.005, "met"),
        (0.54, 0.01, "undecided"),
        (0.57, 0.01, "undecided"),
        (0.6, 0.01, "not met"),
        (0.4, 0.01, "not met"),
        (0.5, 0.02, "undecided"),  # the interval is wider than the band
        (0.5, math.nan, "undecided"),
        (math.nan, math.nan, "undecided"),
    ],
)
def test_verdict_of_a_point_target(value, stderr, said):
    assert verdict(Score(value, stderr, 1000), 0.5) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(2.0, "met"), (2.9, "met"), (3.02, "met"), (3.1, "not met"), (1.9, "not met"),
     (1.955, "undecided")],
)  # fmt: skip
def test_verdict_of_an_interval(value, said):
    assert verdict(Score(value, 0.004, 1000), (2.0, 3.0)) == said


def test_a_wider_tolerance_forgives_more():
    score = Score(0.6, 0.01, 1000)
    assert verdict(score, 0.5) == "not met"
    assert verdict(score, 0.5, tolerance=0.2) == "met"
    assert verdict(score, 0.5, tolerance=0.0) == "not met"


# ---------------------------------------------------------------- intervals


def test_binary_means_have_wilsons_interval_and_others_students():
    assert interval(rate(0, 50), binary=True) == wilson(0.0, 50)
    assert interval(rate(20, 50), binary=True, level=0.5) == wilson(0.4, 50, 0.5)
    score = Score(3.0, 0.1, 100)
    assert interval(score) == student(score)
    assert all(map(math.isnan, interval(Score(math.nan, math.nan, 0), binary=True)))


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("target", [0.5, 0.3, 0.05, 1.0])
def test_a_policy_that_meets_the_moment_is_hardly_ever_refused(target):
    said = verdicts(target, target)
    assert said.count("not met") <= 0.02 * REPEATS
    # And the verdict is of use. At 0.5, the worst, the interval is ± 0.028 and fits into ± 0.05
    # if the mean is off by less than 0.022, two standard errors: 95 % of the time.
    assert said.count("met") >= 0.9 * REPEATS


@pytest.mark.parametrize(
    ("p", "target"), [(0.6, 0.5), (0.4, 0.5), (0.2, 0.3), (0.15, 0.05), (0.9, 1.0)]
)
def test_a_policy_that_misses_by_a_tenth_is_found_out(p, target):
    said = verdicts(p, target)
    assert said.count("not met") >= 0.95 * REPEATS
    assert said.count("met") == 0


def test_a_miss_of_just_the_tolerance_is_seldom_judged():
    """At the edge each wrong word may fall in half a percent: one tail of the 99 % interval."""
    said = verdicts(0.55, 0.5)
    assert said.count("met") <= 0.03 * REPEATS
    assert said.count("not met") <= 0.03 * REPEATS


# ---------------------------------------------------------------- the n that decides


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("p", [0.5, 0.52, 0.56, 0.58])
def test_so_many_values_decide_and_few_less_do_not(p, binary):
    score = rate(round(100 * p), 100)
    assert verdict(score, 0.5, binary=binary) == "undecided"
    n = n_to_decide(score, 0.5, binary=binary)

    def said(n):
        return verdict(Score(p, math.sqrt(p * (1 - p) / n), n), 0.5, binary=binary)

    assert said(math.ceil(1.02 * n)) != "undecided"  # the 100 are n − 1 in their stderr
    assert said(int(n / 1.15)) == "undecided"


def test_no_number_decides_on_the_edge_or_where_nothing_is_known():
    assert n_to_decide(rate(55, 100), 0.5, binary=True) is None
    assert n_to_decide(Score(math.nan, math.nan, 0), 0.5) is None
    assert n_to_decide(Score(0.5, math.nan, 1), 0.5) is None
    assert n_to_decide(rate(500, 1000), 0.1, binary=True) is None  # decided already


# ---------------------------------------------------------------- few values


def test_one_value_decides_nothing():
    assert verdict(Score(3.02, math.nan, 1), 3.0) == "undecided"
