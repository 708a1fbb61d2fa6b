import pytest

from dmgen import features


def test_words_and_characters():
    texts = ["", "one", "two  words\n", "漢字 é"]
    words, characters = features.length(), features.length("characters")
    assert words(texts).tolist() == [0, 1, 2, 2]
    assert characters(texts).tolist() == [0, 3, 11, 4]
    assert (words.name, characters.name) == ("length", "length_characters")
    assert words.binary is characters.binary is False


def test_made_twice_it_is_the_same_feature():
    assert features.length() == features.length("words") != features.length("characters")


def test_unknown_unit_or_option():
    with pytest.raises(ValueError, match="words, characters"):
        features.length("tokens")
    with pytest.raises(TypeError, match="per"):
        features.length(per="words")
