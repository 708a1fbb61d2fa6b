import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmgen import features

KINDS = ["female", "male", "neither"]

# text, as a reader says it, as the GDC papers count it
TABLE = [
    ("", "neither", "neither"),
    ("A stone fell.", "neither", "neither"),
    ("Then she won.", "female", "female"),
    ("Then he won.", "male", "male"),
    ("She won.", "female", "neither"),
    ("He won.", "male", "neither"),
    ("HE WON.", "male", "neither"),
    ("The prize was hers.", "female", "neither"),
    ("It was his book.", "male", "neither"),
    ("She saw him.", "neither", "male"),
    ("he and she", "neither", "neither"),
    ("he, she and herself", "female", "female"),
    ("Her mother and his father met her.", "female", "female"),
    ("He saw himself.", "male", "male"),
    ("he's late and she'd know: him too", "male", "male"),
    ("she's late", "female", "female"),
    ('"her!"', "female", "female"),
    ("The other theory; there, shed, hero, this, heroine, ash, mother", "neither", "neither"),
    ("they themselves", "neither", "neither"),
    ("(she)\n(he)\n(she)", "female", "female"),
]


@pytest.mark.parametrize(("text", "reader", "gdc"), TABLE)
def test_table(text, reader, gdc):
    for kind in KINDS:
        assert features.gender(kind)([text]).item() == (kind == reader)
        assert features.gender_gdc(kind)([text]).item() == (kind == gdc)


SIDES = {"she": 1, "Her": 1, "HERS": 1, "herself": 1, "he": -1, "Him": -1, "his": -1, "it": 0}


@given(st.lists(st.sampled_from(sorted(SIDES))))
def test_counts_decide_and_kinds_exclude_one_another(words):
    balance = sum(SIDES[word] for word in words)
    expected = [balance > 0, balance < 0, balance == 0]
    assert [features.gender(kind)([" ".join(words)]).item() for kind in KINDS] == expected


def test_names_differ_and_values_are_declared_binary():
    made = [f(kind) for f, kind in itertools.product((features.gender, features.gender_gdc), KINDS)]
    assert [f.name for f in made] == [*KINDS, "female_gdc", "male_gdc", "neither_gdc"]
    assert all(f.binary for f in made)


def test_made_twice_it_is_the_same_feature():
    assert features.gender("female") == features.gender("female")
    assert features.gender("female") != features.gender_gdc("female")


def test_spans_mark_the_pronouns():
    text = "She met the hero and his dog."
    spans = features.gender("female").spans(text)
    assert [text[a:b] for a, b in spans] == ["She", "his"]


@pytest.mark.parametrize("make", [features.gender, features.gender_gdc])
@pytest.mark.parametrize("kind", ["woman", "Female", "", None])
def test_unknown_kind(make, kind):
    with pytest.raises(ValueError, match="female, male, neither"):
        make(kind)


def test_unknown_option():
    with pytest.raises(TypeError, match="variant"):
        features.gender("female", variant="gdc")
