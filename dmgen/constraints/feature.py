"""`Feature`: a named function from texts to numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

_QUOTE_LENGTH = 80


class FeatureError(ValueError):
    """A feature failed on a text or gave an unusable value; the message names both."""


@dataclass(frozen=True)
class Feature:
    """A named function from texts to numbers; made by `feature`.

    Two features are equal when all fields that compute something are: phrase, noun and config only
    describe the feature, and equality ignores them.

    Args:
        fn: `fn(text)`, or `fn(texts)` if batched; with the prompt(s) as second argument if
            `with_prompt`. It must be deterministic: values are cached by text.
        name: the feature's name in tables, metrics and checkpoints; not empty, one line.
        batched: fn takes a list of texts and returns as many values, in their order.
        with_prompt: fn also reads the prompt (declared here, never guessed from the signature).
        binary: True if the values can only be 0 or 1 (enforced), False if they are numbers, None
            if the values that fn returns decide (`evaluate`).
        pattern: regular expression whose matches make the feature hold, which a report marks.
        phrase: predicate of one text and of several, ("mentions sports", "mention sports"), from
            which a report makes sentences; None for "has NAME" and "have NAME".
        noun: the quantity of a feature that is a number, "length in words"; None for its name.
        config: YAML form, `{"wordlist": "sports"}`, which `features.from_config` reads; None for a
            feature that exists only in Python.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if the name is empty or has more than one line.
    """

    fn: Callable[..., Any] = field(hash=False)
    name: str
    batched: bool = False
    with_prompt: bool = False
    binary: bool | None = None
    pattern: re.Pattern[str] | None = None
    phrase: tuple[str, str] | None = field(default=None, compare=False)
    noun: str | None = field(default=None, compare=False)
    config: Mapping[str, Any] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.fn) or isinstance(self.fn, Feature):
            raise TypeError(f"a feature needs a function from text to number, got {self.fn!r}")
        if not isinstance(self.name, str):
            raise TypeError(f"a feature's name must be a string, got {self.name!r}")
        if not self.name.strip() or len(self.name.splitlines()) > 1:
            raise ValueError(f"a feature's name must be one line and not blank, got {self.name!r}")
        for flag in ("batched", "with_prompt"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"{flag} must be True or False, got {getattr(self, flag)!r}")
        if self.binary is not None and not isinstance(self.binary, bool):
            raise TypeError(f"binary must be True, False or None, got {self.binary!r}")
        if self.phrase is not None and (
            not isinstance(self.phrase, tuple) or list(map(type, self.phrase)) != [str, str]
        ):
            raise TypeError(
                "phrase must be the predicate of one text and of several, such as "
                f'("mentions sports", "mention sports"), got {self.phrase!r}'
            )

    def __call__(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Tensor:
        """Return the feature's values, float64 `(N,)`; see `evaluate` for arguments and errors."""
        return self.evaluate(texts, prompts)[0]

    def evaluate(
        self, texts: Sequence[str], prompts: Sequence[str] | None = None
    ) -> tuple[Tensor, bool]:
        """Return the values and whether they are binary.

        A feature itself never changes, so each result states whether it is binary: true if declared
        so, or if undeclared and every value of this call was a bool.

        Args:
            texts: N texts.
            prompts: the N prompts they continue; needed only by a feature that reads them.

        Returns:
            (values, binary): float64 `(N,)`, finite; binary is False for no texts, if undeclared.

        Raises:
            TypeError: if texts is a single string or holds something other than strings.
            ValueError: if the numbers of prompts and texts differ, or prompts are missing.
            FeatureError: if fn raises, returns something other than finite numbers (0 or 1 if
                declared binary), or a batched fn returns the wrong number of values.
        """
        texts = _strings(texts, "texts")
        arguments: list[list[str]] = [texts]
        if self.with_prompt:
            if prompts is None:
                raise ValueError(
                    f"feature {self.name!r} reads the prompt: pass prompts, one a text"
                )
            arguments.append(_strings(prompts, "prompts"))
            if len(arguments[1]) != len(texts):
                raise ValueError(f"got {len(texts)} texts but {len(arguments[1])} prompts")
        values, all_bool = (self._batch if self.batched else self._one_by_one)(texts, arguments)
        for bad in np.flatnonzero(~np.isfinite(values))[:1]:
            raise self._error(f"returned {values[bad]}, not a finite number,", texts[bad])
        if self.binary:
            for bad in np.flatnonzero((values != 0) & (values != 1))[:1]:
                raise self._error(f"is declared binary but returned {values[bad]:g}", texts[bad])
        binary = all_bool and bool(texts) if self.binary is None else self.binary
        return torch.from_numpy(values), binary

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return (start, end) of each match of `pattern` in text; none without a pattern."""
        return [m.span() for m in self.pattern.finditer(text)] if self.pattern else []

    def _one_by_one(
        self, texts: list[str], arguments: list[list[str]]
    ) -> tuple[np.ndarray[Any, np.dtype[np.float64]], bool]:
        values = np.empty(len(texts))  # (N,)
        all_bool = True
        for i, text in enumerate(texts):
            try:
                raw = self.fn(*(argument[i] for argument in arguments))
            except Exception as error:
                raise self._error(f"raised {_describe(error)}", text) from error
            value = _to_array(raw)
            if value is None or value.ndim != 0:
                raise self._error(f"returned {_shorten(repr(raw))}, not one number,", text)
            values[i] = value
            all_bool = all_bool and value.dtype == np.bool_
        return values, all_bool

    def _batch(
        self, texts: list[str], arguments: list[list[str]]
    ) -> tuple[np.ndarray[Any, np.dtype[np.float64]], bool]:
        if not texts:
            return np.empty(0), False
        which = f"a batch of {len(texts)} that begins with"
        try:
            raw = self.fn(*(list(argument) for argument in arguments))
        except Exception as error:
            raise self._error(f"raised {_describe(error)}", texts[0], which) from error
        values = _to_array(raw)
        if values is None or values.shape != (len(texts),):
            got = f"shape {values.shape}" if values is not None else _shorten(repr(raw))
            wanted = f"one number for each of {len(texts)} texts"
            raise self._error(f"returned {got}, not {wanted},", texts[0], which)
        return values.astype(np.float64), values.dtype == np.bool_

    def _error(self, what: str, text: str, which: str = "the text") -> FeatureError:
        return FeatureError(f"feature {self.name!r} {what} on {which}: {_shorten(repr(text))}")


@overload
def feature(
    fn: Callable[..., Any],
    *,
    name: str | None = None,
    batched: bool = False,
    with_prompt: bool = False,
    binary: bool | None = None,
) -> Feature: ...


@overload
def feature(
    fn: None = None,
    *,
    name: str | None = None,
    batched: bool = False,
    with_prompt: bool = False,
    binary: bool | None = None,
) -> Callable[[Callable[..., Any]], Feature]: ...


def feature(
    fn: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    batched: bool = False,
    with_prompt: bool = False,
    binary: bool | None = None,
) -> Feature | Callable[[Callable[..., Any]], Feature]:
    """Return a `Feature` made of any callable; also a decorator, bare or with arguments.

    Args:
        fn: `fn(text) -> bool or number`.
        name: its name; None for that of a function made with `def` (a lambda has none).
        batched: `fn(texts) -> sequence, array or tensor` of as many values.
        with_prompt: `fn(text, prompt)`, or `fn(texts, prompts)` if batched.
        binary: declare the values 0/1 (True) or numbers (False); None: binary if fn returns bools.

    Raises:
        TypeError: if fn is not callable or is a Feature already.
        ValueError: if there is no usable name.
    """
    if fn is None:
        return lambda fn: feature(
            fn, name=name, batched=batched, with_prompt=with_prompt, binary=binary
        )
    if name is None and callable(fn) and not isinstance(fn, Feature):
        name = getattr(fn, "__name__", None)
        if name is None or name == "<lambda>":
            raise ValueError(f"{fn!r} has no name of its own: pass dmgen.feature(..., name=...)")
    return Feature(fn, name or "", batched, with_prompt, binary)


def _strings(values: Sequence[str], what: str) -> list[str]:
    if isinstance(values, str):
        raise TypeError(f"{what} must be a list of strings; for a single one pass [{what[:-1]}]")
    values = list(values)
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{what} must be strings, got {_shorten(repr(value))}")
    return values


def _to_array(raw: object) -> np.ndarray[Any, np.dtype[Any]] | None:
    """Return raw as an array of bools, integers or floats; None if it is none of these."""
    if isinstance(raw, Tensor):
        raw = raw.detach().cpu()
        raw = raw.double() if raw.is_floating_point() else raw  # numpy has no bfloat16
    try:
        array = np.asarray(raw)
    except (TypeError, ValueError):
        return None
    return array if array.dtype.kind in "biuf" else None


def _shorten(text: str, length: int = _QUOTE_LENGTH) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {_shorten(str(error), 5 * _QUOTE_LENGTH)}"
