"""Samples pooled from several proposals: the density of the mixture and its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from dmgen.estimates.checks import check_like, check_log_weights


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
    mixture = log_mixture(log_probs, n_samples)
    return check_like(log_target, "log_target", mixture) - mixture
