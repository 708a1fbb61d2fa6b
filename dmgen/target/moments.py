"""lambda from moments: the convex dual by Newton, with errors, or a proof that there is none.

`p(x) ∝ a(x) exp(lambda·phi(x))` is the distribution closest to `a` (in KL(·‖a)) whose moments are
the targets. lambda minimises the dual `D = log E_a[exp(lambda·phi)] - lambda·target`, whose
gradient is `moments - target` and whose Hessian is the covariance of phi under p. D has a minimum
if and only if the target lies inside the convex hull of the sampled feature vectors; otherwise a
direction separates the two, and `MomentsUnreachable` names it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmgen.target.dual import Point, Problem, Rows, scatter, varying
from dmgen.target.moment_fit import MomentFit, as_array, checked_columns, target_text
from dmgen.target.newton import minimise
from dmgen.target.reachability import Certificate

__all__ = ["Certificate", "MomentFit", "MomentsUnreachable", "fit_lambdas"]

Array = NDArray[np.float64]

# Features listed in a message.
_MOST_NAMED = 6


class MomentsUnreachable(ValueError):  # noqa: N818 - named like KeyError
    """The error that no lambda gives the targets on these samples; it says why and what to do.

    Attributes:
        fit: the best attempt, or None if the fit was not begun.
        certificate: the direction that separates targets and samples, or None if none was found.
    """

    def __init__(
        self, message: str, fit: MomentFit | None = None, certificate: Certificate | None = None
    ) -> None:
        super().__init__(message)
        self.fit = fit
        self.certificate = certificate


def fit_lambdas(
    features: Any,
    moments: Any,
    log_weights: Any = None,
    *,
    tol: float = 1e-8,
    max_steps: int = 100,
    names: Sequence[str] | None = None,
) -> MomentFit:
    """Return the lambda for which the reweighted samples have these moments, with its errors.

    Minimises `log Σ ω exp(lambda·phi) - lambda·target`, ω the normalised weights, by a regularised
    Newton method with the exact Hessian. An interval [low, high] leaves lambda = 0 where the
    moment lies inside it; otherwise lambda > 0 ends at low, lambda < 0 at high (the KKT conditions
    of min KL(p‖a)). A small ESS is reported, not an error.

    Args:
        features: (N, K) numbers, numpy or torch, finite. Equal rows of binary ones are merged.
        moments: (K,) targets, or (K, 2) intervals [low, high]; an end may be infinite.
        log_weights: (N,), log a - log q of each sample, nats; `-inf` for samples that violate a
            pointwise constraint. None if the samples were drawn from the base.
        tol: largest allowed distance between moment and target, in standard deviations of the
            feature under p.
        max_steps: most evaluations of the dual.
        names: (K,), for messages and the table.

    Returns:
        `MomentFit`. Its errors take the samples as independent draws; for samples pooled from
        several proposals with fixed counts they are conservative.

    Raises:
        MomentsUnreachable: no sample has weight; a target lies outside the range of its feature in
            the samples, on the edge of it, or in conflict with another; no convergence in
            max_steps.
        ValueError: shapes that do not fit, NaN, infinite features, an interval with low > high.

    Source:
        Csiszár (1975), "I-divergence geometry", for the dual; Mishchenko (2023), "Regularized
        Newton method with global O(1/k²) convergence" (2112.02089), for a damping that falls with
        the norm of the gradient; White (1982) for the sandwich errors.
    """
    phi, lw = checked_columns(features, log_weights)
    n, k = phi.shape
    targets = as_array(moments).copy()
    if targets.shape not in ((k,), (k, 2)) or np.isnan(targets).any():
        raise ValueError(
            f"moments must be ({k},) or ({k}, 2) numbers for {k} features, got {moments!r}"
        )
    low, high = (targets, targets) if targets.ndim == 1 else (targets[:, 0], targets[:, 1])
    if (low > high).any() or np.isposinf(low).any() or np.isneginf(high).any():
        raise ValueError(f"each interval must be [low, high] with low <= high, got {moments!r}")
    labels = tuple(names) if names is not None else tuple(f"feature {j}" for j in range(k))
    if len(labels) != k:
        raise ValueError(f"names must have {k} entries, got {len(labels)}")
    if not (tol > 0 and max_steps >= 1):
        raise ValueError(f"tol must be > 0 and max_steps >= 1, got {tol} and {max_steps}")

    rows = Rows.of(phi, lw)
    if rows.n == 0:
        raise MomentsUnreachable(
            f"none of the {n:,} samples has positive weight, so no moment can be fitted: every text"
            " violates a pointwise constraint. Draw more samples, or use a proposal that satisfies"
            " the pointwise constraints now and then."
        )
    _check_ranges(rows, low, high, labels)
    problem = Problem(rows, low, high)
    point, n_steps, converged, certificate = minimise(problem, tol, max_steps)
    fit = _moment_fit(problem, point, targets, labels, n, n_steps)
    if certificate is not None:
        raise MomentsUnreachable(_conflict_text(certificate, labels, rows.n), fit, certificate)
    if not converged:
        left = np.maximum(low - fit.moments, fit.moments - high).max()
        raise MomentsUnreachable(
            f"the targets of {_quoted(labels)} were not reached in {n_steps} steps: the largest"
            f" distance left is {left:.3g} (tol {tol:g}). They were not proven out of reach either:"
            " raise max_steps, or move the targets away from the edge of what was seen.",
            fit,
        )
    return fit


def _check_ranges(rows: Rows, low: Array, high: Array, names: Sequence[str]) -> None:
    """Raise MomentsUnreachable for a target that the values of its own feature rule out."""
    all_least, all_most = rows.phi.min(0), rows.phi.max(0)
    varies = varying(all_least, all_most)
    for j, (least, most) in enumerate(zip(all_least, all_most, strict=True)):
        slack = 0.0 if varies[j] else 1e-9 * max(1.0, abs(least))
        above = low[j] > most + slack or (low[j] == most and varies[j])
        below = high[j] < least - slack or (high[j] == least and varies[j])
        if not (above or below):
            continue
        sign, end = (1.0, most) if above else (-1.0, least)
        target = low[j] if above else high[j]
        n_at_end = int(rows.counts @ (rows.phi[:, j] == end))
        direction = np.zeros(len(names))
        direction[j] = sign
        proof = Certificate(
            direction, float(sign * end), float(sign * target), n_at_end, bool(target == end)
        )
        request = f"a moment of {target_text([low[j], high[j]])} is requested of {names[j]!r}"
        if varies[j]:
            sampled = (
                f"over {rows.n:,} samples it goes from {least:g} to {most:g}"
                f" ({n_at_end:,} of them at {end:g})"
            )
        elif least == 0:
            sampled = f"it was never seen: it is 0 in all {rows.n:,} samples"
        else:
            sampled = f"it is {least:g} in all {rows.n:,} samples"
        raise MomentsUnreachable(f"{request}, but {sampled}. {_remedy(proof)}", certificate=proof)


def _remedy(proof: Certificate) -> str:
    if proof.on_edge:
        return (
            "A target on the edge of what was seen needs an infinite lambda and would keep only"
            f" the {proof.n_at_largest:,} samples on that edge. Declare it Pointwise if that is"
            " meant; otherwise move it inside, or draw more samples if the edge is an accident of"
            " these."
        )
    return (
        "Draw more samples, use a proposal that draws the missing texts, or choose a target inside"
        " the range of the samples."
    )


def _conflict_text(proof: Certificate, names: Sequence[str], n: int) -> str:
    """Return the message for targets that can be reached one by one but not together."""
    order = np.argsort(-np.abs(proof.direction), kind="stable")
    involved = sorted(order[: np.count_nonzero(proof.direction)][:_MOST_NAMED].tolist())
    terms = [
        f"{'-' if proof.direction[j] < 0 else '+'} {_factor(proof.direction[j])}{names[j]!r}"
        for j in involved
    ]
    more = np.count_nonzero(proof.direction) - len(involved)
    if more:
        terms.append(f"+ ({more} smaller terms)")
    expression = " ".join(terms).removeprefix("+ ")
    most = "always" if proof.n_at_largest == n else "at most"
    reached = "" if proof.n_at_largest == n else f" ({proof.n_at_largest:,} reach it)"
    others = f" and {more} more" if more else ""
    requested = "exactly that" if proof.on_edge else f"{proof.asked:.6g}"
    return (
        f"the targets of {_quoted([names[j] for j in involved])}{others} cannot hold together:"
        f" {expression} is {most} {proof.largest_seen:.6g} in {n:,} samples{reached}, and"
        f" {requested} is requested. {_remedy(proof)}"
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _factor(c: float) -> str:
    return "" if round(abs(c), 6) == 1 else f"{abs(c):.4g}·"


def _moment_fit(
    problem: Problem, point: Point, targets: Array, names: tuple[str, ...], n: int, n_steps: int
) -> MomentFit:
    """Return the fit at a point with its errors.

    Every error is `√(Σ r²)` over the samples, r the influence of a sample. With a and p its
    probabilities under base and target, to first order: `p (phi - m)` for the moments,
    `-H⁻¹ p (phi - m)` for lambda (sandwich), `p - a + m · dlambda` for log Z, and `a - p` for
    KL(p‖a), where the influence of lambda cancels. A row of merged samples counts with its
    `concentration`.
    """
    rows = problem.rows
    log_total, base = rows.tilt(np.zeros(len(names)))
    p = point.p
    correction = rows.n / (rows.n - 1) if rows.n > 1 else math.nan
    lambdas = point.theta / problem.scale
    moments = problem.centre + point.mean * problem.scale
    base_moments = base @ rows.phi
    spread = scatter(rows.phi, moments, p * p * rows.concentration) * correction
    base_spread = scatter(rows.phi, base_moments, base * base * rows.concentration) * correction
    inverse = _inverse_hessian(problem, point)
    log_z_influence = p - base - p * ((rows.phi - moments) @ (inverse @ moments))
    log_z = point.log_z + float(lambdas @ problem.centre) - log_total

    def error(influence: Array) -> float:
        return math.sqrt(correction * float(rows.concentration @ (influence * influence)))

    return MomentFit(
        lambdas=lambdas,
        lambdas_stderr=np.sqrt(np.diag(inverse @ spread @ inverse).clip(min=0)),
        moments=moments,
        moments_stderr=np.sqrt(np.diag(spread)),
        log_z=log_z,
        log_z_stderr=error(log_z_influence),
        kl_target_base=problem.support(point.theta) - point.log_z + log_total,
        kl_target_base_stderr=error(p - base),
        ess=1 / float(rows.concentration @ (p * p)),
        n_steps=n_steps,
        targets=targets,
        base_moments=base_moments,
        base_moments_stderr=np.sqrt(np.diag(base_spread)),
        hits=(rows.counts @ (rows.phi != 0)).astype(np.int64),
        n_samples=n,
        rank=problem.rank,
        names=names,
    )


def _inverse_hessian(problem: Problem, point: Point) -> Array:
    """Return d(lambda)/d(moments), (K, K): pseudo-inverse covariance of the active features."""
    active = problem.varies & ((point.theta != 0) | (problem.low == problem.high))
    spanned = problem.basis(active)[0]
    inverse = np.zeros_like(point.cov)
    block = np.ix_(active, active)
    inverse[block] = spanned @ np.linalg.pinv(spanned.T @ point.cov[block] @ spanned) @ spanned.T
    return inverse / np.outer(problem.scale, problem.scale)
