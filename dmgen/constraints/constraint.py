"""Constraints on the texts of a generator, made of features.

`Pointwise(f)` requires that f holds for every text, `Moment(f, target)` that its mean is `target`.
Both are declarations, checked when they are made, before any model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from dmgen.constraints.feature import Feature, FeatureError, feature


@dataclass(frozen=True, init=False)
class Pointwise:
    """The constraint that a binary feature holds for every text.

    Args:
        feature: a `Feature`, or a callable that has a name of its own.

    Raises:
        TypeError: if it is neither a `Feature` nor callable.
        ValueError: if it has no usable name, or was declared not binary.
    """

    feature: Feature

    def __init__(self, feature: Feature | Callable[..., Any]) -> None:
        object.__setattr__(self, "feature", _as_feature(feature, "Pointwise(feature)"))
        _refuse_not_binary(self.feature, "Pointwise")

    @property
    def name(self) -> str:
        """The feature's name."""
        return self.feature.name

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features whose values `holds` reads."""
        return (self.feature,)

    def holds(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return where the constraint is met, bool `(N,)`.

        Args:
            values: feature values `(N,)` by feature name.

        Raises:
            FeatureError: if a value is neither 0 nor 1.
        """
        return _indicator(self.feature, values, "Pointwise").bool()


@dataclass(frozen=True, init=False)
class Moment:
    """The constraint that the mean of a feature is `target`, among the texts with `given` if set.

    The conditional moment E[f | g] = t is one linear constraint, E[g (f - t)] = 0, so that each
    kind requires the mean of one column (`statistic`) to lie in `bounds`: one exponential family.

    Args:
        feature: a `Feature`, or a callable that has a name of its own.
        target: the mean, in the feature's unit and within [0, 1] for a binary one; or an interval
            (low, high): not binding while the mean is inside, else the nearest edge is the target.
        given: binary feature g of the texts that count; needs a single target.

    Raises:
        TypeError: if feature or given is not a feature, or target not a number or two.
        ValueError: if the target is not finite, an interval not low < high, a binary feature's
            target outside [0, 1], given declared not binary or the feature itself, or given
            combined with an interval (E[g (f - low)] >= 0 and E[g (f - high)] <= 0 constrain two
            different columns, which one column with bounds cannot express).
    """

    feature: Feature
    target: float | tuple[float, float]
    given: Feature | None

    def __init__(
        self,
        feature: Feature | Callable[..., Any],
        target: float | tuple[float, float],
        *,
        given: Feature | Callable[..., Any] | None = None,
    ) -> None:
        condition = None if given is None else _as_feature(given, "Moment(given=...)")
        object.__setattr__(self, "feature", _as_feature(feature, "Moment(feature, ...)"))
        object.__setattr__(self, "target", _as_target(target))
        object.__setattr__(self, "given", condition)
        edges = self.target if isinstance(self.target, tuple) else (self.target,)
        if self.feature.binary and not all(0 <= edge <= 1 for edge in edges):
            raise ValueError(
                f"feature {self.feature.name!r} is binary, so its mean lies in [0, 1]; "
                f"got the target {self.target}"
            )
        if self.given is None:
            return
        _refuse_not_binary(self.given, "Moment(given=...)")
        if self.given.name == self.feature.name:
            raise ValueError(f"feature {self.feature.name!r} cannot be its own condition")
        if isinstance(self.target, tuple):
            raise ValueError(
                f"an interval target {self.target} with given={self.given.name!r} is not "
                "supported: give a single target, the edge that the base is nearest to"
            )

    @property
    def name(self) -> str:
        """Feature, and condition if there is one: "female", "female | sports"."""
        return self.feature.name + (f" | {self.given.name}" if self.given else "")

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features whose values `statistic` reads."""
        return (self.feature, self.given) if self.given else (self.feature,)

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) between which the mean of `statistic` must be; equal for a single target."""
        if isinstance(self.target, tuple):
            return self.target
        return (0.0, 0.0) if self.given else (self.target, self.target)

    def statistic(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the column whose mean is constrained: f, or g (f - target); float64 `(N,)`.

        Args:
            values: feature values `(N,)` by feature name.

        Raises:
            FeatureError: if a value of `given` is neither 0 nor 1.
        """
        column = values[self.feature.name].double()
        if self.given is None or isinstance(self.target, tuple):
            return column
        return _indicator(self.given, values, "Moment(given=...)") * (column - self.target)


def _as_feature(fn: object, where: str) -> Feature:
    if isinstance(fn, Feature):
        return fn
    if not callable(fn):
        raise TypeError(f"{where} needs a Feature or a named function, got {fn!r}")
    return feature(fn)


def _as_target(target: object) -> float | tuple[float, float]:
    edges = tuple(target) if isinstance(target, tuple | list) else (target,)
    if isinstance(target, tuple | list) and len(edges) != 2:
        raise TypeError(f"an interval target is (low, high), got {target!r}")
    for edge in edges:
        if not isinstance(edge, Real) or isinstance(edge, bool):
            raise TypeError(f"a target is a number or an interval (low, high), got {target!r}")
        if not math.isfinite(edge):
            raise ValueError(f"a target must be finite, got {target!r}")
    if len(edges) == 1:
        return float(edges[0])
    if not edges[0] < edges[1]:
        raise ValueError(f"an interval target needs low < high, got {target!r}")
    return float(edges[0]), float(edges[1])


def _refuse_not_binary(feature: Feature, where: str) -> None:
    if feature.binary is False:
        raise ValueError(
            f"{where} needs a feature that is 0 or 1, but {feature.name!r} was declared a number; "
            "compare it with a threshold in a feature of its own"
        )


def _indicator(feature: Feature, values: Mapping[str, Tensor], where: str) -> Tensor:
    column = values[feature.name].double()
    bad = column[(column != 0) & (column != 1)]
    if len(bad):
        raise FeatureError(
            f"{where} needs a feature that is 0 or 1, but {feature.name!r} gave {bad[0].item():g}; "
            "compare it with a threshold in a feature of its own"
        )
    return column
