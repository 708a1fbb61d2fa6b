"""Baselines: the factor κ in the advantage `A = G − κ π/q`.

Any κ that does not depend on the text leaves the expected gradient as it is, since
`E_q[(π/q) ∇log π] = 0`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Baseline:
    """A choice of κ.

    Attributes:
        name: its name in a configuration.
        kappa: from G `(N,)`, π/q `(N,)` and the κ at which A is 0 where π = p to κ, a number or
            `(N,)`; None for κ = 0.
        needs_batch: whether κ of a text depends on the other texts of its batch.
        needs_target: whether it exists only for objectives with a target distribution.
    """

    name: str
    kappa: Callable[[Tensor, Tensor, float], float | Tensor] | None
    needs_batch: bool = False
    needs_target: bool = False


def _leave_one_out(gain: Tensor, ratio: Tensor, at_target: float) -> Tensor:
    return (gain.sum() - gain) / max(len(gain) - 1, 1)


def _optimal(gain: Tensor, ratio: Tensor, at_target: float) -> Tensor:
    """Return κ of each half of the batch from the other half: it must not depend on the text."""
    even = torch.arange(len(gain)) % 2 == 0
    of_odd, of_even = (
        (gain[half] * ratio[half]).sum() / ratio[half].square().sum() for half in (~even, even)
    )
    return torch.where(even, of_odd, of_even)


BASELINES = {
    "none": Baseline("none", None),
    "z": Baseline("z", lambda gain, ratio, at_target: at_target, needs_target=True),
    "leave_one_out": Baseline("leave_one_out", _leave_one_out, needs_batch=True),
    "optimal": Baseline("optimal", _optimal, needs_batch=True),
}
