"""The proof that moments are unreachable: a direction with the targets beyond all samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from dmgen.target.dual import ROUNDING, Array, Problem


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
        if margin > ROUNDING or (edge and margin > -1e-11 and spread > ROUNDING):
            return _certificate(problem, v, projections, margin)
    return None


def _certificate(problem: Problem, v: Array, projections: Array, margin: float) -> Certificate:
    """Return the certificate of direction v (in half-ranges) in units of the features."""
    largest = projections.max()
    direction = v / problem.scale
    unit = np.abs(direction).max()
    largest_seen = float((largest + direction @ problem.centre) / unit)
    n_at_largest = int(problem.rows.counts[projections >= largest - ROUNDING].sum())
    on_edge = margin <= ROUNDING
    least = largest_seen + (0.0 if on_edge else float(margin / unit))
    return Certificate(direction / unit, largest_seen, least, n_at_largest, on_edge)


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
