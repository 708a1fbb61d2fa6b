"""What accepting makes of a proposal, from log-weights alone: its rate, and how far p then is.

A text x ~ q that is accepted with probability r(x) follows `q_r ∝ q·r`. Quasi-rejection takes
`r = min(1, P/(βq))`, for which q_r is called p_β: β above every P/q gives p itself, β near 0 gives
q where P > 0. Everything below is a mean over q of functions of `w = P/q` and r; with `g = w/Z`
and `h = r/AR` both divided by their means, p = g·q and q_r = h·q.

Each function takes `probs (N,)`, the probability of each entry under q where all texts are listed:
the result is then exact. Without it the entries are independent samples of q, and the error
(delta method) accounts for Z and AR being estimated from the same samples. It is not to be believed
below an ESS of about 100 of the weights, and a part of p that q never visits does not show.

Source: Eikema, Kruszewski, Dance, Elsahar and Dymetman (2022), "An approximate sampler for
energy-based models with divergence diagnostics" (TMLR; first version 2112.05702).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates.score import Score
from dmgen.estimates.weights import check_log_weights, stderr_of_mean

__all__ = [
    "acceptance_rate",
    "beta_normalised",
    "kl",
    "log_acceptance",
    "log_beta_for",
    "tv",
    "tv_bound",
]

# Nats by which log w may be above log β without being so: a sum and a difference of logs are
# rounded, and β may be the largest weight itself.
_ROUNDING = 1e-9


def log_acceptance(log_w: Tensor, log_beta: float) -> Tensor:
    """Return `log r = min(0, log w − log β)`, float64 `(N,)`; `-inf` where P = 0.

    Args:
        log_w: (N,), log P − log q, nats; `-inf` is legal.
        log_beta: log β, nats, in the unit of the unnormalised P.

    Raises:
        ValueError: NaN or `+inf` in log_w; a log_beta that is not finite.
    """
    if not math.isfinite(log_beta):
        raise ValueError(f"log_beta must be finite, got {log_beta}")
    return (check_log_weights(log_w, "log_w") - log_beta).clamp(max=0.0)


def acceptance_rate(log_accept: Tensor, probs: Tensor | None = None) -> Score:
    """Return `AR = E_q[r]`, the share of texts that is accepted.

    Args:
        log_accept: (N,), log r <= 0; `-inf` is legal.
        probs: see the head of this file.

    Raises:
        ValueError: NaN, a log r above 0, or probs that do not fit.
    """
    r = torch.exp(_checked_accept(log_accept))
    return _score(_mean(r, probs), r, probs)


def tv(log_w: Tensor, log_accept: Tensor, probs: Tensor | None = None) -> Score:
    """Return the total variation distance of p and q_r, `E_q[(g − h)₊]`, between 0 and 1.

    This is `½ E_q|g − h|`. NaN if every weight or every r is 0. Like every estimate of a TV it is
    biased upwards, by less than its error unless p and q_r nearly agree.

    Args:
        log_w: (N,), log P − log q, nats; `-inf` is legal.
        log_accept: (N,), log r <= 0; `-inf` is legal.
        probs: see the head of this file.

    Raises:
        ValueError: NaN, `+inf`, a log r above 0, or lengths that differ.
    """
    g, h = _densities(log_w, log_accept, probs)
    terms = (g - h).clamp(min=0.0)
    above = terms > 0
    slope_g, slope_h = (_mean(torch.where(above, x, 0.0), probs) for x in (g, h))
    return _score(_mean(terms, probs), terms - slope_g * (g - 1) + slope_h * (h - 1), probs)


def tv_bound(log_w: Tensor, log_beta: float, probs: Tensor | None = None) -> Score:
    """Return the bound `1 − p(A_β) = E_q[g·1(w > β)]`, `A_β = {w <= β}`: TV(p, p_β) is not above.

    The p-mass of the texts that β is too small for. NaN if every weight is 0.

    Args:
        log_w: (N,), log P − log q, nats; `-inf` is legal.
        log_beta: log β, nats.
        probs: see the head of this file.

    Raises:
        ValueError: NaN or `+inf`, or probs that do not fit.
    """
    lw = check_log_weights(log_w, "log_w")
    g = _normalised(lw, probs)
    outside = (lw > log_beta + _ROUNDING).double()
    value = _mean(g * outside, probs)
    return _score(value, g * (outside - value), probs)


def kl(log_w: Tensor, log_accept: Tensor, probs: Tensor | None = None) -> Score:
    """Return KL(p‖q_r) in nats, `E_q[g·(log w − log r)] − log Z + log AR`.

    For p_β, `log w − log r = max(log w, log β)`. `inf` (error NaN) if a text with P > 0 is never
    accepted, NaN if every weight or every r is 0.

    Args, Raises: as `tv`.
    """
    g, h = _densities(log_w, log_accept, probs)
    lw, la = check_log_weights(log_w), check_log_weights(log_accept)
    seen = lw > -math.inf
    if bool((seen & (la == -math.inf)).any()) and bool((la > -math.inf).any()):
        return Score(math.inf, math.nan, 0 if probs is not None else len(lw))
    excess = torch.where(seen, lw - la, 0.0)  # (N,)
    mean = _mean(g * excess, probs)
    value = mean - _log_mean(lw, probs) + _log_mean(la, probs)
    return _score(value, g * (excess - mean) - (g - 1) + (h - 1), probs)


def beta_normalised(log_w: Tensor, log_beta: float, probs: Tensor | None = None) -> Score:
    """Return β/Z, which compares across targets: β is measured in the unit of P, this is not.

    `AR = E_q[min(g, β/Z)]/(β/Z)`, so 1/(β/Z) is the rate once β is above every P/q.

    Args, Raises: as `tv_bound`.
    """
    lw = check_log_weights(log_w, "log_w")
    value = math.nan if bool((lw == -math.inf).all()) else log_beta - _log_mean(lw, probs)
    beta = float(torch.tensor(value, dtype=torch.float64).exp())  # inf beyond the range of floats
    return _score(beta, -beta * (_normalised(lw, probs) - 1), probs)


def log_beta_for(log_w: Tensor, rate: float) -> float:
    """Return the log of the largest β that these samples say accepts a share `rate`, nats.

    `AR(β) = (#{w >= β} + Σ_{w<β} w/β)/N` falls with β without a jump, from the share of positive
    weights at the smallest of them: between two neighbouring weights the equation is solved.

    Args:
        log_w: (N,), log P − log q of samples of q, nats; `-inf` is legal.
        rate: in (0, 1].

    Raises:
        ValueError: NaN or `+inf`, a rate out of range, or above the share of positive weights.

    Differs from the paper's code: it takes the largest weight as β that accepts at least `rate`.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"an acceptance rate must lie in (0, 1], got {rate}")
    lw = check_log_weights(log_w, "log_w")
    n = len(lw)
    ordered = torch.sort(lw[lw > -math.inf]).values
    if len(ordered) / n < rate:
        raise ValueError(
            f"{len(ordered):,} of {n:,} texts of the proposal have P > 0, so no beta accepts a "
            f"share of {rate:g}: ask for at most {len(ordered) / n:g}, or draw from a policy "
            "trained on this target (proposal=)"
        )
    log_sums = torch.logcumsumexp(ordered, 0)
    above = torch.arange(len(ordered) - 1, -1, -1, dtype=torch.float64)  # texts beyond each one
    rates = (above + torch.exp(log_sums - ordered)) / n
    last = int((rates >= rate).sum()) - 1  # the first one's rate is the share of positive weights
    if last == len(ordered) - 1:
        return float(log_sums[last]) - math.log(rate * n)
    room = rate * n - float(above[last])
    # Less than this is the rounding of rate * n: up to the next weight the rate is flat then.
    log_beta = float(log_sums[last]) - math.log(room) if room > 1e-12 * n else math.inf
    return min(log_beta, float(ordered[last + 1]))


