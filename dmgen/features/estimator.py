"""Features from classifiers of scikit-learn's kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmgen.constraints.feature import Feature
from dmgen.features.labels import Threshold, Wanted, labelled, wanted


@dataclass(frozen=True)
class _Estimator:
    estimator: Any
    labels: tuple[Any, ...]
    wanted: Wanted

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if self.wanted.threshold == "argmax":
            # Not the largest of predict_proba: an SVM's probabilities may disagree with predict.
            predicted = np.asarray(self.estimator.predict(list(texts))).tolist()
            rows = [[float(one == label) for label in self.labels] for one in predicted]
        else:
            rows = np.asarray(self.estimator.predict_proba(list(texts))).tolist()
        return self.wanted(torch.tensor(rows, dtype=torch.float64))


def from_estimator(
    estimator: Any,
    label: Any,
    *,
    threshold: Threshold = "argmax",
    name: str | None = None,
) -> Feature:
    """Return the feature "a fitted classifier of scikit-learn's kind gives the text this label".

    Args:
        estimator: fitted on raw texts, such as `make_pipeline(TfidfVectorizer(),
            LogisticRegression()).fit(texts, labels)`: it has `classes_`, `predict(texts)`, and
            `predict_proba(texts)` if threshold is not "argmax".
        label: one of its classes, or a list, tuple or set of which one must be predicted.
        threshold: "argmax" for the result of `predict`, or a number in (0, 1] that the probability
            must reach, or None for the probability itself (a feature that is not binary).
        name: the feature's name; None for the label.

    Raises:
        TypeError: the estimator lacks one of these, so it is not fitted or of another kind.
        ValueError: a label is not among its classes, or threshold is out of range.
    """
    method = "predict" if threshold == "argmax" else "predict_proba"
    for needed in ("classes_", method):
        if not hasattr(estimator, needed):
            raise TypeError(
                f"from_estimator with threshold={threshold!r} needs a fitted classifier with "
                f"classes_ and {method}; {type(estimator).__name__} has no {needed}"
            )
    labels = tuple(np.asarray(estimator.classes_).tolist())
    decision = wanted(label, labels, threshold)
    return labelled(_Estimator(estimator, labels, decision), label, name, decision.binary)
