"""Ready-made features, one file for each family; `dmgen.feature` makes any other one."""

from dmgen.features.classifier import classifier
from dmgen.features.classifier_fit import fit_classifier
from dmgen.features.classifier_head import ClassifierHead
from dmgen.features.config import constraint_from_config, from_config
from dmgen.features.estimator import from_estimator
from dmgen.features.gender import gender, gender_gdc
from dmgen.features.length import length
from dmgen.features.pipeline import from_pipeline
from dmgen.features.readability import readability
from dmgen.features.rewards import from_reward
from dmgen.features.sentiment import sentiment
from dmgen.features.wordlist import regex, word, wordlist

__all__ = [
    "ClassifierHead",
    "classifier",
    "constraint_from_config",
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
