import pytest

from dmgen import features


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"gender": "female"}, features.gender("female")),
        ({"gender_gdc": "male"}, features.gender_gdc("male")),
        ({"wordlist": "sports"}, features.wordlist("sports")),
        (
            {"wordlist": {"words": ["goal", "keeper"], "name": "goals"}},
            features.wordlist(["goal", "keeper"], name="goals"),
        ),
        ({"word": "amazing"}, features.word("amazing")),
        (
            {"word": {"text": "US", "case_sensitive": True}},
            features.word("US", case_sensitive=True),
        ),
        ({"regex": "[0-9]{4}"}, features.regex("[0-9]{4}")),
        ({"length": "words"}, features.length()),
        ({"length": {}}, features.length()),
    ],
)
def test_equals_the_call(config, expected):
    assert features.from_config(config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gendre": "female"}, "unknown kind of feature 'gendre'; did you mean 'gender'"),
        ({"zzz": 1}, "unknown kind of feature 'zzz'.*gender, gender_gdc, length"),
        ({"word": {"txt": "US"}}, "unknown argument of word 'txt'; did you mean 'text'"),
        ({"word": {"name": "US"}}, "word: missing a required argument: 'text'"),
        ({}, "exactly one kind"),
        ({"word": "a", "regex": "b"}, "exactly one kind"),
        ({"gender": "woman"}, "female, male, neither"),
        ({"wordlist": "sprots"}, "unknown lexicon 'sprots'"),
        ({1: "a"}, "unknown kind of feature 1"),
    ],
)
def test_refused_with_a_hint(config, message):
    with pytest.raises(ValueError, match=message):
        features.from_config(config)


@pytest.mark.parametrize("config", ["female", ["gender", "female"], None])
def test_not_a_mapping(config):
    with pytest.raises(TypeError, match="gender"):
        features.from_config(config)


def test_every_public_feature_can_be_configured():
    with pytest.raises(ValueError, match="There are") as info:
        features.from_config({"?": 1})
    listed = str(info.value).split("There are ")[1].split(", ")
    assert listed == [name for name in features.__all__ if name != "from_config"]
