"""Features as a configuration file names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from inspect import signature
from typing import Any

from torch import Tensor

from dmgen.constraints.feature import Feature
from dmgen.features.classifier import ClassifierHead, Embed, classifier
from dmgen.features.gender import gender, gender_gdc
from dmgen.features.labels import Threshold
from dmgen.features.length import length
from dmgen.features.readability import readability
from dmgen.features.sentiment import sentiment
from dmgen.features.wordlist import regex, word, wordlist

__all__ = ["from_config"]

_KINDS: dict[str, Callable[..., Feature]] = {
    "gender": gender,
    "gender_gdc": gender_gdc,
    "length": length,
    "readability": readability,
    "regex": regex,
    "sentiment": sentiment,
    "word": word,
    "wordlist": wordlist,
}


def from_config(
    config: Mapping[str, Any], *, embed: Callable[[str], Embed] | None = None
) -> Feature:
    """Return the feature that a configuration names: `{"gender": "female"}`, `{"word": "amazing"}`.

    Args:
        config: one kind of feature and its argument; several arguments as a mapping,
            `{"wordlist": {"words": ["goal", "keeper"], "name": "goals"}}`. A classifier is
            `{"classifier": {"head": FOLDER, "label": "positive"}}`.
        embed: from the name of a base, as a classifier's head has it, to the function that embeds
            texts with it; called when the classifier is first asked about a text. Without it a
            classifier can be declared and checked, but asked nothing.

    Raises:
        TypeError: if it is not a mapping.
        ValueError: if it is not exactly one known kind with known arguments (the nearest known
            name is suggested), or the kind refuses its argument.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f'a feature is written like {{"gender": "female"}}, got {config!r}')
    if len(config) != 1:
        raise ValueError(f"a feature has exactly one kind, got {dict(config)!r}")
    kinds = dict(sorted({**_KINDS, "classifier": _classifier(embed)}.items()))
    ((kind, argument),) = config.items()
    _refuse_unknown(kind, list(kinds), "kind of feature")
    make = kinds[kind]
    arguments = argument if isinstance(argument, Mapping) else None
    known = list(signature(make).parameters)
    for key in arguments or ():
        _refuse_unknown(key, known, f"argument of {kind}")
    try:
        bound = signature(make).bind(*([argument] if arguments is None else []), **arguments or {})
    except TypeError as error:
        raise ValueError(f"{kind}: {error}, got {argument!r}") from error
    return make(*bound.args, **bound.kwargs)


@dataclass(frozen=True)
class _Lazy:
    """An `Embed` that loads its model when it is first called."""

    base: str
    load: Callable[[str], Embed] | None

    def __call__(self, texts: list[str]) -> Tensor:
        return self._loaded(texts)

    @cached_property
    def _loaded(self) -> Embed:
        if self.load is None:
            raise ValueError(
                f"this classifier was declared without its model, {self.base!r}: pass "
                "features.from_config(..., embed=...) to have it loaded"
            )
        return self.load(self.base)


def _classifier(embed: Callable[[str], Embed] | None) -> Callable[..., Feature]:
    """`classifier` with a folder for its head, and the model that the head names."""

    def make(
        head: str,
        label: str | Sequence[str],
        *,
        threshold: Threshold = "argmax",
        name: str | None = None,
        batch_size: int = 64,
    ) -> Feature:
        loaded = ClassifierHead.from_pretrained(head)
        if not loaded.base:
            raise ValueError(f'{head}/head.json must name the base whose states it reads, "base"')
        lazy = _Lazy(loaded.base, embed)
        return classifier(
            loaded, lazy, label, threshold=threshold, name=name, batch_size=batch_size
        )

    return make


def _refuse_unknown(name: object, known: list[str], what: str) -> None:
    if name in known:
        return
    close = get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"unknown {what} {name!r}{hint} There are {', '.join(known)}")
