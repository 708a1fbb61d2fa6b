"""Declarations of what a generator's texts must be like: features, and constraints on them."""

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature, FeatureError, feature

__all__ = ["Feature", "FeatureError", "Moment", "Pointwise", "feature"]
