"""`Estimate`: a number with the influence of every sample on it, so that errors compose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmgen.estimates.score import Score


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number estimated from N independent samples, with the influence of each sample.

    To first order the error of the estimate is the mean of the influences. Arithmetic combines
    values and influences by the delta method, so the result carries the error that belongs to it:
    estimates from the same samples are correlated, and `a - b`, `a / b` account for that.
    Numbers are exact.

    Attributes:
        value: the estimate.
        influence: (N,) float64, unit of the value, mean 0.
        strata: (N,), optional, the proposal each sample came from; see `stderr_of_mean`.
    """

    value: float
    influence: Tensor
    strata: Tensor | None = None

    @classmethod
    def mean(cls, values: Tensor, strata: Tensor | None = None) -> Estimate:
        """Return the plain mean of values `(N,)`."""
        average = values.mean()
        return cls(float(average), values - average, strata)

    @classmethod
    def total(cls, values: Tensor, strata: Tensor | None = None) -> Estimate:
        """Return the sum of values `(N,)`, N times their mean."""
        influence = len(values) * (values - values.mean())
        return cls(float(values.sum()), influence, strata)

    def score(self, n: int | None = None, signature: str = "") -> Score:
        """Return the value with its standard error, see `stderr_of_mean`.

        Args:
            n: number of samples to report; None for the length of the influence.
            signature: of the score.
        """
        stderr = stderr_of_mean(self.influence, self.strata)
        return Score(self.value, stderr, len(self.influence) if n is None else n, signature)

    def error(self) -> Estimate:
        """Return an estimate of value 0 with the influence of this one.

        If a second estimate was computed with the value of this one in place of the truth, and
        changes by `slope` per unit of it, then `second + slope * first.error()` has the error of
        both.
        """
        return self - self.value

    def log(self) -> Estimate:
        """Return the natural logarithm; `-inf` for 0 and NaN below 0, both with error NaN."""
        value = float(torch.tensor(self.value, dtype=torch.float64).log())
        slope = 1 / self.value if self.value > 0 else math.nan
        return Estimate(value, slope * self.influence, self.strata)

    def exp(self) -> Estimate:
        """Return the exponential; `inf` beyond the range of floats."""
        value = float(torch.tensor(self.value, dtype=torch.float64).exp())
        return Estimate(value, value * self.influence, self.strata)

    def __neg__(self) -> Estimate:
        return Estimate(-self.value, -self.influence, self.strata)

    def __add__(self, other: Estimate | float) -> Estimate:
        value, influence = self._parts(other)
        return Estimate(self.value + value, self.influence + influence, self.strata)

    def __sub__(self, other: Estimate | float) -> Estimate:
        value, influence = self._parts(other)
        return Estimate(self.value - value, self.influence - influence, self.strata)

    def __mul__(self, other: Estimate | float) -> Estimate:
        value, influence = self._parts(other)
        mixed = value * self.influence + self.value * influence
        return Estimate(self.value * value, mixed, self.strata)

    def __truediv__(self, other: Estimate | float) -> Estimate:
        value, influence = self._parts(other)
        ratio = self.value / value
        return Estimate(ratio, (self.influence - ratio * influence) / value, self.strata)

    def __rsub__(self, other: float) -> Estimate:
        return -self + other

    def __rtruediv__(self, other: float) -> Estimate:
        ratio = other / self.value
        return Estimate(ratio, -ratio / self.value * self.influence, self.strata)

    __radd__ = __add__
    __rmul__ = __mul__

    def _parts(self, other: Estimate | float) -> tuple[float, Tensor | float]:
        """Return value and influence of another estimate of the same samples, or of a number."""
        if not isinstance(other, Estimate):
            return other, 0.0
        if self.influence.shape != other.influence.shape or not _equal(self.strata, other.strata):
            raise ValueError(
                "estimates combine only if they come from the same samples, in the same strata;"
                f" got {len(self.influence)} and {len(other.influence)} samples"
            )
        return other.value, other.influence


def stderr_of_mean(residuals: Tensor, strata: Tensor | None = None) -> float:
    """Return the standard error of the mean of N independent residuals; NaN for N = 1.

    `√(Σ r² / (N (N-1)))` with r taken around their mean; with strata around the mean of the
    stratum, each with its own `n/(n-1)`, because counts that were fixed beforehand add no noise.
    A stratum of one sample shows no spread: there the mean of all is taken, which is conservative.

    Args:
        residuals: (N,), the influence of each sample on the estimate, scaled so that the error of
            the estimate is their mean.
        strata: (N,), optional, integer label of the proposal each sample came from.

    Raises:
        ValueError: if strata has another length.
    """
    n = len(residuals)
    if strata is not None and strata.shape != residuals.shape:
        raise ValueError(f"strata must have shape ({n},), got {tuple(strata.shape)}")
    if n == 1:
        return math.nan
    centred = residuals - residuals.mean()
    if strata is None:
        return math.sqrt(float((centred * centred).sum()) / (n * (n - 1)))
    _, label, counts = torch.unique(strata, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, label, centred)
    alone = counts == 1
    within = centred - torch.where(alone, 0.0, sums / counts)[label]
    correction = torch.where(alone, 1.0, counts / (counts - 1).clamp(min=1))[label]
    return math.sqrt(float((correction * within * within).sum())) / n


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
