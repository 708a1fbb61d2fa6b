"""How long a text is."""

from __future__ import annotations

from collections.abc import Sequence

from dmgen.constraints.feature import Feature

__all__ = ["length"]


def length(unit: str = "words") -> Feature:
    """Return the feature "length of the text", a number and not binary.

    Args:
        unit: "words" (separated by white space; the name is "length") or "characters" (Unicode
            code points, blanks included; the name is "length_characters").

    Raises:
        ValueError: if unit is neither.
    """
    if unit == "words":
        return Feature(_words, "length", batched=True, binary=False)
    if unit == "characters":
        return Feature(_characters, "length_characters", batched=True, binary=False)
    raise ValueError(f"unknown unit {unit!r}; there are words, characters")


def _words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def _characters(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]
