"""Distances between the target p = P/Z and a policy: estimators with errors, and the f-family.

The estimators need only what a training step has at hand: `log_score = log P` (unnormalised),
`log_policy = log π` and `log_proposal = log q` of samples drawn from q. Pooled samples of several
models go in with `log_proposal = log_weights.log_mixture(...)`. Z is estimated from the same
weights unless `log_z` is given, and the error accounts for that.

The plain averages for TV and JS have terms that grow like π/q, and no usable error. Replacing
f(t) by f(t) - f'(∞)(t - 1) leaves the divergence as it is, because E_p[t] = 1, and removes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates.score import Score
from dmgen.estimates.weights import check_log_weights, stderr_of_mean
from dmgen.estimates.weights import log_z as estimate_log_z


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
    if all weights are 0. The error is first order and not to be believed below an ESS of about
    200, for either P/q or π/q; parts of p that q never visits show neither in value nor in error.
    Very close to π = p, where the linear terms vanish, it is of the same order as the bias.

    Args:
        log_score: (N,), log P of samples from q, unnormalised, nats; `-inf` is legal.
        log_policy: (N,), log π, normalised, nats; `-inf` is legal.
        log_proposal: (N,), log q, or the log mixture density of pooled samples; finite.
        log_z: log Z if it is known, taken as exact; None estimates it from the same weights.
        strata: (N,), optional, the proposal each sample came from (see `log_weights`).

    Raises:
        ValueError: NaN, `+inf`, a log_proposal of `-inf`, or lengths that differ.
    """
    log_g, log_u = _log_ratios(log_score, log_policy, log_proposal, log_z)
    g = torch.exp(log_g)
    seen = ~torch.isneginf(log_g)
    terms = torch.where(seen, g * (log_g - log_u), 0.0)
    # Not the terms: g may have underflowed.
    if ((log_g > -math.inf) & torch.isneginf(log_u)).any():
        return Score(math.inf, math.nan, len(terms))
    return _score(terms, terms + g, g, log_z, strata)


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
    are 0. The error is not to be believed below an ESS of about 200 of P/q or of π/q, nor where π
    is close to p: there the positive part has its kink, the estimate is biased upwards and its law
    is not normal.

    Args, Raises: as `kl`.
    """
    log_g, log_u = _log_ratios(log_score, log_policy, log_proposal, log_z)
    g = torch.exp(log_g)
    # Where u > g the term is 0, so u may overflow without harm.
    terms = (g - torch.exp(log_u)).clamp(min=0.0)
    return _score(terms, torch.where(terms > 0, g, 0.0), g, log_z, strata)


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
    to be believed below an ESS of about 200 of P/q or of π/q, nor at π = p, where the divergence
    has a minimum and its linear terms vanish.

    Args, Raises: as `kl`.
    """
    log_g, log_u = _log_ratios(log_score, log_policy, log_proposal, log_z)
    g, u = torch.exp(log_g), torch.exp(log_u)
    seen = ~torch.isneginf(log_g)
    d = torch.where(seen, log_u - log_g, 0.0)
    zero = torch.zeros_like(d)
    slope = torch.where(seen, 0.5 * g * (2 * math.log(2) - torch.logaddexp(zero, d)), 0.0)
    # u log(1 + g/u) -> g as u/g grows; the product itself could be inf * 0.
    second = torch.where(d > 40, g, u * torch.logaddexp(zero, -d))
    second = torch.where(seen & ~torch.isneginf(log_u), second, 0.0)
    return _score(slope - 0.5 * second, slope, g, log_z, strata)


def reverse_kl(log_policy: Tensor, log_other: Tensor) -> Score:
    """Return KL(π‖other) in nats from samples of π: the mean of `log π - log other`.

    With `log_other = log P - log Z` it is KL(π‖p). It is `inf` (error NaN) if a sample has
    other = 0. The error is the plain one; it is not to be believed if a few samples carry the
    mean, which happens where π is far out in the tail of the other.

    Args:
        log_policy: (N,), log π of samples drawn from π, nats, finite.
        log_other: (N,), log of the normalised other distribution, nats; `-inf` is legal.

    Raises:
        ValueError: NaN, `+inf`, a log_policy of `-inf`, or lengths that differ.
    """
    policy = _drawn(log_policy, "log_policy")
    other = _like(log_other, "log_other", policy)
    terms = policy - other
    if torch.isposinf(terms).any():
        return Score(math.inf, math.nan, len(terms))
    return Score(float(terms.mean()), stderr_of_mean(terms), len(terms))


def log_z_bounds(proposal_weights: Tensor, target_weights: Tensor) -> tuple[Score, Score]:
    """Return bounds of log Z that close from both sides: `E_q[log P/q] <= log Z <= E_p[log P/q]`.

    They hold in expectation, each up to its own error. Their gap is KL(q‖p) + KL(p‖q), so a
    proposal that misses a part of p cannot hide, as it does from `log_weights.log_z`.

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
    upper = _drawn(target_weights, "target_weights")
    if torch.isneginf(lower).any():
        low = Score(-math.inf, math.nan, len(lower))
    else:
        low = Score(float(lower.mean()), stderr_of_mean(lower), len(lower))
    return low, Score(float(upper.mean()), stderr_of_mean(upper), len(upper))


def _drawn(log_prob: Tensor, name: str) -> Tensor:
    """Return log-probabilities of samples under the very law they were drawn from: all finite."""
    checked = check_log_weights(log_prob, name)
    impossible = torch.isneginf(checked)
    if impossible.any():
        raise ValueError(
            f"{name}[{int(impossible.nonzero()[0])}] is -inf: a sample cannot have probability 0"
            " under the distribution it was drawn from"
        )
    return checked


def _like(values: Tensor, name: str, reference: Tensor) -> Tensor:
    checked = check_log_weights(values, name)
    if len(checked) != len(reference):
        raise ValueError(f"{name} has {len(checked)} samples, the others {len(reference)}")
    return checked


def _log_ratios(
    log_score: Tensor, log_policy: Tensor, log_proposal: Tensor, log_z: float | None
) -> tuple[Tensor, Tensor]:
    """Return `log P/(Zq)` and `log π/q`, both (N,)."""
    proposal = _drawn(log_proposal, "log_proposal")
    log_w = _like(log_score, "log_score", proposal) - proposal
    log_u = _like(log_policy, "log_policy", proposal) - proposal
    if log_z is None:
        log_z = estimate_log_z(log_w)[0]
    elif not math.isfinite(log_z):
        raise ValueError(f"log_z must be finite (or None to estimate it), got {log_z}")
    log_g = log_w - log_z
    if torch.isneginf(log_w).all():
        # Nothing of p was seen. NaN travels to the result, where a mean of zeros would read D = 0.
        log_g = torch.full_like(log_w, math.nan)
    return log_g, log_u


def _score(
    terms: Tensor, slope: Tensor, g: Tensor, log_z: float | None, strata: Tensor | None
) -> Score:
    """Return the mean of terms h(g, u) with its error, `slope = g ∂h/∂g`.

    If Z was estimated, an excess of mean w over Z by a factor 1 + ε scaled every g by 1 - ε and so
    moved the result by -ε · mean(slope): the influence of a sample is `h - mean(slope) · (g - 1)`.
    """
    residuals = terms if log_z is not None else terms - slope.mean() * (g - 1)
    return Score(float(terms.mean()), stderr_of_mean(residuals, strata), len(terms))
