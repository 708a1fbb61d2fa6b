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
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "balance_heuristic",
    "check_log_weights",
    "ess",
    "log_mixture",
    "log_z",
    "mean",
    "pareto_k",
    "stderr_of_mean",
]

# A tail that is spread so far, over 690 nats, is hardly seen, and cannot be computed with.
_NOTHING = 1e-300


def check_log_weights(log_weights: Tensor, name: str = "log_weights") -> Tensor:
    """Return `log_weights` as a detached float64 vector after checking that it is legal.

    Args:
        log_weights: (N,), nats; `-inf` is legal.
        name: what to call it in the error.

    Raises:
        ValueError: if it is not a vector with at least one entry, or holds NaN or `+inf`.
    """
    lw = torch.as_tensor(log_weights, dtype=torch.float64).detach()
    if lw.ndim != 1 or len(lw) == 0:
        raise ValueError(f"{name} must have shape (N,) with N >= 1, got {tuple(lw.shape)}")
    bad = torch.isnan(lw) | torch.isposinf(lw)
    if bad.any():
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}[{where}] is {lw[where].item()}: finite numbers and -inf are allowed"
            f" ({int(bad.sum())} of {len(lw)} entries are NaN or +inf)"
        )
    return lw


def ess(log_weights: Tensor) -> float:
    """Return the effective sample size `(Σ w)² / Σ w²`: 1 to N, and 0 if all weights are 0.

    Args:
        log_weights: (N,), nats; an additive constant does not matter.

    Raises:
        ValueError: NaN or `+inf`.

    Source: Kong (1992), "A note on importance sampling using standardized weights".
    """
    lw = check_log_weights(log_weights)
    top = lw.max()
    if torch.isneginf(top):
        return 0.0
    w = torch.exp(lw - top)
    return float(w.sum() ** 2 / (w * w).sum())


def log_z(log_weights: Tensor, strata: Tensor | None = None) -> tuple[float, float]:
    """Return `log((1/N) Σ w)` and its standard error, the estimate of log Z, in nats.

    The error is first order (delta method): `stderr(w) / (√N mean(w))`. It is not to be believed
    below an ESS of about 100 or a Pareto k above 0.7: a proposal that misses a part of P gives a
    log Z that is too small together with an error that is too small. NaN for N = 1. If all
    weights are 0 the result is `(-inf, inf)`.

    Args:
        log_weights: (N,), nats.
        strata: (N,), optional, the proposal each sample came from.

    Raises:
        ValueError: NaN or `+inf`; strata of another length.
    """
    lw = check_log_weights(log_weights)
    top = lw.max()
    if torch.isneginf(top):
        return -math.inf, math.inf
    w = torch.exp(lw - top)
    average = w.mean()
    return float(top + average.log()), stderr_of_mean(w / average - 1, strata)


