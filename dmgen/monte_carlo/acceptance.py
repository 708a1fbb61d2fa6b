"""Acceptance with probability r(x): its rate, and the distance of the accepted texts from p.

A text x ~ q that is accepted with probability r(x) follows `q_r ∝ q·r`. Quasi-rejection takes
`r = min(1, P/(βq))`, for which q_r is called p_β: β above every P/q gives p itself, β near 0 gives
q where P > 0. So P/q and r are the weights of p and of q_r on texts of q, and the distances of the
two are those of `estimates.divergences`.

Each function takes `probs (N,)`, the probability of each entry under q where all texts are listed:
the result is then exact. Without it the entries are independent samples of q, and the error
(delta method) accounts for Z and AR being estimated from the same samples. It is not reliable below
an ESS of about 100 of the weights, and a part of p that q never visits does not show.

Source: Eikema, Kruszewski, Dance, Elsahar and Dymetman (2022), "An approximate sampler for
energy-based models with divergence diagnostics" (TMLR; first version 2112.05702).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates.checks import check_like, check_log_weights
from dmgen.estimates.divergences import estimate_kl, estimate_tv
from dmgen.estimates.estimate import Estimate
from dmgen.estimates.score import Score
from dmgen.estimates.weights import Weights

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
    """Return `AR = E_q[r]`, the fraction of texts that is accepted.

    Args:
        log_accept: (N,), log r <= 0; `-inf` is legal.
        probs: (N,), optional, probabilities under q; gives the exact result.

    Raises:
        ValueError: NaN, a log r above 0, or probs that do not fit.
    """
    r = _per_sample(_checked_accept(log_accept), probs)
    return _score(Estimate.mean(torch.exp(r)), probs)


def tv(log_w: Tensor, log_accept: Tensor, probs: Tensor | None = None) -> Score:
    """Return the total variation distance of p and q_r, between 0 and 1.

    NaN if every weight or every r is 0. Like every estimate of a TV it is biased upwards, by less
    than its error unless p and q_r nearly agree.

    Args:
        log_w: (N,), log P − log q, nats; `-inf` is legal.
        log_accept: (N,), log r <= 0; `-inf` is legal.
        probs: (N,), optional, probabilities under q; gives the exact result.

    Raises:
        ValueError: NaN, `+inf`, a log r above 0, or lengths that differ.
    """
    return _score(estimate_tv(*_weights(log_w, log_accept, probs)), probs)


def tv_bound(log_w: Tensor, log_beta: float, probs: Tensor | None = None) -> Score:
    """Return `p(w > β)`, an upper bound of TV(p, p_β).

    It is the probability under p of the texts that β is too small for. NaN if every weight is 0.

    Args:
        log_w: (N,), log P − log q, nats; `-inf` is legal.
        log_beta: log β, nats.
        probs: (N,), optional, probabilities under q; gives the exact result.

    Raises:
        ValueError: NaN or `+inf`, or probs that do not fit.
    """
    lw = check_log_weights(log_w, "log_w")
    above = (lw > log_beta + _ROUNDING).double()
    return _score(Weights(_per_sample(lw, probs)).mean(above), probs)


def kl(log_w: Tensor, log_accept: Tensor, probs: Tensor | None = None) -> Score:
    """Return KL(p‖q_r) in nats, `E_p[log w − log r] − log Z + log AR`.

    For p_β, `log w − log r = max(log w, log β)`. `inf` (error NaN) if a text with P > 0 is never
    accepted, NaN if every weight or every r is 0.

    Args and errors are those of `tv`.
    """
    return _score(estimate_kl(*_weights(log_w, log_accept, probs)), probs)


def beta_normalised(log_w: Tensor, log_beta: float, probs: Tensor | None = None) -> Score:
    """Return β/Z, which compares across targets: β is measured in the unit of P, this is not.

    With `g = P/(Zq)`, `AR = E_q[min(g, β/Z)]/(β/Z)`, so 1/(β/Z) is the rate once β is above every
    P/q. NaN if every weight is 0.

    Args and errors are those of `tv_bound`.
    """
    log_z = Weights(_per_sample(check_log_weights(log_w, "log_w"), probs)).log_z
    known = 1.0 if log_z.value > -math.inf else math.nan
    return _score(known * (log_beta - log_z).exp(), probs)


def log_beta_for(log_w: Tensor, rate: float) -> float:
    """Return the log of the largest β that accepts a fraction `rate` of these samples, nats.

    `AR(β) = (#{w >= β} + Σ_{w<β} w/β)/N` is continuous and falls with β, from the fraction of
    positive weights at the smallest of them. Between two neighbouring weights it is solved for β.

    Args:
        log_w: (N,), log P − log q of samples of q, nats; `-inf` is legal.
        rate: in (0, 1].

    Raises:
        ValueError: NaN or `+inf`, a rate out of range, or above the fraction of positive weights.

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
            f"fraction of {rate:g}: take at most {len(ordered) / n:g}, or draw from a policy "
            "trained on this target (proposal=)"
        )
    log_sums = torch.logcumsumexp(ordered, 0)
    above = torch.arange(len(ordered) - 1, -1, -1, dtype=torch.float64)  # texts above each one
    rates = (above + torch.exp(log_sums - ordered)) / n
    last = int((rates >= rate).sum()) - 1  # the first rate is the fraction of positive weights
    if last == len(ordered) - 1:
        return float(log_sums[last]) - math.log(rate * n)
    room = rate * n - float(above[last])
    # Less than this is the rounding of rate * n: up to the next weight the rate is flat then.
    log_beta = float(log_sums[last]) - math.log(room) if room > 1e-12 * n else math.inf
    return min(log_beta, float(ordered[last + 1]))


