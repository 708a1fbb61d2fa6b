"""Importance weights, kept in logs: effective size, log Z, means, tail index, pooled proposals.

A log-weight is `lw = log P(x) - log q(x)` of a text drawn from q. Inputs are tensors of any float
type and are lifted to float64. `-inf` is legal (P = 0), NaN and `+inf` raise. The largest
log-weight is subtracted before anything is exponentiated, so adding 1e5 to all of them costs no
digit beyond the rounding of the inputs.

`strata (N,)` names the proposal each sample came from when their counts were fixed beforehand.
Errors are then taken inside the strata, where they are smaller: without it they are conservative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmgen.estimates.checks import check_log_weights
from dmgen.estimates.estimate import Estimate, stderr_of_mean
from dmgen.estimates.mixture import balance_heuristic, log_mixture
from dmgen.estimates.pareto import pareto_k

__all__ = [
    "Weights",
    "balance_heuristic",
    "check_log_weights",
    "ess",
    "log_mixture",
    "log_z",
    "mean",
    "pareto_k",
    "stderr_of_mean",
]


@dataclass(frozen=True, eq=False)
class Weights:
    """The importance weights w = P/q of N samples drawn from q, immutable.

    Attributes:
        log_w: (N,), log P - log q, nats; lifted to float64, `-inf` is legal.
        strata: (N,), optional, the proposal each sample came from.
        known_log_z: log Z in nats if it is known, taken as exact; 0 if P is normalised; None to
            estimate it from the weights.

    Raises:
        ValueError: NaN or `+inf`.
    """

    log_w: Tensor
    strata: Tensor | None = None
    known_log_z: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_w", check_log_weights(self.log_w))

    @classmethod
    def mixture(
        cls,
        log_target: Tensor,
        log_probs: Tensor,
        n_samples: Tensor,
        strata: Tensor | None = None,
    ) -> Weights:
        """Return the weights of samples pooled from M proposals, see `balance_heuristic`."""
        return cls(balance_heuristic(log_target, log_probs, n_samples), strata)

    def add(self, other: Weights) -> Weights:
        """Return the weights of the samples of both, each with its own q, as separate strata."""
        a, b = (
            torch.zeros(len(w.log_w), dtype=torch.long) if w.strata is None else w.strata
            for w in (self, other)
        )
        strata = torch.cat([a, b - b.min() + a.max() + 1])
        return Weights(torch.cat([self.log_w, other.log_w]), strata, self.known_log_z)

    @property
    def ess(self) -> Estimate:
        """Return the effective sample size `(Σ w)² / Σ w²`, see `ess`."""
        top = self.log_w.max()
        if torch.isneginf(top):
            return Estimate(0.0, torch.full_like(self.log_w, math.nan), self.strata)
        w = torch.exp(self.log_w - top)
        total, squares = Estimate.total(w, self.strata), Estimate.total(w * w, self.strata)
        return total * total / squares

    @property
    def log_z(self) -> Estimate:
        """Return `log((1/N) Σ w)` in nats, see `log_z`; without error if it is known."""
        if self.known_log_z is not None:
            return Estimate(self.known_log_z, torch.zeros_like(self.log_w), self.strata)
        top = self.log_w.max()
        if torch.isneginf(top):
            return Estimate(-math.inf, torch.full_like(self.log_w, math.nan), self.strata)
        w = torch.exp(self.log_w - top)
        average = w.mean()
        return Estimate(float(top + average.log()), w / average - 1, self.strata)

    @property
    def log_density(self) -> Tensor:
        """Return `log p - log q = log w - log Z`, `(N,)`, nats; NaN if all weights are 0."""
        return self.log_w - self.log_z.value

    @property
    def pareto_k(self) -> float:
        """Return the tail index of the largest weights, see `pareto_k`."""
        return pareto_k(self.log_w)

    def mean(self, values: Tensor) -> Estimate:
        """Return the self-normalised mean `Σ w v / Σ w` of values `(N,)`, see `mean`."""
        value, influence = _means(self.log_w, values)
        return Estimate(float(value[0]), influence[:, 0], self.strata)


def ess(log_weights: Tensor) -> float:
    """Return the effective sample size `(Σ w)² / Σ w²`: 1 to N, and 0 if all weights are 0.

    Args:
        log_weights: (N,), nats; an additive constant does not matter.

    Raises:
        ValueError: NaN or `+inf`.

    Source: Kong (1992), "A note on importance sampling using standardized weights".
    """
    return Weights(log_weights).ess.value


def log_z(log_weights: Tensor, strata: Tensor | None = None) -> tuple[float, float]:
    """Return `log((1/N) Σ w)` and its standard error, the estimate of log Z, in nats.

    The error is first order (delta method): `stderr(w) / (√N mean(w))`. It is not reliable below
    an ESS of about 100 or for a Pareto k above 0.7: a proposal that misses a part of P gives a
    log Z that is too small together with an error that is too small. NaN for N = 1. If all
    weights are 0 the result is `(-inf, inf)`.

    Args:
        log_weights: (N,), nats.
        strata: (N,), optional, the proposal each sample came from.

    Raises:
        ValueError: NaN or `+inf`; strata of another length.
    """
    score = Weights(log_weights, strata).log_z.score()
    return score.value, math.inf if score.value == -math.inf else score.stderr


def mean(log_weights: Tensor, values: Tensor, strata: Tensor | None = None) -> tuple[Any, Any]:
    """Return the self-normalised mean `Σ w v / Σ w` and its standard error (delta method).

    `stderr² = N/(N-1) Σ ω² (v - mean)²` with `ω = w / Σ w`. It is not reliable for a small ESS or
    a heavy tail of w·v. It is 0 where all samples with weight share one value: that no spread was
    seen does not mean that there is none.

    Args:
        log_weights: (N,), nats; an additive constant does not matter.
        values: (N,) or (N, K). Entries under a weight of 0 are ignored, whatever they hold.
        strata: (N,), optional, the proposal each sample came from.

    Returns:
        Two floats for values (N,), two float64 tensors (K,) for values (N, K). NaN if all weights
        are 0: the mean does not exist.

    Raises:
        ValueError: NaN or `+inf` in the log-weights, a value that is not finite under a positive
            weight, or shapes that do not fit.
    """
    value, influence = _means(check_log_weights(log_weights), values)
    stderr = [stderr_of_mean(r, strata) for r in influence.unbind(1)]
    if torch.as_tensor(values).ndim == 1:
        return float(value[0]), stderr[0]
    return value, torch.tensor(stderr, dtype=torch.float64)


def _means(lw: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted means `(K,)` of values `(N, K)`, and the influences `(N, K)`."""
    columns = torch.as_tensor(values, dtype=torch.float64).detach()
    if columns.ndim not in (1, 2) or len(columns) != len(lw):
        raise ValueError(
            f"values must be ({len(lw)},) or ({len(lw)}, K), got {tuple(columns.shape)}"
        )
    columns = columns[:, None] if columns.ndim == 1 else columns
    top = lw.max()
    if torch.isneginf(top):
        nothing = torch.full_like(columns, math.nan)
        return nothing[0], nothing
    columns = _finite_where_weighted(columns, lw)
    w = torch.exp(lw - top)
    g = (w / w.mean())[:, None]  # mean 1
    # The second pass removes the rounding of values that are far from 0.
    value = (g * columns).mean(0)
    value = value + (g * (columns - value)).mean(0)
    return value, g * (columns - value)


def _finite_where_weighted(columns: Tensor, lw: Tensor) -> Tensor:
    """Return values with 0 in place of those under a weight of 0; the others must be finite."""
    columns = columns.masked_fill(torch.isneginf(lw)[:, None], 0.0)
    bad = ~torch.isfinite(columns)
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"values[{row}, {column}] is {columns[row, column].item()} where the weight is positive"
        )
    return columns
