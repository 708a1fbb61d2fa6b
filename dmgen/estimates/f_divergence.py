"""The family of f-divergences, each with its derivative and the pseudo-reward of its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class FDivergence:
    """An f-divergence `D(π‖p) = E_p[f(t)]`, `t = π/p`, with `f` convex and `f(1) = 0`.

    Its gradient is `E_q[(π/q) (f'(t) - c) ∇ log π]` for any constant c; `c = f_prime_at_one` makes
    it vanish for every sample at π = p. `f_divergence` returns the named ones; others are made from
    f and -f', in this order: `FDivergence("mine", 1.0, math.inf, f, pseudo_reward)`.

    Attributes:
        name: in messages.
        f_prime_at_one: f'(1), the baseline.
        f_prime_at_infinity: f'(∞), the limit at P = 0; `f(t) - f'(∞)(t - 1)` is the bounded form.
        _f: f of a float64 tensor t.
        _pseudo_reward: -f' of a float64 tensor log t.
    """

    name: str
    f_prime_at_one: float
    f_prime_at_infinity: float
    _f: Callable[[Tensor], Tensor]
    _pseudo_reward: Callable[[Tensor], Tensor]

    def f(self, t: Tensor) -> Tensor:
        """Return the values of f, float64, shape of t, for 0 <= t < ∞; may be `inf` at 0."""
        t = _float64(t, "t")
        if (t < 0).any() or torch.isinf(t).any():
            raise ValueError("t = π/p must be finite and >= 0")
        return self._f(t)

    def f_prime(self, t: Tensor) -> Tensor:
        """Return the values of f', float64, shape of t, for 0 <= t <= ∞."""
        t = _float64(t, "t")
        if (t < 0).any():
            raise ValueError("t = π/p must be >= 0")
        return -self._pseudo_reward(torch.log(t))

    def pseudo_reward(self, log_t: Tensor) -> Tensor:
        """Return `-f'(t)` from log t = log π - log p, without forming t, float64.

        `log_t = +inf` stands for P = 0 and gives `-f_prime_at_infinity`. A log_t far below 0 may
        overflow to `+inf` for "kl", "chi2" and alpha > 0: multiply by π/q in logs there.

        Args:
            log_t: any shape, nats, ±inf legal.

        Raises:
            ValueError: NaN, the result of `-inf - (-inf)`: drop texts with π = P = 0.
        """
        return self._pseudo_reward(_float64(log_t, "log_t"))


def _float64(x: Tensor, name: str) -> Tensor:
    x = torch.as_tensor(x, dtype=torch.float64)
    if torch.isnan(x).any():
        where = torch.isnan(x).nonzero()[0].tolist()
        raise ValueError(f"{name} is NaN at position {where}")
    return x


def f_divergence(name: str | tuple[str, float]) -> FDivergence:
    """Return the named f-divergence with f, f' and pseudo-reward.

    | name | D(π‖p) | f(t) | -f'(t) | -f' at P = 0 |
    | --- | --- | --- | --- | --- |
    | "kl" | KL(p‖π) | -log t | 1/t | 0 |
    | "reverse_kl" | KL(π‖p) | t log t | -log t - 1 | -∞ |
    | "tv" | TV | ½ abs(1 - t) | -½ sign(t - 1) | -½ |
    | "js" | 2 JS | t log t - (t + 1) log((t + 1)/2) | log((1 + 1/t)/2) | -log 2 |
    | "chi2" | χ²(p‖π) | (1 - t)²/t | 1/t² - 1 | -1 |
    | "reverse_chi2" | χ²(π‖p) | (t - 1)² | -2 (t - 1) | -∞ |
    | ("alpha", a) | Amari | (t^(1-a) - (1-a) t - a)/(a (a-1)) | (t^-a - 1)/a | -1/a, -∞ if a <= 0 |

    Alpha is 0 for KL(π‖p), ½ for four times the squared Hellinger distance `½ Σ (√π - √p)²`, 1 for
    KL(p‖π), 2 for ½ χ²(p‖π) and -1 for ½ χ²(π‖p); 0 and 1 are the exact limits. At t = 1, the kink
    of "tv", f' is 0. Where -f' is -∞ at P = 0, the target needs a floor.

    Raises:
        ValueError: for an unknown name or an alpha that is not finite.

    Source: Go, Korbak, Kruszewski, Rozen, Ryu and Dymetman (2023), "Aligning language models with
    preferences through f-divergence minimization" (2302.08215), table 1 ("js" is twice JS there
    too, unlike `divergences.js`); Amari and Nagaoka (2000) for alpha.
    """
    if isinstance(name, tuple):
        is_alpha = len(name) == 2 and name[0] == "alpha" and isinstance(name[1], Real)
        if not is_alpha or not math.isfinite(name[1]):
            raise ValueError(f'a tuple must be ("alpha", a) with a finite number a, got {name!r}')
        return _alpha_divergence(float(name[1]))
    if name not in _FAMILY:
        raise ValueError(
            f'unknown divergence {name!r}: allowed are {", ".join(_FAMILY)} and ("alpha", a)'
        )
    return FDivergence(name, *_FAMILY[name])


def _js_f(t: Tensor) -> Tensor:
    return torch.xlogy(t, t) - torch.xlogy(t + 1, (t + 1) / 2)


def _js_pseudo_reward(log_t: Tensor) -> Tensor:
    return torch.logaddexp(torch.zeros_like(log_t), -log_t) - math.log(2)


# name -> f'(1), f'(∞), f of t, -f' of log t
_FAMILY: dict[str, tuple[float, float, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "kl": (-1.0, 0.0, lambda t: -torch.log(t), lambda log_t: torch.exp(-log_t)),
    "reverse_kl": (1.0, math.inf, lambda t: torch.xlogy(t, t), lambda log_t: -log_t - 1),
    "tv": (0.0, 0.5, lambda t: 0.5 * (1 - t).abs(), lambda log_t: -0.5 * torch.sign(log_t)),
    "js": (0.0, math.log(2), _js_f, _js_pseudo_reward),
    "chi2": (0.0, 1.0, lambda t: (1 - t) ** 2 / t, lambda log_t: torch.expm1(-2 * log_t)),
    "reverse_chi2": (0.0, math.inf, lambda t: (t - 1) ** 2, lambda log_t: -2 * torch.expm1(log_t)),
}


def _alpha_divergence(a: float) -> FDivergence:
    def f(t: Tensor) -> Tensor:
        log_t = torch.log(t)
        # Both lines are the formula of the table; each is free of cancellation at its own limit.
        if a < 0.5:
            power = -log_t if a == 0 else torch.expm1(-a * log_t) / a
            return (torch.where(t == 0, 0.0, t * power) + t - 1) / (a - 1)
        power = log_t if a == 1 else torch.expm1((1 - a) * log_t) / (1 - a)
        return (t - 1 - power) / a

    def pseudo_reward(log_t: Tensor) -> Tensor:
        return -log_t if a == 0 else torch.expm1(-a * log_t) / a

    return FDivergence(f"alpha={a:g}", 0.0, 1 / a if a > 0 else math.inf, f, pseudo_reward)
