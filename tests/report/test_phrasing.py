"""The sentences and intervals of the pages."""

import pytest

from dmgen.report import phrasing, read


def test_what_was_asked_says_what_would_meet_it():
    row = {"metric": "E[female]", "target": 0.5}
    assert phrasing.asked_in_numbers(row, 0.05) == "mean of female = 0.5, met from 0.45 to 0.55"
    row["target"] = [0.4, 0.6]
    wanted = "mean of female between 0.4 and 0.6, met from 0.3 to 0.7"
    assert phrasing.asked_in_numbers(row, 0.1) == wanted


def test_an_interval_of_a_share_ends_at_one():
    row = {"value": 0.999, "stderr": 0.001, "n": 100, "signature": ""}
    low, high = read.interval(row | {"metric": "distinct_3"})
    assert high == 1.0
    assert read.interval(row | {"metric": "length"}) == (low, pytest.approx(0.999 + (0.999 - low)))
