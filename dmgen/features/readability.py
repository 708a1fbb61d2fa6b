"""The reading ease of a text, by the length of its sentences and words."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dmgen.constraints.feature import Feature
from dmgen.features.yaml_form import yaml_form
from dmgen.validation import check_number

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s|$)")
# The full stop of a single capital or of one of these ends no sentence.
_ABBREVIATED = re.compile(
    r"(?<!\w)(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof|Rev|Hon|Gen|Col|Capt|Lt|Sgt|Sen|Gov|vs|No|c|ca)$"
)

_VOWELS = re.compile(r"[aeiouyàáâãäåæèéêëìíîïòóôõöøùúûüýœ]+")
# "late", "whole", "unique", but not "table", "acre"; "walked", but not "wanted", "settled";
# "makes", "holes", but not "boxes", "tables". After another vowel it belongs to that ("died").
_SILENT = re.compile(
    r"qu(?=e$)|(?<![aeiouy])(?:(?<![lr])|(?<=[aeiouy][lr]))e$"
    r"|(?<![aeioutdy])(?<![^aeiouyl]l)(?<!dr)ed$"
    r"|(?<![aeiouysxzcg])(?:(?<![cs]h)(?<!l)|(?<=[aeiouy]l))es$"
)
# Vowels side by side that are spoken apart, "appreciate", "piano", "criterion", "radio", "theory",
# "creation", "idea", "museum", "dual", "continuous", "society", "client", "science", "voyage",
# "studying", "poet", "chaos", "being"; and an m that is a syllable, "rhythm", "realism".
_APART = re.compile(
    r"i(?=at)|(?<![ctsg])i(?=a(?!t))|(?<![cgstxln])i(?=on)|(?<![cgstx])i(?=o(?!n)|u)"
    r"|(?<=e)o(?!u|p)|(?<=[rntv])ea(?=t[eio])|ea(?=$|li[st])|eum|(?<![qg])ua|uou|ie(?=t)"
    r"|(?<![ct])(?<!fr)ie(?=n)|(?<=sc)ie(?=n)|(?<=[aeo])y(?=[aiou]|ee)|y(?=i)|oe(?=[mt])|ao"
    r"|[eo]i(?=ng)|[st]hm$|sm$"
)


@dataclass(frozen=True)
class _Flesch:
    minimum: float | None
    maximum: float | None

    def __call__(self, texts: Sequence[str]) -> list[Any]:
        scores = [_reading_ease(text) for text in texts]
        if self.minimum is None and self.maximum is None:
            return [0.0 if score is None else score for score in scores]
        low = -math.inf if self.minimum is None else self.minimum
        high = math.inf if self.maximum is None else self.maximum
        return [score is not None and low <= score <= high for score in scores]


def readability(
    minimum: float | None = None, maximum: float | None = None, *, name: str | None = None
) -> Feature:
    """Return the feature "Flesch reading ease of the text", or whether it lies within bounds.

    `206.835 − 1.015 words / sentences − 84.6 syllables / words`

    Plain English has 60 to 70, a scientific paper less than 30; children's books exceed 90. The
    formula is made for English. A text without words has 0 and lies within no bounds. Sentences
    and syllables are those of `n_sentences` and `n_syllables`; a number in digits is no word.

    Args:
        minimum: the least reading ease, or None for no lower bound.
        maximum: the greatest, or None. With a bound the feature is binary, without it a number.
        name: the feature's name; None for "readability" with the bounds.

    Raises:
        TypeError: if a bound is not a number.
        ValueError: if a bound is not finite, or minimum is above maximum.

    Source:
        Flesch (1948), A new readability yardstick, Journal of Applied Psychology 32(3).
    """
    what = "a bound of the reading ease"
    minimum = None if minimum is None else check_number(what, minimum)
    maximum = None if maximum is None else check_number(what, maximum)
    if minimum is not None and maximum is not None and minimum > maximum:
        raise ValueError(f"the minimum {minimum:g} is above the maximum {maximum:g}")
    bounds = "" if minimum is None else f" >= {minimum:g}"
    bounds += "" if maximum is None else f" <= {maximum:g}"
    return Feature(
        _Flesch(minimum, maximum),
        f"readability{bounds}" if name is None else name,
        batched=True,
        binary=bool(bounds),
        config=yaml_form("readability", minimum=minimum, maximum=maximum, name=name),
    )


def n_sentences(text: str) -> int:
    """Return the number of sentences in a text, at least 1.

    A sentence ends in `.`, `!`, `?` or an ellipsis before a blank or the end, unless a full stop
    follows a single capital ("J. Smith") or a common abbreviation ("Dr."). An unfinished sentence
    at the end counts if it has a word: generated texts are often cut off.
    """
    ends = [
        match.end()
        for match in _SENTENCE_END.finditer(text)
        if not (match[0][0] == "." and _ABBREVIATED.search(_before(text, match)))
    ]
    pieces = zip([0, *ends], [*ends, len(text)], strict=True)
    return max(1, sum(_WORD.search(text, start, end) is not None for start, end in pieces))


def _before(text: str, match: re.Match[str]) -> str:
    """Return the last eight characters up to and with a match: an abbreviation and its border."""
    return text[max(0, match.start() - 8) : match.start()]


@lru_cache(maxsize=50_000)
def n_syllables(word: str) -> int:
    """Return the number of syllables in an English word, by rules, at least 1.

    It is the number of groups of vowels, less silent endings (-e, -ed, -es), plus pairs of vowels
    that are spoken apart (-ia-, -io-, ...); an accent keeps an ending from being silent. Of 154
    words from biographies that did not serve to write the rules, it counts 149 right and the others
    wrong by one.
    """
    word = unicodedata.normalize("NFC", word.lower()).replace("'", "").replace("’", "")
    n_vowels = len(_VOWELS.findall(word)) + len(_APART.findall(word))
    return max(1, n_vowels - (_SILENT.search(word) is not None))


def _reading_ease(text: str) -> float | None:
    text = unicodedata.normalize("NFC", text)
    words = _WORD.findall(text)
    if not words:
        return None
    syllables = sum(map(n_syllables, words))
    return 206.835 - 1.015 * len(words) / n_sentences(text) - 84.6 * syllables / len(words)
