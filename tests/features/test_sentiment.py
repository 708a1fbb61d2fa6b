import sys
from importlib import import_module

import pytest

from dmgen import features

# The package exports the function under the module's own name.
tone = import_module("dmgen.features.sentiment")

KINDS = ["positive", "negative", "neutral"]


@pytest.fixture
def vader():
    return pytest.importorskip("vaderSentiment.vaderSentiment")


# text, verdict: plain, negated, intensified, without any valued word, empty
TABLE = [
    ("She was a wonderful, generous teacher.", "positive"),
    ("He was not a good man.", "negative"),
    ("His last book was a terrible failure!!!", "negative"),
    ("He was born in 1901 in a small town.", "neutral"),
    ("", "neutral"),
]


@pytest.mark.parametrize(("text", "verdict"), TABLE)
def test_table(vader, text, verdict):
    assert [features.sentiment(kind)([text]).item() == 1 for kind in KINDS] == [
        kind == verdict for kind in KINDS
    ]


def test_the_score_is_that_of_vader_and_the_edges_are_its_authors(vader):
    texts = [text for text, _ in TABLE] + ["good", "bad", "a good and a bad day", "fine", "GREAT!"]
    score = features.sentiment("compound")(texts)
    analyzer = vader.SentimentIntensityAnalyzer()
    assert score.tolist() == [analyzer.polarity_scores(text)["compound"] for text in texts]
    assert features.sentiment("positive")(texts).tolist() == (score >= 0.05).tolist()
    assert features.sentiment("negative")(texts).tolist() == (score <= -0.05).tolist()


@pytest.mark.parametrize(
    ("compound", "verdict"),
    [(0.05, "positive"), (0.049, "neutral"), (-0.049, "neutral"), (-0.05, "negative")],
)
def test_the_edges_themselves(compound, verdict, monkeypatch):
    class Constant:
        def polarity_scores(self, text):
            return {"compound": compound}

    monkeypatch.setattr(tone, "_analyzer", Constant)
    assert [kind for kind in KINDS if features.sentiment(kind)(["x"]).item()] == [verdict]


def test_names_and_equality(vader):
    made = [features.sentiment(kind) for kind in KINDS]
    assert [f.name for f in made] == KINDS
    assert all(f.binary for f in made)
    score = features.sentiment("compound")
    assert (score.name, score.binary) == ("sentiment", False)
    assert made[0] == features.sentiment("positive") != made[1]


def test_unknown_kind():
    with pytest.raises(ValueError, match="positive, negative, neutral, compound"):
        features.sentiment("happy")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    tone._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match=r"pip install 'dmgen\[sentiment\]'"):
        features.sentiment("positive")
