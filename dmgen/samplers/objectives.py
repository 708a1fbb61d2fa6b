"""The advantage of each training method: pure functions of log-probabilities.

Every method follows the gradient `E_q[A ∇log π]` with its own A. All of them are exact in
expectation on an enumerable model, which is how they are tested.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmgen.divergences import f_divergence

METHODS = ("dpg", "gdc", "gdc++", "fdpg", "reinforce")


def advantage(
    method: str,
    log_score: Tensor,
    log_proposal: Tensor,
    log_policy: Tensor,
    log_z: float | Tensor,
    *,
    reward: Tensor | None = None,
    divergence: str | tuple[str, float] | None = None,
) -> Tensor:
    """The advantage A of each text in `∇ = E_q[A ∇log π]`, the direction of ascent.

    | method | A |
    | --- | --- |
    | "dpg", "gdc" | P/(Zq) |
    | "gdc++" | P/(Zq) − π/q: 0 for every text when π = p |
    | "fdpg" | −(π/q)(f'(π/p) − f'(1)), for `divergence` |
    | "reinforce" | (π/q) · reward |

    Args:
        method: one of the above.
        log_score: log P, `(N,)`, nats, unnormalised; `-inf` is legal.
        log_proposal: log q of the law the texts were drawn from, `(N,)`.
        log_policy: log π, `(N,)`, detached: π inside the advantage is not differentiated.
        log_z: log Z, a number or `(N,)`.
        reward: `(N,)`, for "reinforce".
        divergence: as in `f_divergence`, for "fdpg".

    Returns:
        float64 `(N,)`.

    Raises:
        ValueError: unknown method, or its reward or divergence is missing.

    Source: Korbak et al. 2022, eq. 12 and Algorithm 1; Go et al. 2023, Theorem 1.
    Differs from the paper: both terms are divided by Z, so the scale of a step does not depend on
    how rare the constraint is.
    """
    log_weights = log_score.double() - log_proposal - log_z
    ratio = torch.exp(log_policy.double() - log_proposal)
    if method in ("dpg", "gdc"):
        return torch.exp(log_weights)
    if method == "gdc++":
        return torch.exp(log_weights) - ratio
    if method == "fdpg":
        if divergence is None:
            raise ValueError('method "fdpg" needs divergence=, e.g. "js"')
        f = f_divergence(divergence)
        log_t = log_policy.double() - log_score.double() + log_z
        return ratio * (f.pseudo_reward(log_t) + f.f_prime_at_one)
    if method == "reinforce":
        if reward is None:
            raise ValueError('method "reinforce" needs reward=, one number a text')
        return ratio * reward
    raise ValueError(f"unknown method {method!r}; it must be one of {METHODS}")


def inclusion_probabilities(advantage: Tensor, n: int) -> Tensor:
    """Probabilities to be kept, `(N,)`, proportional to |advantage|, capped at 1, that sum to `n`.

    A sum over all texts is estimated without bias by the kept ones, each divided by its
    probability (Horvitz and Thompson 1952); texts of advantage 0 are never kept and never missed.
    If no more than `n` texts have an advantage other than 0, all of those are kept.
    """
    size = advantage.abs()
    keep = torch.zeros_like(size)
    certain = torch.zeros_like(size, dtype=torch.bool)
    # Capping one text at 1 leaves more for the others, which can cap another: at most N rounds.
    while True:
        rest = torch.where(certain, 0.0, size)
        left = n - int(certain.sum())
        total = float(rest.sum())
        if total == 0 or left <= 0:
            break
        keep = torch.clamp(rest * (left / total), max=1.0)
        capped = ~certain & (keep >= 1)
        if not capped.any():
            break
        certain |= capped
    return torch.where(certain, 1.0, keep)


def systematic_sample(probabilities: Tensor, u: float) -> Tensor:
    """Positions kept when each is kept with its probability, long; their number is fixed.

    Systematic sampling: one uniform `u` in [0, 1) places a grid of step 1 on the cumulative sum.
    """
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), probabilities.double().cumsum(0)])
    hits = torch.ceil(edges - u)
    return (hits[1:] > hits[:-1]).nonzero().squeeze(-1)
