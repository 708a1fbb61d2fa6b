"""The factor `Π_j b_j(x) · e^{λ·φ(x)}` that constraints put on a base: its value, and the fit of λ.

Pure functions of feature values by name and log-weights; no model is needed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.estimates import weights as log_weights
from dmgen.estimates.score import Score
from dmgen.target.moments import MomentFit, MomentsUnreachable, fit_lambdas

__all__ = ["Constraint", "Fitted", "constraint_mean", "fit", "hard_edge", "log_factor"]

Constraint = Pointwise | Moment
Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What `fit` found.

    Attributes:
        lambdas: one a `Moment`, ±inf for those that became hard, float64.
        moment_fit: as in `EBM`.
        log_z: log Z against the base for these λ, nats.
        base_moments: mean of each constraint's feature under the base, by name.
    """

    lambdas: Tensor
    moment_fit: MomentFit
    log_z: Score
    base_moments: dict[str, Score]


def with_lambdas(
    constraints: Sequence[Constraint], lambdas: Tensor
) -> Iterator[tuple[Constraint, float]]:
    """Each constraint with its λ; inf for a `Pointwise`."""
    weights = iter(lambdas.tolist())
    for constraint in constraints:
        yield constraint, next(weights) if isinstance(constraint, Moment) else math.inf


def log_factor(constraints: Sequence[Constraint], lambdas: Tensor, values: Values) -> Tensor:
    """`Σ_j log b_j + λ·φ`, float64 `(N,)`, nats; `-inf` where a hard constraint is violated.

    Raises:
        FeatureError: the feature of a hard constraint is neither 0 nor 1.
    """
    total = torch.zeros(len(next(iter(values.values()))), dtype=torch.float64)
    for constraint, weight in with_lambdas(constraints, lambdas):
        if isinstance(constraint, Moment) and math.isfinite(weight):
            total = total + weight * constraint.statistic(values)
        else:
            total = total.masked_fill(~_allowed(constraint, values), -math.inf)
    return total


def hard_edge(moment: Moment) -> float | None:
    """The infinite λ of a moment on an edge, inf for 1 and -inf for 0; None for any other."""
    if moment.feature.binary is False or moment.target not in (0.0, 1.0):
        return None
    return math.inf if moment.target else -math.inf


def soft_moments(constraints: Sequence[Constraint], lambdas: Tensor) -> list[Moment]:
    """The moments with a finite λ."""
    pairs = with_lambdas(constraints, lambdas)
    return [c for c, weight in pairs if isinstance(c, Moment) and math.isfinite(weight)]


def statistics(moments: Sequence[Moment], values: Values) -> Tensor:
    """The columns whose means the moments constrain, float64 `(N, K)`."""
    n = len(next(iter(values.values())))
    columns = [m.statistic(values) for m in moments]
    return torch.stack(columns, dim=1) if columns else torch.zeros(n, 0, dtype=torch.float64)


