"""The advantage of each training method: pure functions of log-probabilities.

Every method follows the gradient `E_q[A ∇log π]` with its own A. All of them are exact in
expectation on an enumerable model, which is how they are tested.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates.f_divergence import f_divergence

METHODS = ("dpg", "gdc", "gdc++", "fdpg", "reinforce", "vargrad")
# Those whose gradient is a mean under importance weights P/q.
WEIGHTED = ("dpg", "gdc", "gdc++", "fdpg")
# KL(p‖π) of "fdpg", in both of its names.
_KL = ("kl", ("alpha", 1.0))
# Baselines that look at the other texts of the batch.
_OF_THE_BATCH = ("leave_one_out", "optimal")


def advantage(
    method: str,
    log_score: Tensor,
    log_proposal: Tensor,
    log_policy: Tensor,
    log_z: float | Tensor,
    *,
    reward: Tensor | None = None,
    divergence: str | tuple[str, float] | None = None,
    baseline: str | None = None,
) -> Tensor:
    """The advantage A = G − κ π/q of each text in `∇ = E_q[A ∇log π]`, the direction of ascent.

    | method | G | κ |
    | --- | --- | --- |
    | "dpg", "gdc" | P/(Zq) | 0 |
    | "gdc++" | P/(Zq) | 1: A is 0 for every text when π = p |
    | "fdpg" | −(π/q) f'(π/p), for `divergence` | −f'(1), likewise |
    | "reinforce" | (π/q) · reward | 0 |
    | "vargrad" | log P/π less its mean over the other texts | 0 |

    Any κ that does not depend on the text leaves the expected gradient as it is, since
    `E_q[(π/q) ∇log π] = 0`. `baseline` chooses another than the method's own:

    | baseline | κ |
    | --- | --- |
    | "none" | 0 |
    | "z" | the value at which A is 0 when π = p; not for "reinforce", which has no such target |
    | "leave_one_out" | the mean of G over the other texts |
    | "optimal" | ΣGu / Σu², u = π/q, over the half of the batch without the text: least variance |

    "vargrad" descends the variance of log P/π under q, `½ Var_q[log P − log π]`, which needs no Z.
    On-policy that is the gradient of KL(π‖p); it is a sum of its own kind and takes no baseline.

    Args:
        method: one of the above.
        log_score: log P, `(N,)`, nats, unnormalised; `-inf` is legal but for "vargrad".
        log_proposal: log q of the law the texts were drawn from, `(N,)`.
        log_policy: log π, `(N,)`, detached: π inside the advantage is not differentiated.
        log_z: log Z, a number or `(N,)`.
        reward: `(N,)`, for "reinforce".
        divergence: as in `f_divergence`, for "fdpg".
        baseline: one of the above; None is the method's own.

    Returns:
        float64 `(N,)`.

    Raises:
        ValueError: unknown method or baseline, or one that does not go with the method; its reward
            or divergence is missing; a divergence that is infinite where P = 0, for texts with
            P = 0.
        FloatingPointError: an advantage is not finite; names the text's log-probabilities.

    Source: Korbak et al. 2022, eq. 12 and Algorithm 1; Go et al. 2023, Theorem 1; Richter et al.
    2020 (VarGrad).
    Differs from the paper: both terms are divided by Z, so the scale of a step does not depend on
    how rare the constraint is.
    """
    check_method(method, baseline, divergence)
    # log p first: then the two terms of GDC++ are equal to the last bit where π = p.
    log_target = log_score.double() - log_z
    ratio = torch.exp(log_policy.double() - log_proposal)
    own = 0.0
    if method == "reinforce":
        if reward is None:
            raise ValueError('method "reinforce" needs reward=, one number a text')
        gain = ratio * reward
    elif method == "vargrad":
        gain = _centred(log_score, log_policy)
    elif method == "fdpg" and divergence not in (None, *_KL):
        gain, own = _f_gain(divergence, log_target, log_policy.double(), ratio)
    else:
        # The KL divergence of "fdpg" too: p/π cannot overflow here while π/q is small.
        gain = torch.exp(log_target - log_proposal)
        own = 1.0 if method in ("gdc++", "fdpg") else 0.0
    kappa = _kappa(baseline, gain, ratio, own, method)
    # Where κ is 0, π/q does not count, and log π need not be known: π/q may well overflow then.
    unmoved = isinstance(kappa, float) and kappa == 0
    result = gain if unmoved else gain - kappa * ratio
    finite = result.isfinite()
    if not bool(finite.all()):
        i = int((~finite).nonzero()[0])
        raise FloatingPointError(
            f"the advantage of a text is {result[i].item()}: log P {log_score[i].item():g}, "
            f"log q {log_proposal[i].item():g}, log π {log_policy[i].item():g}, log Z {log_z}"
        )
    return result


def check_method(
    method: str, baseline: str | None, divergence: str | tuple[str, float] | None
) -> None:
    """Refuses a method without its divergence, and a baseline that does not go with it.

    Raises:
        ValueError: see above.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; it must be one of {METHODS}")
    if method == "fdpg" and divergence is None:
        raise ValueError('method "fdpg" needs divergence=, e.g. "js"')
    allowed = {"reinforce": ("none", *_OF_THE_BATCH), "vargrad": ("none",)}.get(
        method, ("none", "z", *_OF_THE_BATCH)
    )
    if baseline is not None and baseline not in allowed:
        raise ValueError(f"baseline of {method!r} must be None or one of {allowed}: {baseline!r}")


