"""The dual of moment matching: its value, mean and covariance at a lambda.

The dual is `D(lambda) = log Σ w exp(lambda·phi) - lambda·target` over the rows of a sample. Targets
are intervals [low, high] (a point is low = high): the target of a positive lambda is `low`, that of
a negative one `high`. So D has a kink at 0, and its minimum obeys the KKT conditions of
min KL(p‖a).
Names, errors and messages are in `moments`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


Mask = NDArray[np.bool_]


# Distances below this, in half-ranges of a feature, are rounding of the targets (0.1 + 0.2).
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Rows:
    """Feature vectors of the samples with positive weight, equal binary ones merged."""

    phi: Array  # (U, K)
    log_w: Array  # (U,) log of the sum of the weights in the row
    concentration: Array  # (U,) Σw² / (Σw)² in the row: 1 for a single sample
    counts: Array  # (U,) samples in the row
    n: int  # samples with positive weight

    @classmethod
    def of(cls, phi: Array, log_w: Array) -> Rows:
        """Return the rows of features (N, K) with log-weights (N,); `-inf` drops a sample."""
        keep = ~np.isneginf(log_w)
        if not keep.all():
            phi, log_w = phi[keep], log_w[keep]
        n, k = phi.shape
        if n == 0 or not 0 < k <= 52 or not (_is_binary(phi[:1000]) and _is_binary(phi)):
            return cls(phi, log_w, np.ones(n), np.ones(n), n)
        # Up to 52 bits are exact in a float64, and small integers are sorted by radix.
        small = np.uint8 if k <= 8 else np.uint16 if k <= 16 else np.int64
        codes = (phi @ 2.0 ** np.arange(k)).astype(small)
        order = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.diff(codes[order].astype(np.int64), prepend=-1))
        counts = np.diff(starts, append=n)
        log_w = log_w[order]
        # Each row relative to its largest weight: one far below the others must not vanish.
        top = np.maximum.reduceat(log_w, starts)
        w = np.exp(log_w - np.repeat(top, counts))
        total = np.add.reduceat(w, starts)
        concentration = np.add.reduceat(w * w, starts) / total**2
        first = order[starts]
        return cls(phi[first], top + np.log(total), concentration, counts.astype(np.float64), n)

    def tilt(self, lambdas: Array) -> tuple[float, Array]:
        """Return `log Σ w exp(lambda·phi)` and the probabilities (U,) of the rows under p."""
        logits = self.phi @ lambdas
        logits += self.log_w
        top = logits.max()
        logits -= top
        p = np.exp(logits, out=logits)
        total = p.sum()
        p /= total
        return float(top + math.log(total)), p


def _is_binary(phi: Array) -> bool:
    return bool(((phi == 0) | (phi == 1)).all())


def varying(least: Array, most: Array) -> Mask:
    """Return which features take more than one value, rounding aside, from their extremes (K,)."""
    return most - least > 1e-13 * np.maximum(np.abs(least), np.abs(most))


def scatter(phi: Array, centre: Array, weights: Array) -> Array:
    """Return `Σ weights (phi - centre)(phi - centre)ᵀ`, (K, K)."""
    k = phi.shape[1]
    total = np.zeros((k, k))
    root = np.sqrt(weights)[:, None]
    # Blocks that stay in the cache are several times faster than whole arrays of 1e6 rows.
    block = max(1, 32_768 // max(k, 1))
    for start in range(0, len(phi), block):
        part = (phi[start : start + block] - centre) * root[start : start + block]
        total += part.T @ part
    return total


class Problem:
    """Rows and targets with each feature measured from its mean in half-ranges (|x| <= 2).

    Attributes:
        low, high: (K,), the targets in these units; `theta` is lambda in these units.
        varies: (K,), features with more than one value; lambda of the others is 0.
        rank: how many features are linearly independent up to a constant.
    """

    def __init__(self, rows: Rows, low: Array, high: Array) -> None:
        self.rows = rows
        least, most = rows.phi.min(0), rows.phi.max(0)
        self.varies: Mask = varying(least, most)
        self.scale: Array = np.where(self.varies, (most - least) / 2, 1.0)
        # Unweighted, so that a row of tiny weight has its part in the rank.
        uniform = np.full(len(rows.phi), 1 / len(rows.phi))
        self.centre: Array = uniform @ rows.phi
        self.low, self.high = (low - self.centre) / self.scale, (high - self.centre) / self.scale
        gram = scatter(rows.phi, self.centre, uniform)
        self._gram = gram / np.outer(self.scale, self.scale)
        self.rank = self.basis(self.varies)[0].shape[1]

    def basis(self, free: Mask) -> tuple[Array, Array]:
        """Return the directions of the free features that vary on the samples, and the others."""
        values, vectors = np.linalg.eigh(self._gram[np.ix_(free, free)])
        # Exact dependence shows as 1e-16; features of 1e6 rows that differ in one, as 1e-6.
        positive = values > 1e-13 * values.sum()
        return vectors[:, positive], vectors[:, ~positive]

    def project(self, direction: Array) -> Array:
        """Return `direction · x` of every row, (U,), for a direction in half-ranges."""
        scaled = direction / self.scale
        return self.rows.phi @ scaled - float(scaled @ self.centre)

    def support(self, direction: Array) -> float:
        """Return the least value of `direction · m` over the m that satisfy the targets."""
        ends = np.where(direction > 0, self.low, self.high)
        used = direction != 0  # 0 times an infinite end
        return float(direction[used] @ ends[used])


@dataclass(frozen=True, eq=False)
class Point:
    """The dual at one lambda."""

    theta: Array  # (K,) lambda times half-range
    log_z: float  # log Σ w exp(theta·x)
    p: Array  # (U,)
    mean: Array  # (K,) of x under p
    cov: Array  # (K, K) of x under p

    @classmethod
    def at(cls, problem: Problem, theta: Array, log_z: float, p: Array) -> Point:
        """Return the point with the moments of p filled in."""
        rows, scale = problem.rows, problem.scale
        mean = p @ rows.phi
        cov = scatter(rows.phi, mean, p) / np.outer(scale, scale)
        return cls(theta, log_z, p, (mean - problem.centre) / scale, cov)
