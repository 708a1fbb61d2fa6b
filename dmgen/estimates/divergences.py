"""Distances between the target p = P/Z and a policy: estimators with errors.

`kl`, `tv` and `js` need only the columns that a training step has: `log_score = log P`
(unnormalised), `log_policy = log π` and `log_proposal = log q` of samples drawn from q. For pooled
samples of several models `log_proposal` is `weights.log_mixture(...)`. Z is estimated from the
same weights unless `log_z` is given, and the error accounts for that.

`estimate_kl`, `estimate_tv` and `estimate_js` are the same for the `Weights` of two distributions
on the same samples: their results combine with other estimates from these samples. All three are
means of a function h(g, u) of the densities `g = p/q` and `u = r/q`.

The plain averages for TV and JS have terms that grow like π/q, and no usable error. Replacing
f(t) by f(t) - f'(∞)(t - 1) leaves the divergence as it is, because E_p[t] = 1, and removes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates.checks import check_drawn, check_like, check_log_weights
from dmgen.estimates.estimate import Estimate
from dmgen.estimates.score import Score
from dmgen.estimates.weights import Weights


def kl(
    log_score: Tensor,
    log_policy: Tensor,
    log_proposal: Tensor,
    log_z: float | None = None,
    *,
    strata: Tensor | None = None,
) -> Score:
    """Return KL(p‖π) in nats, `Σ ω (log P - log π) - log Z` with `ω = w / Σ w`, `w = P/q`.

    Samples with P = 0 count 0. It is `inf` (error NaN) if a sample has P > 0 and π = 0, and NaN
    if all weights are 0. The error is first order and not reliable below an ESS of about 200, for
    either P/q or π/q; parts of p that q never visits show neither in value nor in error. Very
    close to π = p, where the linear terms vanish, it is of the same order as the bias.

    Args:
        log_score: (N,), log P of samples from q, unnormalised, nats; `-inf` is legal.
        log_policy: (N,), log π, normalised, nats; `-inf` is legal.
        log_proposal: (N,), log q, or the log mixture density of pooled samples; finite.
        log_z: log Z if it is known, taken as exact; None estimates it from the same weights.
        strata: (N,), optional, the proposal each sample came from (see `weights`).

    Raises:
        ValueError: NaN, `+inf`, a log_proposal of `-inf`, or lengths that differ.
    """
    return estimate_kl(*_weights(log_score, log_policy, log_proposal, log_z, strata)).score()


def tv(
    log_score: Tensor,
    log_policy: Tensor,
    log_proposal: Tensor,
    log_z: float | None = None,
    *,
    strata: Tensor | None = None,
) -> Score:
    """Return the total variation distance of p and π, `E_q[(P/(Zq) - π/q)₊]`, between 0 and 1.

    This is `½ E_q|P/(Zq) - π/q|` with a term bounded by P/(Zq) instead of π/q. NaN if all weights
    are 0. The error is not reliable below an ESS of about 200 of P/q or of π/q, nor where π is
    close to p: there the positive part has its kink, and the estimate is biased upwards and not
    normally distributed.

    Args and errors are those of `kl`.
    """
    return estimate_tv(*_weights(log_score, log_policy, log_proposal, log_z, strata)).score()


def js(
    log_score: Tensor,
    log_policy: Tensor,
    log_proposal: Tensor,
    log_z: float | None = None,
    *,
    strata: Tensor | None = None,
) -> Score:
    """Return the Jensen-Shannon divergence of p and π in nats, between 0 and log 2.

    `½ KL(p‖m) + ½ KL(π‖m)`, `m = (p + π)/2`, less `½ log 2 · E_q[π/q - P/(Zq)] = 0`. With
    `g = P/(Zq)` and `u = π/q` a term is `½ g (2 log 2 - log(1 + u/g)) - ½ u log(1 + g/u)`, which
    grows with log u and not with u.
    A small true value can come out slightly below 0. NaN if all weights are 0. The error is not
    reliable below an ESS of about 200 of P/q or of π/q, nor at π = p, where the divergence has a
    minimum and its linear terms vanish.

    Args and errors are those of `kl`.
    """
    return estimate_js(*_weights(log_score, log_policy, log_proposal, log_z, strata)).score()


def reverse_kl(log_policy: Tensor, log_other: Tensor) -> Score:
    """Return KL(π‖other) in nats from samples of π: the mean of `log π - log other`.

    With `log_other = log P - log Z` it is KL(π‖p). It is `inf` (error NaN) if a sample has
    other = 0. The error is not reliable if a few samples dominate the mean, which happens where
    π is far out in the tail of the other.

    Args:
        log_policy: (N,), log π of samples drawn from π, nats, finite.
        log_other: (N,), log of the normalised other distribution, nats; `-inf` is legal.

    Raises:
        ValueError: NaN, `+inf`, a log_policy of `-inf`, or lengths that differ.
    """
    policy = check_drawn(log_policy, "log_policy")
    return Estimate.mean(policy - check_like(log_other, "log_other", policy)).score()


def log_z_bounds(proposal_weights: Tensor, target_weights: Tensor) -> tuple[Score, Score]:
    """Return bounds of log Z that close from both sides: `E_q[log P/q] <= log Z <= E_p[log P/q]`.

    They hold in expectation, each up to its own error. Their gap is KL(q‖p) + KL(p‖q), so a
    proposal that misses a part of p shows, which it does not in `weights.log_z`.

    Args:
        proposal_weights: (N,), log P - log q of samples from q, nats; one `-inf` makes the lower
            bound `-inf` (error NaN).
        target_weights: (M,), log P - log q of exact samples from p, nats, finite.

    Returns:
        (lower, upper), nats.

    Raises:
        ValueError: NaN, `+inf`, or a target weight of `-inf`: such a text cannot come from p.

    Source: Grosse, Ghahramani and Adams (2015), "Sandwiching the marginal likelihood using
    bidirectional Monte Carlo" (1511.02543).
    """
    lower = check_log_weights(proposal_weights, "proposal_weights")
    upper = check_drawn(target_weights, "target_weights")
    return Estimate.mean(lower).score(), Estimate.mean(upper).score()


def estimate_kl(p: Weights, r: Weights) -> Estimate:
    """Return KL(p‖r) in nats as an estimate, `h = g log(g/u)`.

    Args:
        p: the weights of p on N samples of a common proposal q.
        r: the weights of r on the same samples.

    Returns:
        `inf` (error NaN) if a sample has p > 0 and r = 0, NaN if all weights of either are 0.
    """
    log_g, log_u = p.log_density, r.log_density
    # Not g itself: it may have underflowed.
    if ((log_g > -math.inf) & torch.isneginf(log_u)).any():
        return Estimate(math.inf, torch.full_like(log_g, math.nan), p.strata)
    g = torch.exp(log_g)
    terms = torch.where(torch.isneginf(log_g), 0.0, g * (log_g - log_u))
    return _estimate(p, r, terms, terms + g)


def estimate_tv(p: Weights, r: Weights) -> Estimate:
    """Return the total variation distance of p and r as an estimate, `h = (g - u)₊`, see `tv`."""
    g = torch.exp(p.log_density)
    # Where u > g the term is 0, so u may overflow without harm.
    terms = (g - torch.exp(r.log_density)).clamp(min=0.0)
    return _estimate(p, r, terms, torch.where(terms > 0, g, 0.0))


def estimate_js(p: Weights, r: Weights) -> Estimate:
    """Return the Jensen-Shannon divergence of p and r in nats as an estimate; h as in `js`."""
    log_g, log_u = p.log_density, r.log_density
    g, u = torch.exp(log_g), torch.exp(log_u)
    positive = ~torch.isneginf(log_g)
    d = torch.where(positive, log_u - log_g, 0.0)
    zero = torch.zeros_like(d)
    slope = torch.where(positive, 0.5 * g * (2 * math.log(2) - torch.logaddexp(zero, d)), 0.0)
    # u log(1 + g/u) -> g as u/g grows; the product itself could be inf * 0.
    second = torch.where(d > 40, g, u * torch.logaddexp(zero, -d))
    second = torch.where(positive & ~torch.isneginf(log_u), second, 0.0)
    return _estimate(p, r, slope - 0.5 * second, slope)


def _estimate(p: Weights, r: Weights, terms: Tensor, slope: Tensor) -> Estimate:
    """Return the mean of terms h(g, u), with the errors of both normalising constants.

    A log Z that is too large by ε divides all its densities by 1 + ε. So the mean changes by
    `-E[g ∂h/∂g]` a unit of log Z of p. All h here are homogeneous of degree 1, hence
    `u ∂h/∂u = h - g ∂h/∂g` (Euler).

    Args:
        p: the weights of p, in the numerator of g.
        r: the weights of r, in the numerator of u.
        terms: (N,), h.
        slope: (N,), g ∂h/∂g.
    """
    of_p, of_r = float(slope.mean()), float((terms - slope).mean())
    mean = Estimate.mean(terms, p.strata)
    return mean - of_p * p.log_z.error() - of_r * r.log_z.error()


def _weights(
    log_score: Tensor,
    log_policy: Tensor,
    log_proposal: Tensor,
    log_z: float | None,
    strata: Tensor | None,
) -> tuple[Weights, Weights]:
    """Return the weights of the target and of the policy."""
    proposal = check_drawn(log_proposal, "log_proposal")
    log_w = check_like(log_score, "log_score", proposal) - proposal
    log_u = check_like(log_policy, "log_policy", proposal) - proposal
    if log_z is not None:
        if not math.isfinite(log_z):
            raise ValueError(f"log_z must be finite (or None to estimate it), got {log_z}")
        if torch.isneginf(log_w).all():
            # No sample of p: the result is NaN, where a mean of zeros would give D = 0.
            log_z = math.nan
    return Weights(log_w, strata, log_z), Weights(log_u, strata, known_log_z=0.0)
