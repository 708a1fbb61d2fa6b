import json
import re

import numpy as np
import pytest
import torch

import dmgen
from dmgen import features
from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature, FeatureError
from dmgen.features import ClassifierHead


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
        ({"readability": None}, features.readability()),
        ({"readability": 60}, features.readability(60)),
        ({"readability": {"maximum": 30}}, features.readability(maximum=30)),
    ],
)
def test_equals_the_call(config, expected):
    found = features.from_config(config)
    assert found == expected
    assert (found.phrase, found.noun, found.config) == (
        expected.phrase,
        expected.noun,
        expected.config,
    )


@pytest.mark.parametrize(
    ("made", "config"),
    [
        (features.gender("female"), {"gender": "female"}),
        (features.gender_gdc("neither"), {"gender_gdc": "neither"}),
        (features.wordlist("sports"), {"wordlist": "sports"}),
        (
            features.wordlist("sports", name="s", case_sensitive=True),
            {"wordlist": {"words": "sports", "name": "s", "case_sensitive": True}},
        ),
        (
            features.wordlist((word for word in ("goal", "own goal")), name="goals"),
            {"wordlist": {"words": ["goal", "own goal"], "name": "goals"}},
        ),
        (features.word("amazing"), {"word": "amazing"}),
        (
            features.word("US", case_sensitive=True),
            {"word": {"text": "US", "case_sensitive": True}},
        ),
        (features.regex(re.compile("(?i)[0-9]x")), {"regex": "(?i)[0-9]x"}),
        (features.regex("x", name="has x"), {"regex": {"pattern": "x", "name": "has x"}}),
        (features.length(), {"length": "words"}),
        (features.length("characters"), {"length": "characters"}),
        (features.readability(), {"readability": None}),
        (features.readability(np.float64(60)), {"readability": 60.0}),
        (features.readability(maximum=0), {"readability": {"maximum": 0.0}}),
        (
            features.readability(30, 60, name="fair"),
            {"readability": {"minimum": 30.0, "maximum": 60.0, "name": "fair"}},
        ),
    ],
)
def test_a_feature_carries_its_yaml_form(made, config):
    assert made.config == config
    again = features.from_config(json.loads(json.dumps(config)))
    assert again == made
    assert again.config == config


def test_what_exists_only_in_python_has_no_yaml_form():
    assert features.regex(re.compile("x", re.IGNORECASE)).config is None
    assert dmgen.feature(len).config is None
    assert features.from_reward(len).config is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gendre": "female"}, "unknown kind of feature 'gendre'; did you mean 'gender'"),
        ({"zzz": 1}, "unknown kind of feature 'zzz'.*gender, gender_gdc, length"),
        ({"readability": {"minimum": 60, "maximum": 30}}, "minimum 60 is above the maximum 30"),
        ({"sentiment": "happy"}, "positive, negative, neutral, compound"),
        ({"classifier": "heads/tone"}, "classifier: missing a required argument: 'label'"),
        ({"classifier": {"head": "h", "label": []}}, "at least one label"),
        ({"classifier": {"head": "h", "label": "a", "batch_size": 0}}, "batch_size"),
        ({"classifier": {"head": "h", "label": "a", "threshold": 2}}, r"probability in \(0, 1\]"),
        ({"classifier": {"head": "h", "label": "a", "name": " "}}, "one line and not blank"),
        ({"classifier": {"embed": "x"}}, "unknown argument of classifier 'embed'"),
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
    # The others take objects of Python, or make no feature.
    in_python = {"ClassifierHead", "fit_classifier", "constraint_from_config"}
    in_python |= {name for name in features.__all__ if name.startswith("from_")}
    assert listed == [name for name in features.__all__ if name not in in_python]


def test_sentiment():
    pytest.importorskip("vaderSentiment")
    found = features.from_config({"sentiment": "positive"})
    assert found == features.sentiment("positive")
    assert found.config == {"sentiment": "positive"}
    assert found.phrase == ("has sentiment positive", "have sentiment positive")


# ---------------------------------------------------------------- classifiers