def _checked_accept(log_accept: Tensor) -> Tensor:
    la = check_log_weights(log_accept, "log_accept")
    if bool((la > 0).any()):
        raise ValueError(f"log_accept must be at most 0, got {float(la.max()):g}: r is a chance")
    return la


def _densities(log_w: Tensor, log_accept: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor]:
    """g = w/Z and h = r/AR, both `(N,)`; NaN throughout if all are 0."""
    lw, la = check_log_weights(log_w, "log_w"), _checked_accept(log_accept)
    if len(lw) != len(la):
        raise ValueError(f"log_w has {len(lw)} samples, log_accept {len(la)}")
    return _normalised(lw, probs), _normalised(la, probs)


def _normalised(log_x: Tensor, probs: Tensor | None) -> Tensor:
    return torch.exp(log_x - _log_mean(log_x, probs))


def _log_mean(log_x: Tensor, probs: Tensor | None) -> float:
    if probs is None:
        return float(torch.logsumexp(log_x, 0)) - math.log(len(log_x))
    return float(torch.logsumexp(log_x + torch.log(_checked_probs(probs, log_x)), 0))


def _mean(x: Tensor, probs: Tensor | None) -> float:
    return float(x.mean() if probs is None else (_checked_probs(probs, x) * x).sum())


def _checked_probs(probs: Tensor, x: Tensor) -> Tensor:
    p = torch.as_tensor(probs, dtype=torch.float64)
    # Far above the rounding of a float32 model, far below any mass that would matter.
    if p.shape != x.shape or bool((p < 0).any()) or not abs(float(p.sum()) - 1) < 1e-3:
        raise ValueError(
            f"probs must be {len(x)} numbers >= 0 with sum 1, one a text; got shape "
            f"{tuple(p.shape)} and sum {float(p.sum()):g}"
        )
    return p


def _score(value: float, influences: Tensor, probs: Tensor | None) -> Score:
    """A value whose error is that of the mean of its influences; none if it is exact."""
    if probs is not None:
        return Score(value, 0.0, 0)
    return Score(value, stderr_of_mean(influences), len(influences))
