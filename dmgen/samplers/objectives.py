"""The advantage of each training method: pure functions of log-probabilities.

Every method follows the gradient `E_q[A ∇log π]` with its own A. All of them are exact in
expectation on an enumerable model, which is how they are tested.
"""

from __future__ import annotations

import math

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
        ValueError: unknown method; its reward or divergence is missing; a divergence that is
            infinite where P = 0, for texts with P = 0.
        FloatingPointError: an advantage is not finite; names the text and its log-probabilities.

    Source: Korbak et al. 2022, eq. 12 and Algorithm 1; Go et al. 2023, Theorem 1.
    Differs from the paper: both terms are divided by Z, so the scale of a step does not depend on
    how rare the constraint is.
    """
    # log p first: then the two terms of GDC++ are equal to the last bit where π = p.
    log_target = log_score.double() - log_z
    ratio = torch.exp(log_policy.double() - log_proposal)
    if method in ("dpg", "gdc"):
        result = torch.exp(log_target - log_proposal)
    elif method == "gdc++":
        result = torch.exp(log_target - log_proposal) - ratio
    elif method == "fdpg":
        if divergence is None:
            raise ValueError('method "fdpg" needs divergence=, e.g. "js"')
        result = _f_advantage(divergence, log_target, log_proposal, log_policy.double())
    elif method == "reinforce":
        if reward is None:
            raise ValueError('method "reinforce" needs reward=, one number a text')
        result = ratio * reward
    else:
        raise ValueError(f"unknown method {method!r}; it must be one of {METHODS}")
    finite = result.isfinite()
    if not bool(finite.all()):
        i = int((~finite).nonzero()[0])
        raise FloatingPointError(
            f"the advantage of text {i} is {result[i].item()}: log P {log_score[i].item():g}, "
            f"log q {log_proposal[i].item():g}, log π {log_policy[i].item():g}, log Z {log_z}"
        )
    return result


def _f_advantage(
    divergence: str | tuple[str, float],
    log_target: Tensor,
    log_proposal: Tensor,
    log_policy: Tensor,
) -> Tensor:
    """−(π/q)(f'(π/p) − f'(1)), `(N,)`."""
    f = f_divergence(divergence)
    ratio = torch.exp(log_policy - log_proposal)
    if divergence == "kl" or divergence == ("alpha", 1.0):
        # The same in a form in which p/π cannot overflow while π/q is small.
        return torch.exp(log_target - log_proposal) - ratio
    impossible = log_target == -math.inf
    if math.isinf(f.f_prime_at_infinity) and bool(impossible.any()):
        raise ValueError(
            f"divergence {f.name!r} is infinite where P = 0, as for {int(impossible.sum())} of "
            f'{len(impossible)} texts: take "js", "tv" or "kl", or moments instead of hard '
            "constraints"
        )
    return ratio * (f.pseudo_reward(log_policy - log_target) + f.f_prime_at_one)


def inclusion_probabilities(advantage: Tensor, n: int) -> Tensor:
    """Probabilities to be kept, `(N,)`, proportional to |advantage|, capped at 1, that sum to `n`.

    A sum over all texts is estimated without bias by the kept ones, each divided by its
    probability (Horvitz and Thompson 1952); texts of advantage 0 are never kept and never missed.
    If no more than `n` texts have an advantage other than 0, all of those are kept, with
    probability 1.

    Args:
        advantage: `(N,)`, finite.
        n: texts to keep, at least 1.
    """
    size = advantage.abs().double()
    if int((size > 0).sum()) <= n:
        return (size > 0).double()
    certain = torch.zeros_like(size, dtype=torch.bool)
    # Capping one text at 1 leaves more for the others, which can cap another: at most N rounds.
    while True:
        rest = torch.where(certain, 0.0, size)
        keep = rest * ((n - int(certain.sum())) / rest.sum())
        capped = ~certain & (keep >= 1)
        if not bool(capped.any()):
            return torch.where(certain, 1.0, keep)
        certain |= capped


def systematic_sample(probabilities: Tensor, u: float) -> Tensor:
    """Positions kept when each is kept with its probability, long, ascending.

    Systematic sampling: one uniform `u` in [0, 1) places a grid of step 1 on the cumulative sum, so
    the number kept is the sum of the probabilities, rounded up or down.

    Args:
        probabilities: `(N,)`, between 0 and 1.
        u: uniform in [0, 1).
    """
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), probabilities.double().cumsum(0)])
    hits = torch.ceil(edges - u)
    return (hits[1:] > hits[:-1]).nonzero().squeeze(-1)