def mean(log_weights: Tensor, values: Tensor, strata: Tensor | None = None) -> tuple[Any, Any]:
    """Return the self-normalised mean `Σ w v / Σ w` and its standard error (delta method).

    `stderr² = N/(N-1) Σ ω² (v - mean)²` with `ω = w / Σ w`. It is not to be believed for a small
    ESS or a heavy tail of w·v; it is 0 where all samples with weight share one value, which says
    that no spread was seen and not that there is none.

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
    lw = check_log_weights(log_weights)
    v = torch.as_tensor(values, dtype=torch.float64).detach()
    if v.ndim not in (1, 2) or len(v) != len(lw):
        raise ValueError(f"values must be ({len(lw)},) or ({len(lw)}, K), got {tuple(v.shape)}")
    columns = v[:, None] if v.ndim == 1 else v  # (N, K)
    top = lw.max()
    if torch.isneginf(top):
        value = torch.full((columns.shape[1],), math.nan, dtype=torch.float64)
        stderr = value
    else:
        columns = _finite_where_weighted(columns, lw)
        w = torch.exp(lw - top)
        g = (w / w.mean())[:, None]  # mean 1
        # The second pass removes the rounding of values that sit far from 0.
        value = (g * columns).mean(0)
        value = value + (g * (columns - value)).mean(0)
        residuals = g * (columns - value)
        stderr = torch.tensor(
            [stderr_of_mean(r, strata) for r in residuals.unbind(1)], dtype=torch.float64
        )
    if v.ndim == 1:
        return float(value[0]), float(stderr[0])
    return value, stderr


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


def stderr_of_mean(residuals: Tensor, strata: Tensor | None = None) -> float:
    """Return the standard error of the mean of N independent residuals; NaN for N = 1.

    `√(Σ r² / (N (N-1)))` with r taken around their mean; with strata around the mean of the
    stratum, each with its own `n/(n-1)`, because counts that were fixed beforehand add no noise.
    A stratum of one sample has no spread to show: there the mean of all is taken (conservative).

    Args:
        residuals: (N,), the influence of each sample on the estimate, scaled so that the error of
            the estimate is their mean.
        strata: (N,), optional, integer label of the proposal each sample came from.

    Raises:
        ValueError: if strata has another length.
    """
    n = len(residuals)
    if strata is not None and strata.shape != residuals.shape:
        raise ValueError(f"strata must have shape ({n},), got {tuple(strata.shape)}")
    if n == 1:
        return math.nan
    centred = residuals - residuals.mean()
    if strata is None:
        return math.sqrt(float((centred * centred).sum()) / (n * (n - 1)))
    _, label, counts = torch.unique(strata, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, label, centred)
    alone = counts == 1
    within = centred - torch.where(alone, 0.0, sums / counts)[label]
    correction = torch.where(alone, 1.0, counts / (counts - 1).clamp(min=1))[label]
    return math.sqrt(float((correction * within * within).sum())) / n


def pareto_k(log_weights: Tensor) -> float:
    """Return the tail index k of the largest weights: about 1/k moments of the weights are finite.

    A generalised Pareto law is fitted to the excesses of the `min(N/5, 3√N)` largest weights over
    the next one, and k is pulled towards 0.5 with the weight of ten observations. Below 0.5 the
    estimates have a variance and their errors can be believed, from 0.7 on they cannot.

    Two-valued weights: only weights strictly above the threshold have an excess. None above it
    (all large weights equal, hence bounded) gives `-inf`; fewer than five above it (a tail that
    was hardly seen, or no positive weight at all) gives `+inf`.

    Args:
        log_weights: (N,), nats; an additive constant does not matter.

    Raises:
        ValueError: NaN or `+inf`.

    Source: Zhang and Stephens (2009), Technometrics 51(3), for the fit; Vehtari, Simpson, Gelman,
    Yao and Gabry, "Pareto smoothed importance sampling" (1507.02646v9), for its use and the prior.
    """
    lw = check_log_weights(log_weights)
    n = len(lw)
    n_tail = math.ceil(min(0.2 * n, 3 * math.sqrt(n)))
    ordered = torch.sort(lw, descending=True).values
    if torch.isneginf(ordered[0]):
        return math.inf
    # A sample of one or two has no next weight; then all of them are tail.
    threshold = ordered[n_tail] if n_tail < n else torch.tensor(-math.inf, dtype=torch.float64)
    tail = ordered[:n_tail]
    tail = tail[tail > threshold]
    if len(tail) == 0:
        return -math.inf
    if len(tail) < 5:
        return math.inf
    excess = torch.exp(tail - ordered[0]) - torch.exp(threshold - ordered[0])
    return _fit_generalised_pareto(excess.flip(0))


def _fit_generalised_pareto(excess: Tensor) -> float:
    """Return Zhang and Stephens' posterior mean of k for ascending positive excesses (M,)."""
    m = len(excess)
    largest, quartile = excess[-1], excess[int(m / 4 + 0.5) - 1]
    if quartile < _NOTHING * largest:
        return math.inf
    n_grid = 30 + int(math.sqrt(m))
    i = torch.arange(1, n_grid + 1, dtype=torch.float64)
    # Eq. 8 of the paper: a grid for b = -k/σ, every point below 1/largest.
    b = 1 / largest + (1 - torch.sqrt(n_grid / (i - 0.5))) / (3 * quartile)
    k = torch.log1p(-b[:, None] * excess).mean(1)
    # Tied excesses put a grid point on b = 0, where -b/k tends to 1/mean(excess).
    rate = torch.where(b == 0, 1 / excess.mean(), -b / k)
    log_likelihood = m * (torch.log(rate) - k - 1)
    weight = torch.softmax(log_likelihood, 0)
    b_mean = (weight * b).sum()
    k_mean = float(torch.log1p(-b_mean * excess).mean())
    return (m * k_mean + 10 * 0.5) / (m + 10)


