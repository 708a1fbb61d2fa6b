"""Features and constraints from plain values, as a configuration file writes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import isfunction, signature
from typing import Any

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature
from dmgen.features.classifier import lazy_classifier
from dmgen.features.classifier_head import Embed
from dmgen.features.labels import Threshold
from dmgen.validation import check_known, did_you_mean

Families = Mapping[str, Callable[..., Feature]]

CONSTRAINT_KEYS = ("pointwise", "moment", "target", "given")
CONSTRAINT_FORMS = (
    "{pointwise: {wordlist: sports}} or {moment: {gender: female}, target: 0.5, "
    "given: {wordlist: sports}} (given may be left out)"
)


def from_config(
    config: Mapping[str, Any],
    *,
    embed: Callable[[str], Embed] | None = None,
    families: Families | None = None,
) -> Feature:
    """Return the feature that a mapping describes: `{"gender": "female"}`, `{"word": "amazing"}`.

    No file is read: a classifier reads its head when it is first called.

    Args:
        config: the name of a family and its argument; several arguments as a mapping,
            `{"wordlist": {"words": ["goal", "keeper"], "name": "goals"}}`. A classifier is
            `{"classifier": {"head": FOLDER, "label": "positive"}}`.
        embed: name of a base, as in a classifier's head, to the function that embeds texts with
            it. Without it a classifier can be declared, and raises when it is called.
        families: further families by name: functions that return a `Feature`.

    Returns:
        The feature; its `config` gives an equal one again.

    Raises:
        TypeError: config is not a mapping, or the family refuses the type of its argument.
        ValueError: config is not exactly one known family with known arguments (the nearest known
            name is suggested), the family refuses its argument, or one of `families` has the name
            of a built-in one.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f'a feature is written like {{"gender": "female"}}, got {config!r}')
    if len(config) != 1:
        raise ValueError(f"a feature has exactly one kind, got {dict(config)!r}")
    ((kind, argument),) = config.items()
    known = _families(embed, families or {})
    check_known(kind, sorted(known), "kind of feature")
    make = known[kind]
    options = argument if isinstance(argument, Mapping) else None
    for key in options or ():
        check_known(key, list(signature(make).parameters), f"argument of {kind}")
    try:
        bound = signature(make).bind(*([argument] if options is None else []), **options or {})
    except TypeError as error:
        raise ValueError(f"{kind}: {error}, got {argument!r}") from error
    feature = make(*bound.args, **bound.kwargs)
    return replace(feature, config=dict(config)) if feature.config is None else feature


def constraint_from_config(
    config: Mapping[str, Any],
    *,
    where: str = "a constraint",
    embed: Callable[[str], Embed] | None = None,
    families: Families | None = None,
) -> Pointwise | Moment:
    """Return the constraint that a mapping describes.

    Args:
        config: `{"pointwise": FEATURE}` or `{"moment": FEATURE, "target": T}`, the latter with
            `"given": FEATURE` if it is conditional; T is a number or `[low, high]`, FEATURE a
            mapping that `from_config` reads.
        where: place of the mapping, with which messages begin: "constraints.0".
        embed: as in `from_config`.
        families: as in `from_config`.

    Raises:
        TypeError: config is not a mapping, or a value has the wrong type.
        ValueError: a key is unknown or missing, or a feature or target is not a legal one.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"{where}: a constraint is {CONSTRAINT_FORMS}, got {config!r}")
    for key in config:
        if key not in CONSTRAINT_KEYS:
            hint = did_you_mean(key, CONSTRAINT_KEYS) or "."
            there_are = f"There are {', '.join(CONSTRAINT_KEYS)}"
            raise ValueError(f"unknown key {key!r} in {where}{hint} {there_are}")
    if ("pointwise" in config) == ("moment" in config):
        raise ValueError(f"{where}: a constraint is {CONSTRAINT_FORMS}, got {config!r}")
    read = partial(from_config, embed=embed, families=families)
    try:
        if "pointwise" in config:
            if len(config) > 1:
                extra = ", ".join(key for key in config if key != "pointwise")
                raise ValueError(f"pointwise holds for every text and takes no {extra}")
            return Pointwise(read(config["pointwise"]))
        if "target" not in config:
            raise ValueError("a moment needs its target: a number, or an interval [low, high]")
        given = config.get("given")
        condition = None if given is None else read(given)
        return Moment(read(config["moment"]), config["target"], given=condition)
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from error


def _families(embed: Callable[[str], Embed] | None, added: Families) -> Families:
    """Return the public functions of dmgen.features that take plain values, and those added."""

    def classifier(
        head: str,
        label: str | Sequence[str],
        *,
        threshold: Threshold = "argmax",
        name: str | None = None,
        batch_size: int = 64,
    ) -> Feature:
        return lazy_classifier(
            head, label, load=embed, threshold=threshold, name=name, batch_size=batch_size
        )

    # The package imports this file, so it is looked up when it is complete.
    public = sys.modules[__package__ or "dmgen.features"]
    functions = {name: getattr(public, name) for name in public.__all__}
    built_in = {
        name: function
        for name, function in functions.items()
        # The others take objects of Python, or return something other than a feature.
        if isfunction(function) and not name.startswith(("from_", "fit_", "constraint_"))
    }
    for name in added:
        if name in built_in:
            raise ValueError(f"families: {name!r} is a family of dmgen already, take another name")
    return {**built_in, "classifier": classifier, **added}
