"""Features from pipelines of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmgen.constraints.feature import Feature
from dmgen.features.labels import Threshold, Wanted, labelled, wanted
from dmgen.validation import check_integer


@dataclass(frozen=True)
class _Pipeline:
    pipe: Any
    labels: tuple[str, ...]
    wanted: Wanted
    batch_size: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        results = self.pipe(list(texts), top_k=None, truncation=True, batch_size=self.batch_size)
        by_label = [{one["label"]: one["score"] for one in scores} for scores in results]
        rows = [[scores[label] for label in self.labels] for scores in by_label]
        return self.wanted(torch.tensor(rows, dtype=torch.float64))


def from_pipeline(
    pipe: Any,
    label: str | Sequence[str],
    *,
    threshold: Threshold = "argmax",
    name: str | None = None,
    batch_size: int = 32,
) -> Feature:
    """Return the feature "a pipeline of transformers gives the text this label".

    Args:
        pipe: a `transformers.pipeline("text-classification", ...)`. Its tokenizer truncates texts
            longer than its model reads.
        label: a label of its model (`pipe.model.config.id2label`), or several of which one must be
            predicted.
        threshold: "argmax" for the label with the greatest score, or a number in (0, 1] that the
            score must reach, or None for the score itself (a feature that is not binary).
        name: the feature's name; None for the label.
        batch_size: texts a forward pass; more than 1 needs a tokenizer with a padding token.

    Raises:
        TypeError: pipe has no model with labels.
        ValueError: a label is not among them, or threshold or batch_size is out of range.
    """
    try:
        labels = tuple(pipe.model.config.id2label.values())
    except AttributeError as error:
        raise TypeError(
            'from_pipeline needs a transformers.pipeline("text-classification", ...), got '
            f"{type(pipe).__name__}"
        ) from error
    batch_size = check_integer("batch_size", batch_size, least=1)
    decision = wanted(label, labels, threshold)
    fn = _Pipeline(pipe, labels, decision, batch_size)
    return labelled(fn, label, name, decision.binary)
