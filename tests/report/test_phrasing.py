"""The sentences of the pages."""

import math
from dataclasses import replace

import pytest
from conftest import make_evaluation

from dmgen import Moment, Pointwise, feature, features
from dmgen.estimates.score import Score
from dmgen.report import phrasing

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
