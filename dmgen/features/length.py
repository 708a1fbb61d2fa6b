"""The length of a text as a feature."""

from __future__ import annotations

from collections.abc import Sequence

from dmgen.constraints.feature import Feature
from dmgen.features.yaml_form import yaml_form
from dmgen.validation import check_known


def length(unit: str = "words") -> Feature:
    """Return the feature "length of the text", a number and not binary.

    Args:
        unit: "words" (separated by white space; the name is "length") or "characters" (Unicode
            code points, blanks included; the name is "length_characters").

    Raises:
        ValueError: if unit is neither.
    """
    check_known(unit, ("words", "characters"), "unit")
    return Feature(
        _words if unit == "words" else _characters,
        "length" if unit == "words" else "length_characters",
        batched=True,
        binary=False,
        noun=f"length in {unit}",
        config=yaml_form("length", unit=unit),
    )


def _words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def _characters(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]
