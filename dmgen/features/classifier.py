"""The feature that a classifier on the hidden states of a frozen language model defines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dmgen.constraints.feature import Feature
from dmgen.features.classifier_head import ClassifierHead, Embed, embedded
from dmgen.features.labels import Threshold, Wanted, check_threshold, label_name, several, wanted
from dmgen.validation import check_integer


@dataclass(frozen=True)
class _Classifier:
    head: ClassifierHead
    embed: Embed
    wanted: Wanted
    batch_size: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        parts = embedded(self.embed, list(texts), self.batch_size)
        return torch.cat([self.wanted(self.head.log_prob(hidden).exp()) for hidden in parts])


@dataclass(frozen=True)
class _Lazy:
    """A classifier whose head and model are read when it is first called."""

    folder: str
    label: str | Sequence[str]
    threshold: Threshold
    batch_size: int
    load: Callable[[str], Embed] | None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self._classifier(texts)

    @cached_property
    def _classifier(self) -> _Classifier:
        head = ClassifierHead.from_pretrained(self.folder)
        try:
            decision = wanted(self.label, head.labels, self.threshold)
        except ValueError as error:
            raise ValueError(f"the classifier head in {self.folder!r}: {error}") from error
        if not head.base:
            raise ValueError(
                f'{self.folder}/head.json must name the model whose states it reads, "base"'
            )
        if self.load is None:
            raise ValueError(
                f"the classifier in {self.folder!r} was declared without its model, {head.base!r}: "
                "pass features.from_config(..., embed=...) to have it loaded"
            )
        return _Classifier(head, self.load(head.base), decision, self.batch_size)


def classifier(
    head: ClassifierHead | str | Path,
    embed: Embed,
    label: str | Sequence[str],
    *,
    threshold: Threshold = "argmax",
    name: str | None = None,
    batch_size: int = 64,
) -> Feature:
    """Return the feature "a classifier gives the text this label".

    The classifier is linear in the mean hidden state of a frozen language model; by default the
    feature holds where the wanted label (or one of several) is the most probable, as in the papers.

    Args:
        head: the classifier, or the folder it was saved in; `fit_classifier` makes one.
        embed: texts to their mean hidden states `(N, D)`, of the model that the head was fitted on.
        label: a label of the head, or several of which one must be predicted.
        threshold: "argmax", or a number in (0, 1] that the labels' probability must reach, or None
            for this probability itself (a feature that is not binary).
        name: the feature's name; None for the label.
        batch_size: texts embedded at once.

    Raises:
        TypeError: embed is no function, or threshold is of none of these kinds.
        ValueError: there is no head in the folder, the label is not one of the head's or is its
            only one, or threshold or batch_size is out of range.

    Source:
        Khalifa, Elsahar, Dymetman (2021), arXiv:2012.11635, whose classifier constraints are heads
        of this kind.

    Differs from the paper:
        States are averaged over the text's own tokens and never over padding, which in the released
        code made a value depend on the other texts of its batch.
    """
    if not callable(embed):
        raise TypeError(f"embed must be a function from texts to hidden states, got {embed!r}")
    batch_size = check_integer("batch_size", batch_size, least=1)
    loaded = head if isinstance(head, ClassifierHead) else ClassifierHead.from_pretrained(head)
    decision = wanted(label, loaded.labels, threshold)
    config = None
    if not isinstance(head, ClassifierHead):
        options = {"threshold": threshold, "name": name, "batch_size": batch_size}
        config = _yaml_form(str(head), label, **options)
    return Feature(
        _Classifier(loaded, embed, decision, batch_size),
        label_name(label) if name is None else name,
        batched=True,
        binary=decision.binary,
        config=config,
    )


def lazy_classifier(
    head: str,
    label: str | Sequence[str],
    *,
    load: Callable[[str], Embed] | None,
    threshold: Threshold = "argmax",
    name: str | None = None,
    batch_size: int = 64,
) -> Feature:
    """Return `classifier` for a folder that is read when the feature is first called.

    `load` then gets the name of the head's base and returns the function that embeds texts with it;
    None is for a feature that is only declared. Errors as in `classifier`, without the head's.
    """
    labels = [label] if isinstance(label, str) else label
    if not isinstance(labels, list | tuple) or not all(isinstance(one, str) for one in labels):
        raise TypeError(f"label must be text or a list of texts, got {label!r}")
    if not isinstance(head, str):
        raise TypeError(f"head must be the folder of a classifier head, got {head!r}")
    if not labels:
        raise ValueError("a classifier needs at least one label, got none")
    check_threshold(threshold)
    batch_size = check_integer("batch_size", batch_size, least=1)
    label = list(labels) if len(labels) > 1 else labels[0]
    noun = f"classifier {head}, {label_name(label)}" if name is None else name
    options = {"threshold": threshold, "name": name, "batch_size": batch_size}
    return Feature(
        _Lazy(head, label, threshold, batch_size, load),
        label_name(label) if name is None else name,
        batched=True,
        binary=threshold is not None,
        phrase=(f"has {noun}", f"have {noun}"),
        noun=noun,
        config=_yaml_form(head, label, **options),
    )


def _yaml_form(head: str, label: object, **options: object) -> dict[str, object]:
    labels = several(label)
    defaults = {"threshold": "argmax", "name": None, "batch_size": 64}
    chosen = {key: value for key, value in options.items() if value != defaults[key]}
    return {"classifier": {"head": head, "label": labels if labels[1:] else labels[0], **chosen}}
