"""Constraints as rows of plain values in `target.json`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature
from dmgen.features.config import from_config
from dmgen.target.plain import plain

_DESCRIPTION = ("binary", "phrase", "noun", "config")


@dataclass(frozen=True)
class _Missing:
    reason: str

    def __call__(self, texts: Sequence[str]) -> NoReturn:
        raise ValueError(self.reason)


def row(constraint: Pointwise | Moment, weight: float) -> dict[str, Any]:
    """Return name, target and λ of a constraint; λ as text, for JSON has no infinities."""
    if isinstance(constraint, Pointwise):
        return {"pointwise": constraint.name}
    return {"moment": constraint.name, "target": constraint.target, "lambda": repr(weight)}


def full_row(constraint: Pointwise | Moment, weight: float) -> dict[str, Any]:
    """Return `row` as plain values, with the constraint's features."""
    features = {"feature": _feature_row(constraint.feature)}
    if isinstance(constraint, Moment) and constraint.given is not None:
        features["given"] = _feature_row(constraint.given)
    facts: dict[str, Any] = plain(row(constraint, weight))
    return facts | features


def constraint_of(facts: Mapping[str, Any]) -> Pointwise | Moment:
    """Return the constraint of a row; one of version 0.1 has names and no features."""
    name = facts.get("pointwise", facts.get("moment"))
    if not isinstance(name, str) or ("moment" in facts and not {"target", "lambda"} <= set(facts)):
        raise ValueError(
            f"a constraint has 'pointwise', or 'moment' with 'target' and 'lambda', got {facts!r}"
        )
    feature, given = facts.get("feature"), facts.get("given")
    if feature is None:
        # "female | sports": a feature and its condition, neither of which 0.1 wrote by itself.
        feature_name, _, condition = name.partition(" | ") if "moment" in facts else (name, "", "")
        feature, given = {"name": feature_name}, {"name": condition} if condition else None
    if "pointwise" in facts:
        return Pointwise(_feature_of(feature))
    condition_feature = None if given is None else _feature_of(given)
    return Moment(_feature_of(feature), facts["target"], given=condition_feature)


def check_same(
    constraints: Sequence[Pointwise | Moment], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Raise ValueError unless name and target of each constraint are those of its row."""
    wanted = [{k: v for k, v in plain(row(c, 0.0)).items() if k != "lambda"} for c in constraints]
    stored = [{k: r[k] for k in ("pointwise", "moment", "target") if k in r} for r in rows]
    if wanted != stored:
        raise ValueError(f"it holds another target: {stored}, not the constraints {wanted}")


def _feature_row(feature: Feature) -> dict[str, Any]:
    facts = {key: getattr(feature, key) for key in _DESCRIPTION}
    kept: dict[str, Any] = plain({key: value for key, value in facts.items() if value is not None})
    return {"name": feature.name} | kept


def _feature_of(facts: Mapping[str, Any]) -> Feature:
    """Return the feature of its YAML form, else a placeholder."""
    name, phrase, config = facts["name"], facts.get("phrase"), facts.get("config")
    reason = "it exists only in Python: pass the constraints to load a target that can evaluate it"
    feature = None
    if config is not None:
        try:
            feature = from_config(config)
        except (ImportError, TypeError, ValueError) as error:
            reason = f"it cannot be made here, pass the constraints: {error}"
    return replace(
        feature or Feature(_Missing(reason), name, batched=True),
        name=name,
        binary=facts.get("binary"),
        phrase=None if phrase is None else (phrase[0], phrase[1]),
        noun=facts.get("noun"),
        config=config,
    )
