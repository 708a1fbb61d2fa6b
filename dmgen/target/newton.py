"""Newton's method for the dual of moment matching."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dmgen.target.dual import ROUNDING, Array, Mask, Point, Problem
from dmgen.target.reachability import Certificate, separating_direction

# A fit that needs more steps than this has a target far away, or no minimum; the linear programme
# that decides which costs about as much as a few steps.
_STEPS_BEFORE_PROOF = 15


@dataclass(frozen=True, eq=False)
class _Active:
    """The features that lambda acts on at a point, with the edge each one is held to."""

    free: Mask  # (K,)
    edge: Array  # (K,) target in force; 0 where not free
    side: Array  # (K,) the sign lambda must keep; 0 for any
    gradient: Array  # (F,) mean - edge of the free features
    spanned: Array  # (F, R) directions in which they vary
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
        spanned, blind = problem.basis(free)
        return cls(free, edge, side, (mean - edge)[free], spanned, blind)

    @property
    def conflict(self) -> bool:
        """Whether the targets differ in a direction in which the samples do not vary."""
        return bool(np.abs(self.blind.T @ self.gradient).max(initial=0.0) > ROUNDING)

    def settled(self, point: Point, tol: float) -> bool:
        """Return whether the moments match in all spanned directions, and can match exactly.

        The second condition keeps targets on the edge of the hull from counting as reached once
        lambda is large. If p has standard deviation s along v and its support has diameter R, the
        hull goes at least s²/R beyond the mean along v (Bhatia and Davis), so a mismatch below that
        in every direction leaves the target strictly inside.
        """
        if not self.free.any():
            return True
        cov = point.cov[np.ix_(self.free, self.free)]
        gradient = self.spanned @ (self.spanned.T @ self.gradient)
        if (np.abs(gradient) > tol * np.sqrt(np.diag(cov))).any():
            return False
        values, vectors = np.linalg.eigh(self.spanned.T @ cov @ self.spanned)
        if values.min(initial=math.inf) <= 0:
            return False
        mismatch = np.linalg.norm((vectors.T @ (self.spanned.T @ gradient)) / np.sqrt(values))
        diameter = 2 * math.sqrt(len(gradient))
        return bool(2 * diameter * mismatch <= math.sqrt(values.min(initial=math.inf)))

    def move(self, point: Point, damping: float) -> Array:
        """Return theta after a Newton step regularised by `damping · |gradient|`, (K,)."""
        cov = point.cov[np.ix_(self.free, self.free)]
        ridge = damping * float(np.linalg.norm(self.gradient))
        hessian = self.spanned.T @ cov @ self.spanned + ridge * np.eye(self.spanned.shape[1])
        step = -self.spanned @ np.linalg.solve(hessian, self.spanned.T @ self.gradient)
        if self.conflict and self.side.any():
            # Along a blind direction D falls without bound, until an interval is inactive at 0.
            step -= self.blind @ (self.blind.T @ self.gradient) / ridge
        theta = point.theta.copy()
        theta[self.free] += step
        return np.where(self.side * theta < 0, 0.0, theta)


def minimise(
    problem: Problem, tol: float, max_steps: int
) -> tuple[Point, int, bool, Certificate | None]:
    """Return the last point, the evaluations of D, whether it is the minimum, or why there is none.

    Newton's method with the ridge `c |gradient|` (Mishchenko 2023, 2112.02089), c adapted: steps
    are short far from the minimum and become pure Newton steps near it. A step is kept if D falls
    by at least a tenth of the fall in the quadratic model; where that is below the rounding of D,
    if the gradient falls.
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
