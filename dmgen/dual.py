"""The numerics below `moments`: the dual of moment matching, its Newton method, and its refusals.

Minimises `D(lambda) = log Σ w exp(lambda·phi) - lambda·target` over the rows of a sample. Targets
are intervals [low, high] (a point is low = high): a positive lambda pays for `low`, a negative one
for `high`, so D has a kink at 0, and its minimum obeys the KKT conditions of min KL(p‖a).
Nothing here knows about names, errors or messages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

__all__ = ["Certificate", "Point", "Problem", "Rows", "minimise", "scatter", "varying"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# A fit that needs more steps than this is far from a hard target, or has no minimum to find; the
# linear programme that decides it costs about as much as a few steps.
_STEPS_BEFORE_PROOF = 15
# Distances below this, in half-ranges of a feature, are rounding of the targets (0.1 + 0.2).
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Certificate:
    """A direction over the features in which the targets lie beyond every sample, or at the last.

    Attributes:
        direction: (K,), in units of the features, largest entry ±1.
        largest_seen: max of `direction · phi` over the samples with weight.
        asked: least value of `direction · m` over all m that satisfy the targets.
        n_at_largest: number of samples at `largest_seen`.
        on_edge: whether the targets touch the hull of the samples instead of missing it.
    """

    direction: Array
    largest_seen: float
    asked: float
    n_at_largest: int
    on_edge: bool


@dataclass(frozen=True, eq=False)
class Rows:
    """Feature vectors of the samples with positive weight, equal binary ones merged."""

    phi: Array  # (U, K)
    log_w: Array  # (U,) log of the sum of the weights in the row
    share: Array  # (U,) Σw² / (Σw)² in the row: 1 for a single sample
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
        # Each row by its own largest weight: one far below the others must not vanish.
        top = np.maximum.reduceat(log_w, starts)
        w = np.exp(log_w - np.repeat(top, counts))
        total = np.add.reduceat(w, starts)
        share = np.add.reduceat(w * w, starts) / total**2
        first = order[starts]
        return cls(phi[first], top + np.log(total), share, counts.astype(np.float64), n)

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
        # Unweighted, so that a row of tiny weight counts as seen.
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
        seen = values > 1e-13 * values.sum()
        return vectors[:, seen], vectors[:, ~seen]

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


@dataclass(frozen=True, eq=False)
class _Active:
    """The features that lambda acts on at a point, with the edge each one is held to."""

    free: Mask  # (K,)
    edge: Array  # (K,) target in force; 0 where not free
    side: Array  # (K,) the sign lambda must keep; 0 for any
    gradient: Array  # (F,) mean - edge of the free features
    seen: Array  # (F, R) directions in which they vary
    blind: Array  # (F, F - R) directions in which they do not

    @classmethod
    def at(cls, problem: Problem, point: Point, tol: float) -> _Active:
        low, high, theta, mean = problem.low, problem.high, point.theta, point.mean
        slack = tol * np.sqrt(np.diag(point.cov))
        up = (theta > 0) | ((theta == 0) & (mean < low - slack))
        down = (theta < 0) | ((theta == 0) & (mean > high + slack))
        exact = low == high
        free = problem.varies & (exact | up | down)
        edge = np.where(free, np.where(exact | up, low, high), 0.0)
        side = np.where(exact | ~free, 0.0, np.where(up, 1.0, -1.0))
        seen, blind = problem.basis(free)
        return cls(free, edge, side, (mean - edge)[free], seen, blind)

    @property
    def conflict(self) -> bool:
        """Whether the targets disagree in a direction in which the samples do not vary."""
        return bool(np.abs(self.blind.T @ self.gradient).max(initial=0.0) > _ROUNDING)

    def settled(self, point: Point, tol: float) -> bool:
        """Whether the moments match in all seen directions, and an exact match exists nearby.

        The second half keeps targets on the edge of the hull from passing as reached once lambda
        is large. If p has standard deviation s along v and its support has diameter R, the hull
        goes at least s²/R beyond the mean along v (Bhatia and Davis), so a mismatch below that in
        every direction leaves the target strictly inside.
        """
        if not self.free.any():
            return True
        cov = point.cov[np.ix_(self.free, self.free)]
        gradient = self.seen @ (self.seen.T @ self.gradient)
        if (np.abs(gradient) > tol * np.sqrt(np.diag(cov))).any():
            return False
        values, vectors = np.linalg.eigh(self.seen.T @ cov @ self.seen)
        if values.min(initial=math.inf) <= 0:
            return False
        mismatch = np.linalg.norm((vectors.T @ (self.seen.T @ gradient)) / np.sqrt(values))
        diameter = 2 * math.sqrt(len(gradient))
        return bool(2 * diameter * mismatch <= math.sqrt(values.min(initial=math.inf)))

    def move(self, point: Point, damping: float) -> Array:
        """Return theta after a Newton step regularised by `damping · |gradient|`, (K,)."""
        cov = point.cov[np.ix_(self.free, self.free)]
        ridge = damping * float(np.linalg.norm(self.gradient))
        hessian = self.seen.T @ cov @ self.seen + ridge * np.eye(self.seen.shape[1])
        step = -self.seen @ np.linalg.solve(hessian, self.seen.T @ self.gradient)
        if self.conflict and self.side.any():
            # D falls for ever along a blind direction, until an interval lets go at lambda = 0.
            step -= self.blind @ (self.blind.T @ self.gradient) / ridge
        theta = point.theta.copy()
        theta[self.free] += step
        return np.where(self.side * theta < 0, 0.0, theta)


def minimise(
    problem: Problem, tol: float, max_steps: int
) -> tuple[Point, int, bool, Certificate | None]:
    """Return the last point, the evaluations of D, whether it is the minimum, or why there is none.

    Newton's method with the ridge `c |gradient|` (Mishchenko 2023, 2112.02089), c adapted: steps
    are short far away and become pure Newton at the end. A step is kept if D falls by a tenth of
    what the quadratic model says; where that is below the rounding of D, if the gradient falls.
    """
    point = Point.at(problem, np.zeros_like(problem.scale), *problem.rows.tilt(problem.scale * 0))
    damping = 0.25
    n_steps = 0
    while True:
        active = _Active.at(problem, point, tol)
        settled = active.settled(point, tol)
        if settled and not active.conflict:
            return point, n_steps, True, None
        stuck = n_steps == max_steps or (settled and not active.side.any())
        if stuck or n_steps == _STEPS_BEFORE_PROOF:
            certificate = separating_direction(problem)
            if stuck or certificate is not None:
                return point, n_steps, False, certificate
        n_steps += 1
        trial, trust = _try_step(problem, point, active, damping)
        if trial is not None:
            point = trial
        damping = max(damping * trust, 1e-6)


def _try_step(
    problem: Problem, point: Point, active: _Active, damping: float
) -> tuple[Point | None, float]:
    """Return the next point, or None if the step is not kept, and the factor for the damping."""
    theta = active.move(point, damping)
    lambdas = theta / problem.scale
    log_z, p = problem.rows.tilt(lambdas)
    log_z -= float(lambdas @ problem.centre)
    step = theta - point.theta
    promised = -float(active.gradient @ step[active.free] + 0.5 * step @ point.cov @ step)
    gained = point.log_z - log_z + float(step @ active.edge)
    if 0 < promised < 1e-9 * (1 + abs(log_z)):
        trial = Point.at(problem, theta, log_z, p)
        left = np.linalg.norm((trial.mean - active.edge)[active.free])
        return (trial, 1 / 8) if left < np.linalg.norm(active.gradient) else (None, 6.0)
    if not gained > 0.1 * promised > 0:
        return None, 6.0
    return Point.at(problem, theta, log_z, p), 1 / 8 if gained > 0.7 * promised else 1.0


def separating_direction(problem: Problem) -> Certificate | None:
    """Return a direction that proves the targets out of reach of the rows, or None.

    First the v with `|v|₁ <= 1` whose targets lie farthest beyond the rows, `support(v) - max v·x`;
    if none does, a v that no row passes, `v·x <= support(v)`, and some stay below (an edge).
    """
    rows: list[int] = []
    for edge in (False, True):
        v = _cutting_planes(problem, rows, edge)
        projections = problem.project(v)
        margin = problem.support(v) - float(projections.max())
        spread = problem.support(v) - float(projections.mean())
        if margin > _ROUNDING or (edge and margin > -1e-11 and spread > _ROUNDING):
            return _certificate(problem, v, projections, margin)
    return None


def _certificate(problem: Problem, v: Array, projections: Array, margin: float) -> Certificate:
    """Return the certificate of direction v (in half-ranges) in units of the features."""
    largest = projections.max()
    direction = v / problem.scale
    unit = np.abs(direction).max()
    seen = float((largest + direction @ problem.centre) / unit)
    n_at_largest = int(problem.rows.counts[projections >= largest - _ROUNDING].sum())
    on_edge = margin <= _ROUNDING
    asked = seen + (0.0 if on_edge else float(margin / unit))
    return Certificate(direction / unit, seen, asked, n_at_largest, on_edge)


def _cutting_planes(problem: Problem, chosen: list[int], edge: bool) -> Array:
    """Return the optimal v of the linear programme over all rows, solved on few of them.

    Rows that the last solution violates are added to `chosen` until there are none, so a million
    rows cost a few products and tiny programmes. Variables: v⁺, v⁻ >= 0 and z (the largest v·x).
    """
    k = len(problem.scale)
    finite_low, finite_high = np.isfinite(problem.low), np.isfinite(problem.high)
    low = np.where(finite_low, problem.low, 0.0)
    high = np.where(finite_high, problem.high, 0.0)
    usable = np.concatenate([problem.varies & finite_low, problem.varies & finite_high])
    bounds: list[tuple[float | None, float | None]] = [(0.0, float(u)) for u in usable]
    bounds.append((None, None))
    if not chosen:
        phi = problem.rows.phi
        chosen.extend({*phi.argmin(0).tolist(), *phi.argmax(0).tolist()})
    mean = (problem.rows.phi.mean(0) - problem.centre) / problem.scale
    ends = np.concatenate([low, -high])
    signs = np.concatenate([mean, -mean])
    v = np.zeros(k)
    for _ in range(100):
        x = (problem.rows.phi[chosen] - problem.centre) / problem.scale
        last = np.full((len(chosen), 1), -1.0)
        a = np.vstack(
            [
                np.hstack([x, -x, last]),  # v·x <= z
                np.concatenate([np.ones(2 * k), [0.0]]),  # |v|₁ <= 1
                *([np.concatenate([-ends, [1.0]])] if edge else []),  # z <= support(v)
            ]
        )
        b = np.zeros(len(a))
        b[len(chosen)] = 1.0
        cost = np.concatenate([signs - ends, [0.0]]) if edge else np.concatenate([-ends, [1.0]])
        solved = linprog(
            cost,
            A_ub=a,
            b_ub=b,
            bounds=bounds,
            method="highs-ds",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if solved.x is None:
            return v
        v = solved.x[:k] - solved.x[k : 2 * k]
        projections = problem.project(v)
        limit = problem.support(v) if edge else solved.x[-1]
        beyond = np.flatnonzero(projections > limit + 1e-10)
        worst = beyond[np.argsort(-projections[beyond])[: 2 * k + 10]]
        new = set(worst.tolist()) - set(chosen)
        if not new:
            break
        chosen.extend(new)
    return v
