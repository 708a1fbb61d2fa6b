"""The sentences of the pages."""

import math
from dataclasses import replace

import pytest
from conftest import make_evaluation

from dmgen import EBM, Feature, Moment, Pointwise, TabularLM, feature, features
from dmgen.estimates.score import Score
from dmgen.report import phrasing
from dmgen.target.fit import TargetFit

FEMALE, SPORTS = features.gender("female"), features.wordlist("sports")
PLAIN = feature(lambda text: "x" in text, name="x", binary=True)


@pytest.mark.parametrize(
    ("constraint", "sentence"),
    [
        (Pointwise(SPORTS), "Every text mentions sports"),
        (Pointwise(PLAIN), "Every text has x"),
        (Moment(PLAIN, 0), "No text has x"),
        (Moment(SPORTS, 0.125), "12.5 % of the texts mention sports"),
        (Moment(SPORTS, (0.4, 0.6)), "Between 40 % and 60 % of the texts mention sports"),
        (Moment(features.length("words"), (3, 9)),
         "The mean of length in words is between 3 and 9"),
        (Moment(features.gender("neither"), 0.5, given=SPORTS),
         "Of the texts that mention sports, half are about neither women nor men"),
        (Moment(SPORTS, 1, given=PLAIN), "Of the texts that have x, every one mentions sports"),
        (Moment(SPORTS, 0, given=PLAIN), "Of the texts that have x, none mentions sports"),
    ],
)  # fmt: skip
def test_a_constraint_is_a_sentence(constraint, sentence):
    assert phrasing.request(constraint) == sentence


def test_a_request_in_numbers_has_the_range_that_meets_it():
    (row,) = make_evaluation().moments
    wanted = "mean of female = 0.5, met from 0.45 to 0.55"
    assert phrasing.request_in_numbers(row, 0.05) == wanted
    wanted = "mean of female between 0.4 and 0.6, met from 0.3 to 0.7"
    assert phrasing.request_in_numbers(replace(row, target=(0.4, 0.6)), 0.1) == wanted


def test_prices_that_are_not_finite_have_a_meaning():
    infinite = Score(math.inf, math.nan, 256)
    evaluation = replace(make_evaluation(), kl_policy_base=infinite, excess=infinite)
    meanings = [price.meaning for price in phrasing.prices(evaluation)]
    assert meanings[0] == "The policy writes texts to which the base assigns probability 0."
    assert meanings[2] == "It could not be measured."


def test_a_family_of_the_users_own_brings_its_phrase(tmp_path):
    """One function: its YAML form, its sentence in a report, and its name on disk."""

    def rhymes(ending):
        """Return the feature "the text ends in this syllable"."""
        return Feature(
            lambda text: text.endswith(ending),
            f"rhymes with {ending}",
            binary=True,
            phrase=(f"rhymes with “{ending}”", f"rhyme with “{ending}”"),
        )

    (half,) = [
        features.constraint_from_config(entry, families={"rhymes": rhymes})
        for entry in [{"moment": {"rhymes": "oon"}, "target": 0.5}]
    ]
    assert phrasing.request(half) == "Half of the texts rhyme with “oon”"
    base = TabularLM.random("on.", 4, eos=".", seed=0)
    target = EBM.fit(base, [half], n_samples=4000, seed=0)
    target.save(tmp_path)
    # Its function is the user's own, so a file alone knows its words, and not its values.
    read = TargetFit.load(tmp_path)
    assert phrasing.request(read.constraints[0]) == phrasing.request(half)
    loaded = EBM.load(tmp_path, base, [half])
    assert loaded == target
    assert str(loaded) == str(target)
