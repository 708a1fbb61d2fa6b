import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmgen.features.labels import label_name, wanted

KNOWN = ("bad", "good", "great")
SCORES = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]])


@pytest.mark.parametrize(
    ("label", "threshold", "expected"),
    [
        ("good", "argmax", [False, True, False]),
        (["good", "great"], "argmax", [False, True, True]),
        ({"great", "bad"}, "argmax", [True, False, True]),
        ("good", 0.3, [True, True, True]),
        ("good", 0.5, [False, True, False]),
        (("good", "great"), 0.85, [False, False, True]),
    ],
)
def test_decisions(label, threshold, expected):
    decision = wanted(label, KNOWN, threshold)
    found = decision(SCORES)
    assert (found.tolist(), found.dtype, decision.binary) == (expected, torch.bool, True)


def test_without_a_threshold_it_is_the_probability_itself():
    decision = wanted(["good", "great"], KNOWN, None)
    torch.testing.assert_close(decision(SCORES), SCORES[:, 1:].sum(1).double())
    assert not decision.binary


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.sampled_from([1, 2]))
def test_a_set_and_its_complement_share_every_text(logits, n_wanted):
    scores = torch.tensor([logits], dtype=torch.float64).softmax(1)
    one, other = (wanted(list(x), KNOWN, "argmax") for x in (KNOWN[:n_wanted], KNOWN[n_wanted:]))
    assert one(scores) ^ other(scores)


def test_labels_that_do_not_exclude_one_another_have_no_probability_together():
    sigmoids = torch.tensor([[0.9, 0.8, 0.1]])
    assert wanted("good", KNOWN, 0.7)(sigmoids).tolist() == [True]
    assert wanted(["good", "great"], KNOWN, "argmax")(sigmoids).tolist() == [False]
    for threshold in (0.7, None):
        with pytest.raises(ValueError, match="exclude one another"):
            wanted(["good", "great"], KNOWN, threshold)(sigmoids)


def test_a_single_score_can_be_compared_but_always_wins():
    assert wanted("toxic", ["toxic"], 0.5)(torch.tensor([[0.6], [0.4]])).tolist() == [True, False]
    with pytest.raises(ValueError, match="all texts would be alike"):
        wanted("toxic", ["toxic"], "argmax")


@pytest.mark.parametrize("label", [[], KNOWN])
@pytest.mark.parametrize("threshold", ["argmax", 0.5, None])
def test_none_and_all_labels_are_refused(label, threshold):
    with pytest.raises(ValueError, match="all texts would be alike"):
        wanted(label, KNOWN, threshold)


def test_unknown_and_ambiguous_labels():
    with pytest.raises(ValueError, match=r"'awful' is not among .*'bad', 'good', 'great'"):
        wanted("awful", KNOWN, "argmax")
    with pytest.raises(ValueError, match="'a' is twice among"):
        wanted("a", ["a", "b", "a"], "argmax")


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, 80, math.nan])
def test_thresholds_out_of_range(threshold):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        wanted("good", KNOWN, threshold)


@pytest.mark.parametrize("threshold", [True, "max", [0.5]])
def test_thresholds_of_another_kind(threshold):
    with pytest.raises(TypeError, match="argmax"):
        wanted("good", KNOWN, threshold)


def test_names():
    assert label_name("good") == "good"
    assert label_name(["good", "great"]) == "good or great"
    assert label_name(set("hgfedcba")) == "a or b or c or d or e or f or g or h"
    assert label_name(1) == "1"
