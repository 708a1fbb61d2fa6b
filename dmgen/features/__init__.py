"""Ready-made features, a family a file; any other is `dmgen.feature(function, name=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

from dmgen.constraints import Feature
from dmgen.features.lengths import length
from dmgen.features.pronouns import gender, gender_gdc
from dmgen.features.words import regex, word, wordlist

__all__ = ["from_config", "gender", "gender_gdc", "length", "regex", "word", "wordlist"]

_KINDS: dict[str, Callable[..., Feature]] = {
    "gender": gender,
    "gender_gdc": gender_gdc,
    "length": length,
    "regex": regex,
    "word": word,
    "wordlist": wordlist,
}


def from_config(config: Mapping[str, Any]) -> Feature:
    """Return the feature that a configuration names: `{"gender": "female"}`, `{"word": "amazing"}`.

    Args:
        config: one kind of feature and its argument; several arguments as a mapping,
            `{"wordlist": {"words": ["goal", "keeper"], "name": "goals"}}`.

    Raises:
        TypeError: if it is not a mapping.
        ValueError: if it is not exactly one known kind with known arguments (the nearest known
            name is suggested), or the kind refuses its argument.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f'a feature is written like {{"gender": "female"}}, got {config!r}')
    if len(config) != 1:
        raise ValueError(f"a feature has exactly one kind, got {dict(config)!r}")
    ((kind, argument),) = config.items()
    _refuse_unknown(kind, list(_KINDS), "kind of feature")
    make = _KINDS[kind]
    if not isinstance(argument, Mapping):
        return make(argument)
    known = list(signature(make).parameters)
    for key in argument:
        _refuse_unknown(key, known, f"argument of {kind}")
    try:
        signature(make).bind(**argument)
    except TypeError as error:
        raise ValueError(f"{kind}: {error}, got {dict(argument)!r}") from error
    return make(**argument)


def _refuse_unknown(name: object, known: list[str], what: str) -> None:
    if name in known:
        return
    close = get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"unknown {what} {name!r}{hint} There are {', '.join(known)}")