def save_head(folder, base="letters"):
    """A head that says "b" where a text has more than one b."""
    weight, bias = torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, -3.0])
    ClassifierHead(weight, bias, ("a", "b"), base=base).save_pretrained(folder)
    return str(folder)


def count_b(texts):
    return torch.tensor([[float(text.count("b"))] for text in texts])


def test_a_classifier_loads_the_base_that_its_head_names_when_it_is_first_asked(tmp_path):
    loaded = []

    def embed(base):
        loaded.append(base)
        return count_b

    config = {"classifier": {"head": save_head(tmp_path), "label": "b"}}
    f = features.from_config(config, embed=embed)
    assert (f.name, f.binary, loaded) == ("b", True, [])
    assert f(["", "b", "bb", "abb"]).tolist() == [0, 0, 1, 1]
    assert f(["bbb"]).tolist() == [1]
    assert loaded == ["letters"]
    assert f == features.from_config(config, embed=embed)


def test_the_options_of_a_classifier(tmp_path):
    settings = {"label": ["b"], "threshold": None, "name": "how b", "batch_size": 2}
    config = {"classifier": {"head": save_head(tmp_path), **settings}}
    f = features.from_config(config, embed=lambda base: count_b)
    assert (f.name, f.binary) == ("how b", False)
    p = torch.sigmoid(torch.tensor([-3.0, -1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(f(["", "b", "bb"]), p)


def test_a_classifier_is_declared_without_reading_its_head(tmp_path):
    config = {"classifier": {"head": str(tmp_path / "head"), "label": ["b", "c"]}}
    f = features.from_config(config)
    assert (f.name, f.binary, f.config) == ("b or c", True, config)
    assert features.from_config(f.config) == f
    one = features.from_config({"classifier": {"head": "head", "label": ["b"]}})
    assert features.from_config(one.config) == one
    with pytest.raises(FeatureError, match=f"no classifier head in '{tmp_path}"):
        f(["b"])


@pytest.mark.parametrize(("head", "label"), [(5, "b"), ("head", 5), ("head", ["b", 1])])
def test_a_classifier_is_declared_with_text(head, label):
    with pytest.raises(TypeError, match=r"head must be|label must be"):
        features.from_config({"classifier": {"head": head, "label": label}})


def test_the_first_call_of_a_classifier_checks_its_head(tmp_path):
    folder = save_head(tmp_path)
    unknown = features.from_config({"classifier": {"head": folder, "label": "c"}})
    with pytest.raises(FeatureError, match=f"head in '{folder}': label 'c' is not among"):
        unknown(["b"])
    f = features.from_config({"classifier": {"head": folder, "label": "b"}})
    with pytest.raises(FeatureError, match=r"without its model, 'letters'.*embed="):
        f(["b"])
    f = features.from_config({"classifier": {"head": save_head(tmp_path, base=""), "label": "b"}})
    with pytest.raises(FeatureError, match="must name the model"):
        f(["b"])


def test_a_classifier_from_a_folder_has_the_yaml_form_of_its_folder(tmp_path):
    made = features.classifier(save_head(tmp_path), count_b, "b", threshold=0.9)
    config = {"classifier": {"head": str(tmp_path), "label": "b", "threshold": 0.9}}
    assert made.config == config
    read = features.from_config(config, embed=lambda base: count_b)
    assert read(["", "bb", "bbb"]).tolist() == made(["", "bb", "bbb"]).tolist()
    head = ClassifierHead.from_pretrained(tmp_path)
    assert features.classifier(head, count_b, "b").config is None


# ---------------------------------------------------------------- phrases


@pytest.mark.parametrize(
    ("made", "one", "many"),
    [
        (
            features.gender("female"),
            "is about a woman (more female than male pronouns)",
            "are about women (more female than male pronouns)",
        ),
        (
            features.gender_gdc("neither"),
            "is about neither a woman nor a man",
            "are about neither women nor men",
        ),
        (features.wordlist("sports"), "mentions sports", "mention sports"),
        (features.word("US"), "contains “US”", "contain “US”"),
        (features.regex("[0-9]"), "matches [0-9]", "match [0-9]"),
        (
            features.from_config({"classifier": {"head": "tone", "label": ["a", "b"]}}),
            "has classifier tone, a or b",
            "have classifier tone, a or b",
        ),
        (
            features.from_config({"classifier": {"head": "tone", "label": "b", "name": "joy"}}),
            "has joy",
            "have joy",
        ),
    ],
)
def test_a_family_says_how_its_features_are_phrased(made, one, many):
    assert made.phrase == (one, many)


@pytest.mark.parametrize(
    "made",
    [
        features.wordlist("sports", name="s"),
        features.wordlist(["ball"], name="s"),
        features.word("ball", name="s"),
        features.regex("ball", name="s"),
        features.readability(60, name="s"),
    ],
)
def test_a_name_of_ones_own_takes_the_place_of_the_phrase(made):
    assert (made.name, made.phrase) == ("s", None)


def test_a_number_is_called_by_its_noun():
    assert features.length().noun == "length in words"
    assert features.length("characters").noun == "length in characters"
    assert features.readability().noun is None


# ---------------------------------------------------------------- a family of the user's own


def rhymes(ending: str, *, n_lines: int = 2) -> Feature:
    """A family in one place: its values, its phrase; its YAML form is its name and arguments."""

    def value(text):
        return sum(line.endswith(ending) for line in text.split("\n")) >= n_lines

    phrase = (f"rhymes on -{ending}", f"rhyme on -{ending}")
    return Feature(value, f"rhymes:{ending}", binary=True, phrase=phrase)


@pytest.mark.parametrize(
    ("config", "value"), [({"rhymes": "at"}, 1), ({"rhymes": {"ending": "at", "n_lines": 3}}, 0)]
)
def test_a_family_of_the_users_own(config, value):
    f = features.from_config(config, families={"rhymes": rhymes})
    assert f(["the cat\nin a hat"]).tolist() == [value]
    assert f.phrase == ("rhymes on -at", "rhyme on -at")
    assert f.config == config


def test_families_are_checked_like_those_of_dmgen():
    with pytest.raises(ValueError, match="'rhyme'; did you mean 'rhymes'"):
        features.from_config({"rhyme": "at"}, families={"rhymes": rhymes})
    with pytest.raises(ValueError, match="argument of rhymes 'lines'; did you mean 'n_lines'"):
        features.from_config({"rhymes": {"lines": 2}}, families={"rhymes": rhymes})
    with pytest.raises(ValueError, match="'gender' is a family of dmgen already"):
        features.from_config({"gender": "female"}, families={"gender": rhymes})


# ---------------------------------------------------------------- constraints


def test_constraints():
    female, sports = features.gender("female"), features.wordlist("sports")
    read = features.constraint_from_config
    assert read({"pointwise": {"wordlist": "sports"}}) == Pointwise(sports)
    moment = {"moment": {"gender": "female"}, "target": 0.5}
    assert read(moment) == Moment(female, 0.5)
    assert read(moment | {"target": [0.4, 0.6]}) == Moment(female, (0.4, 0.6))
    assert read(moment | {"given": {"wordlist": "sports"}}) == Moment(female, 0.5, given=sports)
    own = read({"pointwise": {"rhymes": "at"}}, families={"rhymes": rhymes})
    assert own.feature.config == {"rhymes": "at"}


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("sports", TypeError, r"constraints\.0: a constraint is \{pointwise"),
        ({}, ValueError, r"constraints\.0: a constraint is \{pointwise"),
        ({"momnt": 1}, ValueError, r"'momnt' in constraints\.0; did you mean 'moment'"),
        ({"moment": {"gender": "female"}}, ValueError, r"constraints\.0: .* needs its target"),
        ({"pointwise": {"word": "a"}, "target": 1}, ValueError, "takes no target"),
        ({"moment": {"gender": "female"}, "target": "half"}, TypeError, "a target is a number"),
        ({"moment": {"gender": "female"}, "target": 1.5}, ValueError, r"\[0, 1\]"),
        ({"pointwise": {"wordlst": "sports"}}, ValueError, "did you mean 'wordlist'"),
    ],
)
def test_constraints_refused(config, error, message):
    with pytest.raises(error, match=message):
        features.constraint_from_config(config, where="constraints.0")
