"""Warnings of a failing run: collapsed weights, no text with P > 0, contradictory Z."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

# A batch has collapsed if its ESS is below this fraction of its texts, or below this number (an ESS
# of 1 means one text with all the weight); a run, after this many such batches in a row.
_LEAST_FRACTION, _LEAST, _PATIENCE = 0.01, 1.5, 10
# In standard errors, two-sided: heavy-tailed weights can raise a false alarm at less.
_MOST_DRIFT = 5.0


@dataclass(frozen=True)
class Health:
    """The signs of a failing run so far.

    Attributes:
        n_low: collapsed batches in a row.
        n_without_z: batches in a row without any text with P > 0.
        warned: the warnings already given; each is given once a run.
    """

    n_low: int = 0
    n_without_z: int = 0
    warned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "warned", tuple(self.warned))  # JSON has lists


def watch(
    health: Health, row: dict[str, Any], *, batch_size: int, is_weighted: bool = True
) -> Health:
    """Return the health after one more row of metrics.

    `is_weighted` is whether the gradient is a mean under importance weights.

    Warns:
        RuntimeWarning: the weights have collapsed on a few texts, no text has satisfied the
            constraints, or estimates of Z from different proposals contradict one another.
    """
    least_ess = max(_LEAST, _LEAST_FRACTION * batch_size) if is_weighted else 0.0
    no_z = not math.isfinite(row["log_z"])
    low = not no_z and row["ess"] < least_ess
    health = replace(
        health,
        n_without_z=health.n_without_z + 1 if no_z else 0,
        n_low=health.n_low + 1 if low else 0,
    )
    messages = {}
    if health.n_without_z >= _PATIENCE:
        messages["no hit"] = (
            f"none of {row['samples']:,} texts satisfies the constraints, so Z is unknown and "
            "the policy does not change: draw from a model that satisfies them more often "
            "(proposal=, or a policy trained on an easier constraint), or weaken the constraints"
        )
    if health.n_low >= _PATIENCE:
        messages["collapse"] = (
            f"the effective sample size has been under {least_ess:g} of {batch_size} texts for "
            f"{_PATIENCE} steps: a few texts make up the whole gradient. Lower the learning rate, "
            "enlarge batch_size, or bound the weights with base_share=0.1"
        )
    if abs(row["log_z_drift"]) > _MOST_DRIFT:
        messages["drift"] = (
            f"at step {row['step']} log Z has moved by {row['log_z_drift']:+.1f} standard errors "
            "since it was last estimated. Z does not depend on the proposal, so log-probabilities "
            "and texts may not match (such as texts drawn with top-p and scored without), or the "
            "weights are too heavy-tailed for a reliable standard error"
        )
    new = [name for name in messages if name not in health.warned]
    for name in new:
        warnings.warn(messages[name], RuntimeWarning, stacklevel=4)
    return replace(health, warned=(*health.warned, *new))