def needs_whole_batch(method: str, baseline: str | None) -> bool:
    """Whether the advantage of a text depends on the other texts of its batch."""
    return method == "vargrad" or baseline in _OF_THE_BATCH


def needs_policy(method: str, baseline: str | None) -> bool:
    """Whether the advantage of a text depends on log π."""
    return method not in ("dpg", "gdc") or baseline not in (None, "none")


def needs_possible_texts(method: str, divergence: str | tuple[str, float] | None) -> bool:
    """Whether the advantage of a text with P = 0 is infinite."""
    if method == "fdpg" and divergence not in (None, *_KL):
        return math.isinf(f_divergence(divergence).f_prime_at_infinity)
    return method == "vargrad"


def _kappa(
    baseline: str | None, gain: Tensor, ratio: Tensor, own: float, method: str
) -> float | Tensor:
    """κ, a number or `(N,)`, independent of the text it belongs to."""
    if baseline is None:
        return own
    if baseline == "none":
        return 0.0
    if baseline == "z":
        return 1.0 if method in ("dpg", "gdc", "gdc++") else own
    if baseline == "leave_one_out":
        return (gain.sum() - gain) / max(len(gain) - 1, 1)
    even = torch.arange(len(gain)) % 2 == 0
    of_odd, of_even = (
        (gain[half] * ratio[half]).sum() / ratio[half].square().sum() for half in (~even, even)
    )
    return torch.where(even, of_odd, of_even)


def _centred(log_score: Tensor, log_policy: Tensor) -> Tensor:
    """log P/π less its mean over the other texts, `(N,)`."""
    impossible = int((log_score == -math.inf).sum())
    if impossible:
        raise ValueError(
            f"vargrad is infinite where P = 0, as for {impossible} of {len(log_score)} texts: take "
            "GDCpp, or moments instead of hard constraints"
        )
    terms = log_score.double() - log_policy
    n = len(terms)
    return (terms - terms.mean()) * (n / max(n - 1, 1))


def _f_gain(
    divergence: str | tuple[str, float] | None,
    log_target: Tensor,
    log_policy: Tensor,
    ratio: Tensor,
) -> tuple[Tensor, float]:
    """−(π/q) f'(π/p), `(N,)`, and −f'(1)."""
    if divergence is None:
        raise ValueError('method "fdpg" needs divergence=, e.g. "js"')
    f = f_divergence(divergence)
    impossible = log_target == -math.inf
    if math.isinf(f.f_prime_at_infinity) and bool(impossible.any()):
        raise ValueError(
            f"divergence {f.name!r} is infinite where P = 0, as for {int(impossible.sum())} of "
            f'{len(impossible)} texts: take "js", "tv" or "kl", or moments instead of hard '
            "constraints"
        )
    return ratio * f.pseudo_reward(log_policy - log_target), -f.f_prime_at_one
