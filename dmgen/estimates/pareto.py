"""The tail index of importance weights, a diagnostic of their errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates.checks import check_log_weights

# Excesses that differ by more, over 690 nats, underflow in the fit.
_NEGLIGIBLE = 1e-300


def pareto_k(log_weights: Tensor) -> float:
    """Return the tail index k of the largest weights: about 1/k moments of the weights are finite.

    A generalised Pareto distribution is fitted to the excesses of the `min(N/5, 3√N)` largest
    weights over the next one, and k is pulled towards 0.5 with the weight of ten observations.
    Below 0.5 the estimates have a variance and their errors are reliable, from 0.7 on they are not.

    Two-valued weights: only weights strictly above the threshold have an excess. None above it
    (all large weights equal, hence bounded) gives `-inf`; fewer than five above it (a tail with
    too few samples, or no positive weight at all) gives `+inf`.

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
    if quartile < _NEGLIGIBLE * largest:
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