def log_mixture(log_probs: Tensor, n_samples: Tensor) -> Tensor:
    """Return `log Σ_m (n_m / n) q_m(x)`, the density of samples pooled from M proposals.

    It stands for `log_proposal` wherever samples of several models are pooled.

    Args:
        log_probs: (N, M), log q_m(x_i) of every sample under every proposal, nats; `-inf` is legal
            as long as one proposal gives the sample a density.
        n_samples: (M,), how many of the N samples came from each proposal, >= 0, sum N.

    Returns:
        (N,) float64, nats.

    Raises:
        ValueError: NaN or `+inf`, counts that do not sum to N, or a sample without any density.

    Source: Veach and Guibas (1995), "Optimally combining sampling techniques", balance heuristic.
    """
    lp = torch.as_tensor(log_probs, dtype=torch.float64).detach()
    counts = torch.as_tensor(n_samples, dtype=torch.float64)
    if lp.ndim != 2 or counts.shape != lp.shape[1:]:
        raise ValueError(
            f"log_probs must be (N, M) and n_samples (M,),"
            f" got {tuple(lp.shape)} and {tuple(counts.shape)}"
        )
    if (counts < 0).any() or counts.sum() != len(lp):
        raise ValueError(
            f"n_samples must be >= 0 and sum to the {len(lp)} rows of log_probs,"
            f" got {counts.tolist()}"
        )
    for m in range(lp.shape[1]):
        check_log_weights(lp[:, m], f"log_probs[:, {m}]")
    mixture = torch.logsumexp(lp + torch.log(counts / counts.sum()), 1)  # (N,)
    lost = torch.isneginf(mixture)
    if lost.any():
        raise ValueError(
            f"log_probs[{int(lost.nonzero()[0])}] is -inf under every proposal that was drawn from:"
            " the sample cannot have come from any of them"
        )
    return mixture


def balance_heuristic(log_target: Tensor, log_probs: Tensor, n_samples: Tensor) -> Tensor:
    """Return the log-weights `log P - log Σ_m (n_m/n) q_m` of samples pooled from M proposals.

    The pooled sample is then used like one from a single proposal: `log_z`, `mean`, `ess` hold.
    A weight is bounded by `n/n_m · P/q_m` for every m, so one good proposal is enough. Because
    the counts are fixed, errors without `strata` are conservative, with it they are exact to
    first order.

    Args:
        log_target: (N,), log P(x_i), unnormalised, nats; `-inf` is legal.
        log_probs: (N, M), log q_m(x_i) of every sample under every proposal, nats.
        n_samples: (M,), how many of the N samples came from each proposal.

    Returns:
        (N,) float64, nats.

    Raises:
        ValueError: NaN or `+inf`, shapes or counts that do not fit, a sample without any density.

    Source: Veach and Guibas (1995); Owen and Zhou (2000), "Safe and effective importance sampling".
    """
    target = check_log_weights(log_target, "log_target")
    mixture = log_mixture(log_probs, n_samples)
    if len(target) != len(mixture):
        raise ValueError(f"log_target has {len(target)} samples, log_probs {len(mixture)}")
    return target - mixture
