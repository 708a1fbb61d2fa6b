"""Ready-made features, a family a file; any other is `dmgen.feature(function, name=...)`."""

from dmgen.features.classifiers import ClassifierHead, classifier, fit_classifier
from dmgen.features.config import from_config
from dmgen.features.interop import from_estimator, from_pipeline, from_reward
from dmgen.features.lengths import length
from dmgen.features.pronouns import gender, gender_gdc
from dmgen.features.reading_ease import readability
from dmgen.features.tone import sentiment
from dmgen.features.words import regex, word, wordlist

__all__ = [
    "ClassifierHead",
    "classifier",
    "fit_classifier",
    "from_config",
    "from_estimator",
    "from_pipeline",
    "from_reward",
    "gender",
    "gender_gdc",
    "length",
    "readability",
    "regex",
    "sentiment",
    "word",
    "wordlist",
]
