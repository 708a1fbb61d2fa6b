import pytest
import torch

from dmgen import features
from dmgen.constraints.feature import FeatureError
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
    assert features.from_config(config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gendre": "female"}, "unknown kind of feature 'gendre'; did you mean 'gender'"),
        ({"zzz": 1}, "unknown kind of feature 'zzz'.*gender, gender_gdc, length"),
        ({"readability": {"minimum": 60, "maximum": 30}}, "minimum 60 is above the maximum 30"),
        ({"sentiment": "happy"}, "positive, negative, neutral, compound"),
        ({"classifier": "heads/tone"}, "classifier: missing a required argument: 'label'"),
        ({"classifier": {"head": "nowhere", "label": "a"}}, "no classifier head in 'nowhere'"),
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
    in_python = {"ClassifierHead", "fit_classifier"}
    in_python |= {name for name in features.__all__ if name.startswith("from_")}
    assert listed == [name for name in features.__all__ if name not in in_python]


def test_sentiment():
    pytest.importorskip("vaderSentiment")
    assert features.from_config({"sentiment": "positive"}) == features.sentiment("positive")


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


def test_without_embed_a_classifier_is_checked_and_says_what_it_lacks(tmp_path):
    folder = save_head(tmp_path)
    with pytest.raises(ValueError, match="'c' is not among"):
        features.from_config({"classifier": {"head": folder, "label": "c"}})
    f = features.from_config({"classifier": {"head": folder, "label": "b"}})
    with pytest.raises(FeatureError, match=r"without its model, 'letters'.*embed="):
        f(["b"])


def test_a_head_that_names_no_base_cannot_be_loaded(tmp_path):
    folder = save_head(tmp_path, base="")
    with pytest.raises(ValueError, match="must name the base"):
        features.from_config({"classifier": {"head": folder, "label": "b"}})
