"""Wilson's and Student's intervals against scipy.stats, and their coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from dmgen.estimates.intervals import student, wilson
from dmgen.estimates.score import Score


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize(("hits", "n"), [(0, 50), (50, 50), (1, 3), (25, 50), (1999, 2048)])
def test_wilson_is_that_of_scipy(hits, n, level):
    found = wilson(hits / n, n, level)
    expected = stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    assert found == pytest.approx((expected.low, expected.high), rel=1e-12, abs=1e-16)


@pytest.mark.parametrize("n", [2, 3, 100])
def test_student_is_that_of_scipy(n):
    found = student(Score(3.0, 0.1, n), 0.95)
    assert found == pytest.approx(stats.t.interval(0.95, n - 1, 3.0, 0.1), rel=1e-12)


@pytest.mark.parametrize("n", [20, 200, 2048])
@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_wilson_covers_as_often_as_it_says(n, p):
    """Exact, a sum over the binomial. Its coverage dips where one outcome more is a big step."""
    k = np.arange(n + 1)
    inside = [low <= p <= high for low, high in (wilson(i / n, n) for i in k)]
    assert stats.binom.pmf(k, n, p) @ np.array(inside) > 0.96
    errors = [math.sqrt(i / n * (1 - i / n) / (n - 1)) for i in k]
    plain = [student(Score(i / n, e, n)) for i, e in zip(k, errors, strict=True)]
    if n * min(p, 1 - p) < 1:
        # What it is there for: the plain interval of 0 hits is a point.
        hits = np.array([low <= p <= high for low, high in plain])
        assert stats.binom.pmf(k, n, p) @ hits < 0.9


def test_wilson_stays_inside_zero_and_one_and_has_a_width():
    assert wilson(1.0, 50) == (pytest.approx(50 / (50 + 2.5758**2), rel=1e-3), 1)
    low, high = wilson(0.0, 50)
    assert low == 0
    assert high > 0.1
    assert wilson(0.5, 50, 0.5)[0] > wilson(0.5, 50)[0]


def test_student_is_wider_than_the_normal_interval():
    assert student(Score(3.0, 0.1, 100))[1] - 3.0 > Score(0.0, 0.1, 100).interval(0.99)[1]


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_student_of_a_few_normal_values_is_exact(n):
    draws = np.random.default_rng(0).normal(size=(4000, n))
    scores = [Score(x.mean(), x.std(ddof=1) / math.sqrt(n), n) for x in draws]
    hits = sum(low <= 0 <= high for low, high in map(student, scores))
    assert abs(hits / 4000 - 0.99) < 4 * math.sqrt(0.99 * 0.01 / 4000)


def test_one_value_has_no_interval():
    assert all(map(math.isnan, student(Score(3.0, math.nan, 1))))
