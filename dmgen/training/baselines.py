"""Baselines: the factor κ in the advantage `A = G − κ π/q`.

Any κ that does not depend on the text leaves the expected gradient as it is, since
`E_q[(π/q) ∇log π] = 0`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BASELINES", "Baseline"]

# From G `(N,)`, π/q `(N,)` and the value of κ at which A is 0 where π = p, to κ.
Kappa = Callable[[Tensor, Tensor, float], float | Tensor]


@dataclass(frozen=True)
class Baseline:
    """A choice of κ.

    Attributes:
        name: what configurations call it.
        kappa: `(G, π/q, value at the target) -> κ`, a number or `(N,)`; None for κ = 0.
        needs_batch: whether κ of a text depends on the other texts of its batch.
        needs_target: whether it exists only for objectives with a target distribution.
    """

    name: str
    kappa: Kappa | None
    needs_batch: bool = False
    needs_target: bool = False


def _leave_one_out(gain: Tensor, ratio: Tensor, at_target: float) -> Tensor:
    return (gain.sum() - gain) / max(len(gain) - 1, 1)


def _optimal(gain: Tensor, ratio: Tensor, at_target: float) -> Tensor:
    even = torch.arange(len(gain)) % 2 == 0
    of_odd, of_even = (
        (gain[half] * ratio[half]).sum() / ratio[half].square().sum() for half in (~even, even)
    )
    return torch.where(even, of_odd, of_even)


def _at_target(gain: Tensor, ratio: Tensor, at_target: float) -> float:
    return at_target


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("none", None),
        Baseline("z", _at_target, needs_target=True),
        Baseline("leave_one_out", _leave_one_out, needs_batch=True),
        # Of each half of the batch from the other half: κ must not depend on the text itself.
        Baseline("optimal", _optimal, needs_batch=True),
    )
}
