"""The cache of feature values: its size, what it forgets, and what it learns of binary features."""

import pytest

from dmgen.constraints.feature import feature
from dmgen.target.feature_cache import FeatureCache


def counting_feature():
    seen = []

    def count(text):
        seen.append(text)
        return len(text)

    return seen, feature(count, name="counted")


def test_it_is_bounded_and_forgets_the_oldest_first(world):
    seen, counted = counting_feature()
    cache = FeatureCache([counted], size=10)
    every = world.enumerate()
    expected = [float(len(t)) for t in every.texts]
    assert cache.values(every.prompts, every.texts)["counted"].tolist() == expected
    assert len(cache) == 10
    cache.values(every.prompts[-10:], every.texts[-10:])
    assert len(seen) == len(every)
    # A text that was forgotten is evaluated again, with the same value.
    assert cache.values(every.prompts, every.texts)["counted"].tolist() == expected
    assert len(seen) == 2 * len(every) - 10
    assert len(cache) == 10


def test_a_text_is_evaluated_once_for_each_prompt():
    seen = []
    reads = feature(lambda t, p: seen.append((t, p)) or len(p), name="p", with_prompt=True)
    cache = FeatureCache([reads])
    prompts, texts = ["x", "long", "x"], ["a", "a", "a"]
    assert cache.values(prompts, texts)["p"].tolist() == [1.0, 4.0, 1.0]
    assert seen == [("a", "x"), ("a", "long")]


def test_a_feature_is_binary_until_a_value_shows_otherwise():
    mixed = feature(lambda text: len(text) if text == "abc" else text == "a", name="mixed")
    cache = FeatureCache([mixed, feature(len, name="number"), feature(str.isalpha, name="alpha")])
    cache.values(["", ""], ["a", "b"])
    assert cache.binary == {"mixed": True, "number": False, "alpha": True}
    cache.values([""], ["abc"])
    assert cache.binary == {"mixed": False, "number": False, "alpha": True}


def test_no_texts_have_no_values():
    (column,) = FeatureCache([feature(len, name="number")]).values([], []).values()
    assert column.shape == (0,)
    with pytest.raises(ValueError, match="zip"):
        FeatureCache([feature(len, name="number")]).values([], ["a"])
