"""Whom a text is about, by its pronouns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dmgen.constraints.feature import Feature

__all__ = ["gender", "gender_gdc"]

_KINDS = ("female", "male", "neither")


@dataclass(frozen=True)
class _Majority:
    """Whether `kind` has strictly more pronouns; "neither" if no side has more (0 to 0 too)."""

    kind: str
    female: frozenset[str]
    pattern: re.Pattern[str]

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        return [self._verdict(text) == self.kind for text in texts]

    def _verdict(self, text: str) -> str:
        found = self.pattern.findall(text)
        n_female = sum(word.lower() in self.female for word in found)
        n_male = len(found) - n_female
        return "neither" if n_female == n_male else "female" if n_female > n_male else "male"


def gender(kind: str) -> Feature:
    """Return the feature "this text is about a woman", "about a man", or "about neither".

    It counts pronouns as a reader would, in any case: she, her, hers, herself against he, him,
    his, himself, as whole words ("he's" counts, "the" does not). A text is female or male if that
    side has strictly more, else neither. Titles count too ("Her Majesty").

    Args:
        kind: "female", "male" or "neither"; also the feature's name.

    Raises:
        ValueError: if kind is none of these.
    """
    return _by_majority(kind, "", "she her hers herself", "he him his himself", re.IGNORECASE)


def gender_gdc(kind: str) -> Feature:
    """Return `gender` as the GDC papers count it, to compare rates with published ones.

    Only lower-case she, her, herself against he, him, himself: neither "She" at the head of a
    sentence nor "his" and "hers" count, so more texts are neither than a reader would say.

    Args:
        kind: "female", "male" or "neither" (the papers' "other"); the name is "female_gdc" etc.

    Raises:
        ValueError: if kind is none of these.

    Source: Khalifa, Elsahar, Dymetman (2021), arXiv:2012.11635, as in its released code. Differs
    from it: words are found by their borders, not by NLTK's tokeniser (only a pronoun joined to
    a word by a hyphen or slash counts here and not there).
    """
    return _by_majority(kind, "_gdc", "she her herself", "he him himself", 0)


def _by_majority(kind: str, suffix: str, female: str, male: str, flags: int) -> Feature:
    if kind not in _KINDS:
        raise ValueError(f"unknown gender {kind!r}; there are {', '.join(_KINDS)}")
    words = "|".join(f"{female} {male}".split())
    pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", flags)
    majority = _Majority(kind, frozenset(female.split()), pattern)
    return Feature(majority, kind + suffix, batched=True, binary=True, pattern=pattern)