def constraint_mean(
    constraint: Constraint,
    values: Values,
    log_w: Tensor | None = None,
    strata: Tensor | None = None,
) -> Score:
    """The mean of a constraint's feature, among the texts with its condition if it has one.

    Args:
        constraint: says which feature, and given what.
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
        # Independent texts of one law: those that count are a sample of their own, of size n.
        weights, column = weights[counted], column[counted]
    value, stderr = log_weights.mean(weights, column, strata)
    return Score(value, stderr, n)


def fit(
    constraints: Sequence[Constraint],
    values: Values,
    log_w: Tensor,
    *,
    binary: Mapping[str, bool],
    strata: Tensor | None = None,
) -> Fitted:
    """λ of the constraints on texts with log-weights a/q; moments on an edge become hard.

    Args:
        constraints: what is asked.
        values: feature values `(N,)` by name.
        log_w: log a − log q of each text, `(N,)`, nats; a and q normalised.
        binary: whether each feature is binary, by name.
        strata: as in `log_weights.log_z`.

    Raises:
        MomentsUnreachable: no λ gives these moments on these texts.
    """
    moments = [c for c in constraints if isinstance(c, Moment)]
    edges = [hard_edge(m) if binary[m.feature.name] else None for m in moments]
    lambdas = torch.tensor([edge or 0.0 for edge in edges], dtype=torch.float64)
    possible = log_w + log_factor(constraints, lambdas, values)
    if not bool((possible > -math.inf).any()):
        raise MomentsUnreachable(_nothing_left(constraints, lambdas, values, log_w))
    soft = soft_moments(constraints, lambdas)
    for moment in soft:
        _check_condition(moment, values, possible)
    found = fit_lambdas(
        statistics(soft, values),
        torch.tensor([m.bounds for m in soft], dtype=torch.float64).reshape(-1, 2),
        possible,
        names=[m.name for m in soft],
    )
    lambdas[lambdas.isfinite()] = torch.as_tensor(found.lambdas)
    weights = log_w + log_factor(constraints, lambdas, values)
    log_z = Score(*log_weights.log_z(weights, strata), n=len(log_w))
    # `found` knows only the texts that satisfy the pointwise part. λ is at the minimum of the dual,
    # so its own error moves KL(p‖a) in second order: what is left is that of log Z at this λ.
    whole = replace(
        found,
        log_z=log_z.value,
        log_z_stderr=log_z.stderr,
        kl_target_base=float(found.lambdas @ found.moments) - log_z.value,
        kl_target_base_stderr=log_z.stderr,
    )
    means = {c.name: constraint_mean(c, values, log_w, strata) for c in constraints}
    return Fitted(lambdas, whole, log_z, means)


def _allowed(constraint: Constraint, values: Values) -> Tensor:
    """Where a hard constraint holds, bool `(N,)`."""
    if isinstance(constraint, Pointwise):
        return constraint.holds(values)
    met = Pointwise(constraint.feature).holds(values) == (constraint.target == 1)
    if constraint.given is None:
        return met
    return met | ~Pointwise(constraint.given).holds(values)


def _nothing_left(
    constraints: Sequence[Constraint], lambdas: Tensor, values: Values, log_w: Tensor
) -> str:
    """Why no text was left: how often each hard constraint held by itself."""
    possible = log_w > -math.inf
    n_possible = int(possible.sum())
    if not n_possible:
        return (
            f"the base cannot say any of the {len(log_w):,} texts that the proposal drew: take a "
            "proposal that shares texts with the base"
        )
    held = ", ".join(
        f"{constraint.name!r} {int((_allowed(constraint, values) & possible).sum()):,} times"
        for constraint, weight in with_lambdas(constraints, lambdas)
        if math.isinf(weight)
    )
    return (
        f"none of {n_possible:,} texts satisfies every hard constraint ({held}): draw more "
        "(n_samples=), draw from a model that shows them (proposal=), or ask for less"
    )


def _check_condition(moment: Moment, values: Values, log_w: Tensor) -> None:
    """Refuses a conditional moment that the texts cannot show, in the user's own terms.

    Without a text that meets the condition every λ would seem to fit.
    """
    if moment.given is None or isinstance(moment.target, tuple):
        return
    possible = log_w > -math.inf
    seen = values[moment.feature.name][possible & (values[moment.given.name] != 0)]
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (math.nan, math.nan)
    if low < moment.target < high or low == moment.target == high:
        return
    what = f"goes from {low:g} to {high:g}" if low < high else f"is always {low:g}"
    among = f", and among them {moment.feature.name!r} {what}" if len(seen) else ""
    raise MomentsUnreachable(
        f"a mean of {moment.target:g} is asked of {moment.name!r}, but {moment.given.name!r} holds "
        f"for {len(seen):,} of {int(possible.sum()):,} texts{among}: draw more (n_samples=), draw "
        "from a model that shows it (proposal=), or ask for less"
    )
