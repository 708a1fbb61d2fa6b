"""Warnings of a run that fails: collapsed weights, no hits, contradicting estimates of Z."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Health", "watch"]

# A batch counts as collapsed under this fraction of effective texts, or so few of them (1 is one
# text that carries all), and a run after so many such batches.
_LEAST_FRACTION, _LEAST, _PATIENCE = 0.01, 1.5, 10
# A two-sided 5 sigma event; heavy-tailed weights can make a false alarm of less.
_MOST_DRIFT = 5.0


@dataclass(frozen=True)
class Health:
    """What rows of metrics have shown so far.

    Attributes:
        n_low: collapsed batches in a row.
        n_without_z: batches in a row without any text with P > 0.
        warned: the warnings that were given; each is given once a run.
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

    Args:
        health: before the row.
        row: metrics of one step.
        batch_size: texts a step.
        is_weighted: whether the gradient is a mean under importance weights.

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
            "nothing is learnt: draw from a model that shows them (proposal=, or begin with a "
            "policy that was trained on an easier constraint), or ask for less"
        )
    if health.n_low >= _PATIENCE:
        messages["collapse"] = (
            f"the effective sample size has been under {least_ess:g} of {batch_size} texts for "
            f"{_PATIENCE} steps: one or a few carry the whole gradient. Lower the learning rate, "
            "enlarge batch_size, or bound the weights with base_share=0.1"
        )
    if abs(row["log_z_drift"]) > _MOST_DRIFT:
        messages["drift"] = (
            f"at step {row['step']} log Z has moved by {row['log_z_drift']:+.1f} standard errors "
            "since it was last estimated. Z does not depend on the proposal, so log-probabilities "
            "and texts may not belong together (such as texts drawn with top-p and scored "
            "without), or the weights are too heavy-tailed for their error to be trusted"
        )
    new = [name for name in messages if name not in health.warned]
    for name in new:
        warnings.warn(messages[name], RuntimeWarning, stacklevel=4)
    return replace(health, warned=(*health.warned, *new))