def log_beta_for_tv(log_w: Tensor, max_tv: float) -> float:
    """Return the log of the smallest β with TV(p, p_β) at most `max_tv` on these samples, nats.

    TV falls with β, to 0 at the largest weight; β is found by bisection to 1e-9 nats.

    Args:
        log_w: (N,), log P − log q of samples of q, nats; `-inf` is legal.
        max_tv: in (0, 1).

    Raises:
        ValueError: NaN or `+inf`, or no positive weight.
    """
    lw = check_log_weights(log_w, "log_w")
    finite = lw[lw > -math.inf]
    if not len(finite):
        raise ValueError(f"none of {len(lw):,} texts of the proposal has P > 0")
    low, high = float(finite.min()), float(finite.max())
    while high - low > 1e-9:
        middle = 0.5 * (low + high)
        if tv(lw, log_acceptance(lw, middle)).value > max_tv:
            low = middle
        else:
            high = middle
    return high


def _weights(log_w: Tensor, log_accept: Tensor, probs: Tensor | None) -> tuple[Weights, Weights]:
    """Return the weights of p and of q_r."""
    lw = check_log_weights(log_w, "log_w")
    la = check_like(_checked_accept(log_accept), "log_accept", lw)
    return Weights(_per_sample(lw, probs)), Weights(_per_sample(la, probs))


def _checked_accept(log_accept: Tensor) -> Tensor:
    la = check_log_weights(log_accept, "log_accept")
    if bool((la > 0).any()):
        raise ValueError(
            f"log_accept must be at most 0, got {float(la.max()):g}: r is a probability"
        )
    return la


def _per_sample(log_x: Tensor, probs: Tensor | None) -> Tensor:
    """Return log x, with probs of `x · N · probs`: the plain mean of that is `Σ probs · x`."""
    if probs is None:
        return log_x
    p = torch.as_tensor(probs, dtype=torch.float64)
    # Far above the rounding of a float32 model, far below any mass that would matter.
    if p.shape != log_x.shape or bool((p < 0).any()) or not abs(float(p.sum()) - 1) < 1e-3:
        raise ValueError(
            f"probs must be {len(log_x)} numbers >= 0 with sum 1, one for each text; got shape "
            f"{tuple(p.shape)} and sum {float(p.sum()):g}"
        )
    return log_x + torch.log(len(p) * p)


def _score(estimate: Estimate, probs: Tensor | None) -> Score:
    """Return an estimate from samples with its error; an exact number has none."""
    return estimate.score() if probs is None else Score(estimate.value, 0.0, 0)
