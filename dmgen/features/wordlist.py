"""Features that hold where a text contains some words or matches a pattern."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

from dmgen.constraints.feature import Feature
from dmgen.features.yaml_form import yaml_form
from dmgen.validation import check_known


@dataclass(frozen=True)
class _Contains:
    pattern: re.Pattern[str]
    # Whether combining accents are joined with their letters first: to a pattern, such an accent
    # is no part of a word.
    composed: bool = False

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        if self.composed:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        return [self.pattern.search(text) is not None for text in texts]


def wordlist(
    words: str | Iterable[str], *, name: str | None = None, case_sensitive: bool = False
) -> Feature:
    """Return the feature "the text contains at least one word of the list".

    Words match whole ("art" is not in "party"; it is in "state-of-the-art"), phrases with any
    white space between their words. dmgen's lexicons were written to match sentences of
    biographies on their topic: art, business, military, music, politics, religion, royalty,
    science, sports. One more, insults, lists words that abuse a person. It is a lower bound for
    toxicity: it misses threats, irony and slurs against groups, and counts quotations.

    Args:
        words: the name of one of these lexicons, or words and phrases of your own.
        name: the feature's name; None for that of a lexicon. A list of your own needs one.
        case_sensitive: whether case must agree.

    Raises:
        TypeError: if a word is not a string.
        ValueError: if there is no such lexicon, the list is empty or has a blank entry (it would
            match every text), or a list of your own has no name.
    """
    argument: Any = words
    phrase = None
    if isinstance(words, str):
        entries = _lexicon(words)
        phrase = (f"mentions {words}", f"mention {words}") if name is None else None
    elif name is None:
        raise ValueError("a word list of your own needs a name: wordlist(words, name=...)")
    elif isinstance(words, Iterable):
        entries = argument = tuple(words)
    else:
        raise TypeError(f"words must be a lexicon's name or a list of words, got {words!r}")
    return _contains(
        _whole_words(entries, case_sensitive),
        str(words) if name is None else name,
        composed=True,
        phrase=phrase,
        config=yaml_form("wordlist", words=argument, name=name, case_sensitive=case_sensitive),
    )


def word(text: str, *, name: str | None = None, case_sensitive: bool = False) -> Feature:
    """Return the feature "the text contains this word (or phrase)", whole.

    Args:
        text: the word.
        name: the feature's name; None for the word itself.
        case_sensitive: whether case must agree ("US", "us"); True in the GDC papers.

    Raises:
        TypeError: if it is not a string.
        ValueError: if it is blank.
    """
    pattern = _whole_words((text,), case_sensitive)
    return _contains(
        pattern,
        text if name is None else name,
        composed=True,
        phrase=(f"contains “{text}”", f"contain “{text}”") if name is None else None,
        config=yaml_form("word", text=text, name=name, case_sensitive=case_sensitive),
    )


def regex(pattern: str | re.Pattern[str], *, name: str | None = None) -> Feature:
    """Return the feature "the pattern is found somewhere in the text".

    Args:
        pattern: of Python's `re`, compiled or not; case counts unless it contains "(?i)". One that
            was compiled with flags outside its text has no YAML form.
        name: the feature's name; None for the pattern itself.

    Raises:
        TypeError: if the pattern is not one of strings.
        ValueError: if it is no regular expression.
    """
    source = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    if not isinstance(source, str):
        raise TypeError(f"a pattern must be a string or a compiled one of strings, got {pattern!r}")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{source!r} is no regular expression: {error}") from error
    return _contains(
        compiled,
        source if name is None else name,
        phrase=(f"matches {source}", f"match {source}") if name is None else None,
        config=yaml_form("regex", pattern=source, name=name)
        if re.compile(source) == compiled
        else None,
    )


def _contains(
    pattern: re.Pattern[str], name: str, *, composed: bool = False, **words: Any
) -> Feature:
    contains = _Contains(pattern, composed)
    return Feature(contains, name, batched=True, binary=True, pattern=pattern, **words)


@cache
def _lexicon(name: str) -> tuple[str, ...]:
    lexicons = {
        path.name.removesuffix(".txt"): path
        for path in (files(__package__) / "lexicons").iterdir()
        if path.name.endswith(".txt")
    }
    check_known(name, sorted(lexicons), "lexicon")
    return tuple(lexicons[name].read_text(encoding="utf-8").splitlines())


def _whole_words(words: Sequence[str], case_sensitive: bool) -> re.Pattern[str]:
    for entry in words:
        if not isinstance(entry, str):
            raise TypeError(f"words must be strings, got {entry!r}")
        if not entry.strip():
            raise ValueError(f"a blank word would match every text, got {entry!r}")
    if not words:
        raise ValueError("a word list needs at least one word")
    # Alternatives under their first letter: five times faster than one flat list of a hundred.
    # The longest first, so that a match marks the whole phrase and not the word it begins with.
    plain = {" ".join(unicodedata.normalize("NFC", entry).split()) for entry in words}
    by_letter = groupby(sorted(plain), lambda w: w[0])
    branches = []
    for letter, group in by_letter:
        tails = "|".join(_escape(w[1:]) for w in sorted(group, key=len, reverse=True))
        branches.append(f"{_escape(letter)}(?:{tails})")
    # Not \b, which finds no border after the last sign of "C++".
    source = rf"(?<!\w)(?:{'|'.join(branches)})(?!\w)"
    return re.compile(source, 0 if case_sensitive else re.IGNORECASE)


def _escape(text: str) -> str:
    """Return text as a pattern in which white space and apostrophes match all their variants."""
    return re.sub("['’]", "['’]", re.escape(text).replace(r"\ ", r"\s+"))
