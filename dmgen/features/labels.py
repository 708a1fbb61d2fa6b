"""The decision that all classifiers share: whether a text has the wanted label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dmgen.constraints.feature import Feature

__all__ = ["Threshold", "Wanted", "check_threshold", "label_name", "labelled", "several", "wanted"]

# "argmax": the most probable label is wanted; a number: P(wanted) reaches it; None: P itself.
Threshold = float | Literal["argmax"] | None

# Largest distance of a text's scores from a sum of 1: float32 rounding over many labels.
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Wanted:
    """The wanted columns of a table of label scores, and the threshold that they must reach."""

    columns: tuple[int, ...]
    threshold: Threshold

    @property
    def binary(self) -> bool:
        """True for a decision, False for a probability."""
        return self.threshold is not None

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the decision for each text, `(N,)`: bool, or float64 without a threshold.

        Args:
            scores: probability of each label, `(N, C)`.

        Raises:
            ValueError: several labels are wanted together, but scores do not sum to 1.
        """
        columns = list(self.columns)
        if self.threshold == "argmax":
            best = scores.argmax(dim=1, keepdim=True)  # (N, 1)
            return (best == scores.new_tensor(columns).long()).any(dim=1)
        together = scores[:, columns].sum(dim=1).double()  # (N,)
        off = (scores.sum(dim=1) - 1).abs()
        if len(columns) > 1 and bool((off > _SUM_TOLERANCE).any()):
            raise ValueError(
                f"the scores of a text's labels are off a sum of 1 by {off.max().item():.2g}, so "
                "the labels do not exclude one another and have no joint probability: take one "
                'label, or threshold="argmax"'
            )
        return together if self.threshold is None else together >= self.threshold


def wanted(label: object, known: Sequence[object], threshold: Threshold) -> Wanted:
    """Return the decision for one label, or for several as a list, tuple or set.

    Args:
        label: the wanted label or labels.
        known: the labels of the classifier, in the order of its scores.
        threshold: as in `Threshold`, a number in (0, 1].

    Raises:
        TypeError: threshold is of none of the three kinds.
        ValueError: a label is unknown or occurs twice in known, none or every one is wanted, or
            threshold is out of range.
    """
    labels = several(label)
    for one in labels:
        if known.count(one) != 1:
            twice = "twice " if one in known else ""
            raise ValueError(
                f"label {one!r} is {twice or 'not '}among those of the classifier: "
                f"{', '.join(map(repr, known))}"
            )
    columns = tuple(sorted({known.index(one) for one in labels}))
    check_threshold(threshold)
    # A classifier with a single score, a number of its own, may want every label it has.
    if not columns or (len(columns) == len(known) and (len(known) > 1 or threshold == "argmax")):
        raise ValueError(
            f"label {label!r} is {'every' if columns else 'no'} label of the classifier, so all "
            f"texts would be alike; there are {', '.join(map(repr, known))}"
        )
    return Wanted(columns, threshold)


def label_name(label: object) -> str:
    """Return the name of a feature after its label: "positive", "positive or very positive"."""
    return " or ".join(map(str, several(label)))


def several(label: object) -> list[object]:
    """Return one label, or several as a list, tuple or set, as a list; a set in order of text."""
    if isinstance(label, set | frozenset):
        return sorted(label, key=str)
    return list(label) if isinstance(label, list | tuple) else [label]


def check_threshold(threshold: object) -> None:
    """Refuse a threshold that is not one.

    Raises:
        TypeError: it is neither "argmax", a number nor None.
        ValueError: it is a number outside (0, 1].
    """
    if threshold is None or threshold == "argmax":
        return
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise TypeError(
            'threshold is "argmax" (the most probable label), a number, or None (the probability '
            f"itself), got {threshold!r}"
        )
    if not 0 < threshold <= 1:  # NaN is neither
        raise ValueError(f"threshold is a probability in (0, 1], got {threshold!r}")


def labelled(fn: Any, label: object, name: str | None, binary: bool) -> Feature:
    """Return a batched feature with this name, or for None with that of its label."""
    name = label_name(label) if name is None else name
    return Feature(fn, name, batched=True, binary=binary)
