"""`Score`: the number, its interval, and what is printed."""

import dataclasses
import math

import pytest

from dmgen.estimates.score import Score


def test_float_gives_the_value():
    assert float(Score(0.25, 0.1, 100)) == 0.25


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.4971, 0.0113, "0.497 ± 0.011"),
        (0.5, 0.0996, "0.50 ± 0.10"),
        (1234.5, 67.8, "1234 ± 68"),
        (-3.2, 9.96, "-3 ± 10"),
        (0.5, 0.0, "0.5 ± 0"),
        (1.0, math.nan, "1 ± nan"),
        (-math.inf, math.inf, "-inf ± inf"),
        (math.nan, math.nan, "nan ± nan"),
        (1e-12, 3e-13, "1e-12 ± 3e-13"),
        (1e8, 3e7, "1e+08 ± 3e+07"),
    ],
)
def test_prints_two_digits_of_the_error(value, stderr, text):
    assert str(Score(value, stderr, 10)) == text


def test_interval_is_the_normal_one():
    low, high = Score(1.0, 2.0, 50).interval(0.95)
    # 97.5 % quantile of the standard normal law, from tables.
    assert high - 1.0 == pytest.approx(2 * 1.959963984540054, abs=1e-12)
    assert 1.0 - low == pytest.approx(high - 1.0, abs=1e-12)
    wide = Score(1.0, 2.0, 50).interval()
    assert wide[1] - 1.0 == pytest.approx(2 * 2.5758293035489004, abs=1e-12)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 99.0, math.nan])
def test_interval_refuses_a_level_outside_0_1(level):
    with pytest.raises(ValueError, match="level"):
        Score(0.0, 1.0, 1).interval(level)


def test_refuses_negative_error_and_count():
    with pytest.raises(ValueError, match="stderr"):
        Score(0.0, -1.0, 1)
    with pytest.raises(ValueError, match="n must"):
        Score(0.0, 1.0, -1)


def test_is_frozen_and_compares_with_its_signature():
    score = Score(1.0, 0.1, 10, "bleu|n=5")
    with pytest.raises(dataclasses.FrozenInstanceError):
        score.value = 2.0
    assert score == Score(1.0, 0.1, 10, "bleu|n=5")
    assert score != Score(1.0, 0.1, 10, "bleu|n=4")
