"""Features for the gender of the person in a text, by pronouns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dmgen.constraints.feature import Feature
from dmgen.features.yaml_form import yaml_form
from dmgen.validation import check_known

# Predicates of one text and of several.
_PHRASES = {
    "female": (
        "is about a woman (more female than male pronouns)",
        "are about women (more female than male pronouns)",
    ),
    "male": (
        "is about a man (more male than female pronouns)",
        "are about men (more male than female pronouns)",
    ),
    "neither": ("is about neither a woman nor a man", "are about neither women nor men"),
}


@dataclass(frozen=True)
class _Majority:
    """The decision whether `kind` has strictly more pronouns; "neither" for a tie, 0 to 0 too."""

    kind: str
    female: frozenset[str]
    pattern: re.Pattern[str]

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        return [self._verdict(text) == self.kind for text in texts]

    def _verdict(self, text: str) -> str:
        pronouns = self.pattern.findall(text)
        n_female = sum(word.lower() in self.female for word in pronouns)
        n_male = len(pronouns) - n_female
        return "neither" if n_female == n_male else "female" if n_female > n_male else "male"


def gender(kind: str) -> Feature:
    """Return the feature "this text is about a woman", "about a man", or "about neither".

    Pronouns count in upper and lower case and as whole words ("he's" counts, "the" does not): she,
    her, hers, herself against he, him, his, himself. A text is female or male if that side has
    strictly more, else neither. Titles count too ("Her Majesty").

    Args:
        kind: "female", "male" or "neither"; also the feature's name.

    Raises:
        ValueError: if kind is none of these.
    """
    return _by_majority(kind, "", "she her hers herself", "he him his himself", re.IGNORECASE)


def gender_gdc(kind: str) -> Feature:
    """Return `gender` as the GDC papers count it, to compare rates with published ones.

    Only lower-case she, her, herself count against he, him, himself: not "She" at the head of a
    sentence, nor "his" and "hers". So more texts are "neither" than by `gender`.

    Args:
        kind: "female", "male" or "neither" (the papers' "other"); the name is "female_gdc" etc.

    Raises:
        ValueError: if kind is none of these.

    Source:
        Khalifa, Elsahar, Dymetman (2021), arXiv:2012.11635, and its released code.

    Differs from the paper:
        Words are found by their borders, not by NLTK's tokeniser; only a pronoun joined to a word
        by a hyphen or slash counts here and not there.
    """
    return _by_majority(kind, "_gdc", "she her herself", "he him himself", 0)


def _by_majority(kind: str, suffix: str, female: str, male: str, flags: int) -> Feature:
    check_known(kind, tuple(_PHRASES), "gender")
    words = "|".join(f"{female} {male}".split())
    pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", flags)
    majority = _Majority(kind, frozenset(female.split()), pattern)
    return Feature(
        majority,
        kind + suffix,
        batched=True,
        binary=True,
        pattern=pattern,
        phrase=_PHRASES[kind],
        config=yaml_form(f"gender{suffix}", kind=kind),
    )
