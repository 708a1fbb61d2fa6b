"""Intervals that cover a mean with a chosen probability: Student's and Wilson's."""

from __future__ import annotations

import math

from scipy.special import ndtri, stdtrit

from dmgen.estimates.score import Score

LEVEL = 0.99


def student(score: Score, level: float = LEVEL) -> tuple[float, float]:
    """Return Student's interval of the mean of n independent values; NaN for n < 2.

    Its width allows for an error that is itself estimated from the n values.

    Args:
        score: a plain mean of n values with its standard error.
        level: probability to cover the true mean, in (0, 1).

    Returns:
        (low, high), in the unit of the values.
    """
    if score.n < 2:
        return score.interval(level)
    half = float(stdtrit(score.n - 1, 0.5 + level / 2)) * score.stderr
    return score.value - half, score.value + half


def wilson(rate: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval of a probability from its frequency among n independent trials.

    It stays inside [0, 1] and has a width where all trials agree (0 of 50 is not 0 ± 0). The
    frequency need not be a multiple of 1/n, as it must for `scipy.stats.binomtest`: planning a
    larger n keeps the frequency.

    Args:
        rate: the frequency, in [0, 1].
        n: number of trials, >= 1.
        level: probability to cover the true rate, in (0, 1).

    Returns:
        (low, high), in [0, 1].

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    z2 = float(ndtri(0.5 + level / 2)) ** 2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
