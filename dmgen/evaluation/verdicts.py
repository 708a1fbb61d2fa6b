"""Verdicts on a mean: met, not met or undecided, and the number of texts that would decide."""

from __future__ import annotations

import math

from dmgen.estimates.intervals import LEVEL, student, wilson
from dmgen.estimates.score import Score

__all__ = ["LEVEL", "TOLERANCE", "interval", "n_to_decide", "verdict"]

TOLERANCE = 0.05
# No evaluation draws more texts than this.
_MOST_TEXTS = 10**9


def interval(score: Score, *, binary: bool = False, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval that covers the true mean with probability `level`.

    Args:
        score: a plain mean of n independent values.
        binary: whether the values are 0 and 1; then it is Wilson's interval, else Student's.
        level: in (0, 1).

    Returns:
        (low, high), in the unit of the values; NaN where the error is unknown.
    """
    if binary and score.n:
        return wilson(score.value, score.n, level)
    return student(score, level)


def verdict(
    score: Score,
    target: float | tuple[float, float],
    tolerance: float = TOLERANCE,
    *,
    binary: bool = False,
) -> str:
    """Return "met", "not met" or "undecided".

    "met" if the 99 % interval lies inside target ± tolerance, "not met" if it lies outside, and
    "undecided" if it contains an edge or is unknown.

    Args:
        score: a plain mean of n values.
        target: the requested mean, or (low, high).
        tolerance: the largest deviation that is accepted, in the unit of the values, >= 0.
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
    """Return the number of values, to 10 %, that would decide if mean and spread stayed the same.

    Args:
        score: as in `verdict`.
        target: as in `verdict`.
        tolerance: as in `verdict`.
        binary: as in `verdict`.

    Returns:
        None if the verdict is not "undecided", if mean or error are unknown, or if the mean lies
        on an edge, where no number decides.
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
