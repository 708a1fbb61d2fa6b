"""The factor `Π_j b_j(x) · e^{λ·φ(x)}` that constraints put on a base.

Pure functions of feature values by name and log-weights; no model is needed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature
from dmgen.estimates import weights as log_weights
from dmgen.estimates.score import Score

__all__ = [
    "Constraint",
    "Values",
    "allowed",
    "checked_lambdas",
    "constraint_mean",
    "distinct_features",
    "hard_edge",
    "log_factor",
    "soft_moments",
    "statistics",
    "with_lambdas",
]

Constraint = Pointwise | Moment
Values = Mapping[str, Tensor]


def with_lambdas(
    constraints: Sequence[Constraint], lambdas: Tensor
) -> Iterator[tuple[Constraint, float]]:
    """Yield each constraint with its λ; inf for a `Pointwise`."""
    weights = iter(lambdas.tolist())
    for constraint in constraints:
        yield constraint, next(weights) if isinstance(constraint, Moment) else math.inf


def log_factor(constraints: Sequence[Constraint], lambdas: Tensor, values: Values) -> Tensor:
    """Return `Σ_j log b_j + λ·φ`, float64 `(N,)`, nats; `-inf` where a hard factor is violated.

    Args:
        constraints: the constraints.
        lambdas: λ of each `Moment`, in their order, `(K,)`, nats; ±inf for a hard factor.
        values: feature values `(N,)` by name.

    Raises:
        FeatureError: the feature of a hard constraint is neither 0 nor 1.
    """
    total = torch.zeros(len(next(iter(values.values()))), dtype=torch.float64)
    for constraint, weight in with_lambdas(constraints, lambdas):
        if isinstance(constraint, Moment) and math.isfinite(weight):
            total = total + weight * constraint.statistic(values)
        else:
            total = total.masked_fill(~allowed(constraint, values), -math.inf)
    return total


def hard_edge(moment: Moment) -> float | None:
    """Return the infinite λ of a moment on an edge, inf for 1 and -inf for 0; None for others."""
    if moment.feature.binary is False or moment.target not in (0.0, 1.0):
        return None
    return math.inf if moment.target else -math.inf


def soft_moments(constraints: Sequence[Constraint], lambdas: Tensor) -> list[Moment]:
    """Return the moments with a finite λ."""
    pairs = with_lambdas(constraints, lambdas)
    return [c for c, weight in pairs if isinstance(c, Moment) and math.isfinite(weight)]


def statistics(moments: Sequence[Moment], values: Values) -> Tensor:
    """Return the columns whose means the moments constrain, float64 `(N, K)`."""
    n = len(next(iter(values.values())))
    columns = [m.statistic(values) for m in moments]
    return torch.stack(columns, dim=1) if columns else torch.zeros(n, 0, dtype=torch.float64)


def constraint_mean(
    constraint: Constraint,
    values: Values,
    log_w: Tensor | None = None,
    strata: Tensor | None = None,
) -> Score:
    """Return the mean of a constraint's feature, among the texts with its condition if it has one.

    Args:
        constraint: names the feature, and the condition of a conditional moment.
        values: feature values `(N,)` by name.
        log_w: log-weights `(N,)`, nats, up to a constant; None weighs all texts alike.
        strata: as in `log_weights.mean`.

    Returns:
        Score in the feature's unit, `n` texts with weight and condition; NaN if there is none.
    """
    column = values[constraint.feature.name]
    weights = torch.zeros_like(column) if log_w is None else log_w
    if isinstance(constraint, Moment) and constraint.given is not None:
        weights = weights.masked_fill(values[constraint.given.name] == 0, -math.inf)
    counted = weights > -math.inf
    n = int(counted.sum())
    if strata is None and n:
        # For independent texts of one distribution, those that count are a sample of size n.
        weights, column = weights[counted], column[counted]
    value, stderr = log_weights.mean(weights, column, strata)
    return Score(value, stderr, n)


def allowed(constraint: Constraint, values: Values) -> Tensor:
    """Return where a hard constraint holds, bool `(N,)`."""
    if isinstance(constraint, Pointwise):
        return constraint.holds(values)
    met = Pointwise(constraint.feature).holds(values) == (constraint.target == 1)
    if constraint.given is None:
        return met
    return met | ~Pointwise(constraint.given).holds(values)


def checked_lambdas(lambdas: Sequence[float] | Tensor, moments: Sequence[Moment]) -> Tensor:
    """Return a copy of λ as float64 `(K,)`.

    Raises:
        ValueError: it is not one number a moment, or infinite where no hard factor is meant.
    """
    checked = torch.as_tensor(lambdas, dtype=torch.float64).clone()
    if checked.shape != (len(moments),) or bool(checked.isnan().any()):
        raise ValueError(
            f"lambdas must be {len(moments)} numbers, one for each of "
            f"{[m.name for m in moments]}; got {checked.tolist()}"
        )
    for moment, weight in zip(moments, checked.tolist(), strict=True):
        if math.isinf(weight) and hard_edge(moment) != weight:
            raise ValueError(
                f"lambda {weight} makes {moment.name!r} a hard factor, which needs a binary "
                f"feature with target 1 (lambda inf) or 0 (lambda -inf), not {moment.target}"
            )
    return checked


def distinct_features(constraints: Sequence[Constraint]) -> list[Feature]:
    """Return the features of all constraints, each once.

    Raises:
        TypeError: constraints holds something other than constraints.
        ValueError: there are no constraints, or different features have one name.
    """
    if not constraints:
        raise ValueError("an EBM needs at least one Pointwise or Moment, got no constraints")
    features: dict[str, Feature] = {}
    for constraint in constraints:
        if not isinstance(constraint, Pointwise | Moment):
            raise TypeError(
                f"constraints must be Pointwise or Moment, got {constraint!r}; wrap a feature in "
                "dmgen.Pointwise(feature) or dmgen.Moment(feature, target)"
            )
        for feature in constraint.features:
            if features.setdefault(feature.name, feature) != feature:
                raise ValueError(
                    f"two different features are called {feature.name!r}: give one another name="
                )
    return list(features.values())
