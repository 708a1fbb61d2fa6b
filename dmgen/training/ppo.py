"""The formulas of PPO with a price on KL(π‖a): pure functions of columns of tokens, `(N, T)`."""

from __future__ import annotations

import torch
from torch import Tensor

# The adaptive coefficient follows the KL's relative error up to this size, and whitening divides
# by a variance that is at least so large.
_MOST_ERROR, _LEAST_VARIANCE = 0.2, 1e-8


def token_rewards(
    reward: Tensor, log_old: Tensor, log_base: Tensor, mask: Tensor, kl_coefficient: float
) -> Tensor:
    """Return `−β (log π_old(x_t) − log a(x_t))`, and the text's reward on its last token.

    Args:
        reward: of each text, `(N,)`.
        log_old, log_base: of each token, `(N, T)`, nats.
        mask: bool `(N, T)`.
        kl_coefficient: β.

    Returns:
        `(N, T)`, 0 where masked; a row sums to `r − β (log π_old(x) − log a(x))`.

    Source: Ziegler et al. 2019, section 2.
    """
    rewards = torch.where(mask, kl_coefficient * (log_base - log_old), 0.0)
    rewards[torch.arange(len(mask)), mask.sum(-1) - 1] += reward
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Return `Â_t = Σ_l (γλ)^l δ_{t+l}`, `δ_t = r_t + γ V_{t+1} − V_t`, `(N, T)`; V = 0 at the end.

    Args:
        rewards: r_t, `(N, T)`, 0 after the end of a text.
        values: V_t, likewise, the value expected before token t.
        gamma, gae_lambda: γ and λ, in [0, 1].

    Source: Schulman et al. 2016, eq. 16.
    """
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values
    advantage = torch.zeros_like(deltas)
    later = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        later = deltas[:, t] + gamma * gae_lambda * later
        advantage[:, t] = later
    return advantage


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return `(x − mean) / sqrt(var + 1e-8)` over the entries with mask, 0 elsewhere, `(N, T)`."""
    seen = x[mask]
    white = (x - seen.mean()) / torch.sqrt(seen.var(correction=0) + _LEAST_VARIANCE)
    return torch.where(mask, white, 0.0)


def ppo_loss(
    log_pi: Tensor,
    values: Tensor,
    advantage: Tensor,
    log_old: Tensor,
    returns: Tensor,
    old_values: Tensor,
    *,
    clip: float,
    value_coefficient: float,
) -> Tensor:
    """Return the loss of each token, to descend; only `log_pi` and `values` are differentiated.

    `max(−Âρ, −Â clip(ρ, 1 ± c)) + ½ v max((V − G)², (clip(V, V_old ± c) − G)²)`, ρ = π/π_old.

    Args:
        log_pi, values: log π and V of each token now, `(N, T)`.
        advantage: Â.
        log_old, old_values: log π and V when the texts were drawn.
        returns: G.
        clip: c.
        value_coefficient: v.

    Source: Schulman et al. 2017, eq. 7, turned to a loss, with the value loss of Ziegler et al.
    2019.
    """
    ratio = torch.exp(log_pi - log_old)
    of_policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    near = old_values + (values - old_values).clamp(-clip, clip)
    of_value = torch.maximum((values - returns).square(), (near - returns).square())
    return of_policy + 0.5 * value_coefficient * of_value


def adapted(coefficient: float, kl: float, kl_target: float, horizon: float, n_texts: int) -> float:
    """Return the next KL coefficient, `β (1 + clip(KL/kl_target − 1, ±0.2) · n_texts/horizon)`.

    Source: Ziegler et al. 2019, section 2.2.
    """
    error = min(max(kl / kl_target - 1, -_MOST_ERROR), _MOST_ERROR)
    return coefficient * (1 + error * n_texts / horizon)
