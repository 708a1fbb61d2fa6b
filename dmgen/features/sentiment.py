"""The tone of a text, positive or negative, by the rules and lexicon of VADER."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from dmgen.constraints.feature import Feature
from dmgen.features.yaml_form import yaml_form
from dmgen.validation import check_known

_KINDS = ("positive", "negative", "neutral", "compound")
# VADER's authors call a text positive from 0.05 on and negative from -0.05 on.
_EDGE = 0.05


@dataclass(frozen=True)
class _Vader:
    kind: str

    def __call__(self, texts: Sequence[str]) -> list[Any]:
        analyzer = _analyzer()
        compounds = [analyzer.polarity_scores(text)["compound"] for text in texts]
        return (
            compounds if self.kind == "compound" else [_verdict(c) == self.kind for c in compounds]
        )


def sentiment(kind: str) -> Feature:
    """Return the feature "this text is positive (negative, neutral) in tone", or the tone's score.

    VADER adds up the valence of a text's words, with rules for negation, intensity, punctuation and
    capitals, and scales the sum to the compound score in [-1, 1]. A text is positive at 0.05 or
    more, negative at -0.05 or less, else neutral. The empty text and one without a word of the
    lexicon score 0.

    Args:
        kind: "positive", "negative" or "neutral", also the feature's name; or "compound" for the
            score itself (named "sentiment", not binary).

    Raises:
        ImportError: the package vaderSentiment is not installed.
        ValueError: if kind is none of these.

    Source:
        Hutto, Gilbert (2014), VADER: a parsimonious rule-based model for sentiment analysis of
        social media text, ICWSM.
    """
    check_known(kind, _KINDS, "sentiment")
    _analyzer()
    binary = kind != "compound"
    return Feature(
        _Vader(kind),
        kind if binary else "sentiment",
        batched=True,
        binary=binary,
        phrase=(f"has sentiment {kind}", f"have sentiment {kind}"),
        noun=f"sentiment {kind}",
        config=yaml_form("sentiment", kind=kind),
    )


def _verdict(compound: float) -> str:
    return "positive" if compound >= _EDGE else "negative" if compound <= -_EDGE else "neutral"


@cache
def _analyzer() -> Any:
    try:
        vader = import_module("vaderSentiment.vaderSentiment")
    except ImportError as error:
        raise ImportError(
            "sentiment needs the package vaderSentiment: pip install 'dmgen[sentiment]'"
        ) from error
    return vader.SentimentIntensityAnalyzer()
