"""Verdicts and intervals: exact coverage, calibration over repeats, and the n that decides."""

import math

import numpy as np
import pytest
from scipy.stats import binom, t

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


@pytest.mark.parametrize("n", [20, 200, 2048])
@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_binary_interval_covers_as_often_as_it_says(n, p):
    """Exact, a sum over the binomial law. Wilson's dips where one outcome more is a big step."""
    k = np.arange(n + 1)
    inside = [low <= p <= high for low, high in (interval(rate(i, n), binary=True) for i in k)]
    assert binom.pmf(k, n, p) @ np.array(inside) > 0.96
    plain = [low <= p <= high for low, high in (interval(rate(i, n)) for i in k)]
    if n * min(p, 1 - p) < 1:
        # What it is there for: the normal interval of 0 hits is a point.
        assert binom.pmf(k, n, p) @ np.array(plain) < 0.9


def test_binary_interval_stays_inside_zero_and_one_and_has_a_width():
    assert interval(rate(50, 50), binary=True) == (
        pytest.approx(50 / (50 + 2.5758**2), rel=1e-3),
        1,
    )
    low, high = interval(rate(0, 50), binary=True)
    assert low == 0
    assert high > 0.1
    assert (
        interval(rate(25, 50), binary=True, level=0.5)[0] > interval(rate(25, 50), binary=True)[0]
    )


def test_other_means_have_students_interval():
    low, high = interval(Score(3.0, 0.1, 100))
    assert (low, high) == pytest.approx(t.interval(0.99, 99, 3.0, 0.1), rel=1e-12)
    assert high - 3.0 > Score(0.0, 0.1, 100).interval(0.99)[1]


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


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_of_a_few_values_covers_as_often_as_it_says(n):
    """Student's law is exact for normal values: 99 of 100 intervals hold the truth."""
    draws = np.random.default_rng(0).normal(size=(4000, n))
    scores = [Score(x.mean(), x.std(ddof=1) / math.sqrt(n), n) for x in draws]
    hits = sum(low <= 0 <= high for low, high in map(interval, scores))
    assert abs(hits / 4000 - 0.99) < 4 * math.sqrt(0.99 * 0.01 / 4000)


def test_one_value_decides_nothing():
    assert verdict(Score(3.02, math.nan, 1), 3.0) == "undecided"
