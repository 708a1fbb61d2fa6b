"""Features of texts, and constraints on a generator made of them."""

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature, FeatureError, feature

__all__ = ["Feature", "FeatureError", "Moment", "Pointwise", "feature"]
