"""`TargetFit`: constraints with their λ and its errors, the fit of λ, and its form on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmgen import storage
from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature
from dmgen.estimates import weights as log_weights
from dmgen.estimates.score import Score
from dmgen.target import constraint_rows
from dmgen.target.factor import (
    Constraint,
    Values,
    allowed,
    checked_lambdas,
    constraint_mean,
    distinct_features,
    hard_edge,
    log_factor,
    soft_moments,
    statistics,
    with_lambdas,
)
from dmgen.target.moment_fit import MomentFit
from dmgen.target.moments import MomentsUnreachable, fit_lambdas
from dmgen.target.plain import plain, read_score

_FILE = "target.json"
_KEYS = ("constraints", "prompt", "max_new_tokens", "log_z", "base_moments")


@dataclass(frozen=True, eq=False)
class TargetFit:
    """A target distribution without its base: constraints, their λ, and the fit of λ.

    Two fits are equal when `to_dict` is: by the names, targets and YAML forms of the constraints
    and by all numbers, NaN counting as equal to NaN. `print` shows the table of `EBM`.

    Args:
        constraints: `Pointwise` and `Moment` declarations; different features need different names.
        lambdas: one a `Moment`, in their order, `(K,)`, nats; ±inf for a hard factor.
        prompt: the prompt of every text.
        max_new_tokens: the longest text in tokens.
        moment_fit: the fit of λ, a row for each soft `Moment`; None for λ from elsewhere.
        log_z: log Z against the base, nats; None if unknown.
        base_moments: mean of each constraint's feature under the base, by the constraint's name.

    Raises:
        TypeError: constraints holds something other than constraints.
        ValueError: there are no constraints, two features share a name, the number of lambdas is
            not that of the moments, or one is infinite where no hard factor is meant.
    """

    constraints: Sequence[Constraint]
    lambdas: Tensor
    prompt: str
    max_new_tokens: int
    moment_fit: MomentFit | None = None
    log_z: Score | None = None
    base_moments: Mapping[str, Score] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "constraints", tuple(self.constraints))
        object.__setattr__(self, "max_new_tokens", int(self.max_new_tokens))
        object.__setattr__(self, "base_moments", dict(self.base_moments))
        distinct_features(self.constraints)
        object.__setattr__(self, "lambdas", checked_lambdas(self.lambdas, self.moments))

    @property
    def moments(self) -> list[Moment]:
        """The `Moment` constraints, in the order of `lambdas`."""
        return [c for c in self.constraints if isinstance(c, Moment)]

    @property
    def features(self) -> list[Feature]:
        """The features of all constraints, each once."""
        return distinct_features(self.constraints)

    def with_heldout(self, values: Values, log_w: Tensor) -> TargetFit:
        """Return this fit with the moments of texts that did not shape λ.

        Args:
            values: feature values `(N,)` by name.
            log_w: log a − log q of each text, `(N,)`, nats.
        """
        if self.moment_fit is None:
            return self
        hard_part = torch.where(self.lambdas.isfinite(), 0.0, self.lambdas)
        log_w = log_w + log_factor(self.constraints, hard_part, values)
        columns = statistics(soft_moments(self.constraints, self.lambdas), values)
        return replace(self, moment_fit=self.moment_fit.with_heldout(columns, log_w))

    def to_dict(self) -> dict[str, Any]:
        """Return the fit as plain values for JSON, which `from_dict` reads.

        Each constraint holds its features with name, phrase and YAML form. λ is text, so that it is
        exact and may be infinite; so are other numbers that are not finite.
        """
        return {
            "constraints": [
                constraint_rows.full_row(constraint, weight)
                for constraint, weight in with_lambdas(self.constraints, self.lambdas)
            ],
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "log_z": plain(self.log_z),
            "base_moments": plain(self.base_moments),
            "moment_fit": None if self.moment_fit is None else self.moment_fit.to_dict(),
        }

    @classmethod
    def from_dict(
        cls, mapping: Mapping[str, Any], constraints: Sequence[Constraint] | None = None
    ) -> TargetFit:
        """Return the fit that `to_dict` wrote, or `target.json` of version 0.1 holds.

        Args:
            mapping: the plain values.
            constraints: the constraints as objects. None makes them from the YAML forms in the
                mapping, reading no other file; a feature that has none, or whose family is not one
                of dmgen's, is a placeholder with its name that raises FeatureError when called.

        Raises:
            ValueError: a key is missing, or the constraints differ in number, order, name or target
                from those in the mapping.
        """
        for key in _KEYS:
            if key not in mapping:
                raise ValueError(f"a target has {', '.join(_KEYS)}; {key!r} is missing")
        rows = mapping["constraints"]
        if constraints is None:
            constraints = [constraint_rows.constraint_of(row) for row in rows]
        else:
            constraint_rows.check_same(constraints, rows)
        moment_fit, log_z = mapping.get("moment_fit"), mapping["log_z"]
        return cls(
            constraints,
            torch.tensor([float(r["lambda"]) for r in rows if "lambda" in r], dtype=torch.float64),
            mapping["prompt"],
            mapping["max_new_tokens"],
            MomentFit.from_dict(moment_fit) if moment_fit else None,
            read_score(log_z) if log_z else None,
            {name: read_score(row) for name, row in mapping["base_moments"].items()},
        )

    def save(self, folder: str | Path) -> None:
        """Write `target.json` into the folder, which is created if missing."""
        storage.write_json(Path(folder) / _FILE, self.to_dict())

    @classmethod
    def load(cls, folder: str | Path, constraints: Sequence[Constraint] | None = None) -> TargetFit:
        """Return the fit that `save` wrote.

        Args:
            folder: the folder of `target.json`.
            constraints: as in `from_dict`.

        Raises:
            ValueError: the file is missing, damaged, or refused by `from_dict`; the message names
                it.
        """
        path = Path(folder) / _FILE
        if not path.is_file():
            raise ValueError(f"there is no target in {folder}: {path} is missing")
        mapping = storage.read_json(path)
        try:
            return cls.from_dict(mapping, constraints)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TargetFit):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __str__(self) -> str:
        """Return constraints with base rate and λ, a line each, and below them the fit of λ."""
        width = max(len(c.name) for c in self.constraints)
        lines = []
        for constraint, weight in with_lambdas(self.constraints, self.lambdas):
            base = self.base_moments.get(constraint.name)
            line = f"{constraint.name:{width}}  {_target_text(constraint):16}"
            line += "" if base is None else f"  base {base!s:18}"
            lines.append(line + ("  hard" if math.isinf(weight) else f"  lambda {weight:.4g}"))
        return "\n".join(lines + self._fit_lines())

    def _fit_lines(self) -> list[str]:
        fit = self.moment_fit
        if fit is None:
            return [] if self.log_z is None else [f"log Z {self.log_z}"]
        soft = soft_moments(self.constraints, self.lambdas)
        if not soft:
            kl = Score(fit.kl_target_base, fit.kl_target_base_stderr, fit.n_samples)
            return [
                f"ESS {fit.ess:,.0f} of {fit.n_samples:,} samples · log Z {self.log_z} · "
                f"KL(p‖a) {kl} nats"
            ]
        lines = ["", str(fit)]
        if len(soft) < len(self.constraints):
            lines.append("base moments and hits are those of texts within the hard constraints")
        return lines + [
            f"{m.name!r} is the mean of {m.given.name} · ({m.feature.name} − {m.target:g})"
            for m in soft
            if m.given is not None
        ]


def fit(
    constraints: Sequence[Constraint],
    values: Values,
    log_w: Tensor,
    *,
    binary: Mapping[str, bool],
    prompt: str,
    max_new_tokens: int,
    strata: Tensor | None = None,
) -> TargetFit:
    """Return λ of the constraints on texts with log-weights a/q; moments on an edge become hard.

    Args:
        constraints: the constraints.
        values: feature values `(N,)` by name.
        log_w: log a − log q of each text, `(N,)`, nats; a and q normalised.
        binary: whether each feature is binary, by name.
        prompt: that of the texts.
        max_new_tokens: that of the texts.
        strata: as in `log_weights.log_z`.

    Raises:
        MomentsUnreachable: no λ gives these moments on these texts.
    """
    moments = [c for c in constraints if isinstance(c, Moment)]
    edges = [hard_edge(m) if binary[m.feature.name] else None for m in moments]
    lambdas = torch.tensor([edge or 0.0 for edge in edges], dtype=torch.float64)
    log_hard = log_w + log_factor(constraints, lambdas, values)
    if not bool((log_hard > -math.inf).any()):
        raise MomentsUnreachable(_nothing_left(constraints, lambdas, values, log_w))
    soft = soft_moments(constraints, lambdas)
    for moment in soft:
        _check_condition(moment, values, log_hard)
    soft_fit = fit_lambdas(
        statistics(soft, values),
        torch.tensor([m.bounds for m in soft], dtype=torch.float64).reshape(-1, 2),
        log_hard,
        names=[m.name for m in soft],
    )
    lambdas[lambdas.isfinite()] = torch.as_tensor(soft_fit.lambdas)
    weights = log_w + log_factor(constraints, lambdas, values)
    log_z = Score(*log_weights.log_z(weights, strata), n=len(log_w))
    # `soft_fit` refers to the texts that satisfy the pointwise part, log Z and KL(p‖a) to all. λ is
    # at the minimum of the dual, so its own error enters KL(p‖a) in second order; the first-order
    # error is that of log Z at this λ.
    moment_fit = replace(
        soft_fit,
        log_z=log_z.value,
        log_z_stderr=log_z.stderr,
        kl_target_base=float(soft_fit.lambdas @ soft_fit.moments) - log_z.value,
        kl_target_base_stderr=log_z.stderr,
    )
    means = {c.name: constraint_mean(c, values, log_w, strata) for c in constraints}
    return TargetFit(
        constraints, lambdas, prompt, max_new_tokens, moment_fit, log_z, base_moments=means
    )


def _nothing_left(
    constraints: Sequence[Constraint], lambdas: Tensor, values: Values, log_w: Tensor
) -> str:
    """Return the message that no text is left, with the counts of each hard constraint alone."""
    weighted = log_w > -math.inf
    n_weighted = int(weighted.sum())
    if not n_weighted:
        return (
            f"the base assigns probability 0 to all {len(log_w):,} texts that the proposal drew: "
            "take a proposal that shares texts with the base"
        )
    held = ", ".join(
        f"{constraint.name!r} {int((allowed(constraint, values) & weighted).sum()):,} times"
        for constraint, weight in with_lambdas(constraints, lambdas)
        if math.isinf(weight)
    )
    return (
        f"none of {n_weighted:,} texts satisfies every hard constraint ({held}): draw more "
        "(n_samples=), draw from a model that shows them (proposal=), or request less"
    )


def _check_condition(moment: Moment, values: Values, log_w: Tensor) -> None:
    """Raise MomentsUnreachable for a conditional moment outside the range of the texts.

    Without a text that meets the condition, every λ would fit.
    """
    if moment.given is None or isinstance(moment.target, tuple):
        return
    weighted = log_w > -math.inf
    column = values[moment.feature.name][weighted & (values[moment.given.name] != 0)]
    low, high = (float(column.min()), float(column.max())) if len(column) else (math.nan, math.nan)
    if low < moment.target < high or low == moment.target == high:
        return
    what = f"goes from {low:g} to {high:g}" if low < high else f"is always {low:g}"
    among = f", and among them {moment.feature.name!r} {what}" if len(column) else ""
    raise MomentsUnreachable(
        f"a mean of {moment.target:g} is requested of {moment.name!r}, but {moment.given.name!r} "
        f"holds for {len(column):,} of {int(weighted.sum()):,} texts{among}: draw more "
        "(n_samples=), draw from a model that shows it (proposal=), or request less"
    )


def _target_text(constraint: Constraint) -> str:
    """Return the target of a constraint as text."""
    if isinstance(constraint, Pointwise):
        return "every text"
    if isinstance(constraint.target, tuple):
        return "mean {:g} to {:g}".format(*constraint.target)
    return f"mean {constraint.target:g}"
