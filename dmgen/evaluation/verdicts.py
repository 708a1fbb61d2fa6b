"""Verdicts on a mean: met, not met or undecided, and how many texts would decide."""

from __future__ import annotations

import math
from statistics import NormalDist

from scipy.special import stdtrit

from dmgen.estimates.score import Score

__all__ = ["LEVEL", "TOLERANCE", "interval", "n_to_decide", "verdict"]

LEVEL = 0.99
TOLERANCE = 0.05
# Nobody draws more texts than this for a verdict.
_MOST_TEXTS = 10**9


def interval(score: Score, *, binary: bool = False, level: float = LEVEL) -> tuple[float, float]:
    """The interval that covers the true mean with chance `level`, for n independent texts.

    Student's, whose errors are themselves estimated from n values; NaN where there is only one.

    Args:
        score: a plain mean of n values.
        binary: the values are 0 and 1; then it is Wilson's interval, which stays inside [0, 1] and
            keeps its width where all values agree (0 of 50 is not 0 ± 0).
        level: coverage, in (0, 1).

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not binary or score.n == 0:
        if score.n < 2:
            return score.interval(level)
        half = float(stdtrit(score.n - 1, 0.5 + level / 2)) * score.stderr
        return score.value - half, score.value + half
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    p, n = score.value, score.n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def verdict(
    score: Score,
    target: float | tuple[float, float],
    tolerance: float = TOLERANCE,
    *,
    binary: bool = False,
) -> str:
    """ "met", "not met" or "undecided".

    "met" if the 99 % interval lies inside target ± tolerance, "not met" if it lies outside,
    "undecided" if it reaches over an edge or is not known.

    Args:
        score: a plain mean of n values.
        target: the mean asked for, or (low, high).
        tolerance: how far off a mean may be, in its unit, >= 0.
        binary: as in `interval`.
    """
    low, high = target if isinstance(target, tuple) else (target, target)
    low, high = low - tolerance, high + tolerance
    left, right = interval(score, binary=binary)
    if low <= left and right <= high:
        return "met"
    return "not met" if right < low or left > high else "undecided"


def n_to_decide(
    score: Score,
    target: float | tuple[float, float],
    tolerance: float = TOLERANCE,
    *,
    binary: bool = False,
) -> int | None:
    """About how many values would decide if mean and spread stayed as they are, to 10 %.

    None if the verdict is not "undecided", if nothing is known yet, or if the mean lies on the
    very edge, where no number decides.

    Args:
        (as in `verdict`)
    """
    if not score.n or not math.isfinite(score.value) or not math.isfinite(score.stderr):
        return None
    if verdict(score, target, tolerance, binary=binary) != "undecided":
        return None
    n = score.n
    while n < _MOST_TEXTS:
        n = math.ceil(1.1 * n)
        planned = Score(score.value, score.stderr * math.sqrt(score.n / n), n)
        if verdict(planned, target, tolerance, binary=binary) != "undecided":
            return n
    return None
